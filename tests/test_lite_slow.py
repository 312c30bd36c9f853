"""The small server as its users start it: many streams for minutes, bad clients, lm-eval, the signal that ends it."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from runs_helper import ROOT, command, environment

import gemma_tpu
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.sampling.asking import every
from gemma_tpu.sampling.completions import complete
from gemma_tpu.sampling.drawing import Settings
from gemma_tpu.sampling.endpoint import Endpoint

pytestmark = pytest.mark.slow
STREAMS = 64
SECONDS = float(os.environ.get("SERVE_LITE_SECONDS", "120"))


class Process:
    """`gemma-tpu serve-lite` in a process of its own."""

    def __init__(self, target: Path, *options: str, ready: bool = True, **variables: str):
        argv = command("serve-lite", target, "--port", "0", "--json", *options)
        self.process = subprocess.Popen(argv, env=environment(**variables), text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)  # fmt: skip
        self.said: list[str] = []
        self.url = ""
        for line in self.process.stderr:
            self.said.append(line)
            found = re.search(r"(http://\S+)/v1 serves", line)
            self.url = found[1] if found else self.url
            if line.startswith(("ready", "error")) or (found and not ready):
                break
        assert self.url, self.said
        self.port = int(self.url.rpartition(":")[2])
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if re.match(rf"gemma_tpu:{name}[ {{]", line)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def stop(self) -> dict:
        """By SIGTERM; its last word."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        out = self.process.stdout.read()
        assert self.process.wait(120) == 0, self.said
        self.reader.join(5)
        assert "Traceback" not in "".join(self.said), self.said
        return json.loads(out)


@pytest.fixture
def serve(base32):
    started = []

    def start(target=base32, *options: str, **more):
        started.append(Process(target, "--max-len", "256", *options, **more))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        one.reader.join(5)
        one.process.stdout.close()
        one.process.stderr.close()


async def _one_stream(port: int, rng: random.Random) -> int:
    """One request of this client, held against what it asked for; the tokens it got."""
    most = rng.randrange(8, 64)
    body = {"prompt": [rng.randrange(8, 1000) for _ in range(rng.randrange(1, 190))], "max_tokens": most,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
            "temperature": rng.choice([0, 0.7, 1.5]), "top_p": rng.choice([1, 0.9]), "top_k": rng.choice([0, 20]),
            "logprobs": rng.choice([None, None, None, 1])}  # fmt: skip
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                 % len(data) + data)  # fmt: skip
    text = (await reader.read()).decode()
    writer.close()
    assert text.startswith("HTTP/1.1 200") and "data: [DONE]" in text, text[:300]
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert chunks[-1]["usage"]["completion_tokens"] == most
    assert [one["finish_reason"] for chunk in chunks for one in chunk["choices"]][-1] == "length"
    return most


def test_64_streams_at_once_for_two_minutes_without_an_error_or_a_recompilation(serve, capsys):
    server = serve()
    errors, tokens, answered = [], 0, 0
    end = time.monotonic() + SECONDS

    async def client(number: int) -> None:
        nonlocal tokens, answered
        rng = random.Random(number)
        while time.monotonic() < end:
            try:
                made = await _one_stream(server.port, rng)  # `tokens += await …` would forget what others add
                tokens, answered = tokens + made, answered + 1
            except Exception as error:  # every one of them is a failure of the server's
                errors.append(repr(error))

    async def all_of_them() -> None:
        await asyncio.gather(*(client(number) for number in range(STREAMS)))

    asyncio.run(all_of_them())
    with capsys.disabled():
        busy = server.metric("generation_tokens_total") / server.metric("slot_steps_total")
        padding = server.metric("prefill_padding_share")
        print(f"\n{answered} streams, {tokens} tokens, {tokens / SECONDS:.0f} tokens/s, {len(errors)} errors; "
              f"slots busy {busy:.2f}, padding {padding:.2f}")  # fmt: skip
    assert not errors and answered > STREAMS
    last = server.stop()
    assert last["recompiles"] == 0 and last["generated"] == tokens and last["answered"] == answered


def _malformed(rng: random.Random) -> bytes:
    """Requests that are wrong at every level: the line, the headers, the body, the fields."""
    body = rng.choice([
        b"", b"{", b"\xff" * 20, b"null", b'{"prompt": 5}', b'{"prompt": "a", "n": "x"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "max_tokens": 1e9}', b"[" * 5000, b'{"prompt": "a", "temperature": NaN}',
        b'{"messages": [{"role": "x"}]}', bytes(rng.randrange(256) for _ in range(50)),
    ])  # fmt: skip
    path = rng.choice([b"/v1/completions", b"/v1/chat/completions", b"/v1/nothing", b"/v1/%zz\x01", b"*"])
    length = rng.choice([len(body), len(body) + 5, -1, 10**12])
    return rng.choice([
        b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length + body,
        b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        b"GARBAGE\r\n\r\n" + body, bytes(rng.randrange(256) for _ in range(80)), b"GET / HTTP/9.9\r\n\r\n",
        b"POST " + path + b" HTTP/1.1\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
    ])  # fmt: skip


def test_it_survives_200_malformed_requests_and_50_abrupt_disconnects(serve):
    server, rng = serve(), random.Random(0)
    wanted = Endpoint(server.url)._ask("/completions", {"prompt": "a", "max_tokens": 8, "temperature": 0})["choices"]
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
            line.sendall(_malformed(rng))
            line.shutdown(socket.SHUT_WR)
            try:
                assert not line.recv(4096).startswith((b"HTTP/1.1 2", b"HTTP/1.1 500"))
            except ConnectionError:
                pass  # refused without a word
    for number in range(50):
        body = json.dumps({"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": number % 3 > 0}).encode()
        line = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        half = number % 4 == 0
        with line:
            line.sendall(whole[: rng.randrange(10, len(whole))] if half else whole)
            if number % 3 == 1 and not half:
                line.recv(200)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset
    end = time.monotonic() + 120
    while server.metric("num_requests_running") + server.metric("num_requests_waiting") and time.monotonic() < end:
        time.sleep(0.1)
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    again = Endpoint(server.url)._ask("/completions", {"prompt": "a", "max_tokens": 8, "temperature": 0})["choices"]
    assert again == wanted and server.metric("recompiles_total") == 0
    server.stop()
    assert len(server.said) <= 5, "bad clients fill no terminal"


def test_on_a_mesh_of_four_it_answers_like_one_device(serve, base32):
    server = serve(base32, "--mesh", "fsdp=2,tp=2", "--slots", "3",
                   XLA_FLAGS="--xla_force_host_platform_device_count=4")  # fmt: skip
    found = Endpoint(server.url).write(every(["one", "two", "three"], raw=True), Settings(max_new_tokens=12))
    wanted = complete(base32, ["one", "two", "three"], Settings(max_new_tokens=12), raw=True)
    assert [one["text"] for one in found] == [one["text"] for one in wanted]
    assert server.metric("slots") == 4, "as many for each device"
    assert server.stop()["recompiles"] == 0


def test_sigterm_finishes_what_is_running_and_takes_nothing_new(serve):
    server = serve()
    body = json.dumps({"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        text = line.recv(4096)
        server.process.send_signal(signal.SIGTERM)
        while b"0\r\n\r\n" not in text[-9:]:
            text += line.recv(4096)
    assert b"data: [DONE]" in text
    assert server.stop()["answered"] == 1
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_sigterm_ends_it_while_it_compiles(serve, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    server = serve(ready=False)
    begun = time.monotonic()
    server.stop()
    assert time.monotonic() - begun < 60


# --- lm-eval ----------------------------------------------------------------------------------------------------


def _lm_eval() -> str:
    clients = Path(os.environ.get("GEMMA_TPU_CLIENTS", ROOT / ".client-envs"))
    found = clients / "lm_eval/bin/lm_eval"
    return str(found) if found.exists() else pytest.skip("no lm_eval: `make test-clients` installs it")


def _choices(folder: Path, server: Process, out: Path) -> dict:
    """As docs/evaluation.md has it."""
    arguments = f"model={server_name(server)},base_url={server.url}/v1/completions,tokenizer={folder}," \
                "tokenizer_backend=huggingface,max_length=512,num_concurrent=8,max_retries=1"  # fmt: skip
    argv = [_lm_eval(), "run", "--model", "local-completions", "--model_args", arguments, "--include_path",
            "docs/lm_eval", "--tasks", "general_choice", "--apply_chat_template", "--output_path", str(out),
            "--log_samples", "--limit", "20"]  # fmt: skip
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500,
                          env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    file = next(out.rglob("samples_general_choice*.jsonl"))
    return {one["doc_id"]: one for one in map(json.loads, file.read_text().splitlines())}


def server_name(server: Process) -> str:
    return json.loads(server.get("/v1/models"))["data"][0]["id"]


def test_lm_eval_measures_what_the_forward_pass_gives_before_and_after_tuning(serve, base32, whole_run, tmp_path):
    tokenizer = Tokenizer(base32)
    docs = [json.loads(line) for line in (ROOT / "docs/lm_eval/general.jsonl").read_text().splitlines()]
    seen = {}
    for name, target, adapter in (("base", base32, None), ("tuned", whole_run, whole_run)):
        server = serve(target, "--max-len", "512")
        found = _choices(base32, server, tmp_path / name)
        assert len(found) == 20 and server.metric("recompiles_total") == 0
        model = gemma_tpu.load(base32, adapter=adapter)
        for number in (0, 13):
            ids = tokenizer.prompt([{"role": "user", "content": docs[number]["question"]}])
            for place, choice in enumerate(docs[number]["choices"]):
                whole = ids + tokenizer.encode(choice)
                logits = np.asarray(model(np.array([whole]))[0], np.float64)
                logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                wanted = sum(logprobs[at - 1, whole[at]] for at in range(len(ids), len(whole)))
                assert float(found[number]["filtered_resps"][place][0]) == pytest.approx(wanted, abs=1e-2)
        seen[name] = [one["filtered_resps"] for one in found.values()]
        server.stop()
    assert seen["base"] != seen["tuned"]
