"""Every Gemma against transformers: what a config means, how layers repeat, what a tiny model computes.

tests/test_architectures_slow.py holds the same of every architecture where this file takes one of a kind.
"""

import itertools
import json
import tempfile
import warnings
from pathlib import Path

import arch_helper
import helpers
import numpy as np
import pytest
from arch_helper import CASES, EXPERTS, TEXT_ONLY, rewritten
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gemma_tpu.adapter import lora, peft_folder, updates
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import hf_config, loading, mesh, sizes, weights
from gemma_tpu.gemma.variants import Layer, Rope, find_blocks
from gemma_tpu.handoff import patch
from gemma_tpu.schema import MeshConfig
from gemma_tpu.storage.shards import open_checkpoint

ALL = CASES | TEXT_ONLY
# The limits; MERGED, and on meshes the logits, times the largest logit.
LOGITS, LOSS, GRADIENT, MERGED, MESH = 1e-4, 1e-5, 1e-4, 1e-5, 1e-5


@pytest.fixture(scope="session")
def tiny_arch(tmp_path_factory):
    pytest.importorskip("torch")
    return arch_helper.checkpoints(tmp_path_factory.mktemp("architectures"))


# --- config.json -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_published_config_and_the_one_that_transformers_writes_are_one_architecture(name):
    pytest.importorskip("transformers")
    assert hf_config.from_config(rewritten(ALL[name])) == hf_config.from_config(ALL[name])


@pytest.mark.parametrize("name", sizes.known())
def test_the_same_of_the_published_sizes(name):
    pytest.importorskip("transformers")
    assert hf_config.from_config(rewritten(sizes.config(name))) == hf_config.from_config(sizes.config(name))


@pytest.mark.parametrize("name", hf_config.FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(name):
    transformers = pytest.importorskip("transformers")
    family = hf_config.FAMILIES[name]
    text = {"model_type": name, "text_config": {}} if family.multimodal else {"model_type": name}
    assert hf_config.from_config(rewritten(text)) == hf_config.from_config(text)
    fields = transformers.CONFIG_MAPPING[name.removesuffix("_text") + "_text"].__dataclass_fields__
    told = {key: fields[key].default for key in family.defaults if key in fields}
    assert {"hidden_size", "sliding_window", "final_logit_softcapping", "tie_word_embeddings"} <= set(told)
    assert {key: family.defaults[key] for key in told} == told


@pytest.mark.parametrize("name", ["gemma4", "gemma4_text", "gemma4_unified", "gemma3", "gemma3_text"])
def test_every_option_that_is_not_implemented_is_refused_by_name(name):
    wrong = {
        "attn_logit_softcapping": 50.0, "use_bidirectional_attention": "all", "attention_bias": True,
        "attention_dropout": 0.1, "hidden_activation": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    config = {"model_type": name} | ({"text_config": wrong} if hf_config.FAMILIES[name].multimodal else wrong)
    with pytest.raises(UserError) as error:
        hf_config.from_config(config)
    for key, value in wrong.items():
        assert f"{key} is {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enable_moe_block": True, "num_experts": 4}, "top_k_experts is None"),
        ({"num_kv_shared_layers": 7}, "leaves no full_attention layer"),
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers is 8"),
        ({"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "'yarn'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"per_layer_config": {"03": {"sliding_window": 7}}}, "per_layer_config.03.sliding_window is 7"),
    ],
)
def test_a_text_tower_that_cannot_be_built_is_refused(change, words):
    text = CASES["gemma4-e2b"]["text_config"] | change
    with pytest.raises(UserError) as error:
        hf_config.from_config({"model_type": "gemma4", "text_config": text})
    assert words in str(error.value)


def test_an_untied_head_is_refused_where_the_multimodal_config_says_so():
    with pytest.raises(UserError, match="tie_word_embeddings is False"):
        hf_config.from_config(CASES["gemma4-31b"] | {"tie_word_embeddings": False})


def test_an_unknown_model_type_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match="'gemma3n'.*gemma4, gemma4_text, gemma4_unified"):
        hf_config.from_config({"model_type": "gemma3n"})


# --- periods -----------------------------------------------------------------------------------------------

PERIODS = {
    "gemma4-e2b": [(5, 3), (5, 4)], "gemma4-e4b": [(6, 4), (6, 3)], "gemma4-12b": [(6, 8)],
    "gemma4-26b-a4b": [(6, 5)], "gemma4-31b": [(6, 10)], "gemma3-270m": [(6, 3)],
    "gemma3-1b": [(6, 4), (1, 2)], "gemma3-4b": [(6, 5), (1, 4)], "gemma3-12b": [(6, 8)],
    "gemma3-27b": [(6, 10), (1, 2)],
}  # fmt: skip


@pytest.mark.parametrize("name", sizes.known())
def test_every_published_size_is_scanned_in_periods(name):
    arch = sizes.architecture(name)
    assert [(len(block.period), block.repeats) for block in arch.blocks] == PERIODS[name]
    assert [block.layer_index(slot, repeat) for block in arch.blocks for repeat in range(block.repeats)
            for slot in range(len(block.period))] == list(range(len(arch.layers)))  # fmt: skip


L = Layer(head_dim=4, kv_heads=2, mlp=8, rope=Rope(1e4), window=8)
G = Layer(head_dim=8, kv_heads=1, mlp=8, rope=Rope(1e6, 0.25), window=None, k_eq_v=True)
X = Layer(head_dim=6, kv_heads=2, mlp=8, rope=Rope(1e4), window=8)


def cost(shape) -> int:
    return sum(len(period) + 1 for period, _ in shape)


def covers(layers):
    """Every way to cut a row into repeated periods, by trying them all."""
    if not layers:
        yield ()
    for end in range(1, len(layers) + 1):
        for period in range(1, end + 1):
            if end % period == 0 and layers[:period] * (end // period) == layers[:end]:
                yield from (((layers[:period], end // period), *rest) for rest in covers(layers[end:]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([L, G, X]), max_size=7).map(tuple))
def test_no_other_cut_compiles_fewer_layer_bodies(layers):
    blocks = [(block.period, block.repeats) for block in find_blocks(layers)]
    assert tuple(itertools.chain.from_iterable(period * repeats for period, repeats in blocks)) == layers
    assert cost(blocks) == min(map(cost, covers(layers)))


def test_a_layer_of_its_own_in_front_does_not_hide_the_period_behind_it():
    assert [(len(b.period), b.repeats) for b in find_blocks((X, *(L, L, L, L, L, G) * 3))] == [(1, 1), (6, 3)]


# --- the names of the tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_table_of_names_is_a_bijection_to_the_tensors_of_the_text_tower(tiny_arch, name):
    checkpoint = open_checkpoint(tiny_arch(name))
    arch = loading.architecture(checkpoint)
    table = list(weights.entries(arch))
    assert len({entry.hf for entry in table}) == len(table)
    assert len({(entry.path, entry.index) for entry in table}) == len(table)
    redundant = {
        f"{arch.prefix}layers.{number}.{hf}"
        for number, layer in enumerate(arch.layers) if layer.kv_shared for hf in weights.REDUNDANT
    }  # fmt: skip
    ours, theirs = {entry.hf for entry in table}, set(checkpoint.names())
    assert not redundant & ours
    assert ours | redundant == {hf for hf in theirs if hf.startswith(arch.prefix) and "vision" not in hf}
    assert all(tuple(checkpoint.info(entry.hf).shape) == entry.hf_shape for entry in table)


# --- what the model computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-26b-a4b", "gemma3-4b"])
def test_the_logits_are_those_of_transformers_past_the_window_and_with_padding(tiny_arch, name):
    assert helpers.compare_with_transformers(tiny_arch(name)) <= LOGITS


def check_gradients(folder, experts: bool, remat: bool = True) -> None:
    pytest.importorskip("peft")
    found = arch_helper.compare_with_peft(folder, experts, remat)
    assert found.logits <= LOGITS and found.loss <= LOSS
    assert {name: error for name, error in found.errors.items() if error > GRADIENT} == {}
    assert found.remat <= 1e-5 and found.remat_loss <= 1e-6
    assert any("experts" in name for name in found.errors) == experts


def test_gradients_through_shared_keys_and_values_are_pefts_and_survive_remat(tiny_arch):
    check_gradients(tiny_arch("gemma4-e2b"), experts=False)


def test_gradients_of_adapters_on_experts_are_pefts(tiny_arch):
    check_gradients(tiny_arch("gemma4-26b-a4b"), experts=True, remat=False)


def test_merged_experts_are_in_transformers_what_peft_applies(tiny_arch, tmp_path):
    pytest.importorskip("peft")
    relative, figures = arch_helper.compare_merge(
        tiny_arch("gemma4-26b-a4b"), tmp_path / "merged", experts=True
    )
    assert relative <= MERGED
    assert figures["updated"] == figures["changed"] and figures["max_ulp"] == 0


def stack_of_experts(folder, *shape: int):
    from safetensors.numpy import save_file

    base = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    folder.mkdir()
    save_file({"experts.up": base, "other": base[0]}, folder / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("block", [7, 40, 10_000], ids=["within an expert", "several experts", "all at once"])
def test_a_stack_of_experts_is_patched_in_blocks_exactly(tmp_path, monkeypatch, block):
    monkeypatch.setattr(updates, "BLOCK_ELEMENTS", block)
    base, rng = stack_of_experts(tmp_path / "base", 5, 3, 4), np.random.default_rng(1)
    b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3, 2), (5, 2, 4)))
    report = patch.write_patched(open_checkpoint(tmp_path / "base"), tmp_path / "out",
                                 {"experts.up": updates.LowRank(b=b, a=a, scale=0.5)})  # fmt: skip
    out = open_checkpoint(tmp_path / "out")
    exact = base.astype(np.float64) + 0.5 * (b.astype(np.float64) @ a.astype(np.float64))
    assert np.array_equal(out.read("experts.up"), exact.astype(np.float32))
    assert np.array_equal(out.read("other"), base[0])
    assert report.changes["experts.up"].moved == np.count_nonzero(exact.astype(np.float32) != base)


@pytest.mark.parametrize(
    ("b", "a"), [((4, 3, 2), (4, 2, 4)), ((5, 3, 2), (2, 4)), ((3, 2), (2, 4)), ((5, 3, 2), (5, 3, 4))]
)
def test_an_update_that_does_not_fit_a_stack_of_experts_is_refused(tmp_path, b, a):
    stack_of_experts(tmp_path / "base", 5, 3, 4)
    update = updates.LowRank(b=np.zeros(b, np.float32), a=np.zeros(a, np.float32), scale=1.0)
    with pytest.raises(UserError, match=r"must give the base's \[5, 3, 4\]"):
        patch.write_patched(open_checkpoint(tmp_path / "base"), tmp_path / "out", {"experts.up": update})


@pytest.mark.parametrize("targets", [EXPERTS[:1], EXPERTS[1:], EXPERTS], ids=str)
def test_adapters_on_experts_have_the_names_and_shapes_of_pefts(tiny_arch, targets):
    peft = pytest.importorskip("peft")
    folder = tiny_arch("gemma4-26b-a4b")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=list(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(helpers.reference(folder), config))
    model, _ = loading.build(folder, dtype="float32")
    lora.inject(model, targets=(*lora.ALL, *targets), rank=2, alpha=2)
    ours = weights.to_peft(weights.split_lora(model.arch, lora.initial(model, seed=0)))
    found = {name: tensor.shape for name, tensor in ours.items() if ".experts." in name}
    assert found == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_an_adapter_whose_rows_are_no_multiple_of_the_experts_is_refused(tiny_arch, tmp_path):
    folder = tiny_arch("gemma4-26b-a4b")
    base = open_checkpoint(folder)
    name = next(one for one in base.names() if one.endswith("experts.down_proj"))
    experts, out, inside = base.info(name).shape
    stem = f"base_model.model.{name.removesuffix('.down_proj')}"
    save_file({f"{stem}.lora_A.weight": np.ones((experts + 1, experts * inside), np.float32),
               f"{stem}.lora_B.weight": np.ones((out, experts + 1), np.float32)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": ["experts.down_proj"]
    }))  # fmt: skip
    with pytest.raises(UserError, match=r"down_proj: A \[\d+, \d+\], B .* do not give"):
        peft_folder.read(tmp_path, base, loading.architecture(base))


@pytest.mark.parametrize("name", ALL)
def test_weights_that_nothing_trained_come_out_byte_for_byte(tiny_arch, tmp_path, name):
    """With the redundant K and V of layers that share others', and the vision tower."""
    found = arch_helper.export_untrained(tiny_arch(name), tmp_path / "out")
    assert len(found.pop("identical")) == len(open_checkpoint(tiny_arch(name)).names())
    assert not any(found.values()), found


def test_a_router_is_never_adapted(tiny_arch):
    model = arch_helper.load_adapted(tiny_arch("gemma4-26b-a4b"), experts=True)
    assert not any("router" in path for path in helpers.adapter_of(model))
    assert not any("experts" in path for path in helpers.adapter_of(helpers.load(
        tiny_arch("gemma4-26b-a4b"), rank=2)))  # fmt: skip


@pytest.mark.slow
def test_greedy_completions_with_shared_keys_are_those_of_transformers(tiny_arch):
    ours, theirs = arch_helper.greedy(tiny_arch("gemma4-e2b"))
    assert ours == theirs


# --- random architectures -----------------------------------------------------------------------------------


@st.composite
def architectures(draw):
    """Any Gemma 4 or 3 text tower of two to six small layers that transformers accepts."""
    layers, heads = draw(st.integers(2, 6)), draw(st.sampled_from([2, 4, 6]))
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    kinds = draw(st.lists(st.sampled_from(hf_config.KINDS), min_size=layers, max_size=layers))
    text = {
        "num_attention_heads": heads, "num_key_value_heads": draw(st.sampled_from(divisors)),
        "hidden_size": 12 * draw(st.integers(2, 3)), "intermediate_size": draw(st.integers(9, 40)),
        "head_dim": 2 * draw(st.integers(2, 8)), "sliding_window": draw(st.integers(2, 40)),
        "layer_types": kinds,
    }  # fmt: skip
    if draw(st.integers(0, 2)) == 0:
        text |= {"query_pre_attn_scalar": draw(st.integers(4, 20))}
        if draw(st.booleans()):
            text |= {"rope_scaling": {"rope_type": "linear", "factor": draw(st.sampled_from([2.0, 8.0]))}}
        return arch_helper.text_only("Gemma3ForCausalLM", "gemma3_text", arch_helper.gemma3(layers) | text)
    kinds[-1] = "full_attention"
    text |= {
        "global_head_dim": 8 * draw(st.integers(1, 4)), "attention_k_eq_v": draw(st.booleans()),
        "num_global_key_value_heads": draw(st.sampled_from([None, *divisors])),
        "final_logit_softcapping": draw(st.sampled_from([None, 30.0])),
        "use_double_wide_mlp": draw(st.booleans()),
    }  # fmt: skip
    possible = [n for n in range(1, layers) if set(kinds[-n:]) <= set(kinds[:-n]) == set(kinds)]
    shares = bool(possible) and draw(st.booleans())
    if shares:
        text |= {"num_kv_shared_layers": draw(st.sampled_from(possible))}
    if shares or draw(st.booleans()):  # transformers cannot run shared layers without per-layer embeddings
        text |= {"hidden_size_per_layer_input": draw(st.integers(12, 20)), "vocab_size_per_layer_input": 96}
    if draw(st.booleans()):
        count = draw(st.integers(2, 6))
        text |= {
            "enable_moe_block": True, "num_experts": count, "top_k_experts": draw(st.integers(1, count)),
            "moe_intermediate_size": 4 * draw(st.integers(1, 5)),  # torch's grouped matmul wants 16 bytes
        }  # fmt: skip
    return arch_helper.text_only("Gemma4ForCausalLM", "gemma4_text", arch_helper.gemma4(layers) | text)


def check_random(config) -> None:
    """Logits, loss and gradients of one drawn architecture, experts adapted where it has some."""
    with tempfile.TemporaryDirectory() as folder:
        arch_helper.write(Path(folder) / "model", config)
        check_gradients(Path(folder) / "model", experts=bool(config.get("enable_moe_block")), remat=False)


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(architectures())
def test_random_architectures_are_what_transformers_and_peft_compute(config):
    check_random(config)


# --- meshes -------------------------------------------------------------------------------------------------


def check_mesh(folder, shape: dict[str, int], experts: bool) -> None:
    wanted = arch_helper.run_on_mesh(folder, {}, experts)
    found = arch_helper.run_on_mesh(folder, shape, experts)
    assert np.abs(wanted[0]).max() > 1
    *absolute, relative = arch_helper.mesh_differences(found, wanted)
    assert max(absolute) <= MESH and relative <= GRADIENT


def test_an_expert_axis_needs_experts_that_it_divides():
    with_experts, without = (hf_config.from_config(CASES[name]) for name in ("gemma4-26b-a4b", "gemma4-31b"))
    assert mesh.sizes(MeshConfig(expert=4), with_experts, 4, 1)["expert"] == 4
    with pytest.raises(UserError, match="mesh.expert is 2, and this model has no experts"):
        mesh.sizes(MeshConfig(expert=2), without, 2, 1)
    with pytest.raises(UserError, match="mesh.expert=3 does not divide the 8 experts; valid: 1, 2, 4, 8"):
        mesh.sizes(MeshConfig(expert=3), with_experts, 3, 1)
