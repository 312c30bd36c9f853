"""Attention over packed rows: causal, within a segment, and within a window where the layer has one.

Where there is no kernel, queries go block by block against the keys that they may see, and the backward pass makes
the scores of a block again: memory grows with the tokens of a row, not with their square.

Shapes: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, g = G * T, H head dim, W window,
C chunks of c tokens; of one block, b rows (of a band, B * C), t queries, s keys.
Masks go by index in the row, as the reference does; packed segments are contiguous, so inside one segment the
index distance is the position distance. Segment 0 is padding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from gemma_tpu.gemma import flash, splash
from gemma_tpu.gemma.mesh import device_kind, platform
from gemma_tpu.gemma.remat import ATTENTION, named

MASKED = -1e30  # finite: a row that is all padding stays a number
MIN_CHUNK = 64  # shorter chunks make matmuls too small to be worth the keys they save
CHUNK = 256  # queries of a row at a time: their scores are what lives at once

Queries = tuple[jax.Array, ...]  # of one block, all [b, t, ...]: q, its segments, …, and last its index among the keys
Keys = tuple[jax.Array, jax.Array, jax.Array]  # of one block: keys, values, segments
Saved = tuple[jax.Array, ...]  # for the backward pass: the five inputs, the output and each query's sum
Total = TypeVar("Total")  # a tree of arrays
Found = TypeVar("Found")


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
    are the same tokens, and no query is held against a key that its block's mask would throw away.
    """
    if q_index_BT is None:
        if platform() == "tpu" and splash.fits(q_BTNH.shape[1], q_BTNH.shape[-1]):
            return splash.splash(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale=scale, window=window)
        if platform() == "gpu" and flash.fits(q_BTNH.shape[1], q_BTNH.shape[-1], q_BTNH.dtype, device_kind()):
            return flash.flash(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale=scale, window=window)
        return _blockwise(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, scale, window)
    k_index_S = jnp.arange(k_BSKH.shape[1])
    bias_BTS = _bias(q_index_BT, k_index_S, q_segments_BT, k_segments_BS, window)
    return named(_softmax_attention(q_BTNH, k_BSKH, v_BSKH, bias_BTS, scale), ATTENTION)


def against_cache(
    q_B1NH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array,
    bias_B1S: jax.Array, scale: float,
) -> jax.Array:  # fmt: skip
    """One query in each row, against its own key and those that a cache holds of the tokens before it.

    Its own is not yet in the cache: what is written after it was read can be written in place.
    """
    q_BKgH = _heads_lead(q_B1NH * scale, k_BKHS.shape[1])
    k_BK1H, v_BK1H = k_B1KH.swapaxes(1, 2), v_B1KH.swapaxes(1, 2)
    old_BKgS = jnp.einsum("BKgH,BKHS->BKgS", q_BKgH, k_BKHS, preferred_element_type=jnp.float32) + bias_B1S[:, None]
    own_BKg1 = jnp.sum(q_BKgH.astype(jnp.float32) * k_BK1H, axis=-1, keepdims=True)
    top_BKg1 = jnp.maximum(jnp.max(old_BKgS, axis=-1, keepdims=True), own_BKg1)
    old_BKgS, own_BKg1 = jnp.exp(old_BKgS - top_BKg1), jnp.exp(own_BKg1 - top_BKg1)
    out_BKgH = jnp.einsum("BKgS,BKSH->BKgH", old_BKgS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    out_BKgH = (out_BKgH + own_BKg1 * v_BK1H) / (jnp.sum(old_BKgS, axis=-1, keepdims=True) + own_BKg1)
    return _heads_back(out_BKgH.astype(q_B1NH.dtype), q_B1NH.shape)


def _bias(
    q_index_BT: jax.Array, k_index_BS: jax.Array, q_segments_BT: jax.Array, k_segments_BS: jax.Array,
    window: int | None,
) -> jax.Array:  # fmt: skip
    """0 where a query sees a key, else MASKED."""
    distance = q_index_BT[..., :, None] - k_index_BS[..., None, :]
    seen = (distance >= 0) & (q_segments_BT[..., :, None] == k_segments_BS[..., None, :])
    if window is not None:
        seen &= distance < window
    # The barrier has it computed once, and not again inside the softmax of every head: half its time on a CPU.
    bias: jax.Array = jax.lax.optimization_barrier(jnp.where(seen, 0.0, MASKED).astype(jnp.float32))
    return bias


def _softmax_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, bias_BTS: jax.Array, scale: float
) -> jax.Array:
    """The plain form: all scores at once."""
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores_BKgS = _scores(_heads_lead(q_BTNH * scale, k_BSKH.shape[2]), k_BKSH, bias_BTS)
    weights_BKgS = jax.nn.softmax(scores_BKgS, axis=-1).astype(v_BKSH.dtype)
    return _heads_back(jnp.einsum("BKgS,BKSH->BKgH", weights_BKgS, v_BKSH), q_BTNH.shape)


def _heads_lead(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Heads lead and the queries of a group stand in one matrix [G * T, H]: plain batched matmuls, twice as fast on
    a CPU as the same contraction with the heads in the middle."""
    B, T, N, H = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(B, T, kv_heads, N // kv_heads, H)
    return x_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, N // kv_heads * T, H)


def _heads_back(x_BKgH: jax.Array, shape: Sequence[int]) -> jax.Array:
    B, T, N, H = shape
    K = x_BKgH.shape[1]
    return x_BKgH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _scores(q_BKgH: jax.Array, k_BKSH: jax.Array, bias_BTS: jax.Array) -> jax.Array:
    B, K, g, _ = q_BKgH.shape
    T, S = bias_BTS.shape[1:]
    scores_BKgS = jnp.einsum("BKgH,BKSH->BKgS", q_BKgH, k_BKSH, preferred_element_type=jnp.float32)
    return (scores_BKgS.reshape(B, K, g // T, T, S) + bias_BTS[:, None, None]).reshape(B, K, g, S)


# --- block by block ---------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, q_segments_BT: jax.Array, k_segments_BT: jax.Array,
    scale: float, window: int | None,
) -> jax.Array:  # fmt: skip
    return _forward(q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BT, scale, window)[0]


def _forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, q_segments_BT: jax.Array, k_segments_BT: jax.Array,
    scale: float, window: int | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(output, the logarithm of each query's sum of weights [B, T, N, 1])."""
    found = []
    for q, keys in _blocks((q_BTNH * scale, q_segments_BT), (k_BTKH, v_BTKH, k_segments_BT), window):
        _, found_of_chunks = _by_chunks(partial(_attend, keys=keys, window=window), q, ())
        found.append(found_of_chunks)
    outs, sums = zip(*found, strict=True)
    lead = q_BTNH.shape[:3]
    return jnp.concatenate(outs, axis=1).reshape(q_BTNH.shape), jnp.concatenate(sums, axis=1).reshape(*lead, 1)


def _attend(q: Queries, keys: Keys, window: int | None) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
    """((), (output, the logarithm of the sum of weights)): nothing adds up over the queries."""
    (q_btNH, q_segments_bt, q_index_1t), (k_bsKH, v_bsKH, k_segments_bs) = q, keys
    bias_bts = _bias(q_index_1t, jnp.arange(k_bsKH.shape[1]), q_segments_bt, k_segments_bs, window)
    k_bKsH, v_bKsH = k_bsKH.swapaxes(1, 2), v_bsKH.swapaxes(1, 2)
    scores_bKgs = _scores(_heads_lead(q_btNH, k_bsKH.shape[2]), k_bKsH, bias_bts)
    top_bKg1 = jnp.max(scores_bKgs, axis=-1, keepdims=True)
    weights_bKgs = jnp.exp(scores_bKgs - top_bKg1)
    sum_bKg1 = jnp.sum(weights_bKgs, axis=-1, keepdims=True)
    out_bKgH = jnp.einsum("bKgs,bKsH->bKgH", weights_bKgs.astype(v_bKsH.dtype), v_bKsH,
                          preferred_element_type=jnp.float32)  # fmt: skip
    out_btNH = _heads_back((out_bKgH / sum_bKg1).astype(q_btNH.dtype), q_btNH.shape)
    return (), (out_btNH, _heads_back(top_bKg1 + jnp.log(sum_bKg1), (*q_btNH.shape[:3], 1)))


def _blockwise_forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, q_segments_BT: jax.Array, k_segments_BT: jax.Array,
    scale: float, window: int | None,
) -> tuple[jax.Array, Saved]:  # fmt: skip
    # Named here: what is kept by this name is kept for the backward pass below, and no block runs again for it.
    out_BTNH, sum_BTN1 = named(
        _forward(q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BT, scale, window), ATTENTION
    )
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BT, out_BTNH, sum_BTN1)


def _blockwise_backward(
    scale: float, window: int | None, saved: Saved, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_BTNH, k_BTKH, v_BTKH, q_segments_BT, k_segments_BT, out_BTNH, sum_BTN1 = saved
    # What a row of weights and its gradient have in common: sum_s w dw = sum_H out dout.
    shared_BTN1 = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH, axis=-1, keepdims=True)
    of_queries = (q_BTNH * scale, q_segments_BT, dout_BTNH, shared_BTN1, sum_BTN1)
    dqs, dkeys = [], []
    for q, keys in _blocks(of_queries, (k_BTKH, v_BTKH, k_segments_BT), window):
        zeros = (jnp.zeros_like(keys[0]), jnp.zeros_like(keys[1]))
        dkv, dq_btNH = _by_chunks(partial(_attend_backward, keys=keys, window=window), q, zeros)
        dqs.append(dq_btNH)
        dkeys.append(dkv)
    _, back = jax.vjp(lambda k, v: list(zip(_keys(k, window), _keys(v, window), strict=True)), k_BTKH, v_BTKH)
    dq_BTNH = jnp.concatenate(dqs, axis=1).reshape(q_BTNH.shape) * scale
    dk_BTKH, dv_BTKH = back(dkeys)
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _attend_backward(
    q: Queries, keys: Keys, window: int | None
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """((dk, dv), dq) of queries against keys; q is scaled."""
    (q_btNH, q_segments_bt, dout_btNH, shared_btN1, sum_btN1, q_index_1t), (k_bsKH, v_bsKH, k_segments_bs) = q, keys
    bias_bts = _bias(q_index_1t, jnp.arange(k_bsKH.shape[1]), q_segments_bt, k_segments_bs, window)
    q_bKgH, dout_bKgH, shared_bKg1, sum_bKg1 = (
        _heads_lead(x, k_bsKH.shape[2]) for x in (q_btNH, dout_btNH, shared_btN1, sum_btN1)
    )
    k_bKsH, v_bKsH = k_bsKH.swapaxes(1, 2), v_bsKH.swapaxes(1, 2)
    weights_bKgs = jnp.exp(_scores(q_bKgH, k_bKsH, bias_bts) - sum_bKg1)
    dv_bKsH = jnp.einsum("bKgs,bKgH->bKsH", weights_bKgs.astype(dout_bKgH.dtype), dout_bKgH)
    dweights_bKgs = jnp.einsum("bKgH,bKsH->bKgs", dout_bKgH, v_bKsH, preferred_element_type=jnp.float32)
    dscores_bKgs = (weights_bKgs * (dweights_bKgs - shared_bKg1)).astype(q_bKgH.dtype)
    dq_bKgH = jnp.einsum("bKgs,bKsH->bKgH", dscores_bKgs, k_bKsH)
    dk_bKsH = jnp.einsum("bKgs,bKgH->bKsH", dscores_bKgs, q_bKgH)
    return (dk_bKsH.swapaxes(1, 2), dv_bKsH.swapaxes(1, 2)), _heads_back(dq_bKgH, q_btNH.shape)


def _by_chunks(run: Callable[[Queries], tuple[Total, Found]], q: Queries, total: Total) -> tuple[Total, Found]:
    """run(q) -> (what adds up over the queries, what each query has); at most CHUNK queries of a row at a time.

    A loop, and not one chunk after another in the program: XLA would have the scores of all of them live at once.
    """
    tokens = q[0].shape[1]
    if tokens <= CHUNK or tokens % CHUNK:
        return run(q)

    def one(total: Total, chunk: Queries) -> tuple[Total, Found]:
        more, found = run(chunk)
        return jax.tree.map(jnp.add, total, more), found

    chunks = [x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).swapaxes(0, 1) for x in q]
    total, found = jax.lax.scan(one, total, tuple(chunks))
    return total, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], tokens, *x.shape[3:]), found)


def _blocks(of_queries: Queries, of_keys: Keys, window: int | None) -> Iterator[tuple[Queries, Keys]]:
    """Pairs of queries and the keys that they may see; the queries' own index among those keys comes last."""
    queries = zip(*(_queries(x, window) for x in of_queries), strict=True)
    # What stands before the first token gets segment -1, which no query has.
    k, v, segments = of_keys
    keys = zip(_keys(k, window), _keys(v, window), _keys(segments, window, filler=-1), strict=True)
    for q, kvs in zip(queries, keys, strict=True):
        t, s = q[0].shape[1], kvs[0].shape[1]  # the last query of a block stands where its last key does
        yield (*q, jnp.arange(s - t, s)[None]), kvs


def _queries(x: jax.Array, window: int | None) -> list[jax.Array]:
    """[B, T, ...] -> [b, t, ...] of each block. Where there is a band it is one block, of all chunks at once."""
    chunk = _chunk(x.shape[1], window)
    if chunk is not None:
        return [x.reshape(-1, chunk, *x.shape[2:])]
    return [x[:, start:stop] for start, stop, _ in _spans(x.shape[1], window)]


def _keys(x: jax.Array, window: int | None, filler: int = 0) -> list[jax.Array]:
    """[B, T, ...] -> [b, s, ...] of each block; of a band, each chunk with the window before it."""
    B, T, *rest = x.shape
    chunk = _chunk(T, window)
    if chunk is None or window is None:  # no chunk without a window
        return [x[:, first:stop] for _, stop, first in _spans(T, window)]
    C, before = T // chunk, window // chunk
    lead = jnp.full((B, window, *rest), filler, x.dtype)
    x_BCc = jnp.concatenate([lead, x], axis=1).reshape(B, C + before, chunk, *rest)
    both = jnp.concatenate([x_BCc[:, i : i + C] for i in range(before + 1)], axis=2)
    return [both.reshape(B * C, window + chunk, *rest)]


def _spans(tokens: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of the queries and the keys, first key): four spans of whole chunks, and what is left."""
    whole = tokens // CHUNK * CHUNK
    step = CHUNK * max(1, -(-whole // (4 * CHUNK)))
    edges = [*range(0, whole, step), whole, tokens]
    spans = [(start, stop) for start, stop in zip(edges, edges[1:], strict=False) if stop > start]
    return [(start, stop, 0 if window is None else max(0, start + 1 - window)) for start, stop in spans]


def _chunk(tokens: int, window: int | None) -> int | None:
    """The chunk length that makes a query look at the fewest keys, chunk + window; None where all is no more."""
    if window is None:
        return None
    chunks = [window // part for part in (1, 2, 4) if window % part == 0 and tokens % (window // part) == 0]
    chunks = [chunk for chunk in chunks if chunk >= MIN_CHUNK or chunk == window]
    best = min(chunks, default=tokens)
    return best if 4 * (best + window) <= 3 * tokens else None
