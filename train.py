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
    MODELS,
    PACKAGES,
    Config,
    Stopped,
    UserError,
    command,
    command_line,
    flag,
    in_notebook,
    kaggle_credentials,
    load_config,
    log,
    parse_config,
    quoted,
    require_packages,
    run_command,
    run_folder,
)

if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    if status := (run_command(lambda: parse_config(description=__doc__), "train.py")
                  or run_command(require_packages, "train.py")):
        sys.exit(status)
    # Threads that wait for each other then leave the core to whoever else wants it. Two programs
    # of spinning threads on the same cores slow each other down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import csv
import ctypes
import dataclasses
import datetime
import hashlib
import importlib
import io
import json
import logging
import math
import platform
import re
import shutil
import signal
import textwrap
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import requests
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion
from tqdm import tqdm

from data import (
    NORMAL,
    PHANTOM_SAMPLES,
    ImageStream,
    KaggleSource,
    Loaders,
    Source,
    augment,
    create_dataloaders,
    describe,
    describe_memory,
    open_source,
    to_float,
    write_splits,
)
from models import (
    DEFAULT_SCORER,
    OWN_WEIGHT_GRADIENTS,
    AnomalyScorer,
    Draws,
    Linear,
    Reading,
    add_lesions,
    corrupt,
    create_model,
    folded,
    map_name,
    moved,
    no_autocast,
    objective_loss,
    read,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 11  # of the checkpoints
CALIBRATION_IMAGES = 512  # training normals that the scorer is calibrated on, at most
LESIONED = 128  # so many of these, or a few more, are read with lesions drawn on as well
READ_AT_ONCE = 8  # images that a trained model is shown at a time, always
# Settings that a resumed run may change; any other change makes it another run.
CHANGEABLE = ("epochs", "patience", "min_delta", "keep_every", "checkpoint_minutes", "device",
              "precision", "micro_batch", "compile", "deterministic", "memory_limit_gb", "seeds",
              "output_dir", "resume", "reuse", "wandb", "wandb_project")
LOG_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "learning_rate", "skipped_steps",
               "images_per_second", "data_wait", "seconds", "process_mb", "device_mb")
# Steps in a row whose loss is no finite number, before the last good state is taken back.
BAD_STEPS = 3
BATCHNORM_MOMENTUM = 0.1  # PyTorch's default
LARGE_MATRIX = 1 << 25  # numbers; Adam keeps less of the past of such a weight, see lean_adam
# Bytes; on a CPU larger steps are taken in parts, none of fewer images than CPU_PART.
CPU_STEP, CPU_PART = 2.4e9, 8
LARGE_FILE = 500 << 20  # bytes; a larger last.pt is written at most once a minute
TRAINED = "trained.json"  # in the parent of the run folders: {model: names of those trained last}


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
    """("bf16", "fp16" or "fp32", why)."""
    if wanted != "auto":
        try:
            autocast(device, wanted)
            old = TorchVersion(torch.__version__) < "2.8"
            if old and (wanted, device.type) == ("fp16", "mps"):
                raise RuntimeError  # the gradient scaler would need float64, which MPS has not
        except RuntimeError:  # MPS, before PyTorch 2.5
            raise UserError(f"--precision {wanted}: not on {device.type} with PyTorch "
                            f"{torch.__version__}; use --precision auto") from None
        return wanted, "as asked"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= (8, 0):
            return "bf16", "this GPU multiplies in bf16"
        if capability >= (7, 0):
            return "fp16", "this GPU multiplies in fp16 but not in bf16"
    if device.type == "cpu":
        try:
            flags = set(Path("/proc/cpuinfo").read_text().split())
        except OSError:
            flags = set()
        if found := flags & {"amx_bf16", "avx512_bf16"}:
            return "bf16", f"this CPU has {', '.join(sorted(found))}"
    return "fp32", "nothing narrower is fast on this device"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context for the network's forward pass; BatchNorm's statistics stay in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def place(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The model on the device, in the memory layout that its convolutions are fastest in."""
    channels_last = device.type == "cuda" or precision == "bf16"
    if device.type == "cpu":
        keep_freed_memory()
        channels_last |= OWN_WEIGHT_GRADIENTS
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
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


def be_deterministic() -> None:
    """Let CUDA take only algorithms that add in a fixed order; where there is none, it warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def _number_in(file: str, key: str = "") -> int | None:
    """The first number in a file of the kernel's, or in its line that begins with `key`."""
    try:
        lines = Path(file).read_text().splitlines()
        return next(int(line.removeprefix(key).split()[0]) for line in lines if
                    line.startswith(key))
    except (OSError, ValueError, IndexError, StopIteration):  # not there, or "max"
        return None


def system_memory() -> tuple[int, int] | None:
    """(bytes that all processes here may use, bytes still free); None where that is not known.

    On Linux, what the machine or the container's control group allows, whichever is less.
    """
    total = _number_in("/proc/meminfo", "MemTotal:")
    free = _number_in("/proc/meminfo", "MemAvailable:")
    if total is None or free is None:
        return None
    total, free = total << 10, free << 10
    limit, used = (_number_in(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        cache = _number_in("/sys/fs/cgroup/memory.stat", "inactive_file") or 0
        total, free = min(total, limit), min(free, limit - used + cache)
    return total, free


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device; None if that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    memory = system_memory() if device.type == "cpu" else None
    return memory[1] // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if memory else None


def process_memory() -> int:
    """Most bytes that this process has held so far; 0 if not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def device_memory(device: torch.device) -> int:
    """Most bytes of a CUDA device that this process has held so far; 0 on others."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def warn_if_memory_is_short() -> bool:
    """Whether less than 5 % of the memory is left; said in one line if so."""
    memory = system_memory()
    if memory is None or memory[1] > 0.05 * memory[0]:
        return False
    log.warning(f"careful: {memory[1] / 2**30:.1f} of {memory[0] / 2**30:.1f} GB of memory are "
                "left. Before the system ends this run: close other programs, or end it with "
                "Ctrl-C and go on with a smaller --micro-batch or --memory-limit-gb")
    return True


def seeded(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Ranks:
    """The processes that train together, as torchrun started them; often just this one.

    Process `rank` of `world` takes its slice of every batch. Values are floats.
    """

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = torch.device("cpu")

    def meet(self, device: torch.device) -> torch.device:
        """Join the others; the device of this process."""
        if self.world == 1:
            return device
        if device.type == "mps":
            raise UserError("torchrun: several processes cannot share an Apple GPU; "
                            "use --device cpu or one process")
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():
                raise UserError(f"torchrun: {local + 1} processes here, but only "
                                f"{torch.cuda.device_count()} GPUs; give --nproc_per_node="
                                f"{torch.cuda.device_count()}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        self.device = device
        log.setLevel(logging.INFO if self.rank == 0 else logging.ERROR)
        if not dist.is_initialized():
            try:  # hours: the others wait while the first one calibrates
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                        timeout=datetime.timedelta(hours=3))
            except ValueError as error:
                raise UserError(f"WORLD_SIZE is {self.world}, but the other processes cannot be "
                                f"found ({error}): start it with torchrun, or unset WORLD_SIZE"
                                ) from None
        return device

    def _reduce(self, value: float, how: Any) -> float:
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return tensor.item()

    def sum(self, value: float) -> float:
        """The sum over all processes."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def least(self, value: float) -> float:
        """The least among all processes."""
        return self._reduce(value, dist.ReduceOp.MIN)

    def wait(self) -> None:
        """Until all have come here."""
        self.sum(0.0)

    def share(self, model: nn.Module) -> None:
        """Give everyone the first one's running statistics, which the checkpoint will hold."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


class Progress:
    """A bar with rate and time left; where nobody watches, a line every 15 seconds."""

    def __init__(self, total: int, label: str, start: int = 0, show: bool = True) -> None:
        self.label, self.total, self.done, self.start = label, total, start, start
        self.began = self.shown = time.monotonic()
        self.bar = tqdm(total=total, initial=start, desc=label, unit=" images", leave=False,
                        dynamic_ncols=True) if show and sys.stderr.isatty() else None

    def update(self, images: int, label: str = "", **values: float) -> None:
        """So many more images are done; label and values are what is shown beside them."""
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
            left = int((self.total - self.done) / max(rate, 1e-9))
            log.info(f"  {self.label}  {self.done}/{self.total} images  {text}  "
                     f"{rate:.1f} images/s  {left // 60}:{left % 60:02d} left")

    def write(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self.bar is not None:
            self.bar.clear()
        log.info(line)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


# ----------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(state: dict, path: Path, previous: Path | None = None) -> None:
    """Write atomically: under a temporary name, to the disk, then renamed to its own.

    previous: the name that what was there before is kept under.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the names, too, where folders can be synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer hides the OSError of a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def cannot_write(file: Path, error: Exception) -> UserError:
    """What to say of a file that a run must write and cannot."""
    if not file.parent.is_dir():
        return UserError(f"{file}: cannot be written, its folder is gone; was it moved or deleted?")
    room = shutil.disk_usage(file.parent).free
    full = f"; {room / 2**20:,.0f} MB are free on that disk" if room < 1 << 30 else ""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    mend = "see who else uses it" if isinstance(error, PermissionError) else "make room"
    return UserError(f"{file}: cannot be written ({reason}{full}); the checkpoint before it is "
                     f"untouched: {mend} and go on with --resume")


class Damaged(UserError):
    """A checkpoint that cannot be read as what it was written."""


def load_checkpoint(path: Path, model: str | None = None) -> dict:
    """A checkpoint of ours, on the CPU. Only tensors and plain values are ever unpickled.

    Checksums of all of it are compared first. Damaged if that fails; UserError if the file is
    missing, not ours, or of another model than `model`.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint there")
    try:
        with zipfile.ZipFile(path) as file:  # which is what torch writes, but does not check
            if wrong := file.testzip():
                raise ValueError(f"the checksum of {wrong} in it is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        ours = isinstance(state, dict) and {"format", "model", "config"} <= state.keys()
    except Exception as error:  # damage shows as many kinds of errors in the readers
        reason = first_line(error)[:160]
        raise Damaged(f"{path}: not a readable checkpoint, perhaps cut short or not ours "
                      f"({type(error).__name__}: {reason})") from None
    if not ours:
        raise UserError(f"{path}: not a checkpoint of this project")
    if state["format"] != FORMAT:
        when = "a newer" if state["format"] > FORMAT else "an earlier"
        raise UserError(f"{path}: written by {when} version of this project; use that one, or "
                        "train again without --resume")
    if model is not None and state["config"]["model"] != model:
        raise UserError(f"{path}: holds a {state['config']['model']}, not a {model}; "
                        f"give --model {state['config']['model']}")
    return state


def newest_checkpoint(folder: Path, model: str) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that is whole, and its content; None if there is none yet.

    A damaged one is named, and the one before it is taken.
    """
    damage = None
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                return path, load_checkpoint(path, model)
            except Damaged as error:
                log.warning(f"damaged   {error}")
                damage = error
    if damage:
        raise UserError(f"{folder}: no checkpoint in it is whole; train again without --resume. "
                        "The old run is moved aside, not overwritten")
    return None


def checkpoint_to_resume(config: Config) -> tuple[Path, dict] | None:
    """The checkpoint that --resume means; None if the run folder has none yet."""
    path = run_folder(config) if config.resume == "auto" else Path(config.resume)
    if config.resume == "auto" or path.is_dir():
        found = newest_checkpoint(path, config.model)
        if found is None and config.resume != "auto":
            raise UserError(f"--resume {path}: there is no checkpoint in it")
        return found
    try:
        return path, load_checkpoint(path, config.model)
    except Damaged as error:
        if (before := path.with_name("previous.pt")) != path and before.exists():
            raise Damaged(f"{error}; the one before it: --resume {before}") from None
        raise


def refuse_changes(state: dict, config: Config, path: Path, fingerprint: str, world: int) -> None:
    """UserError that says what differs if the run that the checkpoint is of cannot go on so."""
    if "optimizer" not in state:
        raise UserError(f"{path}: holds weights only; resume from the last.pt beside it")
    saved, now = state["config"], dataclasses.asdict(config)
    if state["data_fingerprint"] != fingerprint and saved["data"] == config.data:
        raise UserError(f"{path}: the images in {config.data} have changed since")
    aside = {"data"} if state["data_fingerprint"] == fingerprint else set()  # it has only moved
    changed = [f"{flag(k)} was {saved.get(k)!r}, is {now[k]!r}" for k in now
               if k not in (*CHANGEABLE, *aside) and saved.get(k) != now[k]]
    if changed:
        raise UserError(f"{path}: cannot be resumed with other settings: {'; '.join(changed)}")
    if state["world"] != world:
        raise UserError(f"{path}: of a run with {state['world']} processes, and not {world}; go "
                        f"on with torchrun --nproc_per_node={state['world']}")


def same_run(state: dict, config: Config, fingerprint: str, *also: str) -> bool:
    """Whether a checkpoint is of these settings, the changeable ones in `also` included, and of
    the same data, wherever that lies."""
    return state["data_fingerprint"] == fingerprint and all(
        state["config"].get(k) == v for k, v in dataclasses.asdict(config).items()
        if k not in (*CHANGEABLE, "data") or k in also)


def is_finished(folder: Path, config: Config, fingerprint: str) -> bool:
    """Whether the folder holds a run of these very settings and data that ran to its end."""
    if not (folder / "best.pt").is_file():
        return False
    state = load_checkpoint(folder / "best.pt")
    return bool(state["scorer"]) and same_run(state, config, fingerprint, "epochs", "patience",
                                              "min_delta")


def move_aside(folder: Path) -> None:
    """Rename an existing run to the first free name with a number: nothing is overwritten."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    log.info(f"an earlier run was there: moved to {aside}")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """While inside, no other training may use the folder: UserError if one does. There is no such
    guard where folders cannot be locked: on Windows, on some disks of networks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another training is writing there; wait for it, or give "
                            "this one another --output-dir") from None
        except OSError:  # a disk that knows no locks
            pass
        yield
    finally:
        os.close(handle)


def prepare_folder(folder: Path, checkpoint: Path | None, has_best: bool,
                   inside: contextlib.ExitStack) -> None:
    """Make the run folder what training can go on in, and claim it for as long as `inside` lasts.

    checkpoint: what to go on from, also of another folder; has_best: the best weights so far come
    along. What was there of another run is moved aside.
    """
    here = checkpoint is not None and checkpoint.parent.resolve() == folder.resolve()
    kept = ("last.pt", "previous.pt", "best.pt", "log.csv")
    if not here and any((folder / name).exists() for name in kept):
        with claimed(folder):  # not from under another training
            move_aside(folder)
    make_run_folder(folder)
    inside.enter_context(claimed(folder))
    if checkpoint is None:
        return
    if here and checkpoint.name == "previous.pt":  # last.pt is damaged, or was never renamed
        os.replace(checkpoint, folder / "last.pt")
    if not here:
        if has_best:
            shutil.copyfile(checkpoint.parent / "best.pt", folder / "best.pt")
        shutil.copyfile(checkpoint, folder / "last.pt")


def make_run_folder(folder: Path) -> None:
    """Make it; UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir: {folder} cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def logged_to(file: Path, ranks: Ranks) -> Iterator[None]:
    """While inside, what is logged also goes to the file, with time and level on every line."""
    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            start = f"{self.formatTime(record)} {record.levelname:<7} "
            return "\n".join(start + line for line in record.getMessage().splitlines())

    handler = logging.FileHandler(file, encoding="utf-8") if ranks.rank == 0 else (
        logging.NullHandler())
    handler.setFormatter(Lines())
    # A full disk is reported by what must be saved.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:  # not on the screen, where it is shown anyway
        level = logging.INFO if isinstance(error, Stopped) else logging.ERROR
        handler.handle(logging.LogRecord("", level, "", 0, f"ended by {type(error).__name__}: "
                                         f"{error}", (), None))
        raise
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


# ----------------------------------------------------------------------------------------------
# One step


def make_optimizer(config: Config, model: nn.Module, device: torch.device,
                   precision: str = "fp32") -> torch.optim.Optimizer:
    """The optimizer of the model's parameters. Large matrices are left to `lean_adam`, which its
    step calls first."""
    kinds = {"adam": (torch.optim.Adam, {}), "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}),
             "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})}
    kind, extra = kinds[config.optimizer]
    # The gradient scaler shows gradients unscaled, and only finite ones, to unfused kernels alone.
    fused = device.type != "mps" and precision != "fp16"
    optimizer = kind(model.parameters(), lr=config.learning_rate, fused=fused, **extra)
    large = [m for m in model.modules() if isinstance(m, Linear) and is_large(m.weight)]
    if config.optimizer != "sgd" and large:
        for layer in large:
            # Gradients that processes exchange, or that must be unscaled, are made in full.
            if device.type == "cpu" and precision != "fp16" and not (
                    dist.is_initialized() or config.compile):
                layer.factors = []
        decay = extra.get("weight_decay", 0.0)

        def large_ones_first(*_: object) -> None:
            for layer in large:
                lean_adam(optimizer, layer, decay)

        optimizer.register_step_pre_hook(large_ones_first)
    return optimizer


def is_large(parameter: Tensor) -> bool:
    """Whether Adam keeps less of the parameter's past, see `lean_adam`."""
    return parameter.ndim == 2 and parameter.numel() >= LARGE_MATRIX


def factored_weights(model: nn.Module) -> dict[Tensor, list[tuple[Tensor, Tensor]]]:
    """The weights whose gradients are left in factors, and where these are put."""
    return {m.weight: m.factors for m in model.modules()
            if isinstance(m, Linear) and m.factors is not None}


def moment_bytes(parameter: Tensor, config: Config) -> int:
    """What the optimizer keeps of the past of a parameter, nearly."""
    lean = 2 if is_large(parameter) else 8
    return parameter.numel() * (4 if config.optimizer == "sgd" else lean)


@torch.no_grad()
def lean_adam(optimizer: torch.optim.Optimizer, layer: Linear, decay: float) -> None:
    """One step of Adam on a layer's large matrix, whose moments take a quarter of the room.

    The first moment is kept in bf16. Of the second one only the means over rows and columns are,
    whose product stands for it (Shazeer and Stern, ICML 2018, algorithm 2; with a first moment in
    bf16 also Zhai et al., CVPR 2022). The matrix is passed over once, in tiles that stay in the
    CPU's cache, and its gradient, if only the factors are there, is never held in full.
    """
    weight = layer.weight
    group, state = optimizer.param_groups[0], optimizer.state[weight]
    (beta1, beta2), eps = group["betas"], group["eps"]
    g = weight.grad
    if g is not None:
        rows, columns = g.square().mean(1), g.square().mean(0)
    elif layer.factors:
        # Micro-batches one below the other: the product of what is joined is the sum of products.
        y, x = (torch.cat(parts) for parts in zip(*layer.factors, strict=True))
        layer.factors.clear()
        # In fp64: where the images' shares of a gradient all but cancel, fp32 would leave rounding.
        yd, xd = y.double(), x.double()
        rows = ((yd * (xd @ xd.T @ yd)).sum(0) / x.shape[1]).float()
        columns = ((xd * (yd @ yd.T @ xd)).sum(0) / y.shape[1]).float()
        yt = y.T.contiguous()
    else:
        return
    if not state:
        state["step"] = torch.zeros((), device=weight.device)
        state["exp_avg"] = torch.zeros_like(weight, dtype=torch.bfloat16)
        state["row_sq"], state["column_sq"] = torch.zeros_like(rows), torch.zeros_like(columns)
    state["step"] += 1
    t = float(state["step"])
    state["row_sq"].lerp_(rows, 1 - beta2)
    state["column_sq"].lerp_(columns, 1 - beta2)
    # weight -= rate * mean / (sqrt(second moment) + eps), the second moment being
    # row_sq * column_sq / mean(row_sq)
    right = (state["row_sq"] / state["row_sq"].mean().clamp(min=1e-30)).sqrt().clamp(min=1e-6)
    below = 1 / ((state["column_sq"] / (1 - beta2**t)).sqrt() + eps)
    left = (-group["lr"] / (1 - beta1**t) / right)[:, None]
    mean = state["exp_avg"]
    width = min(4096, weight.shape[1])
    height = (1 << 20 if weight.device.type == "cpu" else 1 << 24) // width
    room = weight.new_empty(min(height, weight.shape[0]), width)  # the same for all: in the cache
    for i in range(0, weight.shape[0], height):
        for j in range(0, weight.shape[1], width):
            a, b = slice(i, i + height), slice(j, j + width)
            moment = mean[a, b]
            tile = room[: moment.shape[0], : moment.shape[1]]
            if g is None and x.dtype == mean.dtype:  # all in bf16: no pass to and from fp32
                tile.copy_(moment.addmm_(yt[a], x[:, b], beta=beta1, alpha=1 - beta1))
            elif g is None:
                tile.copy_(moment).addmm_(yt[a], x[:, b], beta=beta1, alpha=1 - beta1)
                moment.copy_(tile)
            else:
                tile.copy_(moment).mul_(beta1).add_(g[a, b], alpha=1 - beta1)
                moment.copy_(tile)
            if decay:
                weight[a, b] *= 1 - group["lr"] * decay
            weight[a, b].addcmul_(tile.mul_(below[b]), left[a])
    weight.grad = None  # done: the optimizer's own step passes it over


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state, whatever device and memory layout it was saved from."""
    fused = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict(
        state | {"param_groups": [g | {"fused": fused} for g in state["param_groups"]]})
    # Fused kernels pair weights and moments by their place in memory: same strides, or nonsense.
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
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


class Objective(nn.Module):
    """The loss as a module, which is what DistributedDataParallel and torch.compile take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, images: Tensor) -> Tensor:
        return objective_loss(self.model, inputs, images)


@dataclasses.dataclass
class Run:
    """All that changes while a model is trained, which is what last.pt must hold."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    micro_batch: int  # images taken at a time
    schedule_epochs: int  # that the learning rate's schedule spans
    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch: the next one to train on
    best_loss: float = math.inf
    bad_epochs: int = 0  # since the best one
    # Of the epoch so far:
    loss_sum: float = 0.0
    images: int = 0
    skipped: int = 0  # steps whose loss was no finite number
    seconds: float = 0.0
    waited: float = 0.0  # seconds, for data
    bad_steps: int = 0  # in a row
    rate_factor: float = 1.0  # of the learning rate; halved when the last good state is taken back
    wandb_id: str | None = None
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict[str, object]:
        """Everything, as tensors and plain values."""
        return {f.name: value.state_dict() if hasattr(value, "state_dict") else value
                for f in dataclasses.fields(self) for value in [getattr(self, f.name)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it but micro_batch, which depends on the machine."""
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the system had no memory left for a tensor."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


def memory_of_a_step(run: Run, config: Config, device: torch.device, precision: str,
                     ) -> Callable[[int], int]:
    """What a training step will take of the device's memory beyond what is held already: bytes by
    the number of images taken at a time.

    Measured: what one image leaves behind for the backward pass, from forward passes over two and
    over three images. Added to it: gradients, and moments where the optimizer has none yet.
    """
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    state = [b.clone() for b in run.model.buffers()]

    def saved(count: int) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # as it is, an output would keep its own graph alive for ever

        images = torch.rand(count, 1, config.image_size, config.image_size, device=device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), \
                autocast(device, precision):
            loss = objective_loss(run.model, images, images)
        del loss  # up to here the graph held them all: no address was used twice
        return sum(seen.values())

    run.model.train()
    two = saved(2)
    image = saved(3) - two
    for buffer, value in zip(run.model.buffers(), state, strict=True):
        buffer.copy_(value)
    factored = factored_weights(run.model)
    fixed = max(0, two - 2 * image)
    for p in run.model.parameters():
        moments = 0 if run.optimizer.state else moment_bytes(p, config)
        fixed += moments + (0 if p in factored else 4 * p.numel())
    # What whole steps took on a CPU was 1.44 to 1.64 times that: gradients of activations, what
    # convolutions work in, and the allocator's own.
    return lambda count: int(1.6 * (fixed + count * image))


def fit_into_memory(run: Run, config: Config, loaders: Loaders, device: torch.device,
                    precision: str, ranks: Ranks) -> None:
    """Take fewer images at a time, if the whole batch would take too much memory."""
    free = memory_for_steps(device, loaders)
    batch = math.ceil(loaders.train.batch_size / ranks.world)
    run.micro_batch = min(batch, config.micro_batch or batch)
    if (free is None and device.type != "cpu") or config.micro_batch:
        return
    need = memory_of_a_step(run, config, device, precision)
    run.micro_batch = int(ranks.least(parts_that_fit(run.micro_batch, need, free, device)))
    if run.micro_batch < batch:
        there = f"; {size_of(max(0, free))} are free" if free is not None else ""
        log.info(f"memory    of {batch} images {run.micro_batch} are taken at a time, their "
                 f"gradients added up: about {size_of(need(run.micro_batch))} instead of "
                 f"{size_of(need(batch))}{there}")
    if free is not None and need(run.micro_batch) > free:
        log.warning(f"careful: even that takes about {size_of(need(run.micro_batch))}; a "
                    "smaller --width or --image-size would take less")


def memory_for_steps(device: torch.device, loaders: Loaders | None) -> int | None:
    """Bytes that training steps may take on the device: what is free, less what the images will
    take there; None if that is not known."""
    free = free_memory(device)
    if free is not None and loaders and device.type == "cpu":
        free -= sum(stream.bound for stream in loaders[:3])
    return free


def parts_that_fit(batch: int, need: Callable[[int], int], free: int | None,
                   device: torch.device) -> int:
    """How many images of a batch to take at a time, so that a step fits into the free memory.

    On a CPU also into CPU_STEP: whole batches gain little or no speed there, for much memory.
    """
    if device.type == "cpu":
        counts = [math.ceil(batch / parts) for parts in range(1, max(1, batch // CPU_PART) + 1)]
        batch = next((count for count in counts if need(count) <= CPU_STEP), counts[-1])
    while free is not None and batch > 1 and need(batch) > 0.9 * free:
        batch = math.ceil(batch / 2)
    return batch


def train_step(run: Run, objective: Any, images: Tensor, config: Config, batch_size: int,
               device: torch.device, precision: str, ranks: Ranks) -> tuple[float, int]:
    """One optimizer step on this process's slice of a batch; mean loss and number of images of
    the whole batch.

    images: uint8 [B,1,H,W]; fewer than the slice if some could not be read, even none.
    batch_size: of the whole batch. All randomness depends on (seed, step) and the place in the
    batch. If the loss is no finite number, nothing is changed.
    """
    total = int(ranks.sum(len(images)))
    # As numpy.array_split deals them: the first few slices have one more.
    start = sum(batch_size // ranks.world + (r < batch_size % ranks.world)
                for r in range(ranks.rank))
    if not total:  # none of the batch's images could be read
        return 0.0, 0
    weight = ranks.world / total  # DistributedDataParallel takes the mean over processes
    if not len(images):  # the others wait for gradients all the same
        images, weight = images.new_zeros((1, *images.shape[1:])), 0.0
    images = to_float(images, device)
    draws = Draws(seeded(config.seed, "step", run.step), len(images), start,
                  max(batch_size, start + len(images)))
    if config.augment:
        images = augment(images, draws)
    inputs = corrupt(images, config.objective, draws)
    norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
    buffers = list(run.model.buffers())  # their running statistics
    before = [b.clone() for b in buffers]

    def clear_gradients(keep_room: bool = False) -> None:
        run.optimizer.zero_grad(set_to_none=not keep_room)
        factored = factored_weights(run.model)
        for factors in factored.values():
            factors.clear()
        if keep_room:
            for p in run.model.parameters():
                if p.grad is None and p not in factored:
                    p.grad = torch.zeros_like(p)

    def accumulate() -> Tensor:
        """Gradients of the weighted loss, micro_batch images at a time; the loss."""
        torch.manual_seed(seeded(config.seed, f"dropout {ranks.rank}", run.step).initial_seed())
        parts = math.ceil(len(images) / run.micro_batch)
        # Made anew in a step of several parts, gradients would come to lie among the activations
        # of the first one, and the other parts would find only gaps.
        clear_gradients(keep_room=parts > 1)
        for norm in norms:  # moves the running statistics as far in a step, whatever the parts
            norm.momentum = 1 - (1 - BATCHNORM_MOMENTUM) ** (1 / parts)
        losses: list[Tensor] = []
        for x, y in zip(inputs.tensor_split(parts), images.tensor_split(parts), strict=True):
            last = len(losses) == parts - 1
            # Gradients travel between processes once a step.
            with contextlib.nullcontext() if last or ranks.world == 1 else objective.no_sync():
                with autocast(device, precision):
                    loss = objective(x, y) * (len(y) * weight)
                run.scaler.scale(loss).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    while True:
        try:
            # Waits for the device: little beside a step of these models.
            loss = ranks.sum(accumulate().item()) / ranks.world
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            torch._foreach_copy_(buffers, before)
            if run.micro_batch == 1 or ranks.world > 1:
                smaller = max(1, run.micro_batch // 2)
                raise UserError(
                    f"out of memory at step {run.step + 1} with {run.micro_batch} images at a "
                    f"time; go on with --resume --micro-batch {smaller}" if run.micro_batch > 1
                    else f"out of memory at step {run.step + 1} with a single image; try a "
                    "smaller --width or --image-size") from None
        # Out of the except block, which would keep the failed step's tensors alive.
        run.micro_batch = math.ceil(min(run.micro_batch, len(images)) / 2)
        log.warning(f"memory    out of it at step {run.step + 1}: {run.micro_batch} images are "
                    "taken at a time from now on, their gradients added up")
        clear_gradients()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if math.isfinite(loss):
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        torch._foreach_copy_(buffers, before)
    return loss, total


def after_bad_loss(run: Run, loss: float, best: Path, initial: Callable[[], Run]) -> None:
    """A step's loss was no finite number: let it be, or take the last good state back, or stop.

    The good state is that of the best epoch, or before there is one the untrained model, with a
    fresh optimizer: it depends on the step alone, and not on when a checkpoint was written.
    """
    run.skipped += 1
    run.bad_steps += 1
    where = f"the loss is {loss} at epoch {run.epoch + 1}, step {run.step + 1}"
    if run.bad_steps < BAD_STEPS:
        log.warning(f"{where}: that step is skipped")
        return
    if run.rate_factor < 1:
        raise UserError(f"{where}, {BAD_STEPS} steps in a row, and so it was before the learning "
                        "rate was halved; start over with a smaller --learning-rate")
    log.warning(f"{where}, {BAD_STEPS} steps in a row: going back to the last good weights, at "
                "half the learning rate from now on")
    good = load_checkpoint(best)["model"] if run.epoch else initial().model.state_dict()
    run.model.load_state_dict(good)
    run.optimizer.state.clear()
    run.bad_steps, run.rate_factor = 0, 0.5


# ----------------------------------------------------------------------------------------------
# Training


class Stop:
    """While inside, SIGINT (Ctrl-C) and SIGTERM end training at the next `check`, on every process
    at the same one; then `save` is called, and Stopped leaves. A second signal ends at once."""

    def __init__(self, ranks: Ranks, save: Callable[[], None], message: str) -> None:
        self.ranks, self.save, self.message = ranks, save, message
        self.number, self.waiting = 0, False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # only there they can be had
            self._old = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is Stopped:
                self.save()
                self.ranks.wait()  # torchrun would end the one that saves once another has ended
            elif kind is not None and issubclass(kind, UserError):  # no step was left half done
                with contextlib.suppress(UserError):  # which the disk may have been the reason of
                    self.save()
        finally:
            # Where another process has died, the launcher's SIGTERM is on its way: it must not end
            # this one before it has said why it ends.
            if self.ranks.world == 1 or kind is None or kind is Stopped:
                self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.number = number
        if self.ranks.world > 1:  # torchrun itself sends a second one
            return
        self._restore()
        if self.waiting:  # between two steps, perhaps for long
            raise Stopped(self.message, number)
        # Not by print, which may be what was interrupted.
        os.write(2, b"\nending after this step, to save; once more ends at once\n")

    def check(self) -> None:
        """Stopped if this process or another has been asked to end."""
        if self.ranks.sum(self.number):
            raise Stopped(self.message, self.number or signal.SIGTERM)


def timed(loader: ImageStream, run: Run, stop: Stop) -> Iterator[Tensor]:
    """The loader's images; counts the seconds that are spent waiting for them."""
    batches = iter(loader)
    while True:
        began = time.monotonic()
        stop.waiting = True
        images, _ = next(batches, (None, None))
        stop.waiting = False
        run.waited += time.monotonic() - began
        if images is None:
            return
        yield images


@torch.no_grad()  # and not inference mode, whose images could not be kept for calibration
def validate(model: nn.Module, loader: Iterable[tuple[Tensor, Any]], config: Config,
             device: torch.device, precision: str, ranks: Ranks, micro_batch: int,
             stop: Stop | None = None) -> float:
    """The objective on validation normals, corrupted in the same way every time.

    A loss on clean input would reward copying it.
    """
    model.eval()
    total, count = 0.0, 0.0
    for i, (images, _) in enumerate(loader):
        if stop:
            stop.check()
        if not len(images):  # fewer than there are processes
            continue
        images = to_float(images, device)
        draws = Draws(seeded(config.seed, f"validate {ranks.rank}", i), len(images))
        inputs = corrupt(images, config.objective, draws)
        for x, y in zip(inputs.split(micro_batch), images.split(micro_batch), strict=True):
            with autocast(device, precision):
                total += objective_loss(model, x, y).item() * len(y)
        count += len(images)
    total, count = ranks.sum(total), ranks.sum(count)
    if not count:
        raise UserError("no validation image could be read")
    return total / count


@torch.no_grad()
def read_evenly(model: nn.Module, images: Tensor, device: torch.device,
                precision: str) -> list[tuple[Reading, int]]:
    """What the model makes of uint8 images [n,1,H,W]: Readings of READ_AT_ONCE images each, and
    how many of these are real; black ones fill up the last.

    Kernels add in another order for batches of another size, and would make an image's score
    depend on the images beside it. Of what the scorers make of a Reading only the first so many
    count, too: reading a batch and its scores in full keeps all shapes the same.
    """
    result = []
    # Once for all, since it casts the weights; which it does anew each time in inference mode.
    with autocast(device, precision):
        for part in images.split(READ_AT_ONCE):
            full = part.new_zeros((READ_AT_ONCE, *part.shape[1:]))
            full[: len(part)] = part
            result.append((read(model, to_float(full, device)), len(part)))
    return result


def score_evenly(
    model: nn.Module, scorer: AnomalyScorer, images: Tensor, device: torch.device, precision: str,
    map_by: str = DEFAULT_SCORER,
) -> tuple[Reading, dict[str, Tensor], Tensor]:
    """The Reading of uint8 images [n,1,H,W], their scores [n] by every scorer, and their anomaly
    maps [n,1,H,W] by `map_by`.

    An image is read as it is, and once more moved to where it is most like normal ones
    (`AnomalyScorer.framing`), unless that is where it is. Each score is the lower of the two. The
    map is that of the reading in which it has the lower score, moved back.
    """
    def scored(readings: list[tuple[Reading, int]]) -> tuple[Reading, dict[str, Tensor], Tensor]:
        scores, maps = [], []
        for reading, count in readings:
            z = scorer.z("zscore", reading)
            scores.append({k: v[:count] for k, v in scorer.scores(reading, z).items()})
            maps.append(scorer.anomaly_map(map_by, reading, z)[:count])
        return (Reading.joined([reading.first(count) for reading, count in readings]),
                {name: torch.cat([s[name] for s in scores]) for name in scores[0]},
                torch.cat(maps))

    # The weights are cast once for all; what the scorers do is done in fp32.
    with autocast(device, precision), no_autocast(device):
        readings = read_evenly(model, images, device, precision)
        shift = torch.cat([scorer.framing(r.images)[:count] for r, count in readings])
        reading, scores, map_ = scored(readings)
        away = shift.any(1).nonzero()[:, 0]
        if len(away):
            shift = shift[away]
            elsewhere = moved(images.to(device)[away], shift)
            _, found, again = scored(read_evenly(model, elsewhere, device, precision))
            others = {name: value.index_copy(0, away.cpu(), found[name])
                      for name, value in scores.items()}
            decides = map_name(map_by)
            lower = (others[decides] < scores[decides]).to(device)[away, None, None, None]
            map_[away] = torch.where(lower, moved(again, -shift), map_[away])
            scores = scorer.lower(scores, others)
    return reading, scores, map_


def regrouped(stream: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """A stream's images, uint8 [n,1,H,W], n a multiple of READ_AT_ONCE but for the last: so that
    smaller batches are not filled up, which would cost as much as whole ones."""
    held = torch.empty(0, dtype=torch.uint8)
    for images, _ in stream:
        held = torch.cat([held, images]) if len(held) else images
        whole = len(held) // READ_AT_ONCE * READ_AT_ONCE
        if whole:
            yield held[:whole]
            held = held[whole:]
    if len(held):
        yield held


def with_lesions(images: Tensor, number: int) -> Tensor:
    """uint8 images [n,1,H,W] with lesions drawn on, which the number decides on; on the CPU."""
    draws = Draws(seeded(0, "calibrate", number), len(images))
    seen = add_lesions(to_float(images, torch.device("cpu")), draws)
    return (seen.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def calibrate(model: nn.Module, loaders: Loaders, device: torch.device,
              precision: str) -> AnomalyScorer:
    """A scorer calibrated on training normals, some of them with lesions drawn on as well, with the
    scores of the validation normals."""
    model = folded(model)
    scorer = AnomalyScorer()
    stream = loaders.train
    step = math.ceil(len(stream.samples) / CALIBRATION_IMAGES)
    some = stream.every(step)
    normals = loaders.val.every(1)  # all, also where this process has but a slice
    count = math.ceil(len(stream.samples) / step)

    bar = Progress(count + len(loaders.val.samples), "calibrating")
    batches, step = 0, max(1, count // LESIONED)
    for images in regrouped(some):
        readings = read_evenly(model, images, device, precision)
        for clean, (reading, count) in zip(images.split(READ_AT_ONCE), readings, strict=True):
            lesioned = None
            if batches % step == 0:
                drawn_on = with_lesions(clean, batches)
                [(lesioned, _)] = read_evenly(model, drawn_on, device, precision)
                lesioned = lesioned.first(count)
            scorer.add(reading.first(count), lesioned)
            batches += 1
        bar.update(len(images))
    if not bar.done:
        raise UserError("none of the training images that the scores are calibrated on can be read")
    scorer.finish()
    scores = []
    for images in regrouped(normals):
        scores.append(score_evenly(model, scorer, images, device, precision)[1])
        bar.update(len(images))
    bar.close()
    scorer.refer_to(scores)
    return scorer


def train(config: Config) -> list[Path]:
    """Train what the configuration asks for; the run folders, as many as models times seeds."""
    ranks = Ranks()
    try:
        return train_all(config, ranks)
    except (RuntimeError, MemoryError) as error:  # with nothing that one could do about it here
        reason = first_line(error)[:200]
        if is_out_of_memory(error):
            raise UserError(f"out of memory ({reason}); try a smaller --micro-batch, --width or "
                            "--image-size") from None
        if ranks.world > 1 and any(w in str(error).lower() for w in ("gloo", "nccl", "peer")):
            last = str(error).strip().split("\n")[-1][:200]  # where NCCL says what it was
            raise UserError("another process of this run has ended, or cannot be reached "
                            f"({reason}{f' ... {last}' if last not in reason else ''}); go on "
                            f"with: {command_to_resume(config)}") from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            told = " ".join(str(error).split())[:300]
            raise UserError(f"--compile does not work here ({type(error).__name__}: {told}); go "
                            "on without it") from None
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


def train_all(config: Config, ranks: Ranks) -> list[Path]:
    """What `train` says, among the processes of `ranks`."""
    config = complete(config)
    # The machine and the models come first: what they refuse costs no reading of data.
    device = ranks.meet(choose_device(config.device)[0])
    if config.deterministic:
        be_deterministic()
    configs = one_by_one(config)
    for each in configs:
        with torch.device("meta"):
            create_model(each.model, each)
        if each.resume not in (None, "auto") and not os.path.exists(each.resume):
            raise UserError(f"--resume {each.resume}: there is no checkpoint there")
    if config.data == "synthetic":
        log.info("This trains on the BUILT-IN PHANTOM: drawn films, not real X-rays. For your own "
                 "images give --data FOLDER.")
    source = open_source(config)
    if config.batch_size is None:
        size = automatic_batch(configs, source, device, ranks)
        configs = [dataclasses.replace(each, batch_size=size) for each in configs]
    if configs[0].batch_size < ranks.world:
        raise UserError(f"--batch-size {configs[0].batch_size}: fewer images than the "
                        f"{ranks.world} processes that share them")
    # One set of loaders for all: the split is the same, and images are read and decoded once.
    loaders = create_dataloaders(configs[0], ranks.rank, ranks.world, source)
    folders = [train_one(each, loaders, device, ranks, config) for each in configs]
    if ranks.rank == 0:
        note_trained(configs, Path(config.output_dir) / TRAINED)
    if len(folders) > 1:
        log.info(f"next      {command_to_evaluate(config.output_dir)}   (all of them)\n")
    return folders


def note_trained(configs: list[Config], file: Path) -> None:
    """Write down which run folders belong together, for evaluate.py; of other models what is there
    stays if it was trained on the same data."""
    noted: dict[str, list[str]] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, UserError):
        known = json.loads(file.read_text(encoding="utf-8"))
        noted = {model: names for model, names in known.items()
                 if all(load_config(file.parent / n).data == configs[0].data for n in names)}
    for model in {each.model for each in configs}:
        noted[model] = [run_folder(each).name for each in configs if each.model == model]
    write_file(file, json.dumps({m: noted[m] for m in MODELS if m in noted}, indent=2) + "\n")


def automatic_batch(configs: list[Config], source: Source, device: torch.device,
                    ranks: Ranks) -> int:
    """The largest power of two of images whose step fits into the free memory, for every model.

    At most a sixteenth of the normal images: fewer steps an epoch would teach little. A run that
    goes on keeps the size that it had.
    """
    for config in configs:
        if config.resume or config.reuse:
            with contextlib.suppress(UserError):  # of which more is said when it is resumed
                found = checkpoint_to_resume(dataclasses.replace(
                    config, resume=config.resume or "auto"))
                if found:
                    return found[1]["config"]["batch_size"]
    normals = sum(s.label == NORMAL for s in source.samples if s.split in ("", "train"))
    most = min(normals, configs[0].samples or normals) // 16
    # All streams together hold some ten batches.
    most = max(2, min(most, configs[0].memory_bytes // (64 * configs[0].image_size**2)))
    size = most
    for config in {each.model: each for each in configs}.values():
        precision, _ = choose_precision(config.precision, device)
        run = start_run(config, device, precision)
        need, free = memory_of_a_step(run, config, device, precision), free_memory(device)
        if free is None:
            raise UserError("--batch-size auto: how much memory is free is not known here; give "
                            "a number")
        if device.type == "cpu":
            free -= config.memory_bytes // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        fits = 2
        while fits * 2 * ranks.world <= most and need(2 * fits) <= 0.9 * free:
            fits *= 2
        size = min(size, fits * ranks.world)
    size = 2 ** int(math.log2(ranks.least(size)))
    log.info(f"memory    batches of {size} images: the largest power of two that fits, and leaves "
             "16 steps an epoch")
    return size


def start_run(config: Config, device: torch.device, precision: str) -> Run:
    """An untrained model and its optimizer, on the device."""
    torch.manual_seed(config.seed)
    # The first optimizer imports PyTorch's compiler, which takes two seconds. Drawing 272 million
    # weights takes longer, and leaves Python alone meanwhile.
    compiler = threading.Thread(target=importlib.import_module, args=("torch._dynamo",))
    compiler.start()
    model = place(create_model(config.model, config), device, precision)
    compiler.join()
    return Run(model, make_optimizer(config, model, device, precision),
               torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
               micro_batch=config.batch_size or 2, schedule_epochs=config.epochs)


def train_one(config: Config, loaders: Loaders, device: torch.device, ranks: Ranks,
              asked: Config) -> Path:
    """Train one model from start, or from a checkpoint, to calibrated best weights."""
    folder = run_folder(config)
    fingerprint = loaders.source.fingerprint()

    # Which checkpoint to go on from, if any.
    found = checkpoint_to_resume(config) if config.resume else None
    if config.reuse and not config.resume:
        try:
            if is_finished(folder, config, fingerprint):
                log.info(f"reuse     {folder} is a finished run of these settings: left as it is\n")
                with contextlib.suppress(UserError):
                    if ranks.rank == 0 and load_config(folder).data != config.data:  # it has moved
                        write_config(config, folder)
                return folder
            found = newest_checkpoint(folder, config.model)
            if found and not same_run(found[1], config, fingerprint, "epochs"):
                found = None
            if found and found[1]["epoch"]:
                load_checkpoint(folder / "best.pt", config.model)  # which must be there, too
        except UserError as error:  # damaged, or of another version: moved aside below
            found = None
            log.warning(f"reuse     {error}: not reused")
    checkpoint, state = found or (None, None)
    if state:
        refuse_changes(state, config, checkpoint, fingerprint, ranks.world)

    precision, why_precision = choose_precision(config.precision, device)
    if state and config.precision == "auto" and state["device"] == device.type:
        if state["precision"] == "bf16" != precision:
            why_precision += "; bf16, as before, would be imitated, very slowly"
        else:
            precision, why_precision = state["precision"], "as before"
    run = start_run(config, device, precision)
    stream = loaders.train
    stream.seed = config.seed  # the loaders may have been another seed's
    stream.set_epoch(0)
    if state:
        run.load_state_dict(state)
        stream.set_epoch(run.epoch)
        if run.batch:
            stream.load_state_dict(state["stream"] | {"next_batch": run.batch})
        if run.epoch:
            best = checkpoint.parent / "best.pt"
            try:
                load_checkpoint(best, config.model)
            except UserError as error:  # damaged or missing
                raise UserError(f"{error}. The weights of the best epoch are lost; those of the "
                                f"last one are in {checkpoint}. Start over without --resume: the "
                                "old run is moved aside, not overwritten") from None

    with contextlib.ExitStack() as inside:
        # The folder: first everyone has looked at it, then one process changes it.
        ranks.wait()
        if ranks.rank == 0:
            prepare_folder(folder, checkpoint, bool(run.epoch), inside)
            write_splits(loaders.splits, folder / "split.csv")
            write_config(config, folder)
        ranks.wait()
        inside.enter_context(logged_to(folder / "run.log", ranks))
        settings = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items())
        log.info(textwrap.fill(settings, 100, initial_indent="settings  ",
                               subsequent_indent=" " * 10, break_on_hyphens=False,
                               break_long_words=False))
        log.info(f"device    {device} ({choose_device(config.device)[1]}), {precision} "
                 f"({why_precision})" + (f", {ranks.world} processes" if ranks.world > 1 else ""))
        log.info(describe(loaders.source, loaders.splits))
        log.info(describe_memory(loaders))
        parameters = sum(p.numel() for p in run.model.parameters())
        log.info(f"model     {config.model}, {parameters:,} parameters")
        if state:
            log.info(f"resume    {checkpoint}, after epoch {run.epoch}, step {run.step}")
            if config.data != (before := state["config"]["data"]):
                log.info(f"          its images were in {before}: the names of these are the same")
        elif config.resume:
            log.info(f"resume    no checkpoint in {folder} yet: starting afresh")
        if state and state["device"] == device.type and (
                config.micro_batch == state["config"]["micro_batch"]):
            run.micro_batch = state["micro_batch"]
        else:
            fit_into_memory(run, config, loaders, device, precision, ranks)
        del found, state
        common = {"format": FORMAT, "config": settings_of(config), "data_fingerprint": fingerprint,
                  "precision": precision, "device": device.type, "world": ranks.world,
                  "versions": {"python": platform.python_version(),
                               "torch": str(torch.__version__)}}
        return train_epochs(run, config, loaders, device, precision, ranks, common, asked)


def train_epochs(run: Run, config: Config, loaders: Loaders, device: torch.device, precision: str,
                 ranks: Ranks, common: dict[str, object], asked: Config) -> Path:
    """The loop, and what comes after it. common: what every checkpoint holds besides weights."""
    folder, last = run_folder(config), run_folder(config) / "last.pt"
    stream = loaders.train
    objective: Any = Objective(run.model)
    if ranks.world > 1:
        # find_unused_parameters: there are none, but without it gradients are grouped anew after
        # the first step, of a resumed run too, and so added up in another order.
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True,
                                            find_unused_parameters=True)
    if config.compile:
        objective = torch.compile(objective)
    wandb = start_wandb(config, run, folder) if config.wandb and ranks.rank == 0 else None
    total_steps = max(1, run.schedule_epochs * len(loaders.train))
    images_an_epoch = len(loaders.train) * stream.batch_size
    bar = Progress(config.epochs * images_an_epoch, folder.name,
                   run.epoch * images_an_epoch + run.images, show=ranks.rank == 0)
    memory_is_short, saved, saved_at, began = False, (-1, -1), time.monotonic(), 0.0
    first_step = run.step

    def due(seconds: float) -> bool:
        """Whether last.pt is so old. A large one (0.5 GB and more) is left alone for a minute."""
        large = last.exists() and last.stat().st_size > LARGE_FILE
        return time.monotonic() - saved_at >= max(seconds, 60 if large else 0)

    def save_last() -> None:
        nonlocal saved_at, saved
        if saved == (run.epoch, run.batch):
            return
        saved, saved_at = (run.epoch, run.batch), time.monotonic()
        if ranks.rank:
            return
        if not all(p.isfinite().all() for p in run.model.parameters()):
            log.warning(f"the weights hold numbers that are not finite: {last} stays as it was")
            return
        seconds = run.seconds + (time.monotonic() - began if run.batch else 0.0)
        save_checkpoint(common | run.state_dict() | {"stream": stream.state_dict(),
                                                     "seconds": seconds},
                        last, folder / "previous.pt")

    stopped = f"ended as asked, and saved; go on with: {command_to_resume(asked)}"
    with contextlib.closing(bar), Stop(ranks, save_last, stopped) as stop:
        while run.epoch < config.epochs and run.bad_epochs < config.patience:
            began = time.monotonic()
            run.model.train()
            for images in timed(loaders.train, run, stop):
                rate = learning_rate_at(run.step, total_steps, config) * run.rate_factor
                for group in run.optimizer.param_groups:
                    group["lr"] = rate
                loss, count = train_step(run, objective, images, config, stream.batch_size,
                                         device, precision, ranks)
                if math.isfinite(loss):
                    run.bad_steps = 0
                    run.loss_sum += loss * count
                    run.images += count
                else:
                    after_bad_loss(run, loss, folder / "best.pt",
                                   lambda: start_run(config, device, precision))
                run.step += 1
                run.batch = stream.next_batch  # wholly unreadable ones are passed over
                bar.update(count, loss=loss,
                           label=f"{folder.name} epoch {run.epoch + 1}/{config.epochs}")
                memory_is_short = memory_is_short or warn_if_memory_is_short()
                if due(60 * config.checkpoint_minutes):
                    save_last()
                stop.check()
            train_seconds = run.seconds + time.monotonic() - began
            ranks.share(run.model)
            val_loss = validate(run.model, loaders.val, config, device, precision, ranks,
                                run.micro_batch, stop)

            # One row for the epoch.
            if not run.images:
                raise UserError("no training image could be read" if not run.skipped else
                                f"no step of epoch {run.epoch + 1} had a finite loss; start over "
                                "with a smaller --learning-rate")
            if not math.isfinite(val_loss):
                raise UserError(f"the validation loss is {val_loss} after epoch {run.epoch + 1}; "
                                "try a smaller --learning-rate")
            seconds = run.seconds + time.monotonic() - began
            row = dict(zip(LOG_COLUMNS, (
                run.epoch + 1, run.step, run.loss_sum / run.images, val_loss,
                learning_rate_at(run.step - 1, total_steps, config) * run.rate_factor, run.skipped,
                run.images / train_seconds, run.waited / train_seconds, seconds,
                process_memory() / 2**20, device_memory(device) / 2**20), strict=True))
            better = val_loss < run.best_loss - config.min_delta
            bar.write(f"  epoch {run.epoch + 1}/{config.epochs}  train loss "
                      f"{row['train_loss']:.4f}  validation loss {val_loss:.4f}"
                      f"{' (best)' if better else ''}  {row['images_per_second']:.1f} images/s  "
                      f"{seconds:.0f} s")
            if wandb and not send(wandb, row):
                wandb = None

            # Save, and perhaps stop. The best weights first: last.pt says that they are there.
            weights = common | {"model": run.model.state_dict(), "epoch": run.epoch + 1,
                                "val_loss": val_loss, "scorer": None}
            if better and ranks.rank == 0:
                save_checkpoint(weights, folder / "best.pt")
            if config.keep_every and (run.epoch + 1) % config.keep_every == 0 and ranks.rank == 0:
                save_checkpoint(weights, folder / f"epoch{run.epoch + 1}.pt")
            run.log.append(row)
            run.bad_epochs = 0 if better else run.bad_epochs + 1
            run.best_loss = val_loss if better else run.best_loss
            run.begin_epoch(run.epoch + 1)
            stream.set_epoch(run.epoch)
            if ranks.rank == 0:
                try:
                    write_log(run.log, folder / "log.csv")
                except UserError as error:  # open in a spreadsheet?
                    log.warning(f"{folder}/log.csv was not written, training goes on: last.pt has "
                                f"its rows, too ({error})")
            ended = run.epoch == config.epochs or run.bad_epochs == config.patience
            if ended or due(0):
                save_last()
            stop.check()
    if ranks.rank:  # the rest is for one process
        return folder
    if run.bad_epochs >= config.patience:
        log.info(f"stopped early: no better validation loss for {config.patience} epochs; to go on "
                 "all the same: --resume with a larger --patience")

    # Calibrate the scorers on the best weights, and store them with these.
    best = load_checkpoint(folder / "best.pt", config.model)
    run.model.load_state_dict(best["model"])
    if run.step > first_step or not best["scorer"]:
        scorer = calibrate(run.model, loaders, device, precision)
        save_checkpoint(dict(best) | {"config": common["config"], "scorer": scorer.state_dict()},
                        folder / "best.pt")
    write_log(run.log, folder / "log.csv")  # also where nothing was left to train
    draw_curves(run.log, folder / "curves.png", folder.name)
    if wandb:
        send(wandb, {}, folder / "curves.png")
    report_data(loaders)
    before = ", previous.pt" if (folder / "previous.pt").exists() else ""
    log.info(f"written   {folder}/: best.pt (epoch {best['epoch']}, validation loss "
             f"{best['val_loss']:.4f}), last.pt{before}, log.csv, run.log, curves.png, split.csv, "
             "config.json")
    log.info(f"next      {command_to_evaluate(str(folder))}\n")
    return folder


def command_to_evaluate(folder: str) -> str:
    """What to type to test what was trained."""
    return f"evaluate({folder!r})" if in_notebook() else (
        f"{command('evaluate.py')} {quoted(folder)}")


def command_to_resume(config: Config) -> str:
    """What to type to go on with a run, as this program itself was started."""
    if in_notebook():
        return "the same cell again" if config.reuse else "the same cell, with reuse=True"
    where = "" if config.output_dir == "runs" else f" --output-dir {quoted(config.output_dir)}"
    # What decides which folders are meant; all else is in these.
    for name in ("seed", "seeds"):
        if (value := getattr(config, name)) != getattr(Config, name):
            where += f" {flag(name)} {value}"
    return f"{command('train.py')} --model {config.model}{where} --resume"


def report_data(loaders: Loaders) -> None:
    """Say what the data cost, and which images could not be read."""
    peak = loaders.train.memory.peak_bytes / 1e6
    log.info(f"memory    images took {peak:,.1f} MB at the most")
    if isinstance(loaders.source, KaggleSource):
        log.info(loaders.source.report())
    for name, loader in (("train", loaders.train), ("validation", loaders.val)):
        for key, reason in loader.bad.items():
            log.warning(f"skipped   {key} ({name}): {reason}")


def find_wandb(verify: bool = False) -> types.ModuleType:
    """The wandb package. UserError if it is missing or has no key: it would ask for one, and wait.

    verify: also ask the server whether it takes the key.
    """
    for name, value in (("SILENT", "true"), ("INIT_TIMEOUT", "30"), ("FINISH_TIMEOUT", "120")):
        os.environ.setdefault(f"WANDB_{name}", value)
    try:
        import wandb
    except ImportError:
        raise UserError("not installed: pip install wandb") from None
    if os.environ.get("WANDB_MODE", "online") == "online":
        keys = [os.environ.get(f"WANDB_{name}") for name in ("API_KEY", "IDENTITY_TOKEN_FILE")]
        hosts = (os.environ.get("WANDB_BASE_URL", ""), wandb.Settings().base_url,
                 "https://api.wandb.ai")  # .netrc may hold a key for one of them
        if not any([*keys, *map(requests.utils.get_netrc_auth, hosts)]):
            raise UserError("no key: set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline")
        if verify and not wandb.login(verify=True):
            raise UserError("the key is not accepted")
    return wandb


def start_wandb(config: Config, run: Run, folder: Path) -> object | None:
    """A run at Weights & Biases, the one before if this run goes on; None if it cannot be had."""
    try:
        there = find_wandb().init(
            project=config.wandb_project, name=folder.name, id=run.wandb_id, resume="allow",
            dir=str(folder), config=dataclasses.asdict(config))
        run.wandb_id = there.id
        return there
    except Exception as error:  # whatever it is, training matters more
        log.warning(f"wandb     cannot be used ({first_line(error)}): going on without it")
    return None


def send(wandb_run: Any, row: dict[str, float], picture: Path | None = None) -> bool:
    """Forward a row of log.csv to Weights & Biases; with a picture, as the last thing. Whether
    that went well."""
    try:
        if picture is None:
            wandb_run.log(row, step=row["epoch"])
        else:
            import wandb

            wandb_run.log({picture.stem: wandb.Image(str(picture))})
            wandb_run.finish()
        return True
    except Exception as error:
        log.warning(f"wandb     cannot be reached ({error}): going on without it")
        return False


def write_file(file: Path, text: str) -> None:
    """Write a small file whole or not at all, and to the disk."""
    temporary = file.with_suffix(".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(file, error) from None


def settings_of(config: Config) -> dict[str, Any]:
    """What a run keeps of its configuration: all but how it was started."""
    return dataclasses.asdict(config) | {"resume": None, "reuse": False}


def write_config(config: Config, folder: Path) -> None:
    """config.json of a run folder."""
    write_file(folder / "config.json", json.dumps(settings_of(config), indent=2) + "\n")


def write_log(rows: list[dict], file: Path) -> None:
    """log.csv, whole: a few rows, and never a torn one after a resume."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_file(file, text.getvalue())


def draw_curves(rows: list[dict], file: Path, title: str) -> None:
    """Training and validation loss over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    plot_curves(figure.subplots(), rows, title, "#0072B2", "#D55E00")
    figure.savefig(file, dpi=120)


def plot_curves(axes: Any, rows: list[dict], title: str, colour: str, colour_val: str) -> None:
    """The losses of the rows of log.csv, on matplotlib's axes."""
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row["train_loss"] for row in rows], "o-", color=colour, label="training",
              markersize=4)
    axes.plot(epochs, [row["val_loss"] for row in rows], "s--", color=colour_val,
              label="validation normals", markersize=4)
    best = min(rows, key=lambda row: row["val_loss"])
    axes.axvline(best["epoch"], color="0.6", linewidth=1, linestyle=":")
    late = best["epoch"] > epochs[-1] / 2
    axes.text(best["epoch"], 0.03, " best ", transform=axes.get_xaxis_transform(),
              ha="right" if late else "left")
    axes.set(xlabel="epoch", ylabel="mean absolute error", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


# ----------------------------------------------------------------------------------------------
# Whether training would work


class Findings:
    """Tells what was found, a line each: ok, careful, or FAILS."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def tell(self, level: str, what: str, text: str) -> None:
        """One finding; further lines of its text are indented."""
        if level == "FAILS":
            self.failed.append(what)
        log.info(f"{level:<9}{what:<13}" + text.replace("\n", "\n" + " " * 22))

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """What goes wrong inside is told as a failure, and all that comes after it goes on."""
        try:
            yield
        except (UserError, OSError, ImportError, RuntimeError, MemoryError) as error:
            text = str(error) if isinstance(error, UserError) else first_line(error)
            self.tell("FAILS", what, text)


def check(config: Config) -> list[str]:
    """Tell whether training with this configuration would work, and how long it would take.

    Nothing is trained, and nothing is left on the disk. What failed, by name; [] if nothing did.
    """
    findings, ranks, config = Findings(), Ranks(), complete(config)
    on, tell = findings.on, findings.tell
    if ranks.world > 1:
        raise UserError("--check: start it as one process, without torchrun")
    with on("versions"):
        there = {p: importlib.import_module(m).__version__ for p, (m, _) in PACKAGES.items()}
        old = [f"{p} must be {least} or newer: pip install -U {p}"
               for p, (_, least) in PACKAGES.items()
               if [*map(int, re.findall(r"\d+", there[p]))] < [*map(int, least.split("."))]]
        versions = {"Python": platform.python_version()} | there
        tell("careful" if old else "ok", "versions", "\n".join(textwrap.wrap(", ".join(
            f"{p} {v}" for p, v in versions.items()), 78) + old))
    device, precision = choose_device("auto")[0], "fp32"  # to go on with where this fails
    with on("device"):
        device, why = choose_device(config.device)
        precision, why_precision = choose_precision(config.precision, device)
        tell("ok", "device", f"{device} ({why}), {precision} ({why_precision})")
    if config.deterministic:
        be_deterministic()

    source, loaders, remote = None, None, config.data.startswith("kaggle:")
    with on("kaggle"):
        try:
            kind = "an access token" if "api_token" in kaggle_credentials() else "a name and key"
            source = open_source(config) if remote else None
            tell("ok", "kaggle", f"{kind} found, " + (
                "and accepted" if remote else "not needed for this data"))
        except UserError as error:
            if remote:
                raise
            tell("ok", "kaggle", f"not needed for this data ({str(error).partition('. ')[0]})")
    if config.wandb:
        try:
            find_wandb(verify=True)
            tell("ok", "wandb", "can be used")
        except Exception as error:  # as in start_wandb
            tell("careful", "wandb", f"{first_line(error)}; training would go on without it")
    with on("data"):
        if source or not remote:
            source = source or open_source(config)
            if config.batch_size is None:
                size = automatic_batch(one_by_one(config), source, device, ranks)
                config = dataclasses.replace(config, batch_size=size)
            loaders = create_dataloaders(config, source=source)
            tell("ok", "data", describe(source, loaders.splits).removeprefix("data").strip())
    # A few images: whether they can be read, how fast, and something to try steps on.
    shape, reading = (config.batch_size or 8, 1, config.image_size, config.image_size), 0.0
    images = torch.randint(256, shape, dtype=torch.uint8)
    with on("images"):
        if loaders:
            stream, began, count = loaders.train, time.monotonic(), 0
            with contextlib.closing(iter(stream)) as batches:
                for images, _ in batches:
                    count += len(images)
                    reading = (time.monotonic() - began) / count  # seconds an image
                    if count >= 64 or reading * count > 5:
                        break
            bad = [f"{name} cannot be read: {reason}" for name, reason in stream.bad.items()]
            tell("careful" if bad else "ok", "images", "\n".join(
                [f"{count} read as a trial, {1 / reading:,.0f} a second", *bad]))

    sizes = {}
    for each in one_by_one(config):
        with on(each.model):  # as where the image size does not suit it
            sizes[each] = checkpoint_bytes(each)
    with on("disk"):
        tell("ok", "disk", look_at_disk(config.output_dir, sizes))
    seconds, speeds = 0.0, {}
    for each in sizes:
        if each.model in findings.failed:  # with another seed
            continue
        with on(each.model):
            found = checkpoint_to_resume(each) if each.resume else None
            if found and source:
                refuse_changes(found[1], each, found[0], source.fingerprint(), ranks.world)
            if each.model not in speeds:
                speeds[each.model] = try_steps(each, images, loaders, sizes[each][0], device,
                                               precision, ranks, tell)
            training, validation = speeds[each.model]
            if loaders:
                epochs = each.epochs - (found[1]["epoch"] if found else 0)
                n, n_val = (len(stream.samples) for stream in loaders[:2])
                kept = sum(stream.cached for stream in loaders[:2])
                again = epochs * (n + n_val - kept)
                seconds += reading * (again if seconds else again + kept) + (
                    epochs * (n * training + n_val * validation)
                    + (min(n, CALIBRATION_IMAGES) + n_val) * validation)
    if seconds and not findings.failed:
        minutes = math.ceil(seconds / 60)
        hours = f"{minutes // 60} h " if minutes >= 60 else ""
        runs = f"{len(sizes)} runs of " if len(sizes) > 1 else ""
        tell("ok", "time", f"about {hours}{minutes % 60} min for {runs}{config.epochs} epochs of "
             f"{n:,} images\nless if early stopping ends it; writing checkpoints comes on top")
    return findings.failed


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """(bytes of last.pt, bytes of best.pt), nearly: weights, and moments with the former."""
    with torch.device("meta"):
        model = create_model(config.model, config)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return weights + sum(moment_bytes(p, config) for p in model.parameters()), weights


def look_at_disk(output_dir: str, sizes: dict[Config, tuple[int, int]]) -> str:
    """What room there is for the run folders. UserError if it is too little or may not be used."""
    there = Path(output_dir)
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UserError(f"--output-dir {output_dir}: {there} is a file")
    need = max((last for last, _ in sizes.values()), default=0)  # under its temporary name
    for config, (last, best) in sizes.items():
        folder = run_folder(config)
        make_run_folder(folder if folder.exists() else there)
        need += 2 * last + best * (1 + config.epochs // (config.keep_every or config.epochs + 1))
        if config.resume:
            need -= sum(p.stat().st_size for p in folder.glob("*.pt"))
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(f"--output-dir {output_dir}: checkpoints take {size_of(need)} there, and "
                        f"{size_of(free)} are free; make room, or name another disk")
    return f"{size_of(free)} are free for {output_dir}, checkpoints take {size_of(max(need, 0))}"


def try_steps(config: Config, images: Tensor, loaders: Loaders | None, kept: int,
              device: torch.device, precision: str, ranks: Ranks,
              tell: Callable[[str, str, str], None]) -> tuple[float, float]:
    """Seconds an image of training and of validation, from steps on a batch of images; tells
    them, and what memory a step takes. UserError if that is too much.

    kept: bytes of the weights and the optimizer's moments.
    """
    free = memory_for_steps(device, loaders)
    if free is not None and kept > free:
        raise UserError(f"weights and their moments alone take {size_of(kept)} of memory, and "
                        f"{size_of(max(0, free))} are free beside the images; try a smaller "
                        "--width or --memory-limit-gb")
    run = start_run(config, device, precision)
    need, free = memory_of_a_step(run, config, device, precision), memory_for_steps(device, loaders)
    batch = len(images)
    run.micro_batch = min(batch, config.micro_batch or batch)
    if not config.micro_batch:
        run.micro_batch = parts_that_fit(batch, need, free, device)
    if free is not None and need(run.micro_batch) > free:
        raise UserError(f"with {run.micro_batch} images at a time a step takes "
                        f"{size_of(need(run.micro_batch))} of memory, and "
                        f"{size_of(max(0, free))} are free; try a smaller --micro-batch, "
                        "--width or --image-size")
    objective: Any = Objective(run.model)
    if config.compile:
        objective = torch.compile(objective)
    for run.step in range(3):
        if run.step <= 1:  # the first one is slower
            began = time.monotonic()
        train_step(run, objective, images, config, batch, device, precision, ranks)
    training = (time.monotonic() - began) / (2 * batch)
    began = time.monotonic()
    validate(run.model, [(images, None)], config, device, precision, ranks, run.micro_batch)
    validation = (time.monotonic() - began) / batch
    parts = f", {run.micro_batch} at a time," if run.micro_batch < batch else ""
    there = f"; {size_of(free)} are free" if free is not None else ""
    short = free is not None and need(batch) > 0.9 * free
    tell("careful" if short and not config.micro_batch else "ok", config.model,
         f"{sum(p.numel() for p in run.model.parameters()):,} parameters\n"
         f"a step of {batch} images{parts} takes {training * batch:.2f} s ({1 / training:,.1f} "
         f"images/s), {size_of(need(run.micro_batch))} of memory{there}")
    return training, validation


def size_of(count: float) -> str:
    """A number of bytes, to be read by people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def main() -> None:
    """Do what the command line asks for."""
    config = parse_config(description=__doc__)
    if "--check" in command_line():
        if failed := check(config):
            raise UserError(f"training would not work as it is: see {', '.join(failed)} above")
        return
    train(config)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    status = run_command(main, "train.py", "; go on from the last checkpoint with --resume")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not through the libraries' own exits: gloo's at times end a process by an abort, which
        # torchrun takes for a failure of the whole run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
