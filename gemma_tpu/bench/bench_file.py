"""The file of a measurement: what was asked, of whom, and every finished point; whole after every point.

A sweep that is run again into the same file goes on with the points that are missing, if it asks the same.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.bench import vllm_result
from gemma_tpu.bench.doubts import OURS
from gemma_tpu.bench.points import Point
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.run.runs import write_text

FORMAT = "gemma-tpu bench 1"
# What must be the same for two points to stand in one file. The KV dtype is what the user says of the server.
SAME = ("endpoint", "arrivals", "seed", "temperature", "shared_prefix", "tokenizer", "data", "kv_dtype", "timeout",
        "warmup", "notes")  # fmt: skip
SAME_SERVER = ("url", "model", "root", "version")

Card = dict[str, Any]


@dataclass
class Results:
    """Everything that a file holds; `settings` and `server` as they were when it was begun."""

    path: Path | None
    settings: Card
    server: Card
    client: Card
    points: list[Card]

    @property
    def name(self) -> str:
        return "this run" if self.path is None else self.path.stem

    def find(self, point: Point) -> Card | None:
        """The point, if it was measured and anything came back."""
        key = (point.input, point.output, point.qps, point.prompts)
        for one in self.points:
            there = (one["input"], one["output"], float(one["qps"]), one["prompts"])
            if there == key and one["completed"]:
                return one
        return None

    def add(self, point: Point, card: Card) -> None:
        key = point.to_json()
        self.points = [one for one in self.points if {name: one[name] for name in key} != key] + [card]
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        whole = {"format": FORMAT, "server": self.server, "settings": self.settings, "client": self.client,
                 "points": self.points}  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(whole) + "\n")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from None


def begin(path: Path, settings: Card, server: Card, client: Card) -> Results:
    """A new file (not yet written), or the one that is there if it asks the same of the same server."""
    made = Results(path, settings, server, client, [])
    if not path.exists():
        return made
    found = read(path)
    if found.settings.get("source") != OURS:
        raise UserError(f"--out {path}: is there and no result of this command; name another file")
    if not found.points:
        return made
    changed = [
        f"{name}: {there.get(name)!r} there, {now.get(name)!r} now"
        for there, now, names in ((found.settings, settings, SAME), (found.server, server, SAME_SERVER))
        for name in names if there.get(name) != now.get(name)
    ]  # fmt: skip
    if changed:
        raise UserError(
            f"--out {path} holds another measurement:\n  " + "\n  ".join(changed)
            + "\nname another file, or ask the same to go on with that one"
        )  # fmt: skip
    return found


_MAYBE = (float, None)
_SPREAD = {"p50": _MAYBE, "p90": _MAYBE, "p99": _MAYBE, "mean": _MAYBE}
_REQUEST = {"scheduled": float, "sent": float, "input_tokens": (int, None), "output_tokens": int, "error?": str,
            "said?": str, "ttft_ms?": _MAYBE, "tpot_ms?": _MAYBE, "e2e_ms?": _MAYBE}  # fmt: skip
_POINT = {
    "input": (int, None), "output": int, "qps": (float, str), "prompts": int, "completed": int, "failed": int,
    "duration": float, "input_tokens": float, "output_tokens": float, "request_throughput": float,
    "input_throughput": float, "output_throughput": float, "failures": {str: int}, "goodput": _MAYBE,
    "good_share": _MAYBE, "counted_by": [str], "fixed_output?": bool, "requests": [_REQUEST],
    "phases?": ({str: float}, None),
    **{name: _SPREAD for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")}, "counters?": {str: int},
    **{f"{name}?": (_SPREAD, None) for name in ("chunk_gap_ms", "lag_ms", "beat_ms")}, "tokens_per_chunk?": _MAYBE,
    "split_ms?": ({str: float}, None), "reconnected?": int, "extras?": [str],
}  # fmt: skip
_FORM = {
    "format": str, "points": [_POINT], "client": dict,
    "settings": {"source": str, "endpoint?": (str, None), "shared_prefix?": (int, None), "kv_dtype?": (str, None),
                 "notes?": ({str: object}, None), "tokenizer?": (str, None), "data?": (str, None),
                 "arrivals?": (str, None), "seed?": (int, None), "temperature?": _MAYBE, "timeout?": _MAYBE,
                 "warmup?": (int, None)},
    "server": {"url": (str, None), "model": (str, None), "root": (str, None), "max_model_len?": (int, None),
               "version": (str, None), "settings?": ({str: object}, None)},
}  # fmt: skip


def _impossible(name: str, point: Card) -> Iterator[str]:
    """Figures that no measurement gives."""
    rate = point["qps"]
    if rate != "inf" and (isinstance(rate, str) or rate <= 0):
        yield f"{name}.qps is {plain.shown(rate)}: it must be a number above 0, or inf"
    for key in ("duration", "output", "prompts"):
        if point[key] <= 0:
            yield f"{name}.{key} is {plain.shown(point[key])}: it must be above 0"
    for key in ("completed", "failed", "input"):
        if (point[key] or 0) < 0:
            yield f"{name}.{key} is {plain.shown(point[key])}: it must not be below 0"
    for one in point["requests"]:
        if "error" not in one and (one.get("ttft_ms") is None or one.get("e2e_ms") is None):
            yield f"{name} has a request that neither failed nor has its times"
            return


def read(path: Path) -> Results:
    """Ours, or one of `vllm bench serve`."""
    found = vllm_result.objects(plain.text(path), path)
    if len(found) == 1 and isinstance(found[0], dict) and found[0].get("format") == FORMAT:
        one = plain.require(found[0], _FORM, str(path))
        numbered = enumerate(one["points"])
        problems = [problem for at, point in numbered for problem in _impossible(f"points[{at}]", point)]
        if plain.largest(one["points"]) > vllm_result.MOST:
            problems.append(f"points hold numbers above {vllm_result.MOST:g}, which nobody has measured")
        lacking = [name for name in SAME if name not in one["settings"] and name != "notes"]
        if one["settings"]["source"] == OURS and lacking:
            problems.append(f"settings lack {', '.join(lacking)}")
        if problems:
            raise UserError(f"{path}: {plain.first(problems, 5, '; ')}")
        return Results(path, one["settings"], one["server"], one["client"], list(one["points"]))
    if found and all(map(vllm_result.is_one, found)):
        for number, one in enumerate(found, 1):
            vllm_result.check(one, f"{path}: result {number}")
        settings = {"source": "vllm bench serve", "endpoint": found[0].get("endpoint_type")}
        client = {"date": found[0].get("date")}
        points = [vllm_result.point(one) for one in found]
        return Results(path, settings, vllm_result.server(found[0]), client, points)
    raise UserError(f"{path}: neither a result of this command nor one of `vllm bench serve --save-result`")
