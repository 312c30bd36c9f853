"""A cost in words: aligned tables on a terminal, whose rows the page repeats."""

from collections.abc import Iterator, Sequence

from gemma_tpu.costs import cost, paper
from gemma_tpu.costs.cost import Optimisation, Serving, Side, Training
from gemma_tpu.costs.costing import Report
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.hardware.prices import WAYS, Prices
from gemma_tpu.pages.columns import table
from gemma_tpu.planning.plan_text import dollars

Row = tuple[str, ...]


def render(report: Report) -> str:
    sections = [
        ("training", training_rows(report)), ("serving", serving_rows(report)), ("total cost", total_rows(report)),
        ("the optimisation", optimisation_rows(report)),
    ]  # fmt: skip
    parts = [f"cost by the prices of {report.prices.name}; measured figures are marked, all others are predicted"]
    parts += ["\n".join([title, *table(rows, right=range(1, len(rows[0])))]) for title, rows in sections if rows]
    parts += ["\n".join(lines) for lines in (break_even_lines(report), repaid_lines(report)) if lines]
    parts.append("\n".join(["made of", *(f"  - {line}" for line in report.assumptions())]))
    return "\n\n".join(parts)


def head(sides: Sequence[Side]) -> Row:
    return ("", *(one.name for one in sides))


def _mark(text: str, measured: bool) -> str:
    return f"{text} measured" if measured else text


def _span(low: float, high: float) -> str:
    return dollars(low) if low == high else f"{dollars(low)} to {dollars(high)}"


def _usd(amount: float | None) -> str:
    return "-" if amount is None else dollars(amount)


def _rows(sides: Sequence[Side], found: Sequence[tuple[str, Sequence[str]]]) -> list[Row]:
    """Without the rows that say nothing of either side."""
    return [head(sides), *((name, *cells) for name, cells in found if any(cell != "-" for cell in cells))]


def training_rows(report: Report) -> list[Row]:
    cells = [_training_cells(report, side, side.training) if side.training else {} for side in report.sides]
    names = dict.fromkeys(name for one in cells for name in one)
    found = [(name, [one.get(name, "-") for one in cells]) for name in names]
    return _rows(report.sides, found) if found else []


def _training_cells(report: Report, side: Side, one: Training) -> dict[str, str]:
    """What is said of one side's run, by name."""
    ways = report.ways(one)
    spot = report.preempted(one) if "spot" in ways else None
    per_million = one.usd_per_million(side.once["training"])
    usd = {way: _span(*ways[way]) if way in ways else "-" for way in WAYS}
    return {
        "slice": f"{one.place.name}, {one.place.chips} chips",
        "hours": _mark(f"{one.hours:.4g}", one.measured),
        "accelerator-hours": f"{one.chip_hours:,.4g}",
        "tokens of rows": "-" if one.tokens is None else f"{one.tokens:,.0f}",
        "on demand": usd["on-demand"],
        "spot, preemptions included": usd["spot"],
        "  hours paid over undisturbed": "-" if spot is None else f"x {spot.factor:.3f}",
        "  best time between checkpoints": "-" if spot is None else f"{spot.best_checkpoint_minutes:.0f} min",
        "own hardware": usd["own"],
        "  cheaper than on demand if used": pays(one.place, report.prices),
        "$ per 1M tokens trained, as paid": "-" if per_million is None else f"{dollars(per_million)} ({side.way})",
    }


def pays(place: Slice, prices: Prices) -> str:
    share = cost.utilisation_that_pays(place, prices)
    if share is None:
        return "-"
    return f"over {share:.0%} of the time" if share <= 1 else "never"


def serving_rows(report: Report) -> list[Row]:
    served = [side.serving for side in report.sides]
    if not any(served):
        return []
    cells = [serving_cells(side.serving, side.serving.usd_per_million(side.per_hour)) if side.serving else {}
             for side in report.sides]  # fmt: skip
    names = list(dict.fromkeys(name for one in cells for name in one))
    found = [(name, [one.get(name, "-") for one in cells]) for name in names]
    found.insert(1, ("$ an hour", ["-" if not side.hourly else f"{dollars(side.per_hour)} ({side.way})"
                                   for side in report.sides]))  # fmt: skip
    found.append(("$ per evaluation", [_usd(report.evaluation(side)) for side in report.sides]))
    return _rows(report.sides, found)


def serving_cells(one: Serving, per_million: float) -> dict[str, str]:
    """The three numbers and what stands around them, by name."""
    found = {
        "slice": f"{one.place.name}, {one.place.chips} chips",
        "output tokens a second": _mark(f"{one.output_tokens_per_s:,.0f}", one.measured),
        "accelerator-hours per 1M tokens": f"{one.chip_hours_per_million:.3g}",
        "$ per 1M tokens generated": dollars(per_million),
    }
    for name, each in one.latency_ms.items():
        told = ", ".join(f"{at} {value:,.4g}" for at, value in each.items())
        found[f"{name.upper()}, ms"] = told
    if one.mfu is not None:
        found["utilisation: useful FLOPs of the peak"] = f"{one.mfu:.1%}"
    if one.of_bound is not None:
        found["utilisation: of what arithmetic allows"] = f"{one.of_bound:.0%}"
    return found


def total_rows(report: Report) -> list[Row]:
    sides = report.sides
    parts = dict.fromkeys(name for one in sides for name in one.once)
    found = [(f"{name}, once", [_usd(one.once.get(name)) for one in sides]) for name in parts]
    for name in dict.fromkeys(name for one in sides for name in one.hourly):
        found.append((f"{name}, an hour", [_usd(one.hourly.get(name)) for one in sides]))
    if any(one.hourly for one in sides):
        for hours in report.hours:
            found.append((f"with {hours:,g} h of serving", [dollars(one.after_hours(hours)) for one in sides]))
    for tokens in report.tokens:
        found.append((f"with {tokens / 1e6:,g}M tokens served", [_usd(one.after_tokens(tokens)) for one in sides]))
    return _rows(sides, found)


def break_even_lines(report: Report) -> list[str]:
    found = []
    if report.by_hours:
        found.append(f"break-even over hours served: {report.by_hours.told('h')}")
    if report.by_tokens:
        found.append(f"break-even over tokens served: {report.by_tokens.told('million tokens')}")
    return found


def optimisation_rows(report: Report) -> list[Row]:
    one = report.optimisation
    if one is None:
        return []
    before, after = serving_cells(one.before, one.usd_before), serving_cells(one.after, one.usd_after)
    return [("", "before", "after"), *((name, before.get(name, "-"), after.get(name, "-")) for name in before | after)]


def repaid_lines(report: Report) -> list[str]:
    one = report.optimisation
    if one is None:
        return []
    effort = f"effort {dollars(one.effort_usd)}"
    if one.repaid_after_tokens is None:
        return [f"{effort}; it saves nothing: {dollars(one.usd_after)} a million tokens after, "
                f"{dollars(one.usd_before)} before: it is never repaid"]  # fmt: skip
    said = f"{effort}; saves {dollars(one.saved)} a million tokens: repaid after {one.repaid_after_tokens / 1e6:,.4g}M"
    if report.tokens_per_day:
        days = one.repaid_after_days(report.tokens_per_day)
        said += f" tokens, {days:,.3g} days at {report.tokens_per_day / 1e6:,g}M a day"
    lines = [said if report.tokens_per_day else f"{said} tokens"]
    return lines + [f"p99 of {name.upper()} became worse: {a:,.4g} to {b:,.4g} ms" for name, a, b in worse(one)]


def worse(one: Optimisation) -> Iterator[tuple[str, float, float]]:
    """What the cheaper tokens are paid for with."""
    before, after = one.before.latency_ms, one.after.latency_ms
    for name in before:
        old, new = before[name].get("p99"), after.get(name, {}).get("p99")
        if old is not None and new is not None and new > old * 1.02:
            yield name, old, new


# --- the paper ---


def paper_text() -> str:
    parts = [f"{paper.data()['about']['title']} ({paper.data()['about']['id']}), its tables by our arithmetic"]
    for name, rows in paper.tables():
        head = ("", "TPU printed", "computed", "GPU printed", "computed", "ratio printed", "computed")
        cells = [(what, *(text for one in each for text in cell(one))) for what, _, each in rows]
        parts.append("\n".join([name, *table([head, *cells], right=range(1, 7))]))
    found = [("place", "printed", "computed"), *(
        (one.place, one.printed_text, one.computed_text) for one in paper.discrepancies()
    )]  # fmt: skip
    parts.append("\n".join(["figures that cannot stand (! above, and others)", *table(found, right=(1, 2))]))
    parts.append("\n".join(["why", *(f"  - {one.place}: {one.why}" for one in paper.discrepancies())]))
    return "\n\n".join(parts)


def cell(one: paper.Cell | None) -> tuple[str, str]:
    if one is None:
        return "", ""
    mark = "" if one.agrees else " !"
    return paper.shown(one.printed, one.digits), paper.shown(one.value, one.digits) + mark
