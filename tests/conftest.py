"""Small things that several test files need. Nothing here touches the network or shared data."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from kaggle_stand_in import StandIn
from PIL import Image

import data
import evaluate
import train as train_module
from config import Config
from train import train

ROOT = Path(__file__).parent.parent
# Networks this small gain nothing by threads, and lose much where other work wants the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

TINY = {"width": 4, "image_size": 32, "latent_dim": 8, "samples": 64, "epochs": 2,
        "batch_size": 16, "reader_steps": 2, "device": "cpu", "precision": "fp32",
        "augment": True}


@pytest.fixture(scope="session", autouse=True)
def no_gpu() -> Iterator[None]:
    """Runs are tested where they were trained, whatever machine this is."""
    no = functools.cache(lambda: False)  # PyTorch itself looks at what it wraps
    with mock.patch("torch.cuda.is_available", no), mock.patch(
            "torch.backends.mps.is_available", no):
        yield


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and pictures take most of the time of such a small run or test: they are left out or
    blank, but in tests of them, in runs that tests share, and in programs that are started."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(train_module, "draw_curves", mock.Mock())
        monkeypatch.setattr(evaluate, "save_picture",
                            lambda file, *_, **named: Image.new("L", (1, 1)).save(file))


@pytest.fixture(scope="session", autouse=True)
def films(tmp_path_factory: pytest.TempPathFactory) -> None:
    """64 of the phantom's films for training, 20 for validation, 32 for test: its own 100 and 200
    would take most of the time of a small run."""
    root = tmp_path_factory.mktemp("data") / "films"
    TINY["data"] = str(root)
    for i in [*range(84), *range(200_000, 200_032)]:  # validation is taken from the first
        kind = "opacity" if i > 84 and i % 2 else None
        file = root / ("test" if i > 84 else "train") / (kind or "normal") / f"{i % 1000:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.draw_phantom(i, TINY["image_size"], kind=kind)[0]).save(file)


def tiny(tmp: Path, **settings: object) -> Config:
    """A configuration that trains in a second."""
    return Config(**(TINY | {"output_dir": str(tmp)} | settings))


def flags_of(config: Config) -> list[str]:
    """What to type for that configuration."""
    return [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True)
            for k, v in dataclasses.asdict(config).items()
            if k == "data" or v != getattr(Config, k)]


def run(*command: object, folder: Path = ROOT, **environ: str) -> subprocess.CompletedProcess:
    """Run a program to its end; a script with this Python."""
    python = [sys.executable] if str(command[0]).endswith(".py") else []
    return subprocess.run([*python, *command], cwd=folder, capture_output=True, text=True,
                          env=os.environ | environ)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 40)) -> None:
    """A smooth random grey picture of (width, height)."""
    rng = np.random.RandomState(seed)
    small = Image.fromarray(rng.randint(0, 256, (5, 5)).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path)


def write_images(folder: Path, count: int, first: int = 0) -> None:
    """As many such pictures, all of them different."""
    for i in range(first, first + count):
        write_image(folder / f"{i:03d}.png", i)


@pytest.fixture(scope="session")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 70 normal and 12 abnormal images and no prescribed split."""
    root = tmp_path_factory.mktemp("xrays") / "xrays"
    write_images(root / "normal", 70)
    write_images(root / "abnormal", 12, 70)
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders of both models, trained a little on the phantom."""
    return train(tiny(tmp_path_factory.mktemp("runs"), model="both", data="synthetic"))


@pytest.fixture(scope="session")
def xrays_run(tmp_path_factory: pytest.TempPathFactory, xrays: Path) -> Path:
    """The folder of a run trained a little on `xrays`."""
    folder = tmp_path_factory.mktemp("xrays_run")
    return train(tiny(folder, data=str(xrays), samples=None, epochs=1))[0]


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in that the official client is pointed at; waiting is noted instead of done."""
    pytest.importorskip("kagglesdk", reason="the client of Kaggle needs Python 3.11")
    server = StandIn()
    for name in [*os.environ]:
        if name.startswith(("KAGGLE_", "XDG_CONFIG_HOME")) or name.lower().endswith("proxy"):
            monkeypatch.delenv(name)
    for name, value in (server.environment() | {"HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    server.pauses = []
    monkeypatch.setattr(data, "pause", lambda seconds, cancelled: server.pauses.append(seconds))
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB of its own."""
    (place := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)
