"""Measure the product against the loops that one would otherwise write, here and now, in turn.

    make bench                               all of it; about ten minutes on two cores
    python tests/bench.py --only step data   a part of it
    python tests/bench.py --quick            in miniature: its figures mean nothing

Prints a row for each figure and writes bench.json. Whatever is measured runs in processes of its
own (bench_work.py), which this small one starts and asks; two that are compared take turns.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / "build" / "bench"
MODELS = {"unet": "U-Net", "reversed_ae": "Reversed AE"}
ENOUGH = 12  # seconds of turns, after which no further one begins
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # what train.py and evaluate.py set as they start
TINY = {"width": 2, "image_size": 32, "latent_dim": 8}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    quick: bool = False  # in this process, where nothing has to be started
    sizes: dict = field(default_factory=dict)  # of the networks: those of Config
    batch: int = 32  # and the default, 8, before it
    rounds: int = 2
    curve_sizes: dict = field(default_factory=lambda: {"width": 8, "image_size": 64,
                                                       "latent_dim": 64})
    curve_steps: int = 96
    files: int = 60  # different ones; each lies there five times
    side: int = 1024
    small_images: tuple[int, ...] = (1_000, 10_000, 100_000)
    scored: int = 24


QUICK = Scale(True, TINY, 4, 1, TINY, 12, 10, 64, (64, 96, 128), 16)


@dataclass
class Row:
    """One figure, what it is held against, and what was aimed at."""

    name: str
    what: str
    ours: float | None
    theirs: float | None
    against: str  # what `theirs` is
    ratio: float | None
    target: str
    reached: bool | None
    more: dict = field(default_factory=dict)  # for bench.json only

    def __str__(self) -> str:
        return (f"{self.what:<56}{short(self.ours):>9}{short(self.theirs):>9}"
                f"{short(self.ratio):>8}  {self.target or '-':<15}"
                f"{ {True: 'yes', False: 'NO', None: '-'}[self.reached]:<9}{self.against}")


HEADER = f"{'':<56}{'ours':>9}{'theirs':>9}{'ratio':>8}  {'target':<15}{'reached':<9}theirs is"


def short(x: float | None) -> str:
    """Three digits."""
    return "-" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def row(name: str, what: str, ours: float | None, theirs: float | None = None, against: str = "",
        *, ratio_from: float | None = None, ratio_to: float | None = None,
        at_least: float | None = None, at_most: float | None = None, **more: object) -> Row:
    """A Row; the target is a bound on the ratio (ratio_from, ratio_to) or on our figure."""
    ratio = ours / theirs if ours is not None and theirs else None
    target, reached = "", None
    for bound, value, text in ((ratio_from, ratio, "ratio >= "), (ratio_to, ratio, "ratio <= "),
                               (at_least, ours, ">= "), (at_most, ours, "<= ")):
        if bound is not None:
            target = f"{text}{bound:,g}"
            reached = None if value is None else (
                value >= bound if ">" in text else value <= bound)
    return Row(name, what, ours, theirs, against, ratio, target, reached, more)


# ----------------------------------------------------------------------------------------------
# Processes


class Worker:
    """A process that does one kind of work, and answers requests; env: variables for it."""

    def __init__(self, scale: Scale, kind: str, env: dict[str, str] | None = None,
                 **settings: object) -> None:
        self.kind, self.quick = kind, scale.quick
        if scale.quick:
            sys.path[:0] = [str(ROOT / "tests")]
            from bench_work import KINDS

            self.answer = KINDS[kind](**settings)
        else:
            self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self.process = subprocess.Popen(
                [sys.executable, "tests/bench_work.py", kind, json.dumps(settings)], cwd=ROOT,
                env=os.environ | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.said, text=True)

    def ask(self, **request: object) -> dict:
        if self.quick:
            with contextlib.redirect_stdout(io.StringIO()):
                return self.answer(**request)
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):  # it has ended
            self.said.seek(0)
            raise SystemExit(f"{self.kind}:\n{self.said.read()[-2000:]}") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.quick:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.process.wait()
            self.said.close()


def in_turn(workers: list[Worker], rounds: int, requests: list[dict] | None = None,
            enough: float = ENOUGH, **request: object) -> list[list[dict]]:
    """Each worker's answers to the request, or to one of its own; they are asked in turn.

    What takes long is asked less often: noise is short beside it.
    """
    began, answers = time.monotonic(), []
    while len(answers) < rounds and (not answers or time.monotonic() - began < enough):
        answers.append([worker.ask(**request, **own) for worker, own in
                        zip(workers, requests or [{}] * len(workers), strict=True)])
    return [list(a) for a in zip(*answers, strict=True)]


def rate(answers: list[dict]) -> float:
    return statistics.median(a["rate"] for a in answers)


def mega(size: int | None) -> float | None:
    return None if size is None else size / 1e6


# ----------------------------------------------------------------------------------------------
# The rows. `known` holds what later ones are computed from.


def step(scale: Scale, known: dict) -> Iterator[Row]:
    """Training steps, and the memory that they take."""
    precisions = dict.fromkeys(("fp32", known["machine"]["precision"]))
    for model, precision in itertools.product(MODELS, precisions):
        name = f"{MODELS[model]} {precision}"
        # Without matrix units the products themselves are not five times as fast in bf16.
        fast = precision == "bf16" and "amx_bf16" in known["machine"]["flags"]
        settings = {"model": model, "batch": scale.batch, "sizes": scale.sizes}
        with Worker(scale, "our_training", PASSIVE, precision=precision, **settings) as ours, \
                Worker(scale, "plain_training", **settings) as theirs:
            in_turn([ours, theirs], 1, steps=1, batch=8)  # to warm up
            for batch, bound in ((8, 1), (scale.batch, 5 if fast else 1)):
                a, b = in_turn([ours, theirs], 2 * scale.rounds, steps=1, batch=batch)
                yield row(f"step.{model}.{precision}.{batch}",
                          f"{name}, batch {batch}: images/s trained",
                          rate(a), rate(b), "plain fp32 loop", ratio_from=bound)
        ours, theirs = (answers[-1]["memory"] / 1e9 for answers in (a, b))
        yield row(f"memory.{model}.{precision}", "  peak memory in GB", ours, theirs,
                  "plain fp32 loop", at_most=3 if model == "unet" else 4,
                  imports=a[0]["imported"] / 1e9)
        yield row(f"promise.{model}.{precision}", "  minutes for 2,000 images, 10 epochs",
                  20_000 / rate(a) / 60, at_most=30 if model == "unet" else 60)


def loss(scale: Scale, known: dict) -> Iterator[Row]:
    """Whether the fast step learns what the plain one does: small networks, the same images."""
    def apart(one: list[float], two: list[float]) -> float:
        """Largest relative difference of the means over each sixth of the steps."""
        n = len(one) // 6
        means = [[statistics.fmean(x[i * n : (i + 1) * n]) for i in range(6)] for x in (one, two)]
        return max(abs(p - q) / q for p, q in zip(*means, strict=True))

    for model, name in MODELS.items():
        settings = {"model": model, "batch": 8, "sizes": scale.curve_sizes, "batches": 8}
        with Worker(scale, "our_training", PASSIVE, large=1 << 8, **settings) as ours, \
                Worker(scale, "plain_training", PASSIVE, weights=0, **settings) as theirs, \
                Worker(scale, "plain_training", PASSIVE, weights=1, **settings) as others:
            curves = [worker.ask(steps=scale.curve_steps)["losses"]
                      for worker in (ours, theirs, others)]
        yield row(f"loss.{model}", f"{name}: loss curve, largest relative difference",
                  apart(curves[0], curves[1]), apart(curves[2], curves[1]),
                  "plain, other weights", at_most=0.05, curves=curves)


def data(scale: Scale, known: dict) -> Iterator[Row]:
    """From files to a training step."""
    for suffix, kind in (("jpg", "JPEG"), ("png", "PNG")):
        with Worker(scale, "our_folder", PASSIVE, sizes=scale.sizes) as ours, \
                Worker(scale, "their_folder", sizes=scale.sizes) as theirs:
            memory = [mega(w.ask(data=known[suffix], memory=True)["memory"])
                      for w in (ours, theirs)]
            a, b = in_turn([ours, theirs], 2 * scale.rounds, data=known[suffix])
        yield row(f"data.{suffix}", f"{kind} of {scale.side}x{scale.side}: images/s, first epoch",
                  rate(a), rate(b), "ImageFolder, 2 workers",
                  ratio_from=2 if suffix == "jpg" else 1)
        yield row(f"data.{suffix}.memory", "  memory in MB above the imports", *memory,
                  "ImageFolder, 2 workers", ratio_to=0.25)
    with Worker(scale, "small_images", PASSIVE, count=scale.small_images[1], cache=True,
                sizes=scale.sizes) as worker:
        worker.ask()  # which fills the cache
        known["cache"] = rate([worker.ask() for _ in range(2 * scale.rounds)])
    yield row("data.cache", "later epochs, from memory: images/s", known["cache"], at_least=20_000)


def stream(scale: Scale, known: dict) -> Iterator[Row]:
    """The same JPEGs out of an archive, by the road to Kaggle; the server takes its share of the
    machine. No rows without Kaggle's client, which needs Python 3.11."""
    if not importlib.util.find_spec("kagglesdk"):
        return
    with Worker(scale, "archive", folder=known["jpg"]) as server, \
            Worker(scale, "our_folder", PASSIVE, sizes=scale.sizes) as ours:
        request = {"data": "kaggle:bench/images"} | server.ask()
        memory = mega(ours.ask(memory=True, **request)["memory"])
        streamed = rate([ours.ask(**request) for _ in range(scale.rounds)])
    yield row("stream", "JPEG streamed from a server here: images/s", streamed, 50,
              "first aim: 10 to 50", at_least=50)
    yield row("stream.memory", "  memory in MB above the imports", memory, 500, "first aim: 500",
              at_most=500)


def evaluation(scale: Scale, known: dict) -> Iterator[Row]:
    """Scoring against the bare forward pass, and what comes after scoring."""
    for model, name in MODELS.items():
        with Worker(scale, "evaluation", PASSIVE, model=model, sizes=scale.sizes,
                    images=scale.scored) as worker:
            worker.ask(part="forward")  # which the calibration has not warmed up
            a, b = in_turn([worker] * 2, 2 * scale.rounds, [
                {"part": "scoring"}, {"part": "forward"}])
            [c] = in_turn([worker], scale.rounds, enough=ENOUGH / 2, part="twice")
        yield row(f"evaluation.{model}", f"{name}: phantom images/s scored", rate(a), rate(b),
                  "bare forward pass", ratio_from=0.9)
        yield row(f"evaluation.{model}.twice", "  if all are read twice", rate(c), rate(b) / 2,
                  "two bare forward passes", ratio_from=0.9)


def start(scale: Scale, known: dict) -> Iterator[Row]:
    """From the command to its answer, or to the first step."""
    for script in ("train", "evaluate"):
        seconds = []
        for _ in range(2 * scale.rounds):
            began = time.perf_counter()
            subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, check=True,
                           stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        yield row(f"start.{script}", f"{script}.py --help: seconds", statistics.median(seconds),
                  at_most=0.5)
    for model, name in MODELS.items():
        seconds = []
        for _ in range(scale.rounds):
            began = time.time()
            with Worker(scale, "first_step", PASSIVE, model=model, sizes=scale.sizes) as worker:
                seconds.append(worker.ask()["at"] - began)
        yield row(f"start.{model}", f"train.py, {name}: seconds to the end of the first step",
                  statistics.median(seconds), at_most=10)


def growth(scale: Scale, known: dict) -> Iterator[Row]:
    """Ten and a hundred times as many images, nothing kept."""
    # There and back, so that what the machine does meanwhile falls on all alike.
    counts = scale.small_images
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(scale, "small_images", PASSIVE, count=count,
                                              cache=False, sizes=scale.sizes)) for count in counts]
        watched: list[list[dict]] = [[] for _ in counts]
        for i in (0, 1, 2, 1, 0):
            watched[i].append(workers[i].ask(epochs=max(1, 2 * counts[1] // counts[i]),
                                             memory=True))
    held = [all(a["held"] for a in answers) and max(a["held"] for a in answers)
            for answers in watched]
    names = [answers[-1]["names"] for answers in watched]
    memory = [x and mega(x - y) for x, y in zip(held, names, strict=True)]
    rates = [rate(answers) for answers in watched]
    once = f"{counts[0]:,} images"
    for i in (1, 2):
        yield row(f"growth.{i}", f"{counts[i]:,} small images: images/s, none kept",
                  rates[i], rates[0], once, ratio_from=0.95)
        yield row(f"growth.{i}.memory", "  whole memory in MB, minus the list of images", memory[i],
                  memory[0], once, ratio_to=1.05)
    yield row("growth.list", "bytes that an image takes in that list",
              names[-1] / counts[-1])


def gpu(scale: Scale, known: dict) -> Iterator[Row]:
    """What a CUDA device makes of it; no rows where there is none."""
    if "gpu" not in known["machine"]:
        return
    batch = 128
    for model, name in MODELS.items():
        gflop = known["machine"]["gflop_an_image"][model]
        for compiled in (False, True):
            settings = {"model": model, "batch": batch, "device": "cuda", "sizes": scale.sizes}
            with Worker(scale, "our_training", PASSIVE, compile=compiled, **settings) as ours, \
                    Worker(scale, "plain_training", **settings) as theirs:
                in_turn([ours, theirs], 1, steps=5)
                a, b = in_turn([ours, theirs], 3, steps=20)
            key, how = (f"gpu.{model}.compiled", " --compile") if compiled else (f"gpu.{model}", "")
            yield row(key, f"GPU, {name}{how}, batch {batch}: images/s trained", rate(a), rate(b),
                      "plain fp32 loop", ratio_from=1)
            yield row(f"{key}.memory", "  peak device memory in GB", a[-1]["device_memory"] / 1e9,
                      b[-1]["device_memory"] / 1e9, "plain fp32 loop", ratio_to=1)
            yield row(f"{key}.ceiling", "  GFLOP/s", rate(a) * gflop,
                      known["machine"]["gpu_gflops"],
                      f"matmul in {known['machine']['gpu_precision']}",
                      ratio_from=0.4 if model == "unet" else None)
            if "cache" in known:
                yield row(f"{key}.fed", "  images/s from the cache", known["cache"], rate(a),
                          "trained", ratio_from=1)


GROUPS: dict[str, Callable[[Scale, dict], Iterator[Row]]] = {
    f.__name__: f for f in (step, loss, data, stream, evaluation, start, growth, gpu)}


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME",
                        help=", ".join(GROUPS))
    parser.add_argument("--quick", action="store_true", help="in miniature, within seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the figures go (default: "
                        "bench.json if all are measured, nowhere otherwise)")
    arguments = parser.parse_args(argv)
    scale, began = QUICK if arguments.quick else Scale(), time.monotonic()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    known: dict = {}
    with Worker(scale, "machine", sizes=scale.sizes) as worker:
        known["machine"] = worker.ask()
    with Worker(scale, "image_folders", scratch=str(SCRATCH), count=scale.files,
                side=scale.side) as worker:
        known |= {suffix: worker.ask(suffix=suffix)["folder"] for suffix in ("jpg", "png")}
    for key, value in known["machine"].items():
        print(f"{key:<16}{value}", flush=True)
    print("\n" + HEADER)
    rows = []
    for name in arguments.only:
        for line in GROUPS[name](scale, known):
            rows.append(line)
            print(line, flush=True)
    print(f"\n{sum(r.reached is True for r in rows)} targets reached, "
          f"{sum(r.reached is False for r in rows)} missed; {time.monotonic() - began:.0f} s")
    whole = not arguments.quick and arguments.only == list(GROUPS)
    if out := arguments.out or (ROOT / "bench.json" if whole else None):
        out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "quick": scale.quick,
                                   "machine": known["machine"],
                                   "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
