"""How settings reach the program, and what a mistake in them is answered with."""

import json
import os
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, run

from config import FIELDS, Config, UserError, command, flag, load_config, parse_config


def test_a_flag_beats_the_environment_beats_a_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"epochs": 3, "seed": 3, "latent_dim": 3}))
    environ = {"IMGAE_EPOCHS": "2", "IMGAE_SEED": "2", "HOME": "/"}
    config = parse_config(["--config", str(file), "--epochs", "1"], environ=environ)
    assert (config.epochs, config.seed, config.latent_dim, config.width) == (1, 2, 3, 64)


def test_every_field_is_a_flag_an_environment_variable_and_a_file_key(tmp_path: Path) -> None:
    samples = {"model": "both", "objective": "plain", "optimizer": "sgd", "check": True,
               "device": "cpu", "precision": "fp32", "data": "x", "output_dir": "y",
               "compile": True, "deterministic": True, "wandb": True,
               "augment": False, "reuse": True, "resume": "auto",
               "learning_rate": 0.5, "min_delta": 0.5, "memory_limit_gb": 0.5,
               "normal": "nv,ok", "grey_bits": 12}
    values = {name: samples.get(name, 48) for name in FIELDS}
    flags = [flag(k) if v is True else "--no-" + k if v is False else f"{flag(k)}={v}"
             for k, v in values.items()]
    assert parse_config(flags, environ={}) == Config(**values)
    environ = {"IMGAE_" + k.upper(): str(v) for k, v in values.items()}
    assert parse_config([], environ=environ) == Config(**values)
    for kept in (values, {"epochs": 3}):  # as by a run of before the other settings were there
        (tmp_path / "config.json").write_text(json.dumps(kept))
        assert load_config(tmp_path) == Config(**kept)


@pytest.mark.parametrize(("given", "says"), [  # flags, what is in a file, or the environment
    (["--epohs", "3"], "(a name with spaces needs quotes); did you mean --epochs?"),
    (["--epochs", "1.5"], "--epochs: '1.5' is not a whole number from 1 on"),
    (["--model", "vgg"], "--model: 'vgg' is not one of unet, reversed_ae, both"),
    (["--learning-rate", "nan"], "--learning-rate: nan is not a number from 1e-12 on"),
    (["--learn", "1"], "unknown argument '--learn'"),
    (["--config", "/no/such.json"], "/no/such.json: no readable table of settings"),
    (["surplus"], "'surplus' (a name with spaces needs quotes); train.py --help lists"),
    ([""], "unknown argument ''"),
    (["--data"], "--data: expected one argument"),
    (["--output-dir", "R\udcf6ntgen"], "--output-dir: 'R\\udcf6ntgen' is not a text in UTF-8"),
    (["--samples", "1"], "--samples: 1 is not a whole number from 2 on"),
    (["--memory-limit-gb", "1e300"], "1e+300 is not a number from 0 to 100000"),
    (["--resume", "runs/unet", "--output-dir", "x"], "which goes on there; leave out"),
    ('{"epoch": 3}', "c.json: epoch: no such setting; did you mean epochs?"),
    ('{"epochs": "x"}', "c.json: epochs: 'x' is not a whole number"),
    ('{"augment": 1}', "c.json: augment: 1 is not true or false"),
    ("{", "c.json: no readable table of settings in JSON (Expecting"),
    ("[]", "('list' object is not a mapping)"),
    ({"IMGAE_EPOCS": "3"}, "environment IMGAE_EPOCS: no such setting; did you mean epochs?"),
    ({"IMGAE_AUGMENT": "maybe"}, "IMGAE_AUGMENT: 'maybe' is not true or false"),
])
def test_a_wrong_setting_is_one_line_that_says_where_and_what_is_legal(
        tmp_path: Path, given: list | str | dict, says: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(given if isinstance(given, str) else "{}")
    flags = given if isinstance(given, list) else ["--config", str(file)]
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        parse_config(flags, environ=given if isinstance(given, dict) else {})
    assert says in str(error.value) and (str(file) in str(error.value)) == isinstance(given, str)


def test_resume_takes_the_settings_of_the_run_but_flags_still_win(tmp_path: Path) -> None:
    (run := tmp_path / "unet").mkdir()
    (run / "config.json").write_text(json.dumps({"width": 8, "epochs": 5, "output_dir": "other"}))
    argv = ["--output-dir", str(tmp_path), "--resume", "--epochs", "9"]
    config = parse_config(argv, environ={})
    assert (config.width, config.epochs, config.output_dir) == (8, 9, str(tmp_path))
    both = parse_config([*argv, "--model", "both"], environ={})
    assert (both.width, both.model) == (8, "both")
    assert parse_config(["--resume", str(run)], environ={}).width == 8
    with pytest.raises(UserError, match="a path belongs to one run"):
        parse_config(["--resume", str(run), "--model", "both"], environ={})
    elsewhere = ["--resume", "--output-dir", str(run)]  # no run is there, and none is begun unasked
    with pytest.raises(UserError, match=r"--resume: there is no run .*name its --output-dir"):
        parse_config(elsewhere, environ={})
    assert parse_config([*elsewhere, "--data", "x"], environ={}).resume == "auto"


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_and_mistakes_are_answered_without_loading_torch(script: str) -> None:
    code = (f"import runpy, sys\nsys.argv = [{script!r}, *sys.argv[1:]]\n"
            f"try: runpy.run_path({script!r}, run_name='__main__')\n"
            "except SystemExit as e: print(e.code, {'torch', 'numpy'} & {*sys.modules})")
    for arguments, status in ((["--help"], 0), (["--no-such-flag", "x"], 2)):
        done = run(sys.executable, "-c", code, *arguments)
        assert done.stdout.endswith(f"{status} set()\n"), done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signal")
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_ctrl_c_while_packages_are_loaded_is_one_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = run(sys.executable, script, *["runs"] * (script == "evaluate.py"),
               PYTHONPATH=str(tmp_path))
    assert done.returncode == 130 and done.stderr == f"{script}: interrupted\n"


def test_what_the_screen_cannot_show_ends_nothing() -> None:
    done = run(sys.executable, "-c", "from config import log, on_screen, run_command\n"
               "@on_screen()\ndef main():\n    print('Nguy\u1ec5n')\n"
               "    log.info('a\\33[31m.png')\nprint(run_command(main, 'x'))",
               PYTHONIOENCODING="ascii")
    assert done.stdout.splitlines() == ["Nguy\\u1ec5n", "a\\x1b[31m.png", "0"]


@pytest.mark.parametrize(("arguments", "says"), [
    (["-c", "import sys; sys.version_info = (3, 9, 6)\nimport config"], "^Python 3.10 or newer is"),
    *[(["-S", *typed],  # as if nothing had been installed
       r"lacks \w+; run make setup and start this with \.venv/bin/python, or .* -m pip install")
      for typed in (["train.py"], ["evaluate.py", "runs/a b"])]])
def test_a_python_that_cannot_run_this_is_one_line(
        tmp_path: Path, arguments: list[str], says: str) -> None:
    for name in ("train.py", "evaluate.py", "config.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = run(sys.executable, *arguments, folder=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert re.search(says, done.stderr) and not done.stdout


def test_what_to_type_next_names_the_python_of_this_program(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    own = tmp_path / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    assert command("evaluate.py") == ".venv/bin/python evaluate.py"
    monkeypatch.setattr(sys, "argv", ["dist-packages/colab_kernel_launcher.py"])
    assert command("evaluate.py") == "!python evaluate.py"


WRITER = """
import sys
from tqdm import tqdm
from config import log, on_screen, run_command
@on_screen()
def main():
    for i in tqdm(range(9), mininterval=0):
        log.info("line %d", i)
        print("more" * 30000)
    open("out", "w").write("done")
sys.exit(run_command(main, "x"))
"""


@pytest.mark.parametrize("shell", ["{} | head -2", "{} > /dev/full", "{} > /dev/full 2>&1",
                                   "{} >&-"])
def test_output_that_cannot_be_written_stops_nothing(tmp_path: Path, shell: str) -> None:
    command = shell.format(shlex.join([sys.executable, "-c", WRITER]))
    done = run("bash", "-o", "pipefail", "-c", command, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "Error" not in done.stderr
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize(("data", "quick"), [("synthetic", True), ("my synthetic", False)])
def test_make_compare_trains_and_compares_what_is_named(
        tmp_path: Path, data: str, quick: bool) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / ".installed").touch()
    make = partial(run, "make", "-n", "compare", f"VENV={tmp_path}",
                   **dict.fromkeys(("MAKEFLAGS", "MAKELEVEL", "MFLAGS"), ""))
    done = make(f"DATA={data}", "OUT=c d", "ARGS=--epochs 9")
    first, second = (shlex.split(x) for x in done.stdout.splitlines()[-2:])
    python = str(tmp_path / "bin/python")
    fixed = ["train.py", "--model", "both", "--data", data, "--output-dir", "c d", "--reuse"]
    assert first[:9] == [python, *fixed] and first[-2:] == ["--epochs", "9"]
    assert ("--samples" in first) == quick and second == [python, "evaluate.py", "c d"]
    (tmp_path / "bin/python").unlink()  # as an upgrade may: the stamp does not count
    make()
    assert not (tmp_path / ".installed").exists()
