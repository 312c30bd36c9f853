"""A profiler trace of some steps of a run."""

from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import jax
from packaging.requirements import Requirement

from gemma_tpu.errors import UserError
from gemma_tpu.run.metrics import say
from gemma_tpu.run.runs import RunFolder
from gemma_tpu.schema import Config


class Profile:
    """A profiler trace of a window of steps, for TensorBoard's profile plugin or Perfetto."""

    def __init__(self, config: Config, run: RunFolder, start: int, total: int):
        first = config.profile.start
        self._first = None if first is None or not start < first <= total else first
        if first is not None and self._first is None:
            why = f"this run ends at update {total}" if first > total else f"this run goes on after update {start}"
            say(f"note: no profile: profile.start is {first}, and {why}")
        if self._first is not None:
            _refuse_another_libtpu()
        self._last = self._seen = None if self._first is None else self._first + config.profile.steps - 1
        self._folder, self._running = run.path / "profile", False

    def before(self, number: int) -> None:
        if number == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, number: int, found: Any) -> None:
        if self._running:
            self._seen = number
        if number == self._last:
            jax.block_until_ready(found)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            say(f"profile of steps {self._first} to {self._seen}: {self._folder}")


def _refuse_another_libtpu() -> None:
    """Where libtpu is not of the version that JAX wants, a trace that begins ends the process, on a CPU too."""
    if jax.config.values["jax_platforms"] == "cpu":  # then it is not loaded
        return
    try:
        here = version("libtpu")
    except PackageNotFoundError:
        return
    wanted = [one for one in map(Requirement, requires("jax") or ()) if one.name == "libtpu"]
    if wanted and here not in wanted[0].specifier:
        raise UserError(f"profile.start: the profiler of libtpu {here} ends the process under JAX {version('jax')}, "
                        f"which wants libtpu{wanted[0].specifier}: install that one, remove profile.start, or on a CPU "
                        "set mesh.cpu_devices=1")  # fmt: skip
