"""The loss mask against transformers' own, which needs marks in the template; and against the messages' own words."""

import json
import shutil
import subprocess
import sys

import chat_helper
import pytest
from chat_helper import REVISIONS, THOUGHT, TOOLS, Speaker, called, own, own_tool_turns, thought, trained_runs

from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.tiny.archs import ARCHS
from gemma_tpu.tiny.checkpoint import write_tiny

SIZES = {"layers": 2, "pattern": 1, "hidden": 32, "mlp": 32}
OWN = {  # template, its marked copy, what its generation prompt inserts, can it think, has it tools
    "thinking kept": (own(), own(marked=True), "", True, True),
    "thinking of the last turn": (own(keeps=False), own(marked=True, keeps=False), "", True, True),
    "empty thought": (own(thought=True), own(marked=True, thought=True), THOUGHT, True, True),
    "turns of tools": (own_tool_turns(), own_tool_turns(marked=True), "", False, True),
}
EACH = 150  # conversations for each of them


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint of each family."""
    folder = tmp_path_factory.mktemp("template")
    return {arch: write_tiny(folder / arch, arch, **SIZES) for arch in ("gemma4-31b", "gemma3-1b")}


@pytest.fixture
def with_template(folders, tmp_path):
    def make(text, arch="gemma4-31b"):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        copy.mkdir()
        for file in folders[arch].glob("*.json"):
            shutil.copy(file, copy)
        (copy / "chat_template.jinja").write_text(text)
        return Tokenizer(copy)

    return make


def by_marks(tokenizer, template, messages, **options):
    """transformers' ids and assistant mask of a marked template."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(str(tokenizer.folder), local_files_only=True)
    found = reference.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return found["input_ids"], [bool(target) for target in found["assistant_masks"]]


@pytest.fixture
def by_marks_cached(monkeypatch):
    """One tokenizer of transformers for many conversations."""
    from transformers import PreTrainedTokenizerFast

    load, kept = PreTrainedTokenizerFast.from_pretrained, {}

    def once(folder, **options):
        return kept.setdefault(folder, load(folder, **options))

    def compare(tokenizer, *args, **options):
        with monkeypatch.context() as patched:
            patched.setattr(PreTrainedTokenizerFast, "from_pretrained", once)
            return by_marks(tokenizer, *args, **options)

    return compare


def conversations(seed, count, *, thinks, tools, system=None):
    """(messages, keyword arguments of a rendering); every kind that the template can render."""
    speaker = Speaker(seed)
    for n in range(count):
        reasoning, calls = thinks and n % 2 == 1, tools and n % 4 > 1
        messages = speaker.conversation(tools=calls, reasoning=reasoning, system=system)
        yield messages, ({"tools": TOOLS} if calls and n % 3 else {}) | ({"enable_thinking": True} if reasoning else {})


def compare_with_marks(tokenizer, marked, inserted, rows, by_marks):
    inserted_ids, count, targets = tokenizer.encode(inserted), 0, 0
    for messages, options in rows:
        found = tokenizer.row(messages, tools=options.get("tools"), thinking="enable_thinking" in options)
        wanted = by_marks(tokenizer, marked, messages, **options)
        insert = inserted_ids if not found.thinking else []
        if insert:
            assert len(found.ids) > len(wanted[0]), "something is inserted"
        assert chat_helper.without_inserted(found.ids, found.mask, insert) == wanted, messages
        count, targets = count + 1, targets + sum(found.mask)
    assert targets > 5 * count
    return count


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_the_mask_is_that_of_a_marked_copy_through_transformers(name, with_template, by_marks_cached):
    """600 conversations: multi-turn, system, tools, thinking on and off, texts that quote the markup."""
    template, marked, inserted, thinks, tools = OWN[name]
    rows = conversations(sorted(OWN).index(name), EACH, thinks=thinks, tools=tools)
    assert compare_with_marks(with_template(template), marked, inserted, rows, by_marks_cached) == EACH


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", REVISIONS)
def test_the_mask_of_each_published_revision_of_gemma_4s_template(name, size, with_template, by_marks_cached):
    template = chat_helper.published(name)
    if template is None:
        pytest.skip("no published template here: install trl, or set GEMMA_CHAT_TEMPLATES to its chat_templates/")
    marked, inserted = chat_helper.marked(template, name), THOUGHT if size == "large" else ""
    tokenizer = with_template(chat_helper.large(template) if inserted else template)
    rows = conversations(REVISIONS.index(name), 50, thinks=True, tools=True)
    assert compare_with_marks(tokenizer, marked, inserted, rows, by_marks_cached) == 50


def test_the_mask_of_gemma_3s_published_template(with_template, by_marks_cached):
    template = chat_helper.published("gemma3")
    if template is None:
        pytest.skip("no published template here: install trl, or set GEMMA_CHAT_TEMPLATES to its chat_templates/")
    tokenizer, marked = with_template(template, "gemma3-1b"), chat_helper.marked(template, "gemma3")
    rows = conversations(9, 100, thinks=False, tools=False)
    assert compare_with_marks(tokenizer, marked, "", rows, by_marks_cached) == 100


# --- against the messages' own words ----------------------------------------------------------------------------------


def decoded(tokenizer, found):
    return "".join(tokenizer.decode(run) for run in trained_runs(found.ids, found.mask))


@pytest.mark.parametrize("name", ["thinking kept", "empty thought"])
def test_what_is_trained_decodes_to_what_the_messages_say(name, with_template):
    tokenizer = with_template(OWN[name][0])
    for messages, options in conversations(40, 60, thinks=True, tools=True):
        answers = [m for m in messages if m["role"] == "assistant"]
        said = [thought(m) + (m["content"] or "").strip() + (called(m) or "<turn|>") for m in answers]
        assert decoded(tokenizer, tokenizer.row(messages, tools=options.get("tools"))) == "".join(said)
        last = tokenizer.row(messages, "last_assistant", tools=options.get("tools"))
        assert decoded(tokenizer, last) == said[-1]


def test_a_message_of_weight_0_is_not_trained_and_changes_nothing_else(with_template):
    tokenizer = with_template(own())
    for messages, _ in conversations(41, 30, thinks=False, tools=True):
        weighted = [m | {"weight": n % 2} for n, m in enumerate(messages)]
        said = [m["content"].strip() + "<turn|>" if m["content"] and not m.get("tool_calls")
                else (m["content"] or "").strip() + called(m)
                for m in weighted if m["role"] == "assistant" and m["weight"]]  # fmt: skip
        found = tokenizer.row(weighted)
        assert found.ids == tokenizer.row(messages).ids
        assert decoded(tokenizer, found) == "".join(said)


def test_with_all_a_message_of_weight_0_is_the_only_one_left_out(with_template):
    tokenizer = with_template(own())
    messages = [{"role": "user", "content": "a b", "weight": 0}, {"role": "assistant", "content": "c"}]
    found = tokenizer.row(messages, "all")
    assert [tokenizer.decode(run) for run in trained_runs(found.ids, found.mask)] == [
        "<|turn>user\n", "<turn|>\n<|turn>model\nc<turn|>\n",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"user turn 1 of 2: its weight is 0.5: it must be 0 \(not trained\) or 1"):
        tokenizer.row([messages[0] | {"weight": 0.5}, messages[1]])


# --- what is served is what is trained --------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A gate."}]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_generation_prompt_is_the_prefix_of_the_training_row_for_every_architecture(arch, tmp_path):
    small = {"gemma4-e2b": dict(layers=4, pattern=1, kv_shared=2), "gemma4-e4b": dict(layers=4, pattern=1, kv_shared=2)}
    sizes = small.get(arch, dict(layers=2, pattern=1))
    tokenizer = Tokenizer(write_tiny(tmp_path / "m", arch, texts=["What is it? A gate."] * 9, **sizes))
    for messages in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT], [*CHAT, *CHAT]):
        for train_on in ("assistant", "last_assistant"):
            ids, mask = tokenizer.training(messages, train_on)
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            prompt = tokenizer.prompt(messages[: answers[-1 if train_on == "last_assistant" else 0]])
            assert ids[: mask.index(True)] == prompt and ids.count(tokenizer.bos_id) == 1
            assert tokenizer.decode(prompt).endswith("model\n" + (THOUGHT if ARCHS[arch].empty_thought else ""))


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", ["own", *REVISIONS])
def test_the_prompt_is_the_prefix_with_tools_and_thinking_too(name, size, with_template):
    template = own(thought=size == "large") if name == "own" else chat_helper.published(name)
    if template is None:
        pytest.skip("no published template here: install trl, or set GEMMA_CHAT_TEMPLATES to its chat_templates/")
    if name != "own" and size == "large":
        template = chat_helper.large(template)
    tokenizer = with_template(template)
    if name == "gemma4_v2":  # it renders what tools respond in a turn of the tool, without a prompt behind it
        rows = conversations(42, 40, thinks=True, tools=False)
    else:
        rows = conversations(42, 40, thinks=True, tools=True)
    for messages, options in rows:
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        messages, tools = messages[: last + 1], options.get("tools")
        if messages[last - 1].get("role") == "tool" and messages[last - 2].get("content"):
            continue
        found = tokenizer.row(messages, "last_assistant", tools=tools)
        prompt = tokenizer.prompt(messages[:last], tools=tools, thinking=found.thinking)
        assert found.ids[: found.mask.index(True)] == prompt


# --- what is particular -----------------------------------------------------------------------------------------------


def test_thinking_is_on_where_the_template_renders_the_rows_reasoning(with_template):
    tokenizer = with_template(own(keeps=False))
    plain = tokenizer.row(CHAT)
    assert not plain.thinking and plain.lost == 0
    found = tokenizer.row([CHAT[0], CHAT[1] | {"reasoning": "hm"}])
    assert found.thinking and "<|think|>" in tokenizer.decode(found.ids) and found.lost == 0
    assert decoded(tokenizer, found) == "<|channel>thought\nhm\n<channel|>A gate.<turn|>"
    earlier = [CHAT[0], CHAT[1] | {"reasoning": "hm"}, *CHAT]  # the template leaves it out of earlier turns
    found = tokenizer.row(earlier)
    assert not found.thinking and found.lost == 1 and "hm" not in tokenizer.decode(found.ids)


def test_a_template_that_leaves_declared_tools_out_is_refused(with_template):
    deaf = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(UserError, match="renders none of the declared tools"):
        with_template(deaf).row(CHAT, "all", tools=tools)


def test_the_token_that_asks_for_a_tools_response_is_trained_where_generation_stops_at_it(folders, tmp_path):
    rows = conversations(43, 40, thinks=False, tools=True)
    messages = next(messages for messages, _ in rows if any("tool_calls" in m for m in messages))
    texts = {}
    for stops in ([1, 106], [1, 106, 94]):
        copy = shutil.copytree(folders["gemma4-31b"], tmp_path / str(len(stops)))
        (copy / "chat_template.jinja").write_text(own())
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        tokenizer = Tokenizer(copy)
        texts[len(stops)] = decoded(tokenizer, tokenizer.row(messages))
    groups = sum(bool(m.get("tool_calls")) for m in messages)
    assert groups and texts[2].count("<|tool_response>") == 0 and texts[3].count("<|tool_response>") == groups
    assert texts[3].replace("<tool_call|><|tool_response>", "<tool_call|>") == texts[2]


def test_arguments_of_a_call_may_be_json_text(with_template):
    tokenizer = with_template(own())

    def row(arguments):
        call = {"function": {"name": "run", "arguments": arguments}}
        return tokenizer.row([CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]},
                              {"role": "tool", "name": "run", "content": "ok"}, CHAT[1]])  # fmt: skip

    assert row('{"file": "a", "n": 2}') == row({"file": "a", "n": 2})
    assert decoded(tokenizer, row("{}")) == "<|tool_call>call:run{}<tool_call|>A gate.<turn|>"
    with pytest.raises(UserError, match="assistant turn 2 of 4: the arguments of run are not JSON"):
        row("{file: a}")
    with pytest.raises(UserError, match="the arguments of run are list: they must be an object"):
        row("[1]")


REFUSED = {
    "a thought where the prompt has an empty one": (
        own(thought=True), [CHAT[0], CHAT[1] | {"reasoning": "hm"}], {"thinking": False},
        r"it has reasoning, and with thinking off the generation prompt goes on with '<channel\|>'",
    ),
    "an answer where the prompt opens a thought": (
        "{{ '<|turn>model\\n<|channel>thought\\n' }}".join(own().rsplit("{{ '<|turn>model\\n' }}", 1)),
        CHAT, {}, "the generation prompt opens a thought .* and this answer has no reasoning",
    ),
    "a thought inside the content": (
        own().replace("{{ m.content | trim }}", "{{ m.content.split('<channel|>') | last | trim }}"),
        [CHAT[0], {"role": "assistant", "content": "<|channel>thought\nhm<channel|>A"}], {},
        r"which is 'A<turn\|>\\n': the template rewrites it; .* belongs into the message's `reasoning`",
    ),
    "calls that the template does not know": (
        own_tool_turns().replace("m.tool_calls", "m.nothing"), next(
            m for m, _ in conversations(44, 40, thinks=False, tools=True) if any("tool_calls" in x for x in m)), {},
        "the chat template does not render its tool_calls",
    ),
    "calls of another shape": (
        own(), [CHAT[0], {"role": "assistant", "content": "A", "tool_calls": [{}]}], {},
        "assistant turn 2 of 2: its tool_calls must be a list of",
    ),
    "a system text that the template drops": (
        own().replace("{{ messages[0].content | trim }}", ""), [{"role": "system", "content": "s"}, *CHAT], {},
        "system turn 1 of 3: the chat template does not render its content exactly once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("template, messages, options, says", REFUSED.values(), ids=REFUSED.keys())
def test_what_would_train_another_thing_than_is_served_is_refused(template, messages, options, says, with_template):
    with pytest.raises(UserError, match=says):
        with_template(template).row(messages, **options)


def test_a_tokenizer_travels_to_another_process(with_template):
    import pickle

    tokenizer = with_template(own())
    wanted = tokenizer.row(CHAT)
    assert pickle.loads(pickle.dumps(tokenizer)).row(CHAT) == wanted


def test_importing_the_module_loads_no_heavy_library():
    code = "import sys, gemma_tpu.data.template; print({'jax', 'torch', 'transformers', 'jinja2'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
