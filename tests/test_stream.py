"""The stream: its bound on memory, its order, going on in the middle, ranks."""

import os
import random
import re
import subprocess
import sys
import threading
import weakref
import zipfile
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from kaggle_stand_in import Archive, StandIn, VirtualNIH
from test_kaggle import opened, png, server_environment
from torch.utils.data import DataLoader

import data
from config import Config, UserError
from data import NORMAL, ImageStream, Memory, PhantomSource, create_dataloaders


def noise(count: int) -> Archive:
    """Stored PNGs of noise, of many sizes."""
    sizes = np.random.RandomState(0).randint(8, 90, (count, 2))
    return Archive.of({f"normal/{i:03d}.png": png(i, tuple(size)) for i, size in enumerate(sizes)},
                      zipfile.ZIP_STORED)


def iterate_together(*streams: ImageStream) -> list[tuple]:
    """The batches of several streams, in turn."""
    found: list[tuple] = []
    thread = threading.Thread(target=lambda: found.extend(zip(*streams, strict=True)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "locked up"
    return found


def least(error: UserError) -> float:
    """The GB that the message says to be enough."""
    return float(re.search(r"--memory-limit-gb: .*?([\d.]+) is enough", str(error))[1])


def test_the_bound_holds_and_nothing_locks_up(
        kaggle: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sizes, limits and orders, down to the smallest limit, with up to three streams."""
    rng, refused = random.Random(5), 0
    source = opened(kaggle, noise(80))
    largest = 4 * max(source.file_bytes(s) for s in source.samples) + (64 << 10)
    there, most, real = [0], [0], data.decode_image

    def decode(*arguments: object) -> np.ndarray:  # notes how many decoded images there are
        image = real(*arguments).copy()
        there[0] += 1
        most[0] = max(most[0], there[0])
        weakref.finalize(image, lambda: there.__setitem__(0, there[0] - 1))
        return image

    def make(limit: int) -> list[ImageStream]:
        memory = Memory(limit)
        return [ImageStream(source, source.samples, size, batch, seed, memory, 1 / (parts - i),
                            cache, stop_on_bad=False) for i in range(parts)]

    monkeypatch.setattr(data, "decode_image", decode)
    for trial in range(18):
        batch, size, seed = rng.choice([2, 5, 16]), rng.choice([16, 32]), rng.choice([None, 1])
        low, cache, parts = trial % 3 == 0, rng.random() < 0.5, rng.choice([1, 3])
        limit = rng.randint(10_000, 60_000) if low else rng.randint(1 << 18, 1 << 22)
        try:
            streams = make(limit)
        except UserError as error:
            streams = make(limit := int(least(error) * 2**30))
            refused += 1
        memory, most[0] = streams[0].memory, 0
        for _ in range(2):
            iterate_together(*streams)
        set_aside = sum(stream.bound for stream in streams)
        assert memory.held == {"files": 0, "pixels": 0, "images": set_aside}
        assert 0 < memory.peak_bytes <= limit
        # There never were more decoded images than have been set aside: besides those in windows
        # only those in two batches, and cached ones.
        assert there[0] == 0 < most[0] <= sum(stream.window for stream in streams)
        images = sum(stream.window + 2 * batch + stream.cached for stream in streams)
        assert images * size**2 <= memory.most["images"] and sum(memory.most.values()) <= limit
        assert limit < 8 * largest or not any(stream.bad for stream in streams)
    assert refused


def test_no_part_of_the_memory_is_promised_twice_and_too_little_says_what_is_needed() -> None:
    config = Config(samples=200, image_size=16, memory_limit_gb=0.002)
    loaders = create_dataloaders(config)
    memory = loaders.train.memory
    assert sum(stream.bound for stream in loaders[:3]) <= memory.most["images"]
    assert sum(memory.most.values()) <= memory.limit == config.memory_bytes
    text = data.describe_memory(loaders)
    assert re.search("never take more than 0.002 GB; 300 of the 300 training and validation", text)
    config = Config(samples=200, image_size=128, batch_size=16, memory_limit_gb=0.012)
    assert re.search(r"; [1-9]\d* of the 300 training", data.describe_memory(
        create_dataloaders(config)))
    config = Config(samples=60, image_size=128, batch_size=8, memory_limit_gb=0.0001)
    with pytest.raises(UserError) as told:
        create_dataloaders(config)
    create_dataloaders(replace(config, memory_limit_gb=least(told.value)))


def test_two_iterations_of_one_stream_at_a_time_do_not_lock_up() -> None:
    source = PhantomSource(60, 16)
    stream = ImageStream(source, source.samples[:60], 16, 8, seed=0, memory=1 << 20)
    pairs = iterate_together(stream, stream)
    assert len(pairs) == 7 and all(torch.equal(x, y) for (x, _), (y, _) in pairs)


PEAK = """
import sys
from config import Config
from data import ImageStream, open_source

def kib(field):  # not getrusage, whose peak includes that of the program that started this one
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field))

source = open_source(Config(data="kaggle:someone/xrays"))
stream = ImageStream(source, source.samples[: int(sys.argv[1])], 64, 8, seed=0, cache=False,
                     memory=50 << 20)
before = kib("VmRSS")
print(sum(len(p) for _, p in stream), kib("VmHWM") - before, stream.memory.peak_bytes >> 10)
"""


@pytest.mark.drill
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_times_as_many_images_take_no_more_memory(kaggle: StandIn) -> None:
    kaggle.archives["someone/xrays"] = VirtualNIH(3000, 375_000, 600)
    environ = {"PYTHONPATH": str(Path(__file__).parent.parent), **server_environment(kaggle)}
    peaks = []
    for count in (300, 3000):
        out = subprocess.run([sys.executable, "-c", PEAK, str(count)], check=True, text=True,
                             capture_output=True, env=os.environ | environ)
        done, peak, counted = map(int, out.stdout.split())
        assert done == count // 8 * 8 and counted < 50 << 10
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 15_000  # KiB


def test_going_on_in_mid_epoch_keeps_the_order_and_fetches_nothing_skipped(kaggle: StandIn) -> None:
    nih = VirtualNIH(400, 80_000, 40)
    source = opened(kaggle, nih)
    normals = [s for s in source.samples if s.label == NORMAL]

    def fresh() -> ImageStream:
        return ImageStream(source, normals, 32, 8, seed=7, cache=False)

    (whole := fresh()).set_epoch(2)
    wanted = [(p.tolist(), x) for x, p in whole]
    (first := fresh()).set_epoch(2)
    with closing(iter(first)) as batches:
        for _ in range(20):
            next(batches)
        batch = first.next_batch
    kaggle.ranges.clear()
    (second := fresh()).set_epoch(2, batch)
    rest = [(p.tolist(), x) for x, p in second]
    assert [p for p, _ in rest] == [p for p, _ in wanted[20:]]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(rest, wanted[20:], strict=True))
    skipped = {normals[i].key for p, _ in wanted[:20] for i in p}
    inside = {nih.names[i] for start, end in kaggle.ranges
              for i in range(-(-start // nih.record), end // nih.record)}
    assert len(inside) == 8 * len(rest) and not skipped & inside


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_its_share_once(world: int, seed: int | None) -> None:
    source = PhantomSource(70, 16)

    def order(**which: int) -> list[list[int]]:
        stream = ImageStream(source, source.samples[:70], 16, 12, seed, **which)
        return [positions.tolist() for _, positions in stream]

    plain, ranks = order(), [order(rank=rank, world=world) for rank in range(world)]
    assert [[*chain(*slices)] for slices in zip(*ranks, strict=True)] == plain
    assert len(plain) == (6 if seed is None else 5)
    assert len({*chain(*plain)}) == (70 if seed is None else 60)


def test_the_workers_of_a_dataloader_are_refused() -> None:
    source = PhantomSource(20, 16)
    stream = ImageStream(source, source.samples[:20], 16, 4)
    assert len(list(DataLoader(stream, batch_size=None))) == 5
    with pytest.raises(RuntimeError, match="num_workers must be 0"):
        list(DataLoader(stream, batch_size=None, num_workers=1))
