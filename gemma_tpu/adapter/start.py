"""How what trains starts: A random and B zero, or both from the base's largest singular values; magnitudes as norms.
Or all of them from an adapter that is there.

PiSSA's start is what the base would lose to the adapter. It is kept beside A and B and taken off the product, so the
base stays as it was read: nothing of it is rounded again, and the first forward pass is the base's own.

Letters: O out and I in features of one weight, R the rank of its stack.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gemma_tpu.adapter import lora, peft_folder
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.sites import Site, sites
from gemma_tpu.schema import LoraConfig
from gemma_tpu.storage.shards import Checkpoint

EXACT = 1024  # widths up to this: a full SVD; above it 16 rounds of subspace iteration, as PEFT's pissa_niter_16
ROUNDS, MORE = 16, 8

Parts = dict[str, jax.Array]  # of one weight, as `Linear.parts` has them


def begin(model: Decoder, section: LoraConfig, seed: int, shardings: Mapping[str, NamedSharding],
          base: Checkpoint | None = None) -> list[str]:
    """Give every adapter of a model whose base is loaded its first values; tells what an adapter that it goes on from
    has given. `base`: the checkpoint that this adapter is of."""
    if section.init_from is not None:
        if base is None:
            raise UserError("lora.init_from: this recipe does not say which base the adapter is of")
        values, notes = taken_up(model, section.init_from, section.dora, seed, base)
        loading.assign(model, loading.put(values | lora.constants(model), shardings))
        return notes
    loading.assign(model, loading.put(lora.initial(model, seed) | lora.constants(model), shardings))
    for site in sites(model):
        one = site.projection
        if one.lora_magnitude is not None:
            name = f"{site.path}.lora_magnitude"
            loading.assign(model, {name: _norms(site, shardings[name])})
        if section.init == "pissa" and (adapter := one.adapter) is not None:
            a, b = adapter
            loading.assign(model, _singular(site, a.shape, b.shape, shardings))
    return []


def taken_up(model: Decoder, folder: str, dora: bool, seed: int,
             base: Checkpoint) -> tuple[dict[str, np.ndarray], list[str]]:  # fmt: skip
    """(the values of an adapter's folder in this model's adapters, what is new in them)"""
    adapter = peft_folder.read(folder, base, model.arch)
    return peft_folder.onto(adapter, model.arch, lora.initial(model, seed), lora.layout(model), dora)


def _norms(site: Site, sharding: NamedSharding) -> jax.Array:
    out = len(site.b_shape(1)) - 1

    def norms(parts: Parts) -> jax.Array:
        w = site.projection.decoded(parts, jnp.float32).astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(w), axis=range(out, w.ndim)))

    found: jax.Array = jax.jit(norms, out_shardings=sharding)(site.projection.parts())
    return found


def _singular(
    site: Site, a_shape: tuple[int, ...], b_shape: tuple[int, ...], shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """A = sqrt(S / scale) V^T and B = U sqrt(S / scale) of each weight W = U S V^T, in the first ranks of each."""
    one, path = site.projection, site.path
    scales = np.broadcast_to(np.asarray(one.lora_scale, np.float32).reshape(-1), len(one.lora_ranks))
    stack = site.b_dims[len(site.lead) :]  # the experts: all of one scale
    scales, ranks = (np.asarray(x).reshape(site.lead + (1,) * len(stack)) for x in (scales, one.lora_ranks))
    scales, ranks = (np.broadcast_to(x, site.b_dims) for x in (scales, ranks))
    run = jax.jit(
        partial(_of_stack, decoded=one.decoded, dims=site.b_dims, rank=max(one.lora_ranks), a_shape=a_shape,
                b_shape=b_shape),
        out_shardings=(shardings[f"{path}.lora_a"], shardings[f"{path}.lora_b"]),
    )  # fmt: skip
    with jax.default_matmul_precision("highest"):
        a, b = run(one.parts(), scales, ranks)
    return {f"{path}.lora_a": a, f"{path}.lora_b": b, f"{path}.lora_a0": jnp.copy(a), f"{path}.lora_b0": jnp.copy(b)}


def _of_stack(
    parts: Parts, scales: jax.Array, ranks: jax.Array, *, decoded: Callable[[Parts, jnp.dtype], jax.Array],
    dims: tuple[int, ...], rank: int, a_shape: tuple[int, ...], b_shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """One weight after the other: a stack's singular vectors at once would be as large as several layers."""
    outside = int(np.prod(b_shape[len(dims) : -1]))

    def of_one(given: tuple[Parts, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        parts, scale, own = given
        w_OI = decoded(parts, jnp.float32).astype(jnp.float32).reshape(outside, -1)
        u_OR, s_R, v_RI = _largest(w_OI, rank)
        root_R = jnp.sqrt(s_R / jnp.where(scale == 0, 1, scale)) * (jnp.arange(rank) < own)
        return root_R[:, None] * v_RI, u_OR * root_R

    run: Callable[[tuple[Parts, jax.Array, jax.Array]], tuple[jax.Array, jax.Array]] = of_one
    for _ in dims:
        run = partial(jax.lax.map, run)
    a, b = run((parts, scales, ranks))
    return a.reshape(a_shape), b.reshape(b_shape)


def _largest(w_OI: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, S and V^T of the `rank` largest singular values."""
    if min(w_OI.shape) <= EXACT:
        u, s, v = jnp.linalg.svd(w_OI, full_matrices=False)
    else:
        q = jax.random.normal(jax.random.key(0), (w_OI.shape[1], min(rank + MORE, *w_OI.shape)))
        for _ in range(ROUNDS):
            q, _ = jnp.linalg.qr(w_OI.T @ jnp.linalg.qr(w_OI @ q)[0])
        q, _ = jnp.linalg.qr(w_OI @ q)
        u, s, v = jnp.linalg.svd(q.T @ w_OI, full_matrices=False)
        u = q @ u
    return u[:, :rank], s[:rank], v[:rank]
