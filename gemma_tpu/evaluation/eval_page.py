"""The page of an evaluation: every sample with its log and its verdict, and what they add up to."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tpu.evaluation import scorecard
from gemma_tpu.pages.page import Bar, Section, bars, bullets, details, facts, page, paragraph, preformatted, table

Card = dict[str, Any]
MOST = 160  # problems that get a bar of their own
COLOURS = {"passed": 2, "mismatch": 1, "syntax_error": 3, "timeout": 4, "attack": 5}


def page_of(found: Card) -> str:
    """One evaluation: of a tuned model beside its base, of one model, or of stored samples."""
    entries = ({"base": found["base"]} if "base" in found else {}) | {"tuned" if "base" in found else "model": found}
    about = ", ".join(
        str(found[key]) for key in ("eval", "task", "style", "target", "iverilog") if found.get(key)
    )
    sections = [
        Section("", _facts(entries)),
        Section("Base against tuned", paragraph(found["paired"]["sentence"]) if "paired" in found else ""),
        Section("Passes", _passes(entries)),
        Section("How many samples of a problem pass", _histogram(entries)),
        Section("Why samples fail", _failures(entries)),
        Section("Problem by problem", _bars(found)),
        Section("The benchmark's own scorer", _official(entries)),
        Section("Problems that nobody can pass here", _unscorable(found)),
        Section("Contamination", _contamination(found)),
        *(Section(f"Every sample, {name}", _samples(entry)) for name, entry in reversed(entries.items())),
    ]
    return page(f"Evaluation of {found['target']}", about, sections)


def compare_page(found: Card, first: Card, second: Card) -> str:
    """Two evaluations of the same problems."""
    entries = {found["a"]: first, found["b"]: second}
    rows = [
        (what[:-1] if what == "wins" else "loss", name, f"{left:.2f}", f"{right:.2f}")
        for what in ("wins", "losses") for name, (left, right) in found[what].items()
    ]  # fmt: skip
    differ = [f"{key}: {left} and {right}" for key, (left, right) in found["settings_differ"].items()]
    sections = [
        Section("", paragraph(found["sentence"]) + bullets(differ)),
        Section("Passes", _passes(entries)),
        Section("How many samples of a problem pass", _histogram(entries)),
        Section("Wins and losses", table(("", "problem", found["a"], found["b"]), rows, right=(2, 3)) if rows else ""),
    ]
    return page("Two evaluations", f"{found['a']} and {found['b']}", sections)


def _facts(entries: Mapping[str, Card]) -> str:
    rows = []
    for name, entry in entries.items():
        for k, (value, low, high) in entry["pass_at_k"].items():
            rows.append((f"{name}, pass@{k}", f"{value:.3f}", f"{low:.3f} to {high:.3f} (95 %)", ""))
        rows.append((f"{name}, passed", f"{entry['passed']}/{entry['total']}", _problems(entry["problems"]), ""))
    return facts(rows)


def _passes(entries: Mapping[str, Card]) -> str:
    rows = [
        Bar(f"{name}, pass@{k}", value, f"{value:.3f} ({low:.3f} to {high:.3f})", at, True)
        for at, (name, entry) in enumerate(entries.items())
        for k, (value, low, high) in entry["pass_at_k"].items()
    ]
    return bars(rows, "pass@k of each model") + paragraph("Intervals are bootstrapped over problems, 95 %.", "note")


def _histogram(entries: Mapping[str, Card]) -> str:
    """By whole counts of passes: a problem with 3 of 5 is another thing than one with 5 of 5."""
    rows = []
    for at, (name, entry) in enumerate(entries.items()):
        counts = Counter(row["passed"] for row in entry["per_problem"].values())
        most = max(row["samples"] for row in entry["per_problem"].values())
        for number in range(most + 1):
            rows.append(Bar(f"{name}: {number} of {most}", counts[number], _problems(counts[number]), at, True))
    return bars(rows, "problems by the number of their samples that pass")


def _problems(number: int) -> str:
    return f"{number} problem" + "s" * (number != 1)


def _failures(entries: Mapping[str, Card]) -> str:
    rows = [
        Bar(f"{name}: {kind}", count, str(count), COLOURS.get(kind, 7), True)
        for name, entry in entries.items() for kind, count in entry["failures"].items()
    ]  # fmt: skip
    examples = [
        f"{name}, {kind}: {one['problem']} ({one['sample']}): {one['log']}"
        for name, entry in entries.items() for kind, found in entry.get("examples", {}).items() for one in found
    ]  # fmt: skip
    return (bars(rows, "failures by class") if rows else paragraph("None fails.")) + bullets(examples)


def _bars(found: Card) -> str:
    mine = scorecard.rates(found)
    base = scorecard.rates(found["base"]) if "base" in found else {}
    rows = []
    for name in list(mine)[:MOST]:
        count = found["per_problem"][name]
        beside = f", base {base[name]:.0%}" if base else ""
        rows.append(Bar(name, mine[name], f"{count['passed']}/{count['samples']}{beside}", 2, True))
    more = len(mine) - len(rows)
    return bars(rows, "share of passes of each problem") + (paragraph(f"… and {more} more.", "note") if more else "")


def _official(entries: Mapping[str, Card]) -> str:
    shown = [(name, entry["official"]) for name, entry in entries.items() if "official" in entry]
    rows = [
        (name, f"{one['passed']}/{one['total']}", f"{one['pass_rate']:.2f}", len(one["differ"])) for name, one in shown
    ]
    if not rows:
        return ""
    head = ("model", "passed", "pass rate", "other verdict than ours")
    return table(head, rows, right=(1, 2, 3)) + bullets([line for _, one in shown for line in one["differ"]])


def _unscorable(found: Card) -> str:
    return "".join(details(name, preformatted(why)) for name, why in found.get("unscorable", {}).items())


def _contamination(found: Card) -> str:
    report = found.get("contamination")
    if not report:
        return ""
    if "not_checked" in report:
        return paragraph(f"Not checked: {report['not_checked']}")
    rows = [
        (one["problem"], one["part"], f"{one['share']:.0%}", one["grams"], one["place"]) for one in report["overlaps"]
    ]
    said = (
        f"{report['rows']:,} rows of training data against {report['texts']} texts of problems, by {report['n']}-grams "
        f"of words: {len(report['contaminated'])} texts have at least {report['share']:.0%} of theirs in the data."
    )
    return paragraph(said) + (table(("problem", "text", "shared", "n-grams", "first in"), rows, (2, 3)) if rows else "")


def _samples(entry: Card) -> str:
    return "".join(
        details(f"{name}: {row['passed']} of {row['samples']}", "".join(_sample(*one) for one in _columns(row)))
        for name, row in entry["per_problem"].items()
    )


def _columns(row: Card) -> Iterator[tuple[int, str, str, str, str]]:
    """Number, verdict, the official one, completion and log of each sample of a problem."""
    count = row["samples"]
    kinds = row.get("verdicts") or [f"score {score:g}" for score in row["scores"]]
    officials, logs = row.get("official", [""] * count), row.get("logs", [""] * count)
    return zip(range(count), kinds, officials, row["completions"], logs, strict=False)


def _sample(number: int, kind: str, official: str, completion: str, log: str) -> str:
    name = f"{number}: {kind}" + (f" (official scorer: {official})" if official else "")
    return details(name, preformatted(completion) + (preformatted(log) if log else ""))
