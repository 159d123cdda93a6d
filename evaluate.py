"""Test trained runs, compare them, or score new images.

    python evaluate.py runs/unet                          on the test split of its own data
    python evaluate.py runs/unet runs/reversed_ae         both, and the comparison
    python evaluate.py runs                               all that was trained there last
    python evaluate.py runs/unet --data other_xrays       an external test
    python evaluate.py runs/unet --image film.png         score new images, with heatmaps
"""

import os
import sys
from typing import Any

from config import UserError, command, command_line, make_parser, require_packages, run_command


def parse_arguments(argv: list[str] | None = None) -> dict[str, Any]:
    """Keyword arguments for `evaluate` or `predict` from the command line."""
    parser = make_parser("evaluate.py", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder, e.g. runs/unet, or "
                        "the folder above: what was trained there last, all models and seeds")
    parser.add_argument("--data", metavar="SPEC", help="other data to test on: synthetic, a "
                        "folder, a CSV or kaggle:owner/name (default: what the run was trained on)")
    parser.add_argument("--split", default="test", metavar="{test,val}",
                        help="val: choose settings there, never on test (default: test)")
    parser.add_argument("--samples", type=int, metavar="N",
                        help="at most N images, drawn evenly from both labels (default: all)")
    parser.add_argument("--scorer", metavar="NAME", help="fused, zscore, peak, texture, haze, "
                        "trace, features, mse, mae, ssim, or all for a table of every one "
                        "(default: fused)")
    parser.add_argument("--image", metavar="PATH", help="score this image, or every image in "
                        "this folder, instead of testing")
    parser.add_argument("--out", metavar="DIR", help="where --image writes (default: predictions "
                        "in the run folder)")
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,mps}")
    arguments = vars(parser.parse_args(command_line() if argv is None else argv))
    if not arguments["runs"]:
        raise UserError("which run? Name its folder, such as runs/unet; --help says more")
    if arguments["samples"] is not None and arguments["samples"] < 1:
        raise UserError(f"--samples: {arguments['samples']} is less than 1")
    arguments["runs"] = [os.path.expanduser(run) for run in arguments["runs"]]
    return arguments


if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    if status := (run_command(parse_arguments, "evaluate.py")
                  or run_command(require_packages, "evaluate.py")):
        sys.exit(status)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

import base64
import contextlib
import csv
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import math
import platform
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import sklearn
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageFilter
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from config import Config, flag, load_config, quoted
from data import (
    ABNORMAL,
    IMAGE_SUFFIXES,
    NORMAL,
    BadImage,
    ImageStream,
    KaggleSource,
    Sample,
    Source,
    decode_image,
    is_text,
    open_source,
    read_splits,
)
from models import (
    DEFAULT_SCORER,
    SCORERS,
    Z_MAPS,
    AnomalyScorer,
    Draws,
    Reading,
    corrupt,
    create_model,
    folded,
    map_name,
    no_autocast,
)
from train import (
    CHANGEABLE,
    READ_AT_ONCE,
    TRAINED,
    Progress,
    autocast,
    choose_device,
    choose_precision,
    first_line,
    is_out_of_memory,
    load_checkpoint,
    place,
    plot_curves,
    score_evenly,
    seeded,
)

RESAMPLES = 1000
NAMES = {"unet": "U-Net", "reversed_ae": "Reversed AE"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
matplotlib.rcParams["text.parse_math"] = False  # a name with a $ in it is a name
PEAK_TOLERANCE = 0.03  # of the image side: how far beside a lesion a map's peak may lie
LOCATED = (("peak_in_lesion", "map peak in lesion"), ("peak_in_small_lesion", "  the smaller half"),
           ("peak_in_large_lesion", "  the larger half"),
           ("energy_in_lesion", "share of map in lesion"))


@dataclasses.dataclass
class Run:
    """A trained model with its calibrated scorer, ready to score."""

    folder: Path
    name: str  # for tables and figures
    config: Config
    model: nn.Module
    scorer: AnomalyScorer
    device: torch.device
    precision: str
    fingerprint: str  # of the data it was trained on
    made_with: str  # versions, device and precision of its training
    parameters: int  # of the model as it was trained

    @torch.no_grad()
    def read(self, images: Tensor, scorer: str = DEFAULT_SCORER,
             ) -> tuple[Reading, dict[str, Tensor], Tensor]:
        """What the model makes of uint8 images [n,1,H,W], their scores [n] by every scorer, and
        their anomaly maps [n,1,H,W] by `scorer`. An image's do not depend on the images beside
        it."""
        return score_evenly(
            self.model, self.scorer, images, self.device, self.precision, scorer)

    @contextlib.contextmanager
    def weights_kept(self) -> Iterator[None]:
        """While inside, the weights that autocast has cast are kept, instead of being cast for each
        batch anew: on a GPU those of the Reversed AE are 270 million numbers."""
        if self.precision == "fp32":
            yield
            return
        with autocast(self.device, self.precision), no_autocast(self.device):  # for the scores
            yield


def load_run(path: str | Path, device: str = "auto") -> Run:
    """The run in a folder, from its best.pt. UserError if there is none, or it is unfinished."""
    folder = Path(path)
    if folder.suffix == ".pt":
        raise UserError(f"{folder}: give the run folder, not a checkpoint")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no run folder there; train one with "
                        f"{command('train.py')}")
    if not (folder / "best.pt").exists():
        inside = quoted(*(str(p.parent) for p in sorted(folder.glob("*/best.pt"))))
        raise UserError(f"{folder}: " + (
            f"not a run folder itself; in it are {inside}" if inside else
            "holds no trained model, not even of one epoch; train one with "
            f"{command('train.py')}"))
    state = load_checkpoint(folder / "best.pt")
    config = Config(**state["config"])
    with contextlib.suppress(UserError):  # where its data lies by now
        config = dataclasses.replace(config, data=load_config(folder).data)
    if not state["scorer"]:
        raise UserError(f"{folder}: training has not finished, so its scores are not calibrated; "
                        f"wait for it, or go on with: {command('train.py')} --model {config.model} "
                        f"--resume {quoted(str(folder))} (--epochs {state['epoch']} ends it now)")
    where, _ = choose_device(device)
    precision, _ = choose_precision(config.precision, where)
    model = create_model(config.model, config)
    model.load_state_dict(state["model"])
    scorer = AnomalyScorer()
    scorer.load_state_dict(state["scorer"])
    name = NAMES[config.model]
    if folder.resolve().name != config.model:
        name += f" ({folder.resolve().name})"
    if state["precision"] != precision:
        print(f"note      {folder} was calibrated in {state['precision']} and scores in "
              f"{precision} here: scores differ a little")
    if not scorer.trace.any():
        print(f"note      drawn lesions leave no trace in the reconstructions of {folder}: the "
              "score trace is 0 for every image, and fused goes by its other parts")
    made_with = (", ".join(f"{k} {v}" for k, v in state["versions"].items())
                 + f", {state['device']}, {state['precision']}")
    return Run(folder, name, config, place(folded(model), where, precision), scorer, where,
               precision, state["data_fingerprint"], made_with,
               sum(p.numel() for p in model.parameters()))


# ----------------------------------------------------------------------------------------------
# Statistics


def weighted_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of scores [n] against labels [n] in {0,1} under each row of weights [R,n]: [R].

    The probability that an abnormal image scores higher than a normal one, ties counting half.
    NaN where a row has no image of one label left.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    w, y = weights[:, order], labels[order]
    positive = np.add.reduceat(w * y, starts, axis=1)
    negative = np.add.reduceat(w * (1 - y), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    with np.errstate(invalid="ignore"):
        return (positive * (below + negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1))


def weighted_average_precision(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Average precision under each row of weights [R,n]: [R]; equal scores enter together."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(-scores[order], prepend=-np.inf))
    w, y = weights[:, order], labels[order]
    gained = np.add.reduceat(w * y, starts, axis=1)
    positive = np.cumsum(gained, axis=1)
    called = np.cumsum(np.add.reduceat(w, starts, axis=1), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(called > 0, positive / called, 0.0)
        return (gained * precision).sum(1) / positive[:, -1]


def patient_weights(patients: Sequence[str], resamples: int = RESAMPLES,
                    seed: int = 0) -> np.ndarray:
    """How often each image [n] is drawn when whole patients are drawn with replacement: [R,n]."""
    names, of_image = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = np.empty((resamples, len(of_image)), dtype=np.float32)
    for row in weights:
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        row[:] = drawn[of_image]
    return weights


def bootstrap(metric: Callable[..., np.ndarray], scores: np.ndarray, labels: np.ndarray,
              weights: np.ndarray) -> np.ndarray:
    """The metric under each row of weights [R,n]: [R]; a few rows at a time, which is faster and
    takes less memory."""
    parts = np.array_split(weights, max(1, weights.size // 500_000))
    return np.concatenate([metric(scores, labels, part) for part in parts])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Central 95 % of bootstrap values, NaNs left out."""
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, (0.025, 0.975)) if len(values) else (math.nan, math.nan)
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share that was counted among n (Wilson 1927), images taken as
    independent."""
    z2 = 1.96**2
    middle, half = share + z2 / (2 * n), 1.96 * math.sqrt((share * (1 - share) + z2 / (4 * n)) / n)
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def chance_of_so_few(under: int, n: int, rank: int, of: int) -> float:
    """The chance that `under` or fewer of n images lie at or under the value of that rank (from
    1) among others of the same distribution: beta-binomial. A threshold from few images is itself
    a matter of chance."""
    def log_beta(a: int, b: int) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    a, b = rank, of + 1 - rank
    return math.fsum(math.exp(
        log_beta(k + a, n - k + b) - log_beta(a, b) - log_beta(k + 1, n - k + 1)
        - math.log(n + 1)) for k in range(under + 1))


def over_seeds(metric: Callable[..., np.ndarray], scores: np.ndarray, labels: np.ndarray,
               weights: np.ndarray) -> np.ndarray:
    """The metric of scores [n], or of each of several models' [S,n] and then averaged, under each
    row of weights [R,n]: [R]."""
    return np.mean([bootstrap(metric, one, labels, weights)
                    for one in np.atleast_2d(scores)], axis=0)


def paired_difference(a: np.ndarray, b: np.ndarray, labels: np.ndarray,
                      weights: np.ndarray) -> tuple[float, float, float]:
    """(mean AUROC of scores b less that of scores a, its 95 % interval): both on the same
    resamples. a, b: [n], or [S,n] of S seeds, averaged within each resample."""
    once = np.ones((1, len(labels)))
    one, two = (over_seeds(weighted_auroc, scores, labels, once)[0] for scores in (a, b))
    ones, twos = (over_seeds(weighted_auroc, scores, labels, weights) for scores in (a, b))
    return float(two - one), *interval(twos - ones)


def verdict(name_a: str, name_b: str, difference: float, low: float, high: float) -> str:
    """A plain sentence on the AUROC difference b - a and its 95 % interval.

    Clear is a difference whose interval, as it is shown, leaves out 0.
    """
    better, worse = (name_b, name_a) if difference >= 0 else (name_a, name_b)
    if difference < 0:
        difference, low, high = -difference, -high, -low
    difference, low, high = (round(x, 3) + 0.0 for x in (difference, low, high))  # no -0.000
    clear = "a clear difference" if low > 0 else "no clear difference"
    return (f"{better} scores {difference:.3f} higher than {worse}, 95 % interval {low:.3f} to "
            f"{high:.3f}: {clear}.")


def group_by_seed(runs: list[Run]) -> dict[str, list[int]]:
    """Name -> positions of runs that differ by their seed alone; most often just one."""
    aside = {"seed", *CHANGEABLE} - {"epochs", "patience", "min_delta"}
    groups: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        settings = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in aside}
        key = (run.fingerprint, *settings.values())
        while run.config.seed in [runs[j].config.seed for j in groups.get(key, [])]:
            key += ("again",)  # the same seed twice is another run, on other hardware perhaps
        groups.setdefault(key, []).append(i)
    names = [NAMES[runs[g[0]].config.model] if len(g) > 1 else runs[g[0]].name
             for g in groups.values()]
    if len(set(names)) < len(names):
        names = [f"{NAMES[runs[g[0]].config.model]} ({runs[g[0]].folder})"
                 for g in groups.values()]
    return dict(zip(names, groups.values(), strict=True))


def mean_of(results: list[dict]) -> dict[str, Any]:
    """Metrics of several seeds, each figure averaged; what is no figure as in the first."""
    mean: dict[str, Any] = {}
    for key, value in results[0].items():
        if isinstance(value, dict):
            mean[key] = mean_of([r[key] for r in results if key in r])
        elif isinstance(value, float):
            mean[key] = float(np.mean([r[key] for r in results]))
        else:
            mean[key] = value
    return mean


class TrivialScores:
    """Scores that need no training worth the name. A model that does not beat them is no use.

    reference: normal training images, uint8 [n,1,H,W]; without them the scores that compare an
    image with these are left out.
    """

    def __init__(self, reference: np.ndarray | None) -> None:
        self.mean = None
        if reference is not None:
            flat = reference.reshape(len(reference), -1) / np.float32(255)
            self.mean = flat.mean(0)
            self.pca = PCA(min(32, len(flat) - 1), random_state=0).fit(flat)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> scores [B] of uint8 images [B,1,H,W]."""
        x = images[:, 0] / np.float32(255)
        flat = x.reshape(len(x), -1)
        rows, columns = np.abs(np.diff(x, axis=1)), np.abs(np.diff(x, axis=2))
        scores = {
            "mean intensity": flat.mean(1),
            "standard deviation": flat.std(1),
            "local contrast": rows.mean((1, 2)) + columns.mean((1, 2)),
        }
        if self.mean is not None:
            back = self.pca.inverse_transform(self.pca.transform(flat))
            scores["distance to mean normal"] = np.square(flat - self.mean).mean(1)
            scores["PCA reconstruction error"] = np.square(flat - back).mean(1)
        return scores


# ----------------------------------------------------------------------------------------------
# Scoring a set of images


@dataclasses.dataclass
class Scored:
    """What one run makes of a set of images; arrays have one entry an image."""

    samples: list[Sample]
    scores: dict[str, np.ndarray]  # scorer -> [n]
    trivial: dict[str, np.ndarray]
    bad: dict[str, str]  # images that could not be read
    pixel_auroc: float | None = None  # for data with masks
    # For each lesion with a mask or box: whether the map's peak lies in it, its share of the map's
    # sum, and its share of the image's area, which is what a map that knows nothing would give.
    located: list[tuple[bool, float, float]] = dataclasses.field(default_factory=list)

    @property
    def labels(self) -> np.ndarray:
        """NORMAL or ABNORMAL of every image, [n]."""
        return np.array([s.label for s in self.samples])


def score_samples(run: Run, source: Source, samples: list[Sample], scorer: str,
                  trivial: TrivialScores | None) -> Scored:
    """Score images with every scorer; `scorer` gives the maps that are held against masks."""
    # Several batches of READ_AT_ONCE, so that what is read twice fills some; fewer of large images.
    size = run.config.image_size
    several = max(1, min(8, 8 * 128**2 // size**2))
    stream = ImageStream(source, samples, size, several * READ_AT_ONCE,
                         memory=run.config.memory_bytes, cache=False)
    scores: dict[str, list] = {name: [] for name in SCORERS}
    baselines: dict[str, list] = {}
    order, located, pixels = [], [], PixelCounts()
    bar = Progress(len(samples), f"scoring with {run.name}")
    for images, positions in stream:
        _, found, maps = run.read(images, scorer)
        for name, values in found.items():
            scores[name].append(values.numpy())
        masks = [lesion_mask(source, samples[i], size) for i in positions.tolist()]
        for map_, mask in zip(maps[:, 0].cpu().numpy(), masks, strict=True):
            if mask is not None and mask.any():
                energy = float(map_[mask].sum() / max(map_.sum(), 1e-12))
                located.append((peak_in_lesion(map_, mask), energy, float(mask.mean())))
            if mask is not None and not source.boxes:  # a box holds much besides its lesion
                pixels.add(map_, mask)
        for name, trivial_ones in (trivial(images.numpy()) if trivial else {}).items():
            baselines.setdefault(name, []).append(trivial_ones)
        order += positions.tolist()
        bar.update(len(images))
    bar.close()
    if not order:
        raise UserError(f"--data {source.spec}: none of the {len(samples)} images could be read")
    if not all(np.isfinite(np.concatenate(v)).all() for v in scores.values()):
        raise UserError(f"{run.folder}: its scores are not finite numbers; train it again")
    seen = [samples[i] for i in order]
    trivial_scores = {k: np.concatenate(v) for k, v in baselines.items()}
    if trivial:
        trivial_scores["haze"] = np.concatenate(scores["haze"])  # no model has a part in it
    if trivial and len({s.view for s in seen}) > 1 and any(s.view.startswith("AP") for s in seen):
        is_ap = [s.view.startswith("AP") for s in seen]
        trivial_scores["is it an AP film"] = np.array(is_ap, dtype=float)
    return Scored(seen, {k: np.concatenate(v) for k, v in scores.items()}, trivial_scores,
                  stream.bad, pixels.auroc(), located)


class PixelCounts:
    """How often each value of a map is met inside and outside of lesions. Values are told apart to
    three digits, which is enough for an AUROC, and takes 4 MB however many pixels there are."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, 1 << 18), dtype=np.int64)  # outside, inside

    def add(self, map_: np.ndarray, mask: np.ndarray) -> None:
        """Count the pixels of an image: map, float32 at least 0, and mask, bool, both [H,W]."""
        # The bits of floats that are not negative are in the order of the floats.
        levels = np.maximum(map_, 0).ravel().view(np.uint32) >> 14
        np.add.at(self.counts.ravel(), levels + (mask.ravel().astype(np.uint32) << 18), 1)

    def auroc(self) -> float | None:
        """Of the map as a test of each pixel; None where no lesion, or nothing else, was met."""
        if not self.counts.any(axis=1).all():
            return None
        truth, level = np.indices(self.counts.shape).reshape(2, -1)
        return float(weighted_auroc(level, truth, self.counts.reshape(1, -1).astype(float))[0])


def lesion_mask(source: Source, sample: Sample, size: int) -> np.ndarray | None:
    """Mask of a sample; all False for a normal image of a source that has masks."""
    mask = source.mask(sample, size)
    if mask is None and sample.label == NORMAL and getattr(source, "masks", None):
        return np.zeros((size, size), dtype=bool)
    return mask


def peak_in_lesion(map_: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the map's highest pixel lies in the mask or within 3 % of the side beside it."""
    y, x = np.unravel_index(map_.argmax(), map_.shape)
    rows, columns = np.nonzero(mask)
    reach = PEAK_TOLERANCE * len(mask)
    return bool((np.square(rows - y) + np.square(columns - x)).min() <= reach**2)


def draw_evenly(samples: list[Sample], limit: int | None) -> list[Sample]:
    """At most `limit` samples, as evenly from both labels as there are; always the same ones."""
    if limit is None or limit >= len(samples):
        return samples
    groups = [[s for s in samples if s.label == label] for label in (NORMAL, ABNORMAL)]
    rng = np.random.Generator(np.random.PCG64(0))
    small = min(groups, key=len)
    n_small = min(len(small), limit // 2)
    kept: set[str] = set()
    for group in groups:
        n = n_small if group is small else min(len(group), limit - n_small)
        kept |= {group[i].key for i in rng.permutation(len(group))[:n]}
    return [s for s in samples if s.key in kept]


def samples_to_score(run: Run, source: Source, split: str) -> tuple[list[Sample], bool, list[str]]:
    """(samples, whether this is an external test, notes) for a run on a source.

    The run's own split.csv decides on the data it was trained on. Of other data the prescribed
    test split is taken, or everything where there is none.
    """
    splits = read_splits(run.folder / "split.csv")
    own = (source.fingerprint() == run.fingerprint
           or os.path.abspath(source.spec) == os.path.abspath(run.config.data))
    if own:
        wanted = getattr(splits, split)
        there = {s.key: s for s in source.samples}
        notes = []
        if gone := [s.key for s in wanted if s.key not in there]:
            notes.append(f"{len(gone)} images of split.csv are no longer there, e.g. {gone[0]}")
        chosen = [there[s.key] for s in wanted if s.key in there]
        then = {s.key: (s.patient, s.label) for s in wanted}
        if other := [s.key for s in chosen if then[s.key] != (s.patient, s.label)]:
            notes.append(f"{len(other)} images have another label or patient than at training, "
                         f"e.g. {other[0]}; those of now count")
        if split == "val":
            notes.append("the thresholds come from these very validation normals")
        return chosen, False, notes
    if split == "val":
        raise UserError("--split val: only on the data that the run was trained on")
    chosen = [s for s in source.samples if s.split == "test"] or source.samples
    # The same data under another path, with a few images more or fewer: what was trained on
    # must not be tested on. Names that coincide by chance are far fewer than half.
    learnt = splits.train + splits.val
    notes, files = [], {file_of(run.config.data, s.key) for s in learnt}
    others = [s for s in chosen if file_of(source.spec, s.key) not in files]
    if same := len(chosen) - len(others):  # a folder in that of the training data, or above it
        if not others:
            raise UserError(f"--data {source.spec}: {run.folder} was trained or validated on all "
                            f"{same} images that would be tested")
        notes.append(f"{same} images left out: the run was trained or validated on them")
        chosen = others
    seen = {(s.key, s.patient, s.label) for s in learnt}
    fresh = [s for s in chosen if (s.key, s.patient, s.label) not in seen]
    known = len(chosen) - len(fresh)
    if known > len(seen) / 2:
        return fresh, True, [*notes, f"{known} images left out: the run was trained or validated "
                             "on images of these names"]
    if known:
        notes.append(f"{known} of these images have the names of images that the run was trained "
                     "or validated on: make sure that they are others")
    return chosen, True, notes


def file_of(spec: str, key: str) -> str:
    """Where the image of that key lies; of data that is no folder something that no file has."""
    root = os.path.realpath(spec)
    return os.path.join(os.path.dirname(root) if root.lower().endswith(".csv") else root, key)


def still_there(samples: list[Sample], source: Source) -> list[Sample]:
    """Those of the samples that the source has."""
    there = {s.key for s in source.samples}
    return [s for s in samples if s.key in there]


def training_reference(run: Run, source: Source) -> np.ndarray:
    """Up to 400 of the run's training normals, uint8 [n,1,H,W], for the trivial scores. UserError
    if none can be read."""
    train = still_there(read_splits(run.folder / "split.csv").train, source)
    stream = ImageStream(source, train[:: max(1, math.ceil(len(train) / 400))],
                         run.config.image_size, 16, memory=run.config.memory_bytes, cache=False,
                         stop_on_bad=False)
    found = [images.numpy() for images, _ in stream]
    if not found:
        raise UserError(f"none of the training images of {run.folder} can be read")
    return np.concatenate(found)


# ----------------------------------------------------------------------------------------------
# Evaluation


def result_folder(run: Run, source: Source, split: str) -> Path:
    """<run>/eval/<data name>, made; with a digest added if other data of that name is there."""
    name = source.name if split == "test" else f"{source.name}-val"
    folder = run.folder / "eval" / name
    with contextlib.suppress(OSError, ValueError):
        there = json.loads((folder / "metrics.json").read_text())
        if there["data_fingerprint"] != source.fingerprint():
            folder = folder.with_name(f"{name}-{source.fingerprint()[:6]}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measure(run: Run, scored: Scored, scorer: str, weights: np.ndarray) -> dict[str, object]:
    """The metrics of one run with one scorer; None where the labels do not allow a figure."""
    scores, labels = scored.scores[scorer], scored.labels
    sick, well = scores[labels == ABNORMAL], scores[labels == NORMAL]
    threshold90, threshold95 = (run.scorer.threshold(scorer, s) for s in (0.90, 0.95))
    result: dict[str, object] = {
        "auroc": None, "auroc_ci": None, "average_precision": None, "average_precision_ci": None,
        "sensitivity_at_90_specificity": float((sick > threshold90).mean()) if len(sick) else None,
        "sensitivity_at_95_specificity": float((sick > threshold95).mean()) if len(sick) else None,
        "threshold": threshold95,
        "specificity_at_threshold": None, "specificity_ci": None, "specificity_chance": None,
        "n_normal": len(well), "n_abnormal": len(sick),
        "n_patients": len({s.patient for s in scored.samples}),
        "n_validation_normals": len(run.scorer.normal_scores[scorer]),
        "score_mean_normal": float(well.mean()) if len(well) else None,
        "score_mean_abnormal": float(sick.mean()) if len(sick) else None,
    }
    if len(well):
        reached = float((well <= threshold95).mean())
        result["specificity_at_threshold"] = reached
        result["specificity_ci"] = wilson(reached, len(well))
        normal = run.scorer.normal_scores[scorer]
        result["specificity_chance"] = chance_of_so_few(
            int((well <= threshold95).sum()), len(well), int((normal <= threshold95).sum()),
            len(normal))
    if len(sick) and len(well):
        once = np.ones((1, len(labels)))
        result["auroc"] = float(weighted_auroc(scores, labels, once)[0])
        result["auroc_ci"] = interval(bootstrap(weighted_auroc, scores, labels, weights))
        result["average_precision"] = float(weighted_average_precision(scores, labels, once)[0])
        result["average_precision_ci"] = interval(
            bootstrap(weighted_average_precision, scores, labels, weights))
        result["auroc_by_finding"] = by_finding(scored, scores)
        result["auroc_by_view"] = by_view(scored, scores)
    return result


def by_finding(scored: Scored, scores: np.ndarray) -> dict[str, dict[str, float]]:
    """AUROC of each kind of finding against all normals; {} where findings are not known."""
    labels = scored.labels
    findings = np.array([s.finding for s in scored.samples])
    table = {}
    for finding, count in Counter(findings[labels == ABNORMAL]).most_common(12):
        if finding:
            chosen = (labels == NORMAL) | ((findings == finding) & (labels == ABNORMAL))
            auroc = weighted_auroc(scores[chosen], labels[chosen], np.ones((1, chosen.sum())))
            table[str(finding)] = {"auroc": float(auroc[0]), "n": int(count)}
    return table


def by_view(scored: Scored, scores: np.ndarray) -> dict[str, dict[str, float]]:
    """AUROC within the images of each view, n of them; {} where no two views are known."""
    labels, views = scored.labels, np.array([s.view for s in scored.samples])
    table = {}
    for view, count in Counter(views).most_common():
        chosen = views == view
        if view and len(set(labels[chosen])) == 2:
            auroc = weighted_auroc(scores[chosen], labels[chosen], np.ones((1, count)))
            table[str(view)] = {"auroc": float(auroc[0]), "n": int(count)}
    return table if len(set(views) - {""}) > 1 else {}


def localisation(scored: Scored) -> dict[str, object]:
    """How well the maps point at lesions; lesions as large as the median count as large."""
    hits, energies, areas = np.array(scored.located).T
    large = areas >= np.median(areas)
    return {"pixel_auroc": scored.pixel_auroc, "n_located": len(hits),
            "peak_in_lesion": float(hits.mean()), "peak_tolerance": PEAK_TOLERANCE,
            "peak_in_small_lesion": float(hits[~large].mean()) if not large.all() else None,
            "peak_in_large_lesion": float(hits[large].mean()),
            "energy_in_lesion": float(energies.mean()), "lesion_area": float(areas.mean())}


def best_direction(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A trivial score, negated if that tells more: its AUROC is then the most it can claim."""
    auroc = weighted_auroc(scores, labels, np.ones((1, len(labels))))[0]
    return scores if auroc >= 0.5 else -scores


def measure_trivial(scored: Scored, weights: np.ndarray) -> dict[str, dict]:
    """AUROC of each trivial score in its better direction, and its 95 % interval."""
    labels, once = scored.labels, np.ones((1, len(scored.samples)))
    best = {k: best_direction(v, labels) for k, v in scored.trivial.items()}
    return {"baselines": {k: float(weighted_auroc(v, labels, once)[0]) for k, v in best.items()},
            "baselines_ci": {k: interval(bootstrap(weighted_auroc, v, labels, weights))
                             for k, v in best.items()}}


def evaluate(
    runs: str | Path | Sequence[str | Path], data: str | None = None, split: str = "test",
    samples: int | None = None, scorer: str | None = None, device: str = "auto",
) -> list[dict[str, object]]:
    """Test runs on the test split of their data (or on other `data`); the metrics of each run.

    Prints the tables and writes <run>/eval/<data name>/; and in the folder above the runs
    comparison.html, and for several runs comparison.md, .csv and .png. Instead of runs the folder
    above them may be given: what was trained there last. Runs that differ by their seed alone are
    also averaged.
    """
    paths = list({path.resolve(): path for given in (
        [runs] if isinstance(runs, str | Path) else runs) for path in runs_in(given)}.values())
    whole_grid, scorer = scorer == "all", DEFAULT_SCORER if scorer in (None, "all") else scorer
    if scorer not in SCORERS:
        raise UserError(f"--scorer {scorer}: not one of {', '.join((*SCORERS, 'all'))}")
    if split not in ("test", "val"):
        raise UserError(f"--split: {split!r} is not one of test, val")
    results: list[dict[str, Any]] = []
    all_scored: list[Scored] = []
    sources: list[Source] = []
    loaded = [load_run(path, device) for path in paths]
    if len({run.name for run in loaded}) < len(loaded):
        for run in loaded:
            run.name = f"{NAMES[run.config.model]} ({run.folder})"
    groups = group_by_seed(loaded)
    for name, positions in groups.items():
        for run in (loaded[i] for i in positions if len(positions) > 1):
            run.name = f"{name}, seed {run.config.seed}"
    trivial, weights = None, None
    compared: list[tuple[str, str, int]] = []  # key, patient and label of the images
    opened: dict[tuple, Source] = {}
    for run in loaded:
        config = run.config if data is None else dataclasses.replace(
            run.config, data=data, samples=None)
        key = (config.data, config.image_size, config.samples)
        try:
            source = opened[key] = opened.get(key) or open_source(config)
        except UserError as error:
            raise error if data else UserError(
                f"{error}. {run.folder} was trained on it: if it lies elsewhere now, name that "
                "place with --data") from None
        chosen, external, notes = samples_to_score(run, source, split)
        chosen = draw_evenly(chosen, samples)
        if not chosen:
            raise UserError(f"--data {source.spec}: no images to score in its {split} split")
        these = [(s.key, s.patient, s.label) for s in chosen]
        if compared and these != compared:
            raise UserError(f"{run.folder} and {paths[0]} cannot be compared: their test images "
                            "differ; name common data with --data")
        if not compared:
            compared = these
            print(f"testing   {source.title}")
            if external:
                print(f"          External test: trained on {run.config.data}, nothing is fitted "
                      "to these images")
            for reason, count in source.left_out.most_common():
                print(f"          left out: {count:,} {reason}")
            for note in notes:
                print(f"          note: {note}")
            try:
                own_source = open_source(run.config) if external else source
                trivial = TrivialScores(training_reference(run, own_source))
            except UserError as error:
                print(f"          note: two trivial scores are left out ({error})")
                trivial = TrivialScores(None)
        with run.weights_kept():
            scored = score_samples(run, source, chosen, scorer, None if all_scored else trivial)
        if all_scored and (bad := scored.bad.keys() ^ all_scored[0].bad.keys()):
            raise UserError(f"{run.folder} and {paths[0]} cannot be compared: {min(bad)} could be "
                            "read for one of them only")
        if weights is None:
            weights = patient_weights([s.patient for s in scored.samples])
        metrics = measure(run, scored, scorer, weights)
        well = scored.labels == NORMAL
        metrics |= {
            "reconstruction_mse": float(scored.scores["mse"][well].mean()) if well.any() else None,
            "reconstruction_ssim": 1 - float(scored.scores["ssim"][well].mean())
            if well.any() else None,
            "scorer": scorer, "data": source.title, "external": external, "split": split,
            "data_fingerprint": source.fingerprint(), "trained_on": run.config.data,
            "model": run.config.model, "seed": run.config.seed, "unreadable": scored.bad,
            "left_out": dict(source.left_out),
        }
        if metrics["auroc"] is not None:
            metrics |= ({k: results[0][k] for k in ("baselines", "baselines_ci")} if results
                        else measure_trivial(scored, weights))
        if scored.located:
            metrics |= localisation(scored)
        if whole_grid:
            metrics["scorers"] = {k: measure(run, scored, k, weights) for k in SCORERS}
        folder = result_folder(run, source, split)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_scores(run, scored, folder / "scores.csv")
        draw_roc([(run.name, scored, metrics)], scorer, folder / "roc.png")
        draw_histogram(run.name, scored, metrics, folder / "histogram.png")
        draw_examples(run, source, scored, metrics, folder / "examples.png")
        draw_worst(run, source, scored, metrics, folder / "worst.png")
        healed = not external and draw_healing(run, source, scored, metrics,
                                               folder / "healing.png")
        results.append(metrics)
        all_scored.append(scored)
        sources.append(source)
        print(f"written   {folder}/: metrics.json, scores.csv, roc.png, histogram.png, "
              f"examples.png, worst.png{', healing.png' * healed}")
    print()
    means = average(groups, all_scored, results, weights)
    table = results_table([run.name for run in loaded], results, means)
    print(table)
    for image, reason in all_scored[0].bad.items():
        print(f"skipped   {image}: {reason}")
    if isinstance(source, KaggleSource):
        print(source.report())
    verdicts = all_verdicts(all_scored[0], means, weights)
    costs = [training_cost(run) for run in loaded]
    if len(loaded) > 1:
        compare(loaded, sources, all_scored, results, means, verdicts, costs, table)
    elif verdicts:
        print(f"\n{verdicts[0]}")
    asked = {"data": data, "split": None if split == "test" else split, "samples": samples,
             "scorer": "all" if whole_grid else None if scorer == DEFAULT_SCORER else scorer}
    again = quoted("python", "evaluate.py", *map(str, paths), *(
        word for k, v in asked.items() if v is not None for word in (flag(k), str(v))))
    page = loaded[0].folder.resolve().parent / "comparison.html"
    write_page(loaded, sources, all_scored, results, means, verdicts, costs, again, page)
    print(f"written   {page}: the results in one file, to open in a browser or to send on")
    return results


def runs_in(path: str | Path) -> list[Path]:
    """The run folder that a path is, or those that were trained last in it."""
    noted = Path(path) / TRAINED
    if (Path(path) / "best.pt").exists() or not noted.is_file():
        return [Path(path)]
    try:
        known = json.loads(noted.read_text(encoding="utf-8"))
        return [Path(path) / name for names in known.values() for name in names]
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{noted}: cannot be read; name the run folders instead") from None


def average(groups: dict[str, list[int]], scored: list[Scored], results: list[dict],
            weights: np.ndarray) -> dict[str, dict]:
    """Name -> metrics averaged over the seeds, of each group of runs that differ by these alone.

    Beside them: `positions` of the runs, `scores` [S,n], `seeds`, `aurocs` and their standard
    deviation `auroc_sd`. The intervals are those of the means, over patients drawn anew.
    """
    means = {}
    for name, positions in groups.items():
        those = [results[i] for i in positions]
        mean = mean_of(those) | {
            "positions": positions, "seeds": [r["seed"] for r in those],
            "specificity_ci": those[0]["specificity_ci"] if len(those) == 1 else None,
            "scores": np.array([scored[i].scores[r["scorer"]]
                                for i, r in zip(positions, those, strict=True)])}
        if mean["auroc"] is not None and len(those) > 1:
            for key, metric in (("auroc_ci", weighted_auroc),
                                ("average_precision_ci", weighted_average_precision)):
                mean[key] = interval(over_seeds(metric, mean["scores"], scored[0].labels, weights))
            mean["aurocs"] = [r["auroc"] for r in those]
            mean["auroc_sd"] = float(np.std(mean["aurocs"], ddof=1))
        means[name] = mean
    return means


def results_table(names: list[str], results: list[dict], means: dict[str, dict]) -> str:
    """The results as aligned text: models, scorers if asked for, trivial scores, findings.

    means: what `average` gives; tables of findings and places are of these.
    """
    first = results[0]
    lines = [f"{first['data']}",
             f"{first['n_normal']} normal and {first['n_abnormal']} abnormal {first['split']} "
             f"images of {first['n_patients']} patients; scorer {first['scorer']}; thresholds from "
             f"{first['n_validation_normals']} validation normals"]
    if first["external"]:
        lines.insert(1, f"External test: trained on {trained_on(results)}, nothing is fitted to "
                     "these images")
    if first["auroc"] is None:
        for name, r in zip(names, results, strict=True):
            lines.append(f"{name}: threshold {r['threshold']:.3f}, specificity reached "
                         f"{specificity(r)}, sensitivity "
                         f"{share(r['sensitivity_at_95_specificity'])}")
        lines.append("AUROC needs both normal and abnormal images: not computed.")
        return "\n".join(lines)
    left = max(28, *(len(short(n)) + 1 for n in names))
    lines += ["", f"{'':<{left}}{'AUROC':>6}  {'95 % interval':<15}{'AP':>6}{'sens@90%':>10}"
                  f"{'sens@95%':>10}{'spec reached':>22}"]

    def row(name: str, r: dict) -> str:
        low, high = r["auroc_ci"]
        return (f"{short(name):<{left}}{r['auroc']:>6.3f}  {f'{low:.3f} to {high:.3f}':<15}"
                f"{r['average_precision']:>6.3f}{share(r['sensitivity_at_90_specificity']):>10}"
                f"{share(r['sensitivity_at_95_specificity']):>10}"
                f"{specificity(r):>22}")

    for name, r in zip(names, results, strict=True):
        lines.append(row(name, r))
        lines += [row(f"  {scorer}", g) for scorer, g in r.get("scorers", {}).items()]
    for name, mean in means.items():
        if "auroc_sd" in mean:
            lines += [row(f"{name}, mean of {len(mean['seeds'])} seeds", mean), spread(mean)]
    warning = drift_warning(results)
    over_seeds = ", means" if len(means) < len(results) else ""
    names, results = [short(n) for n in means], list(means.values())
    wide = max(15, *(len(n) + 2 for n in names))
    lines.append("trivial scores, each in its better direction:")
    for k, v in first["baselines"].items():
        low, high = first["baselines_ci"][k]
        lines.append(f"{'  ' + k:<{left}}{v:>6.3f}  {low:.3f} to {high:.3f}")
    for title in ("AUROC by finding", "AUROC by view"):
        key = title.lower().replace(" ", "_")
        if first[key]:
            lines += ["", f"{title + over_seeds:<28}" + "".join(f"{n:>{wide}}" for n in names)]
        for group, entry in first[key].items():
            label = f"  {group[:18]} ({entry['n']})"
            lines.append(f"{label:<28}" + "".join(
                f"{r[key][group]['auroc']:>{wide}.3f}" for r in results))
    if "n_located" in first:
        lines.append(f"\nlocalisation of {first['n_located']} lesions{over_seeds}")
        if first["pixel_auroc"] is not None:
            lines.append(f"{'  pixel AUROC':<28}" + "".join(
                f"{r['pixel_auroc']:>{wide}.3f}" for r in results))
        for key, title in LOCATED:
            lines.append(f"  {title:<26}" + "".join(f"{share(r[key]):>{wide}}" for r in results))
        lines.append(f"  The peak may lie {100 * PEAK_TOLERANCE:g} % of the image side beside it. "
                     f"The lesions cover {share(first['lesion_area'])} of the image.")
    return "\n".join([*lines, *warning])


def drift_warning(results: list[dict]) -> list[str]:
    """[a sentence] if a threshold is far off on the test normals, by more than chance; or []."""
    drift = [r for r in results if r["n_normal"] and r["specificity_at_threshold"] < 0.90
             and r["specificity_chance"] < 0.025]
    if not drift:
        return []
    low = min(drift, key=lambda r: r["specificity_at_threshold"])
    return [f"Careful: the threshold set for 95 % specificity reaches {specificity(low)} on these "
            "normals. They differ from the validation normals."]


def trained_on(results: list[dict]) -> str:
    """The data of all runs, each named once."""
    return " and ".join(dict.fromkeys(r["trained_on"] for r in results))


def tested_on(metrics: dict) -> str:
    """What a picture's title says of the data."""
    lines = [f"tested on {metrics['data']}"]
    if metrics["external"]:
        lines.append(f"external test: trained on {metrics['trained_on']}")
    return "\n".join(textwrap.fill(line, 75) for line in lines)


def specificity(r: dict) -> str:
    """'94.0 % (88 to 97)': the share of the tested normals under the threshold, its interval."""
    ends = r["specificity_ci"]
    return share(r["specificity_at_threshold"]) + (
        f" ({100 * ends[0]:.0f} to {100 * ends[1]:.0f})" if ends else "")


def spread(mean: dict) -> str:
    """How far the AUROCs of the seeds lie apart."""
    return (f"  seeds {', '.join(map(str, mean['seeds']))}: AUROC {min(mean['aurocs']):.3f} to "
            f"{max(mean['aurocs']):.3f}, standard deviation {mean['auroc_sd']:.3f}")


def share(value: float | None) -> str:
    """'12.3 %' of 0.123; '-' where there is no figure."""
    return "-" if value is None else f"{100 * value:.1f} %"


def with_interval(value: float | None, ends: Sequence[float] | None) -> str:
    """'0.898 (0.850 to 0.936)', in one piece where lines are broken."""
    return "-" if value is None else f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})".replace(
        " ", "\xa0")


def write_scores(run: Run, scored: Scored, file: Path) -> None:
    """One row an image: what it is, and its score by every scorer."""
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["key", "patient", "label", "finding", "view", *scored.scores,
                         *(f"{name}_percentile" for name in scored.scores)])
        percentiles = [run.scorer.percentile(name, torch.from_numpy(v)).tolist()
                       for name, v in scored.scores.items()]
        for i, s in enumerate(scored.samples):
            writer.writerow([s.key, s.patient, s.label, s.finding, s.view,
                             *(f"{v[i]:.6g}" for v in scored.scores.values()),
                             *(f"{p[i]:.1f}" for p in percentiles)])


def all_verdicts(scored: Scored, means: dict[str, dict], weights: np.ndarray) -> list[str]:
    """Sentences on each pair of models, and on each model against the best trivial score."""
    baselines = next(iter(means.values())).get("baselines")
    if not baselines:
        return []
    verdicts = []
    for (a, one), (b, two) in itertools.combinations(means.items(), 2):
        verdicts.append(verdict(a, b, *paired_difference(one["scores"], two["scores"],
                                                         scored.labels, weights)))
        verdicts += overlap(a, one, b, two)
    best = max(baselines, key=baselines.get)
    alone = best_direction(scored.trivial[best], scored.labels)
    return verdicts + [verdict(f"{best[0].upper()}{best[1:]} alone", name, *paired_difference(
        alone, mean["scores"], scored.labels, weights)) for name, mean in means.items()]


def coverage(means: dict[str, dict]) -> str:
    """What the intervals cover, and what not."""
    covered = f"Intervals: {RESAMPLES} bootstrap resamples of patients; differences are paired."
    if any("auroc_sd" in mean for mean in means.values()):
        covered += (" AUROCs are averaged over the seeds within each resample: so the intervals "
                    "cover which patients were tested, and not what other seeds would give. The "
                    "spread over the seeds tells that.")
    return covered


def compare(runs: list[Run], sources: list[Source], scored: list[Scored], results: list[dict],
            means: dict[str, dict], verdicts: list[str], costs: list[dict], table: str) -> None:
    """comparison.md, .csv and .png in the folder above the runs, and the verdict on screen."""
    folder = runs[0].folder.resolve().parent
    lines = []
    for run, cost in zip(runs, costs, strict=True):
        lines.append(f"{run.name}: {cost['parameters']:,} parameters, trained {cost['epochs']} "
                     f"epochs in {cost['minutes']:.1f} min, {cost['images_per_second']:.1f} "
                     "images/s")
    several = any("auroc_sd" in mean for mean in means.values())
    print("\n".join(["", *lines, *verdicts, *([coverage(means)] if several else [])]))
    text = ["# Comparison", "", f"Tested on: {results[0]['data']}. Trained on: "
            f"{trained_on(results)}.", "", "```", table, "```", "",
            *(f"- {line}" for line in lines), "", *verdicts, "",
            f"{coverage(means)} Research use only, not for diagnosis.", ""]
    (folder / "comparison.md").write_text("\n".join(text), encoding="utf-8")
    columns = ("auroc", "average_precision", "sensitivity_at_90_specificity",
               "sensitivity_at_95_specificity", "specificity_at_threshold", "threshold",
               "reconstruction_mse", "reconstruction_ssim", "n_normal", "n_abnormal", "scorer",
               "data", "trained_on")
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["run", *columns, "auroc_low", "auroc_high", *costs[0], "seed",
                         "model", "auroc_mean", "auroc_mean_low", "auroc_mean_high",
                         "auroc_sd"])
        for i, (run, r, cost) in enumerate(zip(runs, results, costs, strict=True)):
            name, mean = next((k, m) for k, m in means.items() if i in m["positions"])
            writer.writerow([run.folder.name, *(r[c] for c in columns),
                             *(r["auroc_ci"] or ("", "")), *cost.values(), r["seed"], name,
                             mean["auroc"], *(mean["auroc_ci"] or ("", "")),
                             mean.get("auroc_sd")])
    firsts = [mean["positions"][0] for mean in means.values()]  # of all seeds it would be too wide
    draw_comparison([runs[i] for i in firsts], [sources[i] for i in firsts],
                    [scored[i] for i in firsts], [results[i] for i in firsts],
                    folder / "comparison.png")
    print(f"written   {folder}/: comparison.md, comparison.csv, comparison.png")


def overlap(name_a: str, a: dict, name_b: str, b: dict) -> list[str]:
    """[a sentence] on whether the seeds of two models tell them apart; [] where each has one."""
    if "aurocs" not in a and "aurocs" not in b:
        return []
    ones, twos = (m.get("aurocs", [m["auroc"]]) for m in (a, b))
    for better, worse, higher, lower in ((name_a, name_b, ones, twos),
                                         (name_b, name_a, twos, ones)):
        if min(higher) > max(lower):
            return [f"Every seed of {better} scores higher than every seed of {worse}."]
    return ["Their seeds overlap: which one scores higher depends on the seed."]


def training_cost(run: Run) -> dict[str, float]:
    """Parameters, epochs, minutes and images a second of a run's training."""
    with open(run.folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return {"parameters": run.parameters, "epochs": len(rows),
            "minutes": sum(float(r["seconds"]) for r in rows) / 60,
            "images_per_second": float(np.mean([float(r["images_per_second"]) for r in rows]))}


# ----------------------------------------------------------------------------------------------
# Pictures


def short(name: str) -> str:
    """A run's name as a figure has room for it."""
    return name if len(name) <= 36 else f"{name[:10]}...{name[-23:]}"


def plain_axes(axes: Axes) -> None:
    """Take away the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)


def plot_roc(axes: Axes, entries: list[tuple[str, Scored, dict]], scorer: str) -> None:
    """The ROC curves of (name, scored, metrics), on matplotlib's axes."""
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle=":")
    for (name, scored, metrics), colour in zip(entries, COLOURS * 3, strict=False):
        if metrics["auroc"] is None:
            axes.text(0.5, 0.5, "needs normal and abnormal images", ha="center")
            continue
        fpr, tpr, _ = roc_curve(scored.labels, scored.scores[scorer])
        axes.plot(fpr, tpr, color=colour, linewidth=2,
                  label=f"{short(name)}: {with_interval(metrics['auroc'], metrics['auroc_ci'])}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal",
             title="ROC, with AUROC and its 95 % interval", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    plain_axes(axes)


def score_frame(scored: Sequence[Scored], scorer: str) -> tuple[np.ndarray, int]:
    """(edges of the bars, height of the tallest) of histograms that can be held side by side."""
    scores = np.concatenate([s.scores[scorer] for s in scored])
    low, high = scores.min(), np.quantile(scores, 0.995)
    bins = np.linspace(low, max(high, low + 1e-9), 31)
    return bins, max(np.histogram(s.scores[scorer][s.labels == label].clip(max=bins[-1]),
                                  bins)[0].max() for s in scored for label in (NORMAL, ABNORMAL))


def plot_histogram(axes: Axes, name: str, scored: Scored, metrics: dict,
                   frame: tuple[np.ndarray, int], colour: str = COLOURS[0]) -> None:
    """Normal images in grey, abnormal ones in the colour of the run."""
    scores, labels, (bins, tallest) = scored.scores[metrics["scorer"]], scored.labels, frame
    clipped = np.minimum(scores, bins[-1])  # the last bar takes what lies beyond
    for label, text, shade in ((NORMAL, "normal", "0.55"), (ABNORMAL, "abnormal", colour)):
        if (labels == label).any():
            axes.hist(clipped[labels == label], bins, color=shade, alpha=0.65, label=text)
    axes.axvline(metrics["threshold"], color=matplotlib.rcParams["text.color"], linestyle="--",
                 linewidth=1.2, label="threshold (95 % of\nvalidation normals)")
    axes.set(xlabel=f"anomaly score ({metrics['scorer']})", ylabel="images",
             title=short(name), ylim=(0, 1.05 * tallest))
    axes.legend(frameon=False, fontsize=9)
    plain_axes(axes)


def draw_roc(entries: list[tuple[str, Scored, dict]], scorer: str, file: Path) -> None:
    """A picture of the ROC curves of (name, scored, metrics)."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    plot_roc(figure.subplots(), entries, scorer)
    figure.suptitle(tested_on(entries[0][2]), fontsize=8)
    figure.savefig(file, dpi=120)


def draw_histogram(name: str, scored: Scored, metrics: dict, file: Path) -> None:
    """A picture of one run's scores, of normal and of abnormal images."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot_histogram(figure.subplots(), name, scored, metrics,
                   score_frame([scored], metrics["scorer"]))
    figure.suptitle(tested_on(metrics), fontsize=8)
    figure.savefig(file, dpi=120)


def example_positions(scored: Scored, metrics: dict, each: int) -> list[tuple[str, int]]:
    """(why, position) of the highest, the borderline and the lowest scores, no image twice."""
    scores = scored.scores[metrics["scorer"]]
    orders = {"highest": np.argsort(-scores),
              "borderline": np.argsort(np.abs(scores - metrics["threshold"])),
              "lowest": np.argsort(scores)}
    chosen: dict[int, str] = {}
    for why, order in orders.items():
        fresh = [int(i) for i in order if int(i) not in chosen][:each]
        chosen |= dict.fromkeys(fresh, why)
    return [(why, i) for i, why in chosen.items()]


def show_image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """A grey image [H,W] in [0,1], without ticks."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def show_map(axes: Axes, image: np.ndarray, map_: np.ndarray, top: float,
             mask: np.ndarray | None = None) -> Any:
    """The anomaly map over the image: opaque where it is high. Returns what a colour bar needs."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    shown = axes.imshow(map_, cmap="inferno", vmin=0, vmax=top,
                        alpha=np.clip(map_ / top, 0, 1) * 0.85)
    if mask is not None and mask.any():
        axes.contour(mask, [0.5], colors="#56B4E9", linewidths=1)
    axes.set(xticks=[], yticks=[])
    return shown


def show_tiles(axes: Axes, images: np.ndarray, maps: np.ndarray, top: float, masks: np.ndarray,
               above: Sequence[str], beside: Sequence[str] = ()) -> Any:
    """Pictures [rows,columns,H,W] in one drawing, which is far faster than one each; NaN is blank.

    maps and masks: of the same shape, 0 where there is none; above and beside: a text for each
    column and row. Returns what a colour bar needs.
    """
    H, W = images.shape[2:]
    gap = max(1, H // 16)

    def joined(tiles: np.ndarray, between: float) -> np.ndarray:
        rows, columns = tiles.shape[:2]
        tiles = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=between)
        return tiles.transpose(0, 2, 1, 3).reshape(rows * (H + gap), columns * (W + gap))

    shown = show_map(axes, joined(images, math.nan), joined(maps, 0), top, joined(masks, 0))
    axes.axis("off")
    for column, text in enumerate(above):
        axes.text(column * (W + gap) + W / 2, -gap, text, fontsize=9, ha="center", va="bottom")
    for row, text in enumerate(beside):
        axes.text(-gap, row * (H + gap) + H / 2, text, fontsize=9, rotation=90, ha="right",
                  va="center")
    return shown


def load_images(source: Source, samples: list[Sample], size: int) -> Tensor:
    """Images that have been scored, once more: uint8 [n,1,H,W]."""
    images = []
    for s in samples:
        try:
            images.append(torch.from_numpy(decode_image(source.read(s), size).copy())[None])
        except (BadImage, OSError) as error:
            raise UserError(f"--data {source.spec}: {s.key} was scored, but cannot be read again "
                            f"for its picture ({error})") from None
    return torch.stack(images)


def pictures(run: Run, source: Source, samples: list[Sample],
             scorer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, reconstructions, anomaly maps), each [n,H,W], of a few samples."""
    reading, _, maps = run.read(load_images(source, samples, run.config.image_size), scorer)
    image, back, map_ = (t[:, 0].cpu().numpy()
                         for t in (reading.images, reading.reconstruction, maps))
    return image, back, map_


def map_top(maps: np.ndarray) -> float:
    """Upper end of the colour scale: common to all maps shown beside each other."""
    return max(float(np.quantile(maps, 0.998)), 1e-6)


def map_label(scorer: str) -> str:
    """The map's name and unit, for a colour bar."""
    name = map_name(scorer)
    return f"{name} (standard deviations of training normals)" if name in Z_MAPS else name


def describe_sample(sample: Sample) -> str:
    """What is written over an image: its finding, shortened."""
    return "normal" if sample.label == NORMAL else (sample.finding or "abnormal")[:18]


def draw_examples(run: Run, source: Source, scored: Scored, metrics: dict, file: Path) -> None:
    """Input, reconstruction and map of the three highest, borderline and lowest scores."""
    picks = example_positions(scored, metrics, 3)
    samples = [scored.samples[i] for _, i in picks]
    images, reconstructions, maps = pictures(run, source, samples, metrics["scorer"])
    tiles = np.stack([images, reconstructions, images])
    heat, masks, above = np.zeros_like(tiles), np.zeros_like(tiles), []
    heat[2] = maps
    for column, ((why, i), sample) in enumerate(zip(picks, samples, strict=True)):
        if (mask := lesion_mask(source, sample, run.config.image_size)) is not None:
            masks[2, column] = mask
        above.append(f"{why}\n{describe_sample(sample)}\n"
                     f"score {scored.scores[metrics['scorer']][i]:.3g}")
    figure = Figure(figsize=(1.5 * len(picks) + 1.2, 5.6), layout="constrained")
    axes = figure.subplots()
    shown = show_tiles(axes, tiles, heat, map_top(maps), masks, above,
                       ("input", "reconstruction", "anomaly map"))
    figure.colorbar(shown, ax=axes, label=map_label(metrics["scorer"]), shrink=0.7)
    figure.suptitle(f"{run.name}, threshold {metrics['threshold']:.3g}\n{tested_on(metrics)}",
                    fontsize=9)
    figure.savefig(file, dpi=120)


def worst(scored: Scored, metrics: dict) -> tuple[list[int], list[int]]:
    """(missed, false alarms): positions on the wrong side of the threshold, the worst first."""
    order = np.argsort(scored.scores[metrics["scorer"]], kind="stable")
    flagged = scored.scores[metrics["scorer"]][order] > metrics["threshold"]
    sick = scored.labels[order] == ABNORMAL
    return order[sick & ~flagged].tolist(), order[~sick & flagged][::-1].tolist()


def draw_worst(run: Run, source: Source, scored: Scored, metrics: dict, file: Path) -> None:
    """Input and map of the ten worst misses, above, and the ten worst false alarms, below."""
    wrong = worst(scored, metrics)
    heights = [3.8 if found else 0.4 for found in wrong]
    figure = Figure(figsize=(15, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(f"{run.name}, {tested_on(metrics)}", fontsize=10)
    for part, of, count, found in zip(
            figure.subfigures(2, 1, height_ratios=heights),
            ("abnormal images missed", "normal images flagged"),
            (metrics["n_abnormal"], metrics["n_normal"]), wrong, strict=True):
        first = found[:10]
        part.suptitle(f"{len(found)} of {count} {of}" + (
            f": the worst {len(first)}, by the score's percentile among validation normals"
            if first else "") + "\n", fontsize=10)  # a blank line, clear of the images' titles
        if not first:
            continue
        samples = [scored.samples[i] for i in first]
        images, _, maps = pictures(run, source, samples, metrics["scorer"])
        percentiles = run.scorer.percentile(metrics["scorer"], torch.from_numpy(
            scored.scores[metrics["scorer"]][first])).tolist()
        tiles = np.full((2, 10, *images.shape[1:]), math.nan, dtype=np.float32)
        heat, masks = np.zeros_like(tiles), np.zeros_like(tiles)
        tiles[:, : len(first)], heat[1, : len(first)] = images, maps
        above = []
        for column, sample in enumerate(samples):
            if (mask := lesion_mask(source, sample, run.config.image_size)) is not None:
                masks[1, column] = mask
            key = sample.key.rpartition("/")[2]
            above.append(f"{describe_sample(sample)}\npercentile {percentiles[column]:.0f}\n"
                         f"{key if len(key) < 17 else '…' + key[-15:]}")
        axes = part.subplots()
        shown = show_tiles(axes, tiles, heat, map_top(maps), masks, above)
        bar = part.colorbar(shown, ax=axes, shrink=0.5, aspect=15)
        bar.set_label(map_label(metrics["scorer"]), fontsize=7)
    figure.savefig(file, dpi=95)


def draw_healing(run: Run, source: Source, scored: Scored, metrics: dict, file: Path) -> bool:
    """Three validation normals, corrupted as in training, and what the model makes of them; below
    them a tested image with a finding. Whether there was anything to draw."""
    size, scorer = run.config.image_size, metrics["scorer"]
    normals = still_there(read_splits(run.folder / "split.csv").normals("val"), source)
    stream = ImageStream(source, normals[:: max(1, len(normals) // 8)][:8], size, 8,
                         memory=run.config.memory_bytes, cache=False, stop_on_bad=False)
    with contextlib.closing(iter(stream)) as batches:
        clean, _ = next(batches, (None, None))
    if clean is None:
        return False
    draws = Draws(seeded(run.config.seed, "picture", 0), len(clean))
    seen = corrupt(clean.float() / 255, run.config.objective, draws)
    clean, seen = clean[:3], (255 * seen[:3]).round().byte()
    titles, lesion = ["normal"] * len(clean), None
    if sick := np.flatnonzero(scored.labels == ABNORMAL).tolist():
        middle = sorted(sick, key=lambda i: scored.scores[scorer][i])[len(sick) // 2]
        sample = scored.samples[middle]
        image = load_images(source, [sample], size)
        clean, seen = torch.cat([clean, image]), torch.cat([seen, image])
        lesion = lesion_mask(source, sample, size)
        titles.append(describe_sample(sample))
    reading, _, maps = run.read(seen, scorer)
    shown = reading.images.cpu()
    tiles = torch.cat([clean / 255, shown, reading.views.cpu(), shown], dim=1).numpy()
    heat, masks = np.zeros_like(tiles), np.zeros_like(tiles)
    heat[:, -1:] = maps.cpu().numpy()
    if lesion is not None:
        masks[-1, -1] = lesion
    # The colours end where the least of the maps does: corruptions are stronger than findings.
    top = min(map_top(m) for m in heat[:, -1])
    views = ["healed", "healed, without skips"][: tiles.shape[1] - 3]
    figure = Figure(figsize=(2 * tiles.shape[1] + 1, 2 * len(tiles) + 0.7), layout="constrained")
    axes = figure.subplots()
    bar = show_tiles(axes, tiles, heat, top, masks, ["image", "what the model sees", *views, "map"],
                     titles)
    figure.colorbar(bar, ax=axes, label=map_label(scorer), shrink=0.6, extend="max")
    figure.suptitle(f"{run.name}, objective {run.config.objective}", fontsize=10)
    figure.savefig(file, dpi=110)
    return True


def draw_comparison(runs: list[Run], sources: list[Source], scored: list[Scored],
                    results: list[dict], file: Path) -> None:
    """ROC and histograms of all runs above, the same example cases through every model below."""
    scorer = results[0]["scorer"]
    cases = comparison_cases(scored[0], scorer)
    figure = Figure(figsize=(4.2 * (1 + len(runs)), 4.4 + 1.9 * len(cases)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[4.4, 1.9 * len(cases)])
    axes = upper.subplots(1, 1 + len(runs))
    frame = score_frame(scored, scorer)
    entries = [(r.name, s, m) for r, s, m in zip(runs, scored, results, strict=True)]
    plot_roc(axes[0], entries, scorer)
    for ax, run, s, m, colour in zip(axes[1:], runs, scored, results, COLOURS * 3, strict=False):
        plot_histogram(ax, run.name, s, m, frame, colour)
    samples = [scored[0].samples[i] for i in cases]
    grid = lower.subplots(len(cases), 1 + 2 * len(runs), squeeze=False)
    drawn = [pictures(run, source, samples, scorer)
             for run, source in zip(runs, sources, strict=True)]
    top = map_top(np.concatenate([maps.ravel() for _, _, maps in drawn]))
    for r, (run, source, s) in enumerate(zip(runs, sources, scored, strict=True)):
        images, reconstructions, maps = drawn[r]
        for row, sample in enumerate(samples):
            if r == 0:
                show_image(grid[row][0], images[row], "input" if row == 0 else "")
                grid[row][0].set_ylabel(describe_sample(sample), fontsize=9)
            show_image(grid[row][1 + 2 * r], reconstructions[row],
                       f"{run.name}\nreconstruction" if row == 0 else "")
            mask = lesion_mask(source, sample, run.config.image_size)
            shown = show_map(grid[row][2 + 2 * r], images[row], maps[row], top, mask)
            grid[row][2 + 2 * r].set_title(f"score {s.scores[scorer][cases[row]]:.3g}", fontsize=9)
    lower.colorbar(shown, ax=grid, label=map_label(scorer), extend="max",
                   shrink=min(1.0, 3 / len(cases)))
    upper.suptitle(f"{results[0]['n_normal']} normal and {results[0]['n_abnormal']} abnormal "
                   f"images, {tested_on(results[0])}", fontsize=10)
    figure.savefig(file, dpi=110)


def comparison_cases(scored: Scored, scorer: str) -> list[int]:
    """Up to six positions: the middle-scoring image of each common finding, and of the normals.

    The middle one, so that the picture shows what is usual and nothing is picked by hand.
    """
    scores = scored.scores[scorer]
    groups: dict[str, list[int]] = {}
    for i, s in enumerate(scored.samples):
        groups.setdefault(describe_sample(s), []).append(i)
    common = sorted(groups.values(), key=len, reverse=True)[:6]
    return [sorted(group, key=lambda i: scores[i])[len(group) // 2] for group in common]


# ----------------------------------------------------------------------------------------------
# The comparison page: one file that needs nothing but a browser


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fff; --ink: #1a1c1f; --soft: #565c64; --line: #d5d8dc;
  --link: #0b5cad; --panel: #f3f4f6 }
@media screen and (prefers-color-scheme: dark) { :root { --back: #15171a; --ink: #e6e8ea;
  --soft: #a8aeb6; --line: #3a3f46; --link: #80b9f2; --panel: #202327 } }
* { box-sizing: border-box }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .8rem 0 }
h1 + p { font-size: 1.2rem }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line) }
h3, h4 { font-size: 1.05rem; margin: 1.5rem 0 .4rem } h4 { font-size: 1rem; margin-top: 1rem }
p, dl { max-width: 46rem; margin: .5rem 0 }
.use { border-left: .3rem solid #d55e00; padding-left: .7rem; font-weight: 600 }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem }
dt { font-weight: 600 } dd { margin: 0 }
a { color: var(--link) }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.skip:not(:focus) { position: absolute; left: -99rem }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none }
nav a { display: inline-block; padding: .2rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0; max-width: 22rem;
  min-width: 4.2rem; border-bottom: 1px solid var(--line) }
tbody th { font-weight: 400; min-width: 7rem }
th:first-child { position: sticky; left: 0; background: var(--back) }
@media screen and (min-width: 48rem) { tbody th { min-width: 16.5rem } }
pre { background: var(--panel); padding: .7rem; white-space: pre-wrap; font-size: .85rem }
img { display: block; width: 100%; height: auto }
.plots { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.drawing { max-width: 28rem; margin: .5rem 0 }
.dark { display: none }
@media screen and (prefers-color-scheme: dark) { .light { display: none } .dark { display: block } }
.row { display: flex; flex-wrap: wrap; gap: .6rem 1rem }
figure { margin: 0; break-inside: avoid; max-width: calc(14rem * var(--n) - .6rem);
  flex: var(--n) 1 calc(7.8rem * var(--n) - .6rem) }
figure div { display: grid; gap: .6rem; grid-template-columns: repeat(var(--n), 1fr) }
figcaption { margin: .2rem 0 .6rem }
@media print { nav, .skip { display: none } body { font-size: 10pt; max-width: none; padding: 0 }
  figure { flex-basis: calc(6.6rem * var(--n) - .6rem); max-width: calc(11rem * var(--n) - .6rem) }
  table { font-size: 8.5pt }
  th, td { padding-right: .7rem } tbody th { min-width: 0 }
  h2, h3, h4 { break-after: avoid } tr, .drawing { break-inside: avoid } @page { margin: 15mm } }
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
$body
</body>
</html>
""")
DARK = {"#1a1c1f": "#e6e8ea", "#0072b2": "#3d9fe0"}  # colours of line drawings on a dark page
SIDE = 256  # of the pictures, in pixels


def embedded(kind: str, content: bytes) -> str:
    """A picture as an address that holds it, for a page in one file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def embedded_image(alt: str, image: np.ndarray, map_: np.ndarray | None = None, top: float = 1.0,
                   mask: np.ndarray | None = None) -> str:
    """An <img> of a grey image [H,W] in [0,1], with the map over it as `show_map` draws it."""
    def fit(values: np.ndarray) -> np.ndarray:
        whole = Image.fromarray(values.astype(np.float32))
        return np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0)

    grey = fit(image).clip(max=1)
    if map_ is not None:
        height = (fit(map_) / top).clip(max=1)
        colour = matplotlib.colormaps["inferno"](height)[..., :3]
        grey = grey[..., None] + 0.85 * height[..., None] * (colour - grey[..., None])
    picture = Image.fromarray((255 * grey).round().astype(np.uint8))
    if mask is not None and mask.any():
        inside = Image.fromarray((fit(mask) > 0.5).astype(np.uint8) * 255)
        outline = ImageChops.difference(inside.filter(ImageFilter.MaxFilter(3)), inside)
        picture.paste(COLOURS[5], mask=outline)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    return (f'<img src="{embedded("jpeg", file.getvalue())}" width="{SIDE}" height="{SIDE}" '
            f'alt="{escape(alt)}">')


def embedded_drawing(alt: str, draw: Callable[..., object], of: tuple = (),
                     size: tuple[float, float] = (4.6, 4.2)) -> str:
    """What draw(axes, *of) draws, `size` inches large, once for light and once for dark pages."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    file = io.StringIO()
    with matplotlib.rc_context(dict.fromkeys(names, next(iter(DARK)))):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), *of)
        figure.savefig(file, format="svg", transparent=True)
    light = dark = file.getvalue()
    for ink, pale in DARK.items():
        dark = dark.replace(ink, pale)
    # Not a <picture>: on paper that would keep what was chosen for the screen.
    return '<div class="drawing">' + "".join(
        f'<img class="{kind}" src="{embedded("svg+xml", svg.encode())}" width="{96 * size[0]:.0f}" '
        f'height="{96 * size[1]:.0f}" alt="{escape(alt)}">'
        for kind, svg in (("light", light), ("dark", dark))) + "</div>"


def html_figure(images: Sequence[str], caption: str) -> str:
    """Images beside each other over their caption, in HTML."""
    return (f'<figure style="--n:{len(images)}"><div>{"".join(images)}</div>'
            f"<figcaption>{caption}</figcaption></figure>")


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A heading and its table, whose columns may be scrolled; each row's first cell names it."""
    name = re.sub(r"\W+", "-", title.lower())
    text = [f'<h3 id="{name}">{escape(title)}</h3><div class="scroll" role="region" tabindex="0" '
            f'aria-labelledby="{name}"><table><thead><tr>',
            *(f'<th scope="col">{escape(cell)}</th>' for cell in head), "</tr></thead><tbody>"]
    for first, *cells in rows:
        text += [f'<tr><th scope="row">{escape(str(first))}</th>',
                 *(f"<td>{escape(str(cell))}</td>" for cell in cells), "</tr>"]
    return "".join([*text, "</tbody></table></div>\n"]).replace(" %", "\xa0%")


def page_results(names: list[str], results: list[dict], means: dict[str, dict]) -> str:
    """The tables of figures: of all runs, and averaged over their seeds."""
    first, rows = results[0], []

    def add(name: str, m: dict) -> None:
        rows.append([name, with_interval(m["auroc"], m["auroc_ci"]),
                     with_interval(m["average_precision"], m["average_precision_ci"]),
                     share(m["sensitivity_at_90_specificity"]),
                     share(m["sensitivity_at_95_specificity"]),
                     specificity(m).replace(" ", "\xa0")])

    for name, r in zip(names, results, strict=True):
        add(name, r)
        for scorer, m in r.get("scorers", {}).items():
            if scorer != r["scorer"]:
                add(f"{name}, {scorer}", m)
    spreads = [(name, mean) for name, mean in means.items() if "auroc_sd" in mean]
    for name, mean in spreads:
        add(f"{name}, mean of {len(mean['seeds'])} seeds", mean)
    rows += [[f"{k} (trivial)", with_interval(v, first["baselines_ci"][k]), *4 * [""]]
             for k, v in first.get("baselines", {}).items()]
    head = ("Score", "AUROC (95 % interval)", "Average precision", "Sensitivity at 90 %",
            "Sensitivity at 95 %", "Specificity reached")
    text = [html_table("AUROC and sensitivity", head, rows),
            '<p class="soft">AUROC is the chance that an abnormal image scores higher than a '
            "normal one; 0.5 is guessing. Sensitivities are at the thresholds that 90 % and 95 % "
            f"of {first['n_validation_normals']} validation normals stay under; the last column "
            "is the share of test normals under the second of them. Trivial scores need no model; "
            f"each stands in its better direction. {coverage(means)}</p>",
            *(f"<p>{escape(name)}, {escape(spread(mean).strip())}.</p>" for name, mean in spreads)]
    over_seeds = ", means" if len(means) < len(results) else ""
    names, results = list(means), list(means.values())
    for kind in ("finding", "view"):
        if table := first.get(f"auroc_by_{kind}"):
            rows = [[group, entry["n"], *(f"{r[f'auroc_by_{kind}'][group]['auroc']:.3f}"
                                          for r in results)] for group, entry in table.items()]
            text.append(html_table(f"AUROC by {kind}{over_seeds}",
                                   [kind.capitalize(), "Images", *names], rows))
    if "n_located" in first:
        rows = [[title.replace("  ", "map peak in lesion, "), *(share(r[key]) for r in results)]
                for key, title in LOCATED]
        if first["pixel_auroc"] is not None:
            rows.insert(0, ["pixel AUROC", *(f"{r['pixel_auroc']:.3f}" for r in results)])
        text += [html_table(f"Where the maps point: {first['n_located']} lesions{over_seeds}",
                            ["Measure", *names], rows), '<p class="soft">The peak may lie '
                 f"{100 * PEAK_TOLERANCE:g} % of the image side beside the lesion. Lesions cover "
                 f"{share(first['lesion_area'])} of the image.</p>"]
    return "".join(text)


def page_plots(runs: list[Run], scored: list[Scored], results: list[dict]) -> str:
    """ROC of all runs, and a histogram of scores for each."""
    scorer, frame = results[0]["scorer"], score_frame(scored, results[0]["scorer"])
    entries = [(run.name, s, m) for run, s, m in zip(runs, scored, results, strict=True)]
    text = []
    if results[0]["auroc"] is not None:
        alt = "; ".join(f"{n}: AUROC {with_interval(m['auroc'], m['auroc_ci'])}"
                        for n, _, m in entries)
        text.append(embedded_drawing(f"ROC curves. {alt}.", plot_roc, (entries, scorer)))
    for (name, s, m), colour in zip(entries, COLOURS * 9, strict=False):
        alt = (f"Histogram of the scores of {name}, threshold {m['threshold']:.3g}. On the right "
               f"side of it: {share(m['specificity_at_threshold'])} of the normal and "
               f"{share(m['sensitivity_at_95_specificity'])} of the abnormal images.")
        text.append(embedded_drawing(alt, plot_histogram, (name, s, m, frame, colour)))
    return f'<div class="plots">{"".join(text)}</div>'


def page_pictures(runs: list[Run], sources: list[Source], scored: list[Scored],
                  results: list[dict]) -> tuple[str, str]:
    """(example cases, worst misses and false alarms), all maps on one colour scale."""
    scorer, cases = results[0]["scorer"], comparison_cases(scored[0], results[0]["scorer"])
    wrong = [worst(s, m) for s, m in zip(scored, results, strict=True)]
    drawn: list[dict[int, tuple]] = []
    for run, source, s, (missed, alarms) in zip(runs, sources, scored, wrong, strict=True):
        drawn.append({})
        positions = list(dict.fromkeys(cases + missed[:3] + alarms[:3]))
        for start in range(0, len(positions), 6):  # a few at a time: the images may be large
            part = positions[start:start + 6]
            found = pictures(run, source, [s.samples[i] for i in part], scorer)
            drawn[-1] |= dict(zip(part, zip(*found, strict=True), strict=True))
    top = map_top(np.concatenate([m.ravel() for d in drawn for _, _, m in d.values()]))
    scale = ScalarMappable(matplotlib.colors.Normalize(0, top), "inferno")
    bar = embedded_drawing(
        f"Colours of the maps, dark to bright: {map_label(scorer)}, 0 to {top:.2g} and more.",
        lambda axes: axes.figure.colorbar(scale, cax=axes, orientation="horizontal", extend="max",
                                          label=map_label(scorer)), size=(4.4, 0.8))

    def show(r: int, i: int) -> tuple[str, str, str]:
        """Input, reconstruction and map of image i by run r."""
        (image, back, map_), name, sample = drawn[r][i], runs[r].name, scored[r].samples[i]
        y, x = (3 * int(v) // len(map_) for v in np.unravel_index(map_.argmax(), map_.shape))
        peak = f"{('upper', 'middle', 'lower')[y]} {('left', 'centre', 'right')[x]}"
        return (embedded_image(f"Input, {describe_sample(sample)}", image),
                embedded_image(f"Reconstruction by {name}", back),
                embedded_image(f"Anomaly map by {name}, highest ({map_.max():.2g}) in the {peak}",
                               image, map_, top, lesion_mask(sources[r], sample, len(map_))))

    def told(r: int, i: int) -> str:
        score = scored[r].scores[scorer][i]
        percentile = runs[r].scorer.percentile(scorer, torch.tensor([score]))[0]
        return (f"score {score:.3g}, percentile {percentile:.0f}, "
                f"{'' if score > results[r]['threshold'] else 'not '}flagged")

    examples, mistakes = [bar], [bar]
    for i in cases:
        sample = scored[0].samples[i]
        examples += [f"<h3>{escape(describe_sample(sample))}: {escape(sample.key)}</h3>"
                     '<div class="row">', html_figure(show(0, i)[:1], "input"),
                     *(html_figure(show(r, i)[1:], f"{escape(run.name)}, reconstruction "
                                   f"and map: {told(r, i)}") for r, run in enumerate(runs)),
                     "</div>"]
    for r, (run, s) in enumerate(zip(runs, scored, strict=True)):
        mistakes.append(f"<h3>{escape(run.name)}</h3>")
        for what, n, those in zip(("abnormal images missed", "normal images flagged"),
                                  (sum(s.labels == ABNORMAL), sum(s.labels == NORMAL)), wrong[r],
                                  strict=True):
            mistakes += [f'<h4>{len(those)} of {n} {what}</h4><div class="row">', *(
                html_figure(show(r, i)[::2], f"<b>{escape(s.samples[i].key)}</b>, "
                            f"{escape(describe_sample(s.samples[i]))}: {told(r, i)}")
                for i in those[:3]), "</div>"]
    return "".join(examples), "".join(mistakes)


def command_to_train(config: Config) -> str:
    """What to type to train a run again: every setting that is not the default."""
    words = ["python", "train.py"]
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        if f.name in ("resume", "reuse") or (value == f.default and f.name != "model"):
            continue
        words += ([flag(f.name) if value else flag(f"no_{f.name}")] if isinstance(value, bool)
                  else [flag(f.name), "auto" if value is None else str(value)])
    return quoted(*words)


def page_training(runs: list[Run], results: list[dict], costs: list[dict],
                  commands: list[str]) -> str:
    """Learning curves on one scale; what training took; commands, versions and settings."""
    logs = []
    for run in runs:
        with open(run.folder / "log.csv", newline="") as f:
            logs.append([{k: float(row[k]) for k in ("epoch", "train_loss", "val_loss")}
                         for row in csv.DictReader(f)])
    highest = max(max(row["train_loss"], row["val_loss"]) for rows in logs for row in rows)

    def draw(axes: Axes, name: str, rows: list[dict], colour: str) -> None:
        plot_curves(axes, rows, short(name), colour, colour)
        axes.set_ylim(0, 1.1 * highest)
        plain_axes(axes)

    text = ['<div class="plots">']
    for run, rows, colour in zip(runs, logs, COLOURS * 9, strict=False):
        best = min(rows, key=lambda row: row["val_loss"])
        text.append(embedded_drawing(
            f"Learning curves of {run.name}. Training loss {rows[0]['train_loss']:.3f} to "
            f"{rows[-1]['train_loss']:.3f}; best validation loss {best['val_loss']:.3f} in epoch "
            f"{best['epoch']:.0f} of {len(rows)}.", draw, (run.name, rows, colour)))
    names = [run.name for run in runs]
    here = (f"python {platform.python_version()}, torch {torch.__version__}, numpy "
            f"{np.__version__}, scikit-learn {sklearn.__version__}")
    took = [("trained on", [kind_of_data(run.config.data) for run in runs]),
            ("normal training images", [f"{len(read_splits(run.folder / 'split.csv').train):,}"
                                        for run in runs]),
            ("parameters", [f"{cost['parameters']:,}" for cost in costs]),
            ("epochs", [cost["epochs"] for cost in costs]),
            ("minutes", [f"{cost['minutes']:.1f}" for cost in costs]),
            ("images per second", [f"{cost['images_per_second']:.1f}" for cost in costs]),
            ("trained with", [run.made_with for run in runs]),
            ("scored with", [f"{here}, {run.device.type}, {run.precision}" for run in runs]),
            ("fingerprint of training data", [run.fingerprint for run in runs]),
            ("fingerprint of test data", [r["data_fingerprint"] for r in results])]
    settings = [[f.name, *(getattr(run.config, f.name) for run in runs)]
                for f in dataclasses.fields(Config)]
    return "".join([*text, "</div>", html_table(
        "What training took", ["What", *names], [[what, *cells] for what, cells in took]),
        "<h3>Commands</h3><pre>" + escape("\n".join(commands)) + "</pre>",
        html_table("Settings", ["Setting", *names], settings)])


def kind_of_data(spec: str, title: str = "") -> str:
    """What a reader must know first about data: whether it is real."""
    return ("the built-in phantom: drawn chest films, not real X-rays" if spec == "synthetic"
            else f"real images, as supplied: {title or spec}")


def write_page(runs: list[Run], sources: list[Source], scored: list[Scored], results: list[dict],
               means: dict[str, dict], verdicts: list[str], costs: list[dict], again: str,
               file: Path) -> None:
    """comparison.html: all that was found, in one file that fetches nothing.

    again: what to type to evaluate like this once more.
    """
    tables = page_results([run.name for run in runs], results, means)
    commands = [*(command_to_train(run.config) for run in runs), again]
    warning, first = drift_warning(results), results[0]
    firsts = [mean["positions"][0] for mean in means.values()]  # seeds; of all it would be too much
    shown = runs, sources, scored, results = [
        [x[i] for i in firsts] for x in (runs, sources, scored, results)]
    title = f"{' and '.join(means)}, {'compared' if len(means) > 1 else 'tested'}"
    facts = {
        "Trained on": "; ".join(dict.fromkeys(kind_of_data(run.config.data) for run in runs)),
        "Tested on": kind_of_data(sources[0].spec, first["data"]) + (
            " (an external test: nothing is fitted to these images)" if first["external"] else ""),
        f"{first['split'].capitalize()} images": f"{first['n_normal']:,} normal and "
        f"{first['n_abnormal']:,} abnormal, of {first['n_patients']:,} patients"
        + (f"; {len(first['unreadable'])} could not be read" if first["unreadable"] else ""),
        "Scorer": first["scorer"]}
    if any("auroc_sd" in mean for mean in means.values()):
        facts["Seeds"] = "all in the tables of results; from the curves on the first of each model"
    examples, mistakes = page_pictures(*shown)
    sections = {
        "Results": tables,
        "ROC and scores": page_plots(runs, scored, results),
        "Example cases": "<p>Of each kind of image the one whose score is in the middle, by the "
        "first model: nothing is picked by hand. Percentile: the share of validation normals that "
        "score no higher. Flagged: above the threshold. Blue outlines, where there are any, are "
        "the true lesions.</p>" + examples,
        "Worst misses and false alarms": "<p>Up to three of each, the furthest from the threshold "
        "first: input and anomaly map.</p>" + mistakes,
        "Training and reproduction": page_training(
            runs, results, [costs[i] for i in firsts], commands)}
    body = ['<header><p class="use">Research use only. Not for diagnosis.</p>',
            f"<h1>{escape(title)}</h1>",
            *(f"<p>{escape(line)}</p>" for line in verdicts),
            '<p class="soft">Compared by AUROC, over the same resamples.</p>' * bool(verdicts),
            *(f"<p><strong>{escape(line)}</strong></p>" for line in warning), "<dl>",
            *(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()),
            '</dl></header><nav aria-label="Sections"><ul>',
            *(f'<li><a href="#s{i}">{name}</a></li>' for i, name in enumerate(sections)),
            '</ul></nav><main id="main" tabindex="-1">',
            *(f'<section id="s{i}"><h2>{name}</h2>\n{text}</section>\n'
              for i, (name, text) in enumerate(sections.items())),
            f"</main><footer><p>Made by ImgAE-Dx on {datetime.date.today()}. This file holds "
            "images of the test data and their names: mind to whom you give it. Research use only, "
            "not for diagnosis.</p></footer>"]
    file.write_text(PAGE.substitute(title=escape(title), body="".join(body)), encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# Prediction


def predict(run: str | Path, image: str | Path, out: str | Path | None = None,
            scorer: str | None = None, device: str = "auto") -> list[dict[str, Any]]:
    """Score an image file, or every image in a folder; one row of results an image.

    Writes NAME_heatmap.png (input, reconstruction, map), NAME_map.npy (the map, float32 [H,W])
    and predictions.csv to `out`, by default <run>/predictions. Unreadable images of a folder are
    named and left out.
    """
    loaded = load_run(run, device)
    scorer = scorer or DEFAULT_SCORER
    if scorer not in SCORERS:
        raise UserError(f"--scorer {scorer}: not one of {', '.join(SCORERS)}")
    path = Path(image)
    if not path.exists():
        raise UserError(f"--image {image}: there is nothing at {path.resolve()}")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES
                   and not is_heatmap(p)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--image {image}: no images in this folder (looked for "
                        f"{', '.join(IMAGE_SUFFIXES)})")
    folder = Path(out) if out else loaded.folder / "predictions"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    threshold = loaded.scorer.threshold(scorer, 0.95)
    names = [f.relative_to(path).as_posix() if path.is_dir() else f.name for f in files]
    stems = [name.rpartition(".")[0].replace("/", "__") for name in names]
    if len(set(stems)) < len(stems):  # film.png and film.jpg: keep them apart
        stems = [name.replace("/", "__") for name in names]
    # File systems take names of 255 bytes; those of DICOM's folders together may be longer.
    stems = [stem if len(os.fsencode(stem)) <= 200 else
             f"{stem[-40:]}-{hashlib.blake2b(os.fsencode(stem), digest_size=6).hexdigest()}"
             for stem in stems]
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    bar = Progress(len(files), "scoring")
    try:
        for start in range(0, len(files), READ_AT_ONCE):
            images, places = [], []
            for i, file in enumerate(files[start : start + READ_AT_ONCE], start):
                try:
                    if not is_text(names[i]):  # neither table nor picture could hold it
                        raise BadImage("its name is not UTF-8")
                    pixels = decode_image(file.read_bytes(), loaded.config.image_size)
                except (BadImage, OSError) as error:
                    if not path.is_dir():
                        raise UserError(
                            f"--image {image}: cannot be read as an image ({error})") from None
                    name = names[i] if is_text(names[i]) else ascii(names[i])[1:-1]
                    skipped.append(f"skipped   {name}: {error}")
                    continue
                images.append(torch.from_numpy(pixels.copy())[None])
                places.append(i)
            if not images:
                continue
            reading, scores, maps = loaded.read(torch.stack(images), scorer)
            percentiles = loaded.scorer.percentile(scorer, scores[scorer])
            for k, i in enumerate(places):
                score = float(scores[scorer][k])
                row = {"image": names[i], "score": round(score, 6),
                       "percentile_among_normals": round(float(percentiles[k]), 1),
                       "threshold": round(threshold, 6),
                       "verdict": "abnormal" if score > threshold else "normal"}
                rows.append(row)
                np.save(folder / f"{stems[i]}_map.npy",
                        maps[k, 0].cpu().numpy().astype(np.float32))
                seen, back, map_ = (t[k, 0].cpu().numpy()
                                    for t in (reading.images, reading.reconstruction, maps))
                draw_prediction(loaded, row, seen, back, map_, scorer,
                                folder / f"{stems[i]}_heatmap.png")
                bar.update(1)
    finally:  # also when it was interrupted
        bar.close()
        if rows:
            with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    print("\n".join(skipped) or "", end="\n" if skipped else "")
    if not rows:
        raise UserError(f"--image {image}: none of its {len(files)} images could be read")
    width = min(60, max(len(r["image"]) for r in rows))
    for r in rows[:40]:
        print(f"{r['image']:<{width}}  score {r['score']:.4g}  higher than or equal to "
              f"{r['percentile_among_normals']:.0f} % of normals  {r['verdict']} "
              f"(threshold {r['threshold']:.4g})")
    if len(rows) > 40:
        print(f"... and {len(rows) - 40} more in predictions.csv")
    print(f"{loaded.name} trained on {loaded.config.data}; abnormal means: above 95 % of "
          f"{len(loaded.scorer.normal_scores[scorer])} validation normals. Not a diagnosis.")
    print(f"written   {folder}/: a heatmap (.png) and a raw map (.npy) an image, predictions.csv")
    return rows


def is_heatmap(file: Path) -> bool:
    """Whether this is what `predict` drew at an earlier time: the map lies beside it."""
    stem = file.name.removesuffix("_heatmap.png")
    return stem != file.name and file.with_name(f"{stem}_map.npy").exists()


def draw_prediction(run: Run, row: dict, image: np.ndarray, back: np.ndarray, map_: np.ndarray,
                    scorer: str, file: Path) -> None:
    """Input, reconstruction and heatmap, each [H,W], side by side.

    The colour scale ends where the map's own peak lies, or at twice the score that 95 % of normal
    images stay under (of zscore's map, the score `peak`) if that is more, so that a normal image
    does not glow.
    """
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    show_image(axes[0], image, "input")
    show_image(axes[1], back, "reconstruction")
    usual = run.scorer.threshold("peak" if map_name(scorer) == "zscore" else scorer, 0.95)
    shown = show_map(axes[2], image, map_, max(float(map_.max()), 2 * usual))
    axes[2].set_title("anomaly map", fontsize=9)
    figure.colorbar(shown, ax=axes[2], label=map_label(scorer))
    figure.suptitle(f"{row['image']}: score {row['score']:.4g}, percentile "
                    f"{row['percentile_among_normals']:.0f} among normals, {row['verdict']} at "
                    f"threshold {row['threshold']:.4g} ({run.name})", fontsize=10)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Do what the command line asks for."""
    arguments = parse_arguments()
    image, out = arguments.pop("image"), arguments.pop("out")
    try:
        if image is None:
            evaluate(**arguments)
        elif len(arguments["runs"]) > 1:
            raise UserError("--image: give one run")
        else:
            predict(arguments["runs"][0], image, out, arguments["scorer"], arguments["device"])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({first_line(error)[:200]}); does another program use it? "
                        "Give fewer runs at a time, or --device cpu") from None


if __name__ == "__main__":
    sys.exit(run_command(main, "evaluate.py"))
