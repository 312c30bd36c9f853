"""The step for GPUs, without one: it lowers for CUDA, and attention takes the form that it says it takes there."""

import json

import jax
import pytest
from runs_helper import run_config

from gemma_tpu.gemma import attention, flash, hf_config, loading, model, splash
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.training import program


def make(base, folder, *overrides: str) -> tuple[program.Program, object]:
    """The train step of a whole config over shapes alone, and its batch."""
    chosen = run_config(base, folder / "run", "mesh.fsdp=1", "mesh.tp=1", "model.dtype=bfloat16", *overrides)
    mesh = meshes.build({}, jax.devices()[:1])
    decoder = model.Decoder(hf_config.from_config(json.loads((base / "config.json").read_text())),
                            loading.DTYPES["bfloat16"])  # fmt: skip
    program.adapt(decoder, chosen)
    shardings, _ = loading.place(decoder, mesh, False)
    program.abstract(decoder, shardings)
    step = program.build(chosen, decoder, shardings, mesh, 8)
    return step, step.abstract_batch(2, 4, 256)


@pytest.mark.parametrize("remat", ["full", "[q,attention,gate]"])
def test_the_train_step_lowers_for_cuda(base32, tmp_path, monkeypatch, remat):
    for module in (attention, model):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(flash, "SIZES", dict.fromkeys((16, 32), flash.SMALLER_HEADS))  # the heads of this model
    step, batch = make(base32, tmp_path, f"train.remat={remat}")
    with jax.set_mesh(step.mesh):
        traced = step._jitted(None).trace(step.abstract_state(), step.parts.frozen, batch)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "func.func public @main" in lowered and "stablehlo.while" in lowered  # layers in a loop, as on a TPU
    foreign = [line for line in lowered.splitlines() if "custom_call" in line and "@Sharding" not in line]
    assert not [line for line in foreign if "custom_call @tpu" in line], foreign
    for which in ("forward", "dq", "dkv"):
        assert f'name = "flash_{which}_' in lowered


@pytest.mark.parametrize("backend, tokens, head_dim, form", [
    ("tpu", 256, 128, "splash"), ("tpu", 256, 512, "splash"), ("tpu", 200, 128, "blocks"), ("tpu", 256, 64, "blocks"),
    ("gpu", 256, 128, "flash"), ("gpu", 256, 512, "blocks"), ("gpu", 200, 128, "blocks"), ("cpu", 256, 128, "blocks"),
])  # fmt: skip
def test_attention_takes_the_kernel_where_there_is_one_for_the_shape(monkeypatch, backend, tokens, head_dim, form):
    taken = []
    monkeypatch.setattr(attention, "platform", lambda: backend)
    monkeypatch.setattr(splash, "splash", lambda q, *rest, **more: taken.append("splash") or q)
    monkeypatch.setattr(flash, "flash", lambda q, *rest, **more: taken.append("flash") or q)
    monkeypatch.setattr(attention, "_blockwise", lambda q, *rest: taken.append("blocks") or q)
    q, kv = (jax.numpy.zeros((1, tokens, heads, head_dim), "bfloat16") for heads in (4, 2))
    segments = jax.numpy.ones((1, tokens), int)
    attention.attention(q, kv, kv, segments, segments, scale=1.0)
    assert taken == [form]
    exact = q.astype("float32")
    attention.attention(exact, *(kv.astype("float32"),) * 2, segments, segments, scale=1.0)
    assert taken[1] == ("blocks" if form == "flash" else form)  # TF32 would round it


@pytest.mark.parametrize("head_dim, window", [(64, None), (128, 100), (256, 512)])
def test_the_kernel_for_gpus_lowers_where_there_is_none(monkeypatch, head_dim, window):
    """With the blocks of the chip that it is lowered for."""
    monkeypatch.setattr(flash, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    q, kv = (jax.ShapeDtypeStruct((2, 1024, heads, head_dim), "bfloat16") for heads in (4, 2))

    def loss(q, k, v, segments):
        return flash.flash(q, k, v, segments, scale=1.0, window=window).astype("float32").sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, kv, jax.ShapeDtypeStruct((2, 1024), "int32"))
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    for which, blocks in (("forward", "128x64"), ("dq", "64x64"), ("dkv", "32x64" if head_dim == 256 else "64x64")):
        assert lowered.count(f'name = "flash_{which}_{blocks}{f"_{window}" if window else ""}"') == 1
