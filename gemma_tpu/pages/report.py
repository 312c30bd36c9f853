"""report.html of a run folder: what ran, its curves, throughput, memory, cost, samples before and after, warnings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gemma_tpu.config import to_dict
from gemma_tpu.errors import UserError
from gemma_tpu.pages import page
from gemma_tpu.pages.page import Axis, Curve, Dot, Section
from gemma_tpu.run import metrics, runs
from gemma_tpu.run.runs import RunFolder

POINTS = 600  # of a curve: more than a screen shows are averaged
Row = Mapping[str, Any]


def write(run: RunFolder) -> Path:
    """Make the page of a run that is over, or of one that still goes on."""
    config = runs.read_config(run.path)
    rows = metrics.read(run.metrics, metrics.STEPS)
    if not rows:
        raise UserError(f"{run.path}: metrics.jsonl is empty or not there; a report needs at least one step")
    summary = runs.read_summary(run)
    held_out = [row for row in metrics.read(run.held_out, metrics.HELD_OUT)
                if None not in (row["loss"], row["perplexity"])]
    samples = metrics.read(run.samples, metrics.PREVIEWS)
    warnings = metrics.read(run.warnings, metrics.WARNINGS)
    sections = [
        Section("", _facts(rows, summary, held_out)),
        Section("Loss", _loss(rows, held_out)),
        Section("Held-out loss", _held_out(held_out)),
        Section("Learning rate and gradient", _curves(rows, [("lr", "learning rate"), ("grad_norm", "gradient norm")])),
        Section("Throughput", _curves(rows, [("tokens_per_s", "tokens/s, without padding"), ("mfu", "MFU")])
                + _shares(rows, summary)),
        Section("Memory", _curves(rows, [("memory_gib", "peak GiB of a device"), ("host_gib", "GiB of the host")])),
        Section("Cost", _cost(rows)),
        Section("Samples", _samples(samples)),
        Section("Warnings", _warnings(warnings, summary)),
        Section("What ran", _config(to_dict(config), summary)),
    ]  # fmt: skip
    state = "" if summary else " It has not finished."
    about = f"{len(rows):,} updates of {config.model.path} on {config.data.path}.{state} Every figure is measured."
    runs.write_text(run.report, page.page(f"Run: {run.path.name}", about, sections))
    return run.report


def _facts(rows: Sequence[Row], summary: Row, held_out: Sequence[Row]) -> str:
    last = rows[-1]
    tokens, targets = (sum(row[key] for row in rows) for key in ("tokens", "target_tokens"))
    loss = next((row["loss"] for row in reversed(rows) if row["loss"] is not None), None)
    seconds = sum(row.get("step_s", 0.0) for row in rows)
    found = [
        ("updates", f"{last['step']:,}", f"{metrics.clock(seconds)} in steps", ""),
        ("loss", _number(loss), f"first {_number(rows[0]['loss'])}", ""),
        ("tokens a second", f"{tokens / seconds:,.0f}" if seconds else "-",
         f"{tokens:,} tokens, {targets:,} in the loss", ""),
    ]  # fmt: skip
    if held_out:
        best = min(held_out, key=lambda row: row["loss"])
        found.append(("best held-out loss", _number(best["loss"]), f"step {best['step']}, perplexity "
                      f"{best['perplexity']:,.2f}", ""))  # fmt: skip
    if {"devices", "device_kind"} <= summary.keys():
        found.append(("devices", f"{summary['devices']} x {summary['device_kind']}",
                      f"{summary.get('hosts', 1)} host(s)", ""))  # fmt: skip
    if last.get("usd") is not None:
        found.append(("cost", f"${last['usd']:,.2f}", "since the command began", ""))
    skipped = sum(row.get("skipped", 0) for row in rows)
    found.append(("updates not applied", str(skipped), "loss or gradient was no number", "bad" if skipped else ""))
    return page.facts(found)


def _loss(rows: Sequence[Row], held_out: Sequence[Row]) -> str:
    points = thinned([(row["step"], row["loss"]) for row in rows if row["loss"] is not None])
    if len(points) < 2:
        return ""
    dots = [Dot(row["step"], row["loss"], "", f"held out at {row['step']}: {row['loss']:.4f}", 1, 5.0, True)
            for row in held_out]  # fmt: skip
    high = max([y for _, y in points] + [dot.y for dot in dots])
    x = Axis("update", 0.0, float(rows[-1]["step"]))
    told = "Line: the loss of each update, nats a target token. Dots: the held-out rows."
    return page.plot(x, Axis("loss", 0.0, high * 1.05 or 1.0), [Curve(points, 0, "")], dots, "Loss by update") + (
        page.paragraph(told, "note")
    )


def _held_out(held_out: Sequence[Row]) -> str:
    if not held_out:
        return ""
    rows = [(row["step"], f"{row['loss']:.4f}", f"{row['perplexity']:,.3f}") for row in held_out]
    return page.table(("update", "loss", "perplexity"), rows, right=(0, 1, 2))


def _curves(rows: Sequence[Row], wanted: Sequence[tuple[str, str]]) -> str:
    """One picture for each figure that these devices have."""
    drawn = ""
    for colour, (key, label) in enumerate(wanted):
        points = thinned([(row["step"], row[key]) for row in rows if row.get(key) is not None])
        if len(points) > 1:
            high = max(y for _, y in points) * 1.1 or 1.0
            axes = Axis("update", 0.0, float(points[-1][0])), Axis(label, 0.0, high)
            drawn += page.plot(*axes, [Curve(points, colour, "")], [], f"{label} by update", 210)
    return drawn


def _shares(rows: Sequence[Row], summary: Row) -> str:
    def mean(key: str) -> float | None:
        found = [row[key] for row in rows if row.get(key) is not None]
        return sum(found) / len(found) if found else None

    named: list[tuple[str, Any]] = [
        ("padding, of the positions", mean("padding")), ("waiting for data, of the time", mean("data_wait")),
        ("saving, of the time", summary.get("saving_share")), ("MFU", mean("mfu")),
    ]  # fmt: skip
    lines = [(name, f"{value:.2%}") for name, value in named if value is not None]
    return page.table(("share", ""), lines, right=(1,)) if lines else ""


def _cost(rows: Sequence[Row]) -> str:
    usd, tokens = rows[-1].get("usd"), sum(row["tokens"] for row in rows)
    if usd is None:
        return page.paragraph("The price of these devices is not known; log.usd_per_hour sets one.", "note")
    each = usd / tokens * 1e6
    return page.paragraph(f"${usd:,.2f} so far, loading and compiling included: ${each:,.2f} for a million tokens "
                          "without padding.")  # fmt: skip


def _samples(samples: Sequence[Row]) -> str:
    """Each prompt as the first and the last completion found it."""
    prompts = list(dict.fromkeys(row["prompt"] for row in samples))
    drawn = ""
    for prompt in prompts:
        made = [row for row in samples if row["prompt"] == prompt]
        chosen = [made[0], made[-1]] if len(made) > 1 else made
        drawn += page.table((f"step, of: {prompt}", "completion"), [(row["step"], row["text"]) for row in chosen])
    return drawn


def _warnings(warnings: Sequence[Row], summary: Row) -> str:
    lines = [f"step {row['step']}, {row['kind']}: {row['text']}" for row in warnings]
    lines += [f"note: {note}" for note in summary.get("notes", [])]
    return page.bullets(lines) if lines else page.paragraph("None.")


def _config(tree: Mapping[str, Any], summary: Row) -> str:
    flat = [(f"{name}.{key}", value) for name, section in tree.items() if isinstance(section, dict)
            for key, value in section.items()]  # fmt: skip
    flat += [(name, value) for name, value in tree.items() if not isinstance(value, dict)]
    flat += [(name, summary[name]) for name in ("version", "trainable_params") if name in summary]
    flat += [(f"rows {name}", value) for name, value in summary.get("rows", {}).items()]
    return page.table(("key", "value"), [(name, value if isinstance(value, str) else json.dumps(value))
                                         for name, value in flat])  # fmt: skip


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, each the mean of its neighbours."""
    width = -(-len(points) // POINTS)
    groups = [points[at : at + width] for at in range(0, len(points), width or 1)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
