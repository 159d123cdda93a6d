"""The cell to paste and the notebook that make colab writes, run in real kernels, offline."""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import colab
import matplotlib.font_manager  # makes its cache of fonts, once for all kernels
import pytest
from conftest import write_image, write_images

from evaluate import IMAGE_ALONE, UNTRAINED

jupyter_client = pytest.importorskip("jupyter_client")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

SMALL = {"IMAGE_SIZE": 32, "SAMPLES": 64, "EPOCHS": 5, "WIDTH": 4}
MODELS = ("unet", "reversed_ae")
# Run before anything else: as if there were no network.
OFFLINE = """
import socket
def refuse(*arguments, **more):
    raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
# What stands in for Colab's own package: a Drive that is there once it is mounted, and a person who
# chooses an image to upload, which Colab saves.
COLAB = """
import shutil, sys, types
from pathlib import Path
drive = types.SimpleNamespace(mount=lambda path: Path("hidden").rename(path))
files = types.SimpleNamespace(upload=lambda: {{shutil.copy({image!r}, "my image.png"): b""}})
for name in ("google", "google.colab"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["google.colab"].drive, sys.modules["google.colab"].files = drive, files
"""


class Kernel:
    """A kernel of a notebook in a folder, without a network, as Jupyter and Colab start it."""

    def __init__(self, folder: Path) -> None:
        self.manager = jupyter_client.KernelManager(  # without directories: this Python's own
            kernel_spec_manager=jupyter_client.kernelspec.KernelSpecManager(kernel_dirs=[]),
            connection_file=str(folder / "connection.json"))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE", "MPLBACKEND"))}
        self.manager.start_kernel(cwd=str(folder), env=kept | {
            "IPYTHONDIR": str(folder / "ipython"), "HOME": str(folder), "PIP_NO_INDEX": "1",
            "MPLCONFIGDIR": matplotlib.get_cachedir()})
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.run(OFFLINE)

    def run(self, code: str, interrupt_at: str = "\0") -> SimpleNamespace:
        """What a cell shows; `error` are its lines. It is interrupted once it prints that."""
        output = SimpleNamespace(stdout="", stderr="", pictures=[], error=[])

        def hook(message: dict) -> None:
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                seen = interrupt_at in output.stdout
                vars(output)[content["name"]] += content["text"]
                if interrupt_at in output.stdout and not seen:
                    self.manager.interrupt_kernel()
            elif kind == "display_data":
                output.pictures.append(base64.b64decode(content["data"]["image/png"]))
            elif kind == "error":
                output.error += content["traceback"]

        # stop_on_error would have an earlier kernel refuse what is sent soon after an error.
        self.client.execute_interactive(code, timeout=900, allow_stdin=False,
                                        stop_on_error=False, output_hook=hook)
        # A progress bar is no complaint.
        output.stderr = re.sub(r"[^\r\n]*\d+/\d+ \[[^\]\r\n]*\]?|\s", "", output.stderr)
        return output

    def run_all(self, notebook: dict, **settings: object) -> list[SimpleNamespace]:
        """Run a notebook's code cells one after the other, and see that each went well."""
        outputs = [self.run(with_settings(cell["source"] + "\n", **settings))
                   for cell in notebook["cells"] if cell["cell_type"] == "code"]
        self.close()
        assert not any(o.error or o.stderr for o in outputs)
        return outputs

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def with_settings(code: str, **settings: object) -> str:
    """The code with other values for these settings."""
    assert all(f"\n{name} = " in colab.SETTINGS for name in settings)
    values = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    return code.replace(colab.SETTINGS, colab.SETTINGS + values)


def step(title: str) -> str:
    """The code under that title."""
    return next(code for text, code in colab.STEPS.items() if text.startswith(f"## {title}"))


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """(kernel, its folder, what the pasted cell showed when it was interrupted, and run again)."""
    folder, cell = tmp_path_factory.mktemp("colab"), with_settings(colab.single_cell(), **SMALL)
    kernel = Kernel(folder)
    yield kernel, folder, kernel.run(cell, interrupt_at="epoch 1/5"), kernel.run(cell)
    kernel.close()


@pytest.mark.drill
def test_a_cell_runs_this_very_code_and_when_interrupted_goes_on(pasted: tuple) -> None:
    kernel, folder, interrupted, again = pasted
    assert len(interrupted.error) == 1 and "saved; go on with" in interrupted.error[0]
    assert "epoch 5/5" not in interrupted.stdout
    assert again.error == [] and again.stderr == ""
    assert again.stdout.count("epoch 1/5") == 1  # the other's
    for row in (r"U-Net +0\.\d{3} ", r"Reversed AE +0\.\d{3} ", r"PCA reconstruction error +0\.\d",
                r"AUROC.+95 % interval", r"example\.pgm"):
        assert re.search(row, again.stdout), row
    files = ["comparison.png", *(f"{m}/predictions/example/example_heatmap.png" for m in MODELS)]
    assert again.pictures == [(folder / "runs" / name).read_bytes() for name in files]
    for file in colab.ROOT.glob("*.py"):
        assert (folder / "imgae_dx" / file.name).read_bytes() == file.read_bytes()
    with open(folder / "imgae_dx/models.py", "a") as file:
        file.write("CHANGED = True\n")
    kernel.run(step("Start"))  # takes a change to it
    assert kernel.run("import models; print(models.CHANGED)").stdout == "True\n"


@pytest.mark.drill
@pytest.mark.parametrize(("title", "settings", "says"), [
    ("Train", {"DATA": "nowhere"}, "--data nowhere: there is nothing at "),
    ("Train", {"DATA": "kaggle:someone/xrays"}, "no Kaggle credentials"),
    ("Start", {"MOUNT_DRIVE": True}, "MOUNT_DRIVE, for Google Colab only: "),
    ("Score", {"IMAGE": "upload"}, "IMAGE: no file was chosen; upload works in Google Colab "),
    ("Score", {"IMAGE": "gone.png"}, "--image gone.png: there is no"),
])
def test_a_mistake_is_one_line(pasted: tuple, title: str, settings: dict, says: str) -> None:
    shown = pasted[0].run(with_settings(colab.SETTINGS, **settings) + step("Start") + step(title))
    assert len(shown.error) == 1 and shown.error[0].startswith(says)
    assert shown.pictures == [] and shown.stderr == ""


@pytest.mark.drill
def test_the_notebook_uses_runs_in_drive_and_an_upload(pasted: tuple, tmp_path: Path) -> None:
    shutil.copytree(pasted[1] / "runs", tmp_path / "hidden/MyDrive/imgae_dx")
    write_image(tmp_path / "image.png")
    text = json.dumps(colab.notebook()).replace("/content/drive", str(tmp_path / "drive"))
    kernel = Kernel(tmp_path)
    kernel.run(COLAB.format(image=str(tmp_path / "image.png")))
    write_images(tmp_path / "normals", 30)
    outputs = kernel.run_all(json.loads(text), **SMALL, MOUNT_DRIVE=True, IMAGE="upload",
                             NORMALS=str(tmp_path / "normals"), EXPORT="model.pt2")
    shown = "".join(output.stdout for output in outputs)
    assert f"Results are kept in {tmp_path}/drive/MyDrive/imgae_dx\n" in shown
    assert "epoch 1/5" not in shown and re.search(r"U-Net +0\.\d{3} ", shown)
    assert [len(output.pictures) for output in outputs[-4:]] == [0, 1, 2, 0]
    assert "my image.png" in outputs[-2].stdout
    for model in MODELS:
        for name in ("calibration-site.pt", "model.pt2"):
            assert (tmp_path / "drive/MyDrive/imgae_dx" / model / name).exists()


def test_make_colab_writes_a_valid_notebook_that_shows_little_source(tmp_path: Path) -> None:
    for file in colab.ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    with mock.patch.object(colab, "ROOT", tmp_path):
        colab.main()
    content = nbformat.read(tmp_path / "build/imgae_dx.ipynb", as_version=4)
    nbformat.validate(content)
    sizes = [len(c.source) for c in content.cells if not c.metadata.get("jupyter")]
    assert sum(sizes) < 5000 and len(content.cells) == len(sizes) + 1
    compile((tmp_path / "build/colab_cell.py").read_text(encoding="utf-8"), "cell", "exec")


@pytest.mark.drill
def test_the_notebook_runs_with_its_own_settings(tmp_path: Path) -> None:
    outputs = Kernel(tmp_path).run_all(colab.notebook())
    for model in MODELS:
        metrics = json.loads((tmp_path / f"runs/{model}/eval/synthetic/metrics.json").read_text())
        trivial = [v for k, v in metrics["baselines"].items() if k not in (IMAGE_ALONE, UNTRAINED)]
        assert metrics["auroc"] > max(trivial) + 0.1
    assert sum(len(output.pictures) for output in outputs) == 3
