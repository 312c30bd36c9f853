"""The sections of a cost's page: the run by every way to pay, tokens, totals over hours and tokens, an optimisation."""

from collections.abc import Sequence

from gemma_tpu.costs import cost_text, paper
from gemma_tpu.costs.cost import BreakEven, Side
from gemma_tpu.costs.costing import Report
from gemma_tpu.pages import page
from gemma_tpu.pages.page import Axis, Bar, Curve, Dot, Section
from gemma_tpu.planning.plan_text import dollars

LEGEND = "Outlined, blue and violet: predicted. Filled, orange and yellow: from measured figures."
PREDICTED, MEASURED = (0, 3), (1, 4)  # colours of the first and the second side
CROSSING = 7
POINTS = 40


def page_of(report: Report) -> str:
    names = " against ".join(one.name for one in report.sides)
    sections = [
        Section("", _facts(report)),
        Section("Training", _training(report)),
        Section("Serving", _serving(report)),
        *_totals(report),
        Section("The optimisation", _optimisation(report)),
        Section("Made of", page.bullets(report.assumptions())),
    ]
    return page.page(f"Cost: {names}", f"Prices: {report.prices.name}. {LEGEND}", sections)


def paper_page(report: Report) -> str:
    sections = [Section(name, _paper_table(rows)) for name, rows in paper.tables()]
    found = [(one.place, one.printed_text, one.computed_text, one.why) for one in paper.discrepancies()]
    sections += [
        Section("Figures that cannot stand", page.table(("place", "printed", "computed", "why"), found, (1, 2))),
        *_totals(report),
        Section("Made of", page.bullets(report.assumptions())),
    ]
    about = paper.data()["about"]
    return page.page("The paper's cost, computed again", f"{about['title']}, {about['id']}. {LEGEND}", sections)


def colour(report: Report, side: Side) -> int:
    """Never one for a prediction and a measurement; a side of both is a prediction."""
    kinds = MEASURED if is_measured(side) else PREDICTED
    return kinds[report.sides.index(side)]


def is_measured(side: Side) -> bool:
    return all(one.measured for one in (side.training, side.serving) if one)


def _facts(report: Report) -> str:
    found = []
    for side in report.sides:
        if side.training:
            of = "measured" if side.training.measured else "predicted"
            found.append((f"run on {side.training.place.name}, {of}", dollars(side.once["training"]),
                          f"{side.training.hours:.3g} h, {side.way}", ""))  # fmt: skip
        if side.serving:
            of = "measured" if side.serving.measured else "predicted"
            per_million = dollars(side.serving.usd_per_million(side.per_hour))
            found.append((f"1M tokens on {side.serving.place.name}, {of}", per_million,
                          f"{side.serving.output_tokens_per_s:,.0f} tokens/s", ""))  # fmt: skip
    for crossing, unit in ((report.by_hours, "h served"), (report.by_tokens, "M tokens served")):
        if crossing and crossing.after:
            name = "never" if crossing.at is None else f"{crossing.at:,.4g}"
            found.append(("break-even", name, unit if crossing.at else f"{crossing.after} always", ""))
    return page.facts(found)


def _training(report: Report) -> str:
    rows = []
    for side in report.sides:
        if side.training is None:
            continue
        shade = (MEASURED if side.training.measured else PREDICTED)[report.sides.index(side)]
        for way, (low, high) in report.ways(side.training).items():
            text = dollars(high) if low == high else f"{dollars(low)} to {dollars(high)}"
            start = 0.0 if low == high else low
            name = f"{side.training.place.name}, {way}"
            rows.append(Bar(name, high, text, shade, side.training.measured, start))
    if not rows:
        return ""
    return page.bars(rows, "Dollars of the run by way to pay") + _table(cost_text.training_rows(report))


def _serving(report: Report) -> str:
    rows = []
    for side in report.sides:
        if side.serving is not None:
            shade = (MEASURED if side.serving.measured else PREDICTED)[report.sides.index(side)]
            usd = side.serving.usd_per_million(side.per_hour)
            text = f"{dollars(usd)}, {side.serving.chip_hours_per_million:.3g} accelerator-hours"
            rows.append(Bar(side.serving.place.name, usd, text, shade, side.serving.measured))
    if not rows:
        return ""
    return page.bars(rows, "Dollars for a million output tokens") + _table(cost_text.serving_rows(report))


def _totals(report: Report) -> list[Section]:
    lines = page.bullets(cost_text.break_even_lines(report))
    found = [Section("Total cost", _table(cost_text.total_rows(report)) + lines)]
    if all(one.hourly for one in report.sides):
        most = _most(report.by_hours, max((*report.hours, 1.0)))
        rates = [one.per_hour for one in report.sides]
        drawn = _lines(report, "hours of serving", most, rates, report.by_hours)
        found.append(Section("Over the hours served", drawn))
    rates = [one.per_million for one in report.sides if one.per_million is not None]
    if len(rates) == len(report.sides):
        most = _most(report.by_tokens, max((*report.tokens, 1e6)) / 1e6)
        drawn = _lines(report, "million tokens served", most, rates, report.by_tokens)
        found.append(Section("Over the tokens served", drawn))
    return found


def _most(crossing: BreakEven | None, asked: float) -> float:
    """Far enough to see where the lines cross."""
    return asked if crossing is None or crossing.at is None else max(asked, 1.5 * crossing.at)


def _lines(report: Report, label: str, most: float, rates: Sequence[float], crossing: BreakEven | None) -> str:
    """Dollars of each side, what is paid once and `rates` for each unit of the other axis."""

    def usd(number: int, x: float) -> float:
        return report.sides[number].fixed + x * rates[number]

    at = [most * n / POINTS for n in range(POINTS + 1)]
    curves = [Curve([(x, usd(number, x)) for x in at], colour(report, side), "")
              for number, side in enumerate(report.sides)]  # fmt: skip
    high = max(y for curve in curves for _, y in curve.points) * 1.08 or 1.0
    dots = []
    # The names stand at different places of their lines, so that lines that run together stay legible.
    for number, side in enumerate(report.sides):
        x = at[POINTS * (1 + 2 * number) // 8]
        y = usd(number, x)
        dots.append(Dot(x, y, side.name, f"{side.name}: {dollars(y)}", colour(report, side), 4.0, is_measured(side)))
    if crossing and crossing.at is not None:
        y = usd(0, crossing.at)
        dots.append(Dot(crossing.at, y, f"break-even {crossing.at:,.4g}", f"{dollars(y)}", CROSSING, 6.0))
    return page.plot(Axis(label, 0.0, most), Axis("$", 0.0, high), curves, dots, f"Dollars against {label}")


def _optimisation(report: Report) -> str:
    one = report.optimisation
    if one is None:
        return ""
    rows = [Bar(name, usd, dollars(usd), MEASURED[0], True) for name, usd in
            (("before", one.usd_before), ("after", one.usd_after))]  # fmt: skip
    drawn = page.bars(rows, "Dollars for a million output tokens, before and after")
    return drawn + _table(cost_text.optimisation_rows(report)) + page.bullets(cost_text.repaid_lines(report))


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    return page.table(head, body, right=range(1, len(head)))


def _paper_table(rows: Sequence[paper.Row]) -> str:
    head = ("", "TPU printed", "computed", "GPU printed", "computed", "ratio printed", "computed")
    body = [(what, *(text for one in each for text in cost_text.cell(one))) for what, _, each in rows]
    return page.table(head, body, right=range(1, 7))
