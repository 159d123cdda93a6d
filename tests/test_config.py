"""How settings reach the program, and what a mistake in them is answered with."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config import FIELDS, Config, UserError, command, flag, load_config, parse_config

ROOT = Path(__file__).parent.parent


def test_a_flag_beats_the_environment_beats_a_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"epochs": 3, "seed": 3, "latent_dim": 3}))
    environ = {"IMGAE_EPOCHS": "2", "IMGAE_SEED": "2", "HOME": "/"}
    config = parse_config(["--config", str(file), "--epochs", "1"], environ=environ)
    assert (config.epochs, config.seed, config.latent_dim, config.width) == (1, 2, 3, 64)


def test_every_field_is_a_flag_an_environment_variable_and_a_file_key(tmp_path: Path) -> None:
    samples = {"model": "both", "objective": "plain", "schedule": "constant", "optimizer": "sgd",
               "device": "cpu", "precision": "fp32", "data": "x", "output_dir": "y",
               "compile": True, "deterministic": True, "wandb": True, "wandb_project": "z",
               "augment": False, "reuse": True, "resume": "auto", "dropout": 0.5,
               "learning_rate": 0.5, "min_delta": 0.5, "memory_limit_gb": 0.5}
    values = {name: samples.get(name, 48) for name in FIELDS}
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(flag(name) if value else "--no-" + name)
        else:
            flags += [flag(name), str(value)]
    assert parse_config(flags, environ={}) == Config(**values)
    environ = {"IMGAE_" + k.upper(): str(v) for k, v in values.items()}
    assert parse_config([], environ=environ) == Config(**values)
    file = tmp_path / "c.json"
    file.write_text(json.dumps(values))
    assert load_config(file) == Config(**values)


@pytest.mark.parametrize(("argv", "says"), [
    (["--epohs", "3"], "unknown argument '--epohs'; did you mean --epochs?"),
    (["--epochs", "-1"], "--epochs: -1 is not a whole number of at least 1"),
    (["--epochs", "1.5"], "--epochs: invalid int value: '1.5'"),
    (["--model", "vgg"], "--model: 'vgg' is not one of unet, reversed_ae, both"),
    (["--learning-rate", "nan"], "--learning-rate: nan is not a number"),
    (["--learn", "1"], "unknown argument '--learn'"),
    (["--config", "/no/such.json"], "/no/such.json: cannot be read"),
    (["surplus"], "'surplus'; --help lists the flags, and a name with spaces needs quotes"),
    ([""], "unknown argument ''"),
    (["--data"], "--data: expected one argument"),
    (["--samples", "1"], "--samples: 1 is not a whole number of at least 2"),
    (["--memory-limit-gb", "1e300"], "1e+300 is not a number of at least 0 and at most 100000"),
    (["--resume", "runs/unet", "--output-dir", "x"], "goes on in that folder; leave out"),
])
def test_a_wrong_flag_is_one_line_that_says_what_is_legal(argv: list[str], says: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        parse_config(argv, environ={})
    assert says in str(error.value)


@pytest.mark.parametrize(("text", "says"), [
    ('{"epoch": 3}', "no setting epoch; did you mean epochs?"),
    ('{"epochs": "3"}', "epochs: '3' is not a whole number"),
    ('{"augment": 1}', "augment: 1 is not true or false"),
    ("{", "not valid JSON"),
    ("[]", "a table of settings is wanted"),
])
def test_a_wrong_file_is_one_line_that_names_file_and_key(
    tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_config(["--config", str(file)], environ={})
    assert says in str(error.value) and str(file) in str(error.value)


def test_a_wrong_environment_variable_is_named() -> None:
    with pytest.raises(UserError, match=r"IMGAE_EPOCS.*IMGAE_EPOCHS"):
        parse_config([], environ={"IMGAE_EPOCS": "3"})
    with pytest.raises(UserError, match="IMGAE_AUGMENT: 'maybe' is not true or false"):
        parse_config([], environ={"IMGAE_AUGMENT": "maybe"})


def test_resume_takes_the_settings_of_the_run_but_flags_still_win(tmp_path: Path) -> None:
    run = tmp_path / "unet"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"width": 8, "epochs": 5, "output_dir": "other"}))
    argv = ["--output-dir", str(tmp_path), "--resume", "--epochs", "9"]
    config = parse_config(argv, environ={})
    assert (config.width, config.epochs, config.output_dir) == (8, 9, str(tmp_path))
    assert parse_config(["--resume", str(run)], environ={}).width == 8
    both = parse_config([*argv, "--model", "both"], environ={})
    assert (both.width, both.model) == (8, "both")
    with pytest.raises(UserError, match="a path belongs to one run"):
        parse_config(["--resume", str(run), "--model", "both"], environ={})


def test_a_notebook_kernels_arguments_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "/usr/lib/python3/dist-packages/colab_kernel_launcher.py"
    monkeypatch.setattr(sys, "argv", [kernel, "-f", "/root/kernel.json"])
    assert parse_config(environ={}) == Config()
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "4"])
    assert parse_config(environ={}).epochs == 4


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_and_mistakes_are_answered_without_loading_torch(script: str) -> None:
    code = (f"import runpy, sys\nsys.argv = [{script!r}, {{}}]\n"
            f"try: runpy.run_path({script!r}, run_name='__main__')\n"
            "except SystemExit as e: print('exit', e.code, 'torch' in sys.modules)")
    for arguments, status in (("'--help'", 0), ("'--no-such-flag', 'x'", 2)):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], cwd=ROOT,
                              capture_output=True, text=True)
        assert f"exit {status} False" in done.stdout, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_config_is_importable_without_torch_and_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", "import config, sys; print("
                           "sorted({'torch', 'numpy'} & set(sys.modules)))"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_an_old_python_is_refused_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", "import sys; sys.version_info = (3, 9, 6)\n"
                           "import config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Python 3.10 or newer is needed")
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_what_the_screen_cannot_show_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from config import run_command\n"
         "print(run_command(lambda: print('Nguy\u1ec5n'), 'x'))"], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, text=True)
    assert done.stdout.splitlines() == ["Nguy\\u1ec5n", "0"]


@pytest.mark.parametrize("typed", [["train.py"], ["evaluate.py", "runs/a b"]])
def test_missing_packages_are_named_with_what_to_type(tmp_path: Path, typed: list[str]) -> None:
    for name in (typed[0], "config.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([sys.executable, "-S", *typed], cwd=tmp_path, capture_output=True,
                          text=True)  # -S: as if nothing had been installed
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert re.search(r"lacks torch, numpy, .*; run make setup, then \.venv/bin/python "
                     + re.escape(shlex.join(typed)) + "; or .* -m pip install -r", done.stderr)


def test_a_run_of_before_a_setting_was_added_takes_its_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"epochs": 3}')
    assert load_config(tmp_path) == Config(epochs=3)


def test_what_to_type_next_names_the_python_of_this_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    own = tmp_path / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    assert command("evaluate.py") == ".venv/bin/python evaluate.py"
    monkeypatch.setenv("PATH", str(own.parent))  # the environment is active
    assert command("evaluate.py") == "python evaluate.py"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/colab_kernel_launcher.py"])
    assert command("train.py") == "!python train.py"


READER = """
import sys
from config import log, run_command
def main():
    for i in range(9):
        log.info("line %d", i)
        print("more" * 30000)
    open(sys.argv[1], "w").write("done")
sys.exit(run_command(main, "x"))
"""


@pytest.mark.parametrize("shell", ["{} | head -2", "{} > /dev/full", "{} > /dev/full 2>&1",
                                   "{} >&-"])
def test_output_that_cannot_be_written_stops_nothing(tmp_path: Path, shell: str) -> None:
    (tmp_path / "main.py").write_text(READER)
    command = shlex.join([sys.executable, str(tmp_path / "main.py"), str(tmp_path / "out")])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell.format(command)], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize(("data", "quick"), [("synthetic", True), ("my synthetic", False)])
def test_make_compare_trains_and_compares_what_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, quick: bool
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / ".installed").touch()
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the make that runs the tests
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(["make", "-n", "compare", f"DATA={data}", "OUT=c d", f"VENV={tmp_path}",
                           "ARGS=--epochs 9"], cwd=ROOT, capture_output=True, text=True)
    first, second = (shlex.split(x) for x in done.stdout.splitlines()[-2:])
    python = str(tmp_path / "bin/python")
    fixed = ["train.py", "--model", "both", "--data", data, "--output-dir", "c d", "--reuse"]
    assert first[:9] == [python, *fixed] and first[-2:] == ["--epochs", "9"]
    assert ("--samples" in first) == quick and second == [python, "evaluate.py", "c d"]
    (tmp_path / "bin/python").unlink()  # as an upgrade may: the stamp does not count
    subprocess.run(["make", "-n", "compare", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True)
    assert not (tmp_path / ".installed").exists()
