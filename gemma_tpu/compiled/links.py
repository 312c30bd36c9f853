"""How long a collective takes on the links of a slice, or through the switch between GPUs.

A slice is a grid of chips; each neighbour is one link, used in both directions at once, and an axis of the grid
closes to a ring only where the hardware has the wrap-around link. The time of a collective is the busiest directed
link's bytes over its speed; two collectives at once queue on the links that they share and on no others.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from gemma_tpu.compiled.hlo import Instruction, Shape
from gemma_tpu.hardware.chips import Slice

Link = tuple[int, int]  # a directed link, from chip to chip; (chip, chip) is between the devices of one chip
Shares = dict[Link, float]  # what part of a device's bytes goes over each link
DIE_LINKS = 6  # the devices of one chip exchange at six times one link (tpu7x)
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [2,4]T(1,0): 0 to 7 as 2 x 4, read by columns
BOX_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-broadcast")


@dataclass(frozen=True)
class Transfer:
    """One collective: what a device gets from others, and where it goes."""

    kind: str
    bytes: float  # per device, over the links
    groups: tuple[tuple[int, ...], ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()


class Grid:
    """The chips of a slice and their links."""

    def __init__(self, place: Slice, wrap: Sequence[bool] | None = None, order: Sequence[int] | None = None):
        self.dims = tuple(int(part) for part in place.topology.split("x"))
        self.per_chip = place.chip.devices
        self.wrap = tuple(wrap) if wrap is not None else wraps(self.dims)
        self.order = tuple(order or range(place.devices))  # partition -> device id
        self.link_gbs = place.chip.link_gbs
        self.kept: frozenset[Link] | None = None
        self._loads: dict[Transfer, dict[Link, float]] = {}

    @property
    def told(self) -> str:
        wraps = ", ".join("ring" if wrap else "open" for wrap in self.wrap[: len(self.dims)])
        return f"chips as {'x'.join(map(str, self.dims))}, axes {wraps}"

    def keep_distinct(self, transfers: Collection[Transfer]) -> None:
        """Of links that carry the same in each of these collectives, look at one: exact, and fast on large slices."""
        self.kept, self._loads = None, {}
        every = [self.loads(one) for one in dict.fromkeys(transfers)]
        distinct = {tuple(loads.get(link, 0.0) for loads in every): link for loads in every for link in loads}
        self.kept, self._loads = frozenset(distinct.values()), {}

    def chip(self, partition: int) -> int:
        return self.order[partition] // self.per_chip

    def _coordinates(self, chip: int) -> tuple[int, ...]:
        found = []
        for size in self.dims:  # the first axis is the fastest
            found.append(chip % size)
            chip //= size
        return tuple(found)

    def _chip_at(self, coordinates: Sequence[int]) -> int:
        chip = 0
        for size, at in zip(reversed(self.dims), reversed(coordinates), strict=True):
            chip = chip * size + at
        return chip

    @cached_property
    def neighbours(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for chip in range(math.prod(self.dims)):
            here = self._coordinates(chip)
            found[chip] = set()
            for axis, size in enumerate(self.dims):
                for step in (-1, 1):
                    at = here[axis] + step
                    if 0 <= at < size or self.wrap[axis] and size > 2:
                        found[chip].add(self._chip_at([*here[:axis], at % size, *here[axis + 1 :]]))
        return found

    def route(self, start: int, end: int) -> list[Link]:
        """One axis after the other, the shorter way around."""
        path, here, goal = [], list(self._coordinates(start)), self._coordinates(end)
        for axis, size in enumerate(self.dims):
            while here[axis] != goal[axis]:
                ahead = (goal[axis] - here[axis]) % size
                forward = ahead <= size - ahead if self.wrap[axis] else goal[axis] > here[axis]
                before = self._chip_at(here)
                here[axis] = (here[axis] + (1 if forward else -1)) % size
                path.append((before, self._chip_at(here)))
        return path

    def loads(self, transfer: Transfer) -> dict[Link, float]:
        """Seconds of every directed link that a collective uses."""
        if transfer not in self._loads:
            self._loads[transfer] = self._all_loads(transfer)
        return self._loads[transfer]

    def _all_loads(self, transfer: Transfer) -> dict[Link, float]:
        share: Shares = defaultdict(float)
        for group in transfer.groups:
            if len(group) > 1:
                for link, part in self._group(transfer.kind, group).items():
                    share[link] += part
        for link, part in self._permutation(transfer.pairs).items():
            share[link] += part
        speed = self.link_gbs * 1e9
        return {
            link: part * transfer.bytes / (speed * (DIE_LINKS if link[0] == link[1] else 1))
            for link, part in share.items()
            if self.kept is None or link in self.kept
        }

    def _group(self, kind: str, group: tuple[int, ...]) -> Shares:
        """What part of a device's bytes goes over each link, for one replica group."""
        chips = sorted({self.chip(device) for device in group})
        if len(chips) == 1:
            return {(chips[0], chips[0]): 1.0}
        if kind in BOX_KINDS:
            inside = {chip: self.neighbours[chip] & set(chips) for chip in chips}
            degree = min(len(near) for near in inside.values())
            if degree and _connected(inside):
                return {(chip, near): 1 / degree for chip in chips for near in inside[chip]}
            return self._ring(chips)
        each = 1 / (len(group) - 1)  # of what one device sends to the others together
        share: Shares = defaultdict(float)
        for start, end in itertools.permutations(group, 2):
            for link in self.route(self.chip(start), self.chip(end)):
                share[link] += each
        return share

    def _ring(self, chips: list[int]) -> Shares:
        """Chips that are no neighbours: a ring in both directions, each hop over the chips between."""
        share: Shares = defaultdict(float)
        for start, end in zip(chips, [*chips[1:], chips[0]], strict=True):
            for link in (*self.route(start, end), *self.route(end, start)):
                share[link] += 0.5
        return share

    def _permutation(self, pairs: tuple[tuple[int, int], ...]) -> Shares:
        share: Shares = defaultdict(float)
        for start, end in pairs:
            here, there = self.chip(start), self.chip(end)
            if here == there and start != end:
                share[(here, here)] += 1.0
            for link in self.route(here, there):
                share[link] += 1.0
        return share


class Switch:
    """The GPUs of one machine: each has a way of its own to all others, and collectives at once share it."""

    def __init__(self, place: Slice):
        self.bandwidth = place.chip.links * place.chip.link_gbs * 1e9  # of one GPU, one direction

    @property
    def told(self) -> str:
        return f"a switch, {self.bandwidth / 1e9:g} GB/s a GPU in each direction"

    def keep_distinct(self, transfers: Collection[Transfer]) -> None:
        """There is one way to look at."""

    def loads(self, transfer: Transfer) -> dict[Link, float]:
        alone = all(len(group) < 2 for group in transfer.groups) and all(start == end for start, end in transfer.pairs)
        return {} if alone else {(0, 0): transfer.bytes / self.bandwidth}


def wraps(dims: tuple[int, ...]) -> tuple[bool, ...]:
    """Which axes close to a ring: 16 chips on a two-dimensional slice; multiples of 4 throughout on a 3D one."""
    if len(dims) == 3:
        return (all(size % 4 == 0 for size in dims),) * 3
    return tuple(size == 16 for size in dims)


def _connected(near: dict[int, set[int]]) -> bool:
    seen, queue = set(), [next(iter(near))]
    while queue:
        here = queue.pop()
        if here not in seen:
            seen.add(here)
            queue.extend(near[here])
    return len(seen) == len(near)


def transfer(kind: str, instruction: Instruction, operands: Sequence[Shape], partitions: int) -> Transfer | None:
    """A collective's bytes over the links per device; None where its groups cannot be read."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
        found = tuple((int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])) if pairs else ()
        return Transfer(kind, _logical(operands), pairs=found) if pairs else None
    groups = replica_groups(instruction.attributes, partitions)
    if groups is None:
        return None
    size = max(map(len, groups))
    part = (size - 1) / size
    whole = _logical(operands)
    count = {
        "all-gather": whole * (size - 1),
        "reduce-scatter": whole * part,
        "all-reduce": 2 * whole * part,
        "collective-broadcast": whole,
    }.get(kind, whole * part)
    return Transfer(kind, count, groups=groups)


def _logical(shapes: Sequence[Shape]) -> float:
    """Bytes without the padding of tiles; a collective sends them compact."""
    return sum(shape.elements * shape.bits / 8 for shape in shapes)


def replica_groups(attributes: str, partitions: int) -> tuple[tuple[int, ...], ...] | None:
    """The groups in any of the three ways in which XLA writes them; no groups is everybody."""
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        found = tuple(tuple(map(int, each.split(","))) for each in re.findall(r"\{([\d,]+)\}", listed[1]))
        return found or (tuple(range(partitions)),)
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes)
    if iota:
        return _grouped(_iota(iota[3], iota[4]), int(iota[2]))
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? ?\{{([^}}]*)\}}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        dims, chosen = _mesh_dims(sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[4]))
        flat = _transposed(dims, [at for at in range(len(dims)) if at not in chosen] + chosen)
        if mesh[2]:  # the mesh has its devices in another order than that of their numbers
            ids = _iota(mesh[2], mesh[3])
            flat = [ids[at] for at in flat]
        return _grouped(flat, math.prod(dims[at] for at in chosen))
    return None





def _iota(dims: str, order: str | None) -> list[int]:
    shape = list(map(int, dims.split(",")))
    return _transposed(shape, list(map(int, order.split(","))) if order else list(range(len(shape))))


def _grouped(flat: list[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(flat[at : at + size]) for at in range(0, len(flat), size))


def _mesh_dims(sizes: dict[str, int], asked: Sequence[tuple[str, str, str]]) -> tuple[list[int], list[int]]:
    """The axes of a mesh cut where a group takes a part of one, and which of these dims the group is over.

    'x':(m)k is the part of k behind the m that count slower: x is [m, k, the rest].
    """
    parts = [(name, int(before or 1), int(before or 1) * int(size or sizes[name])) for name, before, size in asked]
    spans: list[tuple[str, int, int]] = []
    for name, whole in sizes.items():
        cuts = sorted({1, whole, *(cut for axis, *ends in parts if axis == name for cut in ends)})
        spans += [(name, low, high) for low, high in itertools.pairwise(cuts)] or [(name, 1, 1)]
    dims = [high // low for _, low, high in spans]
    chosen = [at for axis, low, high in parts for at, (name, start, end) in enumerate(spans)
              if name == axis and low <= start and end <= high]  # fmt: skip
    return dims, chosen


def _transposed(dims: list[int], turned: list[int]) -> list[int]:
    """The numbers 0..n-1 laid out in `dims` and read with the axes in another order."""
    strides = [math.prod(dims[at + 1 :]) for at in range(len(dims))]
    places = itertools.product(*(range(dims[axis]) for axis in turned))
    return [sum(at * strides[axis] for at, axis in zip(place, turned, strict=True)) for place in places]
