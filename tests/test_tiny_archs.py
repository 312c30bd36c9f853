"""Each tiny architecture has its published layout: transformers loads every tensor, the chat renders as documented."""

import json
import re

import numpy as np
import pytest
from test_tiny import TEXTS, digests, read_tensors

from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import hf_config
from gemma_tpu.tiny.checkpoint import ARCHS, write_tiny

MODEL_TYPES = {
    "gemma4-e2b": "gemma4", "gemma4-e4b": "gemma4", "gemma4-12b": "gemma4_unified", "gemma4-26b-a4b": "gemma4",
    "gemma4-31b": "gemma4", "gemma3-270m": "gemma3_text", "gemma3-1b": "gemma3_text", "gemma3-4b": "gemma3",
    "gemma3-12b": "gemma3", "gemma3-27b": "gemma3",
}  # fmt: skip
PREFIXES = {
    "gemma4": "model.language_model.", "gemma4_unified": "model.language_model.",
    "gemma3": "language_model.model.", "gemma3_text": "model.",
}  # fmt: skip
AUDIO = {"gemma4-e2b", "gemma4-e4b", "gemma4-12b"}
LAST_IS_LOCAL = {"gemma3-1b", "gemma3-4b", "gemma3-27b"}
GEMMA3 = [name for name in MODEL_TYPES if name.startswith("gemma3")]
CHAT = [{"role": "user", "content": " Q\n"}, {"role": "assistant", "content": "A "}]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def folder(arch, tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp(arch) / "tiny", arch=arch, dtype="float32", texts=TEXTS)


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


def layers_of(tensors, prefix):
    """Layer number -> the names that its tensors have within it."""
    found = [re.match(rf"{re.escape(prefix)}layers\.(\d+)\.(.+)", name) for name in tensors]
    layers = {}
    for match in filter(None, found):
        layers.setdefault(int(match[1]), set()).add(match[2])
    return layers


# ---- the layout


def test_all_published_sizes_are_there():
    assert list(ARCHS) == list(MODEL_TYPES)


def test_the_config_is_of_the_published_family(arch, config):
    assert config["model_type"] == MODEL_TYPES[arch]
    assert ("vision_config" in config) == (arch not in ("gemma3-270m", "gemma3-1b"))
    assert bool(config.get("audio_config")) == (arch in AUDIO)
    text = config.get("text_config", config)
    assert text["model_type"] == config["model_type"].removesuffix("_text") + "_text"
    assert "per_layer_config" not in text  # the form that transformers writes, never the published one
    if arch in GEMMA3:
        assert "rope_parameters" not in text
        linear = {"factor": 8.0, "rope_type": "linear"}
        assert text["rope_scaling"] == (linear if config["model_type"] == "gemma3" else None)


def test_the_text_tower_has_its_published_prefix_and_towers_their_own(arch, folder, config):
    names = set(read_tensors(folder))
    prefix = PREFIXES[config["model_type"]]
    tops = {name.split(".")[0] if arch in GEMMA3 else ".".join(name.split(".")[:2]) for name in names}
    assert f"{prefix}embed_tokens.weight" in names and f"{prefix}norm.weight" in names
    expected = {"model"} if arch in ("gemma3-270m", "gemma3-1b") else {
        "gemma3": {"language_model", "vision_tower", "multi_modal_projector"},
        "gemma4": {"model.language_model", "model.vision_tower", "model.embed_vision"},
        "gemma4_unified": {"model.language_model", "model.vision_embedder", "model.embed_vision"},
    }[config["model_type"]]  # fmt: skip
    if arch in AUDIO:
        expected = expected | {"model.embed_audio"}
    if arch in ("gemma4-e2b", "gemma4-e4b"):
        expected = expected | {"model.audio_tower"}
    assert tops == expected


def test_our_reader_agrees_with_the_shapes_and_the_pattern_holds(arch, folder, config):
    described = hf_config.from_config(config)
    tensors = read_tensors(folder)
    for i, layer in enumerate(described.layers):
        name = f"{described.prefix}layers.{i}"
        assert tensors[f"{name}.self_attn.k_proj.weight"].shape == (layer.kv_heads * layer.head_dim, described.hidden)
        assert tensors[f"{name}.mlp.down_proj.weight"].shape == (described.hidden, layer.mlp)
        assert (f"{name}.self_attn.v_proj.weight" in tensors) != layer.k_eq_v
    kinds = [layer.kind for layer in described.layers]
    period = 5 if arch == "gemma4-e2b" else 6
    assert kinds == ["global" if (i + 1) % period == 0 else "local" for i in range(len(kinds))]
    assert (kinds[-1] == "local") == (arch in LAST_IS_LOCAL)


def test_every_layer_of_a_kv_sharing_model_has_the_redundant_tensors(tmp_path):
    for arch, wide in (("gemma4-e2b", True), ("gemma4-e4b", False)):
        folder = write_tiny(tmp_path / arch, arch=arch, tokenizer=False)
        described = hf_config.from_config(json.loads((folder / "config.json").read_text()))
        layers = layers_of(read_tensors(folder), described.prefix)
        shared = [i for i, layer in enumerate(described.layers) if layer.kv_shared]
        assert len(shared) == ARCHS[arch].dims.kv_shared and shared[-1] == len(layers) - 1
        assert len({frozenset(names) for names in layers.values()}) == 1
        assert {f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")} <= layers[shared[0]]
        assert described.layers[shared[0]].mlp == described.layers[0].mlp * (2 if wide else 1)


def test_every_tensor_is_random_and_gemma_3_norms_lie_around_zero(arch, folder):
    tensors = read_tensors(folder)
    for name, array in tensors.items():
        assert np.all(np.isfinite(array)), name
        assert array.size == 1 or np.std(array) > 0, f"{name} is constant"
        assert not np.any(array == 0) or array.ndim > 1, f"{name} has zeros"
        if name.endswith("input_layernorm.weight") and "vision" not in name:
            assert abs(np.mean(array) - (0 if arch in GEMMA3 else 1)) < 0.1, name
        if name.endswith("_min"):
            assert array < 0 < tensors[name.replace("_min", "_max")]


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for arch in ("gemma4-26b-a4b", "gemma3-4b"):
        first, again = (write_tiny(tmp_path / f"{arch}-{i}", arch=arch, seed=5, texts=TEXTS) for i in (1, 2))
        assert digests(first) == digests(again)


# ---- transformers


def load(folder):
    """The model in its published class, after a check that no tensor was missing, unexpected or misshapen."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    # Eager: the grouped kernel of the experts knows no float64.
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    return model


def test_transformers_finds_every_tensor_and_rounding_hardly_moves_the_logits(folder):
    torch = pytest.importorskip("torch")
    model, ids = load(folder), torch.arange(110, 170)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        exact = model.double()(input_ids=ids).logits
    # Logits of order one: random weights that start near a uniform guess, not at its edges.
    assert 0.5 < logits.std().item() < 2
    assert (logits - exact).abs().max().item() < 3e-5


@pytest.mark.parametrize("arch", ["gemma4-e2b", "gemma4-12b", "gemma4-26b-a4b", "gemma3-4b"])
def test_the_text_only_layout_loads_into_the_text_only_class_and_gives_the_same_logits(arch, tmp_path):
    torch = pytest.importorskip("torch")
    logits = {}
    for text_only in (False, True):
        folder = write_tiny(
            tmp_path / str(text_only), arch=arch, dtype="float32", tokenizer=False, text_only=text_only
        )
        model = load(folder)
        assert type(model).__name__.endswith("ForCausalLM" if text_only else "ForConditionalGeneration")
        with torch.no_grad():
            logits[text_only] = model(input_ids=torch.arange(110, 160)[None]).logits
    assert torch.allclose(logits[False], logits[True], atol=1e-5)


# ---- the tokenizer and the chat template


def render(folder, messages, **arguments):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **arguments)


def test_the_chat_renders_as_documented(arch, folder):
    opening, closing = ("<start_of_turn>", "<end_of_turn>") if arch in GEMMA3 else ("<|turn>", "<turn|>")
    user = f"<bos>{opening}user\nQ{closing}\n"
    assert render(folder, CHAT) == f"{user}{opening}model\nA{closing}\n"
    thought = "<|channel>thought\n<channel|>" if arch in ("gemma4-12b", "gemma4-26b-a4b", "gemma4-31b") else ""
    assert render(folder, CHAT[:1], add_generation_prompt=True) == f"{user}{opening}model\n{thought}"


def test_the_tokenizer_makes_training_rows_that_begin_with_the_prompt(arch, folder):
    tokenizer = Tokenizer(folder)
    names = ("<start_of_turn>", "<end_of_turn>") if arch in GEMMA3 else ("<|turn>", "<turn|>")
    assert [tokenizer.encode(name) for name in ("<pad>", "<eos>", "<bos>", *names)] == [[0], [1], [2], [105], [106]]
    assert tokenizer.vocab_size == 1024 and tokenizer.stop_ids == (1, 106) and tokenizer.pad_id == 0
    ids, mask = tokenizer.training(CHAT)
    first = mask.index(True)
    assert ids[:first] == tokenizer.prompt(CHAT[:1]) and mask == [False] * first + [True, True] + [False]
    assert tokenizer.decode(ids[first:]) == "A" + names[1] + "\n"


def test_gemma_3_puts_the_system_text_at_the_head_of_the_first_user_turn(tmp_path):
    folder = write_tiny(tmp_path / "t", arch="gemma3-1b", texts=TEXTS)
    conversation = [{"role": "system", "content": "S"}, *CHAT, {"role": "user", "content": "R"}]
    turns = "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    assert render(folder, conversation) == turns + "<start_of_turn>user\nR<end_of_turn>\n"
    ids, mask = Tokenizer(folder).training(conversation[:3])
    assert ids[: mask.index(True)] == Tokenizer(folder).prompt(conversation[:2])


@pytest.mark.parametrize(
    "messages, arguments, says",
    [
        ([{"role": "tool", "content": "x"}], {}, "unknown role tool: one of user, assistant"),
        ([CHAT[0], {"role": "system", "content": "S"}], {}, "unknown role system"),
        ([CHAT[0], CHAT[0]], {}, "roles must alternate, user first: user where model is due"),
        ([CHAT[1]], {}, "roles must alternate, user first: assistant where user is due"),
        ([{"role": "system", "content": "S"}], {}, "the system text needs a user turn"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "must be a string"),
        ([{"role": "user"}], {}, "must be a string"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], {}, "renders no tool_calls"),
        (CHAT, {"tools": [{"type": "function"}]}, "renders no tools"),
    ],
)
def test_the_gemma_3_template_refuses_what_it_does_not_render(tmp_path_factory, messages, arguments, says):
    from jinja2 import TemplateError

    folder = tmp_path_factory.getbasetemp() / "gemma3-template"
    if not folder.exists():
        write_tiny(folder, arch="gemma3-270m", texts=TEXTS)
    with pytest.raises(TemplateError, match=says):
        render(folder, messages, **arguments)


# ---- sizes


def test_other_sizes_keep_the_layout(tmp_path):
    pytest.importorskip("torch")
    small = dict(tokenizer=False, dtype="float32", hidden=32, mlp=48, vocab=128, head_dim=16, pattern=1, window=8)
    for arch, dims in (
        ("gemma4-e2b", dict(layers=6, kv_shared=2, heads=4, per_layer_input=6, global_head_dim=24)),
        ("gemma4-26b-a4b", dict(layers=2, heads=4, kv_heads=2, experts=3, top_k=2, expert_mlp=5)),
        ("gemma3-1b", dict(layers=3, heads=4, kv_heads=2, query_scalar=20)),
        ("gemma3-4b", dict(layers=3, heads=4, kv_heads=2)),
        ("gemma3-270m", dict(layers=3, heads=4, kv_heads=2)),
    ):
        folder = write_tiny(tmp_path / arch, arch=arch, **small, **dims)
        model = load(folder)
        described = hf_config.from_config(json.loads((folder / "config.json").read_text()))
        kinds = [f"{'sliding' if layer.window else 'full'}_attention" for layer in described.layers]
        assert kinds == model.config.get_text_config().layer_types
        if arch == "gemma3-1b":
            assert model.model.layers[0].self_attn.scaling == 20**-0.5 == described.query_scale


@pytest.mark.parametrize(
    "arch, dims, says",
    [
        ("gemma3-1b", dict(experts=4, kv_shared=1), "gemma3-1b has no experts, kv_shared: leave it out"),
        ("gemma4-12b", dict(per_layer_input=8), "gemma4-12b has no per_layer_input"),
        ("gemma4-31b", dict(query_scalar=8), "gemma4-31b has no query_scalar"),
        ("gemma4-e2b", dict(global_kv_heads=1), "gemma4-e2b has no global_kv_heads"),
        ("gemma4-e2b", dict(kv_shared=-1), "kv_shared is -1: it must be an integer of at least 0"),
        ("gemma4-e2b", dict(kv_shared=11), r"layers less kv_shared \(4\) must be at least pattern \+ 1 \(5\)"),
        ("gemma4-26b-a4b", dict(top_k=9), r"top_k \(9\) must lie between 1 and experts \(8\)"),
        ("gemma4-26b-a4b", dict(expert_mlp=0), r"expert_mlp \(0\) must be at least 1 with experts \(8\)"),
        ("gemma3-4b", dict(hidden=60), r"hidden \(60\) must be a multiple of heads \(8\)"),
    ],
)
def test_sizes_that_the_architecture_cannot_have_are_refused(tmp_path, arch, dims, says):
    with pytest.raises(UserError, match=says):
        write_tiny(tmp_path / "out", arch=arch, **dims)
    assert list(tmp_path.iterdir()) == []
