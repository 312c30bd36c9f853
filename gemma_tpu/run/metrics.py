"""What a run leaves for people: metrics.jsonl, lines on the console or a progress bar, and the loss picture."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_tpu import plain

PACE = {"tokens": float, "tokens_per_s": float, "usd?": (float, None)}  # what tells how fast a run was
_OF_STEPS = {
    **PACE, "step": int, "loss": (float, None), "lr": (float, None), "grad_norm": (float, None), "target_tokens": float,
    "step_s?": float, "skipped?": float,
    **{f"{name}?": (float, None) for name in ("data_wait", "mfu", "memory_gib", "host_gib", "padding")},
}  # fmt: skip
STEPS: dict[str, Any] = _OF_STEPS  # metrics.jsonl
HELD_OUT = {"step": int, "loss": (float, None), "perplexity": (float, None)}
PREVIEWS = {"step": int, "prompt": str, "text": str}
WARNINGS = {"step": int, "kind": str, "text": str}


def read(path: Path, form: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The rows of a journal; none where it is not there. A row of another form than `form` is named by its line."""
    rows = []
    for number, line in enumerate(plain.text(path).split("\n") if path.exists() else (), 1):
        if line.strip():
            row = plain.from_json(line, f"{path}: line {number}")
            rows.append(plain.require(row, form or {}, f"{path}: line {number}"))
    return rows


class Journal:
    """A JSONL file of steps: metrics.jsonl has one object a step, others one an event.

    On resume, steps after the checkpoint are dropped: they will run again. A number that is none (a loss that
    overflowed) is null: JSON has no NaN.
    """

    def __init__(self, path: Path, start: int):
        there = list(_whole_lines(path))
        kept = [row for row in there if row["step"] <= start]
        self.last: Mapping[str, Any] | None = there[-1] if there else None  # also of what will run again: it was paid
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self._file = Appender(path)

    def write(self, row: Mapping[str, Any]) -> None:
        finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        self._file.write((json.dumps(finite) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class Appender:
    """A file that grows while a run goes on. What finds no room on the disk is kept and goes out with what comes
    next: a full disk stops a run at its checkpoints, after they were tried again, and not at a line of a journal."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)
        self._kept, self._said = b"", False

    def write(self, data: bytes) -> None:
        self._kept += data
        try:
            while self._kept:
                self._kept = self._kept[self._file.write(self._kept) :]
            self._said = False
        except OSError as error:
            if not self._said:
                say(f"warning: {self._path} cannot be written ({error.strerror}): its lines are kept until it can")
            self._said = True

    def close(self) -> None:
        self.write(b"")
        self._file.close()
        if self._kept:
            say(f"warning: {self._path}: the last {len(self._kept):,} bytes could not be written")


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    """A killed run may leave half a line at the end: it belongs to a step that will run again."""
    if not path.exists():
        return
    *lines, last = plain.text(path).split("\n")
    with contextlib.suppress(ValueError):
        lines += [last] if json.loads(last) else []
    for number, line in enumerate(lines, 1):
        row = plain.from_json(line, f"{path}: line {number}")
        yield plain.require(row, {"step": int}, f"{path}: line {number}")


class Progress:
    """A bar on a terminal, lines elsewhere; both say the step, what is measured of it and the time that is left."""

    def __init__(self, total: int, start: int, every: int, bar: bool):
        self._total, self._start, self._every = total, start, every
        self._begun = time.monotonic()
        self._bar: Any = None
        if bar and sys.stderr.isatty():
            self._bar = _rich_bar()
            self._bar.start()
            self._task = self._bar.add_task("train", total=total, completed=start, loss="")

    def restart(self) -> None:
        """The time that is left is reckoned from here: compiling is over."""
        self._begun = time.monotonic()

    def update(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        loss = f"loss {row['loss']:.4f}"
        shown = (f"{row['tokens_per_s']:,.0f} tokens/s  lr {row['lr']:.2e}  grad {row['grad_norm']:.3f}"
                 f"{measured(row)}")  # fmt: skip
        if self._bar is not None:
            self._bar.shown = shown
            self._bar.update(self._task, completed=step, loss=loss)
        elif step % self._every == 0 or step in (self._total, self._start + 1):
            left = (time.monotonic() - self._begun) / (step - self._start) * (self._total - step)
            say(f"step {step:>5}/{self._total}  {loss}  {shown}  left {clock(left)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def measured(row: Mapping[str, Any]) -> str:
    """What else is known of a step, for its line: what is not known on these devices is left out."""
    words: dict[str, Callable[[float], str]] = {
        "mfu": lambda x: f"MFU {x:.1%}", "padding": lambda x: f"padding {x:.0%}",
        "memory_gib": lambda x: f"memory {x:.1f} GiB", "data_wait": lambda x: f"data wait {x:.0%}",
        "usd": lambda x: f"${x:.2f}",
    }  # fmt: skip
    return "".join(f"  {told(row[key])}" for key, told in words.items() if row.get(key) is not None)


def _rich_bar() -> Any:
    """The bar with what matters most, and a line below it with the rest: one line would be too long for a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Bar(Progress):
        shown = ""

        def get_renderables(self) -> Iterable[Any]:
            yield self.make_tasks_table(self.tasks)
            yield Text(self.shown)

    return Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip


_silent = False


def silence() -> None:
    """Of several hosts one speaks; errors are every host's own."""
    global _silent
    _silent = True


def say(text: str = "") -> None:
    """To stderr: stdout belongs to --json."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def draw_loss(rows: list[dict[str, Any]], path: Path, title: str, held_out: Mapping[int, float]) -> None:
    """loss.png: every step, a running mean, and the held-out loss where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["loss"] is not None]  # of an update that was not applied
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, mean = [], losses[0] if losses else 0.0
    for loss in losses:
        mean += 0.1 * (loss - mean)
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="#1f4e8c", linewidth=1.8, label="running mean (0.1)")
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o--", color="#c8501e", label="held-out rows")
    axes.set(xlabel="optimizer update", ylabel="loss per target token (nats)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
