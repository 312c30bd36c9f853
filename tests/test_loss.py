"""The chunked loss and its one-pass gradient against log_softmax written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.step import loss as loss_module
from gemma_tpu.step.loss import cross_entropy

T, D, V = 23, 12, 37


def inputs(dtype=jnp.float32, seed: int = 0, rows: int = 1, tokens: int = T, vocab: int = V):
    rng = np.random.default_rng(seed)
    x_BTD = jnp.asarray(3 * rng.standard_normal((rows, tokens, D)), dtype)
    w_VD = jnp.asarray(rng.standard_normal((vocab, D)), dtype)
    targets_BT = jnp.asarray(rng.integers(0, vocab, (rows, tokens)))
    weights_BT = jnp.asarray(rng.choice([0.0, 1.0, 0.25], (rows, tokens)), jnp.float32)
    return x_BTD, w_VD, targets_BT, weights_BT


def naive(x_BTD, w_VD, targets_BT, weights_BT, softcap):
    logits_BTV = x_BTD @ w_VD.T
    if softcap is not None:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    picked_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights_BT * picked_BT)


# 8 does not divide 23 tokens, 64 is more than there are.
@pytest.mark.parametrize(
    ("chunk", "softcap"), [(8, None), (8, 30.0), (8, 2.0), (1, 30.0), (23, None), (23, 2.0), (64, 30.0)]
)
def test_loss_and_gradients_equal_log_softmax(chunk, softcap):
    x, w, targets, weights = inputs()

    def ours(x, w):
        return cross_entropy(x, w, targets, weights, softcap, chunk, True)

    loss, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, w)
    want, want_grads = jax.value_and_grad(naive, argnums=(0, 1))(x, w, targets, weights, softcap)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(ours(x, w), loss, rtol=1e-6)  # without a gradient asked for
    for grad, want_grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, want_grad, atol=2e-5)


def test_the_gradient_is_scaled_by_what_comes_after_the_loss():
    x, w, targets, weights = inputs()

    def after(loss):
        return jnp.square(loss) / 7

    grads = jax.grad(
        lambda x, w: after(cross_entropy(x, w, targets, weights, 30.0, 8, True)), argnums=(0, 1)
    )(x, w)
    wanted = jax.grad(lambda x, w: after(naive(x, w, targets, weights, 30.0)), argnums=(0, 1))(x, w)
    for grad, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-3)


def test_tokens_of_weight_zero_have_no_loss_and_no_gradient():
    x, w, targets, weights = inputs()
    off = np.asarray(weights) == 0
    assert off.any() and not off.all()

    def ours(x, targets):
        return cross_entropy(x, w, targets, weights, 30.0, 8, False)

    dx = jax.grad(ours)(x, targets)
    assert (np.asarray(dx)[off] == 0).all() and (np.asarray(dx)[~off] != 0).any(axis=-1).all()
    assert ours(jnp.where(off[..., None], 50.0, x), jnp.where(off, 0, targets)) == ours(x, targets)


def test_all_weights_zero_is_zero_and_not_nan():
    x, w, targets, weights = inputs()
    loss, dx = jax.value_and_grad(lambda x: cross_entropy(x, w, targets, 0 * weights, 30.0, 8, False))(x)
    assert loss == 0 and (np.asarray(dx) == 0).all()


def test_huge_logits_do_not_overflow():
    x, w, targets, weights = inputs()
    loss, dx = jax.value_and_grad(lambda x: cross_entropy(x, w, targets, weights, None, 8, False))(1e4 * x)
    assert np.isfinite(loss) and np.isfinite(dx).all() and loss > 1e3


def test_a_frozen_head_gets_no_gradient_of_its_own_and_the_same_one_for_the_rest():
    x, w, targets, weights = inputs()

    def grad_of_x(train_head):
        return jax.grad(lambda x: cross_entropy(x, w, targets, weights, 30.0, 8, train_head))(x)

    np.testing.assert_array_equal(grad_of_x(False), grad_of_x(True))

    def shapes(train_head):
        def run(x):
            return cross_entropy(x, w, targets, weights, 30.0, 8, train_head)

        return [
            v.aval.shape for eqn in _equations(jax.make_jaxpr(jax.grad(run))(x).jaxpr) for v in eqn.outvars
        ]

    assert (V, D) in shapes(True) and (V, D) not in shapes(False)


def test_no_array_of_tokens_times_vocabulary_is_ever_made():
    x, w, targets, weights = inputs()
    run = jax.grad(lambda x, w: cross_entropy(x, w, targets, weights, 30.0, 4, True), argnums=(0, 1))
    sizes = [v.aval.size for eqn in _equations(jax.make_jaxpr(run)(x, w).jaxpr) for v in eqn.outvars]
    assert 4 * V <= max(sizes) < T * V


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_bfloat16_inputs_give_a_float32_loss_close_to_the_exact_one():
    x, w, targets, weights = inputs(jnp.bfloat16)
    loss, (dx, dw) = jax.value_and_grad(
        lambda x, w: cross_entropy(x, w, targets, weights, 30.0, 8, True), argnums=(0, 1)
    )(x, w)
    exact = [a.astype(jnp.float32) for a in (x, w)]
    want, (want_dx, want_dw) = jax.value_and_grad(naive, argnums=(0, 1))(*exact, targets, weights, 30.0)
    assert (loss.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # the products of bfloat16 are exact in float32
    np.testing.assert_allclose(dx.astype(jnp.float32), want_dx, atol=0.02)
    np.testing.assert_allclose(dw.astype(jnp.float32), want_dw, atol=0.05)


# Tokens over data and fsdp by rows, over tp along the row; the vocabulary over fsdp and tp.
@pytest.mark.parametrize("softcap", [30.0, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 4}, {"tp": 4}, {"fsdp": 2, "tp": 2}, {"data": 2, "fsdp": 2}, {"data": 2, "tp": 2}], ids=str
)
@pytest.mark.parametrize(("rows", "tokens", "vocab"), [
    (4, 24, 36),
    (4, 23, 36),  # a row that tp does not divide stays whole
    (4, 24, 37),  # and so does a vocabulary
    (1, 24, 36),  # one row: every device of fsdp has the same tokens and another part of the head
])  # fmt: skip
def test_on_a_mesh_the_loss_and_its_gradients_are_those_of_one_device(sizes, rows, tokens, vocab, softcap):
    x, w, targets, weights = inputs(rows=rows, tokens=tokens, vocab=vocab)

    def ours(x, w):
        return cross_entropy(x, w, targets, weights, softcap, 16, True)

    want, want_grads = jax.value_and_grad(naive, argnums=(0, 1))(x, w, targets, weights, softcap)
    with jax.set_mesh(meshes.build(sizes, jax.devices()[:4])):
        loss, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, w)
        alone = jax.jit(ours)(x, w)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(alone, want, rtol=1e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, want_grad, atol=3e-5)


@pytest.mark.parametrize(("vocab", "tokens", "wanted"), [
    (262_144, 16_384, 1024), (65_536, 16_384, 4096), (1_000, 100_000, 4096), (300_000, 50_000, 768), (10**8, 999, 128),
    (1_000, 96, 96),
])  # fmt: skip
def test_a_chunk_is_as_many_whole_tiles_of_tokens_as_its_logits_have_room_for(vocab, tokens, wanted):
    assert loss_module._chunk(vocab, tokens, None) == wanted
