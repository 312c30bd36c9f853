"""One streamed request to an OpenAI-compatible server: its body, the events that come back, how many tokens each had.

What goes beyond OpenAI's interface (a fixed length, the count of tokens in every event) is asked for once and left out
where the server refuses it: a Dialect is what it takes.
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_tpu.bench.latencies import Reply
from gemma_tpu.bench.wire import Answer, Broken, Wire
from gemma_tpu.sampling.asking import Messages
from gemma_tpu.sampling.endpoint import reason

Count = Callable[[str], int]  # tokens of a text
PATHS = {"completions": "/completions", "chat": "/chat/completions"}

# From the most that is of use to nothing. vLLM takes the first; its min_tokens would cost it a mask at each step.
_EXTRAS: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"min_tokens": True, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {"ignore_eos": True},
    {},
)


@dataclass(frozen=True)
class Dialect:
    """How a server is asked."""

    model: str
    endpoint: str = "completions"
    temperature: float = 0.0
    extras: dict[str, Any] = field(default_factory=lambda: _EXTRAS[0])
    limit: str = "max_tokens"  # newer models of OpenAI's own take max_completion_tokens alone

    def body(self, prompt: str | Messages, output: int) -> dict[str, Any]:
        what = {"prompt": prompt} if self.endpoint == "completions" else {"messages": prompt}
        extras = self.extras | ({"min_tokens": output} if "min_tokens" in self.extras else {})
        return {"model": self.model, **what, self.limit: output, "temperature": self.temperature, "stream": True,
                **extras}  # fmt: skip

    def others(self) -> list["Dialect"]:
        """What else could be tried, from the most useful on."""
        limits = ("max_tokens", "max_completion_tokens") if self.endpoint == "chat" else ("max_tokens",)
        return [replace(self, extras=extras, limit=limit) for limit in limits for extras in _EXTRAS]


@dataclass
class _Event:
    at: float
    text: str
    counted: int | None  # tokens so far, where the server says it in every event
    bears: bool  # may hold tokens


async def exchange(
    wire: Wire, dialect: Dialect, prompt: str | Messages, reply: Reply, begun: float, count: Count | None
) -> Reply:
    """Sends a prompt and fills its reply; what goes wrong is kept in it, by its kind."""
    reply.sent = time.perf_counter() - begun
    try:
        async with wire.post(PATHS[dialect.endpoint], dialect.body(prompt, reply.asked_output)) as answer:
            if answer.status != 200:
                raise Broken(f"http_{answer.status}", reason(await answer.read()))
            await _take(answer, dialect, reply, begun, count)
    except Broken as broken:
        reply.error, reply.said = broken.kind, broken.said
    return reply


async def _take(answer: Answer, dialect: Dialect, reply: Reply, begun: float, count: Count | None) -> None:
    if "event-stream" not in answer.headers.get("content-type", ""):
        raise Broken("not_streamed", f"no event stream: {(await answer.read())[:80]!r}")
    events: list[_Event] = []
    usage: dict[str, Any] = {}
    over = False
    async for at, data in _messages(answer):
        if data == "[DONE]":
            over = True
            continue
        found = _parse(data)
        try:
            usage = found.get("usage") or usage
            events += _read(found, at - begun, dialect, reply)
            if not all(isinstance(usage.get(key), int | None) for key in ("prompt_tokens", "completion_tokens")):
                raise TypeError
        except (AttributeError, TypeError):
            raise Broken("not_openai", f"an event of another form than OpenAI's: {data[:80]!r}") from None
    if not over and reply.finish_reason is None:
        raise Broken("cut_off", f"the stream ended after {len(events)} events, without an end")
    reply.input_tokens = usage.get("prompt_tokens")
    _share(reply, events, usage.get("completion_tokens"), count)
    if not reply.chunks:
        raise Broken("no_tokens", f"an answer without a token (finish_reason {reply.finish_reason})")


def _read(found: dict[str, Any], at: float, dialect: Dialect, reply: Reply) -> list[_Event]:
    """What one event says of the answer: as a rule one choice, or none beside the usage."""
    told = (found.get("usage") or {}).get("completion_tokens")
    events = []
    for choice in found.get("choices") or ():
        finish, text = choice.get("finish_reason"), _text(choice)
        reply.finish_reason = finish or reply.finish_reason
        # A token may have no text: a special one, or half of a letter. The last event of a choice and the role
        # that opens a chat have none either, and no token.
        bears = bool(text) or dialect.endpoint == "completions" and finish is None
        events.append(_Event(at, text, told, bears))
    return events


async def _messages(answer: Answer) -> AsyncIterator[tuple[float, str]]:
    """The data of server-sent events; comments, which servers send to keep a connection, are passed over."""
    rest = b""
    async for at, piece in answer.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line[5:].strip().decode(errors="replace")
    if rest.startswith(b"data:"):
        yield time.perf_counter(), rest[5:].strip().decode(errors="replace")


def _parse(data: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Broken("not_openai", f"an event that is no JSON object: {data[:80]!r}")
    if found.get("error"):
        raise Broken("error_event", reason(data.encode()))
    return found


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _share(reply: Reply, events: Sequence[_Event], total: int | None, count: Count | None) -> None:
    """Tokens to the events that brought them: by the server's running count, else its total shared out by text."""
    counted = [(one.at, one.counted) for one in events if one.counted is not None]
    if events and len(counted) == len(events):
        before, found = 0, []
        for at, so_far in counted:
            found.append((at, so_far - before))
            before = max(before, so_far)
        if total is None or total == before:
            reply.chunks, reply.counted_by = [(at, n) for at, n in found if n > 0], "usage"
            return
    bearing = [one for one in events if one.bears]
    if total is not None:
        reply.counted_by = "usage"
    elif count is not None:
        total, reply.counted_by = count("".join(one.text for one in bearing)), "tokenizer"
    else:
        total, reply.counted_by = len(bearing), "chunks"
    weights = [1] * len(bearing)
    if total != len(bearing) and count is not None:
        weights = [count(one.text) for one in bearing]
    shares = apportion(total, weights)
    reply.chunks = [(one.at, n) for one, n in zip(bearing, shares, strict=True) if n > 0]


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to the weights as nearly as that allows."""
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    found, given, seen = [], 0, 0
    for weight in weights:
        seen += weight
        found.append(total * seen // whole - given)
        given += found[-1]
    return found
