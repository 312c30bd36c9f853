"""What an evaluation found: passes, intervals, failure classes with examples; two of them side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import stats
from gemma_tpu.evaluation.samples import Sample
from gemma_tpu.evaluation.verilog import Verdict

Card = dict[str, Any]
KS = (1, 5, 10)
EXAMPLES = 2  # of each class of failure
SHORT = 160
SHOWN_DIFFERENCES = 5


def card(
    problems: Sequence[str], samples: Sequence[Sample], verdicts: Sequence[Verdict], ks: Sequence[int] = ()
) -> Card:
    """`problems` in their order; those without a sample are counted, not scored."""
    rows: dict[str, list[tuple[Sample, Verdict]]] = {}
    for pair in sorted(zip(samples, verdicts, strict=True), key=lambda pair: pair[0].sample):
        rows.setdefault(pair[0].problem, []).append(pair)
    scored = [name for name in problems if name in rows]
    per_problem = {name: _row(rows[name]) for name in scored}
    least = min(row["samples"] for row in per_problem.values())
    if too_large := [k for k in ks if k > least]:
        raise UserError(f"pass@{too_large[0]} needs {too_large[0]} samples of each problem; {least} are there")
    ks = sorted(set(ks) or {k for k in (*KS, least) if k <= least})
    failures = Counter(verdict.kind for verdict in verdicts if not verdict.passed)
    found = {
        "passed": sum(row["passed"] for row in per_problem.values()), "total": len(samples), "problems": len(scored),
        "pass_at_k": {str(k): _pass_at_k(per_problem, k) for k in ks},
        "failures": dict(failures.most_common()),
        "examples": {kind: _examples(samples, verdicts, kind) for kind in failures},
        "cut": sum(sample.finish_reason == "length" for sample in samples),
        "per_problem": per_problem,
    }  # fmt: skip
    if len(scored) < len(problems):
        found["without_samples"] = [name for name in problems if name not in rows]
    if any(verdict.official for verdict in verdicts):
        found["official"] = _official(per_problem)
    return found


def _row(pairs: Sequence[tuple[Sample, Verdict]]) -> dict[str, Any]:
    row = {
        "passed": sum(verdict.passed for _, verdict in pairs), "samples": len(pairs),
        "verdicts": [verdict.kind for _, verdict in pairs], "logs": [verdict.log for _, verdict in pairs],
        "completions": [sample.completion for sample, _ in pairs],
    }  # fmt: skip
    if any(verdict.official for _, verdict in pairs):
        row["official"] = [verdict.official for _, verdict in pairs]
    return row


def _pass_at_k(per_problem: Mapping[str, Card], k: int) -> list[float]:
    return stats.interval([stats.pass_at_k(row["samples"], row["passed"], k) for row in per_problem.values()])


def _official(per_problem: Mapping[str, Card]) -> Card:
    """The official scorer's figures: its mean of percentages that are cut to whole ones, and where it differs."""
    counts = [(sum(one == "passed" for one in row["official"]), row["samples"]) for row in per_problem.values()]
    differ = [
        f"{name} ({number}): {kind} here, {theirs} there"
        for name, row in per_problem.items()
        for number, (kind, theirs) in enumerate(zip(row["verdicts"], row["official"], strict=True))
        if (kind == "passed") != (theirs == "passed")
    ]
    passed, total = (sum(part) for part in zip(*counts, strict=True))
    rate = sum(100 * good // all_ for good, all_ in counts) / len(counts)
    return {"passed": passed, "total": total, "pass_rate": round(rate, 2), "differ": differ}


def _examples(samples: Sequence[Sample], verdicts: Sequence[Verdict], kind: str) -> list[Card]:
    chosen = [pair for pair in zip(samples, verdicts, strict=True) if pair[1].kind == kind][:EXAMPLES]
    return [
        {"problem": one.problem, "sample": one.sample, "log": " ".join(verdict.log.split())[:SHORT]}
        for one, verdict in chosen
    ]


def rates(entry: Card) -> dict[str, float]:
    """Each problem's share of passes, or its mean score."""
    return {name: row.get("score", row["passed"] / row["samples"]) for name, row in entry["per_problem"].items()}


def brief(entry: Card) -> Card:
    """The same without completions and logs: what --json prints."""
    rows = {
        name: {key: value for key, value in row.items() if key not in ("completions", "logs")}
        for name, row in entry["per_problem"].items()
    }
    more = {"base": brief(entry["base"])} if "base" in entry else {}
    return {**entry, "per_problem": rows, **more}


# --- in words ---


def table(entries: Mapping[str, Card]) -> str:
    """Base and tuned, one line each."""
    shared = [set(entry["pass_at_k"]) for entry in entries.values()]
    ks = sorted(set.intersection(*shared), key=int)
    head = "".join(f"{f'pass@{k}':>8}   {'95 % interval':<16}" for k in ks)
    lines = [f"{'model':<8}{head}{'passed':>10}   failures"]
    for name, entry in entries.items():
        cells = ""
        for k in ks:
            value, low, high = entry["pass_at_k"][k]
            cells += f"{value:>8.3f}   {f'{low:.3f} to {high:.3f}':<16}"
        failures = ", ".join(f"{kind} {n}" for kind, n in entry["failures"].items()) or "none"
        lines.append(f"{name:<8}{cells}{entry['passed']:>5}/{entry['total']:<4}   {failures}")
    return "\n".join(lines)


def remarks(name: str, entry: Card) -> list[str]:
    """What the table does not show: the official verdict, examples of failures, what is missing or cut."""
    lines = []
    if official := entry.get("official"):
        lines.append(
            f"{name}, official scorer: {official['passed']}/{official['total']} pass, its pass rate "
            f"{official['pass_rate']:.2f}; it differs from the verdict above on {len(official['differ'])} samples"
        )
        lines += [f"  {one}" for one in official["differ"][:SHOWN_DIFFERENCES]]
    for kind, examples in entry["examples"].items():
        lines += [f"{name}, {kind}: {one['problem']} ({one['sample']}): {one['log']}" for one in examples[:1]]
    if entry.get("without_samples"):
        count = len(entry["without_samples"])
        lines.append(f"{name}: {count} problems have no sample and are not in these numbers")
    if entry["cut"]:
        lines.append(f"note: {entry['cut']} of {entry['total']} completions were cut at their limit of tokens")
    return lines




# --- two runs ---


def compare(first: Card, second: Card, names: tuple[str, str]) -> Card:
    """The paired test on the problems' rates, with wins and losses by name."""
    left, right = rates(first), rates(second)
    if left.keys() != right.keys():
        apart = sorted(left.keys() ^ right.keys())
        raise UserError(
            f"{names[0]} and {names[1]} are not of the same problems: {len(apart)} are in one alone, "
            f"e.g. {', '.join(map(plain.cut, apart[:3]))}"
        )
    order = list(left)
    found = stats.paired([left[name] for name in order], [right[name] for name in order])
    said = {name: [round(left[name], 4), round(right[name], 4)] for name in order}
    return {
        "a": names[0], "b": names[1], "difference": found.difference, "p_value": found.p_value,
        "significant": found.significant, "sentence": found.sentence(*names),
        "wins": {order[at]: said[order[at]] for at in found.wins},
        "losses": {order[at]: said[order[at]] for at in found.losses},
        "same": len(order) - len(found.wins) - len(found.losses),
    }  # fmt: skip


def read(path: Path) -> Card:
    """A results file, or the folder that holds one."""
    file = path
    if path.is_dir():
        held = sorted({*path.glob("results.json"), *path.glob("eval_*.json"), *path.glob("evals/*/results.json")})
        if len(held) != 1:
            places = "".join(f"\n  {one}" for one in held)
            raise UserError(f"{path}: holds {len(held)} results of evaluations; name one file:{places}".rstrip(":"))
        file = held[0]
    try:
        entry = plain.json_value(plain.text(file))
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("per_problem"), dict) or not entry["per_problem"]:
        raise UserError(f"{file}: is no results file of `gemma-tpu eval` (results.json, eval_tiny.json)")
    plain.require(entry, {"per_problem": {str: {"passed": int, "samples": int, "score?": float}}}, str(file))
    wrong = [name for name, row in entry["per_problem"].items() if not 0 <= row["passed"] <= row["samples"] > 0]
    if wrong:
        named = plain.first(map(plain.shown, wrong), 5)
        raise UserError(f"{file}: passed must be from 0 to samples, and is not for {named}")
    return entry
