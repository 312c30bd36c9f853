"""config.json to Architecture: both forms of the file, and a refusal by name of what is not implemented."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tpu.errors import UserError
from gemma_tpu.gemma.hf_config import from_config
from gemma_tpu.gemma.variants import Layer, Rope, find_blocks, gemma4_31b
from gemma_tpu.tiny.config import TinyDims, model_config

L = Layer(head_dim=4, kv_heads=2, mlp=8, rope=Rope(1e4), window=8)
G = Layer(head_dim=8, kv_heads=1, mlp=8, rope=Rope(1e6, 0.25), window=None, k_eq_v=True)
X = Layer(head_dim=6, kv_heads=2, mlp=8, rope=Rope(1e4), window=8)


def published(text_only: bool = False, **dims: int) -> dict:
    return model_config(TinyDims(**dims), "float32", text_only)


def rewritten(config: dict) -> dict:
    """The file that transformers writes when it saves this config."""
    transformers = pytest.importorskip("transformers")
    kind = {"gemma4": transformers.Gemma4Config, "gemma4_text": transformers.Gemma4TextConfig}[
        config["model_type"]
    ]
    return json.loads(kind(**json.loads(json.dumps(config))).to_json_string())


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize(
    "dims",
    [{}, {"global_kv_heads": 2}, {"layers": 12, "window": 8}, {"global_head_dim": 32}],
    ids=["default", "fewer global KV heads", "two periods", "equal head dims"],
)
def test_the_published_and_the_rewritten_config_give_the_same_architecture(text_only, dims):
    config = published(text_only, **dims)
    again = rewritten(config)
    text = again if text_only else again["text_config"]
    assert "global_head_dim" not in text and "per_layer_config" in text
    assert from_config(again) == from_config(config)


def test_a_config_says_what_the_layers_are():
    arch = from_config(published(layers=12, global_kv_heads=2, global_head_dim=64, head_dim=32, window=16))
    assert arch.layers[4] == Layer(head_dim=32, kv_heads=4, mlp=384, rope=Rope(1e4, 1.0), window=16)
    assert arch.layers[11] == Layer(
        head_dim=64, kv_heads=2, mlp=384, rope=Rope(1e6, 0.25), window=None, k_eq_v=True
    )
    assert [layer.kind for layer in arch.layers] == (["local"] * 5 + ["global"]) * 2
    assert (arch.prefix, arch.logit_softcap, arch.heads) == ("model.language_model.", 30.0, 8)
    assert from_config(published(text_only=True)).prefix == "model."


def test_31b_is_what_its_published_config_says():
    text = published()["text_config"] | {
        "vocab_size": 262144, "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
        "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024, "max_position_embeddings": 262144,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
    }  # fmt: skip
    assert from_config({"model_type": "gemma4", "text_config": text}) == gemma4_31b()


@pytest.mark.parametrize("model_type", ["gemma2", "llama", None])
def test_an_unknown_model_type_is_refused_with_those_that_are_known(model_type):
    with pytest.raises(UserError) as error:
        from_config(published(text_only=True) | {"model_type": model_type})
    assert repr(model_type) in str(error.value)
    assert "gemma4, gemma4_text" in str(error.value)


def test_all_unimplemented_options_are_refused_at_once():
    text = published(text_only=True) | {
        "attn_logit_softcapping": 50.0, "enable_moe_block": True, "tie_word_embeddings": False,
        "use_bidirectional_attention": "all", "num_attention_heads": 0,
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        from_config(text)
    for words in (
        "attn_logit_softcapping is 50.0", "tie_word_embeddings is False", "use_bidirectional_attention is 'all'",
        "num_experts is None", "num_attention_heads is 0",
    ):  # fmt: skip
        assert words in str(error.value)


def test_the_last_layer_of_gemma_4_is_global_whatever_the_file_says():
    assert from_config(published(text_only=True) | {"layer_types": ["sliding_attention"] * 6}).layers[-1].window is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention"] * 5}, "layer_types has 5 entries for num_hidden_layers 6"),
        ({"layer_types": ["chunked"] + ["full_attention"] * 5}, "layer_types holds chunked"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "no entry for full_attention"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
            "rope_parameters.sliding_attention.rope_type is 'yarn'",
        ),
    ],
)
def test_a_layer_that_cannot_be_built_is_refused(change, words):
    with pytest.raises(UserError) as error:
        from_config(published(text_only=True) | change)
    assert words in str(error.value)


def test_a_multimodal_config_without_its_text_half_is_refused():
    with pytest.raises(UserError, match="needs a text_config"):
        from_config({"model_type": "gemma4"})


def test_31b_is_one_block_of_a_period_of_six_ten_times():
    (block,) = gemma4_31b().blocks
    assert (len(block.period), block.repeats) == (6, 10)
    assert [layer.kind for layer in block.period] == ["local"] * 5 + ["global"]
    assert block.layer_index(5, 9) == 59


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((L, L, L, L, L, G) * 4 + (L, L), [(0, 6, 4), (24, 1, 2)]),  # as Gemma 3 1B ends
        ((L, G, X, G, L), [(0, 5, 1)]),  # nothing repeats from the first layer on
        ((L,) * 7, [(0, 1, 7)]),
        ((L, L, G), [(0, 1, 2), (2, 1, 1)]),
        ((G,), [(0, 1, 1)]),
        ((), []),
    ],
)
def test_blocks_are_the_longest_repeated_periods(layers, shape):
    assert [(block.first, len(block.period), block.repeats) for block in find_blocks(layers)] == shape


@given(st.lists(st.sampled_from([L, G, X]), max_size=24))
def test_blocks_cover_the_layers_in_order_exactly_once(layers):
    blocks = find_blocks(tuple(layers))
    order = [
        (block.layer_index(slot, repeat), layer)
        for block in blocks
        for repeat in range(block.repeats)
        for slot, layer in enumerate(block.period)
    ]
    assert order == list(enumerate(layers))
