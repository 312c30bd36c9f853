"""Rows times the matrix of their expert: in blocks, against JAX's own form, every row times every expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tpu.gemma import ragged

SIZES = {
    "all to one": [0, 40, 0], "none to some": [0, 17, 0, 0, 3], "one each": [1, 1, 1], "nobody": [0, 0],
    "whole blocks": [16, 16, 8], "rows beyond": [5, 9], "one expert": [40],
}  # fmt: skip


def both(sizes, rows=40, inside=6, out=5, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(len(sizes)), 3)
    x = jax.random.normal(keys[0], (rows, inside), dtype)
    w = jax.random.normal(keys[1], (len(sizes), out, inside), dtype)
    dy = jax.random.normal(keys[2], (rows, out), dtype)
    sizes = jnp.array(sizes, jnp.int32)
    found = []
    for form in (ragged.ragged, lambda x, w, s: jax.lax.ragged_dot_general(x, w, s, ragged._ROWS_BY_EXPERT)):
        y, back = jax.vjp(lambda x, w, form=form: form(x, w, sizes), x, w)
        found.append([np.asarray(one, np.float64) for one in (y, *back(dy))])
    return found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_blocks_give_what_every_row_by_every_expert_gives_and_its_gradients(sizes):
    for ours, theirs in zip(*both(sizes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=0)
    y = both(sizes)[0][0]
    assert not y[sum(sizes) :].any()


def test_the_gradient_of_an_experts_matrix_is_summed_in_float32():
    sizes = jnp.array([3000, 0, 1000, 96], jnp.int32)
    x, w, dy = (jax.random.normal(jax.random.key(n), of) for n, of in enumerate(((4096, 64), (4, 8, 64), (4096, 8))))

    x, dy = (one.astype(jnp.bfloat16).astype(jnp.float32) for one in (x, dy))

    def gradient(dtype) -> np.ndarray:
        _, back = jax.vjp(lambda w: ragged.ragged(x.astype(dtype), w, sizes), w.astype(dtype))
        return np.asarray(back(dy.astype(dtype))[0], np.float64)

    exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    assert np.linalg.norm(rounded - exact) < 2e-3 * np.linalg.norm(exact)


def test_a_token_copies_no_more_experts_than_it_has_rows():
    shapes = [jax.ShapeDtypeStruct(of, jnp.float32) for of in ((8, 4), (128, 3, 4))]
    text = str(jax.make_jaxpr(ragged._by_blocks)(*shapes, jax.ShapeDtypeStruct((128,), jnp.int32)))
    assert "f32[8,3,4]" in text and "f32[129,3,4]" not in text


@given(st.lists(st.integers(0, 30), min_size=4, max_size=4))  # of one shape: each is compiled anew
@settings(max_examples=25, deadline=None)
def test_any_split_of_the_rows_is_multiplied_right(sizes):
    for ours, theirs in zip(*both(sizes, rows=120), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6, rtol=0)


def test_a_block_is_about_what_an_expert_has_and_bounded():
    assert [ragged.block_rows(*of) for of in ((40960, 16), (32768, 128), (8, 128), (100, 8), (136, 8), (1, 1))] == [
        512, 256, 8, 16, 32, 8]  # fmt: skip


def test_the_work_does_not_grow_with_the_number_of_experts():
    def flops(experts: int) -> float:
        shapes = (jax.ShapeDtypeStruct(of, jnp.float32) for of in ((4096, 64), (experts, 32, 64)))
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        return jax.jit(ragged.ragged).lower(*shapes, sizes).compile().cost_analysis()["flops"]

    assert flops(32) < 2.5 * flops(2)


@pytest.mark.parametrize("backend, one_instruction", [("tpu", True), ("gpu", False), ("cpu", False)])
def test_a_tpu_has_an_instruction_for_it(monkeypatch, backend, one_instruction):
    monkeypatch.setattr(ragged, "platform", lambda: backend)
    given = jnp.ones((8, 4)), jnp.ones((2, 3, 4)), jnp.array([5, 3])
    text = str(jax.make_jaxpr(lambda *given: ragged.ragged(*given))(*given))
    assert ("ragged_dot_general" in text) == one_instruction
