"""A small OpenAI-compatible server whose every delay is known: tokens go out at set times, and it fails on demand."""

import asyncio
import json
import threading
import time

WORD = ";"  # one token of the tiny vocabulary, and its answers


class Server:
    """`first` seconds to the first token, `gap` between tokens, `together` tokens in a chunk.

    `faults` are taken by the next streamed requests: a status, "refuse" (closed at once), "close" (in the middle),
    "cut" (a stream that ends without an end), "error" (an event), "stall", "json" (no stream), "empty".
    """

    def __init__(self):
        self.first, self.gap, self.together = 0.02, 0.004, 1
        self.usage = "every"  # event; or "last", or none
        self.unknown = set()  # fields of a body that are refused with 400
        self.overhead = 0  # tokens that it adds to a prompt
        self.short = None  # tokens after which it ends whatever was asked
        self.slots = None  # requests that it works on at a time
        self.faults, self.bodies, self.metrics_text, self.models = [], [], "", [{"id": "tiny", "max_model_len": 2048}]
        self.count = lambda text: len(text.split())
        self.finished, self.waited = 0, 0.0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(5)
        self.url = f"http://127.0.0.1:{self._port}"

    def _run(self):
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self._port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def stop(self):
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _connection(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, _ = head.decode().split(" ", 2)
                length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n")
                               if line.lower().startswith(b"content-length")), 0)  # fmt: skip
                body = json.loads(await reader.readexactly(length)) if length else None
                if not await (self._get(writer, path) if method == "GET" else self._post(writer, path, body)):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the server stops
        finally:
            writer.close()

    async def _get(self, writer, path):
        known = {"/v1/models": {"data": self.models}, "/version": {"version": "9.9"}}
        if path == "/metrics":
            return self._whole(writer, 200, (self.metrics_text + self._measured()).encode())
        return self._whole(writer, 200 if path in known else 404, json.dumps(known.get(path, {})).encode())

    def _measured(self):
        if not self.metrics_text:
            return ""
        names = ("request_queue", "request_prefill", "request_decode", "e2e_request_latency")
        values = (self.waited, self.first * self.finished, 0.01 * self.finished, 0.04 * self.finished + self.waited)
        names = [f"{name}_time_seconds" if name.startswith("request") else f"{name}_seconds" for name in names]
        return "".join(f"vllm:{name}_sum{{e=\"0\"}} {value}\nvllm:{name}_count{{e=\"0\"}} {self.finished}\n"
                       for name, value in zip(names, values, strict=True))  # fmt: skip

    def _whole(self, writer, status, data, kind="application/json"):
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return True

    async def _post(self, writer, path, body):
        self.bodies.append(body)
        fields = set(body) | set(body.get("stream_options") or {})
        if wrong := sorted(fields & self.unknown):
            return self._whole(writer, 400, json.dumps({"error": {"message": f"unknown: {wrong[0]}"}}).encode())
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self._whole(writer, fault, json.dumps({"error": {"message": f"no, {fault}"}}).encode())
        if fault == "refuse":
            return False
        if fault == "json":
            return self._whole(writer, 200, b'{"choices": []}')
        begun = time.perf_counter()
        if self.slots is None:
            return await self._stream(writer, path, body, fault)
        async with self.slots:
            self.waited += time.perf_counter() - begun
            return await self._stream(writer, path, body, fault)

    async def _stream(self, writer, path, body, fault):
        begun, chat = time.perf_counter(), path.endswith("/chat/completions")
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        read, wanted = self.count(text) + self.overhead, self.short or body.get("max_tokens") or 16
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        sizes = [] if fault == "empty" else [min(self.together, wanted - at) for at in range(0, wanted, self.together)]
        if chat:
            self._event(writer, {"delta": {"role": "assistant", "content": ""}}, 0, read, body)
        sent = 0
        for number, size in enumerate(sizes):
            await asyncio.sleep(max(0.0, begun + self.first + self.gap * number - time.perf_counter()))
            if number == 2 and fault in ("close", "cut", "error", "stall"):
                return await self._fail(writer, fault)
            sent += size
            choice = {"delta": {"content": WORD * size}} if chat else {"text": WORD * size}
            last = fault != "cut" and sent == wanted
            self._event(writer, choice | {"finish_reason": "length" if last else None}, sent, read, body)
            await writer.drain()
        if not sizes:
            self._event(writer, {"text": "", "finish_reason": "stop"}, 0, read, body)
        if self.usage in ("every", "last") and (body.get("stream_options") or {}).get("include_usage"):
            self._data(writer, {"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": sent}})
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        self.finished += 1
        return True

    async def _fail(self, writer, fault):
        if fault == "stall":
            await asyncio.sleep(3)
        if fault == "error":
            self._data(writer, {"error": {"message": "out of memory", "code": 500}})
        if fault in ("cut", "error"):
            writer.write(b"0\r\n\r\n")
            return True
        return False

    def _event(self, writer, choice, sent, read, body):
        event = {"choices": [{"index": 0, **choice}]}
        if self.usage == "every" and (body.get("stream_options") or {}).get("continuous_usage_stats"):
            event["usage"] = {"prompt_tokens": read, "completion_tokens": sent}
        self._data(writer, event)

    def _data(self, writer, event):
        self._chunk(writer, b": ping\n\ndata: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, writer, data):
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
