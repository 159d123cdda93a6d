"""What README and docs say it takes to use and to extend this is all that it takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_image

ROOT = Path(__file__).parent.parent
SIZES = ["--reader-steps", "5", "--width", "4", "--image-size", "32", "--latent-dim", "64"]


def extend(folder: Path) -> None:
    """Apply all diffs of docs/extending.md to modules in a folder; each has just one place."""
    diffs = re.findall(r"```diff\n(.*?)\n```", (ROOT / "docs/extending.md").read_text(), re.S)
    assert len(diffs) == 6
    for name, hunks in re.findall(r"^--- (.+)\n((?:(?!--- ).*\n?)*)", "\n".join(diffs), re.M):
        for hunk in hunks.strip("\n").split("@@\n")[1:]:
            lines = hunk.rstrip("\n").split("\n")
            old, new = ("\n" + "\n".join(line[1:] for line in lines if line[0] in kinds)
                        for kinds in (" -", " +"))
            text = (folder / name).read_text()
            assert text.count(old) == 1, f"{name} has no single place for:{old}"
            (folder / name).write_text(text.replace(old, new))
            compile(text.replace(old, new), name, "exec")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    return tmp_path


def run(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_addition_has_its_place(copy: Path) -> None:
    extend(copy)


def test_what_readme_and_docs_point_at_is_there() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path, section in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", page.read_text()):
            assert (page.parent / path).exists(), f"{page.name} points at {path}"
            title = f"\n## {section.replace('-', ' ')}\n"
            assert not section or title in (page.parent / path).read_text().lower(), title


@pytest.mark.drill
def test_additions_and_the_lines_from_python_work(copy: Path) -> None:
    for i in range(70):
        write_image(copy / "images" / ("normal" if i < 60 else "ill") / f"{i}.png", i)
        write_image(copy / "named" / f"{'ok' if i < 60 else 'ill'}_{i}.png", i)
    run(copy, "train.py", "--data", "images", "--epochs", "1", *SIZES)
    extend(copy)
    assert "epoch 2/2" in run(copy, "train.py", "--resume", "--epochs", "2")  # of before --gamma
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    shown = run(copy, "-c", "import numpy; images = numpy.zeros((3, 1, 32, 32), numpy.uint8)\n"
                f"{code}print(reconstruction.shape, anomaly_map.shape, score.shape)")
    assert shown == "(3, 1, 32, 32) (3, 1, 32, 32) (3,)\n"
    shown = run(copy, "train.py", "--model", "spatial_ae", "--objective", "erase", "--gamma", "0.3",
                "--data", "named", "--epochs", "1", *SIZES)
    assert "ill 10 -> abnormal" in shown
    assert "texture" in run(copy, "evaluate.py", "runs/spatial_ae", "--scorer", "texture")
