"""Kernels of attention are one device's: each runs inside shard_map, over the rows and the heads that its device holds.

Shapes as in attention.py.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gemma_tpu.gemma.mesh import split_of

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v, segments


def on_each_device(
    kernel: Kernel, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    rows, heads = split_of("batch", q_BTNH.shape[0]), split_of("act_heads", q_BTNH.shape[2])
    repeat = repeats(k_BTKH.shape[2], q_BTNH.shape[2], 1 if heads is None else _size(heads))
    if repeat > 1:  # fewer KV heads than devices that split heads: each gets the one its queries look at
        k_BTKH, v_BTKH = jnp.repeat(k_BTKH, repeat, axis=2), jnp.repeat(v_BTKH, repeat, axis=2)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        by_head = PartitionSpec(rows, None, heads, None)
        kernel = jax.shard_map(
            kernel, in_specs=(by_head, by_head, by_head, PartitionSpec(rows, None)), out_specs=by_head, check_vma=False
        )
    return kernel(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def repeats(kv_heads: int, heads: int, shards: int) -> int:
    """How often to repeat the KV heads so that they split like the query heads."""
    group = heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % shards == 0)


def _size(names: str | Sequence[str]) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return int(np.prod([shape[name] for name in ((names,) if isinstance(names, str) else names)]))
