"""Measure the product against the loops that one would otherwise write, here and now, in turn.

    make bench                               all of it; about ten minutes on two cores
    python tests/bench.py --only step data   a part of it
    python tests/bench.py --quick            in miniature: its figures mean nothing

Prints a row for each figure and writes bench.json. Whatever is measured runs in processes of its
own, which this one starts and asks; two that are compared take turns.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import reference
import torch
from kaggle_stand_in import Archive, StandIn
from PIL import Image
from torch import Tensor

import train
from config import Config
from data import NORMAL, ImageStream, Sample, Source, create_dataloaders, draw_phantom, open_source
from models import (
    READ_AT_ONCE, Draws, Setup, choose_precision, create_model, score_images, seeded, to_float)

SCRATCH = ROOT / "build" / "bench"
CPU = torch.device("cpu")
MODELS = {"unet": "U-Net", "reversed_ae": "Reversed AE"}
ENOUGH = 12  # seconds of turns, after which no further one begins
TINY = {"width": 2, "image_size": 32, "latent_dim": 8}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured."""

    quick: bool = False  # in this process, where nothing has to be started
    sizes: dict = dataclasses.field(default_factory=dict)  # of the networks: those of Config
    batch: int = 32  # and the default, 8, before it
    rounds: int = 2
    curve_sizes: dict = dataclasses.field(default_factory=lambda: {
        "width": 8, "image_size": 64, "latent_dim": 64})
    curve_steps: int = 96
    files: int = 300  # all different: what is there twice is read once
    side: int = 1024
    small_images: int = 10_000
    scored: int = 24

    def config(self, **settings: object) -> Config:
        return Config(**({"device": "cpu", "epochs": 1, "augment": True} | self.sizes | settings))


QUICK = Scale(True, TINY, 4, 1, TINY, 12, 50, 64, 96, 16)


@dataclasses.dataclass
class Row:
    """One figure, what it is held against, and what was aimed at: a bound on the figure, as in
    "<= 3", or on its ratio to the other, as in "ratio >= 1"."""

    name: str
    what: str
    ours: float | None
    theirs: float | None = None
    against: str = ""  # what `theirs` is
    target: str = ""
    ratio: float | None = None
    reached: bool | None = None

    def __post_init__(self) -> None:
        if self.ours is not None and self.theirs:
            self.ratio = self.ours / self.theirs
        value = self.ratio if self.target.startswith("ratio") else self.ours
        if self.target and value is not None and math.isfinite(value):
            *_, sign, bound = self.target.replace(",", "").split()
            self.reached = value >= float(bound) if sign == ">=" else value <= float(bound)

    def __str__(self) -> str:
        return (f"{self.what:<56}{short(self.ours):>9}{short(self.theirs):>9}"
                f"{short(self.ratio):>8}  {self.target or '-':<15}"
                f"{ {True: 'yes', False: 'NO', None: '-'}[self.reached]:<9}{self.against}")


HEADER = f"{'':<56}{'ours':>9}{'theirs':>9}{'ratio':>8}  {'target':<15}{'reached':<9}theirs is"


def short(x: float | None) -> str:
    """Three digits."""
    return "-" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


# ----------------------------------------------------------------------------------------------
# Processes. A kind of work is a function of its settings, which gives the function that answers
# requests.

Answer = Callable[..., dict]
HERE: dict[str, Answer] = {}  # kinds of work that this process does


@contextlib.contextmanager
def worker(scale: Scale, kind: Callable[..., Answer], passive: bool = True,
           **settings: object) -> Iterator[Answer]:
    """A process that does one kind of work; gives the function that asks it.

    passive: whether its threads wait as those of train.py and evaluate.py do.
    """
    name = f"{kind.__name__} {settings}"
    with contextlib.ExitStack() as inside:
        pool = None if scale.quick else inside.enter_context(
            ProcessPoolExecutor(1, get_context("spawn")))

        def do(function: Callable, *arguments: object) -> Any:
            return pool.submit(function, *arguments).result() if pool else function(*arguments)

        with mock.patch.dict(os.environ, {"OMP_WAIT_POLICY": "PASSIVE"} if passive else {}):
            do(begin, name, kind, settings)
        yield lambda **request: do(ask, name, request)


def begin(name: str, kind: Callable[..., Answer], settings: dict) -> None:
    HERE[name] = kind(**settings)


def ask(name: str, request: dict) -> dict:
    """The answer. What the product prints meanwhile is not shown."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        return HERE[name](**request)


def in_turn(workers: list[Answer], rounds: int, **request: object) -> list[list[dict]]:
    """Each worker's answers to the request, asked in turn. What takes long is asked less often:
    noise is short beside it."""
    began, answers = time.monotonic(), []
    while len(answers) < rounds and (not answers or time.monotonic() - began < ENOUGH):
        answers.append([ask(**request) for ask in workers])
    return [list(a) for a in zip(*answers, strict=True)]


def rate(answers: list[dict], key: str = "rate") -> float:
    return statistics.median(a[key] for a in answers)


# ----------------------------------------------------------------------------------------------
# Kinds of work


def phantoms(count: int, size: int) -> Tensor:
    """Normal phantoms, uint8 [count,1,size,size]."""
    return torch.from_numpy(np.stack([draw_phantom(i, size)[0] for i in range(count)]))[:, None]


def setup_of(config: Config) -> Setup:
    """The Setup that train.py chooses."""
    device = torch.device(config.device)
    return Setup(device, choose_precision(config.precision, device)[0])


def our_training(config: Config, large: int = train.LARGE_MATRIX) -> Answer:
    """Training steps as train.py takes them. large: numbers of a matrix that counts as large."""
    train.LARGE_MATRIX, setup = large, setup_of(config)
    state = train.new_state(config, setup)
    state.model.train()

    def step(images: Tensor) -> float:
        loss, _ = train.train_step(state, images, len(images))
        state.step += 1
        return loss

    return stepping(step, config)


def plain_training(config: Config, weights: int | None = None) -> Answer:
    """The loop of reference.py, with the same corruptions of the same images. weights: a seed for
    those that it begins with; those of `our_training` have 0."""
    network = reference.plain_model(config)
    if weights is not None:  # otherwise it is not worth making them twice
        torch.manual_seed(weights)
        network.load_state_dict(create_model(config.model, config).state_dict())
    step = reference.plain_training(network, torch.device(config.device), lambda number, count:
                                    Draws(seeded(config.seed, "step", number), count))
    return stepping(step, config)


def stepping(step: Callable[[Tensor], float], config: Config) -> Answer:
    """Answers with images a second, losses and peak memory so far of so many steps of whole
    batches, or of their first images alone."""
    images, cuda = phantoms(8 * config.batch_size, config.image_size), config.device == "cuda"
    following = itertools.cycle(images.split(config.batch_size))

    def answer(steps: int, batch: int | None = None) -> dict:
        batches = [next(following)[:batch] for _ in range(steps)]
        began = time.perf_counter()
        losses = [step(x) for x in batches]
        if cuda:
            torch.cuda.synchronize()
        return {"rate": sum(map(len, batches)) / (time.perf_counter() - began), "losses": losses,
                "memory": torch.cuda.max_memory_allocated() if cuda else memory("VmHWM:")}
    return answer


def memory(*kinds: str) -> float:
    """Bytes of memory of this process, of kinds that Linux tells apart; elsewhere not a number."""
    file = Path("/proc/self/status")
    return sum(int(line.split()[1]) << 10 for line in file.read_text().splitlines()
               if line.startswith(kinds)) if file.exists() else math.nan


def watched(passing: Callable[..., int], apart: float = 0) -> Answer:
    """Answers with images a second of what counts them, and the most bytes of memory meanwhile,
    without the code of libraries and what is set apart."""
    def answer(**request: object) -> dict:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux measures the peak from here on
        began = time.perf_counter()
        count = passing(**request)
        return {"rate": count / (time.perf_counter() - began),
                "memory": memory("VmHWM:") - memory("RssFile:") - apart}
    return answer


def epoch(stream: ImageStream) -> int:
    """Take the next epoch's images to where a training step is; how many they are."""
    stream.set_epoch(stream.epoch + 1)
    return sum(len(to_float(x, CPU)) for x, _ in stream)


def our_folder(config: Config, env: dict[str, str] | None = None) -> Answer:
    """First epochs of the config's data, of which nothing is kept. env: for Kaggle's client."""
    def passing() -> int:
        with mock.patch.dict(os.environ, env or {}):
            source = open_source(config)
            return epoch(ImageStream(source, source.samples, config.image_size, 32, seed=0,
                                     cache=False))
    return watched(passing, apart=memory("RssAnon:"))


def their_folder(config: Config) -> Answer:
    """The same with torchvision. Its workers are forked, as in a program of its own on Linux: this
    process was spawned, and spawned workers would import PyTorch within what is timed."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    road = transforms.Compose([transforms.Grayscale(), transforms.Resize((config.image_size,) * 2),
                               transforms.ToTensor()])
    return watched(lambda: sum(len(x) for x, _ in DataLoader(
        datasets.ImageFolder(config.data, road), 32, shuffle=True, num_workers=2,
        multiprocessing_context="fork")))


def small_images(config: Config, count: int) -> Answer:
    """Epochs of a virtual archive of small images, of which 64 exist; all are kept."""
    size = config.image_size
    head = b"P5 %d %d 255\n" % (size, size)
    files = [head + image.numpy().tobytes() for image in phantoms(64, size)]

    class Images(Source):
        spec, name, title, left_out = "images", "images", "images", Counter()

        def read_file(self, name: str) -> bytes:
            return files[int(name) % len(files)]

    samples = [Sample(name, name, NORMAL) for name in map("{:08d}".format, range(count))]
    (source := Images()).samples = samples
    stream = ImageStream(source, samples, size, 32, seed=0)
    return watched(lambda: epoch(stream))


def scoring_and_forward(config: Config, images: int) -> Answer:
    """evaluate.py's scoring of an untrained run on the phantom, and the bare forward pass."""
    setup = setup_of(config)
    network = train.new_state(config, setup).model.eval()
    loaders = create_dataloaders(config)
    # What it refers to is of no moment: a few images.
    config = dataclasses.replace(config, reader_steps=1)
    scorer = train.calibrate(network, loaders._replace(val=loaders.train), config, setup,
                             ("reader",))
    phantom = phantoms(images, config.image_size)

    def scoring() -> int:
        return len(score_images(network, scorer, phantom, setup)[0].images)

    @torch.no_grad()  # in inference mode autocast would cast the weights each time
    def forward() -> int:
        with setup.autocast():
            for x in phantom.split(READ_AT_ONCE):
                network.reconstructions(to_float(x, CPU))
        return images

    forward()  # which the calibration has not warmed up
    return lambda: {part.__name__: watched(part)()["rate"] for part in (scoring, forward)}


def first_step(config: Config) -> Answer:
    """`python train.py` to the end of its first step; answers with when that was."""
    def one_step(*arguments: object, real: Callable = train.train_step) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    def answer() -> dict:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt), \
                mock.patch.object(train, "train_step", one_step):
            train.train(dataclasses.replace(config, output_dir=folder))
        return {"at": time.time()}
    return answer


def image_folder(scale: Scale, suffix: str) -> Path:
    """A folder of different JPEGs or PNGs; made only once."""
    folder = SCRATCH / f"{suffix}-{scale.files}x{scale.side}"
    begun = folder.with_suffix(".begun")
    if folder.is_dir():
        return folder
    (begun / "normal").mkdir(parents=True, exist_ok=True)
    for i in range(scale.files):
        image = Image.fromarray(draw_phantom(i // 50, scale.side)[0]).rotate(i % 50)
        image.save(begun / "normal" / f"{i:03d}.{suffix}", quality=90)
    return begun.rename(folder)


def this_machine() -> dict:
    """What is of moment for the figures."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""  # only Linux has it
    name = re.search(r"model name\s*: (.*)", text)
    flags = {"amx_bf16", "avx512_bf16", "avx512f", "avx2"} & set(text.split())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": name[1] if name else platform.processor(), "cores": os.cpu_count(),
            "flags": sorted(flags), "torch": str(torch.__version__),
            "precision": choose_precision("auto", CPU)[0]} | gpu


# ----------------------------------------------------------------------------------------------
# The rows.


def step(scale: Scale, known: dict) -> Iterator[Row]:
    """Training steps, and the memory that they take."""
    precisions = dict.fromkeys(("fp32", known["precision"]))
    for model, precision in itertools.product(MODELS, precisions):
        # Without matrix units the products themselves are not five times as fast in bf16.
        fast = precision == "bf16" and "amx_bf16" in known["flags"]
        config = scale.config(model=model, batch_size=scale.batch, precision=precision)
        with worker(scale, our_training, config=config) as ours, \
                worker(scale, plain_training, passive=False, config=config) as theirs:
            in_turn([ours, theirs], 1, steps=1, batch=8)  # to warm up
            for batch, bound in ((8, 1), (scale.batch, 5 if fast else 1)):
                a, b = in_turn([ours, theirs], 2 * scale.rounds, steps=1, batch=batch)
                yield Row(f"step.{model}.{precision}.{batch}",
                          f"{MODELS[model]} {precision}, batch {batch}: images/s trained",
                          rate(a), rate(b), "plain fp32 loop", f"ratio >= {bound}")
        yield Row(f"memory.{model}.{precision}", "  peak memory in GB", a[-1]["memory"] / 1e9,
                  b[-1]["memory"] / 1e9, "plain fp32 loop", "<= 3" if model == "unet" else "<= 4")


def loss(scale: Scale, known: dict) -> Iterator[Row]:
    """Whether the fast step learns what the plain one does: small networks, the same images."""
    def apart(one: list[float], two: list[float]) -> float:
        """Largest relative difference of the means over each sixth of the steps."""
        a, b = (np.reshape(x, (6, -1)).mean(1) for x in (one, two))
        return float((abs(a - b) / b).max())

    for model, name in MODELS.items():
        config = scale.config(model=model, batch_size=8, **scale.curve_sizes)
        with worker(scale, our_training, config=config, large=1 << 8) as ours, \
                worker(scale, plain_training, config=config, weights=0) as theirs, \
                worker(scale, plain_training, config=config, weights=1) as others:
            a, b, c = (ask(steps=scale.curve_steps)["losses"] for ask in (ours, theirs, others))
        yield Row(f"loss.{model}", f"{name}: loss curve, largest relative difference",
                  apart(a, b), apart(c, b), "plain, other weights", "<= 0.05")


def data(scale: Scale, known: dict) -> Iterator[Row]:
    """From files to a training step."""
    for suffix, kind, bound in (("jpg", "JPEG", 2), ("png", "PNG", 1)):
        config = scale.config(data=str(image_folder(scale, suffix)))
        with worker(scale, our_folder, config=config) as ours, \
                worker(scale, their_folder, passive=False, config=config) as theirs:
            a, b = in_turn([ours, theirs], 2 * scale.rounds)
        yield Row(f"data.{suffix}", f"{kind} of {scale.side}x{scale.side}: images/s, first epoch",
                  rate(a), rate(b), "ImageFolder, 2 workers", f"ratio >= {bound}")
    with worker(scale, small_images, config=scale.config(), count=scale.small_images) as ours:
        ours()  # which fills the cache
        [a] = in_turn([ours], 2 * scale.rounds)
    yield Row("data.cache", "later epochs, from memory: images/s", rate(a), target=">= 20,000")


def stream(scale: Scale, known: dict) -> Iterator[Row]:
    """The same JPEGs out of an archive, by the road to Kaggle; the server takes its share of the
    machine. No rows without Kaggle's client, which needs Python 3.11."""
    if not importlib.util.find_spec("kagglesdk"):
        return
    server = StandIn()
    server.archives["bench/images"] = Archive.of_folder(image_folder(scale, "jpg"))
    with worker(scale, our_folder, config=scale.config(data="kaggle:bench/images"),
                env=server.environment()) as ours:
        [a] = in_turn([ours], scale.rounds + 1)
    server.shutdown()
    yield Row("stream", "JPEG streamed from a server here: images/s", rate(a), target=">= 50")
    yield Row("stream.memory", "  memory in MB above the imports",
              max(x["memory"] for x in a) / 1e6, target="<= 500")


def evaluation(scale: Scale, known: dict) -> Iterator[Row]:
    """Scoring against the bare forward pass."""
    for model, name in MODELS.items():
        config = scale.config(model=model, samples=2 * READ_AT_ONCE, batch_size=READ_AT_ONCE)
        with worker(scale, scoring_and_forward, config=config, images=scale.scored) as ours:
            [a] = in_turn([ours], 2 * scale.rounds)
        yield Row(f"evaluation.{model}", f"{name}: phantom images/s scored", rate(a, "scoring"),
                  rate(a, "forward"), "bare forward pass", "ratio >= 0.9")


def start(scale: Scale, known: dict) -> Iterator[Row]:
    """From the command to the end of the first step."""
    for model, name in MODELS.items():
        seconds = []
        for _ in range(scale.rounds):
            began = time.time()
            with worker(scale, first_step, config=scale.config(model=model)) as ours:
                seconds.append(ours()["at"] - began)
        yield Row(f"start.{model}", f"train.py, {name}: seconds to the end of the first step",
                  statistics.median(seconds), target="<= 10")


def gpu(scale: Scale, known: dict) -> Iterator[Row]:
    """What a CUDA device makes of it; no rows where there is none."""
    if "gpu" not in known:
        return
    for (model, name), compiled in itertools.product(MODELS.items(), (False, True)):
        config = scale.config(model=model, batch_size=128, device="cuda", compile=compiled)
        with worker(scale, our_training, config=config) as ours, \
                worker(scale, plain_training, config=config) as theirs:
            in_turn([ours, theirs], 1, steps=5)
            a, b = in_turn([ours, theirs], 3, steps=20)
        key, how = (f"gpu.{model}.compiled", " --compile") if compiled else (f"gpu.{model}", "")
        yield Row(key, f"GPU, {name}{how}, batch 128: images/s trained", rate(a), rate(b),
                  "plain fp32 loop", "ratio >= 1")
        yield Row(f"{key}.memory", "  peak device memory in GB", a[-1]["memory"] / 1e9,
                  b[-1]["memory"] / 1e9, "plain fp32 loop", "ratio <= 1")


GROUPS: dict[str, Callable[[Scale, dict], Iterator[Row]]] = {
    f.__name__: f for f in (step, loss, data, stream, evaluation, start, gpu)}


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME",
                        help=", ".join(GROUPS))
    parser.add_argument("--quick", action="store_true", help="in miniature, within seconds")
    parser.add_argument("--out", type=Path, help="default: bench.json, if all are measured")
    arguments = parser.parse_args(argv)
    scale, began = QUICK if arguments.quick else Scale(), time.monotonic()
    known, rows = this_machine(), []
    for key, value in known.items():
        print(f"{key:<16}{value}", flush=True)
    print("\n" + HEADER)
    for name in arguments.only:
        for line in GROUPS[name](scale, known):
            rows.append(line)
            print(line, flush=True)
    print(f"\n{sum(r.reached is True for r in rows)} targets reached, "
          f"{sum(r.reached is False for r in rows)} missed; {time.monotonic() - began:.0f} s")
    whole = not arguments.quick and arguments.only == list(GROUPS)
    if out := arguments.out or (ROOT / "bench.json" if whole else None):
        out.write_text(json.dumps({
            "date": time.strftime("%Y-%m-%d"), "quick": scale.quick, "machine": known,
            "rows": [dataclasses.asdict(r) for r in rows]}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
