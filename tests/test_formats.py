"""Formats: what people have becomes the turns that a chat template reads, or is refused by name; nothing else."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tpu.data import formats
from gemma_tpu.data.formats import Conversation, Preference, RowFault, Text
from gemma_tpu.data.rows import parse
from gemma_tpu.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
READ_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def read(record: dict, form: str | None = None, said: Counter | None = None) -> formats.Parsed:
    return formats.read(record, form or formats.detect(record), Counter() if said is None else said)


def fault(record: dict, form: str | None = None) -> tuple[str, str]:
    with pytest.raises(RowFault) as caught:
        read(record, form)
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize(
    "record, form",
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"conversations": [USER, ASSISTANT]}, "messages"),
        ({"conversation": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])}, "sharegpt"),
        ({"prompt": "q", "response": "a"}, "prompt"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"messages": json.dumps([USER, ASSISTANT])}, "messages"),
    ],
)
def test_every_format_is_detected_and_gives_the_same_turns(record: dict, form: str) -> None:
    assert formats.detect(record) == form
    assert read(record) == Conversation([USER, ASSISTANT])


def test_text_preferences_and_turns_by_themselves_are_told_apart() -> None:
    assert formats.detect({"text": "x"}) == "text" and read({"text": "x"}) == Text("x")
    assert formats.detect({"prompt": "q", "chosen": "a", "rejected": "b"}) == "preference"
    assert formats.detect(USER) == "trajectory"
    assert formats.detect({"type": "user", "message": USER, "uuid": 1}) == "trajectory"
    with pytest.raises(RowFault, match="needs messages, conversations, prompt .* has question, answer"):
        formats.detect({"question": "q", "answer": "a"})


def test_named_columns_are_read_under_their_names_and_a_shadowed_one_is_counted() -> None:
    said: Counter = Counter()
    columns = {"prompt": "question", "response": "answer"}
    record = formats.rename({"question": "q", "answer": "a", "prompt": "z"}, columns, said)
    assert read(record) == Conversation([USER, ASSISTANT])
    assert said == {"column 'prompt' not used, rows": 1}
    with pytest.raises(UserError, match="data.columns gives reply, which no format reads; .*response"):
        formats.check_columns({"reply": "x"})


def test_alpaca_joins_the_input_and_keeps_earlier_pairs() -> None:
    record = {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["q", "a"]]}
    assert read(record).messages == [
        {"role": "system", "content": "s"}, USER, ASSISTANT,
        {"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"},
    ]  # fmt: skip


def test_sharegpt_reads_system_calls_and_observations() -> None:
    turns = [
        {"from": "system", "value": "s"}, {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "a", "weight": 0},
    ]  # fmt: skip
    found = read({"conversations": turns}).messages
    assert [m["role"] for m in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    assert found[3] == {"role": "tool", "content": "4", "name": "add"}
    assert found[4]["weight"] == 0


def test_tool_calls_get_objects_for_arguments_and_results_the_name_of_their_call() -> None:
    record = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                           {"role": "tool", "tool_call_id": "c1", "content": "4"}, ASSISTANT],
              "tools": [{"name": "add", "parameters": {}}]}  # fmt: skip
    found = read(record)
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [READ_CALL]}
    assert found.messages[2] == {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}
    assert found.tools == [{"type": "function", "function": {"description": "", "name": "add", "parameters": {}}}]
    assert read(record | {"tools": json.dumps(record["tools"])}).tools == found.tools


def test_an_agents_log_in_parts_is_the_same_conversation() -> None:
    log = [
        {"type": "user", "message": USER},
        {"type": "assistant", "message": {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "I add."},
            {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 2}}]}},
        {"type": "user", "message": {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "4"}]}]}},
        {"type": "assistant", "message": ASSISTANT},
    ]  # fmt: skip
    found = read({"messages": log}, "trajectory").messages
    assert found[1] == {"role": "assistant", "content": "I add.", "tool_calls": [READ_CALL], "reasoning_content": "hm"}
    assert found[2] == {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}


@pytest.mark.parametrize(
    "messages, reason, words",
    [
        ([USER, {"role": "tool", "content": "4"}], "orphan_tool_result", "no call stands before it"),
        ([{"role": "owner", "content": "x"}], "wrong_role", "role 'owner', not one of system, user"),
        ([USER, {"role": "assistant", "content": "a", "weight": 0.5}], "wrong_weight", "must be 0 (not trained) or 1"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "not_text", "part of type 'image'"),
        ([{"role": "user", "content": {"a": 1}}], "wrong_format", "is not text (dict)"),
        ([USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not_JSON", "of f"),
        ([USER, ASSISTANT | {"tool_calls": [{}]}], "wrong_tool_call", "a tool call without a name"),
        ([USER | {"tool_calls": [CALL]}], "wrong_tool_call", "the role user, not assistant"),
        (["x"], "wrong_format", 'message 0 is not {"role": …, "content": …}'),
    ],
)  # fmt: skip
def test_turns_that_no_template_would_render_right_are_refused(messages: list, reason: str, words: str) -> None:
    found, told = fault({"messages": messages})
    assert found == reason and words in told


def test_a_weight_on_anothers_turn_is_counted_and_not_kept() -> None:
    said: Counter = Counter()
    found = read({"messages": [USER | {"weight": 1}, ASSISTANT | {"weight": True}]}, said=said)
    assert found.messages == [USER, ASSISTANT | {"weight": 1}]
    assert said == {"weight of a user message not used, messages": 1}


def test_preference_pairs_share_their_prompt_and_must_differ() -> None:
    other = {"role": "assistant", "content": "b"}
    wanted = Preference([USER], [ASSISTANT], [other])
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}) == wanted
    assert read({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]}) == wanted
    assert read({"chosen": [USER, ASSISTANT], "rejected": [USER, other]}) == wanted
    assert fault({"prompt": "q", "chosen": "a", "rejected": "a"})[0] == "no_difference"
    assert fault({"prompt": "q", "chosen": "", "rejected": "a"})[0] == "empty"
    assert "no prompt" in fault({"chosen": "a", "rejected": "b"})[1]
    assert fault({"prompt": "q", "chosen": [USER], "rejected": [other]})[0] == "wrong_role"


# --- whatever is thrown at it ---

NAMES = st.sampled_from(sorted({*formats.COLUMNS, "role", "content", "from", "value", "weight", "tool_calls", "type",
                                "message", "function", "name", "arguments", "text", "id", "other"}))  # fmt: skip
WORDS = st.sampled_from(["user", "assistant", "tool", "human", "gpt", "text", "tool_use", "tool_result", "{}", "[", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)


@pytest.mark.parametrize("history", [True, 7, "q", ["q"], [["q"]], {"q": "a"}])
def test_a_history_that_is_no_list_of_pairs_is_refused(history: object) -> None:
    with pytest.raises(RowFault, match="'history' is not a list"):
        read({"instruction": "add", "output": "3", "history": history}, "alpaca")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.sampled_from(sorted(formats.USED)))
def test_no_record_raises_anything_but_a_fault(record: dict, form: str) -> None:
    for attempt in (form, None):
        try:
            parsed = read(record, attempt)
        except RowFault as caught:
            assert caught.reason and str(caught)
            continue
        texts = [parsed.text] if isinstance(parsed, Text) else [
            m["content"] for side in ([parsed.messages] if isinstance(parsed, Conversation) else [parsed.chosen])
            for m in side]  # fmt: skip
        json.dumps(texts, ensure_ascii=False).encode()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()))
def test_no_line_raises_anything_but_a_fault(line: bytes) -> None:
    try:
        assert isinstance(parse(line), dict)
    except RowFault as caught:
        str(caught).encode()
