"""Runs side by side as a page: the same axes for all, nothing rescaled."""

from collections.abc import Sequence

from gemma_tpu.pages import comparison, page
from gemma_tpu.pages.comparison import Run
from gemma_tpu.pages.page import Axis, Curve, Section
from gemma_tpu.pages.report import thinned

PICTURES = (("loss", "Loss, nats a target token", 330), ("grad_norm", "Gradient norm, before clipping", 260),
            ("lr", "Learning rate", 200), ("tokens_per_s", "Tokens/s, without padding", 260),
            ("memory_gib", "Peak GiB of a device", 210), ("usd", "$ so far", 210))  # fmt: skip


def page_of(found: Sequence[Run]) -> str:
    names = [run.name for run in found]
    right = range(1, len(found) + 1)
    problems = comparison.all_warnings(found)
    verdict = page.bullets(problems) if problems else page.paragraph("The runs had the same rows, masks and rates.")
    legend = page.legend([(f"{run.name} ({run.made_by}, {run.devices})", at) for at, run in enumerate(found)])
    sections = [
        Section("", legend + page.bullets(comparison.distances(found))),
        Section("May they be compared?", verdict),
        *(Section(label, _picture(found, key, label, height)) for key, label, height in PICTURES),
        Section("Figures", page.table(("", *names), comparison.lines(found), right=right)),
        Section("Settings that differ", page.table(("key", *names), comparison.settings(found))),
    ]
    return page.page(f"Runs: {', '.join(names)}", "Every figure is measured, on axes that the runs share.", sections)


def _picture(found: Sequence[Run], key: str, label: str, height: int) -> str:
    curves, high, last = [], 0.0, 0.0
    for at, run in enumerate(found):
        points = thinned([(row["step"], row[key]) for row in run.rows if row.get(key) is not None])
        if len(points) > 1:
            high, last = max(high, *(y for _, y in points)), max(last, points[-1][0])
            curves.append(Curve(points, at % page.COLOURS, dashed=at > 0))
    if not curves:
        return ""
    return page.plot(Axis("update", 0.0, last), Axis("", 0.0, high * 1.05 or 1.0), curves, [], label, height)
