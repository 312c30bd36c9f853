"""Attention: the band equals the plain mask, the plain mask equals the definition written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tpu.gemma import attention as module
from gemma_tpu.gemma.attention import attention

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


def blockwise(q, k, v, segments, window):
    return attention(q, k, v, segments, segments, scale=0.7, window=window)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)


@pytest.mark.parametrize("chunk", [256, pytest.param(8, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("window", "kv_heads"), [(None, 2), (None, 4), (1, 2), (5, 1), (5, 2), (8, 4), (8, 1), (100, 2)]
)
def test_attention_is_its_definition(window, kv_heads, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    q, k, v, segments = random_inputs(32, kv_heads=kv_heads)
    found = attention(q, k, v, segments, segments, scale=0.7, window=window)
    np.testing.assert_allclose(found, by_definition(q, k, v, segments, window, 0.7), atol=2e-6)


BANDS = [(30, 5, 64), (24, 1, 64), (64, 16, 8), (24, 8, 2)]
SPANS = [(64, None, 64), (33, 8, 64), (37, 30, 64)]
MORE = [(32, 8, 64), (32, 4, 64), (64, 40, 64), (16, 8, 64), (37, None, 64), (6, None, 64)]


@pytest.mark.parametrize(("tokens", "window", "smallest"), [*BANDS, *SPANS, *(
    pytest.param(*one, marks=pytest.mark.slow) for one in MORE
)])  # fmt: skip
def test_blocks_equal_the_plain_mask_and_so_do_their_gradients(tokens, window, smallest, monkeypatch, small_blocks):
    monkeypatch.setattr(module, "MIN_CHUNK", smallest)  # small ones have several chunks in a window
    cotangent = np.random.default_rng(9).standard_normal((B, tokens, N, H)).astype(np.float32)

    def run(path):
        def total(qkv, segments):
            out = path(*qkv, segments, window)
            return jnp.sum(out * cotangent), out

        return jax.jit(jax.grad(total, has_aux=True))

    by_blocks, with_mask = run(blockwise), run(plain)
    for seed in range(3):
        *qkv, segments = random_inputs(tokens, seed)
        grads, out = by_blocks(tuple(qkv), segments)
        wanted_grads, wanted = with_mask(tuple(qkv), segments)
        np.testing.assert_allclose(out, wanted, atol=2e-6)
        for grad, want in zip(grads, wanted_grads, strict=True):
            np.testing.assert_allclose(grad, want, atol=2e-5)


def keys_looked_at(tokens: int, window: int | None) -> int:
    """Scores of one head of one row."""
    x = jnp.zeros((1, tokens))
    blocks = zip(module._queries(x, window), module._keys(x, window), strict=True)
    return sum(q.shape[0] * q.shape[1] * k.shape[1] for q, k in blocks)


def test_blocks_leave_out_much_of_what_the_mask_would():
    assert keys_looked_at(4096, None) == 4096 * 4096 * 5 // 8
    assert keys_looked_at(4096, 1024) == 4096 * (1024 + 256)  # a band of chunks, each with the window before it
    assert keys_looked_at(4095, 1024) < 4095**2 / 2  # no band divides it, spans do
    assert keys_looked_at(200, 100) <= 200 * 200


def test_memory_of_the_gradient_grows_with_the_tokens_and_not_with_their_square():
    def temporary(path, tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        gradient = jax.grad(lambda q, k, v, s: jnp.sum(path(q, k, v, s, None)), (0, 1, 2))
        return jax.jit(gradient).lower(x, x, x, segments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(blockwise, 2048) < 2.5 * temporary(blockwise, 1024)
    assert temporary(plain, 2048) > 3.5 * temporary(plain, 1024)


@pytest.mark.parametrize("window", [None, 8])
def test_what_remat_keeps_by_name_is_not_made_again(window, small_blocks):
    q, k, v, segments = random_inputs(32)

    def exponentials(policy) -> int:
        run = jax.checkpoint(lambda q, k, v: jnp.sum(blockwise(q, k, v, segments, window)), policy=policy)
        return str(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(q, k, v)).count("= exp ")

    blocks = len(module._queries(q, window))
    kept, again = jax.checkpoint_policies.save_only_these_names("attention"), jax.checkpoint_policies.nothing_saveable
    assert exponentials(kept) == 2 * blocks  # once forward, once backward
    assert exponentials(again) == 3 * blocks


@pytest.mark.parametrize("path", [plain, blockwise])
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
    assert np.isfinite(blockwise(q, k, v, nothing, 8)).all()
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
    low = blockwise(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), segments, 8)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), blockwise(q, k, v, segments, 8), atol=0.06)


def test_a_query_against_a_cache_is_the_last_row_of_attention_over_all_tokens():
    """Slots of the cache that hold nothing of this row are masked by the bias, whatever lies in them."""
    q, k, v, _ = random_inputs(7)
    whole = plain(q, k, v, np.ones((B, 7), np.int32), None)
    old_k, old_v = (np.pad(x[:, :-1], [(0, 0), (0, 3), (0, 0), (0, 0)], constant_values=9.0) for x in (k, v))
    bias = np.where(np.arange(9) < 6, 0.0, module.MASKED).astype(np.float32) * np.ones((B, 1, 1), np.float32)
    found = module.against_cache(*(jnp.asarray(x[:, -1:]) for x in (q, k, v)), jnp.asarray(old_k.transpose(0, 2, 3, 1)),
                                 jnp.asarray(old_v.transpose(0, 2, 1, 3)), jnp.asarray(bias), 0.7)  # fmt: skip
    np.testing.assert_allclose(found, whole[:, -1:], atol=1e-5)
