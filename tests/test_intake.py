"""What the files of a set are taken for: every layout gives its truth, or is refused with a reason.

Sets are written in a small language: `train/good/{}.png*3` are three files, numbered from 0.
"""

import io
import random
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny, write_image, write_images
from PIL import Image
from test_data import dicom

from config import UserError
from data import (
    ABNORMAL, NORMAL, SPLITS, BadImage, FolderSource, Intake, Source, decode_image, flow)
from evaluate import evaluate, load_run
from train import check, train

pydicom = pytest.importorskip("pydicom")


class Files(Source):
    """A set of which only names and tables are there; masks are white, those called black not."""

    def __init__(self, names: list[str], tables: dict[str, str | bytes], normal: str = "") -> None:
        self.spec, self.name, self.tables, self.left_out = "here", "here", tables, Counter()
        Intake(self, sorted([*names, *tables]), normal)

    def read_file(self, name: str) -> bytes:
        if name in self.tables:
            text = self.tables[name]
            return text if isinstance(text, bytes) else text.encode()
        Image.new("L", (8, 8), 0 if "black" in name else 255).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    def is_image(self, name: str) -> bool:
        return name.endswith(".840")


def expand(text: str) -> list[str]:
    found = []
    for word in text.split():
        pattern, _, count = word.partition("*")
        found += [pattern.replace("{}", str(i)) for i in range(int(count or 1))]
    return found


def rows(header: str, pattern: str, *labels: str, separator: str = ",", end: str = "\n") -> str:
    """A table with one row a label; {} in the pattern is its number, LABEL its label."""
    lines = [header, *(pattern.replace("{}", str(i)).replace("LABEL", label)
                       for i, label in enumerate(labels))]
    return end.join(line.replace("|;", separator) for line in lines)


FIVE = ("Normal", "Normal", "Normal", "Mass", "Mass")
ZERO = ("0", "0", "0", "1", "1")
IMG = "img/{}.png*5"


def listed(header: str, pattern: str, *labels: str) -> dict:
    return {"list.csv": rows(header, pattern, *(labels or FIVE))}


# Files, tables, --normal, and what comes of it: normal/abnormal and words of the account, or what a
# refusal says.
CASES: dict[str, tuple] = {
    "radiography": ("S/Normal/images/N{}.png*3 S/COVID/images/C{}.png*2 S/Normal/masks/N{}.png*3 "
                    "S/COVID/masks/C{}.png*2 S/COVID.xlsx", {}, "", "3/2",
                    "no lesions", "1 files ending in .xlsx"),
    "rsna": ("train/p{}.dcm*6 test/t{}.dcm*2", {
        "labels.csv": rows("patientId,x,y,width,height,Target", "p{},LABEL", ",,,,0", ",,,,0",
                           ",,,,0", "1,1,9,9,1", "1,1,9,9,1", ",,,,0"),
        "class.csv": rows("patientId,class", "p{},LABEL", "Normal", "Normal", "Normal", "Opacity",
                          "Opacity", "No Opacity / Not Normal"),
        "sample_submission.csv": "patientId,PredictionString\nt0,0\nt1,0\n"}, "", "3/2",
        "2 images", "tables disagree: 0 + No Opacity / Not Normal", "2 not listed in a table"),
    "several rows": ("train/{}.png*4", {"train.csv": rows(
        "image_id,class_name,rad_id,x_min,y_min,x_max,y_max", "LABEL", "0,No finding,R1,,,,",
        "0,No finding,R2,,,,", "1,No finding,R1,,,,", "1,Mass,R2,1,1,9,9", "2,Mass,R1,1,1,9,9",
        "3,No finding,R1,,,,", "3,No finding,R2,,,,")}, "", "2/2", "2 images"),
    "one column a finding": (" ".join(f"t/patient{i}/study1/v{v}.jpg" for i in range(4)
                                      for v in "12"), {"train.csv": rows(
        "Path,Sex,Frontal/Lateral,No Finding,Edema,Mass", "C/t/patientLABEL", *(
            f"{i}/study1/v{v}.jpg,0,{side},{found}" for i, found in enumerate((
                "1.0,,", "1.0,,-1.0", ",1.0,", ",-1.0,1.0"))
            for v, side in (("1", "Frontal"), ("2", "Lateral"))))}, "", "1/2",
        "4 not a frontal view", "contradictory: Mass + No Finding", "from the names of files"),
    "folders": ("Training/notumor/a{}.jpg*2 Testing/notumor/b{}.jpg*2 Training/glioma/c{}.jpg "
                "Testing/glioma/d{}.jpg", {}, "", "4/2", "train, test: prescribed"),
    "no classes": ("no/{}.jpg*3 yes/{}.jpg*2 pred/{}.jpg*4 results/no/{}.jpg", {}, "", "3/2",
                   "4 in pred, which is no class", "1 in results/no"),
    "img and label": ("train/good/{}.png*2 test/good/img/{}.png*2 test/good/label/black{}.png*2 "
                      "test/Ungood/img/{}.png*2 test/Ungood/label/{}.png*2", {}, "", "4/2",
                      "2 pair with abnormal"),
    "black masks": ("train/good/{}.png*2 ground_truth/good/{}_mask_black.png*2 test/bad/{}.png*2 "
                    "ground_truth/bad/{}_mask.png*2", {}, "", "2/2", "2 pair with abnormal"),
    "mask folder": ("normal_dir/{}.png*3 abnormal_dir/{}.png*2 mask_dir/{}.png*2", {}, "", "3/2",
                    "2 pair with abnormal"),
    "masks beside": ("normal/n{}.png*3 sick/a{}.png*3 sick/a0_mask.tif sick/a1-mask.png "
                     "sick/mask_a2.png sick/a0_gt.png sick/a0_mask_1.png", {}, "", "3/3",
                     "5 pair with abnormal"),
    "patients in names": (" ".join(f"{p}/{k}/{k}-{i}-1.jpeg" for p in ("train", "test")
                                   for k in ("NORMAL", "CNV") for i in range(100, 102)), {}, "",
                          "4/4", "from the names of files"),
    "patient folders": ("normal/P-{}/x.png*5 ill/P-{}/x.png*5 ill/P-{}/y.png*5", {}, "", "5/10",
                        "from the names of folders"),
    "npz": ("x.npz", {}, "", "refused", r"numpy\.load"),
    "names alone": ("c/X_{}_0.png*3 c/X_{}_1.png*2", {}, "", "refused",
                    r"path,label .*c/X_0_0\.png,normal"),
    "two hospitals": ("A/normal/{}.png*3 B/ill/{}.png*2", {}, "", "3/0", "2 in B/ill",
                      "two places"),
    "above the split": ("NORMAL/train/{}.png*2 NORMAL/test/{}.png*2 ILL/test/{}.png*2", {}, "",
                        "4/2", "train, test: prescribed"),
    "grades": ("Train/0/{}.png*3 Test/0/{}.png*2 Test/1/{}.png*2 Test/2/{}.png", {}, "", "5/3",
               "2 1 -> abnormal"),
    "numbered": ("0_Normal/{}.png*3 1_Ill/{}.png*2", {}, "", "3/2"),
    "in words": ("Normal_cases/{}.png*3 Bengin_cases/{}.png*2 normal-(1)/{}.png", {}, "", "4/2"),
    "unsure folder": ("No_DR/{}.png*3 Mild/{}.png*2", {}, "", "refused", "No_DR may mean normal"),
    "decided": ("No_DR/{}.png*3 Mild/{}.png*2", {}, "no dr", "3/2", "No_DR 3 -> normal"),
    "unknown word": ("normal/{}.png*3 Unlabeled/{}.png*2", {}, "", "3/0", "called Unlabeled"),
    "both": ("normal/{}.png*3 normal/abnormal/{}.png*2", {}, "", "3/0", "normal and abnormal"),
    "no ending": ("normal/1.2.{}.840*3 ill/{}.dicom*2", {}, "", "3/2"),
    "beside a table": ("train/{}.png*5", {"train/metadata.csv": rows(
        "file_name,label", "{}.png,LABEL", *FIVE)}, "", "3/2", "Normal 3 -> normal"),
    "json lines": ("{}.png*5", {"metadata.jsonl": rows(
        '{"file_name": "x.png", "label": 1}', '{"file_name": "{}.png", "label": LABEL}', *ZERO)},
        "", "3/2"),
    "prescribed column": (IMG, listed(",image,Label,Dataset_type,age", "{},{}.png,LABEL",
                                      *("Normal,TRAIN,1", "Normal,TRAIN,1", "Normal,TEST,1",
                                        "Mass,TEST,1", "Mass,TRAIN,1")), "", "3/2",
                          "prescribed by the column Dataset_type", "columns of list.csv: age"),
    "semicolons": (IMG, {"l.csv": "\ufeff" + rows("path|;label|;patient", "img/{}.png|;LABEL|;P",
                                                  *ZERO, separator=";", end="\r\n")}, "", "3/2",
                   "from the column patient"),
    "backslashes": (IMG, listed("path,label", "img\\{}.png,LABEL"), "", "3/2"),
    "another place": (IMG, listed("path,label", "/old/place/img/{}.png,LABEL"), "", "3/2"),
    "above": (IMG, {"lists/l.csv": rows("path,label", "../img/{}.png,LABEL", *FIVE)}, "", "3/2"),
    "quotes": (IMG, listed("path, label", 'img/{}.png, "LABEL"') | {"empty.csv": ""}, "", "3/2"),
    "utf-16": (IMG, {"l.txt": rows("path|;label", "img/{}.png|;LABEL", *FIVE, separator="\t",
                                   end="\r\n").encode("utf-16")}, "", "3/2"),
    "cp1252": (IMG, {"l.csv": ("sep=;\n" + rows("Bild|;Befund", "{}.png|;LABEL", "normal", "normal",
                                                "normal", "Erguß", "Erguß", separator=";")
                               ).encode("cp1252")}, "", "3/2", "Erguß 2 -> abnormal"),
    "lists": (IMG, listed("path,label", "{}.png,\"['LABEL']\""), "", "3/2"),
    "floats": (IMG, listed("path,label", "{}.png,LABEL.0", *ZERO), "", "3/2"),
    "without header": ("train/{}.png*5 test/t{}.png*2", {
        "train.txt": rows("", "p{} {}.png LABEL rsna", *("negative", "negative", "positive")),
        "test.txt": "q t0.png positive rsna\nq t1.png negative rsna\n"}, "", "3/2",
        "2 not listed", "prescribed by the names of tables"),
    "contradictory": (IMG, listed("path,label", "{}.png,LABEL", "normal;", "No Finding|Devices",
                                  '"Normal, scar"', "Mass|Edema", "No Finding"), "", "2/1",
                      "contradictory: Devices + No Finding"),
    "unsure words": (IMG, listed("path,label", "{}.png,LABEL", "normal", "No findings", "N",
                                 "Normal study", "Mass"), "", "refused",
                     "N may mean normal or not; .*--normal .*No findings 1"),
    "no normal word": (IMG, listed("path,dx", "{}.png,LABEL", "nv", "nv", "nv", "mel", "mel"), "",
                       "refused", "nv 3 .*mel 2 .*--normal"),
    "named normal": (IMG, listed("path,dx", "{}.png,LABEL", "nv", "nv", "nv", "mel", "mel"), "NV",
                     "3/2", "nv 3 -> normal"),
    "named, not there": (IMG, listed("path,dx", "{}.png,LABEL"), "nv", "refused", "is no nv"),
    "named, another there": (IMG, listed("path,dx", "{}.png,LABEL"), "Mass", "refused",
                             "Normal means normal, too"),
    "a column named": (IMG, listed("image,NV,MEL", "{},LABEL", "1.0,0", "1.0,0", "0,1", "0,1",
                                   "0,1"), "nv", "2/3"),
    "turned round": (IMG, listed("image,normal", "{},LABEL", *ZERO), "", "2/3"),
    "many grades": (IMG, listed("path,label", "{}.png,LABEL", *"01234"), "", "refused",
                    "label 4 is neither"),
    "folder against table": ("normal/{}.png*3 abnormal/a{}.png*2", listed(
        "path,label", "LABEL", "normal/0.png,1", "normal/1.png,0", "normal/2.png,0",
        "abnormal/a0.png,1", "abnormal/a1.png,1"), "", "2/2", "1 table and folder disagree"),
    "another split": ("train/0.png test/1.png", listed("path,label", "LABEL", "test/0.png,0",
                                                       "test/1.png,0"), "", "1/0"),
    "one name in two folders": ("train/a/{}.png*4 test/a/{}.png*2", {
        "train/l.csv": "id,label\n0,normal\n1,normal\n2,normal\n3,Mass\n",
        "test/l.csv": "id,label\n0,normal\n1,Mass\n"}, "", "4/2", "train, test: prescribed"),
    "two files of one name": ("a/0.png b/1.png", listed(
        "path,label", "LABEL", "a/0.png,0", "x/b/1.png,1", "y/b/1.png,0"), "", "1/0",
        "1 listed under two names"),
    "two columns": (IMG, listed("path,a,b", "{}.png,LABEL,LABEL"), "", "refused",
                    "no column says|a, b"),
    "patients with spaces": (IMG, listed("path,label,Patient ID", "{}.png,LABEL", "0,7", "0,7.0",
                                         "0,nan", "1,", "1,8"), "", "3/2", "2 images name nobody"),
    "x-rays and CT": (IMG, listed("filename,finding,view,modality", "{}.png,LABEL",
                                  "No Finding,PA,X-ray", "No Finding,L,X-ray", "No Finding,PA,CT",
                                  '"COVID-19, ARDS",AP,X-ray', "todo,PA,X-ray"), "", "1/1",
                      "1 not an X-ray", "1 not a frontal view", "1 unknown: todo"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_set_is_what_it_is_or_refused(name: str) -> None:
    names, tables, normal, wanted, *says = CASES[name]
    try:
        source = Files(expand(names), tables, normal)
    except UserError as error:
        assert wanted == "refused" and re.search(says[0], str(error)), error
        return
    labels = Counter(s.label for s in source.samples)
    text = "\n".join([*map(": ".join, flow(source)), *source.careful])
    assert f"{labels[NORMAL]}/{labels[ABNORMAL]}" == wanted, text
    assert all(part in text for part in says), text


def wide(top: int, seed: int) -> Image.Image:
    ramp = np.linspace(0, top, 64 * 64).reshape(64, 64)
    return Image.fromarray((ramp + seed % 7 * (ramp < top / 2)).astype(np.uint16))


def test_a_16_bit_set_has_one_scale_that_is_stored_with_the_run(tmp_path: Path) -> None:
    for i in range(70):
        (file := tmp_path / "set" / ("ill" if i % 7 == 6 else "normal") / f"{i}.png").parent.mkdir(
            parents=True, exist_ok=True)
        wide(4200 if i % 2 else 4000, i).save(file, pnginfo=None, compress_level=i % 9)
    folder, = train(tiny(tmp_path / "runs", data=str(tmp_path / "set"), samples=None, epochs=1))
    run = load_run(folder)
    assert run.config.grey_bits == 14
    source = FolderSource(str(tmp_path / "set"))
    means = [float(x.float().mean()) for x, _ in run.stream(source, source.samples, 1)]
    assert max(means) < 1.1 * min(means) and max(means) < 40
    assert "14 of 16 bits in use" in (folder / "run.log").read_text()


def test_signed_values_are_refused_and_padding_is_left_out_of_the_stretch() -> None:
    for low in (-1024, 70_000):
        Image.fromarray(np.full((8, 8), low, np.int32)).save(file := io.BytesIO(), "TIFF")
        with pytest.raises(BadImage, match="signed or of more than 16 bits"):
            decode_image(file.getvalue(), 8)
    plain = decode_image(dicom("MONOCHROME2"), 64)
    raw = np.frombuffer(pydicom.dcmread(io.BytesIO(dicom("MONOCHROME2"))).PixelData, np.uint16)
    padded = raw.reshape(64, 64).copy()
    padded[:9] = 65535
    for kind, seen in (("MONOCHROME2", plain), ("MONOCHROME1", 255 - plain)):
        found = decode_image(dicom(kind, PixelData=padded.tobytes(), PixelPaddingValue=65535,
                                   BitsStored=16, HighBit=15), 64)
        assert not found[:9].any() and np.abs(found[9:].astype(int) - seen[9:]).max() <= 1


def test_identical_files_are_kept_once_and_in_test(tmp_path: Path) -> None:
    for i, name in enumerate(("train/normal/a", "train/normal/b", "test/ill/c")):
        write_image(tmp_path / f"{name}.bmp", i)
    for one, other in (("train/normal/a", "test/normal/a2"), ("train/normal/b", "backup/normal/b"),
                       ("test/ill/c", "test/ill/c2")):
        write_image(tmp_path / f"{other}.bmp", "abc".index(one[-1]))
    nearly = tmp_path / "train/normal/nearly.bmp"
    nearly.write_bytes((tmp_path / "train/normal/a.bmp").read_bytes()[:-1] + b"x")
    source = FolderSource(str(tmp_path))
    assert [s.key for s in source.samples] == [
        "test/ill/c.bmp", "test/normal/a2.bmp", "train/normal/b.bmp", "train/normal/nearly.bmp"]
    assert source.left_out["identical to another image"] == 2
    write_image(tmp_path / "train/normal/ill.bmp", 2)
    source = FolderSource(str(tmp_path))
    assert source.left_out["identical, with labels that contradict"] == 3


def test_check_tells_what_training_would_stumble_over(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_images(tmp_path / "train/normal", 60)
    write_images(tmp_path / "test/ill", 9, 60)
    (tmp_path / "train/normal/gone.png").symlink_to("/gone/1.png")
    (tmp_path / "test/ill/page.png").write_text("<html>")
    first, second = (Image.open(tmp_path / f"test/ill/06{i}.png") for i in (0, 1))
    first.save(tmp_path / "test/ill/pages.tif", save_all=True, append_images=[second])
    config = tiny(tmp_path / "runs", data=str(tmp_path), samples=None)
    check(config)
    told = capsys.readouterr().out
    for text in ("1 links to nothing, pipes or devices", "normal 60 -> normal; ill 11 -> abnormal",
                 "1 of 71 images that were looked at cannot be read as images, e.g. test/ill/page",
                 "have several pages or frames, of which the first is taken, e.g. test/ill/pages",
                 "all images of the test split are abnormal"):
        assert text in told, told
    for i in range(60):
        Image.new("L", (40 + i, 40)).save(tmp_path / f"train/normal/{i:03d}.png")
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(UserError, match="looked at are of one grey"):
        check(config)


def test_the_words_for_normal_go_with_the_run(tmp_path: Path) -> None:
    for i in range(70):
        write_image(tmp_path / "set" / ("nv" if i < 60 else "mel") / f"{i}.png", i)
        write_image(tmp_path / "other" / ("ok" if i < 6 else "mel") / f"{i}.png", 99 + i)
    config = tiny(tmp_path / "runs", data=str(tmp_path / "set"), samples=None, epochs=1)
    with pytest.raises(UserError, match=r"nv 60 .*mel 10 .*--normal"):
        train(config)
    runs = train(replace(config, normal="nv"))
    metrics, = evaluate(runs)
    assert metrics["n_abnormal"] == 10
    page = (runs[0] / "eval/set/report.html").read_text()
    assert "Flow of images" in page and "nv 60 -&gt; normal; mel 10 -&gt; abnormal" in page
    with pytest.raises(UserError, match=r"--normal nv: there is no nv; its words: mel 64 .*ok 6 "):
        evaluate(runs, str(tmp_path / "other"))
    metrics, = evaluate(runs, str(tmp_path / "other"), normal="OK")
    assert (metrics["n_normal"], metrics["n_abnormal"]) == (6, 64)


NORMAL_WORDS = ("normal", "NORMAL", "Healthy", "No Finding", "no_tumor", "0_normal", "good",
                "Control", "Normal cases", "negative")
ABNORMAL_WORDS = ("pneumonia", "Ill", "1_glioma", "Lung Opacity", "abnormal", "defect", "CNV")
UNSURE_WORDS = ("N", "No_DR", "non-covid", "unremarkable", "normal-like")
SPLIT_WORDS = {"train": ("train", "Training", "TRAIN", "train_set"), "val": ("val", "valid"),
               "test": ("test", "Testing", "test_images")}


def random_set(rng: random.Random) -> tuple[list[str], dict, dict[str, tuple[int, str, str]]]:
    """A set in some layout: its files, its tables, and the truth (label, patient or "", split or
    "") of each of its images."""
    pick = rng.choice
    by_table, split_place = rng.random() < 0.5, pick(("", "", "above", "below"))
    words = [pick(NORMAL_WORDS if rng.random() < 0.9 else UNSURE_WORDS), pick(ABNORMAL_WORDS)]
    splits = {name: pick(given) for name, given in SPLIT_WORDS.items()}
    root, inner = pick(("", "data/", "Set 1/raw/")), pick(("", "", "images/", "png/"))
    with_patients = rng.random() < 0.4
    masks, ending = pick(("", "", "beside", "folder")), pick((".png", ".jpg", ".dcm", ".TIF"))
    names, truth = [], dict[str, tuple[int, str, str]]()
    for i in range(rng.randint(20, 40)):
        label, split = int(rng.random() < 0.4), SPLITS[i // 2 % 3] if split_place else ""
        patient = f"patient{i // 2}" if with_patients else ""
        folder = "" if by_table else f"{words[label]}/"
        if split:
            folder = (f"{splits[split]}/{folder}" if split_place == "above"
                      else f"{folder}{splits[split]}/")
        folder = f"{root}{folder}"
        below = f"{patient}/" if patient and not by_table else ""
        name = f"{folder}{inner}{below}x{i:03d}{ending}"
        truth[name] = label, patient, split
        if masks == "beside":
            names.append(f"{name[: -len(ending)]}{pick(('_mask', '-mask', '_seg'))}.png")
        elif masks == "folder":
            names.append(f"{folder}{pick(('masks', 'ground_truth'))}/{below}x{i:03d}.png")
    names += [f"{root}pred/p{i}.png" for i in range(rng.randint(0, 3))] * (not by_table)
    names += ["notes.pdf", "._x.png", f"{root}.DS_Store", "README.md"][: rng.randint(0, 4)]
    tables = {}
    if by_table:
        separator, style = pick(",;\t"), pick(("word", "number", "float", "list", "columns"))
        path = pick(("whole", "name", "stem", "absolute", "backslash"))
        as_column = split_place and rng.random() < 0.5
        header = [pick(("path", "Image Index", "file_name", "image")), *(
            ["No Finding", "Mass", "Edema"] if style == "columns" else
            [pick(("label", "Class", "diagnosis", "Finding Labels"))])]
        header += [pick(("Patient ID", "patient", "subject_id"))] * with_patients
        header += [pick(("split", "dataset_type", "fold"))] * bool(as_column) + ["age"]
        lines = [separator.join(header)]
        for name, (label, patient, split) in truth.items():
            cell = {"whole": name, "name": name.rpartition("/")[2], "absolute": f"/mnt/disk/{name}",
                    "stem": name.rpartition("/")[2].rpartition(".")[0],
                    "backslash": name.replace("/", "\\")}[path]
            said = {"word": [words[label]], "number": [str(label)], "float": [f"{label}.0"],
                    "list": [f"['{words[label]}']"],
                    "columns": [("1.0", "", ""), ("", "1.0", "")][label]}[style]
            lines.append(separator.join([cell, *said, *([patient] * with_patients), *(
                [splits.get(split, "").split("_")[0]] * bool(as_column)), str(rng.randint(1, 90))]))
        encoding = pick(("utf-8", "utf-8-sig", "utf-16"))
        tables[pick(("list.csv", f"{root}meta/all.txt", "a.tsv"))] = pick(("\n", "\r\n")).join(
            lines).encode(encoding)
    return [*names, *truth], tables, truth


@pytest.mark.drill
def test_random_layouts_give_their_truth_or_are_refused_with_a_reason() -> None:
    given = Counter[str]()
    for seed in range(1000):
        names, tables, truth = random_set(random.Random(seed))
        try:
            source = Files(names, tables)
        except UserError as error:
            assert re.search("normal|label", str(error)) and len(str(error)) > 40, (seed, error)
            given["refused"] += 1
            continue
        found = {s.key: s for s in source.samples}
        assert found.keys() <= truth.keys(), (seed, found.keys() - truth.keys())
        wrong = [(k, s) for k, s in found.items() if (s.label, s.split) != truth[k][::2]]
        assert not wrong, (seed, wrong[0], truth[wrong[0][0]], tables)
        patients = defaultdict(set)
        for key, s in found.items():
            if truth[key][1]:
                patients[truth[key][1]].add(s.patient)
        assert all(len(names) == 1 for names in patients.values()), (seed, patients)
        assert sum(source.left_out.values()) >= len(truth) - len(found), seed
        given["all" if len(found) == len(truth) else "some"] += 1
    assert given["all"] > 700 and given["some"] < 100, given
