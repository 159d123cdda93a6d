"""What the processes of bench.py do: the product's loops, and those that it is held against.

    python tests/bench_work.py KIND SETTINGS     then answers requests, a line of JSON each way

A kind of work is a function of its settings, which gives the function that answers requests.
`sizes` are the fields of Config that make the networks as large as they are.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np
import reference
import torch
from PIL import Image
from torch import Tensor

import train
from config import Config, flag, parse_config
from data import NORMAL, ImageStream, Sample, Source, create_dataloaders, draw_phantom, open_source
from models import (
    AnomalyScorer, Draws, Setup, choose_device, choose_precision, create_model, seeded, to_float)

Answer = Callable[..., dict]
CPU = torch.device("cpu")
IMPORTED = train.process_memory()  # bytes that the imports took at the most
LARGE_MATRIX = train.LARGE_MATRIX


def phantom_batches(count: int, batch: int, size: int) -> list[Tensor]:
    """`count` of uint8 [batch,1,size,size]."""
    images = [torch.from_numpy(draw_phantom(i, size)[0])[None] for i in range(count * batch)]
    return list(torch.stack(images).split(batch))


def product_setup(device: str = "cpu", precision: str = "auto") -> Setup:
    """The Setup that train.py chooses. On a CPU the process keeps what it frees from here on."""
    setup = train.join_processes(Config(device=device))
    return dataclasses.replace(setup, precision=choose_precision(precision, setup.device)[0])


# ----------------------------------------------------------------------------------------------
# Training steps


def our_training(model: str, batch: int, sizes: dict, device: str = "cpu", compile: bool = False,
                 batches: int = 2, precision: str = "auto", large: int | None = None) -> Answer:
    """Training steps as train.py takes them.

    large: weights of so many numbers are treated as train.py treats its large ones.
    """
    setup = product_setup(device, precision)
    config = Config(model=model, batch_size=batch, epochs=1, compile=compile, **sizes)
    train.LARGE_MATRIX = large or LARGE_MATRIX
    state = train.new_state(config, setup)
    state.model.train()
    objective = train.Objective(state.model)
    if compile:
        objective = torch.compile(objective)

    def step(images: Tensor) -> float:
        loss, _ = train.train_step(state, objective, images, config, len(images), setup)
        state.step += 1
        return loss

    return stepping(step, phantom_batches(batches, batch, config.image_size), setup.device)


def plain_training(model: str, batch: int, sizes: dict, device: str = "cpu", batches: int = 2,
                   weights: int | None = None) -> Answer:
    """The loop of reference.py, with the same corruptions of the same images.

    weights: a seed for those that it begins with; those of `our_training` have 0.
    """
    where, _ = choose_device(device)
    config = Config(model=model, **sizes)
    network = reference.plain_model(config)
    if weights is not None:  # otherwise it is not worth making them twice
        torch.manual_seed(weights)
        network.load_state_dict(create_model(model, config).state_dict())
    step = reference.plain_training(
        network, where,
        lambda number, count: Draws(seeded(config.seed, "step", number), count))
    return stepping(step, phantom_batches(batches, batch, config.image_size), where)


def stepping(step: Callable[[Tensor], float], batches: list[Tensor],
             device: torch.device) -> Answer:
    """Answers with images a second, losses and peak memory so far of so many steps of whole
    batches, or of their first images alone."""
    done = 0

    def answer(steps: int, batch: int | None = None) -> dict:
        nonlocal done
        began, losses, seen = time.perf_counter(), [], 0
        for _ in range(steps):
            images = batches[done % len(batches)][:batch]
            losses.append(step(images))
            seen += len(images)
            done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return {"rate": seen / seconds, "losses": losses,
                "memory": train.process_memory(), "imported": IMPORTED,
                "device_memory": torch.cuda.max_memory_allocated(device)
                if device.type == "cuda" else 0}
    return answer


def machine(sizes: dict) -> Answer:
    """What this machine is, and how fast its GPU could train."""
    def gpu_gflops(precision: str, side: int = 8192) -> float:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
        a, b = (torch.randn(side, side, device="cuda", dtype=kind) for _ in range(2))
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        return 2 * side**3 / min(seconds) / 1e9

    def answer() -> dict:
        try:
            text = Path("/proc/cpuinfo").read_text()
        except OSError:  # not Linux
            text = ""
        lines = dict(x.split(":", 1) for x in text.replace("\t", "").splitlines() if ":" in x)
        known = {"amx_bf16", "avx512_bf16", "avx512f", "avx2"}
        result: dict[str, object] = {
            "cpu": lines.get("model name", platform.processor()).strip(), "cores": os.cpu_count(),
            "flags": sorted(known & set(lines.get("flags", "").split())),
            "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "python": platform.python_version(),
            "precision": choose_precision("auto", CPU)[0]}
        if torch.cuda.is_available():
            precision, _ = choose_precision("auto", torch.device("cuda"))
            result |= {"gpu": torch.cuda.get_device_name(), "gpu_precision": precision,
                       "gpu_gflops": gpu_gflops(precision), "gflop_an_image": {
                           name: training_flops(Config(model=name, **sizes)) / 1e9
                           for name in reference.PLAIN_MODELS}}
        return result
    return answer


def training_flops(config: Config) -> float:
    """Floating-point operations that training on one image takes, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        images = torch.empty(4, 1, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            reference.plain_loss(reference.plain_model(config), images, images).backward()
    return counter.get_total_flops() / len(images)


# ----------------------------------------------------------------------------------------------
# Data


def memory_now() -> int:
    """Bytes of memory that this process holds, and its children on top; 0 if that is unknown.

    Less what is mapped from files, as the code of libraries is: children share theirs with one
    another, and it would count where there are none alone.
    """
    def kilobytes(pid: int | str, file: str, *keys: str) -> int:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(keys))

    try:
        total = kilobytes("self", "status", "RssAnon:", "RssShmem:")
    except OSError:  # not Linux
        return 0
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it has just ended
            total += kilobytes(child.pid, "smaps_rollup", "Private_Dirty:")
    return total << 10


def watched(passing: Callable[..., int]) -> Answer:
    """Answers with images a second of what counts them. If asked for memory, which may cost speed,
    it looks four times a second: the most bytes `held`, and how many came after this call."""
    before = memory_now()

    def answer(memory: bool = False, **request: object) -> dict:
        peak, over = [before], threading.Event()

        def look() -> None:
            while not over.wait(0.25):
                peak.append(memory_now())

        if memory:
            (thread := threading.Thread(target=look)).start()
        began = time.perf_counter()
        count = passing(**request)
        rate = count / (time.perf_counter() - began)
        if memory:
            peak.append(memory_now())
            over.set()
            thread.join()
        known = memory and before  # else None
        return {"rate": rate, "held": max(peak) if known else None,
                "memory": max(peak) - before if known else None}
    return answer


def our_folder(sizes: dict) -> Answer:
    """An epoch of a folder or of a data set at Kaggle, on its way to a step, and nothing kept."""
    def passing(data: str, env: dict[str, str] | None = None) -> int:
        config = Config(data=data, **sizes)
        with mock.patch.dict(os.environ, env or {}):
            source = open_source(config)
            stream = ImageStream(source, source.samples, config.image_size, 32, seed=0, cache=False)
            return sum(len(to_float(x, CPU)) for x, _ in stream)
    return watched(passing)


def their_folder(sizes: dict) -> Answer:
    """The same with torchvision."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    size = Config(**sizes).image_size
    road = transforms.Compose([transforms.Grayscale(), transforms.Resize((size, size)),
                               transforms.ToTensor()])

    def passing(data: str) -> int:
        return sum(len(x) for x, _ in DataLoader(datasets.ImageFolder(data, road), 32,
                                                 shuffle=True, num_workers=2))
    return watched(passing)


def small_images(sizes: dict, count: int, cache: bool) -> Answer:
    """Epochs of a virtual archive: any number of small images, of which 64 exist. Answers also with
    the bytes that the list of them takes."""
    size = Config(**sizes).image_size
    head = b"P5 %d %d 255\n" % (size, size)
    files = [head + image.numpy().tobytes() for image in phantom_batches(64, 1, size)]

    class Images(Source):
        spec, name, title, left_out = "images", "images", "images", Counter()

        def read_file(self, name: str) -> bytes:
            return files[int(name) % len(files)]

    def passing(epochs: int = 1) -> int:
        seen = 0
        for _ in range(epochs):
            stream.set_epoch(stream.epoch + 1)
            seen += sum(len(to_float(x, CPU)) for x, _ in stream)
        return seen

    source, before = Images(), memory_now()
    source.samples = [Sample(name, name, NORMAL) for name in map("{:08d}".format, range(count))]
    names = memory_now() - before
    stream = ImageStream(source, source.samples, size, 32, seed=0, cache=cache)
    answer = watched(passing)
    return lambda **request: answer(**request) | {"names": names}


def archive(folder: str) -> Answer:
    """The stand-in for Kaggle, serving a folder; answers with what points the client to it."""
    from kaggle_stand_in import Archive, StandIn

    server = StandIn()
    server.archives["bench/images"] = Archive.of_folder(Path(folder))
    return lambda: {"env": server.environment()}


def image_folders(scratch: str, count: int, side: int) -> Answer:
    """Makes a folder of images as JPEG or PNG, each there five times under different names."""
    def answer(suffix: str) -> dict:
        folder = Path(scratch) / f"{suffix}-{count}x{side}"
        begun = folder.with_suffix(".begun")
        if folder.is_dir():
            return {"folder": str(folder)}
        (begun / "normal").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            if i % 8 == 0:
                image = Image.fromarray(draw_phantom(i, side)[0])
            first = begun / "normal" / f"{i:03d}-0.{suffix}"
            image.rotate(i % 8).save(first, **({"quality": 90} if suffix == "jpg" else {}))
            for copy in range(1, 5):
                (first.parent / f"{i:03d}-{copy}.{suffix}").write_bytes(first.read_bytes())
        begun.rename(folder)
        return {"folder": str(folder)}
    return answer


# ----------------------------------------------------------------------------------------------
# Programs


def evaluation(model: str, sizes: dict, images: int) -> Answer:
    """evaluate.py's scoring of an untrained run on the phantom, and the bare forward pass."""
    import evaluate

    batch, setup = train.READ_AT_ONCE, product_setup()
    config = Config(model=model, samples=2 * batch, batch_size=batch, **sizes)
    network = train.new_state(config, setup).model.eval()
    loaders = create_dataloaders(config)
    # What it refers to is of no moment: a few images.
    scorer = train.calibrate(network, loaders._replace(val=loaders.train), setup)
    run = evaluate.TrainedRun(Path(), model, config, network, scorer, setup, "", "")
    test = loaders.test.samples
    some = [*test[: images // 2], *test[-(images // 2):]]  # normal ones, and abnormal
    trivial = evaluate.TrivialScores(np.concatenate([x for x, _ in loaders.train]))
    batches = [to_float(x, CPU) for x in phantom_batches(2, batch, config.image_size)]

    @torch.no_grad()  # in inference mode autocast would cast the weights each time
    def forward() -> int:
        with setup.autocast():
            for i in range(len(some) // batch):
                network.reconstructions(batches[i % 2])
        return len(some) // batch * batch

    def scoring() -> int:
        result = evaluate.Result(run, loaders.source, some)
        evaluate.score_samples(result, trivial)
        return len(result.scores)

    def twice() -> int:
        """As if no image lay where it is most like normal ones; those of the phantom all do."""
        def elsewhere(self: AnomalyScorer, images: Tensor) -> Tensor:
            return torch.ones(len(images), 2, dtype=torch.int64)

        with mock.patch.object(AnomalyScorer, "alignment", elsewhere):
            return scoring()

    parts = {"forward": forward, "scoring": scoring, "twice": twice}
    return lambda part: watched(parts[part])()


def first_step(model: str, sizes: dict) -> Answer:
    """`python train.py` to the end of its first step; answers with when that was."""
    class Taken(Exception):
        pass

    def one_step(*arguments: object) -> None:
        real(*arguments)
        raise Taken

    real = train.train_step

    def answer() -> dict:
        flags = [x for name, value in sizes.items() for x in (flag(name), str(value))]
        with tempfile.TemporaryDirectory() as folder, \
                mock.patch.object(train, "train_step", one_step), contextlib.suppress(Taken):
            train.train(parse_config([*flags, "--model", model, "--device", "cpu",
                                      "--output-dir", folder], environ={}))
        return {"at": time.time()}
    return answer


KINDS: dict[str, Callable[..., Answer]] = {
    f.__name__: f for f in (our_training, plain_training, machine, our_folder, their_folder,
                            small_images, archive, image_folders, evaluation, first_step)}

if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the program prints is no reply
    answer = KINDS[sys.argv[1]](**json.loads(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)
