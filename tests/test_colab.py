"""The cell to paste and the notebook that make colab writes, run in real kernels, offline."""

import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import colab
import matplotlib.font_manager  # makes its cache of fonts, once for all kernels
import pytest
from conftest import write_image

jupyter_client = pytest.importorskip("jupyter_client")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

SMALL = {"IMAGE_SIZE": 32, "SAMPLES": 64, "EPOCHS": 5, "WIDTH": 4}
# Run by the kernel before anything else: as if there were no network.
OFFLINE = """
import socket
def refuse(*arguments, **more):
    raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
# What stands in for Colab's own package: a Drive that is there once it is mounted, and a person who
# chooses a film to upload.
COLAB = """
import sys, types
from pathlib import Path
drive = types.SimpleNamespace(mount=lambda path: Path("hidden").rename(path))
files = types.SimpleNamespace(upload=lambda: {{"my film.png": Path({film!r}).read_bytes()}})
for name in ("google", "google.colab"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
vars(sys.modules["google.colab"]).update(drive=drive, files=files)
"""


class Output:
    """What a cell showed."""

    def __init__(self) -> None:
        self.text = {"stdout": "", "stderr": ""}
        self.pictures: list[bytes] = []
        self.error: list[str] = []  # the lines that are shown of it

    def add(self, message: dict) -> None:
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self.text[content["name"]] += content["text"]
        elif kind == "display_data":
            self.pictures.append(base64.b64decode(content["data"]["image/png"]))
        elif kind == "error":
            self.error += content["traceback"]


class Kernel:
    """A kernel of a notebook in a folder, without a network, as Jupyter and Colab start it."""

    def __init__(self, folder: Path) -> None:
        startup = folder / "ipython" / "profile_default" / "startup" / "offline.py"
        startup.parent.mkdir(parents=True)
        startup.write_text(OFFLINE)
        spec = folder / "kernels" / "here" / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"display_name": "here", "language": "python", "argv": [
            sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}))
        specs = jupyter_client.kernelspec.KernelSpecManager(kernel_dirs=[str(spec.parent.parent)])
        self.manager = jupyter_client.KernelManager(
            kernel_name="here", kernel_spec_manager=specs,
            connection_file=str(folder / "connection.json"))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE", "MPLBACKEND"))}
        self.manager.start_kernel(cwd=str(folder), env=kept | {
            "IPYTHONDIR": str(folder / "ipython"), "HOME": str(folder), "PIP_NO_INDEX": "1",
            "MPLCONFIGDIR": matplotlib.get_cachedir()})
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str, interrupt_at: str | None = None, timeout: float = 120) -> Output:
        """Run a cell; with interrupt_at, interrupt it once it has printed that."""
        output = Output()

        def hook(message: dict) -> None:
            nonlocal interrupt_at
            output.add(message)
            if interrupt_at and interrupt_at in output.text["stdout"]:
                interrupt_at = None
                self.manager.interrupt_kernel()

        # stop_on_error would have an earlier kernel refuse what is sent soon after an error.
        self.client.execute_interactive(code, timeout=timeout, allow_stdin=False,
                                        stop_on_error=False, output_hook=hook)
        return output

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def with_settings(code: str, **settings: object) -> str:
    """The code with other values for the variables that its first lines set."""
    for name, value in settings.items():
        code, found = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", code, count=1,
                              flags=re.MULTILINE)
        assert found, name
    return code


@pytest.fixture(scope="module")
def cell() -> str:
    return with_settings(colab.single_cell(colab.read_modules()), **SMALL)


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory,
           cell: str) -> Iterator[tuple[Kernel, Path, Output, Output]]:
    """(kernel, its folder, what the pasted cell showed when it was interrupted, and run again)."""
    folder = tmp_path_factory.mktemp("colab")
    kernel = Kernel(folder)
    interrupted = kernel.run(cell, interrupt_at="epoch 1/5")
    yield kernel, folder, interrupted, kernel.run(cell)
    kernel.close()


@pytest.mark.drill
def test_an_interrupted_cell_says_in_one_line_that_it_has_saved(
    pasted: tuple[Kernel, Path, Output, Output]
) -> None:
    _, _, interrupted, _ = pasted
    assert interrupted.error == ["ended as asked, and saved; go on with: the same cell again"]
    assert "epoch 5/5" not in interrupted.text["stdout"]


@pytest.mark.drill
def test_the_same_cell_again_goes_on_and_ends_with_table_and_pictures(
    pasted: tuple[Kernel, Path, Output, Output]
) -> None:
    _, folder, _, again = pasted
    shown = again.text["stdout"]
    assert again.error == [] and again.text["stderr"] == ""
    assert "resume    runs/unet/last.pt" in shown and shown.count("epoch 1/5") == 1  # the other's
    for model in ("unet", "reversed_ae"):  # every line once, though the modules came in twice
        assert shown.count(f"model     {model}, ") == 1
    for row in (r"AUROC +95 % interval", r"U-Net +0\.\d{3} ", r"Reversed AE +0\.\d{3} ",
                r"PCA reconstruction error +0\.\d{3}", r"example\.pgm +score"):
        assert re.search(row, shown), row
    files = [folder / "runs" / name for name in (
        "comparison.png", *(f"{model}/predictions/example/example_heatmap.png"
                            for model in ("unet", "reversed_ae")))]
    assert [p for p in again.pictures if p in [f.read_bytes() for f in files]] == again.pictures[1:]
    assert len(again.pictures) == 1 + len(files) and again.pictures[0][:4] == b"\x89PNG"


@pytest.mark.drill
def test_what_a_cell_runs_is_this_very_code_and_can_be_read_there(
    pasted: tuple[Kernel, Path, Output, Output]
) -> None:
    kernel, folder, _, _ = pasted
    for name, text in colab.read_modules().items():
        assert (folder / "imgae_dx" / name).read_text(encoding="utf-8") == text
    shown = kernel.run("import inspect; print(inspect.getsource(train), inspect.getfile(predict))")
    assert shown.text["stdout"].startswith("def train(config: Config) -> list[Path]:")
    assert f"{folder.resolve()}/imgae_dx/evaluate.py" in shown.text["stdout"]


@pytest.mark.drill
def test_a_module_that_is_changed_in_the_notebook_is_imported_anew(
    pasted: tuple[Kernel, Path, Output, Output]
) -> None:
    kernel, text = pasted[0], colab.read_modules()["models.py"]
    for addition in ("CHANGED = True\n", ""):
        kernel.run(f"%%writefile imgae_dx/models.py\n{text}{addition}")
        kernel.run(colab.PROGRAM.code)
        shown = kernel.run("import models; print(hasattr(models, 'CHANGED'))")
        assert shown.text["stdout"] == f"{bool(addition)}\n"


@pytest.mark.drill
@pytest.mark.parametrize(("title", "settings", "says"), [
    ("The data", {"DATA": "nowhere"}, "--data nowhere: there is nothing at "),
    ("The data", {"DATA": "kaggle:someone/xrays"}, "no Kaggle credentials found."),
    ("Where results are kept", {"MOUNT_DRIVE": True}, "MOUNT_DRIVE: only in Google Colab"),
    ("Score an image of your own", {"IMAGE": "upload"}, 'IMAGE = "upload": only in Google Colab'),
    ("Score an image of your own", {"IMAGE": "gone.png"}, "--image gone.png: there is nothing at"),
])
def test_a_mistake_is_shown_as_its_message_alone(
    pasted: tuple[Kernel, Path, Output, Output], title: str, settings: dict, says: str
) -> None:
    (step,) = (s for s in colab.STEPS if s.title == title)
    shown = pasted[0].run(with_settings(f"{step.settings}\n{step.code}", **settings))
    assert len(shown.error) == 1 and shown.error[0].startswith(says)
    assert shown.pictures == [] and shown.text["stderr"] == ""


def run_notebook(kernel: Kernel, content: dict, **settings: object) -> list[Output]:
    """Run a notebook's code cells one after the other, and see that each went well."""
    outputs = []
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            here = {k: v for k, v in settings.items() if f"\n{k} = " in f"\n{code}"}
            outputs.append(kernel.run(with_settings(code, **here), timeout=900))
            assert outputs[-1].error == [] and outputs[-1].text["stderr"] == "", code[:200]
    return outputs


@pytest.mark.drill
def test_the_notebook_finds_finished_runs_in_drive_and_scores_an_uploaded_image(
    pasted: tuple[Kernel, Path, Output, Output], tmp_path: Path
) -> None:
    shutil.copytree(pasted[1] / "runs", tmp_path / "hidden/MyDrive/imgae_dx")
    write_image(tmp_path / "film.png")
    text = json.dumps(colab.notebook(colab.read_modules()))
    content = json.loads(text.replace("/content/drive", str(tmp_path / "drive")))
    kernel = Kernel(tmp_path)
    kernel.run(COLAB.format(film=str(tmp_path / "film.png")))
    outputs = run_notebook(kernel, content, **SMALL, MOUNT_DRIVE=True, IMAGE="upload")
    kernel.close()
    shown = "".join(output.text["stdout"] for output in outputs)
    assert f"Results are kept in {tmp_path}/drive/MyDrive/imgae_dx\n" in shown
    assert shown.count("is a finished run of these settings: left as it is") == 2
    assert "epoch" not in shown.replace("epochs", "") and re.search(r"U-Net +0\.\d{3} ", shown)
    assert [len(output.pictures) for output in outputs[-5:]] == [0, 1, 0, 1, 2]
    assert "my film.png  score" in outputs[-1].text["stdout"]
    for model in ("unet", "reversed_ae"):
        predictions = tmp_path / "drive/MyDrive/imgae_dx" / model / "predictions/my film"
        assert (predictions / "my film_heatmap.png").read_bytes() in outputs[-1].pictures


def test_make_colab_writes_a_valid_notebook_without_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in colab.read_modules():
        shutil.copy(colab.ROOT / name, tmp_path)
    monkeypatch.setattr(colab, "ROOT", tmp_path)
    colab.main()
    content = nbformat.read(tmp_path / "build/imgae_dx.ipynb", as_version=4)
    nbformat.validate(content)
    assert all(not c.outputs for c in content.cells if c.cell_type == "code")
    compile((tmp_path / "build/colab_cell.py").read_text(encoding="utf-8"), "cell", "exec")


@pytest.mark.drill
def test_the_notebook_runs_with_its_own_settings(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    outputs = run_notebook(kernel, colab.notebook(colab.read_modules()))
    kernel.close()
    metrics = [json.loads((tmp_path / f"runs/{model}/eval/synthetic/metrics.json").read_text())
               for model in ("unet", "reversed_ae")]
    assert all(m["auroc"] > max(m["baselines"].values()) + 0.1 for m in metrics)
    assert sum(len(output.pictures) for output in outputs) == 4
