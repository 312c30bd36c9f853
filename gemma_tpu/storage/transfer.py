"""How fast bytes come: a bar with GB/s on a terminal, a line now and then elsewhere. To stderr."""

import sys
import time
from types import TracebackType
from typing import Any

from gemma_tpu.storage.remote import Source

_LINE_EVERY = 15.0  # seconds, where there is no terminal
_WORTH_A_LINE = 1.0  # a transfer that took less needs no words


class Transfer:
    """A context that is told `update(done, total)` in bytes, and at the end says the mean speed."""

    def __init__(self, what: str, source: Source):
        self._what, self._source, self._retries = what, source, source.retries
        self._done, self._total = 0, 0
        self._begun = self._said = time.monotonic()
        self._bar: Any = None

    def update(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        now = time.monotonic()
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = _rich_bar()
                self._bar.start()
                self._task = self._bar.add_task(self._what, total=total, shown="")
            self._bar.update(self._task, completed=done, shown=self._speed(now))
        elif now - self._said >= _LINE_EVERY:
            self._said = now
            print(f"{self._what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {self._speed(now)}", file=sys.stderr)

    def _speed(self, now: float) -> str:
        return f"{self._done / max(now - self._begun, 1e-9) / 1e9:.2f} GB/s"

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.stop()
        retries = self._source.retries - self._retries
        if kind is None and (now - self._begun >= _WORTH_A_LINE or retries) and self._done:
            again = f", {retries} reads tried again" if retries else ""
            print(f"{self._what}: {self._done / 1e9:.2f} GB in {now - self._begun:.1f} s, {self._speed(now)}{again}",
                  file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[shown]}"),
                    TimeRemainingColumn(), console=Console(stderr=True))
