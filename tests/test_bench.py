"""The benchmark still finds its way through the product. What it measures is no test's business."""

import json
import math
from pathlib import Path

import bench
import pytest
from config import Config
from data import open_source


@pytest.mark.drill
def test_every_row_can_be_computed_and_the_fast_step_learns_what_the_plain_one_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it in miniature, and held against the file that is written."""
    monkeypatch.setattr(bench, "SCRATCH", tmp_path)
    monkeypatch.setattr(bench.train, "LARGE_MATRIX", bench.train.LARGE_MATRIX)
    found = bench.main(["--quick", "--out", str(tmp_path / "bench.json")])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in found]
    assert written["quick"] and written["machine"]["torch"] and written["machine"]["cores"]
    rows = {row.name: row for row in found}
    assert {name.split(".")[0] for name in rows} >= {
        "step", "memory", "loss", "data", "stream", "evaluation", "start"}
    assert all(f"step.{m}.fp32.{b}" in rows for m in bench.MODELS for b in (4, 8))
    for name, row in rows.items():
        if "memory" not in name:  # which not every system tells
            assert math.isfinite(row.ours) and row.ours >= 0 and row.target, name
    for suffix in ("jpg", "png"):  # copies would be left out here, and read by the other side
        config = Config(data=str(bench.image_folder(bench.QUICK, suffix)))
        assert len(open_source(config).samples) == bench.QUICK.files
    for model in bench.MODELS:  # from the same weights, on the same images, corrupted alike
        row = rows[f"loss.{model}"]
        assert row.ours < 0.01 < row.theirs, model
