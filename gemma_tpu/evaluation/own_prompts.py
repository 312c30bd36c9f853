"""Prompts of the user's own and the function that scores their completions.

A file has one JSON object a line: `prompt` (text) or `messages`, an `id` if the rows have names, and whatever else the
scorer wants. The scorer is called with that object and the completion, and returns a bool or a number from 0 to 1.
It is the user's code and runs as such, outside of the sandbox.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import stats
from gemma_tpu.evaluation.samples import Sample

Scorer = Callable[[dict[str, Any], str], float]


@dataclass(frozen=True)
class Row:
    name: str
    messages: list[dict[str, str]]
    record: dict[str, Any]


def read(file: Path) -> list[Row]:
    """Every row; all faults in one error."""
    rows, faults, names = [], [], set()
    for number, line in enumerate(plain.text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _row(plain.json_value(line), number)
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: not JSON ({error.msg})")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
        else:
            if row.name in names:
                faults.append(f"line {number}: the id {plain.shown(row.name)} is there twice")
            names.add(row.name)
            rows.append(row)
    if faults or not rows:
        raise UserError(f"{file}: {'; '.join(faults[:5]) or 'holds no prompt'}")
    return rows


def _row(record: Any, number: int) -> Row:
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise ValueError("needs `prompt` or `messages`, one of the two")
    name = str(record.get("id", number))
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"].strip():
            raise ValueError("`prompt` must be text")
        return Row(name, [{"role": "user", "content": record["prompt"]}], record)
    turns = record["messages"]
    good = isinstance(turns, list) and turns and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )  # fmt: skip
    if not good or turns[-1]["role"] != "user":
        raise ValueError("`messages` must be a list of {role, content} that ends with a user turn")
    return Row(name, turns, record)


def scorer(spec: str) -> Scorer:
    """The function that `module:function` names; modules of the current folder are found too."""
    module, separator, function = spec.partition(":")
    if not (module and separator and function):
        raise UserError(f"--scorer {spec}: must be module:function, e.g. my_scorers:exact")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Scorer | None = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"--scorer {spec}: {module} cannot be imported: {error}") from None
    if found is None or not callable(found):
        raise UserError(f"--scorer {spec}: {module} has no function {function}")
    return found


class Scored(TypedDict):
    """The completions of one prompt."""

    score: float  # their mean
    scores: list[float]
    passed: int  # with a score of 1
    samples: int
    completions: list[str]


def card(rows: Sequence[Row], made: Sequence[Sample], judge: Scorer) -> dict[str, Any]:
    """The mean score over prompts with its interval; a completion passes when its score is 1."""
    records = {row.name: row.record for row in rows}
    scores: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    for one in made:
        scores.setdefault(one.problem, []).append(_score(judge, records[one.problem], one))
        texts.setdefault(one.problem, []).append(one.completion)
    per_problem: dict[str, Scored] = {
        name: {"score": sum(found) / len(found), "scores": found, "passed": sum(score == 1 for score in found),
               "samples": len(found), "completions": texts[name]}
        for name, found in scores.items()
    }  # fmt: skip
    passed = sum(row["passed"] for row in per_problem.values())
    least = min(row["samples"] for row in per_problem.values())
    return {
        "mean_score": stats.interval([row["score"] for row in per_problem.values()]),
        "passed": passed, "total": len(made), "problems": len(per_problem),
        "pass_at_k": {
            str(k): stats.interval([stats.pass_at_k(row["samples"], row["passed"], k) for row in per_problem.values()])
            for k in sorted({1, least})
        },
        "failures": {"below_1": len(made) - passed} if passed < len(made) else {},
        "cut": sum(one.finish_reason == "length" for one in made), "per_problem": per_problem,
    }  # fmt: skip


def _score(judge: Scorer, record: dict[str, Any], sample: Sample) -> float:
    try:
        score = judge(dict(record), sample.completion)
    except Exception as error:
        raise UserError(
            f"the scorer failed on prompt {sample.problem}, sample {sample.sample}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
        raise UserError(
            f"the scorer returned {score!r} for prompt {sample.problem}: it must be a bool or a number from 0 to 1"
        )
    return float(score)


def table(results: dict[str, Any]) -> str:
    entries = ({"base": results["base"]} if "base" in results else {}) | {"tuned": results}
    lines = [f"{'model':<8}{'mean score':>11}   {'95 % interval':<16}{'score 1':>12}"]
    for name, entry in entries.items():
        value, low, high = entry["mean_score"]
        passed = f"{entry['passed']}/{entry['total']}"
        lines.append(f"{name:<8}{value:>11.3f}   {f'{low:.3f} to {high:.3f}':<16}{passed:>12}")
    return "\n".join(lines)
