"""Cross entropy that never holds tokens x vocabulary: chunk by chunk, loss and gradient in one pass.

The logits of a chunk are made, turned into the loss and into the gradient of the hidden states, and dropped. Nothing
is recomputed in the backward pass: it scales the gradient that the forward pass has already found. The head's own
gradient is made only where the base trains.

On a mesh the vocabulary is split and the head never moves: what travels is a chunk of hidden states, gathered from
the devices that hold a part of the vocabulary, and its gradient, summed back to them.

Letters: B rows, T tokens of a row, D hidden, V this device's part of the vocabulary; of one chunk: t tokens of this
device, c of all that share the vocabulary.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemma_tpu.gemma.mesh import split_of

LOGITS_BYTES = 2**30  # of one chunk's logits on one device, in float32; about three such buffers live at once
MOST_TOKENS = 4096  # of a chunk: with more of them the matmuls get no faster

Axes = tuple[str, ...]
Gradient = jax.Array | None  # None: not asked for
Sums = tuple[jax.Array, Gradient]  # of the chunks so far: their loss, the gradient of the head
Found = tuple[jax.Array, Gradient, Gradient]  # the loss, the gradients of the hidden states and of the head
Saved = tuple[jax.Array, Gradient]  # the same without the loss, for the backward pass


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, softcap: float | None,
    chunk: int | None, train_head: bool,
) -> jax.Array:  # fmt: skip
    """sum weights * -log softmax(softcap(x w^T))[target] over all tokens, in float32; `chunk` tokens at a time."""
    return _on_mesh(x_BTD, w_VD, targets_BT, weights_BT, softcap, chunk, train_head, gradients=False)[0]


def _on_mesh(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, softcap: float | None,
    chunk: int | None, train_head: bool, gradients: bool,
) -> Found:  # fmt: skip
    rows, seq = split_of("batch", x_BTD.shape[0]), split_of("seq", x_BTD.shape[1])
    vocab = split_of("vocab", w_VD.shape[0])
    split = _names(rows) + _names(seq)
    run = partial(
        _forward, softcap=softcap, chunk=chunk, train_head=train_head, gradients=gradients, split=split,
        vocab=_names(vocab),
    )  # fmt: skip
    if not split and not _names(vocab):
        return run(x_BTD, w_VD, targets_BT, weights_BT)
    tokens = PartitionSpec(rows, seq)
    return jax.shard_map(
        run, in_specs=(PartitionSpec(rows, seq, None), PartitionSpec(vocab, None), tokens, tokens),
        out_specs=(
            PartitionSpec(), PartitionSpec(rows, seq, None) if gradients else None,
            PartitionSpec(vocab, None) if train_head and gradients else None,
        ),
        check_vma=False,
    )(x_BTD, w_VD, targets_BT, weights_BT)  # fmt: skip


def _names(entry: str | Axes | None) -> Axes:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _chunk(vocab: int, tokens: int, chunk: int | None) -> int:
    return min(tokens, chunk or max(128, min(MOST_TOKENS, LOGITS_BYTES // (4 * vocab) // 128 * 128)))


def _forward(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, softcap: float | None,
    chunk: int | None, train_head: bool, gradients: bool, split: Axes, vocab: Axes,
) -> Found:  # fmt: skip
    """On one device: its tokens, its part of the vocabulary. `split`: the mesh axes that the tokens are split over."""
    shared = tuple(axis for axis in vocab if axis in split)  # devices with other tokens and other parts of the head
    group = jax.lax.axis_size(shared) if shared else 1
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    own = x_TD.shape[0]
    size = -(-_chunk(w_VD.shape[0], own * group, chunk) // group)
    padded = -own % size

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padded)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    def one(carry: Sums, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, Gradient]:
        loss, dw_VD = carry
        x_cD, targets_c, weights_c = (_gather(x, shared) for x in piece)
        found, dlogits_cV = _chunk_loss(x_cD, w_VD, targets_c, weights_c, softcap, vocab, gradients)
        if dlogits_cV is None:
            return (loss + found, dw_VD), None
        if dw_VD is not None:
            dw_VD += jnp.einsum("cV,cD->VD", dlogits_cV, x_cD, preferred_element_type=jnp.float32)
        dx_cD = jnp.einsum("cV,VD->cD", dlogits_cV, w_VD, preferred_element_type=jnp.float32)
        return (loss + found, dw_VD), _sum_back(dx_cD, vocab, shared).astype(x_BTD.dtype)

    dw_VD = jnp.zeros(w_VD.shape, jnp.float32) if train_head and gradients else None
    inputs = (pieces(x_TD), pieces(targets_BT.reshape(-1)), pieces(weights_BT.reshape(-1)))
    (loss, dw_VD), dx = jax.lax.scan(one, (jnp.zeros((), jnp.float32), dw_VD), inputs)
    others = tuple(axis for axis in split if axis not in vocab)  # the loss of a chunk covers its group already
    loss = jax.lax.psum(loss, others) if others else loss
    if dw_VD is not None and others:
        dw_VD = jax.lax.psum(dw_VD, others)
    dx_BTD = None if dx is None else dx.reshape(-1, dx.shape[-1])[:own].reshape(x_BTD.shape)
    return loss, dx_BTD, dw_VD


def _chunk_loss(
    x_cD: jax.Array, w_VD: jax.Array, targets_c: jax.Array, weights_c: jax.Array, softcap: float | None, vocab: Axes,
    gradients: bool,
) -> tuple[jax.Array, Gradient]:  # fmt: skip
    """(loss of the chunk, gradient of its logits); every device that holds a part of the vocabulary finds that loss."""
    logits_cV = jnp.einsum("cD,VD->cV", x_cD, w_VD, preferred_element_type=jnp.float32)
    top_c1: jax.Array | float
    if softcap is None:
        top_c1 = _over(jax.lax.pmax, jnp.max(logits_cV, axis=-1, keepdims=True), vocab)
    else:
        logits_cV = softcap * jnp.tanh(logits_cV / softcap)
        top_c1 = softcap / 2  # capped logits cannot overflow: no pass over them to find the largest
    exp_cV = jnp.exp(logits_cV - top_c1)
    sum_c1 = _over(jax.lax.psum, jnp.sum(exp_cV, axis=-1, keepdims=True), vocab)
    first = jax.lax.axis_index(vocab) * w_VD.shape[0] if vocab else 0
    here_c1 = (targets_c - first)[:, None]
    mine_c1 = (here_c1 >= 0) & (here_c1 < w_VD.shape[0])
    hit_c1 = jnp.take_along_axis(logits_cV, jnp.clip(here_c1, 0, w_VD.shape[0] - 1), axis=-1)
    hit_c1 = _over(jax.lax.psum, jnp.where(mine_c1, hit_c1, 0.0), vocab)
    loss = jnp.sum(weights_c * (jnp.log(sum_c1) + top_c1 - hit_c1)[:, 0])
    if not gradients:
        return loss, None
    right_cV = here_c1 == jnp.arange(w_VD.shape[0])
    dlogits_cV = (exp_cV / sum_c1 - right_cV) * weights_c[:, None]
    if softcap is not None:
        dlogits_cV *= 1.0 - jnp.square(logits_cV / softcap)
    return loss, dlogits_cV.astype(x_cD.dtype)


def _over(reduce: Callable[[jax.Array, Axes], jax.Array], x: jax.Array, axes: Axes) -> jax.Array:
    return reduce(x, axes) if axes else x


def _gather(x: jax.Array, axes: Axes) -> jax.Array:
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _sum_back(dx_cD: jax.Array, vocab: Axes, shared: Axes) -> jax.Array:
    """Each part of the vocabulary adds its share to the gradient of every token, on the device of that token."""
    dx_cD = _over(jax.lax.psum, dx_cD, tuple(axis for axis in vocab if axis not in shared))
    return jax.lax.psum_scatter(dx_cD, shared, tiled=True) if shared else dx_cD


def _vjp_forward(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, softcap: float | None,
    chunk: int | None, train_head: bool,
) -> tuple[jax.Array, Saved]:  # fmt: skip
    loss, dx, dw = _on_mesh(x_BTD, w_VD, targets_BT, weights_BT, softcap, chunk, train_head, gradients=True)
    assert dx is not None  # asked for
    return loss, (dx, None if dw is None else dw.astype(w_VD.dtype))


def _vjp_backward(
    softcap: float | None, chunk: int | None, train_head: bool, saved: Saved, g: jax.Array
) -> tuple[jax.Array, Gradient, None, None]:
    dx_BTD, dw_VD = saved
    dx_BTD = (dx_BTD * g).astype(dx_BTD.dtype)
    return dx_BTD, None if dw_VD is None else (dw_VD * g).astype(dw_VD.dtype), None, None


cross_entropy.defvjp(_vjp_forward, _vjp_backward)
