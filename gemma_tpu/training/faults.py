"""What goes wrong in a run while it goes on: updates that were not applied, spikes, a loss that does not fall.

The step itself decides, on the device, whether an update is applied (gemma_tpu/step/step.py). Here the rows of
metrics.jsonl are read as they come: everything unusual is said once with what is known about it, and kept in
warnings.jsonl; what cannot come right by itself stops the run.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from gemma_tpu.errors import RunError
from gemma_tpu.schema import FaultsConfig

WINDOW = 50  # updates that say what a usual gradient norm is
SETTLED = 20  # of them before anything is called unusual
FIRST, LOOK_AT = 10, 60  # "has the loss fallen": the first so many updates against those before this one
NAMED = 6  # rows that are named on the console; warnings.jsonl has all


class Diverged(RunError):
    """Too many updates in a row that were no numbers."""


@dataclass(frozen=True)
class Notice:
    """One thing to know about a step; `more` is for warnings.jsonl alone."""

    step: int
    kind: str  # skipped, spike, flat
    text: str
    more: Mapping[str, Any]

    def row(self) -> dict[str, Any]:
        return {"step": self.step, "kind": self.kind, "text": self.text, **self.more}


class Watch:
    """Judges one row of metrics.jsonl after the other."""

    def __init__(self, section: FaultsConfig, rows_of: Callable[[int], list[str]], start: int):
        self._section, self._rows_of = section, rows_of
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._losses: list[float] | None = [] if start == 0 else None  # a continued run has been judged before
        self._in_a_row = 0
        self.skipped = 0

    def see(self, row: Mapping[str, Any]) -> list[Notice]:
        """What is unusual about this step."""
        if row["skipped"]:
            return [self._skipped(row)]
        self._in_a_row = 0
        found = [*self._spike(row), *self._flat(row)]
        self._norms.append(row["grad_norm"])
        return found

    @property
    def must_stop(self) -> bool:
        return self._in_a_row >= self._section.skips

    def stop(self, at: int) -> "Diverged":
        """Why the run cannot go on, and what to look at."""
        last = sorted(self._norms)[-3:]
        norms = f"the gradient norms before were up to {last[-1]:.3g}" if last else "no update was applied before"
        return Diverged(
            f"{self._in_a_row} updates in a row gave a loss or gradient that is no number, up to step {at}; none of "
            f"them was applied. {norms.capitalize()}. Usual reasons: optim.lr too high, optim.clip null, rows with "
            "extreme content (warnings.jsonl names those of each step)"
        )

    def _skipped(self, row: Mapping[str, Any]) -> Notice:
        self._in_a_row += 1
        self.skipped += 1
        rows = self._rows_of(row["step"])
        named = ", ".join(rows[:NAMED]) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
        what = "loss" if not math.isfinite(row["loss"]) else "gradient"
        return Notice(
            row["step"], "skipped",
            f"the {what} of step {row['step']} is no number (loss {row['loss']}, gradient norm {row['grad_norm']}): "
            f"the update is not applied, {self._in_a_row} in a row, {self.skipped} in all; its rows: {named}",
            {"rows": rows, "loss": row["loss"], "grad_norm": row["grad_norm"]},
        )  # fmt: skip

    def _spike(self, row: Mapping[str, Any]) -> list[Notice]:
        if len(self._norms) < SETTLED:
            return []
        usual, norm = median(self._norms), row["grad_norm"]
        if norm <= self._section.spike * usual:
            return []
        rows = self._rows_of(row["step"])
        return [Notice(
            row["step"], "spike",
            f"the gradient norm of step {row['step']} is {norm:.3g}, {norm / max(usual, 1e-30):.0f} times the usual "
            f"{usual:.3g}; its rows: {', '.join(rows[:NAMED])}", {"rows": rows, "grad_norm": norm, "usual": usual},
        )]  # fmt: skip

    def _flat(self, row: Mapping[str, Any]) -> list[Notice]:
        if self._losses is None:
            return []
        self._losses.append(row["loss"])
        if len(self._losses) < LOOK_AT:
            return []
        first, last, self._losses = fmean(self._losses[:FIRST]), fmean(self._losses[-FIRST:]), None
        if last < 0.99 * first:
            return []
        share = row["target_tokens"] / max(row["tokens"], 1)
        return [Notice(
            row["step"], "flat",
            f"the loss has not fallen in the first {LOOK_AT} updates ({first:.3f} to {last:.3f}). Look at: optim.lr "
            f"(now {row['lr']:.2g}: too high or too low?), the mask ({share:.0%} of the tokens are in the loss; "
            "data.train_on), the chat template (do the rows render as the base expects them?)",
            {"first": first, "last": last},
        )]  # fmt: skip


def is_memory(error: BaseException) -> bool:
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "Out of memory" in text or "exceeds available HBM" in text
