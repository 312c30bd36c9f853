"""The decoder against transformers, on meshes, packed, with a cache; and what its backward pass keeps."""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    DIMS,
    EVEN,
    SMALL,
    adapter_of,
    compare_with_transformers,
    largest_difference,
    load,
    logits,
    loss_and_grads,
    mesh_of,
    micro_batches,
    padded_rows,
    random_rows,
    reference,
    run_on_mesh,
    sheet,
    write,
)

from gemma_tpu.gemma import kv_cache, loading
from gemma_tpu.gemma.hf_config import from_config
from gemma_tpu.gemma.loading import variables
from gemma_tpu.gemma.projection import LoRA
from gemma_tpu.gemma.remat import HOST
from gemma_tpu.schema import Activation, Offloaded
from gemma_tpu.step import step

TOLERANCE = 1e-4


def compare(folder) -> float:
    pytest.importorskip("torch")
    return compare_with_transformers(folder)


@pytest.mark.parametrize("text_only", [False, True], ids=["multimodal layout", "text-only layout"])
def test_logits_equal_transformers_over_two_scanned_periods_with_padding_past_the_window(tiny, text_only):
    assert compare(tiny(**DIMS, text_only=text_only)) <= TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 4, "kv_heads": 4, "global_kv_heads": 4},
        {"heads": 2, "kv_heads": 1, "global_kv_heads": 2},
        {"heads": 8, "kv_heads": 2, "global_kv_heads": 1, "head_dim": 16, "global_head_dim": 8},
        {"window": 7},  # does not divide the rows: the plain mask
        {"window": 1, "head_dim": 16, "global_head_dim": 16},
        {"layers": 6, "pattern": 2, "window": 16, "hidden": 24},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()),
)
def test_logits_equal_transformers_for_other_geometries(tiny, change):
    assert compare(tiny(**SMALL | change, text_only=True)) <= TOLERANCE


@pytest.mark.parametrize("text_only", [False, True], ids=["multimodal", "text-only"])
def test_a_folder_that_transformers_saved_itself_gives_the_same_logits(tiny, tmp_path, text_only):
    pytest.importorskip("torch")
    folder = tiny(**SMALL, text_only=text_only)
    reference(folder).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert "per_layer_config" in (config if text_only else config["text_config"])
    batch = padded_rows(SMALL["vocab"])
    found = [logits(load(f), batch["tokens"], batch["segment_ids"]) for f in (folder, tmp_path / "saved")]
    np.testing.assert_array_equal(*found)


def test_every_tensor_of_a_layer_counts(tiny):
    """No branch is an identity: to move any one weight moves the logits."""
    model = load(tiny(**SMALL))
    tokens = random_rows([24], SMALL["vocab"])[0][None]
    graph, state = nnx.split(model)
    run = jax.jit(lambda state: nnx.merge(graph, state)(tokens))
    before = run(state)
    for path, leaf in nnx.to_flat_state(state):
        noise = 0.3 * np.random.default_rng(1).standard_normal(leaf.shape, dtype=np.float32)
        changed = [(p, x.replace(x[...] + noise) if p == path else x) for p, x in nnx.to_flat_state(state)]
        moved = float(jnp.abs(run(nnx.from_flat_state(changed)) - before).max())
        assert moved > 1e-3, path


# --- meshes ------------------------------------------------------------------------------------------------


def check_mesh(folder, wanted, *mesh) -> None:
    for ours, theirs in zip(run_on_mesh(folder, *mesh), wanted, strict=True):
        assert largest_difference(ours, theirs) <= 1e-5


@pytest.fixture(scope="module")
def on_one_device(tiny):
    return run_on_mesh(tiny(**EVEN), 1, 1)


@pytest.mark.parametrize("mesh", [
    (2, 2), pytest.param((4, 1), marks=pytest.mark.slow), (1, 4, True),
], ids=["2x2", "4x1", "1x4 with 2 global KV heads replicated"])  # fmt: skip
def test_a_mesh_gives_the_logits_loss_and_gradients_of_one_device(tiny, on_one_device, mesh):
    check_mesh(tiny(**EVEN), on_one_device, *mesh)


@pytest.mark.slow
def test_1x4_with_4_global_kv_heads_gives_the_logits_loss_and_gradients_of_one_device(tiny):
    folder = tiny(**EVEN | {"global_kv_heads": 4})
    check_mesh(folder, run_on_mesh(folder, 1, 1), 1, 4)


def test_replicated_kv_heads_are_whole_on_every_device_and_the_rest_is_split(tiny):
    model = load(tiny(**EVEN), mesh_of(1, 4), rank=3, replicate_kv=True)
    parts = {
        path: v[...].size // v[...].addressable_shards[0].data.size for path, v in variables(model).items()
    }
    assert parts["blocks.0.1.attention.k_einsum.w"] == parts["blocks.0.1.attention.k_einsum.lora_b"] == 1
    assert parts["blocks.0.0.attention.kv_einsum.w"] == parts["blocks.0.0.attention.kv_einsum.lora_b"] == 4
    assert parts["blocks.0.1.attention.q_proj.w"] == parts["blocks.0.1.attention.q_proj.lora_b"] == 4
    assert parts["blocks.0.1.mlp.down_proj.w"] == parts["blocks.0.1.mlp.down_proj.lora_a"] == 4


# --- packing and padding -----------------------------------------------------------------------------------


def test_a_packed_row_gives_each_segment_the_logits_it_has_alone(tiny):
    model = load(tiny(**SMALL))
    rows = random_rows([30, 9, 21], SMALL["vocab"])
    packed = sheet([rows], 64)
    alone = sheet([[row] for row in rows], 64)
    found = logits(model, packed["tokens"], packed["segment_ids"], packed["positions"])[0]
    wanted = logits(model, alone["tokens"], alone["segment_ids"])
    at = 0
    for number, row in enumerate(rows):
        assert largest_difference(found[at : at + len(row)], wanted[number, : len(row)]) <= 1e-5
        at += len(row)


@pytest.mark.parametrize("touched", [0, 1, 2, 3])
def test_to_change_one_segment_or_the_padding_moves_no_other_logit_at_all(tiny, touched):
    model = load(tiny(**SMALL))
    batch = sheet([random_rows([20, 9, 23], SMALL["vocab"])], 64)
    inside = batch["segment_ids"] == touched
    changed = np.where(inside, batch["tokens"][:, ::-1] % 50 + 5, batch["tokens"])
    assert (changed != batch["tokens"]).sum() > 4
    before, after = (
        logits(model, t, batch["segment_ids"], batch["positions"]) for t in (batch["tokens"], changed)
    )
    assert largest_difference(before[~inside], after[~inside]) == 0.0
    assert largest_difference(before[inside], after[inside]) > 0.1


def test_positions_restart_with_each_segment_where_they_are_not_given(tiny):
    model = load(tiny(**SMALL))
    batch = sheet([random_rows([20, 9, 23], SMALL["vocab"])], 64)
    given = logits(model, batch["tokens"], batch["segment_ids"], batch["positions"])
    np.testing.assert_array_equal(given[0, :52], logits(model, batch["tokens"], batch["segment_ids"])[0, :52])


def test_the_future_has_no_influence(tiny):
    model = load(tiny(**SMALL))
    tokens = random_rows([64], SMALL["vocab"])[0][None]
    later = np.concatenate([tokens[:, :40], tokens[:, 40:] % 50 + 5], axis=1)
    assert largest_difference(logits(model, tokens)[:, :40], logits(model, later)[:, :40]) == 0.0


# --- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [pytest.param(32, marks=pytest.mark.slow), 40])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row(tiny, capacity):
    """Row 1 begins nine steps after row 0, so that both rings wrap, each row's elsewhere; the window is 8."""
    model, late = load(tiny(**SMALL)), 9
    rows = random_rows([30, 21], SMALL["vocab"])
    batch = sheet([[row] for row in rows], 32)
    wanted = logits(model, batch["tokens"], batch["segment_ids"])
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, last, clock, rings):
        model = nnx.merge(graph, state)
        x, rings = model.step(tokens, last, clock, rings, capacity)
        return model.logits(x[:, None])[:, 0], rings

    rings, begun = kv_cache.empty(model.arch, 2, capacity, model.dtype), 37
    for number in range(30):
        last = np.array([number, number - late])
        tokens = batch["tokens"][[0, 1], last.clip(0)]
        found, rings = run(state, tokens, last, begun + number, rings)
        for row in (0, 1):
            if 0 <= last[row] < len(rows[row]):
                assert largest_difference(found[row], wanted[row, last[row]]) <= 1e-5


# --- dtype, remat ------------------------------------------------------------------------------------------


def test_bfloat16_stays_bfloat16_inside_and_comes_out_as_float32_near_the_exact_logits(tiny):
    folder = tiny(**SMALL)
    tokens = random_rows([32], SMALL["vocab"])[0][None]
    model = load(folder, dtype="bfloat16", rank=3)
    assert jax.eval_shape(model.hidden, tokens).dtype == jnp.bfloat16
    assert {v.dtype for v in variables(model, LoRA).values()} == {jnp.dtype("float32")}
    low, exact = logits(model, tokens), logits(load(folder, rank=3), tokens)
    assert low.dtype == np.float32
    assert 1e-3 < largest_difference(low, exact) < 0.3


REMATS = ["none", "full", ("q", "gate", "lora_h"), ("k", "v@host", "up@host")]


def test_the_activations_that_a_config_can_keep_are_those_that_the_model_names(tiny):
    model = load(tiny(**SMALL), rank=3)
    parts, trained = step.take_apart(model)
    batch = micro_batches(padded_rows(SMALL["vocab"]))
    jaxpr = jax.make_jaxpr(lambda *args: step.mean_loss_and_grads(parts, *args, None))(trained, parts.frozen, batch)
    named = {eqn.params["name"] for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "name"}
    assert named == set(get_args(Activation))
    assert {f"{name}{HOST}" for name in named} == set(get_args(Offloaded))


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMATS[1:], ids=str)
def test_gradients_are_the_same_whatever_is_rematerialised(tiny, remat):
    model = load(tiny(**SMALL), rank=3, dropout=0.3)
    batch = micro_batches(padded_rows(SMALL["vocab"]))
    key = jax.random.key(5)  # dropout too must be drawn the same when a layer is computed again
    wanted_loss, wanted = loss_and_grads(model, batch, key=key, remat="none")
    loss, grads = loss_and_grads(model, batch, key=key, remat=remat)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert largest_difference(grads, wanted) <= 1e-6
    assert all(np.abs(grad).max() > 1e-4 for grad in wanted.values())


@pytest.mark.parametrize("remat", REMATS[1:3], ids=str)
def test_the_backward_pass_keeps_what_remat_names_and_no_frozen_weight(tiny, remat):
    model = load(tiny(**SMALL), rank=3)
    parts, trained = step.take_apart(model)
    batch = micro_batches(padded_rows(SMALL["vocab"]))
    jaxpr = jax.make_jaxpr(lambda *args: step.mean_loss_and_grads(parts, *args, None, remat))(
        trained, parts.frozen, batch
    )
    stacked = {v.aval.shape for scan in _scans(jaxpr.jaxpr) for v in scan.outvars[scan.params["num_carry"] :]}
    adapters = {v.shape for v in variables(model, LoRA).values()}
    frozen = {
        v.shape for path, v in variables(model).items() if path.startswith("blocks") and v.ndim > 2
    } - adapters
    assert (2, 8, 6, 40) in frozen  # q_proj of the local layers
    assert not stacked & frozen
    kept = {"q": (2, 3, 64, 8, 6), "k": (2, 3, 64, 4, 6), "gate": (2, 3, 64, 56), "lora_h": (2, 3, 64, 3)}
    assert {name for name, shape in kept.items() if shape in stacked} == set(remat) & set(kept)


def _scans(jaxpr):
    """Every scan over the two periods, at any depth."""
    for eqn in _equations(jaxpr):
        if eqn.primitive.name == "scan" and eqn.params["length"] == 2:
            yield eqn


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_ten_times_the_layers_is_the_same_program_with_another_trip_count(tmp_path):
    def equations(layers):
        model, _ = loading.build(write(tmp_path / str(layers), **SMALL | {"layers": layers}), dtype="float32")
        graph, state = nnx.split(model)
        run = jax.make_jaxpr(lambda state, tokens: nnx.merge(graph, state)(tokens))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return len(list(_equations(run(shapes, jnp.zeros((1, 16), jnp.int32)).jaxpr)))

    assert equations(40) == equations(4) > 100


def test_an_adapter_with_b_zero_changes_nothing_and_a_random_one_does(tiny):
    folder = tiny(**SMALL)
    tokens = random_rows([24], SMALL["vocab"])[0][None]
    base, tuned = logits(load(folder), tokens), load(folder, rank=3)
    assert largest_difference(logits(tuned, tokens), base) > 0.1
    zeros = {path: np.zeros_like(x) for path, x in adapter_of(tuned).items() if path.endswith("lora_b")}
    loading.assign(tuned, zeros)
    assert largest_difference(logits(tuned, tokens), base) <= 1e-5


def test_the_checkpoints_own_config_is_what_the_model_is_built_from(tiny):
    folder = tiny(**DIMS)
    assert load(folder).arch == from_config(json.loads((folder / "config.json").read_text()))
