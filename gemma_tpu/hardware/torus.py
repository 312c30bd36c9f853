"""Which chip stands where in the mesh, so that neighbours along a mesh axis are neighbours on the wires.

Collectives go round the devices of an axis as a ring. An order that jumps sends that traffic over links that other
chips use at the same time: on a 2x2 slice the plain order of the devices crosses the diagonal twice.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Place = tuple[int, ...]  # x, y, z of the chip, and the core on it
Key = Callable[[int], tuple[int, ...]]  # what to sort by, of the number of a device


def slices(devices: Iterable[Any]) -> int:
    """How many TPU slices these devices are of."""
    return len({_slice(device) for device in devices})


def _slice(device: Any) -> int:
    # A TPU slice alone says nothing; elsewhere the word means hosts.
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def arrange(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """The devices of a TPU slice in the shape of the mesh; of several good orders, the one with the shortest rings.

    Of several slices the first axis is divided among them, so that it alone crosses the network.
    """
    by_slice: dict[int, list[Any]] = {}
    for device in devices:
        by_slice.setdefault(_slice(device), []).append(device)
    each = (shape[0] // len(by_slice), *shape[1:])
    return np.concatenate([_arrange_one(by_slice[index], each) for index in sorted(by_slice)])


def _arrange_one(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    places = [_place(device) for device in devices]
    return min(
        (np.array([devices[i] for i in order], dtype=object).reshape(shape) for order in _orders(places)),
        key=lambda mesh: sum(_ring_hops(mesh, axis) for axis in range(mesh.ndim)),
    )


def _place(device: Any) -> Place:
    return (*(*device.coords, 0, 0)[:3], getattr(device, "core_on_chip", 0) or 0)


def _orders(places: list[Place]) -> Iterator[list[int]]:
    """A closed walk over all chips, then every way of counting through the coordinates."""
    for order in (_closed_walk, *(_counting(axes) for axes in itertools.permutations(range(3)))):
        yield sorted(range(len(places)), key=order(places))


def _counting(axes: tuple[int, ...]) -> Callable[[list[Place]], Key]:
    return lambda places: lambda i: (*(places[i][axis] for axis in axes), places[i][3])


def _closed_walk(places: list[Place]) -> Key:
    """Out along a snake through all chips of x > 0, back along those of x = 0; y and z are one long line."""
    width, height = (1 + max(place[axis] for place in places) for axis in (0, 1))

    def key(i: int) -> tuple[int, ...]:
        x, y, z, core = places[i]
        line = z * height + (height - 1 - y if z % 2 else y)
        if x == 0 and width > 1:
            return 1, -line, 0, core
        return 0, line, (width - x if line % 2 else x), core

    return key


def _ring_hops(mesh: np.ndarray, axis: int) -> int:
    """Wires that one step of every ring along this axis uses."""
    if mesh.shape[axis] == 1:
        return 0
    rings = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])
    return sum(
        sum(abs(a - b) for a, b in zip(_place(one)[:3], _place(other)[:3], strict=True))
        for ring in rings
        for one, other in zip(ring, np.roll(ring, -1), strict=True)
    )
