"""Runs side by side: what each measured, and whether their losses may be compared at all.

Nothing is taken on trust: rows, masks and learning rates are compared update by update as the runs wrote them. A run of
recipes/gpu_baseline, or of anything that writes the same keys, is a run like any other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gemma_tpu import config, plain
from gemma_tpu.errors import UserError
from gemma_tpu.pages.columns import table
from gemma_tpu.run import metrics, runs
from gemma_tpu.schema import Config

NEEDED = ("step", "loss", "lr", "grad_norm", "tokens", "target_tokens", "tokens_per_s")
RATE = 1e-4  # relative; float32 arithmetic and what a journal rounds stay below
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    name: str
    config: Config
    rows: list[Row]
    summary: dict[str, Any]

    @property
    def by_step(self) -> dict[int, Row]:
        return {row["step"]: row for row in self.rows}

    @property
    def made_by(self) -> str:
        return self.summary.get("framework") or f"gemma_tpu {self.summary.get('version', '')}".strip()

    @property
    def devices(self) -> str:
        count, kind = self.summary.get("devices"), self.summary.get("device_kind", "?")
        return "-" if count is None else f"{count} x {kind}"


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders, each with a name of its own."""
    names = [path.resolve().name for path in paths]
    if len(set(path.resolve() for path in paths)) < len(paths):
        raise UserError(f"a run is compared with itself: {', '.join(map(str, paths))}")
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name the run_dir of a config that was trained")
    settings, file = runs.read_config(path), path / "metrics.jsonl"
    rows, found = metrics.read(file), runs.read_summary(runs.RunFolder(path))
    if not rows:
        raise UserError(f"{file}: is empty or not there; a comparison needs at least one update")
    missing = [key for key in NEEDED if key not in rows[0]]
    if missing:
        raise UserError(f"{file}: its rows have no {', '.join(missing)}; was it written by another program?")
    for number, row in enumerate(rows, 1):
        plain.require(row, metrics.STEPS, f"{file}: update {number}")
    return Run(name, settings, rows, found)


# --- what each measured ---


def figures(run: Run) -> Row:
    """Of one run by itself; None where it does not say."""
    rows = run.rows
    losses, norms = ([row[key] for row in rows if row[key] is not None] for key in ("loss", "grad_norm"))
    seconds = sum(row["tokens"] / row["tokens_per_s"] for row in rows if row["tokens_per_s"])
    tokens, usd = sum(row["tokens"] for row in rows), rows[-1].get("usd")
    held = [row["memory_gib"] for row in rows if row.get("memory_gib") is not None]
    padding = [row["padding"] for row in rows if row.get("padding") is not None]
    shares = [row["mfu"] for row in rows if row.get("mfu") is not None]
    return {
        "name": run.name, "made_by": run.made_by, "devices": run.devices, "updates": len(rows),
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "mean_loss": math.fsum(losses) / len(losses) if losses else None,
        "median_grad_norm": median(norms) if norms else None, "max_grad_norm": max(norms, default=None),
        "tokens": tokens, "target_tokens": sum(row["target_tokens"] for row in rows), "seconds": seconds,
        # The first updates warm up where nothing is compiled ahead: the median leaves them out.
        "tokens_per_s": median(row["tokens_per_s"] for row in rows), "mfu": median(shares) if shares else None,
        "padding": math.fsum(padding) / len(padding) if padding else None,
        "memory_gib": max(held, default=None), "usd": usd,
        "usd_per_million_tokens": _usd_per_million(rows),
        "trainable_params": run.summary.get("trainable_params"),
    }  # fmt: skip


def apart(first: Run, other: Run) -> Row:
    """How far two runs are from each other in the updates that both have."""
    pairs = [(row, other.by_step[step]) for step, row in first.by_step.items() if step in other.by_step]
    losses = [abs(a["loss"] - b["loss"]) for a, b in pairs if None not in (a["loss"], b["loss"])]
    norms = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs if a["grad_norm"] and b["grad_norm"]]
    rates = figures(first)["tokens_per_s"], figures(other)["tokens_per_s"]
    return {
        "name": other.name, "updates": len(pairs), "max_loss_difference": max(losses, default=None),
        "max_grad_norm_difference": max(norms, default=None),
        "tokens_per_s_ratio": rates[1] / rates[0] if rates[0] else None,
    }  # fmt: skip


# --- whether they may be compared ---


def warnings(first: Run, other: Run) -> Iterator[str]:
    """Every reason for which a difference between the two need not come from what ran them."""
    names = f"{first.name} and {other.name}"
    pairs = [(row, other.by_step[step]) for step, row in first.by_step.items() if step in other.by_step]
    if not pairs:
        yield f"updates: {names} have none in common"
    rows = _where(pairs, "tokens")
    yield from _told(rows, pairs, f"rows: {names} trained on other rows", "tokens", "losses are not of the same text")
    if rows is None:
        at = _where(pairs, "target_tokens")
        told = "losses are averages over other tokens (data.train_on, or another template)"
        yield from _told(at, pairs, f"mask: {names} have other tokens in the loss", "target_tokens", told)
        plans = first.summary.get("plan"), other.summary.get("plan")
        if at is None and None not in plans and plans[0] != plans[1]:
            yield f"plan: {names} count as many tokens, and their plans differ: {plans[0]} | {plans[1]}"
    rate = next((i for i, (a, b) in enumerate(pairs) if not _same_rate(a["lr"], b["lr"])), None)
    yield from _told(rate, pairs, f"schedule: {names} have other learning rates", "lr", "they are not the same run")
    if len(first.rows) != len(other.rows):
        yield f"length: {first.name} has {len(first.rows):,} updates, {other.name} {len(other.rows):,}"
    trained = first.summary.get("trainable_params"), other.summary.get("trainable_params")
    if None not in trained and trained[0] != trained[1]:
        yield f"parameters: {first.name} trains {trained[0]:,}, {other.name} {trained[1]:,}"
    yield from _configured(first, other, names)


def _configured(first: Run, other: Run, names: str) -> Iterator[str]:
    a, b = first.config, other.config
    if a.model.path.rstrip("/").rpartition("/")[2] != b.model.path.rstrip("/").rpartition("/")[2]:
        yield f"base: {first.name} is of {a.model.path}, {other.name} of {b.model.path}"
    if a.model.dtype != b.model.dtype or a.model.quantise != b.model.quantise:
        yield f"precision: the bases of {names} are held in {_held(a)} and {_held(b)}"
    if a.lora.dropout or b.lora.dropout:
        yield f"dropout: {names} draw other numbers, so their losses differ by chance as well"
    for run in (first, other):
        if not run.summary:
            yield f"state: {run.name} has no summary.json: it has not finished"
        if run.rows[-1].get("usd") is None:
            yield f"cost: the price of {run.name}'s devices is not known; log.usd_per_hour sets one"


def _usd_per_million(rows: Sequence[Row]) -> float | None:
    """From the first update on: what starting costs says nothing of the run, and not every program counts it."""
    tokens = sum(row["tokens"] for row in rows[1:])
    if not tokens or rows[0].get("usd") is None or rows[-1].get("usd") is None:
        return None
    return float(rows[-1]["usd"] - rows[0]["usd"]) / float(tokens) * 1e6


def _held(settings: Config) -> str:
    return settings.model.dtype + (f", {settings.model.quantise}" if settings.model.quantise else "")


def _same_rate(one: float | None, other: float | None) -> bool:
    """None is a rate that was no number."""
    return one == other if one is None or other is None else math.isclose(one, other, rel_tol=RATE)


def _where(pairs: Sequence[tuple[Row, Row]], key: str) -> int | None:
    return next((at for at, (a, b) in enumerate(pairs) if a[key] != b[key]), None)


def _told(at: int | None, pairs: Sequence[tuple[Row, Row]], what: str, key: str, so: str) -> Iterator[str]:
    if at is not None:
        a, b = pairs[at]
        form = ".4g" if key == "lr" else ","
        values = ("no number" if x[key] is None else f"{x[key]:{form}}" for x in (a, b))
        yield f"{what} from update {a['step']} on ({key} {' and '.join(values)}): {so}"


def settings(found: Sequence[Run]) -> list[tuple[str, ...]]:
    """The keys that differ, the folder of the run aside: (key, value in each run)."""
    flat = [_flat(config.to_dict(run.config)) for run in found]
    keys = [key for key in flat[0] if key != "run_dir" and any(str(one[key]) != str(flat[0][key]) for one in flat[1:])]
    return [(key, *("null" if one[key] is None else str(one[key]) for one in flat)) for key in keys]


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        section = isinstance(value, dict)
        found |= {f"{name}.{key}": item for key, item in value.items()} if section else {name: value}
    return found


def to_json(found: Sequence[Run]) -> Row:
    first, *others = found
    return {
        "runs": [figures(run) for run in found], "apart": [apart(first, run) for run in others],
        "warnings": all_warnings(found), "settings": {key: list(values) for key, *values in settings(found)},
    }  # fmt: skip


def all_warnings(found: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(line for run in found[1:] for line in warnings(found[0], run)))


# --- in words ---

# (name, key, how it is written)
LINES = (
    ("made by", "made_by", "{}"), ("devices", "devices", "{}"), ("updates", "updates", "{:,}"),
    ("loss, first", "first_loss", "{:.4f}"), ("loss, last", "last_loss", "{:.4f}"),
    ("loss, mean", "mean_loss", "{:.4f}"), ("gradient norm, median", "median_grad_norm", "{:.4f}"),
    ("gradient norm, highest", "max_grad_norm", "{:.4f}"), ("tokens", "tokens", "{:,}"),
    ("tokens in the loss", "target_tokens", "{:,}"), ("tokens/s, median", "tokens_per_s", "{:,.0f}"),
    ("MFU, median", "mfu", "{:.1%}"), ("padding", "padding", "{:.1%}"), ("seconds in updates", "seconds", "{:,.1f}"),
    ("GiB of a device, peak", "memory_gib", "{:.2f}"), ("cost", "usd", "${:,.4g}"),
    ("$ per million tokens", "usd_per_million_tokens", "{:,.4g}"),
    ("parameters that train", "trainable_params", "{:,}"),
)  # fmt: skip


def lines(found: Sequence[Run]) -> list[tuple[str, ...]]:
    """The table of figures; a figure that no run has is left out."""
    all_figures = [figures(run) for run in found]
    for one in all_figures:  # the trainer alone: --json has what it was made of
        one["made_by"] = one["made_by"].partition(",")[0]
    return [
        (name, *("-" if one[key] is None else form.format(one[key]) for one in all_figures))
        for name, key, form in LINES if any(one[key] is not None for one in all_figures)
    ]


def distances(found: Sequence[Run]) -> list[str]:
    told = []
    for one in (apart(found[0], run) for run in found[1:]):
        parts = [f"{one['updates']:,} updates in common"]
        if one["max_loss_difference"] is not None:
            parts.append(f"losses at most {one['max_loss_difference']:.2e} apart")
        if one["max_grad_norm_difference"] is not None:
            parts.append(f"gradient norms at most {one['max_grad_norm_difference']:.1e} of theirs")
        if one["tokens_per_s_ratio"] is not None:
            parts.append(f"{one['tokens_per_s_ratio']:.2f} x its tokens/s")
        told.append(f"{one['name']} beside {found[0].name}: {', '.join(parts)}")
    return told


def render(found: Sequence[Run]) -> str:
    names = [run.name for run in found]
    right = range(1, len(found) + 1)
    text = table([("", *names), *lines(found)], right=right, indent=0) + ["", *distances(found)]
    if differing := settings(found):
        text += ["", "settings that differ:", *table([("key", *names), *differing])]
    problems = all_warnings(found)
    return "\n".join(text + ["", *(f"warning: {line}" for line in problems)] if problems else text)
