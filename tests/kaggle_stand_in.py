"""A stand-in for Kaggle on loopback: the API's wire format, signed addresses, byte ranges, faults.

The official client is pointed at it by its own environment variables; it acts as the HTTP proxy
for http://localhost, and serves the archives itself. Nothing else is touched.
"""

import base64
import io
import json
import re
import threading
import zipfile
import zlib
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

USER, KEY, TOKEN = "stand-in-user", "fake-key-0123456789", "KGAT_fake-token-9876543210"


class Archive:
    """A zip archive in memory: what `read` gives of it, and the single files."""

    def __init__(self, data: bytes, files: dict[str, bytes]) -> None:
        self.data, self.files, self.size, self.etag = data, files, len(data), '"v1"'

    @classmethod
    def of(cls, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> "Archive":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        return cls(buffer.getvalue(), files)

    @classmethod
    def of_folder(cls, root: Path, method: int = zipfile.ZIP_STORED) -> "Archive":
        return cls.of({p.relative_to(root).as_posix(): p.read_bytes()
                       for p in sorted(root.rglob("*")) if p.is_file()}, method)

    def read(self, start: int, end: int) -> bytes:
        return self.data[start:end]


class VirtualNIH:
    """112,120 films in the layout of NIH ChestX-ray14, 42 GB, made as they are asked for."""

    def __init__(self, images: int = 112_120, member_bytes: int = 375_000, side: int = 64) -> None:
        self.etag, buffer = '"nih"', io.BytesIO()
        noise = np.random.RandomState(0).randint(0, 256, (side, side)).astype(np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        # Bytes after the end of a PNG are ignored: padding, and a number that makes it unique.
        self.body = buffer.getvalue().ljust(member_bytes - 8, b"\0")
        self.crc, self.record = zlib.crc32(self.body), 0
        base = [f"{i // 4:08d}_{i % 4:03d}.png" for i in range(images)]
        self.names = [f"images_{1 + i // 9400:03d}/images/{name}" for i, name in enumerate(base)]
        self.record = len(self._member(0))
        films = self.films = images * self.record

        class After(io.BytesIO):
            """What comes after the films, to be written in one go."""

            def tell(self) -> int:
                return films + super().tell()

            def seek(self, *where: int) -> int:
                raise OSError

        after = After()
        with zipfile.ZipFile(after, "w") as packed:
            packed.filelist += map(self._info, range(images))
            packed.writestr("Data_Entry_2017.csv", "".join([
                "Image Index,Finding Labels,Patient ID,View Position\n",
                *(f"{name},{'No Finding' if i // 4 % 100 < 54 else 'Effusion'},{i // 4},PA\n"
                  for i, name in enumerate(base))]))
            for file, test in (("train_val_list.txt", False), ("test_list.txt", True)):
                packed.writestr(file, "\n".join(
                    name for i, name in enumerate(base) if (i // 4 % 5 == 0) == test))
        self.after = after.getvalue()
        self.size = films + len(self.after)

    def _info(self, i: int) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(self.names[i])
        info.header_offset = i * self.record
        info.CRC = zlib.crc32(i.to_bytes(8, "little"), self.crc)
        info.file_size = info.compress_size = len(self.body) + 8
        return info

    def _member(self, i: int) -> bytes:
        return self._info(i).FileHeader() + self.content(i)

    def content(self, i: int) -> bytes:
        """The file of a film."""
        return self.body + i.to_bytes(8, "little")

    def read(self, start: int, end: int) -> bytes:
        first, last = start // self.record, min(len(self.names), -(-end // self.record))
        films = b"".join(map(self._member, range(first, last)))
        return films[start - first * self.record : end - first * self.record] + (
            self.after[max(0, start - self.films) : max(0, end - self.films)])


class StandIn(ThreadingHTTPServer):
    """Serves `archives` ("owner/name" -> Archive). Faults are taken from `faults`, one a request.

    A fault is the name of what happens to the next request for a range: status-429 (with
    `retry_after`), status-500, drop (half of it), truncate (a shorter range), long (more than the
    range), prefix (the first bytes instead), no-range (it does not say which), empty, whole (200),
    expire (403), corrupt (a byte), stall (nothing until closed). `api_faults` are statuses for
    the API.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.archives: dict[str, Archive | VirtualNIH] = {}
        self.faults: deque[str] = deque()
        self.api_faults: deque[int] = deque()
        self.ranges_allowed, self.empty_page, self.retry_after = True, False, None
        self.calls: Counter = Counter()  # "api", "file", "range"
        self.ranges: list[tuple[int, int]] = []
        self.versions: set[int | None] = set()  # of the data set that were asked for
        self.served = None  # called with the number of ranges so far, before each
        self.whole_sent = self.signature = 0  # bytes sent with status 200; the one that is valid
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What points the official client here."""
        return {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": self.url,
                "no_proxy": "127.0.0.1", "KAGGLE_USERNAME": USER, "KAGGLE_KEY": KEY}

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers to be acknowledged
    server: StandIn

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: object = b"", length: int | None = None,
               **headers: str | None) -> None:
        """Answer with bytes, or with JSON; where it is busy, also with how long to wait."""
        server, body = self.server, content
        if not isinstance(content, bytes):
            body, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        headers["Content-Length"] = str(len(body) if length is None else length)
        headers["Retry-After"] = server.retry_after if status in (429, 500, 503) else None
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        basic = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        if self.headers.get("Authorization") not in (basic, f"Bearer {TOKEN}"):
            return self.answer(401, {"code": 401, "message": f"bad {KEY}"})
        name, file = f"{body['ownerSlug']}/{body['datasetSlug']}", body.get("fileName")
        server.versions.add(body.get("datasetVersionNumber"))
        server.calls["file" if file else "api"] += 1
        archive = server.archives.get(name)
        status = server.api_faults.popleft() if server.api_faults else (
            404 if archive is None or (file and file not in archive.files) else 0)
        if status:
            return self.answer(status, {"code": status, "message": "no"})
        if self.path.endswith("/ListDatasetFiles"):
            return self.list_files(archive, body)
        server.signature += not file
        where = f"file?file={file}" if file else f"all?signature={server.signature}"
        return self.answer(302, Location=f"{server.url}/{where}&name={name}")

    def list_files(self, archive: Archive, body: dict) -> None:
        names, token = sorted(archive.files), body.get("pageToken") or "0"
        first, size = int(token), min(200, body.get("pageSize", 20))
        after = str(first + size) if first + size < len(names) else ""
        if self.server.empty_page and token == "0":  # an empty page that is not the last
            size, after = 0, "00"
        self.answer(200, {"nextPageToken": after, "datasetFiles": [
            {"name": n, "totalBytes": len(archive.files[n]),
             "creationDate": "2026-01-01T00:00:00.000Z"} for n in names[first : first + size]]})

    def do_GET(self) -> None:
        server, url = self.server, urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        archive = server.archives[query["name"]]
        if url.path == "/file":
            return self.answer(200, archive.files[query["file"]])
        m = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not m:  # the official client, following to the archive
            return self.give_whole(archive)
        server.calls["range"] += 1
        if server.served:
            server.served(server.calls["range"])
        with server.lock:
            fault = server.faults.popleft() if (
                server.faults and int(query["signature"]) == server.signature) else ""
        server.signature += fault == "expire"
        start, end = int(m[1]), min(archive.size, int(m[2]) + 1)
        if int(query["signature"]) < server.signature:
            return self.answer(403, b"<Error><Code>ExpiredToken</Code></Error>")
        if fault.startswith("status-"):
            return self.answer(int(fault[7:]))
        if fault == "stall":
            server.closing.wait(60)
            self.close_connection = True
            return None
        if not server.ranges_allowed or fault == "whole":
            return self.give_whole(archive)
        if start >= end:
            return self.answer(416)
        if fault == "truncate":
            end = start + (end - start) // 2
        if fault == "prefix":
            start, end = 0, end - start
        with server.lock:
            server.ranges.append((start, end))
        body = archive.read(start, end) + bytes(1000) * (fault == "long")
        if fault == "corrupt":
            body = body[:-20] + bytes([body[-20] ^ 1]) + body[-19:]
        length = len(body)
        if fault in ("drop", "empty"):
            body, self.close_connection = body[: length // 2 * (fault == "drop")], True
        return self.answer(206, body, length, ETag=archive.etag, Content_Range=(
            None if fault == "no-range" else f"bytes {start}-{end - 1}/{archive.size}"))

    def give_whole(self, archive: Archive) -> None:
        self.answer(200, b"", archive.size, ETag=archive.etag)
        self.close_connection = True
        for start in range(0, archive.size, 1 << 16):
            chunk = archive.read(start, min(archive.size, start + (1 << 16)))
            self.wfile.write(chunk)  # ends with an error once the client hangs up
            with self.server.lock:
                self.server.whole_sent += len(chunk)
