"""The TPU's attention kernel, interpreted on the CPU, against the plain form: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma import per_device, splash
from gemma_tpu.gemma.attention import attention

B, T = 2, 256


def inputs(heads: int, kv_heads: int, head_dim: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, n, head_dim)), dtype) for n in (heads, kv_heads, kv_heads))
    segments = np.ones((B, T), np.int32)
    segments[0, 70:200], segments[0, 200:] = 2, 3
    segments[1, 130:190], segments[1, 190:] = 2, 0  # ends in padding
    return q, k, v, jnp.asarray(segments)


def both(q, k, v, segments, window, run=splash.splash):
    """Output and gradients of a weighted sum of it, of a kernel and of the plain form in float32; padding has no
    weight."""
    share = np.random.default_rng(1).standard_normal(q.shape) * (np.asarray(segments) > 0)[..., None, None]

    def weighed(run):
        return lambda q, k, v: jnp.sum(run(q, k, v) * share)

    def kernel(q, k, v):
        return run(q, k, v, segments, scale=0.1, window=window, interpret=True)

    def plain(q, k, v):
        return attention(q, k, v, segments, segments, scale=0.1, window=window)

    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    found = jax.jit(kernel)(q, k, v), *jax.jit(jax.grad(weighed(kernel), argnums=(0, 1, 2)))(q, k, v)
    wanted = plain(*exact), *jax.grad(weighed(plain), argnums=(0, 1, 2))(*exact)
    return found, wanted, np.asarray(segments) > 0


def assert_equal(found, wanted, real_BT):
    np.testing.assert_allclose(np.asarray(found[0])[real_BT], np.asarray(wanted[0])[real_BT], atol=2e-6)
    for grad, want in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(grad, want, atol=2e-5)


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "window"), [
    (256, 4, 2, 100),  # a local layer: the window ends inside a block
    (512, 2, 1, None),  # a global one
    pytest.param(128, 2, 2, T, marks=pytest.mark.slow),  # a window as long as the row is none
])  # fmt: skip
def test_the_kernel_is_the_plain_form_and_so_are_its_gradients(head_dim, heads, kv_heads, window):
    assert_equal(*both(*inputs(heads, kv_heads, head_dim), window))


# tp=4 has more devices than KV heads: each gets a copy of the one that its queries look at.
@pytest.mark.parametrize("sizes", [pytest.param({"fsdp": 2, "tp": 2}, marks=pytest.mark.slow), {"tp": 4}],
                         ids=str)  # fmt: skip
def test_on_a_mesh_each_device_runs_the_kernel_on_its_own_heads(sizes):
    with jax.set_mesh(meshes.build(sizes, jax.devices()[:4])):
        assert_equal(*both(*inputs(4, 2, 128), 100))


def test_it_takes_only_what_fills_its_blocks():
    assert splash.fits(4096, 256) and splash.fits(384, 512)
    assert not splash.fits(4000, 256) and not splash.fits(4096, 80)


@pytest.mark.parametrize(
    ("kv_heads", "heads", "shards", "times"), [(4, 32, 4, 1), (4, 32, 8, 2), (1, 8, 8, 8), (16, 32, 8, 1)]
)
def test_kv_heads_are_repeated_no_more_than_the_devices_need(kv_heads, heads, shards, times):
    assert per_device.repeats(kv_heads, heads, shards) == times
