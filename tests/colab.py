"""Write build/colab_cell.py and build/imgae_dx.ipynb, which run all of this in Google Colab.

    make colab

Both hold the five modules as they are, write them into a folder imgae_dx and import them from
there: nothing of this project is downloaded. Both take the same steps. Only the standard library
is needed here.
"""

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
MODULES = ("config", "models", "data", "train", "evaluate")


class Step(NamedTuple):
    """A section of the notebook: a text and a code cell."""

    title: str
    text: str  # Markdown
    settings: str  # Python; in the single cell those of all steps come first
    code: str


WHAT = """\
Trains two autoencoders, a **U-Net** and a **Reversed Autoencoder**, on *normal* images only. A new
image is reconstructed as it would look if it were normal. Where the two differ, a heatmap lights
up, and the image gets an anomaly score.

**Runtime → Run all** takes a few minutes. It starts with small models and drawn chest films, and
needs no account, no download and no GPU; with one (Runtime → Change runtime type) it is quicker.

Research use only. Not for diagnosis."""

PROGRAM = Step("The program", """\
The five modules, written into the folder `imgae_dx`. You may change them here: run the changed cell
again, and then the last one of this section and all that follow.""", "", """\
import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

from IPython.display import Image, display

folder = str(Path("imgae_dx").resolve())
sys.path[:] = [folder, *(p for p in sys.path if p != folder)]
for module in ("config", "models", "data", "train", "evaluate"):
    sys.modules.pop(module, None)  # as it is now, not as it was when this was last run
importlib.invalidate_caches()

import torch
from matplotlib import pyplot as plt

from config import Config, UserError
from data import BadImage, decode_image, open_source, read_splits
from evaluate import describe_sample, evaluate, predict, show_image
from train import choose_device, train

print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, "
      "{} ({})".format(*choose_device("auto")))
""")

STEPS = (
    Step("Where results are kept", """\
The machine behind a Colab notebook is thrown away some time after the notebook is closed, and with
it what it has stored. If you set `MOUNT_DRIVE = True`, Google asks you to give this notebook access
to your Drive. Everything is then kept in its folder `imgae_dx`, and a run that was cut off goes on
when these cells are run again, on another day too. That takes 0.6 GB at the settings below and up
to 8 GB at full size; replaced checkpoints may wait in Drive's bin until you empty it. A Drive that
is mounted already is used.""", """\
MOUNT_DRIVE = False  # True: Google asks for access to your Drive; results are kept there
""", """\
if MOUNT_DRIVE:
    try:
        from google.colab import drive
    except ImportError:
        raise UserError("MOUNT_DRIVE: only in Google Colab; set it to False") from None
    try:
        drive.mount("/content/drive")
    except Exception as error:
        raise UserError(f"Google Drive was not mounted ({error}). Run this again and allow it, or "
                        "set MOUNT_DRIVE = False") from None
DRIVE = Path("/content/drive/MyDrive")
OUT = DRIVE / "imgae_dx" if DRIVE.is_dir() else Path("runs")
print(f"Results are kept in {OUT}" + ("" if DRIVE.is_dir() else ", on this machine only"))
"""),
    Step("The data", """\
- `"synthetic"`: the built-in phantom, drawn chest films with known lesions.
- `"kaggle:owner/name"`: a data set of Kaggle's, streamed. On kaggle.com: Settings, API, Create New
  Token. In Colab: Secrets (the key symbol on the left), add it as `KAGGLE_API_TOKEN` and give this
  notebook access. It is neither printed nor saved.
- `"/content/drive/MyDrive/my_xrays"`: a folder of yours in Drive, mounted above, with subfolders
  `normal` and `abnormal`.""", """\
DATA = "synthetic"  # the built-in phantom
# DATA = "kaggle:paultimothymooney/chest-xray-pneumonia"  # needs KAGGLE_API_TOKEN under Secrets
# DATA = "/content/drive/MyDrive/my_xrays"  # a folder with normal/ and abnormal/
IMAGE_SIZE = 64  # pixels, of a side; a multiple of 16
""", """\
if DATA.startswith("kaggle:"):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "kaggle>=2.0"]
    if (done := subprocess.run(pip, capture_output=True, text=True)).returncode:
        raise UserError(f"the kaggle package cannot be installed: {done.stderr.strip()}")
source = open_source(Config(data=DATA, image_size=IMAGE_SIZE))
print(source.title)
figure, grid = plt.subplots(2, 5, figsize=(8, 3.8), layout="constrained")
for label in (0, 1):
    examples = [s for s in source.samples if s.label == label]
    for axes, sample in zip(grid[label], examples):
        with contextlib.suppress(BadImage, OSError):
            picture = decode_image(source.read(sample), IMAGE_SIZE) / 255
            show_image(axes, picture, describe_sample(sample))
for axes in grid.flat:
    axes.set_axis_off()
plt.show()
"""),
    Step("Train both models", """\
On normal images only, the same ones for both. If you interrupt this (Runtime → Interrupt
execution), it saves first; run the cell again, and it goes on from there. What is finished is not
trained again.

These settings are for a first look. For real images take a GPU and `IMAGE_SIZE = 128`,
`SAMPLES = None`, `EPOCHS = 20`, `WIDTH = 64`.""", """\
SAMPLES = 400  # normal images to train on; None: all there are
EPOCHS = 4  # passes over them
WIDTH = 16  # channels of the first level; 64 is full size
""", """\
folders = train(Config(model="both", data=DATA, image_size=IMAGE_SIZE, samples=SAMPLES,
                       epochs=EPOCHS, width=WIDTH, output_dir=str(OUT), reuse=True))
"""),
    Step("Compare them", """\
On the test images, which no model has seen. *AUROC* is the chance that an abnormal image scores
higher than a normal one; 0.5 is guessing. The *trivial scores* need no model: what does not beat
them is of no use. More is in `comparison.html` in the folder `OUT`: download it from Files, on the
left, and open it in a browser.""", "", """\
evaluate(folders)
display(Image(str(OUT / "comparison.png"), width=1000))
"""),
    Step("Score an image of your own", """\
It should be of the kind that the models were trained on: to models that know the phantom only,
every real X-ray is abnormal.""", """\
IMAGE = ""  # a file or folder; "upload": choose a file; empty: an abnormal test image
""", """\
if IMAGE == "upload":
    try:
        from google.colab import files
    except ImportError:
        raise UserError('IMAGE = "upload": only in Google Colab; give a path') from None
    name, content = next(iter(files.upload().items()), ("", b""))
    if not name:
        raise UserError("no file was chosen")
elif not IMAGE:
    sample = next((s for s in read_splits(folders[0] / "split.csv").test if s.label), None)
    if sample is None:
        raise UserError("there is no abnormal test image: set IMAGE to a file of yours")
    name, content = f"example{Path(sample.key).suffix or '.pgm'}", source.read(sample)
    print(f"an abnormal test image: {describe_sample(sample)}\\n")
image = Path(IMAGE)
if IMAGE in ("upload", ""):
    image = OUT / "images" / name
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(content)
for run in folders:
    predictions = run / "predictions" / image.stem
    for earlier in predictions.glob("*_heatmap.png"):  # of other images, in a folder of that name
        earlier.unlink()
    predict(run, image, predictions)
    for heatmap in sorted(predictions.glob("*_heatmap.png"))[:10]:
        display(Image(str(heatmap), width=800))
"""),
)

CELL = """\
# ImgAE-Dx in one cell: paste it into an empty notebook (Google Colab or Jupyter) and run it. It
# trains a U-Net and a Reversed Autoencoder on normal images, compares them, and shows what they
# find. When it is run again, it goes on where it stopped. Research use only. Not for diagnosis.

{settings}
# --- The program: five modules, written into the folder imgae_dx ---

MODULES = {{}}
{modules}
import os

os.makedirs("imgae_dx", exist_ok=True)
for name, text in MODULES.items():
    with open(f"imgae_dx/{{name}}", "w", encoding="utf-8") as file:
        file.write(text)

{steps}"""


def read_modules() -> dict[str, str]:
    """File name -> source of the five modules. ValueError if one cannot be quoted."""
    texts = {f"{name}.py": (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    for name, text in texts.items():
        if "'''" in text:
            raise ValueError(f"{name}: holds ''', which ends the quotation in the single cell")
    return texts


def single_cell(modules: dict[str, str]) -> str:
    """All steps as the Python text of one cell, with the settings first."""
    steps = [PROGRAM.code, *(f"# --- {s.title} ---\n\n{s.code}" for s in STEPS)]
    return CELL.format(
        settings="\n".join(f"# {s.title}\n{s.settings}" for s in STEPS if s.settings),
        modules="".join(f"MODULES[{name!r}] = r'''{text}'''\n" for name, text in modules.items()),
        steps="\n".join(steps))


def notebook(modules: dict[str, str]) -> dict[str, object]:
    """The steps as a notebook, nbformat 4.5, without outputs."""
    cells = []

    def add(kind: str, name: str, text: str, **metadata: object) -> None:
        code = {"execution_count": None, "outputs": []} if kind == "code" else {}
        cells.append({"cell_type": kind, "id": name, "metadata": {"id": name, **metadata},
                      "source": text.strip("\n").splitlines(keepends=True), **code})

    add("markdown", "title", f"# ImgAE-Dx\n\n{WHAT}")
    for number, step in enumerate((PROGRAM, *STEPS)):
        add("markdown", f"step-{number}", f"## {step.title}\n\n{step.text}")
        if step is PROGRAM:
            add("code", "folder", "import os\n\nos.makedirs('imgae_dx', exist_ok=True)")
            for name, text in modules.items():
                add("code", name.replace(".", "-"), f"%%writefile imgae_dx/{name}\n{text}",
                    jupyter={"source_hidden": True})
        add("code", f"step-{number}-code", f"{step.settings}\n{step.code}")
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {
        "colab": {"provenance": [], "collapsed_sections": ["step-0"]},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}}


def main() -> None:
    modules = read_modules()
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    (folder / "colab_cell.py").write_text(single_cell(modules), encoding="utf-8")
    text = json.dumps(notebook(modules), indent=1, ensure_ascii=False) + "\n"
    (folder / "imgae_dx.ipynb").write_text(text, encoding="utf-8")
    print("build/colab_cell.py    paste it into an empty notebook, and run it\n"
          "build/imgae_dx.ipynb   in Colab: File, Upload notebook; then Runtime, Run all")


if __name__ == "__main__":
    main()
