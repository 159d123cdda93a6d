"""The benchmark still finds its way through the product. What it measures is no test's business."""

import json
import math
from pathlib import Path

import bench
import pytest

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bench.Row]:
    """All of it in miniature, and held against the file that is written."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SCRATCH", folder)
        found = bench.main(["--quick", "--out", str(folder / "bench.json")])
    written = json.loads((folder / "bench.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in found]
    assert written["quick"] and written["machine"]["torch"] and written["machine"]["cores"]
    return {row.name: row for row in found}


def test_every_row_can_be_computed(rows: dict[str, bench.Row]) -> None:
    assert {name.split(".")[0] for name in rows} >= {
        "step", "memory", "promise", "loss", "data", "stream", "evaluation", "start", "growth"}
    assert all(f"step.{m}.fp32.{b}" in rows for m in bench.MODELS for b in (4, 8))
    for name, row in rows.items():
        if "memory" not in name:  # which not every system tells
            assert math.isfinite(row.ours) and row.ours >= 0, name
            assert row.target or name == "growth.list" or name.endswith(".ceiling"), name


def test_the_fast_step_learns_what_the_plain_one_learns(rows: dict[str, bench.Row]) -> None:
    """From the same weights, on the same images, with the same corruptions."""
    for model in bench.MODELS:
        row = rows[f"loss.{model}"]
        assert row.ours < 0.03 < row.theirs, model


def test_a_process_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    settings = {"scratch": str(tmp_path), "count": 1, "side": 16}
    with bench.Worker(bench.Scale(), "image_folders", **settings) as worker:
        folder = Path(worker.ask(suffix="png")["folder"])
        assert len(list(folder.glob("normal/*.png"))) == 5
        with pytest.raises(SystemExit, match=r"image_folders:[\s\S]*unexpected keyword"):
            worker.ask(colour="green")
