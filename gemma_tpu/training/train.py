"""The only training loop. It dispatches step N and then reads the metrics of step N - 1, so the device never waits.

One compile for each length of batch (most runs have one), said out loud: all are compiled ahead of the first batch,
and a batch of another shape is an error, never one more compile. A signal, a fault or a lost host ends the run with
its last state saved or named.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from gemma_tpu.adapter import lora
from gemma_tpu.config import to_dict
from gemma_tpu.data.batches import Batch, BatchIterator, Loader
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.hardware import devices, distributed, torus
from gemma_tpu.pages import report
from gemma_tpu.run import checkpoint, metrics
from gemma_tpu.run.checkpoint import Checkpoints, shapes_of
from gemma_tpu.run.metrics import say
from gemma_tpu.run.runs import RunFolder, read_summary, write_text
from gemma_tpu.schema import Config
from gemma_tpu.step import step
from gemma_tpu.training import faults, meter, oom, program
from gemma_tpu.training.logbook import Logbook
from gemma_tpu.training.previews import Previews
from gemma_tpu.training.tracing import Profile


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
        self.samples = Previews(self.config.eval, self.config.model.path, self.model.arch)
        self.notes = [*self.program.notes, *self.loader.notes, *self.notes, *filter(None, [self.samples.note])]
        for note in self.notes:
            say(f"note: {note}")
        self.parts = self.program.parts
        self.state = self.program.first_state()
        self.losses: dict[int, float] = {}  # held out, by step
        self._grade = jax.jit(step.make_eval_step(self.parts))

    # --- state ------------------------------------------------------------------------------------------------

    def open_checkpoints(self) -> Checkpoints:
        section = self.config.checkpoint
        folder = checkpoint.folder_of(self.run.path, section.folder)
        return Checkpoints(folder, section.keep, section.keep_best if self.held_out is not None else 0)

    def resume(self, checkpoints: Checkpoints, batches: BatchIterator) -> int:
        """Go on from the latest checkpoint that can be read, if there is one; returns the step that it stands at."""
        agreement = distributed.Agreement()
        unreadable: list[tuple[int, RunError]] = []
        for latest in reversed(checkpoints.steps):
            saved: dict[str, Any] | None = None
            failure: RunError | None = None
            try:
                saved = self._restore(checkpoints, latest)
            except RunError as error:
                failure = error
            unread = any(agreement.now([failure is not None]))  # what one host cannot read, none goes on from
            if unread or saved is None:
                elsewhere = RunError(f"{checkpoints.at(latest)}: another host cannot read it")
                unreadable.append((latest, failure or elsewhere))
                continue
            for step_number, why in unreadable:
                say(f"warning: {why}; it is skipped, and lies in {checkpoints.put_aside(step_number)} now")
            self.state |= {"trained": saved["trained"], "opt": saved["opt"], "step": self.program.at(latest)}
            self.losses = {int(at): loss for at, loss in saved["record"].get("held_out", {}).items()}
            batches.set_state(saved["record"]["data"])
            return latest
        if unreadable:
            raise RunError(
                "\n".join(str(why) for _, why in unreadable) + f"\nno checkpoint in {checkpoints.folder} can be "
                "read, so there is nothing to go on from; move them away to train from the start"
            )
        return 0

    def _restore(self, checkpoints: Checkpoints, latest: int) -> dict[str, Any]:
        record = checkpoints.record(latest)
        if record["base"]["fingerprint"] != self.base["fingerprint"]:
            raise UserError(
                f"{self.run.path} was trained on another base ({record['base']['folder']}) than "
                f"{self.base['folder']}; point model.path at that one, or give another run_dir"
            )
        return checkpoints.restore(latest, self.state["trained"], self.state["opt"])

    def record(self, data_state: dict[str, Any]) -> dict[str, Any]:
        method, rows = self.config.train.method, self.loader.prepared
        return {
            "config": to_dict(self.config), "data": data_state, "base": self.base, "version": self.version,
            "method": method, "shapes": shapes_of(self.state["trained"]),
            "rows": {"read": rows.rows, "kept": len(rows), "dropped": dict(rows.dropped.counts)},
            "adapter": lora.record(self.model, self.config.lora) if method == "lora" else None,
            "held_out": {str(at): loss for at, loss in self.losses.items()},
            "mesh": {axis: int(size) for axis, size in self.mesh.shape.items()}, "hosts": distributed.count(),
        }  # fmt: skip

    # --- running ----------------------------------------------------------------------------------------------

    def compile(self, batch: Batch) -> step.Step:
        begun, cache = time.monotonic(), devices.CompileCache(self.config.train.compile_cache)
        with oom.explained(self.config, self.model.arch, self.mesh):
            compiled = self.program.compile(self.program.lower(self.state, self.program.place(batch)))
        shape = "x".join(map(str, batch["tokens"].shape))
        say(f"compiled the train step once, for batches of {shape}, in {time.monotonic() - begun:.1f} s "
            f"({cache.told('train_step')})")  # fmt: skip
        return compiled

    def compile_all(self, start: int) -> step.Step:
        """The step for every length of batch that the rest of the run has: one program that takes any of them."""
        first = self.loader.first_steps(start).items()
        programs = {width: self.compile(self.loader[number]) for width, number in first}

        def run(state: step.State, frozen: step.Frozen, batch: step.Batch) -> tuple[step.State, step.Metrics]:
            width = batch["tokens"].shape[-1]
            if width not in programs:
                raise TypeError(f"a batch of length {width}: the step is compiled for {', '.join(map(str, programs))}")
            return programs[width](state, frozen, batch)

        return run

    def fit(self) -> dict[str, Any]:
        """Train to the end (or to a signal), saving on the way; returns the summary, which the run folder keeps too."""
        distributed.barrier("the run folder was looked at")  # by every host, before the first one writes in it
        if distributed.is_first() and not self.run.config.exists():
            self.run.write_config(self.config)  # checkpoints without a config would not be known for a run
        checkpoints = self.open_checkpoints()
        batches = self.loader.iterate(self.program.place)  # on the devices ahead of their step
        try:
            with jax.set_mesh(self.mesh):
                start = self.resume(checkpoints, batches)
                if distributed.is_first():
                    self.run.write_config(self.config)  # again, with what may change, now that the checkpoint agrees
                if self._is_complete(start):
                    return self._complete(start)
                if start:
                    say(f"resumed at step {start} of {self.loader.total_steps} from {checkpoints.at(start)}")
                seconds = checkpoints.probe(self.state["trained"], self.state["opt"], self.record({}))
                say(f"a checkpoint can be saved in {checkpoints.folder} ({seconds:.1f} s)")
                return _Loop(self, checkpoints, batches, start).run()
        except OSError as error:  # the journal, the picture or the summary
            raise checkpoints.failure(f"writing in {self.run.path}", error) from error
        finally:
            batches.close()
            checkpoints.close()

    def _is_complete(self, start: int) -> bool:
        return start >= self.loader.total_steps or self.stalled

    def _complete(self, start: int) -> dict[str, Any]:
        early = "" if start >= self.loader.total_steps else f", stopped early of {self.loader.total_steps}"
        say(f"{self.run.path} is complete ({start} updates{early}); to train on, give another run_dir")
        return read_summary(self.run) or self.finish(start, {})

    # --- what is measured now and then ------------------------------------------------------------------------

    @property
    def stalled(self) -> bool:
        """Has the held-out loss had its chances?"""
        patience = self.config.eval.patience
        if patience is None or not self.losses:
            return False
        best = min(self.losses, key=self.losses.__getitem__)
        return sum(at > best for at in self.losses) >= patience

    def measure(self, at: int) -> float | None:
        """The held-out loss, once for each step."""
        if self.held_out is not None and at not in self.losses:
            self.losses[at] = held_out_loss(self.parts, self.state["trained"], self.held_out, self.mesh, self._grade)
        return self.losses.get(at)

    def finish(self, total: int, figures: dict[str, Any]) -> dict[str, Any]:
        """The summary, the picture and the report of a run that has ended."""
        self.measure(total)
        if not distributed.is_first():
            return {"steps": total}
        rows = metrics.read(self.run.metrics, metrics.STEPS)
        best = min(self.losses, key=self.losses.__getitem__) if self.losses else None
        summary = {
            "steps": total,
            "device_kind": jax.devices()[0].device_kind,
            "devices": self.mesh.size,
            "slices": torus.slices(self.mesh.devices.flat),
            "mesh": {axis: int(size) for axis, size in self.mesh.shape.items()},
            "hosts": distributed.count(),
            "loss": rows[-1]["loss"] if rows else None,
            "held_out_loss": {str(at): loss for at, loss in sorted(self.losses.items())},
            "best_step": best,
            "tokens": sum(row["tokens"] for row in rows),
            "target_tokens": sum(row["target_tokens"] for row in rows),
            "rows": self.record({})["rows"],
            "lengths": self.loader.widths.tolist(),
            "padding_share": round(self.loader.padding_share, 4),
            "trainable_params": sum(int(np.prod(x.shape)) for x in self.state["trained"].values()),
            "usd": rows[-1].get("usd") if rows else None,
            "notes": self.notes,
            "plan": self.loader.plan,
            "version": self.version,
            **figures,
        }
        write_text(self.run.summary, json.dumps(summary, indent=1) + "\n")
        metrics.draw_loss(rows, self.run.picture, f"{self.run.path.name}: loss", self.losses)
        report.write(self.run)
        if "data_wait_share" in figures:
            say(f"the steps waited for data {figures['data_wait_share']:.2%} of their time")
        return summary


class _Loop:
    """One call of `fit`: the steps, and between them what is due."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, batches: BatchIterator, start: int):
        self._trainer, self._checkpoints, self._batches, self._start = trainer, checkpoints, batches, start
        self._config, self._total = trainer.config, trainer.loader.total_steps
        config, arch = trainer.config, trainer.model.arch
        remat = program.remat_of(config, trainer.model, trainer.mesh)[0]
        rates = meter.rates_of(config, arch, dict(trainer.mesh.shape), jax.devices()[0].device_kind, remat)
        self._log = Logbook(config, trainer.run, trainer.loader, start, rates)
        self._profile = Profile(config, trainer.run, start, self._total)
        self._agreement = distributed.Agreement()
        self._agreement.now([0, 0])  # compiled here, not between two steps
        self._saved_at, self._saving = time.monotonic(), 0.0

    def run(self) -> dict[str, Any]:
        trainer, total = self._trainer, self._total
        try:
            if not self._start:
                self._look(0)
            compiled = trainer.compile_all(self._start)
            with _signals() as asked:
                try:
                    number, stop = self._steps(compiled, asked)
                except faults.Diverged as error:
                    self._checkpoints.wait()
                    raise self._checkpoints.diagnosis(error) from error
            self._save_last(number)
        finally:
            self._profile.close()
            self._log.close()
        if stop and number < total:
            where = self._checkpoints.at(number)
            raise RunError(f"stopped by {signal.Signals(stop).name} after step {number} of {total}; saved in {where}. "
                           "Run the same command again to go on from there")  # fmt: skip
        return trainer.finish(number, self._figures())

    def _steps(self, compiled: step.Step, asked: list[signal.Signals]) -> tuple[int, int]:
        """To the last step, or to where it is to stop: (that step, the signal that asked for it or 0)."""
        trainer, log, stop = self._trainer, self._log, 0
        self._saved_at = time.monotonic()
        log.begin()
        for number in range(self._start + 1, self._total + 1):
            batch = log.wait_for(self._batches)
            self._profile.before(number)
            with oom.explained(self._config, trainer.model.arch, trainer.mesh):
                trainer.state, found = compiled(trainer.state, trainer.parts.frozen, batch)
                log.dispatched(number, found, batch["tokens"].size)
            self._profile.after(number, found)
            # A signal after this line stops after the next step.
            stop, by_time = self._agreement.step([asked[0] if asked else 0, self._is_old()])
            every = self._config.eval.every
            if every and number % every == 0 and number < self._total and not stop:
                self._look(number)
            better = number in trainer.losses and min(trainer.losses.values()) == trainer.losses[number]
            if number % self._config.checkpoint.every == 0 or by_time or stop or number == self._total or (
                better and self._config.checkpoint.keep_best
            ) or trainer.stalled:  # fmt: skip
                self._save(number)
            elif (failure := self._checkpoints.poll()) is not None:
                self._save_again(number, failure)
            if stop or trainer.stalled:
                break
        log.catch_up()
        if trainer.stalled:
            best = min(trainer.losses, key=trainer.losses.__getitem__)
            say(f"stopped early at step {number}: no held-out loss was better than that of step {best} for "
                f"{self._config.eval.patience} measurements (eval.patience)")  # fmt: skip
        return number, stop

    def _look(self, number: int) -> None:
        """The held-out loss and the samples, of the state as it is."""
        trainer, log = self._trainer, self._log
        log.catch_up()
        begun = time.monotonic()
        loss = trainer.measure(number)
        if loss is not None:
            log.held_out(number, loss)
        for prompt, text in trainer.samples.make(trainer.parts, trainer.state["trained"]):
            log.sample(number, prompt, text)
        log.expected()
        log.meter.pause(time.monotonic() - begun)

    def _is_old(self) -> bool:
        seconds = self._config.checkpoint.seconds
        return seconds is not None and distributed.is_first() and time.monotonic() - self._saved_at >= seconds

    def _save(self, number: int) -> None:
        self._log.catch_up()  # or a run killed after this save would come back without this step's row
        if number == self._total:
            self._look(number)  # so that the last checkpoint knows its held-out loss, and can be the best
        begun = self._saved_at = time.monotonic()  # the devices have nothing to do from here to the next step
        try:
            self._checkpoints.save(number, *self._state(number))
        except RunError as failure:
            self._save_again(number, failure)
        self._log.expected()
        self._saving += time.monotonic() - begun

    def _save_again(self, number: int, failure: RunError) -> None:
        """A save has failed, this one or the one before: the state as it is now is saved, or the run ends."""
        self._log.catch_up()
        self._log.warn(faults.Notice(number, "save", str(failure).splitlines()[0], {}))
        self._checkpoints.save_now(number, *self._state(number))

    def _save_last(self, number: int) -> None:
        begun = time.monotonic()
        try:
            self._checkpoints.wait()
        except RunError as failure:
            self._save_again(number, failure)
        self._saving += time.monotonic() - begun

    def _state(self, number: int) -> tuple[Any, ...]:
        trainer = self._trainer
        record = trainer.record(self._batches.get_state())
        return trainer.state["trained"], trainer.state["opt"], record, trainer.losses.get(number)

    def _figures(self) -> dict[str, Any]:
        clock = self._log.meter
        seconds = clock.seconds
        return {
            "seconds": round(seconds, 2),
            "data_wait_share": round(clock.waited / seconds, 4) if seconds else 0.0,
            "saving_share": round(self._saving / seconds, 4) if seconds else 0.0,
            "skipped": self._log.skipped,
            "recompiled": self._log.recompiled,
        }


def held_out_loss(
    parts: step.Parts, trained: step.Trained, loader: Loader, mesh: Mesh, grade: step.Grade | None = None
) -> float:
    """Mean loss over every target token of a loader's first epoch; `grade`: the eval step, jitted before."""
    run = grade or jax.jit(step.make_eval_step(parts))
    sharding = NamedSharding(mesh, meshes.spec_for((None, "batch", None), mesh))
    loss = weight = 0.0
    with jax.set_mesh(mesh):
        for number in range(loader.steps_per_epoch):
            batch = {name: distributed.place(leaf, sharding) for name, leaf in loader[number].items()}
            found = run(trained, parts.frozen, batch)
            loss, weight = loss + float(found[0]), weight + float(found[1])
    return loss / weight


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """SIGINT and SIGTERM are noted, and the loop stops after the step in flight; a second SIGINT ends at once."""
    asked: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def count(parameters: nnx.State[Any, Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
