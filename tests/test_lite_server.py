"""The small server, in this process on a port of 127.0.0.1: what it answers is what the sampler gives."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from lite_helper import CAPACITY, QUEUE, Server, wait_for
from runs_helper import DIMS

import gemma_tpu
from gemma_tpu import cli
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.sampling import sampler
from gemma_tpu.sampling.asking import Asked, conversation, every
from gemma_tpu.sampling.completions import Writer
from gemma_tpu.sampling.drawing import Settings
from gemma_tpu.sampling.endpoint import Endpoint
from gemma_tpu.tiny.checkpoint import write_tiny

NEW = 12
TEXTS = ["one", "module counter(input clk", "x" * 30, "hello there"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One local layer and one global: what compiles fastest."""
    return write_tiny(tmp_path_factory.mktemp("lite") / "base", dtype="float32", **(DIMS | {"layers": 2}))


@pytest.fixture(scope="module")
def server(base):
    found = Server(base)
    yield found
    found.stop()
    assert found.engine.state == "stopped" and found.engine.metrics.totals()["recompiles"] == 0


@pytest.fixture(scope="module")
def writer(base):
    """What `gemma-tpu sample` prints comes from it."""
    return Writer(sampler.Sampler(gemma_tpu.load(base), rows=4), Tokenizer(base))


@pytest.fixture(scope="module")
def greedy(writer):
    return writer.write([*every(TEXTS, raw=True), Asked(conversation(TEXTS[0]))], Settings(max_new_tokens=NEW))


# --- what it answers ------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_sample(server, greedy):
    found = server.text(TEXTS, max_tokens=NEW, logprobs=0)
    assert [one["index"] for one in found["choices"]] == list(range(len(TEXTS)))
    for one, wanted in zip(found["choices"], greedy, strict=False):
        assert one["text"] == wanted["text"] and one["finish_reason"] == wanted["finish_reason"]
        np.testing.assert_allclose(one["logprobs"]["token_logprobs"], wanted["logprobs"], atol=1e-4)
    assert found["usage"]["completion_tokens"] == sum(len(one["tokens"]) for one in greedy[:-1])
    chat = server.ask("/v1/chat/completions", {"messages": conversation(TEXTS[0]), "max_tokens": NEW, "temperature": 0})
    assert chat[1]["choices"][0]["message"] == {"role": "assistant", "content": greedy[-1]["text"]}


@pytest.mark.slow
def test_a_seed_gives_the_samples_of_that_seed_whoever_else_is_there(server, writer):
    hot = Settings(max_new_tokens=NEW, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3)
    wanted = writer.write(every(TEXTS[:2], n=3, raw=True), hot)
    said = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.text, TEXTS[3], max_tokens=30) for _ in range(3)]
        found = pool.submit(server.text, TEXTS[:2], **said, n=3, max_tokens=NEW).result()
    assert [one["text"] for one in found["choices"]] == [one["text"] for one in wanted]
    assert len({other.result()["choices"][0]["text"] for other in others}) == 1


def test_ids_are_prompts_too_and_n_samples_share_a_prefill(server, writer):
    ids = writer.tokenizer.encode(TEXTS[1], bos=True)
    before = server.metric("prompt_tokens_total")
    found = server.text(ids, n=7, temperature=1.0, max_tokens=3)
    assert len({one["text"] for one in found["choices"]}) > 1 and found["usage"]["prompt_tokens"] == len(ids)
    assert server.metric("prompt_tokens_total") == before + len(ids)
    assert server.text(ids, max_tokens=4)["choices"] == server.text(TEXTS[1], max_tokens=4)["choices"]


def test_a_stream_joins_to_the_whole_answer_log_probabilities_and_all(server):
    body = {"prompt": TEXTS[:2], "max_tokens": NEW, "temperature": 1.5, "seed": 3, "logprobs": 2, "echo": True}
    whole = server.text(**body)
    chunks = server.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and len({chunk["id"] for chunk in chunks}) == 1
    for wanted in whole["choices"]:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == wanted["index"]]
        assert len(mine) > 2 and "".join(one["text"] for one in mine) == wanted["text"]
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == wanted["finish_reason"]
        joined = {name: sum((one["logprobs"][name] for one in mine), []) for name in wanted["logprobs"]}
        for name in ("tokens", "text_offset"):
            assert joined[name] == wanted["logprobs"][name]
        # In another slot the last digit of a sum may differ.
        assert joined["token_logprobs"][1:] == pytest.approx(wanted["logprobs"]["token_logprobs"][1:], abs=1e-4)
        for ours, theirs in zip(joined["top_logprobs"][1:], wanted["logprobs"]["top_logprobs"][1:], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_chat_streams_a_role_then_text_then_why_it_ended(server, greedy):
    body = {"messages": conversation(TEXTS[0]), "max_tokens": NEW, "temperature": 0}
    deltas = [chunk["choices"][0] for chunk in server.stream("/v1/chat/completions", body)]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(one["delta"].get("content", "") for one in deltas) == greedy[-1]["text"]
    assert deltas[-1]["finish_reason"] == greedy[-1]["finish_reason"]


def test_the_log_probabilities_of_a_prompt_are_those_of_the_forward_pass(server, writer, base):
    """What lm-eval's local-completions asks for."""
    ids = writer.tokenizer.encode(TEXTS[1], bos=True)
    logits_TV = np.asarray(gemma_tpu.load(base)(np.array([ids]))[0])
    wanted_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    for most in (0, 1):
        said = server.text(ids, max_tokens=most, echo=True, logprobs=3)["choices"][0]["logprobs"]
        assert len(said["tokens"]) == len(ids) + most and said["token_logprobs"][0] is said["top_logprobs"][0] is None
        for place, token in enumerate(ids[1:], start=1):
            assert said["token_logprobs"][place] == pytest.approx(wanted_TV[place - 1, token], abs=1e-4)
            top = said["top_logprobs"][place]
            assert max(top.values()) == pytest.approx(wanted_TV[place - 1].max(), abs=1e-4)
            assert said["token_logprobs"][place] in top.values(), "to the last bit: lm-eval compares them"
    assert "".join(said["tokens"]).startswith("<bos>" + TEXTS[1])


def test_alternatives_are_the_likeliest_tokens_at_each_place(server):
    greedy = server.text(TEXTS[0], max_tokens=6, logprobs=4)["choices"][0]["logprobs"]
    assert all(own == max(top.values()) for own, top in
               zip(greedy["token_logprobs"], greedy["top_logprobs"], strict=True))  # fmt: skip
    body = {"messages": conversation("a"), "max_tokens": 3, "logprobs": True, "top_logprobs": 3, "temperature": 2.0}
    for one in server.ask("/v1/chat/completions", body)[1]["choices"][0]["logprobs"]["content"]:
        values = [top["logprob"] for top in one["top_logprobs"]]
        assert len(values) == 3 and values == sorted(values, reverse=True) and one["logprob"] <= values[0] + 1e-5
        assert one["bytes"] in (None, list(one["token"].encode()))


def test_a_stop_string_and_a_stop_token_end_a_text_before_them(server, writer, greedy):
    text, tokens = greedy[0]["text"], greedy[0]["tokens"]
    stop = text[len(text) // 2 :][:3]
    found = server.text(TEXTS[0], max_tokens=NEW, stop=[stop, "never"])["choices"][0]
    assert (found["text"], found["finish_reason"]) == (text[: text.index(stop)], "stop")
    chunks = server.stream("/v1/completions", {"prompt": TEXTS[0], "max_tokens": NEW, "stop": stop, "temperature": 0})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == found["text"]
    found = server.text(TEXTS[0], max_tokens=NEW, stop_token_ids=[tokens[5]])["choices"][0]
    assert found["text"] == writer.tokenizer.decode(tokens[: tokens.index(tokens[5])])
    assert found["finish_reason"] == "stop"


def test_the_endpoint_client_and_eval_ask_it_like_any_server(server, greedy, capsys, tmp_path):
    found = Endpoint(server.url).write(every(TEXTS[:2], raw=True), Settings(max_new_tokens=NEW))
    assert [one["text"] for one in found] == [one["text"] for one in greedy[:2]]
    hot = ["--prompt", "a", "--n", "2", "--temperature", "1", "--top-k", "9", "--max-new-tokens", "3", "--json"]
    assert cli.main(["sample", server.url, *hot]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 2


# --- what it refuses ------------------------------------------------------------------------------------------


def test_an_over_long_request_is_refused_and_others_go_to_the_next_bucket(server):
    before = server.metric('prefill_bucket_hits_total')
    error = server.refused("/v1/completions", {"prompt": [5] * 180, "max_tokens": 13})
    assert error["code"] == "context_length_exceeded"
    assert f"has 180 tokens, and with 13 new ones 193: at most {CAPACITY} fit here" in error["message"]
    for length in (64, 65, 180):
        assert server.text([5] * length, max_tokens=12)["usage"]["prompt_tokens"] == length
    lines = server.ask("/metrics")[1]
    assert 'prefill_bucket_hits_total{bucket="64"}' in lines and 'prefill_bucket_hits_total{bucket="192"}' in lines
    assert server.metric("prefill_bucket_hits_total") == before + 3
    assert 0 < server.metric("prefill_padding_share") < 1
    chat = server.ask("/v1/chat/completions", {"messages": conversation("a"), "ignore_eos": True, "temperature": 0})
    assert chat[1]["usage"]["total_tokens"] == CAPACITY, "without max_tokens a chat may use all that fits"


@pytest.mark.parametrize("path, body, words", [
    ("/v1/completions", b"{", "the body is no JSON"), ("/v1/completions", {"prompt": [1024]}, "token id 1024"),
    ("/v1/completions", {"prompt": "a", "colour": 1}, "'colour' is no field"),
    ("/v1/chat/completions", {"messages": conversation("a"), "chat_template_kwargs": {"enable_thinking": True}},
     "renders no thinking"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": list(range(8)), "max_tokens": 10**9}, "at most 192 fit"),
])  # fmt: skip
def test_a_bad_request_is_refused_in_the_shape_of_openai(server, path, body, words):
    before = server.metric("requests_rejected_total")
    assert words in server.refused(path, body)["message"]
    assert server.metric("requests_rejected_total") == before + 1


def test_other_statuses_say_what_there_is(server):
    assert server.ask("/v1/completions", {"prompt": "a", "model": "x"})[0] == 404
    assert server.ask("/v1/completions", b'"' + b"a" * 2**17)[0] == 413
    for path, method, status in (("/v1/embeddings", "POST", 404), ("/v1/completions", "GET", 405)):
        found = server.ask(path, method=method)
        assert found[0] == status and "POST /v1/completions" in found[1]["error"]["message"]
    assert server.ask("/v1/models")[1]["data"][0]["id"] == "tiny"


def test_a_bug_costs_one_request_and_shows_no_traceback(server, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("deep\ninside")

    monkeypatch.setattr("gemma_tpu.lite.requests.parse", broken)
    status, found = server.ask("/v1/completions", {"prompt": "a"})
    assert status == 500 and found["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert server.text("a", max_tokens=1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "error: a request failed: ZeroDivisionError: deep inside (test_lite" in said


# --- many at once ---------------------------------------------------------------------------------------------


def test_whoever_hangs_up_gives_the_slot_back(server):
    """Long texts in every slot and before them; while one streams, while one waits, while one wants it whole."""
    gone = server.metric("requests_cancelled_total")
    long = {"prompt": "a", "max_tokens": 180, "ignore_eos": True, "temperature": 1.0}
    lines = [server.begin(long | {"stream": number % 2 == 0}) for number in range(9)]
    wait_for(lambda: server.metric("num_requests_running") == 3)
    for line in lines:
        line.close()
    wait_for(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == 0)
    assert server.metric("requests_cancelled_total") > gone
    assert server.text(TEXTS[0], max_tokens=3)["choices"][0]["finish_reason"]


def test_a_full_queue_refuses_more_and_goes_on_with_the_rest(server):
    long = {"prompt": ["a"] * 8, "max_tokens": 100, "ignore_eos": True}
    lines = [server.begin(long) for _ in range(3)]
    wait_for(lambda: server.metric("num_requests_waiting") >= QUEUE - 8)
    status, found = server.ask("/v1/completions", long)
    assert (status, found["error"]["type"], found["error"]["code"]) == (429, "rate_limit_error", "queue_full")
    for line in lines:
        assert line.recv(15).startswith(b"HTTP/1.1 200")
        line.close()


def test_prompts_that_come_together_share_a_sheet(base):
    found = Server(base, max_wait=0.5)
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda text: found.text(text, max_tokens=1), TEXTS[:3]))
        assert found.metric("prefill_bucket_hits_total") == 1
        assert found.metric("prompt_tokens_total") < found.metric("prefill_sheet_tokens_total") == 64
    finally:
        found.stop()


def test_the_metrics_split_the_time_of_a_request(server):
    names = ("request_queue_time", "request_prefill_time", "request_decode_time", "time_to_first_token",
             "e2e_request_latency")  # fmt: skip
    before = {name: (server.metric(f"{name}_seconds_count"), server.metric(f"{name}_seconds_sum")) for name in names}
    server.text("a", max_tokens=40, ignore_eos=True)
    spent = {name: server.metric(f"{name}_seconds_sum") - before[name][1] for name in names}
    assert all(server.metric(f"{name}_seconds_count") == before[name][0] + 1 for name in names)
    queue, prefill, decode, first, whole = spent.values()
    assert queue + prefill == pytest.approx(first, abs=1e-6) and first + decode == pytest.approx(whole, abs=1e-6)
    assert server.metric("recompiles_total") == 0
    assert server.metric("compiled_programs") == server.engine.device.compiled()


def test_it_is_not_ready_before_it_has_compiled_nor_after_its_device_has_failed(base, capsys):
    found = Server(base, compiled=False)
    hold = threading.Event()
    compile_, decode = found.engine.device.compile, found.engine.device.decode
    found.engine.device.compile = lambda told: hold.wait(30) and compile_(told)
    found.engine.start()
    assert found.ask("/health")[0] == 503 and found.ask("/health")[1]["status"] == "compiling"
    status, error = found.ask("/v1/completions", {"prompt": "a"})
    assert (status, error["error"]["code"]) == (503, "compiling") and "/health" in error["error"]["message"]
    hold.set()
    assert found.engine.when_compiled() and found.ask("/health") == (200, {"status": "ok", "model": "tiny"})

    def broken(call):
        raise MemoryError("no room\nleft")

    found.engine.device.decode = broken
    assert found.ask("/v1/completions", {"prompt": "a"})[0] == 500 and decode
    wait_for(lambda: found.engine.state == "failed")
    assert found.ask("/health")[0] == found.ask("/v1/completions", {"prompt": "a"})[0] == 503
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the device's thread has ended: MemoryError: no room left" in said
    found.stop()


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    (["nowhere"], "nowhere: no such folder"), (["BASE", "--max-len", "5000"], "--max-len is 5000: the model's context"),
    (["BASE", "--max-len", "64", "--buckets", "128"], "--buckets: 128 is more"),
    (["BASE", "--mesh", "x=1"], "'x=1' is wrong"), (["BASE", "--host", "256.1.1.1"], "--host 256.1.1.1"),
    (["BASE", "--port", "TAKEN"], "give another --port"),
])  # fmt: skip
def test_the_command_refuses_what_is_wrong(server, base, capsys, argv, words):
    named = {"BASE": str(base), "TAKEN": str(server.port)}
    port = [] if "--port" in argv else ["--port", "0"]
    assert cli.main(["serve-lite", *(named.get(word, word) for word in argv), *port]) == 2
    assert words in capsys.readouterr().err
