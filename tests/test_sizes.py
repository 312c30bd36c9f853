"""The table of known sizes against what is published of each, against transformers and against our model."""

import math

import pytest

from gemma_tpu.errors import UserError
from gemma_tpu.gemma import sizes
from gemma_tpu.gemma.mesh import tp_choices
from gemma_tpu.gemma.variants import Layer, Rope

# Text parameters; LoRA parameters at rank 64; the largest tp that divides every head count, without and with
# replicated KV heads.
COUNTS = {
    "gemma4-e2b": (4_628_569_379, 96_632_832, 1, 8),
    "gemma4-e4b": (7_463_013_418, 139_526_144, 2, 8),
    "gemma4-12b": (11_907_350_320, 262_275_072, 1, 16),
    "gemma4-26b-a4b": (25_233_141_790, 74_342_400, 2, 16),
    "gemma4-31b": (30_697_345_340, 489_717_760, 4, 32),
    "gemma3-270m": (268_098_176, 15_187_968, 1, 4),
    "gemma3-1b": (999_885_952, 52_183_040, 1, 4),
    "gemma3-4b": (3_880_263_168, 119_209_984, 4, 8),
    "gemma3-12b": (11_766_034_176, 261_881_856, 8, 16),
    "gemma3-27b": (27_009_346_304, 454_066_176, 16, 32),
}
# layers, global ones among them, is the last one global; window; context; softcap; scale of the queries
SHAPES = {
    "gemma4-e2b": (35, 7, True, 512, 131072, 30.0, 1.0),
    "gemma4-e4b": (42, 7, True, 512, 131072, 30.0, 1.0),
    "gemma4-12b": (48, 8, True, 1024, 262144, 30.0, 1.0),
    "gemma4-26b-a4b": (30, 5, True, 1024, 262144, 30.0, 1.0),
    "gemma4-31b": (60, 10, True, 1024, 262144, 30.0, 1.0),
    "gemma3-270m": (18, 3, True, 512, 32768, None, 256**-0.5),
    "gemma3-1b": (26, 4, False, 512, 32768, None, 256**-0.5),
    "gemma3-4b": (34, 5, False, 1024, 131072, None, 256**-0.5),
    "gemma3-12b": (48, 8, True, 1024, 131072, None, 256**-0.5),
    "gemma3-27b": (62, 10, False, 1024, 131072, None, 168**-0.5),
}
# What these checkpoints hold in all on the hub. What is no text: the SigLIP tower, and the projector's norm
# (1152) and matrix (1152 x hidden).
VISION_TOWER = 416_866_032
MULTIMODAL_TOTALS = {"gemma3-4b": 4_300_079_472, "gemma3-12b": 12_187_325_040, "gemma3-27b": 27_432_406_640}


def test_the_ten_sizes_are_known():
    assert sizes.known() == list(COUNTS) == list(SHAPES)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_that_are_published(name):
    arch = sizes.architecture(name)
    text, lora, _, _ = COUNTS[name]
    assert sizes.parameters(arch) == text
    assert sizes.lora_parameters(arch, 64) == lora
    assert sizes.lora_parameters(arch, 16) * 4 == lora
    if name in MULTIMODAL_TOTALS:
        assert text + VISION_TOWER + 1152 + 1152 * arch.hidden == MULTIMODAL_TOTALS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_the_largest_tp_is_the_one_that_divides_the_fewest_heads(name):
    arch = sizes.architecture(name)
    assert tp_choices(arch, replicate_kv=False, limit=64)[-1] == COUNTS[name][2]
    assert tp_choices(arch, replicate_kv=True, limit=64)[-1] == COUNTS[name][3]


@pytest.mark.parametrize("name", SHAPES)
def test_layers_windows_and_scales_are_those_that_are_published(name):
    arch = sizes.architecture(name)
    count, full, last_is_global, window, context, softcap, scale = SHAPES[name]
    assert [layer.kind for layer in arch.layers].count("global") == full
    assert (len(arch.layers), arch.layers[-1].kind == "global") == (count, last_is_global)
    assert {layer.window for layer in arch.layers} == {window, None}
    assert (arch.context, arch.logit_softcap, arch.query_scale) == (context, softcap, scale)
    assert arch.norm_offset == (1.0 if name.startswith("gemma3") else 0.0)


def test_global_ropes_turn_a_quarter_of_the_head_in_gemma_4_and_are_stretched_in_the_larger_gemma_3():
    ropes = {name: _first(name, "global").rope for name in sizes.known()}
    stretched = {"gemma3-4b", "gemma3-12b", "gemma3-27b"}
    for name, rope in ropes.items():
        partial = 0.25 if name.startswith("gemma4") else 1.0
        assert rope == Rope(1_000_000.0, partial, 8.0 if name in stretched else 1.0)
        assert _first(name, "local").rope == Rope(10_000.0)


def test_the_edge_sizes_share_keys_and_values_and_only_e2b_doubles_the_mlp_of_those_layers():
    for name, shared, mlp in (("gemma4-e2b", 20, (6144, 12288)), ("gemma4-e4b", 18, (10240, 10240))):
        arch = sizes.architecture(name)
        own = len(arch.layers) - shared
        assert [layer.kv_shared for layer in arch.layers] == [False] * own + [True] * shared
        assert (arch.layers[0].mlp, arch.layers[-1].mlp) == mlp
        assert (arch.per_layer_input, arch.per_layer_vocab) == (256, 262144)
    assert not any(sizes.architecture(name).shares_kv for name in sizes.known()[2:])


def test_26b_has_128_experts_beside_its_dense_mlp_and_no_other_size_has_any():
    experts = {name: {layer.experts for layer in sizes.architecture(name).layers} for name in sizes.known()}
    (found,) = experts.pop("gemma4-26b-a4b")
    assert (found.count, found.top_k, found.mlp) == (128, 8, 704)
    assert set.union(*experts.values()) == {None}


@pytest.mark.parametrize("name", COUNTS)
def test_transformers_makes_the_same_tensors_of_the_same_config(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from gemma_tpu.gemma.weights import entries

    config = sizes.config(name)
    family = {"gemma4": "Gemma4", "gemma4_unified": "Gemma4Unified"}.get(config["model_type"], "Gemma3")
    text = {key: value for key, value in config.get("text_config", config).items() if key != "model_type"}
    with torch.device("meta"):  # shapes alone
        reference = getattr(transformers, f"{family}ForCausalLM")(
            getattr(transformers, f"{family}TextConfig")(**text)
        )
    theirs = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    del theirs["lm_head.weight"]  # tied
    arch = sizes.architecture(name).with_prefix("model.")
    assert {entry.hf: entry.hf_shape for entry in entries(arch)} == theirs


@pytest.mark.parametrize("name", COUNTS)
def test_our_model_holds_what_the_counts_say(name):
    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading
    from gemma_tpu.gemma.model import Decoder
    from gemma_tpu.gemma.projection import Base

    arch = sizes.architecture(name)
    model = Decoder(arch)
    base = loading.variables(model, Base).values()
    assert sum(math.prod(variable.shape) for variable in base) == sizes.parameters(arch)
    lora.inject(model, rank=8, alpha=16)
    assert lora.count(model) == sizes.lora_parameters(arch, 8)


def test_an_unknown_size_is_refused_with_all_that_are_known():
    for ask in (sizes.config, sizes.architecture, sizes.hub_id):
        with pytest.raises(UserError, match="'gemma4-26b' is no known size; known: gemma4-e2b, .*-27b"):
            ask("gemma4-26b")


def test_a_config_that_a_caller_changes_changes_no_other():
    changed = sizes.config("gemma4-31b")
    changed["text_config"]["layer_types"].clear()
    assert len(sizes.architecture("gemma4-31b").layers) == 60


def _first(name: str, kind: str) -> Layer:
    return next(layer for layer in sizes.architecture(name).layers if layer.kind == kind)
