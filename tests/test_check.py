"""train.py --check: it tells beforehand what training would stumble over, and trains nothing."""

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny
from kaggle_stand_in import KEY, USER, Archive, StandIn
from test_kaggle import SPEC, images
from test_survival import FakeWandb
from test_train import run_script

import train as train_module
from config import Config, UserError, parse_config
from train import check, checkpoint_bytes, main, train

Found = Callable[..., tuple[list[str], dict[str, str]]]


@pytest.fixture
def found(tmp_path: Path, capsys: pytest.CaptureFixture) -> Found:
    """Checks a tiny configuration: (what failed, what was told of each thing)."""
    def look(output: Path = tmp_path, **settings: object) -> tuple[list[str], dict[str, str]]:
        failed = check(tiny(output, **settings))
        told, what = {}, ""
        for line in capsys.readouterr().out.splitlines():
            if m := re.match(r"(ok|careful|FAILS) +(\w+) +(.*)", line):
                what = m[2]
                assert what not in told, "said twice"
                told[what] = f"{m[1]} {m[3]}"
            elif what:
                told[what] += "\n" + line
        assert failed == [what for what, text in told.items() if text.startswith("FAILS")]
        return failed, told

    return look


def test_where_training_would_work_all_is_ok_and_nothing_is_left(
    found: Found, tmp_path: Path
) -> None:
    failed, told = found(model="both", seeds=2)
    assert failed == [] and all(text.startswith("ok ") for text in told.values())
    assert list(told) == ["versions", "device", "kaggle", "data", "images", "disk", "unet",
                          "reversed_ae", "time"]
    assert "torch " in told["versions"] and "cpu (as asked), " in told["device"]
    assert "train        64         0" in told["data"]
    assert re.search(r"a step of 16 images takes [\d.]+ s \([\d,.]+ images/s\), "
                     r"[\d.]+ MB of memory(; [\d.]+ GB are free)?$", told["unet"])
    assert "about 1 min for 4 runs of 2 epochs of 64 images" in told["time"]
    assert list(tmp_path.iterdir()) == []


def test_it_goes_on_after_a_failure_so_that_all_are_seen_at_once(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_module.torch.cuda, "is_available", lambda: False)
    failed, told = found(tmp_path / "file/runs", device="cuda", data="no/such/folder",
                         model="both")
    assert failed == ["device", "data", "disk"]
    assert "use --device auto" in told["device"] and "there is nothing at" in told["data"]
    assert f"{tmp_path / 'file'} is a file" in told["disk"]
    assert "a step of 16 images" in told["unet"] and "time" not in told
    assert found(image_size=40)[0] == ["unet"]


def test_packages_that_are_too_old_are_named_with_what_is_wanted(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "PACKAGES", {"torch": ("torch", "99.0"),
                                                   "numpy": ("numpy", "1.9")})
    failed, told = found()
    assert failed == [] and told["versions"].startswith("careful Python ")
    assert "torch must be 99.0 or newer: pip install -U torch" in told["versions"]
    assert "numpy must" not in told["versions"]


@pytest.mark.parametrize(("key", "says"), [
    (KEY, "ok a name and key found, and accepted"),
    ("wrong-key-98765", "FAILS --data kaggle:someone/xrays: Kaggle refuses the credentials (401)"),
    (None, "FAILS no Kaggle credentials found. On kaggle.com: Settings, API")])
def test_kaggle_credentials_are_tried_and_never_shown(
    found: Found, monkeypatch: pytest.MonkeyPatch, kaggle: StandIn,
    key: str | None, says: str
) -> None:
    kaggle.archives["someone/xrays"] = Archive.of(images(80))
    if key:
        monkeypatch.setenv("KAGGLE_KEY", key)
    else:
        monkeypatch.delenv("KAGGLE_USERNAME")
        monkeypatch.delenv("KAGGLE_KEY")
    failed, told = found(data=SPEC, samples=None)
    assert told["kaggle"].startswith(says) and failed == ([] if key == KEY else ["kaggle"])
    assert ("streamed; nothing is stored" in told.get("data", "")) == (key == KEY)
    assert "images/s" in told["unet"]
    assert not re.search(f"{KEY}|{USER}|wrong-key", str(told))
    calls = sum(kaggle.calls.values())
    assert "not needed for this data" in found()[1]["kaggle"]
    assert sum(kaggle.calls.values()) == calls  # nobody is asked for what is not needed


@pytest.mark.parametrize(("broken", "says"), [
    ("", "ok can be used"), ("login", "careful the network is dead"), (None, "careful no key: ")])
def test_wandb_is_tried_only_if_asked_for_and_never_a_reason_to_fail(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str | None, says: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken or ""))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "" if broken is None else "secret-key")
    failed, told = found(wandb=True)
    assert failed == [] and told["wandb"].startswith(says) and "secret" not in str(told)
    assert "wandb" not in found()[1]


def test_a_disk_too_small_for_the_checkpoints_is_said_with_both_figures(
    found: Found, small_disk: Path
) -> None:
    assert found(small_disk / "runs")[0] == []
    failed, told = found(small_disk / "runs", width=16)
    assert failed == ["disk"] and re.search(
        r"checkpoints take 5\d\.\d MB there, and 6\.\d MB are free; make room", told["disk"])
    (small_disk / "other").write_bytes(bytes(6 << 20))
    assert found(small_disk / "runs")[0] == ["disk"]
    assert not (small_disk / "runs").exists()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_room_for_checkpoints_is_what_they_take(tmp_path: Path, optimizer: str) -> None:
    config = tiny(tmp_path, epochs=1, optimizer=optimizer, width=16)
    folder, = train(config)
    for name, size in zip(("last.pt", "best.pt"), checkpoint_bytes(config), strict=True):
        assert (folder / name).stat().st_size == pytest.approx(size, rel=0.2), name


def test_images_that_cannot_be_read_are_named(found: Found, xrays: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(xrays, data)
    config = {"data": str(data), "samples": None, "output": tmp_path / "runs"}
    for name in sorted((data / "normal").iterdir())[:3]:
        name.write_text("<html>404</html>")
    failed, told = found(**config)
    assert failed == [] and told["images"].startswith("careful ")
    assert re.search(r"normal/00\d\.png cannot be read: a web page or XML, and no", told["images"])
    for name in sorted((data / "normal").iterdir())[3:20]:
        name.write_text("<html>404</html>")
    failed, told = found(**config)
    assert failed == ["images"] and "images cannot be read, more than 5%" in told["images"]


def test_memory_too_small_fails_without_a_step_that_would_end_the_program(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = train_module.train_step
    monkeypatch.setattr(train_module, "train_step", lambda run, *rest: (
        steps.append(run.micro_batch), real(run, *rest))[1])
    def free(count: float) -> None:
        monkeypatch.setattr(train_module, "free_memory", lambda device: int(count))

    free(1e6)  # of which the images may take 0.4
    failed, told = found()
    assert failed == ["unet"] and "weights and their moments alone take 1." in told["unet"]
    monkeypatch.setattr(train_module, "memory_of_a_step", lambda *_: lambda count: count * 10**12)
    free(1e11)
    failed, told = found()
    assert failed == ["unet"] and "with 1 images at a time a step takes 1,000.0 GB" in told["unet"]
    assert not steps
    free(9e12)
    failed, told = found()
    assert failed == [] and told["unet"].startswith("careful ") and steps == [8] * 3
    assert "16 images, 8 at a time, takes" in told["unet"]


def test_a_run_to_be_resumed_is_looked_at(found: Found, tmp_path: Path) -> None:
    folder, = train(tiny(tmp_path / "runs"))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    failed, told = found(tmp_path / "runs", resume="auto", epochs=3, width=8)
    assert failed == ["unet"] and "--width was 4, is 8" in told["unet"]
    assert found(tmp_path / "runs", resume="auto", epochs=3)[0] == []
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_the_flag_ends_with_exit_code_2_and_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(tiny(tmp_path)).items()
             if v != getattr(Config(), k)]
    done = run_script("train.py", "--check", *flags, "--data", "no/such/folder")
    assert done.returncode == 2 and "FAILS    data " in done.stdout
    assert done.stderr == "train.py: training would not work as it is: see data above\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "--check", *flags])
    main()  # nothing to be raised
    assert list(tmp_path.iterdir()) == []
    assert parse_config(["--check"], environ={}) == Config()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        check(tiny(tmp_path))
