"""What the README says it takes to add to this is all that it takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_image

ROOT = Path(__file__).parent.parent


def apply(folder: Path, diff: str) -> None:
    """Apply a diff of the README's to modules in a folder; each place must be found just once."""
    for name, hunks in re.findall(r"^--- (.+)\n((?:(?!--- ).*\n?)*)", diff, re.M):
        file = folder / name
        for hunk in hunks.strip("\n").split("@@\n")[1:]:
            lines = hunk.rstrip("\n").split("\n")
            old, new = ("\n" + "\n".join(line[1:] for line in lines if line[0] in kinds)
                        for kinds in (" -", " +"))
            text = file.read_text()
            assert text.count(old) == 1, f"{name} has no single place for:{old}"
            file.write_text(text.replace(old, new))


@pytest.fixture
def added_to(tmp_path: Path) -> Path:
    """A copy of the modules with all that the README adds."""
    for name in ("config", "models", "data", "train", "evaluate"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    section = (ROOT / "README.md").read_text().split("\n## Adding to it\n")[1].split("\n## ")[0]
    diffs = re.findall(r"```diff\n(.*?)\n```", section, re.S)
    assert len(diffs) == 4
    for diff in diffs:
        apply(tmp_path, diff)
    return tmp_path


def test_each_addition_has_its_place_and_makes_valid_code(added_to: Path) -> None:
    for file in added_to.glob("*.py"):
        compile(file.read_text(), file.name, "exec")


@pytest.mark.drill
def test_what_it_takes_to_add_a_model_an_objective_a_scorer_and_a_layout(added_to: Path) -> None:
    for i in range(70):
        write_image(added_to / "films" / f"{'ok' if i < 60 else 'ill'}_{i}.png", i)
    run = [sys.executable, "train.py", "--model", "spatial_ae", "--objective", "erase", "--data",
           "films", "--width", "4", "--image-size", "32", "--latent-dim", "64", "--epochs", "1"]
    done = subprocess.run(run, cwd=added_to, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "films named ok_ or ill_" in done.stdout
    test = [sys.executable, "evaluate.py", "runs/spatial_ae", "--scorer", "maximum"]
    done = subprocess.run(test, cwd=added_to, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "maximum" in done.stdout
