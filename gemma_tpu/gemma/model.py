"""The decoder: Flax NNX modules whose variables carry a leading axis, one entry for each repeat of their period.

Layers that repeat are stacked and scanned: 60 layers compile like 6. What trains goes through the scan as its
input, so that gradients come back stacked; what is frozen is closed over and indexed inside the checkpointed layer,
or the scan would keep a copy of every frozen weight for the backward pass.

Letters: B rows, T tokens, R repeats, D hidden, N query heads, K KV heads, H head dim, F mlp, V vocab, C = 2.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from gemma_tpu.gemma import kv_cache
from gemma_tpu.gemma.attention import against_cache, attention
from gemma_tpu.gemma.experts import Mixture
from gemma_tpu.gemma.kv_cache import Number, Pair, Parts, Rings
from gemma_tpu.gemma.mesh import constrain, platform
from gemma_tpu.gemma.projection import Base, LoRA, Projection, shaped
from gemma_tpu.gemma.remat import Remat, named, rematerialise
from gemma_tpu.gemma.variants import Architecture, Block, Layer, Rope

MOST_UNROLLED = 8  # repeats of a period, where layers are unrolled at all

Shared = dict[str, Pair]  # by layer kind, the keys and values that later layers take over
Carry = tuple[jax.Array, Shared]  # x_BTD, and those
Past = Callable[[int, Number], Pair]  # (slot of the period, repeat): what a cache holds for that layer
State = nnx.State[Any, Any]  # a layer's variables by their paths: of all its repeats, or of one
Slots = tuple[Parts, ...]  # of one block, as `Rings` have it


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    segments_BT: jax.Array | None  # None for a step against the cache
    positions_BT: jax.Array
    biases: Mapping[int | None, jax.Array] | None = None  # of the slots of the cache, by window


class Norm(nnx.Module):
    """RMS norm in float32, times a weight (to which Gemma 3 adds one)."""

    def __init__(self, arch: Architecture, size: int, repeats: int | None, dtype: jnp.dtype):
        if repeats is None:
            self.w = shaped(Base, (size,), dtype, (None,))
        else:
            self.w = shaped(Base, (repeats, size), dtype, ("layers", None))
        self.eps, self.offset = arch.eps, arch.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        return (rms(x, self.eps) * (self.offset + self.w[...].astype(jnp.float32))).astype(x.dtype)


def rms(x: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    """Rotary embedding, halves layout; with `partial` < 1 the last pairs have frequency zero and stay."""
    half = x_BTNH.shape[-1] // 2
    turning = int(rope.partial * half)
    inverse = rope.theta ** (-jnp.arange(turning, dtype=jnp.float32) / half) / rope.factor
    inverse = jnp.concatenate([inverse, jnp.zeros(half - turning, jnp.float32)])
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


class Attention(nnx.Module):
    def __init__(self, arch: Architecture, layer: Layer, repeats: int, dtype: jnp.dtype):
        D, N, K, H = arch.hidden, arch.heads, layer.kv_heads, layer.head_dim
        self.layer, self.eps, self.scale, self.has_v_norm = layer, arch.eps, arch.query_scale, arch.v_norm
        self.q_proj = Projection("q_proj", "BTD,NHD->BTNH", (N, H, D), ("heads", None, "embed"), repeats, dtype)
        if layer.kv_shared:
            pass  # its keys and values come from an earlier layer
        elif layer.k_eq_v:
            self.k_einsum = Projection("k_einsum", "BTD,KHD->BTKH", (K, H, D), ("kv_heads", None, "embed"), repeats,
                                       dtype)  # fmt: skip
        else:
            self.kv_einsum = Projection("kv_einsum", "BTD,CKHD->BTCKH", (2, K, H, D),
                                        (None, "kv_heads", None, "embed"), repeats, dtype)  # fmt: skip
        self.o_proj = Projection("o_proj", "BTNH,DNH->BTD", (D, N, H), ("embed", "heads", None), repeats, dtype)
        self.q_norm = Norm(arch, H, repeats, dtype)
        if not layer.kv_shared:
            self.k_norm = Norm(arch, H, repeats, dtype)

    def __call__(
        self, x_BTD: jax.Array, ctx: Context, key: jax.Array | None, kv: Pair | None, past: Pair | None
    ) -> tuple[jax.Array, Pair]:
        """(output, the keys and values it used). `kv` are those of an earlier layer, for a layer that shares them;
        `past` is what a cache holds of the tokens before."""
        # Kept by name as the projections give them: the norms need that again, and the rest is cheap.
        q_BTNH = named(constrain(self.q_proj(x_BTD, key), "batch", None, "act_heads", None), "q")
        q_BTNH = rotate(self.q_norm(q_BTNH), ctx.positions_BT, self.layer.rope)
        if not self.layer.kv_shared:
            kv = self._keys_values(x_BTD, ctx, key)
        assert kv is not None, "a layer that shares keys and values comes after one of its kind that has some"
        if past is not None:
            assert ctx.biases is not None, "a step against a cache knows the biases of its slots"
            out_BTNH = against_cache(q_BTNH, *kv, *past, ctx.biases[self.layer.window], self.scale)
        else:
            assert ctx.segments_BT is not None, "without a cache, tokens see those of their own segment"
            out_BTNH = attention(
                q_BTNH, *kv, ctx.segments_BT, ctx.segments_BT, scale=self.scale, window=self.layer.window
            )
        return named(self.o_proj(out_BTNH, key), "o"), kv

    def _keys_values(self, x_BTD: jax.Array, ctx: Context, key: jax.Array | None) -> Pair:
        if self.layer.k_eq_v:
            k_BTKH = v_BTKH = _kept(self.k_einsum(x_BTD, key), "k")
        else:
            kv_BTCKH = self.kv_einsum(x_BTD, key)
            k_BTKH, v_BTKH = _kept(kv_BTCKH[:, :, 0], "k"), _kept(kv_BTCKH[:, :, 1], "v")
        k_BTKH = rotate(self.k_norm(k_BTKH), ctx.positions_BT, self.layer.rope)
        if self.has_v_norm:
            v_BTKH = rms(v_BTKH, self.eps).astype(x_BTD.dtype)  # scale-free
        return k_BTKH, v_BTKH


def _kept(x_BTKH: jax.Array, name: str) -> jax.Array:
    return named(constrain(x_BTKH, "batch", None, "act_kv_heads", None), name)


class MLP(nnx.Module):
    def __init__(self, arch: Architecture, layer: Layer, repeats: int, dtype: jnp.dtype):
        D, F = arch.hidden, layer.mlp
        self.gate_proj = Projection("gate_proj", "BTD,FD->BTF", (F, D), ("mlp", "embed"), repeats, dtype)
        self.up_proj = Projection("up_proj", "BTD,FD->BTF", (F, D), ("mlp", "embed"), repeats, dtype)
        self.down_proj = Projection("down_proj", "BTF,DF->BTD", (D, F), ("embed", "mlp"), repeats, dtype)

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        gate_BTF = named(constrain(self.gate_proj(x_BTD, key), "batch", None, "act_mlp"), "gate")
        up_BTF = named(constrain(self.up_proj(x_BTD, key), "batch", None, "act_mlp"), "up")
        mid_BTF = jax.nn.gelu(gate_BTF, approximate=True) * up_BTF
        return named(self.down_proj(mid_BTF, key), "down")


class DecoderLayer(nnx.Module):
    def __init__(self, arch: Architecture, layer: Layer, repeats: int, dtype: jnp.dtype):
        D, norm = arch.hidden, partial(Norm, arch, arch.hidden, repeats, dtype)
        self.attention = Attention(arch, layer, repeats, dtype)
        self.mlp = MLP(arch, layer, repeats, dtype)
        self.input_norm, self.post_attention_norm = norm(), norm()
        self.pre_mlp_norm, self.post_mlp_norm = norm(), norm()
        self.has_experts, self.has_per_layer_input = layer.experts is not None, arch.per_layer_input > 0
        self.has_scalar = arch.layer_scalar
        if layer.experts is not None:
            self.experts = Mixture(arch, layer.experts, repeats, dtype)
            self.dense_norm, self.pre_experts_norm, self.post_experts_norm = norm(), norm(), norm()
        if self.has_per_layer_input:
            P = arch.per_layer_input
            self.per_layer_gate = Projection("per_layer_input_gate", "BTD,PD->BTP", (P, D), (None, "embed"), repeats,
                                             dtype)  # fmt: skip
            self.per_layer_projection = Projection("per_layer_projection", "BTP,DP->BTD", (D, P), ("embed", None),
                                                   repeats, dtype)  # fmt: skip
            self.post_per_layer_norm = norm()
        if self.has_scalar:
            self.layer_scalar = shaped(Base, (repeats, 1), dtype, ("layers", None))

    def __call__(
        self, x_BTD: jax.Array, ctx: Context, key: jax.Array | None, kv: Pair | None, past: Pair | None,
        per_layer_BTP: jax.Array | None,
    ) -> tuple[jax.Array, Pair]:  # fmt: skip
        out_BTD, kv = self.attention(self.input_norm(x_BTD), ctx, key, kv, past)
        x_BTD = x_BTD + self.post_attention_norm(out_BTD)
        out_BTD = self.mlp(self.pre_mlp_norm(x_BTD), key)
        if self.has_experts:
            mixed_BTD = self.experts(x_BTD, self.pre_experts_norm(x_BTD), key)
            out_BTD = self.dense_norm(out_BTD) + self.post_experts_norm(mixed_BTD)
        x_BTD = x_BTD + self.post_mlp_norm(out_BTD)
        if self.has_per_layer_input:
            assert per_layer_BTP is not None, "the decoder makes the per-layer inputs of such a model"
            gate_BTP = jax.nn.gelu(self.per_layer_gate(x_BTD, key), approximate=True) * per_layer_BTP
            x_BTD = x_BTD + self.post_per_layer_norm(self.per_layer_projection(gate_BTP, key))
        if self.has_scalar:
            x_BTD = x_BTD * self.layer_scalar[...]
        return constrain(x_BTD, "batch", "seq", None), kv


class Embedding(nnx.Module):
    """Tied input embedding and output head."""

    def __init__(self, arch: Architecture, dtype: jnp.dtype):
        self.w = shaped(Base, (arch.vocab, arch.hidden), dtype, ("vocab", None))
        self.hidden = arch.hidden

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        w_VD = self.w[...]
        return w_VD[tokens_BT] * jnp.asarray(self.hidden**0.5, w_VD.dtype)  # the reference rounds the factor too


class PerLayerEmbedding(nnx.Module):
    """A small second input for each layer: of the token itself, and of its embedding. L layers of width P.

    The table keeps the checkpoint's two dims: with L and P apart a TPU pads L, and copies 5 GiB of E2B's every step.
    """

    def __init__(self, arch: Architecture, dtype: jnp.dtype):
        L, P, D = len(arch.layers), arch.per_layer_input, arch.hidden
        self.w = shaped(Base, (arch.per_layer_vocab, L * P), dtype, ("per_layer_vocab", None))
        self.projection = shaped(Base, (L, P, D), dtype, (None, None, "embed"))
        self.norm = Norm(arch, P, None, dtype)
        self.token_scale, self.root = P**0.5, D**-0.5

    def __call__(self, tokens_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
        w_VP = self.w[...]
        context_BTLP = jnp.einsum("BTD,LPD->BTLP", x_BTD, self.projection[...]) * jnp.asarray(self.root, x_BTD.dtype)
        token_BTLP = (w_VP[tokens_BT] * jnp.asarray(self.token_scale, w_VP.dtype)).reshape(context_BTLP.shape)
        return (self.norm(context_BTLP) + token_BTLP) * jnp.asarray(2.0**-0.5, x_BTD.dtype)


class Objective(Protocol):
    """What training makes small: a sum over a micro-batch [B, T], and what all micro-batches' sum is divided by."""

    def __call__(
        self, model: "Decoder", batch: dict[str, jax.Array], key: jax.Array | None, remat: Remat
    ) -> jax.Array: ...
    def weight(self, batch: dict[str, jax.Array]) -> jax.Array: ...


class Decoder(nnx.Module):
    """Call it on tokens for float32 logits; `hidden` stops before the head, for a loss that never holds them."""

    def __init__(self, arch: Architecture, dtype: jnp.dtype = jnp.bfloat16):
        self.arch = arch
        self.embed = Embedding(arch, dtype)
        if arch.per_layer_input:
            self.embed_per_layer = PerLayerEmbedding(arch, dtype)
        self.blocks = nnx.List([
            nnx.List([DecoderLayer(arch, layer, block.repeats, dtype) for layer in block.period])
            for block in arch.blocks
        ])
        self.final_norm = Norm(arch, arch.hidden, None, dtype)
        self.trains: type[nnx.Variable[jax.Array]] = LoRA  # what goes through the scan as input
        self.objective: Objective | None = None  # what it trains for; None: the cross entropy of every target

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed.w[...].dtype

    def __call__(
        self, tokens_BT: ArrayLike, segment_ids_BT: ArrayLike | None = None, positions_BT: jax.Array | None = None
    ) -> jax.Array:
        return self.logits(self.hidden(tokens_BT, segment_ids_BT, positions_BT))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, self.embed.w[...], preferred_element_type=jnp.float32)
        return softcap(logits_BTV, self.arch.logit_softcap)

    def hidden(
        self, tokens_BT: ArrayLike, segment_ids_BT: ArrayLike | None = None, positions_BT: jax.Array | None = None,
        *, key: jax.Array | None = None, remat: Remat = "none",
    ) -> jax.Array:  # fmt: skip
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        segment_ids_BT = jnp.asarray(segment_ids_BT, jnp.int32)
        if positions_BT is None:
            positions_BT = restart_positions(segment_ids_BT)
        return self._run(tokens_BT, Context(segment_ids_BT, positions_BT), _Pass(key, remat, self.trains))[0]

    def prefill(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, Rings]:
        """Like `hidden`, and the keys and values of every layer that has its own, [R, B, T, K, H], as `Rings` lie."""
        ctx = Context(segment_ids_BT, restart_positions(segment_ids_BT))
        return self._run(tokens_BT, ctx, _Pass(None, "none", self.trains, keep=True))

    def step(
        self, tokens_B: jax.Array, last_B: jax.Array, clock: jax.Array, rings: Rings, capacity: int
    ) -> tuple[jax.Array, Rings]:
        """One token more in every row, the row's number `last_B`: (x_BD, rings). See `kv_cache` for the clock."""
        ctx = Context(None, last_B[:, None], kv_cache.biases(self.arch, capacity, clock, last_B))
        x_B1D, new = self._run(tokens_B[:, None], ctx, _Pass(None, "none", self.trains, keep=True), rings)
        # The slot is made to wait for the result: XLA copies a whole ring that may still be read when it is written.
        after = clock + jnp.isnan(x_B1D[0, 0, 0]).astype(clock.dtype)
        return x_B1D[:, 0], kv_cache.put(rings, new, after)

    def _run(
        self, tokens_BT: jax.Array, ctx: Context, how: "_Pass", rings: Rings | None = None
    ) -> tuple[jax.Array, Rings]:
        """(x_BTD, the keys and values that `how` keeps: without it, of no layer)"""
        x_BTD = constrain(self.embed(tokens_BT), "batch", "seq", None)
        per_layer_BTLP = self.embed_per_layer(tokens_BT, x_BTD) if self.arch.per_layer_input else None
        shared = _no_keys_yet(self.arch, tokens_BT.shape, x_BTD.dtype) if self.arch.shares_kv else {}
        kept: list[Slots] = []
        for number, (block, layers) in enumerate(zip(self.arch.blocks, self.blocks, strict=True)):
            part = None if per_layer_BTLP is None else _of_block(block, per_layer_BTLP)
            past = None if rings is None else partial(kv_cache.past, self.arch, rings, number)
            apart = rings is not None and kv_cache.apart(rings, number)
            (x_BTD, shared), kv = _run_block(block, layers, (x_BTD, shared), ctx, how, part, past, apart)
            kept.append(kv)
        return self.final_norm(x_BTD), tuple(kept)


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def restart_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """0, 1, 2 … from the first token of each segment."""
    index_T = jnp.arange(segment_ids_BT.shape[1])
    starts_BT = jnp.concatenate(
        [jnp.ones_like(segment_ids_BT[:, :1], bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1
    )
    return index_T - jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)


@dataclass(frozen=True)
class _Pass:
    """How one forward pass runs: the dropout key, what is recomputed, which variables train, and whether it gives
    the keys and values too."""

    key: jax.Array | None
    remat: Remat
    trains: type[nnx.Variable[jax.Array]]
    keep: bool = False


def _no_keys_yet(arch: Architecture, shape: tuple[int, ...], dtype: jnp.dtype) -> Shared:
    """Stand-ins for the keys and values that later layers take over; each kind's own layers replace them."""
    own = {layer.kind: (*shape, layer.kv_heads, layer.head_dim) for layer in arch.layers if not layer.kv_shared}
    return {kind: (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for kind, shape in own.items()}


def _of_block(block: Block, per_layer_BTLP: jax.Array) -> jax.Array:
    """The block's part of the per-layer inputs, as the scan wants it: [repeats, slots, B, T, P]."""
    slots, count = len(block.period), len(block.period) * block.repeats
    part_LBTP = jnp.moveaxis(per_layer_BTLP[:, :, block.first : block.first + count], 2, 0)
    return part_LBTP.reshape(block.repeats, slots, *part_LBTP.shape[1:])


def _run_block(
    block: Block, layers: Iterable[DecoderLayer], carry: Carry, ctx: Context, how: _Pass, per_layer: jax.Array | None,
    past: Past | None, apart: bool,
) -> tuple[Carry, Slots]:  # fmt: skip
    """Scan one period's layers over its repeats. Repeats whose caches stand apart go one after another in the
    program."""
    split = [nnx.split(layer, how.trains, ...) for layer in layers]
    trained = [part[1] for part in split]

    def one_layer(
        slot: int, repeat: Number, x_BTD: jax.Array, trained_layer: State, kv: Pair | None,
        per_layer_BTP: jax.Array | None,
    ) -> tuple[jax.Array, Pair]:  # fmt: skip
        graph, _, *rest = split[slot]
        (frozen,) = rest
        at = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, repeat, keepdims=False), frozen)
        layer: DecoderLayer = nnx.merge(graph, trained_layer, at)
        number = block.first + repeat * len(block.period) + slot
        key = None if how.key is None else jax.random.fold_in(how.key, number)
        return layer(x_BTD, ctx, key, kv, None if past is None else past(slot, repeat), per_layer_BTP)

    def one_period(
        carry: Carry, xs: tuple[Number, list[State], jax.Array | None]
    ) -> tuple[Carry, tuple[Pair | None, ...]]:
        (x_BTD, shared), (repeat, trained_now, per_layer_now) = carry, xs
        kept: list[Pair | None] = []
        for slot, layer in enumerate(block.period):
            run = rematerialise(partial(one_layer, slot), how.remat)
            x_BTD, kv = run(
                repeat, x_BTD, trained_now[slot], shared.get(layer.kind),
                None if per_layer_now is None else per_layer_now[slot],
            )  # fmt: skip
            shared = {**shared, layer.kind: kv} if shared else shared
            kept.append(kv if how.keep and not layer.kv_shared else None)
        return (x_BTD, shared), tuple(kept)

    if apart:
        found = []
        for repeat in range(block.repeats):
            trained_now, per_layer_now = jax.tree.map(operator.itemgetter(repeat), (trained, per_layer))
            carry, pairs = one_period(carry, (repeat, trained_now, per_layer_now))
            found.append(pairs)
        by_slot = zip(*found, strict=True)
        return carry, tuple(tuple(_lead(pair) for pair in each if pair is not None) or None for each in by_slot)

    # Elsewhere a loop compiles faster and holds less; a CPU pays for its stacks of activations with copies of them.
    unroll = platform() == "cpu" and block.repeats <= MOST_UNROLLED
    carry, kept = jax.lax.scan(one_period, carry, (jnp.arange(block.repeats), trained, per_layer), unroll=unroll)
    return carry, tuple(None if pair is None else (pair,) for pair in kept)


def _lead(pair: Pair) -> Pair:
    k, v = pair
    return k[None], v[None]
