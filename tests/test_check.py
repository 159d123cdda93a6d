"""train.py --check: it tells beforehand what training would stumble over, and trains nothing."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny
from kaggle_stand_in import KEY, USER, Archive, StandIn
from test_kaggle import SPEC, images

from config import UserError
from models import Setup
from train import check, hint, train


def test_where_training_would_work_it_says_how_long_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tiny(tmp_path, model="both", seeds=2))
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if line[0] != " "] == [
        "device", "data", "reading", "model", "model", "disk", "time"]
    assert "cpu, fp32; torch" in told and "train        64         0" in told
    assert len(re.findall(r"a step of 16 images takes [\d.]+ s \([\d,.]+ images/s\)", told)) == 2
    assert re.search(r"at most about \d+ min", told) and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        check(tiny(tmp_path))


@pytest.mark.parametrize(("key", "says"), [
    (KEY, ""), ("wrong-key-98765", "answers 401"),
    (None, "no Kaggle credentials found. On kaggle.com: Settings, API")])
def test_kaggle_credentials_are_tried_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kaggle: StandIn,
    capsys: pytest.CaptureFixture, key: str | None, says: str
) -> None:
    kaggle.archives["someone/xrays"] = Archive.of(images(80))
    if key:
        monkeypatch.setenv("KAGGLE_KEY", key)
    else:
        monkeypatch.delenv("KAGGLE_USERNAME")
        monkeypatch.delenv("KAGGLE_KEY")
    told = ""
    try:
        check(tiny(tmp_path, data=SPEC, samples=None))
        assert key == KEY
    except UserError as error:
        told = str(error)
        assert key != KEY and says in told
    told += capsys.readouterr().out
    assert ("streamed; nothing is stored" in told) == (key == KEY)
    assert not re.search(f"{KEY}|{USER}|wrong-key", told)


def test_a_disk_too_small_for_the_checkpoints_is_said_with_both_figures(small_disk: Path) -> None:
    check(tiny(small_disk / "runs"))
    with pytest.raises(UserError, match=r"checkpoints take 0\.0\d GB, and 0\.01 GB are free; make"):
        check(tiny(small_disk / "runs", width=16))
    assert not (small_disk / "runs").exists()


def test_images_that_cannot_be_read_are_named(
    xrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(xrays, data)
    config = tiny(tmp_path / "runs", data=str(data), samples=None)
    for name in sorted((data / "normal").iterdir())[:3]:
        name.write_text("<html>404</html>")
    check(config)
    told = capsys.readouterr().out
    assert re.search(r"careful   normal/00\d\.png cannot be read: no image", told)
    for name in sorted((data / "normal").iterdir())[3:20]:
        name.write_text("<html>404</html>")
    with pytest.raises(UserError, match="images cannot be read, more than 5%"):
        check(config)


def test_a_run_to_be_resumed_is_looked_at(tmp_path: Path) -> None:
    folder, = train(tiny(tmp_path / "runs"))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="--width was 4, is 8"):
        check(tiny(tmp_path / "runs", resume="auto", epochs=3, width=8))
    check(tiny(tmp_path / "runs", resume="auto", epochs=3))
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(("seconds", "device", "width", "told"), [
    (7200, "cpu", 64, True), (3000, "cpu", 64, False), (7200, "cuda", 64, False),
    (7200, "cpu", 8, False)])
def test_training_of_hours_on_a_cpu_names_smaller_settings(
    seconds: float, device: str, width: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "imgae_dx"):
        hint(tiny(Path(), width=width, image_size=128), Setup(torch.device(device)), seconds)
    assert ("about 2.0 hours on this CPU. --width 16" in caplog.text) == told
