"""One point under load: every request sent at its time whatever came of those before, and how late the sender was."""

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemma_tpu.bench.bench_prompts import Prompt
from gemma_tpu.bench.exchange import Count, Dialect, exchange
from gemma_tpu.bench.latencies import Reply
from gemma_tpu.bench.wire import Wire
from gemma_tpu.errors import RunError, UserError

BEAT = 0.01  # seconds between looks at how late this process is

REFUSED = ("http_400", "http_422")


@dataclass(frozen=True)
class Measured:
    replies: list[Reply]
    duration: float
    beats: list[float]  # how late each beat was, in seconds
    reconnected: int


async def run_point(
    wire: Wire, dialect: Dialect, prompts: Sequence[Prompt], output: int, times: Sequence[float], count: Count | None,
    on_done: Callable[[Reply], None],
) -> Measured:  # fmt: skip
    """Sends each prompt at its time and waits for all answers."""
    replies = [Reply(number, at, asked_input=one.tokens, asked_output=one.output or output)
               for number, (one, at) in enumerate(zip(prompts, times, strict=True))]  # fmt: skip
    beats: list[float] = []
    reconnected = wire.reconnected
    gc.collect()
    gc.freeze()  # a collection over all prompts would stop the clock for everybody
    heart = asyncio.create_task(_beat(beats))
    begun = time.perf_counter()

    async def one(reply: Reply) -> None:
        on_done(await exchange(wire, dialect, prompts[reply.number].content, reply, begun, count))

    try:
        async with asyncio.TaskGroup() as group:
            for reply in replies:
                wait = begun + reply.scheduled - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(reply))
        duration = time.perf_counter() - begun
    finally:
        heart.cancel()
        gc.unfreeze()
    return Measured(replies, duration, beats, wire.reconnected - reconnected)


async def _beat(beats: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(BEAT)
        beats.append(max(0.0, time.perf_counter() - before - BEAT))


async def learn(
    wire: Wire, dialect: Dialect, prompt: Prompt, output: int, count: Count | None
) -> tuple[Dialect, Reply]:
    """The first request: what the server takes beside OpenAI's own fields. It is part of no result."""
    refused = ""
    for one in dialect.others():
        reply = await _alone(wire, one, prompt, output, count)
        if reply.ok:
            return one, reply
        if reply.error not in REFUSED:
            break
        refused = refused or reply.said
    said = f"{reply.error}: {refused or reply.said}"
    if reply.error in REFUSED + ("http_401", "http_403", "http_404"):
        raise UserError(f"the server refuses the first request: {said}")
    raise RunError(f"the first request failed: {said}")


async def warm_up(
    wire: Wire, dialect: Dialect, prompts: Sequence[Prompt], output: int, count: Count | None
) -> list[Reply]:
    """Requests before those that count: whatever a server compiles or allocates for a new shape."""
    return [await _alone(wire, dialect, prompt, output, count) for prompt in prompts]


async def _alone(wire: Wire, dialect: Dialect, prompt: Prompt, output: int, count: Count | None) -> Reply:
    reply = Reply(0, 0.0, asked_input=prompt.tokens, asked_output=prompt.output or output)
    return await exchange(wire, dialect, prompt.content, reply, time.perf_counter(), count)
