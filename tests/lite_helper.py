"""A small server in a thread of this process, on a port of 127.0.0.1, and plain ways to ask it."""

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

import gemma_tpu
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.lite import app
from gemma_tpu.lite.engine import Engine
from gemma_tpu.lite.metrics import Metrics
from gemma_tpu.lite.patience import Patient
from gemma_tpu.lite.programs import Device
from gemma_tpu.lite.requests import Limits

CAPACITY = 192
SHAPE = {"slots": 3, "capacity": CAPACITY, "buckets": (64, 192), "burst": 4}
QUEUE = 24


class Server:
    def __init__(self, folder: Path, *, max_wait: float = 0.01, compiled: bool = True, **shape: Any):
        model = gemma_tpu.load(folder)
        device = Device(model, **{**SHAPE, **shape})
        self.engine = Engine(device, Metrics(), max_wait=max_wait, queue=QUEUE)
        limits = Limits(prompts=8, samples=8, body=2**16)
        self.served = app.Served(self.engine, Tokenizer(folder), "tiny", model.arch.vocab, limits)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = uvicorn.Config(app.build(self.served), log_config=None, log_level="critical", http=Patient,
                                 timeout_graceful_shutdown=20)  # fmt: skip
        self.web = uvicorn.Server(options)
        self._thread = threading.Thread(target=self.web.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        wait_for(lambda: self.web.started)
        if compiled:
            self.engine.start()
            assert self.engine.when_compiled(), self.engine.progress

    def stop(self) -> None:
        self.web.should_exit = True
        self._thread.join(30)
        self._listener.close()
        assert self.engine.stop(30) or self.engine.state == "compiling"

    def ask(self, path: str, body: Any = None, *, method: str | None = None) -> tuple[int, Any]:
        """(status, the answer; parsed where it is JSON). Bytes are sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if body is None else "POST"), path, data)
            answer = connection.getresponse()
            text = answer.read()
            kind = answer.getheader("content-type", "")
            return answer.status, json.loads(text) if kind.startswith("application/json") else text.decode()
        finally:
            connection.close()

    def text(self, prompt: Any, **more: Any) -> dict[str, Any]:
        """A completion that must succeed, greedy unless another temperature is given."""
        status, found = self.ask("/v1/completions", {"prompt": prompt, "temperature": 0, **more})
        assert status == 200, found
        return found

    def refused(self, path: str, body: Any) -> dict[str, Any]:
        status, found = self.ask(path, body)
        assert status == 400 and set(found) == {"error"}, found
        assert set(found["error"]) == {"message", "type", "param", "code"}
        assert found["error"]["type"] == "invalid_request_error" and "Traceback" not in found["error"]["message"]
        return found["error"]

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        status, found = self.ask(path, {**body, "stream": True})
        assert status == 200, found
        *chunks, last = [part.removeprefix("data: ") for part in found.strip().split("\n\n")]
        assert last == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    def metric(self, name: str) -> float:
        """The sum of its series."""
        lines = self.ask("/metrics")[1].splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == f"gemma_tpu:{name}"]
        assert found, name
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def begin(self, body: dict[str, Any]) -> socket.socket:
        """A request that is sent, and whose answer nobody has read."""
        data = json.dumps(body).encode()
        found = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        found.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        return found


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
