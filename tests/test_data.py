"""Sources, layouts, splits, decoding, the stream, and the phantom's frozen difficulty."""

import hashlib
import importlib.util
import io
import os
import re
import shutil
import struct
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tiny, write_image, write_images
from PIL import Image

from config import Config, UserError
from data import (
    ABNORMAL, NORMAL, PHANTOM_KINDS, BadImage, FolderSource, ImageStream, Memory, PhantomSource,
    Sample, create_dataloaders, decode_image, describe, draw_phantom, epoch_order,
    read_splits, split_for_training, split_samples, write_splits)

# The phantom


def test_the_phantoms_difficulty_is_frozen() -> None:
    digest = hashlib.sha256()
    for kind in (None, *PHANTOM_KINDS):
        for index, size in ((7, 64), (200_003, 128)):
            image, mask = draw_phantom(index, size, seed=3, kind=kind)
            digest.update(image.tobytes() + mask.tobytes())
    assert digest.hexdigest() == (
        "b5f08261ace90ce166b7df45903393f193f71faaaab032697a5481b2795244b8")


def test_phantom_masks_belong_to_the_images_that_are_read() -> None:
    source = PhantomSource(4, 64)
    sick = next(s for s in source.samples if s.finding == "opacity")
    image, mask = draw_phantom(int(sick.patient), 64, kind="opacity")
    assert np.array_equal(source.mask(sick, 64), mask) and source.mask(sick, 32).shape == (32, 32)
    assert np.array_equal(decode_image(source.read(sick), 64), image)
    assert not source.mask(source.samples[0], 64).any()


# Folders and tables


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are Unicode")
def test_links_special_files_and_names_that_cannot_be_written_down_do_no_harm(
        tmp_path: Path) -> None:
    write_images(tmp_path / "normal", 3)
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "normal" / "linked").symlink_to(tmp_path / "normal")
    odd = os.fsencode(tmp_path / "normal") + b"/R\xf6ntgen.png"  # Latin-1
    shutil.copy(tmp_path / "normal/000.png", odd)
    for name in ("normal/pipe.png", "table.csv"):  # whoever reads a pipe waits for ever
        os.mkfifo(tmp_path / name)
    (tmp_path / "normal/zero.png").symlink_to("/dev/zero")
    (tmp_path / "normal/gone.png").symlink_to("nowhere")
    source = FolderSource(str(tmp_path))
    assert len(source.samples) == 3 and len(source.fingerprint().split("-")) == 3
    assert source.left_out.pop("with a name that is not UTF-8") == 1
    assert source.left_out.pop("links to nothing, pipes or devices") == 4
    assert [reason[:17] for reason in source.left_out] == ["link, again, to .", "link, normal/link"]
    with pytest.raises(UserError, match="no folder or table at"):
        FolderSource(str(tmp_path / "table.csv"))
    (tmp_path / "list.csv").write_text("path,label\nnormal/zero.png,0\n")
    with pytest.raises(UserError, match="no column path whose values are images that are there"):
        FolderSource(str(tmp_path / "list.csv"))


def test_runs_are_no_data(tmp_path: Path) -> None:
    for i, name in enumerate(("normal/0.png", "sick/1.png", "runs/comparison.png",
                              "mine/unet/curves.png")):
        write_image(tmp_path / name, i)
    for name in ("runs/comparison.html", "mine/unet/last.pt", "mine/unet/split.csv"):
        (tmp_path / name).touch()
    source = FolderSource(str(tmp_path))
    assert [s.key for s in source.samples] == ["normal/0.png", "sick/1.png"]
    assert source.left_out == {"folder of a run of this program": 2}


def test_a_csv_of_paths_with_patients_split_finding_and_mask(tmp_path: Path) -> None:
    write_images(tmp_path / "p", 3)
    Image.fromarray(np.repeat(np.uint8([[255], [0]]), 20, axis=0)).save(tmp_path / "p/mask.png")
    file = tmp_path / "list.csv"
    file.write_text(
        "\ufeff\"Path\",Label,patient,split,mask\n\"p/000.png\",normal,A,train,\n"
        "./p/001.png,0,A,train,\np/002.png,Nodule,B,test,p/mask.png\n", encoding="utf-8")
    source = FolderSource(str(file))
    assert [(s.key, s.patient, s.label, s.finding, s.split) for s in source.samples] == [
        ("p/000.png", "A", 0, "", "train"), ("p/001.png", "A", 0, "", "train"),
        ("p/002.png", "B", 1, "Nodule", "test")]
    file.write_text(file.read_text().replace("test", "train"))
    assert FolderSource(str(file)).fingerprint() != source.fingerprint()  # it is other data
    found = source.mask(source.samples[2], 32)
    assert found[:16].all() and not found[16:].any() and source.mask(source.samples[0], 32) is None


@pytest.mark.parametrize(("text", "place", "says"), [
    ("path,size\na.png,x\n", "list.csv", "list.csv has no column label"),
    ("name,label\n7,0\n", "list.csv", "list.csv has no column path"),
    ("path;label\n", "list.csv", "its columns are: path, label"),
    ("path,label\na.png,0\nb.png,0\n", "list.csv", "1 of the 2 files that list.csv lists are not"),
    ("path,label\na.png,0\nb.png,\n", "list.csv", "list.csv row 3: path or label is empt"),
    ("path,label\na.png,7\n", "list.csv", "label 7 is neither 0"),
    ("path,label\na.png,Unknown\n", "list.csv", "none of its .* is known to be normal"),
    ("path,label,split\na.png,0,later\n", "list.csv", "split 'later' is not one of"),
    ("path,label,mask\na.png,0,gone.png\n", "list.csv", "1 masks that list.csv .* is gone.png"),
    ("", "gone", "nothing at {}/gone; give a folder, a CSV, kaggle:owner/name, or"),
    ("", "my films/empty", "no images in it"),
    ("", "a.png", "no folder or table at"),
    ("", "my films/Normal", "give a CSV with the first line path,label"),
    ("", str(Path(__file__).parent.parent), "the program's own folder; put the images into one")])
def test_a_wrong_place_or_table_is_one_line_that_names_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my films/empty").mkdir(parents=True)
    for name in ("a.png", "my films/Normal/a.png"):
        write_image(tmp_path / name)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*$") as told:
        FolderSource(place)
    assert re.search(says.format(re.escape(str(tmp_path))), str(told.value))
    assert place in str(told.value)


def test_a_large_batch_is_noted_and_too_little_data_refused(xrays: Path, tmp_path: Path) -> None:
    source = FolderSource(str(xrays))
    for size, notes in ((42, 0), (43, 1)):
        splits = split_for_training(source, Config(data=str(xrays), batch_size=size))
        assert len(splits.train) == 42
        assert sum("all make one step" in note for note in splits.notes) == notes
    for count, says in ((19, r"19 normal images are too few.*evaluate\.py"),
                        (60, "60 normal images leave 0 for training")):
        write_images(tmp_path / "test" / "normal", count)
        with pytest.raises(UserError, match=says):
            split_for_training(FolderSource(str(tmp_path)), Config(data=str(tmp_path)))


# Splits


def many(n: int, label: int, patients: int, split: str = "", tag: str = "") -> list[Sample]:
    return [Sample(f"{tag}{label}-{i:04d}", f"{tag}{i % patients}", label, split=split)
            for i in range(n)]


def test_patients_are_never_shared_and_train_is_normal() -> None:
    samples = many(600, NORMAL, 150) + many(200, ABNORMAL, 220)  # many patients have both
    parts = split_samples(samples)
    patients = [{s.patient for s in p} for p in parts[:3]]
    assert sum(map(len, patients)) == len(set().union(*patients))
    assert all(s.label == NORMAL for s in parts.train)
    counts = [len(parts.train), len(parts.normals("val")), len(parts.normals("test"))]
    assert sum(counts) == 600 and 90 <= counts[2] <= 140 and 35 <= counts[1] <= 65
    assert any(s.label for s in parts.val) and any(s.label for s in parts.test)
    assert parts[:3] == split_samples(samples)[:3]
    # Test takes its share of the normals also where patients have many abnormal images.
    parts = split_samples(many(100, NORMAL, 100) + many(400, ABNORMAL, 100))
    assert len(parts.normals("test")) == 20 and len(parts.train) == 60


def test_an_official_test_split_is_respected_and_a_tiny_official_validation_is_not() -> None:
    samples = (many(300, NORMAL, 300, "train", "a") + many(100, ABNORMAL, 100, "train", "b")
               + many(8, NORMAL, 8, "val", "c") + many(50, NORMAL, 50, "test", "d")
               + many(3, NORMAL, 3, "train", "d"))  # three train images of test patients
    parts = split_samples(samples)
    assert {s.key for s in parts.test} == {s.key for s in samples if s.split == "test"}
    assert len(parts.normals("val")) == 30 and sum(s.label for s in parts.val) == 100
    assert len(parts.train) == 270
    assert "3 images left out of training" in parts.notes[0] and "too small" in parts.notes[1]
    parts = split_samples(samples + many(60, NORMAL, 60, "val", "e"))  # large enough
    assert len(parts.normals("val")) == 68 and len(parts.train) == 300


def test_validation_that_is_prescribed_without_test_is_used_and_not_tested_on() -> None:
    val = many(60, NORMAL, 60, "val", "c") + many(60, ABNORMAL, 60, "val", "d")
    train = many(300, NORMAL, 300, "train", "a") + many(40, ABNORMAL, 40, "train", "b")
    parts = split_samples(train + val)
    assert {s.key for s in parts.val} == {s.key for s in val}
    assert sum(s.label == NORMAL for s in parts.test) == 60 and len(parts.train) == 240
    # A small one is split anew with all else, and nothing is lost.
    parts = split_samples(train + val[:20] + val[60:80])
    assert "split anew" in parts.notes[0]
    assert sum(len(part) for part in parts[:3]) == len(train) + 40


def test_samples_limits_training_and_never_moves_an_image() -> None:
    samples = many(2000, NORMAL, 2000, "train") + many(50, NORMAL, 50, "test", "t")
    whole, part = split_samples(samples), split_samples(samples, 300)
    assert len(part.train) == 300 and len(part.val) == 100
    assert {s.key for s in part.train} <= {s.key for s in whole.train}
    assert {s.key for s in part.val} <= {s.key for s in whole.val} and part.test == whole.test
    assert "only" in split_samples(samples, 9999).notes[0]


def test_splits_survive_their_file(tmp_path: Path) -> None:
    parts, file = split_samples(many(100, NORMAL, 50) + many(30, ABNORMAL, 60)), tmp_path / "s.csv"
    write_splits(parts, file)
    for ours, theirs in zip(parts[:3], read_splits(file)[:3], strict=True):
        assert [(s.key, s.patient, s.label) for s in ours] == [
            (s.key, s.patient, s.label) for s in theirs]
    file.write_text("key,split\na,train\n")
    with pytest.raises(UserError, match=r"s\.csv: not a readable table"):
        read_splits(file)


# Decoding


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # 64x64, dark left, bright right


def test_grey_of_8_or_16_bits_colour_palette_and_transparency_come_out_the_same() -> None:
    grey = Image.fromarray(RAMP)
    opaque = Image.fromarray(np.dstack([RAMP] * 3 + [np.full_like(RAMP, 90)]))
    palette = Image.fromarray((RAMP // 4).astype(np.uint8), "P")
    palette.putpalette([v for i in range(64) for v in (4 * i,) * 3])
    full = Image.fromarray(RAMP.astype(np.uint16) * 257)
    twelve = Image.fromarray((RAMP.astype(np.uint32) * 4095 // 255).astype(np.uint16))
    for image in (grey, grey.convert("RGB"), opaque, grey.convert("LA"), palette, full, twelve):
        assert np.array_equal(decode_image(encoded(image), 64), RAMP), image.mode
    assert np.abs(decode_image(encoded(grey, "JPEG", quality=95), 64) - RAMP.astype(int)).max() < 8
    bright = Image.fromarray(np.array([[0, 65535]] * 2, np.uint16))
    assert decode_image(encoded(bright), 2).tolist() == [[0, 255]] * 2  # not saturated


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("turn", [2, 3, 4, 5, 6, 7, 8])
def test_a_turned_image_comes_out_upright(turn: int, kind: str) -> None:
    picture = np.zeros((64, 64), np.uint8)
    picture[:32, :16], picture[40:, 48:] = 250, 120
    exif = Image.Exif()
    exif[0x0112] = turn
    file = encoded(Image.fromarray(picture), kind, exif=exif, quality=95)
    by = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
          6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90}
    assert np.abs(decode_image(file, 64).astype(int) - by[turn](picture)).max() < 30


def test_every_format_of_the_list_is_found_in_a_folder_and_read(tmp_path: Path) -> None:
    wide = RAMP.astype(np.uint16) * 257
    folder = tmp_path / "normal"
    folder.mkdir()
    for name, image, kind in (
            ("a.png", RAMP, "PNG"), ("b.jpg", RAMP, "JPEG"), ("c.jpeg", RAMP.clip(2), "JPEG"),
            ("d.bmp", RAMP, "BMP"), ("e.pgm", RAMP, "PPM"),
            ("g.tif", RAMP, "TIFF"), ("h.TIFF", wide, "TIFF"), ("j.png", wide, "PNG"),
            ("i.tif", wide.clip(9).astype(">u2"), "TIFF")):
        (folder / name).write_bytes(encoded(Image.fromarray(image), kind))
    (folder / "f.pgm").write_bytes(b"P5 %d %d 65535\n" % RAMP.shape[::-1]
                                   + wide.astype(">u2").tobytes())
    if importlib.util.find_spec("pydicom"):
        (folder / "k.dcm").write_bytes(dicom("MONOCHROME2"))
    source = FolderSource(str(tmp_path))
    assert len(source.samples) == len(list(folder.iterdir())) >= 10
    for sample in source.samples:
        found = decode_image(source.read(sample), 64).astype(int)
        assert np.abs(found - RAMP).max() <= (4 if sample.key.endswith(".dcm") else 2), sample.key


def test_a_non_square_image_is_stretched_whole() -> None:
    wide = np.zeros((50, 200), np.uint8)
    wide[:, :100], wide[:, -4:] = 80, 255  # a bright right edge that a crop would lose
    out = decode_image(encoded(Image.fromarray(wide)), 50)
    assert out.shape == (50, 50) and (out[:, :24] == 80).all()
    assert (out[:, -1] > 200).all() and (out[:, 26:48] == 0).all()


@pytest.mark.parametrize("damage", [
    lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no image",
    lambda b: b[:100] + b"\0" * 400])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_files_are_bad_images(kind: str, damage: object) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (64, 64)).astype(np.uint8)
    with pytest.raises(BadImage):
        decode_image(damage(encoded(Image.fromarray(noise), kind)), 32)
    with pytest.raises(BadImage):
        decode_image(encoded(Image.fromarray(RAMP), "JPEG", dpi=(72, 72),
                             exif=b"Exif\0\0II*\0\x08\0"), 32)


def test_an_image_or_mask_of_absurd_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    png = bytearray(encoded(Image.fromarray(RAMP)))
    for side in (9_500, 60_000):  # Pillow warns of the first, and refuses the second
        png[16:24] = side.to_bytes(4, "big") * 2  # width and height in the header
        png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
        with warnings.catch_warnings(), pytest.raises(BadImage, match="pixels"):
            warnings.simplefilter("ignore")
            decode_image(bytes(png), 32)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(RAMP)))
    (tmp_path / "mask.png").write_bytes(png)
    (tmp_path / "b.png").write_bytes(encoded(Image.fromarray(RAMP.T)))
    (tmp_path / "list.csv").write_text("path,label,mask\na.png,1,mask.png\nb.png,0,\n")
    source = FolderSource(str(tmp_path))
    with pytest.raises(UserError, match=r"mask\.png cannot be read"):
        source.mask(source.samples[0], 32)


def dicom(photometric: str, syntax: str = "ExplicitVRLittleEndian", **tags: object) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds = pydicom.dataset.FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.Rows, ds.Columns, ds.SamplesPerPixel = 64, 64, 1
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = (RAMP.astype(np.uint16) * 16).tobytes()
    for tag, value in tags.items():
        setattr(ds, tag, value)
    pydicom.dcmwrite(buffer := io.BytesIO(), ds)
    return buffer.getvalue()


def test_dicom_is_scaled_inverted_and_windowed() -> None:
    expected = np.rint(RAMP * (255 / 252))
    assert np.abs(decode_image(dicom("MONOCHROME2"), 64) - expected).max() <= 1
    assert np.abs(255.0 - decode_image(dicom("MONOCHROME1"), 64) - expected).max() <= 1
    windowed = decode_image(dicom("MONOCHROME2", WindowCenter=1000, WindowWidth=500,
                                  RescaleSlope=1, RescaleIntercept=-500), 64)
    low, high = (RAMP * 16.0 - 500 < 740), (RAMP * 16.0 - 500 > 1260)
    assert (windowed[low] == 0).all() and (windowed[high] == 255).all()
    assert 0 < windowed[~low & ~high].mean() < 255


def tiled(side: int) -> bytes:
    """A TIFF file of 64x64 pixels that lie in one tile of side x side."""
    tile = zlib.compress(bytes(side * side))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134,
            325: len(tile)}
    return b"II*\0\x08\0\0\0\x0a\0" + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4) + tile


def icon() -> bytes:
    """An icon that says 16x16, and holds 4000x4000 pixels."""
    png = encoded(Image.new("L", (4000, 4000)))
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


@pytest.mark.parametrize(("make", "says"), [
    (lambda: dicom("MONOCHROME2", "DeflatedExplicitVRLittleEndian"), "deflated DICOM"),
    (lambda: dicom("MONOCHROME2", PixelData=bytes(9_000_000)), r"needs 10\d.0 MB at once"),
    (lambda: tiled(4096), "needs 33.6 MB at once"), (icon, "no image of a known format"),
    (lambda: encoded(Image.new("RGB", (2000, 2000)), "WEBP"), "needs 80.0 MB at once")])
def test_what_a_file_is_inflated_to_counts_and_not_what_it_says(
        make: object, says: str, tmp_path: Path) -> None:
    memory = Memory(40 << 20)  # of which a quarter is for decoding
    with pytest.raises(BadImage, match=says):
        decode_image(make(), 64, partial(memory.hold, "pixels"))
    assert memory.peak_bytes == 0
    decode_image(tiled(128), 64, partial(memory.hold, "pixels"))
    assert 0 < memory.peak_bytes < memory.limit / 4


def test_dicom_that_cannot_be_decoded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without, pytest.raises(UserError, match="pip install 'pydicom>"):
        without.setitem(sys.modules, "pydicom", None)
        decode_image(b"\0" * 128 + b"DICM" + b"\0" * 100, 32)
    content = dicom("MONOCHROME2")
    with pytest.raises(BadImage, match="DICOM with PALETTE COLOR pixels"):
        decode_image(dicom("PALETTE COLOR"), 64)
    lacking = RuntimeError("Unable to decompress, because all plugins lack:\n\tgdcm\n\tpylibjpeg")
    monkeypatch.setattr("pydicom.dcmread", mock.Mock(side_effect=lacking))
    with pytest.raises(BadImage, match=r"DICOM: Unable .* all plugins lack: gdcm pylibjpeg"):
        decode_image(content, 64)


# The stream


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 5000])
def test_an_epochs_order_is_a_permutation_and_depends_on_seed_and_epoch_alone(count: int) -> None:
    order = epoch_order(count, 1, 2)
    assert sorted(order) == list(range(count))
    assert np.array_equal(order, epoch_order(count, 1, 2))
    if count > 10:
        assert not np.array_equal(order, epoch_order(count, 1, 3))
        assert not np.array_equal(order, epoch_order(count, 2, 2))
        assert np.abs(np.diff(order)).min() >= 1 and (np.abs(np.diff(order)) == 1).mean() < 0.35


def test_batches_hold_the_right_pixels_in_any_epoch(xrays: Path) -> None:
    source = FolderSource(str(xrays))
    for memory, cache, kept in ((1 << 30, True, 82), (100 << 10, True, 26), (1 << 20, False, 0)):
        stream = ImageStream(source, source.samples, 32, 9, seed=0, memory=memory, cache=cache)
        assert stream.cached == kept
        for epoch in range(2):
            stream.set_epoch(epoch)
            for images, positions in stream:
                assert images.dtype == torch.uint8 and images.shape[1:] == (1, 32, 32)
                for image, position in zip(images, positions.tolist(), strict=True):
                    expected = decode_image(source.read(source.samples[position]), 32)
                    assert np.array_equal(image[0].numpy(), expected)


class Counting(PhantomSource):
    reads = 0

    def read(self, sample: Sample) -> bytes:
        self.reads += 1
        return super().read(sample)


def test_a_bad_image_is_skipped_counted_and_named_and_many_stop_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "normal", 40)
    (tmp_path / "normal/007.png").write_bytes(b"broken")
    source = FolderSource(str(tmp_path))
    stream = ImageStream(source, source.samples, 32, 8)
    for _ in range(2):
        assert sum(len(x) for x, _ in stream) == 39 and list(stream.bad) == ["normal/007.png"]
    for i in (1, 2, 3):
        (tmp_path / f"normal/00{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"4 of 40 images cannot be read, more than 5%.*007.png"):
        list(ImageStream(source, source.samples, 32, 8))


def test_what_fits_in_memory_is_read_once_for_calibration_and_training() -> None:
    source = Counting(44, 32)
    stream = ImageStream(source, source.samples[:44], 32, 8, seed=0)
    assert sum(map(len, stream.every(4, 8))) == 11
    seen = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        seen.append({*torch.cat([p for _, p in stream]).tolist()})
        assert len(seen[-1]) == 40  # what training leaves over is read, too
    assert seen[0] != seen[1]  # it is different in each epoch
    stream.set_epoch(3, 2)  # as where a run was ended within an epoch
    assert sum(map(len, stream.every(1, 8))) == source.reads == 44


def test_loaders_in_two_lines_and_the_table_of_the_data(xrays: Path) -> None:
    loaders = create_dataloaders(tiny(xrays.parent, data=str(xrays), samples=None))
    images, _ = next(iter(loaders.train))
    assert images.shape == (16, 1, 32, 32)
    for stream in loaders[:2]:
        assert all(s.label == NORMAL for s in stream.samples)
    assert any(s.label == ABNORMAL for s in loaders.test.samples)
    text = describe(loaders.source, loaders.splits)
    assert str(xrays) in text and "abnormal 12" in text and "every image counts as a pat" in text
