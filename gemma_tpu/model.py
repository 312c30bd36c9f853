"""The decoder: Flax NNX modules whose variables carry a leading axis, one entry for each repeat of their period.

Layers that repeat are stacked and scanned: 60 layers compile like 6. What trains goes through the scan as its
input, so that gradients come back stacked; what is frozen is closed over and indexed inside the checkpointed layer,
or the scan would keep a copy of every frozen weight for the backward pass.

Letters: B rows, T tokens, S cache slots, D hidden, N query heads, K KV heads, H head dim, F mlp, V vocab, C = 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma_tpu.attention import attention
from gemma_tpu.mesh import constrain
from gemma_tpu.projection import Base, LoRA, Projection
from gemma_tpu.variants import Architecture, Block, Layer, Rope

Remat = str | Sequence[str]  # "none", "full", or the names of the activations to keep
ACTIVATIONS = ("q", "k", "v", "attention", "o", "gate", "up", "down", "lora_h")


@dataclass(frozen=True)
class Cache:
    """Keys and values of every block and slot, [repeats, B, S, K, H], and which cache slots hold a token."""

    kv: tuple[tuple[tuple[jax.Array, jax.Array], ...], ...]
    segments_BS: jax.Array


jax.tree_util.register_dataclass(Cache, ["kv", "segments_BS"], [])


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    segments_BT: jax.Array
    positions_BT: jax.Array
    k_segments_BS: jax.Array
    index_BT: jax.Array | None  # where the tokens stand in the cache; None without a cache


class Norm(nnx.Module):
    """RMS norm in float32, times a weight."""

    def __init__(self, size: int, axis: str | None, eps: float, repeats: int | None, dtype: jnp.dtype):
        lead, axes = ((), (axis,)) if repeats is None else ((repeats,), ("layers", axis))
        self.w = Base(jax.ShapeDtypeStruct((*lead, size), dtype), axes=axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return (rms(x, self.eps) * self.w[...].astype(jnp.float32)).astype(x.dtype)


def rms(x: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    """Rotary embedding, halves layout; with `partial` < 1 the last pairs have frequency zero and stay."""
    half = x_BTNH.shape[-1] // 2
    turning = int(rope.partial * half)
    inverse = rope.theta ** (-jnp.arange(turning, dtype=jnp.float32) / half)
    inverse = jnp.concatenate([inverse, jnp.zeros(half - turning, jnp.float32)])
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


class Attention(nnx.Module):
    def __init__(self, arch: Architecture, layer: Layer, repeats: int, dtype: jnp.dtype):
        D, N, K, H = arch.hidden, arch.heads, layer.kv_heads, layer.head_dim
        self.layer, self.eps = layer, arch.eps
        self.q_proj = Projection("q_proj", "BTD,NHD->BTNH", (N, H, D), ("heads", None, "embed"), repeats, dtype)
        if layer.k_eq_v:
            self.k_einsum = Projection("k_einsum", "BTD,KHD->BTKH", (K, H, D), ("kv_heads", None, "embed"), repeats,
                                       dtype)  # fmt: skip
        else:
            self.kv_einsum = Projection("kv_einsum", "BTD,CKHD->BTCKH", (2, K, H, D),
                                        (None, "kv_heads", None, "embed"), repeats, dtype)  # fmt: skip
        self.o_proj = Projection("o_proj", "BTNH,DNH->BTD", (D, N, H), ("embed", "heads", None), repeats, dtype)
        self.q_norm = Norm(H, None, arch.eps, repeats, dtype)
        self.k_norm = Norm(H, None, arch.eps, repeats, dtype)

    def __call__(self, x_BTD, ctx: Context, key, kv=None):
        q_BTNH = self.q_norm(self.q_proj(x_BTD, key))
        q_BTNH = rotate(q_BTNH, ctx.positions_BT, self.layer.rope)
        k_BTKH, v_BTKH = self._keys_values(x_BTD, key)
        k_BTKH = rotate(self.k_norm(k_BTKH), ctx.positions_BT, self.layer.rope)
        v_BTKH = rms(v_BTKH, self.eps).astype(x_BTD.dtype)  # scale-free
        q_BTNH = checkpoint_name(constrain(q_BTNH, "batch", None, "act_heads", None), "q")
        k_BTKH = checkpoint_name(constrain(k_BTKH, "batch", None, "act_kv_heads", None), "k")
        v_BTKH = checkpoint_name(constrain(v_BTKH, "batch", None, "act_kv_heads", None), "v")
        if kv is not None:
            k_BTKH, v_BTKH = kv = tuple(_put(old, new, ctx.index_BT) for old, new in zip(kv, (k_BTKH, v_BTKH),
                                                                                        strict=True))  # fmt: skip
        out_BTNH = attention(
            q_BTNH, k_BTKH, v_BTKH, ctx.segments_BT, ctx.k_segments_BS,
            scale=1.0, window=self.layer.window, q_index_BT=ctx.index_BT,
        )  # fmt: skip
        out_BTNH = checkpoint_name(out_BTNH, "attention")
        return checkpoint_name(self.o_proj(out_BTNH, key), "o"), kv

    def _keys_values(self, x_BTD, key):
        if self.layer.k_eq_v:
            k_BTKH = self.k_einsum(x_BTD, key)
            return k_BTKH, k_BTKH
        kv_BTCKH = self.kv_einsum(x_BTD, key)
        return kv_BTCKH[:, :, 0], kv_BTCKH[:, :, 1]


def _put(cache_BSKH, new_BTKH, index_BT):
    rows_B1 = jnp.arange(cache_BSKH.shape[0])[:, None]
    return cache_BSKH.at[rows_B1, index_BT].set(new_BTKH.astype(cache_BSKH.dtype))


class MLP(nnx.Module):
    def __init__(self, arch: Architecture, layer: Layer, repeats: int, dtype: jnp.dtype):
        D, F = arch.hidden, layer.mlp
        self.gate_proj = Projection("gate_proj", "BTD,FD->BTF", (F, D), ("mlp", "embed"), repeats, dtype)
        self.up_proj = Projection("up_proj", "BTD,FD->BTF", (F, D), ("mlp", "embed"), repeats, dtype)
        self.down_proj = Projection("down_proj", "BTF,DF->BTD", (D, F), ("embed", "mlp"), repeats, dtype)

    def __call__(self, x_BTD, key):
        gate_BTF = checkpoint_name(constrain(self.gate_proj(x_BTD, key), "batch", None, "act_mlp"), "gate")
        up_BTF = checkpoint_name(constrain(self.up_proj(x_BTD, key), "batch", None, "act_mlp"), "up")
        return checkpoint_name(self.down_proj(jax.nn.gelu(gate_BTF, approximate=True) * up_BTF, key), "down")


class DecoderLayer(nnx.Module):
    def __init__(self, arch: Architecture, layer: Layer, repeats: int, dtype: jnp.dtype):
        self.attention = Attention(arch, layer, repeats, dtype)
        self.mlp = MLP(arch, layer, repeats, dtype)
        for name in ("input_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm"):
            setattr(self, name, Norm(arch.hidden, "norm", arch.eps, repeats, dtype))
        self.layer_scalar = Base(jax.ShapeDtypeStruct((repeats, 1), dtype), axes=("layers", None))

    def __call__(self, x_BTD, ctx: Context, key, kv=None):
        out_BTD, kv = self.attention(self.input_norm(x_BTD), ctx, key, kv)
        x_BTD = x_BTD + self.post_attention_norm(out_BTD)
        x_BTD = x_BTD + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x_BTD), key))
        return constrain(x_BTD * self.layer_scalar[...], "batch", "seq", None), kv


class Embedding(nnx.Module):
    """Tied input embedding and output head."""

    def __init__(self, arch: Architecture, dtype: jnp.dtype):
        self.w = Base(jax.ShapeDtypeStruct((arch.vocab, arch.hidden), dtype), axes=("vocab", "embed"))
        self.hidden = arch.hidden

    def __call__(self, tokens_BT):
        w_VD = self.w[...]
        return w_VD[tokens_BT] * jnp.asarray(self.hidden**0.5, w_VD.dtype)  # the reference rounds the factor too


class Decoder(nnx.Module):
    """Call it on tokens for float32 logits; `hidden` stops before the head, for a loss that never holds them."""

    def __init__(self, arch: Architecture, dtype: jnp.dtype = jnp.bfloat16):
        self.arch = arch
        self.embed = Embedding(arch, dtype)
        self.blocks = nnx.List([
            nnx.List([DecoderLayer(arch, layer, block.repeats, dtype) for layer in block.period])
            for block in arch.blocks
        ])
        self.final_norm = Norm(arch.hidden, "norm", arch.eps, None, dtype)
        self.trains: type[nnx.Variable] = LoRA  # what goes through the scan as input

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed.w[...].dtype

    def __call__(self, tokens_BT, segment_ids_BT=None, positions_BT=None):
        return self.logits(self.hidden(tokens_BT, segment_ids_BT, positions_BT))

    def logits(self, x_BTD):
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, self.embed.w[...], preferred_element_type=jnp.float32)
        return softcap(logits_BTV, self.arch.logit_softcap)

    def hidden(self, tokens_BT, segment_ids_BT=None, positions_BT=None, *, key=None, remat: Remat = "none"):
        tokens_BT = jnp.asarray(tokens_BT)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        if positions_BT is None:
            positions_BT = restart_positions(segment_ids_BT)
        ctx = Context(segment_ids_BT, positions_BT, segment_ids_BT, None)
        x_BTD = constrain(self.embed(tokens_BT), "batch", "seq", None)
        for block, layers in zip(self.arch.blocks, self.blocks, strict=True):
            x_BTD, _ = _run_block(block, layers, x_BTD, ctx, key, remat, self.trains, None)
        return self.final_norm(x_BTD)

    def with_cache(self, tokens_BT, segment_ids_BT, index_BT, cache: Cache):
        """Like `hidden`, with the tokens written to the cache at `index_BT`; returns (x_BTD, cache)."""
        rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
        segments_BS = cache.segments_BS.at[rows_B1, index_BT].set(segment_ids_BT)
        ctx = Context(segment_ids_BT, index_BT, segments_BS, index_BT)
        x_BTD, kv = self.embed(tokens_BT), []
        for block, layers, old in zip(self.arch.blocks, self.blocks, cache.kv, strict=True):
            x_BTD, new = _run_block(block, layers, x_BTD, ctx, None, "none", self.trains, old)
            kv.append(new)
        return self.final_norm(x_BTD), Cache(tuple(kv), segments_BS)

    def empty_cache(self, rows: int, slots: int) -> Cache:
        def pair(block: Block, layer: Layer):
            shape = (block.repeats, rows, slots, layer.kv_heads, layer.head_dim)
            return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

        kv = tuple(tuple(pair(block, layer) for layer in block.period) for block in self.arch.blocks)
        return Cache(kv, jnp.zeros((rows, slots), jnp.int32))


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def restart_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """0, 1, 2 … from the first token of each segment."""
    index_T = jnp.arange(segment_ids_BT.shape[1])
    starts_BT = jnp.concatenate(
        [jnp.ones_like(segment_ids_BT[:, :1], bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1
    )
    return index_T - jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)


def _run_block(block: Block, layers, x_BTD, ctx: Context, key, remat: Remat, trains, kv):
    """Scan one period's layers over its repeats. `kv` is the block's part of the cache, or None."""
    split = [nnx.split(layer, trains, ...) for layer in layers]
    trained = [part[1] for part in split]

    def one_layer(slot, repeat, x_BTD, trained_layer, kv_layer):
        graph, _, frozen = split[slot]
        at = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, repeat, keepdims=False), frozen)
        layer = nnx.merge(graph, trained_layer, at)
        number = block.first + repeat * len(block.period) + slot
        layer_key = None if key is None else jax.random.fold_in(key, number)
        return layer(x_BTD, ctx, layer_key, kv_layer)

    def one_period(x_BTD, xs):
        repeat, trained_now, kv_now = xs
        kv_next = []
        for slot in range(len(block.period)):
            run = _rematerialise(lambda *a, slot=slot: one_layer(slot, *a), remat)
            x_BTD, kv_layer = run(repeat, x_BTD, trained_now[slot], None if kv_now is None else kv_now[slot])
            kv_next.append(kv_layer)
        return x_BTD, None if kv_now is None else tuple(kv_next)

    return jax.lax.scan(one_period, x_BTD, (jnp.arange(block.repeats), trained, kv))


def _rematerialise(run, remat: Remat):
    if remat == "none":
        return run
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat == "full" else policies.save_only_these_names(*remat)
    return jax.checkpoint(run, policy=policy, prevent_cse=False)
