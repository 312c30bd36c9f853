"""The name table: every tensor of the text tower once, read back byte for byte, nothing else touched."""

import json

import jax
import numpy as np
import pytest
from helpers import DIMS, EVEN, SMALL, adapter_of, load, mesh_of, write
from safetensors.numpy import load_file, save_file

from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading, weights
from gemma_tpu.gemma.projection import Base
from gemma_tpu.storage.shards import INDEX_FILE, open_checkpoint


def edit(folder, change):
    """Rewrite the checkpoint's tensors, all into one shard, after `change` has had its hands on them."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    change(tensors)
    save_file(tensors, folder / "model-1.safetensors")
    (folder / INDEX_FILE).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-1.safetensors")})
    )
    return open_checkpoint(folder)


@pytest.mark.parametrize("text_only", [False, True])
def test_the_table_names_every_tensor_of_the_text_tower_exactly_once(tiny, text_only):
    checkpoint = open_checkpoint(tiny(**DIMS, text_only=text_only))
    arch = loading.architecture(checkpoint)
    names = [entry.hf for entry in weights.entries(arch)]
    assert len(names) == len(set(names))
    others = set(checkpoint.names()) - set(names)
    assert set(names) <= set(checkpoint.names())
    assert all(name.startswith(("model.vision_tower.", "model.embed_vision.")) for name in others)
    assert bool(others) is not text_only
    weights.check(checkpoint, arch)


def test_the_table_fills_every_element_of_every_variable_exactly_once(tiny):
    model, _ = loading.build(tiny(**DIMS), dtype="float32")
    filled = {path: np.zeros(v.shape, int) for path, v in loading.variables(model, Base).items()}
    for entry in weights.entries(model.arch):
        filled[entry.path][entry.index] += 1
        assert filled[entry.path][entry.index].shape == entry.shape
        assert int(np.prod(entry.shape)) == int(np.prod(entry.hf_shape))
    assert all((count == 1).all() for count in filled.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("fsdp", "tp"), [(1, 1), (2, 2)])
def test_what_is_loaded_goes_back_byte_for_byte(tmp_path, dtype, fsdp, tp):
    from gemma_tpu.tiny.checkpoint import write_tiny

    folder = write_tiny(tmp_path / "base", dtype=dtype, tokenizer=False, **EVEN)
    model = load(folder, mesh_of(fsdp, tp), dtype=dtype)
    variables = loading.variables(model, Base)
    checkpoint = open_checkpoint(folder)
    for entry in weights.entries(model.arch):
        ours = np.asarray(variables[entry.path][...])[entry.index].reshape(entry.hf_shape)
        stored = checkpoint.read(entry.hf)
        assert ours.dtype == stored.dtype
        assert ours.tobytes() == stored.tobytes(), entry.hf


def test_each_device_of_a_2x2_mesh_holds_its_quarter_of_the_matrices(tiny):
    variables = loading.variables(load(tiny(**EVEN), mesh_of(2, 2)), Base)
    split = 0
    for path, variable in variables.items():
        array = variable[...]
        per_device = array.addressable_shards[0].data.size
        matrix = path.endswith("_proj.w") or path.endswith("einsum.w") or path == "embed.w"
        assert per_device * (4 if matrix else 1) == array.size, path
        split += matrix
        whole = np.asarray(jax.device_get(array))
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert split == 1 + 2 * 6  # embed; q, kv or k, o, gate, up and down of the local and of the global slot


def test_a_bfloat16_base_is_widened_exactly(tmp_path):
    from gemma_tpu.tiny.checkpoint import write_tiny

    folder = write_tiny(tmp_path / "base", dtype="bfloat16", tokenizer=False, **SMALL)
    embed = load(folder, dtype="float32").embed.w[...]
    assert embed.dtype == np.float32
    np.testing.assert_array_equal(
        embed, open_checkpoint(folder).read("model.language_model.embed_tokens.weight").astype(np.float32)
    )


def test_all_tensors_that_do_not_fit_are_named_at_once(tmp_path):
    folder = write(tmp_path / "base", **SMALL)
    layers = "model.language_model.layers"

    def break_it(tensors):
        del tensors[f"{layers}.1.self_attn.k_proj.weight"]
        tensors[f"{layers}.2.mlp.up_proj.weight"] = np.zeros((7, 40), np.float32)
        tensors[f"{layers}.1.self_attn.v_proj.weight"] = np.zeros((32, 40), np.float32)
        tensors[f"{layers}.4.layer_scalar"] = np.zeros(1, np.float32)

    checkpoint = edit(folder, break_it)
    model, _ = loading.build(folder, dtype="float32")
    with pytest.raises(UserError) as error:
        loading.load_base(model, checkpoint, loading.place(model, mesh_of())[0])
    said = str(error.value)
    assert str(folder) in said
    assert f"{layers}.1.self_attn.k_proj.weight: missing" in said
    assert f"{layers}.2.mlp.up_proj.weight: shape (7, 40), config.json says (56, 40)" in said
    assert f"{layers}.1.self_attn.v_proj.weight: not a tensor of this architecture" in said
    assert f"{layers}.4.layer_scalar: not a tensor of this architecture" in said
    assert len(said.splitlines()) == 5


def test_a_long_list_of_offenders_is_cut_and_counted(tmp_path):
    folder = write(tmp_path / "base", **SMALL)
    checkpoint = edit(
        folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name]
    )
    arch = loading.architecture(checkpoint)
    with pytest.raises(UserError) as error:
        weights.check(checkpoint, arch.with_prefix("model.other."))
    assert f"… and {len(list(weights.entries(arch))) - 20} more" in str(error.value)


def test_a_text_tower_under_the_other_prefix_is_found(tmp_path):
    folder = write(tmp_path / "base", **SMALL, text_only=True)
    wanted = load(folder).embed.w[...]

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)

    edit(folder, rename)
    assert loading.architecture(open_checkpoint(folder)).prefix == "model.language_model."
    np.testing.assert_array_equal(load(folder).embed.w[...], wanted)


# --- adapters ----------------------------------------------------------------------------------------------


def test_split_and_join_of_an_adapter_are_inverse(tiny):
    model = load(tiny(**DIMS), rank=3)
    ours = adapter_of(model)
    pairs = weights.split_lora(model.arch, ours)
    assert len(pairs) == 12 * 7 - 2  # no v_proj in the two global layers
    assert not any("layers.5.self_attn.v_proj" in hf or "layers.11.self_attn.v_proj" in hf for hf in pairs)
    again = weights.join_lora(model.arch, pairs, {path: x.shape for path, x in ours.items()})
    assert set(again) == set(ours)
    for path, x in ours.items():
        np.testing.assert_array_equal(again[path], x)


def test_split_gives_the_update_that_the_model_applies(tiny):
    """B A by the checkpoint's names is the product of our stacked dims, K and V each with their own."""
    model = load(tiny(**DIMS), rank=3)
    ours = adapter_of(model)
    pairs = weights.split_lora(model.arch, ours)
    for hf, index in (("k_proj", 0), ("v_proj", 1)):
        a, b = pairs[f"model.language_model.layers.9.self_attn.{hf}.weight"]  # slot 3 of the second period
        assert (a.shape, b.shape) == ((3, 40), (4 * 6, 3))
        stem = "blocks.0.3.attention.kv_einsum"
        delta = np.einsum("KHR,RD->KHD", ours[f"{stem}.lora_b"][1, index], ours[f"{stem}.lora_a"][1, index])
        np.testing.assert_allclose(b @ a, delta.reshape(24, 40), atol=1e-6)


def test_an_adapter_tensor_without_a_weight_is_an_error_both_ways(tiny):
    model = load(tiny(**SMALL), rank=3)
    ours = adapter_of(model)
    pairs = weights.split_lora(model.arch, ours)
    stray = {f"blocks.7.0.mlp.up_proj.lora_{part}": np.zeros((1, 2, 2)) for part in "ab"}
    with pytest.raises(UserError) as error:
        weights.split_lora(model.arch, ours | stray)
    assert "blocks.7.0.mlp.up_proj.lora_a" in str(error.value)
    hf = "model.language_model.layers.1.self_attn.v_proj.weight"
    with pytest.raises(UserError, match="layers.1.self_attn.v_proj"):
        weights.join_lora(
            model.arch, pairs | {hf: next(iter(pairs.values()))}, {k: v.shape for k, v in ours.items()}
        )


def test_half_an_adapter_is_an_error(tiny):
    model = load(tiny(**SMALL), rank=3)
    ours = adapter_of(model)
    del ours["blocks.0.0.mlp.up_proj.lora_a"]
    with pytest.raises(UserError, match="up_proj.lora_b"):
        weights.split_lora(model.arch, ours)


def test_a_stack_of_experts_is_two_matrices_to_peft_and_the_inner_of_two_stacks_is_wrapped():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 5, 3))  # [expert, rank, in], [expert, out, rank]
    up, down, module = "m.layers.0.experts.gate_up_proj", "m.layers.0.experts.down_proj", "base_model.model.m.layers.0"
    both = weights.to_peft({up: (a, b), down: (a + 1, b + 1)})
    places = (f"{module}.experts.base_layer", f"{module}.experts")
    assert set(both) == {f"{place}.lora_{side}.weight" for place in places for side in "AB"}
    inner = [both[f"{module}.experts.base_layer.lora_{side}.weight"] for side in "AB"]
    for expert in range(2):
        np.testing.assert_array_equal(inner[0][3 * expert : 3 * expert + 3], a[expert])
        np.testing.assert_array_equal(inner[1][:, expert::2], b[expert])
    np.testing.assert_array_equal(both[f"{module}.experts.lora_A.weight"], inner[0] + 1)
    for one in (up, down):
        assert set(weights.to_peft({one: (a, b)})) == {f"{module}.experts.lora_{side}.weight" for side in "AB"}
