"""The only training loop. It dispatches step N and then reads the metrics of step N - 1, so the device never waits.

One compile a run, said out loud: the step is compiled ahead of the first batch, and a batch of another shape is an
error, never a second compile.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from gemma_tpu import devices, metrics, program, step
from gemma_tpu import mesh as meshes
from gemma_tpu.checkpoint import Checkpoints, shapes_of
from gemma_tpu.config import to_dict
from gemma_tpu.data import Loader
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.metrics import say
from gemma_tpu.model import Decoder
from gemma_tpu.runs import RunFolder, write_text
from gemma_tpu.schema import Config


@dataclass
class Trainer:
    """Everything a run needs, on its mesh; `fit` runs it."""

    config: Config
    run: RunFolder
    mesh: Mesh
    model: Decoder
    shardings: dict[str, NamedSharding]
    loader: Loader
    held_out: Loader | None
    base: dict[str, str]  # folder and fingerprint of the base, for the checkpoint's record
    version: str
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.program = program.build(self.config, self.model, self.shardings, self.mesh, self.loader.total_steps)
        for note in [*self.program.notes, *self.loader.notes, *self.notes]:
            say(f"note: {note}")
        self.parts = self.program.parts
        self.state = self.program.first_state()

    # --- state ------------------------------------------------------------------------------------------------

    def resume(self, checkpoints: Checkpoints, batches: Any) -> int:
        """Go on from the latest checkpoint, if there is one; returns the step that it stands at."""
        latest = checkpoints.latest
        if latest is None:
            return 0
        record = checkpoints.record(latest)
        if record["base"]["fingerprint"] != self.base["fingerprint"]:
            raise UserError(
                f"{self.run.path} was trained on another base ({record['base']['folder']}) than "
                f"{self.base['folder']}; point model.path at that one, or give another run_dir"
            )
        saved = checkpoints.restore(latest, self.state["trained"], self.state["opt"])
        self.state |= {"trained": saved["trained"], "opt": saved["opt"]}
        self.state["step"] = self.program.at(latest)
        batches.set_state(record["data"])
        return latest

    def record(self, data_state: dict[str, Any]) -> dict[str, Any]:
        lora, method, rows = self.config.lora, self.config.train.method, self.loader.prepared
        return {
            "config": to_dict(self.config), "data": data_state, "base": self.base, "version": self.version,
            "method": method, "shapes": shapes_of(self.state["trained"]),
            "rows": {"read": rows.rows, "kept": len(rows), "dropped": dict(rows.dropped.counts)},
            "adapter": {"rank": lora.rank, "alpha": lora.alpha} if method == "lora" else None,
        }  # fmt: skip

    # --- running ----------------------------------------------------------------------------------------------

    def compile(self, batch: dict[str, np.ndarray]) -> Any:
        begun, cache = time.monotonic(), devices.CompileCache(self.config.train.compile_cache)
        compiled = self.program.compile(self.program.lower(self.state, self.program.place(batch)))
        shape = "x".join(map(str, batch["tokens"].shape))
        say(f"compiled the train step once, for batches of {shape}, in {time.monotonic() - begun:.1f} s "
            f"({cache.told('train_step')})")  # fmt: skip
        return compiled

    def fit(self) -> dict[str, Any]:
        """Train to the end (or to a signal), saving on the way; returns the summary, which the run folder keeps too."""
        if not self.run.config.exists():  # checkpoints without a config would not be known for a run
            self.run.write_config(self.config)
        checkpoints = Checkpoints(self.run.checkpoints, self.config.checkpoint.keep)
        batches = iter(self.loader)
        try:
            with jax.set_mesh(self.mesh):
                start = self.resume(checkpoints, batches)
                self.run.write_config(self.config)  # again, with what may change, now that the checkpoint agrees
                return self._fit(checkpoints, batches, start)
        except OSError as error:  # the journal, the picture or the summary
            raise checkpoints.failure(f"writing in {self.run.path}", error) from error
        finally:
            batches.close()
            checkpoints.close()

    def _fit(self, checkpoints: Checkpoints, batches: Any, start: int) -> dict[str, Any]:
        total, every = self.loader.total_steps, self.config.checkpoint.every
        if start:
            say(f"resumed at step {start} of {total} from {self.run.checkpoints / str(start)}")
        if start >= total:
            say(f"{self.run.path} is complete ({total} updates); to train on, give another run_dir")
            return json.loads(self.run.summary.read_text()) if self.run.summary.exists() else self._finish(start, {}, 0)
        held_out = {} if start else self._held_out(0)
        compiled = self.compile(self.loader[start])
        pace = _Pace(self, start)
        try:
            with _signals() as asked:
                for number in range(start + 1, total + 1):
                    batch = pace.wait_for(batches)
                    self.state, found = compiled(self.state, self.parts.frozen, self.program.place(batch))
                    pace.dispatched(number, found)
                    stop = bool(asked)  # looked at once: a signal after this line stops after the next step
                    if number % every == 0 or number == total or stop:
                        pace.catch_up()  # or a run killed after this save would come back without this step's row
                        checkpoints.save(number, self.state["trained"], self.state["opt"],
                                         self.record(batches.get_state()))  # fmt: skip
                    if stop:
                        break
            checkpoints.wait()
        finally:
            pace.close()
        if stop and number < total:
            raise RunError(
                f"stopped by {asked[0]} after step {number} of {total}; saved in {self.run.checkpoints / str(number)}. "
                "Run the same command again to go on from there"
            )
        return self._finish(total, held_out, pace.seconds, pace.waited)

    def _finish(self, total: int, held_out: dict[int, float], seconds: float, waited: float = 0.0) -> dict[str, Any]:
        held_out = held_out | self._held_out(total)
        rows = metrics.read(self.run.metrics)
        metrics.draw_loss(rows, self.run.picture, f"{self.run.path.name}: loss", held_out)
        summary = {
            "steps": total,
            "device_kind": jax.devices()[0].device_kind,
            "devices": self.mesh.size,
            "loss": rows[-1]["loss"] if rows else None,
            "held_out_loss": {str(at): loss for at, loss in held_out.items()},
            "tokens": sum(row["tokens"] for row in rows),
            "target_tokens": sum(row["target_tokens"] for row in rows),
            "seconds": round(seconds, 2),
            "data_wait_share": round(waited / seconds, 4) if seconds else 0.0,
            "padding_share": round(self.loader.padding_share, 4),
            "trainable_params": sum(int(np.prod(x.shape)) for x in self.state["trained"].values()),
        }
        write_text(self.run.summary, json.dumps(summary, indent=1) + "\n")
        return summary

    def _held_out(self, at: int) -> dict[int, float]:
        if self.held_out is None:
            return {}
        loss = held_out_loss(self.parts, self.state["trained"], self.held_out, self.mesh)
        say(f"held-out loss at step {at}: {loss:.4f}")
        return {at: loss}


class _Pace:
    """Reads the metrics one step behind, and keeps the journal, the bar and the clock."""

    def __init__(self, trainer: Trainer, start: int):
        log = trainer.config.log
        self._journal = metrics.Journal(trainer.run.metrics, start)
        self._progress = metrics.Progress(trainer.loader.total_steps, start, log.every, log.progress)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._begun = self._last = time.monotonic()
        self.waited = 0.0

    @property
    def seconds(self) -> float:
        return self._last - self._begun

    def wait_for(self, batches: Iterator) -> dict[str, np.ndarray]:
        begun = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - begun
        return batch

    def dispatched(self, number: int, found: dict[str, jax.Array]) -> None:
        self.catch_up()
        self._pending = (number, found)

    def catch_up(self) -> None:
        if self._pending is None:
            return
        (number, found), self._pending = self._pending, None
        values = {name: value.item() for name, value in jax.device_get(found).items()}
        now = time.monotonic()
        row = {"step": number, **values, "tokens_per_s": round(values["tokens"] / (now - self._last), 1)}
        self._last = now
        self._journal.write(row)
        self._progress.update(row)

    def close(self) -> None:
        self._journal.close()
        self._progress.close()


def held_out_loss(parts: step.Parts, trained: step.Trained, loader: Loader, mesh: Mesh) -> float:
    """Mean loss over every target token of a loader's first epoch."""
    run = jax.jit(step.make_eval_step(parts))
    sharding = NamedSharding(mesh, meshes.spec_for((None, "batch", None), mesh))
    loss = weight = 0.0
    with jax.set_mesh(mesh):
        for number in range(loader.steps_per_epoch):
            found = run(trained, parts.frozen, jax.device_put(loader[number], sharding))
            loss, weight = loss + float(found[0]), weight + float(found[1])
    return loss / weight


@contextmanager
def _signals() -> Iterator[list[str]]:
    """SIGINT and SIGTERM are noted, and the loop stops after the step in flight; a second SIGINT ends at once."""
    asked: list[str] = []

    def note(number: int, _frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def count(parameters: nnx.State) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
