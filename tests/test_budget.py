"""Memory by arithmetic, against the TPU compiler's own peaks; and what is valid and what fits."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tpu import config
from gemma_tpu.errors import UserError
from gemma_tpu.estimate import budget
from gemma_tpu.estimate.budget import memory
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips
from gemma_tpu.step.job import Job, padded, placed

ALL = ("q", "k", "v", "attention", "o", "gate", "up", "down", "lora_h")


def job(
    mesh=None, rows=4, tokens=4096, accumulation=1, rank=64, remat="full", method="lora", replicate_kv=False
):  # fmt: skip
    base = Job(method, "all", (), rank, "bfloat16", rows, accumulation, tokens, "full", (), replicate_kv)
    return base.change(mesh=mesh or {}, remat=remat)


@pytest.fixture(scope="module")
def big():
    return sizes.architecture("gemma4-31b")


# Peaks in GiB of one device: arguments, outputs that reuse none, and temporaries, from libtpu 0.0.51's buffer
# assignment for the train step of 2026-11-21.
COMPILED = [
    ("gemma4-31b", "v5p-8", job({"fsdp": 4}), 25.70),
    ("gemma4-31b", "v5p-8", job({"fsdp": 4}, remat=ALL), 59.67),
    ("gemma4-31b", "v5p-8", job({"fsdp": 2, "tp": 2}, remat=ALL), 60.13),
    ("gemma4-31b", "v5p-8", job({"tp": 4}), 24.79),
    ("gemma4-31b", "v5e-8", job({"tp": 8}, rows=1, replicate_kv=True), 12.07),
    ("gemma4-31b", "v6e-8", job({"fsdp": 8}, rows=8), 15.50),
    ("gemma4-12b", "v6e-4", job({"fsdp": 4}, accumulation=2, rank=32), 11.77),
    ("gemma3-12b", "v5e-4", job({"fsdp": 4}, tokens=2048, accumulation=2, rank=32), 10.90),
    ("gemma3-27b", "v6e-4", job({"tp": 4}, rows=1, accumulation=4, rank=32), 17.35),
    ("gemma3-27b", "v6e-4", job({"fsdp": 2, "tp": 2}, rows=2, accumulation=2, rank=32), 18.60),
    ("gemma3-4b", "v6e-1", job({}, rows=1, accumulation=8, rank=32), 10.79),
    ("gemma3-4b", "v5e-4", job({"tp": 4}, rows=1, accumulation=8, rank=32), 3.64),
    ("gemma3-1b", "v6e-1", job({}, tokens=2048, rank=32, method="full"), 10.01),
    ("gemma4-e4b", "v6e-1", job({}, rows=1, accumulation=8, rank=16), 18.14),
    ("gemma4-26b-a4b", "v6e-4", job({"fsdp": 4}, accumulation=2, rank=32, remat=ALL), 24.92),
    ("gemma4-31b", "v5p-8", job({"fsdp": 4}, rows=8), 33.61),
    ("gemma4-31b", "v5p-8", job({"fsdp": 4}, remat=("gate", "up", "attention")), 47.12),
    ("gemma4-e2b", "v6e-1", job({}, rows=1, accumulation=8, rank=16,
     remat=("q", "k", "v", "attention", "gate", "up", "lora_h")), 18.17),
    ("gemma4-31b", "v5p-32", job({"fsdp": 16}, rows=16, remat=ALL), 49.1),
    ("gemma4-31b", "v5p-32", job({"fsdp": 16}, rows=16), 12.01),
    ("gemma3-1b", "v6e-1", job({}, rows=2, tokens=2048, rank=32, remat="none"), 21.44),
    ("gemma4-31b", "tpu7x-8", job({"fsdp": 4, "tp": 2}, remat=ALL), 37.17),
    ("gemma4-31b", "tpu7x-8", job({"fsdp": 8}, rows=8, remat=ALL), 61.75),
    ("gemma3-4b", "tpu7x-2", job({"fsdp": 2}, rank=16), 12.75),
    ("gemma4-12b", "tpu7x-8", job({"fsdp": 8}, rows=8, rank=32), 11.74),
    ("gemma4-31b", "2xv5p-8", job({"data": 2, "fsdp": 4}, rows=8, remat=ALL), 66.5),
]  # fmt: skip


@pytest.mark.parametrize("size, place, asked, gib", COMPILED)
def test_the_analytic_memory_is_within_a_tenth_of_the_compilers_peak(size, place, asked, gib):
    assert memory(sizes.architecture(size), asked, chips.find(place)).total == pytest.approx(gib, rel=0.1)


def test_the_placed_weights_are_the_models_parameters(big):
    frozen = sum(one.elements for one in placed(big, job()) if not one.trains)
    trained = sum(one.elements for one in placed(big, job()) if one.trains)
    assert frozen == sizes.parameters(big) and trained == 489_717_760


def test_fsdp_splits_the_weights_and_tp_does_too(big):
    whole = memory(big, job()).weights
    for mesh in ({"fsdp": 4}, {"tp": 4}, {"fsdp": 2, "tp": 2}):
        assert memory(big, job(mesh)).weights == pytest.approx(whole / 4, rel=0.001)
    assert whole * budget.GIB == pytest.approx(2 * sizes.parameters(big), rel=0.001)


def test_the_moments_are_two_float32_values_for_each_adapter_value(big):
    found = memory(big, job())
    assert found.lora * budget.GIB == pytest.approx(4 * 489_717_760, rel=0.01)
    assert found.moments == 2 * found.lora


def test_kept_activations_are_their_shapes(big):
    """4096 tokens on each of four devices: gate alone is 60 layers x 4096 x 21504 x 2 bytes."""
    found = memory(big, job({"fsdp": 4}, remat=ALL)).saved
    assert found["gate"] == pytest.approx(60 * 4096 * 21504 * 2 / 2**30)
    assert found["residual"] == found["o"] == found["down"] == pytest.approx(60 * 4096 * 5376 * 2 / 2**30)
    assert found["q"] == pytest.approx(4096 * 32 * (50 * 256 + 10 * 512) * 2 / 2**30)
    assert found["k"] == pytest.approx(4096 * (50 * 16 * 256 + 10 * 4 * 512) * 2 / 2**30)
    assert found["v"] == pytest.approx(4096 * 50 * 16 * 256 * 2 / 2**30)  # in global layers V is K


def test_what_lies_in_the_hosts_memory_is_not_in_the_devices(big):
    found = memory(big, job(remat=("gate", "up@host")))
    assert "up" not in found.saved and found.saved["gate"] > 0


def test_full_remat_keeps_each_layers_input_and_nothing_else(big):
    assert set(memory(big, job(remat="full")).saved) == {"residual"}


def test_tensor_parallelism_splits_what_is_kept(big):
    rows = {mesh: sum(memory(big, job(dict(mesh), remat=ALL)).saved.values())
            for mesh in ((("fsdp", 4),), (("tp", 4),))}  # fmt: skip
    assert rows[("tp", 4),] == pytest.approx(rows[("fsdp", 4),], rel=0.05)


def test_replicated_kv_heads_are_whole_on_every_device(big):
    eight = memory(big, job({"tp": 8}, replicate_kv=True, remat=("k",))).saved["k"]
    local, glob = 50 * 16 * 256 / 8, 10 * 4 * 512  # 4 global heads do not divide by 8
    assert eight == pytest.approx(4 * 4096 * (local + glob) * 2 / 2**30)


def test_full_fine_tuning_trains_the_base_and_has_no_adapters():
    arch = sizes.architecture("gemma3-1b")
    found = memory(arch, job(method="full"))
    assert found.lora == 0 and found.moments == 2 * found.weights
    assert found.weights * budget.GIB == pytest.approx(2 * sizes.parameters(arch), rel=0.01)


def test_the_categories_add_up_to_the_total(big):
    found = memory(big, job({"fsdp": 4}, remat=ALL), chips.find("v5p-8"))
    assert sum(gib for _, gib in found.rows()) == found.total
    assert found.headroom == found.limit - found.total and found.limit == 95.73 and found.fits


def test_a_tile_is_of_the_two_dims_that_waste_least():
    assert padded((10, 21504, 64)) == 10 * 21504 * 64  # stored with 21504 along the lanes
    assert padded((10, 64, 1344)) == 10 * 64 * 1408  # 1344 is 10.5 x 128
    assert padded((5376,)) == 5376


shapes = st.fixed_dictionaries({
    "rows": st.integers(1, 16).map(lambda n: 4 * n), "tokens": st.integers(1, 64).map(lambda n: 128 * n),
    "rank": st.sampled_from([8, 64, 128]), "remat": st.sampled_from(["none", "full", ALL, ("gate", "o")]),
    "mesh": st.sampled_from([{"fsdp": 4}, {"tp": 4}, {"fsdp": 2, "tp": 2}, {}]),
})  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(shapes=shapes, more=st.integers(1, 8))
def test_more_rows_or_tokens_never_need_less_memory(shapes, more):
    arch = sizes.architecture("gemma3-4b")
    base = job(**shapes)
    least = memory(arch, base).total
    assert memory(arch, base.change(rows=base.rows + 4 * more)).total >= least
    assert memory(arch, base.change(tokens=base.tokens + 128 * more)).total >= least


@settings(max_examples=20, deadline=None)
@given(shapes=shapes, name=st.sampled_from(ALL))
def test_keeping_one_more_activation_keeps_its_bytes(shapes, name):
    arch = sizes.architecture("gemma3-4b")
    base = job(**shapes | {"remat": ("x",)})
    less, more = memory(arch, base).saved, memory(arch, base.change(remat=(name,))).saved
    assert set(more) - set(less) == {name} and more[name] > 0


def test_the_largest_batch_fits_and_the_next_does_not(big):
    place, asked = chips.find("v5p-8"), job({"fsdp": 4}, remat=ALL)
    rows = budget.largest_batch(big, asked, place)
    assert rows % 4 == 0 and rows > 0
    assert memory(big, asked.change(rows=rows), place).fits
    assert not memory(big, asked.change(rows=rows + 4), place).fits


def test_the_longest_sequence_fits_and_the_next_does_not(big):
    place, asked = chips.find("v5p-8"), job({"fsdp": 4})
    tokens = budget.longest_sequence(big, asked, place)
    assert tokens % 128 == 0 and 4096 < tokens < big.context
    assert memory(big, asked.change(tokens=tokens), place).fits
    assert not memory(big, asked.change(tokens=tokens + 128), place).fits


def test_where_the_weights_alone_do_not_fit_nothing_does(big):
    place = chips.find("v6e-1")
    assert budget.largest_batch(big, job(), place) == budget.longest_sequence(big, job(), place) == 0


def test_a_small_model_is_bounded_by_its_context():
    arch = sizes.architecture("gemma3-270m")
    assert budget.longest_sequence(arch, job(rows=1, rank=8), chips.find("tpu7x-2")) == arch.context


def test_meshes_are_valid_or_say_why_not(big):
    found = {str(one): one for one in budget.valid_meshes(big, chips.find("v5e-8"), job(rows=4))}
    assert set(found) == {"fsdp=8", "fsdp=4, tp=2", "fsdp=2, tp=4", "tp=8"}
    assert found["fsdp=4, tp=2"].valid and found["fsdp=2, tp=4"].valid
    assert "4 rows per micro-batch" in found["fsdp=8"].reason
    assert found["tp=8"].reason == "mesh.tp=8 does not divide the 4 global KV heads"
    replicated = budget.valid_meshes(big, chips.find("v5e-8"), job(rows=4, replicate_kv=True))
    assert {str(one): one.valid for one in replicated}["tp=8"]


def test_experts_get_an_axis_of_their_own_where_there_are_some():
    found = budget.valid_meshes(sizes.architecture("gemma4-26b-a4b"), chips.find("v5p-8"), job())
    assert any(one.sizes["expert"] == 4 and one.valid for one in found)
    assert all(one.sizes["expert"] == 1 for one in
               budget.valid_meshes(sizes.architecture("gemma4-31b"), chips.find("v5p-8"), job()))  # fmt: skip


def test_a_wrong_target_is_the_error_that_training_gives(big):
    wrong = Job("lora", ("q_porj",), (), 8, "bfloat16", 1, 1, 128, "full", job().mesh, False)
    with pytest.raises(UserError, match="q_porj"):
        memory(big, wrong)


def test_the_job_of_a_config_is_what_the_config_says():
    found = Job.of(config.load("gemma4_31b_v5p8_fast.yaml"), {"fsdp": 4}, remat="full")
    assert (found.rows, found.tokens, found.rank, found.size("fsdp"), found.size("tp")) == (4, 4096, 64, 4, 1)
    assert found.tokens_per_update == 16384 and found.devices == 4
    assert Job.of(config.load("gemma4_31b_v5p8_fast.yaml"), {"fsdp": 4}, remat=["q", "k"]).keeps("q")


def test_auto_is_no_answer_for_a_job():
    with pytest.raises(ValueError, match="auto"):
        job(remat="auto")


def test_31b_takes_less_than_a_second(big):
    memory(big, job())  # the import of JAX and Flax
    begun = time.perf_counter()
    memory(big, job({"fsdp": 4}, rank=63, remat=ALL), chips.find("v5p-8"))
    assert time.perf_counter() - begun < 1.0


def test_without_a_slice_there_is_no_limit(big):
    assert memory(big, job()).limit == math.inf


# --- adapters, optimizers and bases of other kinds ---------------------------------------------------------


def test_each_optimizers_own_state_is_counted(big):
    from gemma_tpu.schema import OptimConfig

    found = {name: memory(big, replace(job(), optim=OptimConfig(name=name))) for name in
             ("adamw", "lion", "adafactor", "muon")}  # fmt: skip
    assert found["adamw"].moments == 2 * found["adamw"].lora
    assert found["lion"].moments == found["lion"].lora
    assert found["muon"].moments == pytest.approx(found["lion"].lora, rel=1e-4)
    assert found["adafactor"].moments == pytest.approx(found["adafactor"].lora, rel=0.01)  # too narrow to factor
    full = job(method="full")
    whole = memory(big, full).moments
    assert memory(big, replace(full, optim=OptimConfig(name="adafactor"))).moments < 0.01 * whole


def test_moments_are_split_as_what_they_belong_to(big):
    one, four = (memory(big, job(mesh)).moments for mesh in ({}, {"fsdp": 4}))
    assert four == pytest.approx(one / 4, rel=0.05)


def test_the_fields_of_an_adapter_are_counted(big):
    from gemma_tpu.schema import LoraConfig, Table

    def held(**fields):
        return memory(big, replace(job(), adapter=LoraConfig(**fields)))

    plain = held()
    assert held(init="pissa").lora == pytest.approx(2 * plain.lora, rel=0.01)
    assert held(init="pissa").moments == plain.moments  # where it started has no moments
    assert plain.lora < held(dora=True).lora < 1.05 * plain.lora
    assert held(rank_pattern=Table({"up_proj": 128})).lora > 1.1 * plain.lora
    few = [one for one in placed(big, replace(job(), adapter=LoraConfig(layers=(0, 7)))) if one.trains]
    assert sum(one.parameters for one in few) < 0.1 * 489_717_760 < sum(one.elements for one in few)


def test_a_quantised_base_takes_its_bits_and_its_scales(big):
    bfloat, int8, nf4 = (memory(big, replace(job(), quantise=kind)).weights for kind in (None, "int8", "nf4"))
    layers = sum(one.elements for one in placed(big, job()) if one.path.startswith("blocks.") and ".w" in one.path
                 and "norm" not in one.path and not one.trains)  # fmt: skip
    assert (bfloat - int8) * budget.GIB == pytest.approx(layers, rel=0.01)
    assert (bfloat - nf4) * budget.GIB == pytest.approx(layers * (1.5 - 1 / 64), rel=0.01)
    counted = [sum(one.parameters for one in placed(big, replace(job(), quantise=kind)) if not one.trains)
               for kind in (None, "nf4")]  # fmt: skip
    assert counted[0] == counted[1] == sizes.parameters(big)
