"""What a run does with its time, memory and money, step by step: the measured half of metrics.jsonl."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gemma_tpu.estimate import roofline
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import chips
from gemma_tpu.schema import Config
from gemma_tpu.step.job import Job, Policy

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """What these devices could do and cost; None where it is not known (a CPU)."""

    flops_per_token: float | None = None
    peak_flops: float | None = None  # of all devices
    usd_per_hour: float | None = None


class Meter:
    """The clock of a run. What is asked of it for a step covers the time since the step before."""

    def __init__(self, rates: Rates, spent: float = 0.0, paid_since: float | None = None):
        self._rates, self._spent = rates, spent  # dollars of the run before it was continued
        self._begun = self._last = time.monotonic()
        self._paid_since = self._begun if paid_since is None else paid_since  # loading and compiling cost as well
        self._devices = [device for device in jax.local_devices() if device.memory_stats()]
        self._elsewhere = 0.0  # seconds since the last step that belong to no step: a held-out loss, a sample
        self.waited = self.stepping = 0.0

    @property
    def seconds(self) -> float:
        return self._last - self._begun

    def restart(self) -> None:
        """The first step begins now: what came before (the first held-out loss, compiling) is not its time."""
        self._begun = self._last = time.monotonic()
        self._elsewhere = 0.0

    def pause(self, seconds: float) -> None:
        """Time that is not the next step's."""
        self._elsewhere += seconds

    def measure(self, tokens: int, positions: int, waited: float) -> dict[str, Any]:
        """Of the step that has just ended: `tokens` that are no padding, of `positions`."""
        now = time.monotonic()
        seconds, self._last, self._elsewhere = max(now - self._last - self._elsewhere, 1e-9), now, 0.0
        self.waited += waited
        self.stepping += seconds
        rates, found = self._rates, {"tokens_per_s": round(tokens / seconds, 1), "step_s": round(seconds, 5)}
        found |= {"padding": round(1 - tokens / positions, 4), "data_wait": round(min(1.0, waited / seconds), 4)}
        if rates.flops_per_token and rates.peak_flops:
            found["mfu"] = round(tokens * rates.flops_per_token / seconds / rates.peak_flops, 4)
        if self._devices:
            most = max(device.memory_stats()["peak_bytes_in_use"] for device in self._devices)
            found["memory_gib"] = round(most / GIB, 3)
        found["host_gib"] = round(resident_bytes() / GIB, 4)
        if rates.usd_per_hour:
            found["usd"] = round(self._spent + (now - self._paid_since) / 3600 * rates.usd_per_hour, 4)
        return found


def resident_bytes() -> int:
    """Memory that this process holds on the host now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Compilations:
    """Counts what the compiler is asked for while a run goes on, by name: a step that compiles again is a fault."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.found: list[tuple[str, float]] = []
        self._listening = False
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **more: str | int) -> None:
        if self._listening and event == self.EVENT:
            self.found.append((str(more.get("fun_name", "a program")), duration_secs))

    def start(self) -> None:
        self._listening, self.found = True, []

    def stop(self) -> None:
        self._listening = False
        jax.monitoring.unregister_event_duration_listener(self._note)

    def take(self) -> list[tuple[str, float]]:
        taken, self.found = self.found, []
        return taken


def rates_of(config: Config, arch: Architecture, mesh: Mapping[str, int], device_kind: str, remat: Policy) -> Rates:
    """From the planner's arithmetic and the table of chips; the config's price wins over the list's."""
    size = math.prod(mesh.values())
    place = chips.of_devices(device_kind, size)
    usd = config.log.usd_per_hour or (place.usd if place else None)
    if place is None:
        return Rates(usd_per_hour=usd)
    flops = roofline.work(arch, Job.of(config, mesh, remat)).useful
    return Rates(flops, place.chip.device_bf16_tflops * 1e12 * size, usd)
