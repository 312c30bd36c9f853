"""Which rates a server keeps up with, and what is doubted, on servers that are arithmetic."""

import math

import pytest

from gemma_tpu.bench import arrivals, doubts, saturation
from gemma_tpu.bench.latencies import Reply, summary
from gemma_tpu.estimate import inference
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips

SETTINGS = {"shared_prefix": 0, "kv_dtype": None, "source": doubts.OURS}


def queue(qps, count, service, slots=1, kind="poisson", seed=0):
    """A point of a server with so many slots, each of which works `service` seconds on a request."""
    free, replies = [0.0] * slots, []
    for number, at in enumerate(arrivals.times(count, qps, kind, seed)):
        begun = max(at, min(free))
        free[free.index(min(free))] = begun + service
        replies.append(Reply(number, at, at, 100, 10, 100, [(begun + service / 2, 1), (begun + service, 9)], "usage"))
    ends = max(one.chunks[-1][0] for one in replies)
    card = {"input": 100, "output": 10, "qps": "inf" if math.isinf(qps) else qps, "prompts": count}
    return card | summary(replies, ends, {})


def judged(points):
    unloaded = saturation.unloaded_ms(points)
    for one in points:
        one["keeps_up"], one["done_share"] = saturation.keeps_up(one, unloaded)
        one["flags"] = doubts.of_point(one, SETTINGS, unloaded, None, None)
    return saturation.of_shape(points)


@pytest.mark.parametrize("kind", ["constant", "poisson"])
@pytest.mark.parametrize("seed", range(5))
def test_the_saturation_of_a_queue_is_found_between_the_rates_around_its_capacity(kind, seed):
    points = [queue(qps, 300, 0.2, slots=2, kind=kind, seed=seed) for qps in (1, 2, 4, 7, 14, 28, math.inf)]
    found = judged(points)  # 2 slots of 0.2 s: 10 a second
    assert (found["qps"], found["first_not"]) == (7.0, 14.0)
    assert "keeps up to QPS 7, not with 14" in found["told"]
    assert points[-1]["keeps_up"] is None and "burst" in points[-1]["flags"]


def test_a_server_that_keeps_up_with_every_rate_saturates_above():
    found = judged([queue(qps, 100, 0.1, slots=64) for qps in (1, 4, 16)])
    assert found["qps"] is None and found["at_least"] == 16 and "saturates above" in found["told"]


def test_the_papers_thirty_prompts_at_qps_32_tell_nothing_of_qps_32():
    """A request of 512 tokens at 24 ms each takes 12 s; 30 have all arrived within one."""
    points = [queue(qps, 30, 12.3, slots=64) for qps in (1.0, 8.0, 32.0)]
    found = judged(points)
    assert found["qps"] is None and found["at_least"] is None
    assert found["told"].endswith("QPS 1, 8, 32 too short to tell")
    said = points[-1]["flags"]["too_short"]
    assert "30 requests arrive within 0.9" in said and "each takes 12.3 s" in said
    assert "at least 1,182 requests are needed" in said


def test_a_run_as_long_as_it_says_is_long_enough():
    short = judged([queue(32.0, 30, 1.0, slots=64)])
    assert "too short" in short["told"]
    long = [queue(32.0, 130, 1.0, slots=64)]
    assert judged(long)["at_least"] == 32 and "too_short" not in long[0]["flags"]


def test_a_point_whose_requests_fail_is_not_kept_up_with():
    point = queue(4.0, 40, 0.1, slots=8)
    point |= {"completed": 30, "failed": 10, "failures": {"http_503": 10}}
    assert judged([point])["first_not"] == 4.0
    assert point["flags"]["failures"] == "10 of 40 requests failed (10 http_503)"


def test_the_floor_of_a_prompt_is_its_operations_at_the_peak():
    arch = sizes.architecture("gemma4-31b")
    flops = inference.prefill_flops(arch, 15360)
    weights = 29.3e9  # of the layers, without the embedding
    assert flops == pytest.approx(2 * weights * 15360, rel=0.15)
    assert flops > 2 * weights * 15360  # attention comes on top
    v6e = inference.least_ttft_ms(arch, 15360, chips.find("v6e-8"))
    assert v6e == pytest.approx(1e3 * flops / (8 * 918e12))
    assert inference.least_ttft_ms(arch, 15360, chips.find("v6e-4")) == pytest.approx(2 * v6e)


def test_layers_that_reuse_keys_count_for_the_last_token_alone():
    """Gemma 4 E2B: 20 of 35 layers, so the floor is far under that of all layers."""
    arch = sizes.architecture("gemma4-e2b")
    from gemma_tpu.estimate.roofline import layer_matmuls

    every = 2 * 4096 * sum(sum(layer_matmuls(arch, layer).values()) for layer in arch.layers)
    assert inference.prefill_flops(arch, 4096) < 0.6 * every


@pytest.mark.parametrize(("on", "tokens", "ttft"), [("v6e-8", 15360, 62.0), ("H100x2", 15360, 99.0)])
def test_the_papers_ttft_of_sixteen_thousand_tokens_cannot_be(on, tokens, ttft):
    point = queue(4.0, 30, 7.0, slots=64)
    for one in point["requests"]:
        one["ttft_ms"] = ttft
    floor = inference.least_ttft_ms(sizes.architecture("gemma4-31b"), tokens, chips.find(on))
    said = doubts.of_point(point, SETTINGS, 7000.0, floor, on)["ttft_below_floor"]
    assert said.startswith(f"30 of 30 TTFTs, down to {ttft:.0f} ms, are under the {floor:.0f} ms")
    assert "ttft_below_floor" not in doubts.of_point(point, SETTINGS, 7000.0, ttft - 1, on)


def test_doubts_name_what_the_client_and_the_server_did():
    point = queue(1.0, 30, 0.1) | {
        "beat_ms": {"p99": 80.0}, "counters": {"prefix_queries": 1000, "prefix_hits": 500, "preemptions": 3},
        "phases": {"requests": 41}, "fixed_output": True,
    }  # fmt: skip
    point["requests"][0]["output_tokens"] = 4
    point["requests"][1]["input_tokens"] = 101
    found = doubts.of_point(point, SETTINGS, 100.0, None, None)
    assert set(found) == {"client_late", "prefix_cache", "preempted", "other_traffic", "short_output", "input_length"}
    assert "late by 80.0 ms" in found["client_late"] and "41 requests" in found["other_traffic"]
    assert "explains 50 a prompt" in doubts.of_point(point, SETTINGS | {"shared_prefix": 50}, 100.0, None, None)[
        "prefix_cache"]  # fmt: skip
    assert doubts.of_point(queue(1.0, 30, 0.1), SETTINGS, 100.0, None, None) == {}


def test_a_run_says_when_the_kv_dtype_is_not_known():
    server = {"settings": {"cache_dtype": "auto"}}
    assert "says auto" in doubts.of_run(SETTINGS, server, [])["kv_dtype_unknown"]
    assert "kv_dtype_unknown" not in doubts.of_run(SETTINGS | {"kv_dtype": "bfloat16"}, server, [])
    assert "kv_dtype_unknown" not in doubts.of_run(SETTINGS, {"settings": {"cache_dtype": "fp8_e5m2"}}, [])
    assert "the file does not say" in doubts.of_run(SETTINGS | {"source": "vllm bench serve"}, server, [])[
        "kv_dtype_unknown"]  # fmt: skip
    assert "few_for_p99" in doubts.of_run(SETTINGS, server, [queue(1.0, 30, 0.1)])
    assert "few_for_p99" not in doubts.of_run(SETTINGS, server, [queue(1.0, 100, 0.1)])
