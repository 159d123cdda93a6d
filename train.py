"""Train an autoencoder on normal images.

    python train.py --model unet                             on the built-in phantom
    python train.py --model both --data my_xrays --epochs 30
    python train.py --model unet --resume                    go on where it stopped

Every flag can also come from the environment (IMGAE_EPOCHS=5) or from --config FILE.
"""

import os
import sys

from config import Config, UserError, flag, parse_config, run_command, run_folder

if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    if status := run_command(lambda: parse_config(description=__doc__), "train.py"):
        sys.exit(status)
    # Threads that wait for each other then leave the core to whoever else wants it. Two programs
    # of spinning threads on the same cores slow each other down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import csv
import ctypes
import dataclasses
import hashlib
import json
import math
import platform
import shutil
import textwrap
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    PHANTOM_SAMPLES,
    ImageStream,
    KaggleSource,
    Loaders,
    augment,
    create_dataloaders,
    describe,
    describe_memory,
    to_float,
    write_splits,
)
from models import AnomalyScorer, Draws, Reading, corrupt, create_model, objective_loss, read

FORMAT = 1  # of the checkpoints
CALIBRATION_IMAGES = 256  # training normals that the scorer is calibrated on, at most
# Settings that a resumed run may change; any other change makes it another run.
CHANGEABLE = ("epochs", "patience", "min_delta", "keep_every", "checkpoint_minutes", "device",
              "precision", "memory_limit_gb", "output_dir", "resume", "reuse")
LOG_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "learning_rate", "images_per_second",
               "seconds", "peak_memory_mb")


# ----------------------------------------------------------------------------------------------
# The machine


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """(device, why it is that one). UserError if the wanted one is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"--device: {wanted!r} is not one of auto, cpu, cuda, mps")
    if wanted == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device auto")
    if wanted == "mps" and not mps:
        raise UserError("--device mps: PyTorch finds no Apple GPU here; use --device auto")
    if wanted != "auto":
        return torch.device(wanted), "as asked"
    if cuda:
        return torch.device("cuda"), torch.cuda.get_device_name()
    if mps:
        return torch.device("mps"), "Apple GPU, no CUDA device"
    return torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads"


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """("bf16" or "fp32", why)."""
    if wanted != "auto":
        return wanted, "as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return "bf16", "this GPU multiplies in bf16"
    if device.type == "cpu":
        try:
            flags = set(Path("/proc/cpuinfo").read_text().split())
        except OSError:
            flags = set()
        if found := flags & {"amx_bf16", "avx512_bf16"}:
            return "bf16", f"this CPU has {', '.join(sorted(found))}"
    return "fp32", "no fast bf16 on this device"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context for the network's forward pass; BatchNorm's statistics stay in fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def place(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The model on the device, in the memory layout that its convolutions are fastest in."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" or precision == "bf16":
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


def keep_freed_memory() -> None:
    """Let the process keep the memory it frees (Linux with glibc; elsewhere nothing happens).

    Otherwise every large activation is asked of the kernel anew and zeroed, which costs a third
    of a training step on a CPU.
    """
    if sys.platform == "linux" and (libc := ctypes.CDLL(None)) and hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: on a CUDA device there, else by the process. 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def seeded(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Progress:
    """A bar with rate and time left; where nobody watches, a line every 15 seconds."""

    def __init__(self, total: int, label: str, start: int = 0) -> None:
        self.label, self.total, self.done, self.start = label, total, start, start
        self.began = self.shown = time.monotonic()
        self.bar = tqdm(total=total, initial=start, desc=label, unit=" images", leave=False,
                        dynamic_ncols=True) if sys.stderr.isatty() else None

    def update(self, images: int, label: str = "", **values: float) -> None:
        self.done += images
        self.label = label or self.label
        text = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        if self.bar is not None:
            self.bar.set_description(self.label, refresh=False)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(images)
        elif time.monotonic() - self.shown > 15:
            self.shown = time.monotonic()
            rate = (self.done - self.start) / (self.shown - self.began)
            left = int((self.total - self.done) / rate)
            print(f"  {self.label}  {self.done}/{self.total} images  {text}  {rate:.1f} images/s  "
                  f"{left // 60}:{left % 60:02d} left", flush=True)

    def write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ----------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(state: dict, path: Path) -> None:
    """Write atomically: under a temporary name, to the disk, then renamed over the old one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides the OSError of a full disk
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error}); what was there is untouched") from None


def load_checkpoint(path: Path, model: str | None = None) -> dict:
    """A checkpoint of ours, on the CPU. Only tensors and plain values are ever unpickled.

    UserError if the file is missing, damaged, not ours, or of another model than `model`.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint there")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        ours = isinstance(state, dict) and {"format", "model", "config"} <= state.keys()
    except Exception as error:  # damage shows as many kinds of errors in torch's reader
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{path}: not a readable checkpoint, perhaps cut short or not ours "
                        f"({type(error).__name__}: {reason})") from None
    if not ours:
        raise UserError(f"{path}: not a checkpoint of this project")
    if state["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version of this project")
    if model is not None and state["config"]["model"] != model:
        raise UserError(f"{path}: holds a {state['config']['model']}, not a {model}; "
                        f"give --model {state['config']['model']}")
    return state


def checkpoint_of_resume(config: Config) -> Path | None:
    """The file that --resume means; None if the run folder has no checkpoint yet."""
    if config.resume == "auto":
        path = run_folder(config) / "last.pt"
        return path if path.exists() else None
    path = Path(config.resume)
    return path / "last.pt" if path.is_dir() else path


def refuse_changes(saved: dict, config: Config, path: Path) -> None:
    """UserError with the list of differences if this is not the run that the checkpoint is of."""
    now = dataclasses.asdict(config)
    changed = [f"{flag(k)} was {saved.get(k)!r}, is {now[k]!r}" for k in now
               if k not in CHANGEABLE and saved.get(k) != now[k]]
    if changed:
        raise UserError(f"{path}: cannot be resumed with other settings: {'; '.join(changed)}")


def is_finished(folder: Path, config: Config, fingerprint: str) -> bool:
    """Whether the folder holds a run of these very settings and data that ran to its end."""
    if not (folder / "best.pt").is_file():
        return False
    state = load_checkpoint(folder / "best.pt")
    asked, saved = dataclasses.asdict(config), state["config"]
    ignored = ("output_dir", "resume", "reuse", "keep_every", "checkpoint_minutes",
               "memory_limit_gb", "device", "precision")
    return bool(state["scorer"]) and state["data_fingerprint"] == fingerprint and all(
        saved.get(k) == v for k, v in asked.items() if k not in ignored)


def move_aside(folder: Path) -> None:
    """Rename an existing run to the first free name with a number: nothing is overwritten."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"an earlier run was there: moved to {aside}")


def make_run_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir: {folder} cannot be written ({error.strerror})") from None


# ----------------------------------------------------------------------------------------------
# Training


def make_optimizer(config: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    kinds = {"adam": (torch.optim.Adam, {}), "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}),
             "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})}
    kind, extra = kinds[config.optimizer]
    return kind(model.parameters(), lr=config.learning_rate, fused=device.type != "mps", **extra)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state, whatever device and memory layout it was saved from."""
    fused = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = fused
    # Fused kernels pair weights and moments by their place in memory: same strides, or nonsense.
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def learning_rate_at(step: int, total: int, config: Config) -> float:
    """Linear warm-up over the first 5 % of `total` steps, then the schedule; 2 % after `total`."""
    warm = max(1, total // 20)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if config.schedule == "constant":
        return config.learning_rate
    share = min(1.0, (step - warm) / max(1, total - warm))
    return config.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


@torch.inference_mode()
def validate(model: nn.Module, loader: DataLoader, config: Config, device: torch.device,
             precision: str) -> float:
    """The objective on validation normals, corrupted in the same way every time.

    A loss on clean input would reward copying it.
    """
    model.eval()
    total, count = 0.0, 0
    for i, (images, _) in enumerate(loader):
        with autocast(device, precision):
            images = to_float(images, device)
            draws = Draws(seeded(config.seed, "validate", i), len(images))
            loss = objective_loss(model, corrupt(images, config.objective, draws), images)
        total += loss.item() * len(images)
        count += len(images)
    if not count:
        raise UserError("no validation image could be read")
    return total / count


@torch.inference_mode()
def calibrate(model: nn.Module, loaders: Loaders, device: torch.device,
              precision: str) -> AnomalyScorer:
    """A scorer calibrated on training normals, with the scores of the validation normals."""
    model.eval()
    scorer = AnomalyScorer()
    stream: ImageStream = loaders.train.dataset
    some = stream.every(math.ceil(len(stream.samples) / CALIBRATION_IMAGES))

    def reading(images: torch.Tensor) -> Reading:
        images = to_float(images, device)
        with autocast(device, precision):
            return read(model, images)

    bar = Progress(len(some.positions) + len(loaders.val.dataset.samples), "calibrating")
    for images, _ in some:
        scorer.add(reading(images))
        bar.update(len(images))
    if not bar.done:
        raise UserError("none of the training images that the scores are calibrated on can be read")
    scorer.finish()
    normals = []
    for images, _ in loaders.val:
        normals.append(scorer.scores(reading(images)))
        bar.update(len(images))
    bar.close()
    scorer.refer_to(normals)
    return scorer


def train(config: Config) -> list[Path]:
    """Train what the configuration asks for; the run folders (one, or two for model="both")."""
    synthetic = config.data == "synthetic"
    config = dataclasses.replace(
        config, epochs=config.epochs or (3 if synthetic else 30),
        samples=config.samples or (PHANTOM_SAMPLES if synthetic else None),
        # Absolute, so that the run can be evaluated from anywhere.
        data=config.data if synthetic or not os.path.exists(config.data)
        else os.path.abspath(config.data))
    models = ("unet", "reversed_ae") if config.model == "both" else (config.model,)
    configs = [dataclasses.replace(config, model=model) for model in models]
    # The machine and the models come first: what they refuse costs no reading of data.
    device, _ = choose_device(config.device)
    for each in configs:
        with torch.device("meta"):
            create_model(each.model, each)
        if each.resume and (checkpoint := checkpoint_of_resume(each)):
            load_checkpoint(checkpoint, each.model)
    if synthetic:
        print("This trains on the BUILT-IN PHANTOM: drawn films, not real X-rays. For your own "
              "images give --data FOLDER.")
    loaders = create_dataloaders(config)  # one for both models: images are read and decoded once
    return [train_one(each, loaders) for each in configs]


def train_one(config: Config, loaders: Loaders) -> Path:
    """Train one model from start, or from a checkpoint, to calibrated best weights."""
    folder = run_folder(config)
    device, why_device = choose_device(config.device)
    precision, why_precision = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)
    model = place(create_model(config.model, config), device, precision)
    fingerprint = loaders.source.fingerprint()

    settings = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items())
    print(textwrap.fill(settings, 100, initial_indent="settings  ", subsequent_indent=" " * 10,
                        break_on_hyphens=False, break_long_words=False))
    print(f"device    {device} ({why_device}), {precision} ({why_precision})")
    print(describe(loaders.source, loaders.splits))
    print(describe_memory(loaders))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model     {config.model}, {parameters:,} parameters", flush=True)

    # Which checkpoint to go on from, if any.
    checkpoint = checkpoint_of_resume(config) if config.resume else None
    if config.resume and checkpoint is None:
        print(f"resume    no checkpoint in {folder} yet: starting afresh")
    if config.reuse and not config.resume:
        if is_finished(folder, config, fingerprint):
            print(f"reuse     {folder} is a finished run of these settings: left as it is\n")
            return folder
        if (folder / "last.pt").is_file():
            saved = load_checkpoint(folder / "last.pt")
            same = all(saved["config"].get(k) == v for k, v in dataclasses.asdict(config).items()
                       if k not in CHANGEABLE or k == "epochs")
            if same and saved["data_fingerprint"] == fingerprint:
                checkpoint = folder / "last.pt"

    optimizer = make_optimizer(config, model, device)
    step, epoch, best_loss, bad_epochs, rows = 0, 0, math.inf, 0, []
    loss_sum, count, earlier_seconds = 0.0, 0, 0.0  # of the epoch so far
    stream: ImageStream = loaders.train.dataset
    stream.set_epoch(0)
    schedule_epochs = config.epochs
    if checkpoint:
        state = load_checkpoint(checkpoint, config.model)
        if "optimizer" in state and "stream" not in state:
            raise UserError(f"{checkpoint}: of an earlier version; start over without --resume")
        if "optimizer" not in state:
            raise UserError(f"{checkpoint}: holds weights only; resume from the last.pt beside it")
        if state["epoch"]:
            load_checkpoint(checkpoint.parent / "best.pt", config.model)  # missing: say so
        refuse_changes(state["config"], config, checkpoint)
        if state["data_fingerprint"] != fingerprint:
            raise UserError(f"{checkpoint}: the images in {config.data} have changed since")
        model.load_state_dict(state["model"])
        load_optimizer(optimizer, state["optimizer"])
        step, epoch, rows = state["step"], state["epoch"], state["log"]
        best_loss, bad_epochs = state["best_loss"], state["bad_epochs"]
        schedule_epochs = state["schedule_epochs"]
        stream.set_epoch(epoch)
        if state["stream"]["next_batch"]:
            stream.load_state_dict(state["stream"])
            loss_sum, count = state["loss_sum"], state["count"]
            earlier_seconds = state["seconds"]
        del state
        print(f"resume    {checkpoint}, after epoch {epoch}, step {step}")
    here = checkpoint is not None and checkpoint.parent.resolve() == folder.resolve()
    if not here and any((folder / name).exists() for name in ("last.pt", "best.pt", "log.csv")):
        move_aside(folder)
    make_run_folder(folder)
    if checkpoint and not here:  # the best weights so far come along
        if epoch:
            shutil.copyfile(checkpoint.parent / "best.pt", folder / "best.pt")
        shutil.copyfile(checkpoint, folder / "last.pt")
    write_splits(loaders.splits, folder / "split.csv")
    saved_config = dataclasses.asdict(config) | {"resume": None, "reuse": False}
    (folder / "config.tmp").write_text(json.dumps(saved_config, indent=2) + "\n")
    os.replace(folder / "config.tmp", folder / "config.json")
    common = {"format": FORMAT, "config": saved_config, "data_fingerprint": fingerprint,
              "precision": precision,
              "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}}

    total_steps = max(1, schedule_epochs * len(loaders.train))
    images_an_epoch = len(loaders.train) * loaders.train.dataset.batch_size
    bar = Progress(config.epochs * images_an_epoch, config.model, epoch * images_an_epoch + count)
    saved_at = time.monotonic()

    def save_last() -> None:
        nonlocal saved_at
        save_checkpoint(common | {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
            "epoch": epoch, "best_loss": best_loss, "bad_epochs": bad_epochs,
            "schedule_epochs": schedule_epochs, "log": rows, "stream": stream.state_dict(),
            "loss_sum": loss_sum, "count": count,
            "seconds": earlier_seconds + time.monotonic() - began if count else 0.0,
        }, folder / "last.pt")
        saved_at = time.monotonic()

    while epoch < config.epochs and bad_epochs < config.patience:
        # Train: the randomness of a step depends on (seed, step) alone.
        began = time.monotonic()
        model.train()
        for images, _ in loaders.train:
            torch.manual_seed(seeded(config.seed, "dropout", step).initial_seed())
            images = to_float(images, device)
            draws = Draws(seeded(config.seed, "step", step), len(images))
            if config.augment:
                images = augment(images, draws)
            inputs = corrupt(images, config.objective, draws)
            rate = learning_rate_at(step, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast(device, precision):
                loss = objective_loss(model, inputs, images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            value = loss.item()  # waits for the device; little beside a step of these models
            if not math.isfinite(value):
                raise UserError(f"the loss is {value} at epoch {epoch + 1}, step {step + 1}; "
                                "try a smaller --learning-rate")
            step += 1
            loss_sum += value * len(images)
            count += len(images)
            bar.update(len(images), f"{config.model} epoch {epoch + 1}/{config.epochs}", loss=value)
            if time.monotonic() - saved_at >= 60 * config.checkpoint_minutes:
                save_last()
        if not count:
            raise UserError("no training image could be read")
        train_seconds = earlier_seconds + time.monotonic() - began

        # Validate, log.
        val_loss = validate(model, loaders.val, config, device, precision)
        if not math.isfinite(val_loss):
            raise UserError(f"the validation loss is {val_loss} after epoch {epoch + 1}; "
                            "try a smaller --learning-rate")
        epoch += 1
        seconds = earlier_seconds + time.monotonic() - began
        rate = learning_rate_at(step - 1, total_steps, config)
        rows.append(dict(zip(LOG_COLUMNS, (
            epoch, step, loss_sum / count, val_loss, rate, count / train_seconds, seconds,
            peak_memory_mb(device)), strict=True)))
        write_log(rows, folder / "log.csv")
        better = val_loss < best_loss - config.min_delta
        bar.write(f"  epoch {epoch}/{config.epochs}  train loss {loss_sum / count:.4f}  validation "
                  f"loss {val_loss:.4f}{' (best)' if better else ''}  "
                  f"{count / train_seconds:.1f} images/s  {seconds:.0f} s")

        # Save, and perhaps stop.
        weights = common | {"model": model.state_dict(), "epoch": epoch, "val_loss": val_loss,
                            "scorer": None}
        if better:
            best_loss, bad_epochs = val_loss, 0
            save_checkpoint(weights, folder / "best.pt")
        else:
            bad_epochs += 1
        if config.keep_every and epoch % config.keep_every == 0:
            save_checkpoint(weights, folder / f"epoch{epoch}.pt")
        stream.set_epoch(epoch)
        loss_sum, count, earlier_seconds = 0.0, 0, 0.0
        ended = epoch == config.epochs or bad_epochs == config.patience
        # last.pt is large (weights and two moments): at most once a minute, and at the end.
        if ended or epoch == 1 or time.monotonic() - saved_at > 60:
            save_last()
    bar.close()
    write_log(rows, folder / "log.csv")  # also where nothing was left to train
    if bad_epochs >= config.patience:
        print(f"stopped early: no better validation loss for {config.patience} epochs")

    # Calibrate the scorers on the best weights, and store them with these.
    best = load_checkpoint(folder / "best.pt", config.model)
    model.load_state_dict(best["model"])
    scorer = calibrate(model, loaders, device, precision)
    save_checkpoint(dict(best) | {"config": saved_config, "scorer": scorer.state_dict()},
                    folder / "best.pt")
    draw_curves(rows, folder / "curves.png", config.model)
    report_data(loaders)
    print(f"written   {folder}/: best.pt (epoch {best['epoch']}, validation loss "
          f"{best['val_loss']:.4f}), last.pt, log.csv, curves.png, split.csv, config.json")
    print(f"next      python evaluate.py {folder}\n", flush=True)
    return folder


def report_data(loaders: Loaders) -> None:
    """Say what the data cost, and which images could not be read."""
    peak = loaders.train.dataset.memory.whole.peak / 1e6
    print(f"memory    images took {peak:,.1f} MB at the most")
    if isinstance(loaders.source, KaggleSource):
        print(loaders.source.report())
    for name, loader in (("train", loaders.train), ("validation", loaders.val)):
        for key, reason in loader.dataset.bad.items():
            print(f"skipped   {key} ({name}): {reason}")


def write_log(rows: list[dict], file: Path) -> None:
    """log.csv, whole: a few rows, and never a torn one after a resume."""
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(rows: list[dict], file: Path, title: str) -> None:
    """Training and validation loss over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row["train_loss"] for row in rows], "o-", color="#0072B2", label="training",
              markersize=4)
    axes.plot(epochs, [row["val_loss"] for row in rows], "s--", color="#D55E00",
              label="validation normals", markersize=4)
    best = min(rows, key=lambda row: row["val_loss"])
    axes.annotate("best", (best["epoch"], best["val_loss"]), textcoords="offset points",
                  xytext=(0, 8), ha="center")
    axes.set(xlabel="epoch", ylabel="mean absolute error", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(file, dpi=120)


def main() -> None:
    train(parse_config(description=__doc__))


if __name__ == "__main__":
    sys.exit(run_command(main, "train.py", "; go on from the last checkpoint with --resume"))
