"""`gemma-tpu bench` against a server whose every delay is known."""

import asyncio
import json
import math
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from bench_server import Server
from test_page import check
from tokenizers import Tokenizer

from gemma_tpu import cli
from gemma_tpu.bench import bench_file, bench_page, bench_prompts, scrape
from gemma_tpu.errors import UserError
from gemma_tpu.tiny import tokenizer as tiny_tokenizer

DATA = Path(__file__).parent / "data"
CACHE = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="False"} 1.0\n'


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["module counter ( input clock , output q ) ; always registered the value of each adder select"] * 3
    tiny_tokenizer.write_tokenizer(folder, texts, 512)
    return folder


@pytest.fixture
def server(tokenizer):
    made = Server()
    read = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    made.count = lambda text: len(read.encode(text, add_special_tokens=False).ids)
    yield made
    made.stop()


@pytest.fixture
def bench(server, tokenizer, tmp_path, capsys):
    def run(*arguments, code=0, url=server.url, out="out.json"):
        more = ["--tokenizer", tokenizer, "--out", tmp_path / out] if url and "://" in url else []
        words = ["bench", *([url] if url else []), "--json", *more, *arguments]
        assert cli.main(list(map(str, words))) == code
        printed = capsys.readouterr()
        run.said = printed.err
        return json.loads(printed.out)

    return run


ONE = ("--input", 24, "--output", 12, "--qps", 40, "--prompts", 20, "--warmup", 1)
QUICK = ("--input", 24, "--output", 12, "--qps", "inf", "--prompts", 4, "--warmup", 0)


def near(value, wanted, early=0.95):
    """A busy machine is late, never early."""
    return early * wanted <= value <= 1.4 * wanted + 10


def test_known_delays_come_back_as_ttft_tpot_itl_and_e2e(server, bench):
    server.first, server.gap = 0.1, 0.03
    found = bench(*ONE)
    assert (found["completed"], found["failed"]) == (20, 0)
    assert near(found["ttft_ms"]["p50"], 100)
    assert near(found["tpot_ms"]["p50"], 30, early=0.85)
    assert near(found["itl_ms"]["p50"], 30, early=0.85)
    assert near(found["e2e_ms"]["p50"], 100 + 11 * 30)
    assert found["output_throughput"] == pytest.approx(20 * 12 / found["duration"], rel=1e-3)
    assert found["points"][0]["counted_by"] == ["usage"] and found["points"][0]["tokens_per_chunk"] == 1
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]


def test_the_loop_is_open_a_slow_server_is_asked_no_less_often(server, bench):
    """Every request is sent at its time, though none has been answered yet."""
    server.first, server.gap = 0.6, 0.0
    found = bench("--input", 8, "--output", 2, "--qps", 60, "--prompts", 24, "--arrivals", "constant", "--warmup", 0)
    requests = found["points"][0]["requests"]
    assert [one["scheduled"] for one in requests] == pytest.approx([(n + 1) / 60 for n in range(24)], abs=1e-6)
    assert all(0 <= one["sent"] - one["scheduled"] < 0.15 for one in requests)
    assert max(one["sent"] for one in requests) < 0.6
    assert found["points"][0]["lag_ms"]["p99"] < 150
    assert 0.99 < found["duration"] < 1.5


@pytest.mark.parametrize("usage", ["every", "last", "none"])
def test_chunks_of_several_tokens_are_counted_as_tokens(server, bench, usage):
    server.together, server.usage, server.gap = 4, usage, 0.04
    found = bench(*ONE)
    point = found["points"][0]
    assert point["output_tokens"] == 20 * 12 and point["tokens_per_chunk"] == 4
    assert near(found["itl_ms"]["mean"], 2 * 40 / 11, early=0.8)  # 2 waits of 40 ms, shared by 11 tokens
    assert near(point["chunk_gap_ms"]["p50"], 40, early=0.8)
    assert point["counted_by"] == (["tokenizer"] if usage == "none" else ["usage"])
    assert ("tokens_by_text" in point["flags"]) == (usage == "none")


def test_prompts_have_exactly_the_tokens_asked_for_and_none_comes_twice(server, bench):
    server.overhead = 5  # as a template or a BOS would add
    found = bench("--input", "24,40", "--output", 4, "--qps", "50,inf", "--prompts", 6)
    asked = [body["prompt"] for body in server.bodies]
    assert len(asked) == len(set(asked)) == 1 + 2 * 2 + 4 * 6
    assert {server.count(text) for text in asked[1:]} == {19, 35}
    assert all(one["input_tokens"] == point["input"] for point in found["points"] for one in point["requests"])
    assert "input_length" not in {name for point in found["points"] for name in point["flags"]}
    assert "+5 tokens" in bench.said
    before = set(asked)
    bench("--input", 24, "--output", 4, "--qps", "50", "--prompts", 6, out="again.json")
    assert not before & {body["prompt"] for body in server.bodies[len(asked):]}


def test_a_shared_prefix_is_shared_and_stated(server, bench):
    found = bench("--input", 30, "--output", 2, "--qps", "inf", "--prompts", 6, "--shared-prefix", 20, "--warmup", 0)
    texts = [body["prompt"] for body in server.bodies[1:]]
    common = len(Path(texts[0]).name)
    for text in texts[1:]:
        common = min(common, next(at for at, (a, b) in enumerate(zip(text, texts[0], strict=False)) if a != b))
    assert server.count(texts[0][:common]) >= 19
    assert found["settings"]["shared_prefix"] == 20


def test_what_a_server_refuses_is_left_out_and_said(server, bench):
    server.unknown = {"continuous_usage_stats"}
    bench(*QUICK)
    assert server.bodies[-1]["ignore_eos"] and server.bodies[-1]["stream_options"] == {"include_usage": True}
    server.unknown, server.bodies = {"ignore_eos", "continuous_usage_stats"}, []
    bench(*QUICK, out="min.json")
    assert server.bodies[-1]["min_tokens"] == 12 and "ignore_eos" not in server.bodies[-1]
    server.unknown, server.bodies = {"ignore_eos", "min_tokens", "stream_options"}, []
    found = bench(*QUICK, out="none.json")
    assert set(server.bodies[-1]) == {"model", "prompt", "max_tokens", "temperature", "stream"}
    assert "short_output" not in found["points"][0]["flags"]
    server.short = 3
    said = bench(*QUICK, out="short.json")["points"][0]["flags"]["short_output"]
    assert said.startswith("4 of 4 answers ended before 12 tokens (the shortest after 3)")
    assert found["points"][0]["counted_by"] == ["tokenizer"] and "nothing beyond OpenAI's own" in bench.said


def test_chats_go_to_the_chat_endpoint_and_their_role_is_no_token(server, bench):
    server.first = 0.08
    for usage in ("every", "last"):
        server.usage = usage
        found = bench("--endpoint", "chat", *QUICK, out=f"{usage}.json")
        assert server.bodies[-1]["messages"][0]["role"] == "user"
        assert near(found["ttft_ms"]["p50"], 80)
        assert found["points"][0]["output_tokens"] == 4 * 12
    server.unknown, server.bodies = {"max_tokens"}, []
    bench("--endpoint", "chat", *QUICK, out="newer.json")
    assert server.bodies[-1]["max_completion_tokens"] == 12


def test_failures_are_counted_by_their_kind_and_spoil_no_latency(server, bench):
    faults = [None, 503, "close", "cut", "error", "json", "empty", "stall", 429, 503]
    server.faults = [None, *faults]  # the first request is not counted
    found = bench("--input", 8, "--output", 12, "--qps", 50, "--prompts", 11, "--warmup", 0, "--timeout", 1)
    assert found["points"][0]["failures"] == {
        "http_503": 2, "closed": 1, "cut_off": 1, "error_event": 1, "not_streamed": 1, "no_tokens": 1, "stalled": 1,
        "http_429": 1,
    }  # fmt: skip
    assert (found["completed"], found["failed"]) == (2, 9)
    assert found["e2e_ms"]["p99"] < 900  # the one that stalled took a second
    said = {one["error"]: one["said"] for one in found["points"][0]["requests"] if "error" in one}
    assert said["http_429"] == "no, 429" and said["error_event"] == "out of memory"
    assert found["points"][0]["flags"]["failures"].startswith("9 of 11 requests failed")


def test_a_kept_connection_that_the_server_has_closed_is_replaced_and_counted(server, bench):
    server.faults = [None, None, "refuse"]
    found = bench("--input", 8, "--output", 2, "--qps", 5, "--prompts", 3, "--warmup", 0)
    assert (found["completed"], found["points"][0]["reconnected"]) == (3, 1)


def test_a_server_that_is_gone_ends_the_sweep_and_keeps_what_is_finished(server, bench):
    server.faults = [None] * 6 + [500] * 5
    found = bench("--input", 8, "--output", 2, "--qps", "50,inf", "--prompts", 5, "--warmup", 0, code=1)
    assert "every request of 8/2 at QPS inf failed: {'http_500': 5}; no, 500" in found["error"]
    found = bench("--input", 8, "--output", 2, "--qps", "50,inf", "--prompts", 5, "--warmup", 0)
    assert "1 of 2 points are in" in bench.said
    assert [one["completed"] for one in found["points"]] == [5, 5] and len(server.bodies) == 6 + 5 + 1 + 5


def test_a_finished_sweep_is_not_run_again_and_another_is_refused(server, bench, tmp_path):
    first = bench(*QUICK)
    asked = len(server.bodies)
    assert bench(*QUICK)["points"] == first["points"] and len(server.bodies) == asked
    found = bench(*QUICK, "--seed", 5, code=2)
    assert "seed: 0 there, 5 now" in found["error"] and "name another file" in found["error"]
    assert "notes: {} there, {'tp': '8'} now" in bench(*QUICK, "--note", "tp=8", code=2)["error"]
    (tmp_path / "out.json").write_text('{"request_rate": 1}')
    assert "neither a result of this command" in bench(*QUICK, code=2)["error"]
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_a_server_that_is_too_slow_saturates_between_two_rates(server, bench):
    """One request at a time of 20 ms: fewer than 50 a second."""
    server.first, server.gap, server.slots = 0.02, 0.0, asyncio.Semaphore(1)
    found = bench("--input", 8, "--output", 2, "--qps", "25,200", "--prompts", 40, "--arrivals", "constant")
    assert found["saturation"]["8/2"]["first_not"] == 200.0 and found["saturation_qps"] == 25.0
    assert [one["keeps_up"] for one in found["points"]] == [True, False]


def test_the_servers_own_clocks_split_the_latency(server, bench):
    server.metrics_text = CACHE
    found = bench("--input", 8, "--output", 6, "--qps", 40, "--prompts", 10)
    point = found["points"][0]
    assert point["phases"]["requests"] == 10
    split = point["split_ms"]
    assert split["queue"] == pytest.approx(0, abs=0.1) and split["prefill"] == pytest.approx(20)
    assert split["decode"] == pytest.approx(10) and split["server_other"] == pytest.approx(10)
    assert sum(split.values()) == pytest.approx(point["e2e_ms"]["mean"], abs=0.01)
    assert found["server"]["settings"] == {"cache_dtype": "auto", "enable_prefix_caching": "False", "block_size": "16"}
    assert found["server"]["version"] == "9.9" and "kv_dtype_unknown" in found["flags"]
    assert "kv_dtype_unknown" not in bench("--input", 8, "--output", 6, "--qps", 40, "--prompts", 10, "--kv-dtype",
                                           "bfloat16", out="kv.json")["flags"]  # fmt: skip


def test_metrics_are_read_whatever_their_prefix():
    text = "# HELP x\n" + "".join(
        f'gemma_tpu:request_{phase}_time_seconds_sum{{a="b\\"c,}}"}} {value}\n'
        f"gemma_tpu:request_{phase}_time_seconds_count 4\n"
        for phase, value in (("queue", 1), ("prefill", 2), ("decode", 3))
    ) + "prefix_cache_hits_total 5\nprefix_cache_queries_total 50\nodd line\nbad NaNa\n"  # fmt: skip
    samples = scrape.parse(text)
    phases = scrape.phases({}, samples)
    assert phases == {"queue": 250.0, "prefill": 500.0, "decode": 750.0, "requests": 4}
    assert scrape.counters({}, samples) == {"prefix_queries": 50, "prefix_hits": 5}
    assert scrape.split(phases, 1600.0) == {"queue": 250.0, "prefill": 500.0, "decode": 750.0, "transport": 100.0}
    assert scrape.split(None, 1.0) is None and scrape.phases(samples, samples) is None


def test_own_prompts_are_sent_as_they_stand_once_each(server, bench, tmp_path):
    file = tmp_path / "own.jsonl"
    rows = [{"prompt": f"the adder number {n}"} for n in range(11)] + [{"prompt": "long", "output": 9}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = bench("--data", file, "--output", 3, "--qps", "40,inf", "--prompts", 5)
    assert [body["prompt"] for body in server.bodies] == [row["prompt"] for row in rows]
    assert found["points"][0]["input"] is None and server.bodies[-1]["max_tokens"] == 9
    assert "12 prompts, and 14 are needed" in bench("--data", file, "--output", 3, "--qps", "40,inf", "--prompts", 6,
                                                    code=2, out="more.json")["error"]  # fmt: skip
    file.write_text('{"prompt": "a"}\nno\n{"messages": [{"role": "user", "content": "x"}]}\n{"prompt": 5}\n')
    found = bench("--data", file, "--output", 3, "--qps", 1, "--prompts", 1, code=2, out="bad.json")
    assert all(said in found["error"] for said in ("line 2: no JSON", "line 3: messages go to", "line 4: needs"))


@pytest.mark.parametrize(("arguments", "said"), [
    ((), "none is given"),
    (("--preset", "paper", "--qps", 1), "given: --preset and --qps"),
    (("--preset", "paper"), "context of 2,048 tokens, too short for 4096/512, 8192/512, 15360/512"),
    (("--input", 8, "--qps", 1), "--output missing"),
    (("--preset", "paper", "--prompts", 5), "has its own"),
    (("--input", 8, "--output", 8, "--qps", 1, "--model", "other"), "serves tiny"),
    (("--input", 8, "--output", 8, "--qps", 1, "--slo", "fast"), "--slo fast"),
    (("--input", 8, "--output", 8, "--qps", 1, "--on", "v9-1"), "no slice that is known"),
    (("--input", 8, "--output", 8, "--qps", 1, "--on", "v6e-8"), "give --weights DIR or a published name"),
    (("--input", 8, "--output", 8, "--qps", 1, "--note", "x"), "NAME=VALUE"),
    (("--input", 8, "--output", 8, "--qps", 1, "--shared-prefix", 8), "must be less than the 8 tokens"),
    (("--compare", "a", "b"), "takes result files alone"),
])  # fmt: skip
def test_wrong_input_is_one_message(server, bench, arguments, said):
    assert said in bench(*arguments, code=2)["error"]


def test_a_server_that_refuses_or_is_not_there_is_said_at_once(server, bench, tokenizer):
    server.faults = [401]
    assert "refuses the first request: http_401: no, 401" in bench(*QUICK, code=2)["error"]
    server.faults = ["refuse"]
    assert "the first request failed: closed" in bench(*QUICK, code=1, out="b.json")["error"]
    server.models = [{"id": "a"}, {"id": "b"}]
    assert "serves a, b: say which model" in bench(*QUICK, code=2, out="c.json")["error"]
    assert "no answer" in bench(*QUICK, code=1, url="http://127.0.0.1:9", out="d.json")["error"]
    assert "begins with http://" in bench(*QUICK, code=2, url="ftp://x", out="e.json")["error"]


def test_a_port_that_speaks_another_protocol_is_said(bench):
    with socket.create_server(("127.0.0.1", 0)) as door:

        def greet():
            line, _ = door.accept()
            with line:
                line.recv(4096)
                line.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        said = bench(*QUICK, code=1, url=f"http://127.0.0.1:{door.getsockname()[1]}")["error"]
        thread.join()
    assert "no answer (SSH-2.0-OpenSSH_9.6" in said


@pytest.mark.parametrize("told, version", [('{"version": "9.9"}', "9.9"), ("{", None), ("[1]", None), (None, None)])
def test_a_version_that_cannot_be_read_is_none(told, version, monkeypatch):
    monkeypatch.setattr(scrape, "_get", lambda url: told)
    assert scrape._version("http://x/v1") == version


def test_a_missing_tokenizer_is_asked_for(server, capsys):
    assert cli.main(["bench", server.url, "--input", "8", "--output", "8", "--qps", "1"]) == 2
    assert "give --tokenizer DIR" in capsys.readouterr().err


def test_a_text_has_exactly_so_many_tokens_at_every_length(tokenizer, tmp_path):
    vocabulary, random = bench_prompts.Vocabulary(tokenizer), np.random.default_rng(0)
    for tokens in [*range(1, 40), 500, 4096]:
        text = vocabulary.text(tokens, random)
        assert vocabulary.count(text) == tokens and text == text.strip()
    with pytest.raises(UserError, match="no tokenizer.json"):
        bench_prompts.Vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        bench_prompts.Vocabulary(tmp_path)
    with pytest.raises(UserError, match="no room"):
        bench_prompts.random_prompts(vocabulary, 2, 5, key=[0], chat=False, extra=5)
    with pytest.raises(UserError, match="too few texts of 1 tokens"):
        bench_prompts.random_prompts(vocabulary, 5000, 1, key=[0], chat=False)


# --- results ---


@pytest.mark.parametrize("name", ["vllm_bench_detailed.json", "vllm_bench_plain.json"])
def test_files_of_vllm_bench_serve_are_read_as_they_count(bench, name):
    theirs = json.loads((DATA / name).read_text())
    found = bench(url=str(DATA / name))
    assert found["completed"] == theirs["completed"] and found["failed"] == theirs["failed"]
    assert found["output_throughput"] == pytest.approx(theirs["output_throughput"], rel=1e-6)
    for ours, key in (("ttft_ms", "ttft"), ("tpot_ms", "tpot"), ("itl_ms", "itl"), ("e2e_ms", "e2el")):
        for part, prefix in (("p50", "median"), ("p90", "p90"), ("p99", "p99")):
            wanted = theirs.get(f"{prefix}_{key}_ms")
            if key == "e2el" and wanted is None:  # not asked for, and yet told by the latencies
                wanted = 1e3 * np.percentile(theirs["latencies"], int(part[1:]))
            # The plain file has no p90.
            assert found[ours][part] == (None if wanted is None else pytest.approx(wanted, rel=1e-4)), (ours, part)
    assert found["settings"]["source"] == "vllm bench serve"
    assert ("burst" in found["points"][0]["flags"]) == (theirs["request_rate"] == "inf")
    if "ttfts" in theirs:
        assert len(found["points"][0]["requests"]) == theirs["num_prompts"]
        assert bench("--slo", "ttft=0.001", url=str(DATA / name))["goodput"] == 0.0


def test_several_runs_appended_to_one_file_are_several_points(bench, tmp_path):
    """--append-result puts a newline between whole objects."""
    one = json.loads((DATA / "vllm_bench_plain.json").read_text())
    file = tmp_path / "appended.json"
    file.write_text("\n".join(json.dumps(one | {"request_rate": qps}) for qps in (1.0, 2.0, "inf")))
    assert [one["qps"] for one in bench(url=str(file))["points"]] == [1.0, 2.0, "inf"]
    file.write_text(file.read_text()[:-30])
    assert "no JSON" in bench(url=str(file), code=2)["error"]


@pytest.mark.slow
def test_two_runs_are_compared_where_they_have_the_same_points(server, bench, tmp_path, capsys):
    bench("--input", 24, "--output", 12, "--qps", "40,inf", "--prompts", 10, out="fast.json")
    server.gap = 0.008
    bench("--input", 24, "--output", 12, "--qps", "40,80", "--prompts", 10, out="slow.json")
    files = [str(tmp_path / name) for name in ("fast.json", "slow.json")]
    found = bench("--compare", *files, url=None)
    assert [(one["shape"], one["qps"]) for one in found["points"]] == [("24/12", "40")]
    fast, slow = found["points"][0]["TPOT p50"]
    assert 1.4 < slow / fast < 2.8
    assert sorted(found["alone"]) == ["24/12 at QPS 80: only in slow", "24/12 at QPS inf: only in fast"]
    near = json.loads((tmp_path / "slow.json").read_text())
    for point in near["points"]:
        point["input"] += 1  # a BOS that the other did not count
    (tmp_path / "near.json").write_text(json.dumps(near))
    assert len(bench("--compare", files[0], tmp_path / "near.json", url=None)["points"]) == 1
    page = tmp_path / "both.html"
    assert cli.main(["bench", "--compare", *files, str(DATA / "vllm_bench_plain.json"), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "A: fast: tiny, gemma-tpu bench 9.9" in printed and "C: vllm_bench_plain" in printed
    words = check(page.read_text()).words
    assert "Point by point" in words and "24/12: TTFT, p50" in words
    assert "needs two result files" in bench("--compare", files[0], url=None, code=2)["error"]


def test_the_page_draws_what_was_measured_with_its_doubts(server, bench, tmp_path, capsys):
    server.metrics_text = CACHE
    page = tmp_path / "deep" / "page.html"
    found = bench("--input", "8,24", "--output", 12, "--qps", "40,80,inf", "--prompts", 10, "--slo", "ttft=500",
                  "--note", "tp=8", "--html", page)  # fmt: skip
    seen = check(page.read_text())
    assert sum(tag == "circle" for tag, _ in seen.seen) == 6 * 9  # points, in nine pictures
    for words in ("Output tokens a second", "TTFT, p50", "E2E, p99", "Where the time goes", "goodput"):
        assert words in seen.words
    assert "tp" in seen.words and found["settings"]["notes"] == {"tp": "8"}
    assert found["goodput"] > 0 and found["good_share"] == 1.0
    capsys.readouterr()
    assert cli.main(["bench", str(tmp_path / "out.json"), "--on", "v6e-8", "--weights", "google/gemma-4-31B-it"]) == 0
    printed = capsys.readouterr().out
    assert "8/12" in printed and "keeps up" in printed and "burst" in printed
    assert cli.main(["bench", str(tmp_path / "out.json"), "--on", "v6e-8"]) == 2
    assert "give --weights" in capsys.readouterr().err


def test_a_ttft_under_the_floor_of_the_stated_hardware_is_flagged(server, bench):
    """A prompt of 1,900 tokens of a 31B model takes four v5e chips 145 ms at least; this server answers after 5."""
    server.first = 0.005
    found = bench("--input", 1900, "--output", 2, "--qps", 20, "--prompts", 6, "--on", "v5e-4", "--weights",
                  "google/gemma-4-31B-it")  # fmt: skip
    point = found["points"][0]
    assert point["ttft_floor_ms"] == pytest.approx(1900 * 2 * 29.5e9 / (4 * 197e12) * 1e3, rel=0.1)
    assert point["flags"]["ttft_below_floor"].startswith("6 of 6 TTFTs")
    assert "ttft_below_floor" not in bench(*QUICK, "--on", "v6e-8", "--weights", "google/gemma-3-270m-it",
                                           out="small.json")["points"][0]["flags"]  # fmt: skip


def test_a_damaged_or_foreign_file_is_refused(bench, tmp_path, server):
    file = tmp_path / "x.json"
    for text, said in (("{", "no JSON"), ("[1]", "neither a result"), ('{"format": "gemma-tpu bench 1"}', "damaged"),
                       ("", "neither a result")):  # fmt: skip
        file.write_text(text)
        assert said in bench(url=str(file), code=2)["error"]
    assert "no such file" in bench(url=str(tmp_path / "none.json"), code=2)["error"]
    assert "begins with http://" in bench(url="localhost:8000", code=2)["error"]
    assert "no such file: a, b" in bench("--compare", "a", "b", url=None, code=2)["error"]
    shutil.copy(DATA / "vllm_bench_plain.json", file)
    assert "no result of this command" in bench(*ONE, code=2, out="x.json")["error"]
    assert bench_file.read(file).points[0]["qps"] in ("inf", 2) or math.isfinite(bench_file.read(file).points[0]["qps"])


@pytest.mark.parametrize("values", [(-3.0, 100.0), (-3.0, -1.0), (5e-324, 1e308), (1.0, 100.0)])
def test_a_file_that_says_negative_milliseconds_is_drawn(values):
    points = [{"qps": 1.0}, {"qps": 2.0}]
    drawn = bench_page._picture([("a", points)], lambda one: values[int(one["qps"]) - 1], "ms", True)
    assert "nan" not in drawn and all(f"QPS {qps}" in drawn for qps in (1, 2))
