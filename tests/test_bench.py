"""The benchmark still finds its way through the product. What it measures is no test's business."""

import json
import math
from pathlib import Path

import bench
import pytest


def test_every_row_can_be_computed_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SCRATCH", tmp_path)
    rows = bench.main(["--quick", "--out", str(tmp_path / "bench.json")])
    names = {row.name for row in rows}
    assert {name.split(".")[0] for name in names} >= {
        "step", "memory", "loss", "data", "stream", "wait", "evaluation", "start", "growth",
        "promise"}
    assert all(f"step.{m}.{b}" in names for m in bench.MODELS for b in (4, 8))
    for row in rows:
        if "memory" not in row.name:  # which not every system tells
            assert math.isfinite(row.ours) and row.ours >= 0, row.name
            assert row.target or row.name == "growth.list", row.name
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    assert written["quick"] and written["machine"]["torch"] and written["machine"]["cores"]


def test_the_fast_step_learns_what_the_plain_one_learns() -> None:
    """From the same weights, on the same images, with the same corruptions: only dropout and the
    precision differ."""
    for row in bench.loss(bench.QUICK, {}):
        assert row.ours < 0.02, row.name


def test_a_process_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    with bench.Worker(bench.Scale(), "films", scratch=str(tmp_path), count=1, side=16) as worker:
        folder = Path(worker.ask(suffix="png")["folder"])
        assert len(list(folder.glob("normal/*.png"))) == 5
        with pytest.raises(SystemExit, match=r"films:[\s\S]*unexpected keyword"):
            worker.ask(colour="green")
