"""Attention by the TPU's own kernel (splash attention, Pallas): blocks outside a mask are never looked at.

The kernel is one device's: it runs inside shard_map, over this device's rows and heads. Shapes as in attention.py.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from gemma_tpu.gemma.mesh import split_of

BLOCK = 512  # at head dim 512 the default block of 1024 asks for more VMEM than there is
LANES = 128  # the kernel's blocks are multiples of it
NAME = "attention"  # what the kernel's output and row sums are called where activations are kept by name


def fits(tokens: int, head_dim: int) -> bool:
    """The kernel wants whole blocks of tokens, and heads that fill lanes."""
    return tokens % LANES == 0 and head_dim % LANES == 0


def splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, *, scale: float,
    window: int | None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Causal attention within segments, and within `window` if there is one; queries and keys are the same tokens."""
    rows, heads = split_of("batch", q_BTNH.shape[0]), split_of("act_heads", q_BTNH.shape[2])
    shards = 1 if heads is None else _size(heads)
    repeat = repeats(k_BTKH.shape[2], q_BTNH.shape[2], shards)
    if repeat > 1:  # fewer KV heads than devices that split heads: each gets the one its queries look at
        k_BTKH, v_BTKH = jnp.repeat(k_BTKH, repeat, axis=2), jnp.repeat(v_BTKH, repeat, axis=2)
    run: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] = functools.partial(
        _one_device, window=window, interpret=interpret, heads=q_BTNH.shape[2] // shards
    )
    q_BNTH, k_BKTH, v_BKTH = ((x.swapaxes(1, 2)) for x in (q_BTNH * scale, k_BTKH, v_BTKH))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        by_head = PartitionSpec(rows, heads, None, None)
        run = jax.shard_map(
            run, in_specs=(by_head, by_head, by_head, PartitionSpec(rows, None)), out_specs=by_head, check_vma=False
        )
    return run(q_BNTH, k_BKTH, v_BKTH, segments_BT).swapaxes(1, 2)


def _size(names: str | Sequence[str]) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return int(np.prod([shape[name] for name in ((names,) if isinstance(names, str) else names)]))


def repeats(kv_heads: int, heads: int, shards: int) -> int:
    """How often to repeat the KV heads so that they split like the query heads."""
    group = heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % shards == 0)


def _one_device(
    q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segments_BT: jax.Array, *, window: int | None,
    interpret: bool, heads: int,
) -> jax.Array:  # fmt: skip
    tokens = q_BNTH.shape[2]
    made = _kernel(heads, tokens, window, interpret)

    def of_row(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segments_T: jax.Array) -> jax.Array:
        return made(q_NTH, k_KTH, v_KTH, kernel.SegmentIds(segments_T, segments_T))

    return jax.vmap(of_row)(q_BNTH, k_BKTH, v_BKTH, segments_BT)


def _kernel(heads: int, tokens: int, window: int | None, interpret: bool) -> Callable[..., jax.Array]:
    shape = (tokens, tokens)
    # A window of W sees the query itself and the W - 1 tokens before it.
    mask = masks.CausalMask(shape) if window is None or window >= tokens else masks.LocalMask(shape, (window - 1, 0), 0)
    block = max(size for size in range(LANES, BLOCK + 1, LANES) if tokens % size == 0)
    blocks = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    made: Callable[..., jax.Array] = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=NAME, interpret=interpret,
    )  # fmt: skip
    return made
