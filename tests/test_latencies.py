"""The arithmetic of a measurement, on requests whose every time is written down here."""

import numpy as np
import pytest

from gemma_tpu.bench import latencies
from gemma_tpu.bench.latencies import Reply
from gemma_tpu.errors import UserError


def reply(sent, *chunks, **more):
    return Reply(0, sent, sent, asked_input=8, asked_output=4, input_tokens=8, chunks=list(chunks),
                 counted_by="usage", **more)  # fmt: skip


def failed(kind="http_503"):
    return Reply(0, 0.0, 0.0, asked_input=8, asked_output=4, error=kind, said="no")


def test_the_latencies_of_one_token_a_chunk_are_those_of_vllm_bench_serve():
    one = reply(1.0, (1.5, 1), (1.6, 1), (1.8, 1))
    assert one.ttft == pytest.approx(0.5) and one.e2e == pytest.approx(0.8) and one.tpot == pytest.approx(0.15)
    assert one.itl == pytest.approx([0.1, 0.2]) == one.gaps


def test_several_tokens_in_a_chunk_share_its_wait_and_add_up_to_the_whole():
    one = reply(0.0, (0.5, 3), (0.8, 2), (0.9, 1))
    assert one.itl == pytest.approx([0, 0, 0.15, 0.15, 0.1])
    assert one.output_tokens == 6 == len(one.itl) + 1
    assert sum(one.itl) == pytest.approx(one.e2e - one.ttft)
    assert one.tpot == pytest.approx(np.mean(one.itl))
    assert one.gaps == pytest.approx([0.3, 0.1])


def test_a_single_token_has_no_tpot_and_no_itl():
    one = reply(0.0, (0.25, 1))
    assert one.tpot is None and one.itl == [] and one.e2e == one.ttft == 0.25


def test_percentiles_lie_between_values_linearly_and_are_milliseconds():
    found = latencies.percentiles([0.01 * n for n in range(1, 12)])
    assert (found["p50"], found["p90"], found["p99"], found["mean"]) == (60.0, 100.0, 109.0, 60.0)
    assert latencies.percentiles([]) == {"p50": None, "p90": None, "p99": None, "mean": None}


def test_a_summary_counts_failures_by_kind_and_leaves_them_out_of_every_latency():
    found = latencies.summary(
        [reply(0.0, (0.1, 1), (0.2, 3)), reply(1.0, (1.3, 1), (1.6, 3)), failed(), failed("stalled"), failed()], 2.0, {}
    )
    assert (found["completed"], found["failed"]) == (2, 3)
    assert found["failures"] == {"http_503": 2, "stalled": 1}
    assert found["output_tokens"] == 8 and found["output_throughput"] == 4.0
    assert found["input_tokens"] == 16 and found["input_throughput"] == 8.0
    assert found["request_throughput"] == 1.0
    assert found["ttft_ms"]["p50"] == 200.0
    assert found["tokens_per_chunk"] == 2.0
    assert found["itl_ms"]["mean"] == pytest.approx(1e3 * (0.1 + 0.3) / 6, abs=1e-3)
    assert found["chunk_gap_ms"]["mean"] == 200.0
    assert [one.get("error") for one in found["requests"]] == [None, None, "http_503", "stalled", "http_503"]


def test_a_summary_of_nothing_but_failures_has_no_latency():
    found = latencies.summary([failed()], 1.0, {"ttft": 1.0})
    assert found["completed"] == 0 and found["output_throughput"] == 0.0 and found["ttft_ms"]["p50"] is None
    assert found["goodput"] == 0.0


def test_goodput_counts_requests_that_meet_every_bound_and_no_failure():
    replies = [reply(0.0, (0.1, 1), (0.2, 1)), reply(0.0, (0.1, 1), (0.4, 1)), reply(0.0, (0.3, 1), (0.4, 1)),
               reply(0.0, (0.1, 1)), failed()]  # fmt: skip
    found = latencies.summary(replies, 2.0, {"ttft": 200.0, "tpot": 150.0})
    assert found["goodput"] == 1.0  # the first, and the one of a single token, in 2 s
    assert found["good_share"] == 0.4
    assert latencies.summary(replies, 2.0, {"e2e": 400.0001})["good_share"] == 0.8
    assert latencies.summary(replies, 2.0, {})["goodput"] is None


def test_an_slo_is_read_and_what_is_wrong_with_it_is_named():
    assert latencies.parse_slo("ttft=500, tpot=50,e2e=1e4") == {"ttft": 500.0, "tpot": 50.0, "e2e": 1e4}
    assert latencies.parse_slo(None) == {}
    for wrong in ("e2el=5", "ttft", "ttft=fast", "tpot=-1", "itl=5", "ttft=inf"):
        with pytest.raises(UserError, match="milliseconds of ttft, tpot, e2e"):
            latencies.parse_slo(wrong)
