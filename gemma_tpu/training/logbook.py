"""What is written about a run while it goes on, read one step behind so that the device never waits.

metrics.jsonl has every update; held_out.jsonl, samples.jsonl and warnings.jsonl what happens now and then. The same
figures go to the console and to the trackers. Of several hosts the first one writes; all of them judge.
"""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from gemma_tpu.config import to_dict
from gemma_tpu.data.batches import Loader
from gemma_tpu.hardware import distributed
from gemma_tpu.run import metrics
from gemma_tpu.run.runs import RunFolder
from gemma_tpu.schema import Config
from gemma_tpu.step.step import Batch, Metrics
from gemma_tpu.training import faults, trackers
from gemma_tpu.training.faults import Notice
from gemma_tpu.training.meter import Compilations, Meter, Rates


class Logbook:
    """Journals, console, trackers and the clock of one run."""

    def __init__(self, config: Config, run: RunFolder, loader: Loader, start: int, rates: Rates):
        self._loader = loader
        self._pending: tuple[int, Metrics, int, float] | None = None
        self._watch = faults.Watch(config.faults, self._rows_of, start)
        self._compilations = Compilations()
        self._waited = 0.0
        self.recompiled = 0
        self._journals: dict[str, metrics.Journal] = {}
        self._trackers: list[trackers.Tracker] = []
        first = distributed.is_first()
        if first:
            self._journals = {"metrics": metrics.Journal(run.metrics, start)} | {
                path.stem: metrics.Journal(path, start) for path in (run.held_out, run.samples, run.warnings)
            }
            self._trackers = trackers.open_trackers(
                run.path, config.log.tensorboard, config.log.trackers, config.log.project, to_dict(config), start > 0,
            )  # fmt: skip
        last = self._journals["metrics"].last if first else None
        self._progress = metrics.Progress(loader.total_steps, start, config.log.every, config.log.progress and first)
        self.meter = Meter(rates, (last or {}).get("usd", 0.0), run.opened)

    @property
    def skipped(self) -> int:
        return self._watch.skipped

    def begin(self) -> None:
        """From here on nothing should compile any more, and the clock of the steps runs."""
        self._compilations.start()
        self.meter.restart()
        self._progress.restart()

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        begun = time.monotonic()
        batch = next(batches)
        self._waited = time.monotonic() - begun
        return batch

    def dispatched(self, number: int, found: Metrics, positions: int) -> None:
        """Step `number` is on its way, over so many token positions; the one before is read and written."""
        self.catch_up()
        self._pending = (number, found, positions, self._waited)

    def catch_up(self) -> None:
        if self._pending is None:
            return
        (number, found, positions, waited), self._pending = self._pending, None
        values = {name: value.item() for name, value in jax.device_get(found).items()}
        row = {"step": number, **values, **self.meter.measure(values["tokens"], positions, waited)}
        self._write("metrics", row)
        for tracker in self._trackers:
            tracker.scalars(number, trackers.scalars_of(row))
        self._progress.update(row)
        for notice in self._watch.see(row):
            self.warn(notice)
        self._explain_compilations(number)
        if self._watch.must_stop:
            raise self._watch.stop(number)

    def warn(self, notice: Notice) -> None:
        metrics.say(f"warning: {notice.text}")
        self._write("warnings", notice.row())

    def held_out(self, number: int, loss: float) -> None:
        perplexity = math.exp(min(loss, 700.0))
        metrics.say(f"held-out loss at step {number}: {loss:.4f}, perplexity {perplexity:,.2f}")
        self._write("held_out", {"step": number, "loss": loss, "perplexity": perplexity})
        for tracker in self._trackers:
            tracker.scalars(number, {"held_out/loss": loss, "held_out/perplexity": perplexity})

    def sample(self, number: int, prompt: str, text: str) -> None:
        asked, first = (" ".join(one.split()) for one in (prompt, text))
        metrics.say(f"sample at step {number} of '{_cut(asked, 60)}': {_cut(first, 160) or '(no text)'}")
        self._write("samples", {"step": number, "prompt": prompt, "text": text})
        for tracker in self._trackers:
            tracker.text(number, f"sample/{prompt[:60]}", text)

    def expected(self) -> None:
        """What has compiled since the last step was meant to: a held-out loss, a sample, a save."""
        self._compilations.take()

    def close(self) -> None:
        self._compilations.stop()
        self._progress.close()
        for journal in self._journals.values():
            journal.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, journal: str, row: Mapping[str, Any]) -> None:
        if journal in self._journals:
            self._journals[journal].write(row)

    def _explain_compilations(self, number: int) -> None:
        for name, seconds in self._compilations.take():
            self.recompiled += 1
            why = "a batch of another shape" if "train_step" in name else "something beside the step runs on the device"
            self.warn(Notice(
                number, "compiled", f"{name} was compiled at step {number} in {seconds:.1f} s, while the run went on: "
                f"{why}", {"program": name, "seconds": seconds},
            ))  # fmt: skip

    def _rows_of(self, number: int) -> list[str]:
        return [self._loader.prepared.where(row) for row in self._loader.rows_of(number - 1)]


def _cut(text: str, length: int) -> str:
    return text[:length] + "…" * (len(text) > length)
