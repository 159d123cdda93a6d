"""Where images come from, how they are split, and how they reach the training loop.

One road for every source: Source.fetch(samples) -> bytes -> decode_image -> uint8 [H,W]
-> ImageStream -> batches uint8 [B,1,H,W]. Nothing on it knows where the bytes came from.

    from data import create_dataloaders
    loaders = create_dataloaders(Config(data="my_xrays"))    # loaders.train, .val, .test
"""

import contextlib
import csv
import ctypes
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import queue
import random
import re
import struct
import sys
import threading
import zipfile
import zlib
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import requests
import torch
import urllib3
from PIL import Image, ImageOps, UnidentifiedImageError
from requests.adapters import HTTPAdapter
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from config import Config, UserError, command, log

NORMAL, ABNORMAL = 0, 1
SPLITS = ("train", "val", "test")
MIN_NORMALS = 50  # fewer cannot teach a model what is normal
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".tif", ".tiff", ".dcm")
# What Pillow may open. Others run programs, or hold images of other sizes than they say.
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "GIF", "WEBP")
# A larger image is a mistake or an attack, never a radiograph. Pillow warns of the same ones.
MAX_PIXELS = 89_478_485
SHUFFLE_GROUP, SHUFFLE_WINDOW = 16, 512  # images; see epoch_order
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


# Left, top, right and bottom of a rectangle, as shares of the image's sides.
Box = tuple[float, float, float, float]


class Source:
    """A set of labelled images. Subclasses fill the fields and say how to read a file."""

    spec: str  # what --data said
    name: str  # short name, used for folders of results
    title: str  # one line: what this is
    samples: list[Sample]
    left_out: Counter  # reason -> number of images or rows that were left out
    masks: dict[str, str]  # image key -> name of its mask's file
    boxes: dict[str, list[Box]]  # image key -> boxes drawn round its lesions
    threads = os.cpu_count() or 1  # that read and decode at the same time
    version = ""  # tells a set from a later one of the same name, where the source knows

    def read_file(self, name: str) -> bytes:
        """Read a file. OSError, BadImage or TooLarge if it cannot be had."""
        raise NotImplementedError

    def read(self, sample: Sample) -> bytes:
        """Read an image's file. OSError or BadImage if it cannot be had."""
        return self.read_file(sample.key)

    def read_text(self, name: str) -> str:
        """Read a CSV or a list. UserError if it cannot be had."""
        try:
            return self.read_file(name).decode("utf-8-sig", errors="replace")
        except (OSError, BadImage) as error:
            why = error.args[-1]
            raise UserError(f"--data {self.spec}: {name} cannot be read ({why})") from None

    def mask(self, sample: Sample, size: int) -> np.ndarray | None:
        """Where the lesion is, bool [size,size]; None if the source does not know."""
        inside = np.zeros((size, size), dtype=bool)
        for box in self.boxes.get(sample.key, ()):
            left, top, right, bottom = (round(side * size) for side in box)
            inside[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        if not (name := self.masks.get(sample.key)):
            return inside if sample.key in self.boxes else None
        try:
            with Image.open(io.BytesIO(self.read_file(name)), formats=FORMATS) as image:
                _check_pixels(image.width, image.height)
                mask = image.convert("L").point(lambda grey: 255 * (grey > 0))
        except (*DAMAGE, *TOO_MANY_PIXELS, BadImage) as error:
            raise UserError(f"--data {self.spec}: {name} is no readable mask ({error})") from None
        # Any lesion pixel counts, so that a small lesion does not vanish.
        return np.asarray(mask.resize((size, size), Image.Resampling.BOX)) > 0

    def file_bytes(self, sample: Sample) -> int:
        """Size of the file; 0 if that is not known before it is read."""
        return 0

    def glance(self, sample: Sample) -> bytes:
        """A few bytes that are equal for equal files of one size. OSError."""
        return b""

    def digest(self, sample: Sample) -> int:
        """The file's CRC-32. OSError if it cannot be had."""
        raise OSError

    def blocks(self, samples: list[Sample]) -> np.ndarray:
        """Number of each sample's block, int64 [n]: one request fetches a block's samples."""
        return np.arange(len(samples))

    def cost(self, samples: list[Sample]) -> int:
        """Bytes that `fetch` of these holds at most."""
        return sum(self.file_bytes(s) for s in samples)

    def fetch(self, samples: list[Sample],
              cancelled: threading.Event) -> Iterator[tuple[Sample, bytes | Exception]]:
        """Yield each sample, in any order, with its bytes or what is wrong with it. Cancelled."""
        for sample in samples:
            if cancelled.is_set():
                raise Cancelled
            try:
                yield sample, self.read(sample)
            except (OSError, BadImage) as error:
                yield sample, error

    def fingerprint(self) -> str:
        """A digest of names, patients, labels and prescribed splits, one of the files' sizes, and
        where they can be had one of a few files' content, wherever the data lies. See same_data."""
        names, sizes, some = (hashlib.blake2b(digest_size=n) for n in (8, 4, 4))
        for s in self.samples:
            names.update(f"{s.key}\t{s.patient}\t{s.label}\t{s.split}\n".encode())
            sizes.update(b"%d " % self.file_bytes(s))
        known = f"{names.hexdigest()}-{sizes.hexdigest()}"
        with contextlib.suppress(OSError):
            for s in self.samples[:: len(self.samples) // 16 + 1]:
                some.update(b"%d " % self.digest(s))
            known += f"-{some.hexdigest()}"
        return known


def same_data(one: str, other: str) -> bool:
    """Whether two fingerprints agree in all that both of them know."""
    return all(x == y for x, y in zip(one.split("-"), other.split("-"), strict=False))


def open_source(config: Config) -> Source:
    """The source that `config.data` names. UserError if there is none, or nothing usable in it."""
    if config.data == "synthetic":
        return PhantomSource(config.samples or PHANTOM_SAMPLES, config.image_size)
    if config.data.startswith("kaggle:"):
        return open_kaggle(config.data)
    return FolderSource(config.data)


# ----------------------------------------------------------------------------------------------
# The phantom

PHANTOM_SAMPLES = 400  # normal training images unless --samples says otherwise
PHANTOM_KINDS = ("opacity", "nodule", "effusion", "missing", "doubled")
# How much of each range of normal anatomy is used. Together with the noise below this sets the
# difficulty: learnt from a few hundred images within minutes, yet no trivial score tells lesions.
VARIETY = 0.35
MASK_LEVEL = 0.04  # smallest noise-free change, as a share of the grey range, that counts as lesion


class PhantomSource(Source):
    """Drawn chest images with known lesions, of `image_size` x `image_size` pixels.

    Training images are numbered from 0, validation from 100,000, test from 200,000.
    """

    def __init__(self, train_normals: int, image_size: int) -> None:
        self.spec = self.name = "synthetic"
        self.title = "built-in phantom (drawn chest images, not real X-rays)"
        self.left_out, self.image_size = Counter(), image_size
        self.masks, self.boxes = {}, {}
        if image_size <= 128:  # threads that draw with small arrays wait for one another
            self.threads = 1
        both = [""] * 100 + list(PHANTOM_KINDS) * 20
        self.samples = [
            Sample(f"{i:06d}-{kind or 'normal'}", f"{i:06d}", ABNORMAL if kind else NORMAL, kind,
                   "PA", split)
            for split, first, kinds in (("train", 0, [""] * train_normals),
                                        ("val", 100_000, both), ("test", 200_000, both))
            for i, kind in enumerate(kinds, first)]

    def read(self, sample: Sample) -> bytes:
        size = self.image_size
        image, _ = draw_phantom(int(sample.patient), size, kind=sample.finding or None)
        return b"P5 %d %d 255\n" % (size, size) + image.tobytes()  # a PGM file

    def file_bytes(self, sample: Sample) -> int:
        return 256 * self.image_size**2  # what drawing one holds: some 32 layers of float64

    def mask(self, sample: Sample, size: int) -> np.ndarray | None:
        return draw_phantom(int(sample.patient), size, kind=sample.finding or None)[1]


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """Smooth step from 0 to 1 around distance 0 (`width` wide): a blurred edge without a blur."""
    t = np.clip(distance * (1.0 / width) + 0.5, 0.0, 1.0)
    bent = 3.0 - 2.0 * t
    bent *= t  # in place, which is faster
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
    def draw(low: float, high: float, count: int | None = None) -> Any:
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
    if kind == "missing":
        if choice < 0.4:
            return -draw(0.7, 0.9) * p.depth * p.heart * p.lung * (p.u > 0)
        if choice < 0.55:
            return -p.collar_level * _clavicles(p.collar, a) * mine
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


def draw_phantom(index: int, size: int = 128, seed: int = 0,
                 kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Film number `index` (one patient each) and the mask of its anomaly.

    Returns uint8 [size, size] in 0..255 and bool [size, size], all False when `kind` is None.
    The film drawn with kind=None is the lesion-free twin: same anatomy, exposure and noise.
    """
    if kind not in (None, *PHANTOM_KINDS):
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

NORMAL_NAMES = {"normal", "normals", "good", "healthy", "no finding", "no_finding", "negative",
                "no", "false", "0"}
ABNORMAL_NAMES = {"abnormal", "anomaly", "anomalous", "bad", "defect", "positive", "yes", "true",
                  "1"}
# What says neither: not to be taken for a finding.
UNKNOWN_NAMES = {"unknown", "unlabeled", "unlabelled", "uncertain", "todo", "none", "null", "nan",
                 "na", "n/a", "?"}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
               "validation": "val", "test": "test", "testing": "test"}


class FolderSource(Source):
    """Images in a folder, in a layout that `recognise_layout` knows, or those that a CSV lists."""

    def __init__(self, spec: str) -> None:
        path = Path(os.path.expanduser(spec))
        name = path.resolve().name if path.is_dir() else path.stem
        self.spec, self.name = spec, re.sub(r"[^\w.-]+", "_", name) or "folder"
        self.left_out = Counter()
        if not path.exists():
            page = re.search(r"kaggle\.com/(?:datasets/)?([\w.-]+/[\w.-]+)", spec)
            raise UserError(f"--data {spec}: there is nothing at {path.resolve()}; give a folder, "
                            f"a CSV, kaggle:{page[1] if page else 'owner/name'}, or synthetic")
        self.root = path if path.is_dir() else path.parent
        if path.is_dir():
            layout = recognise_layout(self._list_files(), self.read_text, spec, self.left_out)
        elif path.suffix.lower() == ".csv" and path.is_file():
            layout = read_csv_of_paths(path.name, self.read_text, spec,
                                       lambda name: (self.root / name).is_file())
        else:
            raise UserError(f"--data {spec}: neither a folder nor a CSV file; unpack an archive "
                            "first, and give a single image to evaluate.py with --image")
        self.samples, self.masks, self.boxes = layout.samples, layout.masks, layout.boxes
        self.title = f"{layout.title} in {self.root.resolve()}"

    def _list_files(self) -> list[str]:
        """List all files below the folder, sorted, but hidden ones and those of runs."""
        def refuse(e: OSError) -> None:
            raise UserError(f"--data {self.spec}: {e.filename} cannot be read ({e.strerror})")

        if all((self.root / name).is_file() for name in ("train.py", "evaluate.py", "config.py")):
            raise UserError(f"--data {self.spec}: this is the program's own folder; put the images "
                            "into one of their own, and name that")
        names: list[str] = []
        known: set[str] = set()  # a link may lead to a folder that was there already
        for folder, folders, files in os.walk(self.root, onerror=refuse, followlinks=True):
            real, inside = os.path.realpath(folder), Path(folder).relative_to(self.root)
            is_run = inside.parts and ({"last.pt", "split.csv"} <= {*files}
                                       or "comparison.html" in files)
            if real in known or is_run:  # runs of this program have pictures, too
                folders[:] = []
                continue
            known.add(real)
            folders[:] = sorted(d for d in folders if not d.startswith("."))
            # No pipes and devices, which never end. A link to nothing is found unreadable later.
            names += [(inside / f).as_posix() for f in files if not f.startswith(".") and (
                os.path.isfile(p := os.path.join(folder, f)) or not os.path.exists(p))]
        fit = sorted(filter(is_text, names))
        if len(fit) < len(names):
            self.left_out["with a name that is not UTF-8"] = len(names) - len(fit)
        return fit

    def read_file(self, name: str) -> bytes:
        with open(os.path.join(self.root, name), "rb") as f:  # joined faster than by pathlib
            return f.read()

    def file_bytes(self, sample: Sample) -> int:
        try:
            return os.stat(os.path.join(self.root, sample.key)).st_size
        except OSError:  # a dangling link: found unreadable later on
            return 0

    def glance(self, sample: Sample) -> bytes:
        with open(self.root / sample.key, "rb") as f:  # the middle: borders are often black
            f.seek(self.file_bytes(sample) // 2)
            return f.read(1024)

    def digest(self, sample: Sample) -> int:
        crc = 0
        with open(self.root / sample.key, "rb") as f:  # a piece at a time: it may be large
            while piece := f.read(CHUNK):
                crc = zlib.crc32(piece, crc)
        return crc


def is_text(name: str) -> bool:
    """Whether a file's name can be written to a table: in old archives some cannot."""
    return name.encode(errors="ignore").decode() == name


@dataclass(frozen=True)
class Layout:
    """What is found in a place: all but how to read it."""

    title: str
    samples: list[Sample]
    masks: dict[str, str] = field(default_factory=dict)  # image key -> mask file
    boxes: dict[str, list[Box]] = field(default_factory=dict)


def recognise_layout(names: list[str], read_text: Callable[[str], str], where: str,
                     left_out: Counter) -> Layout:
    """Samples from a sorted list of file names (posix, relative) and the CSV files among them.

    Looks for NIH ChestX-ray14, covid-chestxray, a CSV of paths, then folders of classes. UserError
    if it is none of them. where: this place's name in messages. left_out: counts what is not used.
    """
    # Hidden files are no data, such as a Mac's shadows of files.
    names = [n for n in names if not any(p.startswith(".") for p in PurePosixPath(n).parts)]
    known = set(names)
    # The Kermany archive holds itself a second time.
    copies = {n for n in names if "/chest_xray/" in f"/{n}"
              and f"/{n}".replace("/chest_xray/", "/", 1)[1:] in known}
    if copies:
        left_out["copies inside the archive"] += len(copies)
        names = sorted(known - copies)
    images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
    tables = {PurePosixPath(n).name: n for n in names if n.lower().endswith((".csv", ".txt"))}
    if not images:
        raise UserError(f"--data {where}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")

    if entry := next((n for b, n in tables.items() if b.startswith("Data_Entry_2017")), None):
        return read_nih(images, entry, tables, read_text, where, left_out)
    if "metadata.csv" in tables:
        text = read_text(tables["metadata.csv"])
        if not _missing(text, ("finding",), ("filename",), ("view",)) and _missing(
                text, _LABEL):  # with a label it is the user's own
            return read_covid(images, text, left_out)

    listing = []
    for table in (n for n in tables.values() if "/" not in n and n.lower().endswith(".csv")):
        try:
            if not _missing(read_text(table), _PATH, _LABEL):
                listing.append(table)
        except TooLarge:
            left_out["tables, too large to be looked into"] += 1
    if len(listing) == 1:
        return read_csv_of_paths(listing[0], read_text, where, known.__contains__)
    if listing:
        raise UserError(f"--data {where}: {', '.join(listing)} all list images; name the one that "
                        f"is meant (--data {os.path.join(where, listing[0])}), or join them, with "
                        "a column split")
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
    samples, stems = [], {n.rpartition(".")[0] for n in images}
    for name, parent in parents.items():
        mask_of = re.fullmatch(r"(.+)_mask(_\d+)?\.\w+", name)
        label, finding = ABNORMAL, parent.name.lower()
        if mask_of and mask_of[1] in stems:
            left_out["masks beside their images"] += 1
            continue
        if parent in normal_dirs:
            label, finding = NORMAL, ""
        elif finding in UNKNOWN_NAMES:
            left_out[f"in a folder called {parent.name}"] += 1
            continue
        elif finding not in ABNORMAL_NAMES and (
                finding in ("mask", "masks", "ground_truth")
                or parent.parent not in beside_normal or parent in beside_normal):
            left_out["in a folder that is neither normal nor beside a normal one"] += 1
            continue
        split = next((SPLIT_NAMES[p.lower()] for p in parent.parts if p.lower() in SPLIT_NAMES), "")
        # As Kermany's files are called; there the numbers begin anew for each finding.
        patient = re.match(r"(person\d+_(bacteria|virus))_|((?:NORMAL2-)?IM-\d+)-",
                           PurePosixPath(name).name)
        samples.append(Sample(name, patient[1] or patient[3] if patient else name, label,
                              (patient and patient[2]) or finding, "", split))
    if not any(s.label == NORMAL for s in samples):
        found = ", ".join(sorted({p.as_posix() for p in parents.values()} - {"."})[:6])
        raise UserError(
            f"--data {where}: none of its {len(images)} images is known to be normal. Give a place "
            "with a folder normal (or NORMAL, good, healthy) and others beside it, or a CSV; "
            + (f"folders found: {found}" if found else "it has no folders"))
    return Layout("folders of normal and abnormal images", samples)


_PATH = ("path", "file", "filename", "image", "image_path", "filepath")
_LABEL = ("label", "class", "target")
_PATIENT = ("patient", "patient_id", "patientid", "subject_id")


def _rows(text: str) -> Iterator[dict[str, str]]:
    """A CSV's rows with lower-case column names and stripped values."""
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield {(k or "").strip().lower(): (v or "").strip() for k, v in row.items()
                   if not isinstance(v, list)}
    except csv.Error as error:
        raise UserError(f"--data: a table beginning {text[:60]!r} is no CSV ({error})") from None


def _missing(text: str, *wanted: tuple[str, ...]) -> str:
    """Say which of the groups of column names has no name in the CSV's header; "" if none."""
    header = text.split("\n", 1)[0].strip()
    try:
        columns = [c.strip().lower() for c in next(csv.reader([header]), [])]
    except csv.Error:
        columns = []
    for first, *others in wanted:
        if not {first, *others} & {*columns}:
            also = f" (or {', '.join(others)})" if others else ""
            return f"no column {first}{also}; its columns, parted by commas, are: {header[:200]}"
    return ""


def read_csv_of_paths(file: str, read_text: Callable[[str], str], where: str,
                      exists: Callable[[str], bool]) -> Layout:
    """A user's own table: path and label, and where there are any, patient, split, finding, view
    and mask. Paths are relative to the table."""
    text = read_text(file)
    if missing := _missing(text, _PATH, _LABEL):
        raise UserError(f"--data {where}: {file} has {missing}")
    samples: dict[str, Sample] = {}
    masks = {}
    for number, row in enumerate(_rows(text), start=2):
        path = next(row[c] for c in _PATH if c in row)
        label = next(row[c] for c in _LABEL if c in row)
        split, word = row.get("split", "").lower(), label.lower()
        key, mask = (os.path.normpath(p).replace(os.sep, "/") for p in (path, row.get("mask", "")))
        normal = word in NORMAL_NAMES
        wrong = {
            "path or label is empty": not path or not label,
            f"{path} is listed twice": key in samples,
            f"split {split!r} is not one of train, val, test": split and split not in SPLIT_NAMES,
            f"label {label} says neither normal nor abnormal; give 0, 1 or a finding, or take the "
            "row out": word in UNKNOWN_NAMES,
            f"label {label} is neither 0 (normal) nor 1 (abnormal)":
                not normal and label != "1" and re.fullmatch(r"[\d.+-]+", label)}
        if what := next((what for what, is_so in wrong.items() if is_so), ""):
            raise UserError(f"--data {where}: {file} row {number}: {what}")
        finding = row.get("finding") or ("" if word in ABNORMAL_NAMES else label)
        samples[key] = Sample(
            key, next((row[c] for c in _PATIENT if row.get(c)), key),
            NORMAL if normal else ABNORMAL, "" if normal else finding,
            row.get("view", ""), SPLIT_NAMES.get(split, ""))
        if row.get("mask"):
            masks[key] = mask
    listed = [*samples, *masks.values()]
    if absent := [name for name in listed if not exists(name)]:
        raise UserError(f"--data {where}: {len(absent)} of the {len(listed)} files that {file} "
                        f"lists are not there, the first is {absent[0]}; paths are relative to it")
    return Layout(f"images listed in {file}", [*samples.values()], masks)


def read_nih(images: list[str], entry: str, tables: dict[str, str],
             read_text: Callable[[str], str], where: str, left_out: Counter) -> Layout:
    """NIH ChestX-ray14: normal is exactly `No Finding`; the official lists give the test split."""
    text = read_text(entry)
    if missing := _missing(text, ("image index",), ("finding labels",), ("patient id",)):
        raise UserError(f"--data {where}: {entry} has {missing}")
    split_of: dict[str, str] = {}
    for list_name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if list_name in tables:
            split_of |= dict.fromkeys(read_text(tables[list_name]).split(), split)
    samples = _listed(images, (
        (row["image index"], row["patient id"], row["finding labels"], row.get("view position", ""),
         split_of.get(row["image index"], "")) for row in _rows(text)), left_out)
    boxes: dict[str, list[Box]] = {}
    if "BBox_List_2017.csv" in tables:
        by_name = {PurePosixPath(n).name: n for n in images}
        # Image, finding, x, y, width, height, in pixels of the 1024 x 1024 images; the header has
        # brackets and commas of its own, so columns are taken by place.
        rows = csv.reader(io.StringIO(read_text(tables["BBox_List_2017.csv"])))
        for name, _, *numbers in (row for row in rows if len(row) >= 6):
            if name in by_name:
                with contextlib.suppress(ValueError):  # the header
                    x, y, width, height = (float(n) / 1024 for n in numbers[:4])
                    boxes.setdefault(by_name[name], []).append((x, y, x + width, y + height))
    return Layout("NIH ChestX-ray14", samples, boxes=boxes)


def read_covid(images: list[str], text: str, left_out: Counter) -> Layout:
    """covid-chestxray-dataset: frontal X-rays with a stated finding; normal is `No Finding`."""
    rows = []
    for row in _rows(text):
        tokens = {t.strip() for t in re.split(r"[/,]", row["finding"])} - {""}
        if row.get("modality", "X-ray") != "X-ray":
            left_out["not an X-ray"] += 1
        elif row["view"] not in ("PA", "AP", "AP Supine"):
            left_out["not a frontal view"] += 1
        elif not tokens or tokens & {"todo", "Unknown"}:
            left_out["no finding stated (todo, unknown, empty)"] += 1
        else:
            finding = "No Finding" if tokens == {"No Finding"} else row["finding"]
            rows.append((row["filename"], row.get("patientid", ""), finding, row["view"], ""))
    return Layout("covid-chestxray-dataset", _listed(images, rows, left_out))


def _listed(images: list[str], rows: Iterable[tuple[str, str, str, str, str]],
            left_out: Counter) -> list[Sample]:
    """Samples of the images that rows of (file, patient, finding, view, split) name."""
    by_name = {PurePosixPath(n).name: n for n in images}
    samples: dict[str, Sample] = {}
    for file, patient, finding, view, split in rows:
        key = by_name.get(file)
        if key is None:
            left_out["listed in the table but not there"] += 1
        elif key in samples:
            left_out["listed twice"] += 1
        else:
            normal = finding == "No Finding"
            samples[key] = Sample(key, patient or key, NORMAL if normal else ABNORMAL,
                                  "" if normal else finding, view, split)
    return sorted(samples.values(), key=lambda s: s.key)


# ----------------------------------------------------------------------------------------------
# Kaggle: credentials, and the archive of a data set, read piece by piece over HTTP


KAGGLE_HELP = """. On kaggle.com: Settings, API, Create New Token. Then
    export KAGGLE_API_TOKEN=your_token                          (the newer kind, one text)
    export KAGGLE_USERNAME=your_name KAGGLE_KEY=your_key        (or the older kind, both)
with no typographic quotes, or put {"username": "your_name", "key": "your_key"} in
~/.kaggle/kaggle.json (chmod 600); in Colab add the same names under Secrets.
Images of your own need no account: --data FOLDER"""


def kaggle_credentials() -> dict[str, str]:
    """Return what kagglesdk's client takes: "api_token", or "username" and "password".

    Looks in the environment, in Colab's secrets, and in the files of the `kaggle` command.
    UserError says what to do.
    """
    try:
        from kagglesdk import get_access_token_from_env
    except ImportError:
        raise UserError("--data kaggle: needs Python 3.11, and: pip install -U kaggle") from None
    environ = os.environ
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        value = environ.pop(name, "").strip()  # the client would send even a blank token
        if not value and "google.colab" in sys.modules:
            with contextlib.suppress(Exception):  # not there, or not granted to this notebook
                from google.colab import userdata

                value = userdata.get(name).strip()
        if value:
            environ[name] = value
    folders = (environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle",
               f"{environ.get('XDG_CONFIG_HOME') or '~/.config'}/kaggle")
    files = [Path(folder, "kaggle.json").expanduser() for folder in folders if folder]
    file, found = next(filter(Path.exists, files), None), {"": ""}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a file that is unreadable
        token = get_access_token_from_env()[0]
        there = json.loads(file.read_text(encoding="utf-8")) if file and not token else {}
        found = {"api_token": token} if token else {
            "username": str(environ.get("KAGGLE_USERNAME") or there.get("username", "")),
            "password": str(environ.get("KAGGLE_KEY") or there.get("key", ""))}
    if not all(re.fullmatch("[!-~]+", value) for value in found.values()):  # plain characters
        raise UserError("no Kaggle credentials found"
                        + (f", nor usable ones in {file}" if file else "") + KAGGLE_HELP)
    if file and os.name == "posix" and file.stat().st_mode & 0o077:
        log.warning(f"careful   others may read {file}; forbid it: chmod 600 {file}")
    return found


TIMEOUT = (10, 30)  # seconds: to connect; without a byte
TRIES, FIRST_TRIES = 12, 4  # in a row, before giving up; fewer while nothing has worked yet
LONGEST_WAIT = 600  # seconds; a server that asks for more is not waited for
REFUSALS = {401: "it refuses the credentials; create a new token under Settings, API",
            403: "not for this account; it may be private, or have terms to be accepted",
            404: "there is no such data set"}
# Neighbours in the archive are fetched together: at most BLOCK bytes, over gaps of at most GAP
# (a request costs about as much as so many bytes).
BLOCK, GAP, CHUNK = 8 << 20, 64 << 10, 1 << 17
LARGEST_FILE = 256 << 20  # bytes of a file that is read whole
NEVER = threading.Event()  # for what belongs to no iteration, and so is not cancelled
NO_CONNECTION = (OSError, urllib3.exceptions.HTTPError)  # those of requests are OSErrors


class TooLarge(UserError):
    """A table or mask has more than LARGEST_FILE bytes."""


class RangeRefused(Exception):
    """The server does not give parts of the archive."""


def pause(seconds: float, cancelled: threading.Event) -> None:
    """Wait, until the event is set at the latest."""
    cancelled.wait(seconds)


class RemoteArchive(io.RawIOBase):
    """The archive of a Kaggle data set as a seekable file, and calls of Kaggle's API for the set.

    What fails is tried again. `read_range`, `call` and `retry` are safe among threads, which share
    the connections. Errors show neither credentials nor addresses, which are signed.
    """

    def __init__(self, spec: str, owner: str, name: str, version: str | None) -> None:
        credentials = kaggle_credentials()
        from kagglesdk import KaggleClient

        self.spec, self.owner, self.name, self.version = spec, owner, name, version
        client = KaggleClient(**credentials).__enter__()
        session = client.http_client()._session
        session.send = partial(session.send, timeout=TIMEOUT)  # the client has none
        self.api, self.storage = client.datasets.dataset_api_client, requests.Session()
        self.storage.mount("https://", HTTPAdapter(pool_maxsize=32))  # threads of a few streams
        self.tries, self.lock = FIRST_TRIES, threading.Lock()
        self.address, self.size, self.etag, self.position = "", 0, "", 0
        self.traffic: Counter = Counter()  # API calls, requests, bytes
        self.tried_again: Counter = Counter()  # reason -> times

    def call(self, method: str, **fields: object) -> Any:
        """Call a method of the official client. Errors are for `retry`."""
        from kagglesdk.datasets.types import dataset_api_service

        request = getattr(dataset_api_service, f"Api{method.title().replace('_', '')}Request")
        fields |= {"ownerSlug": self.owner, "datasetSlug": self.name,
                   "datasetVersionNumber": self.version and int(self.version)}
        self.traffic["API calls"] += 1
        try:
            return getattr(self.api, method)(request.from_dict(fields))
        except (TypeError, ValueError, LookupError, AttributeError):
            raise ConnectionError("an answer that Kaggle's client does not understand") from None

    def retry(self, cancelled: threading.Event, attempt: Callable, *args: Any, **named: Any) -> Any:
        """Return attempt(...), called again after growing, random waits while its error may pass.

        Unlike urllib3's Retry this can be cancelled, and sees bodies that are cut short.
        """
        for failures in itertools.count(1):
            if cancelled.is_set():
                raise Cancelled
            wait = random.uniform(0, min(60, 2 ** (failures - 2)))
            try:
                result = attempt(*args, **named)
                self.tries = TRIES
                return result
            except requests.HTTPError as error:
                answer = error.response  # also where the client found an error told in the body
                status = answer.status_code if answer.status_code >= 400 else answer.json()["code"]
                reason = f"Kaggle answers {status}"
                if status < 500 and status != 429:
                    raise UserError(
                        f"--data {self.spec}: {reason}: {REFUSALS.get(status, 'it refuses')}. See "
                        f"https://www.kaggle.com/datasets/{self.owner}/{self.name}") from None
                with contextlib.suppress(Exception):  # a header that names no time
                    wait = urllib3.Retry().get_retry_after(answer.raw) or wait
            except ConnectionError as error:  # what is wrong with an answer
                reason = str(error)
            except NO_CONNECTION as error:
                reason = f"no connection to Kaggle ({type(error).__name__})"
            self.tried_again[reason] += 1
            if failures >= self.tries or wait > LONGEST_WAIT:
                raise UserError(
                    f"--data {self.spec}: {reason}; tries: {failures}. Check the network, wait "
                    f"{math.ceil(wait / 60)} min, then go on with --resume; or download the data "
                    "set and give its folder")
            if wait >= 5:
                log.warning(f"kaggle    {reason}: trying again in {wait:.0f} s")
            pause(wait, cancelled)

    def read_range(self, start: int, end: int, cancelled: threading.Event = NEVER) -> memoryview:
        """Return bytes start..end-1. What came before a connection broke is not asked for again."""
        data, done = memoryview(bytearray(end - start)), 0
        while done < len(data):
            done += self.retry(cancelled, self._receive, start + done, data[done:], cancelled)
        return data

    def _receive(self, start: int, into: memoryview, cancelled: threading.Event) -> int:
        """Fill `into` with the bytes from `start` on; return how many of them came, at least 1."""
        with self.lock:
            if not self.address:
                with self.call("download_dataset") as answer:
                    self.address = answer.url  # unread: the client would download it all
            address, done = self.address, 0
        self.traffic["requests"] += 1
        with self.storage.get(address, stream=True, timeout=TIMEOUT, headers={
                "Range": f"bytes={start}-{start + len(into) - 1}",
                "Accept-Encoding": "identity"}) as response:
            status, etag = response.status_code, response.headers.get("ETag", "")
            if status in (400, 401, 403, 404, 410):
                if self.address == address:  # else another thread has renewed it
                    self.address = ""
                raise ConnectionError(f"an address of the archive that has expired ({status})")
            if status == 200 and not self.size:
                raise RangeRefused
            part = re.fullmatch(rf"bytes {start}-\d+/(\d+)",
                                response.headers.get("Content-Range", ""))
            now = (int(part[1]), etag) if part else (self.size, self.etag)
            if not self.size:
                self.size, self.etag = now
            elif status == 416 or now != (self.size, self.etag):
                raise UserError(
                    f"--data {self.spec}: the data set was changed on Kaggle meanwhile. Start "
                    "over, or name a version that stays: kaggle:owner/name/versions/N")
            response.raise_for_status()
            if not part:
                raise ConnectionError("another part of the archive than was asked for")
            with contextlib.suppress(*NO_CONNECTION):
                while chunk := response.raw.read(min(CHUNK, len(into) - done)):
                    into[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    self.traffic["bytes"] += len(chunk)
                    if cancelled.is_set():
                        raise Cancelled
        if not done:
            raise ConnectionError("an answer that broke before its content")
        if done < len(into):
            self.tried_again["an answer cut short"] += 1
        return done

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        if self.position < 0:
            raise OSError("a place before the first byte")
        return self.position

    def read(self, size: int = -1) -> bytes:
        start = self.position
        self.position = min(self.size, start + size) if size >= 0 else self.size
        return bytes(self.read_range(start, max(start, self.position)))


# A file in the archive: start..end-1 are its bytes, up to the next one's; size is that of the
# content; method 0 is stored, 8 deflated, -1 encrypted. As tuples 100,000 would take 60 MB more.
Member = namedtuple("Member", "start end packed size crc method")
MEMBER = struct.Struct("<5Qi")


class KaggleSource(Source):
    """A Kaggle data set, streamed: its archive is read by range, and nothing is stored."""

    threads = 8  # most of a request is waiting

    def __init__(self, remote: RemoteArchive) -> None:
        self.remote, self.spec, self.left_out = remote, remote.spec, Counter()
        self.members: dict[str, bytes] = {}
        self.list_members()
        layout = recognise_layout(sorted(self.members), self.read_text, self.spec, self.left_out)
        self.samples, self.masks, self.boxes = layout.samples, layout.masks, layout.boxes
        self.name, self.version = re.sub(r"[^\w.-]+", "_", remote.name), remote.etag
        self.title = f"{layout.title}, Kaggle data set {remote.owner}/{remote.name}" + (
            f" version {remote.version}" if remote.version else "")

    def list_members(self) -> None:
        """Fill `members` from the archive's directory. UserError if it cannot be read."""
        try:
            self.remote.read_range(0, 1)  # now its size is known
            with zipfile.ZipFile(self.remote) as archive:
                infos = sorted(archive.infolist(), key=lambda i: i.header_offset)
            ends = [*(i.header_offset for i in infos[1:]), archive.start_dir]
            for i, end in zip(infos, ends, strict=True):
                if not 0 <= i.header_offset < end:
                    raise ValueError("its members overlap")
                method = -1 if i.flag_bits & 1 else i.compress_type
                if not i.is_dir():  # the name is copied: it would hold on to the info's memory
                    self.members[i.filename.encode().decode()] = MEMBER.pack(
                        i.header_offset, end, i.compress_size, i.file_size, i.CRC, method)
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError,
                struct.error) as error:
            raise UserError(f"--data {self.spec}: what Kaggle gives is not a readable zip archive "
                            f"({error})") from None

    def member(self, name: str) -> Member:
        """Look a file up. FileNotFoundError if there is none of that name."""
        if name not in self.members:
            raise FileNotFoundError("not in the data set")
        return Member(*MEMBER.unpack(self.members[name]))

    def file_bytes(self, sample: Sample) -> int:
        return self.member(sample.key).size

    def digest(self, sample: Sample) -> int:
        return self.member(sample.key).crc

    def read_file(self, name: str) -> bytes:
        if self.member(name).size > LARGEST_FILE:
            raise TooLarge(f"--data {self.spec}: {name} cannot be read (larger than "
                           f"{LARGEST_FILE / 1e6:,.0f} MB)")
        ((_, content),) = self.fetch([Sample(name, "", NORMAL)], NEVER)
        if isinstance(content, Exception):
            raise content
        return content

    def runs(self, samples: list[Sample]) -> Iterator[list[tuple[Member, int]]]:
        """Group the members, with their places in `samples`, so that a request serves a group."""
        run: list[tuple[Member, int]] = []
        for place in sorted(range(len(samples)), key=lambda i: self.member(samples[i].key).start):
            member = self.member(samples[place].key)
            if run and (member.start - run[-1][0].end > GAP
                        or member.end - run[0][0].start > BLOCK):
                yield run
                run = []
            run.append((member, place))
        if run:
            yield run

    def blocks(self, samples: list[Sample]) -> np.ndarray:
        # Groups of the shuffle are wanted at different times: their images are fetched apart.
        numbers = np.arange(len(samples)) // SHUFFLE_GROUP
        for number, run in enumerate(self.runs(samples)):
            numbers[[place for _, place in run]] += number * len(samples)
        return numbers

    def cost(self, samples: list[Sample]) -> int:
        members = [self.member(s.key) for s in samples]
        # One request's bytes; a member that is fetched once more; and unpacked, which zlib does
        # in pieces that it joins, beside the one before.
        return (max(run[-1][0].end - run[0][0].start for run in self.runs(samples))
                + max(m.end - m.start for m in members) + 3 * max(m.size for m in members))

    def fetch(self, samples: list[Sample],
              cancelled: threading.Event) -> Iterator[tuple[Sample, bytes | Exception]]:
        for run in self.runs(samples):
            start = run[0][0].start
            data = self.remote.read_range(start, run[-1][0].end, cancelled)
            for member, place in run:
                content = unpack(member, data[member.start - start : member.end - start])
                for _ in range(2):
                    if isinstance(content, BadImage):  # damaged on its way?
                        self.remote.tried_again[f"a damaged file ({content})"] += 1
                        content = unpack(member, self.remote.read_range(
                            member.start, member.end, cancelled))
                yield samples[place], content
                del content
            del data

    def report(self) -> str:
        """Tell what went over the network so far, in one line or two."""
        traffic, again = self.remote.traffic, self.remote.tried_again
        reasons = ", ".join(f"{times} times {reason}" for reason, times in again.most_common())
        return (f"network   {traffic['bytes'] / 1e6:,.1f} MB in {traffic['requests']:,} requests, "
                f"API calls: {traffic['API calls']:,}"
                + (f"\n          tried again: {reasons}" if reasons else ""))


def unpack(member: Member, span: memoryview) -> bytes | Exception:
    """Return the content of a member from its bytes in the archive, or what is wrong with it."""
    if member.method not in (0, 8):
        return BadImage("encrypted" if member.method < 0 else f"packed by method {member.method}")
    try:
        content = span[30 + sum(struct.unpack_from("<HH", span, 26)) :][: member.packed]
        data = bytes(content[: member.size + 1]) if member.method == 0 else (
            zlib.decompressobj(-15).decompress(content, member.size + 1))
    except (zlib.error, struct.error) as error:
        return BadImage(f"damaged in the archive ({error})")
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        return BadImage("its length or checksum is wrong")
    return data


class KaggleFilesSource(KaggleSource):
    """A Kaggle data set whose archive is not given in parts: a call of the API for each file.

    Slower, and Kaggle limits the number of calls; for small sets.
    """

    blocks, digest = Source.blocks, Source.digest

    def list_members(self) -> None:
        token = None
        while token != "":  # an empty page does not mean the end
            page = self.remote.retry(NEVER, self.remote.call, "list_dataset_files", pageSize=200,
                                     pageToken=token or "")
            for f in page.dataset_files or []:  # CHUNK: what `_download` holds beyond the file
                self.members[f.name] = MEMBER.pack(0, CHUNK, 0, f.total_bytes, 0, 0)
            token = page.next_page_token or ""

    def fetch(self, samples: list[Sample],
              cancelled: threading.Event) -> Iterator[tuple[Sample, bytes | Exception]]:
        for sample in samples:
            yield sample, self.remote.retry(cancelled, self._download, sample.key)

    def _download(self, name: str) -> bytes | Exception:
        size = self.member(name).size
        try:
            with self.remote.call("download_dataset", fileName=name) as answer:
                data = answer.raw.read(size + CHUNK, decode_content=True)
        except requests.HTTPError as error:
            if error.response.status_code == 404:
                return BadImage("listed by Kaggle, but not there (404)")
            raise
        self.remote.traffic["bytes"] += len(data)
        if len(data) != size:  # Kaggle zips large files
            with contextlib.suppress(zipfile.BadZipFile, zlib.error, RuntimeError, LookupError,
                                     EOFError), zipfile.ZipFile(io.BytesIO(data)) as packed:
                data = packed.open(packed.infolist()[0]).read(size + 1)
        return data if len(data) == size else BadImage(
            f"{len(data):,} bytes long instead of {size:,} as listed")


def open_kaggle(spec: str) -> KaggleSource:
    """Open the data set that kaggle:owner/name[/versions/N] names. UserError."""
    m = re.fullmatch(r"kaggle:([\w.-]+)/([\w.-]+)(?:/versions/(\d+))?", spec)
    if not m:
        raise UserError(f"--data {spec}: wanted is kaggle:owner/name[/versions/N]")
    remote = RemoteArchive(spec, m[1], m[2], m[3])
    try:
        return KaggleSource(remote)
    except RangeRefused:
        log.warning("kaggle    no parts of the archive are given: a call for each file, slowly")
        return KaggleFilesSource(remote)


# ----------------------------------------------------------------------------------------------
# Splits

class Splits(NamedTuple):
    """Samples by split. train: normals only. val and test: both labels where there are any."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    notes: list[str]  # what a user should know about how this came about

    def normals(self, split: str) -> list[Sample]:
        """The normal samples of `train`, `val` or `test`."""
        return _normals(getattr(self, split))


def _normals(samples: list[Sample]) -> list[Sample]:
    return [s for s in samples if s.label == NORMAL]


def _without(samples: list[Sample], others: list[Sample]) -> list[Sample]:
    """Those of `samples` whose patients have no image among `others`."""
    patients = {s.patient for s in others}
    return [s for s in samples if s.patient not in patients]


def _first(samples: list[Sample], want: int, what: str) -> list[Sample]:
    """The images of the first patients (with what="key": the first images) in the order of their
    names' hashes, the same for ever: of as many as have `want` normal images."""
    def order(name: str) -> bytes:
        return hashlib.blake2b(f"imgae-dx:{name}".encode(), digest_size=8).digest()

    normals = Counter(getattr(s, what) for s in _normals(samples))
    chosen = set()
    for name in sorted({getattr(s, what) for s in samples}, key=order):
        if want <= 0:
            break
        chosen.add(name)
        want -= normals[name]
    return [s for s in samples if getattr(s, what) in chosen]


def split_samples(samples: list[Sample], train_limit: int | None = None) -> Splits:
    """Split by patient into train (normals), val and test; the same for every seed and model.

    A test split that the source prescribes is respected, and so is a validation split with at
    least 50 normals; a smaller one is left out, or if test is not prescribed either split anew
    with all else. Otherwise test takes 20 % of the normals and every patient who has no normal
    image, and validation 10 % of the remaining normals. Abnormal images of patients who are not
    in train go to validation, where settings may be chosen on them.
    train_limit: the most training images; validation normals then are at most a quarter, or 100.
    """
    notes = []
    test = [s for s in samples if s.split == "test"]
    rest = [s for s in samples if s.split != "test"]
    val = [s for s in rest if s.split == "val"]
    prescribed = bool(test)
    if not test:
        if val and len(_normals(val)) < MIN_NORMALS:
            notes.append(f"prescribed validation split of {len(val)} images is too small (fewer "
                         f"than {MIN_NORMALS} normals): they are split anew with all others")
            val, rest = [], [dataclasses.replace(s, split="") for s in rest]
        free = _without(rest, val)
        test = _without(free, _normals(free))
        mixed = _without(free, test)
        test = test + _first(mixed, round(0.2 * len(_normals(mixed))), "patient")
    left = _without(rest, test)
    if prescribed and len(left) < len(rest):
        notes.append(f"{len(rest) - len(left)} images left out of training and validation: "
                     "their patients are in test")

    val = [s for s in left if s.split == "val"]
    rest = [s for s in left if s.split != "val"]
    normals = _normals(rest)
    if len(_normals(val)) < MIN_NORMALS:
        if val:
            notes.append(f"prescribed validation split of {len(val)} images is too small: unused, "
                         f"as it has fewer than {MIN_NORMALS} normals; "
                         "validation is taken from the training patients")
        want = max(round(0.1 * len(normals)), min(20, len(normals) // 4))
        val = _first(normals, want, "patient")
    train = _without(normals, val)
    if train_limit is not None:
        if train_limit > len(train):
            notes.append(f"--samples {train_limit}: there are only {len(train)} to train on")
        train = _first(train, train_limit, "key")
        val = [s for s in val if s.label == ABNORMAL] + _first(
            _normals(val), max(100, train_limit // 4), "key")
    known = {s.key for s in val}
    val += [s for s in _without(rest, train) if s.label == ABNORMAL and s.key not in known]
    if all(s.patient == s.key for s in samples):
        notes.append("no patient is named: every image counts as a patient of its own")
    for one, other in ((train, val), (train, test), (val, test)):
        assert len(_without(one, other)) == len(one), "a patient is in two splits"
    assert len(_normals(train)) == len(train), "abnormal image in train"
    return Splits(train, sorted(val, key=lambda s: s.key), test, notes)


_COLUMNS = [column.name for column in dataclasses.fields(Sample)]


def write_splits(splits: Splits, file: Path) -> None:
    """Write split.csv: one row an image, the split in the last column."""
    rows = [(s.key, s.patient, s.label, s.finding, s.view, name)
            for name in SPLITS for s in getattr(splits, name)]
    temporary = file.with_suffix(".tmp")  # half a table would be read as a smaller data set
    with open(temporary, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([_COLUMNS, *rows])
    os.replace(temporary, file)


def read_splits(file: Path) -> Splits:
    """Read what write_splits wrote."""
    parts: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    try:
        with open(file, newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                key, patient, label, finding, view, split = (row[c] for c in _COLUMNS)
                parts[split].append(Sample(key, patient, int(label), finding, view, split))
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file}: not a readable table of splits ({error})") from None
    return Splits(**parts, notes=[])


def split_for_training(source: Source, config: Config, rank: int = 0) -> Splits:
    """split_samples for the configuration; UserError if there are too few normals to learn from.
    Of several processes the first one, which prints the notes, looks for identical files."""
    normals = len(_normals(source.samples))
    if normals < MIN_NORMALS:
        raise UserError(
            f"--data {source.spec}: {normals} normal images are too few to learn what is normal "
            f"(at least {MIN_NORMALS}). Train on a larger set, then score this one with: "
            f"{command('evaluate.py')} RUN_FOLDER --data {source.spec}")
    splits = split_samples(source.samples, config.samples)
    for name, part in (("training", splits.train), ("validation", splits.normals("val"))):
        if len(part) < 2:
            raise UserError(f"--data {source.spec}: its {normals} normal images leave {len(part)} "
                            f"for {name}, as patients and a prescribed test split are kept whole")
    if config.batch_size > len(splits.train):
        splits.notes.append(f"--batch-size {config.batch_size}: more than there are training "
                            "images, which all make one step")
    if rank == 0 and (pairs := duplicates_across(source, splits)):
        splits.notes.append(f"{len(pairs)} pairs of identical files lie in different splits, e.g. "
                            f"{pairs[0][0]} and {pairs[0][1]}")
    return splits


def duplicates_across(source: Source, splits: Splits) -> list[tuple[str, str]]:
    """Pairs of files with identical bytes in two different splits (first key, second key).
    Only files of equal size that are alike at a glance are read in full."""
    groups = [[(name, s) for name in SPLITS for s in getattr(splits, name)]]
    for mark in (source.file_bytes, source.glance, source.digest):
        parts = []
        for group in groups:
            by_mark = defaultdict(list)
            for name, s in group:
                with contextlib.suppress(OSError):
                    by_mark[mark(s)].append((name, s))
            by_mark.pop(0, None)  # their size is not known
            parts += [part for part in by_mark.values() if len({name for name, _ in part}) > 1]
        groups = parts
    return [(one.key, s.key) for (first, one), *others in groups
            for name, s in others if name != first]


def describe(source: Source, splits: Splits) -> str:
    """The table of the data that is printed before anything is done with it."""
    lines = [f"data      {source.title}",
             f"  {'split':<6}{'normal':>9}{'abnormal':>10}{'patients':>10}"]
    for name in SPLITS:
        part, normals = getattr(splits, name), len(splits.normals(name))
        lines.append(f"  {name:<6}{normals:>9,}{len(part) - normals:>10,}"
                     f"{len({s.patient for s in part}):>10,}")
    findings = Counter(s.finding or "unnamed" for s in splits.test if s.label == ABNORMAL)
    if findings:
        shown = ", ".join(f"{k} {v:,}" for k, v in findings.most_common(6))
        lines.append(f"  findings in test: {shown}{', and others' if len(findings) > 6 else ''}")
    if isinstance(source, KaggleSource):  # there a look would cost a request each
        total = sum(source.file_bytes(s) for s in splits.train) / 1e6
        lines.append(f"  training images: {total:,.1f} MB, streamed; nothing is stored on disk")
    lines += [f"  left out: {count:,} {why}" for why, count in source.left_out.most_common()]
    lines += [f"  note: {note}" for note in splits.notes]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Decoding

class BadImage(Exception):
    """These bytes are no image that can be used; the message says why."""


# What Pillow's decoders raise on damaged files.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError,
          struct.error)
TOO_MANY_PIXELS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
Hold = Callable[[int], contextlib.AbstractContextManager]  # so many bytes, while inside


def decode_image(data: bytes, size: int, hold: Hold = contextlib.nullcontext) -> np.ndarray:
    """Decode an image file's bytes to grey values, uint8 [size,size].

    The whole image is stretched to the square, whatever its shape: nothing is cut off and no
    border is invented. Colour becomes luma (ITU-R 601), transparency is ignored, EXIF orientation
    is applied. 16-bit grey is scaled from 0-65535, or from 0-4095 if no value is larger. DICOM
    has rescale and window applied, is inverted if MONOCHROME1, and stretched to the full range.
    A JPEG is decoded at a half, a quarter or an eighth where that still leaves twice `size`.
    hold: entered with the bytes that the pixels take at most, while they do. Raises BadImage.
    """
    if bytes(data[128:132]) == b"DICM":
        return _decode_dicom(data, size, hold)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(image.width, image.height)
        tags = getattr(image, "tag_v2", {})  # a TIFF's tile is decoded whole
        area = max(image.width * image.height, tags.get(322, 0) * tags.get(323, 0))
        # A progressive JPEG holds its coefficients at full size, whatever is decoded of it.
        more = 2 * len(image.getbands()) * image.width * image.height * bool(
            image.info.get("progressive"))
        image.draft(None, (2 * size, 2 * size))
        # Bytes a pixel: decoded, and what the conversions below make of it.
        deep = image.mode[0] in "IF" or image.format == "WEBP"
        depth = {"L": 2, "1": 3}.get(image.mode, 20 if deep else 12)
        with hold(area * depth + more):
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise BadImage("floating-point grey values, whose range is not known")
            if image.mode.startswith("I"):  # 16-bit grey; convert("L") would saturate it
                values = np.asarray(image).astype(np.float32)
                values *= np.float32(255 / (4095 if values.max() <= 4095 else 65535))
                return _stretch(Image.fromarray(values), size)
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA")
            # Not pasted on a background: what a viewer shows of an X-ray is its colour.
            return _stretch(image if image.mode == "L" else image.convert("L"), size)
    except TOO_MANY_PIXELS:
        raise BadImage("more pixels than any radiograph") from None
    except UnidentifiedImageError:
        page = bytes(data[:100]).lstrip()[:1] == b"<"
        raise BadImage("a web page or XML, and no image" if page else
                       "no image of a known format" if data else "an empty file") from None
    except DAMAGE as error:
        raise BadImage(str(error).split("<")[0].strip() or type(error).__name__) from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels is more than any radiograph")


def _stretch(image: Image.Image, size: int) -> np.ndarray:
    """Stretch a grey image, 8-bit or float in 0..255, to uint8 [size,size]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
    values = np.asarray(image)
    return values if values.dtype == np.uint8 else np.rint(values).clip(0, 255).astype(np.uint8)


def _decode_dicom(data: bytes, size: int, hold: Hold) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise UserError("DICOM images need pydicom 3: pip install 'pydicom>=3'") from None
    try:
        packed = _inflated(data)
        with hold(3 * packed):
            head = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        _check_pixels(head.Columns, head.Rows)
        planes = int(head.get("NumberOfFrames") or 1) * int(head.get("SamplesPerPixel") or 1)
        # There may be more of them than the header says.
        pixels = max(head.Rows * head.Columns * planes,
                     8 * max(packed, len(data)) // head.BitsAllocated)
        with hold(24 * pixels + 3 * packed):  # float64 on the way
            dicom = pydicom.dcmread(io.BytesIO(data))
            values = apply_voi_lut(apply_modality_lut(dicom.pixel_array, dicom), dicom)
            kind = dicom.PhotometricInterpretation
            if values.ndim != 2 or kind not in ("MONOCHROME1", "MONOCHROME2"):
                raise BadImage(f"DICOM with {kind} pixels in {values.ndim} dimensions, not a "
                               "single grey image")
            values = values.astype(np.float32)
            low, high = values.min(), values.max()
            values = (values - low) * (255 / max(high - low, 1e-6))
            values = 255 - values if kind == "MONOCHROME1" else values
            return _stretch(Image.fromarray(values), size)
    except BadImage:
        raise
    except Exception as error:  # pydicom answers damage with nearly every kind of error
        raise BadImage(f"DICOM: {' '.join(str(error).split())}") from None


def _inflated(data: bytes) -> int:
    """Bytes that a DICOM file is inflated to when it is opened; 0 if it is not deflated."""
    from pydicom.filereader import read_dataset

    file, inflater, count = io.BytesIO(data), zlib.decompressobj(-15), 0
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") == "1.2.840.10008.1.2.1.99":
        while not inflater.eof and (piece := inflater.unconsumed_tail or file.read(CHUNK)):
            count += len(inflater.decompress(piece, BLOCK))
    return count


# ----------------------------------------------------------------------------------------------
# Memory

class Cancelled(Exception):
    """The iteration that this work was for has ended."""


class Memory:
    """The bytes that images may take in all streams that share it. Safe among threads.

    Files in flight may take an eighth, pixels being decoded a quarter. The rest is for decoded
    images, cached or waiting for their batch: each stream sets a fixed part aside when it is made.
    """

    def __init__(self, limit: int) -> None:
        self.limit, files, pixels = limit, limit // 8, limit // 4
        self.most = {"files": files, "pixels": pixels, "images": limit - files - pixels}
        self.held, self.peak_bytes = dict.fromkeys(self.most, 0), 0
        self._change = threading.Condition()
        keep_one_heap()

    @contextlib.contextmanager
    def hold(self, use: str, count: int) -> Iterator[None]:
        """Hold bytes for "files" or "pixels" while inside. BadImage if they are too many."""
        most = self.most[use]
        if count > most:
            raise BadImage(f"needs {count / 1e6:,.1f} MB at once, more than the {most / 1e6:,.1f} "
                           "MB that --memory-limit-gb leaves for it")
        with self._change:
            self._change.wait_for(lambda: self.held[use] + count <= most)
            self.held[use] += count
            self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))
        try:
            yield
        finally:
            with self._change:
                self.held[use] -= count
                self._change.notify_all()


def keep_one_heap() -> None:
    """Let all threads take memory from one heap that keeps what is freed (Linux with glibc).

    Otherwise 8 threads keep 8 heaps, of four times the bytes that are counted, and large arrays are
    asked of the kernel anew and zeroed: on a CPU a tenth to a third of a training step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
        for setting, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, -1)):
            libc.mallopt(setting, value)


# ----------------------------------------------------------------------------------------------
# The stream

def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch: a permutation of range(count), int64, a pure function of its arguments.

    Groups of 16 neighbours are shuffled, then single images within windows of 512: random
    enough for training, while neighbours in the source are still wanted at about the same time.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    groups = rng.permutation(math.ceil(count / SHUFFLE_GROUP))
    order = (groups[:, None] * SHUFFLE_GROUP + np.arange(SHUFFLE_GROUP)).ravel()
    order = order[order < count]
    for start in range(0, count, SHUFFLE_WINDOW):
        rng.shuffle(order[start : start + SHUFFLE_WINDOW])
    return order


Batches = Generator[tuple[Tensor, Tensor], None, None]


class ImageStream(IterableDataset):
    """Iterates over batches (images uint8 [B,1,H,W], positions int64 [B]) of samples, in order.

    Positions index `samples`. With a seed the order is `epoch_order(len, seed, epoch)` and an
    incomplete last batch is dropped; without one it is the order of `samples`, and complete.
    Rank r of `world` gets the r-th of as many slices of each batch (perhaps an empty one).

    Threads read and decode ahead. One iteration at a time stays within `memory` (bytes, or a Memory
    that streams share: at most `share` of what is left for images). If `cache`, as many of the
    first of `samples` as fit are cached for later epochs.

    Unreadable images are skipped, and named in `bad` with the reason. More than 5 % of them (and
    more than one) end the run with a UserError if `stop_on_bad`.
    """

    def __init__(self, source: Source, samples: list[Sample], image_size: int, batch_size: int,
                 seed: int | None = None, memory: Memory | int = 4 << 30, share: float = 1.0,
                 cache: bool = True, rank: int = 0, world: int = 1,
                 stop_on_bad: bool = True) -> None:
        self.source, self.samples, self.image_size = source, samples, image_size
        self.memory = memory = Memory(memory) if isinstance(memory, int) else memory
        self.seed, self.rank, self.world, self.stop_on_bad = seed, rank, world, stop_on_bad
        self.batch_size = size = batch_size if seed is None else min(batch_size, len(samples))
        self.epoch = self.next_batch = self._start = 0
        self.bad: dict[str, str] = {}  # key -> reason
        self.blocks = source.blocks(samples)
        grouped = len(np.unique(self.blocks)) < len(samples)

        # What is set aside, in images: two batches, as one is made while the consumer has the one
        # before it; a window for those on their way; and the cache.
        pixels = image_size**2
        room = int(share * (memory.most["images"] - memory.held["images"])) // pixels - 2 * size
        if room <= size:
            raise UserError(
                f"--memory-limit-gb: {memory.limit / 2**30:.4f} is too little for batches of "
                f"{size} images of {image_size}x{image_size} pixels; "
                f"{7 * (3 * size + 1) * pixels / 2**30 + 5e-5:.4f} is enough")
        wanted = size + (2 * SHUFFLE_WINDOW if grouped else max(size, 4 * source.threads))
        self.window = min(wanted, max(size + 1, room // 2) if cache else room)
        self.cached = min(len(samples), room - self.window) if cache else 0
        self.bound = (2 * size + self.window + self.cached) * pixels  # bytes
        memory.held["images"] += self.bound
        self._cache = np.empty((self.cached, image_size, image_size), np.uint8)
        self._is_cached = np.zeros(len(samples), dtype=bool)
        self._span = min(SHUFFLE_WINDOW, self.window // 2)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        n = len(self.samples)
        return math.ceil(n / self.batch_size) if self.seed is None else n // self.batch_size

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Choose which epoch's order the next iteration takes, and from which batch on: nothing is
        read of those before."""
        self.epoch, self.next_batch, self._start = epoch, batch, batch

    def __iter__(self) -> Batches:
        if get_worker_info():
            raise RuntimeError("an ImageStream has threads of its own: num_workers must be 0")
        n, size = len(self.samples), self.batch_size
        order = np.arange(n) if self.seed is None else epoch_order(n, self.seed, self.epoch)
        self.next_batch, self._start = self._start, 0
        numbers = range(self.next_batch, len(self))
        batches = [np.array_split(order[i * size : (i + 1) * size], self.world)[self.rank]
                   for i in numbers]
        # What training leaves over is loaded all the same if it will be cached, so that no later
        # epoch need read it.
        rest = order[len(self) * size :] if self.world == 1 else order[:0]
        batches.append(rest[(rest < self.cached) & ~self._is_cached[rest]])
        with contextlib.closing(self._load(batches)) as loaded:
            for number, batch in zip(numbers, loaded, strict=False):
                if self.stop_on_bad and len(self.bad) > max(1, MAX_BAD_SHARE * n / self.world):
                    key, reason = list(self.bad.items())[-1]
                    raise UserError(
                        f"--data {self.source.spec}: {len(self.bad)} of {n} images cannot be read, "
                        f"more than {MAX_BAD_SHARE:.0%}; the last is {key}: {reason}. Replace or "
                        "remove them, or raise --memory-limit-gb if that is the reason")
                self.next_batch = number + 1
                if len(batch[0]) or self.world > 1:  # where every batch is counted on
                    yield batch
            next(loaded)  # the rest

    def every(self, step: int) -> Batches:
        """Iterate over every step-th of `samples`, whole for every rank. Shares the cache."""
        positions = np.arange(0, len(self.samples), step)
        return self._load(np.split(positions, range(self.batch_size, len(positions),
                                                    self.batch_size)))

    def _groups(self, batches: list[np.ndarray]) -> Iterator[list[int]]:
        """Yield the positions that must be read, in the order in which they are wanted, but those
        of one block together that are wanted within `_span` images."""
        wanted = [i for i in np.concatenate(batches).tolist()
                  if not self._is_cached[i] and self.samples[i].key not in self.bad]
        for start in range(0, len(wanted), self._span):
            blocks = defaultdict(list)
            for i in wanted[start : start + self._span]:
                blocks[self.blocks[i]].append(i)
            yield from blocks.values()

    def _load(self, batches: list[np.ndarray]) -> Batches:
        """Yield the images of each batch of positions that can be read, and their positions."""
        groups = self._groups(batches)
        group = next(groups, None)
        loading: dict[int, Future] = {}  # images on their way, those of a group by one future
        jobs, cancelled = queue.SimpleQueue[Any](), threading.Event()
        # Daemons: an iteration that is left early waits for no network, nor does Python's end.
        threads = [threading.Thread(target=self._work, args=(jobs, cancelled), daemon=True,
                                    name=f"decode-{i}") for i in range(self.source.threads)]
        try:
            for thread in threads:
                thread.start()
            for batch in batches:
                images = np.empty((len(batch), 1, self.image_size, self.image_size), np.uint8)
                positions: list[int] = []
                for i in batch.tolist():
                    found = None  # no longer held, as its room is given to others
                    while group and len(loading) + len(group) <= self.window:
                        future: Future = Future()
                        loading.update(dict.fromkeys(group, future))
                        jobs.put((group, future))
                        group = next(groups, None)
                    if i in loading:
                        found = loading.pop(i).result().pop(i)
                        if isinstance(found, Exception):
                            self.bad[self.samples[i].key] = str(found)
                        elif i < self.cached:
                            self._cache[i], self._is_cached[i] = found, True
                    elif self._is_cached[i]:
                        found = self._cache[i]
                    if isinstance(found, np.ndarray):  # not bad, now or in an earlier epoch
                        images[len(positions), 0] = found
                        positions.append(i)
                yield (torch.from_numpy(images[: len(positions)]),
                       torch.tensor(positions, dtype=torch.int64))
        finally:
            cancelled.set()
            for _ in threads:
                jobs.put(None)
            for thread in threads:  # soon they have ended, but for one that waits for the network
                if thread.ident:
                    thread.join(1 / len(threads))

    def _work(self, jobs: queue.SimpleQueue, cancelled: threading.Event) -> None:
        while (job := jobs.get()) and not cancelled.is_set():
            group, future = job
            try:
                future.set_result(self._load_group(group, cancelled))
            except BaseException as error:  # the consumer raises it
                future.set_exception(error)

    def _load_group(self, group: list[int],
                    cancelled: threading.Event) -> dict[int, np.ndarray | Exception]:
        """Map each position to its image, uint8 [H,W], or to what is wrong with it."""
        position_of, found = {self.samples[i]: i for i in group}, {}
        cost, hold = self.source.cost([*position_of]), partial(self.memory.hold, "pixels")
        if cost > self.memory.most["files"] and len(group) > 1:  # together they are too many
            return {i: self._load_group([i], cancelled)[i] for i in group}
        try:
            with self.memory.hold("files", cost):
                for sample, data in self.source.fetch([*position_of], cancelled):
                    try:
                        found[position_of[sample]] = data if isinstance(data, Exception) else (
                            decode_image(data, self.image_size, hold))
                    except BadImage as error:  # without its traceback, which would keep the file
                        found[position_of[sample]] = BadImage(str(error))
                    del data
        except BadImage as error:  # too large a file
            found[group[0]] = BadImage(str(error))
        return found


class Loaders(NamedTuple):
    """The streams of the three splits, and what they read."""

    train: ImageStream
    val: ImageStream  # normals only: what early stopping and thresholds look at
    test: ImageStream
    source: Source
    splits: Splits


def create_dataloaders(config: Config, rank: int = 0, world: int = 1,
                       source: Source | None = None) -> Loaders:
    """Make the three streams for a configuration. `stream.samples[position]` tells the label.

    Of train and val, process `rank` of `world` gets its slice of every batch. source: if it has
    been opened already.
    """
    source = source or open_source(config)
    splits = split_for_training(source, config, rank)
    # Ranks on one machine share its memory. Test images are seen once: they need not be cached.
    memory = Memory(config.memory_bytes // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    make = partial(ImageStream, source, image_size=config.image_size,
                   batch_size=config.batch_size, memory=memory)
    test = make(splits.test, share=1 / 4, cache=False)
    val = make(splits.normals("val"), share=1 / 3, rank=rank, world=world)
    train = make(splits.train, seed=config.seed, rank=rank, world=world)
    return Loaders(train, val, test, source, splits)


def describe_memory(loaders: Loaders) -> str:
    """Tell in one line the bound on what the streams hold, and how many images they cache."""
    cached = loaders.train.cached + loaders.val.cached
    there = len(loaders.train.samples) + len(loaders.val.samples)
    return (f"memory    images never take more than {loaders.train.memory.limit / 2**30:,.3g} GB; "
            f"{'all' if cached == there else f'{cached:,} of the'} {there:,} training and "
            "validation images fit into the cache")
