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
    MODELS, Config, GracefulExit, UserError, command, flag, load, log, on_screen, parse_config,
    run_command, run_folder)

if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    status = run_command(lambda: parse_config(description=__doc__) and load("train").main(),
                         "train.py")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not through the libraries' own exits: gloo's at times end a process by an abort, which
        # torchrun takes for a failure of the whole run.
        os._exit(status)
    sys.exit(status)

import contextlib
import dataclasses
import datetime
import itertools
import json
import logging
import math
import shlex
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    PHANTOM_SAMPLES, ImageStream, KaggleSource, Loaders, Source, create_dataloaders, describe,
    describe_memory, same_data, write_splits)
from models import (
    BASELINE, DEFAULT_SCORER, MODEL_CLASSES, READ_AT_ONCE, READER_BATCH, READERS, AnomalyScorer,
    Draws, Setup, augment, choose_device, choose_precision, corrupt, create_model, draw_lesions,
    objective_loss, pooled, reconstruct_evenly, score_images, seeded, to_float, train_reader,
    untrained_model, warp)

FORMAT = 18  # of the checkpoints
CALIBRATION_IMAGES = 512  # training normals that the scorer is calibrated on, at most
LEAST_DRAWN, MOST_DRAWN = 512, 2048  # training normals with lesions drawn on, for the readers
# Settings that a resumed run may change. Any other change makes it another run.
CHANGEABLE = ("epochs", "patience", "min_delta", "checkpoint_minutes", "device",
              "precision", "micro_batch", "compile", "deterministic", "memory_limit_gb", "seeds",
              "output_dir", "resume", "reuse", "wandb", "check")
BAD_STEPS = 3  # in a row whose loss is not finite, before training ends
BATCHNORM_MOMENTUM = 0.1  # PyTorch's default
LARGE_MATRIX = 1 << 25  # numbers; LeanAdam keeps less state of such a parameter
TO_RESUME = "the same command and --resume (in a notebook: resume=\"auto\")"


def join_processes(config: Config) -> Setup:
    """The Setup of this process: device, precision, and its place among those that torchrun
    started. UserError if these do not fit together."""
    device, _ = choose_device(config.device)
    precision, _ = choose_precision(config.precision, device)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if config.deterministic:  # only algorithms that add in a fixed order; else a warning
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for this
        torch.use_deterministic_algorithms(True, warn_only=True)
    if world == 1:
        return Setup(device, precision)
    if device.type == "mps":
        raise UserError("torchrun: several processes cannot share an Apple GPU; use --device cpu "
                        "or one process")
    if config.batch_size < world:
        raise UserError(f"--batch-size {config.batch_size}: fewer images than the {world} "
                        "processes that share them")
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"torchrun: {local + 1} processes here, but only {there} GPUs; give "
                            f"--nproc_per_node={there}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if rank:
        log.setLevel(logging.ERROR)
    if not dist.is_initialized():
        try:  # hours: the others wait while the first one calibrates
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=3))
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is {world}, but the other processes cannot be found "
                            f"({error}): start it with torchrun, or unset WORLD_SIZE") from None
    return Setup(device, precision, rank, world)


def progress(total: int, label: str, initial: int = 0, show: bool = True,
             unit: str = "images") -> tqdm:
    """A progress bar over images; where nobody watches, a line every 15 seconds."""
    pause = 0.2 if sys.stderr.isatty() else 15
    return tqdm(total=total, desc=label, initial=initial, unit=f" {unit}", leave=False,
                mininterval=pause, delay=pause, dynamic_ncols=True, disable=not show)


# ----------------------------------------------------------------------------------------------
# Files of a run


def write_file(path: Path, content: str | bytes | dict) -> None:
    """Write a text, bytes or a checkpoint, whole or not at all. UserError if that fails."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            if isinstance(content, dict):
                torch.save(content, f)
            else:
                f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch hides a full disk's OSError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({reason_of(error)}). Is the disk full, or has "
                        "the folder gone? What was there before is untouched: mend it and start "
                        "again, or go on with --resume") from None


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of ours, on the CPU. Only tensors and plain values are ever unpickled. UserError
    if it is missing, damaged (checksums are compared first), not ours, or of another version."""
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint there")
    try:
        with zipfile.ZipFile(path) as file:  # torch writes a zip file, but does not check it
            if wrong := file.testzip():
                raise ValueError(f"the checksum of {wrong} in it is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        version = state["format"]
    except Exception as error:  # damage shows as many kinds of errors in the readers
        why = "it holds code, refused" if "GLOBAL" in str(error) else (
            "damaged, cut short, or not of this project")
        raise UserError(f"{path}: not a readable checkpoint, {why} ({type(error).__name__}: "
                        f"{reason_of(error)})") from None
    if version != FORMAT:
        raise UserError(f"{path}: of another version of this project ({version}, not {FORMAT}); "
                        "use that one, or train again without --resume")
    return state


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    return text[:200] or type(error).__name__


@contextlib.contextmanager
def open_run(folder: Path, go_on: bool) -> Iterator[None]:
    """Make the run folder, keep other trainings out of it while inside, and log to its run.log.

    Unless training goes on in it, an earlier run that is there is moved aside, never overwritten.
    UserError if nothing can be written there, or another training is there.
    """
    handler = open_log(folder)
    try:
        if not go_on and any((folder / n).exists() for n in ("last.pt", "best.pt", "log.csv")):
            number = next(n for n in itertools.count(1) if not Path(f"{folder}.{n}").exists())
            handler.close()
            folder.rename(f"{folder}.{number}")
            log.info(f"an earlier run was there: moved to {folder}.{number}")
            handler = open_log(folder)
        log.addHandler(handler)
        yield
    except BaseException as error:
        log.debug(f"ended by {type(error).__name__}: {error}")  # is shown elsewhere
        raise
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def open_log(folder: Path) -> logging.FileHandler:
    """The log of a run folder, locked. UserError if it cannot be written, or is locked already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output-dir: {folder} cannot be written ({error.strerror})") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    # A full disk is reported by what must be saved.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    with contextlib.suppress(ImportError, OSError):  # neither Windows nor every disk has locks
        import fcntl

        try:
            fcntl.flock(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handler.close()
            raise UserError(f"{folder}: another training is writing there; wait for it, or give "
                            "this one another --output-dir") from None
    return handler


def draw_curves(rows: list[dict], file: Path, title: str) -> None:
    """Draw training and validation loss over epochs, from the rows of log.csv."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):  # not by a user's own style
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes, epochs = figure.subplots(), [row["epoch"] for row in rows]
        axes.plot(epochs, [row["train_loss"] for row in rows], "o-", label="training")
        axes.plot(epochs, [row["val_loss"] for row in rows], "s--", label="validation normals")
        best = min(rows, key=lambda row: row["val_loss"])["epoch"]
        axes.axvline(best, color="0.6", linestyle=":", label=f"best: epoch {best}")
        axes.set(xlabel="epoch", ylabel="mean absolute error")
        axes.set_title(title, parse_math=False)  # a name with a $ in it is a name
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
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
                factors = getattr(weight, "factors", None)  # of the gradient; see models.Linear
                if is_large(weight) and (factors or weight.grad is not None):
                    self._step_large(weight, group, factors)
                    weight.grad = None  # PyTorch's own step passes it over
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the factors of large ones."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for weight in group["params"]:
                getattr(weight, "factors", []).clear()

    def _step_large(self, weight: Tensor, group: dict[str, Any],
                    factors: list[tuple[Tensor, Tensor]] | None) -> None:
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
        if factors:
            g, x = map(torch.cat, zip(*factors, strict=True))  # micro-batches one below the other
            # The means of squares of g.T @ x. In fp64: shares of images may all but cancel.
            rows, columns = ((b @ b.T @ a * a).sum(0).float() / b.shape[1]
                             for a, b in itertools.permutations((g.double(), x.double())))
        else:
            rows, columns = (torch.linalg.vector_norm(weight.grad, dim=d).square() / weight.shape[d]
                             for d in (1, 0))
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
    """Linear warm-up over the first 5 % of `total` steps, then a cosine; 2 % after `total`."""
    warm = max(1, total // 20)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    share = min(1.0, (step - warm) / max(1, total - warm))
    return config.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


# ----------------------------------------------------------------------------------------------
# Training state and step


@dataclasses.dataclass
class TrainingState:
    """What is trained, and all that changes meanwhile, which is what last.pt must hold."""

    config: Config
    setup: Setup
    objective: Callable[..., Tensor]  # objective_loss, perhaps compiled
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
    # Not of it:
    about: dict[str, object] = dataclasses.field(default_factory=dict)  # is in every checkpoint
    saved_at: float = 0.0  # of time.monotonic()

    def state_dict(self) -> dict[str, object]:
        """All that changes, as tensors and plain values."""
        return {name: value.state_dict() if hasattr(value, "state_dict") else value
                for name, value in vars(self).items()
                if name not in ("config", "setup", "objective", "about", "saved_at")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take in what `state_dict` gave, except micro_batch, which depends on the machine."""
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name in self.state_dict().keys() - {"model", "optimizer", "scaler", "micro_batch"}:
            setattr(self, name, state[name])

    def count(self, loss: float, images: int) -> None:
        """Count a step. UserError at the last of BAD_STEPS in a row whose loss is not finite."""
        where = f"the loss is {loss} at epoch {self.epoch + 1}, step {self.step + 1}"
        if math.isfinite(loss):
            self.loss_sum, self.images = self.loss_sum + loss * images, self.images + images
            self.bad_steps = 0
        else:
            self.skipped, self.bad_steps = self.skipped + 1, self.bad_steps + 1
            if self.bad_steps >= BAD_STEPS:
                raise UserError(f"{where}, {BAD_STEPS} steps in a row; start over with a smaller "
                                "--learning-rate")
            log.warning(f"{where}: that step is skipped")
        self.step += 1

    def end_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.images, self.skipped, self.seconds, self.waited = 0.0, 0, 0, 0.0, 0.0

    def save(self) -> None:
        """Write log.csv and last.pt, each whole. One process does so for all."""
        self.saved_at, folder = time.monotonic(), run_folder(self.config)
        if self.setup.rank:
            return
        lines: list[Iterable] = [*self.log[:1], *(row.values() for row in self.log)]
        try:  # the first line are the keys
            write_file(folder / "log.csv", "".join(",".join(map(str, x)) + "\n" for x in lines))
        except UserError as error:  # open in a spreadsheet?
            log.warning(f"last.pt holds its rows, too: {error}")
        # After the rows: a run that ends in between takes the epoch again, and writes them again.
        write_file(folder / "last.pt", self.about | self.state_dict())


def new_state(config: Config, setup: Setup) -> TrainingState:
    """An untrained model and its optimizer, on the device."""
    model = untrained_model(config, setup)
    slice_size = math.ceil(config.batch_size / setup.world)
    rule = model.cpu_micro_batch if setup.device.type == "cpu" else slice_size
    return TrainingState(
        config, setup, torch.compile(objective_loss) if config.compile else objective_loss,
        model, make_optimizer(config, model, setup),
        torch.amp.GradScaler(setup.device.type, enabled=setup.precision == "fp16"),
        min(slice_size, config.micro_batch or rule), schedule_epochs=config.epochs)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the system had no memory left for a tensor."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


def train_step(state: TrainingState, images: Tensor, batch_size: int) -> tuple[float, int]:
    """Take an optimizer step on this process's slice of a batch; (mean loss, number of images) of
    the whole batch, of batch_size images. A loss that is not finite changes nothing.

    images: uint8 [B,1,H,W]; fewer than the slice if some could not be read, even none.
    """
    config, setup = state.config, state.setup
    total = int(setup.sum(len(images)))
    if not total:  # none of the batch's images could be read
        return 0.0, 0
    weight = 1 / total
    if not len(images):  # the others wait for gradients all the same
        images, weight = images.new_zeros((1, *images.shape[1:])), 0.0
    # All randomness depends on seed, step and the place in the whole batch.
    start = sum(map(len, torch.arange(batch_size).tensor_split(setup.world)[: setup.rank]))
    draws = Draws(seeded(config.seed, "step", state.step), len(images), start,
                  max(batch_size, start + len(images)))
    images = to_float(images, setup.device)
    if config.augment:
        images = augment(images, draws)
    inputs = corrupt(images, config.objective, draws)
    buffers = list(state.model.buffers())  # BatchNorm's running statistics
    before = [b.clone() for b in buffers]
    while True:
        try:
            # .item() waits for the device: little beside a step of these models.
            loss = setup.sum(accumulate_gradients(state, inputs, images, weight).item())
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            torch._foreach_copy_(buffers, before)
            if state.micro_batch == 1 or setup.world > 1:
                raise UserError(f"out of memory at step {state.step + 1} with --micro-batch "
                                f"{state.micro_batch}; go on with --resume and a smaller one, or "
                                "start over with a smaller --width or --image-size") from None
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


def accumulate_gradients(state: TrainingState, inputs: Tensor, images: Tensor,
                         weight: float) -> Tensor:
    """Sum up the gradients of the loss times `weight`, from micro_batch images at a time, over all
    processes; that weighted loss of this process. inputs, clean images: float [B,1,H,W]."""
    parts = math.ceil(len(images) / state.micro_batch)
    for norm in state.model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # running statistics move as far, whatever the parts
            norm.momentum = 1 - (1 - BATCHNORM_MOMENTUM) ** (1 / parts)
    state.optimizer.zero_grad()
    losses: list[Tensor] = []
    for x, y in zip(inputs.tensor_split(parts), images.tensor_split(parts), strict=True):
        with state.setup.autocast():
            loss = state.objective(state.model, x, y) * (len(y) * weight)
        state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    if state.setup.world > 1:
        for parameter in state.model.parameters():
            dist.all_reduce(parameter.grad)
    return torch.stack(losses).sum()


# ----------------------------------------------------------------------------------------------
# Training


class Signals(contextlib.ExitStack):
    """While inside, SIGINT (Ctrl-C), SIGTERM and SIGHUP end training at the next `check`, on every
    process at the same one, by GracefulExit. A second signal ends at once, but for torchrun, which
    itself sends one."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup, self.number = setup, 0
        self.waiting = 0.0  # for data since this time.monotonic(), perhaps for long
        with contextlib.suppress(ValueError):  # only in the main thread they can be had
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP; nohup ignores it
                if number and signal.getsignal(number) is not signal.SIG_IGN:
                    self.callback(signal.signal, number, signal.signal(number, self.note))

    def __exit__(self, kind: type | None, *error: Any) -> bool | None:
        # Where another process has died, the launcher's SIGTERM is on its way: it must not end
        # this one before it has said why it ends.
        restore = self.setup.world == 1 or kind in (None, GracefulExit)
        return super().__exit__(kind, *error) if restore else None

    def note(self, number: int, frame: object) -> None:
        """Take in a signal."""
        self.number = number
        if self.setup.world > 1:
            return
        self.close()  # signals do what they did before
        if self.waiting:
            self.check()
        with contextlib.suppress(OSError):  # not by print, which may be what was interrupted
            os.write(2, b"\nending after this step, to save; once more ends at once\n")

    def check(self) -> None:
        """GracefulExit if this process or another has been asked to end."""
        if self.setup.sum(self.number):
            raise GracefulExit(f"ended as asked, and saved; go on with {TO_RESUME}",
                               128 + (self.number or signal.SIGTERM))


@torch.no_grad()
def validate(state: TrainingState, stream: ImageStream, signals: Signals | None = None) -> float:
    """The mean objective on validation normals, corrupted in the same way every time: a loss on
    clean input would reward copying it."""
    state.model.eval()
    config, setup = state.config, state.setup
    total, count = 0.0, 0.0
    for i, (images, _) in enumerate(stream):
        if signals:
            signals.check()
        if not len(images):  # fewer than there are processes
            continue
        images = to_float(images, setup.device)
        draws = Draws(seeded(config.seed, f"validate {setup.rank}", i), len(images))
        inputs = corrupt(images, config.objective, draws)
        for x, y in zip(*(t.split(state.micro_batch) for t in (inputs, images)), strict=True):
            with setup.autocast():
                total += objective_loss(state.model, x, y).item() * len(y)
        count += len(images)
    total, count = setup.sum(total), setup.sum(count)
    if not count:
        raise UserError("no validation image could be read")
    return total / count


def calibrate(model: nn.Module, loaders: Loaders, config: Config, setup: Setup,
              readers: Sequence[str] = READERS) -> AnomalyScorer:
    """A scorer of what the model makes of images: calibrated on training normals, with readers
    trained on some of them with lesions drawn on, and with the scores of the validation normals."""
    model.eval()
    scorer, stream, device = AnomalyScorer(), loaders.train, setup.device
    stride = math.ceil(len(stream.samples) / CALIBRATION_IMAGES)
    count = math.ceil(len(stream.samples) / stride)
    drawn = min(max(config.epochs * len(stream.samples) // 4, LEAST_DRAWN), MOST_DRAWN,
                config.reader_steps * READER_BATCH)  # no more than are shown
    inputs, targets, group = {n: list[Tensor]() for n in readers}, list[Tensor](), group_of(config)
    with progress(count + drawn, "calibrating") as bar, torch.no_grad():
        for images in stream.every(stride, READ_AT_ONCE):  # not a slice of them
            [(output, real)] = reconstruct_evenly(model, images, setup)
            scorer.add(output.first(real))
            bar.update(real)
        if not bar.n:
            raise UserError("none of the training images that the scores are calibrated on can be "
                            "read")
        scorer.finish()
        stride = max(1, len(stream.samples) // drawn)
        groups = itertools.chain.from_iterable(
            stream.every(stride, group) for _ in itertools.count())
        while (number := len(targets)) * group < drawn:
            images = next(groups)
            draws = Draws(seeded(config.seed, "drawn", number), len(images))
            seen, there = draw_lesions(to_float(images, torch.device("cpu")), draws,
                                       config.augment)
            targets.append(pooled(there).half())  # in half precision: they are many
            for output, real in reconstruct_evenly(model, (255 * seen).round().byte(), setup):
                output = output.first(real)
                found = scorer.reader_inputs(output, scorer.z(output))
                for name in readers:
                    inputs[name].append(found[name].half().cpu())
            bar.update(len(images))
    with progress(len(readers) * config.reader_steps, "training readers", unit="step") as bar:
        for name in readers:
            scorer.readers[name] = train_reader(torch.cat(inputs.pop(name)), torch.cat(targets),
                                                config, device, bar.update)
    refer_to_normals(scorer, model, loaders, config, setup)
    return scorer


def group_of(config: Config) -> int:
    """Images that are changed and scored at a time: fewer of large ones, whose copies take room."""
    return max(1, min(4, 4 * 256**2 // config.image_size**2)) * READ_AT_ONCE


def refer_to_normals(scorer: AnomalyScorer, model: nn.Module, loaders: Loaders, config: Config,
                     setup: Setup) -> None:
    """Score the validation normals. Of a trained model, tell what its reader finds of a kind of
    lesion that it was not trained on, and whether it reconstructs at all."""
    scores, traits = list[dict[str, Tensor]](), list[Tensor]()
    moved, errors = list[Tensor](), list[Tensor]()
    tops, trained = dict.fromkeys(scorer.readers, 1.0), BASELINE in scorer.readers
    for number, images in enumerate(loaders.val.every(1, group_of(config))):
        output, found, maps = score_images(model, scorer, images, setup)
        scores.append(found)
        traits.append(scorer.traits(images))
        for name in maps.keys() - scorer.readers.keys():  # twice what 999 of 1,000 pixels lie under
            pixels = maps[name].flatten(1)
            top = 2 * pixels.topk(math.ceil(pixels.shape[1] / 1000)).values[:, -1].mean().item()
            tops[name] = max(top, tops.get(name, 0.0))
        if not trained:
            continue
        draws = Draws(seeded(config.seed, "warp", number), len(images))
        warped = (255 * warp(to_float(images, torch.device("cpu")), draws)).round().byte()
        moved.append(score_images(model, scorer, warped, setup)[1][DEFAULT_SCORER])
        mean, own = scorer.mean_image.to(setup.device), output.seen_by(DEFAULT_SCORER)
        errors.append(torch.stack([(output.images - x).abs().mean((1, 2, 3))
                                   for x in (own.reconstructions, mean)]))
    if not scores:
        raise UserError("no validation image could be read")
    normal = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    scorer.map_tops = tops
    scorer.refer_to(normal, torch.cat(traits))
    if not trained:
        return
    told = (torch.cat(moved)[:, None] > normal[DEFAULT_SCORER]).double().mean()
    size = sum(p.numel() for p in scorer.readers[DEFAULT_SCORER].parameters())
    log.info(f"reader    {size:,} parameters; AUROC {told:.3f} for parts moved in validation "
             "images, a kind of lesion that it was not trained on")
    error, of_mean = torch.cat(errors, dim=1).mean(1).tolist()
    if error >= of_mean:
        log.warning(f"careful   {type(model).__name__}'s reconstructions of validation images are "
                    f"no better than the mean training image (error {error:.4f}, {of_mean:.4f})")


@on_screen()
def train(config: Config) -> list[Path]:
    """Train what the configuration asks for; the run folders, as many as models times seeds."""
    try:
        setup, configs, loaders = prepare(config)
        folders = [train_one(each, loaders, setup) for each in configs]
    except (RuntimeError, MemoryError) as error:  # with nothing that one could do about it here
        if is_out_of_memory(error):
            raise UserError(f"out of memory ({reason_of(error)}); try a smaller --micro-batch, "
                            "--width or --image-size") from None
        if dist.is_initialized() and any(w in str(error).lower() for w in ("gloo", "nccl", "peer")):
            raise UserError("another process of this run has ended, or cannot be reached "
                            f"({reason_of(error)}); go on with {TO_RESUME}") from None
        raise
    if len(folders) > 1:
        log.info(f"next      {command('evaluate.py')} {shlex.quote(config.output_dir)}   (all)\n")
    return folders


def prepare(config: Config) -> tuple[Setup, list[Config], Loaders]:
    """The Setup; a configuration for each run, every model with every seed, what was left open
    filled in; and the loaders of all: the split is the same, and images are decoded once."""
    setup, phantom = join_processes(config), config.data == "synthetic"
    if phantom:
        log.info("This trains on the BUILT-IN PHANTOM. For your own images: --data FOLDER")
    models = MODELS if config.model == "both" else (config.model,)
    configs = [dataclasses.replace(
        config, model=model, seed=config.seed + i, seeds=1,
        epochs=config.epochs or (3 if phantom else MODEL_CLASSES[model].epochs),
        samples=config.samples or (PHANTOM_SAMPLES if phantom else None),
        augment=not phantom if config.augment is None else config.augment,  # phantoms lie all alike
        # Absolute, so that the run can be evaluated from anywhere.
        data=os.path.abspath(config.data) if os.path.exists(config.data) and not phantom
        else config.data) for i in range(config.seeds) for model in models]
    with torch.device("meta"):  # what a model refuses costs no reading of data
        for each in configs:
            create_model(each.model, each)
    loaders = create_dataloaders(configs[0], setup.rank, setup.world)
    bits = loaders.train.bits or None  # found from the images, and kept
    return setup, [dataclasses.replace(each, grey_bits=bits) for each in configs], loaders


def checkpoint_to_resume(config: Config, source: Source, world: int) -> dict | None:
    """The content of the last.pt that --resume or --reuse means; None if there is none.

    A setting that it does not have is its default. Data may lie in another place. UserError if it
    has other settings, data or processes; with --reuse alone also if it has another length.
    """
    last = run_folder(config) / "last.pt"
    if config.resume in (None, "auto") and not last.exists():
        return None
    state = load_checkpoint(last)
    before, now = dataclasses.asdict(Config(**state["config"])), dataclasses.asdict(config)
    same = same_data(state["data_fingerprint"], source.fingerprint()) and (
        source.version == state["data_version"] or "" in (source.version, state["data_version"]))
    may_change = set(CHANGEABLE) - set(() if config.resume else ("epochs", "patience", "min_delta"))
    changed = [f"{flag(k)} was {before[k]!r}, is {now[k]!r}" for k in now
               if before[k] != now[k] and k not in may_change and (k != "data" or not same)]
    if not same and before["data"] == config.data:
        changed = [f"the images in {config.data} have changed since"]
    if state["world"] != world:
        changed.append(f"torchrun --nproc_per_node was {state['world']}, is {world}")
    if changed:
        raise UserError(f"{last}: cannot be resumed: {'; '.join(changed)}. Go on as before, or "
                        "start anew without --resume")
    if state["epoch"]:  # there must be weights of the best epoch to go on from
        load_checkpoint(last.with_name("best.pt"))
    return state


def train_one(config: Config, loaders: Loaders, setup: Setup) -> Path:
    """Train one model from start, or from a checkpoint, to calibrated best weights."""
    folder, source = run_folder(config), loaders.source
    saved, settings = None, dataclasses.asdict(config) | {"resume": None, "reuse": False}
    if config.resume or config.reuse:
        try:
            saved = checkpoint_to_resume(config, source, setup.world)
        except UserError as error:
            if config.resume:
                raise
            log.warning(f"reuse     {error}: not reused")
    state = new_state(config, setup)
    if saved:
        state.load_state_dict(saved)
        if saved["device"] == setup.device.type and (
                config.micro_batch == saved["config"]["micro_batch"]):
            state.micro_batch = saved["micro_batch"]  # it may have been halved
    loaders.train.seed = config.seed  # the loaders may have been another seed's
    state.about = {"format": FORMAT, "config": settings, "data_fingerprint": source.fingerprint(),
                   "data_version": source.version, "precision": setup.precision,
                   "device": setup.device.type, "world": setup.world, "versions": {
                       "python": sys.version.split()[0], "torch": str(torch.__version__)}}
    setup.barrier()  # everyone has looked at the folder; then one process changes it
    with contextlib.nullcontext() if setup.rank else open_run(folder, saved is not None):
        if setup.rank == 0:
            write_splits(loaders.splits, folder / "split.csv")
            write_file(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        setup.barrier()
        told = [f"{k} {v}" for k, v in settings.items() if k == "model" or v != getattr(Config, k)]
        log.info(f"settings  {', '.join(told)}; all others have their defaults")
        log.info(f"device    {setup.device} ({choose_device(config.device)[1]}), {setup.precision} "
                 f"({choose_precision(config.precision, setup.device)[1]})"
                 + (f", {setup.world} processes" if setup.world > 1 else ""))
        log.info(describe(source, loaders.splits))
        log.info(describe_memory(loaders))
        size = sum(p.numel() for p in state.model.parameters())
        log.info(f"model     {config.model}, {size:,} parameters")
        if saved:
            done = state.epoch >= config.epochs or state.bad_epochs >= config.patience
            log.info(f"resume    {folder}, after epoch {state.epoch}, step {state.step}" + (
                ": nothing is left to train" if done else ""))
            if config.data != (before := saved["config"]["data"]):
                log.info(f"          its images were in {before}: the names of these are the same")
        elif config.resume:
            log.info(f"resume    no checkpoint in {folder} yet: starting afresh")
        del saved
        train_epochs(state, loaders)
        if setup.rank == 0:
            finish_run(state, loaders)
    return folder


def train_epochs(state: TrainingState, loaders: Loaders) -> None:
    """The loop: train an epoch, validate, keep the best, save, log, perhaps stop."""
    config, setup, folder = state.config, state.setup, run_folder(state.config)
    wandb = try_wandb(start_wandb, state) if config.wandb and not setup.rank else None
    state.saved_at = time.monotonic()
    with Signals(setup) as signals:
        try:
            while state.epoch < config.epochs and state.bad_epochs < config.patience:
                train_epoch(state, loaders.train, signals)
                began = time.monotonic()
                val_loss = validate(state, loaders.val, signals)
                if not math.isfinite(val_loss):
                    raise UserError(f"the validation loss is {val_loss} after epoch "
                                    f"{state.epoch + 1}; try a smaller --learning-rate")
                seconds = max(state.seconds, 1e-9)  # of training
                row = {"epoch": state.epoch + 1, "step": state.step,
                       "train_loss": state.loss_sum / state.images, "val_loss": val_loss,
                       "learning_rate": state.optimizer.param_groups[0]["lr"],
                       "skipped_steps": state.skipped, "images_per_second": state.images / seconds,
                       "data_wait": state.waited / seconds,
                       "seconds": seconds + time.monotonic() - began,
                       "device_mb": torch.cuda.max_memory_allocated(setup.device) / 2**20
                       if setup.device.type == "cuda" else 0}

                # Saving comes before telling. The best weights first: last.pt says they are there.
                better = val_loss < state.best_loss - config.min_delta
                if better and setup.rank == 0:
                    write_file(folder / "best.pt", state.about | {
                        "model": state.model.state_dict(), "epoch": state.epoch + 1,
                        "val_loss": val_loss, "scorer": None})
                state.log.append(row)
                state.bad_epochs = 0 if better else state.bad_epochs + 1
                state.best_loss = val_loss if better else state.best_loss
                state.end_epoch()
                state.save()
                log.info(f"  epoch {state.epoch}/{config.epochs}  train loss "
                         f"{row['train_loss']:.4f}  validation loss {val_loss:.4f}"
                         f"{' (best)' if better else ''}  {row['images_per_second']:.1f} images/s  "
                         f"{row['seconds']:.0f} s")
                if wandb:
                    try_wandb(wandb.log, row, step=state.epoch)
                signals.check()
        except (GracefulExit, UserError) as error:  # no step was left half done
            if all(p.isfinite().all() for p in state.model.parameters()):
                state.save()
            if isinstance(error, GracefulExit):
                setup.barrier()  # torchrun would end the one that saves once another has ended
            raise
    if wandb:
        try_wandb(wandb.finish)


def train_epoch(state: TrainingState, stream: ImageStream, signals: Signals) -> None:
    """Take the steps of an epoch, from state.batch on; save and look for signals in between."""
    config, setup, before = state.config, state.setup, time.monotonic() - state.seconds
    total_steps = max(1, state.schedule_epochs * len(stream))
    label = f"{run_folder(config).name} epoch {state.epoch + 1}/{config.epochs}"
    stream.set_epoch(state.epoch, state.batch)
    state.model.train()
    with progress(len(stream) * stream.batch_size, label, state.images, setup.rank == 0) as bar:
        signals.waiting = time.monotonic()
        for images, _ in stream:
            state.waited += time.monotonic() - signals.waiting
            signals.waiting = 0.0
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate_at(state.step, total_steps, config)
            loss, count = train_step(state, images, stream.batch_size)
            state.count(loss, count)
            state.batch = stream.next_batch  # wholly unreadable ones are passed over
            state.seconds = time.monotonic() - before
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(count)
            if state.step == 20 and setup.rank == 0:
                hint(config, setup, state.seconds / 20 * total_steps)
            if time.monotonic() - state.saved_at >= 60 * config.checkpoint_minutes:
                state.save()
            signals.check()
            signals.waiting = time.monotonic()
    signals.waiting, state.seconds = 0.0, time.monotonic() - before
    if not state.images:
        raise UserError("no training image could be read" if not state.skipped else
                        f"no step of epoch {state.epoch + 1} had a finite loss; start over with a "
                        "smaller --learning-rate")
    if setup.world > 1:  # everyone gets the first one's running statistics
        for buffer in state.model.buffers():
            dist.broadcast(buffer, 0)


def hint(config: Config, setup: Setup, seconds: float) -> None:
    """Name smaller settings where training takes more than an hour on a CPU."""
    if setup.device.type == "cpu" and seconds > 3600 and config.width * config.image_size > 1024:
        log.info(f"time      about {seconds / 3600:.1f} hours on this CPU. --width 16 --image-size "
                 "64 takes a fifteenth of that. On Kermany's test it cost no AUROC")


def finish_run(state: TrainingState, loaders: Loaders) -> None:
    """Calibrate the scorers on the best weights, store them with these, and say where all is."""
    config, setup, folder = state.config, state.setup, run_folder(state.config)
    if state.bad_epochs >= config.patience:
        log.info(f"stopped early: no better validation loss for {config.patience} epochs; to go on "
                 "all the same: --resume with a larger --patience")
    best = load_checkpoint(folder / "best.pt")
    state.model.load_state_dict(best["model"])
    if not best["scorer"]:
        scorer = calibrate(state.model, loaders, config, setup)
        state.model.to("cpu")
        # What its own reader finds in what an untrained network makes of images, as a baseline.
        untrained = calibrate(untrained_model(config, setup).eval(), loaders, config, setup,
                              (DEFAULT_SCORER,))
        write_file(folder / "best.pt", best | {
            "config": state.about["config"], "scorer": scorer.state_dict(),
            "untrained": untrained.state_dict()})
    draw_curves(state.log, folder / "curves.png", folder.name)
    log.info(f"memory    images took {loaders.train.memory.peak_bytes / 1e6:,.1f} MB at the most")
    if isinstance(loaders.source, KaggleSource):
        log.info(loaders.source.report())
    for name, stream in (("train", loaders.train), ("validation", loaders.val)):
        for key, reason in stream.bad.items():
            log.warning(f"skipped   {key} ({name}): {reason}")
    log.info(f"written   {folder}/: best.pt (epoch {best['epoch']}, validation loss "
             f"{best['val_loss']:.4f}), last.pt, log.csv, run.log, curves.png")
    log.info(f"next      {command('evaluate.py')} {shlex.quote(str(folder))}\n")


def start_wandb(state: TrainingState) -> Any:
    """A run at Weights & Biases: the one before, if this run goes on."""
    import wandb

    for name, value in (("SILENT", "true"), ("INIT_TIMEOUT", "30"), ("FINISH_TIMEOUT", "120"),
                        ("PROJECT", "imgae-dx"), ("MODE", "online")):
        os.environ.setdefault(f"WANDB_{name}", value)
    # Without a key it would ask for one, and wait.
    if os.environ["WANDB_MODE"] == "online" and not wandb.login(timeout=1):
        raise UserError("no key: set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline")
    folder = run_folder(state.config)
    there = wandb.init(name=folder.name, id=state.wandb_id, resume="allow", dir=str(folder),
                       config=dataclasses.asdict(state.config))
    state.wandb_id = there.id
    return there


def try_wandb(action: Callable, *arguments: Any, **more: Any) -> Any:
    """Do something at Weights & Biases; None and a warning if it fails: training matters more."""
    try:
        return action(*arguments, **more)
    except Exception as error:
        log.warning(f"wandb     cannot be used ({reason_of(error)}): going on without it")


@on_screen()
def check(config: Config) -> None:
    """Tell whether training so would work, and how long it would take. Nothing is trained, and
    nothing is left on the disk. UserError at the first thing that fails."""
    if "WORLD_SIZE" in os.environ:
        raise UserError("--check: start it as one process, without torchrun")
    setup, configs, loaders = prepare(config)
    log.info(f"device    {setup.device}, {setup.precision}; torch {torch.__version__}")
    log.info(describe(loaders.source, loaders.splits))
    began = time.monotonic()
    with contextlib.closing(iter(loaders.train)) as stream:
        batches = [x for x, _ in itertools.islice(stream, math.ceil(64 / config.batch_size))]
    reading = (time.monotonic() - began) / sum(map(len, batches))  # seconds an image
    log.info(f"reading   {1 / reading:,.0f} images a second")
    for name, reason in loaders.train.bad.items():
        log.warning(f"careful   {name} cannot be read: {reason}")
    seconds, need, images = 0.0, 0, batches[0]  # of training; bytes of checkpoints
    for each in configs:
        if each.resume:
            checkpoint_to_resume(each, loaders.source, setup.world)
        if each.seed != config.seed:  # it takes as long as the first seed
            continue
        state = new_state(each, setup)
        for state.step in range(3):
            if state.step <= 1:  # the first step is slower
                began = time.monotonic()
            train_step(state, images, len(images))
        took = (time.monotonic() - began) / (2 * len(images))
        weights = sum(t.nbytes for t in state.model.state_dict().values())
        moments = sum(t.nbytes for m in state.optimizer.state.values() for t in m.values())
        need += config.seeds * (3 * weights + 2 * moments)  # last.pt twice, while it is written
        blank = torch.zeros(READER_BATCH, 6, each.image_size, each.image_size)
        began = time.monotonic()
        train_reader(pooled(blank), pooled(blank[:, :1]), dataclasses.replace(each, reader_steps=3),
                     setup.device, lambda step: None)
        reader_step = (time.monotonic() - began) / 3
        seconds += config.seeds * (
            each.epochs * (len(loaders.train.samples) * (took + reading)
                           + len(loaders.val.samples) * (took / 3 + reading))
            # Of the model and of the same untrained: readers, and passes over what they learn from.
            + (len(READERS) + 1) * each.reader_steps * reader_step
            + 2 * (CALIBRATION_IMAGES + MOST_DRAWN) * (took / 3 + reading))
        log.info(f"model     {each.model}; a step of {len(images)} images takes "
                 f"{took * len(images):.2f} s ({1 / took:,.1f} images/s)")

    there = next(p for p in Path(config.output_dir, "x").absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output-dir {config.output_dir}: {there} cannot be written")
    free = shutil.disk_usage(there).free
    text = f"checkpoints take {need / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free"
    if need > free:
        raise UserError(f"--output-dir {config.output_dir}: {text}; make room")
    log.info(f"disk      {text}\ntime      at most about {math.ceil(seconds / 60):,} min; less if "
             "early stopping ends it, or where images are cached")
    hint(config, setup, seconds)


def main() -> None:
    """Do what the command line asks for."""
    config = parse_config(description=__doc__)
    check(config) if config.check else train(config)
