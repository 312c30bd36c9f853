"""The bound of serving: its bytes are the model's, its time is the larger of reading and computing."""

import math

import pytest

from gemma_tpu.estimate import inference
from gemma_tpu.estimate.inference import Load, Server
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips

BIG = sizes.architecture("gemma4-31b")


def server(name: str, **more) -> Server:
    place = chips.find(name)
    return Server(BIG, place, place.devices, **more)


@pytest.mark.parametrize("size", sizes.known())
def test_the_weights_that_are_held_are_the_model(size):
    arch = sizes.architecture(size)
    assert inference.weights_held(arch) == pytest.approx(sizes.parameters(arch), rel=3e-4)  # all but the norms


def test_a_mixture_reads_the_experts_that_it_touches():
    arch = sizes.architecture("gemma4-26b-a4b")
    one, many = inference.weights_read(arch, 1), inference.weights_read(arch, 10_000)
    assert one < 0.2 * many and many == pytest.approx(inference.weights_held(arch), rel=1e-6)


@pytest.mark.parametrize("size", ["gemma4-31b", "gemma4-e4b", "gemma3-27b"])
def test_the_cache_is_what_the_sampler_keeps(size):
    from gemma_tpu.gemma import kv_cache

    arch = sizes.architecture(size)
    for context in (700, 5000):
        ours = inference.cache_of_token(arch, context) * context
        assert ours == pytest.approx(kv_cache.nbytes(arch, 1, context, 2))


def test_a_device_without_a_whole_head_holds_a_copy():
    one, four = Server(BIG, chips.find("v6e-8"), 8), Server(BIG, chips.find("v6e-8"), 4)
    # 16 local heads over 8 devices are 2 each; 4 global ones are 1 each, as over 4 devices.
    local = sum(layer.window is not None for layer in BIG.layers)
    whole = len(BIG.layers) - local
    per_head = 2 * 2 * 1024  # keys and values of 1,024 tokens in bf16
    assert one.cache_bytes(1024) == per_head * (local * 2 * 256 + whole * 1 * 512)
    assert four.cache_bytes(1024) == per_head * (local * 4 * 256 + whole * 1 * 512)


def test_what_fits_beside_the_weights_fits_and_one_more_does_not():
    one, context = server("v6e-8"), 8192
    most = one.rows_that_fit(context)
    room = one.place.chip.hbm_gib * inference.USABLE * 2**30
    used = one.weights_gib * 2**30 + most * one.cache_bytes(context)
    assert used <= room < used + one.cache_bytes(context)
    assert server("v6e-8", kv_bytes=1).rows_that_fit(context) in (2 * most, 2 * most + 1)


def test_one_request_waits_for_the_weights_and_many_for_their_caches():
    one = server("h100x2")
    lone, crowd = one.step_parts(1, 4096), one.step_parts(64, 16384)
    assert max(lone, key=lone.get) == "weights" and max(crowd, key=crowd.get) == "cache"
    assert lone["weights"] == pytest.approx(inference.weights_read(BIG, 1) * 2 / (2 * 3.35e12))


def test_no_prompt_is_read_faster_than_its_flops():
    one = server("v6e-8")
    least = 2 * 29.3e9 * 15360 / (8 * 918e12)  # products with weights alone
    assert least < one.prefill_s(15360) < 1.4 * least


def test_tokens_of_a_slice_are_its_rows_over_their_time():
    one, load = server("v6e-8"), Load(1024, 512)
    rate = one.output_tokens_per_s(load, 16)
    seconds = 16 * one.prefill_s(1024) + 512 * one.step_s(16, 1280)
    assert rate == pytest.approx(16 * 512 / seconds)
    assert one.tpot_s(load, 16) == pytest.approx(16 / rate)


def test_a_request_is_prompt_and_output():
    load = Load(1000, 200)
    weights = 2 * 29.28e9 * 1200 + 2 * 200 * BIG.vocab * BIG.hidden
    found = inference.flops_of_request(BIG, load)
    assert found == pytest.approx(weights + inference.attention_of_request(BIG, load), rel=2e-3)


def test_every_server_holds_the_weights_and_divides_the_heads():
    found = {one.tp for one in inference.servers(BIG, chips.find("v5p-32"))}
    assert found == {1, 2, 4, 8, 16}  # 57 GiB fit one v5p of 95.7
    assert not list(inference.servers(BIG, chips.find("v6e-1")))
    assert math.isclose(server("v6e-8").weights_gib * 8, inference.weights_held(BIG) * 2 / 2**30)
