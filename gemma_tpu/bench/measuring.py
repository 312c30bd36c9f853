"""A sweep over the points of a load, and what its results add up to."""

import asyncio
import math
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gemma_tpu import __version__
from gemma_tpu.bench import arrivals, doubts, latencies, saturation, scrape
from gemma_tpu.bench.arrivals import Arrivals
from gemma_tpu.bench.bench_file import Results, begin
from gemma_tpu.bench.bench_prompts import Prompt, Vocabulary, own_prompts, random_prompts
from gemma_tpu.bench.exchange import Dialect
from gemma_tpu.bench.points import Point
from gemma_tpu.bench.under_load import Measured, learn, run_point, warm_up
from gemma_tpu.bench.wire import Wire, lift_limit
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.estimate import inference
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware.chips import Slice

SETTLE = 1.0  # seconds that a server has to put the last request into its metrics

Card = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is asked of a server, beside the points."""

    endpoint: str = "completions"
    arrivals: Arrivals = "poisson"
    seed: int = 0
    temperature: float = 0.0
    warmup: int = 2  # requests before each shape
    shared_prefix: int = 0
    tokenizer: str | None = None
    data: str | None = None
    kv_dtype: str | None = None
    timeout: float = 600.0
    salt: int | None = None  # of the prompts; None: another one in every run, so that no cache knows them

    def to_json(self) -> Card:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "salt"}
        return {"source": doubts.OURS, **found}


def measure(
    server: scrape.Server, points: Sequence[Point], settings: Settings, out: Path, notes: Card, say: Say
) -> Results:
    """Every point that `out` does not have yet."""
    _check_lengths(server, points)
    vocabulary = None if settings.tokenizer is None else Vocabulary(settings.tokenizer)
    if vocabulary is None and settings.data is None:
        raise UserError(
            f"random prompts need the tokenizer of the served model, and {server.root or server.model} is no folder "
            "here: give --tokenizer DIR (or hf://org/name), or prompts of your own by --data FILE"
        )
    given = settings.to_json() | {"notes": notes}
    results = begin(out, given, server.to_json(), _client())
    missing = [point for point in points if results.find(point) is None]
    if len(missing) < len(points):
        say(f"{len(points) - len(missing)} of {len(points)} points are in {out} already and are not run again")
    if missing:
        lift_limit()
        sweep = _Sweep(server, settings, vocabulary, results, _prompts(settings, missing), say)
        results.save()  # what cannot be written is said before an hour of measuring
        asyncio.run(sweep.run(missing))
    return results


def _check_lengths(server: scrape.Server, points: Sequence[Point]) -> None:
    longest = server.max_model_len
    wrong = [point.shape for point in points
             if longest and point.input is not None and point.input + point.output > longest]  # fmt: skip
    if wrong:
        shapes = ", ".join(dict.fromkeys(wrong))
        raise UserError(
            f"{server.model} is served with a context of {longest:,} tokens, too short for {shapes} (in/out): start it "
            "with a longer --max-model-len, or leave these points out"
        )


def _prompts(settings: Settings, points: Sequence[Point]) -> Iterator[Prompt] | None:
    """The user's own, enough of them that none is used twice."""
    if settings.data is None:
        return None
    own = list(own_prompts(Path(settings.data), settings.endpoint == "chat"))
    needed = sum(point.prompts for point in points) + max(1, settings.warmup)
    if len(own) < needed:
        raise UserError(
            f"--data {settings.data}: {len(own)} prompts, and {needed} are needed so that none is used twice "
            f"({len(points)} points, {max(1, settings.warmup)} to warm up): give more prompts, or fewer by --prompts N"
        )
    return iter(own)


def _client() -> Card:
    return {"version": __version__, "python": platform.python_version(), "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S")}  # fmt: skip


class _Sweep:
    """One connection pool, one dialect, and the prompts that are left."""

    def __init__(
        self, server: scrape.Server, settings: Settings, vocabulary: Vocabulary | None, results: Results,
        own: Iterator[Prompt] | None, say: Say,
    ):  # fmt: skip
        self._server, self._settings, self._results, self._say = server, settings, results, say
        self._vocabulary, self._own = vocabulary, own
        self._count = None if vocabulary is None else vocabulary.count
        self._salt = secrets.randbits(31) if settings.salt is None else settings.salt
        self._extra = 0  # tokens that the server adds to each prompt
        self._number = 0
        self._seen: set[str] = set()

    async def run(self, points: Sequence[Point]) -> None:
        wire = Wire(self._server.url, scrape.key(), self._settings.timeout)
        try:
            dialect = await self._learn(wire, points[0])
            shape = None
            for number, point in enumerate(points, 1):
                if point.shape != shape:
                    await self._warm_up(wire, dialect, point)
                    shape = point.shape
                card = await self._measure(wire, dialect, point)
                self._results.add(point, card)
                self._say(f"{number} of {len(points)}: {point.name}: {_line(card)}")
                if not card["completed"]:
                    raise RunError(f"every request of {point.name} failed: {card['failures']}; {_first_error(card)}")
        finally:
            await wire.close()

    async def _learn(self, wire: Wire, point: Point) -> Dialect:
        first = Dialect(self._server.model, self._settings.endpoint, self._settings.temperature)
        prompt = self._take(point, 1)[0]
        dialect, reply = await learn(wire, first, prompt, min(point.output, 8), self._count)
        if prompt.tokens is not None and reply.input_tokens is not None:
            # What a template and a BOS add; our own count has the tokenizer's additions in it.
            self._extra = reply.input_tokens - prompt.tokens
            if self._extra:
                self._say(f"the server reads {self._extra:+} tokens for a prompt's own (its template, its BOS): "
                          "prompts are made that much shorter")  # fmt: skip
        taken = ", ".join(sorted(dialect.extras)) or "nothing beyond OpenAI's own fields"
        self._say(f"asking {self._server.model} at {self._server.url} ({dialect.endpoint}); it takes {taken} "
                  "(one request, which counts for nothing)")  # fmt: skip
        return dialect

    async def _warm_up(self, wire: Wire, dialect: Dialect, point: Point) -> None:
        # Own prompts have no length that a server could have compiled for: they are warmed up once.
        wanted = self._settings.warmup - (1 if self._own is not None else 0)
        if wanted < 1 or self._own is not None and self._number > 1:
            return
        replies = await warm_up(wire, dialect, self._take(point, wanted), point.output, self._count)
        bad = [one for one in replies if not one.ok]
        failed = f", {len(bad)} failed ({bad[0].error}: {bad[0].said})" if bad else ""
        self._say(f"warmed up for {point.shape} with {wanted} requests, which count for nothing{failed}")

    async def _measure(self, wire: Wire, dialect: Dialect, point: Point) -> Card:
        prompts = self._take(point, point.prompts)
        times = arrivals.times(point.prompts, point.qps, self._settings.arrivals, self._settings.seed)
        before = await asyncio.to_thread(scrape.metrics, self._server.url)
        with _Progress(point) as progress:
            found = await run_point(wire, dialect, prompts, point.output, times, self._count, progress)
        after = await self._settled(before, sum(one.ok for one in found.replies))
        return _card(point, found, before, after, dialect, self._own is None)

    async def _settled(self, before: scrape.Samples, wanted: int) -> scrape.Samples:
        """The metrics once the last request is in them: a server counts it after its last token has gone out."""
        end = time.perf_counter() + SETTLE
        while True:
            after = await asyncio.to_thread(scrape.metrics, self._server.url)
            seen = (scrape.phases(before, after) or {}).get("requests")
            if seen is None and not after or seen is not None and seen >= wanted or time.perf_counter() > end:
                return after
            await asyncio.sleep(0.05)

    def _take(self, point: Point, count: int) -> list[Prompt]:
        """Prompts that nobody has seen."""
        self._number += 1
        if self._own is not None:
            return list(islice(self._own, count))
        chat = self._settings.endpoint == "chat"
        return random_prompts(
            self._vocabulary, count, point.input, key=[self._salt, self._settings.seed, self._number], chat=chat,
            shared=self._settings.shared_prefix, extra=self._extra + (0 if chat else self._vocabulary.added),
            seen=self._seen,
        )  # fmt: skip


class _Progress:
    """A line that counts answers, where somebody looks."""

    def __init__(self, point: Point):
        self._point, self._done, self._shown = point, 0, sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, _: latencies.Reply) -> None:
        self._done += 1
        if self._shown:
            print(f"\r{self._point.name}: {self._done} of {self._point.prompts}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _card(
    point: Point, found: Measured, before: scrape.Samples, after: scrape.Samples, dialect: Dialect, fixed: bool
) -> Card:
    card = point.to_json() | latencies.summary(found.replies, found.duration, {})
    phases = scrape.phases(before, after)
    return card | {
        "beat_ms": latencies.percentiles(found.beats), "reconnected": found.reconnected, "phases": phases,
        "split_ms": scrape.split(phases, card["e2e_ms"]["mean"]), "counters": scrape.counters(before, after),
        "fixed_output": fixed, "extras": sorted(dialect.extras),
    }  # fmt: skip


def _first_error(card: Card) -> str:
    return next((one["said"] for one in card["requests"] if "error" in one), "")


def _line(card: Card) -> str:
    failed = f", {card['failed']} failed" if card["failed"] else ""
    if not card["completed"]:
        return f"nothing completed{failed}"
    return (f"{card['output_throughput']:,.1f} output tokens/s, TTFT {card['ttft_ms']['p50']:,.1f} ms, "
            f"E2E {card['e2e_ms']['p50']:,.0f} ms{failed}")  # fmt: skip


# --- what results add up to ---


@dataclass(frozen=True)
class Judge:
    """What measurements are held against."""

    slo: dict[str, float]
    place: Slice | None = None
    arch: Architecture | None = None


def assess(results: Results, judge: Judge) -> Card:
    """The whole as `--json` prints it: the point with the most output tokens a second on top, all points below."""
    shapes: dict[tuple[Any, Any], list[Card]] = {}
    for one in results.points:
        shapes.setdefault((one["input"], one["output"]), []).append(dict(one))
    found: dict[str, Card] = {}
    for (read, written), points in shapes.items():
        unloaded = saturation.unloaded_ms(points)
        for one in points:
            one |= _judged(one, results.settings, judge, unloaded)
        found[f"{'own' if read is None else read}/{written}"] = saturation.of_shape(points)
    points = sorted((one for each in shapes.values() for one in each), key=_order)
    done = [one for one in points if one["completed"]]
    best = max(done, key=lambda one: one["output_throughput"], default=None)
    shown = {} if best is None else {name: best[name] for name in _TOP}
    return {
        **shown,
        "saturation_qps": None if best is None else found[_shape(best)]["qps"],
        "point": None if best is None else {name: best[name] for name in ("input", "output", "qps", "prompts")},
        "saturation": found, "slo": judge.slo, "server": results.server, "settings": results.settings,
        "client": results.client, "flags": doubts.of_run(results.settings, results.server, points),
        "on": None if judge.place is None else judge.place.name,
        "file": None if results.path is None else str(results.path),
        "total": {"points": len(points), **{name: sum(one[name] for one in points)
                                            for name in ("completed", "failed", "duration")}},
        "points": points,
    }  # fmt: skip


_TOP = ("completed", "failed", "duration", "request_throughput", "input_throughput", "output_throughput", "ttft_ms",
        "tpot_ms", "itl_ms", "e2e_ms", "goodput", "good_share")  # fmt: skip


def _shape(point: Card) -> str:
    return Point(point["input"], point["output"], math.inf, 1).shape


def _order(point: Card) -> tuple[float, int, float]:
    return (-1 if point["input"] is None else point["input"], point["output"], float(point["qps"]))


def _judged(point: Card, settings: Card, judge: Judge, unloaded: float | None) -> Card:
    floor = None
    if judge.place is not None and judge.arch is not None and point["input"] is not None:
        fresh = point["input"] - (settings.get("shared_prefix") or 0)
        floor = inference.least_ttft_ms(judge.arch, fresh, judge.place)
    on = None if judge.place is None else judge.place.name
    able, share = saturation.keeps_up(point, unloaded)
    found = {"keeps_up": able, "done_share": share, "ttft_floor_ms": None if floor is None else round(floor, 3),
             "flags": doubts.of_point(point, settings, unloaded, floor, on)}  # fmt: skip
    if judge.slo and point["requests"]:
        found |= latencies.goodput(point["requests"], point["duration"], judge.slo)
    return found
