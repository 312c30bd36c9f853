"""A small Hugging Face Hub on 127.0.0.1: one model repository, its API, its files by ranges, and faults on demand."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """`faults` are taken by the next reads of files: a status, or "drop", "short", "whole"."""

    repo, commit = "org/model", "c" * 40

    def __init__(self, files: dict[str, bytes], monkeypatch: Any):
        self.files = dict(files)
        self.gated = self.bad_token = self.redirect = False
        self.faults: list[int | str] = []
        self.sha256: dict[str, str] = {}  # what the hub claims, where it is not the truth
        self.revisions_read: set[str] = set()
        self.reads: list[str] = []
        self.tokens_at: dict[str, set[str | None]] = {"hub": set(), "store": set()}
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(place)) for place in ("hub", "store")]
        self.url, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", self.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            self.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")

    def __enter__(self) -> "Hub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        from huggingface_hub.utils import close_session

        close_session()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, data in self.files.items():
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
            if name.endswith(".safetensors"):
                sha256 = self.sha256.get(name, hashlib.sha256(data).hexdigest())
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _handler(self, place: str) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize, disable_nagle_algorithm = -1, True  # an answer in one packet, at once

            def log_message(self, *_: Any) -> None:
                """Requests are not printed."""

            def do_GET(self) -> None:
                hub.tokens_at[place].add(self.headers.get("Authorization"))
                path = unquote(self.path.partition("?")[0])
                if hub.bad_token:
                    self.answer(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
                elif path.startswith("/api/models/"):
                    self.api(path.removeprefix("/api/models/"))
                else:
                    self.file(*re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", path).groups())

            def api(self, path: str) -> None:
                if not path.startswith(hub.repo):
                    self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
                    return
                rest = path.removeprefix(hub.repo).strip("/")
                if rest == "auth-check":
                    denied = {"X-Error-Code": "GatedRepo"} if hub.gated else {}
                    self.answer(403 if hub.gated else 200, {}, denied)
                elif rest.startswith("tree/"):
                    self.answer(200, hub.tree())
                elif rest.removeprefix("revision/") in ("", "main", hub.commit):
                    self.answer(200, {"id": hub.repo, "sha": hub.commit, "gated": "manual", "tags": [],
                                      "cardData": {"license": "gemma"}})  # fmt: skip
                else:
                    self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})

            def file(self, repo: str, revision: str, name: str) -> None:
                if hub.redirect and place == "hub":
                    self.answer(302, {}, {"Location": hub.store + self.path})
                    return
                hub.revisions_read.add(revision)
                hub.reads.append(name)
                start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
                fault = hub.faults.pop(0) if hub.faults else None
                data = hub.files[name][start : end + 1]
                if isinstance(fault, int):
                    self.answer(fault, {})
                    return
                if fault == "whole":
                    self.send(200, hub.files[name], {})
                    return
                if fault == "short":
                    data = data[:-1]
                self.send(206, data, {}, drop=fault == "drop")

            def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

            def send(self, status: int, data: bytes, headers: dict[str, str], drop: bool = False) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if drop else data)
                self.close_connection = self.close_connection or drop

        return Handler
