"""The points of a sweep: how long prompts and answers are, how many requests a second, how many requests."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.errors import UserError

LARGEST = 1_000_000  # tokens, prompts: what is above it was mistyped


@dataclass(frozen=True)
class Point:
    """One load. `input` None: the user's own prompts, as long as they are."""

    input: int | None
    output: int
    qps: float  # inf: all at once
    prompts: int

    @property
    def shape(self) -> str:
        return f"{'own' if self.input is None else self.input}/{self.output}"

    @property
    def rate(self) -> str:
        return rate(self.qps)

    @property
    def name(self) -> str:
        return f"{self.shape} at QPS {self.rate}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"qps": "inf" if math.isinf(self.qps) else self.qps}


def rate(qps: float) -> str:
    return "inf" if math.isinf(qps) else f"{qps:g}"


# The sweep of "Fine-Tuning and Serving Gemma 4 31B on Google Cloud TPU", section 8.1.
PAPER_SHAPES = ((128, 256), (512, 256), (1024, 512), (4096, 512), (8192, 512), (15360, 512))
PAPER_QPS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)
PAPER_PROMPTS = 30
PRESETS = {
    "paper": tuple(Point(i, o, qps, PAPER_PROMPTS) for i, o in PAPER_SHAPES for qps in PAPER_QPS),
}


def grid(
    inputs: Sequence[int | None], outputs: Sequence[int], rates: Sequence[float], prompts: int
) -> tuple[Point, ...]:
    """Every rate for every shape. One output serves all inputs; otherwise each input has its own."""
    if len(outputs) not in (1, len(inputs)):
        raise UserError(
            f"{len(inputs)} inputs and {len(outputs)} outputs: give one output for all, or as many as inputs"
        )
    outputs = list(outputs) * (len(inputs) if len(outputs) == 1 else 1)
    return checked(Point(i, o, qps, prompts) for i, o in zip(inputs, outputs, strict=True) for qps in rates)


def read(path: Path) -> tuple[Point, ...]:
    """A YAML list of mappings {input, output, qps, prompts}; qps may be a list, of which each makes a point."""
    given = plain.yaml_file(path, f"--points {path}")
    if not isinstance(given, list) or not given:
        raise UserError(f"--points {path}: must be a list of points, like `- {{input: 512, output: 256, qps: [1, 2]}}`")
    problems: list[str] = []
    found: list[Point] = []
    for number, one in enumerate(given, 1):
        wrong = list(_wrong(one))
        problems += [f"point {number}: {text}" for text in wrong]
        if not wrong:
            rates = one["qps"] if isinstance(one["qps"], list) else [one["qps"]]
            found += [Point(one["input"], one["output"], float(qps), one.get("prompts", PAPER_PROMPTS))
                      for qps in rates]  # fmt: skip
    if problems:
        raise UserError(f"--points {path}:\n  " + plain.first(problems, between="\n  "))
    return checked(found)


_KEYS = ("input", "output", "qps", "prompts")


def _wrong(one: Any) -> Iterable[str]:
    if not isinstance(one, dict):
        yield f"{plain.shown(one)} must be a mapping of {', '.join(_KEYS)}"
        return
    for key in one:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, 1)
            meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KEYS)}"
            yield f"{plain.below('', key)}: unknown key; {meant}"
    for key in ("input", "output", "prompts"):
        value = one.get(key, PAPER_PROMPTS if key == "prompts" else None)
        if type(value) is not int:
            yield f"{key} is {plain.shown(value)}: it must be an integer"
    rates = one.get("qps")
    each = rates if isinstance(rates, list) else [rates]
    if not each or any(type(qps) not in (int, float) and qps != "inf" for qps in each):
        yield f"qps is {plain.shown(rates)}: it must be a number, inf, or a list of them"


def checked(points: Iterable[Point]) -> tuple[Point, ...]:
    """All that is wrong with them at once."""
    points = tuple(points)
    wrong = [
        f"{point.name}: {key} is {value}: it must be from {least} to {LARGEST:,}"
        for point in points
        for key, value, least in (("input", point.input, 1), ("output", point.output, 1), ("prompts", point.prompts, 1))
        if value is not None and not least <= value <= LARGEST
    ]
    wrong += [f"{point.name}: qps must be above 0" for point in points if not point.qps > 0]
    wrong += [f"{point.name}: given twice" for at, point in enumerate(points) if point in points[:at]]
    if wrong:
        raise UserError("these points are wrong:\n  " + "\n  ".join(dict.fromkeys(wrong)))
    return points
