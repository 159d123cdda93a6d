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
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from conftest import tiny, write_image, write_images
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import evaluate as ev
import models
from config import Config, UserError, parse_config
from data import FolderSource, Sample, decode_image, draw_phantom, read_splits
from models import SCORERS, Setup
from train import load_checkpoint, train, write_file

OTHER_READERS = (ev.IMAGE_ALONE, ev.UNTRAINED)


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def scored(labels: np.ndarray | list, scores: np.ndarray | list = (), run: object = None,
           **fields: str) -> ev.Result:
    """A test that is done: one image a patient, with scores by mse."""
    samples = [Sample(str(i), str(i), int(y), **{k: v[i] for k, v in fields.items()})
               for i, y in enumerate(labels)]
    return ev.Result(run, None, samples, "mse", scored={"mse": np.array(scores)})


@pytest.mark.parametrize("digits", [9, 0])  # equal scores, too
def test_auroc_and_average_precision_agree_with_scikit_learn(digits: int) -> None:
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 2, 200)
    scores = np.round(labels + rng.randn(200) * 1.5, digits)
    weights = rng.randint(0, 4, (5, 200)).astype(float)
    for ours, theirs in zip(ev.weighted_metrics(scores, labels, weights),
                            (roc_auc_score, average_precision_score), strict=True):
        expected = [theirs(labels, scores, sample_weight=w) for w in weights]
        assert ours == pytest.approx(expected, abs=1e-9)
    assert np.isnan(ev.weighted_metrics(scores, 0 * labels, weights)[0]).all()


def test_pixel_auroc_from_counts_agrees_with_scikit_learn() -> None:
    rng, t = np.random.RandomState(0), ev.Result(None, SimpleNamespace(boxes={}), [])
    masks = [rng.rand(1000) < 0.2 * i for i in range(5)]
    maps = [np.abs(rng.randn(1000)) * 10.0 ** (i - 2) + mask for i, mask in enumerate(masks)]
    maps[0][:300] = 0
    for map_, mask in zip(maps, masks, strict=True):
        ev.locate(t, map_, mask)
    wanted = roc_auc_score(np.concatenate(masks), np.concatenate(maps))
    assert ev.localisation(t)["pixel_auroc"] == pytest.approx(wanted, abs=1e-4)
    t.pixels[0] = 0
    assert ev.localisation(t)["pixel_auroc"] is None


def test_the_bootstrap_draws_patients_not_images() -> None:
    patients = ["a"] * 5 + ["b", "c", "d"]
    weights = ev.patient_weights(patients, 500)
    assert (weights[0] == 1).all() and len(weights) == 501
    assert (weights[:, :5] == weights[:, :1]).all()
    assert (weights[:, [0, 5, 6, 7]].sum(1) == 4).all()
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.15)
    assert np.array_equal(weights, ev.patient_weights(patients, 500))


@pytest.mark.curves
def test_misses_and_false_alarms_are_shown_the_worst_first(
        runs: list[Path], tmp_path: Path) -> None:
    t = scored([0, 0, 0, 1, 1, 1], [0.2, 0.9, 0.6, 0.4, 0.1, 0.5], ev.load_run(runs[0]))
    t.metrics = {"threshold": 0.5}
    assert ev.worst(t) == ([4, 3, 5], [1, 2])
    t.source, t.folder = SimpleNamespace(spec="synthetic", title=""), tmp_path
    ev.draw_cases(t, "worst.png", "none", [], [])  # where there is no mistake
    assert (tmp_path / "worst.png").exists()


@pytest.mark.parametrize(("threshold", "validation", "of_normals", "says"), [
    (0.5, 100, 100, "reaches 0.800 (0.711 to 0.867) on these normals"), (0.5, 100, 5, None),
    (0.5, 8, 100, "8 validation normals the threshold is rough: it cannot hold"),  # nor is a drift
    (0.5, 50, 5, "50 validation normals the threshold is rough"), (0.9, 100, 100, None)])
def test_a_threshold_that_does_not_hold_is_warned_of_where_that_is_no_chance(
    runs: list[Path], threshold: float, validation: int, of_normals: int, says: str | None
) -> None:
    run = ev.load_run(runs[0])
    run.scorer.normal_scores = {"mse": torch.full((validation,), threshold, dtype=torch.float64)}
    scores = np.append(np.where(np.arange(of_normals) % 5, 0.4, 0.8), [0.9, 0.9])
    t = scored([0] * of_normals + [1, 1], scores, run)
    t.metrics = ev.measure(t, "mse", np.ones((2, len(scores)))) | {
        "data_fingerprint": run.fingerprint}
    found = [*ev.cautions([t])]
    assert len(found) == bool(says) and (not says or says in found[0])
    if of_normals == 100 and says:  # Brown, Cai and DasGupta 2001, and any textbook
        assert t.metrics["specificity_ci"] == pytest.approx((0.711, 0.867), abs=1e-3)


def test_the_chance_of_so_few_normals_under_a_threshold_is_that_of_drawing_both_anew(
        runs: list[Path]) -> None:
    run, rng = ev.load_run(runs[0]), np.random.RandomState(0)
    run.scorer.normal_scores = {"mse": torch.arange(20, dtype=torch.float64)}
    t = scored([0] * 9, [0] * 7 + [30, 30], run)
    thresholds = np.sort(rng.rand(20_000, 20))[:, 19]  # the one of 20 that 95 % stay under
    under = (rng.rand(20_000, 9) <= thresholds[:, None]).sum(1)
    chance = ev.measure(t, "mse", np.ones((2, 9)))["specificity_chance"]
    assert (under <= 7).mean() == pytest.approx(chance, abs=0.01)


@pytest.mark.parametrize(("difference", "low", "high", "says"), [
    (-0.10, -0.15, -0.05, "clearly below B, by 0.100 (0.050 to 0.150)"),
    (-0.03, -0.07, 0.01, "not clearly below B, by 0.030 (-0.010 to 0.070)"),
    # As shown: an interval that reads "0.000 to 0.041" does not leave out 0.
    (0.02, 0.0004, 0.041, "not clearly above B, by 0.020 (0.000 to 0.041)"),
    (0.02, 0.0006, 0.041, "clearly above B, by 0.020 (0.001 to 0.041)"),
    (-0.02, -0.041, -0.0004, "not clearly below B, by 0.020 (0.000 to 0.041)")])
def test_the_verdict_says_which_is_better_and_whether_it_is_clear(
        difference: float, low: float, high: float, says: str) -> None:
    assert ev.verdict("B", difference, low, high) == says


@pytest.mark.parametrize(("skill_a", "skill_b", "says"), [
    (0.5, 2.0, "clearly above A"), (1.0, 1.0, "not clearly (above|below) A"),
    (2.0, 0.5, "clearly below A")])
def test_the_verdict_is_right_on_a_constructed_win_tie_and_loss(
        skill_a: float, skill_b: float, says: str) -> None:
    rng, labels = np.random.RandomState(0), np.repeat([0, 1], 150)
    a, b = (skill * labels + rng.randn(300) for skill in (skill_a, skill_b))
    weights = ev.patient_weights([str(i // 2) for i in range(300)])
    difference, low, high = ev.paired_difference(a, b, labels, weights)
    assert low < difference < high
    assert re.match(says, ev.verdict("A", difference, low, high))
    # Pairing makes a small but steady difference clear: a little better on every abnormal image.
    found = ev.paired_difference(a, a + 0.15 * labels, labels, weights)
    assert ev.verdict("A", *found).startswith("clearly above A")


def test_the_difference_of_several_seeds_is_that_of_their_mean_aurocs() -> None:
    rng, labels = np.random.RandomState(2), np.repeat([0, 1], 100)
    a, b = labels + rng.randn(3, 200) * 1.5, labels * 1.2 + rng.randn(2, 200)
    weights = ev.patient_weights([str(i) for i in range(200)], 100)
    means = [np.array([np.mean([roc_auc_score(labels, s, sample_weight=w) for s in seeds])
                       for w in weights]) for seeds in (a, b)]
    drawn = means[1] - means[0]
    assert ev.paired_difference(a, b, labels, weights) == pytest.approx(
        (drawn[0], *ev.interval(drawn[1:])), abs=1e-9)


def test_subgroups_by_view_are_measured_within_the_view() -> None:
    views, labels = ["PA"] * 4 + ["AP"] * 4 + [""] * 2, [0, 0, 1, 1, 0, 0, 1, 1, 0, 1]
    scores = np.array([1, 2, 3, 4, 13, 14, 11, 12, 0, 0.5])
    assert ev.by_group(scored(labels, view=views), scores, "view") == {
        "PA": {"auroc": 1.0, "n": 4}, "AP": {"auroc": 0.0, "n": 4}}
    assert ev.by_group(scored(labels, view=["PA"] * 10), scores, "view") == {}
    assert ev.by_group(scored(labels, finding=[""] * 10), scores, "finding") == {}
    findings = ["", "", "a", "b", "", "", "a", "b", "", "b"]
    assert ev.by_group(scored(labels, finding=findings), scores, "finding") == {
        "b": {"auroc": pytest.approx(7 / 15), "n": 3}, "a": {"auroc": pytest.approx(0.6), "n": 2}}


def test_a_peak_counts_in_the_lesion_or_just_beside_it_by_lesion_size() -> None:
    mask = np.zeros((100, 100), bool)
    mask[20:30, 20:30] = True
    t = ev.Result(None, SimpleNamespace(boxes=True), [])
    for y, x in ((25, 25), (32, 25), (33, 25), (80, 80)):
        map_ = np.zeros((100, 100))
        map_[y, x] = 1
        ev.locate(t, map_, mask)
    assert t.located == [(True, 1, 0.01), (True, 0, 0.01), (False, 0, 0.01), (False, 0, 0.01)]
    assert not np.any(t.pixels)  # a box holds much besides its lesion
    t.located = [(True, 0.5, 0.2), (True, 0.4, 0.3), (True, 0.2, 0.02), (False, 0.1, 0.01)]
    assert ev.localisation(t) == {
        "n_located": 4, "pixel_auroc": None, "peak_in_lesion": 0.75, "peak_in_small_lesion": 0.5,
        "peak_in_large_lesion": 1, "energy_in_lesion": pytest.approx(0.3),
        "lesion_area": pytest.approx(0.1325), "peak_tolerance": ev.PEAK_TOLERANCE}


def test_maps_are_held_against_the_boxes_of_nih(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "nih"
    write_images(folder / "images", 8)
    (folder / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Patient ID,View Position\n" + "".join(
            f"00{i}.png,{'Nodule' if i < 3 else 'No Finding'},{i},{'PA' if i % 2 else 'AP'}\n"
            for i in range(8)))
    # The first box is the whole image, where every peak must lie; the second a corner.
    (folder / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n000.png,Nodule,0,0,1024,1024,,,\n"
        "001.png,Nodule,0,0,32,32,,,\n")
    (metrics,) = ev.evaluate(runs[0], data=str(folder))
    assert metrics["n_located"] == 2 and metrics["pixel_auroc"] is None
    assert metrics["peak_in_large_lesion"] == 1
    assert metrics["lesion_area"] == pytest.approx((1 + 1 / 1024) / 2)
    assert 0.5 < metrics["energy_in_lesion"] < 0.51
    assert set(metrics["auroc_by_view"]) == {"PA", "AP"}


@pytest.mark.curves
def test_evaluation_writes_metrics_scores_and_pictures(
        runs: list[Path], capsys: pytest.CaptureFixture) -> None:
    (metrics,) = ev.evaluate(runs[0])
    text, folder = capsys.readouterr().out, runs[0] / "eval" / "synthetic"
    assert {p.name for p in folder.iterdir()} == {
        "metrics.json", "scores.csv", "report.html", *ev.PICTURES}
    assert not (runs[0].parent / "comparison.html").exists()
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["auroc"] == metrics["auroc"] and set(saved) >= {
        "average_precision", "sensitivity_at_90_specificity", "reconstruction_mse",
        "reconstruction_ssim", "specificity_at_threshold", "data"}
    assert (saved["n_normal"], saved["n_abnormal"], saved["scorer"]) == (100, 100, "reader")
    assert not saved["external"]
    # The figures must follow from the scores in the table beside them.
    rows = rows_of(folder / "scores.csv")
    labels, scores, percentiles = (np.array([float(r[k]) for r in rows]) for k in (
        "label", "reader", "reader_percentile"))
    assert roc_auc_score(labels, scores) == pytest.approx(saved["auroc"], abs=1e-3)
    threshold = ev.load_run(runs[0]).scorer.threshold("reader", 0.95)
    assert saved["threshold"] == threshold
    for value, (low, high) in ((saved["auroc"], saved["auroc_ci"]), *(
            (value, saved["baselines_ci"][name]) for name, value in saved["baselines"].items())):
        assert low < value < high
    for name, value in saved["baselines"].items():
        assert value >= 0.5 or name in OTHER_READERS  # each in its better direction
    assert set(saved["baselines"]) > {"haze", "local contrast", *OTHER_READERS}
    assert all(re.search(f"clearly (above|below) {name}, by ", text) for name in OTHER_READERS)
    assert (scores[labels == 1] > threshold).mean() == pytest.approx(
        saved["sensitivity_at_95_specificity"], abs=0.011)
    reached, (low, high) = saved["specificity_at_threshold"], saved["specificity_ci"]
    assert low < reached <= high
    assert f"{reached:.3f} ({low:.3f} to {high:.3f})" in text
    assert ((percentiles > 95) == (scores > threshold)).all()
    assert 0 <= saved["pixel_auroc"] <= 1 and saved["n_located"] == 100
    assert set(saved["auroc_by_finding"]) == {"opacity", "nodule", "effusion", "missing", "doubled"}
    assert "PCA reconstruction error" in text
    for name in ev.PICTURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
    page = Page(folder / "report.html")
    assert len(page.pictures) == 5 and "U-Net, tested" in page.text


class Page(HTMLParser):
    """What a browser would find in a page, minus the layout. It must be one file, without scripts,
    that fetches nothing, tells nothing of the machine, and that a screen reader can follow."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source, self.text = file.read_text(encoding="utf-8"), ""
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.feed(self.source)
        self.pictures = [a["alt"] for t, a in self.tags if t == "img"]
        assert not re.search(r"https?:|@import|url\(", self.source) and len(self.source) < 3e6
        assert "default-src 'none'" in self.source and "/tmp/" not in self.text
        names = {t for t, a in self.tags if a.get("rel") != "icon"}
        assert not {"script", "link", "iframe", "object"} & names
        assert {"main", "header", "footer", "caption", "figcaption"} <= names
        levels = [int(t[1]) for t, _ in self.tags if re.fullmatch("h[1-6]", t)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
        assert ("html", {"lang": "en"}) in self.tags

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        for name in ("src", "href", "srcset", "data", "action"):
            assert found.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in found)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            assert tag == "td" or found["scope"] in ("col", "row")
        elif tag == "img":
            kind, content = found["src"].split(";base64,")
            with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
                image.load()
            assert kind == "data:image/png" and found["alt"].strip()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")


@pytest.mark.curves
def test_two_runs_are_compared_on_the_same_images(
        runs: list[Path], capsys: pytest.CaptureFixture) -> None:
    ev.evaluate(runs, scorer="all")
    text, compared = capsys.readouterr().out, runs[0].parent
    results = [json.loads((run / "eval/synthetic/metrics.json").read_text()) for run in runs]
    assert set(results[0]["scorers"]) == set(SCORERS)
    with Image.open(compared / "comparison.png") as picture:
        assert min(picture.size) > 500
    page = Page(compared / "comparison.html")

    def told(value: float, ends: tuple[float, float]) -> str:
        return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"

    for name, saved in zip(("U-Net", "Reversed AE"), results, strict=True):
        for title, m in ((name, saved), (f"{name}, zscore", saved["scorers"]["zscore"])):
            row = next(row for row in page.rows if row[0] == title)
            assert row[1:] == [
                told(m["auroc"], m["auroc_ci"]),
                told(m["average_precision"], m["average_precision_ci"]),
                f"{m['sensitivity_at_95_specificity']:.3f}",
                told(m["specificity_at_threshold"], m["specificity_ci"])]
            assert re.search(r"  +".join(map(re.escape, row)), text)  # the same on the screen
    for name in results[0]["baselines"]:
        assert [name, *(f"{r['baselines'][name]:.3f}" for r in results)] in page.rows
    assert ["nodule", "20", *(f"{r['auroc_by_finding']['nodule']['auroc']:.3f}"
                              for r in results)] in page.rows
    assert len(page.pictures) == 1 + 2 * 4  # the comparison; examples, worst, healing, curves
    counts = [sum(p.numel() for p in ev.load_run(run).model.parameters()) for run in runs]
    for what in ("Research use only", "not real X-rays", "100 normal and 100 abnormal",
                 "python train.py --model unet", "--latent-dim 8", results[0]["data_fingerprint"],
                 torch.__version__, *(f"{count:,} parameters, epoch" for count in counts)):
        assert what in page.text


@pytest.mark.curves
def test_names_in_the_page_are_only_names(runs: list[Path], tmp_path: Path) -> None:
    bad, finding = "<script>alert(1)<img src=x onerror=y> &amp; \" ' $x$ $body", '"><b onclick=$_$>'
    for i in range(8):
        write_image(tmp_path / "data" / "good" / f"{i} {bad}.png", i)
        write_image(tmp_path / "data" / finding / f"={i} {bad}.png", 10 + i)
    folder = tmp_path / f"<u>{bad}" / "<i>"
    shutil.copytree(runs[0], folder)
    # Nor does LaTeX, which a user may draw all texts with, see them.
    with mock.patch.dict(matplotlib.rcParams, {"text.usetex": True, "text.parse_math": True}):
        ev.evaluate(folder, data=str(tmp_path / "data"))
        assert matplotlib.rcParams["text.usetex"]
    page = Page(folder / "eval/data/report.html")
    assert not {"u", "i", "b", "script"} & {t for t, _ in page.tags}
    assert finding in page.text and "U-Net (<i>), tested" in page.text
    assert "in data; an external test" in page.text and str(tmp_path) not in page.text
    keys = [r["key"] for r in rows_of(folder / "eval/data/scores.csv")]
    assert f"good/0 {bad}.png" in keys and len(keys) == 16
    ev.write_csv(tmp_path / "x.csv", [{"name": "=1+1", "score": -0.5}])  # no formula either
    assert (tmp_path / "x.csv").read_text() == "name,score\n'=1+1,-0.5\n"


def test_the_command_in_the_page_trains_the_same_run() -> None:
    config = Config(model="reversed_ae", data="my images/a'b", samples=7, batch_size=4,
                    augment=False, deterministic=True, learning_rate=2e-4, output_dir="other")
    words = shlex.split(ev.command_to_train(config))
    assert words[:2] == ["python", "train.py"]
    assert parse_config(words[2:], environ={}) == config
    assert ev.command_to_train(Config()) == "python train.py --model unet"


def test_seeds_of_a_model_are_averaged_and_compared_as_one(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = train(tiny(tmp_path, data="synthetic", epochs=1, model="both", seeds=2))
    shutil.copytree(folders[0], tmp_path / "unet again")  # no name that a run is given
    capsys.readouterr()
    results, text = ev.evaluate(tmp_path, samples=100), capsys.readouterr().out
    aurocs = [r["auroc"] for r in results]
    one, two = np.mean(aurocs[:2]), np.mean(aurocs[2:])
    page = Page(tmp_path / "comparison.html")
    assert [row[0] for row in page.rows[1:5]] == [
        "U-Net, seed 0", "U-Net, seed 1", "Reversed AE, seed 0", "Reversed AE, seed 1"]
    spread = np.std(aurocs[:2], ddof=1), min(aurocs[:2]), max(aurocs[:2])
    over_seeds = ["U-Net", "2", *(f"{x:.3f}" for x in (one, *spread))]
    assert over_seeds in page.rows and re.search(r" +".join(over_seeds), text)
    verdicts = re.findall("AUROC of .*, with .*", text)
    side = "above" if one >= two else "below"
    assert re.search(rf"U-Net, with .*: (not )?clearly {side} Reversed AE, by "
                     rf"{abs(one - two):.3f} \(", verdicts[0]) and len(verdicts) == 2
    assert all(name in v for v in verdicts for name in OTHER_READERS)
    assert all(v in page.text for v in verdicts)
    assert "U-Net and Reversed AE, compared" in page.text
    assert re.search("python train.py --model unet .*--seed 1 ", page.text)
    # The same seed twice is not two seeds, and other settings are not either.
    first, other, copy = (ev.load_run(f) for f in (folders[0], folders[2], tmp_path / "unet again"))
    wider = dataclasses.replace(other, config=dataclasses.replace(other.config, width=5))
    assert list(ev.group_by_seed([first, copy, wider, other]).values()) == [
        [first, other], [copy], [wider]]


def test_validation_may_be_looked_at_without_touching_test(runs: list[Path]) -> None:
    above = runs[0].parent
    drawn = ev.evaluate(runs, samples=40)[0]
    before = (above / "comparison.html").read_bytes()
    assert ev.evaluate(runs[0], samples=40) == [drawn]  # always the same images
    ev.evaluate(runs, split="val", samples=40)
    assert (above / "comparison.html").read_bytes() == before
    assert (above / "comparison-synthetic-val.html").exists()
    twice = [runs[0], above / "." / runs[0].name]  # are one
    (metrics,) = ev.evaluate(twice, split="val")
    assert [metrics] == ev.evaluate(runs[0], split="val")
    assert metrics["split"] == "val" and metrics["specificity_at_threshold"] >= 0.95
    folder = runs[0] / "eval" / "synthetic-val"
    assert (folder / "metrics.json").exists() and "Val images" in Page(folder / "report.html").text


def test_an_external_test_says_so_and_overwrites_nothing(
        runs: list[Path], xrays: Path, capsys: pytest.CaptureFixture) -> None:
    ev.evaluate(runs[0], samples=40)
    before = (runs[0] / "eval/synthetic/metrics.json").read_bytes()
    (metrics,) = ev.evaluate(runs[0], data=str(xrays))
    assert metrics["external"] and (metrics["n_normal"], metrics["n_abnormal"]) == (70, 12)
    assert "external test: nothing is fitted" in capsys.readouterr().out
    page = Page(runs[0] / "eval/xrays/report.html")  # without masks or findings
    assert "U-Net, tested" in page.text and "Reversed AE" not in page.text
    assert "Where the maps point" not in page.text and len(page.pictures) == 4
    assert page.rows[1][1] == "{:.3f} ({:.3f} to {:.3f})".format(
        metrics["auroc"], *metrics["auroc_ci"])
    assert not (runs[0] / "eval/xrays/healing.png").exists()  # of other normals
    drawn = ev.evaluate(runs, data=str(xrays), samples=40)[0]  # evenly, as far as there are any
    assert (drawn["n_normal"], drawn["n_abnormal"]) == (28, 12)
    told = Page(runs[0].parent / "comparison-xrays.html").text
    assert "in xrays; an external test" in told and "Trained onsynthetic" in told
    assert (runs[0] / "eval/synthetic/metrics.json").read_bytes() == before


def test_normals_alone_give_no_auroc_but_a_specificity(
        runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "normal", 6)
    (metrics,) = ev.evaluate(runs[0], data=str(tmp_path))
    assert metrics["auroc"] is None and metrics["n_abnormal"] == 0
    assert "not computed" in capsys.readouterr().out
    page = Page(next((runs[0] / "eval" / tmp_path.name).glob("*.html")))
    assert "clearly" not in page.text
    low, high = metrics["specificity_ci"]
    assert page.rows[1] == ["U-Net", "-", "-", "-", f"0.000 ({low:.3f} to {high:.3f})"]


def test_training_images_are_never_tested_on_under_another_path(
        xrays_run: Path, tmp_path: Path, xrays: Path, capsys: pytest.CaptureFixture) -> None:
    def tested(folder: Path) -> tuple[dict, set[str]]:
        (metrics,) = ev.evaluate(xrays_run, data=str(folder))
        return metrics, {r["key"] for r in rows_of(xrays_run / f"eval/{folder.name}/scores.csv")}

    parts, grown = read_splits(xrays_run / "split.csv"), tmp_path / "grown"
    for copy in (tmp_path / "copy", grown):
        shutil.copytree(xrays, copy)
    for folder in (xrays, tmp_path / "copy"):  # the same data under another name
        metrics, keys = tested(folder)
        assert keys == {s.key for s in parts.test} and not metrics["external"]
    write_image(grown / "normal" / "new.png", 1000)
    _, keys = tested(grown)
    assert not keys & {s.key for s in parts.train + parts.val} and "normal/new.png" in keys
    assert "images left out: the run was trained or validated" in capsys.readouterr().out
    for s in parts.train[5:] + parts.val:  # of a few it is only said
        (grown / s.key).unlink()
    run = ev.load_run(xrays_run)
    chosen, external, (note,) = ev.samples_to_score(run, FolderSource(str(grown)), "test")
    assert external and len(chosen) > 12 and note.startswith("5 of these images have the names of")
    # Named by a folder above that of the training data, their keys are others.
    inside = tmp_path / "above" / "grown"
    inside.parent.mkdir()
    grown.rename(inside)
    run.config = dataclasses.replace(run.config, data=str(inside))
    chosen, external, (note,) = ev.samples_to_score(run, FolderSource(str(inside.parent)), "test")
    assert external and note.startswith("5 images left out: the run was trained or validated on")
    assert not {s.key for s in chosen} & {f"grown/{s.key}" for s in parts.train[:5]}
    for s in parts.test:
        (inside / s.key).unlink()
    (inside / "normal/new.png").unlink()
    with pytest.raises(UserError, match="was trained or validated on all 5 images"):
        ev.samples_to_score(run, FolderSource(str(inside.parent)), "test")


def test_data_that_has_changed_in_its_place_counts_as_it_is_now(
        xrays_run: Path, xrays: Path) -> None:
    parts, run = read_splits(xrays_run / "split.csv"), ev.load_run(xrays_run)
    source, corrected = FolderSource(str(xrays)), parts.test[0]
    gone = {s.key for s in parts.train[: len(parts.train) // 2]}
    known = {s.key: s for s in source.samples if s.key not in gone}
    known[corrected.key] = dataclasses.replace(corrected, label=1 - corrected.label)
    source.samples = list(known.values())
    chosen, external, (note,) = ev.samples_to_score(run, source, "test")
    assert not external and len(chosen) == len(parts.test)
    assert chosen[0].key == corrected.key and chosen[0].label == 1 - corrected.label
    assert note == (f"1 images have another label or patient than at training, e.g. "
                    f"{corrected.key}; those of now count")
    # A source of Kaggle's does not know what is gone.
    read_one = source.read
    with mock.patch.object(source, "read", lambda s: read_one(known[s.key])):
        assert len(run.some_normals(source, "train", 400)) == len(parts.train) - len(gone)


def test_large_images_are_scored_within_the_memory_that_they_were_trained_in(
        runs: list[Path], xrays: Path) -> None:
    run, score, source = ev.load_run(runs[0]), ev.load_run(runs[0]).score, FolderSource(str(xrays))
    run.config = dataclasses.replace(run.config, image_size=1024, memory_limit_gb=0.25)
    run.scorer.mean_image = torch.rand(1, 1024, 1024)
    t, streams, stream = ev.Result(run, source, source.samples[:12]), [], run.stream
    run.stream = lambda *given, **more: streams.append(stream(*given, **more)) or streams[-1]
    with mock.patch.object(ev.TrainedRun, "score", lambda self, images: score(
            images[..., ::32, ::32].contiguous())), mock.patch.object(models, "untrained_model"):
        ev.score_samples(t)
    assert len(t.samples) == 12 and streams[0].memory.limit == 0.25 * 2**30
    assert 0 < streams[0].memory.peak_bytes <= streams[0].memory.limit


def test_runs_of_different_sizes_are_compared_but_not_on_different_images(
        runs: list[Path], xrays: Path, xrays_run: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (other,) = train(tiny(tmp_path, data="synthetic", image_size=48, epochs=1))
    ev.evaluate([runs[0], other], samples=40)
    out = capsys.readouterr().out
    assert len(set(re.findall(r"U-Net \([^)]*/unet\)", out))) == 2 and "comparison.html" in out
    with pytest.raises(UserError, match=r"cannot be compared.*--data.*the runs to"):
        ev.evaluate([runs[0], xrays_run], samples=40)

    def score(t: ev.Result, trivial: object) -> None:
        score_samples(t, trivial)
        t.bad = {} if t.run.config.model == "unet" else {t.samples[-1].key: "too large"}

    score_samples = ev.score_samples
    monkeypatch.setattr(ev, "score_samples", score)
    with pytest.raises(UserError, match=r"normal/\d+.png could be read for one of them only$"):
        ev.evaluate(runs, data=str(xrays), samples=10)


@pytest.mark.curves
def test_prediction_gives_score_percentile_verdict_and_maps(
        runs: list[Path], xrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    images, out, run = tmp_path / "new", tmp_path / "out", ev.load_run(runs[0])
    shutil.copytree(xrays / "abnormal", images)
    (images / "broken.png").write_bytes(b"x")
    rows, text = ev.predict(runs[0], images, out, "zscore"), capsys.readouterr().out
    assert "skipped   broken.png" in text and "Not a diagnosis" in text and len(rows) == 12
    threshold = run.scorer.threshold("zscore", 0.95)
    for row in rows:
        assert row["verdict"] == ("abnormal" if row["score"] > threshold else "normal")
        map_ = np.load(out / row["image"].replace(".png", "_map.npy"))
        assert map_.shape == (32, 32) and map_.dtype == np.float32
        assert map_[int(32 * row["peak_y"]), int(32 * row["peak_x"])] == map_.max()
        assert (out / row["image"].replace(".", "_heatmap.")).exists()
    assert [r["image"] for r in rows_of(out / "predictions.csv")] == [r["image"] for r in rows]
    image = images / rows[3]["image"]
    assert ev.predict(runs[0], image, scorer="zscore") == rows[3:4]
    other = tmp_path / "other"  # the same by the command
    flags = ["--image", str(image), "--out", str(other), "--scorer", "reader", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(runs[0]), *flags])
    ev.main()
    (row,) = rows_of(other / "predictions.csv")
    pixels = torch.from_numpy(decode_image(image.read_bytes(), 32).copy())[None, None]
    _, scores, maps = run.score(pixels)
    for score, scorer in ((row["score"], "reader"), (rows[3]["score"], "zscore")):
        assert float(score) == pytest.approx(float(scores[scorer]), abs=1e-6)  # saved rounded
    saved = np.load(other / f"{image.stem}_map.npy")
    assert np.array_equal(saved, maps["reader"][0, 0].numpy())
    # Another prediction does not replace the earlier one.
    ev.predict(runs[0], image, scorer="mse")
    for folder in ("predictions", "predictions-2"):
        assert (runs[0] / folder / image.name.replace(".", "_heatmap.")).exists()


def test_what_could_not_be_written_or_held_is_refused_before_scoring(
        runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "huge.png", "wb") as f:
        f.truncate(1 << 30)  # takes no room on the disk; an eighth of 4 GB may be read
    with pytest.raises(UserError, match=r"huge.png: cannot be read .*needs 1,073\.7 MB at once"):
        ev.predict(runs[0], tmp_path / "huge.png", tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(ev, "score_samples", mock.Mock(side_effect=AssertionError))
    with pytest.raises(UserError, match=rf"^{runs[0]}: results cannot be written there$"):
        ev.evaluate(runs[0])


def test_arrays_give_reconstructions_maps_and_scores(runs: list[Path]) -> None:
    run = ev.load_run(runs[0])
    images = np.stack([draw_phantom(i, 32)[0] for i in range(70)])[:, None]
    reconstruction, anomaly_map, score = run(images, "zscore")
    assert reconstruction.shape == anomaly_map.shape == images.shape and score.shape == (70,)
    output, scores, maps = run.score(torch.from_numpy(images[:3]))
    with_skips, from_latent = output.reconstructions.numpy().swapaxes(0, 1)[:, :, None]
    assert np.array_equal(reconstruction[:3], from_latent)
    assert np.array_equal(run(images[:3], "mse")[0], with_skips)
    assert np.array_equal(score[:3], scores["zscore"])
    assert np.array_equal(anomaly_map[:3], maps["zscore"])
    again = run(torch.from_numpy(images[:3]).float() / 255, "zscore")
    assert np.array_equal(again[2], score[:3])
    for wrong in (images[0], images[:0], images[..., 1:], images / 100 + 1, images.astype(int)):
        with pytest.raises(UserError, match=r"^images: \[n,1,32,32\] in uint8, or float in"):
            run(wrong)


def test_names_of_results_stay_apart_and_short_enough() -> None:
    deep = "1.2.840.113619/" + "1." * 40 + "7/" + "2." * 40 + "8/"
    names = ["a.png", "b.png", "b.jpg", "q/b.png", "q__b.png", "C.png", "c.bmp",
             *(f"{deep}{last}/{'9.' * 40}1.png" for last in "ab")]
    stems = ev.distinct_stems(names)
    assert stems[0] == "a" and len({stem.lower() for stem in stems}) == len(names)
    assert max(map(len, stems)) <= 200 and not any("/" in stem for stem in stems)
    assert ev.distinct_stems(names[1:2]) == ["b"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are Unicode")
def test_an_interrupted_prediction_keeps_its_table_and_never_reads_its_own_pictures(
        runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 3, 70)
    shutil.copy(tmp_path / "070.png", os.fsencode(tmp_path) + b"/f\xfcnf.png")  # Latin-1
    os.mkfifo(tmp_path / "pipe.png")  # whoever reads it waits for ever
    # Drawing is interrupted at the second picture; those of the second try are not looked at.
    draw = mock.Mock(side_effect=[None, KeyboardInterrupt, *[None] * 3])
    monkeypatch.setattr(ev, "save_picture", lambda file, *_: file.touch() or draw())
    with pytest.raises(KeyboardInterrupt):
        ev.predict(runs[0], tmp_path, tmp_path / "out")
    assert [row["image"] for row in rows_of(tmp_path / "out/predictions.csv")] == [
        "070.png", "071.png"]
    rows = ev.predict(runs[0], tmp_path, tmp_path / "out")
    assert [row["image"] for row in rows] == ["070.png", "071.png", "072.png"]
    assert (tmp_path / "out-2/predictions.csv").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_scores_in_bf16_are_close_and_do_not_depend_on_the_other_images(
        runs: list[Path], which: int) -> None:
    run = ev.load_run(runs[which])
    images = torch.from_numpy(np.stack([draw_phantom(i, 32)[0] for i in range(21)]))[:, None]
    _, exact, exact_map = run.score(images)
    run.setup = Setup(run.setup.device, "bf16")
    run.model = run.setup.place(run.model)
    _, scores, maps = run.score(images)
    assert not torch.equal(exact_map["zscore"], maps["zscore"])
    assert (maps["zscore"] - exact_map["zscore"]).abs().max() < 0.4  # standard deviations
    assert (scores["reader"] - exact["reader"]).abs().max() < 0.01  # it has hardly been trained
    for name in ("zscore", "mse"):
        spread = run.scorer.normal_scores[name].std()
        assert (scores[name] - exact[name]).abs().max() < 0.2 * spread, name
    assert (scores["reader"] - exact["reader"]).abs().max() < 1e-3
    with run.setup.autocast(), models.no_autocast(run.setup.device):  # as while testing
        inside = run.score(images)[1]
    for group in ([0], [20, 3], list(range(19, 2, -1))):
        _, their_scores, their_maps = run.score(images[group])
        assert all(torch.equal(their_scores[k], scores[k][group])
                   and torch.equal(their_maps[k], maps[k][group])
                   and torch.equal(inside[k], scores[k]) for k in SCORERS)


def test_an_image_gets_the_same_score_at_calibration_in_a_test_and_alone(
        runs: list[Path], xrays: Path) -> None:
    ev.evaluate(runs[1], data=str(xrays))
    rows = [r for r in rows_of(runs[1] / "eval/xrays/scores.csv") if r["label"] == "1"]
    for row in rows[::5]:
        (alone,) = ev.predict(runs[1], xrays / row["key"])
        assert alone["score"] == pytest.approx(float(row["reader"]), abs=1e-6)
        assert alone["percentile_among_normals"] == float(row["reader_percentile"])
    run, normals = ev.load_run(runs[1]), read_splits(runs[1] / "split.csv").normals("val")
    ev.score_samples(t := ev.Result(run, ev.open_source(run.config), normals))
    for name in SCORERS:
        assert np.array_equal(np.sort(t.scored[name]), run.scorer.normal_scores[name])


@pytest.mark.parametrize(("call", "says"), [
    (lambda run, tmp: ev.evaluate(run / "best.pt"), "no run folder"),
    (lambda run, tmp: ev.evaluate(run, scorer="magic"), "--scorer magic: not one of"),
    (lambda run, tmp: ev.predict(run, tmp, scorer="all"), "--scorer all: is for tests of runs; "),
    (lambda run, tmp: ev.evaluate(run, data=str(tmp / "gone")), "there is nothing at"),
    (lambda run, tmp: ev.predict(run, tmp / "gone.png"), "there is no file at"),
    (lambda run, tmp: ev.predict(run, tmp), "no images in this folder (looked for .png"),
    (lambda run, tmp: ev.evaluate(tmp), "no run folder (one holds best.pt"),
    (lambda run, tmp: ev.parse_arguments([]), "which run? Name its folder"),
    (lambda run, tmp: ev.parse_arguments(["r", "--samples", "x"]), "--samples: invalid int value"),
    (lambda run, tmp: ev.predict(run, Path(__file__)), "cannot be read as an image"),
    (lambda run, tmp: ev.evaluate(run, split="train"), "--split: 'train'"),
    (lambda run, tmp: ev.evaluate(run, device="gpu"), "--device: 'gpu' is not one of"),
    (lambda run, tmp: ev.parse_arguments(["r", "--samples", "0"]), "--samples: 0 is less than 1"),
    (lambda run, tmp: ev.parse_arguments(["r", "s", "--image", "x"]), "--image: takes one run"),
    (lambda run, tmp: ev.parse_arguments(["r", "--image", "x", "--split", "val"]),
     "--split: does not go with --image"),
    (lambda run, tmp: ev.parse_arguments(["r", "--normal", "x"]), "with --calibrate or --data"),
    (lambda run, tmp: ev.parse_arguments(["r", "--out", "x"]), "--out: goes with --image"),
])
def test_bad_input_is_one_clear_line(
        runs: list[Path], tmp_path: Path, call: object, says: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        call(runs[0], tmp_path)
    assert says in str(error.value)


def test_training_data_may_lie_elsewhere_or_be_gone(
        xrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(xrays, tmp_path / "xrays")
    folder, = train(tiny(tmp_path, data=str(tmp_path / "xrays"), samples=None, epochs=1))
    (tmp_path / "xrays").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"was trained on it: if it lies elsewhere now, .* --data$"):
        ev.evaluate(folder)
    assert ev.evaluate(folder, data=str(tmp_path / "moved"))[0]["external"] is False
    # Without its training images half of the trivial scores can be had.
    for s in read_splits(folder / "split.csv").train:
        (tmp_path / "moved" / s.key).unlink()
    shutil.copytree(tmp_path / "moved", tmp_path / "xrays")
    capsys.readouterr()
    assert "PCA reconstruction error" not in ev.evaluate(folder)[0]["baselines"]
    assert "note: three trivial scores are left out (none of the" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "xrays")
    for above, n in (("a", 3), ("b", 4)):  # other data of one name: results are kept apart
        write_images(tmp_path / above / "images" / "normal", n)
        write_images(tmp_path / above / "images" / "abnormal", n, 50)
        (metrics,) = ev.evaluate(folder, data=str(tmp_path / above / "images"))
        assert "PCA reconstruction error" not in metrics["baselines"]
    assert len(list((folder / "eval").glob("images*"))) == 2


def test_a_run_that_is_unfinished_is_not_evaluated_and_left_out_of_its_folder(
        runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # What only tells of training may be missing, and earlier results may be damaged.
    folder, unfinished = tmp_path / "unet", tmp_path / "unet-seed1"
    shutil.copytree(runs[0], folder, ignore=shutil.ignore_patterns("eval", "log.csv", "curves.png"))
    (folder / "eval/synthetic").mkdir(parents=True)
    (folder / "eval/synthetic/metrics.json").write_text("{}")
    for other in (tmp_path / "reversed_ae", unfinished):
        other.mkdir()
        shutil.copy(runs[0] / "config.json", other)
    write_file(unfinished / "best.pt", load_checkpoint(runs[0] / "best.pt") | {"scorer": None})
    assert len(ev.evaluate(tmp_path, samples=20)) == 1
    assert (folder / "eval/synthetic/report.html").exists()
    said = capsys.readouterr().out
    assert all(f"careful   left out: {tmp_path / name}: " in said
               for name in ("reversed_ae", "unet-seed1"))
    with pytest.raises(UserError, match=r"training has not finished.*--resume"):
        ev.evaluate(unfinished)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"no run in .* can be tested"):
        ev.evaluate(tmp_path)
    shutil.rmtree(tmp_path / "reversed_ae")
    unfinished = unfinished.rename(tmp_path / "first")
    with pytest.raises(UserError, match=f"not a run folder itself; in it are {unfinished}$"):
        ev.evaluate(tmp_path)
