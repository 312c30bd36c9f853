"""Cross entropy that never holds tokens x vocabulary: chunk by chunk, loss and gradient in one pass.

The logits of a chunk are made, turned into the loss and into the gradient of the hidden states, and dropped. Nothing
is recomputed in the backward pass: it scales the gradient that the forward pass has already found. The head's own
gradient is made only where the base trains.

Letters: T tokens (rows flattened), D hidden, V vocabulary, c tokens of one chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(x_TD, w_VD, targets_T, weights_T, softcap: float | None, chunk: int, train_head: bool):
    """sum_t weights[t] * -log softmax(softcap(x w^T))[target t], in float32."""
    return _forward(x_TD, w_VD, targets_T, weights_T, softcap, chunk, False)[0]


def _forward(x_TD, w_VD, targets_T, weights_T, softcap, chunk, train_head, gradients=False):
    tokens = x_TD.shape[0]
    chunk = min(chunk, tokens)
    padded = -tokens % chunk

    def split(x):
        return jnp.pad(x, [(0, padded)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    def one(carry, piece):
        loss, dw_VD = carry
        x_cD, targets_c, weights_c = piece
        raw_cV = jnp.einsum("cD,VD->cV", x_cD, w_VD, preferred_element_type=jnp.float32)
        logits_cV = raw_cV if softcap is None else softcap * jnp.tanh(raw_cV / softcap)
        top_c1 = jnp.max(logits_cV, axis=-1, keepdims=True)
        exp_cV = jnp.exp(logits_cV - top_c1)
        sum_c1 = jnp.sum(exp_cV, axis=-1, keepdims=True)
        hit_c1 = jnp.take_along_axis(logits_cV, targets_c[:, None], axis=-1)
        loss += jnp.sum(weights_c * (jnp.log(sum_c1) + top_c1 - hit_c1)[:, 0])
        if not gradients:
            return (loss, dw_VD), None
        right_cV = jax.nn.one_hot(targets_c, w_VD.shape[0], dtype=jnp.float32)
        dlogits_cV = (exp_cV / sum_c1 - right_cV) * weights_c[:, None]
        if softcap is not None:
            dlogits_cV *= 1.0 - jnp.square(logits_cV / softcap)
        dlogits_cV = dlogits_cV.astype(x_cD.dtype)
        if train_head:
            dw_VD += jnp.einsum("cV,cD->VD", dlogits_cV, x_cD, preferred_element_type=jnp.float32)
        return (loss, dw_VD), jnp.einsum("cV,VD->cD", dlogits_cV, w_VD)

    dw_VD = jnp.zeros(w_VD.shape if train_head else (), jnp.float32)
    pieces = (split(x_TD), split(targets_T), split(weights_T))
    (loss, dw_VD), dx = jax.lax.scan(one, (jnp.zeros((), jnp.float32), dw_VD), pieces)
    dx_TD = None if dx is None else dx.reshape(-1, dx.shape[-1])[:tokens]
    return loss, dx_TD, dw_VD


def _vjp_forward(x_TD, w_VD, targets_T, weights_T, softcap, chunk, train_head):
    loss, dx_TD, dw_VD = _forward(x_TD, w_VD, targets_T, weights_T, softcap, chunk, train_head, gradients=True)
    return loss, (dx_TD, dw_VD.astype(w_VD.dtype) if train_head else None)


def _vjp_backward(softcap, chunk, train_head, saved, g):
    dx_TD, dw_VD = saved
    dx_TD = (dx_TD * g).astype(dx_TD.dtype)
    return dx_TD, None if dw_VD is None else (dw_VD * g).astype(dw_VD.dtype), None, None


cross_entropy.defvjp(_vjp_forward, _vjp_backward)
