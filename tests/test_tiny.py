"""The tiny checkpoint is what Google publishes, in small: transformers loads it, one seed is one result."""

import hashlib
import json
import re

import numpy as np
import pytest

from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.tiny.checkpoint import write_tiny

TEXTS = [
    "Design module counter_b: 8-bit up counter q, clock clk, synchronous reset rst.",
    "module counter_b(input clk, input rst, output reg [7:0] q);\n  always @(posedge clk)\n"
    "    if (rst) q <= 0;\n    else q <= q + 1;\nendmodule\n",
] * 20
SMALL = {"layers": 4, "pattern": 1, "hidden": 32, "mlp": 48, "heads": 4, "kv_heads": 2, "global_kv_heads": 1}


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def read_tensors(folder):
    from safetensors import safe_open

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            assert shard.metadata() == {"format": "pt"}
            tensors |= {name: np.asarray(shard.get_tensor(name), np.float32) for name in shard.keys()}
    return tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "published", texts=TEXTS)


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "text", texts=TEXTS, text_only=True)


def test_the_folder_holds_the_published_files(published):
    assert sorted(digests(published)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {oct(file.stat().st_mode & 0o777) for file in published.iterdir()} == {"0o644"}


def test_config_has_the_published_form(published):
    config = json.loads((published / "config.json").read_text())
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert config["model_type"] == "gemma4" and config["audio_config"] is None
    assert config["vision_config"]["model_type"] == "gemma4_vision"
    text = config["text_config"]
    expected = {
        "model_type": "gemma4_text",
        "head_dim": 32,
        "global_head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window": 128,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
        },
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
    }
    assert {key: text[key] for key in expected} == expected
    assert "per_layer_config" not in text  # the form that transformers writes, never the published one
    for key in ("boi_token_id", "eoi_token_id", "image_token_id", "audio_token_id", "video_token_id"):
        assert config[key] < text["vocab_size"]
    generation = json.loads((published / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 106] and generation["bos_token_id"] == 2


def test_shards_and_index_agree_and_a_layer_straddles_shards(published):
    index = json.loads((published / "model.safetensors.index.json").read_text())
    tensors = read_tensors(published)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == 2 * sum(array.size for array in tensors.values())
    assert len(set(index["weight_map"].values())) == 3
    shards_of_layer = {}
    for name, shard in index["weight_map"].items():
        if found := re.search(r"layers\.\d+", name):
            shards_of_layer.setdefault(found.group(), set()).add(shard)
    assert any(len(shards) > 1 for shards in shards_of_layer.values())


def test_no_tensor_makes_a_branch_an_identity(published):
    for name, array in read_tensors(published).items():
        assert np.all(np.isfinite(array)), name
        assert np.std(array) > 0 or array.shape == (1,), f"{name} is constant"
        assert not np.any(array == 0) or array.ndim > 1, f"{name} has zeros"
    scalars = [a.item() for n, a in read_tensors(published).items() if n.endswith("layer_scalar")]
    assert len(set(scalars)) == 6 and all(0.5 <= scalar < 1 for scalar in scalars)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    first, again, other = (
        write_tiny(tmp_path / name, seed=seed, texts=TEXTS, **SMALL)
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert digests(first) == digests(again)
    changed = {name for name, digest in digests(first).items() if digest != digests(other)[name]}
    assert changed == {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}


def test_both_layouts_hold_the_same_text_tower(published, text_only):
    multimodal = read_tensors(published)
    for name, array in read_tensors(text_only).items():
        assert np.array_equal(array, multimodal[name.replace("model.", "model.language_model.")])


def test_the_bundled_rows_train_the_tokenizer_and_answers_are_few_tokens(tmp_path):
    tokenizer = Tokenizer(write_tiny(tmp_path / "tiny", **SMALL))
    answer = "module mux_a(input sel, output reg [7:0] y);\nendmodule"
    assert len(tokenizer.encode(answer)) < 0.6 * len(answer)
    assert tokenizer.decode(tokenizer.encode(answer)) == answer


# ---- the tokenizer


def test_special_tokens_have_the_published_ids_and_are_single(published):
    tokenizer = Tokenizer(published)
    for text, i in (
        ("<pad>", 0),
        ("<eos>", 1),
        ("<bos>", 2),
        ("<|think|>", 98),
        ("<|turn>", 105),
        ("<turn|>", 106),
    ):
        assert tokenizer.encode(text) == [i]
    for name in ("channel", "tool", "tool_call", "tool_response"):
        for text in (f"<|{name}>", f"<{name}|>"):
            assert len(tokenizer.encode(text)) == 1 and tokenizer.encode(text)[0] < 107
    assert len(tokenizer.encode('<|"|>')) == 1
    assert tokenizer.vocab_size == 1024 and tokenizer.stop_ids == (1, 106) and tokenizer.pad_id == 0


@pytest.mark.parametrize(
    "text",
    [
        "naïve café",
        "数字电路 ☃ \U0001f600",
        "tab\tand\r\nreturn",
        "  two  spaces ",
        "\x00\x7f",
        "é",
        "\n\n\n",
        "<0x41>",
        "",
    ],
)
def test_any_text_survives_a_round_trip(published, text):
    tokenizer = Tokenizer(published)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_names_and_brackets_are_the_same_tokens_wherever_they_stand(published):
    tokenizer = Tokenizer(published)

    def contains(text, part):
        ids, wanted = tokenizer.encode(text), tokenizer.encode(part)
        return any(ids[i : i + len(wanted)] == wanted for i in range(len(ids)))

    for part in ("counter_b", "posedge", "[7:0]", "rst"):
        for text in (
            f"{part}",
            f" {part}",
            f"({part})",
            f"\n{part}\n",
            f"x = {part};",
            f"~{part},",
            f"1{part}2",
        ):
            assert contains(text, part), (part, text)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("[127:0]")] == ["[", "1", "2", "7", ":", "0", "]"]


def test_the_tokenizer_that_transformers_rebuilds_gives_the_same_ids(published):
    from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

    rebuilt = GemmaTokenizer.from_pretrained(published)
    tokenizer = Tokenizer(published)
    for text in [*TEXTS[:2], "naïve ☃", "<|turn>user\n  q <= [3:0];<turn|>\n"]:
        assert rebuilt.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert rebuilt.eot_token == "<turn|>" and rebuilt.image_token == "<|image|>"


# ---- the chat template


def test_the_template_renders_as_documented(published):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(published)
    messages = [{"role": "user", "content": " Q\n"}, {"role": "assistant", "content": "A "}]
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == "<bos><|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n"
    prompt = "<bos><|turn>user\nQ<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    assert render(messages[:1], tokenize=False, add_generation_prompt=True) == prompt
    for role in ("system", "developer"):
        system = [{"role": role, "content": "S"}, *messages[:1]]
        assert render(system, tokenize=False) == "<bos><|turn>system\nS<turn|>\n<|turn>user\nQ<turn|>\n"


@pytest.mark.parametrize(
    "message, arguments, says",
    [
        ({"role": "tool", "content": "x"}, {}, "unknown role tool: one of user, assistant"),
        ({"role": "user", "content": [{"type": "image"}]}, {}, "must be a string"),
        ({"role": "user"}, {}, "must be a string"),
        ({"role": "assistant", "content": "x", "tool_calls": [1]}, {}, "renders no tool_calls"),
        ({"role": "assistant", "content": "x", "reasoning": "r"}, {}, "renders no reasoning"),
        ({"role": "assistant", "content": "<|channel>thought\nr<channel|>x"}, {}, "renders no thinking"),
        ({"role": "user", "content": "x"}, {"enable_thinking": True}, "renders no thinking"),
        ({"role": "user", "content": "x"}, {"tools": [{"type": "function"}]}, "renders no tools"),
    ],
)
def test_the_template_refuses_what_it_does_not_render(published, message, arguments, says):
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(published)
    with pytest.raises(TemplateError, match=says):
        tokenizer.apply_chat_template([message], tokenize=False, **arguments)


# ---- transformers


@pytest.mark.parametrize(
    "layout, name", [("published", "Gemma4ForConditionalGeneration"), ("text", "Gemma4ForCausalLM")]
)
def test_transformers_loads_every_tensor_and_runs_text(published, text_only, layout, name):
    torch = pytest.importorskip("torch")
    import transformers

    folder = published if layout == "published" else text_only
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([Tokenizer(folder).prompt([{"role": "user", "content": TEXTS[0]}])])
    with torch.no_grad():
        logits = model.float()(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], 1024)
    # Logits of order one: random weights that start near a uniform guess, not at its edges.
    assert 0.5 < logits.std().item() < 2


def test_other_sizes_load_too(tmp_path):
    pytest.importorskip("torch")
    from transformers import Gemma4ForCausalLM

    folder = write_tiny(tmp_path / "t", text_only=True, tokenizer=False, dtype="float32", vocab=128, **SMALL)
    assert not (folder / "tokenizer.json").exists() and not (folder / "chat_template.jinja").exists()
    _, info = Gemma4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


# ---- bad input


def test_an_existing_folder_with_content_is_never_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="mine exists and is not an empty folder"):
        write_tiny(tmp_path / "mine", texts=TEXTS)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert (write_tiny(tmp_path / "empty", texts=TEXTS, **SMALL) / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(RunError, match="could not be written .*No space left"):
        write_tiny(tmp_path / "out", texts=TEXTS, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_all_wrong_arguments_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        write_tiny(tmp_path / "out", arch="gemma5", dtype="int8", depth=3, hidden=0)
    for part in (
        "arch 'gemma5' is unknown: one of gemma4-e2b, ",
        "dtype 'int8'",
        "unknown sizes depth",
        "hidden is 0",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError) as error:
        write_tiny(tmp_path / "out", layers=7, kv_heads=3, global_kv_heads=5, head_dim=31, global_head_dim=36)
    assert len(str(error.value).splitlines()) == 5
    with pytest.raises(UserError, match="vocab is 300: a tokenizer needs at least 460"):
        write_tiny(tmp_path / "out", texts=TEXTS, vocab=300)
    assert list(tmp_path.iterdir()) == []
