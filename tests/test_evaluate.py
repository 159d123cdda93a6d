"""The figures that are reported, the files that are written, and scoring of new images."""

import base64
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import tiny, write_image
from PIL import Image
from scipy.stats import betabinom
from sklearn.metrics import average_precision_score, roc_auc_score

import evaluate as evaluate_module
import train as train_module
from config import Config, UserError, parse_config
from data import FolderSource, ImageStream, Sample, decode_image, draw_phantom, read_splits
from evaluate import (
    PixelCounts,
    Run,
    Scored,
    by_view,
    chance_of_so_few,
    command_to_train,
    draw_evenly,
    evaluate,
    group_by_seed,
    interval,
    load_run,
    localisation,
    overlap,
    paired_difference,
    parse_arguments,
    patient_weights,
    peak_in_lesion,
    predict,
    samples_to_score,
    verdict,
    weighted_auroc,
    weighted_average_precision,
    wilson,
    worst,
)
from models import OWN_MAP, SCORERS, Reading, create_model, moved, read
from train import load_checkpoint, place, save_checkpoint, train


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of numbers and texts: drawing would take most of their time."""
    def blank(*arguments: object) -> bool:
        Image.new("L", (1, 1)).save(arguments[-1])
        return True

    for name in ("draw_roc", "draw_histogram", "draw_examples", "draw_worst", "draw_healing",
                 "draw_comparison"):
        monkeypatch.setattr(evaluate_module, name, blank)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_average_precision_agree_with_scikit_learn(ties: bool) -> None:
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 2, 200)
    scores = labels + rng.randn(200) * 1.5
    if ties:
        scores = np.round(scores)
    weights = rng.randint(0, 4, (5, 200)).astype(float)
    for ours, theirs in ((weighted_auroc, roc_auc_score),
                         (weighted_average_precision, average_precision_score)):
        expected = [theirs(labels, scores, sample_weight=w) for w in weights]
        assert ours(scores, labels, weights) == pytest.approx(expected, abs=1e-9)


def test_pixel_auroc_from_counts_agrees_with_scikit_learn() -> None:
    rng = np.random.RandomState(0)
    counts, maps, masks = PixelCounts(), [], []
    for i in range(5):
        mask = np.zeros((32, 32), dtype=bool)
        mask[: 4 * i] = True
        map_ = (np.abs(rng.randn(32, 32)) * 10.0 ** (i - 2) + mask).astype(np.float32)
        map_[:, :3] = 0.0
        assert counts.auroc() is None or masks[-1].any()
        counts.add(map_, mask)
        maps.append(map_.ravel())
        masks.append(mask.ravel())
    expected = roc_auc_score(np.concatenate(masks), np.concatenate(maps))
    assert counts.auroc() == pytest.approx(expected, abs=1e-4)


def test_auroc_without_one_label_is_not_a_number() -> None:
    assert np.isnan(weighted_auroc(np.arange(3.0), np.zeros(3), np.ones((1, 3)))[0])


def test_the_bootstrap_draws_patients_not_images() -> None:
    patients = ["a"] * 5 + ["b", "c", "d"]
    weights = patient_weights(patients, 500)
    assert (weights[:, :5] == weights[:, :1]).all()
    assert (weights[:, [0, 5, 6, 7]].sum(1) == 4).all()
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.15)
    assert np.array_equal(weights, patient_weights(patients, 500))


def test_the_interval_of_a_share_is_wilsons() -> None:
    # Brown, Cai and DasGupta 2001, and any textbook: 10 of 10 and 9 of 10.
    assert wilson(1.0, 10) == pytest.approx((0.722, 1.0), abs=1e-3)
    assert wilson(0.9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)


def test_misses_and_false_alarms_are_on_the_wrong_side_of_the_threshold_the_worst_first() -> None:
    samples = [Sample(str(i), str(i), y) for i, y in enumerate([0, 0, 0, 1, 1, 1])]
    scored = Scored(samples, {"mse": np.array([0.2, 0.9, 0.6, 0.4, 0.1, 0.5])}, {}, {})
    assert worst(scored, {"scorer": "mse", "threshold": 0.5}) == ([4, 3, 5], [1, 2])


def test_the_chance_of_so_few_normals_under_a_threshold_is_that_of_drawing_both_anew() -> None:
    assert chance_of_so_few(7, 9, 19, 20) == pytest.approx(betabinom.cdf(7, 9, 19, 2))
    rng = np.random.RandomState(0)
    thresholds = np.sort(rng.rand(20_000, 20))[:, 18]
    under = (rng.rand(20_000, 9) <= thresholds[:, None]).sum(1)
    assert (under <= 7).mean() == pytest.approx(chance_of_so_few(7, 9, 19, 20), abs=0.01)
    assert chance_of_so_few(9, 9, 19, 20) == pytest.approx(1)


@pytest.mark.parametrize(("threshold", "validation", "of_normals", "says"), [
    (0.5, 50, 100, "reaches 80.0 % (71 to 87) on these normals"), (0.5, 50, 5, None),
    (0.5, 8, 100, None), (0.9, 50, 100, None)])  # of eight the highest is not sure itself
def test_a_threshold_that_does_not_hold_is_warned_of_where_that_is_no_chance(
    runs: list[Path], threshold: float, validation: int, of_normals: int, says: str | None
) -> None:
    run = load_run(runs[0])
    run.scorer.normal_scores = {"mse": torch.full((validation,), threshold, dtype=torch.float64)}
    scores = np.append(np.where(np.arange(of_normals) % 5, 0.4, 0.8), [0.9, 0.9])
    labels = [0] * of_normals + [1, 1]
    samples = [Sample(str(i), str(i), y) for i, y in enumerate(labels)]
    scored = Scored(samples, {"mse": scores}, {}, {})
    metrics = evaluate_module.measure(run, scored, "mse", np.ones((2, len(scores)))) | {
        "data": "", "split": "test", "scorer": "mse", "external": False, "baselines": {}}
    table = evaluate_module.results_table(["U-Net"], [metrics], {"U-Net": metrics})
    assert (says in table) if says else ("Careful" not in table)


def test_long_names_stay_apart_and_in_line(runs: list[Path]) -> None:
    samples = [Sample(str(i), str(i), i % 2, "nodule" if i % 2 else "") for i in range(20)]
    scored = Scored(samples, {"mse": np.arange(20.0) % 2}, {}, {})
    run = load_run(runs[0])
    run.scorer.normal_scores = {"mse": torch.zeros(50, dtype=torch.float64)}
    metrics = evaluate_module.measure(run, scored, "mse", np.ones((2, 20))) | {
        "data": "", "split": "test", "scorer": "mse", "external": False,
        "baselines": {"mean intensity": 0.5}, "baselines_ci": {"mean intensity": (0.4, 0.6)}}
    names = ["U-Net (an_experiment_with_opacities)", "U-Net (an_experiment_with_nothing_at_all)"]
    table = evaluate_module.results_table(names, [metrics] * 2, dict.fromkeys(names, metrics))
    [head] = [line for line in table.splitlines() if line.startswith("AUROC by finding")]
    assert head.count("with_opacities)") == head.count("nothing_at_all)") == 1
    rows = [line for line in table.splitlines() if line.startswith(("U-Net", "  mean int"))]
    assert len(rows) == 3 and len({line.index("1.000" if "U" in line else "0.500")
                                   for line in rows}) == 1


def test_the_interval_of_clustered_images_is_wider_than_if_they_were_independent() -> None:
    rng = np.random.RandomState(1)
    labels = np.repeat(rng.randint(0, 2, 40), 10)
    scores = labels + np.repeat(rng.randn(40) * 1.5, 10)
    widths = []
    for patients in (np.repeat(np.arange(40), 10), np.arange(400)):
        low, high = interval(weighted_auroc(scores, labels, patient_weights(patients.astype(str))))
        widths.append(high - low)
    assert widths[0] > 2 * widths[1]


@pytest.mark.parametrize(("difference", "low", "high", "says"), [
    (0.10, 0.05, 0.15, "B scores 0.100 higher than A, 95 % interval 0.050 to 0.150: a clear"),
    (-0.10, -0.15, -0.05, "A scores 0.100 higher than B, 95 % interval 0.050 to 0.150: a clear"),
    (0.03, -0.01, 0.07, "B scores 0.030 higher than A, 95 % interval -0.010 to 0.070: no clear"),
    (-0.03, -0.07, 0.01, "A scores 0.030 higher than B, 95 % interval -0.010 to 0.070: no clear"),
    # As shown: an interval that reads "0.000 to 0.041" does not leave out 0.
    (0.02, 0.0004, 0.041, "B scores 0.020 higher than A, 95 % interval 0.000 to 0.041: no clear"),
    (0.02, 0.0006, 0.041, "B scores 0.020 higher than A, 95 % interval 0.001 to 0.041: a clear"),
    (0.02, -0.0004, 0.041, "B scores 0.020 higher than A, 95 % interval 0.000 to 0.041: no clear"),
    (-0.02, -0.041, -0.0004, "A scores 0.020 higher than B, 95 % interval 0.000 to 0.041: no"),
    (0.0, 0.0, 0.0, "B scores 0.000 higher than A, 95 % interval 0.000 to 0.000: no clear"),
])
def test_the_verdict_names_the_better_and_says_whether_it_is_clear(
    difference: float, low: float, high: float, says: str
) -> None:
    assert verdict("A", "B", difference, low, high).startswith(says)


@pytest.mark.parametrize(("skill_a", "skill_b", "says"), [
    (0.5, 2.0, r"B scores 0\.\d+ higher than A, .*: a clear difference"),
    (1.0, 1.0, r"[AB] scores 0\.0\d+ higher than [AB], .*: no clear difference"),
    (2.0, 0.5, r"A scores 0\.\d+ higher than B, .*: a clear difference"),
])
def test_the_verdict_is_right_on_a_constructed_win_tie_and_loss(
    skill_a: float, skill_b: float, says: str
) -> None:
    rng = np.random.RandomState(0)
    labels = np.repeat([0, 1], 150)
    a, b = (skill * labels + rng.randn(300) for skill in (skill_a, skill_b))
    weights = patient_weights([str(i // 2) for i in range(300)])
    difference, low, high = paired_difference(a, b, labels, weights)
    assert low < difference < high
    expected = roc_auc_score(labels, b) - roc_auc_score(labels, a)
    assert difference == pytest.approx(expected, abs=1e-9)
    assert re.match(says, verdict("A", "B", difference, low, high))


def test_pairing_makes_a_small_but_steady_difference_clear() -> None:
    rng = np.random.RandomState(1)
    labels = np.repeat([0, 1], 150)
    a = labels + rng.randn(300)
    b = a + 0.15 * labels  # nearly the same scores, a little better on every abnormal image
    weights = patient_weights([str(i) for i in range(300)])
    assert "a clear difference" in verdict("A", "B", *paired_difference(a, b, labels, weights))


def test_subgroups_by_view_are_measured_within_the_view() -> None:
    views, labels = ["PA"] * 4 + ["AP"] * 4 + [""] * 2, [0, 0, 1, 1, 0, 0, 1, 1, 0, 1]
    samples = [Sample(str(i), str(i), y, view=v)
               for i, (y, v) in enumerate(zip(labels, views, strict=True))]
    scores = np.array([1, 2, 3, 4, 13, 14, 11, 12, 0, 0.5])
    assert by_view(samples_scored(samples), scores) == {
        "PA": {"auroc": 1.0, "n": 4}, "AP": {"auroc": 0.0, "n": 4}}
    one_view = [dataclasses.replace(s, view="PA") for s in samples]
    assert by_view(samples_scored(one_view), scores) == {}


def samples_scored(samples: list[Sample]) -> Scored:
    return Scored(samples, {}, {}, {})


def test_a_peak_counts_in_the_lesion_or_just_beside_it() -> None:
    mask = np.zeros((100, 100), bool)
    mask[20:30, 20:30] = True
    for (y, x), hit in (((25, 25), True), ((32, 25), True), ((33, 25), False), ((80, 80), False)):
        map_ = np.zeros((100, 100))
        map_[y, x] = 1
        assert peak_in_lesion(map_, mask) is hit


def test_localisation_counts_peaks_by_lesion_size_and_the_share_of_the_map() -> None:
    located = [(True, 0.5, 0.2), (True, 0.4, 0.3), (True, 0.2, 0.02), (False, 0.1, 0.01)]
    got = localisation(Scored([], {}, {}, {}, 0.9, located))
    assert (got["n_located"], got["pixel_auroc"], got["peak_in_lesion"]) == (4, 0.9, 0.75)
    assert (got["peak_in_small_lesion"], got["peak_in_large_lesion"]) == (0.5, 1.0)
    assert got["energy_in_lesion"] == pytest.approx(0.3)
    assert got["lesion_area"] == pytest.approx(0.1325)


@pytest.mark.usefixtures("blank_pictures")
def test_maps_are_held_against_the_boxes_of_nih(runs: list[Path], tmp_path: Path) -> None:
    rows = ["Image Index,Finding Labels,Patient ID,View Position"]
    for i in range(8):
        write_image(tmp_path / "nih" / "images" / f"{i}.png", i)
        rows.append(f"{i}.png,{'Nodule' if i < 3 else 'No Finding'},{i},{'PA' if i % 2 else 'AP'}")
    (tmp_path / "nih" / "Data_Entry_2017.csv").write_text("\n".join(rows))
    # The first box is the whole film, where every peak must lie; the second a corner.
    (tmp_path / "nih" / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n0.png,Nodule,0,0,1024,1024,,,\n"
        "1.png,Nodule,0,0,32,32,,,\n")
    (metrics,) = evaluate(runs[0], data=str(tmp_path / "nih"))
    assert metrics["n_located"] == 2 and metrics["pixel_auroc"] is None
    assert metrics["peak_in_large_lesion"] == 1
    assert metrics["lesion_area"] == pytest.approx((1 + 1 / 1024) / 2)
    assert 0.5 < metrics["energy_in_lesion"] < 0.51
    assert set(metrics["auroc_by_view"]) == {"PA", "AP"}


def test_a_limited_test_is_drawn_evenly_and_always_the_same() -> None:
    samples = [Sample(str(i), str(i), int(i >= 90)) for i in range(100)]
    chosen = draw_evenly(samples, 40)
    assert len(chosen) == 40 and sum(s.label for s in chosen) == 10
    assert chosen == draw_evenly(samples, 40) and draw_evenly(samples, None) is samples


KEYS = {"auroc", "auroc_ci", "average_precision", "sensitivity_at_90_specificity",
        "sensitivity_at_95_specificity", "threshold", "n_normal", "n_abnormal",
        "specificity_at_threshold", "reconstruction_mse", "reconstruction_ssim", "scorer", "data"}


def test_evaluation_writes_metrics_scores_and_pictures(
    runs: list[Path], capsys: pytest.CaptureFixture
) -> None:
    (metrics,) = evaluate(runs[0])
    text = capsys.readouterr().out
    folder = runs[0] / "eval" / "synthetic"
    drawn = {"roc.png", "histogram.png", "examples.png", "worst.png", "healing.png"}
    assert {p.name for p in folder.iterdir()} == {"metrics.json", "scores.csv", *drawn}
    saved = json.loads((folder / "metrics.json").read_text())
    assert set(saved) >= KEYS and saved["auroc"] == metrics["auroc"]
    assert (saved["n_normal"], saved["n_abnormal"], saved["scorer"]) == (100, 100, "fused")
    assert "not real X-rays" in saved["data"] and not saved["external"]
    # The figures must follow from the scores in the table beside them.
    with open(folder / "scores.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    labels = np.array([int(r["label"]) for r in rows])
    scores = np.array([float(r["fused"]) for r in rows])
    assert roc_auc_score(labels, scores) == pytest.approx(saved["auroc"], abs=1e-3)
    low, high = saved["auroc_ci"]
    assert low < saved["auroc"] < high
    threshold = load_run(runs[0]).scorer.threshold("fused", 0.95)
    assert saved["threshold"] == threshold
    for name, value in saved["baselines"].items():
        low, high = saved["baselines_ci"][name]
        assert low < value < high and value >= 0.5
    haze = roc_auc_score(labels, [float(r["haze"]) for r in rows])  # which needs no model
    assert saved["baselines"]["haze"] == pytest.approx(max(haze, 1 - haze), abs=1e-4)
    assert (scores[labels == 1] > threshold).mean() == pytest.approx(
        saved["sensitivity_at_95_specificity"], abs=0.011)
    reached, (low, high) = saved["specificity_at_threshold"], saved["specificity_ci"]
    assert low < reached < high
    assert f"{100 * reached:.1f} % ({100 * low:.0f} to {100 * high:.0f})" in text
    percentiles = np.array([float(r["fused_percentile"]) for r in rows])
    assert ((percentiles > 95) == (scores > threshold)).all()
    assert 0 <= saved["pixel_auroc"] <= 1 and saved["n_located"] == 100
    assert set(saved["auroc_by_finding"]) == {"opacity", "nodule", "effusion", "missing", "doubled"}
    assert "not real X-rays" in text and "PCA reconstruction error" in text
    for name in drawn:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300


class Page(HTMLParser):
    """What a browser would find in comparison.html, less the layout."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        data = data.replace("\xa0", " ")
        self.text += data
        if self.tags and self.tags[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")

    def drawings(self, start: str) -> list[str]:
        """The alt texts of the drawings that start so; each is there for light and for dark."""
        return [a["alt"] for t, a in self.tags
                if t == "img" and a["alt"].startswith(start) and a.get("class") != "dark"]


def check_that_it_needs_nothing_else(page: Page) -> None:
    """One file, without scripts, that fetches nothing and that a screen reader can follow."""
    assert not re.search(r"https?:|@import|url\(", page.source)
    assert not {"script", "link", "iframe", "object"} & {t for t, a in page.tags
                                                        if a.get("rel") != "icon"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            kind, content = attributes["src"].split(";base64,")
            content = base64.b64decode(content, validate=True)
            if kind == "data:image/jpeg":
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
            else:
                assert kind == "data:image/svg+xml"
                for element in ElementTree.fromstring(content).iter():
                    link = element.get("{http://www.w3.org/1999/xlink}href", "#")
                    assert link.startswith(("#", "data:"))
            assert attributes["alt"].strip()
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert {"main", "nav", "header", "footer"} <= {t for t, _ in page.tags}
    assert len(page.source) < 3e6


def read_metrics(folder: Path, model: str) -> dict:
    return json.loads((folder / model / "eval" / "synthetic" / "metrics.json").read_text())


def test_two_runs_are_compared_on_the_same_images(
    runs: list[Path], capsys: pytest.CaptureFixture
) -> None:
    evaluate(runs, scorer="all")
    text, compared = capsys.readouterr().out, runs[0].parent
    assert "clear difference" in text
    for run in runs:  # as trained: scoring folds some of them away
        config = Config(**load_checkpoint(run / "best.pt")["config"])
        count = sum(p.numel() for p in create_model(config.model, config).parameters())
        assert f" {count:,} parameters, trained 2 epochs" in text
    results = [read_metrics(compared, model) for model in ("unet", "reversed_ae")]
    with open(compared / "comparison.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["run"] for r in rows] == ["unet", "reversed_ae"]
    assert [float(r["auroc"]) for r in rows] == [r["auroc"] for r in results]
    assert set(results[0]["scorers"]) == set(SCORERS)
    page = (compared / "comparison.md").read_text()
    assert "not real X-rays" in page and "clear difference" in page and "not for diagnosis" in page
    with Image.open(compared / "comparison.png") as picture:
        assert min(picture.size) > 500
    page = Page(compared / "comparison.html")
    check_that_it_needs_nothing_else(page)
    check_that_it_holds_what_was_measured(page, results, compared)


def check_that_it_holds_what_was_measured(page: Page, results: list[dict], compared: Path) -> None:
    def told(value: float, ends: tuple[float, float]) -> str:
        return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"

    for name, saved in zip(("U-Net", "Reversed AE"), results, strict=True):
        for title, m in ((name, saved), (f"{name}, peak", saved["scorers"]["peak"])):
            row = next(row for row in page.rows if row[0] == title)
            assert row[1:3] == [told(m["auroc"], m["auroc_ci"]),
                                told(m["average_precision"], m["average_precision_ci"])]
            assert row[3:5] == [f"{100 * m[key]:.1f} %" for key in (
                "sensitivity_at_90_specificity", "sensitivity_at_95_specificity")]
            assert row[5].startswith(f"{100 * m['specificity_at_threshold']:.1f} % (")
        assert len(page.drawings(f"Histogram of the scores of {name}")) == 1
        (curves,) = page.drawings(f"Learning curves of {name}")
        with open(compared / saved["model"] / "log.csv", newline="") as f:
            assert f"to {float(list(csv.DictReader(f))[-1]['train_loss']):.3f};" in curves
        missed = round(100 * (1 - saved["sensitivity_at_95_specificity"]))
        assert f"{missed} of 100 abnormal images missed" in page.text
    for name, value in saved["baselines"].items():
        row = next(row for row in page.rows if row[0] == f"{name} (trivial)")
        assert row[1] == told(value, saved["baselines_ci"][name])
    assert ["nodule", "20", *(f"{r['auroc_by_finding']['nodule']['auroc']:.3f}"
                              for r in results)] in page.rows
    assert len(page.drawings("ROC curves")) == 1 and len(page.drawings("Colours of the maps")) == 2
    assert sum(t == "img" and a.get("class") == "dark" for t, a in page.tags) == 7
    # One case of the normals and of each of the five findings, seen by both models.
    assert len(page.drawings("Reconstruction by U-Net")) == 6
    for text in ("Research use only", "not real X-rays", "clear difference",
                 " alone, 95 % interval", "100 normal and 100 abnormal",
                 results[0]["data_fingerprint"], torch.__version__):
        assert text in page.text
    assert ["latent_dim", "8", "8"] in page.rows


def test_names_in_the_page_are_only_names(runs: list[Path], tmp_path: Path) -> None:
    bad = "<script>alert(1)<img src=x onerror=y> &amp; \" ' $x$ $body"
    finding = '"><b onclick=$_$>'
    for i in range(8):
        write_image(tmp_path / "data" / "good" / f"{i} {bad}.png", i)
        write_image(tmp_path / "data" / finding / f"{i} {bad}.png", 10 + i)
    folder = tmp_path / f"<u>{bad}" / "<i>"
    shutil.copytree(runs[0], folder)
    evaluate(folder, data=str(tmp_path / "data"))
    page = Page(folder.parent / "comparison.html")
    check_that_it_needs_nothing_else(page)
    assert not {"u", "i", "script"} & {t for t, _ in page.tags}
    assert re.search(rf"good/\d {re.escape(bad)}\.png", page.text)
    assert finding in page.text and "U-Net (<i>), tested" in page.text
    assert page.drawings(f"Input, {finding}")


def test_the_command_in_the_page_trains_the_same_run() -> None:
    config = Config(model="reversed_ae", data="my films/a'b", samples=7, batch_size=None,
                    augment=False, deterministic=True, learning_rate=2e-4, output_dir="other")
    words = shlex.split(command_to_train(config))
    assert words[:2] == ["python", "train.py"]
    assert parse_config(words[2:], environ={}) == config
    assert command_to_train(Config()) == "python train.py --model unet"


def test_intervals_of_several_seeds_are_those_of_the_mean(runs: list[Path]) -> None:
    rng = np.random.RandomState(0)
    labels, run = np.arange(60) % 2, load_run(runs[0])
    samples = [Sample(str(i), str(i), y) for i, y in enumerate(labels)]
    weights = patient_weights([s.patient for s in samples])
    run.scorer.normal_scores = {"mse": torch.zeros(50, dtype=torch.float64)}
    scored = [Scored(samples, {"mse": labels * shift + rng.randn(60)}, {}, {}) for shift in (0, 3)]
    results = [evaluate_module.measure(run, s, "mse", weights) | {"scorer": "mse", "seed": i}
               for i, s in enumerate(scored)]
    mean = evaluate_module.average({"U-Net": [0, 1]}, scored, results, weights)["U-Net"]
    for name, metric in (("auroc", weighted_auroc),
                         ("average_precision", weighted_average_precision)):
        low, high = mean[f"{name}_ci"]
        assert low < mean[name] < high and results[0][f"{name}_ci"][1] < mean[name]
        both = [metric(s.scores["mse"], labels, weights) for s in scored]
        assert (low, high) == pytest.approx(interval(np.mean(both, axis=0)))


def test_the_difference_of_several_seeds_is_that_of_their_mean_aurocs() -> None:
    rng = np.random.RandomState(2)
    labels = np.repeat([0, 1], 100)
    a = labels + rng.randn(3, 200) * 1.5
    b = labels * 1.2 + rng.randn(2, 200)
    weights = patient_weights([str(i) for i in range(200)], 200)
    difference, low, high = paired_difference(a, b, labels, weights)
    one, two = (np.mean([roc_auc_score(labels, s) for s in x]) for x in (a, b))
    assert difference == pytest.approx(two - one, abs=1e-9) and low < difference < high
    drawn = np.array([np.mean([roc_auc_score(labels, s, sample_weight=w) for s in b])
                      - np.mean([roc_auc_score(labels, s, sample_weight=w) for s in a])
                      for w in weights])
    assert (low, high) == pytest.approx(interval(drawn), abs=1e-9)


@pytest.mark.parametrize(("a", "b", "says"), [
    ([0.8, 0.9], [0.7, 0.75], "Every seed of A scores higher than every seed of B."),
    ([0.8, 0.9], [0.91, 0.95], "Every seed of B scores higher than every seed of A."),
    ([0.8, 0.9], [0.85, 0.95], "Their seeds overlap: which one scores higher depends on the seed."),
    ([0.8, 0.9], [0.9], "Their seeds overlap: which one scores higher depends on the seed."),
    ([0.8], [0.9], None),
])
def test_a_comparison_says_whether_seeds_tell_the_models_apart(
    a: list[float], b: list[float], says: str | None
) -> None:
    one, two = ({"auroc": x[0]} | ({"aurocs": x} if len(x) > 1 else {}) for x in (a, b))
    assert overlap("A", one, "B", two) == ([says] if says else [])


@pytest.mark.usefixtures("blank_pictures")
def test_seeds_of_a_model_are_averaged_and_compared_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = train(tiny(tmp_path, data="synthetic", epochs=1, model="both", seeds=2))
    shutil.copytree(folders[0], tmp_path / "unet-seed2")  # there, but not of this training
    capsys.readouterr()
    results = evaluate(tmp_path, samples=100)
    text = capsys.readouterr().out
    assert [(r["model"], r["seed"]) for r in results] == [
        ("unet", 0), ("unet", 1), ("reversed_ae", 0), ("reversed_ae", 1)]
    aurocs = [r["auroc"] for r in results]
    one, two = np.mean(aurocs[:2]), np.mean(aurocs[2:])
    page = Page(tmp_path / "comparison.html")
    check_that_it_needs_nothing_else(page)
    for line in ("U-Net, seed 1  ", "Reversed AE, seed 0  ", "Their seeds overlap: ",
                 "and not what other seeds would give"):
        assert (line in text) == (line in (tmp_path / "comparison.md").read_text())
        assert line in text or line.startswith("Their seeds")  # which depends on the figures
        assert (line.strip() in text) == (line.strip() in page.text)
    row = re.search(r"U-Net, mean of 2 seeds +(0\.\d+)  (0\.\d+) to (0\.\d+)", text)
    assert float(row[1]) == pytest.approx(one, abs=6e-4) and row[2] < row[1] < row[3]
    sd = np.std(aurocs[:2], ddof=1)
    assert (f"seeds 0, 1: AUROC {min(aurocs[:2]):.3f} to {max(aurocs[:2]):.3f}, standard deviation "
            f"{sd:.3f}") in text
    verdicts = re.findall(r".* scores \d\.\d{3} higher than .*", text)
    assert [" alone" in v for v in verdicts] == [False, True, True]
    assert re.search(rf"scores {abs(one - two):.3f} higher than", text)
    assert "U-Net and Reversed AE, compared" in page.text
    assert [row[0] for row in page.rows[1:7]] == [
        "U-Net, seed 0", "U-Net, seed 1", "Reversed AE, seed 0", "Reversed AE, seed 1",
        "U-Net, mean of 2 seeds", "Reversed AE, mean of 2 seeds"]
    assert page.rows[5][1] == f"{row[1]} ({row[2]} to {row[3]})"
    assert re.search("python train.py --model unet .*--seed 1 ", page.text)
    with open(tmp_path / "comparison.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["run"], r["model"], r["seed"]) for r in rows] == [
        ("unet", "U-Net", "0"), ("unet-seed1", "U-Net", "1"),
        ("reversed_ae", "Reversed AE", "0"), ("reversed_ae-seed1", "Reversed AE", "1")]
    assert float(rows[3]["auroc_mean"]) == pytest.approx(two)
    # The same seed twice is not two seeds, and other settings are not either.
    one, two, copy = (load_run(f) for f in (folders[0], folders[2], tmp_path / "unet-seed2"))
    wider = dataclasses.replace(two, config=dataclasses.replace(two.config, width=5))
    assert list(group_by_seed([one, copy, wider, two]).values()) == [[0, 3], [1], [2]]


@pytest.mark.usefixtures("blank_pictures")
def test_a_rerun_gives_the_same_figures(runs: list[Path]) -> None:
    both = evaluate([runs[0], runs[0].parent / "." / runs[0].name], samples=40)  # the same
    assert both == evaluate(runs[0], samples=40) and len(both) == 1


@pytest.mark.usefixtures("blank_pictures")
def test_validation_may_be_looked_at_without_touching_test(runs: list[Path]) -> None:
    (metrics,) = evaluate(runs[0], split="val")
    assert metrics["split"] == "val" and metrics["specificity_at_threshold"] >= 0.95
    assert (runs[0] / "eval" / "synthetic-val" / "metrics.json").exists()


@pytest.mark.usefixtures("blank_pictures")
def test_an_external_test_says_so_and_overwrites_nothing(
    runs: list[Path], xrays: Path, capsys: pytest.CaptureFixture
) -> None:
    evaluate(runs[0], samples=40)
    before = (runs[0] / "eval" / "synthetic" / "metrics.json").read_bytes()
    (metrics,) = evaluate(runs[0], data=str(xrays))
    assert metrics["external"] and (metrics["n_normal"], metrics["n_abnormal"]) == (70, 12)
    assert "External test: trained on synthetic" in capsys.readouterr().out
    page = Page(runs[0].parent / "comparison.html")  # of one run, without masks or findings
    check_that_it_needs_nothing_else(page)
    assert "U-Net, tested" in page.text and "Reversed AE" not in page.text
    assert "Trained onthe built-in phantom" in page.text
    assert "Tested onreal images, as supplied" in page.text and "external test" in page.text
    assert "Where the maps point" not in page.text and len(page.drawings("ROC curves")) == 1
    assert page.rows[1][:2] == ["U-Net", "{:.3f} ({:.3f} to {:.3f})".format(
        metrics["auroc"], *metrics["auroc_ci"])]
    assert "external test: trained on synthetic" in evaluate_module.tested_on(metrics)
    assert not (runs[0] / "eval" / "xrays" / "healing.png").exists()  # of other normals
    evaluate(runs, data=str(xrays), samples=20)
    page = (runs[0].parent / "comparison.md").read_text()
    assert "External test: trained on synthetic" in page and "Trained on: synthetic" in page
    assert (runs[0] / "eval" / "xrays" / "metrics.json").exists()
    assert (runs[0] / "eval" / "synthetic" / "metrics.json").read_bytes() == before


def test_normals_alone_give_no_auroc_but_a_specificity(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for i in range(6):
        write_image(tmp_path / "normal" / f"{i}.png", i)
    (metrics,) = evaluate(runs[0], data=str(tmp_path))
    assert metrics["auroc"] is None and metrics["n_abnormal"] == 0
    assert metrics["specificity_at_threshold"] is not None
    assert "not computed" in capsys.readouterr().out
    page = Page(runs[0].parent / "comparison.html")
    check_that_it_needs_nothing_else(page)
    assert not page.drawings("ROC") and "clear difference" not in page.text
    low, high = (100 * end for end in metrics["specificity_ci"])
    assert page.rows[1] == ["U-Net", "-", "-", "-", "-", f"0.0 % ({low:.0f} to {high:.0f})"]
    assert "0 of 0 abnormal images missed" in page.text


@pytest.mark.usefixtures("blank_pictures")
def test_own_data_is_tested_on_the_test_split_of_split_csv_alone(
    xrays_run: Path, tmp_path: Path, xrays: Path
) -> None:
    folder = xrays_run
    (metrics,) = evaluate(folder)
    parts = read_splits(folder / "split.csv")
    with open(folder / "eval" / "xrays" / "scores.csv", newline="") as f:
        assert {r["key"] for r in csv.DictReader(f)} == {s.key for s in parts.test}
    assert metrics["n_abnormal"] == 12
    # The same images under another name are still the same data.
    copy = tmp_path / "copy"
    shutil.copytree(xrays, copy)
    assert evaluate(folder, data=str(copy))[0]["external"] is False


@pytest.mark.usefixtures("blank_pictures")
def test_runs_that_could_not_read_the_same_images_are_not_compared(
    runs: list[Path], xrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(run: Run, *arguments: object) -> Scored:
        scored = score_samples(run, *arguments)
        if run.config.model == "unet":
            return scored
        bad = {scored.samples[-1].key: "too large"}
        cut = ({k: v[:-1] for k, v in d.items()} for d in (scored.scores, scored.trivial))
        return Scored(scored.samples[:-1], *cut, bad)

    score_samples = evaluate_module.score_samples
    monkeypatch.setattr(evaluate_module, "score_samples", score)
    with pytest.raises(UserError, match=r"normal/\d+.png could be read for one of them only$"):
        evaluate(runs, data=str(xrays), samples=10)


def test_training_images_are_never_tested_on_under_another_path(
    xrays_run: Path, tmp_path: Path, xrays: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = xrays_run
    grown = tmp_path / "grown"
    shutil.copytree(xrays, grown)
    write_image(grown / "normal" / "new.png", 1000)
    evaluate(folder, data=str(grown))
    parts = read_splits(folder / "split.csv")
    with open(folder / "eval" / "grown" / "scores.csv", newline="") as f:
        tested = {r["key"] for r in csv.DictReader(f)}
    assert not tested & {s.key for s in parts.train + parts.val} and "normal/new.png" in tested
    assert "images left out: the run was trained or validated" in capsys.readouterr().out
    for s in parts.train[5:] + parts.val:  # of a few it is only said
        (grown / s.key).unlink()
    chosen, external, (note,) = samples_to_score(load_run(folder), FolderSource(str(grown)), "test")
    assert external and len(chosen) > 12 and note.startswith("5 of these images have the names of")
    # Named by a folder above that of the training data, their keys are others.
    inside = tmp_path / "above" / "grown"
    inside.parent.mkdir()
    grown.rename(inside)
    run = load_run(folder)
    run.config = dataclasses.replace(run.config, data=str(inside))
    chosen, external, (note,) = samples_to_score(run, FolderSource(str(inside.parent)), "test")
    assert external and note.startswith("5 images left out: the run was trained or validated on")
    assert not {s.key for s in chosen} & {f"grown/{s.key}" for s in parts.train[:5]}
    for s in parts.test:
        (inside / s.key).unlink()
    (inside / "normal/new.png").unlink()
    with pytest.raises(UserError, match="was trained or validated on all 5 images"):
        samples_to_score(run, FolderSource(str(inside.parent)), "test")


def test_data_that_has_changed_in_its_place_counts_as_it_is_now(
    xrays_run: Path, xrays: Path
) -> None:
    parts, run = read_splits(xrays_run / "split.csv"), load_run(xrays_run)
    source = FolderSource(str(xrays))
    corrected, gone = parts.test[0], {s.key for s in parts.train[: len(parts.train) // 2]}
    source.samples = [dataclasses.replace(s, label=1 - s.label) if s.key == corrected.key else s
                      for s in source.samples if s.key not in gone]
    chosen, external, (note,) = samples_to_score(run, source, "test")
    assert not external and len(chosen) == len(parts.test)
    assert chosen[0].key == corrected.key and chosen[0].label == 1 - corrected.label
    assert note == (f"1 images have another label or patient than at training, e.g. "
                    f"{corrected.key}; those of now count")
    # A source of Kaggle's does not know what is gone.
    known, read_one = {s.key: s for s in source.samples}, source.read
    with mock.patch.object(source, "read", lambda s: read_one(known[s.key])):
        assert len(evaluate_module.training_reference(run, source)) == len(parts.train) - len(gone)


def test_large_images_are_scored_within_the_memory_that_they_were_trained_in(
    runs: list[Path], xrays: Path
) -> None:
    run, source, streams = load_run(runs[0]), FolderSource(str(xrays)), []
    run.config = dataclasses.replace(run.config, image_size=1024, memory_limit_gb=0.25)

    def stream(*arguments: object, **settings: object) -> ImageStream:
        streams.append(ImageStream(*arguments, **settings))
        return streams[-1]

    def read_small(images: torch.Tensor, scorer: str) -> tuple:
        return load_run(runs[0]).read(images[..., ::32, ::32].contiguous(), scorer)

    with mock.patch.object(evaluate_module, "ImageStream", stream), mock.patch.object(
            run, "read", read_small, create=True):
        scored = evaluate_module.score_samples(run, source, source.samples[:12], "fused", None)
    assert len(scored.samples) == 12 and streams[0].memory.limit == 0.25 * 2**30
    assert 0 < streams[0].memory.peak_bytes <= streams[0].memory.limit


@pytest.mark.usefixtures("blank_pictures")
def test_an_external_test_works_without_the_training_data_and_keeps_results_apart(
    tmp_path: Path, xrays: Path, capsys: pytest.CaptureFixture
) -> None:
    training = tmp_path / "training"
    shutil.copytree(xrays, training)
    (folder,) = train(tiny(tmp_path, data=str(training), samples=None, epochs=1))
    shutil.rmtree(training)
    for above, n in (("a", 3), ("b", 4)):
        for i in range(n):
            write_image(tmp_path / above / "films" / "normal" / f"x{i}.png", i)
            write_image(tmp_path / above / "films" / "abnormal" / f"y{i}.png", 50 + i)
        (metrics,) = evaluate(folder, data=str(tmp_path / above / "films"))
        assert "PCA reconstruction error" not in metrics["baselines"]
    assert "two trivial scores are left out" in capsys.readouterr().out
    assert len(list((folder / "eval").iterdir())) == 2


@pytest.mark.usefixtures("blank_pictures")
def test_runs_of_one_model_and_of_different_sizes_can_be_compared(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (other,) = train(tiny(tmp_path, data="synthetic", image_size=48, epochs=1))
    evaluate([runs[0], other], samples=40)
    assert f"U-Net ({runs[0]})" in capsys.readouterr().out


def test_runs_on_different_data_are_not_compared(runs: list[Path], xrays_run: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be compared.*--data"):
        evaluate([runs[0], xrays_run], samples=40)


def test_prediction_gives_score_percentile_verdict_and_maps(
    runs: list[Path], xrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = tmp_path / "new"
    shutil.copytree(xrays / "abnormal", images)
    (images / "broken.png").write_bytes(b"x")
    rows = predict(runs[0], images, tmp_path / "out", "texture")
    assert len(rows) == 12
    out = capsys.readouterr().out
    assert "skipped   broken.png" in out and "Not a diagnosis" in out
    run = load_run(runs[0])
    threshold = run.scorer.threshold("texture", 0.95)
    for row in rows:
        assert row["verdict"] == ("abnormal" if row["score"] > threshold else "normal")
        map_ = np.load(tmp_path / "out" / row["image"].replace(".png", "_map.npy"))
        assert map_.shape == (32, 32) and map_.dtype == np.float32
        pixels = decode_image((images / row["image"]).read_bytes(), 32)
        x = torch.from_numpy(pixels.copy())[None, None].float() / 255
        with torch.no_grad():
            two = [read(run.model, each) for each in (x, moved(x, run.scorer.framing(x)))]
        means = [float(run.scorer.anomaly_map("texture", each).mean()) for each in two]
        assert row["score"] == pytest.approx(min(means), rel=1e-3)
        if means[0] <= means[1]:  # otherwise the map was moved back, and so lost an edge
            assert row["score"] == pytest.approx(map_.mean(), rel=1e-3)
        assert (tmp_path / "out" / row["image"].replace(".", "_heatmap.")).exists()
    with open(tmp_path / "out" / "predictions.csv", newline="") as f:
        assert [r["image"] for r in csv.DictReader(f)] == [r["image"] for r in rows]
    alone = predict(runs[0], images / rows[3]["image"], scorer="texture")
    assert alone == rows[3:4]
    film = images / rows[3]["image"]
    (row,) = predict(runs[0], film, tmp_path / "peak", "peak")
    pixels = torch.from_numpy(decode_image(film.read_bytes(), 32).copy())[None, None]
    _, scores, maps = load_run(runs[0]).read(pixels, "zscore")
    assert row["score"] == pytest.approx(float(scores["peak"]), rel=1e-6)  # saved rounded
    assert rows[3]["score"] == pytest.approx(float(scores["texture"]), rel=1e-6)
    saved = np.load(tmp_path / "peak" / film.name.replace(".png", "_map.npy"))
    assert np.array_equal(saved, maps[0, 0].numpy())
    assert (images / rows[3]["image"]).read_bytes() == (
        xrays / "abnormal" / rows[3]["image"]).read_bytes()
    assert (runs[0] / "predictions" / rows[3]["image"].replace(".", "_heatmap.")).exists()


def test_the_command_scores_an_image_into_the_folder_that_is_named(
    runs: list[Path], xrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture
) -> None:
    film = next(iter(sorted((xrays / "abnormal").iterdir())))
    flags = ["--image", str(film), "--out", str(tmp_path / "out"), "--scorer", "peak"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(runs[0]), *flags, "--device", "cpu"])
    evaluate_module.main()
    (row,) = csv.DictReader((tmp_path / "out" / "predictions.csv").open())
    assert (tmp_path / "out" / f"{film.stem}_heatmap.png").exists()
    assert predict(runs[0], film, tmp_path / "again", "peak")[0]["score"] == float(row["score"])
    assert f"{film.name}  score " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, runs), *flags])
    with pytest.raises(UserError, match="--image: give one run"):
        evaluate_module.main()


def test_long_names_of_nested_folders_are_cut_and_stay_apart(
    runs: list[Path], tmp_path: Path
) -> None:
    deep = tmp_path / "new" / "1.2.840.113619" / ("1." * 40 + "7") / ("2." * 40 + "8")
    for last in ("a", "b"):
        write_image(deep / last / ("9." * 40 + "1.png"))
    rows = predict(runs[0], tmp_path / "new", tmp_path / "out")
    assert len(rows) == 2 and len(list((tmp_path / "out").glob("*_heatmap.png"))) == 2


def test_a_run_in_which_lesions_leave_no_trace_says_so(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = load_checkpoint(runs[0] / "best.pt")
    for number, weight in enumerate((0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        trace = torch.full_like(state["scorer"]["trace"], weight)
        save_checkpoint(state | {"scorer": state["scorer"] | {"trace": trace}}, folder / "best.pt")
        load_run(folder)
        assert (f"lesions leave no trace in the reconstructions of {folder}"
                in capsys.readouterr().out) == (weight == 0)


@pytest.mark.parametrize("which", [0, 1])
def test_an_image_counts_as_in_the_framing_that_suits_it(
    runs: list[Path], which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(runs[which])
    films = torch.from_numpy(np.stack([
        np.roll(draw_phantom(i, 32)[0], i % 8 - 4 if i % 3 else 0, (0, 1)) for i in range(24)]))
    films = films[:, None]
    x = films.float() / 255
    shift = run.scorer.framing(x)
    away = int(shift.any(1).sum())
    assert 8 < away < 16
    with torch.no_grad():
        in_eights = [[read(run.model, part) for part in y.split(8)] for y in (x, moved(x, shift))]
    first, second = map(Reading.joined, in_eights)
    calls = mock.Mock(wraps=read)
    monkeypatch.setattr(train_module, "read", calls)
    two = [run.scorer.scores(r) for r in (first, second)]
    for name in ("zscore", "texture", "fused"):
        _, scores, maps = run.read(films, name)
        for scorer in SCORERS:
            if scorer != "fused":
                assert torch.equal(scores[scorer], torch.minimum(two[0][scorer], two[1][scorer]))
        assert (scores["fused"] <= torch.minimum(two[0]["fused"], two[1]["fused"])).all()
        back = moved(run.scorer.anomaly_map(name, second), -shift)
        decides = "zscore" if name == "fused" else name
        expected = torch.where((two[1][decides] < two[0][decides])[:, None, None, None], back,
                               run.scorer.anomaly_map(name, first))
        assert torch.equal(maps, expected)
    assert calls.call_count == 3 * (3 + 2)  # once more, and only those that lie elsewhere
    _, scores, _ = run.read(films[~shift.any(1)])
    assert torch.equal(scores["mse"], two[0]["mse"][~shift.any(1)]) and calls.call_count == 15 + 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are Unicode")
def test_an_interrupted_prediction_keeps_its_table_and_never_reads_its_own_pictures(
    runs: list[Path], xrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        shutil.copy(xrays / f"abnormal/{70 + i:03d}.png", tmp_path)
    shutil.copy(tmp_path / "070.png", os.fsencode(tmp_path) + b"/f\xfcnf.png")  # Latin-1
    drawn: list[Path] = []

    def draw(*arguments: object) -> None:
        drawn.append(arguments[-1])
        arguments[-1].touch()
        if len(drawn) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "draw_prediction", draw)
    with pytest.raises(KeyboardInterrupt):
        predict(runs[0], tmp_path, tmp_path / "out")
    with open(tmp_path / "out/predictions.csv", newline="") as f:
        assert [row["image"] for row in csv.DictReader(f)] == ["070.png", "071.png"]
    rows = predict(runs[0], tmp_path, tmp_path / "out")
    assert [row["image"] for row in rows] == ["070.png", "071.png", "072.png"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("which", [0, 1])
def test_scores_and_maps_of_an_image_are_bitwise_the_same_whatever_is_beside_it(
    runs: list[Path], which: int, precision: str
) -> None:
    run = load_run(runs[which])
    run.model, run.precision = place(run.model, run.device, precision), precision
    images = torch.randint(256, (21, 1, 32, 32), dtype=torch.uint8)
    _, scores, _ = run.read(images)
    own = {name: run.read(images, name)[2] for name in ("fused", *OWN_MAP)}
    groups = [[i] for i in range(21)] + [[20, 3], [5, 4, 3], list(range(19, 2, -1))]
    read_evenly, seen = train_module.read_evenly, {}

    def read_once(model: object, images: torch.Tensor, *where: object) -> list:
        """The network reads a group once, and all maps are made of that: a third of the time."""
        key = images.numpy().tobytes()
        if key not in seen:
            seen[key] = read_evenly(model, images, *where)
        return seen[key]

    with mock.patch.object(train_module, "read_evenly", read_once):
        for group in groups:
            seen.clear()
            for shown, maps in own.items():
                _, their_scores, their_maps = run.read(images[group], shown)
                assert torch.equal(their_maps, maps[group]), f"{shown} of {group}"
                for name in SCORERS:
                    assert torch.equal(their_scores[name], scores[name][group]), (
                        f"{name} of {group}")
    with run.weights_kept():
        for part in (images[:8], images[3:21]):
            one, kept = (run.read(part)[1] for _ in range(2))
            assert all(torch.equal(one[name], kept[name]) for name in SCORERS)
        kept = run.read(images)[1]
    assert all(torch.equal(kept[name], scores[name]) for name in SCORERS)


@pytest.mark.parametrize("which", [0, 1])
def test_scores_and_maps_in_bf16_are_close_to_those_in_fp32(runs: list[Path], which: int) -> None:
    run = load_run(runs[which])
    films = torch.from_numpy(np.stack([draw_phantom(i, 32)[0] for i in range(24)]))[:, None]
    found = []
    for precision in ("fp32", "bf16"):
        run.precision = precision
        found.append(run.read(films))
    (_, exact, exact_map), (_, rough, rough_map) = found
    assert not torch.equal(exact_map, rough_map)
    for name in ("zscore", "peak", "mae"):  # features of networks as small as these are rough
        spread = run.scorer.normal_scores[name].std()
        assert (rough[name] - exact[name]).abs().max() < 0.2 * spread, name
    assert (rough_map - exact_map).abs().max() < 0.2  # standard deviations of training normals


@pytest.mark.usefixtures("blank_pictures")
def test_a_film_gets_the_same_score_in_a_test_and_alone(
    runs: list[Path], xrays: Path
) -> None:
    evaluate(runs[1], data=str(xrays))
    with open(runs[1] / "eval" / "xrays" / "scores.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["label"] == "1"]
    for row in rows[::5]:
        (alone,) = predict(runs[1], xrays / row["key"])
        assert f"{alone['score']:.5g}" == f"{float(row['fused']):.5g}"
        assert alone["percentile_among_normals"] == float(row["fused_percentile"])


@pytest.mark.parametrize(("call", "says"), [
    (lambda run, tmp: evaluate(tmp / "nowhere"), "there is no run folder there"),
    (lambda run, tmp: evaluate(run / "best.pt"), "give the run folder"),
    (lambda run, tmp: evaluate(run, scorer="magic"), "--scorer magic: not one of"),
    (lambda run, tmp: evaluate(run, data=str(tmp / "gone")), "there is nothing at"),
    (lambda run, tmp: predict(run, tmp / "gone.png"), "there is nothing at"),
    (lambda run, tmp: predict(run, tmp), "no images in this folder (looked for .png"),
    (lambda run, tmp: evaluate(tmp), "holds no trained model, not even of one epoch; train one"),
    (lambda run, tmp: parse_arguments([]), "which run? Name its folder"),
    (lambda run, tmp: parse_arguments(["r", "--samples", "x"]), "--samples: 'x' is not a whole"),
    (lambda run, tmp: predict(run, Path(__file__)), "cannot be read as an image"),
    (lambda run, tmp: evaluate(run, split="train"), "--split: 'train'"),
    (lambda run, tmp: evaluate(run, device="gpu"), "--device: 'gpu' is not one of"),
    (lambda run, tmp: parse_arguments(["r", "--samples", "0"]), "--samples: 0 is less than 1"),
])
def test_bad_input_is_one_clear_line(
    runs: list[Path], tmp_path: Path, call: object, says: str
) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        call(runs[0], tmp_path)
    assert says in str(error.value)


@pytest.mark.usefixtures("blank_pictures")
def test_data_that_went_elsewhere_is_said_to_be_what_the_run_was_trained_on(
    xrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(xrays, tmp_path / "xrays")
    folder, = train(tiny(tmp_path, data=str(tmp_path / "xrays"), samples=None, epochs=1))
    (tmp_path / "xrays").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"was trained on it: if it lies elsewhere now, .* --data$"):
        evaluate(folder)
    assert evaluate(folder, data=str(tmp_path / "moved"))[0]["external"] is False
    # Without its training images all but two trivial scores can be had.
    (tmp_path / "moved").rename(tmp_path / "xrays")
    for s in read_splits(folder / "split.csv").train:
        (tmp_path / "xrays" / s.key).unlink()
    capsys.readouterr()
    assert len(evaluate(folder)[0]["baselines"]) == 4
    assert "note: two trivial scores are left out (none of the" in capsys.readouterr().out


def test_the_folder_above_the_runs_is_told_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/best.pt").touch()
    with pytest.raises(UserError, match=f"not a run folder itself; in it are {tmp_path}/unet$"):
        evaluate(tmp_path)


def test_an_unfinished_run_is_not_evaluated(runs: list[Path], tmp_path: Path) -> None:
    state = load_checkpoint(runs[0] / "best.pt")
    (tmp_path / "unet").mkdir()
    save_checkpoint(dict(state) | {"scorer": None}, tmp_path / "unet" / "best.pt")
    with pytest.raises(UserError, match=r"training has not finished.*--resume"):
        evaluate(tmp_path / "unet")


def test_calibrated_scores_travel_with_the_weights(runs: list[Path]) -> None:
    run = load_run(runs[1])
    parts = read_splits(runs[1] / "split.csv")
    source = evaluate_module.open_source(dataclasses.replace(run.config))
    scored = evaluate_module.score_samples(run, source, parts.normals("val"), "mse", None)
    for name in SCORERS:
        again = torch.from_numpy(np.sort(scored.scores[name]))
        assert torch.equal(again, run.scorer.normal_scores[name])
