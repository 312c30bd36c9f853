"""verify says yes to a right merge, and no, with the place, to each way of being wrong."""

import json
import shutil
import sys

import numpy as np
import pytest
from runs_helper import overwrite, run_config, tensors, train
from safetensors.numpy import load_file, save_file

import gemma_tpu
from gemma_tpu.adapter import adapters, updates
from gemma_tpu.adapter.updates import LowRank
from gemma_tpu.errors import UserError
from gemma_tpu.gemma.loading import architecture
from gemma_tpu.handoff import merging
from gemma_tpu.handoff.layerwise import Side
from gemma_tpu.handoff.patch import write_patched
from gemma_tpu.handoff.verify import Report, _compare_logits, _probe, verify
from gemma_tpu.storage.shards import open_checkpoint

LAYER = "model.language_model.layers.2.self_attn."
VISION = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight"


@pytest.fixture
def merged(whole_merged, tmp_path):
    shutil.copytree(whole_merged, tmp_path / "merged")
    return tmp_path / "merged"


def test_a_right_merge_is_right(whole_run, whole_merged, capsys):
    found = verify(whole_run, merged=whole_merged)
    assert found["ok"] and found["failures"] == []
    assert found.keys() >= {"ok", "max_logit_difference", "max_ulp", "changed", "identical", "clients"}
    assert found["max_logit_difference"] <= 1e-5 * found["max_logit"]
    assert found["changed"] == found["updated"] == 26 and found["max_ulp"] <= 1
    assert found["identical"] == len(tensors(whole_merged)) - 26
    assert found["dtype"] == "float32" and found["rounding"] <= 1e-5 * found["max_logit"]
    out, err = capsys.readouterr()
    assert out == "" and f"{whole_merged} is right" in err and "FAILED" not in err


def test_transformers_computes_the_same_from_the_merged_folder(whole_run, whole_merged):
    pytest.importorskip("torch")
    client = verify(whole_run, merged=whole_merged)["clients"]["transformers"]
    assert client["max_logit_difference"] <= client["bound"] < 1e-2


def test_without_torch_it_says_that_transformers_was_not_compared(whole_run, whole_merged, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = verify(whole_run, merged=whole_merged)
    assert found["ok"] and found["clients"]["transformers"] == "not compared: torch is not installed"


@pytest.mark.slow
def test_a_bfloat16_merge_is_held_against_what_its_rounding_may_move(base16, tmp_path, capsys):
    train(run_config(base16, tmp_path / "run"))
    gemma_tpu.merge(tmp_path / "run")
    found = verify(tmp_path / "run")
    assert found["ok"], found["failures"]
    assert found["dtype"] == "bfloat16" and found["max_ulp"] <= 1 and found["least_identical_share"] >= 0.999
    assert 0 < found["max_logit_difference"] <= found["logit_bound"] < 5 * found["rounding"]
    assert found["max_logit_difference"] > 1e-5 * found["max_logit"], "a bound for float32 would refuse it"
    assert "what another rounding of the weights would move" in capsys.readouterr().err


# --- and no to everything else ------------------------------------------------------------------------------


def refused(whole_run, merged, *said: str) -> None:
    found = verify(whole_run, merged=merged)
    assert not found["ok"]
    assert any(all(text in failure for text in said) for failure in found["failures"]), found["failures"]


def flip_largest(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[np.abs(array).argmax()] *= -1
    return array


def test_one_element_of_a_changed_tensor(whole_run, merged, capsys):
    overwrite(merged, f"{LAYER}q_proj.weight", flip_largest)
    refused(whole_run, merged, f"{LAYER}q_proj.weight", "representable numbers")
    assert "FAILED: " in capsys.readouterr().err


def test_one_element_a_little_off(whole_run, merged):
    def nudge(array):
        array[3, 5] = np.nextafter(np.nextafter(array[3, 5], np.inf), np.inf)
        return array

    overwrite(merged, f"{LAYER}v_proj.weight", nudge)
    refused(whole_run, merged, f"{LAYER}v_proj.weight", "2 representable numbers")


def test_a_nan(whole_run, merged):
    def poison(array):
        array[0, 0] = np.nan
        return array

    overwrite(merged, f"{LAYER}k_proj.weight", poison)
    refused(whole_run, merged, f"{LAYER}k_proj.weight", "representable numbers")


@pytest.mark.parametrize("name", [VISION, "model.language_model.layers.1.input_layernorm.weight"])
def test_one_byte_of_an_untouched_tensor(name, whole_run, merged):
    def last_byte(array):
        array.view(np.uint8).reshape(-1)[-4] ^= 1  # the lowest bit of the last float
        return array

    overwrite(merged, name, last_byte)
    refused(whole_run, merged, "1 tensors changed that the adapter does not touch", name)


def test_k_and_v_swapped(whole_run, merged):
    k, v = (tensors(merged)[f"{LAYER}{name}.weight"].copy() for name in ("k_proj", "v_proj"))
    overwrite(merged, f"{LAYER}k_proj.weight", lambda _: v)
    overwrite(merged, f"{LAYER}v_proj.weight", lambda _: k)
    refused(whole_run, merged, "of its elements equal the sum", LAYER)


def test_an_adapter_applied_twice_or_with_another_scale(whole_run, merged, base32):
    before = tensors(base32)
    for name, array in tensors(merged).items():
        if name.endswith("mlp.gate_proj.weight"):
            overwrite(merged, name, lambda _, name=name, array=array: 2 * array - before[name])
    refused(whole_run, merged, "mlp.gate_proj.weight", "of its elements equal the sum")


def rewrite(folder, name: str, value: np.ndarray | None) -> None:
    """Replace or remove one tensor, in its shard and in the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    held = load_file(shard)
    if value is None:
        del held[name], index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        held[name] = value
    save_file(held, shard, metadata={"format": "pt"})


def test_a_missing_tensor(whole_run, merged):
    rewrite(merged, f"{LAYER}o_proj.weight", None)
    refused(whole_run, merged, "1 tensors missing in the merged folder", f"{LAYER}o_proj.weight")


@pytest.mark.parametrize("change", [np.transpose, np.float16, np.float64])
def test_another_shape_or_dtype(change, whole_run, merged):
    name = f"{LAYER}o_proj.weight"
    rewrite(merged, name, np.ascontiguousarray(change(tensors(merged)[name])))
    refused(whole_run, merged, "1 tensors reshaped in the merged folder", name)


def test_a_merge_of_another_step(whole_run, tmp_path):
    gemma_tpu.merge(whole_run, out=tmp_path / "earlier", step=3)
    refused(whole_run, tmp_path / "earlier", "of its elements equal the sum")
    found = verify(whole_run, merged=tmp_path / "earlier", step=3)
    assert found["ok"] and found["step"] == 3


@pytest.mark.slow
def test_right_tensors_under_another_config(whole_run, merged):
    """Every tensor is right, and the model still is another: only the logits can tell."""
    config = json.loads((merged / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 5.0
    (merged / "config.json").write_text(json.dumps(config))
    refused(whole_run, merged, "merged and base + adapter differ by", "at probe", "token")


def test_a_run_that_was_not_merged_is_told_how(whole_run, tmp_path):
    with pytest.raises(UserError, match="does not exist; run `gemma-tpu merge"):
        verify(whole_run, merged=tmp_path / "nowhere")


# --- layer by layer -----------------------------------------------------------------------------------------


def test_a_layer_at_a_time_gives_the_logits_of_the_whole_model(whole_run, base32):
    trained, (tokens, segments) = adapters.read(whole_run), _probe(base32)
    for adapter in (None, trained):
        side = Side(open_checkpoint(base32), adapter)
        *_, last = side.layers(tokens, segments)
        whole = np.asarray(gemma_tpu.load(base32, adapter=adapter)(tokens, segments))[segments > 0]
        np.testing.assert_allclose(side.logits(last[segments > 0]), whole, atol=1e-5 * np.abs(whole).max())


def test_a_float16_base_has_the_bound_of_its_own_rounding(whole_run, base32, tmp_path):
    shutil.copytree(base32, tmp_path / "base")
    for shard in (tmp_path / "base").glob("*.safetensors"):
        halves = {name: array.astype(np.float16) for name, array in load_file(shard).items()}
        save_file(halves, shard, metadata={"format": "pt"})
    base, trained = open_checkpoint(tmp_path / "base"), adapters.read(whole_run)
    edits = updates.check(base, merging.updates_of(trained, architecture(base)))
    probe = _probe(base32)
    for factor, good in ((1.0, True), (1.02, False)):
        scaled = {n: LowRank(p.b, p.a, p.scale * factor) for n, (p,) in edits.items()}
        write_patched(base, tmp_path / str(factor), scaled)
        report = Report({"clients": {}})
        _compare_logits(report, Side(base, trained), open_checkpoint(tmp_path / str(factor)), edits, probe)
        assert (not report.failures) == good and report.figures["dtype"] == "float16"
        assert report.figures["logit_bound"] > report.figures["rounding"] > 1e-5 * report.figures["max_logit"]
