"""Attention by the TPU's own kernel (splash attention, Pallas): blocks outside a mask are never looked at.

Shapes as in attention.py.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from gemma_tpu.gemma.per_device import on_each_device
from gemma_tpu.gemma.remat import ATTENTION

BLOCK = 512  # at head dim 512 the default block of 1024 asks for more VMEM than there is
LANES = 128  # the kernel's blocks are multiples of it


def fits(tokens: int, head_dim: int) -> bool:
    """The kernel wants whole blocks of tokens, and heads that fill lanes."""
    return tokens % LANES == 0 and head_dim % LANES == 0


def splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, *, scale: float,
    window: int | None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Causal attention within segments, and within `window` if there is one; queries and keys are the same tokens."""
    run = partial(_one_device, window=window, interpret=interpret)
    return on_each_device(run, q_BTNH * scale, k_BTKH, v_BTKH, segments_BT)


def _one_device(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, *, window: int | None,
    interpret: bool,
) -> jax.Array:  # fmt: skip
    _, tokens, heads, _ = q_BTNH.shape
    made = _kernel(heads, tokens, window, interpret)

    def of_row(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segments_T: jax.Array) -> jax.Array:
        return made(q_NTH, k_KTH, v_KTH, kernel.SegmentIds(segments_T, segments_T))

    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return jax.vmap(of_row)(q_BNTH, k_BKTH, v_BKTH, segments_BT).swapaxes(1, 2)


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
        residual_checkpoint_name=ATTENTION, interpret=interpret,
    )  # fmt: skip
    return made
