"""Streaming from Kaggle: the real client against a stand-in on loopback."""

import email.utils
import io
import json
import os
import random
import re
import sys
import threading
import time
import tracemalloc
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tiny, write_image
from kaggle_stand_in import KEY, TOKEN, USER, Archive, StandIn, VirtualNIH
from PIL import Image

import data
from config import Config, UserError
from data import (
    FolderSource, ImageStream, KaggleFilesSource, create_dataloaders, open_source, same_data,
    split_for_training)
from evaluate import evaluate
from train import main as train_main
from train import train

SPEC = "kaggle:someone/xrays"
Opened = tuple[StandIn, data.KaggleSource]
real = data.pause  # which the fixture `kaggle` replaces


@pytest.fixture(scope="session")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Kermany's layout: 72 normals to train on, a test split."""
    root = tmp_path_factory.mktemp("kermany")
    for count, seed, name in ((72, 0, "train/NORMAL/IM-{:04d}-0001"),
                              (8, 100, "train/PNEUMONIA/person{0}_virus_{0}"),
                              (10, 200, "test/NORMAL/NORMAL2-IM-{:04d}-0001"),
                              (10, 300, "test/PNEUMONIA/person9{0}_bacteria_{0}")):
        for i in range(count):
            write_image(root / "chest_xray" / f"{name.format(i)}.jpeg", seed + i)
    return root


def server_environment(server: StandIn) -> dict[str, str]:
    return server.environment() | {"OMP_NUM_THREADS": "1"}


def opened(kaggle: StandIn, content: Archive | VirtualNIH | dict[str, bytes],
           spec: str = SPEC) -> data.KaggleSource:
    """The source of an archive, or of one that holds these files."""
    name = "/".join(spec.removeprefix("kaggle:").split("/")[:2])
    kaggle.archives[name] = Archive.of(content) if isinstance(content, dict) else content
    return open_source(Config(data=spec))


def stream_of(source: data.Source, **settings: object) -> ImageStream:
    return ImageStream(source, source.samples, 32, 8, **settings)


def everything(stream: ImageStream) -> tuple[list[int], np.ndarray]:
    """(positions, images) of one pass over a stream."""
    batches = list(stream)
    return (torch.cat([p for _, p in batches]).tolist(),
            np.concatenate([x.numpy() for x, _ in batches]))


def png(seed: int, size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, size[::-1]).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def images(count: int, **more: bytes) -> dict[str, bytes]:
    return {f"normal/{i:03d}.png": png(i) for i in range(count)} | more


# Credentials


@pytest.fixture
def home(kaggle: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with Kaggle's in it, and no credentials."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.setenv(name, "")  # which is as good as none; undone after the test
    (home := Path(os.environ["HOME"])).mkdir()
    return home


NAME = {"KAGGLE_USERNAME": USER, "KAGGLE_KEY": KEY}
JSON = json.dumps({"username": USER, "key": KEY})


@pytest.mark.parametrize(("environ", "file", "content"), [
    (NAME | {"KAGGLE_API_TOKEN": " "}, "", ""),
    ({"KAGGLE_API_TOKEN": TOKEN}, "", ""),
    ({"KAGGLE_API_TOKEN": "{home}/token"}, "token", TOKEN + "\n"),
    ({}, ".kaggle/access_token", TOKEN),
    ({}, ".kaggle/access_token.txt", TOKEN),
    ({"KAGGLE_CONFIG_DIR": "{home}/there"}, "there/kaggle.json", JSON),
    ({}, ".kaggle/kaggle.json", JSON),
    ({"XDG_CONFIG_HOME": "{home}/xdg"}, "xdg/kaggle/kaggle.json", JSON),
    ({}, ".config/kaggle/kaggle.json", JSON),
    ({"KAGGLE_KEY": KEY}, ".kaggle/kaggle.json", JSON.replace(KEY, "an old one")),
    ({"KAGGLE_API_TOKEN": ""}, "colab", {"KAGGLE_API_TOKEN": TOKEN + "\n"}),
    ({}, "colab", NAME)])
def test_credentials_are_found_wherever_the_client_looks_and_among_the_secrets_of_colab(
        kaggle: StandIn, home: Path, monkeypatch: pytest.MonkeyPatch, environ: dict, file: str,
        content: str | dict) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value.format(home=home))
    if file == "colab":
        for name in ("google", "google.colab"):  # whose own __init__ does not load userdata
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules[name].__path__ = []
        userdata = types.SimpleNamespace(get=lambda name: content[name])  # KeyError: absent
        monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)
    elif file:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text(content)
    assert len(opened(kaggle, images(3)).samples) == 3


@pytest.mark.parametrize(("environ", "content", "says"), [
    ({}, None, "no Kaggle credentials found. On kaggle.com"),
    *[({}, content, "{home}/.kaggle/kaggle.json") for content in (
        "{broken", '{"username": "me"}', "[]", "")],
    ({"KAGGLE_USERNAME": "me"}, "{}", "KAGGLE_KEY=your_key"),  # half is not used
    ({"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "\u201cabc\u201d"}, None, "quotes"),
    ({"KAGGLE_API_TOKEN": "\u201cabc\u201d"}, None, "quotes")])
def test_missing_or_unusable_credentials_are_said_before_anything_else(
        kaggle: StandIn, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
        environ: dict, content: str | None, says: str) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if content is not None:
        (home / ".kaggle").mkdir()
        (home / ".kaggle/kaggle.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", SPEC])
    with pytest.raises(UserError, match=re.escape(says.format(home=home))) as told:
        train_main()
    for word in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", '{"username"', "Colab"):
        assert word in str(told.value)
    assert capsys.readouterr().out == "" and not kaggle.calls


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, None])
def test_an_archive_or_single_files_give_the_same_samples_order_and_pixels_as_the_folder(
        kaggle: StandIn, chest: Path, method: int | None) -> None:
    single = method is None
    kaggle.ranges_allowed, kaggle.empty_page = not single, True
    here, there = FolderSource(str(chest)), opened(kaggle, Archive.of_folder(chest, method or 0))
    assert isinstance(there, KaggleFilesSource) == single
    assert there.samples == here.samples and same_data(there.fingerprint(), here.fingerprint())
    assert len(there.fingerprint().split("-")) == (2 if single else 3)  # no checksums are known
    kaggle.api_faults.extend([429, 500] * single)
    for seed in (None, 3):
        streams = [ImageStream(s, s.samples, 32, 9, seed=seed) for s in (here, there)]
        for epoch in range(2):
            for stream in streams:
                stream.set_epoch(epoch)
            (order, pixels), (order2, pixels2) = map(everything, streams)
            assert order == order2 and np.array_equal(pixels, pixels2)
    assert kaggle.calls["file"] == (2 + 2 * 100 if single else 0)  # each once, and two again


def test_tables_give_labels_and_splits_also_in_zip64_archives(kaggle: StandIn) -> None:
    nih = VirtualNIH(12_000, 375_000, 24)
    source = opened(kaggle, nih)
    assert len(source.samples) == 12_000 and "from the column Patient ID" in str(source.facts)
    assert {s.split for s in source.samples} == {"train", "test"}
    # Offsets beyond 4 GiB: the last film decodes to what was put in.
    assert nih.size > 1 << 32 and source.read(source.samples[-1]) == nih.content(11_999)
    assert source.file_bytes(source.samples[-1]) == 375_000


def test_names_beyond_ascii_and_a_comment_are_understood(kaggle: StandIn) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for i in range(3):
            packed.writestr(f"ré sumé/normal/n° {i}.png", png(i))
        packed.comment = b"PK\5\6 in a comment is not the end"[4:]
    source = opened(kaggle, Archive(buffer.getvalue(), {}))
    assert [s.key for s in source.samples] == [f"ré sumé/normal/n° {i}.png" for i in range(3)]
    assert source.read(source.samples[1]) == png(1)


@pytest.mark.parametrize("name", ["", "xrays", "a/b/c", "a/b/versions/x", "a/b?c"])
def test_a_misspelt_name_is_refused_without_a_request(kaggle: StandIn, name: str) -> None:
    with pytest.raises(UserError, match="kaggle:owner/name"):
        opened(kaggle, {}, f"kaggle:{name}")
    assert not kaggle.calls


@pytest.mark.parametrize("ranges", [True, False])
def test_the_version_that_is_named_is_asked_for(kaggle: StandIn, ranges: bool) -> None:
    kaggle.ranges_allowed = ranges
    source = opened(kaggle, images(3), f"{SPEC}/versions/3")
    assert len(source.read(source.samples[0])) > 100 and source.title.endswith("version 3")
    assert kaggle.versions == {3}
    opened(kaggle, images(3))
    assert kaggle.versions == {3, None}


def test_only_what_is_needed_is_fetched_and_neighbours_share_a_request(kaggle: StandIn) -> None:
    """One call of the API, the directory and the tables; then the chosen images alone."""
    nih = VirtualNIH(4000, 30_000, 24)
    source = opened(kaggle, nih)
    assert sum(end - start for start, end in kaggle.ranges) < 1.6 * len(nih.after) + (1 << 18)
    chosen = split_for_training(source, Config(data=SPEC, samples=200)).train
    kaggle.ranges.clear()
    everything(ImageStream(source, chosen, 32, 8, seed=0))
    assert len(chosen) == 200 and kaggle.calls["api"] == 1
    assert sum(end - start for start, end in kaggle.ranges) < 1.9 * 200 * nih.record
    source = opened(kaggle, Archive.of(images(200), zipfile.ZIP_STORED))
    kaggle.ranges.clear()
    everything(stream_of(source, seed=0))
    assert len(kaggle.ranges) <= 200 / 16 + 1


# Faults


@pytest.fixture
def faulty(kaggle: StandIn) -> Opened:
    """An opened source of 40 stored images, ready for faults."""
    return kaggle, opened(kaggle, Archive.of(images(40), zipfile.ZIP_STORED))


FLEETING = ["status-429", "status-500", "status-503", "drop", "truncate", "prefix", "no-range",
            "whole", "expire", "corrupt", "empty", "long"]


@pytest.mark.parametrize("fault", FLEETING)
def test_a_passing_fault_loses_nothing_and_is_counted(faulty: Opened, fault: str) -> None:
    server, source = faulty
    server.faults.extend([fault, fault])
    order, pixels = everything(ImageStream(source, source.samples, 40, 8))
    assert order == list(range(40))
    for i in range(40):
        assert np.array_equal(pixels[i, 0], np.asarray(Image.open(io.BytesIO(png(i)))))
    assert ("tried again" in source.report()) == (fault != "long") and not server.faults
    assert fault != "expire" or server.calls["api"] in (2, 3)


def test_a_dropped_connection_goes_on_where_it_broke(faulty: Opened) -> None:
    server, source = faulty
    server.ranges.clear()
    server.faults.append("drop")
    source.remote.read_range(0, 8000)
    assert server.ranges == [(0, 8000), (4000, 8000)]


def test_retry_after_is_honoured_and_waits_grow_without_it(faulty: Opened) -> None:
    server, source = faulty
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    for asked, low, high in (("37", 37, 37), (date, 90, 100), ("soon", 0, 1), ("\u00b2", 0, 1),
                             ("Mon, 99 Foo", 0, 1)):
        server.retry_after = asked
        server.faults.append("status-429")
        source.read(source.samples[0])
        assert low <= server.pauses.pop() <= high and not server.pauses
    server.retry_after = None
    random.seed(1)
    server.faults.extend(["status-429"] * 10)
    source.read(source.samples[0])
    assert len(server.pauses) == 10 and max(server.pauses) <= 60
    assert all(wait <= 2.0 ** (i - 1) for i, wait in enumerate(server.pauses))
    assert len({round(wait, 6) for wait in server.pauses}) == 10  # jitter
    server.retry_after = "3600"
    server.faults.append("status-429")
    with pytest.raises(UserError, match="wait 60 min"):
        source.read(source.samples[0])


CHANGED = r"changed on Kaggle.*versions/N"


@pytest.mark.parametrize(("fault", "says"), [
    *((fault, SPEC) for fault in ("status-503", "truncate", "whole", "expire")),
    ({"etag": '"v2"'}, CHANGED), ({"size": 5000}, CHANGED), ({"size": 1}, CHANGED)])
def test_a_lasting_fault_or_a_changed_data_set_ends_in_one_line(
        faulty: Opened, fault: str | dict, says: str) -> None:
    server, source = faulty
    if isinstance(fault, dict):
        vars(server.archives["someone/xrays"]).update(fault)
    else:
        server.faults.extend([fault] * 200)
    with pytest.raises(UserError, match=says) as told:
        everything(stream_of(source))
    assert not re.search(rf"\n|signature|{server.url}", str(told.value))


def test_a_whole_archive_sent_for_a_range_is_not_read(kaggle: StandIn) -> None:
    source = opened(kaggle, nih := VirtualNIH(1000, 375_000, 24))
    before = kaggle.whole_sent
    kaggle.faults.append("whole")
    source.read(source.samples[0])
    assert kaggle.whole_sent - before < 16 << 20 < nih.size  # what sockets buffer, no more
    assert source.remote.traffic["bytes"] < 2 << 20


@pytest.mark.parametrize("ranges", [True, False])
def test_a_large_table_that_is_not_needed_is_left_alone(
        kaggle: StandIn, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    monkeypatch.setattr(data, "LARGEST_FILE", 1000)
    kaggle.ranges_allowed = ranges
    source = opened(kaggle, images(40, **{"pixels.csv": b"1,2\n" * 500}))
    assert len(source.samples) == 40 and kaggle.calls["file"] == 0
    assert "pixels.csv has too much in it" in source.facts["not used"]
    with pytest.raises(UserError, match=r"none .*normal.*.*labels.csv has too much in it"):
        opened(kaggle, {"a/1.png": png(1), "labels.csv": b"1,2\n" * 500})


def lie(archive: Archive, name: str, **fields: int) -> Archive:
    """The archive with other numbers in a member's entry of the central directory."""
    broken = bytearray(archive.data)
    at = broken.rindex(name.encode()) - 46
    for field, value in fields.items():
        where, size = {"crc": (16, 4), "packed": (20, 4), "full": (24, 4), "method": (10, 2),
                       "flags": (8, 2)}[field]
        broken[at + where : at + where + size] = value.to_bytes(size, "little")
    return Archive(bytes(broken), archive.files)


@pytest.mark.parametrize(("fields", "reason"), [
    ({"full": 1000}, "length"),  # a bomb: a gigabyte behind a small number
    ({"method": 14}, "packed by method 14"),
    ({"flags": 1}, "encrypted"),
    ({"crc": 1}, "checksum"),
    ({"packed": 10}, "checksum"),
    ({"full": 0xFFFFFFFE}, "--memory-limit-gb")])
def test_a_member_that_lies_is_refused(kaggle: StandIn, fields: dict, reason: str) -> None:
    files = images(40) | {"normal/bomb.png": bytes(64 << 20)}
    source = opened(kaggle, lie(Archive.of(files), "normal/bomb.png", **fields))
    limit = 48 << 20 if "full" in fields else 4 << 30  # the bomb alone would be more than 48 MB
    stream = stream_of(source, memory=limit)
    assert len(everything(stream)[0]) == 40 and [*stream.bad] == ["normal/bomb.png"]
    assert reason in stream.bad["normal/bomb.png"]
    before = kaggle.calls["range"]
    everything(stream)
    assert kaggle.calls["range"] == before  # the others are cached, and this one is known
    assert "full" not in fields or stream.memory.peak_bytes < limit
    if reason == "length":  # it is not inflated beyond its declared size
        tracemalloc.start()
        with pytest.raises(data.BadImage, match="length"):
            source.read_file("normal/bomb.png")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_what_is_no_zip_or_has_a_damaged_directory_is_refused(kaggle: StandIn) -> None:
    whole = Archive.of(images(40), zipfile.ZIP_STORED).data
    first, last = whole.index(b"PK\1\2"), whole.rindex(b"PK\1\2")
    contents = [b"", b"no zip at all" * 100, b"PK\5\6" + b"\xff" * 18]
    for at, value in ((last, 0), (last + 6, 0xFF), (first + 45, 0x7F), (len(whole) - 9, 1),
                      (len(whole) - 5, 0x7F)):
        # signature, version, a member's place, size and place of it all
        contents.append(whole[:at] + bytes([value]) + whole[at + 1 :])
    for content in contents:
        says = "not a readable zip archive" if content else "answers 416"
        with pytest.raises(UserError, match=f"{SPEC}.*{says}"):
            opened(kaggle, Archive(content, {}))


def test_what_is_too_large_is_refused_before_it_is_fetched_or_decoded(kaggle: StandIn) -> None:
    large = io.BytesIO()
    Image.new("L", (2000, 1500)).save(large, "PNG")
    files = images(40) | {"normal/huge.png": os.urandom(3 << 20),
                          "normal/large.png": large.getvalue()}
    source = opened(kaggle, Archive.of(files, zipfile.ZIP_STORED))
    kaggle.ranges.clear()
    stream = stream_of(source, memory=8 << 20)
    assert len(everything(stream)[0]) == 40 and stream.memory.peak_bytes < 8 << 20
    assert "--memory-limit-gb" in stream.bad["normal/huge.png"]
    assert "needs 6.0 MB at once" in stream.bad["normal/large.png"]
    assert sum(end - start for start, end in kaggle.ranges) < 1 << 20


@pytest.mark.parametrize(("status", "words"), [
    (401, "refuses the credentials"), (403, "terms to be accepted"), (404, "no such data set"),
    (400, "answers 400")])
def test_what_the_api_refuses_is_said_at_once_and_a_busy_one_is_asked_again(
        kaggle: StandIn, status: int, words: str) -> None:
    kaggle.retry_after = "12"
    kaggle.api_faults.extend([429, 500, status])
    with pytest.raises(UserError, match=words) as told:
        opened(kaggle, images(3))
    assert kaggle.calls["api"] == 3 and KEY not in str(told.value)
    assert kaggle.pauses == [12.0, 12.0] and len(opened(kaggle, images(3)).samples) == 3


def test_no_network_is_said_and_phantoms_do_not_stand_in(
    kaggle: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    kaggle.shutdown()
    kaggle.server_close()
    with pytest.raises(UserError, match=r"no connection to Kaggle .* tries: 4"):
        train(tiny(tmp_path, data=SPEC))
    assert "PHANTOM" not in capsys.readouterr().out


def test_a_stalled_server_is_given_up_on(faulty: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    server, source = faulty
    monkeypatch.setattr(data, "TIMEOUT", (2, 0.05))
    server.faults.append("stall")
    assert source.read(source.samples[3]) == png(3)


@pytest.mark.parametrize("ranges", [True, False])
def test_fetching_ends_soon_after_it_is_cancelled(
        kaggle: StandIn, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    """In a wait that would take minutes, with the network down, and before the next request."""
    kaggle.ranges_allowed, kaggle.retry_after = ranges, "500"
    source, cancelled = opened(kaggle, images(40)), threading.Event()
    (kaggle.faults if ranges else kaggle.api_faults).append("status-429" if ranges else 429)

    def wait(seconds: float, event: threading.Event) -> None:
        assert seconds == 500 and event is cancelled
        threading.Timer(0.05, cancelled.set).start()
        real(seconds, event)

    monkeypatch.setattr(data, "pause", wait)
    with pytest.raises(data.Cancelled):
        list(source.fetch(source.samples, cancelled))
    calls = sum(kaggle.calls.values())
    with pytest.raises(data.Cancelled):
        list(source.fetch(source.samples, cancelled))
    assert sum(kaggle.calls.values()) == calls


def test_leaving_during_a_stall_does_not_wait_for_it(faulty: Opened) -> None:
    server, source = faulty
    stream = iter(ImageStream(source, source.samples, 32, 4, cache=False))
    others = set(threading.enumerate())
    next(stream)
    server.faults.extend(["stall"] * 20)
    mine = [t for t in threading.enumerate() if t not in others and t.name.startswith("decode")]
    stream.close()  # returns at once; threads that still wait keep no program from ending
    assert mine and all(t.daemon for t in mine)
    server.closing.set()
    for thread in mine:
        thread.join(timeout=10)
    assert not any(t.is_alive() for t in mine)


@pytest.mark.drill
@pytest.mark.parametrize("seed", range(12))
def test_whatever_passing_faults_come_nothing_is_lost_unnamed(kaggle: StandIn, seed: int) -> None:
    source = opened(kaggle, VirtualNIH(300, 70_000, 30))
    wanted = everything(stream_of(source, seed=seed))
    rng = random.Random(seed)
    limit = rng.choice([4 << 20, 16 << 20, 1 << 30])
    stream = stream_of(source, seed=seed, memory=limit, stop_on_bad=False)
    kaggle.faults.extend(rng.choice([*FLEETING, *[""] * 8]) for _ in range(400))
    order, pixels = everything(stream)
    # An image that arrives damaged three times is given up, and named.
    there = [i for i, p in enumerate(wanted[0]) if source.samples[p].key not in stream.bad]
    assert order == [wanted[0][i] for i in there] and np.array_equal(pixels, wanted[1][there])
    assert set(stream.bad.values()) <= {"its length or checksum is wrong"} and len(stream.bad) < 30
    assert source.remote.tried_again.total() > 3 and stream.memory.peak_bytes <= limit


@pytest.mark.drill
def test_a_set_of_42_gigabytes_starts_with_few_requests(kaggle: StandIn) -> None:
    kaggle.archives["nih-chest-xrays/data"] = nih = VirtualNIH()
    loaders = create_dataloaders(Config(data="kaggle:nih-chest-xrays/data", samples=2000))
    assert nih.size > 42e9 and kaggle.calls == {"api": 1, "range": 8 + 24}  # a look at some
    assert next(iter(loaders.train))[0].shape == (8, 1, 128, 128)
    assert len(loaders.source.samples) == 112_120 and len(loaders.splits.train) == 2000


def test_single_files_are_named_if_broken_or_missing_and_unpacked_if_zipped(
        kaggle: StandIn, chest: Path) -> None:
    kaggle.ranges_allowed = False
    source = opened(kaggle, archive := Archive.of_folder(chest))
    kaggle.api_faults.extend([500] * 8)
    keys, files = [s.key for s in source.samples], archive.files
    content, packed = files[keys[7]], Archive.of({"x.jpeg": files[keys[7]]}).data
    files[keys[2]] = packed.replace(b"PK\1\2", b"PK\1\1")
    files[keys[3]] += bytes(1 << 20)
    files[keys[4]] = files[keys[4]][:-7]
    files[keys[5]] = b"PK\3\4 but no zip".ljust(len(files[keys[5]]))
    del files[keys[6]]
    files[keys[7]] = packed
    stream = stream_of(source)
    assert len(everything(stream)[0]) == 95 and set(stream.bad) == set(keys[2:7])
    assert "404" in stream.bad[keys[6]] and "instead of" in stream.bad[keys[2]]
    assert source.read(source.samples[7]) == content


def test_training_from_kaggle_gives_the_weights_of_the_folder_and_keeps_the_key_secret(
        kaggle: StandIn, chest: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kaggle.archives["someone/xrays"] = Archive.of_folder(chest)
    kaggle.faults.extend(["status-500", "drop"])
    with mock.patch.dict(os.environ, {"KAGGLE_API_TOKEN": TOKEN}):
        folders = [train(tiny(tmp_path / name, data=spec, batch_size=8))[0]
                   for name, spec in (("folder", str(chest)), ("kaggle", SPEC))]
    weights = [torch.load(f / "best.pt", weights_only=True) for f in folders]
    assert weights[0]["model"].keys() == weights[1]["model"].keys()
    assert all(torch.equal(v, weights[1]["model"][k]) for k, v in weights[0]["model"].items())
    requests = kaggle.calls["range"]
    metrics = evaluate([folders[1]]) + evaluate([folders[0]], data=SPEC)
    assert metrics[0]["auroc"] == metrics[1]["auroc"] and metrics[0]["n_normal"] == 10
    assert kaggle.calls["range"] > requests
    printed = capsys.readouterr()
    assert "images never take more" in printed.out and "MB in" in printed.out
    assert not re.search(f"{KEY}|{TOKEN}|signature=", printed.out + printed.err)
    artefacts = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(artefacts) > 15
    assert not [p for p in artefacts if re.search(f"{KEY}|{TOKEN}".encode(), p.read_bytes())]
