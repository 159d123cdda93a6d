"""train.py --check: it tells beforehand what training would stumble over, and trains nothing."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from conftest import tiny
from kaggle_stand_in import KEY, USER, Archive, StandIn
from test_kaggle import SPEC, images
from test_train import run_script

from config import Config, UserError, parse_config
from train import check, train


def test_where_training_would_work_it_says_how_long_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    check(tiny(tmp_path, model="both", seeds=2))
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if line[0] != " "] == [
        "device", "data", "reading", "model", "model", "disk", "time"]
    assert "cpu, fp32; torch" in told and "train        64         0" in told
    assert len(re.findall(r"a step of 16 images takes [\d.]+ s \([\d,.]+ images/s\)", told)) == 2
    assert "at most about 1 min" in told and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("settings", "says"), [
    ({"device": "cuda"}, "--device cuda: PyTorch finds no CUDA device"),
    ({"data": "no/such/folder"}, "--data no/such/folder: there is nothing at"),
    ({"image_size": 40}, "--image-size 40: unet needs a multiple of 16"),
    ({"output_dir": "/dev/null/runs"}, "--output-dir /dev/null/runs: /dev/null cannot be written")])
def test_what_would_fail_is_said(tmp_path: Path, settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        check(tiny(tmp_path, **settings))


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


def test_the_flag_ends_with_exit_code_2_and_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(tiny(tmp_path)).items()
             if v != getattr(Config(), k)]
    done = run_script("train.py", "--check", *flags, "--data", "no/such/folder")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("train.py: --data no/such/folder: there is nothing at")
    assert parse_config(["--check"], environ={}) == Config(check=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        check(tiny(tmp_path))
