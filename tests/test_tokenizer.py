"""Prompts and training rows: what is trained, what is not, and that serving sees the same tokens."""

import json
import shutil
import subprocess
import sys

import pytest

from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.tiny.checkpoint import write_tiny

TEXTS = [
    "Write a module named and_gate.\n\nmodule and_gate(input a, output y);\n  assign y = a;\nendmodule\n"
] * 9
THOUGHT = "<|channel>thought\n<channel|>"

# Two shapes of template beside the bundled one: E2B's (the generation prompt is a bare header) and Gemma 3's
# (the system text is put into the first user turn).
BARE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
SYSTEM_IN_USER = (
    "{{ bos_token }}{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in rest %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def turns(*contents, system=None):
    """user, assistant, user, … with these contents."""
    roles = ["user", "assistant"] * len(contents)
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"layers": 2, "pattern": 1, "hidden": 32, "mlp": 32}
    return write_tiny(tmp_path_factory.mktemp("tokenizer") / "tiny", texts=TEXTS, **sizes)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.fixture
def with_template(folder, tmp_path):
    def make(template, **generation):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        copy.mkdir()
        for file in folder.glob("*.json"):
            shutil.copy(file, copy)
        (copy / "chat_template.jinja").write_text(template)
        if generation:
            (copy / "generation_config.json").write_text(json.dumps(generation))
        return Tokenizer(copy)

    return make


def trained_text(tokenizer, ids, mask):
    assert len(ids) == len(mask)
    return tokenizer.decode([i for i, target in zip(ids, mask, strict=True) if target])


CONVERSATIONS = {
    "single": turns("Q", "A"),
    "system": turns("Q", "A", system="Be brief."),
    "multi-turn": turns("one", "1", "two", "2", "three", "3", system="Count."),
    "the same answer again and in the questions": turns("yes", "yes", "yes", "yes"),
    "an answer that quotes the turns": turns("q", "user\nq\nmodel\nmodel", "model\n", "user\n"),
    "an answer that looks like the role header": turns("q", "model\nmodel\n", "q", "model"),
    "edges of white space": turns("  q\n\n", "\n\n  A\n B \n\n", "\n", "\t x\n"),
    "unicode spelled in bytes": turns("größe?", "naïve ☃ 数字 \U0001f600", "é", "\u00a0ü\u00a0"),
    "empty answer": turns("q", ""),
    "the marker itself": turns("[[answer]]", "[[answer]] [[[answer]]]"),
    "a question without an answer at the end": turns("q", "A", "and?"),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", ["bundled", "bare", "system in user"])
def test_targets_are_the_answers_and_their_end_of_turn_after_the_prompt_that_serving_sends(
    template, messages, tokenizer, with_template
):
    if template != "bundled":
        tokenizer = with_template({"bare": BARE, "system in user": SYSTEM_IN_USER}[template])
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

    ids, mask = tokenizer.training(messages)
    spoken = "".join(messages[i]["content"].strip() + "<turn|>" for i in answers)
    assert trained_text(tokenizer, ids, mask) == spoken
    prompt = tokenizer.prompt(messages[: answers[0]])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id

    ids, mask = tokenizer.training(messages, "last_assistant")
    assert trained_text(tokenizer, ids, mask) == messages[answers[-1]]["content"].strip() + "<turn|>"
    prompt = tokenizer.prompt(messages[: answers[-1]])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


def test_the_empty_thought_channel_is_inserted_before_each_answer_and_never_trained(tokenizer):
    messages = turns("a", "b", "c", "d")
    for train_on, count in (("assistant", 2), ("last_assistant", 1), ("all", 2)):
        ids, mask = tokenizer.training(messages, train_on)
        assert tokenizer.decode(ids).count("<|turn>model\n" + THOUGHT) == count
        assert "channel" not in trained_text(tokenizer, ids, mask)


def test_a_row_is_the_full_render_but_for_what_is_inserted(tokenizer, with_template):
    messages = turns("a", "b", "c", "d", "e", system="s")
    full = (
        "<bos><|turn>system\ns<turn|>\n<|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n"
        "<|turn>user\nc<turn|>\n<|turn>model\nd<turn|>\n<|turn>user\ne<turn|>\n"
    )
    assert tokenizer.decode(tokenizer.training(messages)[0]).replace(THOUGHT, "") == full
    assert tokenizer.decode(with_template(BARE).training(messages)[0]) == full


def test_all_trains_every_token_but_bos(with_template):
    tokenizer = with_template(BARE)
    ids, mask = tokenizer.training(turns("a", "b"), "all")
    assert mask == [False] + [True] * (len(ids) - 1)
    ids, mask = tokenizer.training(turns("no answer"), "all")
    assert mask == [False] + [True] * (len(ids) - 1)


def test_a_row_without_an_assistant_turn_has_no_target(tokenizer):
    for train_on in ("assistant", "last_assistant"):
        ids, mask = tokenizer.training(turns("q"), train_on)
        assert len(ids) == len(mask) > 0 and not any(mask)


def test_both_names_of_the_assistant_are_trained(tokenizer):
    named_model = [{"role": "user", "content": "q"}, {"role": "model", "content": "A"}]
    assert tokenizer.training(named_model) == tokenizer.training(turns("q", "A"))


def test_bos_is_added_once_where_the_template_has_none(with_template):
    tokenizer = with_template(BARE.removeprefix("{{ bos_token }}"))
    ids, mask = tokenizer.training(turns("q", "A"))
    assert ids.count(2) == 1 and ids[0] == 2 and trained_text(tokenizer, ids, mask) == "A<turn|>"
    assert tokenizer.prompt(turns("q"))[:2] == [2, 105]
    assert ids[: mask.index(True)] == tokenizer.prompt(turns("q"))


def test_encode_adds_nothing_by_itself_and_parses_special_tokens(tokenizer):
    assert tokenizer.encode("<|turn>") == [105]
    assert tokenizer.encode("a", bos=True) == [2, *tokenizer.encode("a")]
    assert tokenizer.encode("<bos>a", bos=True) == [2, *tokenizer.encode("a")]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([2, *tokenizer.encode("a b"), 106], skip_special=True) == "a b"
    assert tokenizer.decode([2, *tokenizer.encode("a b"), 106]) == "<bos>a b<turn|>"


def test_truncation_saved_in_the_file_is_not_applied(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer(copy).encode("1 2 3 4 5 6 7 8")) > 8


def test_stop_ids_come_from_the_generation_config_else_from_eos_and_end_of_turn(
    folder, tmp_path, with_template
):
    assert Tokenizer(folder).stop_ids == (1, 106)
    assert with_template(BARE, eos_token_id=106).stop_ids == (106,)
    copy = shutil.copytree(folder, tmp_path / "bare")
    (copy / "generation_config.json").unlink()
    assert Tokenizer(copy).stop_ids == (1, 106)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("eot_token"), config.pop("model_specific_special_tokens")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(copy).stop_ids == (1, 106)


REFUSED = {
    "much text before the answer that the prompt lacks": (
        BARE.replace("{{ m.content", "{% if m.role == 'assistant' %}" + 9000 * "x" + "{% endif %}{{ m.content"),
        turns("q", "A"),
        r"the chat template writes 'x{60}…' before the answer",
    ),
    "text before the answer that the prompt lacks": (
        BARE.replace("{{ m.content", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content"),
        turns("q", "A"),
        r"assistant turn 2 of 2: the chat template writes '<think></think>' before the answer",
    ),
    "a template that rewrites the content": (
        BARE.replace("| trim", "| replace('yes', 'no')"),
        turns("q", "yes"),
        r"assistant turn 2 of 2: its content 'yes' .* which is 'no<turn\|>\\n'",
    ),
    "a template that drops the content": (
        BARE.replace("{{ m.content | trim }}", "{{ m.content | trim if m.role == 'user' }}"),
        turns("q", "A"),
        r"assistant turn 2 of 2: the chat template does not render its content exactly once",
    ),
    "a template that ends the turn with no stop token": (
        BARE.replace("<turn|>", ""),
        turns("q", "A"),
        r"closes it with '\\n', which does not begin with a stop token \(<eos> \(1\), <turn\|> \(106\)\)",
    ),
    "a template that raises": (
        "{{ raise_exception('roles must alternate') }}",
        turns("q", "A"),
        r"the chat template refuses the conversation: roles must alternate",
    ),
    "a template that writes half of a letter": (
        r"{{ '\ud800' }}" + BARE,
        turns("q", "A"),
        r"the chat template breaks on the conversation: it writes half of a letter",
    ),
    "a template that writes the last turn first": (
        "{% for m in messages[::-1] %}{{ m.content }}<turn|>{% endfor %}",
        [{"role": "user", "content": ""}, *turns("", "A", "", "A")[1:]],
        r"does not render the answers one after the other",
    ),
    "an answer without a question": (BARE, turns("q", "A")[1:], r"turn 1 of 1: nothing comes before it"),
    "content that is no string": (BARE, turns("q", ["A"]), r"turn 2 of 2: its content is list"),
    "tool calls": (
        BARE,
        [*turns("q"), {"role": "assistant", "content": "A", "tool_calls": [{}], "reasoning": "r"}],
        r"turn 2 of 2: its tool_calls must be a list of",
    ),
    "no messages": (BARE, [], r"at least one message"),
    "a message without a role": (
        BARE,
        [{"content": "q"}],
        r"message 1 of 1 is .* must be an object with a role",
    ),
}


@pytest.mark.parametrize("template, messages, says", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_located_exactly_is_refused(template, messages, says, with_template):
    with pytest.raises(UserError, match=says):
        with_template(template).training(messages)


JOINING = (  # two answers in a row are one turn, as in the newest template of Gemma 4
    "{% for m in messages %}{% if not (loop.index0 and m.role == messages[loop.index0 - 1].role) %}"
    "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}{{ m.content }}"
    "{% if loop.last or m.role != messages[loop.index0 + 1].role %}<turn|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def test_answers_that_the_template_joins_are_one_turn(with_template):
    tokenizer = with_template(JOINING)
    ids, mask = tokenizer.training(turns("q", "one") + turns("", "two")[1:])
    assert trained_text(tokenizer, ids, mask) == "onetwo<turn|>"
    ids, mask = tokenizer.training(turns("q", "one") + turns("", "two")[1:], "last_assistant")
    assert trained_text(tokenizer, ids, mask) == "two<turn|>"


def test_an_unknown_train_on_is_refused(tokenizer):
    with pytest.raises(UserError, match="train_on is 'model': it must be assistant, last_assistant or all"):
        tokenizer.training(turns("q", "A"), "model")


def test_a_folder_without_a_readable_tokenizer_or_template_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json there"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(UserError, match="tokenizer.json: not a readable tokenizer"):
        Tokenizer(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json is not valid JSON"):
        Tokenizer(copy)
    (copy / "generation_config.json").unlink()
    named = copy / "tokenizer_config.json"
    given = json.loads(named.read_text())
    named.write_text(json.dumps({key: value for key, value in given.items() if key not in ("pad_token", "eos_token")}))
    with pytest.raises(UserError, match="it sets neither pad_token nor eos_token"):
        Tokenizer(copy)
    named.write_text(json.dumps(given))
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer(copy).prompt(turns("q"))


def test_a_template_in_tokenizer_config_is_used(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": BARE}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(copy)
    assert tokenizer.decode(tokenizer.prompt(turns("q"))) == "<bos><|turn>user\nq<turn|>\n<|turn>model\n"


def test_importing_the_module_loads_no_heavy_library():
    code = "import sys, gemma_tpu.data.tokenizer; print({'jax', 'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_row_of_plain_text_has_one_bos_is_all_target_and_ends_with_eos(tokenizer):
    draft = tokenizer.draft_text("wire a;")
    found = tokenizer.finish(draft, iter(tokenizer.encode_all(draft.texts)))
    assert found.ids == [tokenizer.bos_id, *tokenizer.encode("wire a;"), tokenizer.eos_id]
    assert found.mask == [False] + [True] * (len(found.ids) - 1)
