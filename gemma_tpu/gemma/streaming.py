"""Base weights from a checkpoint onto the shards of a mesh, piece by piece: no host reads or holds more than it must.

Rows of a checkpoint's matrix lie in one piece in the file, columns do not. Where the devices of several hosts hold
different columns of the same rows, or the same tensor, each of those hosts would read all of it: there the hosts
read different rows, and the devices exchange what they need over their own links, which are far faster.
"""

import functools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.gemma.weights import Entry, by_path, check
from gemma_tpu.storage.shards import Checkpoint

Index = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]  # [low, high) of every dim of a variable
Encoder = Callable[[jax.Array], dict[str, jax.Array]]  # a piece, along its first dim, into parts along theirs
Route = tuple[NamedSharding, ...]  # read as the first, then moved from each to the next; the last is what is wanted

# Devices whose memory is the host's: what was read becomes the array as it stands, and pieces would be a copy more.
TAKES_OVER = frozenset({"cpu"})
WORTH_MOVING = 1 << 20  # bytes that hosts must save together; below, reading twice is faster than a collective


@dataclass(frozen=True)
class Plan:
    """How one variable comes to its devices."""

    entries: Sequence[Entry]
    shape: tuple[int, ...]
    dtype: np.dtype
    stored: int  # bytes of an element in the checkpoint
    route: Route
    step: int  # how much of the first dim is read at once; repeats of a stacked variable, else all

    @property
    def piece(self) -> tuple[int, ...]:
        return self.step, *self.shape[1:]

    @property
    def bytes_here(self) -> int:
        """What this host reads of it."""
        return sum(map(_elements, _places(self.route[0], self.shape))) * self.stored


def load(
    checkpoint: Checkpoint, arch: Architecture, variables: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding], progress: Callable[[int, int], None] = lambda done, total: None,
    encoders: Mapping[str, Encoder] | None = None,
) -> dict[str, jax.Array]:  # fmt: skip
    """The variables on their devices; called by every host alike. `progress` gets the bytes read here so far, of all.

    A variable with an encoder is read in the given shape and type, and held as what the encoder makes of each piece:
    its parts, by names beside the variable's own.

    Beyond the parameters, a host holds two pieces at most, each no larger than the largest tensor or one repeat.
    """
    check(checkpoint, arch)
    encoders = encoders or {}
    plans = _plans(checkpoint, by_path(arch), variables, shardings, encoders)
    total, done = sum(plan.bytes_here for plan in plans.values()), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    loaded: dict[str, jax.Array] = {}
    before: jax.Array | None = None
    with ThreadPoolExecutor(checkpoint.source.reads_at_once, "weights") as pool:
        for path, plan in plans.items():
            for start in range(0, plan.shape[0], plan.step):
                piece = _read(checkpoint, pool, plan, start, tell)
                jax.block_until_ready(before)  # one piece may be on its way to the devices while the next is read
                before = piece
                if path not in encoders:
                    loaded[path] = _joined(plan, loaded.get(path), piece, start)
                    continue
                parts = _encoded(path, plan, encoders[path], shardings, piece)
                loaded |= {name: _put_in(plan, loaded.get(name), part, start) for name, part in parts.items()}
    return loaded


def _encoded(
    path: str, plan: Plan, encoder: Encoder, shardings: Mapping[str, NamedSharding], piece: jax.Array
) -> dict[str, jax.Array]:
    """The parts of one piece, by their paths, each as it lies."""
    stem = path.removesuffix(".w")
    named = {name: f"{stem}.{name}" for name in jax.eval_shape(encoder, piece)}
    places = tuple((name, shardings[there]) for name, there in named.items())
    return {named[name]: part for name, part in _encoder(encoder, plan.route, places)(piece).items()}


@functools.lru_cache
def _encoder(encoder: Encoder, route: Route, places: tuple[tuple[str, NamedSharding], ...]) -> Encoder:
    return jax.jit(lambda piece: encoder(_along(piece, route)), out_shardings=dict(places))


def _put_in(plan: Plan, whole: jax.Array | None, part: jax.Array, start: int) -> jax.Array:
    if plan.step == plan.shape[0]:
        return part
    if whole is None:
        shape = (plan.shape[0], *part.shape[1:])
        whole = jax.jit(lambda: jnp.zeros(shape, part.dtype), out_shardings=part.sharding)()
    return _inserter((part.sharding,))(whole, part, np.int32(start))


def _plans(
    checkpoint: Checkpoint, table: Mapping[str, list[Entry]], variables: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding], encoders: Mapping[str, Encoder],
) -> dict[str, Plan]:  # fmt: skip
    sizes = {path: math.prod(table[path][0].shape) * variable.dtype.itemsize for path, variable in variables.items()}
    largest = max(sizes.values(), default=0)
    plans = {}
    for path, variable in variables.items():
        entry, shape = table[path][0], tuple(variable.shape)
        stored = checkpoint.info(entry.hf).dtype.itemsize
        route = _route(entry, shape, shardings[path], stored)
        devices: set[jax.Device] = route[0].device_set
        platforms = {device.platform for device in devices}
        step = shape[0]
        if entry.index and not (len(route) == 1 and platforms <= TAKES_OVER and path not in encoders):
            repeat = sum(map(_elements, _places(route[0], (1, *shape[1:])))) * variable.dtype.itemsize
            # All pieces of one size, so that what puts them together is compiled once.
            step = max(n for n in range(1, step + 1) if step % n == 0 and (n == 1 or n * repeat <= largest))
        plans[path] = Plan(table[path], shape, variable.dtype, stored, route, step)
    return plans


def _route(entry: Entry, shape: tuple[int, ...], wanted: NamedSharding, itemsize: int) -> Route:
    """From the way the hosts read least to the wanted one.

    Mesh axes that split the columns, or nothing, are given to the rows one by one, where that saves reading and
    divides. Undone one by one, each is one all-to-all or all-gather: XLA finds no good way for several at once.
    """
    if wanted.is_fully_addressable:
        return (wanted,)
    mesh, first = wanted.mesh, len(entry.index)
    columns = first + min(entry.out_dims, len(entry.shape))
    spec = [(part,) if isinstance(part, str) else tuple(part or ()) for part in wanted.spec]
    spec += [()] * (len(shape) - len(spec))
    used = [axis for names in spec for axis in names]
    splitting_columns = [axis for names in spec[columns:] for axis in names]
    route = [wanted]
    for axis in splitting_columns + [axis for axis in mesh.axis_names if axis not in used and mesh.shape[axis] > 1]:
        for dim in range(first, columns):
            moved = [tuple(name for name in names if name != axis) for names in spec]
            moved[dim] += (axis,)
            if shape[dim] % math.prod(mesh.shape[name] for name in moved[dim]):
                continue
            sharding = NamedSharding(mesh, PartitionSpec(*(names or None for names in moved)))
            saved = _touched(route[0], shape, columns) - _touched(sharding, shape, columns)
            if saved * itemsize >= WORTH_MOVING:
                route, spec = [sharding, *route], moved
                break
    return tuple(route)


def _touched(sharding: NamedSharding, shape: tuple[int, ...], columns: int) -> int:
    """Elements that all hosts read together: the rows, each whole, that any of a host's devices wants a part of."""
    indices: Mapping[jax.Device, Index] = sharding.devices_indices_map(shape)
    rows = {(device.process_index, _bounds(index, shape)[:columns]) for device, index in indices.items()}
    return sum(_elements(bounds) for _, bounds in rows) * math.prod(shape[columns:])


def _read(
    checkpoint: Checkpoint, pool: ThreadPoolExecutor, plan: Plan, start: int, tell: Callable[[int], None]
) -> jax.Array:
    """One piece on its devices. What several devices hold is read once, and so are the bytes around columns."""
    places = _places(plan.route[0], plan.piece, start)
    shards = {bounds: _pages([high - low for low, high in bounds], plan.dtype) for bounds in places}
    parts = {entry.hf: list(_slices(entry, shards)) for entry in plan.entries}
    wanted = {name: slices for name, slices in parts.items() if slices}
    reads = [pool.submit(checkpoint.read_slices, name, slices) for name, slices in wanted.items()]
    try:
        for read, slices in zip(reads, wanted.values(), strict=True):
            read.result()
            tell(sum(out.size for _, out in slices) * plan.stored)
    finally:
        for read in reads:
            read.cancel()
    arrays = [jax.device_put(shards[bounds], device) for bounds, devices in places.items() for device in devices]
    return jax.make_array_from_single_device_arrays(plan.piece, plan.route[0], arrays)


def _joined(plan: Plan, whole: jax.Array | None, piece: jax.Array, start: int) -> jax.Array:
    """The variable so far, with this piece where it belongs."""
    if plan.step < plan.shape[0]:
        if whole is None:
            whole = jax.jit(lambda: jnp.zeros(plan.shape, plan.dtype), out_shardings=plan.route[-1])()
        return _inserter(plan.route)(whole, piece, np.int32(start))
    return piece if len(plan.route) == 1 else _mover(plan.route)(piece)


@functools.lru_cache
def _inserter(route: Route) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    def insert(whole: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, _along(piece, route), start, axis=0)

    return jax.jit(insert, out_shardings=route[-1], donate_argnums=0)


@functools.lru_cache
def _mover(route: Route) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda piece: _along(piece, route), out_shardings=route[-1])


def _along(piece: jax.Array, route: Route) -> jax.Array:
    for sharding in route[1:]:
        piece = jax.lax.with_sharding_constraint(piece, sharding)
    return piece


def _bounds(index: Index, shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _places(sharding: NamedSharding, shape: tuple[int, ...], start: int = 0) -> dict[Bounds, list[jax.Device]]:
    """The parts of a variable, or of a piece that starts there, that this host's devices hold; each with those."""
    places: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, "every device of a NamedSharding holds a part"
        (low, high), *rest = _bounds(index, shape)
        places.setdefault(((low + start, high + start), *rest), []).append(device)
    return places


def _elements(bounds: Bounds) -> int:
    return math.prod(high - low for low, high in bounds)


def _pages(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it stands: it would copy what is aligned to less than 64 bytes.

    numpy asks for huge pages, and beside a page cache full of weight files the kernel takes longer to clear room
    for those than the read takes.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array: np.ndarray = np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)
    return array


def _slices(
    entry: Entry, shards: Mapping[Bounds, np.ndarray]
) -> Iterator[tuple[Index, np.ndarray]]:
    """What the shards need of one tensor, as slices of the checkpoint's matrix, each with the array it fills."""
    lead = len(entry.index)
    for bounds, shard in shards.items():
        if not all(low <= i < high for (low, high), i in zip(bounds, entry.index, strict=False)):
            continue
        inner = bounds[lead:]
        part = shard[tuple(i - low for i, (low, _) in zip(entry.index, bounds, strict=False))]
        if entry.hf_shape == entry.shape:
            yield tuple(slice(low, high) for low, high in inner), part
            continue
        [(columns, _)] = _runs(inner[entry.out_dims :], entry.shape[entry.out_dims :], part[(0,) * entry.out_dims])
        for rows, run in _runs(inner[: entry.out_dims], entry.shape[: entry.out_dims], part):
            yield (rows, columns), run.reshape(rows.stop - rows.start, -1)  # a view: the run lies in one piece


def _runs(bounds: Bounds, shape: tuple[int, ...], part: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """A box of dims that the checkpoint has as one, as ranges of that one: several where it splits within heads."""
    (low, high), *rest = bounds
    inner = math.prod(shape[1:])
    if all((lo, hi) == (0, size) for (lo, hi), size in zip(rest, shape[1:], strict=True)):
        yield slice(low * inner, high * inner), part
        return
    for i in range(low, high):
        for run, array in _runs(tuple(rest), shape[1:], part[i - low]):
            yield slice(run.start + i * inner, run.stop + i * inner), array
