"""A stand-in for Kaggle on loopback: the API's wire format, signed addresses, byte ranges, faults.

The official client is pointed at it by its own environment variables; it acts as the HTTP proxy
for http://localhost, and serves the archives itself. Nothing else is touched.
"""

import base64
import io
import json
import re
import struct
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
        files = {p.relative_to(root).as_posix(): p.read_bytes()
                 for p in sorted(root.rglob("*")) if p.is_file()}
        return cls.of(files, method)

    def read(self, start: int, end: int) -> bytes:
        return self.data[start:end]


class VirtualNIH:
    """112,120 films in the layout of NIH ChestX-ray14, 42 GB, made as they are asked for."""

    def __init__(self, images: int = 112_120, member_bytes: int = 375_000, side: int = 64) -> None:
        self.etag, self.images = '"nih"', images
        rng = np.random.RandomState(0)
        buffer = io.BytesIO()
        Image.fromarray(rng.randint(0, 256, (side, side)).astype(np.uint8)).save(buffer, "PNG")
        # Bytes after the end of a PNG are ignored: padding, and a number that makes it unique.
        self.body = buffer.getvalue().ljust(member_bytes - 8, b"\0")
        crc = zlib.crc32(self.body)
        self.names = [f"images_{1 + i // 9400:03d}/images/{i // 4:08d}_{i % 4:03d}.png"
                      for i in range(images)]
        self.record = 30 + len(self.names[0]) + member_bytes
        members = [(name, member_bytes, zlib.crc32(i.to_bytes(8, "little"), crc), i * self.record)
                   for i, name in enumerate(self.names)]
        base = [name.rpartition("/")[2] for name in self.names]
        rows = [f"{b},{'No Finding' if i // 4 % 100 < 54 else 'Effusion'},0,{i // 4},50,M,PA\n"
                for i, b in enumerate(base)]
        tables = {
            "Data_Entry_2017.csv": "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,"
            "Patient Gender,View Position\n" + "".join(rows),
            "train_val_list.txt": "\n".join(b for i, b in enumerate(base) if i // 4 % 5),
            "test_list.txt": "\n".join(b for i, b in enumerate(base) if not i // 4 % 5)}
        films, self.after = images * self.record, b""
        for name, text in tables.items():
            entry = name, len(text), zlib.crc32(text.encode())
            members.append((*entry, films + len(self.after)))
            self.after += self._header(*entry) + text.encode()
        start, n = films + len(self.after), len(members)
        directory = b"".join(self._entry(*member) for member in members)
        # Zip64's record of the end, what says where it is, and the old record with no numbers.
        self.after += directory + struct.pack(
            "<4sQ2H2I4Q4sIQI4s4H2IH", b"PK\6\6", 44, 45, 45, 0, 0, n, n, len(directory), start,
            b"PK\6\7", 0, start + len(directory), 1,
            b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        self.size = films + len(self.after)

    @staticmethod
    def _header(name: str, size: int, crc: int) -> bytes:
        return struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, size, size, len(name),
                           0) + name.encode()

    @staticmethod
    def _entry(name: str, size: int, crc: int, start: int) -> bytes:
        extra = struct.pack("<HHQ", 1, 8, start)
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, size, size,
                           len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF) + name.encode() + extra

    def _member(self, i: int) -> bytes:
        tail = i.to_bytes(8, "little")
        crc = zlib.crc32(tail, zlib.crc32(self.body))
        return self._header(self.names[i], len(self.body) + 8, crc) + self.body + tail

    def read(self, start: int, end: int) -> bytes:
        parts, films = [], self.images * self.record
        while start < min(end, films):
            i, at = divmod(start, self.record)
            part = self._member(i)[at : at + end - start]
            parts.append(part)
            start += len(part)
        if end > films:
            parts.append(self.after[max(0, start - films) : end - films])
        return b"".join(parts)


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
        self.retry_after: str | None = None
        self.ranges_allowed, self.empty_page = True, False
        self.calls: Counter = Counter()  # "api", "range", "whole", "file", "list"
        self.ranges: list[tuple[int, int]] = []
        self.versions: set[int | None] = set()  # of the data set that were asked for
        self.whole_sent = 0  # bytes given away in answers with status 200
        self.served = None  # called with the number of ranges so far, before each
        self.signature = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def patience(self) -> dict[str, str]:
        return {"Retry_After": self.retry_after} if self.retry_after else {}

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

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, content: dict, **headers: object) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json",
                    **headers)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        basic = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        if self.headers.get("Authorization") not in (basic, f"Bearer {TOKEN}"):
            return self.json(401, {"code": 401, "message": f"bad {KEY}"})
        method = urlsplit(self.path).path.rpartition("/")[2]
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        server.versions.add(body.get("datasetVersionNumber"))
        server.calls["list" if method == "ListDatasetFiles" else
                     "file" if body.get("fileName") else "api"] += 1
        if server.api_faults:
            status = server.api_faults.popleft()
            return self.json(status, {"code": status, "message": "no"}, **server.patience)
        archive = server.archives.get(name)
        if archive is None:
            return self.json(404, {"code": 404, "message": "no such data set"})
        if method == "ListDatasetFiles":
            return self.list_files(archive, body)
        if file := body.get("fileName"):
            if file not in archive.files:
                return self.json(404, {"code": 404, "message": "no such file"})
            location = f"{server.url}/file?name={name}&file={file}"
        else:
            server.signature += 1
            location = f"{server.url}/archive?name={name}&signature={server.signature}"
        self.answer(302, Location=location)

    def list_files(self, archive: Archive, body: dict) -> None:
        names = sorted(archive.files)
        token = body.get("pageToken") or "0"
        if self.server.empty_page and token == "0":  # an empty page that is not the last
            return self.json(200, {"datasetFiles": [], "nextPageToken": "00"})
        first, size = int(token), min(200, body.get("pageSize", 20))
        page = [{"name": n, "totalBytes": len(archive.files[n]),
                 "creationDate": "2026-01-01T00:00:00.000Z"} for n in names[first : first + size]]
        after = str(first + size) if first + size < len(names) else ""
        self.json(200, {"datasetFiles": page, "nextPageToken": after})

    def do_GET(self) -> None:
        server, url = self.server, urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        archive = server.archives[query["name"]]
        if url.path == "/file":
            content = archive.files[query["file"]]
            return self.answer(200, content, Content_Type="application/octet-stream")
        m = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not m:
            server.calls["whole"] += 1
            return self.give_whole(archive)
        server.calls["range"] += 1
        if server.served:
            server.served(server.calls["range"])
        if int(query["signature"]) < server.signature:
            return self.answer(403, b"<Error><Code>ExpiredToken</Code></Error>")
        with server.lock:
            fault = server.faults.popleft() if server.faults else ""
        if fault.startswith("status-"):
            return self.answer(int(fault[7:]), **server.patience)
        if fault == "expire":
            server.signature += 1
            return self.answer(403, b"<Error><Code>ExpiredToken</Code></Error>")
        if fault == "stall":
            server.closing.wait(60)
            self.close_connection = True
            return None
        if not server.ranges_allowed or fault == "whole":
            return self.give_whole(archive)
        start, end = int(m[1]), min(archive.size, int(m[2]) + 1)
        if start >= end:
            return self.answer(416)
        if fault == "truncate":
            end = start + (end - start) // 2
        if fault == "prefix":
            start, end = 0, end - start
        with server.lock:
            server.ranges.append((start, end))
        body = archive.read(start, end)
        if fault == "corrupt":
            body = body[:-20] + bytes([body[-20] ^ 1]) + body[-19:]
        if fault == "long":
            body += bytes(1000)
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", archive.etag)
        if fault != "no-range":
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{archive.size}")
        self.end_headers()
        if fault in ("drop", "empty"):
            body, self.close_connection = body[: len(body) // 2 * (fault == "drop")], True
        self.wfile.write(body)
        return None

    def give_whole(self, archive: Archive) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(archive.size))
        self.send_header("ETag", archive.etag)
        self.end_headers()
        self.close_connection = True
        for start in range(0, archive.size, 1 << 16):
            chunk = archive.read(start, min(archive.size, start + (1 << 16)))
            self.wfile.write(chunk)  # ends with an error once the client hangs up
            with self.server.lock:
                self.server.whole_sent += len(chunk)
