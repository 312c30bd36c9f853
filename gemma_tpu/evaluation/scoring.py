"""Completions into results: simulated, counted, said and kept. Nothing here samples, and nothing needs a model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import samples, scorecard, verilog, verilog_eval
from gemma_tpu.evaluation.samples import Sample
from gemma_tpu.evaluation.scorecard import Card
from gemma_tpu.run import runs
from gemma_tpu.run.metrics import say

Score = Callable[[Sequence[Sample]], list[verilog.Verdict]]


def stored(
    file: Path, clone: Path, *, task: str = verilog_eval.TASKS[0], only: Sequence[str] = (), unsafe: bool = False,
    workers: int | None = None, timeout: float = verilog_eval.TIMEOUT, out: Path | None = None, ks: Sequence[int] = (),
) -> Card:  # fmt: skip
    """Stored completions, ours or anyone's, scored; the same file always gives the same numbers."""
    version = verilog.require(unsafe)
    problems = verilog_eval.load(clone, task)
    made = samples.read(file, [one.id for one in problems])
    problems = verilog_eval.choose(problems, only)
    chosen = {one.id for one in problems}
    made = [one for one in made if one.problem in chosen]
    if not made:
        raise UserError(f"{file}: holds no sample of the chosen problems")
    with_samples = {one.problem for one in made}
    ready = scorable([one for one in problems if one.id in with_samples], workers, unsafe, timeout)
    verdicts = simulated(ready, unsafe, workers, timeout)(made)
    entry = scorecard.card([one.id for one in problems], made, verdicts, ks)
    results = {
        **entry, "eval": "verilog", "target": str(file), "iverilog": version, "task": task,
        "unscorable": {one.id: one.unscorable for one in ready if one.unscorable},
    }  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        keep(out / "results.json", results)
    return told(results, "samples")


def self_check(
    clone: Path, *, task: str = verilog_eval.TASKS[0], only: Sequence[str] = (), unsafe: bool = False,
    workers: int | None = None, timeout: float = verilog_eval.TIMEOUT,
) -> Card:  # fmt: skip
    """Every reference through the path of a completion: names those that cannot pass with this simulator."""
    version = verilog.require(unsafe)
    problems = verilog_eval.choose(verilog_eval.load(clone, task), only)
    verdicts = verilog_eval.self_check(problems, workers=workers, unsafe=unsafe, timeout=timeout)
    made = [Sample(one.id, 0, one.reference) for one in problems]
    entry = scorecard.card([one.id for one in problems], made, verdicts)
    say(f"{entry['passed']} of {entry['total']} references pass; {version}")
    failing = [(one.id, it) for one, it in zip(problems, verdicts, strict=True) if not it.passed]
    for name, verdict in failing:
        kinds = f"{verdict.kind}; official scorer: {verdict.official}"
        say(f"  {name} cannot pass here ({kinds}): {_one_line(verdict.log)}")
    return {
        **entry, "eval": "verilog", "target": "references", "iverilog": version, "task": task,
        "unscorable": {name: f"{verdict.kind}: {verdict.log}" for name, verdict in failing},
    }  # fmt: skip


def simulated(
    problems: Sequence[verilog.Problem], unsafe: bool, workers: int | None = None,
    timeout: float = verilog_eval.TIMEOUT,
) -> Score:  # fmt: skip
    by_name = {one.id: one for one in problems}
    official = isinstance(problems[0], verilog_eval.EvalProblem)
    def score(made: Sequence[Sample]) -> list[verilog.Verdict]:
        pairs = [by_name[one.problem] for one in made], [one.completion for one in made]
        if official:
            return verilog.score_all(*pairs, unsafe=unsafe, workers=workers, judge=verilog_eval.judge, timeout=timeout)
        return verilog.score_all(*pairs, unsafe=unsafe, workers=workers)

    return score


def scorable(
    problems: Sequence[verilog_eval.EvalProblem], workers: int | None, unsafe: bool, timeout: float
) -> list[verilog_eval.EvalProblem]:
    """With what each reference gives here; says which problems nobody can pass with this simulator."""
    ready = verilog_eval.measured(problems, workers=workers, unsafe=unsafe, timeout=timeout)
    failing = [one.id for one in ready if one.unscorable]
    if failing:
        say(f"{len(failing)} of {len(ready)} problems cannot be passed with this simulator and count as failed: "
            + ", ".join(failing))  # fmt: skip
    return ready


def told(results: Card, name: str = "tuned") -> Card:
    entries = ({"base": results["base"]} if "base" in results else {}) | {name: results}
    say(scorecard.table(entries))
    for label, entry in entries.items():
        for line in scorecard.remarks(label, entry):
            say(line)
    if "paired" in results:
        say(results["paired"]["sentence"])
    say(f"simulated with {results['iverilog']}")
    return results


def keep(path: Path, results: Card) -> None:
    runs.write_text(path, json.dumps(results, indent=1) + "\n")
    say(f"every completion and verdict is in {path}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[: scorecard.SHORT]
