"""Where images come from, how they are split, and how they reach the training loop.

One road for every source: Source.read(sample) -> bytes -> decode_image -> uint8 [H,W]
-> ImageStream -> batches uint8 [B,1,H,W]. Nothing on it knows where the bytes came from.

    from data import create_dataloaders
    loaders = create_dataloaders(Config(data="my_xrays"))    # loaders.train, .val, .test
"""

import contextlib
import csv
import hashlib
import io
import math
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from config import Config, UserError

NORMAL, ABNORMAL = 0, 1
SPLITS = ("train", "val", "test")
MIN_NORMALS = 50  # fewer cannot teach a model what is normal
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".tif", ".tiff", ".dcm")
MAX_PIXELS = 100_000_000  # a larger image is a mistake or an attack, never a radiograph
MAX_BAD_SHARE = 0.05  # of a stream's images; more unreadable ones than this stop the run


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as its source knows it, before any of it is read."""

    key: str  # name within the source; unique
    patient: str  # images of one patient never lie in two splits
    label: int  # 0 normal, 1 abnormal
    finding: str = ""  # kind of abnormality, where known
    view: str = ""  # PA, AP ..., where known
    split: str = ""  # train, val or test where the source prescribes it


class Source:
    """A set of labelled images. Subclasses fill `samples` and say how to `read` one."""

    spec: str  # what --data said
    name: str  # short name, used for folders of results
    title: str  # one line: what this is
    samples: list[Sample]
    left_out: Counter  # reason -> number of images or rows that were left out

    def read(self, sample: Sample) -> bytes:
        """The image file's bytes. OSError if it cannot be had."""
        raise NotImplementedError

    def mask(self, sample: Sample, size: int) -> np.ndarray | None:
        """Where the lesion is, bool [size,size]; None if the source does not know."""
        return None

    def fingerprint(self) -> str:
        """A short digest of names, patients, labels and prescribed splits: equal for equal data,
        wherever it lies."""
        digest = hashlib.blake2b(digest_size=8)
        for s in self.samples:
            digest.update(f"{s.key}\t{s.patient}\t{s.label}\t{s.split}\n".encode())
        return digest.hexdigest()


def open_source(config: Config) -> Source:
    """The source that `config.data` names. UserError if there is none, or nothing usable in it."""
    if config.data == "synthetic":
        return PhantomSource(config.samples or PHANTOM_SAMPLES, config.image_size)
    if config.data.startswith("kaggle:"):
        raise UserError(f"--data {config.data}: Kaggle data sets are not streamed yet; download "
                        "and unpack it, then give the folder")
    return FolderSource(config.data)


# ----------------------------------------------------------------------------------------------
# The phantom


PHANTOM_SAMPLES = 400  # normal training films unless --samples says otherwise


class PhantomSource(Source):
    """Drawn chest films with known lesions: everything runs on them without any download.

    Training films are numbered from 0, validation from 100,000, test from 200,000; they do not
    depend on any setting but `image_size`, at which they are drawn.
    """

    def __init__(self, train_normals: int, image_size: int) -> None:
        self.spec = self.name = "synthetic"
        self.title = "built-in phantom (drawn chest films, not real X-rays)"
        self.left_out, self.image_size = Counter(), image_size
        kinds = [None] * 100 + list(PHANTOM_KINDS) * 20
        self.samples = [self._sample(i, None, "train") for i in range(train_normals)]
        self.samples += [self._sample(100_000 + i, kind, "val") for i, kind in enumerate(kinds)]
        self.samples += [self._sample(200_000 + i, kind, "test") for i, kind in enumerate(kinds)]

    @staticmethod
    def _sample(index: int, kind: str | None, split: str) -> Sample:
        return Sample(f"{index:06d}-{kind or 'normal'}", f"{index:06d}",
                      NORMAL if kind is None else ABNORMAL, kind or "", "PA", split)

    def _draw(self, sample: Sample, size: int) -> tuple[np.ndarray, np.ndarray]:
        return draw_phantom(int(sample.patient), size, kind=sample.finding or None)

    def read(self, sample: Sample) -> bytes:
        image, _ = self._draw(sample, self.image_size)
        return b"P5 %d %d 255\n" % image.shape[::-1] + image.tobytes()  # a PGM file

    def mask(self, sample: Sample, size: int) -> np.ndarray | None:
        return self._draw(sample, size)[1]


PHANTOM_KINDS = ("opacity", "nodule", "effusion", "missing", "doubled")
# A large array freed once makes glibc keep the memory of later temporaries: twice the speed.
np.empty(1 << 22, np.uint8)
# How much of each range of normal anatomy is used. Together with the noise below this sets the
# difficulty: learnt from a few hundred films within minutes, yet no trivial score tells lesions.
VARIETY = 0.35
MASK_LEVEL = 0.04  # smallest noise-free change, as a share of the grey range, that counts as lesion


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """Smooth step from 0 to 1 around distance 0 (`width` wide): a blurred edge without a blur."""
    t = distance * (1.0 / width)
    t += 0.5
    t = np.clip(t, 0.0, 1.0, out=t)
    bent = -2.0 * t
    bent += 3.0
    bent *= t
    bent *= t
    return bent


def _bone(distance: np.ndarray, half: float, width: float) -> np.ndarray:
    """Cross-section of a bone, 0..1: nothing beyond `half`, densest towards its rims."""
    off = np.abs(distance)
    return _soft(half - off, width) * (0.75 + (0.25 / half) * np.minimum(off, half))


def _ellipse(u: np.ndarray, v: np.ndarray, angle: float, ru: float, rv: float) -> np.ndarray:
    """Squared normalised radius: 0 at the origin, 1 on an ellipse turned by `angle`."""
    c, s = np.cos(angle), np.sin(angle)
    return ((c / ru) * u + (s / ru) * v) ** 2 + ((c / rv) * v - (s / rv) * u) ** 2


def _clavicles(distance: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Both collar bones, 0..1, from the distance to their axis and from |u|."""
    return _bone(distance, 0.034, 0.03) * _soft(a - 0.09, 0.05) * _soft(0.74 - a, 0.15)


def _patient(rng: np.random.RandomState, size: int) -> SimpleNamespace:
    """One patient's layers, float64 [size, size] each; lengths are in half image sides."""
    def draw(low: float, high: float, count: int | None = None) -> float | np.ndarray:
        return (low + high) / 2 + VARIETY * (rng.uniform(low, high, count) - (low + high) / 2)

    p = SimpleNamespace()
    p.grid = grid = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
    p.scale, ratio, angle = draw(0.96, 1.15), draw(0.93, 1.07), draw(-0.07, 0.07)
    x, y = grid[None, :] - draw(-0.08, 0.08), grid[:, None] - draw(-0.05, 0.11)
    # Body frame: u grows towards the patient's left (the viewer's right), v towards the feet.
    p.u = u = (np.cos(angle) * x + np.sin(angle) * y) / (p.scale * ratio)
    p.v = v = (np.cos(angle) * y - np.sin(angle) * x) / p.scale
    p.a = a = np.abs(u)
    aa = a * a

    # Soft tissue: neck, sloping shoulders, flanks; thinner towards the skin.
    flank = draw(0.82, 0.92) + 0.9 * np.maximum(0.0, -0.10 - v)
    shoulder = draw(-0.90, -0.84) + draw(0.28, 0.40) * aa
    skin = np.maximum(np.minimum(flank - a, v - shoulder), draw(0.22, 0.27) - a)
    body = _soft(skin - 0.01, 0.05)
    tissue = 0.22 + 0.34 * np.sqrt(np.clip(skin / 0.6, 0.0, 1.0))
    tissue += 0.09 * np.maximum(0.0, 1.0 - ((a - 0.92) ** 2 + (v + 0.48) ** 2) / 0.05)
    tissue += 0.16 * np.maximum(0.0, 1.0 - aa / 0.12) ** 2 * _soft(v + 0.8, 0.6)

    # Lungs: round apices, walls that widen downwards, domes below (the liver lifts the right one).
    middle, apex, half = draw(0.36, 0.39), draw(0.80, 0.88), draw(0.34, 0.37)
    p.across = (a - middle) / (half + half * draw(0.06, 0.16) * v)  # -1 inner border, +1 chest wall
    radius = np.sqrt(p.across**2 + np.minimum((v - 0.15) / apex, 0.0) ** 2)
    p.cage = _soft((1.12 - radius) * half, 0.05) * body
    base, p.lift = draw(0.50, 0.62), draw(0.03, 0.10)
    p.base = base
    dome = v - base + p.lift * (u < 0) - draw(1.0, 1.7) * (a - draw(0.28, 0.34)) ** 2
    waist = a - 0.05 * v * v - draw(0.13, 0.16)
    p.lung = _soft((1.0 - radius) * half, 0.05) * _soft(waist, 0.06) * _soft(-dome, 0.035)
    p.depth = draw(0.36, 0.44)

    # Heart: a tilted ellipse that bulges to the patient's left, the right atrium, the aortic knob.
    big = draw(0.88, 1.12)
    p.heart_at = draw(0.10, 0.15), base - 0.21 * big, draw(0.75, 0.95), 0.39 * big, 0.26 * big
    main = _ellipse(u - p.heart_at[0], v - p.heart_at[1], *p.heart_at[2:])
    atrium = _ellipse(u + 0.05, v - base + 0.22, 0.0, 0.18 * big, 0.30)
    knob = _ellipse(u - 0.09, v + draw(0.16, 0.26), 0.0, 0.11, 0.18)
    rest = (1.0 - _soft(1.1 - main, 0.55)) * (1.0 - _soft(1.1 - atrium, 0.8))
    p.heart = 1.0 - rest * (1.0 - _soft(1.1 - knob, 0.9))
    p.air = p.lung * (1.0 - p.heart)

    # Hila: dense roots from which vessels fan out and fade.
    du, dv = a - 0.13, v - draw(-0.04, 0.04) - 0.04 * (u < 0)
    reach = du * du + dv * dv
    vessels = 0.14 * np.maximum(0.0, 1.0 - reach / 0.03)
    fade = 0.13 * np.clip(1.1 - reach / 0.12, 0.0, 1.0) * _soft(reach - 0.008, 0.016)
    for slope in np.array([-1.3, -0.3, 0.6, 1.7]) + draw(-0.15, 0.15, 4):
        off = np.abs(dv - slope * du + 0.5 * reach) * (1.0 / (0.03 * np.hypot(1.0, slope)))
        vessels += fade * np.maximum(0.0, 1.0 - off)

    # Posterior ribs fall outwards, the fainter anterior ones fall inwards.
    step, p.rib_half, p.rib_level = draw(0.138, 0.168), draw(0.19, 0.25), draw(0.12, 0.17)
    p.rib_phase = (v - draw(-0.70, -0.62) + 0.22 * a - draw(0.75, 0.95) * aa) * (1.0 / step)
    row = np.rint(p.rib_phase)
    ribs = _bone(p.rib_phase - row, p.rib_half, 0.16) * p.cage * _soft(a - 0.07, 0.06) * (row >= 0)
    p.ribs = p.rib_level * ribs * (0.4 + 0.6 * p.air)
    front = (v + draw(0.30, 0.42) + 0.75 * a - 0.35 * aa) * (0.8 / step)
    row = np.rint(front)
    fronts = 0.05 * _bone(front - row, 0.24, 0.25) * p.lung * _soft(a - 0.30, 0.25) * (row >= 0)
    bend = 1.2 * a * (a - 0.35) * (a - 0.75)
    p.collar = v - draw(-0.47, -0.40) + draw(0.20, 0.34) * a - bend
    p.collar_level = draw(0.14, 0.20) * body

    disc = v * draw(6.5, 8.0) + draw(0.0, 1.0)
    disc -= np.rint(disc)
    spine = 0.06 * _soft(0.085 - a, 0.04) * (1.0 - 1.6 * disc * disc)
    trachea = 0.08 * _soft(0.045 - np.abs(u + 0.01), 0.04) * _soft(-0.12 - v, 0.2)
    gas = draw(0.0, 0.14) * _soft(1.0 - _ellipse(u - 0.36, v - base - 0.17, 0.1, 0.17, 0.09), 0.6)
    p.total = (
        0.06 + body * tissue + p.air * (0.08 * v - p.depth + vessels) + p.ribs + fronts
        + p.collar_level * _clavicles(p.collar, a) + spine - trachea - gas
        + 0.10 * _soft(dome, 0.035) * p.cage
    )
    return p


def _lesion(kind: str, p: SimpleNamespace, rng: np.random.RandomState) -> np.ndarray:
    """What an anomaly adds to the attenuation (negative: takes away), float64 [size, size]."""
    draw, a = rng.uniform, p.a
    sign, choice = rng.choice([-1.0, 1.0]), draw(0.0, 1.0)
    mine = p.u * sign > 0
    # A place in the lung of that side; on the left the heart leaves only the outer part below.
    low = draw(-0.40, 0.32)
    inner = -0.25 if sign < 0 or low < -0.1 else 0.25
    du, dv = p.u - sign * (0.375 + 0.36 * draw(inner, 0.55)), p.v - low
    if kind == "opacity":
        turn, ru, rv = draw(0.0, 3.14), draw(0.16, 0.26), draw(0.12, 0.19)
        col, row = np.sin(draw(10, 16, 2) * p.grid[:, None] + draw(0, 6, 2)).T
        wobble = 0.35 * (col[None, :] + row[:, None])
        spot = _soft(1.0 + wobble - _ellipse(du, dv, turn, ru, rv), draw(0.9, 1.6))
        col, row = np.sin(draw(28, 44, 2) * p.grid[:, None] + draw(0, 6, 2)).T
        waves = col[None, :] * row[:, None]
        return draw(0.16, 0.26) * spot * (1.0 + draw(0.0, 0.5) * waves) * (0.15 + 0.85 * p.air)
    if kind == "nodule":
        radius = draw(0.05, 0.12) / p.scale
        return draw(0.20, 0.30) * _soft(1.0 - _ellipse(du, dv, 0.0, radius, radius), 0.8)
    if kind == "effusion":
        # The fluid's upper edge climbs along the chest wall: the meniscus.
        level = p.base - p.lift * (sign < 0) + draw(-0.08, 0.02)
        edge = level - draw(0.14, 0.28) * np.clip(p.across * 0.5 + 0.4, 0.0, 1.0) ** 2
        return draw(0.55, 0.85) * p.depth * p.air * mine * _soft(p.v - edge, 0.07)
    first, count = rng.randint(2, 5), rng.randint(2, 4)
    stretch = _soft(a - draw(0.14, 0.26), 0.08) * mine
    if kind == "missing" and choice < 0.4:
        return -draw(0.7, 0.9) * p.depth * p.heart * p.lung * (p.u > 0)
    if kind == "missing" and choice < 0.55:
        return -p.collar_level * _clavicles(p.collar, a) * mine
    if kind == "missing":
        row = np.rint(p.rib_phase)
        return -p.ribs * ((row >= first) & (row <= first + count)) * stretch
    if choice < 0.25:
        # A second, larger heart behind the first: its border runs through the left lung.
        u, v, angle, ru, rv = p.heart_at
        grown = draw(1.25, 1.45)
        shape = _ellipse(p.u - u, p.v - v, angle, ru * grown, rv * grown)
        return draw(0.4, 0.6) * p.depth * _soft(1.0 - shape, 0.24) * p.air
    if choice < 0.5:
        return p.collar_level * _clavicles(p.collar - draw(0.10, 0.16), a) * mine
    # Ribs drawn again: half a space lower, or tilted so that they cross their neighbours.
    again = p.rib_phase - first - 0.5 - (choice < 0.75) * draw(2.0, 5.0) * (0.45 - a)
    again -= np.clip(np.rint(again), 0, count - 1)
    return 1.3 * p.rib_level * _bone(again, p.rib_half, 0.16) * p.cage * stretch


def draw_phantom(
    index: int, size: int = 128, seed: int = 0, kind: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Film number `index` (one patient each) and the mask of its anomaly.

    Returns uint8 [size, size] in 0..255 and bool [size, size], all False when `kind` is None.
    The film drawn with kind=None is the lesion-free twin: same anatomy, exposure and noise.
    """
    if kind is not None and kind not in PHANTOM_KINDS:
        raise ValueError(f"kind must be None or one of {PHANTOM_KINDS}, not {kind!r}")
    # RandomState, because its stream is frozen for good: tests can pin the bytes of a film. The
    # lesion has a generator of its own, so that it cannot disturb the patient's numbers.
    rng = np.random.RandomState([seed, index, 0])
    p = _patient(rng, size)
    gain, offset, bend = rng.uniform(0.9, 1.1), rng.uniform(-0.03, 0.03), rng.uniform(-0.25, 0.2)
    tilt_u, tilt_v = rng.uniform(-0.03, 0.03, 2)
    noise_level, grain = 0.015 * 6.0 ** rng.uniform(0.0, 1.0), rng.uniform(0.0, 0.2)
    noise = rng.standard_normal((size + 1, size + 1))  # last: the only numbers that depend on size
    noise = noise[:-1, :-1] + grain * (noise[1:, :-1] + noise[:-1, 1:])
    noise *= noise_level / np.sqrt(1.0 + 2.0 * grain * grain)
    light = offset + tilt_u * p.u + tilt_v * p.v

    def expose(attenuation: np.ndarray) -> np.ndarray:
        grey = np.clip(gain * attenuation + light, 0.0, 1.0)
        return grey + bend * grey * (1.0 - grey)

    grey, mask = expose(p.total), np.zeros((size, size), dtype=bool)
    if kind is not None:
        rng = np.random.RandomState([seed, index, 1 + PHANTOM_KINDS.index(kind)])
        twin, grey = grey, expose(p.total + 1.2 * _lesion(kind, p, rng))
        change = np.abs(grey - twin)
        mask = change >= min(MASK_LEVEL, 0.5 * change.max())
    return np.rint(255.0 * np.clip(grey + noise, 0.0, 1.0)).astype(np.uint8), mask


# ----------------------------------------------------------------------------------------------
# Folders, and the layouts that are recognised in them. A layout is read off the names and the
# CSV files alone, so that the same code serves for any place that can list names.


NORMAL_NAMES = {"normal", "normals", "good", "healthy", "no finding", "no_finding", "negative", "0"}
ABNORMAL_NAMES = {"abnormal", "anomaly", "anomalous", "bad", "defect", "positive", "1"}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
               "validation": "val", "test": "test", "testing": "test"}


class FolderSource(Source):
    """Images in a folder, or those that a CSV file lists.

    Layouts, in the order in which they are looked for: NIH ChestX-ray14, covid-chestxray, a CSV
    of paths, folders called normal / abnormal (or NORMAL / PNEUMONIA, good / scratch ...) with or
    without train / val / test above them.
    """

    def __init__(self, spec: str) -> None:
        path = Path(spec).expanduser()
        name = path.resolve().name if path.is_dir() else path.stem
        self.spec, self.name = spec, re.sub(r"[^\w.-]+", "_", name) or "folder"
        self.left_out = Counter()
        if not path.exists():
            raise UserError(f"--data {spec}: there is nothing at {path.resolve()}")
        self.root = path if path.is_dir() else path.parent
        if path.is_dir():
            names = []
            for folder, folders, files in os.walk(path, followlinks=True):
                folders[:] = sorted(d for d in folders if not d.startswith("."))
                inside = PurePosixPath(Path(folder).relative_to(path).as_posix())
                names += [str(inside / f) for f in files if not f.startswith(".")]
            layout = recognise_layout(sorted(names), self._read_text, spec, self.left_out)
        elif path.suffix.lower() == ".csv":
            layout = read_csv_of_paths(path.name, None, self._read_text, spec)
            listed = [*(s.key for s in layout.samples), *layout.masks.values()]
            absent = [name for name in listed if not (self.root / name).is_file()]
            if absent:
                raise UserError(
                    f"--data {spec}: {len(absent)} of the {len(listed)} files it lists are "
                    f"not there, the first is {self.root / absent[0]}"
                )
        else:
            raise UserError(f"--data {spec}: neither a folder nor a CSV file")
        self.samples, self.masks = layout.samples, layout.masks
        self.title = f"{layout.title} in {path.resolve()}"

    def _read_text(self, name: str) -> str:
        try:
            return (self.root / name).read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise UserError(f"{self.root / name}: cannot be read ({error.strerror})") from None

    def read(self, sample: Sample) -> bytes:
        return (self.root / sample.key).read_bytes()

    def mask(self, sample: Sample, size: int) -> np.ndarray | None:
        if sample.key not in self.masks:
            return None
        file = self.root / self.masks[sample.key]
        try:
            with Image.open(file) as image:
                mask = image.convert("L").point(lambda grey: 255 * (grey > 0))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{file}: cannot be read as a mask ({error})") from None
        # Any lesion pixel counts, so that a small lesion does not vanish.
        return np.asarray(mask.resize((size, size), Image.Resampling.BOX)) > 0


class Layout(NamedTuple):
    title: str
    samples: list[Sample]
    masks: dict[str, str] = {}  # image key -> mask file, for the layouts that have masks


def recognise_layout(
    names: list[str], read_text: Callable[[str], str], where: str, left_out: Counter
) -> Layout:
    """Samples from a sorted list of file names (posix, relative) and the CSV files among them.

    where: what to call this place in messages. left_out: takes the counts of what is not used.
    UserError if the layout is not one of those known, with what was found instead.
    """
    # The Kermany archive holds itself a second time, and a Mac's shadow files.
    copies = [n for n in names if "__MACOSX/" in n or n.startswith("chest_xray/chest_xray/")]
    if copies:
        left_out["copies inside the archive"] += len(copies)
        names = sorted(set(names) - set(copies))
    images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
    tables = {PurePosixPath(n).name: n for n in names if n.lower().endswith((".csv", ".txt"))}
    if not images:
        raise UserError(f"--data {where}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")

    if entry := next((n for b, n in tables.items() if b.startswith("Data_Entry_2017")), None):
        return read_nih(images, entry, tables, read_text, where, left_out)
    if "metadata.csv" in tables and _has_columns(
        read_text(tables["metadata.csv"]), ("finding",), ("filename",), ("view",)
    ):
        return read_covid(images, tables["metadata.csv"], read_text, left_out)
    top = [n for n in tables.values() if "/" not in n and n.lower().endswith(".csv")]
    listing = [n for n in top if _has_columns(read_text(n), _PATH, _LABEL)]
    if len(listing) == 1:
        return read_csv_of_paths(listing[0], images, read_text, where)
    return read_class_folders(images, where, left_out)


def read_class_folders(images: list[str], where: str, left_out: Counter) -> Layout:
    """An image's class is the folder it lies in: normal by its name, abnormal if that folder
    stands beside a normal one or is called abnormal; train, val or test may stand above."""
    parents = {n: PurePosixPath(n).parent for n in images}
    normal_dirs = {p for p in parents.values() if p.name.lower() in NORMAL_NAMES}
    beside_normal = {p.parent for p in normal_dirs}
    # train/normal also explains what lies beside it: the test/pneumonia of the same set.
    sets = {p.parent for p in beside_normal if p.name.lower() in SPLIT_NAMES}
    beside_normal |= {p.parent for p in parents.values()
                      if p.parent.name.lower() in SPLIT_NAMES and p.parent.parent in sets}
    samples = []
    for name in images:
        parent = parents[name]
        if parent in normal_dirs:
            label, finding = NORMAL, ""
        elif parent.name.lower() in ABNORMAL_NAMES or (
            parent.parent in beside_normal and parent not in beside_normal
            and parent.name.lower() not in ("mask", "masks", "ground_truth")
        ):
            label, finding = ABNORMAL, parent.name.lower()
        else:
            left_out["in a folder that is neither normal nor beside a normal one"] += 1
            continue
        split = next((SPLIT_NAMES[p.lower()] for p in parent.parts if p.lower() in SPLIT_NAMES), "")
        patient, kermany_finding = _patient_from_name(PurePosixPath(name).name)
        samples.append(Sample(name, patient or name, label, kermany_finding or finding, "", split))
    if not any(s.label == NORMAL for s in samples):
        found = ", ".join(sorted({p.as_posix() for p in parents.values()})[:6])
        raise UserError(
            f"--data {where}: no folder of normal images among its {len(images)} images; call it "
            f"normal (or NORMAL, good, healthy) or list the images in a CSV; folders found: {found}"
        )
    kermany = any(s.finding in ("bacteria", "virus") for s in samples)
    return Layout("chest X-rays as Kermany laid them out" if kermany else
                  "folders of normal and abnormal images", samples)


def _patient_from_name(name: str) -> tuple[str, str]:
    """(patient, finding) that a Kermany file name tells; empty where it does not."""
    if m := re.match(r"(person\d+)_(bacteria|virus)_", name):
        return f"{m[1]}_{m[2]}", m[2]  # the numbers begin anew for each finding
    m = re.match(r"((?:NORMAL2-)?IM-\d+)-", name)
    return (m[1], "") if m else ("", "")


_PATH = ("path", "file", "filename", "image", "image_path", "filepath")
_LABEL = ("label", "class", "target")


def _rows(text: str) -> list[dict[str, str]]:
    """A CSV's rows with lower-case column names and stripped values."""
    rows = list(csv.DictReader(io.StringIO(text)))
    return [{(k or "").strip().lower(): (v or "").strip() for k, v in row.items()
             if not isinstance(v, list)} for row in rows]


def _has_columns(text: str, *wanted: tuple[str, ...]) -> bool:
    """Whether the CSV's header has one of each group of column names."""
    first = next(csv.reader([text.split("\n", 1)[0].strip()]), [])
    header = [c.strip().lower() for c in first]
    return all(any(name in header for name in group) for group in wanted)


def read_csv_of_paths(
    file: str, images: list[str] | None, read_text: Callable[[str], str], where: str
) -> Layout:
    """A user's own table: path and label, and where there are any, patient, split, finding, view
    and mask. Paths are relative to the table. images: the files there are, if they were listed."""
    text = read_text(file)
    for group in (_PATH, _LABEL):
        if not _has_columns(text, group):
            header = text.split("\n", 1)[0].strip()
            raise UserError(f"--data {where}: {file} has no column {group[0]} (or "
                            f"{', '.join(group[1:])}); its columns are: {header[:200]}")
    there = None if images is None else set(images)
    samples, masks, seen = [], {}, set()
    for number, row in enumerate(_rows(text), start=2):
        path = next(row[c] for c in _PATH if c in row)
        label = next(row[c] for c in _LABEL if c in row)
        key = os.path.normpath(path).replace(os.sep, "/")
        if not path or not label:
            raise UserError(f"--data {where}: {file} row {number}: path or label is empty")
        if there is not None and key not in there:
            raise UserError(f"--data {where}: {file} row {number}: there is no image {path}")
        if key in seen:
            raise UserError(f"--data {where}: {file} row {number}: {path} is listed twice")
        seen.add(key)
        split = row.get("split", "").lower()
        if split and split not in SPLIT_NAMES:
            raise UserError(f"--data {where}: {file} row {number}: split {split!r} is not one of "
                            "train, val, test")
        normal = label.lower() in NORMAL_NAMES
        if not normal and re.fullmatch(r"[\d.+-]+", label) and label != "1":
            raise UserError(f"--data {where}: {file} row {number}: label {label} is neither 0 "
                            "(normal) nor 1 (abnormal)")
        finding = row.get("finding") or ("" if label.lower() in ABNORMAL_NAMES else label)
        samples.append(Sample(
            key, row.get("patient") or row.get("patient_id") or key,
            NORMAL if normal else ABNORMAL, "" if normal else finding,
            row.get("view", ""), SPLIT_NAMES.get(split, "")))
        if row.get("mask"):
            masks[key] = row["mask"]
    return Layout(f"images listed in {file}", samples, masks)


def read_nih(
    images: list[str], entry: str, tables: dict[str, str], read_text: Callable[[str], str],
    where: str, left_out: Counter,
) -> Layout:
    """NIH ChestX-ray14: normal is exactly `No Finding`; the official lists give the test split."""
    text = read_text(entry)
    for column in ("image index", "finding labels", "patient id"):
        if not _has_columns(text, (column,)):
            raise UserError(f"--data {where}: {entry} has no column {column!r}")
    by_name = {PurePosixPath(n).name: n for n in images}
    split_of = {}
    for list_name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if list_name in tables:
            split_of |= dict.fromkeys(read_text(tables[list_name]).split(), split)
    samples = []
    for row in _rows(text):
        key = by_name.get(row["image index"])
        if key is None:
            left_out["listed in the table but not there"] += 1
            continue
        normal = row["finding labels"] == "No Finding"
        samples.append(Sample(
            key, row["patient id"], NORMAL if normal else ABNORMAL,
            "" if normal else row["finding labels"], row.get("view position", ""),
            split_of.get(row["image index"], "")))
    return Layout("NIH ChestX-ray14", sorted(samples, key=lambda s: s.key))


def read_covid(
    images: list[str], table: str, read_text: Callable[[str], str], left_out: Counter
) -> Layout:
    """covid-chestxray-dataset: frontal X-rays with a stated finding; normal is `No Finding`."""
    by_name = {PurePosixPath(n).name: n for n in images}
    samples: dict[str, Sample] = {}
    for row in _rows(read_text(table)):
        tokens = {t.strip() for t in re.split(r"[/,]", row["finding"])} - {""}
        key = by_name.get(row["filename"])
        if row.get("modality", "X-ray") != "X-ray":
            left_out["not an X-ray"] += 1
        elif row["view"] not in ("PA", "AP", "AP Supine"):
            left_out["not a frontal view"] += 1
        elif not tokens or tokens & {"todo", "Unknown"}:
            left_out["no finding stated (todo, unknown, empty)"] += 1
        elif key is None:
            left_out["listed in the table but not there"] += 1
        elif key in samples:
            left_out["listed twice"] += 1
        else:
            normal = tokens == {"No Finding"}
            samples[key] = Sample(key, row.get("patientid") or key, NORMAL if normal else ABNORMAL,
                                  "" if normal else row["finding"], row["view"])
    return Layout("covid-chestxray-dataset", sorted(samples.values(), key=lambda s: s.key))


# ----------------------------------------------------------------------------------------------
# Splits


class Splits(NamedTuple):
    """Samples by split. train: normals only. val and test: both labels where there are any."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    notes: list[str]  # what a user should know about how this came about

    def normals(self, split: str) -> list[Sample]:
        return [s for s in getattr(self, split) if s.label == NORMAL]


def _draw(text: str) -> bytes:
    """A number that depends on a text alone: the same for ever, on every machine."""
    return hashlib.blake2b(f"imgae-dx:{text}".encode(), digest_size=8).digest()


def _take_patients(samples: list[Sample], want: int) -> tuple[list[Sample], list[Sample]]:
    """(taken, rest): all images of so many patients, in hashed order, that `want` normals are."""
    by_patient = defaultdict(list)
    for s in samples:
        by_patient[s.patient].append(s)
    taken: set[str] = set()
    count = 0
    for patient in sorted(by_patient, key=_draw):
        if count >= want:
            break
        taken.add(patient)
        count += sum(s.label == NORMAL for s in by_patient[patient])
    return [s for s in samples if s.patient in taken], [
        s for s in samples if s.patient not in taken]


def split_samples(samples: list[Sample], train_limit: int | None = None) -> Splits:
    """Split by patient into train (normals), val and test; the same for every seed and model.

    A test split that the source prescribes is respected, and so is a validation split with at
    least 50 normals. Otherwise test takes 20 % of the normals and every patient who has no normal
    image, and validation 10 % of the remaining normals. Abnormal images of patients who are not
    in train go to validation, where settings may be chosen on them.
    train_limit: the most training images; validation normals then are at most a quarter as many,
    or 100.
    """
    notes = []
    test = [s for s in samples if s.split == "test"]
    rest = [s for s in samples if s.split != "test"]
    if not test:
        patients_with_normals = {s.patient for s in rest if s.label == NORMAL}
        sick = [s for s in rest if s.patient not in patients_with_normals]
        mixed = [s for s in rest if s.patient in patients_with_normals]
        n_normal = sum(s.label == NORMAL for s in mixed)
        taken, rest = _take_patients(mixed, round(0.2 * n_normal))
        test = sick + taken
    in_test = {s.patient for s in test}
    overlap = [s for s in rest if s.patient in in_test]
    if overlap:
        rest = [s for s in rest if s.patient not in in_test]
        notes.append(f"{len(overlap)} images left out of training and validation: their patients "
                     "are in test")

    val = [s for s in rest if s.split == "val"]
    rest = [s for s in rest if s.split != "val"]
    if sum(s.label == NORMAL for s in val) < MIN_NORMALS:
        if val:
            notes.append(f"prescribed validation split of {len(val)} images is too small: unused; "
                         "validation is taken from the training patients")
        normals = [s for s in rest if s.label == NORMAL]
        want = max(round(0.1 * len(normals)), min(20, len(normals) // 4))
        val = _take_patients(normals, want)[0]
    in_val = {s.patient for s in val}
    train = [s for s in rest if s.label == NORMAL and s.patient not in in_val]
    if train_limit is not None:
        if train_limit > len(train):
            notes.append(f"--samples {train_limit}: there are only {len(train)} to train on")
        chosen = set(sorted((s.key for s in train), key=_draw)[:train_limit])
        train = [s for s in train if s.key in chosen]
        normals = [s for s in val if s.label == NORMAL]
        kept = set(sorted((s.key for s in normals), key=_draw)[: max(100, train_limit // 4)])
        val = [s for s in val if s.label == ABNORMAL or s.key in kept]
    in_train = {s.patient for s in train}
    known = {s.key for s in val}
    val += [s for s in rest if s.label == ABNORMAL and s.patient not in in_train
            and s.key not in known]
    if all(s.patient == s.key for s in samples):
        notes.append("no patient is named: every image counts as a patient of its own")
    splits = Splits(train, sorted(val, key=lambda s: s.key), test, notes)
    _assert_disjoint(splits)
    return splits


def _assert_disjoint(splits: Splits) -> None:
    patients = [{s.patient for s in part} for part in splits[:3]]
    assert not patients[0] & patients[1] and not patients[0] & patients[2], "patients shared"
    assert not patients[1] & patients[2], "patients shared between validation and test"
    assert all(s.label == NORMAL for s in splits.train), "abnormal image in train"


_COLUMNS = ("key", "patient", "label", "finding", "view", "split")


def write_splits(splits: Splits, file: Path) -> None:
    """split.csv: one row an image, the split in the last column."""
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(_COLUMNS)
        for name in SPLITS:
            for s in getattr(splits, name):
                writer.writerow((s.key, s.patient, s.label, s.finding, s.view, name))


def read_splits(file: Path) -> Splits:
    """What write_splits wrote."""
    parts: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    try:
        with open(file, newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                parts[row["split"]].append(Sample(*(row[c] for c in _COLUMNS[:2]),
                                                  int(row["label"]), row["finding"], row["view"],
                                                  row["split"]))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a readable table of splits ({error})") from None
    return Splits(*parts.values(), notes=[])


def duplicates_across(source: FolderSource, splits: Splits) -> list[tuple[str, str]]:
    """Pairs of files with identical bytes in two different splits (first key, second key).

    Only files of equal size are read.
    """
    by_size = defaultdict(list)
    for name in SPLITS:
        for s in getattr(splits, name):
            with contextlib.suppress(OSError):  # a dangling link: found unreadable later on
                by_size[(source.root / s.key).stat().st_size].append((name, s))
    pairs, seen = [], {}
    for group in by_size.values():
        if len({name for name, _ in group}) < 2:
            continue
        for name, s in group:
            try:
                digest = hashlib.blake2b(source.read(s), digest_size=16).digest()
            except OSError:
                continue
            other_name, other = seen.setdefault(digest, (name, s))
            if other_name != name:
                pairs.append((other.key, s.key))
    return pairs


def describe(source: Source, splits: Splits) -> str:
    """The table of the data that is printed before anything is done with it."""
    lines = [f"data      {source.title}",
             f"  {'split':<6}{'normal':>9}{'abnormal':>10}{'patients':>10}"]
    for name in SPLITS:
        part = getattr(splits, name)
        sick = sum(s.label for s in part)
        patients = len({s.patient for s in part})
        lines.append(f"  {name:<6}{len(part) - sick:>9,}{sick:>10,}{patients:>10,}")
    findings = Counter(s.finding or "unnamed" for s in splits.test if s.label)
    if findings:
        shown = [f"{k} {v:,}" for k, v in findings.most_common(6)]
        more = f" and {len(findings) - 6} more" if len(findings) > 6 else ""
        lines.append(f"  findings in test: {', '.join(shown)}{more}")
    everything = [s for name in SPLITS for s in getattr(splits, name)]
    sizes = sorted({size for s in everything[:: max(1, len(everything) // 20)]
                    if (size := image_size_of(source, s))})
    if sizes:
        low, high = sizes[0], sizes[-1]
        lines.append(f"  image sizes (of about 20 looked at): {low[0]}x{low[1]}"
                     + (f" to {high[0]}x{high[1]}" if low != high else ""))
    for reason, count in source.left_out.most_common():
        lines.append(f"  left out: {count:,} {reason}")
    lines += [f"  note: {note}" for note in splits.notes]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Decoding


class BadImage(Exception):
    """These bytes are no image that can be used; the message says why."""


def decode_image(data: bytes, size: int) -> np.ndarray:
    """An image file's bytes as grey values, uint8 [size,size].

    The whole image is stretched to the square, whatever its shape: nothing is cut off and no
    border is invented. Colour becomes luma (ITU-R 601), transparency is ignored, EXIF orientation
    is applied. 16-bit grey is scaled from 0-65535, or from 0-4095 if no value is larger. DICOM
    has rescale and window applied, is inverted if MONOCHROME1, and stretched to the full range.
    Raises BadImage.
    """
    if data[128:132] == b"DICM":
        image = _decode_dicom(data)
    else:
        try:
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels is more than any radiograph")
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise BadImage("floating-point grey values, whose range is not known")
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA")
            if image.mode in ("RGBA", "LA", "RGBX"):
                # Not pasted on a background: what a viewer shows of an X-ray is its colour.
                image = image.convert("RGB" if image.mode != "LA" else "L")
            if image.mode.startswith("I"):  # 16-bit grey; convert("L") would saturate it
                values = np.asarray(image).astype(np.float32)
                top = 4095 if values.max() <= 4095 else 65535
                image = Image.fromarray(values * np.float32(255 / top))
            elif image.mode != "L":
                image = image.convert("L")
        except BadImage:
            raise
        except Image.DecompressionBombError:
            raise BadImage("more pixels than any radiograph") from None
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:
            # What Pillow's decoders raise on damaged files.
            raise BadImage(str(error).split("<")[0].strip() or type(error).__name__) from None
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
    values = np.asarray(image)
    return values if values.dtype == np.uint8 else np.rint(values).clip(0, 255).astype(np.uint8)


def _decode_dicom(data: bytes) -> Image.Image:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise UserError("DICOM images need pydicom 3: pip install pydicom") from None
    try:
        dicom = pydicom.dcmread(io.BytesIO(data))
        if dicom.Rows * dicom.Columns > MAX_PIXELS:
            raise BadImage(f"{dicom.Columns}x{dicom.Rows} pixels is more than any radiograph")
        values = apply_voi_lut(apply_modality_lut(dicom.pixel_array, dicom), dicom)
        inverted = dicom.PhotometricInterpretation == "MONOCHROME1"
    except BadImage:
        raise
    except Exception as error:  # pydicom answers damage with nearly every kind of error
        raise BadImage(f"DICOM: {error}") from None
    values = values.astype(np.float32)
    if values.ndim != 2:
        raise BadImage(f"DICOM with {values.ndim} dimensions, not a single grey image")
    low, high = values.min(), values.max()
    values = (values - low) * (255 / max(high - low, 1e-6))
    return Image.fromarray(255 - values if inverted else values)


def image_size_of(source: Source, sample: Sample) -> tuple[int, int] | None:
    """(width, height) from the file's header; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(source.read(sample))) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


# ----------------------------------------------------------------------------------------------
# The stream


SHUFFLE_GROUP, SHUFFLE_WINDOW = 16, 4096


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch: a permutation of range(count), int64, a pure function of its arguments.

    Groups of 16 neighbours are shuffled, then single images within windows of 4,096: random
    enough for training, while neighbours in the source are still wanted at about the same time.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    groups = rng.permutation(math.ceil(count / SHUFFLE_GROUP))
    order = (groups[:, None] * SHUFFLE_GROUP + np.arange(SHUFFLE_GROUP)).ravel()
    order = order[order < count]
    for start in range(0, count, SHUFFLE_WINDOW):
        rng.shuffle(order[start : start + SHUFFLE_WINDOW])
    return order


class ImageStream(IterableDataset):
    """Batches (images uint8 [B,1,H,W], positions int64 [B]) of a list of samples, in order.

    Positions index `samples`. With a seed the order is `epoch_order(len, seed, epoch)` and an
    incomplete last batch is dropped; without one it is the order of `samples`, and complete.
    Decoded images are kept in memory while `memory_bytes` allow (the first ones of `samples`;
    the rest is read again each time). At most two batches are decoded ahead, by threads that end
    when the iteration does. Unreadable images are skipped, counted and named in `bad`; more than
    5 % of them (and more than one) end the run with a UserError if `stop_on_bad`.
    """

    def __init__(self, source: Source, samples: list[Sample], image_size: int, batch_size: int,
                 seed: int | None = None, memory_bytes: int = 4 << 30,
                 stop_on_bad: bool = True) -> None:
        self.source, self.samples, self.image_size = source, samples, image_size
        self.stop_on_bad = stop_on_bad
        self.batch_size = batch_size if seed is None else min(batch_size, len(samples))
        self.seed, self.epoch = seed, 0
        self.bad: dict[str, str] = {}  # key -> reason
        kept = min(len(samples), memory_bytes // image_size**2)
        self._cache = torch.empty((kept, 1, image_size, image_size), dtype=torch.uint8)
        self._cached = np.zeros(len(samples), dtype=bool)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        n = len(self.samples)
        return math.ceil(n / self.batch_size) if self.seed is None else n // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.samples)
        order = np.arange(n) if self.seed is None else epoch_order(n, self.seed, self.epoch)
        batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        pool = ThreadPoolExecutor(os.cpu_count() or 1, "decode")
        ahead: deque[tuple[np.ndarray, dict[int, Future]]] = deque()
        try:
            for batch in [*batches, None, None]:  # two more turns empty what is ahead
                if batch is not None:
                    missing = {int(i): pool.submit(self._load, int(i))
                               for i in batch if not self._cached[i]}
                    ahead.append((batch, missing))
                if len(ahead) > 2 or (batch is None and ahead):
                    result = self._assemble(*ahead.popleft())
                    if len(result[1]):
                        yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _assemble(self, batch: np.ndarray, missing: dict[int, Future]) -> tuple[Tensor, Tensor]:
        if not missing:
            positions = torch.from_numpy(batch.astype(np.int64))
            return self._cache[positions], positions
        images, positions = [], []
        for i in batch.tolist():
            if i in missing:
                try:
                    image = torch.from_numpy(missing[i].result().copy())[None]
                except (BadImage, OSError) as error:
                    self._note_bad(self.samples[i].key, str(error))
                    continue
                if i < len(self._cache):
                    self._cache[i] = image
                    self._cached[i] = True
            else:
                image = self._cache[i]
            images.append(image)
            positions.append(i)
        empty = torch.empty((0, 1, self.image_size, self.image_size), dtype=torch.uint8)
        return torch.stack(images) if images else empty, torch.tensor(positions, dtype=torch.int64)

    def _load(self, position: int) -> np.ndarray:
        sample = self.samples[position]
        if sample.key in self.bad:  # found unreadable in an earlier epoch
            raise BadImage(self.bad[sample.key])
        return decode_image(self.source.read(sample), self.image_size)

    def _note_bad(self, key: str, reason: str) -> None:
        self.bad[key] = reason
        if self.stop_on_bad and len(self.bad) > max(1, MAX_BAD_SHARE * len(self.samples)):
            raise UserError(
                f"--data {self.source.spec}: {len(self.bad)} of {len(self.samples)} images cannot "
                f"be read, more than {MAX_BAD_SHARE:.0%}; the last is {key}: {reason}"
            )


class Loaders(NamedTuple):
    """DataLoaders over (uint8 images [B,1,H,W], positions [B]), and what they read."""

    train: DataLoader
    val: DataLoader  # normals only: what early stopping and thresholds look at
    test: DataLoader
    source: Source
    splits: Splits


def create_dataloaders(config: Config) -> Loaders:
    """The three loaders for a configuration. `loader.dataset.samples[position]` tells the label.

    train is shuffled anew for each `loader.dataset.set_epoch(n)`.
    """
    source = open_source(config)
    splits = split_for_training(source, config)
    budget = int(config.memory_limit_gb * 2**30)
    loaders = []
    for name, samples in (("train", splits.train), ("val", splits.normals("val")),
                          ("test", splits.test)):
        stream = ImageStream(source, samples, config.image_size, config.batch_size,
                             config.seed if name == "train" else None, budget)
        budget -= stream._cache.numel()
        loaders.append(DataLoader(stream, batch_size=None))
    return Loaders(*loaders, source, splits)


def split_for_training(source: Source, config: Config) -> Splits:
    """split_samples for the configuration; UserError if there are too few normals to learn from."""
    normals = sum(s.label == NORMAL for s in source.samples)
    if normals < MIN_NORMALS:
        raise UserError(
            f"--data {source.spec}: {normals} normal images are too few to learn what is normal "
            f"(at least {MIN_NORMALS}). Train on a larger set, then score this one with: "
            f"python evaluate.py RUN_FOLDER --data {source.spec}"
        )
    splits = split_samples(source.samples, config.samples)
    for name, part in (("training", splits.train), ("validation", splits.normals("val"))):
        if len(part) < 2:
            raise UserError(f"--data {source.spec}: its {normals} normal images leave {len(part)} "
                            f"for {name}, because whole patients are kept together and a "
                            "prescribed test split is kept as it is")
    if isinstance(source, FolderSource) and (pairs := duplicates_across(source, splits)):
        splits.notes.append(f"{len(pairs)} pairs of identical files lie in different splits, e.g. "
                            f"{pairs[0][0]} and {pairs[0][1]}")
    return splits


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B,1,H,W] to float32 in [0,1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, moved, scaled, perhaps mirrored, made brighter and of other contrast.

    float [B,1,H,W] in [0,1] to the same. Rotation up to 5 degrees, shift 5 %, scale 5 %,
    brightness 0.05, contrast 10 %; what comes in from outside repeats the edge.
    generator: on the CPU, so that every device sees the same.
    """
    B = len(images)

    def uniform(spread: float) -> Tensor:
        return (torch.rand(B, generator=generator) * 2 - 1) * spread

    angle, zoom = uniform(math.radians(5)), 1 + uniform(0.05)
    mirror = torch.where(torch.rand(B, generator=generator) < 0.5, -1.0, 1.0)
    dx, dy = uniform(0.1), uniform(0.1)  # grid coordinates span 2, so this is 5 % of the side
    theta = torch.stack([
        torch.stack([angle.cos() * zoom * mirror, -angle.sin() * zoom, dx], dim=1),
        torch.stack([angle.sin() * zoom * mirror, angle.cos() * zoom, dy], dim=1),
    ], dim=1).to(images.device)  # [B,2,3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # border padding, which MPS does not have
    images = F.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)
    contrast = (1 + uniform(0.1)).view(B, 1, 1, 1).to(images.device)
    brightness = uniform(0.05).view(B, 1, 1, 1).to(images.device)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean + brightness).clamp_(0, 1)
