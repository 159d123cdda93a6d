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
import importlib.util
import io
import json
import logging
import math
import os
import shlex
import shutil
import signal
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

MODELS = ("unet", "reversed_ae")
OBJECTIVES = ("heal", "denoise", "plain")
log = logging.getLogger("imgae_dx")  # what the program tells; `on_screen` shows it


class OneLine:
    """An exception that a notebook shows as its message alone: IPython asks it what to show."""

    def _render_traceback_(self) -> list[str]:
        # The notebook keeps the last error, and with it the frames, and in these a whole model.
        traceback.clear_frames(self.__traceback__)  # type: ignore[attr-defined]
        return [str(self)]


class UserError(OneLine, Exception):
    """Something the user can put right. Shown as one line, without a traceback; exit code 2."""


class GracefulExit(OneLine, KeyboardInterrupt):
    """Training was asked to end by a signal, and all is saved. The message says how to go on."""

    def __init__(self, message: str, signal_number: int = 2) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def setting(default: object, help: str, choices: tuple = (), low: float | None = None,
            high: float | None = None) -> typing.Any:
    """A dataclass field with what its flag needs: help, legal values, inclusive bounds."""
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """All settings of a training run. Illegal values raise UserError."""

    # What is trained
    model: str = setting("unet", "which autoencoder; both trains one after the other",
                         (*MODELS, "both"))
    objective: str = setting("heal", "heal: restore a normal image from noise, opacities and "
                             "foreign patches; denoise: from coarse noise alone; plain: reproduce "
                             "the input", OBJECTIVES)
    image_size: int = setting(128, "side of the square images in pixels; a multiple of 16",
                              low=16, high=1024)
    latent_dim: int = setting(512, "numbers in the latent", low=1)
    width: int = setting(64, "channels of the first level; smaller is faster and weaker", low=1)
    dropout: float = setting(0.0, "dropout while training; the objective's corruptions are enough",
                             low=0, high=0.9)
    reader_steps: int = setting(800, "steps in which each reader, which gives the scores, is "
                                "trained after the model", low=1)

    # On what
    data: str = setting("synthetic", "synthetic (built-in phantom), a folder of images, a CSV, or "
                        "kaggle:owner/name[/versions/N]")
    samples: int | None = setting(None, "normal training images; default: all, 400 on the phantom",
                                  low=2)
    augment: bool = setting(True, "small random shifts, turns, scales, brightness and contrast")
    memory_limit_gb: float = setting(4.0, "most memory for images: being read, decoded, waiting, "
                                     "and cached for later epochs; what does not fit is read "
                                     "again", low=0, high=100_000)

    # How
    epochs: int | None = setting(None, "passes over the training images in total, earlier ones "
                                 "of a resumed run included; default: 20, 3 on the phantom", low=1)
    batch_size: int = setting(8, "images in a training step, over all processes", low=2)
    micro_batch: int | None = setting(None, "images that a process takes at a time, gradients "
                                      "accumulated; default: 8 (U-Net) or 16 on a CPU, else all; "
                                      "halved when memory runs out", low=1)
    learning_rate: float = setting(1e-3, "peak learning rate", low=1e-12)
    schedule: str = setting("cosine", "learning rate after warm-up: falling to 2 %% by the last of "
                            "the epochs asked for at the first start, or constant",
                            ("cosine", "constant"))
    optimizer: str = setting("lean_adam", "lean_adam: Adam that keeps little state of very large "
                             "matrices; the others are PyTorch's own",
                             ("lean_adam", "adam", "adamw", "sgd"))
    patience: int = setting(10, "stop after this many epochs without a better validation loss",
                            low=1)
    min_delta: float = setting(0.0, "what a validation loss must fall by to count as better", low=0)
    seed: int = setting(0, "seed of everything random but the split by patients", low=0,
                        high=2**31 - 1)
    seeds: int = setting(1, "train so many times, with seeds from --seed on: how far do results "
                         "depend on it?", low=1, high=100)
    device: str = setting("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "auto: bf16 where the hardware gains by it, fp16 on older "
                             "CUDA devices, else fp32", ("auto", "fp32", "bf16", "fp16"))
    compile: bool = setting(False, "compile the model with torch.compile: a slow start, then "
                            "perhaps faster steps")
    deterministic: bool = setting(False, "on CUDA, use only algorithms that give the same bits "
                                  "every time; slower (the CPU always does)")

    # Where to, and from where
    output_dir: str = setting("runs", "parent of the run folders, which are named after the model "
                              "and, but for seed 0, the seed")
    checkpoint_minutes: float = setting(5.0, "how often last.pt is written within an epoch", low=0)
    resume: str | None = setting(None, "continue the run folder's last.pt, or that of PATH")
    reuse: bool = setting(False, "leave a finished run of the same settings as it is, and resume "
                          "an unfinished one")
    wandb: bool = setting(False, "also send every row of log.csv to Weights & Biases")
    wandb_project: str = setting("imgae-dx", "its project there")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, checked(f.name, getattr(self, f.name), flag(f.name)))
        # No shell has done so where make, a file or --resume=~/runs gives it.
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))
        object.__setattr__(self, "resume", self.resume and os.path.expanduser(self.resume))

    @property
    def memory_bytes(self) -> int:
        """memory_limit_gb in bytes."""
        return int(self.memory_limit_gb * 2**30)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def flag(name: str) -> str:
    """The flag of a setting: --batch-size of batch_size."""
    return "--" + name.replace("_", "-")


def kind_of(name: str) -> type:
    """The type of a setting's values, None aside."""
    hint: typing.Any = FIELDS[name].type
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


def checked(name: str, value: typing.Any, where: str) -> typing.Any:
    """The value, in the setting's own type. UserError that says what is legal."""
    kind: typing.Any = kind_of(name)
    choices, low, high = (FIELDS[name].metadata[key] for key in ("choices", "low", "high"))
    if value is None and FIELDS[name].default is None:
        return None
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    wrong = (type(value) is not kind or (choices and value not in choices)
             or (kind is float and not math.isfinite(value))
             or (low is not None and value < low) or (high is not None and value > high))
    if not wrong:
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    for bound, limit in (("at least", low), ("at most", high)):
        if limit is not None:
            words += f"{' and' if ' of ' in words else ' of'} {bound} {limit:g}"
    legal = "one of " + ", ".join(choices) if choices else words
    raise UserError(f"{where}: {value!r} is not {legal}")


def known(name: str, where: str, shown: Callable[[str], str] = str) -> str:
    """The name, if there is a setting of that name. UserError with the closest one otherwise."""
    if name in FIELDS:
        return name
    close = difflib.get_close_matches(name, FIELDS, 1)
    hint = f"; did you mean {shown(close[0])}?" if close else (
        "; --help lists them (is this of another version?)")
    raise UserError(f"{where}: there is no setting {shown(name)}{hint}")


def read_config_file(path: str | Path) -> dict[str, typing.Any]:
    """The settings in a JSON file, names and values checked. UserError that names file and key."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"--config {path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: a table of settings is wanted")
    return {known(k, f"--config {path}"): checked(k, v, f"--config {path}: {k}")
            for k, v in values.items()}


def load_config(path: str | Path) -> Config:
    """The Config in a JSON file, or in a run folder's config.json. A missing setting is its
    default."""
    path = Path(path)
    return Config(**read_config_file(path / "config.json" if path.is_dir() else path))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors. The description is shown as it is laid out."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)

    def values(self, argv: list[str] | None) -> dict[str, typing.Any]:
        """The values of the arguments; argv defaults to the command line. UserError if one is not
        known, with the closest flag."""
        values, rest = self.parse_known_args(command_line() if argv is None else argv)
        if rest:
            names = [s for action in self._actions for s in action.option_strings]
            close = difflib.get_close_matches(rest[0].split("=")[0], names, 1)
            raise UserError(f"unknown argument {rest[0]!r}; " + (
                f"did you mean {close[0]}?" if close else
                "--help lists the flags, and a name with spaces needs quotes"))
        return vars(values)


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    return sys.argv[0].endswith(("ipykernel_launcher.py", "colab_kernel_launcher.py"))


def command_line() -> list[str]:
    """sys.argv's flags; none in a notebook cell, where argv belongs to the kernel."""
    return [] if in_notebook() else sys.argv[1:]


def train_parser(description: str) -> Parser:
    """The parser of train.py: a flag for every setting, and --config and --check."""
    parser = Parser("train.py", description)
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON file")
    parser.add_argument("--check", action="store_true", help="train nothing: say whether training "
                        "with the other flags would work, and how long it would take")
    for name, f in FIELDS.items():
        kind, default = kind_of(name), "" if f.default is None else f" (default: {f.default})"
        about: dict[str, typing.Any] = {"dest": name, "default": argparse.SUPPRESS,
                                        "help": f.metadata["help"] + default}
        if kind is bool:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, **about)
        elif name == "resume":
            parser.add_argument(flag(name), nargs="?", const="auto", metavar="PATH", **about)
        else:
            shown = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else (
                {int: "N", float: "X", str: "TEXT"}[kind])
            parser.add_argument(flag(name), type=kind, metavar=shown, **about)
    return parser


def parse_config(argv: list[str] | None = None, description: str = "",
                 environ: Mapping[str, str] = os.environ) -> Config:
    """Config from flags, environment, --config file and defaults, the strongest first.

    With --resume, what the resumed run was trained with stands in for the defaults.
    """
    parser = train_parser(description)
    flags = parser.values(argv)
    del flags["check"]  # no setting, but what train.py does with them
    file = flags.pop("config")
    layers = read_config_file(file) if file else {}
    for key, text in environ.items():
        if key.startswith("IMGAE_") and text:
            name = known(key[6:].lower(), f"environment {key}", lambda n: "IMGAE_" + n.upper())
            words = [flag(name), text]
            if kind_of(name) is bool:
                on = {"1": True, "true": True, "0": False, "false": False}.get(text.lower())
                checked(name, text if on is None else on, f"environment {key}")
                words = [flag(name) if on else flag(f"no_{name}")]
            try:
                layers[name] = vars(parser.parse_args(words))[name]
            except UserError as error:
                raise UserError(f"environment {key}: {error}") from None
    layers |= flags
    asked = Config(**layers)
    if asked.resume:
        if asked.resume != "auto" and "output_dir" in flags:
            raise UserError(f"--resume {asked.resume}: goes on in that folder; leave out "
                            "--output-dir")
        found = resumed_settings(asked)
        if not found and asked.resume == "auto" and "data" not in layers:
            raise UserError(f"--resume: there is no run in {run_folder(asked)}; name its "
                            "--output-dir and --seed, or give --data to start one there")
        layers = found | layers
    return Config(**layers)


def run_folder(config: Config) -> Path:
    """Where a run lies: <output_dir>/<model>, or <output_dir>/<model>-seed<N> unless N is 0; with
    --resume PATH, there."""
    if config.resume not in (None, "auto"):
        path = Path(config.resume)
        return path.parent if path.suffix == ".pt" else path
    name = config.model + (f"-seed{config.seed}" if config.seed else "")
    return Path(config.output_dir) / name


def resumed_settings(config: Config) -> dict[str, typing.Any]:
    """The settings of the run that `config.resume` points at; {} if there is none to be found."""
    several = config.model == "both" or config.seeds > 1
    if several and config.resume != "auto":
        raise UserError(f"--resume {config.resume}: a path belongs to one run; with --model both "
                        "or --seeds give --resume alone")
    folder = run_folder(replace(config, model=MODELS[0]) if config.model == "both" else config)
    if not (folder / "config.json").is_file():
        return {}
    settings = read_config_file(folder / "config.json")
    return {k: v for k, v in settings.items() if k not in ("resume", "reuse", "output_dir", "model")
            or (k == "model" and config.model != "both")}


# ----------------------------------------------------------------------------------------------
# Running a script


class _Screen(logging.Handler):
    """Shows what is logged as plain lines, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(record.getMessage())
        sys.stdout.flush()


class _Forgiving:
    """A stream that drops what it cannot write: a closed terminal, a reader that has gone, or a
    full disk behind it must not stop the work."""

    def __init__(self, stream: typing.Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered; nowhere, if that fails, so that no error comes at exit."""
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def on_screen() -> Iterator[None]:
    """Show what is logged on the screen while inside."""
    if any(isinstance(handler, _Screen) for handler in log.handlers):  # one, also when nested
        yield
        return
    screen, before = _Screen(), (log.level, log.propagate)
    log.addHandler(screen)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(screen)
        log.level, log.propagate = before


def require_packages() -> None:
    """UserError that says what to type if a package is missing. Ctrl-C while these are imported
    then ends the program at once, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    needed = ("torch", "numpy", "PIL", "requests", "scipy", "sklearn", "matplotlib", "tqdm")
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        folder = Path(sys.argv[0]).parent
        raise UserError(f"{sys.executable} lacks {', '.join(missing)}; run make setup, then "
                        f"{folder / '.venv/bin/python'} {shlex.join(sys.argv)}; or "
                        f"{sys.executable} -m pip install -r {folder / 'requirements.txt'}")


def command(script: str) -> str:
    """What to type to start train.py or evaluate.py with the Python that runs this."""
    if in_notebook():
        return f"!python {script}"
    python = Path(sys.executable)
    active = shutil.which("python") == str(python.with_name("python"))
    return f"{'python' if active else shlex.quote(os.path.relpath(python))} {script}"


def run_command(main: Callable[[], object], prog: str, when_interrupted: str = "") -> int:
    """Run a script's main and give its exit code: a UserError is one line on stderr and 2."""
    # There is no stream where it was closed before Python started.
    streams = [stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
               for stream in (sys.stdout, sys.stderr)]
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):  # a file's name must not be what ends a run
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(_Forgiving, streams)  # type: ignore[assignment]
    rank, status, message = os.environ.get("RANK", "0"), 0, ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with on_screen():
            main()
    except UserError as error:  # one of several processes says which it is
        status, message = 2, f"{'' if rank == '0' else f'(process {rank}) '}{error}"
    except GracefulExit as error:
        status, message = 128 + error.signal_number, str(error) if rank == "0" else ""
    except KeyboardInterrupt:
        status, message = 130, f"interrupted{when_interrupted}"
    except OSError as error:  # a full disk, a folder that may not be written ...
        status, message = 2, f"{error.filename or 'file'}: {error.strerror or error}"
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
    if message:
        with contextlib.suppress(OSError):
            print(f"{prog}: {message}", file=sys.stderr)
    return status
