"""Every knob of the project, in one dataclass, and how a value reaches it.

A flag is stronger than the environment (IMGAE_EPOCHS=5), which is stronger than a file
(--config settings.json or .toml), which is stronger than the default. Nothing heavy is imported
here, so that `python train.py --help` answers at once.

    from config import Config, load_config
    config = Config(model="unet", epochs=5)          # from Python
    config = load_config("runs/unet/config.json")    # what a run was trained with
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (in a line, before what an older one cannot read)
    print(f"Python 3.10 or newer is needed; {sys.executable} is {sys.version.split()[0]}. "
          "With a newer one: make setup PYTHON=python3.12", file=sys.stderr)
    sys.exit(2)

import argparse
import dataclasses
import difflib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

MODELS = ("unet", "reversed_ae")
OBJECTIVES = ("heal", "denoise", "plain")


class OneLine:
    """An exception that a notebook shows as its message alone: IPython asks it what to show."""

    def _render_traceback_(self) -> list[str]:
        # The notebook keeps the last error, and with it the frames, and in these a whole model.
        traceback.clear_frames(self.__traceback__)  # type: ignore[attr-defined]
        return [str(self)]


class UserError(OneLine, Exception):
    """Something the user can put right. Shown as one line, without a traceback; exit code 2."""


class Stopped(OneLine, KeyboardInterrupt):
    """Training was asked to end by a signal, and all is saved. The message says how to go on."""

    def __init__(self, message: str, number: int = 2) -> None:
        super().__init__(message)
        self.number = number  # of the signal


class _Screen(logging.Handler):
    """What is logged goes to the screen as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


log = logging.getLogger("imgae_dx")  # what training tells: on the screen, and in a run's run.log
log.setLevel(logging.INFO)
log.propagate = False
log.handlers[:] = [_Screen()]  # one, also where a notebook loads this module once more


def knob(default: object, help: str, choices: tuple = (), low: float | None = None,
         high: float | None = None) -> typing.Any:
    """A dataclass field with what its flag needs: help, legal values, inclusive bounds."""
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """All settings of a training run. Illegal values raise UserError."""

    # What is trained
    model: str = knob("unet", "which autoencoder; both trains one after the other",
                      (*MODELS, "both"))
    objective: str = knob("heal", "heal: restore a normal image from noise, opacities and foreign "
                          "patches; denoise: from coarse noise alone; plain: reproduce the input",
                          OBJECTIVES)
    image_size: int = knob(128, "side of the square images in pixels; a multiple of 16",
                           low=16, high=1024)
    latent_dim: int = knob(512, "numbers in the latent", low=1)
    width: int = knob(64, "channels of the first level; smaller is faster and weaker", low=1)
    dropout: float = knob(0.0, "dropout while training; the objective's corruptions are enough",
                          low=0, high=0.9)

    # On what
    data: str = knob("synthetic", "synthetic (built-in phantom), a folder of images, a CSV, or "
                     "kaggle:owner/name[/versions/N]")
    samples: int | None = knob(None, "normal training images; default: all, 400 on the phantom",
                               low=2)
    augment: bool = knob(True, "small random shifts, turns, scales, brightness and contrast")
    memory_limit_gb: float = knob(4.0, "most memory for images: in flight, being decoded, waiting, "
                           "and kept for later epochs; what does not fit is read again", low=0,
                                  high=100_000)

    # How
    epochs: int | None = knob(None, "passes over the training images in total, earlier ones "
                              "of a resumed run included; default: 20, 3 on the phantom", low=1)
    batch_size: int | None = knob(8, "images in a training step, over all processes; auto: the "
                                  "largest power of two whose step fits in memory", low=2)
    micro_batch: int | None = knob(None, "images that a process takes at a time, their gradients "
                                   "added up; default: as many as fit in memory, on a CPU "
                                   "in a step of 2.4 GB, but 8 at least", low=1)
    learning_rate: float = knob(1e-3, "peak learning rate", low=1e-12)
    schedule: str = knob("cosine", "learning rate after warm-up: falling to 2 %% by the last of "
                         "the epochs asked for at the first start, or constant",
                         ("cosine", "constant"))
    optimizer: str = knob("adam", "", ("adam", "adamw", "sgd"))
    patience: int = knob(10, "stop after this many epochs without a better validation loss", low=1)
    min_delta: float = knob(0.0, "what a validation loss must fall by to count as better", low=0)
    seed: int = knob(0, "seed of everything random but the split by patients", low=0,
                     high=2**31 - 1)
    seeds: int = knob(1, "train so many times, with seeds from --seed on: how far do results "
                      "depend on it?", low=1, high=100)
    device: str = knob("auto", "", ("auto", "cpu", "cuda", "mps"))
    precision: str = knob("auto", "auto: bf16 where the hardware gains by it, fp16 on older CUDA "
                          "devices, else fp32", ("auto", "fp32", "bf16", "fp16"))
    compile: bool = knob(False, "compile the model with torch.compile: a slow start, then perhaps "
                         "faster steps")
    deterministic: bool = knob(False, "on CUDA, use only algorithms that give the same bits every "
                               "time; slower (the CPU always does)")

    # Where to, and from where
    output_dir: str = knob("runs", "parent of the run folders, which are named after the model "
                           "and, but for seed 0, the seed")
    checkpoint_minutes: float = knob(5.0, "how often last.pt is written within an epoch", low=0)
    keep_every: int | None = knob(None, "also keep the weights of every N-th epoch", low=1)
    resume: str | None = knob(None, "continue the newest checkpoint of the run folder, or PATH")
    reuse: bool = knob(False, "leave a finished run of the same settings as it is, and resume an "
                       "unfinished one")
    wandb: bool = knob(False, "also send every row of log.csv to Weights & Biases")
    wandb_project: str = knob("imgae-dx", "its project there")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name), flag(f.name)))
        # No shell has done so where make or a file gives it.
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))

    @property
    def memory_bytes(self) -> int:
        """memory_limit_gb in bytes."""
        return int(self.memory_limit_gb * 2**30)


def flag(name: str) -> str:
    """The flag of a setting: --batch-size of batch_size."""
    return "--" + name.replace("_", "-")


_TYPES = typing.get_type_hints(Config)


def _type_of(name: str) -> tuple[type, bool]:
    """(type, whether None is legal) of a field of Config."""
    hint = _TYPES[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def _checked(f: dataclasses.Field, value: typing.Any, where: str) -> object:
    """The value in the field's own type, or a UserError that says what is legal."""
    kind, optional = _type_of(f.name)
    if optional and (value is None or (kind is int and value == "auto")):
        return None
    wrong = UserError(f"{where}: {value!r} is not {_legal(f)}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise wrong
    choices, low, high = (f.metadata[k] for k in ("choices", "low", "high"))
    if (choices and value not in choices) or (low is not None and value < low) or (
        high is not None and value > high
    ):
        raise wrong
    return value


def _legal(f: dataclasses.Field) -> str:
    """'one of a, b' or 'a whole number of at least 1': what a field takes, in words."""
    kind, _ = _type_of(f.name)
    if f.metadata["choices"]:
        return "one of " + ", ".join(f.metadata["choices"])
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    low, high = f.metadata["low"], f.metadata["high"]
    if low is not None:
        words += f" of at least {low:g}"
    if high is not None:
        words += f"{' and' if low is not None else ' of'} at most {high:g}"
    return words


def _from_text(f: dataclasses.Field, text: str, where: str) -> object:
    """The value that a flag's or an environment variable's text stands for."""
    kind, optional = _type_of(f.name)
    if optional and text.lower() in ("", "none", *(["auto"] if kind is int else [])):
        return None
    try:
        if kind is bool:
            words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            return words[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise UserError(f"{where}: {text!r} is not {_legal(f)}") from None


def _known(name: str, where: str, shown: Callable[[str], str] = str) -> str:
    names = list(_TYPES)
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {shown(close[0])}?" if close else f"; known are {', '.join(names)}"
    raise UserError(f"{where}: there is no setting {shown(name)}{hint}")


def read_config_file(path: str | Path) -> dict[str, typing.Any]:
    """The settings in a JSON or TOML file, names checked; values are checked by Config."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            try:
                import tomllib
            except ImportError:  # before Python 3.11
                raise UserError(f"{path}: TOML needs Python 3.11; write it as JSON") from None
            values = tomllib.loads(text)
        else:
            values = json.loads(text)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # both decoders' errors are ValueErrors, and so is bad UTF-8
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise UserError(f"--config {path}: not valid {kind}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: a table of settings is wanted")
    by_name = {f.name: f for f in dataclasses.fields(Config)}
    return {
        _known(k, f"--config {path}"): _checked(by_name[k], v, f"--config {path}: {k}")
        for k, v in values.items()
    }


def load_config(path: str | Path) -> Config:
    """The Config in a JSON or TOML file, or in a run folder's config.json."""
    path = Path(path)
    return Config(**read_config_file(path / "config.json" if path.is_dir() else path))


class _Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line, and suggests what was meant."""

    def error(self, message: str) -> typing.NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        message = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", message)
        message = message.replace("expected one argument", "a value is missing after it")
        wrong = message.removeprefix("unrecognized arguments: ")
        if wrong != message and not wrong.startswith("-"):
            message = (f"{wrong.strip() or repr(wrong)} stands alone; images are named with "
                       "--data, and a name with spaces needs quotes")
        elif wrong != message:
            names = [s for a in self._actions for s in a.option_strings]
            close = difflib.get_close_matches(wrong.split()[0].split("=")[0], names, 1)
            message = f"unknown flag {wrong.split()[0]}"
            message += f"; did you mean {close[0]}?" if close else "; --help lists the flags"
        raise UserError(message)


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser whose errors are UserErrors; the description is shown as it is laid out."""
    return _Parser(prog=prog, description=description, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    return sys.argv[0].endswith(("ipykernel_launcher.py", "colab_kernel_launcher.py"))


def command_line() -> list[str]:
    """sys.argv's flags; none in a notebook cell, where argv belongs to the kernel."""
    return [] if in_notebook() else sys.argv[1:]


def parse_config(argv: list[str] | None = None, description: str = "",
                 environ: Mapping[str, str] | None = None) -> Config:
    """Config from flags, environment, --config file and defaults, the strongest first.

    With --resume, what the resumed run was trained with stands in for the defaults.
    """
    environ = os.environ if environ is None else environ
    fields = {f.name: f for f in dataclasses.fields(Config)}
    parser = make_parser("train.py", description)
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON or TOML file")
    parser.add_argument("--check", action="store_true", help="train nothing: say whether training "
                        "with the other flags would work, and how long it would take")
    for f in fields.values():
        kind, _ = _type_of(f.name)
        default = "" if f.default is None else f"(default: {f.default})"
        about: dict[str, typing.Any] = {
            "dest": f.name, "default": argparse.SUPPRESS,
            "help": f"{f.metadata['help']} {default}".strip()}
        if kind is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, **about)
        elif f.name == "resume":
            parser.add_argument(flag(f.name), nargs="?", const="auto", metavar="PATH", **about)
        else:
            shown = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else (
                {int: "N", float: "X", str: "TEXT"}[kind])
            parser.add_argument(flag(f.name), metavar=shown, **about)

    flags = vars(parser.parse_args(command_line() if argv is None else argv))
    del flags["check"]  # no setting, but what train.py does with them
    layers: dict[str, typing.Any] = {}
    if file := flags.pop("config"):
        layers |= read_config_file(file)
    for key, text in environ.items():
        if key.startswith("IMGAE_"):
            name = _known(key[6:].lower(), f"environment {key}", lambda n: "IMGAE_" + n.upper())
            layers[name] = _from_text(fields[name], text, f"environment {key}")
    for name, value in flags.items():
        is_text = isinstance(value, str)
        layers[name] = _from_text(fields[name], value, flag(name)) if is_text else value
    asked = Config(**layers)
    if asked.resume:
        layers = resumed_settings(asked) | layers
    return Config(**layers)


def run_folder(config: Config) -> Path:
    """Where a run lies: <output_dir>/<model>, or <output_dir>/<model>-seed<N> unless N is 0."""
    name = config.model + (f"-seed{config.seed}" if config.seed else "")
    return Path(config.output_dir) / name


def resumed_settings(config: Config) -> dict[str, typing.Any]:
    """The settings of the run that `config.resume` points at; {} if there is none to be found."""
    if config.resume == "auto":
        folder = run_folder(config if config.model != "both" else replace(config, model=MODELS[0]))
    elif config.model == "both" or config.seeds > 1:
        raise UserError(f"--resume {config.resume}: a path belongs to one run; with --model both "
                        "or --seeds give --resume alone")
    else:
        path = Path(config.resume)
        folder = path if path.is_dir() else path.parent
        if folder.name in ("", ".."):  # from within the run folder
            folder = folder.resolve()
    file = folder / "config.json"
    if not file.is_file():
        return {}
    settings = read_config_file(file) | {"resume": None, "reuse": False}
    settings.pop("output_dir", None)
    named = run_folder(Config(**settings)).name
    if config.model == "both":
        settings.pop("model", None)
    elif config.resume != "auto" and folder.name == named:
        settings["output_dir"] = str(folder.parent)  # go on in the folder that was named
    return settings


# ----------------------------------------------------------------------------------------------
# Running a script


# What requirements.txt asks for, less kaggle: package -> (the module in it, the oldest version).
PACKAGES = {"torch": ("torch", "2.4"), "numpy": ("numpy", "1.26"), "pillow": ("PIL", "10.0"),
            "requests": ("requests", "2.28"), "scikit-learn": ("sklearn", "1.3"),
            "matplotlib": ("matplotlib", "3.8"), "tqdm": ("tqdm", "4.66")}


def require_packages() -> None:
    """UserError that says what to type if a package is missing."""
    missing = [p for p, (module, _) in PACKAGES.items() if not importlib.util.find_spec(module)]
    if not missing:
        return
    folder = Path(sys.argv[0]).parent
    own = folder / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    again = quoted(*sys.argv)
    what = f"{sys.executable} lacks {', '.join(missing)}"
    if own.exists() and os.path.abspath(folder / ".venv") != sys.prefix:
        raise UserError(f"{what}; type: {own} {again}")
    raise UserError(f"{what}; run make setup, then {own} {again}; or {sys.executable} -m pip "
                    f"install -r {folder / 'requirements.txt'}")


def quoted(*words: str) -> str:
    """Words as a command line that can be typed in the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command(script: str) -> str:
    """What to type to start train.py or evaluate.py as this program was started."""
    python, here = Path(sys.executable), Path(sys.argv[0])
    for name in ("python", "python3"):
        if (found := shutil.which(name)) and Path(found).parent == python.parent:  # it is active
            start = name
            break
    else:
        start = quoted(os.path.relpath(python) if python.is_relative_to(Path.cwd())
                       else str(python))
    if script == "train.py" and (world := os.environ.get("LOCAL_WORLD_SIZE", "1")) != "1":
        start = f"torchrun --nproc_per_node={world}"
    where = here.with_name(script) if here.name in ("train.py", "evaluate.py") else script
    return f"{start} {quoted(str(where))}"


def run_command(main: Callable[[], object], prog: str, when_interrupted: str = "") -> int:
    """Run a script's main; a UserError becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name must not be what ends a run
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # one of several processes says which it is
        print(f"{prog}: {'' if rank == '0' else f'(process {rank}) '}{error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{prog}: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted{when_interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written ...
        print(f"{prog}: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0
