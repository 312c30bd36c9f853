"""What a compiled step holds in HBM on each device, from the compiler's buffer assignment.

Held at once are the arguments, the outputs that reuse no argument, and the arena of temporaries, which the compiler
packed itself. Its own memory-usage report also adds buffers of offloaded computations, which are views of these.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_tpu.compiled.hlo import HOST, Module
from gemma_tpu.errors import RunError

ASSIGNMENT = "*after_optimizations-buffer-assignment.txt"
# libtpu 0.0.51 says the page, 0.0.42 does not.
_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(?:, color (\d+))?(?:, page \d+)?,? ?(.*)")
_VALUE = re.compile(r" value: <\d+ (\S+?)(?:\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")


@dataclass(frozen=True)
class Buffer:
    name: str
    kind: str  # argument, output, temporary
    bytes: int


@dataclass(frozen=True)
class Memory:
    arguments: int
    outputs: int  # those that reuse no argument
    temporaries: int
    host: int  # in the host's memory: what is offloaded
    largest: list[Buffer]  # temporaries: the largest of those that share a place in the arena

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries


def memory(folder: Path, module: Module | None = None, count: int = 40) -> Memory:
    """Peak bytes of one device. With the module, buffers are named by the operation that writes them."""
    found = list(folder.glob(ASSIGNMENT))
    if not found:
        raise FileNotFoundError(f"{folder}: no {ASSIGNMENT} in it; compile with xla_dump_to and xla_dump_hlo_as_text")
    names = _names(module) if module else {}
    sums = {"argument": 0, "output": 0, "temporary": 0, "host": 0}
    buffers: list[Buffer] = []
    for size, color, told, values in _allocations(max(found, key=lambda path: path.stat().st_size)):
        kind = _kind(told)
        if kind is None or color not in (0, HOST):
            continue
        sums["host" if color == HOST else kind] += size
        if color == 0:
            chosen = _tenants(values) if kind == "temporary" else values[:1]
            buffers += [
                Buffer(f"{names.get(name, name)} {shape.split('{')[0]}", kind, held) for name, held, _, shape in chosen
            ]
    if not sums["argument"]:
        raise RunError(f"{folder}: the buffer assignment has no allocation of an argument: this version of libtpu "
                       "writes it otherwise; plan with --fast, or install the libtpu that this JAX names")  # fmt: skip
    buffers.sort(key=lambda one: -one.bytes)
    return Memory(sums["argument"], sums["output"], sums["temporary"], sums["host"], buffers[:count])


Value = tuple[str, int, int, str]  # instruction, bytes, offset, shape


def _allocations(path: Path) -> Iterator[tuple[int, int, str, list[Value]]]:
    held: tuple[int, int, str, list[Value]] | None = None
    with path.open() as lines:
        for line in lines:
            if line.startswith("allocation"):
                if held:
                    yield held
                found = _ALLOCATION.match(line)
                held = (int(found[1]), int(found[2] or 0), found[3], []) if found else None
            elif held and (found := _VALUE.match(line)):
                held[3].append((found[1], int(found[2]), int(found[3]), found[4]))
            elif not line.startswith(" "):
                if held:
                    yield held
                held = None
    if held:
        yield held


def _kind(told: str) -> str | None:
    if "thread-local" in told:
        return None
    if told.startswith("parameter") or ", parameter " in told:
        return "argument"
    return "output" if "output" in told or "maybe-live-out" in told else "temporary"


def _tenants(values: list[Value]) -> list[Value]:
    """The largest values that do not overlap in the arena: one for each place."""
    taken: list[tuple[int, int]] = []
    chosen: list[Value] = []
    for one in sorted(values, key=lambda value: -value[1]):
        start, end = one[2], one[2] + one[1]
        if one[1] and len(chosen) < 200 and all(end <= low or start >= high for low, high in taken):
            taken.append((start, end))
            chosen.append(one)
    return chosen


def _names(module: Module) -> dict[str, str]:
    """Instruction -> the path of an argument, or the operation that writes it and its line."""
    names = {}
    for owner in module.computations.values():
        for each in owner.instructions:
            if path := each.op_name.split("/"):
                source = module.source(each)
                names[each.name] = ("/".join(path[-2:]) or each.name) + (f" ({source})" if source else "")
    return names
