"""Keys and values of sequences that are being continued: a ring for each layer, as long as the layer can look back.

All rows write at one clock: the token of step c stands in slot c mod S of every row, whenever its sequence began. So
a step writes one slice, not one place in each row, and what a slot holds follows from its age alone: a row of n
tokens has something in the slots of age 0 to n - 1. A global layer's ring is as long as a sequence may become, a
sliding layer's as long as its window; layers that share the keys and values of others have none. Keys lie as
[R, B, K, H, S] and values as [R, B, K, S, H]: both products of attention then read them in order, which on a CPU is
ten times as fast as keys that lie like values. On a CPU each repeat of a period has arrays of its own, with R = 1: one
taken out of a stack is a copy there.

Letters: R repeats of a block's period, B rows, T tokens, S slots, K KV heads, H head dim.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gemma_tpu.gemma.mesh import platform
from gemma_tpu.gemma.variants import Architecture, Layer

MOST_APART = 8  # repeats of a period; the program grows with them
MASKED = -1e30  # finite: a row without tokens stays a number

AXES = (None, "batch", "act_kv_heads", None, None)  # how the rings lie on a mesh
SLOTS = (4, 3)  # the dim of the slots, of keys and of values

Number = int | jax.Array
Pair = tuple[jax.Array, jax.Array]
# Of every block and slot of its period: all repeats in one part, or one for each. None: the layer has no own.
Parts = tuple[Pair, ...] | None
Rings = tuple[tuple[Parts, ...], ...]


def slots(layer: Layer, capacity: int) -> int:
    return capacity if layer.window is None else min(layer.window, capacity)


def empty(arch: Architecture, rows: int, capacity: int, dtype: jnp.dtype) -> Rings:
    """Rings for `rows` sequences of at most `capacity` tokens."""

    def parts(repeats: int, layer: Layer) -> Parts:
        if layer.kv_shared:
            return None
        head, count = layer.head_dim, slots(layer, capacity)
        number = repeats if platform() == "cpu" and repeats <= MOST_APART else 1
        lead = (repeats // number, rows, layer.kv_heads)
        return tuple(
            (jnp.zeros((*lead, head, count), dtype), jnp.zeros((*lead, count, head), dtype)) for _ in range(number)
        )

    return tuple(tuple(parts(block.repeats, layer) for layer in block.period) for block in arch.blocks)


def apart(rings: Rings, number: int) -> bool:
    """Whether the repeats of a block have their own arrays: which is wanted must then be known to the program."""
    return any(parts is not None and len(parts) > 1 for parts in rings[number])


def nbytes(arch: Architecture, rows: int, capacity: int, itemsize: int) -> int:
    own = [layer for layer in arch.layers if not layer.kv_shared]
    return sum(2 * rows * layer.kv_heads * slots(layer, capacity) * layer.head_dim * itemsize for layer in own)


def ages(clock: Number, count: int) -> jax.Array:
    """How many steps ago each slot was written, when the one of `clock` is the newest."""
    return (clock - jnp.arange(count)) % count


def biases(arch: Architecture, capacity: int, clock: Number, last_B: jax.Array) -> dict[int | None, jax.Array]:
    """By window, [B, 1, S]: 0 where the token of this step, the row's number `last_B`, sees a slot, else MASKED.

    Its own slot, still another's, is among the latter.
    """
    found = {}
    for layer in dict.fromkeys(arch.layers):
        age_S = ages(clock, slots(layer, capacity))
        seen_B1S = (age_S > 0) & (age_S <= last_B[:, None, None])
        found[layer.window] = jnp.where(seen_B1S, 0.0, MASKED).astype(jnp.float32)
    return found


def put(rings: Rings, new: Rings, clock: Number) -> Rings:
    """With the keys and values that a step has found, [R, B, 1, K, H]."""

    def one(ring: jax.Array, new_RB1KH: jax.Array, dim: int) -> jax.Array:
        new = jnp.expand_dims(new_RB1KH[:, :, 0], dim).astype(ring.dtype)
        return jax.lax.dynamic_update_slice_in_dim(ring, new, clock % ring.shape[dim], axis=dim)

    return _of_each(one, rings, _like(rings, new))


def past(arch: Architecture, rings: Rings, number: int, slot: int, repeat: Number) -> Pair:
    """What a layer looks back on: keys [B, K, H, S] and values [B, K, S, H], its own or those that it shares.

    `repeat` is an int wherever repeats have arrays of their own: see `apart`.
    """
    layer = arch.blocks[number].period[slot]
    if layer.kv_shared:
        number, slot, repeat = source(arch, layer)
    parts = rings[number][slot]
    assert parts is not None, "only layers that share others' keys and values have no ring"
    if len(parts) == 1:
        k, v = parts[0]
    else:
        (k, v), repeat = parts[int(repeat)], 0
    take = partial(jax.lax.dynamic_index_in_dim, index=repeat, keepdims=False)
    return take(k), take(v)


def source(arch: Architecture, shared: Layer) -> tuple[int, int, int]:
    """(block, slot of the period, repeat) of the layer whose keys and values a sharing layer uses."""
    own = [
        (block.layer_index(slot, repeat), (number, slot, repeat))
        for number, block in enumerate(arch.blocks)
        for slot, layer in enumerate(block.period)
        for repeat in range(block.repeats)
        if not layer.kv_shared and layer.kind == shared.kind
    ]
    return max(own)[1]


# --- prompts: from a packed sheet into a store, from there into a row ---------------------------------------------


def of_sheet(new: Rings, start_E: jax.Array, length_E: jax.Array, row_E: jax.Array, store: Rings) -> Rings:
    """The store with the last tokens of each of a sheet's segments in its rows, the newest in the last slot.

    `new` is what a forward pass over one sheet gives, [R, 1, T, K, H]; a `row_E` beyond the store is nowhere.
    """

    def one(kept: jax.Array, new_R1TKH: jax.Array, dim: int) -> jax.Array:
        count = kept.shape[dim]
        index_ES = (start_E + length_E)[:, None] - count + jnp.arange(count)
        found_REKSH = new_R1TKH[:, 0].at[:, index_ES].get(mode="clip").swapaxes(2, 3)
        found = jnp.moveaxis(found_REKSH, 3, dim).astype(kept.dtype)
        return kept.at[:, row_E].set(found, mode="drop")

    return _of_each(one, store, _like(store, new))


def start_row(rings: Rings, store: Rings, row: Number, stored: Number, clock: Number) -> Rings:
    """A stored prompt into a row, turned so that its newest token stands in the slot before `clock`'s."""

    def one(ring: jax.Array, kept: jax.Array, dim: int) -> jax.Array:
        prompt = jax.lax.dynamic_slice_in_dim(kept, stored, 1, axis=1)
        index_S = kept.shape[dim] - 1 - ages(clock - 1, ring.shape[dim])
        return jax.lax.dynamic_update_slice_in_dim(ring, jnp.take(prompt, index_S, dim, mode="clip"), row, axis=1)

    return _of_each(one, rings, store)


def _of_each(one: Callable[[jax.Array, jax.Array, int], jax.Array], left: Rings, right: Rings) -> Rings:
    """one(x, y, dim of the slots) for all keys and values of two caches."""

    def pair(x: Pair, y: Pair) -> Pair:
        k, v = (one(a, b, dim) for a, b, dim in zip(x, y, SLOTS, strict=True))
        return k, v

    def parts(x: Parts, y: Parts) -> Parts:
        return None if x is None or y is None else tuple(map(pair, x, y))

    return tuple(tuple(map(parts, a, b)) for a, b in zip(left, right, strict=True))


def _like(rings: Rings, new: Rings) -> Rings:
    """`new` in as many parts as the rings."""

    def parts(mine: Parts, given: Parts) -> Parts:
        if mine is None or given is None or len(mine) == len(given):
            return given
        [(k, v)] = given
        return tuple((k[repeat : repeat + 1], v[repeat : repeat + 1]) for repeat in range(len(mine)))

    return tuple(tuple(map(parts, a, b)) for a, b in zip(rings, new, strict=True))
