"""Requests of the small server: what is asked is read, and everything that is wrong is named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tpu.commands.lite_cli import buckets_for
from gemma_tpu.lite.fields import CHAT, NEUTRAL, TEXT
from gemma_tpu.lite.requests import Limits, Refused, Request, parse

LIMITS = Limits(prompts=4, samples=4)
HELLO = [{"role": "user", "content": "hello"}]


def text(**body) -> Request:
    return parse("text", json.dumps({"prompt": "hello", **body}).encode(), LIMITS, "tiny")


def chat(**body) -> Request:
    return parse("chat", json.dumps({"messages": HELLO, **body}).encode(), LIMITS, "tiny")


def refused(call, **body) -> dict:
    with pytest.raises(Refused) as found:
        call(**body)
    return found.value.body["error"] | {"status": found.value.status}


@pytest.mark.parametrize("prompt, count", [("a", 1), (["a", "b"], 2), ([5, 6], 1), ([[5], [6, 7]], 2)])
def test_a_prompt_is_a_text_a_list_of_texts_ids_or_lists_of_ids(prompt, count):
    assert len(text(prompt=prompt).prompts) == count


def test_every_field_arrives():
    found = text(
        max_tokens=9, n=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=4, stop="x",
        stop_token_ids=[5], ignore_eos=True, stream=True, stream_options={"include_usage": True}, logprobs=2, echo=True,
        model="tiny", user="me",
    )  # fmt: skip
    numbers = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 4}
    assert found == Request("text", ["hello"], 9, 3, numbers, ("x",), (5,), True, True, True, True, 2, False)
    found = chat(max_completion_tokens=3, logprobs=True, top_logprobs=2, chat_template_kwargs={"enable_thinking": True})
    assert (found.max_tokens, found.logprobs, found.thinking) == (3, 2, True)
    assert chat().max_tokens is None and chat().logprobs is None and chat(logprobs=True).logprobs == 0


def test_null_is_a_field_left_out_and_without_a_seed_two_requests_differ():
    plain = text(**dict.fromkeys(set(TEXT) - {"prompt"}), **dict.fromkeys(NEUTRAL))
    assert plain.max_tokens == 16 and plain.numbers["temperature"] == 1.0
    assert text().numbers["seed"] != text().numbers["seed"]


def test_all_that_is_wrong_is_said_at_once():
    error = refused(text, temperature=-1, top_p=0, tempature=1, n="2", stop="", presence_penalty=0.5)
    assert error["status"] == 400 and error["param"] == "temperature"
    for words in ("temperature is -1: it must be a number of at least 0", "top_p is 0:", "n is '2':", "stop is '':",
                  "'tempature' is no field that is known here", "this server has no presence_penalty"):
        assert words in error["message"]


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_there_is_refused_by_its_name_and_accepted_where_it_asks_for_nothing(name):
    assert refused(text, **{name: {"something": 1}})["param"] == name
    for value in NEUTRAL[name]:
        text(**{name: value})


@pytest.mark.parametrize("body, words", [
    ({"n": 5}, "at most 4"), ({"n": 2, "temperature": 0}, "all would be the same"), ({"n": True}, "n is True"),
    ({"prompt": ["a"] * 5}, "5 prompts: at most 4"), ({"max_tokens": 0}, "max_tokens is 0 without echo"),
    ({"prompt": []}, "prompt is []"), ({"prompt": [1, "a"]}, "prompt is"), ({"prompt": None}, "prompt is missing"),
    ({"prompt": "\ud800"}, "prompt is"), ({"temperature": 1e31}, "temperature is"), ({"seed": -1}, "seed is -1"),
    ({"stream_options": {"include_usage": True}}, "without stream: true"), ({"logprobs": 21}, "from 0 to 20"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options is"), ({"stop": ["a"] * 17}, "at most 16"),
])  # fmt: skip
def test_a_text_request_is_refused_with_its_rule(body, words):
    assert words in refused(text, **body)["message"]


@pytest.mark.parametrize("body, words", [
    ({"messages": []}, "at least one message"), ({"messages": ["a"]}, "messages[0] is 'a'"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "role is 'robot'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "reads text alone"),
    ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, "'name'"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "'tool_calls'"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "give one of them"), ({"max_tokens": 0}, "max_tokens is 0"),
    ({"top_logprobs": 2}, "without logprobs: true"), ({"tools": [{"type": "function"}]}, "no tools"),
    ({"logprobs": 2}, "logprobs is 2"), ({"prompt": "a"}, "'prompt' is no field"),
])  # fmt: skip
def test_a_chat_request_is_refused_with_its_rule(body, words):
    assert words in refused(chat, **body)["message"]


def test_parts_of_text_are_one_text_and_what_clients_send_back_as_null_is_left_out():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = chat(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": "c", "refusal": None}])
    assert found.prompts == [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]]


def test_another_model_is_not_found():
    error = refused(text, model="gpt")
    assert (error["status"], error["code"]) == (404, "model_not_found") and "tiny alone" in error["message"]


@pytest.mark.parametrize("data", [
    b"", b"{", b"\xff\xfe", b"[1]", b"null", b'{"prompt": NaN}', b'{"prompt": "a", "prompt": "b"}', b"[" * 100_000,
    b'{"n": ' + b"9" * 5000 + b"}",
], ids=lambda data: repr(data[:12]))  # fmt: skip
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(Refused) as found:
        parse("text", data, LIMITS, "tiny")
    assert found.value.status == 400 and found.value.body["error"]["message"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
names = st.sampled_from(sorted({*TEXT, *CHAT, *NEUTRAL})) | st.text(max_size=5)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["text", "chat"]), body=st.dictionaries(names, anything, max_size=5))
def test_whatever_is_sent_is_read_or_refused(kind, body):
    body = {"prompt": "a", **body} if kind == "text" else {"messages": HELLO, **body}
    try:
        assert parse(kind, json.dumps(body).encode(), LIMITS, "tiny").prompts
    except Refused as error:
        assert error.status in (400, 404) and json.dumps(error.body)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_bytes_are_refused_and_nothing_else_happens(data):
    with pytest.raises(Refused):
        parse("text", data, LIMITS, "tiny")


@pytest.mark.parametrize("capacity, asked, found", [
    (64, None, [64]), (300, None, [64, 256, 320]), (4096, None, [64, 256, 1024, 4096]), (256, [128], [128, 256]),
])  # fmt: skip
def test_the_last_bucket_holds_the_longest_prompt(capacity, asked, found):
    assert buckets_for(capacity, asked) == found
