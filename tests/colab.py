"""Write build/colab_cell.py and build/imgae_dx.ipynb, which run all of this in Google Colab.

    make colab

Both hold the five modules, zipped, in one string. They unpack it into a folder imgae_dx and import
from there: nothing of this project is downloaded. Only the standard library is needed here.
"""

import base64
import io
import json
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

TITLE = """\
# ImgAE-Dx
Trains two autoencoders, a **U-Net** and a **Reversed Autoencoder**, on *normal* images only. A new
image is reconstructed as it would look if it were normal. Where the two differ, a heatmap lights
up, and the image gets an anomaly score. Research use only. Not for diagnosis.

**Runtime → Run all** takes a few minutes. These settings are for a first look: small models,
drawn chest images, no account, no download, no GPU. For real images take a GPU (Runtime → Change
runtime type) and `IMAGE_SIZE = 128`, `SAMPLES = None`, `EPOCHS = None`, `WIDTH = 64`."""

# Colab makes a form of the comments `@title` and `@param`, and folds the code away behind it.
SETTINGS = """\
# @title ImgAE-Dx: settings { display-mode: "form" }
# @markdown `synthetic`, a folder, or `kaggle:owner/name` with Colab's secret `KAGGLE_API_TOKEN`.
DATA = "synthetic"  # @param {type: "string"}
# @markdown Keep results in your Drive, in the folder `imgae_dx`. Google asks you first.
MOUNT_DRIVE = False  # @param {type: "boolean"}
IMAGE_SIZE = 64  # @param {type: "integer"}
# @markdown Normal images to train on; `None`: all there are.
SAMPLES = 400  # @param {type: "raw"}
EPOCHS = 4  # @param {type: "raw"}
# @markdown Channels of the first level; 64 is full size.
WIDTH = 16  # @param {type: "integer"}
# @markdown An image or folder to score; `upload`: choose a file; empty: an abnormal one of `DATA`.
IMAGE = ""  # @param {type: "string"}
# @markdown Another site: a folder of 30 or more of its normal images, for a threshold of its own.
NORMALS = ""  # @param {type: "string"}
# @markdown Take the models elsewhere: `model.pt2`, or `model.onnx`.
EXPORT = ""  # @param {type: "string"}
"""

PROGRAM = """\
import base64, io, zipfile

MODULES = "{}"
with zipfile.ZipFile(io.BytesIO(base64.b64decode(MODULES))) as archive:
    archive.extractall("imgae_dx")
"""

STEPS = {
    """\
## Start
The modules in the folder `imgae_dx` may be changed: then run this cell again, and all that follow.
With `MOUNT_DRIVE` a run that was cut off goes on when the cells are run again, on another day and
machine too. It takes 0.6 GB of Drive, up to 8 GB at full size.""": """\
import sys
from pathlib import Path
from IPython.display import Image, display

sys.path.insert(0, str(Path("imgae_dx").resolve()))
for name in ("config", "models", "data", "train", "evaluate"):
    sys.modules.pop(name, None)  # as it is now, not as it was when this was last run

from config import Config, UserError
from data import open_source
from evaluate import calibrate, evaluate, export, predict
from train import train
if MOUNT_DRIVE:
    try:
        from google.colab import drive
        drive.mount("/content/drive")
    except Exception as error:
        raise UserError(f"MOUNT_DRIVE, for Google Colab only: not mounted: {error}") from None
if DATA.startswith("kaggle:"):
    get_ipython().run_line_magic("pip", "install --quiet 'kaggle>=2.0'")
OUT = Path("/content/drive/MyDrive/imgae_dx" if MOUNT_DRIVE else "runs")
print(f"Results are kept in {OUT}")
""",
    """\
## Train both models
If you interrupt this (Runtime → Interrupt execution), it saves first. Run the cell again, and it
goes on from there. What is finished is not trained again.""": """\
folders = train(Config(model="both", data=DATA, image_size=IMAGE_SIZE, samples=SAMPLES,
                       epochs=EPOCHS, width=WIDTH, output_dir=str(OUT), reuse=True))
""",
    """\
## Compare them
*AUROC* is the chance that an abnormal image scores higher than a normal one; 0.5 is guessing.
*Trivial scores* need no model: what does not beat them is of no use. More is in
`comparison.html`: download it from Files, on the left, and open it in a browser.""": """\
evaluate(folders)
display(Image(str(OUT / "comparison.png"), width=1000))
""",
    "## Score an image of your own\nTo models that know the drawn images only, "
    "every real X-ray is abnormal.": """\
image = Path(IMAGE)
if IMAGE == "upload":
    try:
        from google.colab import files
        image = Path(next(iter(files.upload())))  # Colab has saved it here
    except (ImportError, StopIteration):
        raise UserError("IMAGE: no file was chosen; upload works in Google Colab only") from None
elif not IMAGE:
    source = open_source(Config(data=DATA, image_size=IMAGE_SIZE))
    sample = next((s for s in source.samples if s.label), source.samples[0])
    image = Path("example" + (Path(sample.key).suffix or ".pgm"))
    image.write_bytes(source.read(sample))
for run in folders:
    predict(run, image, run / "predictions" / image.stem)
    for path in sorted(image.iterdir())[:10] if image.is_dir() else [image]:
        heatmap = run / "predictions" / image.stem / f"{path.stem}_heatmap.png"
        if heatmap.is_file():  # not of what is no image
            display(Image(str(heatmap), width=800))
""",
    """\
## At another site
With `NORMALS` each model gets a threshold of its own for the place these images come from. With
`EXPORT` it is written as one file, for programs that know nothing of this one.""": """\
for run in folders:
    site = "site" if NORMALS else None
    if NORMALS and not (run / "calibration-site.pt").exists():
        calibrate(run, NORMALS, site)
    if EXPORT.endswith(".onnx"):
        get_ipython().run_line_magic("pip", "install --quiet onnxscript onnxruntime")
    if EXPORT:
        export(run, run / EXPORT, calibration=site)
""",
}


def program() -> str:
    """The code that unpacks the five modules. The same modules always give the same text."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("config.py", "models.py", "data.py", "train.py", "evaluate.py"):
            file.writestr(zipfile.ZipInfo(name), (ROOT / name).read_bytes(), zipfile.ZIP_BZIP2)
    return PROGRAM.format(base64.b64encode(archive.getvalue()).decode())


def single_cell() -> str:
    """All code as the text of one cell, with the settings first."""
    return "\n".join([SETTINGS, program(), *(f"#{title.splitlines()[0]}\n\n{code}"
                                             for title, code in STEPS.items())])


def notebook() -> dict[str, object]:
    """Texts and code as a notebook, nbformat 4, without outputs."""

    def cell(kind: str, text: str, **metadata: object) -> dict[str, object]:
        code = {"execution_count": None, "outputs": []} if kind == "code" else {}
        return {"cell_type": kind, "metadata": metadata, "source": text.strip("\n")} | code

    cells = [cell("markdown", TITLE), cell("code", SETTINGS, cellView="form"),
             cell("code", f"# @title The program, unpacked into imgae_dx\n{program()}",
                  cellView="form", jupyter={"source_hidden": True})]
    for text, step in STEPS.items():
        cells += [cell("markdown", text), cell("code", step)]
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 4, "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}}


def main() -> None:
    (build := ROOT / "build").mkdir(exist_ok=True)
    (build / "colab_cell.py").write_text(single_cell(), encoding="utf-8")
    (build / "imgae_dx.ipynb").write_text(json.dumps(notebook(), indent=1), encoding="utf-8")
    print("build/colab_cell.py: paste it into an empty notebook, and run it\n"
          "build/imgae_dx.ipynb: in Colab File, Upload notebook; then Runtime, Run all")


if __name__ == "__main__":
    main()
