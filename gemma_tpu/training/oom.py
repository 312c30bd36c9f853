"""Out of memory, said as the planner's advice: what to set so that the same updates fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from jax.sharding import Mesh

from gemma_tpu.errors import RunError
from gemma_tpu.estimate import advice
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import chips, torus
from gemma_tpu.schema import Config
from gemma_tpu.step.job import Job
from gemma_tpu.training import faults


@contextmanager
def explained(config: Config, arch: Architecture, mesh: Mesh) -> Iterator[None]:
    """What the compiler or the devices say of memory becomes one message with what would fit."""
    try:
        yield
    except (RunError, KeyboardInterrupt):
        raise
    except Exception as error:
        if not faults.is_memory(error):
            raise
        first = str(error).strip().splitlines()[0][:300]
        place = chips.of_devices(mesh.devices.flat[0].device_kind, mesh.size, torus.slices(mesh.devices.flat))
        told = "\n  ".join(changes(config, arch, dict(mesh.shape), place))
        raise RunError(f"out of memory: {first}\nwhat would fit, the cheapest first:\n  {told}") from error


def changes(config: Config, arch: Architecture, mesh: dict[str, int], place: chips.Slice | None) -> list[str]:
    """One line a change, as it is written on the command line."""
    if place is None:
        return _usual(config)
    remat = config.train.remat if config.train.remat != "auto" else "full"
    now = Job.of(config, mesh, remat)
    found = []
    for one in islice(advice.fixes(arch, now, place), 4):
        words = " ".join(one.overrides(config, now))
        where = "" if one.place.name == place.name else f" on {one.place.name}"
        if words or where:
            peak = f"predicted peak {one.memory.total:.1f} of {one.memory.limit:.2f} GiB"
            found.append(f"{words or 'the same config'}{where}   ({peak})")
    return found or _usual(config)


def _usual(config: Config) -> list[str]:
    """Where the memory of the devices is not known: what always lowers the peak."""
    train, lines = config.train, []
    if train.remat != "full":
        lines.append("train.remat=full")
    if train.accumulation < train.batch_size:
        more = next(n for n in range(train.accumulation + 1, train.batch_size + 1) if train.batch_size % n == 0)
        lines.append(f"train.accumulation={more}")
    lines.append(f"data.max_seq_len={max(2, config.data.max_seq_len // 2)}")
    return [*lines, "a larger slice (gemma-tpu plan CONFIG)"]
