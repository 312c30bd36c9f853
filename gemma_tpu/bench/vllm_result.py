"""Result files of `vllm bench serve`, read as points.

A file has one JSON object, or several one after the other (--append-result). What was measured of each request is in
it only with --save-detailed; without, medians and the percentiles that were asked for (p99 unless told otherwise).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.bench.latencies import PERCENTILES, percentiles
from gemma_tpu.errors import UserError

NAMES = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "e2e_ms": "e2el"}

Card = dict[str, Any]


def is_one(found: Any) -> bool:
    return isinstance(found, dict) and {"request_rate", "num_prompts", "output_throughput", "duration"} <= set(found)


def objects(text: str, path: Path) -> list[Any]:
    """Every JSON value of a file that has them one after the other."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(text.rstrip()):
        at += len(text[at:]) - len(text[at:].lstrip())
        try:
            one, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error})") from None
        found.append(one)
    return found


def point(found: Card) -> Card:
    """One run as a point."""
    failed = found.get("failed", found["num_prompts"] - found["completed"])
    done = max(1, found["completed"])
    card = {
        "input": round(found["total_input_tokens"] / done),
        "output": round(found["total_output_tokens"] / done),
        "qps": "inf" if math.isinf(float(found["request_rate"])) else found["request_rate"],
        "prompts": found["num_prompts"],
        "completed": found["completed"],
        "failed": failed,
        "failures": {"unknown": failed} if failed else {},
        "duration": found["duration"],
        "input_tokens": found["total_input_tokens"],
        "output_tokens": found["total_output_tokens"],
        "request_throughput": found["request_throughput"],
        "input_throughput": found["total_input_tokens"] / found["duration"],
        "output_throughput": found["output_throughput"],
        **{ours: _percentiles(found, theirs) for ours, theirs in NAMES.items()},
        "goodput": found.get("request_goodput"),
        "good_share": None,
        "counted_by": [],
        "fixed_output": False,  # their file does not say what was asked for
        "requests": [],
    }
    if card["e2e_ms"]["p50"] is None and found.get("latencies") and not failed:
        card["e2e_ms"] = percentiles(found["latencies"])  # newer files keep them without --save-detailed
    return card | _detailed(found) if {"ttfts", "start_times"} <= set(found) else card


def _percentiles(found: Card, name: str) -> dict[str, float | None]:
    shown = {f"p{p}": found.get(f"p{p}_{name}_ms") for p in PERCENTILES}
    shown["p50"] = found.get(f"median_{name}_ms", shown["p50"])
    return {**shown, "mean": found.get(f"mean_{name}_ms")}


def _detailed(found: Card) -> Card:
    """Request by request, where the file has it. Times are of one clock; the first request is the beginning."""
    starts, errors = found["start_times"], found["errors"]
    begun = min((start for start, error in zip(starts, errors, strict=True) if not error), default=0.0)
    whole = found.get("latencies") or [first + sum(gaps) for first, gaps in
                                       zip(found["ttfts"], found["itls"], strict=True)]  # fmt: skip
    requests: list[Card] = []
    for start, first, all_of_it, read, written, error in zip(
        starts, found["ttfts"], whole, found["input_lens"], found["output_lens"], errors, strict=True
    ):
        at = max(0.0, start - begun)
        card = {"scheduled": at, "sent": at, "input_tokens": read, "output_tokens": written}
        if error:
            requests.append(card | {"error": "unknown", "said": error.strip().rpartition("\n")[2][:300]})
            continue
        tpot = 1e3 * (all_of_it - first) / (written - 1) if written > 1 else None
        requests.append(card | {"ttft_ms": 1e3 * first, "tpot_ms": tpot, "e2e_ms": 1e3 * all_of_it})
    good = [one for one in requests if "error" not in one]
    return {
        "ttft_ms": percentiles([one["ttft_ms"] / 1e3 for one in good]),
        "tpot_ms": percentiles([one["tpot_ms"] / 1e3 for one in good if one["tpot_ms"] is not None]),
        "e2e_ms": percentiles([one["e2e_ms"] / 1e3 for one in good]),
        "itl_ms": percentiles(np.concatenate([np.asarray(gaps, float) for gaps in found["itls"]] or [np.zeros(0)])),
        "requests": requests,
    }


def server(found: Card) -> Card:
    return {"url": None, "model": found.get("model_id"), "root": found.get("model_id"), "max_model_len": None,
            "version": None, "settings": {}}  # fmt: skip
