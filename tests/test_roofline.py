"""FLOPs and time by arithmetic, checked by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tpu.estimate import roofline
from gemma_tpu.estimate.budget import memory
from gemma_tpu.estimate.roofline import attention_flops, estimate, keys_seen, work
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips
from gemma_tpu.step.job import Job

ALL = ("q", "k", "v", "attention", "o", "gate", "up", "down", "lora_h")


def job(
    mesh=None, rows=4, tokens=4096, accumulation=1, rank=64, remat=ALL, method="lora", dtype="bfloat16"
):  # fmt: skip
    base = Job(method, "all", (), rank, dtype, rows, accumulation, tokens, "full", (), False)
    return base.change(mesh={"fsdp": 4} if mesh is None else mesh, remat=remat)


@pytest.fixture(scope="module")
def big():
    return sizes.architecture("gemma4-31b")


def test_the_layers_of_31b_hold_29_3_billion_weights(big):
    D, F = 5376, 21504
    local = 2 * D * 32 * 256 + 2 * D * 16 * 256 + 3 * D * F
    full = 2 * D * 32 * 512 + D * 4 * 512 + 3 * D * F  # V is K
    assert work(big, job()).layers == 50 * local + 10 * full
    assert work(big, job()).layers == pytest.approx(29.3e9, rel=0.01)


def test_the_formula_gives_134_gflop_a_token(big):
    found = work(big, job())
    assert found.adapters == 489_717_760
    assert found.attention == pytest.approx(2.8e9, rel=0.01) and found.head == 262144 * 5376
    by_hand = 4 * found.layers + 6 * found.adapters + 3 * found.attention + 4 * found.head
    assert found.useful == by_hand == pytest.approx(134e9, rel=0.005)
    assert "4N + 6L + 3A + 4VD" in found.formula and "134.2 GFLOP" in found.formula


def test_v5p_8_could_do_13700_tokens_a_second(big):
    assert roofline.limit_tokens_per_s(big, job(), chips.find("v5p-8")) == pytest.approx(13_700, rel=0.005)


def test_full_remat_costs_47_percent_more_and_keeping_all_costs_nothing(big):
    assert work(big, job(remat="full")).executed / work(big, job()).useful == pytest.approx(1.465, abs=0.01)
    for remat in (ALL, "none"):
        assert work(big, job(remat=remat)).executed == work(big, job()).useful


def test_what_is_not_kept_is_computed_again(big):
    some = work(big, job(remat=tuple(name for name in ALL if name != "gate")))
    assert some.recomputed == 2 * 60 * 5376 * 21504 and some.recomputed_attention == 0


def test_what_the_host_keeps_is_not_computed_again(big):
    away = job(remat=tuple(f"{name}@host" for name in ALL))
    assert work(big, away).executed == work(big, away).useful


def test_full_fine_tuning_is_six_times_the_weights():
    arch = sizes.architecture("gemma3-1b")
    found = work(arch, job(method="full", mesh={"fsdp": 1}))
    assert found.useful == 6 * found.layers + 3 * found.attention + 6 * found.head and found.adapters == 0


def test_a_mixture_counts_the_experts_that_a_token_meets():
    """26B-A4B: less than 4 billion active in the layers, more than 25 billion stored."""
    arch = sizes.architecture("gemma4-26b-a4b")
    assert 2.5e9 < work(arch, job()).layers < 4e9 < 25e9 < sizes.parameters(arch)


@pytest.mark.parametrize("tokens, window", [(1, None), (7, None), (7, 3), (7, 7), (7, 20), (300, 128)])
def test_keys_seen_is_the_count_of_the_mask(tokens, window):
    layer = next(one for one in sizes.architecture("gemma3-1b").layers)
    layer = type(layer)(**{**vars(layer), "window": window})
    counted = sum(sum(1 for key in range(query + 1) if window is None or query - key < window)
                  for query in range(tokens))  # fmt: skip
    assert keys_seen(layer, tokens) == pytest.approx(counted / tokens)


def test_attention_is_scores_and_values(big):
    last = big.layers[-1]
    assert attention_flops(big, last, 4096) == 4 * 32 * 512 * 4097 / 2


# Seconds of a step, walked over the schedule that libtpu 0.0.51 made of the train step of 2026-11-22: rows of
# `python benchmarks/plans.py`, and some with fewer or more tokens in a micro-batch.
@pytest.mark.parametrize("size, place, asked, walked, near", [
    ("gemma4-31b", "v5p-8", job(), 1.590, 0.1),
    ("gemma4-31b", "v5p-8", job(remat="full"), 2.294, 0.1),
    ("gemma4-31b", "v5p-8", job({"fsdp": 2, "tp": 2}), 2.073, 0.12),
    ("gemma4-31b", "v5p-8", job(accumulation=2), 3.179, 0.1),
    ("gemma4-31b", "v5p-32", job({"fsdp": 16}, rows=16), 1.712, 0.1),
    ("gemma4-31b", "2xv5p-8", job({"data": 2, "fsdp": 4}, rows=8), 1.912, 0.1),
    ("gemma4-31b", "v6e-8", job({"fsdp": 8}, rows=8, remat=("q", "k", "o", "down", "lora_h")), 1.646, 0.2),
    ("gemma4-31b", "tpu7x-8", job({"fsdp": 8}, rows=8), 1.606, 0.2),
    ("gemma3-27b", "v5p-8", job(rank=32), 1.343, 0.1),
    ("gemma3-1b", "v5e-1", job({}, 2, 2048, accumulation=8, rank=16), 1.084, 0.1),
    ("gemma3-1b", "v6e-1", job({}, 1, 2048, accumulation=16, rank=16), 0.292, 0.1),
    ("gemma3-1b", "v6e-1", job({}, 8, 2048, accumulation=2, rank=16), 0.369, 0.1),
    ("gemma4-e2b", "v6e-1", job({}, 1, accumulation=8, rank=16), 0.757, 0.1),
    ("gemma4-e2b", "v6e-1", job({}, 2, accumulation=4, rank=16), 0.868, 0.12),
    ("gemma4-e2b", "v5p-8", job(rows=4, accumulation=2, rank=16), 0.277, 0.1),
    ("gemma4-e4b", "v6e-1", job({}, 1, accumulation=8, rank=16), 1.245, 0.1),
    ("gemma4-26b-a4b", "v6e-4", job(accumulation=2, rank=32), 0.639, 0.3),
])  # fmt: skip
def test_the_estimate_is_near_the_walk_of_the_schedule(size, place, asked, walked, near):
    found = estimate(sizes.architecture(size), asked, chips.find(place)).step_s
    assert found == pytest.approx(walked, rel=near)


# Seconds of a step and GiB of a GPU: walked over what XLA's GPU compiler (jax-cuda13-pjrt 0.10.2) made of the step of
# 2026-11-22, as `python benchmarks/gpu_plans.py` prints them.
@pytest.mark.parametrize("size, place, asked, walked, gib, near", [
    ("gemma4-e2b", "h100x1", job({}, 1, accumulation=8, rank=16), 0.878, 19.6, 0.1),
    ("gemma4-e4b", "h100x1", job({}, 1, accumulation=8, rank=16), 1.420, 28.4, 0.1),
    ("gemma4-12b", "h100x1", job({}, 1, accumulation=8, rank=32), 3.156, 49.3, 0.1),
    ("gemma3-1b", "h100x1", job({}, 2, 2048, accumulation=8, rank=16), 0.375, 7.6, 0.2),
    ("gemma3-4b", "h200x1", job({}, 1, accumulation=8, rank=16), 0.961, 18.7, 0.1),
    ("gemma3-4b", "a100x1", job({}, 1, accumulation=8, rank=16), 2.729, 18.3, 0.1),
    ("gemma3-1b", "l4x1", job({}, 2, 2048, accumulation=8, rank=16, remat="full"), 4.166, 3.9, 0.2),
    ("gemma4-31b", "h100x8", job({"fsdp": 8}, 8), 0.985, 57.9, 0.1),
    ("gemma4-31b", "h100x8", job({"fsdp": 8}, 16, remat=("q", "o", "up", "down", "lora_h")), 2.231, 67.8, 0.1),
    ("gemma4-31b", "b200x8", job({"fsdp": 4, "tp": 2}), 0.221, 35.6, 0.1),
    ("gemma4-26b-a4b", "h100x8", job({"fsdp": 8}, 8, rank=32), 0.271, 16.7, 0.3),
    ("gemma4-26b-a4b", "h200x1", job({}, 1, accumulation=8, rank=32), 2.008, 59.5, 0.3),
])  # fmt: skip
def test_on_gpus_the_estimate_is_near_the_walk_too(size, place, asked, walked, gib, near):
    arch, there = sizes.architecture(size), chips.find(place)
    assert estimate(arch, asked, there).step_s == pytest.approx(walked, rel=near)
    assert memory(arch, asked, there).total == pytest.approx(gib, rel=0.15)


def test_an_estimate_adds_up_and_says_what_it_is(big):
    found = estimate(big, job(), chips.find("v5p-8"))
    assert found.step_s == pytest.approx(sum(found.parts.values()))
    assert found.tokens_per_s == pytest.approx(16384 / found.step_s)
    assert found.mfu == pytest.approx(found.tokens_per_s * work(big, job()).useful / (4 * 459e12))
    assert found.basis == "analytic" and found.limited_by == "matmul"
    told = "\n".join(found.assumptions)
    assert "fsdp" in told and "v5p: 459 bf16 TFLOP/s, 2765 GB/s" in told and "2026" in told


def test_a_gpu_is_estimated_and_marked(big):
    found = estimate(big, job({"fsdp": 8}, rows=8), chips.find("h100x8"))
    assert 0 < found.mfu < 1 and any("no GPU compiler" in line for line in found.assumptions)


def test_float32_is_six_times_slower_in_matmuls():
    arch, place = sizes.architecture("gemma3-270m"), chips.find("v6e-1")
    one, six = (estimate(arch, job({"fsdp": 1}, dtype=dtype), place) for dtype in ("bfloat16", "float32"))
    assert six.parts["matmul"] == pytest.approx(6 * one.parts["matmul"])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 8).map(lambda n: 4 * n), place=st.sampled_from(["v5e-4", "v5p-8", "h100x4"]),
       mesh=st.sampled_from([{"fsdp": 4}, {"tp": 4}, {"fsdp": 2, "tp": 2}]),
       remat=st.sampled_from(["none", "full", ALL, ("gate",)]))  # fmt: skip
def test_no_estimate_beats_the_limit_and_remat_never_pays(rows, place, mesh, remat):
    arch, there = sizes.architecture("gemma3-4b"), chips.find(place)
    asked = job(mesh, rows=rows, remat=remat)
    found = estimate(arch, asked, there)
    assert found.tokens_per_s < roofline.limit_tokens_per_s(arch, asked, there)
    assert found.step_s >= estimate(arch, asked.change(remat="none"), there).step_s
