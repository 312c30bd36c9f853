"""Attention over packed rows: causal, within a segment, and within a window where the layer has one.

Shapes: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, g = G * T, H head dim, W window,
C chunks of c tokens.
Masks go by index in the row, as the reference does; packed segments are contiguous, so inside one segment the
index distance is the position distance. Segment 0 is padding.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row that is all padding stays a number
MIN_CHUNK = 64  # shorter chunks make matmuls too small to be worth the keys they save


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    q_index_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v, in the dtype of q; the softmax itself is float32.

    `q_index_BT` is where the queries stand among the keys (decoding against a cache); without it queries and keys
    are the same tokens, and a layer whose window is much shorter than the row looks only at the keys near it.
    """
    tokens = q_BTNH.shape[1]
    if q_index_BT is None:
        chunk = None if window is None else _chunk(tokens, window)
        if chunk is not None:
            return _banded(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, scale, window, chunk)
        q_index_BT = jnp.arange(tokens)[None]
    k_index_S = jnp.arange(k_BSKH.shape[1])
    bias_BTS = _bias(q_index_BT, k_index_S, q_segments_BT, k_segments_BS, window)
    return _softmax_attention(q_BTNH, k_BSKH, v_BSKH, bias_BTS, scale)


def _bias(q_index_BT, k_index_BS, q_segments_BT, k_segments_BS, window):
    """0 where a query sees a key, else MASKED."""
    distance = q_index_BT[..., :, None] - k_index_BS[..., None, :]
    seen = (distance >= 0) & (q_segments_BT[..., :, None] == k_segments_BS[..., None, :])
    if window is not None:
        seen &= distance < window
    # The barrier has it computed once, and not again inside the softmax of every head: half its time on a CPU.
    return jax.lax.optimization_barrier(jnp.where(seen, 0.0, MASKED).astype(jnp.float32))


def _softmax_attention(q_BTNH, k_BSKH, v_BSKH, bias_BTS, scale):
    """Heads lead and the queries of a group stand in one matrix [G * T, H]: plain batched matmuls, twice as fast
    on a CPU as the same contraction with the heads in the middle."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    q_BKgH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores_BKgS = jnp.einsum("BKgH,BKSH->BKgS", q_BKgH * scale, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKgS.reshape(B, K, G, T, S) + bias_BTS[:, None, None]
    weights_BKgS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype).reshape(B, K, G * T, S)
    out_BKgH = jnp.einsum("BKgS,BKSH->BKgH", weights_BKgS, v_BKSH)
    return out_BKgH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _chunk(tokens: int, window: int) -> int | None:
    """The chunk length that makes a query look at the fewest keys, chunk + window; None where all is no more."""
    chunks = [window // part for part in (1, 2, 4) if window % part == 0 and tokens % (window // part) == 0]
    chunks = [chunk for chunk in chunks if chunk >= MIN_CHUNK or chunk == window]
    best = min(chunks, default=tokens)
    return best if 4 * (best + window) <= 3 * tokens else None


def _banded(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, scale, window, chunk):
    """Chunks of c queries see their own chunk and the window before it: c + W keys each instead of T."""
    B, T, N, H = q_BTNH.shape
    C, before = T // chunk, window // chunk

    def chunks(x):  # [B, T, ...] -> [B * C, c, ...]
        return x.reshape(B * C, chunk, *x.shape[2:])

    def with_window(x, filler=0):  # [B, T, ...] -> [B * C, W + c, ...]
        lead = jnp.full((B, window, *x.shape[2:]), filler, x.dtype)
        x_BCc = jnp.concatenate([lead, x], axis=1).reshape(B, C + before, chunk, *x.shape[2:])
        both = jnp.concatenate([x_BCc[:, i : i + C] for i in range(before + 1)], axis=2)
        return both.reshape(B * C, window + chunk, *x.shape[2:])

    # What stands before the first token gets segment -1, which no query has.
    k_segments = with_window(k_segments_BS, filler=-1)
    q_index = jnp.arange(window, window + chunk)[None]
    bias = _bias(q_index, jnp.arange(window + chunk), chunks(q_segments_BT), k_segments, window)
    out = _softmax_attention(chunks(q_BTNH), with_window(k_BSKH), with_window(v_BSKH), bias, scale)
    return out.reshape(B, T, N, H)
