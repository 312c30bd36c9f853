"""One request over a raw socket: how events are cut into pieces must not matter, and what is no HTTP is said."""

import asyncio
import contextlib
import json

import pytest

from gemma_tpu.bench.exchange import Dialect, apportion, exchange
from gemma_tpu.bench.latencies import Reply
from gemma_tpu.bench.wire import Broken, Wire

EVENTS = [{"choices": [{"text": text, "finish_reason": None}]} for text in ("one", " two", "")]
EVENTS += [{"choices": [{"text": " three", "finish_reason": "length"}]},
           {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}]  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def stream(end=b"\n\n"):
    lines = [b"data: " + json.dumps(one).encode() for one in EVENTS] + [b"data: [DONE]"]
    return b": hello" + end + end.join(lines) + end


def ask(*pieces, close=True, silence=2.0, scheme="http", count=None):
    """The reply to a request that a server answers with these bytes, one piece after the other."""

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)
            await asyncio.sleep(0 if close else 1)
        writer.close()

    async def both():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            wire = Wire(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "key", silence)
            reply = Reply(0, 0.0, asked_output=4)
            found = await exchange(wire, Dialect("m"), "prompt", reply, 0.0, count)
            await wire.close()
            return found

    return asyncio.run(both())


def chunked(data, size):
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return [f"{len(part):X};x=1\r\n".encode() + part + b"\r\n" for part in parts] + [b"0\r\n\r\n"]


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_events_are_whole_however_they_are_cut(size, end):
    found = ask(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunked(stream(end), size))
    assert found.ok, found.said
    assert found.output_tokens == 4 == len(found.chunks) and found.counted_by == "usage"
    assert (found.input_tokens, found.finish_reason) == (7, "length")


def test_a_body_may_end_by_its_length_or_with_the_connection():
    body = stream()
    for head, pieces in ((f"Content-Length: {len(body)}\r\n\r\n".encode(), [body[:50], body[50:]]), (b"\r\n", [body])):
        assert ask(HEAD + head, *pieces).output_tokens == 4
    assert ask(HEAD + b"\r\n", body.rstrip()).output_tokens == 4  # the last line without its end


@pytest.mark.parametrize(("pieces", "kind"), [
    ([b""], "closed"),
    ([b"SSH-2.0 hello\r\n\r\n"], "not_http"),
    ([HEAD + b"Content-Length: x\r\n\r\n"], "not_http"),
    ([HEAD + b"Content-Length: 500\r\n\r\n", b"data: "], "closed"),
    ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n"], "not_http"),
    ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nda"], "closed"),
    ([HEAD + b"\r\n", b"data: {\"choices\"\n\n"], "not_openai"),
    ([HEAD + b"\r\n", b"data: [1]\n\n"], "not_openai"),
    ([HEAD + b"\r\n", b"data: {\"choices\": [3]}\n\n"], "not_openai"),
    ([HEAD + b"\r\n", b"data: {\"choices\": [{\"text\": \"a\"}]}\n\n"], "cut_off"),
    ([HEAD + b"\r\n", b"data: [DONE]\n\n"], "no_tokens"),
    ([b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"], "not_streamed"),
    ([b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"], "http_503"),
])  # fmt: skip
def test_what_goes_wrong_has_a_name(pieces, kind):
    found = ask(*pieces)
    assert found.error == kind and found.said


def test_silence_and_a_closed_port_are_failures_too():
    assert ask(HEAD + b"\r\n", b"data: ", close=False, silence=0.1).error == "stalled"
    found = asyncio.run(exchange(Wire("http://127.0.0.1:9"), Dialect("m"), "p", Reply(0, 0.0), 0.0, None))
    assert found.error == "no_connection"
    assert ask(b"no TLS here", scheme="https").error == "no_connection"
    assert Broken("a", "b").kind == "a"


def test_without_usage_tokens_are_those_of_the_tokenizer_else_chunks():
    body = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in EVENTS[:-1]) + b"data: [DONE]\n\n"
    by_words = ask(HEAD + b"\r\n", body, count=lambda text: 2 * len(text.split()))
    assert (by_words.output_tokens, by_words.counted_by) == (6, "tokenizer")
    assert [count for _, count in by_words.chunks] == [2, 2, 2]
    assert (ask(HEAD + b"\r\n", body).output_tokens, ask(HEAD + b"\r\n", body).counted_by) == (4, "chunks")


def test_tokens_are_apportioned_whole_and_add_up():
    assert apportion(10, [1, 1, 1]) == [3, 3, 4]
    assert apportion(3, [0, 0]) == [1, 2]
    assert apportion(5, [10, 0, 10]) == [2, 0, 3]
    for total in range(20):
        assert sum(apportion(total, [3, 1, 4, 1, 5])) == total
