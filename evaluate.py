"""Test trained runs, compare them, or score new images.

    python evaluate.py runs/unet                          on the test split of its own data
    python evaluate.py runs/unet runs/reversed_ae         both, and the comparison
    python evaluate.py runs                               all models and seeds in that folder
    python evaluate.py runs/unet --data other_xrays       an external test
    python evaluate.py runs/unet --image image.png        score new images, with heatmaps
    python evaluate.py runs/unet --calibrate normals      a threshold for another site
    python evaluate.py runs/unet --export model.onnx      take the model elsewhere (or model.pt2)

A test is written into RUN/eval/DATA/, of a single run with the page report.html. A comparison lies
beside its runs: comparison.html and .png, of other data or --split val comparison-DATA.*
"""

import os
import sys
from typing import Any

from config import Parser, UserError, command, load, run_command


def parse_arguments(argv: list[str] | None = None) -> dict[str, Any]:
    """Read the command line: what `evaluate`, `predict`, `calibrate` or `export` is given."""
    parser = Parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folder, e.g. runs/unet, or the folder above: "
        "every run in it that has its model's name")
    add("--data", metavar="SPEC", help="other data to test on: synthetic, a folder, a CSV or "
        "kaggle:owner/name (default: what the run was trained on)")
    add("--normal", metavar="WORD[,WORD]", help="with --data or --calibrate: the words that mean "
        "normal there (default: those of training)")
    add("--split", metavar="{test,val}", help="val: choose settings there, never on test")
    add("--samples", type=int, metavar="N", help="at most N images, evenly from both labels")
    add("--scorer", metavar="NAME", help="reader (default), zscore, mse, ssim, or all for a table")
    add("--out", metavar="DIR", help="where --image writes (default: predictions in the run "
        "folder); a number is added if predictions are there already")
    add("--specificity", type=float, metavar="SHARE",
        help="place the threshold above this share of normal images (default: 0.95)")
    add("--calibration", metavar="NAME", help="test, score or export with the calibration of this "
        "name; with --calibrate: its name (default: that of the folder)")
    add("--device", metavar="{auto,cpu,cuda,mps}", help="where to compute (default: auto)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--image", metavar="PATH", help="score this image, or every image in this folder, "
            "instead of testing")
    instead("--calibrate", metavar="FOLDER", help="take threshold and percentiles from these "
            "normal images of another site, at least 30; kept as calibration-NAME.pt")
    instead("--export", metavar="FILE", help="write model, reader and threshold as one graph: a "
            "name that ends in .onnx or .pt2")
    given = {k: v for k, v in parser.values(argv).items() if v not in (None, [])}
    goes_with = {"image": "out scorer device", "calibrate": "normal device", "export": "scorer",
                 "data": "normal split samples scorer device"}
    task = next((name for name in goes_with if name in given), "test")
    allowed = goes_with.get(task, "split samples scorer device").split()
    if "runs" not in given:
        raise UserError("which run? Name its folder, such as runs/unet; --help says more")
    for name in sorted(given.keys() - {"runs", task, "specificity", "calibration", *allowed}):
        where = " or ".join(f"--{other}" for other, flags in goes_with.items() if name in flags)
        raise UserError(f"--{name}: " + (
            f"does not go with --{task}" if task in given else f"goes with {where}"))
    if task not in ("data", "test") and len(given["runs"]) > 1:
        raise UserError(f"--{task}: takes one run")
    if given.get("samples", 1) < 1:
        raise UserError(f"--samples: {given['samples']} is less than 1")
    given["runs"] = [os.path.expanduser(run) for run in given["runs"]]
    return given


if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    sys.exit(run_command(lambda: parse_arguments() and load("evaluate").main(), "evaluate.py"))

import base64
import contextlib
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import re
import shlex
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from operator import getitem
from pathlib import Path
from string import Template
from typing import NamedTuple

import matplotlib.style
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.stats import betabinom, binomtest, ks_2samp
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import models
import train
from config import FIELDS, MODELS, Config, flag, load_config, log, on_screen
from data import (
    ABNORMAL, IMAGE_SUFFIXES, NORMAL, SPLITS, FolderSource, ImageStream, KaggleSource, Sample,
    Source, Unlabelled, decode_image, flow, is_text, open_source, read_splits, same_data)
from models import (
    BASELINE, DEFAULT_SCORER, READ_AT_ONCE, SCORERS, TRAITS, AnomalyScorer, Output, Setup,
    normals_needed)

RESAMPLES = 1000
SPECIFICITY, LEVELS, PREVALENCES = 0.95, (0.90, 0.95, 0.99), (0.01, 0.05, 0.20)
OVERLAY_SIDE = 4096  # pixels
OUTPUTS = ["score", "percentile", "abnormal", "map"]  # of an exported graph
FEWEST_NORMALS = 30  # of another site, for a calibration
RECALIBRATE = (f"With {FEWEST_NORMALS} or more normal images from there set it anew: "
               "evaluate.py RUN --calibrate FOLDER_OF_NORMALS.")
NAMES = {"unet": "U-Net", "reversed_ae": "Reversed AE"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
IMAGE_ALONE, UNTRAINED = "a reader of the image alone", "the same network untrained"
PEAK_TOLERANCE = 0.03  # of the image side: how far beside a lesion a map's peak may lie
# Pixels are counted by their map value, for an AUROC to four digits in 20,000 ranges.
PIXEL_BOUNDS = np.concatenate([[0], np.geomspace(1e-6, 1e4, 20_000), [np.inf]])
PICTURES = {"scores.png": "ROC curve and histogram of scores",
            "examples.png": "highest, borderline and lowest scores",
            "worst.png": "the worst abnormal images missed, and normal images flagged",
            "healing.png": "what it makes of lesions drawn on normal images"}


# ----------------------------------------------------------------------------------------------
# Trained runs


@dataclass
class TrainedRun:
    """A trained model with its calibrated scorer, ready to score."""

    folder: Path
    name: str  # for tables and figures
    config: Config
    model: nn.Module
    scorer: AnomalyScorer
    untrained: AnomalyScorer  # the same of this network before training, as a baseline
    setup: Setup
    fingerprint: str  # of the data it was trained on
    made_with: str  # versions, device and precision of its training
    specificity: float  # that its thresholds are set for
    calibration: str = ""  # the name of that of another site
    calibrated_on: frozenset[str] = frozenset()  # digests of its images

    @property
    def normals(self) -> str:
        """What threshold and percentiles come from."""
        count, *_ = map(len, self.scorer.normal_scores.values())
        return f"{count:,} " + (f"normal images of calibration {self.calibration}" if
                                self.calibration else "validation normals")

    def threshold(self, scorer: str) -> float:
        """The score above which an image counts as abnormal."""
        return self.scorer.threshold(scorer, self.specificity)

    def __call__(self, images: np.ndarray | Tensor, scorer: str = DEFAULT_SCORER,
                 ) -> tuple[np.ndarray, ...]:
        """(reconstructions that the scorer sees, anomaly maps, both [n,1,H,W], scores [n]) of
        images [n,1,H,W], uint8 or float in [0,1]; H = W = config.image_size. UserError if not."""
        x, side, by = torch.as_tensor(images).cpu(), self.config.image_size, scorer_called(scorer)
        if x.is_floating_point() and x.numel() and x.min() >= 0 and x.max() <= 1:
            x = (255 * x).round().byte()
        if x.dtype != torch.uint8 or x.shape != (len(x), 1, side, side) or not len(x):
            raise UserError(f"images: [n,1,{side},{side}] in uint8, or float in [0,1], is wanted, "
                            f"not this {x.dtype} of shape {list(x.shape)}")
        found = [(output.seen_by(by).reconstructions, maps[by], scores[by])
                 for output, scores, maps in map(self.score, x.split(8 * READ_AT_ONCE))]
        return tuple(torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Output, dict[str, Tensor], dict[str, Tensor]]:
        """Score uint8 images [n,1,H,W]: (Output, scores [n], anomaly maps [n,1,H,W]), the last two
        by every scorer. Those of an image do not depend on the other images."""
        return models.score_images(self.model, self.scorer, images, self.setup)

    def stream(self, source: Source, samples: list[Sample], batch_size: int = READ_AT_ONCE,
               stop_on_bad: bool = False) -> ImageStream:
        """Stream samples in order, within the memory that the run was trained in."""
        return ImageStream(source, samples, self.config.image_size, batch_size,
                           memory=self.config.memory_bytes, cache=False, stop_on_bad=stop_on_bad,
                           bits=self.config.grey_bits or source.grey_bits())

    def some_normals(self, source: Source, split: str, most: int) -> Tensor:
        """Read a few normal images of its train or val split: uint8 [n,1,H,W]. UserError if none
        can be read."""
        there, splits = {s.key for s in source.samples}, read_splits(self.folder / "split.csv")
        normals = [s for s in splits.normals(split) if s.key in there]
        some = normals[:: max(1, math.ceil(len(normals) / most))]
        if not (found := [images for images, _ in self.stream(source, some)]):
            raise UserError(f"none of the {split} images of {self.folder} can be read")
        return torch.cat(found)


def scorer_called(name: str | None) -> str:
    """The scorer of that name, or the default one. UserError if there is none."""
    if name in (None, *SCORERS):
        return name or DEFAULT_SCORER
    why = "is for tests of runs; here name one of" if name == "all" else "not one of"
    raise UserError(f"--scorer {name}: {why} {', '.join(SCORERS)}")


def load_run(path: str | Path, device: str = "auto", calibration: str | None = None,
             specificity: float | None = None) -> TrainedRun:
    """Load a run folder's best.pt, perhaps with another site's calibration or another specificity.
    UserError if there is none, it is unfinished, or has too few normal images for that."""
    folder = Path(path)
    if not (folder / "best.pt").exists():
        inside = shlex.join(str(p.parent) for p in sorted(folder.glob("*/best.pt")))
        raise UserError(f"{folder}: " + (
            f"not a run folder itself; in it are {inside}" if inside else "no run folder (one "
            f"holds best.pt, once an epoch is done); train with {command('train.py')}"))
    state = train.load_checkpoint(folder / "best.pt")
    config = Config(**state["config"])
    with contextlib.suppress(UserError):  # where its data lies by now
        config = replace(config, data=load_config(folder).data)
    if not state["scorer"]:
        raise UserError(f"{folder}: training has not finished, so its scores are not calibrated; "
                        f"wait for it, or go on with: {command('train.py')} --model {config.model} "
                        f"--resume {shlex.quote(str(folder))} (--epochs {state['epoch']} ends it "
                        "now)")
    where, _ = models.choose_device(device)
    setup = Setup(where, models.choose_precision(config.precision, where)[0])
    if state["precision"] != setup.precision:
        log.warning(f"note      {folder} was calibrated in {state['precision']} and scores in "
                    f"{setup.precision} here: scores differ a little")
    model = models.create_model(config.model, config)
    model.load_state_dict(state["model"])
    scorer, untrained = (AnomalyScorer().load_state_dict(state[k], where)
                         for k in ("scorer", "untrained"))
    name, own = NAMES[config.model], folder.resolve().name
    made_with = (f"{sum(p.numel() for p in model.parameters()):,} parameters, epoch "
                 f"{state['epoch']}, {', '.join(map(' '.join, state['versions'].items()))}, "
                 f"{state['device']}, {state['precision']}")
    run = TrainedRun(folder, name if own == config.model else f"{name} ({own[:24]})", config,
                     setup.place(model).eval(), scorer, untrained, setup,
                     state["data_fingerprint"], made_with, specificity or SPECIFICITY)
    if calibration:
        file = folder / f"calibration-{calibration}.pt"
        if not file.exists():
            there = sorted(p.stem[12:] for p in folder.glob("calibration-*.pt"))
            raise UserError(f"--calibration {calibration}: {folder} has none of that name; it has "
                            f"{', '.join(there) or 'none'}. One is made by --calibrate")
        site = train.load_checkpoint(file)
        if site.get("made_for") != digest(scorer.normal_scores[DEFAULT_SCORER]):
            raise UserError(f"--calibration {calibration}: {file} was made for another run, or "
                            f"before {folder} was trained anew; make it again by --calibrate")
        scorer.refer_to(site["normal_scores"], site["normal_traits"])
        run.calibration, run.calibrated_on = calibration, frozenset(site["images"])
        run.name += f", calibrated at {calibration}"
    needed = 0 if specificity is None else normals_needed(specificity)
    if needed > len(scorer.normal_scores[DEFAULT_SCORER]):
        raise UserError(f"--specificity {specificity:g}: takes {needed:,} normal images, and "
                        f"{folder} has {run.normals}")
    return run


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's content: it tells images apart, and runs by their normal scores."""
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()


def runs_in(path: str | Path) -> list[Path]:
    """Find the run folder that a path is, or those in it that are named after model and seed."""
    folder, found = Path(path), {}
    if not (folder / "best.pt").exists():
        for file in folder.glob("*/config.json"):
            if name := re.fullmatch(rf"({'|'.join(MODELS)})(?:-seed(\d+))?", file.parent.name):
                found[MODELS.index(name[1]), int(name[2] or 0)] = file.parent
    return [found[key] for key in sorted(found)] or [folder]


def group_by_seed(runs: list[TrainedRun]) -> dict[str, list[TrainedRun]]:
    """Group runs that differ by their seed alone, by name. Each run gets a name of its own."""
    if len({run.name for run in runs}) < len(runs):
        above = os.path.commonpath([run.folder.resolve().parent for run in runs])
        for run in runs:
            run.name = f"{NAMES[run.config.model]} ({os.path.relpath(run.folder.resolve(), above)})"
    aside = {"seed", *train.CHANGEABLE} - {"epochs", "patience", "min_delta"}
    groups, met = dict[tuple, list[TrainedRun]](), Counter[tuple]()
    for run in runs:
        key = (run.fingerprint, *(v for k, v in asdict(run.config).items() if k not in aside))
        met[key, run.config.seed] += 1  # the same seed twice is another run
        groups.setdefault((key, met[key, run.config.seed]), []).append(run)
    named = {group[0].name: group for group in groups.values()}
    for name, group in named.items():
        for run in group if len(group) > 1 else ():
            run.name = f"{name}, seed {run.config.seed}"
    return named


# ----------------------------------------------------------------------------------------------
# Statistics


def weighted_metrics(scores: np.ndarray, labels: np.ndarray,
                     weights: np.ndarray | None = None) -> np.ndarray:
    """Compute AUROC and average precision of scores [n] against labels [n] in {0,1}, under each row
    of weights [R,n] (default: every image once): [2,R]. NaN where a row lacks one label. Equal
    scores count half in the AUROC, and enter the precision together."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(-scores[order], prepend=-np.inf))
    weights, y = np.ones((1, len(labels))) if weights is None else weights, labels[order]
    found = []
    for rows in np.array_split(weights, max(1, weights.size // 500_000)):  # faster, and smaller
        positive = np.add.reduceat(rows[:, order] * y, starts, axis=1)
        negative = np.add.reduceat(rows[:, order] * (1 - y), starts, axis=1)
        true, false = positive.cumsum(axis=1), negative.cumsum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            below = false[:, -1:] - false
            auroc = (positive * (below + negative / 2)).sum(1) / (true[:, -1] * false[:, -1])
            precision = np.where(true > 0, true / (true + false), 0.0)
            found.append(np.stack([auroc, (positive * precision).sum(1) / true[:, -1]]))
    return np.concatenate(found, axis=1)


def patient_weights(patients: Sequence[str], resamples: int = RESAMPLES) -> np.ndarray:
    """Draw whole patients with replacement: how often each image counts, [1+R,n]; first: once."""
    names, of_image = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.Generator(np.random.PCG64(0))
    weights = np.ones((1 + resamples, len(of_image)), dtype=np.float32)
    for row in weights[1:]:
        drawn = rng.integers(len(names), size=len(names))
        row[:] = np.bincount(drawn, minlength=len(names))[of_image]
    return weights


def interval(values: np.ndarray) -> tuple[float, ...]:
    """Give the central 95 % of bootstrap values, NaNs left out."""
    values = values[np.isfinite(values)]
    return tuple(np.quantile(values, (0.025, 0.975)).tolist() if len(values) else [math.nan] * 2)


def paired_difference(a: np.ndarray, b: np.ndarray, labels: np.ndarray,
                      weights: np.ndarray) -> tuple[float, ...]:
    """(mean AUROC of scores b minus that of a, its 95 % interval) on the same resamples. a, b: [n],
    or [S,n] of S seeds, averaged within each resample."""
    one, two = (np.mean([weighted_metrics(x, labels, weights)[0] for x in np.atleast_2d(scores)],
                        axis=0) for scores in (a, b))
    return float(two[0] - one[0]), *interval(two[1:] - one[1:])


def verdict(other: str, difference: float, low: float, high: float) -> str:
    """Tell the AUROC difference to another score: clear if its 95 % interval, as it is shown,
    leaves out 0."""
    side, sign = ("above", 1) if difference >= 0 else ("below", -1)
    by, *ends = (round(sign * x, 3) + 0.0 for x in (difference, low, high))  # no -0.000
    return (f"{'clearly' if min(ends) > 0 else 'not clearly'} {side} {other}, "
            f"by {by:.3f} ({min(ends):.3f} to {max(ends):.3f})")


class TrivialScores:
    """Scores that need no training worth the name: a model that does not beat them is no use.
    reference: normal training images, uint8 [n,1,H,W]; without them three scores are left out."""

    def __init__(self, reference: np.ndarray | None) -> None:
        self.pca = None
        if reference is not None:
            flat = reference.reshape(len(reference), -1) / np.float32(255)
            logs = models.log_contrast(torch.from_numpy(reference) / 255, 1 / 8)
            self.mean, self.usual = flat.mean(0), logs.mean(0)
            self.spread = logs.std(0).clamp(min=0.05)
            self.pca = PCA(min(32, len(flat) - 1), random_state=0).fit(flat)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Score uint8 images [B,1,H,W]: name -> scores [B]."""
        x = images[:, 0] / np.float32(255)
        flat = x.reshape(len(x), -1)
        rows, columns = np.abs(np.diff(x, axis=1)), np.abs(np.diff(x, axis=2))
        scores = {"mean intensity": flat.mean(1), "standard deviation": flat.std(1),
                  "local contrast": rows.mean((1, 2)) + columns.mean((1, 2))}
        if self.pca:
            logs = models.log_contrast(torch.from_numpy(images) / 255, 1 / 8)
            haze = (self.usual - logs) / self.spread
            back = self.pca.inverse_transform(self.pca.transform(flat))
            scores |= {"distance to mean normal": np.square(flat - self.mean).mean(1),
                       "PCA reconstruction error": np.square(flat - back).mean(1),
                       "haze": haze.mean((1, 2, 3)).numpy()}
        return scores


def samples_to_score(run: TrainedRun, source: Source, split: str,
                     ) -> tuple[list[Sample], bool, list[str]]:
    """(samples, whether this is an external test, notes) for a run on a source. On the data it was
    trained on its split.csv decides; of other data the prescribed test split, or all, is taken."""
    splits, notes = read_splits(run.folder / "split.csv"), list[str]()
    if (same_data(source.fingerprint(), run.fingerprint)
            or os.path.abspath(source.spec) == os.path.abspath(run.config.data)):
        wanted, there = getattr(splits, split), {s.key: s for s in source.samples}
        if gone := [s.key for s in wanted if s.key not in there]:
            notes.append(f"{len(gone)} images of split.csv are no longer there, e.g. {gone[0]}")
        found = [there[s.key] for s in wanted if s.key in there]
        same_now = {(s.key, s.patient, s.label) for s in wanted}
        if other := [s.key for s in found if (s.key, s.patient, s.label) not in same_now]:
            notes.append(f"{len(other)} images have another label or patient than at training, "
                         f"e.g. {other[0]}; those of now count")
        if split == "val":
            notes.append("the thresholds come from these very validation normals")
        return found, False, notes
    if split == "val":
        raise UserError("--split val: only on the data that the run was trained on")
    chosen = [s for s in source.samples if s.split == "test"] or source.samples
    # The same data under another path, with a few images more or fewer: what was trained on
    # must not be tested on. Names that coincide by chance are far fewer than half.
    others = not_learnt(run, source, chosen)
    if same := len(chosen) - len(others):  # a folder in that of the training data, or above it
        notes.append(f"{same} images left out: the run was trained or validated on them")
        if not others:
            raise UserError(f"--data {source.spec}: {run.folder} was trained or validated on all "
                            f"{same} images that would be tested")
    seen = {(s.key, s.patient, s.label) for s in splits.train + splits.val}
    fresh = [s for s in others if (s.key, s.patient, s.label) not in seen]
    known = len(others) - len(fresh)
    if known > len(seen) / 2:
        notes.append(f"{known} images left out: the run was trained or validated on images of "
                     "these names")
        return fresh, True, notes
    if known:
        notes.append(f"{known} of these images have the names of images that the run was trained "
                     "or validated on: make sure that they are others")
    return others, True, notes


def not_learnt(run: TrainedRun, source: Source, samples: list[Sample]) -> list[Sample]:
    """Leave out the files that a run was trained or validated on."""
    def place(spec: str, sample: Sample) -> str:  # no file's, if the data is no folder
        root = os.path.realpath(spec)
        return os.path.join(os.path.dirname(root) if root.lower().endswith(".csv") else root,
                            sample.key)

    splits = read_splits(run.folder / "split.csv")
    learnt = {place(run.config.data, s) for s in splits.train + splits.val}
    return [s for s in samples if place(source.spec, s) not in learnt]


def draw_evenly(samples: list[Sample], limit: int | None) -> list[Sample]:
    """Choose at most `limit` samples, as evenly from both labels as possible; always the same."""
    if limit is None or limit >= len(samples):
        return samples
    rng, labels = np.random.Generator(np.random.PCG64(0)), np.array([s.label for s in samples])
    drawn = (rng.permutation(np.flatnonzero(labels == label)) for label in (NORMAL, ABNORMAL))
    in_turn = [i for pair in itertools.zip_longest(*drawn) for i in pair if i is not None]
    return [samples[i] for i in sorted(in_turn[:limit])]


# ----------------------------------------------------------------------------------------------
# Scoring


@dataclass
class Result:
    """A run, what it is tested on, and what came of it. Arrays have one entry an image."""

    run: TrainedRun
    source: Source
    samples: list[Sample]
    scorer: str = DEFAULT_SCORER  # the one that counts
    split: str = "test"
    external: bool = False  # whether the data is not what the run was trained on
    # What score_samples finds.
    scored: dict[str, np.ndarray] = field(default_factory=dict)  # scorer -> scores [n]
    baselines: dict[str, np.ndarray] = field(default_factory=dict)  # other scores, by name
    bad: dict[str, str] = field(default_factory=dict)  # images that could not be read, and why
    traits: Any = ()  # [n,4], see TRAITS
    digests: list[str] = field(default_factory=list)
    scored_before: int = 0  # how often this run had been tested on this split
    # For each lesion with a mask or box: whether the map's peak lies in it, its shares of the map's
    # sum, and of the image's area, which a map that knows nothing would give.
    located: list[tuple[bool, float, float]] = field(default_factory=list)
    pixels: Any = 0  # [2,n]: how many outside, and inside of masks lie between PIXEL_BOUNDS
    metrics: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()  # where it is written

    @property
    def scores(self) -> np.ndarray:
        """The scores that count, [n]."""
        return self.scored[self.scorer]

    @property
    def labels(self) -> np.ndarray:
        """NORMAL or ABNORMAL of every image, [n]."""
        return np.array([s.label for s in self.samples])

    @property
    def about(self) -> str:
        """The data, without the place where it lies: whether it is real, and whether external."""
        place = Path(self.source.spec).resolve()
        title = self.source.title.replace(str(place), place.name)
        return title + "; an external test, nothing is fitted to these images" * self.external

    def mask(self, sample: Sample) -> np.ndarray | None:
        """Where its lesions are, bool [H,W]: nowhere in a normal image of a source with masks."""
        size = self.run.config.image_size
        mask = self.source.mask(sample, size)
        empty = mask is None and sample.label == NORMAL and getattr(self.source, "masks", None)
        return np.zeros((size, size), dtype=bool) if empty else mask


def plan_tests(runs: list[TrainedRun], data: str | None, split: str, limit: int | None,
               scorer: str, normal: str | None = None) -> list[Result]:
    """Choose what each run is tested on; UserError if that is not the same for all."""
    plans: list[Result] = []
    opened: dict[tuple, Source] = {}
    for run in runs:
        config = run.config if data is None else replace(
            run.config, data=data, samples=None, normal=normal or run.config.normal)
        key = (config.data, config.normal, config.image_size, config.samples)
        try:
            source = opened[key] = opened.get(key) or open_source(config)
        except UserError as error:
            raise error if data else UserError(
                f"{error}. {run.folder} was trained on it: if it lies elsewhere now, name that "
                "place with --data") from None
        chosen, external, notes = samples_to_score(run, source, split)
        plans.append(Result(run, source, draw_evenly(chosen, limit), scorer, split, external))
        if not chosen:
            raise UserError(f"--data {source.spec}: no images to score in its {split} split")
        if len({tuple((s.key, s.patient, s.label) for s in p.samples) for p in plans}) > 1:
            raise UserError(f"{run.folder} and {runs[0].folder} cannot be compared: their test "
                            "images differ; name common data with --data, or the runs to compare")
        if len(plans) == 1:
            log.info(f"testing   {source.title}")
            first = ["external test: nothing is fitted to these images"] * external
            for note in [*first, *notes, *map(": ".join, flow(source))]:
                log.info(f"          note: {note}")
    return plans


def score_samples(r: Result, trivial: TrivialScores | None = None) -> None:
    """Score the images with every scorer, and note which of them could be read."""
    # Several batches of READ_AT_ONCE; fewer of large images.
    several = max(1, min(8, 8 * 128**2 // r.run.config.image_size**2))
    stream = r.run.stream(r.source, r.samples, several * READ_AT_ONCE, stop_on_bad=True)
    found: list[dict[str, np.ndarray]] = []
    untrained = replace(r.run, model=models.untrained_model(r.run.config, r.run.setup).eval(),
                        scorer=r.run.untrained)
    # Inside, the weights that autocast has cast are kept, instead of being cast for each batch
    # anew: of the full-sized Reversed AE these are 270 million numbers.
    with (train.progress(len(r.samples), f"scoring with {r.run.name}") as bar,
          r.run.setup.autocast(), models.no_autocast(r.run.setup.device)):
        for images, positions in stream:
            _, scores, maps = r.run.score(images)
            scores[UNTRAINED] = untrained.score(images)[1][DEFAULT_SCORER]
            scores |= {"traits": r.run.scorer.traits(images), "position": positions}
            found.append({k: v.numpy() for k, v in scores.items()}
                         | (trivial(images.numpy()) if trivial else {}))
            r.digests += map(digest, images)
            for map_, i in zip(maps[r.scorer][:, 0].cpu().numpy(), positions.tolist(), strict=True):
                if (mask := r.mask(r.samples[i])) is not None:
                    locate(r, map_, mask)
            bar.update(len(images))
    if not found:
        raise UserError(f"--data {r.source.spec}: none of the {len(r.samples)} images could be "
                        "read")
    every = {k: np.concatenate([scores[k] for scores in found]) for k in found[0]}
    r.samples, r.bad = [r.samples[i] for i in every.pop("position")], stream.bad
    r.traits, r.scored = every.pop("traits"), {k: every.pop(k) for k in SCORERS}
    if not all(np.isfinite(v).all() for v in r.scored.values()):
        raise UserError(f"{r.run.folder}: its scores are not finite numbers; train it again")
    readers = {IMAGE_ALONE: every.pop(BASELINE), UNTRAINED: every.pop(UNTRAINED)}
    is_ap = np.array([s.view.startswith("AP") for s in r.samples], dtype=float)
    if trivial and 0 < is_ap.sum() < len(is_ap):
        every["is it an AP view"] = is_ap
    # Each in the direction that tells more: its AUROC is then the most it can claim.
    r.baselines = {k: -v if weighted_metrics(v, r.labels)[0, 0] < 0.5 else v
                   for k, v in every.items()} | readers


def locate(r: Result, map_: np.ndarray, mask: np.ndarray) -> None:
    """Hold an anomaly map [H,W] against the mask [H,W] of its lesions."""
    if mask.any():
        energy = float(map_[mask].sum() / max(map_.sum(), 1e-12))
        away = distance_transform_edt(~mask).flat[map_.argmax()]  # of the peak from the lesions
        r.located.append((bool(away <= PEAK_TOLERANCE * len(mask)), energy, float(mask.mean())))
    if not r.source.boxes:  # a box holds much besides its lesion
        r.pixels = r.pixels + np.stack([
            np.histogram(values.clip(0), PIXEL_BOUNDS)[0] for values in (map_[~mask], map_[mask])])


def mean_of(values: np.ndarray) -> float | None:
    """Compute the mean; None of no values."""
    return float(values.mean()) if len(values) else None


def measure(r: Result, scorer: str, weights: np.ndarray) -> dict[str, Any]:
    """Compute the metrics with one scorer; None where the labels do not allow a figure."""
    scores, labels, normal = r.scored[scorer], r.labels, r.run.scorer.normal_scores[scorer]
    sick, well = scores[labels == ABNORMAL], scores[labels == NORMAL]

    def at(specificity: float) -> dict[str, Any]:
        threshold = r.run.scorer.threshold(scorer, specificity)
        return {"threshold": threshold, "sensitivity": mean_of(sick > threshold),
                "specificity": mean_of(well <= threshold)}

    threshold, sensitivity, specificity = at(r.run.specificity).values()
    result: dict[str, Any] = {
        "auroc": None, "auroc_ci": None, "average_precision": None, "average_precision_ci": None,
        "specificity_wanted": r.run.specificity, "threshold": threshold,
        "sensitivity_at_threshold": sensitivity, "specificity_at_threshold": specificity,
        "specificity_ci": None, "specificity_chance": None,
        "n_normal": len(well), "n_abnormal": len(sick),
        "n_patients": len({s.patient for s in r.samples}), "n_validation_normals": len(normal),
        "score_mean_normal": mean_of(well), "score_mean_abnormal": mean_of(sick)}
    if len(well):
        under, rank = int((well <= threshold).sum()), int((normal <= threshold).sum())
        # The chance that so few test normals, or fewer, lie under the value of that rank among the
        # validation normals, if both are alike: a threshold from few images is a matter of chance.
        chance = betabinom.cdf(under, len(well), rank, len(normal) + 1 - rank)
        result |= {"specificity_chance": float(chance), "specificity_ci": tuple(
            binomtest(under, len(well)).proportion_ci(method="wilson"))}
    if len(sick) and len(well):
        drawn = weighted_metrics(scores, labels, weights)
        for k, values in zip(("auroc", "average_precision"), drawn, strict=True):
            result |= {k: float(values[0]), f"{k}_ci": interval(values[1:])}
        result |= {f"auroc_by_{kind}": by_group(r, scores, kind) for kind in ("finding", "view")}
    for level in (90, 95):  # whatever threshold counts
        result[f"sensitivity_at_{level}_specificity"] = at(level / 100)["sensitivity"]
    return result | {"at_specificity": {
        str(s): at(s) for s in LEVELS if normals_needed(s) <= len(normal)}}


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> str:
    """Give the shares of the flagged images that are abnormal, and of the others that are normal,
    where that share of all images is abnormal."""
    ill, well = prevalence, 1 - prevalence
    pairs = ((ill * sensitivity, well * (1 - specificity)),
             (well * specificity, ill * (1 - sensitivity)))
    return ", ".join(decimal(right / (right + wrong) if right + wrong else None)
                     for right, wrong in pairs)


def by_group(r: Result, scores: np.ndarray, kind: str) -> dict[str, dict[str, float]]:
    """Compute the AUROC of each finding against all normals, or within each of several views."""
    labels, values = r.labels, np.array([getattr(s, kind) for s in r.samples])
    grouped = labels == ABNORMAL if kind == "finding" else np.ones(len(labels), dtype=bool)
    table = {}
    for value, count in Counter(values[grouped].tolist()).most_common(12):
        chosen = (values == value) | ~grouped
        if value and len(set(labels[chosen])) == 2:
            auroc, _ = weighted_metrics(scores[chosen], labels[chosen])[:, 0].tolist()
            table[value] = {"auroc": auroc, "n": count}
    return table if kind == "finding" or len(set(values) - {""}) > 1 else {}


def localisation(r: Result) -> dict[str, Any]:
    """Measure how well the maps point at lesions. Those as large as the median count as large."""
    hits, energies, areas = np.array(r.located).T
    large, pixel_auroc = areas >= np.median(areas), None
    if np.any(r.pixels, axis=-1).all():  # of the map as a test of each pixel
        truth, level = np.indices(r.pixels.shape).reshape(2, -1)
        pixel_auroc = float(roc_auc_score(truth, level, sample_weight=r.pixels.ravel()))
    return {"pixel_auroc": pixel_auroc, "n_located": len(hits),
            "peak_in_lesion": mean_of(hits), "peak_tolerance": PEAK_TOLERANCE,
            "peak_in_small_lesion": mean_of(hits[~large]),
            "peak_in_large_lesion": mean_of(hits[large]),
            "energy_in_lesion": mean_of(energies), "lesion_area": mean_of(areas)}


def measure_all(r: Result, weights: np.ndarray, every_scorer: bool) -> dict[str, Any]:
    """Compute everything that metrics.json tells of a run."""
    mse, ssim = (mean_of(r.scored[k][r.labels == NORMAL]) for k in ("mse", "ssim"))
    metrics = measure(r, r.scorer, weights) | {
        "reconstruction_mse": mse, "reconstruction_ssim": None if ssim is None else 1 - ssim,
        "scorer": r.scorer, "data": r.source.title, "external": r.external, "split": r.split,
        "data_fingerprint": r.source.fingerprint(), "trained_on": r.run.config.data,
        "model": r.run.config.model, "seed": r.run.config.seed, "unreadable": r.bad,
        "left_out": dict(r.source.left_out)}
    if metrics["auroc"] is not None:
        drawn = {k: weighted_metrics(v, r.labels, weights)[0] for k, v in r.baselines.items()}
        metrics |= {"baselines": {k: float(values[0]) for k, values in drawn.items()},
                    "baselines_ci": {k: interval(values[1:]) for k, values in drawn.items()}}
    if every_scorer:
        metrics["scorers"] = {k: measure(r, k, weights) for k in SCORERS}
    return metrics | (localisation(r) if r.located else {})


# ----------------------------------------------------------------------------------------------
# Evaluation: figures, tables, the page


def evaluate(
    runs: str | Path | Sequence[str | Path], data: str | None = None, split: str = "test",
    samples: int | None = None, scorer: str | None = None, device: str = "auto",
    normal: str | None = None, specificity: float | None = None, calibration: str | None = None,
) -> list[dict[str, Any]]:
    """Test runs, or all in a folder, on the test split of their data or on other `data`; gives the
    metrics of each. Writes <run>/eval/<data name>/, and of several runs the comparison in the
    folder above. Runs that differ by their seed alone are compared as one."""
    with on_screen():
        given = [runs] if isinstance(runs, str | Path) else runs
        paths = {path.resolve(): path for g in given for path in runs_in(g)}.values()
        by = scorer_called(None if scorer == "all" else scorer)
        if split not in ("test", "val"):
            raise UserError(f"--split: {split!r} is not one of test, val")
        loaded = []
        for path in paths:
            try:
                loaded.append(load_run(path, device, calibration, specificity))
            except UserError as error:
                if path in map(Path, given) or len(paths) == 1:
                    raise
                log.warning(f"careful   left out: {error}")
        if not loaded:
            raise UserError(f"no run in {', '.join(map(str, given))} can be tested")
        if locked := [run.folder for run in loaded if not os.access(run.folder, os.W_OK)]:
            raise UserError(f"{locked[0]}: results cannot be written there")
        named = group_by_seed(loaded)
        tested = plan_tests(loaded, data, split, samples, by, normal)
        first = tested[0]
        try:
            source = open_source(first.run.config) if first.external else first.source
            trivial = TrivialScores(first.run.some_normals(source, "train", 400).numpy())
        except UserError as error:
            log.info(f"          note: three trivial scores are left out ({error})")
            trivial = TrivialScores(None)
        for r in tested:
            score_samples(r, trivial if r is first else None)
            if bad := r.bad.keys() ^ first.bad.keys():
                raise UserError(f"{r.run.folder} and {first.run.folder} cannot be compared: "
                                f"{min(bad)} could be read for one of them only")
            r.baselines = first.baselines | r.baselines  # trivial scores are the same for all
            weights = patient_weights([s.patient for s in r.samples])
            r.metrics = measure_all(r, weights, scorer == "all")
            write_test(r)
        groups = {name: [r for r in tested if r.run in group] for name, group in named.items()}
        report(tested, groups, weights)
    return [r.metrics for r in tested]


def write_test(r: Result) -> None:
    """Write what a test found to <run>/eval/<data name>/, with a digest if other data is there, and
    that it was made to <run>/eval/tests.csv."""
    m, above, split = r.metrics, r.run.folder / "eval", "val" * (r.split == "val")
    name = "-".join(filter(None, (r.source.name, split, r.run.calibration)))
    r.folder, tests, known = above / name, above / "tests.csv", m["data_fingerprint"]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        there = json.loads((r.folder / "metrics.json").read_text(encoding="utf-8"))
        if not same_data(there["data_fingerprint"], known):
            r.folder = above / f"{name}-{known[-6:]}"
    r.folder.mkdir(parents=True, exist_ok=True)
    before = ["day,data,split,fingerprint,images,scorer"]
    with contextlib.suppress(OSError):
        before = tests.read_text(encoding="utf-8", errors="replace").splitlines() or before
    train.write_file(tests, "\n".join([*before, ",".join(map(str, (
        datetime.date.today(), r.source.name, r.split, known, len(r.samples), r.scorer)))]) + "\n")
    r.scored_before = sum(len(cells) == 6 and cells[2] == r.split and same_data(cells[3], known)
                          for cells in (line.split(",") for line in before))
    train.write_file(r.folder / "metrics.json", json.dumps(m, indent=2) + "\n")
    percentiles = {k: r.run.scorer.percentile(k, torch.from_numpy(v)).tolist()
                   for k, v in r.scored.items()}
    write_csv(r.folder / "scores.csv", [
        {k: getattr(s, k) for k in ("key", "patient", "label", "finding", "view")}
        | {k: float(f"{v[i]:.6g}") for k, v in r.scored.items()}
        | {f"{k}_percentile": round(v[i], 1) for k, v in percentiles.items()}
        for i, s in enumerate(r.samples)])
    save_picture(r.folder / "scores.png", f"tested on {r.about}", tested=[r])
    order, near = np.argsort(r.scores), np.argsort(abs(r.scores - m["threshold"]))
    some = dict.fromkeys([*order[:-4:-1], *near[:3], *order[:3]])
    draw_cases(r, "examples.png", "highest, borderline and lowest scores", [*some])
    missed, flagged = worst(r)
    draw_cases(r, "worst.png", f"{len(missed)} of {m['n_abnormal']} abnormal images missed, "
               f"{len(flagged)} of {m['n_normal']} normal images flagged: the worst of them",
               missed[:8], flagged[:8])
    if not r.external:
        try:
            draw_healing(r)
        except UserError as error:  # its validation images are gone
            log.info(f"          note: no healing.png ({error})")
    log.info(f"written   {r.folder}/: metrics.json, scores.csv and pictures")


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV. Texts that a spreadsheet would take for a formula get an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"'{v}" if isinstance(v, str) and v.startswith(("=", "+", "-", "@"))
                      else v for k, v in row.items()} for row in rows)
    train.write_file(file, text.getvalue())


def all_verdicts(groups: dict[str, list[Result]], weights: np.ndarray) -> Iterator[str]:
    """Compare each model with those after it, the best trivial score, a reader of the image alone
    and itself untrained: one sentence a model."""
    first = next(iter(groups.values()))[0]
    if not (known := first.metrics.get("baselines")):
        return
    every = {name: np.array([r.scores for r in group]) for name, group in groups.items()}
    best = max((k for k in known if k not in (IMAGE_ALONE, UNTRAINED)), key=known.get)
    for number, (name, group) in enumerate(groups.items(), 1):
        others = dict([*every.items()][number:]) | {
            k: np.array([r.baselines[k] for r in group]) for k in (best, IMAGE_ALONE, UNTRAINED)}
        yield f"AUROC of {name}, with 95 % intervals: " + "; ".join(
            verdict(other, *paired_difference(scores, every[name], first.labels, weights))
            for other, scores in others.items()) + "."


def cautions(tested: list[Result]) -> Iterator[str]:
    """Warn, in sentences, of changed data, and of thresholds that do not hold or cannot."""
    normals = min(r.metrics["n_validation_normals"] for r in tested)
    first, wanted = tested[0], tested[0].run.specificity
    if normals < 100:
        yield f"Careful: with {normals} validation normals the threshold is rough" + (
            ": it cannot hold. It takes 20, better 100." if normals < 20 else ".")
    if not all(r.external or same_data(r.metrics["data_fingerprint"], r.run.fingerprint)
               for r in tested):
        yield ("Careful: the images, their names or labels have changed since training. Train "
               "again, unless the test images alone were meant to change.")
    if far := [(m["specificity_at_threshold"], m["specificity_ci"])
               for m in (r.metrics for r in tested) if m["n_normal"]
               and m["specificity_at_threshold"] < wanted - 0.05
               and m["specificity_chance"] < 0.025]:
        yield (f"Careful: the threshold set for {100 * wanted:g} % specificity reaches "
               f"{decimal(*min(far))} on these normals. They differ from the {first.run.normals}. "
               f"{RECALIBRATE}")
    elif first.external:
        chosen = first.labels == (NORMAL if NORMAL in first.labels else ABNORMAL)
        yield from drift(first.run, first.scorer, first.traits[chosen], first.scores[chosen])
    if known := max(len(r.run.calibrated_on & {*r.digests}) for r in tested):
        yield (f"Careful: {known} of these images are among those that the threshold was "
               "calibrated on. Its specificity is flattered by them.")


def drift(run: TrainedRun, scorer: str, traits: np.ndarray, scores: np.ndarray) -> Iterator[str]:
    """Tell, in a sentence, if 20 images or more (traits [n,4], scores [n]) differ as a whole from
    those that the threshold comes from, by Kolmogorov-Smirnov tests at 5 % in all (Bonferroni).
    What is clear but slight (distributions that lie less than 0.15 apart) is not told."""
    found = list[str]()
    own = torch.column_stack([run.scorer.normal_traits, run.scorer.normal_scores[scorer]]).numpy()
    for name, x, y in zip((*TRAITS, "score"), np.column_stack([traits, scores]).T, own.T,
                          strict=True):
        test = ks_2samp(x, y)
        if len(x) >= 20 and test.pvalue < 0.05 / own.shape[1] and test.statistic > 0.15:
            found.append(f"{name} {np.median(x):.3g} instead of {np.median(y):.3g}")
    if found:
        yield (f"Careful: these images differ as a whole from the {run.normals} (medians: "
               f"{'; '.join(found)}). Unless many of them are abnormal, the threshold may not "
               f"hold. {RECALIBRATE}")


def report(tested: list[Result], groups: dict[str, list[Result]], weights: np.ndarray) -> None:
    """Show what was found, and write it to report.html or the comparison."""
    first, m, several = tested[0], tested[0].metrics, len(tested) > 1
    tables, sentences = [*result_tables(tested, groups)], [
        *all_verdicts(groups, weights), *cautions(tested)]
    facts = {
        "Trained on": "; ".join(dict.fromkeys(relative(r.run.config.data) for r in tested)),
        "Tested on": first.about,
        f"{first.split.capitalize()} images": f"{m['n_normal']:,} normal and {m['n_abnormal']:,} "
        f"abnormal, of {m['n_patients']:,} patients"
        + (f"; {len(first.bad)} could not be read" if first.bad else ""),
        "Tested before": f"{first.scored_before} times on this split, by this run",
        "Chosen by": "weights: the lowest loss on corrupted normal validation images; threshold: "
        f"{first.run.normals}. No abnormal image had a part in either."}
    log.info("\n" + "\n\n".join(["\n".join(map(": ".join, facts.items())),
                                 *itertools.starmap(text_table, tables), *sentences]) + "\n")
    for image, reason in first.bad.items():
        log.info(f"skipped   {image}: {reason}")
    if isinstance(first.source, KaggleSource):
        log.info(first.source.report())
    page, pictures = first.folder / "report.html", {}
    if several:
        own = not (first.external or first.run.calibration) and first.split == "test"
        page = first.run.folder.resolve().parent / (
            "comparison.html" if own else f"comparison-{first.folder.name}.html")
        draw_comparison([group[0] for group in groups.values()], page.with_suffix(".png"))
        pictures[page.with_suffix(".png")] = "ROC curves, histograms of scores, example cases"
    for name, (r, *_) in groups.items():
        pictures |= {r.folder / file: f"{name}: {text}" for file, text in PICTURES.items()
                     if not (several and file == "scores.png")}  # in comparison.png
        pictures[r.run.folder / "curves.png"] = f"{name}: loss in training"
    figures = [f'<figure class="scroll" tabindex="0"><figcaption>{escape(text)}</figcaption><img '
               f'alt="{escape(text)}" src="data:image/png;base64,'
               f'{base64.b64encode(picture.read_bytes()).decode()}"></figure>'
               for picture, text in pictures.items() if picture.exists()]
    # What became of the images that were found: the account of the intake, and the splits.
    images = dict(flow(first.source)) | {"careful": "; ".join(first.source.careful) or "nothing"}
    splits = read_splits(first.run.folder / "split.csv")
    images |= {} if first.external else {
        name: f"{len(splits.normals(name)):,} normal of {len(getattr(splits, name)):,}"
        for name in SPLITS}
    made = {r.run.name: f"{command_to_train(r.run.config)}\n{r.run.made_with}; data "
                        f"{r.run.fingerprint}" for r in tested}
    made["This test"] = (
        f"torch {torch.__version__}, numpy {np.__version__}, {first.run.setup.device.type}, "
        f"{first.run.setup.precision}; data {m['data_fingerprint']}")
    train.write_file(page, PAGE.substitute(
        title=escape(f"{' and '.join(groups)}, {'compared' if several else 'tested'}"),
        sentences="".join(f"<p>{escape(line)}</p>\n" for line in sentences),
        facts=html_list(facts), tables="".join(itertools.starmap(html_table, tables)),
        pictures="\n".join(figures), flow=html_list(images), made=html_list(made),
        today=datetime.date.today()))
    log.info(f"written   {page}: the results in one file, to open in a browser or to send on")


def relative(path: str) -> str:
    """Give the last part of an absolute path: what is sent on tells nothing of the machine."""
    return Path(path).name if os.path.isabs(path) else path


def command_to_train(config: Config) -> str:
    """Give what to type to train a run again: model, and every setting that is not the default."""
    words = ["python", "train.py"]
    for name, value in asdict(config).items():
        if isinstance(value, bool) and value != FIELDS[name].default:
            words.append(flag(name if value else f"no_{name}"))
        elif name == "model" or value != FIELDS[name].default:
            words += [flag(name), relative(str(value))]
    return shlex.join(words)


Table = tuple[str, list[str], list[list[str]], str]  # title, header, rows, note


def text_table(title: str, header: list[str], rows: list[list[str]], note: str) -> str:
    """Lay a table out as aligned text. The first cell of a row names it, and has no header."""
    lines = [["", *header], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line))
            for line in lines]
    return "\n".join([title, *map(str.rstrip, text), *textwrap.wrap(note, 99)])


def html_list(texts: dict[str, str]) -> str:
    """Write names and what they stand for as an HTML list."""
    return "\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in texts.items())


def html_table(title: str, header: list[str], rows: list[list[str]], note: str) -> str:
    """Write a table as HTML, in a region that scrolls."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in ("", *header))
    body = "\n".join(f'<tr><th scope="row">{escape(first)}</th>' + "".join(
        f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for first, *cells in rows)
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}"><table>'
            f"<caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}"
            f"</tbody></table></div>\n<p>{escape(note)}</p>\n")


def decimal(value: Any, ends: Sequence[float] | None = None) -> str:
    """'0.898', or with its interval '0.898 (0.850 to 0.936)'; '-' of no figure."""
    return "-" if value is None else f"{value:.3f}" + (
        f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def result_tables(tested: list[Result], groups: dict[str, list[Result]]) -> Iterator[Table]:
    """Make all tables of figures. Those by model hold means over the seeds."""
    first, names = tested[0].metrics, list(groups)

    def mean(group: list[Result], *keys: str) -> float | None:
        """Average a figure over seeds, found in their metrics under these keys."""
        found: list[Any] = [functools.reduce(getitem, keys, r.metrics) for r in group]
        return None if None in found else float(np.mean(found))

    def by_model(*keys: str) -> list[str]:
        return [decimal(mean(group, *keys)) for group in groups.values()]

    every = [(r.run.name, r.metrics) for r in tested] + [
        (f"{r.run.name}, {name}", m) for r in tested
        for name, m in r.metrics.get("scorers", {}).items() if name != r.scorer]
    yield f"Results, scorer {tested[0].scorer}", [
        "AUROC (95 % interval)", "average precision", "sensitivity", "specificity"], [
        [name, decimal(m["auroc"], m["auroc_ci"]),
         decimal(m["average_precision"], m["average_precision_ci"]),
         decimal(m["sensitivity_at_threshold"]),
         decimal(m["specificity_at_threshold"], m["specificity_ci"])] for name, m in every], (
        "AUROC needs both normal and abnormal images: not computed. " * (first["auroc"] is None)
        + f"At the threshold that {100 * first['specificity_wanted']:g} % of the "
        f"{tested[0].run.normals} stay under; specificity is the share of these normals under it. "
        f"Intervals: {RESAMPLES} bootstrap resamples of patients, the same for all; of specificity "
        "Wilson's.")
    if first["auroc"] is not None:
        points = []
        for (name, group), level in itertools.product(groups.items(), first["at_specificity"]):
            under, over = (mean(group, "at_specificity", level, k)
                           for k in ("specificity", "sensitivity"))
            points.append([f"{name}, {100 * float(level):g} %", decimal(under), decimal(over),
                           *(predictive_values(over, under, p) for p in PREVALENCES)])
        yield "Thresholds for a specificity, and predictive values", [
            "specificity", "sensitivity", *(f"{100 * p:g} % ill: PPV, NPV" for p in PREVALENCES)
            ], points, ("PPV: share of the flagged images that are abnormal; NPV: share of the "
                        "others that are normal; if so many of all images were abnormal.")
        if len(groups) < len(tested):
            seeds = {k: [r.metrics["auroc"] for r in group] for k, group in groups.items()}
            yield "AUROC over seeds; the tables below hold means over them", [
                "seeds", "mean", "standard deviation", "lowest", "highest"], [
                [k, str(len(x)), *map(decimal, (np.mean(x), np.std(x, ddof=1), min(x), max(x)))]
                for k, x in seeds.items() if len(x) > 1], ""
        yield "AUROC of baselines", names, [
            [name, *by_model("baselines", name)] for name in first["baselines"]
            ], "Trivial scores are taken in their better direction, which favours them."
        for kind in ("finding", "view"):
            if found := first[key := f"auroc_by_{kind}"]:
                yield f"AUROC by {kind}", ["images", *names], [
                    [name, str(group["n"]), *by_model(key, name, "auroc")]
                    for name, group in found.items()], ""
    if "n_located" in first:
        rows = {"pixel AUROC": "pixel_auroc", "map peak in lesion": "peak_in_lesion",
                "map peak in lesion, the smaller half": "peak_in_small_lesion",
                "map peak in lesion, the larger half": "peak_in_large_lesion",
                "share of map in lesion": "energy_in_lesion"}
        yield f"Where the maps point: {first['n_located']} lesions", names, [
            [title, *by_model(key)] for title, key in rows.items()], (
            f"The peak may lie {100 * PEAK_TOLERANCE:g} % of the image side beside the lesion. "
            f"Lesions cover {decimal(first['lesion_area'])} of the image.")


# ----------------------------------------------------------------------------------------------
# Pictures and page

UNITS = {"reader": "how much looks\nlike a lesion, 0 to 1",
         "zscore": "residual in standard deviations\nof training normals"}


class Row(NamedTuple):
    """A row of a picture: a text beside it, and images with what there is above and over each."""

    beside: str
    images: Sequence[np.ndarray] | np.ndarray  # each [H,W] in [0,1]
    above: Sequence[str] = ()
    maps: Sequence[np.ndarray | None] = ()  # anomaly maps, each [H,W], at least 0
    masks: Sequence[np.ndarray | None] = ()  # of lesions to outline, each bool [H,W]


@matplotlib.style.context({"text.parse_math": False}, after_reset=True)  # a $ in a name is a $
def save_picture(file: Path, title: str, rows: Sequence[Row] = (), scorer: str = "",
                 top: float = 1.0, tested: Sequence[Result] = ()) -> None:
    """Save a picture, whatever the user's settings of matplotlib: ROC curves and scores of tests,
    and below them rows of images. top: where the maps' colours end, the same in all pictures."""
    columns = max((len(row.images) for row in rows), default=3)
    wide = max(1.7 * columns + 1.2, 4.2 * (1 + len(tested)) * bool(tested))  # inches
    heights = [4.6] * bool(tested) + [2.0 * len(rows)] * bool(rows) or [0.1]
    figure = Figure(figsize=(wide, sum(heights)))
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if tested:
        draw_scores(parts[0], tested)
    if rows:
        draw_grid(parts[-1], rows, columns, scorer, top)
    title = "\n".join(textwrap.fill(line, int(12 * wide)) for line in title.split("\n"))
    figure.text(0.5, 1 + 0.3 / sum(heights), title, fontsize=9, ha="center", va="bottom")
    figure.savefig(file, dpi=110, bbox_inches="tight")


def draw_grid(figure: Any, rows: Sequence[Row], columns: int, scorer: str, top: float) -> None:
    """Draw rows of images, and beside them what the colours of maps mean."""
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={
        "left": 0, "right": 1, "bottom": 0, "top": 0.98, "wspace": 0.05, "hspace": 0.2})
    for line, row in zip(grid, rows, strict=True):
        line[0].set_ylabel(row.beside, fontsize=8)
        for axes, image, above, map_, mask in itertools.zip_longest(line, *row[1:]):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if image is not None:
                axes.imshow(image, "gray", vmin=0, vmax=1)
                axes.set_title(above or "", fontsize=8, pad=3)
            if map_ is not None:  # opaque where it is high
                axes.imshow(map_, "inferno", vmin=0, vmax=top,
                            alpha=np.clip(map_ / top, 0, 1) * 0.85)
            if mask is not None and mask.any():
                axes.contour(mask, [0.5], colors="#56B4E9", linewidths=1)
    figure.colorbar(ScalarMappable(Normalize(0, top), "inferno"), ax=grid, pad=0.02, aspect=15,
                    extend="neither" if scorer == DEFAULT_SCORER else "max", fraction=0.05,
                    shrink=min(1, 1.3 / len(rows)), label=UNITS.get(scorer, scorer))


def draw_scores(figure: Any, tested: Sequence[Result]) -> None:
    """Draw the ROC curves of tests, and beside them histograms of the scores on one scale."""
    roc, *histograms = figure.subplots(1, 1 + len(tested), gridspec_kw={
        "wspace": 0.3, "bottom": 0.18, "top": 0.95})
    for axes in histograms[1:]:
        axes.sharey(histograms[0])
    roc.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle=":", label="guessing")
    every = np.concatenate([r.scores for r in tested])
    bins = np.linspace(every.min(), max(np.quantile(every, 0.995), every.min() + 1e-9), 31)
    for r, axes, colour in zip(tested, histograms, itertools.cycle(COLOURS), strict=False):
        if r.metrics["auroc"] is not None:
            told = decimal(r.metrics["auroc"], r.metrics["auroc_ci"])
            roc.plot(*roc_curve(r.labels, r.scores)[:2], color=colour, linewidth=2,
                     label=f"{r.run.name}: {told}")
        scores = r.scores.clip(max=bins[-1])  # the last bar takes what lies beyond
        for label, name, shade in ((NORMAL, "normal", "0.55"), (ABNORMAL, "abnormal", colour)):
            axes.hist(scores[r.labels == label], bins, color=shade, alpha=0.65, label=name)
        axes.axvline(r.metrics["threshold"], color="0.1", linestyle="--", linewidth=1.2,
                     label=f"threshold ({100 * r.metrics['specificity_wanted']:g} % of\n"
                           f"{'validation' if not r.run.calibration else 'calibration'} normals)")
        axes.set(xlabel=f"anomaly score ({r.scorer})", ylabel="images", title=r.run.name)
        axes.legend(frameon=False, fontsize=9)
    roc.legend(loc="lower right", frameon=False, fontsize=9, handlelength=1)
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal",
            title="ROC; AUROC (95 % interval)", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))


def describe_sample(sample: Sample) -> str:
    """Name an image in a picture: its finding, shortened."""
    return "normal" if sample.label == NORMAL else (sample.finding or "abnormal")[:18]


def picture_rows(r: Result, images: Tensor, above: Sequence[str] = (),
                 masks: Sequence[np.ndarray | None] = (), every: bool = False) -> list[Row]:
    """Make rows of uint8 images [n,1,H,W]: the images with texts above, the reconstruction that the
    scorer sees (or every one), and the maps with scores above and lesions outlined."""
    output, scores, maps = r.run.score(images)
    output = output if every else output.seen_by(r.scorer)
    views = torch.cat([output.images, output.reconstructions, maps[r.scorer]], 1).cpu().numpy()
    seen, *backs, found = views.swapaxes(0, 1)
    names = [f"reconstruction{f' {i}' * (len(backs) > 1)}" for i in range(1, len(backs) + 1)]
    told = [f"score {score:.3g}" for score in scores[r.scorer].tolist()]
    return [Row("image", seen, above), *map(Row, names, backs),
            Row("anomaly map", seen, told, found, masks)]


def tested_rows(r: Result, positions: Sequence[int]) -> tuple[Row, Row, Row]:
    """Make rows of tested images, which are read once more: images, reconstructions and maps."""
    samples = [r.samples[i] for i in positions]
    stream = r.run.stream(r.source, samples)
    images = [images for images, _ in stream]
    for key, reason in stream.bad.items():
        raise UserError(f"--data {r.source.spec}: {key} was scored, but cannot be read again for "
                        f"its picture ({reason})")
    above = [f"{s.key.rpartition('/')[2][-18:]}\n{describe_sample(s)}" for s in samples]
    image, back, map_ = picture_rows(r, torch.cat(images), above, [*map(r.mask, samples)])
    return image, back, map_


def worst(r: Result) -> tuple[list[int], list[int]]:
    """(missed, false alarms): positions on the wrong side of the threshold, the worst first."""
    order = np.argsort(r.scores, kind="stable")
    flagged, sick = r.scores[order] > r.metrics["threshold"], r.labels[order] == ABNORMAL
    return order[sick & ~flagged].tolist(), order[~sick & flagged][::-1].tolist()


def draw_cases(r: Result, name: str, title: str, *groups: list[int]) -> None:
    """Draw tested images, those at the positions of each group in rows of their own."""
    rows = [row for group in groups if group for row in tested_rows(r, group)]
    save_picture(r.folder / name, f"{r.run.name}, tested on {r.about}\n{title}, threshold "
                 f"{r.metrics['threshold']:.3g}", rows, r.scorer, r.run.scorer.map_tops[r.scorer])


def draw_healing(r: Result) -> None:
    """Draw validation normals, lesions drawn on them, and what the model makes of these."""
    config, clean = r.run.config, r.run.some_normals(r.source, "val", 6)
    draws = models.Draws(models.seeded(config.seed, "picture", 0), len(clean))
    seen, there = models.draw_lesions(clean / 255, draws, vary=False)
    drawn, *rows = picture_rows(r, (255 * seen).round().byte(), (),
                                list(there[:, 0].numpy() > 0.5), every=True)
    rows = [Row("normal", clean[:, 0].numpy() / 255), drawn._replace(beside="lesions drawn"), *rows]
    save_picture(r.folder / "healing.png", f"{r.run.name}: normal images with lesions drawn on",
                 rows, r.scorer, r.run.scorer.map_tops[r.scorer])


def draw_comparison(tested: list[Result], file: Path) -> None:
    """Draw ROC and histograms of all runs, and below the same example cases through every model:
    those with the middle score of the six most common findings, so that nothing is picked by hand.
    """
    first, kinds = tested[0], [describe_sample(s) for s in tested[0].samples]
    order, rows = np.argsort(first.scores).tolist(), list[Row]()
    cases = [[i for i in order if kinds[i] == kind][count // 2]
             for kind, count in Counter(kinds).most_common(6)]
    for r in tested:
        image, *others = tested_rows(r, cases)
        rows = rows or [image]
        rows += [row._replace(beside=f"{textwrap.fill(r.run.name, 22)}\n{row.beside}")
                 for row in others]
    save_picture(file, f"{first.metrics['n_normal']} normal and {first.metrics['n_abnormal']} "
                 f"abnormal images, tested on {first.about}", rows, first.scorer,
                 max(r.run.scorer.map_tops[r.scorer] for r in tested), tested)


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark }
body { max-width: 72rem; margin: auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-top: 1px solid #8888; padding-top: 1rem }
p, dl { max-width: 46rem } dt, caption { font-weight: 600 } dd { white-space: pre-wrap }
.use { border-left: .3rem solid #d55e00; padding-left: .7rem; font-weight: 600 }
.scroll { overflow-x: auto; margin: 1.5rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td, caption { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0 }
th, td { border-bottom: 1px solid #8888; min-width: 4.2rem; max-width: 22rem }
tbody th { font-weight: 400; min-width: 8rem }
img { display: block; max-width: 100%; background: #fff }
@media screen and (max-width: 48rem) { img { max-width: none; max-height: 80vh } }
@media print { body { font-size: 10pt; max-width: none } table { font-size: 8pt }
  figure, tr { break-inside: avoid } img { max-height: 22cm } @page { margin: 15mm } }
</style></head>
<body><header><p class="use">Research use only. Not for diagnosis.</p><h1>$title</h1>
$sentences<dl>$facts</dl></header>
<main><h2>Results</h2>$tables
<h2>Pictures</h2><p>Maps are bright where an image is unlike what the model expects of a normal one.
Blue outlines are true lesions, where these are known. Of several seeds the first is shown.</p>
$pictures
<h2>Flow of images</h2><p>What was found in the data, what it was taken for, and what was left out.
</p><dl>$flow</dl>
<h2>Training and reproduction</h2><dl>$made</dl></main>
<footer><p>Made by ImgAE-Dx on $today. This file holds images of the test data and their names: mind
to whom you give it. Research use only, not for diagnosis.</p></footer></body></html>
""")


# ----------------------------------------------------------------------------------------------
# Prediction


TOLD = ("{image}: score {score:.4g}, percentile {percentile_among_normals:.0f} among normals, "
        "{verdict} (threshold {threshold:.4g})")


class NewImages(FolderSource):
    """An image file, or all in a folder but pictures of earlier predictions, without labels."""

    def __init__(self, path: Path) -> None:
        self.spec, self.root, files = str(path), path.parent, [path]
        if path.is_dir():
            self.root, files = path, sorted(path.rglob("*"))
            made = {f"{str(p)[:-8]}_{kind}.png" for p in files if p.name.endswith("_map.npy")
                    for kind in ("heatmap", "overlay")}
            files = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and str(p) not in made]
        # A pipe would be waited for.
        names = [p.relative_to(self.root).as_posix() for p in files if p.is_file()]
        if not names:
            raise UserError(f"--image {path}: " + (
                f"no images in this folder (looked for {', '.join(IMAGE_SUFFIXES)})"
                if path.is_dir() else f"there is no file at {path.resolve()}"))
        self.name, self.masks, self.boxes, self.left_out = path.stem, {}, {}, Counter()
        self.samples = [Sample(name, name, NORMAL) for name in names if is_text(name)]
        self.bad = {ascii(name)[1:-1]: "its name is not UTF-8" for name in names
                    if not is_text(name)}  # neither table nor picture could hold it


def predict(run: str | Path, image: str | Path, out: str | Path | None = None,
            scorer: str | None = None, device: str = "auto", specificity: float | None = None,
            calibration: str | None = None) -> list[dict[str, Any]]:
    """Score an image file, or every image in a folder that can be read; a row of results for each.
    Writes NAME_heatmap.png, NAME_overlay.png (in the image's own size), NAME_map.npy (float32
    [H,W]) and predictions.csv to `out`, by default <run>/predictions, with a number if predictions
    lie there already."""
    with on_screen():
        trained, by = load_run(run, device, calibration, specificity), scorer_called(scorer)
        threshold, top = trained.threshold(by), trained.scorer.map_tops[by]
        source, rows, number = NewImages(Path(image)), list[dict[str, Any]](), 1
        wanted = folder = Path(out) if out else trained.folder / "predictions"
        while (folder / "predictions.csv").exists():
            folder, number = Path(f"{wanted}-{number + 1}"), number + 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
        stream, traits = trained.stream(source, source.samples), list[np.ndarray]()
        stems, side = distinct_stems([s.key for s in source.samples]), trained.config.image_size
        try:
            with train.progress(len(stems), "scoring") as bar:
                for images, positions in stream:
                    traits.append(trained.scorer.traits(images).numpy())
                    for i, (seen,), (back,), (map_,), score in zip(
                            positions.tolist(), images.numpy() / np.float32(255),
                            *trained(images, by), strict=True):
                        percentile = trained.scorer.percentile(by, torch.tensor(score)).item()
                        y, x = divmod(int(map_.argmax()), side)
                        rows.append({"image": source.samples[i].key,
                                     "score": round(score.item(), 6),
                                     "percentile_among_normals": round(percentile, 1),
                                     "threshold": round(threshold, 6),
                                     "verdict": "abnormal" if score > threshold else "normal",
                                     "peak_x": round((x + 0.5) / side, 3),
                                     "peak_y": round((y + 0.5) / side, 3)})
                        np.save(folder / f"{stems[i]}_map.npy", map_)
                        titles = ["input", "reconstruction", "anomaly map"]
                        row = Row("", [seen, back, seen], titles, [None, None, map_])
                        save_picture(folder / f"{stems[i]}_heatmap.png",
                                     f"{TOLD.format(**rows[-1])} ({trained.name})", [row], by, top)
                        overlay(stream, i, map_ / top).save(folder / f"{stems[i]}_overlay.png")
                        bar.update(1)
        finally:  # also when it was interrupted
            if rows:
                write_csv(folder / "predictions.csv", rows)
        bad = source.bad | stream.bad
        if not rows:
            raise UserError(f"--image {image}: cannot be read as an image ({min(bad.values())})")
        log.info("\n".join([
            *(f"skipped   {name}: {reason}" for name, reason in bad.items()),
            *(TOLD.format(**row) for row in rows[:40]),
            *[f"... and {len(rows) - 40} more in predictions.csv"] * (len(rows) > 40),
            f"{trained.name} trained on {trained.config.data}; abnormal means: above "
            f"{100 * trained.specificity:g} % of {trained.normals}. Not a diagnosis.",
            *drift(trained, by, np.concatenate(traits), np.array([r["score"] for r in rows])),
            f"written   {folder}/: for each image a heatmap, an overlay in its own size (.png) and "
            "the raw map (.npy); predictions.csv"]))
    return rows


def overlay(stream: ImageStream, position: int, map_: np.ndarray) -> Image.Image:
    """Lay an anomaly map [H,W], 1 where its colours end, over the image at its own size and shape,
    at most OVERLAY_SIDE a side."""
    sample, hold = stream.samples[position], functools.partial(stream.memory.hold, "pixels")
    sides = stream.source.size_of(sample)
    width, height = (round(side * min(1, OVERLAY_SIDE / max(sides))) or 1 for side in sides)
    values = decode_image(stream.source.read(sample), max(width, height), hold, stream.bits)
    image = Image.fromarray(values).resize((width, height)).convert("RGB")
    heat = Image.fromarray(map_.clip(0, 1)).resize((width, height), Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps["inferno"](np.asarray(heat), bytes=True)[..., :3]
    cover = Image.fromarray((0.85 * 255 * np.asarray(heat)).astype(np.uint8))
    return Image.composite(Image.fromarray(colours), image, cover)


def distinct_stems(names: list[str]) -> list[str]:
    """Name each image's results; with a digest where two would be equal, or a name too long."""
    stems = [name.rpartition(".")[0].replace("/", "__") for name in names]
    counts = Counter(stem.lower() for stem in stems)
    return [stem if counts[stem.lower()] == 1 and len(os.fsencode(stem)) <= 200 else
            f"{stem[-40:]}-{hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()}"
            for stem, name in zip(stems, names, strict=True)]


# ----------------------------------------------------------------------------------------------
# Another site, and elsewhere


def calibrate(run: str | Path, folder: str, calibration: str | None = None,
              specificity: float | None = None, normal: str | None = None,
              device: str = "auto") -> Path:
    """Take the normal images in a folder for threshold and percentiles: those labelled so, or all
    if nothing there tells; none that the run was trained or validated on. Writes only
    RUN/calibration-NAME.pt. UserError if they are too few, or the name is taken."""
    with on_screen():
        trained, wanted = load_run(run, device), SPECIFICITY if specificity is None else specificity
        trained.specificity, needed = wanted, max(FEWEST_NORMALS, normals_needed(wanted))
        name = calibration or re.sub(r"[^\w.-]+", "_", Path(folder).resolve().name)
        file = trained.folder / f"calibration-{name}.pt"
        if not re.fullmatch(r"[\w.-]+", name) or file.exists():
            why = f"{file} is there already; give another" if file.exists() else "give a"
            raise UserError(f"--calibration {name}: {why} name, of letters, digits, '.', '_', '-'")
        try:
            source: Source = open_source(replace(
                trained.config, data=folder, samples=None, normal=normal or trained.config.normal))
            log.info(f"normals   those labelled so among the {len(source.samples):,} images of "
                     f"{source.title}")
        except Unlabelled:
            source = NewImages(Path(folder))
            log.info(f"normals   all {len(source.samples):,} images in {folder}: no table and no "
                     "folder there says what they are")
        r = Result(trained, source, [s for s in not_learnt(trained, source, source.samples)
                                     if s.label == NORMAL])
        score_samples(r)
        for key, reason in r.bad.items():
            log.info(f"skipped   {key}: {reason}")
        scores, n = torch.from_numpy(r.scores), len(r.samples)
        if n < needed:
            raise UserError(f"--calibrate {folder}: {n} normal images can be used; "
                            f"{100 * wanted:g} % specificity takes {needed} or more, better 100")
        low, high = scores.log().quantile(scores.new_tensor([0.25, 0.75]))
        odd = np.flatnonzero(scores.log() > high + 3 * (high - low))  # Tukey 1977: far out
        if len(odd):
            log.warning(f"careful   {len(odd)} of these images score far above the others: are "
                        f"they normal? {', '.join(r.samples[i].key for i in odd[:5])}")
        own, old = trained.scorer.normal_scores[DEFAULT_SCORER], trained.threshold(DEFAULT_SCORER)
        trained.scorer.refer_to({k: torch.from_numpy(v) for k, v in r.scored.items()},
                                torch.from_numpy(r.traits))
        train.write_file(file, {
            "format": train.FORMAT, "made_for": digest(own), "images": r.digests,
            "normal_scores": trained.scorer.normal_scores,
            "normal_traits": trained.scorer.normal_traits})
        # Judged by the threshold of the n - 1 others, as many images stay under as its rank there.
        told = [decimal(k / n, tuple(binomtest(k, n).proportion_ci())) for k in (
            int((scores <= old).sum()), math.ceil(round(n * wanted, 9)))]
        log.info(f"threshold {trained.threshold(DEFAULT_SCORER):.4g} instead of {old:.4g}, for "
                 f"{100 * wanted:g} % specificity, which takes {normals_needed(wanted)} normal "
                 f"images or more\nspecificity on these {n} images: before {told[0]}; now "
                 f"{told[1]}, each judged by the others (95 % intervals: Clopper-Pearson)\n"
                 f"written   {file}\nnext      {command('evaluate.py')} "
                 f"{shlex.quote(str(trained.folder))} --calibration {name} --image NEW_IMAGES")
    return file


class Exported(nn.Module):
    """A run as one graph: image float [1,1,H,W] in [0,1] -> score [1], percentile [1], whether it
    is abnormal, bool [1], and anomaly map [1,1,H,W]."""

    def __init__(self, run: TrainedRun, scorer: str) -> None:
        super().__init__()
        self.model: Any = run.model
        self.scorer, self.by, self.threshold = run.scorer, scorer, run.threshold(scorer)
        self.readers = nn.ModuleDict(run.scorer.readers)  # so that their weights are the graph's
        self.normal = run.scorer.normal_scores[scorer].float()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        output = Output(image, torch.cat(self.model.reconstructions(image), 1))
        map_ = self.scorer.maps(output)[self.by]
        score = map_.mean((1, 2, 3))
        percentile = 100 * (self.normal <= score[:, None]).float().mean(1)
        return score, percentile, score > self.threshold, map_


def export(run: str | Path, file: str | Path, scorer: str | None = None,
           specificity: float | None = None, calibration: str | None = None) -> Path:
    """Write a run as one graph in fp32, FILE.onnx or FILE.pt2 (torch.export). It is kept only if it
    gives eight validation images the program's scores, to a thousandth of the normals' standard
    deviation; UserError if not, or if a package is missing."""
    with on_screen():
        file, scorer = Path(file), scorer_called(scorer)
        if file.suffix not in (".onnx", ".pt2"):
            raise UserError(f"--export {file}: give a name that ends in .onnx or .pt2")
        if not os.access(file.parent, os.W_OK):
            raise UserError(f"--export {file}: {file.parent} cannot be written")
        trained = load_run(run, "cpu", calibration, specificity)
        images = trained.some_normals(open_source(trained.config), "val", 8)[:8]
        as_it_runs, precision = trained.score(images)[1][scorer], trained.setup.precision
        trained.setup = Setup(torch.device("cpu"))
        trained.model = trained.model.to(memory_format=torch.contiguous_format)
        in_fp32 = trained.score(images)[1][scorer]
        about = {"made_by": f"ImgAE-Dx, {trained.name}; research use only", "scorer": scorer,
                 "threshold": f"{trained.threshold(scorer):.6g}, above "
                              f"{100 * trained.specificity:g} % of {trained.normals}",
                 "input": f"image: float32 {[1, *images.shape[1:]]} in 0 to 1",
                 "preprocessing": "grey (ITU-R 601), the whole image stretched to this square by "
                                  "antialiased bilinear resampling, rounded to 0..255, over 255",
                 "output": f"{', '.join(OUTPUTS)}: score; its percentile among normal images; "
                           f"whether it is above the threshold; map, {UNITS.get(scorer, scorer)}"}
        graph = Exported(trained, scorer).eval().requires_grad_(False)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(graph, (images[:1] / 255,))
            if file.suffix == ".onnx":
                content, answer = to_onnx(program, about)
            else:
                made = io.BytesIO()
                torch.export.save(program, made, extra_files={"about.json": json.dumps(about)})
                content, answer = made.getvalue(), torch.export.load(made).module()
            found = torch.cat([torch.as_tensor(answer(x[None] / 255)[0]) for x in images])
        spread = trained.scorer.normal_scores[scorer].std()
        away, usual = ((abs(found - scores).max() / spread).item()
                       for scores in (in_fp32, as_it_runs))
        if not away <= 1e-3:
            raise UserError(f"--export {file}: not kept, since its scores are up to {away:.2g} "
                            "standard deviations of normals away from the program's")
        train.write_file(file, content)
        log.info(f"written   {file}: {len(content) / 1e6:.1f} MB; image -> "
                 f"{', '.join(OUTPUTS)}\nchecked   on {len(images)} validation images: scores at "
                 f"most {away:.1g} standard deviations of normals away from the program's in fp32, "
                 f"and {usual:.1g} from those in {precision}, as it runs here")
    return file


def to_onnx(program: Any, about: dict[str, str]) -> tuple[bytes, Callable]:
    """(an exported program as ONNX, what runs it: onnxruntime if that is installed). UserError if
    onnxscript is not, PyTorch is older than its use of that, or the model is larger than a file."""
    try:
        import onnxscript  # noqa: F401
        if TorchVersion(torch.__version__) < "2.6":
            raise ImportError
    except ImportError:
        raise UserError("--export: ONNX needs PyTorch 2.6 or newer, and a package: pip install "
                        "onnxscript onnxruntime; a name that ends in .pt2 needs neither") from None
    if sum(weight.nbytes for weight in program.state_dict.values()) > 2e9:
        raise UserError("--export: an ONNX file holds at most 2 GB; give a name that ends in .pt2")
    made = torch.onnx.export(program, (), input_names=["image"], output_names=OUTPUTS, dynamo=True,
                             verbose=False)
    made.model.metadata_props.update(about)
    content = made.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        log.warning("careful   onnxruntime is not installed: what was written has not been run")
        return content, program.module()
    session = onnxruntime.InferenceSession(content)
    return content, lambda image: session.run(None, {"image": image.numpy()})


def main() -> None:
    """Do what the command line asks for."""
    given = parse_arguments()
    tasks: dict[str, Callable] = {"image": predict, "calibrate": calibrate, "export": export}
    try:
        if task := next((name for name in tasks if name in given), None):
            tasks[task](given.pop("runs")[0], given.pop(task), **given)
        else:
            evaluate(**given)
    except (RuntimeError, MemoryError) as error:
        if not train.is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({train.reason_of(error)[:200]}); does another program "
                        "use it? Give fewer runs at a time, or --device cpu") from None
