"""Train an autoencoder on normal images.

    python train.py --model unet                             on the built-in phantom
    python train.py --model both --data my_xrays --epochs 30
    python train.py --model unet --resume                    go on where it stopped
    python train.py --model both --data my_xrays --check     would that work, and how long?
    torchrun --nproc_per_node=2 train.py --model unet        on two GPUs

Every flag can also come from the environment (IMGAE_EPOCHS=5) or from --config FILE.
"""

import os
import sys

from config import (
    MODELS, Config, GracefulExit, UserError, command, command_line, flag, log, on_screen,
    parse_config, require_packages, run_command, run_folder)

if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    if status := (run_command(lambda: parse_config(description=__doc__), "train.py")
                  or run_command(require_packages, "train.py")):
        sys.exit(status)
    # Threads that wait for each other then leave the core to whoever else wants it. Two programs
    # of spinning threads on the same cores slow each other down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import csv
import dataclasses
import datetime
import io
import itertools
import json
import logging
import math
import platform
import shlex
import shutil
import signal
import threading
import time
import types
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    PHANTOM_SAMPLES, ImageStream, KaggleSource, Loaders, create_dataloaders, describe,
    describe_memory, open_source, write_splits)
from models import (
    BASELINE, DEFAULT_SCORER, READ_AT_ONCE, READER_BATCH, READERS, AnomalyScorer, Draws, Setup,
    augment, choose_device, choose_precision, corrupt, create_model, draw_lesions, objective_loss,
    pooled, reconstruct_evenly, score_images, seeded, to_float, train_reader, untrained_model, warp)

FORMAT = 12  # of the checkpoints
CALIBRATION_IMAGES = 512  # training normals that the scorer is calibrated on, at most
LEAST_DRAWN, MOST_DRAWN = 512, 2048  # training normals with lesions drawn on, for the readers
# Settings that a resumed run may change. Any other change makes it another run.
CHANGEABLE = ("epochs", "patience", "min_delta", "checkpoint_minutes", "device",
              "precision", "micro_batch", "compile", "deterministic", "memory_limit_gb", "seeds",
              "output_dir", "resume", "reuse", "wandb", "wandb_project")
LOG_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "learning_rate", "skipped_steps",
               "images_per_second", "data_wait", "seconds", "process_mb", "device_mb")
BAD_STEPS = 3  # in a row whose loss is not finite, before training ends
BATCHNORM_MOMENTUM = 0.1  # PyTorch's default
LARGE_MATRIX = 1 << 25  # numbers; LeanAdam keeps less state of such a parameter
TO_RESUME = "the same command and --resume (in a notebook: resume=\"auto\")"
ENDED = f"ended as asked, and saved; go on with {TO_RESUME}"


# ----------------------------------------------------------------------------------------------
# Setup: device, precision, processes


def join_processes(config: Config) -> Setup:
    """The Setup of this process: the device, and its place among those that torchrun started.

    The precision is fp32 until a run chooses it. UserError if device or processes do not fit.
    """
    device, _ = choose_device(config.device)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if config.deterministic:  # only algorithms that add in a fixed order; else a warning
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for this
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    if world == 1:
        return Setup(device)
    if device.type == "mps":
        raise UserError("torchrun: several processes cannot share an Apple GPU; use --device cpu "
                        "or one process")
    if config.batch_size < world:
        raise UserError(f"--batch-size {config.batch_size}: fewer images than the {world} "
                        "processes that share them")
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun: {local + 1} processes here, but only "
                            f"{torch.cuda.device_count()} GPUs; give --nproc_per_node="
                            f"{torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if not dist.is_initialized():
        try:  # hours: the others wait while the first one calibrates
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=3))
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is {world}, but the other processes cannot be found "
                            f"({error}): start it with torchrun, or unset WORLD_SIZE") from None
    return Setup(device, rank=rank, world=world)


def process_memory() -> int:
    """Most bytes that this process has held so far; 0 if not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def progress(total: int, label: str, initial: int = 0, show: bool = True,
             unit: str = "images") -> tqdm:
    """A progress bar over images; where nobody watches, a line every 15 seconds."""
    pause = 0.2 if sys.stderr.isatty() else 15
    return tqdm(total=total, desc=label, initial=initial, unit=f" {unit}", leave=False,
                mininterval=pause, delay=pause, dynamic_ncols=True, disable=not show)


# ----------------------------------------------------------------------------------------------
# Files of a run


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a checkpoint, whole or not at all. UserError if that fails."""
    with written(path) as f:
        torch.save(state, f)


def write_text(file: Path, text: str) -> None:
    """Write a small file, whole or not at all. UserError if that fails."""
    with written(file) as f:
        f.write(text.encode())


@contextlib.contextmanager
def written(path: Path) -> Iterator[Any]:
    """A file under a temporary name, to write into. It is renamed when all is on the disk."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the name, too, where folders can be synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):  # torch hides a full disk's OSError
            raise
        raise UserError(f"{path}: cannot be written ({reason_of(error)}). Is the disk full, or has "
                        "the folder gone? What was there before is untouched: mend it and go on "
                        "with --resume") from None


def load_checkpoint(path: Path, model: str | None = None) -> dict:
    """A checkpoint of ours, on the CPU. Only tensors and plain values are ever unpickled.

    UserError if it is missing, damaged (its checksums are compared first), not ours, of another
    version, or of another model than `model`.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint there")
    try:
        with zipfile.ZipFile(path) as file:  # torch writes a zip file, but does not check it
            if wrong := file.testzip():
                raise ValueError(f"the checksum of {wrong} in it is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        version, kind = state["format"], state["config"]["model"]
    except Exception as error:  # damage shows as many kinds of errors in the readers
        why = "it holds code, refused" if "Unsupported" in str(error) else (
            "damaged, cut short, or not of this project")
        raise UserError(f"{path}: not a readable checkpoint, {why} ({type(error).__name__}: "
                        f"{reason_of(error)[:160]})") from None
    if version != FORMAT:
        when = "a newer" if version > FORMAT else "an earlier"
        raise UserError(f"{path}: written by {when} version of this project; use that one, or "
                        "train again without --resume")
    if model is not None and kind != model:
        raise UserError(f"{path}: holds a {kind}, not a {model}; give --model {kind}")
    return state


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    return text or type(error).__name__


def differences(state: dict, config: Config, fingerprint: str, also: tuple[str, ...]) -> list[str]:
    """What makes a checkpoint another run than that of config and data; [] if nothing does.

    A setting that the checkpoint does not have is its default. Data may lie in another place.
    also: settings of CHANGEABLE that must be the same all the same.
    """
    saved, now = dataclasses.asdict(Config(**state["config"])), dataclasses.asdict(config)
    if state["data_fingerprint"] == fingerprint:
        now["data"] = saved["data"]
    elif saved["data"] == config.data:
        return [f"the images in {config.data} have changed since"]
    return [f"{flag(k)} was {saved[k]!r}, is {now[k]!r}" for k in now
            if saved[k] != now[k] and (k not in CHANGEABLE or k in also)]


@contextlib.contextmanager
def open_run(folder: Path, go_on: bool) -> Iterator[None]:
    """Make the run folder and keep other trainings out of it while inside; log to its run.log.

    Unless training goes on in it, what is there of another run is moved aside: nothing is
    overwritten. UserError if nothing can be written there, or another training is there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output-dir: {folder} cannot be written ({error.strerror})") from None
    try:
        with contextlib.suppress(ImportError):  # Windows has no such locks, nor have some disks
            import fcntl

            try:
                fcntl.flock(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another training is writing there; wait for it, or "
                                "give this one another --output-dir") from None
            except OSError:
                pass
        if not go_on and any((folder / n).exists() for n in ("last.pt", "best.pt", "log.csv")):
            aside = next(aside for n in itertools.count(1) if not (
                aside := folder.with_name(f"{folder.name}.{n}")).exists())
            handler.close()
            folder.rename(aside)
            log.info(f"an earlier run was there: moved to {aside}")
            with open_run(folder, go_on):
                yield
            return
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        # A full disk is reported by what must be saved.
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        log.addHandler(handler)
        yield
    except BaseException as error:
        if handler in log.handlers:  # only to the file: on the screen it is shown anyway
            handler.handle(logging.LogRecord("", logging.ERROR, "", 0, "ended by "
                                             f"{type(error).__name__}: {error}", (), None))
        raise
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def settings_of(config: Config) -> dict[str, Any]:
    """What a run keeps of its configuration: all but how it was started."""
    return dataclasses.asdict(config) | {"resume": None, "reuse": False}


def write_log(rows: list[dict], file: Path) -> None:
    """log.csv, whole: a few rows, and never a torn one after a resume."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def draw_curves(rows: list[dict], file: Path, title: str) -> None:
    """Draw training and validation loss over epochs, from the rows of log.csv."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):  # not by a user's own style
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        epochs = [row["epoch"] for row in rows]
        for key, style, colour, label in (("train_loss", "o-", "#0072B2", "training"),
                                          ("val_loss", "s--", "#D55E00", "validation normals")):
            axes.plot(epochs, [row[key] for row in rows], style, color=colour, label=label,
                      markersize=4)
        best = min(rows, key=lambda row: row["val_loss"])["epoch"]
        axes.axvline(best, color="0.6", linewidth=1, linestyle=":", label=f"best: epoch {best}")
        axes.set(xlabel="epoch", ylabel="mean absolute error")
        axes.set_title(title, parse_math=False)  # a name with a $ in it is a name
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        figure.savefig(file, dpi=120)


# ----------------------------------------------------------------------------------------------
# Optimizer


class LeanAdam(torch.optim.Adam):
    """Adam that keeps little state of very large matrices (LARGE_MATRIX numbers and more).

    Of such a matrix the first moment is kept in bf16. Of the second moment only the means over rows
    and columns are kept, whose product stands for it (Shazeer and Stern, ICML 2018, algorithm 2;
    with a first moment in bf16 also Zhai et al., CVPR 2022). That is a quarter of Adam's state. All
    other parameters take PyTorch's own step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step. Gradients of large matrices are freed."""
        for group in self.param_groups:
            for weight in group["params"]:
                if is_large(weight) and (weight.grad is not None or factors_of(weight)):
                    self._step_large(weight, group)
                    weight.grad = None  # PyTorch's own step passes it over
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what large ones are the product of."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for weight in group["params"]:
                factors_of(weight).clear()

    def _step_large(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.bfloat16)
            state["row_sq"], state["column_sq"] = map(weight.new_zeros, weight.shape)
        mean, row_sq, column_sq = state["exp_avg"], state["row_sq"], state["column_sq"]
        state["step"] += 1
        t = float(state["step"])
        # In tiles, of which all temporaries stay in the CPU's cache.
        width = min(4096, weight.shape[1])
        height = (1 << 20 if weight.device.type == "cpu" else 1 << 24) // width
        tiles = [(slice(i, i + height), slice(j, j + width)) for i in range(0, len(weight), height)
                 for j in range(0, weight.shape[1], width)]
        if factors := factors_of(weight):
            g, x = map(torch.cat, zip(*factors, strict=True))  # micro-batches one below the other
            # The means of squares of g.T @ x. In fp64: shares of images may all but cancel.
            rows, columns = ((b @ b.T @ a * a).sum(0).float() / b.shape[1]
                             for a, b in itertools.permutations((g.double(), x.double())))
        else:
            rows, columns = torch.zeros_like(row_sq), torch.zeros_like(column_sq)
            for a, b in tiles:
                squares = weight.grad[a, b].square()
                rows[a] += squares.sum(1) / weight.shape[1]
                columns[b] += squares.sum(0) / weight.shape[0]
        row_sq.lerp_(rows, 1 - beta2)
        column_sq.lerp_(columns, 1 - beta2)
        # weight -= lr * mean / (sqrt(second moment) + eps), the second moment being
        # row_sq * column_sq / mean(row_sq)
        scale = (row_sq / row_sq.mean().clamp(min=1e-30)).sqrt().clamp(min=1e-6)
        below = 1 / ((column_sq / (1 - beta2**t)).sqrt() + group["eps"])
        left = (-group["lr"] / (1 - beta1**t) / scale)[:, None]
        for a, b in tiles:
            moment = mean[a, b].float()
            if factors:
                moment.addmm_(g[:, a].T, x[:, b], beta=beta1, alpha=1 - beta1)
            else:
                moment.mul_(beta1).add_(weight.grad[a, b], alpha=1 - beta1)
            mean[a, b] = moment
            weight[a, b].addcmul_(moment.mul_(below[b]), left[a])


def factors_of(weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a weight's gradient is the product of, if it is kept like that (see models.Linear)."""
    return getattr(weight, "factors", [])


def is_large(parameter: Tensor) -> bool:
    """Whether LeanAdam keeps less state of the parameter."""
    return parameter.ndim == 2 and parameter.numel() >= LARGE_MATRIX


def make_optimizer(config: Config, model: nn.Module, setup: Setup) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, for the model's parameters."""
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "lean_adam": (LeanAdam, {}), "adam": (torch.optim.Adam, {}),
        "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})}
    kind, extra = kinds[config.optimizer]
    # The gradient scaler shows gradients unscaled, and only finite ones, to unfused kernels alone.
    fused = setup.device.type != "mps" and setup.precision != "fp16"
    # Nor can a gradient be kept in factors where it is unscaled, exchanged or compiled.
    if kind is LeanAdam and setup.device.type == "cpu" and fused and setup.world == 1 and (
            not config.compile):
        for weight in filter(is_large, model.parameters()):
            weight.factors = []  # type: ignore[attr-defined]
    return kind(model.parameters(), lr=config.learning_rate, fused=fused, **extra)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state, whatever device and memory layout it was saved from."""
    fused = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict(
        state | {"param_groups": [g | {"fused": fused} for g in state["param_groups"]]})
    # Fused kernels pair weights and moments by their place in memory: same strides, or nonsense.
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                # PyTorch has cast LeanAdam's moments to the parameter's type.
                dtype = torch.bfloat16 if "row_sq" in moments else parameter.dtype
                moments[name] = torch.empty_like(parameter, dtype=dtype).copy_(value)


def learning_rate_at(step: int, total: int, config: Config) -> float:
    """Linear warm-up over the first 5 % of `total` steps, then the schedule; 2 % after `total`."""
    warm = max(1, total // 20)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if config.schedule == "constant":
        return config.learning_rate
    share = min(1.0, (step - warm) / max(1, total - warm))
    return config.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


# ----------------------------------------------------------------------------------------------
# One step


class Objective(nn.Module):
    """The loss as a module, which is what DistributedDataParallel and torch.compile take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, images: Tensor) -> Tensor:
        return objective_loss(self.model, inputs, images)


@dataclasses.dataclass
class TrainingState:
    """All that changes while a model is trained, which is what last.pt must hold."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    micro_batch: int  # images that a process takes at a time
    schedule_epochs: int  # that the learning rate's schedule spans
    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch: the next one to train on
    best_loss: float = math.inf
    bad_epochs: int = 0  # since the best one
    # Of the epoch so far:
    loss_sum: float = 0.0
    images: int = 0
    skipped: int = 0  # steps whose loss was not finite
    seconds: float = 0.0
    waited: float = 0.0  # seconds, for data
    bad_steps: int = 0  # in a row
    wandb_id: str | None = None
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors and plain values."""
        return {f.name: value.state_dict() if hasattr(value, "state_dict") else value
                for f in dataclasses.fields(self) for value in [getattr(self, f.name)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take in what `state_dict` gave, except micro_batch, which depends on the machine."""
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for f in dataclasses.fields(self):
            if f.name not in ("model", "optimizer", "scaler", "micro_batch"):
                setattr(self, f.name, state[f.name])
        self.log = list(self.log)

    def begin_epoch(self, epoch: int) -> None:
        """Set what is counted within an epoch to nothing."""
        self.epoch, self.batch = epoch, 0
        self.loss_sum, self.images, self.skipped, self.seconds, self.waited = 0.0, 0, 0, 0.0, 0.0


def new_state(config: Config, setup: Setup) -> TrainingState:
    """An untrained model and its optimizer, on the device."""
    model = untrained_model(config, setup)
    slice_size = math.ceil(config.batch_size / setup.world)
    rule = model.cpu_micro_batch if setup.device.type == "cpu" else slice_size
    return TrainingState(
        model, make_optimizer(config, model, setup),
        torch.amp.GradScaler(setup.device.type, enabled=setup.precision == "fp16"),
        min(slice_size, config.micro_batch or rule), schedule_epochs=config.epochs)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the system had no memory left for a tensor."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


def train_step(state: TrainingState, objective: Any, images: Tensor, config: Config,
               batch_size: int, setup: Setup) -> tuple[float, int]:
    """One optimizer step on this process's slice of a batch: mean loss and number of images of the
    whole batch.

    images: uint8 [B,1,H,W]; fewer than the slice if some could not be read, even none.
    batch_size: of the whole batch. All randomness depends on (seed, step) and the place in the
    batch. If the loss is not finite, nothing is changed.
    """
    total = int(setup.sum(len(images)))
    if not total:  # none of the batch's images could be read
        return 0.0, 0
    # As numpy.array_split deals them: the first few slices have one more.
    start = sum(batch_size // setup.world + (r < batch_size % setup.world)
                for r in range(setup.rank))
    weight = setup.world / total  # DistributedDataParallel takes the mean over processes
    if not len(images):  # the others wait for gradients all the same
        images, weight = images.new_zeros((1, *images.shape[1:])), 0.0
    images = to_float(images, setup.device)
    draws = Draws(seeded(config.seed, "step", state.step), len(images), start,
                  max(batch_size, start + len(images)))
    if config.augment:
        images = augment(images, draws)
    inputs = corrupt(images, config.objective, draws)
    buffers = list(state.model.buffers())  # BatchNorm's running statistics
    before = [b.clone() for b in buffers]
    while True:
        try:
            # .item() waits for the device: little beside a step of these models.
            mine = accumulate_gradients(state, objective, inputs, images, weight, config, setup)
            loss = setup.sum(mine.item()) / setup.world
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            torch._foreach_copy_(buffers, before)
            if state.micro_batch == 1 or setup.world > 1:
                smaller = max(1, state.micro_batch // 2)
                raise UserError(f"out of memory at step {state.step + 1} with " + (
                    f"{state.micro_batch} images at a time; go on with --resume --micro-batch "
                    f"{smaller}" if state.micro_batch > 1 else
                    "a single image; try a smaller --width or --image-size")) from None
        # Out of the except block, which would keep the failed step's tensors alive.
        state.micro_batch = math.ceil(min(state.micro_batch, len(images)) / 2)
        log.warning(f"memory    out of it at step {state.step + 1}: {state.micro_batch} images at "
                    "a time from now on, gradients accumulated")
        state.optimizer.zero_grad()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    if math.isfinite(loss):
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        torch._foreach_copy_(buffers, before)
    return loss, total


def accumulate_gradients(state: TrainingState, objective: Any, inputs: Tensor, images: Tensor,
                         weight: float, config: Config, setup: Setup) -> Tensor:
    """Leave the gradients of the summed loss times `weight` in the parameters, from micro_batch
    images at a time; that weighted loss.

    inputs: what the model sees, images: clean, both float [B,1,H,W].
    """
    torch.manual_seed(seeded(config.seed, f"dropout {setup.rank}", state.step).initial_seed())
    parts = math.ceil(len(images) / state.micro_batch)
    for norm in state.model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # running statistics move as far, whatever the parts
            norm.momentum = 1 - (1 - BATCHNORM_MOMENTUM) ** (1 / parts)
    state.optimizer.zero_grad()
    losses: list[Tensor] = []
    for x, y in zip(inputs.tensor_split(parts), images.tensor_split(parts), strict=True):
        last = len(losses) == parts - 1
        # Gradients travel between processes once a step.
        with contextlib.nullcontext() if last or setup.world == 1 else objective.no_sync():
            with setup.autocast():
                loss = objective(x, y) * (len(y) * weight)
            state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def after_bad_loss(state: TrainingState, loss: float) -> None:
    """Pass over a step whose loss was not finite. UserError after BAD_STEPS of them in a row."""
    state.skipped += 1
    state.bad_steps += 1
    where = f"the loss is {loss} at epoch {state.epoch + 1}, step {state.step + 1}"
    if state.bad_steps >= BAD_STEPS:
        raise UserError(f"{where}, {BAD_STEPS} steps in a row; start over with a smaller "
                        "--learning-rate")
    log.warning(f"{where}: that step is skipped")


# ----------------------------------------------------------------------------------------------
# Training


class Signals:
    """While inside, SIGINT (Ctrl-C), SIGTERM and SIGHUP end training at the next `check`, on every
    process at the same one, by GracefulExit. A second signal ends at once, but for torchrun, which
    itself sends one."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.number, self.waiting = setup, 0, False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # only there they can be had
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP; nohup ignores it
                if number and signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        # Where another process has died, the launcher's SIGTERM is on its way: it must not end
        # this one before it has said why it ends.
        if self.setup.world == 1 or kind is None or kind is GracefulExit:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.number = number
        if self.setup.world > 1:  # torchrun itself sends a second one
            return
        self._restore()
        if self.waiting:  # between two steps, perhaps for long
            raise GracefulExit(ENDED, number)
        with contextlib.suppress(OSError):  # not by print, which may be what was interrupted
            os.write(2, b"\nending after this step, to save; once more ends at once\n")

    def check(self) -> None:
        """GracefulExit if this process or another has been asked to end."""
        if self.setup.sum(self.number):
            raise GracefulExit(ENDED, self.number or signal.SIGTERM)


def timed(stream: ImageStream, state: TrainingState, signals: Signals) -> Iterator[Tensor]:
    """The stream's images; counts the seconds that are spent waiting for them."""
    batches = iter(stream)
    while True:
        began = time.monotonic()
        signals.waiting = True
        images, _ = next(batches, (None, None))
        signals.waiting = False
        state.waited += time.monotonic() - began
        if images is None:
            return
        yield images


@torch.no_grad()
def validate(model: nn.Module, stream: ImageStream, config: Config, setup: Setup,
             micro_batch: int, signals: Signals | None = None) -> float:
    """The mean objective on validation normals, corrupted in the same way every time.

    A loss on clean input would reward copying it.
    """
    model.eval()
    total, count = 0.0, 0.0
    for i, (images, _) in enumerate(stream):
        if signals:
            signals.check()
        if not len(images):  # fewer than there are processes
            continue
        images = to_float(images, setup.device)
        draws = Draws(seeded(config.seed, f"validate {setup.rank}", i), len(images))
        inputs = corrupt(images, config.objective, draws)
        for x, y in zip(inputs.split(micro_batch), images.split(micro_batch), strict=True):
            with setup.autocast():
                total += objective_loss(model, x, y).item() * len(y)
        count += len(images)
    total, count = setup.sum(total), setup.sum(count)
    if not count:
        raise UserError("no validation image could be read")
    return total / count


def calibrate(model: nn.Module, loaders: Loaders, config: Config, setup: Setup,
              readers: Sequence[str] = READERS) -> AnomalyScorer:
    """A scorer of what the model makes of images: calibrated on training normals, with readers
    trained on some of them with lesions drawn on, and with the scores of the validation normals.

    Takes at most a quarter of the time that a normal training took.
    """
    model.eval()
    scorer, stream, device = AnomalyScorer(), loaders.train, setup.device
    stride = math.ceil(len(stream.samples) / CALIBRATION_IMAGES)
    count = math.ceil(len(stream.samples) / stride)
    drawn = min(max(config.epochs * len(stream.samples) // 4, LEAST_DRAWN), MOST_DRAWN,
                config.reader_steps * READER_BATCH)  # no more than are shown
    inputs, targets = {name: list[Tensor]() for name in readers}, list[Tensor]()
    with progress(count + drawn, "calibrating") as bar, torch.no_grad():
        for images in in_groups(stream.every(stride), READ_AT_ONCE):  # not a slice of them
            [(output, real)] = reconstruct_evenly(model, images, setup)
            scorer.add(output.first(real))
            bar.update(real)
        if not bar.n:
            raise UserError("none of the training images that the scores are calibrated on can be "
                            "read")
        scorer.finish()
        stride = max(1, len(stream.samples) // drawn)
        groups = itertools.chain.from_iterable(
            in_groups(stream.every(stride), 4 * READ_AT_ONCE) for _ in itertools.count())
        while (number := len(targets)) * 4 * READ_AT_ONCE < drawn:
            images = next(groups)
            draws = Draws(seeded(config.seed, "drawn", number), len(images))
            seen, there = draw_lesions(to_float(images, torch.device("cpu")), draws)
            targets.append(pooled(there))
            for output, real in reconstruct_evenly(model, (255 * seen).round().byte(), setup):
                found = scorer.reader_inputs(output.first(real), scorer.z(output.first(real)))
                for name in readers:
                    inputs[name].append(found[name].cpu())
            bar.update(len(images))
    with progress(len(readers) * config.reader_steps, "training readers", unit="step") as bar:
        for name in readers:
            scorer.readers[name] = train_reader(torch.cat(inputs[name]), torch.cat(targets),
                                                config, device, bar.update)
    refer_to_normals(scorer, model, loaders, config, setup)
    return scorer


def refer_to_normals(scorer: AnomalyScorer, model: nn.Module, loaders: Loaders, config: Config,
                     setup: Setup) -> None:
    """Score the validation normals, and tell what the reader finds of a kind of lesion that it was
    not trained on, and whether the model reconstructs at all."""
    cpu, scores, moved, errors = torch.device("cpu"), list[dict[str, Tensor]](), [], []
    tops = dict.fromkeys(scorer.readers, 1.0)
    for number, images in enumerate(in_groups(loaders.val.every(1), 4 * READ_AT_ONCE)):
        output, found, maps = score_images(model, scorer, images, setup)
        scores.append(found)
        for name in maps.keys() - scorer.readers.keys():
            top = 2 * float(maps[name].flatten(1).quantile(0.999, dim=1).mean())
            tops[name] = max(top, tops.get(name, 0.0))
        draws = Draws(seeded(config.seed, "warp", number), len(images))
        warped = (255 * warp(to_float(images, cpu), draws)).round().byte()
        moved.append(score_images(model, scorer, warped, setup)[1]["reader"])
        mean = scorer.mean_image.to(setup.device)
        errors.append(torch.stack([(output.images - x).abs().mean((1, 2, 3))
                                   for x in (output.reconstruction, mean)]))
    if not scores:
        raise UserError("no validation image could be read")
    normal = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    scorer.refer_to(normal, tops)
    reader, (own, of_mean) = normal[DEFAULT_SCORER], torch.cat(errors, dim=1).mean(1).tolist()
    if BASELINE not in scorer.readers:  # an untrained model: nothing to tell
        return
    told = (torch.cat(moved)[:, None] > reader).double().mean()
    size = sum(p.numel() for p in scorer.readers[DEFAULT_SCORER].parameters())
    log.info(f"reader    {size:,} parameters; AUROC {told:.3f} for parts moved in validation "
             "images, a kind of lesion that it was not trained on")
    if own >= of_mean:
        log.warning(f"careful   {type(model).__name__}'s reconstructions of validation images are "
                    f"no better than the mean training image (mean error {own:.4f}, {of_mean:.4f})")


def in_groups(stream: Iterable[tuple[Tensor, Any]], size: int) -> Iterator[Tensor]:
    """A stream's images, uint8 [size,1,H,W]; fewer in the last group."""
    rest = torch.empty(0, dtype=torch.uint8)
    for images, _ in stream:
        *groups, rest = (torch.cat([rest, images]) if len(rest) else images).split(size)
        yield from groups
        if len(rest) == size:
            yield rest
            rest = rest[:0]
    if len(rest):
        yield rest


@on_screen()
def train(config: Config) -> list[Path]:
    """Train what the configuration asks for; the run folders, as many as models times seeds."""
    try:
        return train_all(config)
    except (RuntimeError, MemoryError) as error:  # with nothing that one could do about it here
        reason = reason_of(error)[:200]
        if is_out_of_memory(error):
            raise UserError(f"out of memory ({reason}); try a smaller --micro-batch, --width or "
                            "--image-size") from None
        if dist.is_initialized() and any(w in str(error).lower() for w in ("gloo", "nccl", "peer")):
            last = str(error).strip().split("\n")[-1][:200]  # where NCCL says what it was
            raise UserError("another process of this run has ended, or cannot be reached "
                            f"({reason}{f' ... {last}' if last not in reason else ''}); go on "
                            f"with {TO_RESUME}") from None
        raise


def complete(config: Config) -> Config:
    """The configuration, with what it leaves open filled in."""
    synthetic = config.data == "synthetic"
    return dataclasses.replace(
        config, epochs=config.epochs or (3 if synthetic else 20),
        samples=config.samples or (PHANTOM_SAMPLES if synthetic else None),
        # Absolute, so that the run can be evaluated from anywhere.
        data=config.data if synthetic or not os.path.exists(config.data)
        else os.path.abspath(config.data))


def one_by_one(config: Config) -> list[Config]:
    """A configuration for each run: every model, with every seed."""
    models = MODELS if config.model == "both" else (config.model,)
    return [dataclasses.replace(config, model=model, seed=config.seed + i, seeds=1)
            for i in range(config.seeds) for model in models]


def train_all(config: Config) -> list[Path]:
    """What `train` says."""
    config = complete(config)
    # The machine and the models come first: what they refuse costs no reading of data.
    setup = join_processes(config)
    configs = one_by_one(config)
    for each in configs:
        with torch.device("meta"):
            create_model(each.model, each)
        if each.resume not in (None, "auto") and not os.path.exists(each.resume):
            raise UserError(f"--resume {each.resume}: there is no checkpoint there")
    if config.data == "synthetic":
        log.info("This trains on the BUILT-IN PHANTOM: drawn images, not real X-rays. For your own "
                 "images give --data FOLDER.")
    # One set of loaders for all: the split is the same, and images are read and decoded once.
    loaders = create_dataloaders(configs[0], setup.rank, setup.world, open_source(config))
    folders = [train_one(each, loaders, setup) for each in configs]
    if len(folders) > 1:
        log.info(f"next      {command('evaluate.py')} {shlex.quote(config.output_dir)}   (all)\n")
    return folders


def checkpoint_to_resume(config: Config, fingerprint: str, world: int) -> dict | None:
    """The content of the last.pt that --resume or --reuse means; None if there is none.

    UserError if the run cannot go on so. With --reuse alone it must be of the same length, too.
    """
    folder = run_folder(config)
    named = config.resume not in (None, "auto")
    last = Path(config.resume) if named and config.resume.endswith(".pt") else folder / "last.pt"
    if not named and not last.exists():
        return None
    state = load_checkpoint(last, config.model)
    if "optimizer" not in state:
        raise UserError(f"{last}: holds weights only; resume from the last.pt beside it")
    length = () if config.resume else ("epochs", "patience", "min_delta")
    changed = differences(state, config, fingerprint, length)
    if changed:
        raise UserError(f"{last}: cannot be resumed: {'; '.join(changed)}. Go on as before, or "
                        "start anew without --resume")
    if state["world"] != world:
        raise UserError(f"{last}: of a run with {state['world']} processes, and not {world}; go "
                        f"on with torchrun --nproc_per_node={state['world']}")
    if state["epoch"]:
        try:
            load_checkpoint(folder / "best.pt", config.model)
        except UserError as error:
            raise UserError(f"{error}. The weights of the best epoch are lost. Start over without "
                            "--resume: the old run is moved aside, not overwritten") from None
    return state


def train_one(config: Config, loaders: Loaders, setup: Setup) -> Path:
    """Train one model from start, or from a checkpoint, to calibrated best weights."""
    folder, fingerprint = run_folder(config), loaders.source.fingerprint()
    saved = None
    if config.resume or config.reuse:
        try:
            saved = checkpoint_to_resume(config, fingerprint, setup.world)
        except UserError as error:
            if config.resume:
                raise
            log.warning(f"reuse     {error}: not reused")

    precision, why = choose_precision(config.precision, setup.device)
    if saved and config.precision == "auto" and saved["device"] == setup.device.type:
        if saved["precision"] == "bf16" != precision:
            why += "; bf16, as before, would be imitated, very slowly"
        else:
            precision, why = saved["precision"], "as before"
    setup = dataclasses.replace(setup, precision=precision)
    state = new_state(config, setup)
    stream = loaders.train
    stream.seed = config.seed  # the loaders may have been another seed's
    stream.set_epoch(0)
    if saved:
        state.load_state_dict(saved)
        stream.set_epoch(state.epoch)
        if state.batch:
            stream.load_state_dict(saved["stream"] | {"next_batch": state.batch})
        if saved["device"] == setup.device.type and (
                config.micro_batch == saved["config"]["micro_batch"]):
            state.micro_batch = saved["micro_batch"]  # it may have been halved

    with contextlib.ExitStack() as inside:
        setup.barrier()  # everyone has looked at the folder; then one process changes it
        if setup.rank == 0:
            inside.enter_context(open_run(folder, saved is not None))
            write_splits(loaders.splits, folder / "split.csv")
            write_text(folder / "config.json", json.dumps(settings_of(config), indent=2) + "\n")
        setup.barrier()
        settings = [f"{k} {v}" for k, v in dataclasses.asdict(config).items()
                    if k == "model" or v != getattr(Config, k)]
        log.info(f"settings  {', '.join(settings)}; all others have their defaults")
        log.info(f"device    {setup.device} ({choose_device(config.device)[1]}), {precision} "
                 f"({why})" + (f", {setup.world} processes" if setup.world > 1 else ""))
        log.info(describe(loaders.source, loaders.splits))
        log.info(describe_memory(loaders))
        parameters = sum(p.numel() for p in state.model.parameters())
        log.info(f"model     {config.model}, {parameters:,} parameters")
        if saved:
            done = state.epoch >= config.epochs or state.bad_epochs >= config.patience
            log.info(f"resume    {folder}, after epoch {state.epoch}, step {state.step}" + (
                ": nothing is left to train" if done else ""))
            if config.epochs != state.schedule_epochs:
                log.info(f"          the learning rate falls over {state.schedule_epochs} epochs, "
                         "as asked for at first, and then stays")
            if config.data != (before := saved["config"]["data"]):
                log.info(f"          its images were in {before}: the names of these are the same")
        elif config.resume:
            log.info(f"resume    no checkpoint in {folder} yet: starting afresh")
        common = {"format": FORMAT, "config": settings_of(config), "data_fingerprint": fingerprint,
                  "precision": precision, "device": setup.device.type, "world": setup.world,
                  "versions": {"python": platform.python_version(),
                               "torch": str(torch.__version__)}}
        del saved
        train_epochs(state, config, loaders, setup, common)
        if setup.rank == 0:
            finish_run(state, config, loaders, setup, common)
    return folder


def train_epochs(state: TrainingState, config: Config, loaders: Loaders, setup: Setup,
                 common: dict[str, object]) -> None:
    """The loop: train an epoch, validate, keep the best, save, log, perhaps stop.

    common: what every checkpoint holds besides weights.
    """
    folder, stream = run_folder(config), loaders.train
    first = setup.rank == 0  # of the processes: the one that writes
    objective: Any = Objective(state.model)
    if setup.world > 1:
        # find_unused_parameters: there are none, but without it gradients are grouped anew after
        # the first step, of a resumed run too, and so added up in another order.
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True,
                                            find_unused_parameters=True)
    if config.compile:
        objective = torch.compile(objective)
    wandb = start_wandb(config, state, folder) if config.wandb and first else None
    total_steps = max(1, state.schedule_epochs * len(stream))
    saved, saved_at = (-1, -1), time.monotonic()

    def save_last() -> None:
        nonlocal saved_at, saved
        if saved != (state.epoch, state.batch):
            saved, saved_at = (state.epoch, state.batch), time.monotonic()
            if first:
                save_checkpoint(common | state.state_dict() | {"stream": stream.state_dict()},
                                folder / "last.pt")

    with Signals(setup) as signals:
        try:
            while state.epoch < config.epochs and state.bad_epochs < config.patience:
                name = f"{folder.name} epoch {state.epoch + 1}/{config.epochs}"
                began, before = time.monotonic(), state.seconds
                state.model.train()
                with progress(len(stream) * stream.batch_size, name, state.images, first) as bar:
                    for images in timed(stream, state, signals):
                        lr = learning_rate_at(state.step, total_steps, config)
                        for group in state.optimizer.param_groups:
                            group["lr"] = lr
                        loss, count = train_step(state, objective, images, config,
                                                 stream.batch_size, setup)
                        if math.isfinite(loss):
                            state.bad_steps = 0
                            state.loss_sum += loss * count
                            state.images += count
                        else:
                            after_bad_loss(state, loss)
                        state.step += 1
                        state.batch = stream.next_batch  # wholly unreadable ones are passed over
                        state.seconds = before + time.monotonic() - began
                        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                        bar.update(count)
                        if time.monotonic() - saved_at >= 60 * config.checkpoint_minutes:
                            save_last()
                        signals.check()
                if setup.world > 1:  # everyone gets the first one's running statistics
                    for buffer in state.model.buffers():
                        dist.broadcast(buffer, 0)
                training_seconds = max(before + time.monotonic() - began, 1e-9)
                val_loss = validate(state.model, loaders.val, config, setup, state.micro_batch,
                                    signals)
                if not state.images:
                    raise UserError("no training image could be read" if not state.skipped else
                                    f"no step of epoch {state.epoch + 1} had a finite loss; start "
                                    "over with a smaller --learning-rate")
                if not math.isfinite(val_loss):
                    raise UserError(f"the validation loss is {val_loss} after epoch "
                                    f"{state.epoch + 1}; try a smaller --learning-rate")
                row = dict(zip(LOG_COLUMNS, (
                    state.epoch + 1, state.step, state.loss_sum / state.images, val_loss,
                    learning_rate_at(state.step - 1, total_steps, config), state.skipped,
                    state.images / training_seconds, state.waited / training_seconds,
                    before + time.monotonic() - began, process_memory() / 2**20,
                    torch.cuda.max_memory_allocated(setup.device) / 2**20
                    if setup.device.type == "cuda" else 0), strict=True))

                # Saving comes before telling. The best weights first: last.pt says they are there.
                better = val_loss < state.best_loss - config.min_delta
                if better and first:
                    save_checkpoint(common | {
                        "model": state.model.state_dict(), "epoch": state.epoch + 1,
                        "val_loss": val_loss, "scorer": None}, folder / "best.pt")
                state.log.append(row)
                state.bad_epochs = 0 if better else state.bad_epochs + 1
                state.best_loss = val_loss if better else state.best_loss
                state.begin_epoch(state.epoch + 1)
                stream.set_epoch(state.epoch)
                save_last()
                if first:
                    try:
                        write_log(state.log, folder / "log.csv")
                    except UserError as error:  # open in a spreadsheet?
                        log.warning(f"{folder}/log.csv was not written, training goes on: last.pt "
                                    f"has its rows, too ({error})")
                log.info(f"  epoch {state.epoch}/{config.epochs}  train loss "
                         f"{row['train_loss']:.4f}  validation loss {val_loss:.4f}"
                         f"{' (best)' if better else ''}  {row['images_per_second']:.1f} images/s  "
                         f"{row['seconds']:.0f} s")
                wandb = send(wandb, row)
                signals.check()
        except GracefulExit:
            save_last()
            setup.barrier()  # torchrun would end the one that saves once another has ended
            raise
        except UserError:  # no step was left half done
            with contextlib.suppress(UserError):  # which the disk may have been the reason of
                if all(p.isfinite().all() for p in state.model.parameters()):
                    save_last()
            raise
    send(wandb, {})


def finish_run(state: TrainingState, config: Config, loaders: Loaders, setup: Setup,
               common: dict[str, object]) -> None:
    """Calibrate the scorers on the best weights, store them with these, and say where all is."""
    folder = run_folder(config)
    if state.bad_epochs >= config.patience:
        log.info(f"stopped early: no better validation loss for {config.patience} epochs; to go on "
                 "all the same: --resume with a larger --patience")
    best = load_checkpoint(folder / "best.pt", config.model)
    state.model.load_state_dict(best["model"])
    if not best["scorer"]:
        scorer = calibrate(state.model, loaders, config, setup)
        state.model.to("cpu")
        # What its own reader finds in what an untrained network makes of images, as a baseline.
        untrained = calibrate(untrained_model(config, setup).eval(), loaders, config, setup,
                              (DEFAULT_SCORER,))
        save_checkpoint(dict(best) | {
            "config": common["config"], "scorer": scorer.state_dict(),
            "untrained": untrained.state_dict()}, folder / "best.pt")
    write_log(state.log, folder / "log.csv")  # also where nothing was left to train
    draw_curves(state.log, folder / "curves.png", folder.name)
    log.info(f"memory    images took {loaders.train.memory.peak_bytes / 1e6:,.1f} MB at the most")
    if isinstance(loaders.source, KaggleSource):
        log.info(loaders.source.report())
    for name, stream in (("train", loaders.train), ("validation", loaders.val)):
        for key, reason in stream.bad.items():
            log.warning(f"skipped   {key} ({name}): {reason}")
    log.info(f"written   {folder}/: best.pt (epoch {best['epoch']}, validation loss "
             f"{best['val_loss']:.4f}), last.pt, log.csv, run.log, curves.png, split.csv, "
             "config.json")
    log.info(f"next      {command('evaluate.py')} {shlex.quote(str(folder))}\n")


def start_wandb(config: Config, state: TrainingState, folder: Path) -> Any:
    """A run at Weights & Biases, the one before if this run goes on; None if it cannot be had."""
    for name, value in (("SILENT", "true"), ("INIT_TIMEOUT", "30"), ("FINISH_TIMEOUT", "120")):
        os.environ.setdefault(f"WANDB_{name}", value)
    try:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online":
            try:  # without a key it would ask for one, and wait
                known = wandb.login(prompt=False)
            except TypeError:  # older versions of wandb
                known = bool(wandb.api.api_key)
            if not known:
                raise UserError("no key: set WANDB_API_KEY, run wandb login, or set "
                                "WANDB_MODE=offline")
        there = wandb.init(project=config.wandb_project, name=folder.name, id=state.wandb_id,
                           resume="allow", dir=str(folder), config=dataclasses.asdict(config))
        state.wandb_id = there.id
        return there
    except Exception as error:  # whatever it is, training matters more
        reason = "not installed: pip install wandb" if isinstance(error, ImportError) else (
            reason_of(error))
        log.warning(f"wandb     cannot be used ({reason}): going on without it")
    return None


def send(wandb_run: Any, row: dict[str, float]) -> Any:
    """Forward a row of log.csv to Weights & Biases; an empty one ends it. None if that fails."""
    try:
        if wandb_run:
            wandb_run.log(row, step=row["epoch"]) if row else wandb_run.finish()
        return wandb_run
    except Exception as error:
        log.warning(f"wandb     cannot be reached ({reason_of(error)}): going on without it")
    return None


# ----------------------------------------------------------------------------------------------
# Whether training would work


@on_screen()
def check(config: Config) -> None:
    """Tell whether training with this configuration would work, and how long it would take.

    Nothing is trained, and nothing is left on the disk. UserError at the first thing that fails.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError("--check: start it as one process, without torchrun")
    config = complete(config)
    setup = join_processes(config)
    precision, why = choose_precision(config.precision, setup.device)
    setup = dataclasses.replace(setup, precision=precision)
    log.info(f"device    {setup.device}, {precision} ({why}); torch {torch.__version__}")
    loaders = create_dataloaders(config)
    log.info(describe(loaders.source, loaders.splits))

    began, count = time.monotonic(), 0
    with contextlib.closing(iter(loaders.train)) as batches:
        for images, _ in itertools.islice(batches, math.ceil(64 / config.batch_size)):
            count += len(images)
    reading = (time.monotonic() - began) / count  # seconds an image
    log.info(f"reading   {1 / reading:,.0f} images a second")
    for name, reason in loaders.train.bad.items():
        log.warning(f"careful   {name} cannot be read: {reason}")

    seconds, need = 0.0, 0  # of training; bytes of checkpoints
    for each in one_by_one(config):
        if each.resume:
            checkpoint_to_resume(each, loaders.source.fingerprint(), setup.world)
        if each.seed != config.seed:  # it takes as long as the first seed
            continue
        state = new_state(each, setup)
        for state.step in range(3):
            if state.step <= 1:  # the first step is slower
                began = time.monotonic()
            train_step(state, Objective(state.model), images, each, len(images), setup)
        took = (time.monotonic() - began) / (2 * len(images))
        weights, moments = (
            sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
            for tensors in (state.model.state_dict().values(), [
                t for each in state.optimizer.state.values() for t in each.values()]))
        need += config.seeds * (3 * weights + 2 * moments)  # last.pt twice, while it is written
        seconds += config.seeds * config.epochs * (
            len(loaders.train.samples) * (took + reading)
            + len(loaders.val.samples) * (took / 3 + reading))
        log.info(f"model     {each.model}, {sum(p.numel() for p in state.model.parameters()):,} "
                 f"parameters; a step of {len(images)} images takes {took * len(images):.2f} s "
                 f"({1 / took:,.1f} images/s); {process_memory() / 1e9:,.1f} GB of memory so far")

    there = Path(config.output_dir).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output-dir {config.output_dir}: {there} cannot be written")
    free = shutil.disk_usage(there).free
    text = f"checkpoints take {need / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free"
    if need > free:
        raise UserError(f"--output-dir {config.output_dir}: {text}; make room")
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    log.info(f"disk      {text}\ntime      at most about {f'{hours} h ' if hours else ''}{minutes} "
             "min; less if early stopping ends it, or where images are cached")


def main() -> None:
    """Do what the command line asks for."""
    config = parse_config(description=__doc__)
    check(config) if "--check" in command_line() else train(config)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    status = run_command(main, "train.py", "; what was saved goes on with --resume")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not through the libraries' own exits: gloo's at times end a process by an abort, which
        # torchrun takes for a failure of the whole run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
