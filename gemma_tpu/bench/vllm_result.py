"""Result files of `vllm bench serve`, read as points.

A file has one JSON object, or several one after the other (--append-result). What was measured of each request is in
it only with --save-detailed; without, medians and the percentiles that were asked for (p99 unless told otherwise).
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu import plain
from gemma_tpu.bench.latencies import PERCENTILES, percentiles
from gemma_tpu.errors import UserError

MOST = 1e15  # of any figure: nobody measures more tokens, milliseconds or requests
NAMES = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "e2e_ms": "e2el"}

Card = dict[str, Any]


def is_one(found: Any) -> bool:
    return isinstance(found, dict) and {"request_rate", "num_prompts", "output_throughput", "duration"} <= set(found)


def objects(text: str, path: Path) -> list[Any]:
    """Every JSON value of a file that has them one after the other."""
    decoder, blank, found = json.JSONDecoder(), re.compile(r"\s*"), []
    at = blank.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        try:
            one, at = decoder.raw_decode(text, at)
            for _ in plain.levels(one):
                pass
        except RecursionError:
            raise UserError(f"{path}: no JSON (nested too deep)") from None
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error})") from None
        found.append(one)
        at = blank.match(text, at).end()  # type: ignore[union-attr]
    return found


_MAYBE = (float, None)
_FORM = {
    "request_rate": (float, str), "num_prompts": int, "completed": int, "failed?": int, "duration": float,
    "total_input_tokens": int, "total_output_tokens": int, "request_throughput": float, "output_throughput": float,
    "request_goodput?": _MAYBE, "date?": (str, None), "endpoint_type?": (str, None), "model_id?": (str, None),
    **{f"{kind}_{name}_ms?": _MAYBE for name in NAMES.values()
       for kind in ("mean", "median", *(f"p{p}" for p in PERCENTILES))},
    "latencies?": ([float], None),
}  # fmt: skip
_DETAILED = {"start_times": [float], "errors": [str], "ttfts": [float], "itls": [[float]], "input_lens": [int],
             "output_lens": [int]}  # fmt: skip


def check(found: Any, name: str) -> None:
    """One run of the file, or a UserError with what is wrong in it."""
    detailed = {"ttfts", "start_times"} <= set(found)
    plain.require(found, _FORM | (_DETAILED if detailed else {}), name)
    sizes = {len(found[key]) for key in _DETAILED} if detailed else set()
    if len(sizes) > 1 or (detailed and found.get("latencies") and len(found["latencies"]) not in sizes):
        raise UserError(f"{name}: its lists of requests have different lengths")
    if plain.largest(found) > MOST:
        raise UserError(f"{name}: holds numbers above {MOST:g}, which nobody has measured")
    rate = found["request_rate"]
    if isinstance(rate, str) and rate != "inf" or not isinstance(rate, str) and rate <= 0:
        raise UserError(f"{name}: request_rate is {plain.shown(rate)}: it must be a number above 0, or inf")
    for key in ("duration", "num_prompts"):
        if found[key] <= 0:
            raise UserError(f"{name}: {key} is {plain.shown(found[key])}: it must be above 0")
    for key in ("completed", "failed", "total_input_tokens", "total_output_tokens"):
        if found.get(key, 0) < 0:
            raise UserError(f"{name}: {key} is {plain.shown(found[key])}: it must not be below 0")


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
