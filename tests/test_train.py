"""Training runs: what they leave behind, how they resume, and what they refuse."""

import csv
import dataclasses
import itertools
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags_of, run, tiny

import data as data_module
import train as train_module
from config import Config, UserError, command, load_config, parse_config, run_command
from data import read_splits
from models import Setup, create_model, objective_loss
from train import learning_rate_at, load_checkpoint, prepare, train, write_file

TIMED = ("images_per_second", "data_wait", "seconds", "device_mb")  # in log.csv


def log_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def same_state(a: object, b: object) -> bool:
    """Bitwise equality of nested checkpoints."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise: weights, optimizer, early stopping, calibration, split; all but what is timed."""
    for name in ("last.pt", "best.pt"):
        a, b = load_checkpoint(one / name), load_checkpoint(other / name)
        assert a.keys() == b.keys()
        for key in a.keys() - {"config", "log", "seconds", "waited"}:
            assert same_state(a[key], b[key]), f"{name} {key}"
    logs = [[{k: v for k, v in row.items() if k not in TIMED} for row in log_of(run)]
            for run in (one, other)]
    assert logs[0] == logs[1]
    assert (one / "split.csv").read_bytes() == (other / "split.csv").read_bytes()


def at_call(monkeypatch: pytest.MonkeyPatch, name: str, number: int, what: object) -> None:
    """When train.py's function is called for the number-th time, send this process the signal
    `what`, or raise it."""
    real, calls = getattr(train_module, name), itertools.count(1)

    def function(*arguments: object) -> object:
        if next(calls) == number:
            if isinstance(what, signal.Signals):
                os.kill(os.getpid(), what)
            else:
                raise what
        return real(*arguments)

    monkeypatch.setattr(train_module, name, function)


def interrupted(monkeypatch: pytest.MonkeyPatch, config: Config, number: int,
                name: str = "validate", what: object = KeyboardInterrupt) -> None:
    """Train until that call of train.py's function, and end there: at once, unless by a signal."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, name, number, what)
        train(config)


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, size: object) -> list[int]:
    """A list that gets size(*arguments) of every call of a function from here on."""
    real, sizes = getattr(owner, name), []

    def function(*arguments: object, **more: object) -> object:
        sizes.append(size(*arguments))
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, function)
    return sizes


@pytest.mark.curves
def test_a_run_leaves_what_it_promises_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder,) = train(tiny(tmp_path, data="synthetic"))
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "split.csv", "log.csv", "run.log", "last.pt", "best.pt",
                     "curves.png"}
    rows = log_of(folder)
    assert list(rows[0]) == ["epoch", "step", "train_loss", "val_loss", "learning_rate",
                             "skipped_steps", "images_per_second", "data_wait", "seconds",
                             "device_mb"]
    assert [(r["epoch"], r["step"]) for r in rows] == [("1", "4"), ("2", "8")]
    assert all(0 <= float(r["data_wait"]) < 1 for r in rows)
    text = capsys.readouterr().out
    assert "BUILT-IN PHANTOM" in text.splitlines()[0]
    for words in ("settings  model unet", "device    cpu (as asked)", "train        64         0",
                  "model     unet, ", "last.pt, log.csv",
                  f"next      {command('evaluate.py')} {folder}"):
        assert words in text
    assert load_config(folder).epochs == 2
    best = load_checkpoint(folder / "best.pt")
    assert "optimizer" not in best and len(best["scorer"]["normal_scores"]["mse"]) == 100
    lines = (folder / "run.log").read_text().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO    settings ", lines[0])
    assert sum("epoch 2/2" in line for line in lines) == 1


def test_what_is_left_open_depends_on_the_model_and_on_the_data(xrays: Path) -> None:
    left_open = Config(model="both", image_size=32, device="cpu")
    own = dataclasses.replace(left_open, data=str(xrays))
    for config, epochs, augmented in ((own, (10, 20), True), (left_open, (3, 3), False)):
        _, found, _ = prepare(config)
        assert tuple(c.epochs for c in found) == epochs
        assert all(c.augment is augmented for c in found)
    _, (asked,), _ = prepare(dataclasses.replace(own, model="unet", epochs=1))
    assert asked.epochs == 1


@pytest.mark.parametrize("settings", [
    {"model": "reversed_ae"}, {"objective": "plain"}, {"objective": "heal"}, {"precision": "bf16"},
    {"precision": "fp16"},
    {"optimizer": "adam"}, {"optimizer": "adamw", "augment": False},
    {"optimizer": "sgd", "learning_rate": 0.01}])
def test_training_lowers_the_loss(tmp_path: Path, settings: dict) -> None:
    (folder,) = train(tiny(tmp_path, epochs=4, batch_size=8, **settings))
    losses = [float(r["train_loss"]) for r in log_of(folder)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("where", ["within an epoch", "between epochs", "asked in validation"])
@pytest.mark.parametrize(("model", "precision"), [("unet", "fp32"), ("reversed_ae", "bf16")])
def test_a_run_interrupted_and_resumed_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, model: str, precision: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "LARGE_MATRIX", 512)  # LeanAdam takes steps of its own, too
    settings = {"model": model, "precision": precision, "epochs": 4}
    (whole,) = train(tiny(tmp_path / "whole", **settings))
    part = tiny(tmp_path / "part", **settings)
    if where == "within an epoch":  # as after the last save within it
        part = dataclasses.replace(part, checkpoint_minutes=0.0)
    what = signal.SIGTERM if where == "asked in validation" else KeyboardInterrupt
    interrupted(monkeypatch, part, 3, what=what)
    state = load_checkpoint(tmp_path / "part" / model / "last.pt")
    assert (state["epoch"], state["batch"]) == (2, 0 if where == "between epochs" else 4)
    assert_same_run(whole, *train(dataclasses.replace(part, resume="auto")))
    moments = load_checkpoint(whole / "last.pt")["optimizer"]["state"].values()
    assert sum(m["exp_avg"].dtype == torch.bfloat16 for m in moments) == 2


@pytest.mark.curves
def test_resume_with_more_epochs_goes_on_and_keeps_the_schedules_length(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    (folder,) = train(tiny(tmp_path, resume="auto", epochs=3))
    rows = log_of(folder)
    assert [r["epoch"] for r in rows] == ["1", "2", "3"]
    assert float(rows[2]["learning_rate"]) == pytest.approx(0.02e-3)  # the end of 2 epochs' cosine
    assert load_checkpoint(folder / "last.pt")["schedule_epochs"] == 2


@pytest.mark.parametrize("cut_short", [False, True])
def test_resume_starts_afresh_where_there_is_nothing_or_a_first_save_was_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture, cut_short: bool
) -> None:
    if cut_short:
        folder, = train(tiny(tmp_path, epochs=1))
        (folder / "last.pt").unlink()  # the disk took best.pt, and not last.pt
    folder, = train(tiny(tmp_path, resume="auto", epochs=1))
    assert "starting afresh" in capsys.readouterr().out
    assert (folder / "best.pt").exists() and (folder / "last.pt").exists()
    assert (tmp_path / "unet.1/best.pt").exists() == cut_short


def test_resume_on_other_hardware_keeps_moments_and_weights_together(runs: list[Path]) -> None:
    config = load_config(runs[0])
    setup = Setup(torch.device("cpu"), "bf16")
    state = load_checkpoint(runs[0] / "last.pt")
    model = setup.place(create_model("unet", config))
    model.load_state_dict(state["model"])
    optimizer = train_module.make_optimizer(config, model, setup)
    train_module.load_optimizer(optimizer, state["optimizer"])
    for i, p in enumerate(model.parameters()):
        moment = optimizer.state[p]["exp_avg"]
        assert moment.stride() == p.stride()
        assert torch.equal(moment, state["optimizer"]["state"][i]["exp_avg"])


def test_resume_of_a_folder_goes_on_in_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = train(tiny(tmp_path / "here", epochs=1, seed=7))
    assert folder.name == "unet-seed7"
    monkeypatch.chdir(tmp_path)
    train(parse_config(["--output-dir", "here", "--seed", "7", "--resume", "--epochs", "2"],
                       environ={}))
    folder = folder.rename(tmp_path / "here/my best")
    config = parse_config(["--resume", "here/my best", "--epochs", "3"], environ={})
    assert train(config)[0].resolve() == folder.resolve()
    monkeypatch.chdir(folder)
    for epochs, what in enumerate(("last.pt", "."), 4):
        train(parse_config(["--resume", what, "--epochs", str(epochs)], environ={}))
    assert len(log_of(folder)) == 5 and load_config(folder).seed == 7
    assert [p.name for p in tmp_path.rglob("*") if p.is_dir()] == ["here", "my best"]
    with pytest.raises(UserError, match="a path belongs to one run"):
        parse_config(["--resume", ".", "--seeds", "2"], environ={})


@pytest.mark.parametrize(("changes", "says"), [
    ({"resume": "auto", "objective": "plain", "learning_rate": 0.5},
     r"--objective was 'denoise', is 'plain'.*--learning-rate"),
    ({"resume": ".", "model": "reversed_ae"}, "--model was 'unet', is 'reversed_ae'"),
    ({"resume": "best.pt"}, "there is no checkpoint there")])
def test_other_settings_models_and_best_weights_cannot_be_resumed(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, changes: dict, says: str
) -> None:
    monkeypatch.chdir(runs[0])
    with pytest.raises(UserError, match=says):
        train(dataclasses.replace(load_config(runs[0]), **changes))


def test_starting_over_moves_the_old_run_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder,) = train(tiny(tmp_path, epochs=1))
    before = (folder / "best.pt").read_bytes()
    train(tiny(tmp_path, epochs=1, learning_rate=0.002))
    train(tiny(tmp_path, epochs=1, learning_rate=0.003, reuse=True))
    assert (tmp_path / "unet.1" / "best.pt").read_bytes() == before
    assert (tmp_path / "unet.2" / "best.pt").exists()
    assert f"moved to {tmp_path / 'unet.1'}" in capsys.readouterr().out


def test_reuse_leaves_a_finished_run_alone_and_finishes_an_unfinished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    interrupted(monkeypatch, tiny(tmp_path, reuse=True), 2)
    (folder,) = train(tiny(tmp_path, reuse=True))
    assert "after epoch 1" in capsys.readouterr().out
    stamp = (folder / "best.pt").stat().st_mtime_ns
    train(tiny(tmp_path, reuse=True))
    assert (folder / "best.pt").stat().st_mtime_ns == stamp
    assert "nothing is left to train" in capsys.readouterr().out
    assert not load_config(folder).reuse  # how it was started is not what it was trained with


def test_several_seeds_are_runs_of_their_own_on_one_split_and_one_reading_of_the_images(
    tmp_path: Path, xrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data": str(xrays), "samples": None, "epochs": 2}
    (alone,) = train(tiny(tmp_path / "alone", seed=4, **settings))
    assert alone.name == "unet-seed4"
    decoded = counted(monkeypatch, data_module, "decode_image", lambda *_: 1)
    folders = train(tiny(tmp_path, model="both", seed=3, seeds=2, **settings))
    assert [f.name for f in folders] == ["unet-seed3", "reversed_ae-seed3", "unet-seed4",
                                         "reversed_ae-seed4"]
    splits = {(f / "split.csv").read_bytes() for f in folders}
    parts = read_splits(folders[0] / "split.csv")
    assert len(splits) == 1 and len(decoded) == len(parts.train) + len(parts.normals("val"))
    assert_same_run(alone, folders[2])
    one, other = (load_checkpoint(f / "best.pt") for f in (alone, folders[0]))
    assert not same_state(one["model"], other["model"])


def test_several_seeds_go_on_in_the_run_that_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = train(tiny(tmp_path / "whole", seed=1))
    # The second epoch of the second run:
    interrupted(monkeypatch, tiny(tmp_path, seeds=3), 4, what=signal.SIGINT)
    assert load_checkpoint(tmp_path / "unet-seed1" / "last.pt")["epoch"] == 1
    stamp = (tmp_path / "unet" / "best.pt").stat().st_mtime_ns
    folders = train(tiny(tmp_path, seeds=3, resume="auto"))
    assert [f.name for f in folders] == ["unet", "unet-seed1", "unet-seed2"]
    assert (tmp_path / "unet" / "best.pt").stat().st_mtime_ns == stamp
    assert_same_run(whole, folders[1])
    train(tiny(tmp_path, seeds=3, reuse=True))
    assert not (tmp_path / "unet-seed1.1").exists()


def test_early_stopping_keeps_the_best_and_a_worse_epoch_never_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    losses = iter([0.5, 0.3, 0.295, 0.31, 0.4])
    monkeypatch.setattr(train_module, "validate", lambda *a: next(losses))
    (folder,) = train(tiny(tmp_path, epochs=9, patience=3, min_delta=0.01))
    assert [float(r["val_loss"]) for r in log_of(folder)] == [0.5, 0.3, 0.295, 0.31, 0.4]
    best = load_checkpoint(folder / "best.pt")
    assert (best["epoch"], best["val_loss"]) == (2, 0.3)
    assert "stopped early" in capsys.readouterr().out


def test_the_validation_loss_is_the_objective_on_the_same_corruption_each_time(
    tmp_path: Path
) -> None:
    config = tiny(tmp_path)
    state = train_module.new_state(config, Setup(torch.device("cpu")))
    loaders = data_module.create_dataloaders(config)
    first, second = (train_module.validate(state, loaders.val) for _ in range(2))
    state.config = dataclasses.replace(config, objective="plain")
    assert first == second != train_module.validate(state, loaders.val)
    with pytest.raises(UserError, match="no validation image could be read"):
        train_module.validate(state, [])


def spoil(monkeypatch: pytest.MonkeyPatch, spoilt: object) -> None:
    """Make the loss of the training steps (from 0) for which spoilt(step) holds not a number."""
    real, calls = train_module.train_step, []

    def train_step(state: object, *rest: object) -> tuple[float, int]:
        calls.append(1)
        bad = spoilt(len(calls) - 1)
        state.objective = lambda *x: objective_loss(*x) * (float("nan") if bad else 1)
        return real(state, *rest)

    monkeypatch.setattr(train_module, "train_step", train_step)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spoil(monkeypatch, lambda step: step in (1, 2))
    (folder,) = train(tiny(tmp_path, epochs=1))
    assert [r["skipped_steps"] for r in log_of(folder)] == ["2"]
    assert "the loss is nan at epoch 1, step 2: that step is skipped" in capsys.readouterr().out
    state = load_checkpoint(folder / "last.pt")
    assert state["step"] == 4 and state["images"] == 0  # of the next epoch
    assert all(v.isfinite().all() for v in state["model"].values()), "BatchNorm took it in"
    steps = {int(v["step"]) for v in state["optimizer"]["state"].values()}
    assert steps == {2}, "the optimizer took a skipped step"


def test_a_loss_that_stays_not_finite_stops_with_epoch_step_and_value_after_a_resume_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda step: step >= 6)
    for _ in range(2):
        with pytest.raises(UserError, match=r"epoch 3, step 9, 3 steps in a row.*--learning-rate"):
            train(tiny(tmp_path, epochs=4, resume="auto"))
    state = load_checkpoint(tmp_path / "unet/last.pt")
    assert all(v.isfinite().all() for v in state["model"].values())
    assert (tmp_path / "unet/best.pt").exists()
    assert "ended by UserError: the loss is nan" in (tmp_path / "unet/run.log").read_text()


def test_a_validation_loss_that_is_not_finite_stops_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "validate", lambda *a: float("nan"))
    with pytest.raises(UserError, match="the validation loss is nan after epoch 1"):
        train(tiny(tmp_path))


def test_the_learning_rate_warms_up_falls_and_stays() -> None:
    config = Config(learning_rate=1.0)
    rates = [learning_rate_at(s, 100, config) for s in range(130)]
    assert rates[0] == 0.2 and rates[4] == 1.0 and max(rates) == 1.0
    assert rates[4:101] == sorted(rates[4:101], reverse=True)
    assert rates[100:] == pytest.approx([0.02] * 30)


# ----------------------------------------------------------------------------------------------
# Checkpoints that are not what they should be


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.target = folder / "ran"

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize(("write", "says"), [
    (lambda p, evil: p.write_bytes(b"not a checkpoint at all"), "not a readable checkpoint"),
    (lambda p, evil: write_file(p, {"weights": torch.zeros(3)}), "not a read.* not of this"),
    (lambda p, evil: None, "there is no checkpoint there"),
    (lambda p, evil: write_file(p, {"format": 12}), "of another version of this project"),
    (lambda p, evil: torch.save({"format": 1, "model": evil}, p), "it holds code, refused"),
    (lambda p, evil: torch.save({"format": 1, "config": Config()}, p), "it holds code, refused"),
    (lambda p, evil: p.write_bytes(pickle.dumps({"format": 1, "model": evil})), "not of this pr")])
def test_what_is_no_checkpoint_of_ours_is_refused_and_no_code_in_it_is_run(
    tmp_path: Path, write: object, says: str
) -> None:
    evil = Evil(tmp_path)
    write(tmp_path / "some.pt", evil)
    with pytest.raises(UserError, match=f"some.pt: .*{says}"):
        load_checkpoint(tmp_path / "some.pt")
    assert not evil.target.exists()


@pytest.mark.parametrize("failing", ["save", "fsync"])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "x.pt"
    write_file(path, {"a": 1})

    def fail(_: object, file: object = None) -> None:
        if file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch if failing == "save" else train_module.os, failing, fail)
    with pytest.raises(UserError, match=r"x\.pt: cannot be written.*No space.*untouched"):
        write_file(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    for content in ({}, ""):
        with pytest.raises(UserError, match=r"gone/x\.pt: .*No such file.*has the folder gone"):
            write_file(tmp_path / "gone" / "x.pt", content)


# ----------------------------------------------------------------------------------------------
# From the command line


@pytest.mark.parametrize("check", [[], ["--check"]], ids=["train", "check"])
@pytest.mark.parametrize(("arguments", "says"), [
    (["--image-size", "100"], "--image-size 100: unet needs a multiple of 16"),
    (["--data", "no/such/folder"], "--data no/such/folder: there is nothing at"),
    (["--output-dir", "Makefile/x"], r"--output-dir.* \S*Makefile\S* cannot be written"),
    (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device"),
    (["--resume", "no/such.pt"], "no/such.pt/last.pt: there is no checkpoint there"),
])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, check: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["--width", "4", "--latent-dim", "8", "--samples", "64", "--image-size", "32"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *small, *arguments, *check])
    assert run_command(train_module.main, "train.py") == 2
    assert re.fullmatch(f"train.py: .*{says}.*\n", capsys.readouterr().err)


def test_train_and_evaluate_as_a_user_runs_them(tmp_path: Path) -> None:
    flags = flags_of(tiny("", epochs=1, device="auto", precision="auto", output_dir="runs"))
    done = run("train.py", *flags, IMGAE_OUTPUT_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = run("evaluate.py", tmp_path / "unet")
    assert done.returncode == 0 and "AUROC" in done.stdout, done.stderr
    assert (tmp_path / "unet/eval/films/metrics.json").exists()
