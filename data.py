"""Where images come from, how they are split, and how they reach the training loop.

One road for every source: Source.fetch(samples) -> bytes -> decode_image -> uint8 [H,W]
-> ImageStream -> batches uint8 [B,1,H,W]. Nothing on it knows where the bytes came from.

    from data import create_dataloaders
    loaders = create_dataloaders(Config(data="my_xrays"))    # loaders.train, .val, .test
"""

import contextlib
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import posixpath
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
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, NoReturn

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
MIN_VALIDATION = 20  # normals of a prescribed validation split; fewer hold no threshold of 95 %
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".gif",
                  ".webp", ".dcm", ".dicom")
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


SAMPLE_COLUMNS = [column.name for column in fields(Sample)]
# Left, top, right and bottom of a rectangle, as shares of the image's sides.
Box = tuple[float, float, float, float]


class Source:
    """A set of labelled images. Subclasses fill the fields and say how to read a file."""

    spec: str  # what --data said
    name: str  # short name, used for folders of results
    title: str  # one line: what this is
    samples: list[Sample]
    left_out: Counter  # reason -> number of images or rows that were left out
    masks: dict[str, list[str]]  # image key -> names of its masks' files
    boxes: dict[str, list[Box]]  # image key -> boxes drawn round its lesions
    facts: dict[str, str] = {}  # noqa: RUF012 (never changed): what was found, and taken for what
    careful: tuple[str, ...] | list[str] = ()  # what may spoil the results
    threads = os.cpu_count() or 1  # that read and decode at the same time
    looked_at = 24  # images that are opened beforehand
    _bits: int | None = None  # what grey_bits has found
    version = ""  # tells a set from a later one of the same name, where the source knows

    def read_file(self, name: str) -> bytes:
        """Read a file. OSError, BadImage or TooLarge. Subclasses have this or `open_file`."""
        with self.open_file(name) as file:
            return file.read()

    def open_file(self, name: str) -> BinaryIO:
        """Open a file, of which perhaps only some bytes are wanted."""
        return io.BytesIO(self.read_file(name))

    def read(self, sample: Sample) -> bytes:
        """Read an image's file. OSError or BadImage if it cannot be had."""
        return self.read_file(sample.key)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn what goes wrong with a file while inside into a UserError."""
        try:
            yield
        except (*DAMAGE, BadImage) as error:
            why = error.args[-1] if error.args else error
            raise UserError(f"--data {self.spec}: {name} cannot be read ({why})") from None

    def read_text(self, name: str) -> str:
        """Read a CSV or a list. UserError if it cannot be had."""
        with self.reading(name):
            data = self.read_file(name)
        try:
            return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except UnicodeDecodeError:
            return data.decode("cp1252", errors="replace")

    def mask(self, sample: Sample, size: int) -> np.ndarray | None:
        """Where the lesion is, bool [size,size]; None if the source does not know. UserError."""
        inside, boxes = np.zeros((size, size), dtype=bool), self.boxes.get(sample.key, [])
        scale = self.size_of(sample) * 2 if any(max(box) > 1 for box in boxes) else (1,) * 4
        for box in boxes:
            left, top, right, bottom = (
                round(x / n * size) for x, n in zip(box, scale, strict=True))
            inside[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        for name in self.masks.get(sample.key, ()):
            # Any lesion pixel counts, so that a small lesion does not vanish.
            inside |= np.asarray(self.read_mask(name).resize(
                (size, size), Image.Resampling.BOX)) > 0
        return inside if boxes or sample.key in self.masks else None

    def read_mask(self, name: str) -> Image.Image:
        """Read a mask: 255 where it is not black. UserError."""
        with (self.reading(name), self.open_file(name) as file,
              Image.open(file, formats=FORMATS) as image):
            _check_pixels(image.width, image.height)
            return image.convert("L").point(lambda grey: 255 * (grey > 0))

    def is_black(self, name: str) -> bool:
        """Whether a mask can be read, and marks nothing."""
        with contextlib.suppress(UserError):
            return not self.read_mask(name).getbbox()
        return False

    def size_of(self, sample: Sample) -> tuple[int, int]:
        """Width and height in pixels, as the image is shown. UserError if it cannot be read."""
        with self.reading(sample.key), self.open_file(sample.key) as file:
            if file.read(132)[128:] == b"DICM":
                import pydicom

                file.seek(0)
                header = pydicom.dcmread(file, stop_before_pixels=True)
                return header.Columns, header.Rows
            with Image.open(file, formats=FORMATS) as image:
                on_its_side = image.getexif().get(0x112, 1) > 4
                return image.size[::-1] if on_its_side else image.size

    def is_image(self, name: str) -> bool:
        """Whether a file of unknown ending begins like an image."""
        with self.open_file(name) as file:
            data = file.read(132)
        return data[128:] == b"DICM" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP") or (
            data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"P5",
                             b"P2", b"P6")))

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

    def grey_bits(self) -> int:
        """Bits in use of 16-bit images, one figure a set: the smallest of 10, 12, 14, 16 that holds
        what is seen in 128 of them; 0 if what is looked at, drawn by names, has 8. Tells of pages
        and of unreadable files. UserError if the images are signed, or all of one grey."""
        if self._bits is not None:
            return self._bits
        some = sorted(self.samples, key=lambda s: zlib.crc32(s.key.encode()))[: self.looked_at]
        deep, flat, paged, broken = list[Any](), list[bool](), list[str](), list[str]()
        for sample in some:
            try:
                with (self.open_file(sample.key) as file,
                      Image.open(file, formats=FORMATS) as image):
                    if getattr(image, "n_frames", 1) > 1:
                        paged.append(sample.key)
                    if image.mode.startswith("I") and len(deep) < 128:
                        deep.append(image.getextrema())
                    if len(flat) < 24:
                        image.draft("L", (64, 64))
                        flat.append(bool(np.ptp(np.asarray(image)) == 0))
            except (*DAMAGE, BadImage):
                if sample.key.lower().endswith(IMAGE_SUFFIXES[:-2]):  # DICOM is not Pillow's
                    broken.append(sample.key)
        looked = "images that were looked at"
        if sum(low < 0 for low, _ in deep) > MAX_BAD_SHARE * len(deep):
            raise UserError(f"--data {self.spec}: the {looked} hold signed grey values; save them "
                            "as 8 or 16 bits, by one rule for all")
        if len(flat) > 7 and all(flat):
            raise UserError(f"--data {self.spec}: the {looked} are of one grey; was their "
                            "conversion right?")
        top = max((high for _, high in deep), default=0)
        self._bits = next(n for n in (10, 12, 14, 16) if top < 2**n or n == 16) if deep else 0
        if deep:
            self.facts = self.facts | {"grey": f"{self._bits} of 16 bits in use"}
        self.careful = [*self.careful, *(
            f"{len(names)} of {len(some):,} {looked} {what}, e.g. {names[0]}" for names, what in (
                (paged, "have several pages or frames, of which the first is taken"),
                (broken, "cannot be read as images")) if names)]
        return self._bits

    def fingerprint(self) -> str:
        """A digest of names, patients, labels and prescribed splits, one of the files' sizes, and
        where they can be had one of a few files' content, wherever the data lies. See same_data."""
        def short(parts: Iterable[str], size: int) -> str:
            return hashlib.blake2b("".join(parts).encode(), digest_size=size).hexdigest()

        known = [short((f"{s.key}\t{s.patient}\t{s.label}\t{s.split}\n" for s in self.samples), 8),
                 short((f"{self.file_bytes(s)} " for s in self.samples), 4)]
        with contextlib.suppress(OSError):
            some = self.samples[:: len(self.samples) // 16 + 1]
            known.append(short((f"{self.digest(s)} " for s in some), 4))
        return "-".join(known)


def same_data(one: str, other: str) -> bool:
    """Whether two fingerprints agree in all that both of them know."""
    return all(x == y for x, y in zip(one.split("-"), other.split("-"), strict=False))


def open_source(config: Config) -> Source:
    """The source that `config.data` names. UserError if there is none, or nothing usable in it."""
    if config.data == "synthetic":
        return PhantomSource(config.samples or PHANTOM_SAMPLES, config.image_size)
    if not config.data.startswith("kaggle:"):
        return FolderSource(config.data, config.normal)
    m = re.fullmatch(r"kaggle:([\w.-]+)/([\w.-]+)(?:/versions/(\d+))?", config.data)
    if not m:
        raise UserError(f"--data {config.data}: wanted is kaggle:owner/name[/versions/N]")
    remote = RemoteArchive(config.data, m[1], m[2], m[3])
    try:
        return KaggleSource(remote, config.normal)
    except RangeRefused:
        log.warning("kaggle    no parts of the archive are given: a call for each file, slowly")
        return KaggleFilesSource(remote, config.normal)


# ----------------------------------------------------------------------------------------------
# The phantom

PHANTOM_SAMPLES = 400  # normal training images unless --samples says otherwise
PHANTOM_KINDS = ("opacity", "nodule", "effusion", "missing", "doubled")
# How much of each range of normal anatomy is used. Together with the noise below this sets the
# difficulty: learnt from a few hundred images within minutes, yet no trivial score tells lesions.
VARIETY = 0.35
MASK_LEVEL = 0.04  # smallest noise-free change, as a share of the grey range, that counts as lesion


class PhantomSource(Source):
    """Drawn chest images with known lesions, of `image_size` x `image_size` pixels."""

    def __init__(self, train_normals: int, image_size: int) -> None:
        self.spec = self.name = "synthetic"
        self.title = "built-in phantom (drawn chest images, not real X-rays)"
        self.left_out, self.image_size = Counter(), image_size
        self.masks, self.boxes, self._bits = {}, {}, 0
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
    return (3.0 - 2.0 * t) * t * t


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
    """Draw image number `index`, uint8 [size, size], and the mask of its anomaly, bool
    [size, size]: all False when `kind` is None. That image is the lesion-free twin of the others:
    same anatomy, exposure and noise. ValueError if there is no such kind."""
    # RandomState, because its stream is frozen for good: tests can pin the bytes of an image. The
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
# Intake: what the files of a folder or archive mean. It is read off names and tables; of the files
# themselves only the first bytes, where an ending says nothing, and a few masks of normal images.
#
# Tables and folders say the same things of an image, see `Said`. What a word means is decided in
# `meaning` alone, and what several of them say of one image in `join` alone.

HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?/)|__MACOSX/)")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
OTHER_SUFFIXES = (".xml", ".json", ".npy", ".npz", ".zip", ".gz", ".xlsx", ".md", ".html", ".pdf",
                  ".py", ".ipynb", ".pt", ".mat", ".mp4", ".log", ".yaml")
MOST_TABLES = 40  # that are looked into
# What a word means: the first of these that matches all of it, in lower case, with single spaces.
# Any other one is the name of a finding.
MEANINGS = {kind: re.compile(pattern) for kind, pattern in {
    "unknown": "|unknown|unlabell?ed|uncertain|todo|none|null|nan|na",
    "abnormal": "anomal(y|ies|ous)|bad|defect(ive)?|ungood|positive|yes|true|1|"
                r".*(\ba ?normal|no good|(ab|non|not|un) ?(normal|healthy|good|ok|clea[rn])).*",
    "normal": "normals?|good|healthy?|no ?findings?|no ?tumou?r|(healthy ?)?controls?|negative|"
              "no|false|0",
    # Like normal, but not certain to mean it: --normal alone decides.
    "unsure": r".*(normal|\b(healthy?|controls?|negatives?|neg|clear|clean|intact|good|okay|ok|"
              r"pass|passed|unremarkable|unaffected|uninfected)\b).*|(no|non|not|without|free)\b"
              r".*|non(?!e)\w.*|n|nl|nor|norm|wnl|nil"}.items()}
says_abnormal = MEANINGS["abnormal"].fullmatch  # and not what is found
SPLIT_NAMES = {name: split for split, names in {
    "train": "train training trainset", "val": "val valid validation valset dev",
    "test": "test testing testset"}.items() for name in names.split()}
# What adds nothing to a name: normal_cases, chest_good, Training Set.
FILLER = re.compile(
    "(case|image|img|picture|photo|png|jpe?g|dicom|dcm|bmp|tiff?|scan|slice|patient|subject|xray|"
    "ray|radiograph|film|frame|file|lung|brain|finding|person|session)s?|study|studies|series|x|p|"
    "s|pat|subj|sub|pid|chest|cxr|class|folder|dir|data|dataset|set|split|group|batch|part")
NO_CLASS = re.compile(
    "(pred|prediction|result|heatmap|output|overlay|sample|example|figure|plot|preview|thumbnail|"
    "duplicate|reconstruction)s?|all|tmp|temp|backup|old|misc|inference|submission|demo|trash|"
    "excluded|unused")
MASK = "masks?|gt|labels?|segs?|segmentations?|annotations?|ground[ _-]?truth"
MASK_FOLDER = re.compile(rf"({MASK})\b.*|.*\b({MASK})")
MASK_FILE = re.compile(  # of the image beside which it lies
    rf"(?:{MASK})[ _-]+(.+)|(.+?)[ _-]*(?:{MASK}|lesion|roi)(?:[ _-]?\d+)?")
PERSON = re.compile(r"(?i)(?:patient|person|pat|subject|subj|sub|case|pid|p)[ _-]?\d+[a-z]?")
# Patients in the names of files, believed where every image of a set has such a name: Kermany's,
# OCT's, CheXpert's and MURA's, the NIH's, and such as patient7_3.png.
NAME_RULES = [re.compile(f"(?:^|/){rule}") for rule in (
    r"(person\d+_(?:bacteria|virus)(?=_)|(?:NORMAL2-)?IM-\d+(?=-))[^/]*$",
    r"[A-Z]+-(\d+)-\d+\.\w+$", r"(\d{8})_\d{3}\.\w+$",
    r"(?:.*/)?((?i:patient|pat|subject|subj|sub|case|person|p)[ _-]?\d+)/",
    r"((?i:patient|pat|subject|subj|sub|case|person)[ _-]?\d+)[ _-][^/]+$")]

# Columns by their names without case, spaces and signs. The path and the split are known by values.
LABELS = ("label labels class classname target diagnosis findinglabels findinglabel finding "
          "findings category dx condition disease pathology groundtruth type abnormal anomaly "
          "positive")
COLUMNS = {name: re.compile(pattern) for name, pattern in {
    "patient": "(anon|anonymized)?(patient|subject|participant|person|case|pat)s?(id|ids|no|nr|"
               "num|number|name|key|code|identifier)?|mrn|pid|lesionid",
    "view": "view|viewposition|frontallateral|appa|projection", "modality": "modality",
    "mask": ".*(mask|segmentation).*", "no label": "sex|gender|age|smoker|survival",
    "no path": "|unnamed0|index",
    "left": "x|xmin|bboxx|x0|left", "top": "y|ymin|y0|top", "width": "width|w",
    "height": "height|h", "right": "xmax|x1|x2|right", "bottom": "ymax|y1|y2|bottom"}.items()}
SIDE_VIEWS = {"l", "ll", "lat", "lateral", "axial", "coronal", "sagittal", "oblique"}
X_RAYS = {"xray", "cr", "dx"}
YES, FLAGS = {"1", "yes", "true"}, {"", "1", "yes", "true", "0", "no", "false", "-1"}
DECIDE = "say which words mean normal with --normal WORD[,WORD]"
A_CSV = "give a CSV with the first line path,label and then a line an image,"
INSTEAD = {  # of what holds images, but is none
    ".npz": ". A .npz file holds arrays of NumPy; these lines save them as PNG:"
            "\n    import numpy, os, PIL.Image; d = numpy.load('FILE.npz')"
            "\n    for i, (x, y) in enumerate(zip(d['train_images'], d['train_labels'].ravel())):"
            "\n        os.makedirs(f'{y}', exist_ok=True); "
            "PIL.Image.fromarray(x).save(f'{y}/{i}.png')",
    ".zip": "; unpack the archive first", ".gz": "; unpack what ends in .gz first"}


def folder_of(name: str) -> str:
    """The folder of a file, "" at the top. Faster than dirname."""
    return name.rpartition("/")[0]


@lru_cache(100_000)
def spaced(text: str) -> str:
    """A name in lower case, its words and numbers parted by single spaces; 7.0 is 7."""
    if re.fullmatch(r"[+-]?\d+(\.0*)?", text.strip()):
        return str(int(float(text)))
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).casefold()
    return " ".join(re.findall(r"\d+|[^\W\d_]+", text))


def squash(text: str) -> str:
    """A word without case, spaces and signs."""
    return spaced(text).replace(" ", "")


@lru_cache(100_000)
def bare(text: str) -> tuple[str, str]:
    """The words of a folder or label that tell something, and the split that it names, or "".

    '0_Normal cases (1)' is ('normal', ''), 'train_images' is ('', 'train')."""
    words, split = spaced(text).split(), ""
    for end in (0, -1):
        if words and not split and words[end] in SPLIT_NAMES:
            split = SPLIT_NAMES[words.pop(end)]
    telling = [w for w in words if not (FILLER.fullmatch(w) or w.isdigit())]
    if not telling:  # 'class 1', and '1' alone, are classes; 'set 1' and 'images' are not
        is_class = all(w.isdigit() or w == "class" for w in words) and words[-1:] != ["class"]
        return " ".join(words if is_class else ()), split
    if any(len(w) > 3 for w in telling):  # not T 1, nor no. 2: there the number tells something
        words = words[words[0].isdigit() : len(words) - words[-1].isdigit()]
    return " ".join(w for w in words if not FILLER.fullmatch(w)), split


@lru_cache(100_000)
def meaning(word: str, given: frozenset[str] = frozenset()) -> str:
    """What a label or folder says: normal, abnormal, unknown, or unsure if it is only like normal.
    given: the words of --normal; whatever else is labelled is abnormal then."""
    if squash(word) in given:
        return "normal"
    forms = {spaced(word), bare(word)[0] or spaced(word)}
    kind = next((k for k, pattern in MEANINGS.items() if any(map(pattern.fullmatch, forms))), "")
    return kind if kind == "unknown" or (kind and not given) else "abnormal"


def tokens(label: str) -> tuple[str, ...]:
    """The words of a label: one, or several joined by | , ; or written as a list."""
    return tuple(word for part in re.split(r"[|;,]", label) if (word := part.strip(" []{}()'\"")))


@lru_cache(100_000)
def judge(words: tuple[str, ...], given: frozenset[str]) -> str:
    """What words say together: a meaning, or contradictory."""
    found = {meaning(word, given) for word in words} or {"unknown"}
    if found == {"abnormal", "unknown"}:
        return "abnormal"
    return found.pop() if len(found) == 1 else "unsure" if "unsure" in found else "contradictory"


@lru_cache(100_000)
def split_of(folder: str) -> str:
    """The split that a folder's path names, the innermost part that does; "" if none does."""
    return next((split for part in reversed(folder.split("/")) if (split := bare(part)[1])), "")


def is_mask_folder(name: str) -> bool:
    """Whether a folder is called masks, ground_truth, lung masks, test_labels or the like."""
    words = [w for w in spaced(name).split() if not (FILLER.fullmatch(w) or w in SPLIT_NAMES)]
    return not {"with", "and"} & {*words} and bool(MASK_FOLDER.fullmatch(" ".join(words)))


@dataclass(slots=True)
class Said:
    """What a row of a table, or a folder, says of an image."""

    kind: str  # a meaning, contradictory, "" if nothing is said, or why it is left out
    words: tuple[str, ...]
    patient: str = ""
    view: str = ""
    split: str = ""


# From what gives way to what does not, where several things are said of an image.
STRICT = ("", *SPLITS).index  # an image of test is not trained on
KINDS = ("", "normal", "unknown", "abnormal", "unsure", "contradictory", "tables disagree")


def join(one: Said, other: Said, rows: bool) -> Said:
    """What two rows of a table say of an image, or two tables, or a table and a folder.

    By rows it is normal only if all say so, and of tables that differ none is believed."""
    kinds = {one.kind, other.kind}
    if rows and one.split != other.split:
        kinds = {"listed in two splits"}
    elif not rows and {"normal", "abnormal"} <= kinds:
        kinds = {"tables disagree"}
    elif not rows:
        kinds = kinds - {"unknown", ""} or {one.kind}
    kind = max(kinds, key=lambda k: KINDS.index(k) if k in KINDS else len(KINDS))
    return Said(kind, tuple(dict.fromkeys(one.words + other.words)), one.patient or other.patient,
                one.view or other.view, max(one.split, other.split, key=STRICT))


class Index:
    """Finds the image that a table means, with or without folder, ending, or another prefix."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names, self.by_stem = set(names), defaultdict[str, list[str]](list)
        for name in names:
            self.by_stem[self.stem(name)].append(name)

    @staticmethod
    def stem(path: str) -> str:
        """The name in a path, in lower case, without the ending of an image."""
        name = path[path.rfind("/") + 1 :].lower()
        dot = name.rfind(".")
        return name[:dot] if dot > 0 and name[dot:] in IMAGE_SUFFIXES else name

    def __contains__(self, text: str) -> bool:
        return bool(text) and self.stem(text.replace("\\", "/")) in self.by_stem

    def find(self, path: str, below: str) -> str:
        """The image, or "" if there is none, or no single one. below: the table's folder."""
        path = path.replace("\\", "/")
        candidates = self.by_stem.get(self.stem(path), [])
        if "/" in path or len(candidates) > 1:
            for name in (posixpath.join(below, path), path):
                if (name := posixpath.normpath(name)) in self.names:
                    return name
            def above(name: str) -> list[str]:
                return [part for part in folder_of(name).lower().split("/")[::-1] if part]

            found = defaultdict(list)
            for name in candidates:
                pairs = [*zip(above(path), above(name), strict=False)]
                # Another prefix is not another split: train/1.png is never test/1.png.
                if all(one == other for one, other in pairs) or (
                        len(candidates) == 1
                        and split_of(folder_of(path)) in ("", split_of(folder_of(name)))):
                    exact = name.lower().endswith(path.lower().rpartition("/")[2])
                    found[len(pairs), exact, name.startswith(f"{below}/")].append(name)
            candidates = found[max(found)] if found else []
        return candidates[0] if len(candidates) == 1 else ""


class Table:
    """A table of a set, known by what is in it: parted by commas, semicolons or tabs, or a JSON
    record a line. csv.Error or ValueError if it is none."""

    def __init__(self, name: str, text: str, images: Index, given: frozenset[str]) -> None:
        self.name, self.given, lines = name, given, re.split(r"\r\n?|\n", text)
        if lines[0].startswith("sep="):  # so Excel is told
            del lines[0]

        def parsed(separator: str, most: int | None = None) -> list[list[str]]:
            rows = csv.reader(lines, delimiter=separator, skipinitialspace=True)
            cells = ([sys.intern(cell.strip()) for cell in row] for row in rows)
            return [*itertools.islice(filter(any, cells), most)]

        def fit(separator: str) -> tuple[int, int]:
            first = parsed(separator, 50)
            return (sum(any(cell in images for cell in row) for row in first),
                    len(first[0]) if first and separator != " " else 0)

        if text.lstrip().startswith("{"):  # JSON
            records = [json.loads(line) for line in lines if line.strip()]
            header = [*dict.fromkeys(itertools.chain(*records))]
            rows = [header, *([str(record.get(name, "")) for name in header] for record in records)]
        else:
            rows = parsed(max((",", ";", "\t", "|", " "), key=fit)) or [[]]
        self.shown, self.first = rows[0], 1
        if any(cell in images and cell.lower().endswith(IMAGE_SUFFIXES) for cell in self.shown):
            self.shown, self.first = [""] * len(rows[0]), 0  # it has no header
        self.columns = [*map(squash, self.shown)]
        self.rows = [row + [""] * (len(self.columns) - len(row)) for row in rows[self.first :]]
        self.find_columns([Counter(row[i] for row in self.rows) for i in range(len(self.columns))],
                          images)

    def find_columns(self, values: list[Counter], images: Index) -> None:
        """Tell by names and values which column is what; None for what there is not."""
        every = [i for i, cells in enumerate(values) if any(cells)]
        named = {role: [i for i in every if pattern.fullmatch(self.columns[i])]
                 for role, pattern in COLUMNS.items()}
        best, self.path = 0.0, None
        for i in every:
            matched = [v for v in values[i] if v in images]
            # Bare numbers are the names of images only where nearly all of them are.
            numbers = 2 * sum(map(str.isdigit, matched)) > len(matched)
            share = len(matched) / min(len(values[i]), len(images.names))
            rank = len(matched) * (0.5 if numbers else 1)
            if (rank > best and share > (0.9 if numbers else 0.01) and i not in named["mask"]
                    and not (self.first and i in named["no path"])):
                best, self.path = rank, i
        # Words of splits alone; or two of them among others, which then are refused.
        kinds = [{SPLIT_NAMES.get(squash(v)) for v in [*cells][:99] if v} for cells in values]
        self.split = next((i for i in every if i != self.path and (
            None not in kinds[i] or len(kinds[i]) > 2 or self.columns[i] == "split")), None)
        self.role: dict[str, int | None] = {role: (found or [None])[0]
                                            for role, found in named.items()}
        self.role["mask"] = next((i for i in named["mask"] if any("." in v for v in values[i])),
                                 None)
        self.views = named["view"]
        self.sides = ("left", "top", *(("right", "bottom") if named["right"] else
                                       ("width", "height")))
        self.xrays = any(squash(v) in X_RAYS for i in named["modality"] for v in values[i])

        taken = {self.path, self.split, *named["view"], *(
            i for role, i in self.role.items() if role not in ("no label", "no path"))}
        unused = [i for i in every if i not in taken]
        free = [i for i in unused if i not in named["no label"] and not any(
            len(token) > 60 for v in values[i] for token in tokens(v))]  # sentences are no labels
        flags = [i for i in free if self.shown[i] and {*map(squash, values[i])} <= FLAGS]
        telling = [i for i in flags if meaning(self.shown[i], self.given) in ("normal", "unsure")]
        # A column with the name of a label, better one that knows normal; else the only one that
        # does.
        called = [i for name in LABELS.split() for i in free if self.columns[i] == name]
        knows = [i for i in called if any(
            judge(tokens(v), self.given) in ("normal", "unsure") for v in values[i])]
        spoken = [i for i in free if any(
            meaning(token, self.given) == "normal" and (self.given or len(squash(token)) > 5)
            for value in itertools.islice(values[i], 9999) for token in tokens(value))]
        label = (knows or (spoken if len(spoken) == 1 else called) or [None])[0]
        self.one_hot = bool(telling) and (label is None or label in telling)
        self.labels = flags if self.one_hot else [] if label is None else [label]
        self.unused = [self.shown[i] for i in unused if i not in self.labels]

    def words_of(self, cells: tuple[str, ...]) -> tuple[str, ...]:
        """What the cells of the labels say of an image, in words."""
        if not self.one_hot:
            return tokens(cells[0])
        said = {self.shown[i]: squash(cell) for i, cell in zip(self.labels, cells, strict=True)}
        words = tuple(name for name, value in said.items() if value in YES)
        if judge(words, self.given) == "normal":  # what is uncertain beside it contradicts it
            words += tuple(name for name, value in said.items() if value == "-1")
        if not words and len(said) == 1 and "" not in said.values():
            return ("abnormal",)  # a single column, called normal, says no
        return words


def listing(parts: list[str], most: int) -> str:
    """Write down the first ones of many things, and how many others there are."""
    return "; ".join(parts[:most] + [f"and {len(parts) - most:,} more"] * (len(parts) > most))


def counts(counter: Counter, most: int = 15) -> str:
    """Write down how many there are of what, the most first."""
    return listing([f"{n:,} {what}" for what, n in counter.most_common() if n], most) or "nothing"


class Unlabelled(UserError):
    """Neither a table nor a folder's name says what the images of a set are."""


class Intake:
    """Fills a source's samples, masks, boxes, facts and what is left out. UserError if nothing is
    known to be normal, or a word may mean normal or not. normal: the words of --normal. table: the
    one that was named; else all of them are looked into."""

    def __init__(self, source: Source, names: list[str], normal: str = "", table: str = "") -> None:
        self.source, self.normal, self.table = source, normal, table
        self.given = frozenset(squash(word) for word in normal.split(",")) - {""}
        self.means = partial(meaning, given=self.given)
        self.left_out, self.unused = source.left_out, Counter[str]()
        self.facts = dict.fromkeys(("words", "patients", "split", "not used"), "")
        self.found: dict[str, Said] = {}  # by images
        self.boxes: dict[str, list[Box]] = {}
        self.listed_masks: dict[str, list[str]] = {}
        self.whence = defaultdict[str, dict[str, None]](dict)  # of patients, splits ...: columns
        images, tables = self.sort_files(names)
        self.masks, self.files = self.find_masks(images), Index(images)
        self.images = [n for n in images if n not in self.masks]
        self.index = Index(self.images) if self.masks else self.files
        self.read_tables([table] if table else tables)
        self.by_folders = not any(said.kind for said in self.found.values())
        self.read_folders()
        self.finish()

    def refuse(self, text: str, kind: type[UserError] = UserError) -> NoReturn:
        """Raise a UserError that begins with the name of the set."""
        raise kind(f"--data {self.source.spec}: {text}")

    def sort_files(self, names: list[str]) -> tuple[list[str], list[str]]:
        """Tell images and tables among the files; what is neither is counted by its ending."""
        images, tables = list[str](), list[str]()
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if HIDDEN.search(name):
                self.unused["hidden files"] += 1
            elif ending in TABLE_SUFFIXES:
                tables.append(name)
            elif ending in IMAGE_SUFFIXES or (
                    ending not in OTHER_SUFFIXES and self.source.is_image(name)):
                images.append(name)
            else:
                known = re.fullmatch(r"\.\w{1,8}", ending)
                self.unused[f"files ending in {ending if known else 'nothing known'}"] += 1
        tables.sort(key=lambda n: (n.count("/"), n))
        self.unused["tables more than are looked into"] = len(tables[MOST_TABLES:])
        if not images:
            self.refuse(f"no images in it (looked for {', '.join(IMAGE_SUFFIXES)}); not used: "
                        + counts(self.unused) + next((
                            text for ending, text in INSTEAD.items()
                            if f"files ending in {ending}" in self.unused), ""))
        return images, tables[:MOST_TABLES]

    def find_masks(self, images: list[str]) -> dict[str, str]:
        """Find the masks; each with the stem of the image that it belongs to."""
        parts = {f: f.split("/") for f in map(folder_of, images)}
        # A folder that holds all images is no folder of masks, whatever it is called.
        everywhere = set.intersection(*map(set, parts.values()))
        inside = {f for f, ps in parts.items() if any(map(is_mask_folder, {*ps} - everywhere))}
        stems, masks = {name: Index.stem(name) for name in images}, {}
        known = {*stems.values()}
        for name, stem in stems.items():
            beside = MASK_FILE.fullmatch(stem)
            base = beside and (beside[1] or beside[2])
            if base in known or folder_of(name) in inside:
                masks[name] = base if base in known else stem
        return masks if len(masks) < len(images) else {}

    def read_tables(self, names: list[str]) -> None:
        """Take what the tables say that list images."""
        tables = list[Table]()
        for name in names:
            why = ""
            try:
                table = Table(name, self.source.read_text(name), self.index, self.given)
                lacks = ("path whose values are images that are there" if table.path is None else
                         "" if table.labels else "label, nor another that says which are normal")
                why = lacks and (f"no column {lacks}; its columns are: "
                                 f"{', '.join(table.shown)[:200]}")
                if table.path is not None and not re.search("(?i)submission", name):
                    tables.append(table)
            except TooLarge:
                why = "too much in it to be looked into"
            except (csv.Error, ValueError, TypeError, AttributeError) as error:
                why = f"no rows of columns ({error})"
            if self.table and why:
                self.refuse(f"{name} has {why}; {A_CSV} such as a.png,normal")
            self.unused[f"table: {name} has {why}"] += bool(why)
        # What tells normal from abnormal comes first: others add to it, or contradict it.
        for table in sorted(tables, key=lambda table: not table.labels):
            self.read_table(table)

    def read_table(self, table: Table) -> None:
        """Add what one table says of its images, in rows that may be several an image."""
        named = {SPLIT_NAMES[w] for w in spaced(Index.stem(table.name)).split() if w in SPLIT_NAMES}
        of_table = "" if {"train", "test"} <= named else max(named - {"val"} or named, default="")
        absent, here, paths = set[str](), dict[str, Said](), dict[str, str]()
        words_of, below = lru_cache(100_000)(table.words_of), folder_of(table.name)

        def cell(column: int | None) -> str:
            return "" if column is None else row[column]

        for number, row in enumerate(table.rows, 1 + table.first):
            path, split = row[table.path], cell(table.split)
            image = self.index.find(path, below)
            words = words_of(tuple(row[i] for i in table.labels)) if table.labels else ()
            if self.table and not (path and words):
                self.refuse(f"{table.name} row {number}: path or label is empty")
            if split and squash(split) not in SPLIT_NAMES:
                self.refuse(f"{table.name} row {number}: {table.shown[table.split]} {split!r} is "
                            "not one of train, val, test")
            if not image:
                absent.add(path)
                continue
            kind = judge(words, self.given) if table.labels else ""
            if re.search(r"[/\\]", path) and paths.setdefault(image, path) != path:
                kind = "listed under two names"
            elif table.xrays and squash(cell(table.role["modality"])) not in X_RAYS:
                kind = "not an X-ray"
            elif any(squash(row[i]) in SIDE_VIEWS for i in table.views):
                kind = "not a frontal view"
            patient = re.sub(r"\.0+$", "", cell(table.role["patient"]))
            nobody = MEANINGS["unknown"].fullmatch(spaced(patient))
            split = SPLIT_NAMES.get(squash(split)) or max(
                of_table, split_of(folder_of(image)), key=STRICT)
            said = Said(kind, words, "" if nobody else sys.intern(patient),
                        cell(table.role["view"]), split)
            here[image] = join(here[image], said, True) if image in here else said
            with contextlib.suppress(ValueError):  # an empty one: no lesion
                x, y, right, bottom = (float(cell(table.role[side])) for side in table.sides)
                if "width" in table.sides:
                    right, bottom = x + right, y + bottom
                # Those of the NIH are of images of 1024 x 1024 pixels.
                scale = 1024 if "bboxx" in table.columns else 1
                if not math.isnan(x + y + right + bottom):
                    self.boxes.setdefault(image, []).append(
                        (x / scale, y / scale, right / scale, bottom / scale))
            if mask := cell(table.role["mask"]):
                self.listed_masks[image] = [self.files.find(mask, below) or mask]
        if absent and self.table:
            self.refuse(f"{len(absent)} of the {len(absent) + len(here)} files that {table.name} "
                        f"lists are not there, the first is {min(absent)}; paths are relative to "
                        "it")
        self.left_out.update({"listed in a table but not there": len(absent)} if absent else {})
        for image, said in here.items():
            self.found[image] = join(self.found.get(image, said), said, False)
        for what, column in (("patients", table.role["patient"]), ("split", table.split)):
            if column is not None:
                self.whence[what][f"the column {table.shown[column]}"] = None
        if any(table.unused):
            self.unused[f"columns of {table.name}: {', '.join(filter(None, table.unused))}"] = len(
                table.unused)

    def read_folders(self) -> None:
        """Take an image's class from its folder: normal by its word, abnormal beside a normal one.
        Where tables tell the class, mark images whose folders say the opposite.

        Folders of splits, of patients, and those that only hold (images, data) count for nothing.
        """
        paths = {f: [p for p in f.split("/") if bare(p)[0] and not PERSON.fullmatch(p)
                     and (self.by_folders or len(squash(p)) > 3)]
                 for f in {*map(folder_of, self.images)}}
        everywhere = set.intersection(*({*ps[:-1]} for ps in paths.values()))  # hold all images
        paths = {f: [p for p in ps if p not in everywhere or self.means(p) == "normal"]
                 for f, ps in paths.items()}
        both, kinds = {"normal", "abnormal"}, {f: [
            kind if (kind := self.means(p)) == "normal" or says_abnormal(spaced(p)) else ""
            for p in ps] for f, ps in paths.items()}
        if not self.by_folders:
            tell = both <= set().union(*kinds.values())
            for image, said in self.found.items():
                if tell and both == {said.kind, *kinds[folder_of(image)]} - {""}:
                    said.kind = "table and folder disagree"
            return
        beside = {tuple(ps[: max(i for i, kind in enumerate(kinds[f]) if kind == "normal")])
                  for f, ps in paths.items() if "normal" in kinds[f]}
        places = dict[str, Said]()
        for folder, ps in paths.items():
            level = [i for i in range(len(ps)) if tuple(ps[:i]) in beside] or [
                i for i, kind in enumerate(kinds[folder]) if kind == "abnormal"]
            word = ps[level[-1]] if level else "".join(ps[-1:])
            kind = self.means(word)
            if any(NO_CLASS.fullmatch(bare(p)[0]) for p in ps):
                kind = f"in {folder}, which is no class"
            elif not level and kind != "unsure":
                kind = f"in {folder or 'no folder'}, neither normal nor beside a normal folder"
            elif kind == "unknown":
                kind = f"in a folder called {word}"
            elif both <= {*kinds[folder]}:
                kind = f"in {folder}, which says normal and abnormal"
            # A folder with a number, below the class or above it, is a patient's.
            rest = ps[level[-1] + 1 :] + ps[: level[-1]] if level else []
            patient = [*filter(PERSON.fullmatch, folder.split("/"))][-1:] + [
                p for p in rest if re.search(r"\d", p)]
            places[folder] = Said(kind, (word,), "".join(patient[:1]), "", split_of(folder))
        few = len({said.patient for said in places.values()}) < 5  # the parts of a set, or stages
        for said in places.values():
            if few and not PERSON.fullmatch(said.patient):
                said.patient = ""
            if said.patient:
                self.whence["patients"]["the names of folders"] = None
        for image in self.images:
            said = places[folder_of(image)]
            self.found[image] = join(self.found.get(image, said), said, False)

    def check_words(self) -> None:
        """Write down the words that were found, and what each is taken for. UserError if one of
        them must be decided on."""
        entries = [said for said in self.found.values() if said.kind in KINDS]
        if not any(self.means(word) == "normal" for said in entries for word in said.words):
            entries = [*self.found.values()]
        words = Counter(word for said in entries for word in said.words if word)
        self.facts["words"] = listing(
            [f"{word} {n:,} -> {self.means(word)}" for word, n in sorted(
                words.items(), key=lambda w: (self.means(w[0]) != "normal", -w[1]))], 40)
        why = (f"there is no {', '.join(strange)}"
               if (strange := sorted(self.given - {*map(squash, words)})) else "")
        for word in words if not why else ():
            kind, short = self.means(word), squash(word)
            if kind == "unsure":
                why = f"{word} may mean normal or not; {DECIDE}, all others then are abnormal"
            elif self.given and kind != "normal" and re.fullmatch(
                    "normals?|healthy|nofindings?", short):
                why = f"{word} means normal, too, does it not? Add it"
            elif not (self.given or self.by_folders) and re.fullmatch(r"[+-]?[\d.]+", word) and (
                    short not in ("0", "1")):
                why = f"label {word} is neither 0 (normal) nor 1 (abnormal); {DECIDE}, perhaps 0"
        if why:
            self.refuse(f"{f'--normal {self.normal}: ' * bool(self.normal)}{why}; its words: "
                        f"{self.facts['words'] or 'none'}")

    def finish(self) -> None:
        """Make the samples of what was found, and the account of it; or refuse."""
        self.check_words()
        self.name_patients()
        samples = []
        for image, said in sorted(self.found.items()):
            if said.kind in ("normal", "abnormal"):
                samples.append(Sample(image, said.patient or image, int(said.kind == "abnormal"),
                                          self.finding_of(said) if said.kind == "abnormal" else "",
                                      said.view, said.split))
            else:
                words = f": {' + '.join(sorted(said.words)[:4]) or 'no word'}"
                self.left_out[(said.kind or "in a table that does not label them")
                              + words * (said.kind in KINDS[1:])] += 1
        if self.table:  # what it does not list was not meant
            self.images = [*self.found]
        elif len(self.images) > len(self.found):
            self.left_out["not listed in a table"] = len(self.images) - len(self.found)
        some = any(s.label == NORMAL for s in samples)
        samples = self.source.samples = self.drop_copies(samples)
        if not any(s.label == NORMAL for s in samples):
            remedy = f"{DECIDE}; or {A_CSV} such as {[*self.images, 'a.png'][0]},normal"
            self.refuse(f"none of its {len(self.images)} images is known to be normal; its words: "
                        f"{self.facts['words'] or 'none'}; "
                        f"{'was their conversion right?' if some else remedy} "
                        f"(not used: {counts(self.unused)}; left out: {counts(self.left_out, 4)})",
                        UserError if self.facts["words"] else Unlabelled)
        self.pair_masks({s.key: s.label for s in samples})
        self.account(samples)

    def name_patients(self) -> None:
        """Say whence the patients are known: column, folder, or else the names of all files."""
        nobody = [image for image, said in self.found.items() if not said.patient]
        self.facts["patients"] = f"from {' and '.join(self.whence['patients'])}" + (
            f"; {len(nobody):,} images name nobody, and count as a patient each" if nobody else "")
        if len(nobody) == len(self.found):
            self.facts["patients"] = "not named: every image counts as a patient"
            for rule in NAME_RULES:
                if nobody and all(map(rule.search, nobody)):
                    self.facts["patients"] = "from the names of files"
                    for image in nobody:
                        self.found[image].patient = rule.search(image)[1]

    def finding_of(self, said: Said) -> str:
        """The kind of abnormality in words."""
        words = [word for word in said.words if self.means(word) == "abnormal"]
        finding = "|".join([w for w in words if not says_abnormal(spaced(w))] or words)
        return finding.lower() if self.by_folders else finding

    def drop_copies(self, samples: list[Sample]) -> list[Sample]:
        """Keep one of identical files, in test if one is there; none if their labels contradict.
        Those of one named patient, or of a prescribed test split, that lie in one folder stay.
        Only files of equal size, alike at a glance, are read."""
        alike = {0: samples}
        for mark in (self.source.file_bytes, self.source.glance, self.source.digest):
            found = defaultdict[Any, list[Sample]](list)
            for before, group in alike.items():
                for s in group:
                    with contextlib.suppress(OSError, BadImage):
                        found[before, mark(s)].append(s)
            alike = {key: group for key, group in found.items() if len(group) > 1 and key[1] != 0}
        gone = dict[str, str]()
        for group in alike.values():
            best = min(group, key=lambda s: (-STRICT(s.split), s.key.count("/"), s.key))
            for s in group:
                if len({other.label for other in group}) > 1:
                    gone[s.key] = "identical, with labels that contradict"
                elif s is not best and not (
                        (folder_of(s.key), s.split) == (folder_of(best.key), best.split)
                        and s.patient != s.key
                        and (s.patient == best.patient or s.split == "test")):
                    gone[s.key] = "identical to another image"
        self.left_out.update(gone.values())
        return [s for s in samples if s.key not in gone]

    def pair_masks(self, label: dict[str, int]) -> None:
        """Give abnormal images the masks of their lesions. Those that normal images have, too, are
        of organs, unless these are black."""
        normals, masks = [], defaultdict[str, list[str]](list)
        for mask, stem in self.masks.items():
            place = {*folder_of(mask).split("/")}
            shared = {image: len(place & {*folder_of(image).split("/")})
                      for image in self.index.by_stem.get(stem, ()) if image in label}
            near = [image for image, n in shared.items() if n == max(shared.values())]
            ill = [image for image in near if label[image] == ABNORMAL]
            if len(ill) == 1:
                masks[ill[0]].append(mask)
            elif near and not ill:
                normals.append(mask)
        if self.masks:
            self.facts["masks"] = (f"{len(self.masks):,} files, no images; "
                                   f"{sum(map(len, masks.values())):,} pair with abnormal images")
        if not all(map(self.source.is_black, normals[:: len(normals) // 5 + 1])):
            self.facts["masks"] += f"; normal images have them, too ({len(normals):,}): no lesions"
            masks.clear()
        self.source.masks = masks | {k: v for k, v in self.listed_masks.items() if k in label}
        if gone := {m for v in self.listed_masks.values() for m in v} - self.files.names:
            self.refuse(f"{len(gone)} masks that {self.table or 'a table'} lists are not there, "
                        f"the first is {min(gone)}")

    def account(self, samples: list[Sample]) -> None:
        """Write down what was found and used, and of what one must be careful."""
        source, facts = self.source, self.facts
        source.boxes = {s.key: self.boxes[s.key] for s in samples if s.key in self.boxes}
        used = {s.split for s in samples} - {""}
        facts["split"] = "none prescribed" if used <= {"train"} else (
            f"{', '.join(s for s in SPLITS if s in used)}: prescribed by "
            + " and ".join(self.whence["split"] or ["the names of tables and folders"]))
        facts["boxes"] = f"{len(source.boxes):,} images" if source.boxes else ""
        facts["not used"] = counts(self.unused) if any(self.unused.values()) else ""
        missing, careful = len(self.images) - len(samples), []
        if missing > len(self.images) / 10:
            careful.append(f"{missing:,} of the {len(self.images):,} images are not used; see why "
                           "above")
        seen = {split_of(folder_of(n)) for n in self.images} | {
            said.split for said in self.found.values()}
        careful += [f"no image of the {s} split can be used" for s in SPLITS if s in seen - used]
        if not any(s.label for s in samples):
            careful.append("no abnormal image can be used: there will be no AUROC" + (
                "; do normal and abnormal images come from two places?" if missing else ""))
        source.careful, source.facts = careful, {k: v for k, v in facts.items() if v}
        source.title = f"images {'in folders' if self.by_folders else 'listed in tables'}"


class FolderSource(Source):
    """Images in a folder, or those that a table lists, as `Intake` understands them."""

    looked_at = 1000  # their pixels are read of few

    def __init__(self, spec: str, normal: str = "") -> None:
        path = Path(os.path.expanduser(spec))
        if not (path.is_dir() or (path.is_file() and path.suffix.lower() in TABLE_SUFFIXES)):
            there = "no folder or table" if path.exists() else "nothing"
            raise UserError(f"--data {spec}: there is {there} at {path.resolve()}; give a folder, "
                            "a CSV, kaggle:owner/name, or synthetic; unpack an archive first, and "
                            "give a single image to evaluate.py with --image")
        if all(map(os.path.isfile, (path / "train.py", path / "evaluate.py"))):
            raise UserError(f"--data {spec}: this is the program's own folder; put the images "
                            "into one of their own, and name that")
        self.root, table = (path, "") if path.is_dir() else (path.parent, path.name)
        name = path.stem if table else path.resolve().name
        self.spec, self.name = spec, re.sub(r"[^\w.-]+", "_", name) or "folder"
        self.left_out = Counter()
        names = self._list_files()
        if table:  # it may list what lies elsewhere
            listed = re.findall(r"(?:\.\./|[A-Z]:|/)[^,;\t|\"\n]*\.\w{3,5}", self.read_text(table))
            names = sorted({*names, *(os.path.normpath(n).replace(os.sep, "/") for n in listed
                                      if (self.root / n).is_file())})
        Intake(self, names, normal, table)
        self.title += f" in {self.root.resolve()}"

    def _list_files(self) -> list[str]:
        """List all files below the folder, sorted, but those of runs and in hidden folders."""
        def refuse(e: OSError) -> None:
            raise UserError(f"--data {self.spec}: {e.filename} cannot be read ({e.strerror})")

        names = list[str]()
        known: dict[str, str] = {}  # a link may lead to a folder that was there already
        for folder, folders, files in os.walk(self.root, onerror=refuse, followlinks=True):
            real, inside = os.path.realpath(folder), Path(folder).relative_to(self.root).as_posix()
            is_run = inside != "." and ({"last.pt", "split.csv"} <= {*files}
                                        or "comparison.html" in files)
            if real in known or is_run:  # runs of this program have pictures, too
                self.left_out["folder of a run of this program" if is_run else
                              f"link, {inside}, to {known[real]}, which was read already"] += 1
                folders.clear()
                continue
            known[real] = inside
            folders[:] = sorted(d for d in folders if not d.startswith("."))
            for file in files:
                name = file if inside == "." else f"{inside}/{file}"
                if not is_text(name):
                    self.left_out["with a name that is not UTF-8"] += 1
                elif os.path.isfile(os.path.join(folder, file)):
                    names.append(name)
                else:  # a pipe would be waited for
                    self.left_out["links to nothing, pipes or devices"] += 1
        return sorted(names)

    def open_file(self, name: str) -> BinaryIO:
        return open(os.path.join(self.root, name), "rb")  # joined faster than by pathlib

    def file_bytes(self, sample: Sample) -> int:
        try:
            return os.stat(os.path.join(self.root, sample.key)).st_size
        except OSError:  # a dangling link: found unreadable later on
            return 0

    def glance(self, sample: Sample) -> bytes:
        with self.open_file(sample.key) as file:  # the middle: borders are often black
            file.seek(self.file_bytes(sample) // 2)
            return file.read(1024)

    def digest(self, sample: Sample) -> int:
        if not self.is_image(sample.key):
            raise OSError("an error page, perhaps, and no image that is there twice")
        crc = 0
        with self.open_file(sample.key) as file:  # a piece at a time: it may be large
            while piece := file.read(CHUNK):
                crc = zlib.crc32(piece, crc)
        return crc


def is_text(name: str) -> bool:
    """Whether a file's name can be written to a table: in old archives some cannot."""
    return name.encode(errors="ignore").decode() == name


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
                while count := response.raw.readinto(into[done : done + CHUNK]):
                    done += count
                    self.traffic["bytes"] += count
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

    def __init__(self, remote: RemoteArchive, normal: str = "") -> None:
        self.remote, self.spec, self.left_out = remote, remote.spec, Counter()
        self.members: dict[str, bytes] = {}
        self.endings: dict[str, bool] = {}  # that say nothing -> whether they are images
        self.list_members()
        Intake(self, sorted(self.members), normal)
        self.name, self.version = re.sub(r"[^\w.-]+", "_", remote.name), remote.etag
        self.title += f", Kaggle data set {remote.owner}/{remote.name}" + (
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

    def is_image(self, name: str) -> bool:
        ending = os.path.splitext(name)[1]
        if ending[1:].isdigit():  # the last number of a name such as 1.2.840
            ending = ""
        if ending not in self.endings:  # one of each is looked into, as it costs a request
            self.endings[ending] = self.member(name).size <= LARGEST_FILE and super().is_image(name)
        return self.endings[ending]

    def member(self, name: str) -> Member:
        """Look up where a file lies. KeyError."""
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
    """A Kaggle data set whose archive is not given in parts: a call of the API for each file."""

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

    A prescribed test split is kept, and so is a validation split beside it with at least 20
    normals, or alone with 50; a smaller one is left out, or without a test split dissolved.
    Otherwise test takes 20 % of the normals and every patient who has no normal image, and
    validation 10 % of the remaining normals. Abnormal images of patients who are not in train go
    to validation. train_limit: the most training images; validation normals then are at most a
    quarter, or 100.
    """
    notes = []
    test = [s for s in samples if s.split == "test"]
    rest = _without([s for s in samples if s.split != "test"], test)
    if lost := len(samples) - len(test) - len(rest):
        notes.append(f"{lost} images left out of training and validation: their patients are in "
                     "test")
    val, enough = [s for s in rest if s.split == "val"], MIN_VALIDATION if test else MIN_NORMALS
    if val and len(_normals(val)) < enough:
        notes.append(f"prescribed validation split of {len(val)} images is too small (fewer than "
                     f"{enough} normals): " + ("unused" if test else "split anew with all others"))
        rest, val = [replace(s, split="") for s in rest
                     if not test or s.split != "val"], []
    if not test:
        free = _without(rest, val)
        test = _without(free, _normals(free))
        mixed = _without(free, test)
        test = test + _first(mixed, round(0.2 * len(_normals(mixed))), "patient")
        rest = _without(rest, test)

    normals = [s for s in _normals(rest) if s.split != "val"]
    if not val:
        want = max(round(0.1 * len(normals)), min(20, len(normals) // 4))
        val = _first(normals, want, "patient")
    train = _without(normals, val)
    if train_limit is not None:
        if train_limit > len(train):
            notes.append(f"--samples {train_limit}: there are only {len(train)} to train on")
        train = _first(train, train_limit, "key")
        val = [s for s in val if s.label == ABNORMAL] + _first(
            _normals(val), max(100, train_limit // 4), "key")
    val += [s for s in _without(rest, train) if s.label == ABNORMAL and s.split != "val"]
    used = {s.key for part in (train, val, test) for s in part}
    if spare := Counter(s.label for s in samples if s.key not in used):
        notes.append(f"{spare[NORMAL]:,} normal and {spare[ABNORMAL]:,} abnormal images are in no "
                     "split, because of their patients, --samples, or what is prescribed")
    for one, other in ((train, val), (train, test), (val, test)):
        assert len(_without(one, other)) == len(one), "a patient is in two splits"
    assert len(_normals(train)) == len(train), "abnormal image in train"
    return Splits(train, sorted(val, key=lambda s: s.key), test, notes)


def write_splits(splits: Splits, file: Path) -> None:
    """Write split.csv: one row an image, the split in the last column."""
    rows = [(s.key, s.patient, s.label, s.finding, s.view, name)
            for name in SPLITS for s in getattr(splits, name)]
    temporary = file.with_suffix(".tmp")  # half a table would be read as a smaller data set
    with open(temporary, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([SAMPLE_COLUMNS, *rows])
    os.replace(temporary, file)


def read_splits(file: Path) -> Splits:
    """Read what write_splits wrote."""
    parts: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    try:
        with open(file, newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                key, patient, label, finding, view, split = (row[c] for c in SAMPLE_COLUMNS)
                parts[split].append(Sample(key, patient, int(label), finding, view, split))
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file}: not a readable table of splits ({error})") from None
    return Splits(**parts, notes=[])


def split_for_training(source: Source, config: Config) -> Splits:
    """split_samples for the configuration; UserError if there are too few normals to learn from."""
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
    if len({s.label for s in splits.test}) == 1:
        only = "normal" if splits.test[0].label == NORMAL else "abnormal"
        splits.notes.append(f"all images of the test split are {only}: no AUROC can be given")
    return splits


def flow(source: Source) -> list[tuple[str, str]]:
    """What was found in a source, what it was taken for, and what was left out and why."""
    return [*source.facts.items()] + [("left out", counts(source.left_out))] * bool(source.left_out)


def describe(source: Source, splits: Splits) -> str:
    """The table of the data that is printed before anything is done with it."""
    lines = [f"data      {source.title}",
             f"  {'split':<6}{'normal':>9}{'abnormal':>10}{'patients':>10}"]
    for name in SPLITS:
        part, normals = getattr(splits, name), len(splits.normals(name))
        lines.append(f"  {name:<6}{normals:>9,}{len(part) - normals:>10,}"
                     f"{len({s.patient for s in part}):>10,}")
    if found := Counter(s.finding or "unnamed" for s in splits.test if s.label == ABNORMAL):
        shown = listing([f"{k} {v:,}" for k, v in found.most_common()], 6)
        lines.append(f"  findings in test: {shown}")
    if isinstance(source, KaggleSource):  # there a look would cost a request each
        total = sum(source.file_bytes(s) for s in splits.train) / 1e6
        lines.append(f"  training images: {total:,.1f} MB, streamed; nothing is stored on disk")
    lines += [f"  {name}: {text}" for name, text in flow(source)]
    lines += [f"  note: {note}" for note in splits.notes]
    lines += [f"careful   {text}" for text in source.careful]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Decoding

class BadImage(Exception):
    """These bytes are no image that can be used; the message says why."""


# What Pillow raises on damaged files, and on what has too many pixels.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError,
          struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning)
Hold = Callable[[int], contextlib.AbstractContextManager]  # so many bytes, while inside


def decode_image(data: bytes, size: int, hold: Hold = contextlib.nullcontext,
                 bits: int = 0) -> np.ndarray:
    """Decode an image file's bytes to grey values, uint8 [size,size].

    The whole image is stretched to the square. Colour becomes luma (ITU-R 601), transparency is
    ignored, EXIF orientation is applied. 16-bit grey is scaled from 0..2**bits-1; if bits is 0,
    from 0-65535, or from 0-4095 if no value is larger. DICOM has rescale and window applied, is
    inverted if MONOCHROME1, and stretched to the full range, its padding aside. Of several pages
    the first is taken. A JPEG is decoded at a fraction of its size that leaves twice `size`.
    hold: entered with the bytes that the pixels take at most, while they do. Raises BadImage.
    """
    if data[128:132] == b"DICM":
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
                low, high = values.min(), values.max()
                if low < 0 or high > 65535:
                    raise BadImage(f"grey values from {low:.0f} to {high:.0f}, signed or of more "
                                   "than 16 bits; save them as 8 or 16 bits, by one rule for all")
                values *= np.float32(255 / (2**bits - 1 if bits else
                                            4095 if high <= 4095 else 65535))
                return _stretch(Image.fromarray(values), size)
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA")
            # Not pasted on a background: what a viewer shows of an X-ray is its colour.
            return _stretch(image if image.mode == "L" else image.convert("L"), size)
    except UnidentifiedImageError:
        raise BadImage("no image of a known format" if data else "an empty file") from None
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
    if b"1.2.840.10008.1.2.1.99" in data:  # one that is deflated as a whole
        raise BadImage("deflated DICOM, which may unpack to any size; save it in another form")
    try:
        head = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        _check_pixels(head.Columns, head.Rows)
        planes = int(head.get("NumberOfFrames") or 1) * int(head.get("SamplesPerPixel") or 1)
        # There may be more of them than the header says.
        pixels = max(head.Rows * head.Columns * planes, 8 * len(data) // head.BitsAllocated)
        with hold(24 * pixels):  # float64 on the way
            dicom = pydicom.dcmread(io.BytesIO(data))
            raw, padding = dicom.pixel_array, dicom.get("PixelPaddingValue")
            values = apply_voi_lut(apply_modality_lut(raw, dicom), dicom)
            kind = dicom.PhotometricInterpretation
            if values.ndim != 2 or kind not in ("MONOCHROME1", "MONOCHROME2"):
                raise BadImage(f"DICOM with {kind} pixels in {values.ndim} dimensions, not a "
                               "single grey image")
            values = values.astype(np.float32)
            seen = np.full(raw.shape, True)
            if padding is not None:
                ends = sorted((padding, dicom.get("PixelPaddingRangeLimit", padding)))
                seen = (raw < ends[0]) | (raw > ends[1])
            low, high = (values[seen].min(), values[seen].max()) if seen.any() else (0, 0)
            values = (values - low).clip(0) * (255 / max(high - low, 1e-6))
            values = (255 - values if kind == "MONOCHROME1" else values) * seen
            return _stretch(Image.fromarray(values), size)
    except BadImage:
        raise
    except Exception as error:  # pydicom answers damage with nearly every kind of error
        raise BadImage(f"DICOM: {' '.join(str(error).split())}") from None


# ----------------------------------------------------------------------------------------------
# Memory

class Cancelled(Exception):
    """The iteration that this work was for has ended."""


class Memory:
    """The bytes that images may take in all streams that share it: an eighth files in flight, a
    quarter pixels being decoded, the rest decoded images, of which each stream sets a fixed part
    aside when it is made. Safe among threads."""

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
    """Let all threads take memory from one heap that keeps what is freed (Linux with glibc). Else
    8 threads keep 8 heaps, of four times the bytes that are counted, and large arrays are asked of
    the kernel anew and zeroed: on a CPU a tenth to a third of a training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
        for setting, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, -1)):
            libc.mallopt(setting, value)


# ----------------------------------------------------------------------------------------------
# The stream

def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch: a permutation of range(count), int64, of its arguments alone. Groups of
    16 neighbours are shuffled, then single images within windows of 512, so that neighbours in the
    source are still wanted at about the same time."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    groups = rng.permutation(math.ceil(count / SHUFFLE_GROUP))
    order = (groups[:, None] * SHUFFLE_GROUP + np.arange(SHUFFLE_GROUP)).ravel()
    order = order[order < count]
    for start in range(0, count, SHUFFLE_WINDOW):
        rng.shuffle(order[start : start + SHUFFLE_WINDOW])
    return order


Batches = Generator[tuple[Tensor, Tensor], None, None]


class ImageStream(IterableDataset):
    """Iterates over batches (images uint8 [B,1,H,W], positions in `samples` int64 [B]).

    With a seed the order is `epoch_order(len, seed, epoch)` and an incomplete last batch is
    dropped; without one it is the order of `samples`, and complete. Rank r of `world` gets the r-th
    of as many slices of each batch (perhaps an empty one). One iteration at a time stays within
    `memory` (bytes, or a Memory that streams share: at most `share` of what is left for images). If
    `cache`, as many of the first of `samples` as fit are cached for later epochs.

    Unreadable images are skipped, and named in `bad` with the reason. More than 5 % of them (and
    more than one) end the run with a UserError if `stop_on_bad`.
    """

    def __init__(self, source: Source, samples: list[Sample], image_size: int, batch_size: int,
                 seed: int | None = None, memory: Memory | int = 4 << 30, share: float = 1.0,
                 cache: bool = True, rank: int = 0, world: int = 1,
                 stop_on_bad: bool = True, bits: int = 0) -> None:
        self.source, self.samples, self.image_size = source, samples, image_size
        self.memory = memory = Memory(memory) if isinstance(memory, int) else memory
        self.seed, self.rank, self.world, self.stop_on_bad = seed, rank, world, stop_on_bad
        self.bits = bits  # of the values of 16-bit images; 0 if each decides
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
        with contextlib.closing(self._load(batches)) as loaded:
            for number, batch in zip(numbers, loaded, strict=True):
                if self.stop_on_bad and len(self.bad) > max(1, MAX_BAD_SHARE * n / self.world):
                    key, reason = list(self.bad.items())[-1]
                    raise UserError(
                        f"--data {self.source.spec}: {len(self.bad)} of {n} images cannot be read, "
                        f"more than {MAX_BAD_SHARE:.0%}; the last is {key}: {reason}. Replace or "
                        "remove them, or raise --memory-limit-gb if that is the reason")
                self.next_batch = number + 1
                if len(batch[0]) or self.world > 1:  # where every batch is counted on
                    yield batch

    def every(self, step: int, size: int) -> Iterator[Tensor]:
        """Iterate over every step-th of `samples`, `size` at a time, uint8 [size,1,H,W]; whole for
        every rank. Shares the cache."""
        positions = np.arange(0, len(self.samples), step)
        for images, _ in self._load(np.split(positions, range(size, len(positions), size))):
            if len(images):
                yield images

    def _groups(self, batches: list[np.ndarray]) -> Iterator[list[int]]:
        """Yield the positions that must be read, in the order in which they are wanted, but those
        of one block together that are wanted within `_span` images."""
        wanted = [i for batch in batches for i in batch.tolist()
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
                            decode_image(data, self.image_size, hold, self.bits))
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
    splits = split_for_training(source, config)
    # Ranks on one machine share its memory. Test images are seen once: they need not be cached.
    memory = Memory(config.memory_bytes // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    make = partial(ImageStream, source, image_size=config.image_size,
                   batch_size=config.batch_size, memory=memory,
                   bits=config.grey_bits or source.grey_bits())
    test = make(splits.test, share=1 / 4, cache=False)
    val = make(splits.normals("val"), share=1 / 3, rank=rank, world=world)
    train = make(splits.train, seed=config.seed, rank=rank, world=world)
    return Loaders(train, val, test, source, splits)


def describe_memory(loaders: Loaders) -> str:
    """Tell in one line the bound on what the streams hold, and how many images they cache."""
    train, val = loaders[:2]
    return (f"memory    images never take more than {train.memory.limit / 2**30:,.3g} GB; "
            f"{train.cached + val.cached:,} of the {len(train.samples) + len(val.samples):,} "
            "training and validation images fit into the cache")
