"""Attention by a kernel for GPUs (Pallas, by Triton): what no query of a block sees is neither read nor computed.

Causal, within a segment and within a window, a query sees one run of keys: from `first` to itself. And a key is seen
by one run of queries: from itself to `last`. These two numbers of each token are the whole mask, and where loops end.

Shapes as in attention.py; of one block t queries, s keys. Scores are powers of 2, which a GPU has in hardware.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gemma_tpu.gemma.mesh import device_kind
from gemma_tpu.gemma.per_device import on_each_device
from gemma_tpu.gemma.remat import ATTENTION, named

MASKED = -1e30  # finite: where a block has only such scores, what it adds is multiplied by 0 later and is no NaN
LOG2_E = math.log2(math.e)
WHOLE = 128  # rows are whole blocks of every size below

# Queries, keys, warps and stages of the loop, of each kernel, by head dim: the largest whose registers the compiler
# does not spill and whose shared memory there is (`make test-gpu-plans` compiles them for every chip that it knows).
Size = tuple[int, int, int, int]
SMALLER_HEADS: dict[str, Size] = {"forward": (128, 64, 8, 2), "dq": (64, 64, 8, 2), "dkv": (64, 64, 8, 2)}
SIZES = {64: SMALLER_HEADS, 128: SMALLER_HEADS,
         256: {"forward": (64, 32, 8, 2), "dq": (32, 32, 4, 2), "dkv": (32, 32, 8, 2)}}  # fmt: skip
# Hopper and Blackwell have 227 KiB of shared memory for a block, and others 99 or more.
LARGE_SIZES: dict[re.Pattern[str], dict[int, dict[str, Size]]] = {
    re.compile(r"\bG?H\d{2,3}\b"): {256: {"forward": (128, 64, 8, 2), "dq": (64, 64, 8, 2), "dkv": (32, 64, 8, 2)}},
    re.compile(r"\bG?B\d{3}\b"): {256: {"forward": (128, 64, 8, 2), "dq": (64, 64, 8, 2), "dkv": (32, 64, 8, 1)}},
}


# Triton makes code for Ampere and what came after it; of other makers' GPUs nothing is known here.
OTHERS = re.compile(r"AMD|Radeon|gfx\d|\b[KMPV]\d{1,3}\b|\bT4G?\b|\bT\d{3,4}\b|TITAN|GTX|Quadro|RTX 20\d\d")


def fits(tokens: int, head_dim: int, dtype: jax.typing.DTypeLike, kind: str) -> bool:
    """Heads of 512 need more registers and shared memory than there are; float32 would be rounded to TF32."""
    whole = tokens % WHOLE == 0 and head_dim in SIZES
    return whole and dtype == jnp.bfloat16 and not OTHERS.search(kind)


def flash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, *, scale: float,
    window: int | None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Causal attention within segments, and within `window` if there is one; queries and keys are the same tokens."""
    kind = "" if interpret else device_kind()
    return on_each_device(partial(_attend, (scale, window, kind, interpret)), q_BTNH, k_BTKH, v_BTKH, segments_BT)


def runs(segments_BT: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """(the first key that each token sees, the last query that sees it)."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    edge_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.pad(edge_BT, ((0, 0), (1, 0)), constant_values=True)
    ends_BT = jnp.pad(edge_BT, ((0, 0), (0, 1)), constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, index_BT, index_BT.shape[1]), axis=1, reverse=True)
    if window is not None:
        first_BT, last_BT = jnp.maximum(first_BT, index_BT - window + 1), jnp.minimum(last_BT, index_BT + window - 1)
    return first_BT, last_BT


Told = tuple[float, int | None, str, bool]  # scale, window, kind of device, interpret
Saved = tuple[jax.Array, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    told: Told, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    return _attend_forward(told, q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _attend_forward(
    told: Told, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, Saved]:
    B, T, N, _ = q_BTNH.shape
    size, of = _size("forward", told, q_BTNH.shape), _Specs(q_BTNH.shape, k_BTKH.shape)
    first_BT, _ = runs(segments_BT, told[1])
    t = size[0]
    found = _call(
        _forward_kernel, "forward", told, size, (T // t, N, B),
        [of.queries(t), of.keys(), of.keys(), of.tokens(t)], [of.queries(t), of.numbers(t)],
        [q_BTNH, jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
    )(q_BTNH, k_BTKH, v_BTKH, first_BT)  # fmt: skip
    # Named here: what is kept by this name is kept for the backward pass below, and the kernel does not run again.
    out_BTNH, sum_BNT = named(tuple(found), ATTENTION)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, sum_BNT)


def _attend_backward(
    told: Told, saved: Saved, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, sum_BNT = saved
    (B, T, N, _), K = q_BTNH.shape, k_BTKH.shape[2]
    of = _Specs(q_BTNH.shape, k_BTKH.shape)
    first_BT, last_BT = runs(segments_BT, told[1])
    # What a row of weights and its gradient have in common: sum_s w dw = sum_H out dout.
    shared_BNT = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH, axis=-1).swapaxes(1, 2)
    size = _size("dq", told, q_BTNH.shape)
    t = size[0]
    (dq_BTNH,) = _call(
        _dq_kernel, "dq", told, size, (T // t, N, B),
        [of.queries(t), of.keys(), of.keys(), of.queries(t), of.numbers(t), of.numbers(t), of.tokens(t)],
        [of.queries(t)], [q_BTNH],
    )(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, sum_BNT, shared_BNT, first_BT)  # fmt: skip
    size = _size("dkv", told, q_BTNH.shape)
    s = size[1]
    dk_BTKH, dv_BTKH = _call(
        _dkv_kernel, "dkv", told, size, (T // s, K, B),
        [of.group(), of.keys(s), of.keys(s), of.group(), of.group_numbers(), of.group_numbers(), of.tokens(),
         of.tokens(s)], [of.keys(s), of.keys(s)], [k_BTKH, v_BTKH],
    )(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, sum_BNT, shared_BNT, first_BT, last_BT)  # fmt: skip
    return dq_BTNH, dk_BTKH, dv_BTKH, None


_attend.defvjp(_attend_forward, _attend_backward)


def _size(which: str, told: Told, shape: tuple[int, ...]) -> Size:
    large = next((sizes for pattern, sizes in LARGE_SIZES.items() if pattern.search(told[2])), {})
    return large.get(shape[-1], SIZES[shape[-1]])[which]


def _call(
    kernel: Callable[..., None], which: str, told: Told, size: Size, grid: tuple[int, int, int],
    in_specs: list[pl.BlockSpec], out_specs: list[pl.BlockSpec], outs: list[Any],
) -> Callable[..., list[jax.Array]]:  # fmt: skip
    """The name tells those who read the program what the kernel does: `flash_forward_128x64_1024`, with its window."""
    (scale, window, _, interpret), (t, s, warps, stages) = told, size
    made: Callable[..., list[jax.Array]] = pl.pallas_call(
        partial(kernel, scale=scale, size=(t, s)), grid=grid, in_specs=in_specs, out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        name=f"flash_{which}_{t}x{s}" + (f"_{window}" if window else ""), interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    )  # fmt: skip
    return made


class _Specs:
    """What one program of a grid (block, head, row) sees of each array. No number: all tokens."""

    def __init__(self, q_shape: tuple[int, ...], k_shape: tuple[int, ...]):
        (_, self.T, N, self.H), K = q_shape, k_shape[2]
        self.G = N // K

    def queries(self, t: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, t, None, self.H), lambda i, n, b: (b, i, n, 0))

    def numbers(self, t: int) -> pl.BlockSpec:
        """One float of each query of a head."""
        return pl.BlockSpec((None, None, t), lambda i, n, b: (b, n, i))

    def keys(self, s: int | None = None) -> pl.BlockSpec:
        """A block of a key/value head; or all of the one that a query head looks at."""
        if s is None:
            return pl.BlockSpec((None, self.T, None, self.H), lambda i, n, b: (b, 0, n // self.G, 0))
        return pl.BlockSpec((None, s, None, self.H), lambda j, k, b: (b, j, k, 0))

    def group(self) -> pl.BlockSpec:
        """The query heads that look at one key/value head."""
        return pl.BlockSpec((None, self.T, self.G, self.H), lambda j, k, b: (b, 0, k, 0))

    def group_numbers(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.G, self.T), lambda j, k, b: (b, k, 0))

    def tokens(self, t: int | None = None) -> pl.BlockSpec:
        if t is None:
            return pl.BlockSpec((None, self.T), lambda i, n, b: (b, 0))
        return pl.BlockSpec((None, t), lambda i, n, b: (b, i))


# --- the kernels: what one program of the grid does -------------------------------------------------------------


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, out_ref: Any, sum_ref: Any, *, scale: float,
    size: tuple[int, int],
) -> None:  # fmt: skip
    """A block of queries of one head, with the largest score so far and the sum of weights beside the output."""
    t, s = size
    q_tH, first_t = q_ref[...], first_ref[...]
    index_t = pl.program_id(0) * t + jnp.arange(t)

    def one(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out_tH, top_t, sum_t = carry
        at = pl.ds(j * s, s)
        seen_ts = _seen(index_t[:, None], first_t[:, None], (j * s + jnp.arange(s))[None])
        scores_ts = jnp.where(seen_ts, triton.dot(q_tH, k_ref[at, :].T) * (scale * LOG2_E), MASKED)
        new_t = jnp.maximum(top_t, jnp.max(scores_ts, axis=1))
        weights_ts, shrink_t = jnp.exp2(scores_ts - new_t[:, None]), jnp.exp2(top_t - new_t)
        v_sH = v_ref[at, :]
        out_tH = out_tH * shrink_t[:, None] + triton.dot(weights_ts.astype(v_sH.dtype), v_sH)
        return out_tH, new_t, sum_t * shrink_t + jnp.sum(weights_ts, axis=1)

    empty = jnp.zeros(q_tH.shape, jnp.float32), jnp.full((t,), MASKED, jnp.float32), jnp.zeros((t,), jnp.float32)
    out_tH, top_t, sum_t = jax.lax.fori_loop(*_blocks_of_keys(first_t, t, s), one, empty)
    out_ref[...] = (out_tH / sum_t[:, None]).astype(out_ref.dtype)
    sum_ref[...] = top_t + jnp.log2(sum_t)


def _dq_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, sum_ref: Any, shared_ref: Any, first_ref: Any, dq_ref: Any, *,
    scale: float, size: tuple[int, int],
) -> None:  # fmt: skip
    """The same block and the same keys."""
    t, s = size
    q_tH, dout_tH, sum_t, shared_t, first_t = (x[...] for x in (q_ref, dout_ref, sum_ref, shared_ref, first_ref))
    index_t = pl.program_id(0) * t + jnp.arange(t)

    def one(j: jax.Array, dq_tH: jax.Array) -> jax.Array:
        at = pl.ds(j * s, s)
        k_sH = k_ref[at, :]
        seen_ts = _seen(index_t[:, None], first_t[:, None], (j * s + jnp.arange(s))[None])
        scores_ts = triton.dot(q_tH, k_sH.T) * (scale * LOG2_E) - sum_t[:, None]
        weights_ts = jnp.exp2(jnp.where(seen_ts, scores_ts, MASKED))
        dscores_ts = weights_ts * (triton.dot(dout_tH, v_ref[at, :].T) - shared_t[:, None])
        more_tH: jax.Array = triton.dot(dscores_ts.astype(k_sH.dtype), k_sH)
        return dq_tH + more_tH

    zeros = jnp.zeros(q_tH.shape, jnp.float32)
    dq_tH = jax.lax.fori_loop(*_blocks_of_keys(first_t, t, s), one, zeros)
    dq_ref[...] = (dq_tH * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, sum_ref: Any, shared_ref: Any, first_ref: Any, last_ref: Any,
    dk_ref: Any, dv_ref: Any, *, scale: float, size: tuple[int, int],
) -> None:  # fmt: skip
    """A block of keys, over the query heads that look at it and the blocks of queries that see one of them."""
    t, s = size
    k_sH, v_sH = k_ref[...], v_ref[...]
    begin = pl.program_id(0) * s
    index_s = begin + jnp.arange(s)
    lower, upper = jax.lax.div(begin, t), jax.lax.div(jnp.max(last_ref[...]), t) + 1

    def of_head(g: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def one(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dk_sH, dv_sH = carry
            at = pl.ds(i * t, t)
            q_tH, dout_tH = q_ref[at, g, :], dout_ref[at, g, :]
            seen_st = _seen((i * t + jnp.arange(t))[None], first_ref[at][None], index_s[:, None])
            scores_st = triton.dot(k_sH, q_tH.T) * (scale * LOG2_E) - sum_ref[g, at][None]
            weights_st = jnp.exp2(jnp.where(seen_st, scores_st, MASKED))
            dv_sH += triton.dot(weights_st.astype(dout_tH.dtype), dout_tH)
            dscores_st = weights_st * (triton.dot(v_sH, dout_tH.T) - shared_ref[g, at][None])
            return dk_sH + triton.dot(dscores_st.astype(q_tH.dtype), q_tH), dv_sH

        found: tuple[jax.Array, jax.Array] = jax.lax.fori_loop(lower, upper, one, carry)
        return found

    zeros = jnp.zeros(k_sH.shape, jnp.float32)
    dk_sH, dv_sH = jax.lax.fori_loop(0, q_ref.shape[1], of_head, (zeros, zeros))
    dk_ref[...] = (dk_sH * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_sH.astype(dv_ref.dtype)


def _seen(query: jax.Array, first: jax.Array, key: jax.Array) -> jax.Array:
    seen: jax.Array = (key >= first) & (key <= query)
    return seen


def _blocks_of_keys(first_t: jax.Array, t: int, s: int) -> tuple[jax.Array, jax.Array]:
    """(the first block of keys that one of these queries sees, the end of them)."""
    end = (pl.program_id(0) + 1) * t
    return jax.lax.div(jnp.min(first_t), s), jax.lax.div(end + s - 1, s)
