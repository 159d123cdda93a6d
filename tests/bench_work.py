"""What the processes of bench.py do: the product's loops, and those that it is held against.

    python tests/bench_work.py KIND SETTINGS     then answers requests, a line of JSON each way

A kind of work is a function of its settings, which gives the function that answers requests.
`sizes` are the fields of Config that make the networks as large as they are.
"""

import contextlib
import csv
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np
import reference
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import train
from config import Config, flag, parse_config
from data import (
    ABNORMAL,
    NORMAL,
    ImageStream,
    Sample,
    Source,
    create_dataloaders,
    decode_image,
    draw_phantom,
    open_source,
    to_float,
)
from models import SCORERS, Draws, create_model, folded

Answer = Callable[..., dict]
CPU = torch.device("cpu")
IMPORTED = train.process_memory()  # bytes that the imports took at the most


def phantom_batches(count: int, batch: int, size: int) -> list[Tensor]:
    """`count` of uint8 [batch,1,size,size]."""
    films = [torch.from_numpy(draw_phantom(i, size)[0])[None] for i in range(count * batch)]
    return list(torch.stack(films).split(batch))


# ----------------------------------------------------------------------------------------------
# Training steps


def our_training(model: str, batch: int, sizes: dict, device: str = "cpu", compile: bool = False,
                 batches: int = 2, large: int | None = None) -> Answer:
    """Training steps as train.py takes them. All that bench knows of its inside is here.

    large: weights of so many numbers are treated as train.py treats its large ones.
    """
    where, _ = train.choose_device(device)
    precision, _ = train.choose_precision("auto", where)
    config = Config(model=model, batch_size=batch, epochs=1, compile=compile, **sizes)
    with mock.patch.object(train, "LARGE_MATRIX", large or train.LARGE_MATRIX):
        run = train.start_run(config, where, precision)
    need = train.memory_of_a_step(run, config, where, precision)
    run.micro_batch = train.parts_that_fit(batch, need, train.free_memory(where), where)
    run.model.train()
    objective, ranks = train.Objective(run.model), train.Ranks()
    if compile:
        objective = torch.compile(objective)

    def step(images: Tensor) -> float:
        loss, _ = train.train_step(run, objective, images, config, len(images), where, precision,
                                   ranks)
        run.step += 1
        return loss

    return stepping(step, phantom_batches(batches, batch, config.image_size), where)


def plain_training(model: str, batch: int, sizes: dict, device: str = "cpu", batches: int = 2,
                   weights: int | None = None) -> Answer:
    """The loop of reference.py, with the same corruptions of the same images.

    weights: a seed for those that it begins with; those of `our_training` have 0.
    """
    where, _ = train.choose_device(device)
    config = Config(model=model, **sizes)
    network = plain_model(config)
    if weights is not None:  # otherwise it is not worth making them twice
        torch.manual_seed(weights)
        network.load_state_dict(create_model(model, config).state_dict())
    step = reference.plain_training(
        network, where,
        lambda number, count: Draws(train.seeded(config.seed, "step", number), count))
    return stepping(step, phantom_batches(batches, batch, config.image_size), where)


def plain_model(config: Config) -> torch.nn.Module:
    return reference.PLAIN_MODELS[config.model](config.image_size, config.latent_dim, config.width,
                                                config.dropout)


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
                "device_memory": train.device_memory(device)}
    return answer


def training_flops(config: Config) -> float:
    """Floating-point operations that training on one image takes, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        images = torch.empty(4, 1, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            reference.plain_loss(plain_model(config), images, images).backward()
    return counter.get_total_flops() / len(images)


def machine(sizes: dict, side: int) -> Answer:
    """What this machine is, how fast it multiplies, and how much there is to multiply."""
    def gflops(device: str, kind: torch.dtype, side: int) -> float:
        a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(4):
                c = a @ b
            c[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        return 4 * 2 * side**3 / min(seconds) / 1e9

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
            "precision": train.choose_precision("auto", CPU)[0],
            "gflops_fp32": gflops("cpu", torch.float32, side),
            "gflop_an_image": {name: training_flops(Config(model=name, **sizes)) / 1e9
                               for name in reference.PLAIN_MODELS}}
        if result["precision"] == "bf16":  # elsewhere it is imitated, and takes minutes
            result["gflops_bf16"] = gflops("cpu", torch.bfloat16, side)
        if torch.cuda.is_available():
            precision, _ = train.choose_precision("auto", torch.device("cuda"))
            kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
            result |= {"gpu": torch.cuda.get_device_name(), "gpu_precision": precision,
                       "gpu_gflops": gflops("cuda", kinds[precision], 8192)}
        return result
    return answer


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
            return sum(len(to_float(x, CPU)) for x, _ in DataLoader(stream, batch_size=None))
    return watched(passing)


def their_folder(sizes: dict) -> Answer:
    """The same with torchvision."""
    from torchvision import datasets, transforms

    size = Config(**sizes).image_size
    road = transforms.Compose([transforms.Grayscale(), transforms.Resize((size, size)),
                               transforms.ToTensor()])

    def passing(data: str) -> int:
        return sum(len(x) for x, _ in DataLoader(datasets.ImageFolder(data, road), 32,
                                                 shuffle=True, num_workers=2))
    return watched(passing)


def decoding(sizes: dict) -> Answer:
    """Decoding and resizing alone, of files in memory, in as many threads as the product takes."""
    size, files = Config(**sizes).image_size, []

    def passing(data: str) -> int:
        with ThreadPoolExecutor(Source.threads) as pool:
            return sum(1 for _ in pool.map(lambda file: decode_image(file, size), files))

    def answer(data: str) -> dict:
        files[:] = [p.read_bytes() for p in sorted(Path(data).glob("*/*-0.*"))] * 5
        return watched(passing)(data=data)
    return answer


def small_films(sizes: dict, count: int, cache: bool) -> Answer:
    """Epochs of a virtual archive: any number of small films, of which 64 exist. Answers also with
    the bytes that the list of them takes."""
    size = Config(**sizes).image_size
    head = b"P5 %d %d 255\n" % (size, size)
    files = [head + film.numpy().tobytes() for film in phantom_batches(64, 1, size)]

    class Films(Source):
        spec, name, title, left_out = "films", "films", "films", Counter()

        def read_file(self, name: str) -> bytes:
            return files[int(name) % len(files)]

    def passing(epochs: int = 1) -> int:
        seen = 0
        for _ in range(epochs):
            stream.set_epoch(stream.epoch + 1)
            seen += sum(len(to_float(x, CPU)) for x, _ in stream)
        return seen

    source, before = Films(), memory_now()
    source.samples = [Sample(name, name, NORMAL) for name in map("{:08d}".format, range(count))]
    names = memory_now() - before
    stream = ImageStream(source, source.samples, size, 32, seed=0, cache=cache)
    answer = watched(passing)
    return lambda **request: answer(**request) | {"names": names}


def archive(folder: str) -> Answer:
    """The stand-in for Kaggle, serving a folder; answers with what points the client to it."""
    from kaggle_stand_in import Archive, StandIn

    server = StandIn()
    server.archives["bench/films"] = Archive.of_folder(Path(folder))
    return lambda: {"env": server.environment()}


def films(scratch: str, count: int, side: int) -> Answer:
    """Makes a folder of films as JPEG or PNG, each there five times under different names."""
    def answer(suffix: str) -> dict:
        folder = Path(scratch) / f"{suffix}-{count}x{side}"
        begun = folder.with_suffix(".begun")
        if folder.is_dir():
            return {"folder": str(folder)}
        (begun / "normal").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            if i % 8 == 0:
                film = Image.fromarray(draw_phantom(i, side)[0])
            first = begun / "normal" / f"{i:03d}-0.{suffix}"
            film.rotate(i % 8).save(first, **({"quality": 90} if suffix == "jpg" else {}))
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

    batch = train.READ_AT_ONCE
    config = Config(model=model, samples=2 * batch, batch_size=batch, **sizes)
    precision, _ = train.choose_precision("auto", CPU)
    network = train.start_run(config, CPU, precision).model.eval()
    loaders = create_dataloaders(config)
    # What it refers to is of no moment: a few films.
    scorer = train.calibrate(network, loaders._replace(val=loaders.train), CPU, precision)
    known = {"folder": Path(), "name": model, "config": config, "model": folded(network),
             "scorer": scorer, "device": CPU, "precision": precision}  # the rest is of no moment
    run = evaluate.Run(**{f.name: known.get(f.name, "") for f in dataclasses.fields(evaluate.Run)})
    test = loaders.test.samples
    some = [*test[: images // 2], *test[-(images // 2):]]  # normal ones, and abnormal
    trivial = evaluate.TrivialScores(np.concatenate([x for x, _ in loaders.train]))
    batches = [to_float(x, CPU) for x in phantom_batches(2, batch, config.image_size)]

    @torch.no_grad()  # in inference mode autocast would cast the weights each time
    def forward() -> int:
        with train.autocast(CPU, precision):
            for i in range(len(some) // batch):
                network.reconstructions(batches[i % 2])
        return len(some) // batch * batch

    def scoring() -> int:
        with run.weights_kept():
            return len(evaluate.score_samples(run, loaders.source, some, "fused", trivial).samples)

    def twice() -> int:
        """As if no film lay where it is most like normal ones; those of the phantom all do."""
        def elsewhere(films: Tensor) -> Tensor:
            return torch.ones(len(films), 2, dtype=torch.int64)

        with mock.patch.object(scorer, "framing", elsewhere):
            return scoring()

    parts = {"forward": forward, "scoring": scoring, "twice": twice}
    return lambda part: watched(parts[part])()


def figures(scratch: str, scores: int) -> Answer:
    """What evaluate.py makes of so many scores, two images of a patient each: all but scoring, of
    a run that is so small that reading and drawing it costs next to nothing."""
    import evaluate

    def answer() -> dict:
        def scored(run: object, source: Source, samples: list[Sample], *_: object) -> object:
            rng, many = np.random.RandomState(0), (samples * (scores // len(samples) + 1))[:scores]
            many = [dataclasses.replace(s, patient=str(i // 2)) for i, s in enumerate(many)]
            sick = np.array([s.label == ABNORMAL for s in many])
            return evaluate.Scored(many, {name: rng.normal(size=scores) + sick
                                          for name in SCORERS}, {}, {})

        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            [run] = train.train(Config(width=2, latent_dim=8, samples=50, epochs=1, device="cpu",
                                       output_dir=folder))
            with mock.patch.object(evaluate, "score_samples", scored):
                began = time.perf_counter()
                evaluate.evaluate(run, device="cpu")
                return {"seconds": time.perf_counter() - began}
    return answer


def first_step(model: str, sizes: dict) -> Answer:
    """`python train.py` up to its first step, and what measuring a step's memory took of that."""
    class Begun(Exception):
        pass

    def answer() -> dict:
        probing, probe = 0.0, train.fit_into_memory

        def timed_probe(*arguments: object) -> None:
            nonlocal probing
            began = time.perf_counter()
            probe(*arguments)
            probing = time.perf_counter() - began

        flags = [x for name, value in sizes.items() for x in (flag(name), str(value))]
        with tempfile.TemporaryDirectory() as folder, \
                mock.patch.object(train, "fit_into_memory", timed_probe), \
                mock.patch.object(train, "train_step", side_effect=Begun):
            try:
                train.train(parse_config([*flags, "--model", model, "--device", "cpu",
                                          "--output-dir", folder], environ={}))
            except Begun:
                return {"at": time.time(), "probing": probing}
        raise AssertionError("no step was taken")
    return answer


def short_run(sizes: dict, scratch: str, samples: int, batch: int) -> Answer:
    """Two epochs of train.py's steps on a folder; answers with the rows of log.csv."""
    class Trained(Exception):
        pass

    def answer(data: str) -> dict:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            with contextlib.suppress(Trained), \
                    mock.patch.object(train, "validate", return_value=0.0), \
                    mock.patch.object(train, "calibrate", side_effect=Trained):
                train.train(Config(data=data, samples=samples, epochs=2, batch_size=batch,
                                   device="cpu", output_dir=folder, **sizes))
            [log] = Path(folder).rglob("log.csv")
            with log.open(newline="") as f:
                return {"rows": list(csv.DictReader(f))}
    return answer


KINDS: dict[str, Callable[..., Answer]] = {
    f.__name__: f for f in (our_training, plain_training, machine, our_folder, their_folder,
                            decoding, small_films, archive, films, evaluation, figures,
                            first_step, short_run)}

if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the program prints is no reply
    answer = KINDS[sys.argv[1]](**json.loads(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)
