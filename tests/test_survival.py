"""A run that cannot be lost: signals, kills, damage, memory, several processes, W&B."""

import contextlib
import dataclasses
import functools
import io
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, flags_of, tiny, write_image
from kaggle_stand_in import Archive, StandIn, VirtualNIH
from PIL import Image, ImageOps
from test_kaggle import SPEC, png, server_environment
from test_train import assert_same_run, counted, interrupted, log_of, same_state

import train as train_module
from config import Config, UserError
from data import Source, create_dataloaders
from evaluate import evaluate, load_run
from models import Setup, choose_precision
from train import Signals, load_checkpoint, open_run, train

CPU = torch.device("cpu")
PROGRAM = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(config: Config, *more: str, launcher: tuple[str, ...] = (), limit: int | None = None,
          script: str = "train.py", **environ: str) -> subprocess.Popen:
    """A real training program. limit: bytes that a file of its may have."""
    restrict = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(
        [sys.executable, *launcher, script, *flags_of(config), *more], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restrict if limit else None,
        env=os.environ | PROGRAM | environ)


def read_until(program: subprocess.Popen, words: str) -> None:
    """Read what the program prints up to the line that holds these words."""
    for line in program.stdout:
        if words in line:
            return
    raise AssertionError(f"the program ended first: {program.communicate()[1]}")


def ended(program: subprocess.Popen, code: int | None = 0) -> str:
    """What the program writes to stderr up to its end, with this exit code; None: one but 0."""
    _, errors = program.communicate(timeout=200)
    assert program.returncode == code or (code is None and program.returncode), errors
    return errors


def bytes_of(folder: Path, *names: str) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in names or ("last.pt", "best.pt")}


# ----------------------------------------------------------------------------------------------
# Signals and kills


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 epochs that nothing interrupted."""
    return train(tiny(tmp_path_factory.mktemp("straight"), epochs=8))[0]


@pytest.mark.parametrize(("number", "code"), [
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.drill), (signal.SIGINT, 130),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.drill)])
def test_a_signal_ends_after_the_step_says_how_to_go_on_and_loses_nothing(
    tmp_path: Path, straight: Path, number: int, code: int
) -> None:
    config = tiny(tmp_path / "a b", epochs=8)
    program = start(config)
    read_until(program, "epoch 1/8")
    program.send_signal(number)
    errors = ended(program, code)
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith(
        "train.py: ended as asked, and saved; go on with the same command and --resume")
    state = load_checkpoint(tmp_path / "a b/unet/last.pt")
    assert 4 <= state["step"] < 32 and state["step"] == 4 * state["epoch"] + state["batch"]
    resumed, = train(dataclasses.replace(config, resume="auto"))
    assert_same_run(resumed, straight)


@pytest.mark.drill
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_loses_nothing(
    tmp_path: Path, straight: Path, nohup: bool
) -> None:
    config = tiny(tmp_path, epochs=8)
    child, terminal = pty.fork()
    if not child:  # in a session of its own, which the terminal controls
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "train.py", *flags_of(config)],
                  os.environ | PROGRAM)
    shown = b""
    while b"epoch 1/8" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if nohup else 129)
    if not nohup:
        assert 4 <= load_checkpoint(tmp_path / "unet/last.pt")["step"] < 32
        train(dataclasses.replace(config, resume="auto"))
    assert_same_run(tmp_path / "unet", straight)


def test_a_signal_while_waiting_for_data_does_not_wait_for_it(
    kaggle: StandIn, tmp_path: Path
) -> None:
    kaggle.archives["someone/xrays"] = VirtualNIH(1500, 20_000, 40)
    program: list[subprocess.Popen] = []

    def stall(ranges: int) -> None:
        if (tmp_path / "unet/last.pt").exists():  # steps are being taken; now nothing comes
            program[0].send_signal(signal.SIGTERM)
            kaggle.served = lambda ranges: kaggle.closing.wait(60)
            kaggle.served(ranges)

    kaggle.served = stall
    config = tiny(tmp_path, data=SPEC, samples=240, batch_size=4, epochs=2, memory_limit_gb=0.001,
                  checkpoint_minutes=0.0)
    program.append(start(config, **server_environment(kaggle)))
    assert "ended as asked, and saved" in ended(program[0], 143)
    assert load_checkpoint(tmp_path / "unet/last.pt")["step"] > 0


@pytest.mark.drill
@pytest.mark.parametrize("data", ["synthetic", SPEC])
@pytest.mark.parametrize("model", ["unet", "reversed_ae"])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    kaggle: StandIn, tmp_path: Path, model: str, data: str
) -> None:
    films = {f"{'normal' if i < 260 else 'abnormal'}/{i:03d}.png": png(i) for i in range(300)}
    kaggle.archives["someone/xrays"] = Archive.of(films)
    settings = {"model": model, "data": data, "epochs": 12, "width": 8, "samples": 160,
                "batch_size": 4, "checkpoint_minutes": 0.0}
    if data == SPEC:
        settings["memory_limit_gb"] = 0.001  # so little that it streams all the time
    config, rng = tiny(tmp_path / "killed", **settings), random.Random(f"{model} {data}")
    go_on = functools.partial(start, config, "--resume", **server_environment(kaggle))
    for _ in range(5):
        program = go_on()
        read_until(program, "model     ")
        with pytest.raises(subprocess.TimeoutExpired):  # else it was not killed, but had ended
            program.communicate(timeout=rng.uniform(0, 1))
        program.kill()
        program.communicate()
    half_written = train_module.run_folder(config) / "last.pt.tmp"
    for _ in range(20):  # in the middle of a save; seen and killed, it may have been renamed
        half_written.unlink(missing_ok=True)
        program = go_on()
        while not half_written.exists():
            assert program.poll() is None, "it ended before it had been killed often enough"
        program.kill()
        program.communicate()
        if half_written.exists():
            break
    assert half_written.exists()
    ended(go_on())
    straight, = train(tiny(tmp_path / "straight", **settings))
    killed, scores = tmp_path / "killed" / model, []
    assert_same_run(killed, straight)
    for folder in (killed, straight):
        evaluate([folder], samples=60)
        scores.append(next((folder / "eval").rglob("scores.csv")).read_bytes())
    assert scores[0] == scores[1]


# ----------------------------------------------------------------------------------------------
# Damage, full disks


def flipped(checkpoint: bytes) -> bytes:
    """The same with one bit of its largest tensor flipped (between tensors there is padding)."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as file:
        at = checkpoint.index(file.read(max(file.infolist(), key=lambda member: member.file_size)))
    return checkpoint[:at] + bytes([checkpoint[at] ^ 1]) + checkpoint[at + 1 :]


DAMAGE = {"cut": lambda b: b[: len(b) // 2], "empty": lambda b: b"", "flipped": flipped}


@pytest.mark.parametrize(("name", "kind"), [
    ("last.pt", "cut"), ("last.pt", "flipped"), ("best.pt", "empty"), ("best.pt", "flipped"),
    ("best.pt", "gone")])
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(
    tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture, name: str, kind: str
) -> None:
    folder = tmp_path / "unet"
    shutil.copytree(straight, folder)
    if kind == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(DAMAGE[kind]((folder / name).read_bytes()))
    before = bytes_of(folder, *(f.name for f in folder.glob("*.[pc][ts]*")))
    says = f"{name}: {'there is no' if kind == 'gone' else 'not a readable'} checkpoint"
    with pytest.raises(UserError, match=says):
        train(tiny(tmp_path, epochs=9, resume="auto"))
    capsys.readouterr()
    train(tiny(tmp_path, epochs=8, reuse=name == "best.pt"))
    said = capsys.readouterr().out
    assert f"moved to {tmp_path / 'unet.1'}" in said
    assert name == "last.pt" or re.search(f"{says}.* not reused", said)
    assert bytes_of(tmp_path / "unet.1", *before) == before
    assert_same_run(folder, straight)


def test_a_batch_of_which_nothing_can_be_read_is_not_counted_on_either_side_of_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = tmp_path / "films"
    for i in range(100):
        write_image(films / "normal" / f"{i:03d}.png", i, (32, 32))
    settings = {"data": str(films), "samples": 60, "batch_size": 2, "epochs": 2}
    stream = create_dataloaders(tiny(tmp_path, **settings)).train
    stream.set_epoch(0)
    for position in [p.tolist() for _, p in stream][3]:
        (films / stream.samples[position].key).write_bytes(b"not an image")
    whole, = train(tiny(tmp_path / "whole", **settings))
    interrupted(monkeypatch, tiny(tmp_path / "part", **settings), 11, "train_step", signal.SIGTERM)
    part, = train(tiny(tmp_path / "part", resume="auto", **settings))
    assert_same_run(whole, part)
    assert load_checkpoint(whole / "last.pt")["step"] < 60  # one step less in the first epoch


def test_a_file_that_may_not_grow_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    folder, = train(tiny(tmp_path, epochs=1))
    kept = bytes_of(folder)
    errors = ended(start(tiny(tmp_path, epochs=3), "--resume", limit=200_000), 2)
    assert len(errors.strip().splitlines()) == 1
    assert "cannot be written" in errors and "go on with --resume" in errors
    assert bytes_of(folder) == kept and not list(folder.glob("*.tmp"))


@pytest.mark.drill
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(small_disk: Path) -> None:
    config = tiny(small_disk, epochs=6)
    folder, = train(dataclasses.replace(config, epochs=1))
    kept = bytes_of(folder)
    with open(folder / "run.log", "a") as lines:  # no room left in its last page
        lines.write("x" * (-lines.tell() % 4096))
    with open(small_disk / "other", "wb", buffering=0) as other, \
            pytest.raises(OSError, match="No space"):
        while True:
            other.write(bytes(10_000))
    errors = ended(start(config, "--resume"), 2)
    assert len(errors.strip().splitlines()) == 1
    assert "No space left" in errors or "Is the disk full" in errors
    assert bytes_of(folder) == kept
    (small_disk / "other").unlink()
    ended(start(config, "--resume"))
    assert len(log_of(folder)) == 6
    # And a folder that may only be read:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    errors = ended(start(config, "--resume", "--epochs=7"), 2)
    assert "cannot be written (Read-only file system)" in errors


# ----------------------------------------------------------------------------------------------
# Memory


def out_of_memory(monkeypatch: pytest.MonkeyPatch, when: object, error: Exception) -> list[int]:
    """Raise the error whenever when(images at a time, number of the call) holds; the images at a
    time of each call."""
    real, calls = train_module.objective_loss, []

    def objective_loss(net: object, inputs: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if net.training and when(len(images), len(calls)):
            raise error
        return real(net, inputs, images)

    monkeypatch.setattr(train_module, "objective_loss", objective_loss)
    return calls


@pytest.mark.parametrize("model", ["unet", "reversed_ae"])
def test_out_of_memory_in_mid_run_splits_the_batch_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, model: str
) -> None:
    config = tiny(tmp_path / "whole", model=model, data="synthetic", epochs=5, augment=False,
                  micro_batch=16)
    whole, = train(config)
    calls = out_of_memory(monkeypatch, lambda images, call: images > 8 and call > 10, RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to "
        "allocate 8589934592 bytes"))
    capsys.readouterr()
    split, = train(dataclasses.replace(config, output_dir=str(tmp_path / "split")))
    assert capsys.readouterr().out.count("8 images at a time from now on") == 1
    assert max(calls[12:]) == 8  # in validation, too
    a, b = log_of(whole), log_of(split)
    assert [r["step"] for r in a] == [r["step"] for r in b]  # the same batches
    # BatchNorm sees 8 images at a time instead of 16: nearly the same, not the same.
    assert float(b[-1]["val_loss"]) == pytest.approx(float(a[-1]["val_loss"]), rel=0.01)
    assert load_checkpoint(split / "last.pt")["micro_batch"] == 8


def test_out_of_memory_with_a_single_image_says_what_would_take_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = out_of_memory(monkeypatch, lambda *_: True, MemoryError())
    with pytest.raises(UserError, match=r"--micro-batch 1; .*smaller --width or --image-size"):
        train(tiny(tmp_path, batch_size=4))
    assert calls == [4, 2, 1]


def test_a_batch_is_taken_in_parts_of_eight_on_a_cpu_and_whole_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, batch_size=24)
    monkeypatch.setattr(train_module, "make_optimizer", lambda *_: None)  # none for "meta"
    for setup, asked, parts in ((Setup(CPU), None, 8), (Setup(CPU, world=4), None, 6),
                                (Setup(torch.device("meta")), None, 24), (Setup(CPU), 24, 24)):
        state = train_module.new_state(dataclasses.replace(config, micro_batch=asked), setup)
        assert state.micro_batch == parts


def test_parts_that_were_made_smaller_stay_so_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = out_of_memory(monkeypatch, lambda images, call: images > 8 and call == 2,
                          torch.cuda.OutOfMemoryError("CUDA out of memory"))
    interrupted(monkeypatch, tiny(tmp_path, epochs=3, micro_batch=16), 6, "train_step",
                signal.SIGTERM)
    assert calls[:6] == [16, 16, 8, 8, 8, 8]
    folder, = train(tiny(tmp_path, epochs=3, micro_batch=16, resume="auto"))
    assert load_checkpoint(folder / "last.pt")["micro_batch"] == 8
    folder, = train(tiny(tmp_path, epochs=4, micro_batch=4, resume="auto"))  # asked for anew
    assert load_checkpoint(folder / "last.pt")["micro_batch"] == 4


def test_calibration_depends_on_neither_batch_nor_parts(tmp_path: Path) -> None:
    config, setup = tiny(tmp_path, samples=61), Setup(CPU)
    model = train_module.new_state(config, setup).model
    states = []
    for batch_size in (16, 3):
        loaders = create_dataloaders(dataclasses.replace(config, batch_size=batch_size))
        states.append(train_module.calibrate(model, loaders, config, setup).state_dict())
    assert states[0]["count"] == 61 and same_state(*states)


# ----------------------------------------------------------------------------------------------
# Several processes


GRADIENTS = """
import os, sys
import torch, torch.distributed as dist
import models, train
from config import Config
torch.set_num_threads(1)
setup = train.join_processes(Config(device="cpu", precision="fp32"))
images = torch.randint(256, (7, 1, 32, 32), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
results = {}
for model, micro in (("unet", 7), ("reversed_ae", 2)):
    config = Config(width=4, image_size=32, latent_dim=8, objective="denoise",
                    model=model, optimizer="sgd")
    state = train.new_state(config, setup)
    state.model.eval()  # BatchNorm by its running statistics: the same for every slice
    state.micro_batch = micro
    mine = images.tensor_split(setup.world)[setup.rank]
    loss, _ = train.train_step(state, mine, 7)
    results[model] = {"loss": loss, "grads": [p.grad for p in state.model.parameters()],
                      "weights": [p.detach() for p in state.model.parameters()]}
if setup.rank == 0:
    torch.save(results, sys.argv[1])
if setup.world > 1:
    dist.destroy_process_group()
    os._exit(0)  # as train.py does
"""


@pytest.mark.drill
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(GRADIENTS)
    results = []
    for launcher in ((), TWO):
        subprocess.run([sys.executable, *launcher, script, tmp_path / "out.pt"], check=True,
                       capture_output=True, env=os.environ | PROGRAM)
        results.append(torch.load(tmp_path / "out.pt", weights_only=True))
    for model, one in results[0].items():
        two = results[1][model]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for kind in ("grads", "weights"):
            for a, b in zip(one[kind], two[kind], strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-7), f"{model} {kind}"


STOP_IN_VALIDATION = """
import os, signal, sys
import pytest
import train
from config import run_command
from test_train import at_call
if os.environ["RANK"] == "1":
    at_call(pytest.MonkeyPatch(), "validate", 2, signal.SIGTERM)
status = run_command(train.main, "train.py")
sys.stderr.flush()
os._exit(status)
"""


@pytest.mark.drill
def test_several_processes_train_validate_stop_and_resume_together(tmp_path: Path) -> None:
    three = (*TWO[:-1], "--nproc_per_node=3")  # slices of 6, 5 and 5 images
    alone, = train(tiny(tmp_path / "alone", epochs=3))
    whole = tmp_path / "whole/unet"
    program = start(tiny(tmp_path / "whole", epochs=3), launcher=three)
    output, errors = program.communicate(timeout=200)
    assert program.returncode == 0, errors
    assert "3 processes" in output and output.count("epoch 3/3") == 1
    assert (whole / "split.csv").read_bytes() == (alone / "split.csv").read_bytes()
    a, b = log_of(alone), log_of(whole)
    assert [r["step"] for r in a] == [r["step"] for r in b]
    # BatchNorm's statistics are of each process's slice: nearly the same, not the same.
    assert float(b[-1]["val_loss"]) == pytest.approx(float(a[-1]["val_loss"]), rel=0.1)
    assert load_checkpoint(whole / "best.pt")["scorer"]["count"] == 64  # of all, not of a slice
    script = tmp_path / "stop.py"
    script.write_text(STOP_IN_VALIDATION)
    for place, name in (("launcher", "train.py"), ("validation", str(script))):
        config = tiny(tmp_path / place, epochs=3)
        program = start(config, launcher=three, script=name)
        if place == "launcher":
            read_until(program, "epoch 1/3")
            program.send_signal(signal.SIGTERM)
        assert "saved; go on with the same command and --resume" in ended(program, None)
        state = load_checkpoint(tmp_path / place / "unet/last.pt")
        assert 4 <= state["step"] < 12 if place == "launcher" else (
            state["epoch"], state["batch"], state["step"]) == (1, 4, 8)
        assert "torchrun --nproc_per_node was 3, is 1" in ended(start(config, "--resume"), 2)
        ended(start(config, "--resume", launcher=three))
        assert_same_run(tmp_path / place / "unet", whole)


@pytest.mark.drill
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_a_process_that_dies_ends_the_run_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=200)
    program = start(config, launcher=TWO)
    read_until(program, "epoch 1/200")
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert "another process of this run has ended" in ended(program, None)
    step = load_checkpoint(tmp_path / "unet/last.pt")["step"]
    ended(start(dataclasses.replace(config, epochs=step // 4 + 2), "--resume", launcher=TWO))


def test_the_launchers_signal_does_not_silence_a_process_that_another_has_left() -> None:
    """torchrun sends SIGTERM to the others as soon as one has died."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        for world in (1, 2):
            with pytest.raises(RuntimeError), Signals(Setup(CPU, world=world)):
                raise RuntimeError("gloo: connection closed by peer")
            assert (signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]) == (world == 1)
        os.kill(os.getpid(), signal.SIGTERM)  # is only noted: this line is passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_two_trainings_never_share_a_folder(tmp_path: Path) -> None:
    folder, = train(tiny(tmp_path, epochs=1))
    before = (folder / "last.pt").read_bytes()
    with open_run(folder, True):
        for how in ({}, {"resume": "auto", "epochs": 3}):
            with pytest.raises(UserError, match=r"unet: another training is writing there; .*dir$"):
                train(tiny(tmp_path, **how))
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["unet"]
        assert (folder / "last.pt").read_bytes() == before
    train(tiny(tmp_path, resume="auto", epochs=2))


def test_a_run_goes_on_where_its_data_has_another_place_and_no_other_content(
    tmp_path: Path, xrays: Path, capsys: pytest.CaptureFixture
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(xrays, one)
    config = tiny(tmp_path, data=str(one), samples=None, epochs=1)
    folder, = train(config)
    one.rename(two)
    capsys.readouterr()
    moved = dataclasses.replace(config, data=str(two))
    train(dataclasses.replace(moved, reuse=True))
    assert "nothing is left to train" in capsys.readouterr().out
    assert load_run(folder).config.data == str(two)  # which evaluate.py goes by
    train(dataclasses.replace(moved, resume="auto", epochs=2))
    assert f"its images were in {one}: the names of these are the same" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.pt")["epoch"] == 2
    write_image(one / "normal" / "0.png")
    shutil.copytree(xrays, one, dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"cannot be resumed: --data was '{two}', is '{one}'\. "):
        train(dataclasses.replace(moved, data=str(one), resume="auto", epochs=3))
    write_image(two / "normal" / "0.png")
    with pytest.raises(UserError, match=rf"the images in {two} have changed since\. "):
        train(dataclasses.replace(moved, resume="auto", epochs=3))


@pytest.mark.parametrize("same_size", [True, False])
def test_pixels_that_change_under_their_names_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture, same_size: bool
) -> None:
    films = tmp_path / "films"
    for i in range(80):
        write_image(films / ("normal" if i < 70 else "sick") / f"{i}.bmp", i)
    config = tiny(tmp_path / "runs", data=str(films), samples=None, epochs=1)
    folder, = train(config)
    evaluate([folder])
    assert "have changed since training" not in capsys.readouterr().out
    for file in films.rglob("*.bmp"):
        with Image.open(file) as image:
            changed = ImageOps.invert(image).resize((40, 40 if same_size else 41))
        changed.save(file)
    with pytest.raises(UserError, match=f"resumed: the images in {films} have changed since. Go"):
        train(dataclasses.replace(config, resume="auto", epochs=2))
    evaluate([folder])
    assert "Careful: the images, their names or labels have ch" in capsys.readouterr().out
    assert len([*folder.glob("eval/films*")]) == 2  # nothing is overwritten
    train(dataclasses.replace(config, reuse=True))
    assert f"{films} have changed since" in capsys.readouterr().out
    assert (tmp_path / "runs/unet.1/last.pt").exists()


def test_a_data_set_of_another_version_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epochs, version in enumerate(("", "1", "1", "2"), 1):  # Kaggle's are known, a folder's not
        monkeypatch.setattr(Source, "version", version)
        with pytest.raises(UserError, match="have changed since") if version == "2" else (
                contextlib.nullcontext()):
            train(tiny(tmp_path, resume="auto", epochs=epochs))
    assert load_checkpoint(tmp_path / "unet/last.pt")["epoch"] == 3


def test_a_run_goes_on_in_the_precision_that_the_machine_has_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epochs, found in enumerate(("bf16", "fp32", "fp16"), 1):
        monkeypatch.setattr(train_module, "choose_precision", lambda *_, found=found: (found, ""))
        folder, = train(tiny(tmp_path, precision="auto", resume="auto", epochs=epochs))
        assert load_checkpoint(folder / "last.pt")["precision"] == found


@pytest.mark.parametrize(("batch_size", "says"), [
    (8, r"WORLD_SIZE is 4.*start it with torchrun, or unset"),
    (2, "--batch-size 2: fewer images than the 4 processes")])
def test_processes_that_are_not_there_or_too_many_are_one_line(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, says: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=says):
        train(Config(device="cpu", batch_size=batch_size))


def test_fp16_on_an_apple_gpu_is_refused_where_its_scaler_would_fail(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    with pytest.raises(UserError, match=r"--precision fp16: not on mps with PyTorch 2\.7\.1"):
        choose_precision("fp16", torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert choose_precision("fp16", torch.device("mps")) == ("fp16", "as asked")


@pytest.mark.drill
def test_a_compiled_model_trains_and_its_weights_load_without(tmp_path: Path) -> None:
    folder, = train(tiny(tmp_path, compile=True, epochs=2))
    assert evaluate([folder], samples=40)[0]["auroc"] is not None


# ----------------------------------------------------------------------------------------------
# Weights & Biases


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    """In wandb's place."""
    fake = mock.MagicMock()
    fake.init.return_value.id = "abc123"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_rows_of_the_csv_and_a_resumed_run_goes_on_there(
    tmp_path: Path, wandb: mock.MagicMock
) -> None:
    train(tiny(tmp_path, wandb=True, epochs=1))
    folder, = train(tiny(tmp_path, wandb=True, epochs=2, resume="auto"))
    run = wandb.init.return_value
    rows = [call.args[0] for call in run.log.call_args_list]
    assert [{k: str(v) for k, v in row.items()} for row in rows] == log_of(folder)
    assert [call.kwargs["id"] for call in wandb.init.call_args_list] == [None, "abc123"]
    assert run.finish.call_count == 2 and os.environ["WANDB_PROJECT"] == "imgae-dx"
    train(tiny(tmp_path / "off", epochs=1))
    assert wandb.init.call_count == 2  # never unasked


@pytest.mark.curves
@pytest.mark.parametrize("broken", ["import", "key", "init", "log", "finish"])
def test_wandb_never_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    wandb: mock.MagicMock, broken: str
) -> None:
    says = {"import": "cannot be used (import of wandb", "key": "no key: set WANDB_API_KEY"}.get(
        broken, "the network is dead")
    if broken == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif broken == "key":
        wandb.login.return_value = False
        wandb.init.side_effect = AssertionError("it would ask for a key, and wait")
    else:
        owner = wandb if broken == "init" else wandb.init.return_value
        getattr(owner, broken).side_effect = ConnectionError("the network is dead")
    folder, = train(tiny(tmp_path, wandb=True, epochs=1))
    assert len([x for x in capsys.readouterr().out.splitlines() if says in x]) == 1
    assert (folder / "curves.png").exists()


def test_a_checkpoint_is_written_after_every_epoch_and_as_often_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = counted(monkeypatch, train_module, "write_file", lambda path, _: path.name)
    train(tiny(tmp_path / "seldom", epochs=3))
    assert saved.count("last.pt") == 3
    saved.clear()
    train(tiny(tmp_path / "often", epochs=3, checkpoint_minutes=0.0))
    assert saved.count("last.pt") == 15  # after each of 12 steps, and after each epoch
