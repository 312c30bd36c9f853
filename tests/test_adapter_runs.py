"""Whole runs with adapters and bases of other kinds: trained on a mesh, resumed, loaded, merged, and proved."""

import json
import shutil

import numpy as np
import pytest
from runs_helper import run_config, saved, tensors, train

import gemma_tpu
from gemma_tpu.adapter import adapters, lowrank
from gemma_tpu.errors import UserError
from gemma_tpu.gemma.loading import architecture
from gemma_tpu.handoff import merging
from gemma_tpu.handoff.verify import verify
from gemma_tpu.storage.shards import open_checkpoint

ADAPTER = ("lora.dora=true", "lora.init=pissa", "lora.rslora=true", "lora.rank_pattern={mlp.up_proj: 6}",
           "lora.layers=[0, 1, 3]", "lora.dropout=0.1")  # fmt: skip


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(base16, tmp_path_factory):
    """Everything that an adapter can have, on a base in nf4, with the optimizer whose state looks least like Adam's."""
    run_dir = tmp_path_factory.mktemp("adapters") / "run"
    train(run_config(base16, run_dir, "model.quantise=nf4", "train.steps=3", "optim.name=muon",
                     "optim.loraplus_ratio=4", *ADAPTER))  # fmt: skip
    return run_dir


def test_the_checkpoint_holds_what_trained_and_where_it_started(run, base16):
    trained = adapters.read(run)
    found = trained.by_tensor(architecture(open_checkpoint(base16)))
    assert trained.quantised == "nf4"
    assert not any(".layers.2." in hf for hf in found) and any(".layers.3." in hf for hf in found)
    for hf, one in found.items():
        assert one.rank == (6 if ".mlp.up_proj" in hf else 4) and one.scale == pytest.approx(8 / one.rank**0.5)
        assert one.a0.shape == one.a.shape and np.abs(one.a - one.a0).max() > 1e-4
        assert one.magnitude.shape == one.b.shape[:1]


@pytest.mark.parametrize("onto", ["original", "dequantised"])
def test_it_merges_onto_either_base_and_the_proof_holds(run, base16, tmp_path, onto):
    report = gemma_tpu.merge(run, out=tmp_path / "merged", onto=onto)
    proof = verify(run, merged=tmp_path / "merged", onto=onto)
    assert proof["ok"], proof["failures"]
    before, after = tensors(base16), tensors(tmp_path / "merged")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert len(changed) == report["tensors_changed"]
    in_layer_2 = any(".layers.2." in name for name in changed)  # no adapter there, and yet it was quantised
    assert in_layer_2 == (onto == "dequantised")
    if onto == "dequantised":
        assert "original weights" in proof["clients"]["peft"]
    else:  # PEFT has read the folder: DoRA, both ranks, twice as wide for PiSSA, nothing in layer 2
        pytest.importorskip("peft")
        assert proof["clients"]["peft"]["max_logit_difference"] <= proof["clients"]["peft"]["bound"]


def test_its_adapter_goes_out_as_peft_folder_and_trains_on(run, base16, tmp_path):
    with pytest.raises(UserError, match="has no portable form"):
        merging.export_adapter(run, out=tmp_path / "portable")
    merging.export_adapter(run, out=tmp_path / "native", native=True)
    config = json.loads((tmp_path / "native/adapter_config.json").read_text())
    assert config["use_dora"] and config["r"] == 8 and {*config["rank_pattern"].values()} == {12}
    again = ("train.steps=1", "optim.lr=1e-30", f"lora.init_from={tmp_path / 'native'}", "lora.rank=8",
             "lora.rank_pattern={mlp.up_proj: 12}", "lora.dora=true", "lora.layers=[0, 1, 3]")  # fmt: skip
    train(run_config(base16, tmp_path / "again", *again))
    base = open_checkpoint(base16)
    wanted, found = (adapters.read(one).by_tensor(architecture(base)) for one in (run, tmp_path / "again"))
    assert wanted.keys() == found.keys()
    for hf, one in wanted.items():
        np.testing.assert_allclose(found[hf].merged(base.read(hf)), one.merged(base.read(hf)), rtol=1e-4, atol=1e-5)


def test_one_proof_does_not_pass_for_the_other_merge(run, tmp_path):
    gemma_tpu.merge(run, out=tmp_path / "merged", onto="dequantised")
    assert not verify(run, merged=tmp_path / "merged", onto="original")["ok"]


def test_a_run_on_the_base_as_it_is_has_nothing_to_dequantise(whole_run, tmp_path):
    with pytest.raises(UserError, match="nothing to dequantise"):
        gemma_tpu.merge(whole_run, out=tmp_path / "merged", onto="dequantised")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_a_run_that_stops_and_goes_on_ends_where_the_unbroken_one_does(base32, tmp_path, name):
    more = (f"optim.name={name}", "train.steps=4", "checkpoint.every=2", *ADAPTER)
    train(run_config(base32, tmp_path / "whole", *more))
    train(run_config(base32, tmp_path / "again", *more))
    shutil.rmtree(tmp_path / "again/checkpoints/4")
    train(run_config(base32, tmp_path / "again", *more))
    whole, again = (saved(tmp_path / place, 4) for place in ("whole", "again"))
    for path, value in whole.items():
        np.testing.assert_array_equal(value, again[path])
    assert lowrank.PARTS[3] in {path.rpartition(".")[2] for path in whole}


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_full_fine_tuning_of_a_small_model_by_every_optimizer(base32, tmp_path, name):
    summary = train(run_config(base32, tmp_path / "run", f"optim.name={name}", "train.method=full", "train.steps=3"))
    assert np.isfinite(summary["loss"])
    text = {name: array.size for name, array in tensors(base32).items() if ".language_model." in name}
    assert summary["trainable_params"] == sum(text.values()), "all of the text tower"
    gemma_tpu.merge(tmp_path / "run")
    assert verify(tmp_path / "run")["ok"]
