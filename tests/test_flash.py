"""The GPU's attention kernel, interpreted on the CPU, against the plain form: outputs and gradients."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, load, loss_and_grads, micro_batches, random_rows, relative_error, sheet
from test_splash import B, T
from test_splash import both as splash_both
from test_splash import inputs as splash_inputs

from gemma_tpu.gemma import attention as attention_module
from gemma_tpu.gemma import flash
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.remat import rematerialise

inputs, both = partial(splash_inputs, dtype=jnp.bfloat16), partial(splash_both, run=flash.flash)


def assert_close(found, wanted, real_BT):
    """To what bfloat16 rounds: of the output and of the gradients themselves, and of the weights on the way."""
    for one, want in zip(found, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        one, want = (np.asarray(x, np.float32)[real_BT] for x in (one, want))
        assert np.linalg.norm(one - want) < 4e-3 * np.linalg.norm(want)
        np.testing.assert_allclose(one, want, rtol=0.01, atol=0.01 * np.abs(want).max())


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "window"), [
    (64, 4, 2, None), (64, 4, 4, 100), (128, 2, 1, T), (256, 2, 1, 40),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in ((64, 4, 1, 64), (64, 2, 2, 2), (256, 2, 2, None))),
])  # fmt: skip
def test_the_kernel_is_the_plain_form_and_so_are_its_gradients(head_dim, heads, kv_heads, window):
    assert_close(*both(*inputs(heads, kv_heads, head_dim), window))


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", pytest.param("NVIDIA B200", marks=pytest.mark.slow)])
def test_the_sizes_for_large_chips_give_the_same(monkeypatch, kind):
    told = flash._size
    monkeypatch.setattr(flash, "_size", lambda which, _, shape: told(which, (0.1, None, kind, True), shape))
    assert_close(*both(*inputs(2, 1, 256), 40))


# tp=4 has more devices than KV heads: each gets a copy of the one that its queries look at.
@pytest.mark.parametrize("sizes", [pytest.param({"fsdp": 2, "tp": 2}, marks=pytest.mark.slow), {"tp": 4}],
                         ids=str)  # fmt: skip
def test_on_a_mesh_each_device_runs_the_kernel_on_its_own_heads(sizes):
    with jax.set_mesh(meshes.build(sizes, jax.devices()[:4])):
        assert_close(*both(*inputs(4, 2, 64), 100))


@pytest.mark.parametrize("window, first, last", [
    (None, [0, 0, 0, 3, 3, 3, 3, 7], [2, 2, 2, 6, 6, 6, 6, 7]),
    (2, [0, 0, 1, 3, 3, 4, 5, 7], [1, 2, 2, 4, 5, 6, 6, 7]),
    (1, list(range(8)), list(range(8))),
])  # fmt: skip
def test_what_a_token_sees_and_what_sees_it_are_runs(window, first, last):
    found = flash.runs(jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]]), window)
    assert [x.tolist() for x in found] == [[first], [last]]


def test_blocks_that_nobody_sees_are_not_computed():
    """A NaN in a key of another segment, blocks away, reaches nothing: 0 times it would be NaN."""
    q, k, v, _ = inputs(2, 1, 64)
    segments = jnp.asarray(np.repeat([[1, 2]], 128, axis=1).repeat(B, axis=0))
    k, v = k.at[:, :60].set(jnp.nan), v.at[:, :60].set(jnp.nan)
    run, back = jax.vjp(lambda *x: flash.flash(*x, segments, scale=0.1, window=None, interpret=True), q, k, v)
    assert np.isfinite(run[:, 128:].astype(np.float32)).all() and not np.isfinite(run[:, :60].astype(np.float32)).any()
    for gradient in back(jnp.ones_like(run)):
        assert np.isfinite(gradient[:, 128:].astype(np.float32)).all()


def test_blocks_after_what_is_seen_are_not_computed_either():
    """Nor is a block read that is not there: interpreted, it would be the last one again, and hidden by the mask."""
    q, k, v, _ = inputs(2, 1, 64)
    segments = jnp.asarray(np.repeat([[1, 2]], 128, axis=1).repeat(B, axis=0))
    q, k, v = (x.at[:, 128:].set(jnp.nan) for x in (q, k, v))
    run, back = jax.vjp(lambda *x: flash.flash(*x, segments, scale=0.1, window=None, interpret=True), q, k, v)
    for found in (run, *back(jnp.ones_like(run))):
        assert np.isfinite(found[:, :128].astype(np.float32)).all()


def test_its_output_is_kept_by_name_and_then_no_kernel_runs_again():
    q, k, v, segments = inputs(2, 1, 64)

    def again(remat) -> bool:
        def run(q, k, v):
            return jnp.sum(flash.flash(q, k, v, segments, scale=0.1, window=None, interpret=True))

        program = jax.jit(jax.grad(rematerialise(run, remat))).lower(q, k, v).compile().as_text()
        assert "/flash_dq" in program
        return any("flash_forward" in line and "rematted_computation" in line for line in program.splitlines())

    assert again("full") and not again(["attention"])


def test_a_whole_model_trains_with_it_as_with_the_other_form(tiny, monkeypatch):
    """Both kinds of layers, windows and global, in bfloat16: as near the float32 gradients as in blocks."""
    folder = tiny(**dict(SMALL, head_dim=16, global_head_dim=32, window=40))
    rows = random_rows([70, 130, 40, 200], SMALL["vocab"])
    batch = micro_batches(sheet([[rows[0], rows[1]], [rows[2], rows[3]]], T))
    exact, wanted = loss_and_grads(load(folder, rank=3), batch)
    model = load(folder, dtype="bfloat16", rank=3)
    plain, by_blocks = loss_and_grads(model, batch)
    taken = []

    def kernel(*args, **more):
        taken.append(more["window"])
        return flash.flash(*args, **more, interpret=True)

    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    monkeypatch.setattr(attention_module, "flash", SimpleNamespace(flash=kernel, fits=lambda *of: True))
    monkeypatch.setattr(flash, "SIZES", dict.fromkeys((16, 32), flash.SMALLER_HEADS))
    loss, found = loss_and_grads(model, batch)
    assert set(taken) == {40, None}
    assert abs(loss - exact) < max(2 * abs(plain - exact), 2e-3 * exact)
    for name, want in wanted.items():
        assert relative_error(found[name], want) < max(1.5 * relative_error(by_blocks[name], want), 0.02), name


def test_it_takes_only_what_fills_its_blocks_and_its_memory():
    kind = "NVIDIA L4"
    assert flash.fits(4096, 256, jnp.bfloat16, kind) and flash.fits(384, 64, jnp.bfloat16, kind)
    assert not flash.fits(4096, 512, jnp.bfloat16, kind) and not flash.fits(4000, 256, jnp.bfloat16, kind)
    assert not flash.fits(4096, 256, jnp.float32, kind) and not flash.fits(4096, 96, jnp.bfloat16, kind)
    for sizes in [*flash.SIZES.values(), *(one for of in flash.LARGE_SIZES.values() for one in of.values())]:
        assert all(flash.WHOLE % block == 0 for t, s, *_ in sizes.values() for block in (t, s))


@pytest.mark.parametrize("kind, forward, dkv", [
    *((kind, (128, 64, 8, 2), (32, 64, 8, 2)) for kind in (
        "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20", "NVIDIA H800")),
    *((kind, (128, 64, 8, 2), (32, 64, 8, 1)) for kind in ("NVIDIA B200", "NVIDIA GB200", "NVIDIA B300")),
    *((kind, (64, 32, 8, 2), (32, 32, 8, 2)) for kind in (
        "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA GB10",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA A10G")),
])  # fmt: skip
def test_only_chips_with_the_shared_memory_get_large_blocks(kind, forward, dkv):
    told = (0.1, None, kind, False)
    assert flash.fits(4096, 256, jnp.bfloat16, kind)
    assert flash._size("forward", told, (1, 4096, 8, 256)) == forward
    assert flash._size("dkv", told, (1, 4096, 8, 256)) == dkv
    assert flash._size("dq", told, (1, 4096, 8, 128)) == flash.SIZES[128]["dq"]


@pytest.mark.parametrize("kind", [
    "Tesla T4", "NVIDIA T4G", "Tesla V100-SXM2-16GB", "Tesla P100-PCIE-16GB", "Quadro RTX 6000", "NVIDIA TITAN RTX",
    "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce GTX 1080", "NVIDIA T1000", "AMD Instinct MI300X", "gfx942",
])  # fmt: skip
def test_chips_that_triton_makes_no_code_for_get_the_other_form(kind):
    assert not flash.fits(4096, 256, jnp.bfloat16, kind)
