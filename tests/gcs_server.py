"""A bucket of Google Cloud Storage on this machine: as much of its JSON interface as TensorStore and gcsfs use.

Objects are in memory. `refuse(method, name)` may name a status for a request: no right, or a network that is not well.
"""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

OBJECT = re.compile(r"^(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)$")


class Bucket:
    """The server, while `with` lasts; `environment` is what sends both clients to it, over HTTP alone."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}  # by name: bytes and generation
        self.sessions: dict[str, tuple[str, bytearray]] = {}  # of uploads in pieces
        self.generation = 0
        self.lock = threading.RLock()
        self.refuse: Callable[[str, str], int | None] = lambda method, name: None
        bucket = self

        class Handler(_Handler):
            of = bucket

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Bucket":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"TENSORSTORE_GCS_HTTP_URL": self.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                "STORAGE_EMULATOR_HOST": self.url, "FSSPEC_GCS_TOKEN": "anon", "FSSPEC_GS_TOKEN": "anon",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # fmt: skip

    def put(self, name: str, data: bytes) -> None:
        with self.lock:
            self.generation += 1
            self.objects[name] = data, self.generation

    def about(self, name: str) -> dict[str, str]:
        data, generation = self.objects[name]
        return {"kind": "storage#object", "name": name, "bucket": "bucket", "size": str(len(data)),
                "generation": str(generation), "metageneration": "1", "id": f"bucket/{name}/{generation}",
                "updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z",
                "contentType": "application/octet-stream", "storageClass": "STANDARD",
                "mediaLink": f"{self.url}/download/storage/v1/b/bucket/o/{quote(name, safe='')}?alt=media"}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    of: Bucket
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # an answer in one packet, at once
    asked: dict[str, str]

    def log_message(self, *_: object) -> None:
        pass

    def _begin(self) -> tuple[str, bytes]:
        parts = urlsplit(self.path)
        self.asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
        length = self.headers.get("Content-Length")
        return parts.path, self.rfile.read(int(length)) if length else b""

    def _answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        headers.setdefault("Content-Type", "application/json" if isinstance(body, dict) else "application/octet-stream")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int) -> None:
        self._answer(status, {"error": {"code": status, "message": f"refused with {status}"}})

    def _refused(self, name: str) -> bool:
        status = self.of.refuse(self.command, name)
        if status is not None:
            self._error(status)
        return status is not None

    def do_GET(self) -> None:
        path, _ = self._begin()
        if found := OBJECT.match(path):
            name = unquote(found[2])
            with self.of.lock:
                return None if self._refused(name) else self._object(name)
        if path.endswith("/o"):
            with self.of.lock:
                return None if self._refused(self.asked.get("prefix", "")) else self._list()
        return self._answer(200, {"kind": "storage#bucket", "name": "bucket", "id": "bucket", "location": "US"})

    def _object(self, name: str) -> None:
        if name not in self.of.objects:
            return self._error(404)
        data, generation = self.of.objects[name]
        if self.asked.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if self.asked.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._error(412)
        if self.asked.get("alt") != "media":
            return self._answer(200, self.of.about(name))
        about = {"x_goog_generation": str(generation)}
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not wanted:
            return self._answer(200, data, **about)
        start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if start >= len(data):
            return self._answer(416)
        return self._answer(206, data[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}", **about)

    def _list(self) -> None:
        prefix, delimiter = self.asked.get("prefix", ""), self.asked.get("delimiter")
        low, high = self.asked.get("startOffset", ""), self.asked.get("endOffset")
        items, folders = [], set()
        for name in sorted(self.of.objects):
            if not name.startswith(prefix) or name < low or (high and name >= high):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.of.about(name))
        found: dict = {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}
        if (most := int(self.asked.get("maxResults", 0))) and not delimiter:
            begin = int(self.asked.get("pageToken", 0))
            found["items"] = items[begin : begin + most]
            found |= {"nextPageToken": str(begin + most)} if begin + most < len(items) else {}
        return self._answer(200, found)

    def do_POST(self) -> None:
        path, body = self._begin()
        with self.of.lock:
            if path.startswith("/batch/"):
                return self._batch(body)
            if "/rewriteTo/" in path or "/copyTo/" in path:
                here, there = re.match(r".*/b/[^/]+/o/([^/]+)/\w+To/b/[^/]+/o/([^/]+)$", path).groups()
                if unquote(here) not in self.of.objects:  # a folder, which a bucket does not have
                    return self._error(404)
                self.of.put(unquote(there), self.of.objects[unquote(here)][0])
                return self._answer(200, {"done": True, "resource": self.of.about(unquote(there))})
            return self._piece(path, body) if path.startswith("/upload/session/") else self._upload(body)

    def _upload(self, body: bytes) -> None:
        kind, name = self.asked["uploadType"], self.asked.get("name")
        if kind == "multipart":
            mark = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = (part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1]
                           for part in body.split(mark)[1:3])  # fmt: skip
            name, body = json.loads(about)["name"], data.removesuffix(b"\n").removesuffix(b"\r")
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
        if self._refused(name):
            return None
        if self.asked.get("ifGenerationMatch") == "0" and name in self.of.objects:
            return self._error(412)
        if kind == "resumable":
            session = str(len(self.of.sessions))
            self.of.sessions[session] = name, bytearray()
            return self._answer(200, {}, Location=f"{self.of.url}/upload/session/{session}")
        self.of.put(name, body)
        return self._answer(200, self.of.about(name))

    def do_PUT(self) -> None:
        path, body = self._begin()
        with self.of.lock:
            self._piece(path, body)

    def _piece(self, path: str, body: bytes) -> None:
        name, held = self.of.sessions[path.rpartition("/")[2]]
        if self._refused(name):
            return None
        held += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or int(total) > len(held):
            return self._answer(308, Range=f"bytes=0-{len(held) - 1}")
        self.of.put(name, bytes(held))
        return self._answer(200, self.of.about(name))

    def _delete(self, name: str) -> int:
        return 204 if self.of.objects.pop(name, None) is not None else 404

    def do_DELETE(self) -> None:
        path, _ = self._begin()
        with self.of.lock:
            name = unquote(OBJECT.match(path)[2])
            if not self._refused(name):
                self._answer(self._delete(name))

    def _batch(self, body: bytes) -> None:
        """Of deletions, which is all that is asked in one."""
        answers = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", body)):
            status = self._delete(unquote(OBJECT.match(urlsplit(path.decode()).path)[2]))
            answers.append(f"--mark\r\nContent-Type: application/http\r\nContent-ID: <response-{number + 1}>\r\n\r\n"
                           f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\n\r\n\r\n")  # fmt: skip
        text = "".join(answers) + "--mark--"
        self._answer(200, text.encode(), Content_Type="multipart/mixed; boundary=mark")
