"""Small things that several test files need. Nothing here touches the network or shared data."""

import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from kaggle_stand_in import StandIn
from PIL import Image

import data
import train as train_module
from config import Config
from train import train

# Networks this small gain nothing by threads, and lose much where other work wants the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

TINY = {"width": 4, "image_size": 32, "latent_dim": 8, "samples": 64, "epochs": 2,
        "batch_size": 16, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="session", autouse=True)
def no_gpu() -> Iterator[None]:
    """Runs are tested where they were trained, whatever machine this is."""
    no = functools.cache(lambda: False)  # PyTorch itself looks at what it wraps
    with mock.patch("torch.cuda.is_available", no), mock.patch(
            "torch.backends.mps.is_available", no):
        yield


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Learning curves take a fifth of such a small run's time: they are left out, but in tests of
    them, in runs that tests share, and in programs that are started."""
    if request.node.get_closest_marker("curves"):
        yield
    else:
        with mock.patch.object(train_module, "draw_curves"):
            yield


@pytest.fixture(scope="session", autouse=True)
def films(tmp_path_factory: pytest.TempPathFactory) -> None:
    """64 of the phantom's films for training, 20 for validation, 32 for test: its own 100 and 200
    would take most of the time of a small run."""
    root = tmp_path_factory.mktemp("data") / "films"
    TINY["data"] = str(root)
    for i in range(84):  # validation is taken from these
        write_film(root / "train/normal" / f"{i:02d}.png", i)
    for i in range(32):
        kind = ("normal", "opacity")[i % 2]
        write_film(root / "test" / kind / f"{i:02d}.png", 200_000 + i, kind)


def tiny(tmp: Path, **settings: object) -> Config:
    """A configuration that trains in a second."""
    return Config(**(TINY | {"output_dir": str(tmp)} | settings))


def write_film(path: Path, index: int, kind: str = "normal") -> None:
    """A film of the phantom."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, _ = data.draw_phantom(index, TINY["image_size"], kind=None if kind == "normal" else kind)
    Image.fromarray(image).save(path)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 40)) -> None:
    """A smooth random grey picture of (width, height)."""
    rng = np.random.RandomState(seed)
    small = Image.fromarray(rng.randint(0, 256, (5, 5)).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 70 normal and 12 abnormal images and no prescribed split."""
    root = tmp_path_factory.mktemp("data") / "xrays"
    for i in range(82):
        write_image(root / ("normal" if i < 70 else "abnormal") / f"{i:03d}.png", i)
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders of both models, trained a little on the phantom."""
    return train(tiny(tmp_path_factory.mktemp("runs"), model="both", data="synthetic"))


@pytest.fixture(scope="session")
def xrays_run(tmp_path_factory: pytest.TempPathFactory, xrays: Path) -> Path:
    """The folder of a run trained a little on `xrays`."""
    (folder,) = train(tiny(tmp_path_factory.mktemp("xrays_run"), data=str(xrays), samples=None,
                           epochs=1))
    return folder


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in that the official client is pointed at; waiting is noted instead of done."""
    pytest.importorskip("kagglesdk", reason="the client of Kaggle needs Python 3.11")
    server = StandIn()
    for name in [n for n in os.environ if n.startswith("KAGGLE_") or n.lower().endswith("proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name, value in server.environment().items():
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
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)
