"""Every setting of the project, in one dataclass, and how a value reaches it.

A flag is stronger than the environment (IMGAE_EPOCHS=5), which is stronger than a file
(--config settings.json), which is stronger than the default. Nothing heavy is imported here, so
that `python train.py --help` answers at once.

    from config import Config, load_config
    config = Config(model="unet", epochs=5)          # from Python
    config = load_config("runs/unet")                # what a run was trained with
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (in a line, before what an older one cannot read)
    print(f"Python 3.10 or newer is needed; {sys.executable} is {sys.version.split()[0]}. "
          "With a newer one: make setup PYTHON=python3.12", file=sys.stderr)
    sys.exit(2)

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import logging
import os
import shlex
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

MODELS = ("unet", "reversed_ae")
OBJECTIVES = ("denoise", "heal", "plain")
log = logging.getLogger("imgae_dx")  # what the program tells; `on_screen` shows it


class OneLine(BaseException):
    """An exception that is shown as its message alone: by `run_command`, and in a notebook, since
    IPython asks it what to show. status: the exit code of the program that it ends."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status

    def _render_traceback_(self) -> list[str]:
        # The notebook keeps the last error, and with it the frames, and in these a whole model.
        traceback.clear_frames(self.__traceback__)
        return [str(self)]


class UserError(OneLine, Exception):
    """Something the user can put right. Shown as one line, without a traceback; exit code 2."""


class GracefulExit(OneLine, KeyboardInterrupt):
    """Training was asked to end by a signal, and all is saved. The message says how to go on."""


def setting(default: object, help: str, choices: tuple[str, ...] = (), low: float = 0,
            high: float = sys.float_info.max) -> typing.Any:
    """A dataclass field with what its flag needs: help, legal values, inclusive bounds."""
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a training run. Illegal values raise UserError."""

    # What is trained
    model: str = setting("unet", "which autoencoder; both: one after the other", (*MODELS, "both"))
    objective: str = setting("denoise", "denoise: undo coarse noise; heal: undo noise and drawn "
                             "lesions; plain: reproduce the input", OBJECTIVES)
    image_size: int = setting(128, "images' side in pixels, a multiple of 16", low=16, high=1024)
    latent_dim: int = setting(512, "numbers in the latent", low=1)
    width: int = setting(64, "channels of the first level; smaller is faster and weaker", low=1)
    reader_steps: int = setting(600, "steps in which each reader (it gives scores) learns", low=1)

    # On what
    data: str = setting("synthetic", "synthetic (built-in phantom), a folder of images, a CSV, or "
                        "kaggle:owner/name[/versions/N]")
    normal: str = setting("", "words that mean normal in tables or folder names, parted by commas; "
                          "all others then mean abnormal")
    samples: int | None = setting(None, "training images; default: all, 400 on the phantom", low=2)
    grey_bits: int | None = setting(None, "bits in use of 16-bit images; default: found from them",
                                    low=8, high=16)
    augment: bool | None = setting(None, "random shifts, turns, scales, brightness, contrast; for "
                                   "readers more; default: on, but off on the phantom")
    memory_limit_gb: float = setting(4.0, "most memory for images, those cached for later epochs "
                                     "included; what does not fit is read again", high=100_000)

    # How
    epochs: int | None = setting(None, "passes over the images, those before a --resume included; "
                                 "default: 10 (U-Net), 20 (Reversed AE), 3 on the phantom", low=1)
    batch_size: int = setting(8, "images in a training step, over all processes", low=2)
    micro_batch: int | None = setting(None, "images at a time, halved when memory runs out; "
                                      "default: 8 (U-Net) or 16 on a CPU, else all", low=1)
    learning_rate: float = setting(1e-3, "peak learning rate; it warms up, and falls to 2 %% by "
                                   "the last of the epochs first asked for", low=1e-12)
    optimizer: str = setting("lean_adam", "lean_adam: Adam with little state of large matrices; "
                             "the others are PyTorch's own", ("lean_adam", "adam", "adamw", "sgd"))
    patience: int = setting(10, "stop after so many epochs without a better one", low=1)
    min_delta: float = setting(0.0, "what a validation loss must fall by to count as better")
    seed: int = setting(0, "seed of everything random but the split by patients", high=2**31 - 1)
    seeds: int = setting(1, "train so many times, with seeds from --seed on", low=1, high=100)
    device: str = setting("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "auto: bf16 where the hardware gains by it, fp16 on older "
                             "CUDA devices, else fp32", ("auto", "fp32", "bf16", "fp16"))
    compile: bool = setting(False, "compile the model with torch.compile")
    deterministic: bool = setting(False, "on CUDA, give the same bits every time, if more slowly")

    # Where to, and from where
    output_dir: str = setting("runs", "parent of the run folders, such as unet and unet-seed1")
    checkpoint_minutes: float = setting(5.0, "how often last.pt is written within an epoch")
    resume: str | None = setting(None, "continue the run folder's last.pt, or that of PATH")
    reuse: bool = setting(False, "leave finished runs of the same settings alone, resume others")
    wandb: bool = setting(False, "also send every row of log.csv to Weights & Biases")
    check: bool = setting(False, "train nothing: say whether it would work, and how long it takes")

    def __post_init__(self) -> None:
        vars(self).update(checked(vars(self), flag))

    @property
    def memory_bytes(self) -> int:
        """memory_limit_gb in bytes."""
        return int(self.memory_limit_gb * 2**30)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def flag(name: str) -> str:
    """The flag of a setting: --batch-size of batch_size."""
    return "--" + name.replace("_", "-")


def checked(values: Mapping[str, typing.Any],
            where: Callable[[str], str]) -> dict[str, typing.Any]:
    """The settings, texts converted to their types. UserError that says where(name) one is wrong,
    and what is legal."""
    found = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise UserError(f"{where(name)}: no such setting; {closest(name, FIELDS)}")
        f = FIELDS[name]
        kind = (typing.get_args(f.type) or (f.type,))[0]  # of int | None, int
        choices, low, high = (f.metadata[key] for key in ("choices", "low", "high"))
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                # No shell has replaced ~ in make's words, in a file or in --resume=~/runs.
                value = (kind(os.path.expanduser(value)) if kind is not bool else
                         ("0", "false", "1", "true").index(value.lower()) > 1)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is str and fits:  # neither torch nor tables and pictures take other paths
            fits = value.encode(errors="ignore").decode() == value
        if fits and (value in choices if choices else kind is str or low <= value <= high):
            found[name] = kind(value)
        elif value is None and f.default is None:
            found[name] = None
        else:
            span = f" from {low:g} " + (f"to {high:g}" if high < sys.float_info.max else "on")
            legal = {str: "a text in UTF-8", bool: "true or false", int: "a whole number" + span,
                     float: "a number" + span}[kind]
            raise UserError(f"{where(name)}: {value!r} is not "
                            + ("one of " + ", ".join(choices) if choices else legal))
    return found


def closest(name: str, names: Collection[str]) -> str:
    """What to say of a name that is not one of those: the closest of them."""
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]}?" if close else "train.py --help lists what there is"


def load_config(path: str | Path) -> Config:
    """The Config in a JSON file, or in a run folder's config.json; what is missing there is its
    default. UserError that names file and setting."""
    return Config(**read_config_file(path))


def read_config_file(path: str | Path) -> dict[str, typing.Any]:
    """The settings that are in such a file."""
    path = Path(path, "config.json") if Path(path).is_dir() else Path(path)
    try:
        values = {**json.loads(path.read_text(encoding="utf-8-sig"))}
    except (OSError, ValueError, TypeError) as why:
        raise UserError(f"--config {path}: no readable table of settings in JSON ({why})") from None
    return checked(values, lambda name: f"--config {path}: {name}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors. The description is shown as it is laid out."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)

    def values(self, argv: list[str] | None) -> dict[str, typing.Any]:
        """The values of argv, by default of the command line. UserError as of `error`."""
        values, rest = self.parse_known_args(argv)
        if rest:
            raise UserError(f"unknown argument {rest[0]!r} (a name with spaces needs quotes); "
                            + closest(rest[0], self._option_string_actions))
        return vars(values)


def parse_config(argv: list[str] | None = None, description: str = "",
                 environ: Mapping[str, str] = os.environ) -> Config:
    """Config from flags, environment, --config file and defaults, the strongest first. With
    --resume, what the resumed run was trained with stands in for the defaults. UserError."""
    parser = Parser("train.py", description)
    parser.add_argument("--config", metavar="FILE", type=read_config_file, default={},
                        help="settings from a JSON file")
    parser.argument_default = argparse.SUPPRESS
    for name, f in FIELDS.items():
        about = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        more: dict[str, typing.Any] = {"metavar": "|".join(f.metadata["choices"]) or None}
        if bool in (f.type, *typing.get_args(f.type)):
            more = {"action": argparse.BooleanOptionalAction}
        elif name == "resume":
            more = {"nargs": "?", "const": "auto", "metavar": "PATH"}
        parser.add_argument(flag(name), help=about, **more)
    flags = parser.values(argv)
    layers = flags.pop("config") | checked(
        {key[6:].lower(): text for key, text in environ.items()
         if key.startswith("IMGAE_") and text},
        lambda name: f"environment IMGAE_{name.upper()}") | flags
    asked = Config(**layers)
    if not asked.resume:
        return asked
    folder, named = run_folder(asked), asked.resume != "auto"
    if named and (asked.model == "both" or asked.seeds > 1 or "output_dir" in flags):
        raise UserError(f"--resume {asked.resume}: a path belongs to one run, which goes on there; "
                        "leave out --output-dir, --seeds and --model both, or the path")
    if (folder / "config.json").is_file():
        layers = read_config_file(folder) | {"output_dir": asked.output_dir} | layers
    elif not named and "data" not in layers:
        raise UserError(f"--resume: there is no run in {folder}; name its --output-dir and --seed, "
                        "or give --data to start one there")
    return Config(**layers)


def run_folder(config: Config) -> Path:
    """Where a run lies: <output_dir>/<model>, or <output_dir>/<model>-seed<N> unless N is 0; with
    --resume PATH, there. Of several runs it is that of the first."""
    if config.resume not in (None, "auto"):
        path = Path(config.resume)
        return path.parent if path.name == "last.pt" else path
    model = MODELS[0] if config.model == "both" else config.model
    return Path(config.output_dir) / (model + (f"-seed{config.seed}" if config.seed else ""))


def command(script: str) -> str:
    """What to type to start train.py or evaluate.py with the Python that runs this."""
    if sys.argv[0].endswith("kernel_launcher.py"):  # in a notebook
        return f"!python {script}"
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    return f"{shlex.quote(python)} {script}"


@contextlib.contextmanager
def on_screen() -> Iterator[None]:
    """Show what is logged (not for debugging) on the screen while inside."""
    from tqdm import tqdm

    screen = logging.Handler(logging.INFO)
    # A name may hold a terminal's commands.
    screen.emit = lambda r: tqdm.write("".join(  # type: ignore
        c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in r.getMessage()))
    log.addHandler(screen)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(screen)
        log.setLevel(logging.NOTSET)
        log.propagate = True


class _Forgiving(io.FileIO):
    """A file that drops what it cannot write: a closed terminal, a reader that has gone, or a full
    disk behind the output must not stop the work."""

    def write(self, data: typing.Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def load(module: str) -> typing.Any:
    """Import train or evaluate, after the flags were read: a mistake in these, and --help, need no
    torch. UserError that says what to type if a package is missing."""
    # Threads that wait leave their core to others. Two programs of spinning ones nearly stop.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{sys.executable} lacks {error.name}; run make setup and start this with "
                        f".venv/bin/python, or run {sys.executable} -m pip install -r "
                        "requirements.txt") from None


def run_command(main: Callable[[], object], prog: str) -> int:
    """Run a script's main and give its exit code: a UserError is one line on stderr and 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None if it was closed before
        with contextlib.suppress(io.UnsupportedOperation):  # a test's is no file
            number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
            file = io.BufferedWriter(_Forgiving(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream and stream.encoding,
                                                "backslashreplace", line_buffering=True))
    try:
        main()
        return 0
    except OneLine as error:
        status, message = error.status, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except OSError as error:  # a full disk, a folder that may not be written ...
        status, message = 2, f"{error.filename or 'file'}: {error.strerror or error}"
    rank = os.environ.get("RANK", "0")  # one of several processes says which it is
    print(f"{prog}: {message if rank == '0' else f'(process {rank}) {message}'}", file=sys.stderr)
    return status
