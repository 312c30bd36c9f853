"""What is wrong with a measurement, by name: what cannot be, what was too short, what the client did itself."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tpu.bench.saturation import LEAST_TIMES, arrival_seconds, steady, whole_ms

LATE_MS, LATE_SHARE = 5.0, 0.05  # of the median TTFT: what the sender may be late
CACHED = 0.02  # of the prompt tokens, from the prefix cache
FOR_P99 = 100
OURS = "gemma-tpu bench"  # the source of a result of this command

Card = Mapping[str, Any]
Flags = dict[str, str]


def of_point(point: Card, settings: Card, unloaded: float | None, floor_ms: float | None, on: str | None) -> Flags:
    """Every doubt about one point: its name, and what it says."""
    found: Flags = {}
    found |= _below_floor(point, floor_ms, on) | _length(point, unloaded) | _client(point) | _counts(point)
    found |= _server(point, settings)
    if point["failed"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in point["failures"].items())
        sent = point["completed"] + point["failed"]
        found["failures"] = f"{point['failed']} of {sent} requests failed ({kinds or 'of unknown kind'})"
    return found


def _below_floor(point: Card, floor_ms: float | None, on: str | None) -> Flags:
    if floor_ms is None or not point["completed"]:
        return {}
    times = [one["ttft_ms"] for one in point.get("requests") or () if "error" not in one]
    times = times or [point["ttft_ms"]["p50"]]
    under = [one for one in times if one is not None and one < floor_ms]
    if not under:
        return {}
    count = f"{len(under)} of {len(times)} TTFTs" if len(times) > 1 else "the median TTFT"
    said = (f"{count}, down to {min(under):.0f} ms, are under the {floor_ms:.0f} ms that the prompt's operations take "
            f"at the bf16 peak of {on}: the prompts were not computed (a cache?), or not this long")  # fmt: skip
    return {"ttft_below_floor": said}


def _length(point: Card, unloaded: float | None) -> Flags:
    if not point["completed"]:
        return {}
    sent = point["completed"] + point["failed"]
    whole = unloaded if unloaded is not None else whole_ms(point)
    if math.isinf(float(point["qps"])):
        return {"burst": f"all {sent} requests at once: throughput of a batch that drains, no steady state"}
    if whole is None or steady(point, whole):
        return {}
    lasts = arrival_seconds(point)
    needed = math.ceil(LEAST_TIMES * whole / 1e3 * float(point["qps"])) + 1
    return {"too_short": f"{sent} requests arrive within {lasts:.3g} s and each takes {whole / 1e3:.3g} s: no steady "
            f"state, so nothing is known about this rate; at least {needed:,} requests are needed"}  # fmt: skip


def _client(point: Card) -> Flags:
    lag, beat = point.get("lag_ms") or {}, point.get("beat_ms") or {}
    late = max(lag.get("p99") or 0.0, beat.get("p99") or 0.0)
    allowed = max(LATE_MS, LATE_SHARE * (point["ttft_ms"]["p50"] or 0.0))
    if late <= allowed:
        return {}
    return {"client_late": f"the load generator itself was late by {late:.1f} ms (p99; {allowed:.1f} are tolerated): "
            "run it on another machine, or on one with more cores"}  # fmt: skip


def _counts(point: Card) -> Flags:
    found: Flags = {}
    whole = [one for one in point.get("requests") or () if "error" not in one]
    short = [one["output_tokens"] for one in whole if one["output_tokens"] < point["output"]]
    if short and point.get("fixed_output", True):
        said = f"{len(short)} of {len(whole)} answers ended before {point['output']} tokens (the shortest after "
        found["short_output"] = f"{said}{min(short)}): the server heeds neither ignore_eos nor min_tokens"
    if point.get("input") is not None and point.get("fixed_output", True):
        other = [one["input_tokens"] for one in whole
                 if one["input_tokens"] is not None and one["input_tokens"] != point["input"]]  # fmt: skip
        if other:
            found["input_length"] = (f"the server counts {min(other)} to {max(other)} tokens in {len(other)} of "
                                     f"{len(whole)} prompts of {point['input']}: another tokenizer?")  # fmt: skip
    if "chunks" in point.get("counted_by", ()):
        found["tokens_by_chunks"] = "no usage from the server and no --tokenizer: each chunk was taken for a token"
    elif "tokenizer" in point.get("counted_by", ()):
        found["tokens_by_text"] = "no usage from the server: tokens were counted by encoding the answers again"
    return found


def _server(point: Card, settings: Card) -> Flags:
    found: Flags = {}
    counters = point.get("counters") or {}
    asked, hits = counters.get("prefix_queries", 0), counters.get("prefix_hits", 0)
    if asked and hits / asked > CACHED:
        stated = f", of which --shared-prefix explains {settings['shared_prefix']} a prompt" if settings.get(
            "shared_prefix") else "; switch prefix caching off, or do not repeat prompts"  # fmt: skip
        found["prefix_cache"] = f"{hits / asked:.0%} of the prompt tokens came from the prefix cache{stated}"
    if counters.get("preemptions"):
        found["preempted"] = f"the server preempted {counters['preemptions']} requests: its KV cache was full"
    seen, sent = (point.get("phases") or {}).get("requests"), point["completed"]
    if seen is not None and seen > sent + point["failed"]:
        found["other_traffic"] = f"the server finished {seen} requests in this time, of which {sent} are of this run"
    return found


def of_run(settings: Card, server: Card, points: Sequence[Card]) -> Flags:
    """Doubts about all points together."""
    found: Flags = {}
    said = (server.get("settings") or {}).get("cache_dtype")
    if settings.get("kv_dtype") is None and said in (None, "auto"):
        told = "the server says auto" if said else "the server does not say"
        told = f"{told}, and --kv-dtype is not given" if settings["source"] == OURS else "the file does not say"
        found["kv_dtype_unknown"] = f"the dtype of the KV cache: {told}; results with other dtypes cannot be compared"
    few = [one["completed"] for one in points if 0 < one["completed"] < FOR_P99]
    if few:
        found["few_for_p99"] = f"a p99 of TTFT, TPOT or E2E over {min(few)} requests is about their maximum"
    return found
