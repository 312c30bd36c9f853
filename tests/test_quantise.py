"""A base in fewer bits: its codes against bitsandbytes', the model against its own dequantised weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    EVEN,
    SMALL,
    largest_difference,
    logits,
    loss_and_grads,
    mesh_of,
    micro_batches,
    padded_rows,
    relative_error,
)

from gemma_tpu.adapter import lora, start
from gemma_tpu.gemma import loading, quantise
from gemma_tpu.gemma.projection import Base
from gemma_tpu.schema import LoraConfig

KINDS = ("int8", "nf4")


def weight(shape=(24, 256), seed=0):
    rng = np.random.default_rng(seed)
    w = (0.05 * rng.standard_normal(shape)).astype(np.float32)
    w[3] = 0.0  # a row of zeros
    w[5, :64] = 0.0  # and a block
    return w


def by_hand(w, block=64):
    """nf4 of each block by the nearest of the sixteen values, written without the module."""
    table = np.array(quantise.NF4)
    blocks = w.reshape(-1, block).astype(np.float64)
    largest = np.abs(blocks).max(1)
    even = blocks / np.where(largest == 0, 1, largest)[:, None]
    nearest = np.abs(even[:, :, None] - table).argmin(-1)
    return nearest.reshape(w.shape), largest.reshape(w.shape[0], -1)


def test_codes_are_the_nearest_of_the_sixteen_values_and_scales_lie_within_half_a_step():
    w = weight()
    held = quantise.encode(w, "nf4", 1)
    codes, largest = by_hand(w)
    np.testing.assert_array_equal(held["w"].astype(np.int32), codes)
    scale = held["w_low"][:, None] + held["w_step"][:, None] * held["w_scale"].astype(np.float32)
    assert (np.abs(scale - largest) <= 0.5001 * held["w_step"][:, None]).all()
    found = quantise.decode(held, "nf4", 1)
    np.testing.assert_allclose(found, np.array(quantise.NF4, np.float32)[codes] * np.repeat(scale, 64, 1), rtol=1e-6)
    assert not found[3].any() and not held["w_scale"][3].any()


def test_the_sixteen_values_are_the_quantiles_that_qlora_derives_them_from():
    """Nine quantiles of the normal distribution above zero and eight below, zero once, the largest at one."""
    from statistics import NormalDist

    offset = 0.9677083
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(quantise.NF4, values, atol=1e-6)


def test_int8_is_within_half_a_step_of_each_rows_own_scale():
    w = weight()
    held = quantise.encode(w, "int8", 1)
    step = np.abs(w).max(1) / 127
    assert np.abs(held["w"]).max() == 127 and held["w"].dtype == np.int8
    assert (np.abs(quantise.decode(held, "int8", 1) - w) <= 0.5001 * step[:, None]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [1, 2])
def test_jax_and_numpy_give_the_same_codes_and_values(kind, inside):
    w = weight((8, 6, 128))
    ours = quantise.encode(w, kind, inside)
    theirs = jax.jit(lambda w: quantise.encode(w, kind, inside, jnp))(w)
    promised = quantise.parts(kind, w.shape, inside)
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == promised
    assert {name: (x.shape, x.dtype) for name, x in theirs.items()} == promised
    np.testing.assert_array_equal(ours["w"].astype(np.int32), np.asarray(theirs["w"]).astype(np.int32))
    there = jax.jit(lambda held: quantise.decode(held, kind, inside, jnp))(theirs)
    np.testing.assert_allclose(quantise.decode(ours, kind, inside), there, atol=1e-7)


def test_a_checkpoints_matrix_gives_what_the_same_weight_gave_in_training():
    """o_proj trains as [D, N, H]; its file has [D, N * H]."""
    w = weight((12, 4, 32))
    alone = quantise.decode(quantise.encode(w, "nf4", 2), "nf4", 2)
    again = quantise.round_trip(w.reshape(12, 128), "nf4", quantise.block_of(32))
    np.testing.assert_array_equal(alone.reshape(12, 128), again)
    rows = quantise.round_trip(w.reshape(12, 128)[4:7], "nf4", 32)
    np.testing.assert_array_equal(rows, again[4:7])


# --- in a model --------------------------------------------------------------------------------------------


def quantised(folder, kind, mesh=None, dtype="float32", **adapter):
    section = LoraConfig(rank=3, alpha=4.5, **adapter)
    model, checkpoint = loading.build(folder, dtype=dtype, quantise=kind)
    lora.inject_config(model, section)
    shardings, _ = loading.place(model, mesh or mesh_of())
    loading.load_base(model, checkpoint, shardings)
    start.begin(model, section, 0, shardings)
    rng = np.random.default_rng(0)
    b = {path: (0.1 * rng.standard_normal(v.shape)).astype(np.float32)
         for path, v in sorted(loading.variables(model).items()) if path.endswith("lora_b")}  # fmt: skip
    loading.assign(model, loading.put(b, shardings))
    return model


def dequantised(folder, model):
    """An ordinary model of the weights that the quantised one stands for."""
    plain, checkpoint = loading.build(folder, dtype="float32")
    section = LoraConfig(rank=3, alpha=4.5)
    lora.inject_config(plain, section)
    shardings, _ = loading.place(plain, mesh_of())
    loading.load_base(plain, checkpoint, shardings)
    values = {path: np.asarray(v[...]) for path, v in loading.variables(model, lora.LoRA).items()}
    for site in lora.sites(model):
        values[f"{site.path}.w"] = np.asarray(site.projection.weight(jnp.float32))
    loading.assign(plain, loading.put(values, shardings))
    return plain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_logits_and_gradients_are_those_of_the_dequantised_weights(tiny, kind):
    folder = tiny(**SMALL)
    model = quantised(folder, kind)
    plain = dequantised(folder, model)
    for site in lora.sites(model):
        assert site.projection.w[...].dtype == quantise.STORED[kind]
    batch = padded_rows(model.arch.vocab, 32)
    real = batch["segment_ids"] > 0
    found, wanted = (logits(one, batch["tokens"], batch["segment_ids"])[real] for one in (model, plain))
    assert largest_difference(found, wanted) <= 1e-5 * np.abs(wanted).max()
    (loss, grads), (plain_loss, plain_grads) = (loss_and_grads(one, micro_batches(batch)) for one in (model, plain))
    assert abs(loss - plain_loss) <= 1e-6 and set(grads) == set(plain_grads)
    for path, grad in plain_grads.items():
        assert relative_error(grads[path], grad) <= 1e-4, path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_loads_the_same_codes_and_gives_the_same_loss(tiny, kind):
    folder, found, held = tiny(**EVEN), [], []
    for mesh in (mesh_of(), mesh_of(2, 2)):
        model = quantised(folder, kind, mesh, dora=True)
        batch = padded_rows(model.arch.vocab, 32)
        batch = {name: np.concatenate([x, x[:1]]) for name, x in batch.items()}
        found.append(loss_and_grads(model, micro_batches(batch), mesh)[0])
        held.append({path: np.asarray(v[...]) for path, v in loading.variables(model, Base).items()})
    assert abs(found[0] - found[1]) <= 1e-5
    for path, value in held[0].items():
        np.testing.assert_array_equal(value, held[1][path])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "fsdp": 2}])
def test_routed_experts_are_quantised_too(tmp_path, kind, mesh):
    import arch_helper

    from gemma_tpu.gemma import mesh as meshes

    devices = jax.devices()[: 4 if mesh else 1]
    folder = arch_helper.write(tmp_path / "moe", arch_helper.CASES["gemma4-26b-a4b"])
    model = quantised(folder, kind, meshes.build(mesh, devices))
    assert any(site.of_experts for site in lora.sites(model))
    batch = padded_rows(model.arch.vocab, 32)
    batch = {name: np.concatenate([x, x[:1]]) for name, x in batch.items()}
    loss, _ = loss_and_grads(model, micro_batches(batch), meshes.build(mesh, devices))
    plain = dequantised(folder, quantised(folder, kind))
    assert abs(loss - loss_and_grads(plain, micro_batches(batch))[0]) <= 1e-5


def test_bitsandbytes_has_the_same_sixteen_values_and_codes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    w = weight((64, 256))
    packed, state = functional.quantize_4bit(torch.tensor(w), blocksize=64, quant_type="nf4")
    np.testing.assert_allclose(quantise.NF4, state.code.numpy(), atol=1e-7)
    pairs = packed.numpy().reshape(-1)
    codes = np.stack([pairs >> 4, pairs & 15], -1).reshape(w.shape)
    ours = quantise.encode(w, "nf4", 1)
    seen = np.repeat(by_hand(w)[1] > 0, 64, 1)
    np.testing.assert_array_equal(ours["w"].astype(np.uint8)[seen], codes[seen])
    twice = functional.dequantize_4bit(*functional.quantize_4bit(
        torch.tensor(w), blocksize=64, compress_statistics=True, quant_type="nf4"
    ))
    mine = np.square(quantise.decode(ours, "nf4", 1) - w).mean()
    assert mine <= 1.02 * np.square(twice.numpy() - w).mean()


