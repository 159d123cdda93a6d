"""Another site: a threshold from its normal images, notice of drift, the model taken elsewhere."""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from stress import change

import evaluate as ev
from config import UserError
from data import draw_phantom
from models import AnomalyScorer, normals_needed


@pytest.fixture(scope="module")
def run(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of its own: calibrations and tests are written into it."""
    return Path(shutil.copytree(runs[1], tmp_path_factory.mktemp("site") / "reversed_ae"))


def draw(first: int, count: int) -> torch.Tensor:
    """Normal images of the phantom: uint8 [count,1,32,32]."""
    images = [draw_phantom(first + i, 32)[0] for i in range(count)]
    return torch.from_numpy(np.stack(images))[:, None]


def save(images: torch.Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_a_threshold_holds_for_new_normal_images_and_says_how_many_it_takes() -> None:
    assert [normals_needed(s) for s in (0.9, 0.95, 0.99)] == [9, 19, 99]
    scorer, rng, held = AnomalyScorer(), np.random.RandomState(0), []
    for _ in range(2000):
        drawn = torch.from_numpy(np.sort(rng.randn(39)))
        scorer.normal_scores["mse"] = drawn
        held.append(rng.randn(50) <= scorer.threshold("mse", 0.95))
    assert np.mean(held) == pytest.approx(38 / 40, abs=0.005)  # the 38th of 39


def test_normals_of_another_site_give_a_threshold_of_its_own(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, best = change(draw(5000, 60), "exposure"), run / "best.pt"
    site, before = save(images, tmp_path / "site b"), best.stat().st_mtime_ns
    ev.calibrate(run, str(site))
    text = capsys.readouterr().out
    assert "all 60 images in" in text and "now 0.950 (0.861 to 0.990)" in text  # 57 of 60
    assert best.stat().st_mtime_ns == before
    own, there = ev.load_run(run), ev.load_run(run, calibration="site_b")
    scores = np.sort(own(images)[2])
    assert there.scorer.threshold("reader", 0.95) == scores[57]  # the 58th of 60
    assert own.scorer.threshold("reader", 0.95) != scores[57]

    new = save(change(draw(6000, 3), "exposure"), tmp_path / "new")
    rows = ev.predict(run, new, tmp_path / "out", calibration="site_b", specificity=0.9)
    assert {row["threshold"] for row in rows} == {round(float(scores[54]), 6)}
    assert "above 90 % of 60 normal images of calibration site_b" in capsys.readouterr().out
    save(images, tmp_path / "mixed" / "normal")
    [found] = ev.evaluate(run, data=str(tmp_path / "mixed"), calibration="site_b")
    text = capsys.readouterr().out
    assert found["specificity_at_threshold"] == pytest.approx(58 / 60)
    assert "calibrated at site_b" in text and "60 of these images are among those" in text
    assert (run / "eval" / "mixed-site_b" / "report.html").exists()


def test_labels_tell_which_images_a_calibration_takes(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(draw(7000, 40), tmp_path / "both" / "normal")
    write_images(tmp_path / "both" / "abnormal", 20)
    images = torch.load(ev.calibrate(run, str(tmp_path / "both"), "labelled"))["images"]
    assert len(images) == 40 and "among the 60 images" in capsys.readouterr().out
    mixed = tmp_path / "both" / "normal"
    for i, odd in enumerate(255 * (torch.rand(3, 32, 32) > 0.5).byte()):
        Image.fromarray(odd.numpy()).save(mixed / f"odd{i}.png")
    score = ev.TrainedRun.score  # the reader has learnt nothing here

    def by_zscore(*given: object) -> tuple:
        output, scores, maps = score(*given)
        return output, scores | {"reader": scores["zscore"]}, maps

    with mock.patch.object(ev.TrainedRun, "score", by_zscore):
        ev.calibrate(run, str(mixed), "odd")
    assert "3 of these images score far above the others" in capsys.readouterr().out


@pytest.mark.parametrize(("call", "says"), [
    (lambda run, tmp: ev.calibrate(run, str(save(draw(0, 20), tmp / "few"))),
     "20 normal images can be used; 95 % specificity takes 30 or more"),
    (lambda run, tmp: ev.calibrate(run, str(save(draw(0, 40), tmp / "few")), specificity=0.99),
     "40 normal images can be used; 99 % specificity takes 99 or more"),
    (lambda run, tmp: ev.calibrate(run, str(tmp), "a/b"), "give a name, of letters"),
    (lambda run, tmp: ev.calibrate(run, str(tmp / "gone")), "there is no"),
    (lambda run, tmp: ev.calibrate(run, str(save(draw(0, 40), tmp / "x" / "ill").parent)),
     "none of its 40 images is known to be normal; its words: ill 40"),
    (lambda run, tmp: [ev.calibrate(run, str(save(draw(0, 40), tmp / x)), "x") for x in "ab"],
     "is there already; give another name"),
    (lambda run, tmp: ev.predict(run, tmp, calibration="y"), "has none of that name; it has"),
    (lambda run, tmp: ev.load_run(
        run.parent / "other", calibration=ev.calibrate(run, str(save(draw(0, 40), tmp / "o")))
        .rename(run.parent / "other" / "calibration-o.pt") and "o"), "was made for another run"),
    (lambda run, tmp: ev.predict(run, tmp, specificity=0.999),
     "--specificity 0.999: takes 999 normal images"),
    (lambda run, tmp: ev.predict(run, tmp, specificity=95), "specificity 95: not between 0 and 1"),
    (lambda run, tmp: ev.export(run, tmp / "model.bin"), "a name that ends in .onnx or .pt2"),
    (lambda run, tmp: ev.export(run, tmp / "gone" / "model.pt2"), "cannot be written"),
    (lambda run, tmp: ev.parse_arguments(["r", "--image", "x", "--export", "y"]), "not allowed wi"),
    (lambda run, tmp: ev.parse_arguments(["r", "--calibrate", "x", "--data", "y"]),
     "--data: does not go with --calibrate"),
])
def test_what_cannot_be_had_is_one_clear_line(
        run: Path, runs: list[Path], tmp_path: Path, call: object, says: str) -> None:
    if not (run.parent / "other").exists():
        shutil.copytree(runs[0], run.parent / "other")
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        call(run, tmp_path)
    assert says in str(error.value)


def test_images_of_the_same_source_seldom_look_like_drift_and_changed_ones_do(run: Path) -> None:
    trained, rng = ev.load_run(run), np.random.RandomState(0)
    own, scorer = draw(8000, 300), trained.scorer

    def measured(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return scorer.traits(images).numpy(), trained(images)[2]

    traits, scores = measured(own)
    alarms = 0
    for _ in range(200):
        one, two = np.split(rng.permutation(300)[:200], [100])
        scorer.refer_to({"reader": torch.from_numpy(scores[one])}, torch.from_numpy(traits[one]))
        alarms += len([*ev.drift(trained, "reader", traits[two], scores[two])])
    assert alarms <= 10
    for kind in ("exposure", "framing", "sharpness"):
        [text] = ev.drift(trained, "reader", *measured(change(own[100:200], kind)))
        assert "differ as a whole from the 100 validation normals" in text


def test_every_test_is_counted(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "eval" / "tests.csv").unlink(missing_ok=True)
    for split, times in (("test", 0), ("val", 0), ("test", 1)):
        ev.evaluate(run, split=split, samples=40)
        assert f"Tested before: {times} times on this split" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "scorer"), [(".pt2", "zscore"), (".onnx", "reader")])
def test_an_export_scores_as_the_program_does(
        run: Path, tmp_path: Path, suffix: str, scorer: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    file = ev.export(run, tmp_path / f"model{suffix}", scorer, 0.9)
    trained, images = ev.load_run(run, specificity=0.9), draw(9000, 20)
    _, maps, scores = trained(images, scorer)
    if suffix == ".pt2":
        about = {"about.json": ""}
        graph = torch.export.load(file, extra_files=about).module()
        answers = [graph(image[None] / 255) for image in images]
        assert "antialiased" in json.loads(about["about.json"])["preprocessing"]
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        answers = [session.run(None, {"image": image[None].numpy() / np.float32(255)})
                   for image in images]
        assert "antialiased" in session.get_modelmeta().custom_metadata_map["preprocessing"]
    found = [np.concatenate([np.asarray(answer[i]) for answer in answers]) for i in range(4)]
    assert found[0] == pytest.approx(scores, abs=1e-5)
    assert found[1] == pytest.approx(
        trained.scorer.percentile(scorer, torch.from_numpy(scores)).numpy(), abs=1.01)  # a rank
    assert np.array_equal(found[2], found[0] > np.float32(trained.threshold(scorer)))
    assert found[3] == pytest.approx(maps, abs=1e-4)


def test_the_map_lies_over_the_image_as_it_is_shown(run: Path, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x112] = 6  # shown on its side
    Image.new("L", (60, 40), 90).save(tmp_path / "turned.jpg", exif=turned)
    ev.predict(run, tmp_path, tmp_path / "out")
    with Image.open(tmp_path / "out" / "turned_overlay.png") as picture:
        assert picture.size == (40, 60)


def test_an_export_that_scores_otherwise_is_not_kept(run: Path, tmp_path: Path) -> None:
    with mock.patch.object(ev.Exported, "forward", lambda self, image: (
            image.mean((1, 2, 3)), image, image, image)), pytest.raises(UserError, match="not k"):
        ev.export(run, tmp_path / "model.pt2")
    with mock.patch.dict(sys.modules, {"onnxscript": None}), pytest.raises(
            UserError, match="pip install onnxscript"):
        ev.export(run, tmp_path / "model.onnx")
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")), pytest.raises(
            UserError, match=r"model.pt2: cannot be written \(No space left"):
        ev.export(run, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
