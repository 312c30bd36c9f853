"""Attention: the band equals the plain mask, the plain mask equals the definition written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tpu import attention as module
from gemma_tpu.attention import attention

B, N, K, H = 2, 4, 2, 6


def random_inputs(tokens: int, seed: int = 0, kv_heads: int = K):
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((B, tokens, heads, H)).astype(np.float32) for heads in (N, kv_heads, kv_heads)
    )
    return q, k, v, random_segments(tokens, rng)


def random_segments(tokens: int, rng) -> np.ndarray:
    """Packed rows: segments 1, 2, 3 … of random lengths, then padding; the last begins with padding too."""
    out = np.zeros((B, tokens), np.int32)
    for row in out:
        cuts = np.sort(rng.choice(np.arange(1, tokens), 4, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), start=1):
            row[start:stop] = number
    out[-1, :3] = 0
    return out


def by_definition(q, k, v, segments, window, scale):
    """One query and one head at a time, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s for s in range(t + 1) if segments[b, s] == segments[b, t] and (window is None or t - s < window)
        ]
        scores = np.array([scale * q[b, t, n].astype(np.float64) @ k[b, s, n // group] for s in seen])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def plain(q, k, v, segments, window):
    """The same call with the index of each query given, which takes the path with the full mask."""
    index = jnp.arange(q.shape[1])[None]
    return attention(q, k, v, segments, segments, scale=0.7, window=window, q_index_BT=index)


def banded(q, k, v, segments, window):
    return attention(q, k, v, segments, segments, scale=0.7, window=window)


@pytest.mark.parametrize(
    ("window", "kv_heads"), [(None, 2), (None, 4), (1, 2), (5, 1), (5, 2), (8, 4), (8, 1), (100, 2)]
)
def test_attention_is_its_definition(window, kv_heads):
    q, k, v, segments = random_inputs(32, kv_heads=kv_heads)
    found = attention(q, k, v, segments, segments, scale=0.7, window=window)
    np.testing.assert_allclose(found, by_definition(q, k, v, segments, window, 0.7), atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "window", "smallest"), [(32, 8, 64), (32, 4, 64), (30, 5, 64), (24, 1, 64), (64, 16, 8), (24, 8, 2)]
)
def test_the_banded_path_equals_the_plain_mask_and_so_do_its_gradients(tokens, window, smallest, monkeypatch):
    took = []
    monkeypatch.setattr(module, "MIN_CHUNK", smallest)  # small ones have several chunks in a window
    monkeypatch.setattr(module, "_banded", lambda *a, inner=module._banded: took.append(1) or inner(*a))
    cotangent = np.random.default_rng(9).standard_normal((B, tokens, N, H)).astype(np.float32)

    def run(path):
        def total(qkv, segments):
            out = path(*qkv, segments, window)
            return jnp.sum(out * cotangent), out

        return jax.jit(jax.grad(total, has_aux=True))

    with_band, with_mask = run(banded), run(plain)
    for seed in range(3):
        *qkv, segments = random_inputs(tokens, seed)
        grads, out = with_band(tuple(qkv), segments)
        wanted_grads, wanted = with_mask(tuple(qkv), segments)
        np.testing.assert_allclose(out, wanted, atol=2e-6)
        for grad, want in zip(grads, wanted_grads, strict=True):
            np.testing.assert_allclose(grad, want, atol=2e-5)
    assert len(took) == 1  # traced once, for the band alone


@pytest.mark.parametrize(("tokens", "window"), [(16, 8), (33, 8), (32, None)])
def test_rows_that_do_not_fit_the_band_take_the_plain_mask(tokens, window, monkeypatch):
    monkeypatch.setattr(module, "_banded", None)
    q, k, v, segments = random_inputs(tokens)
    np.testing.assert_allclose(
        attention(q, k, v, segments, segments, scale=0.7, window=window),
        by_definition(q, k, v, segments, window, 0.7), atol=2e-6,
    )  # fmt: skip


@pytest.mark.parametrize("path", [plain, banded])
def test_keys_of_padding_and_of_other_segments_have_no_influence_at_all(path):
    q, k, v, segments = random_inputs(32)
    before = path(q, k, v, segments, 8)
    for number in (0, 2):
        other = (segments == number)[..., None, None]
        after = path(q, np.where(other, 1e3, k), np.where(other, -1e3, v), segments, 8)
        kept = segments != number
        assert np.array_equal(np.asarray(before)[kept], np.asarray(after)[kept])
        assert not np.array_equal(np.asarray(before), np.asarray(after))


def test_a_row_of_nothing_but_padding_stays_a_number():
    q, k, v, _ = random_inputs(32)
    nothing = np.zeros((B, 32), np.int32)
    assert np.isfinite(banded(q, k, v, nothing, 8)).all()
    no_key = attention(q, k, v, nothing, nothing - 1, scale=1.0, q_index_BT=jnp.arange(32)[None])
    assert np.isfinite(no_key).all()


def test_queries_against_a_longer_cache_see_what_stands_before_them():
    q, k, v, _ = random_inputs(32)
    segments = np.ones((B, 32), np.int32)
    whole = plain(q, k, v, segments, 8)
    index = np.array([[20], [11]])
    one = np.take_along_axis(q, index[..., None, None], axis=1)
    found = attention(one, k, v, segments[:, :1], segments, scale=0.7, window=8, q_index_BT=index)
    np.testing.assert_allclose(found[0, 0], whole[0, 20], atol=2e-6)
    np.testing.assert_allclose(found[1, 0], whole[1, 11], atol=2e-6)


def test_bfloat16_inputs_give_bfloat16_out_close_to_float32():
    q, k, v, segments = random_inputs(32)
    low = banded(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), segments, 8)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), banded(q, k, v, segments, 8), atol=0.06)
