"""Adapters out and in, and Tunix's checkpoints: each held against what the other program itself computes."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from runs_helper import files, overwrite, run_config, saved, tensors, train
from safetensors.numpy import load_file, save_file

import gemma_tpu
from gemma_tpu import cli
from gemma_tpu.adapter import adapters, peft_folder
from gemma_tpu.adapter.updates import LowRank
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import weights
from gemma_tpu.gemma.loading import architecture
from gemma_tpu.handoff import card, merging
from gemma_tpu.storage.shards import open_checkpoint

TUNIX = Path(__file__).parent / "fixtures" / "tunix"  # by benchmarks/peers/tunix_save.py
GIVEN = {"checkpoint": TUNIX / "checkpoints", "layout": "tunix", "base": TUNIX / "base", "rank": 3, "alpha": 7.5}


# --- Tunix -------------------------------------------------------------------------------------------------


def test_a_merged_tunix_checkpoint_computes_what_tunix_computed(tmp_path):
    wanted = load_file(TUNIX / "logits.safetensors")
    assert np.abs(wanted["tuned"] - wanted["base"]).max() > 1
    np.testing.assert_allclose(gemma_tpu.load(TUNIX / "base")(wanted["tokens"]), wanted["base"], atol=1e-5)
    report = gemma_tpu.merge(**GIVEN, out=tmp_path / "merged")
    np.testing.assert_allclose(gemma_tpu.load(tmp_path / "merged")(wanted["tokens"]), wanted["tuned"], atol=1e-5)
    assert report["tensors_changed"] == 26, "K in all four layers, V in the local two"
    assert "| alpha | 7.5 |" in (tmp_path / "merged" / card.CARD).read_text()


@pytest.mark.parametrize("inner", ["2", "2/model_params"])
def test_a_step_or_its_parameters_may_be_named_too_by_the_command(inner, tmp_path, capsys):
    arguments = [f"--{key}={value}" for key, value in GIVEN.items() if key != "checkpoint"]
    found = cli.main(["merge", f"--checkpoint={TUNIX / 'checkpoints' / inner}", *arguments,
                      f"--out={tmp_path / 'out'}", "--json"])  # fmt: skip
    assert found == 0 and json.loads(capsys.readouterr().out)["tensors_changed"] == 26


def test_a_tunix_checkpoint_in_a_bucket_merges_to_the_same_bytes(tmp_path):
    memory = fsspec.filesystem("memory")
    for name, data in files(TUNIX / "checkpoints").items():
        memory.pipe_file(f"/tunix/run/{name}", data)
    try:
        gemma_tpu.merge(**GIVEN, out=tmp_path / "here")
        gemma_tpu.merge(**GIVEN | {"checkpoint": Path("memory://tunix/run")}, out=tmp_path / "there")
        assert files(tmp_path / "there") == files(tmp_path / "here")
        with pytest.raises(UserError, match="there is nothing of that name|neither steps with model_params"):
            gemma_tpu.merge(**GIVEN | {"checkpoint": "memory://tunix/nowhere"}, out=tmp_path / "none")
    finally:
        memory.rm("/tunix", recursive=True)


@pytest.mark.parametrize("change, said", [
    ({"rank": 4}, "layers.0.attn.attn_vec_einsum: its rank is 3, not 4"), ({"rank": 0}, "rank .0. must be at least 1"),
    ({"alpha": None}, "needs --alpha too"), ({"base": None, "rank": None}, "needs --base, --rank too"),
    ({"layout": None}, "needs --layout too"), ({"layout": "maxtext"}, "must be one of tunix, peft"),
    ({"checkpoint": TUNIX / "base"}, "neither steps with model_params"),
    ({"checkpoint": TUNIX / "nowhere"}, "no such folder"),
])  # fmt: skip
def test_what_is_missing_or_wrong_is_said(change, said, tmp_path):
    with pytest.raises(UserError, match=said):
        gemma_tpu.merge(**GIVEN | change, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tunix_adapter_for_more_layers_than_the_base_has_is_refused(tmp_path):
    shutil.copytree(TUNIX / "base", tmp_path / "base")
    held = load_file(tmp_path / "base" / "model.safetensors")
    lost = {name: value for name, value in held.items() if "layers.3" not in name}
    save_file(lost, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layers.3.attn.k_einsum: the base has no model.layers.3.self_attn.k_proj"):
        gemma_tpu.merge(**GIVEN | {"base": tmp_path / "base"}, out=tmp_path / "out")


# --- to the hub --------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, **options):
            calls.append(("create", repo, options))
            return f"https://hub/{repo}"

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], set(os.listdir(options["folder_path"]))))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return calls


def test_a_push_uploads_the_finished_folder_to_a_private_repository(pushed, tmp_path):
    found = gemma_tpu.merge(**GIVEN, out=tmp_path / "out", push="me/mine")
    assert found["pushed"] == "me/mine"
    assert pushed == [("create", "me/mine", {"private": True, "exist_ok": True}),
                      ("upload", "me/mine", {"README.md", "config.json", "model.safetensors"})]  # fmt: skip


@pytest.mark.parametrize("push, out", [("mine", "out"), ("https://x/y", "out"), ("me/mine", "gs://bucket/out")])
def test_a_push_that_cannot_be_is_refused_before_the_merge(push, out, pushed, tmp_path):
    with pytest.raises(UserError, match="--push"):
        gemma_tpu.merge(**GIVEN, out=out if "://" in out else tmp_path / out, push=push)
    assert not pushed and not (tmp_path / "out").exists()


# --- PEFT, out ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(whole_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    merging.export_adapter(whole_run, out=out)
    return out


def read(folder, base):
    checkpoint = open_checkpoint(base)
    return peft_folder.read(folder, checkpoint, architecture(checkpoint))


def test_an_export_is_what_was_trained_bit_for_bit(whole_run, exported, base32):
    wanted = merging.updates_of(adapters.read(whole_run), architecture(open_checkpoint(base32)))
    found = read(exported, base32).parts
    assert found.keys() == wanted.keys() and len(wanted) == 26
    for name, part in wanted.items():
        assert found[name].scale == part.scale == 2
        np.testing.assert_array_equal(found[name].a, part.a)
        np.testing.assert_array_equal(found[name].b, part.b)


def test_the_portable_form_has_one_rank_whole_alpha_and_no_flags(exported):
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (4, 8, False, False)
    assert type(config["lora_alpha"]) is int and config["base_model_name_or_path"] == "float32"
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["modules_to_save"])


def test_its_pattern_takes_every_projection_of_the_text_tower_and_none_of_another(exported, base32):
    pattern = json.loads((exported / "adapter_config.json").read_text())["target_modules"]
    modules = {name.removesuffix(".weight") for name in tensors(base32)}
    taken = {name for name in modules if re.fullmatch(pattern, name)}
    assert taken == {name.removeprefix("base_model.model.").rpartition(".lora_")[0]
                     for name in load_file(exported / "adapter_model.safetensors")}  # fmt: skip
    towers = {name.replace("language_model", tower) for name in taken for tower in ("vision_tower.encoder", "audio")}
    assert taken and not [name for name in towers if re.fullmatch(pattern, name)]


def delta(part):
    return part.scale * (part.b.astype(np.float64) @ part.a.astype(np.float64))


@pytest.fixture
def mixed(base32):
    """Ranks and scales of several kinds, as patterns and rsLoRA give them."""
    checkpoint, rng = open_checkpoint(base32), np.random.default_rng(0)
    names = [entry.hf for entry in weights.lora_entries(architecture(checkpoint)).values()]
    made = {}
    for number, name in enumerate(names):
        (out, inside), rank = checkpoint.info(name).shape, (2, 3, 5)[number % 3]
        draw = rng.standard_normal
        made[name] = LowRank(draw((out, rank)).astype(np.float32), draw((rank, inside)).astype(np.float32),
                             (1.5, 4 / 3**0.5)[number % 2])  # fmt: skip
    return made


@pytest.mark.parametrize("native", [False, True])
def test_mixed_ranks_and_scales_survive_either_form(mixed, native, base32, tmp_path):
    config = peft_folder.write(tmp_path / "out", mixed, base="x", native=native)
    found = read(tmp_path / "out", base32).parts
    for name, part in mixed.items():
        np.testing.assert_allclose(delta(found[name]), delta(part), rtol=1e-5, atol=1e-6)
        assert found[name].a.shape[0] == (part.a.shape[0] if native else 5)
    assert native == bool(config["rank_pattern"]) == bool(config["alpha_pattern"])


def test_the_portable_form_is_what_llama_cpps_converter_reads_and_computes(mixed, tmp_path):
    """It reads lora_alpha alone, and the scale is that over B's columns; any other name than lora_A and lora_B is an
    error to it, and so are halves."""
    config = peft_folder.write(tmp_path / "out", mixed, base="x")
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, value in held.items():
        found = re.fullmatch(r"base_model\.model\.(model\.language_model\.layers\.\d+\..+)\.lora_([AB])\.weight", name)
        assert found and value.ndim == 2 and value.dtype == np.float32
        pairs.setdefault(f"{found[1]}.weight", {})[found[2]] = value
    assert pairs.keys() == mixed.keys()
    for name, pair in pairs.items():
        computed = config["lora_alpha"] / pair["B"].shape[1] * (pair["B"].astype(np.float64) @ pair["A"])
        np.testing.assert_allclose(computed, delta(mixed[name]), rtol=1e-5, atol=1e-6)


def test_a_magnitude_has_a_native_form_alone(mixed, base32, tmp_path):
    name, part = next(iter(mixed.items()))
    magnitude = np.arange(1, len(part.b) + 1, dtype=np.float32)
    dora = {name: LowRank(part.b, part.a, 1.5, magnitude)}
    with pytest.raises(UserError, match="has no portable form"):
        peft_folder.write(tmp_path / "out", dora, base="x")
    assert peft_folder.write(tmp_path / "out", dora, base="x", native=True)["use_dora"]
    np.testing.assert_array_equal(read(tmp_path / "out", base32).parts[name].magnitude, magnitude)


def test_merging_the_exported_folder_gives_the_bytes_of_merging_the_run(exported, base32, whole_merged, tmp_path):
    gemma_tpu.merge(checkpoint=exported, layout="peft", base=base32, out=tmp_path / "merged")
    ours, wanted = files(tmp_path / "merged"), files(whole_merged)
    assert ours.pop(card.CARD) != wanted.pop(card.CARD)
    assert ours == wanted


def test_the_command_exports_and_a_taken_folder_stays(whole_run, tmp_path, capsys):
    command = ["adapter", str(whole_run), "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "portable"
    assert cli.main(command) == 2 and "exists and is not empty" in capsys.readouterr().err
    with pytest.raises(UserError, match="exists and is not empty"):
        merging.export_adapter(whole_run, out=tmp_path / "out")


def test_for_vllm_v_has_ks_pair_where_v_is_k_and_all_else_stays(whole_run, exported, base32, tmp_path, capsys):
    command = ["adapter", str(whole_run), "--out", str(tmp_path / "out"), "--json"]
    assert cli.main([*command, "--for", "vllm"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["form"] == "vllm" and "V is K" not in told.err
    held, portable = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", exported))
    added = held.keys() - portable.keys()
    stems = {f"base_model.model.model.language_model.layers.{layer}.self_attn.v_proj.lora_{side}.weight"
             for layer in (1, 3) for side in "AB"}  # fmt: skip
    assert added == stems and not portable.keys() - held.keys()
    for name in added:
        np.testing.assert_array_equal(held[name], held[name.replace("v_proj", "k_proj")])
    one, other = read(tmp_path / "out", base32).parts, read(exported, base32).parts
    assert one.keys() == other.keys() and all(np.array_equal(one[name].b, other[name].b) for name in one)
    held[min(added)] = held[min(added)] + 1
    save_file(held, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="v_proj.lora_A.weight: no weight of the base's text tower takes it"):
        read(tmp_path / "out", base32)


def test_an_export_that_vllm_would_half_apply_says_so_and_two_forms_are_one_too_many(whole_run, tmp_path, capsys):
    assert cli.main(["adapter", str(whole_run), "--out", str(tmp_path / "out")]) == 0
    assert "V is K in 2 of 4 layers" in capsys.readouterr().err
    assert cli.main(["adapter", str(whole_run), "--out", str(tmp_path / "x"), "--native", "--for", "vllm"]) == 2
    assert "two forms: choose one" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_full_run_has_no_adapter(whole_run, tmp_path, monkeypatch):
    trained = adapters.read(whole_run)
    full = dataclasses.replace(trained, record=trained.record | {"method": "full"})
    monkeypatch.setattr(adapters, "read", lambda *_: full)
    with pytest.raises(UserError, match="has trained every weight"):
        merging.export_adapter(whole_run, out=tmp_path / "out")


# --- PEFT, in ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_goes_on_from_an_exported_adapter(exported, base32, whole_run, tmp_path):
    """At a rate of zero nothing moves: what is saved is what was taken up."""
    start = f"lora.init_from={exported}"
    train(run_config(base32, tmp_path / "run", start, "train.steps=1", "optim.lr=1e-30", "lora.rank=6", "lora.alpha=3"))
    found = merging.updates_of(adapters.read(tmp_path / "run"), architecture(open_checkpoint(base32)))
    wanted = merging.updates_of(adapters.read(whole_run), architecture(open_checkpoint(base32)))
    for name, part in wanted.items():
        assert found[name].a.shape[0] == 6 and found[name].scale == 0.5
        np.testing.assert_allclose(delta(found[name]), delta(part), rtol=1e-4, atol=1e-6)
    assert all(np.abs(value).max() > 0 for path, value in saved(tmp_path / "run", 1).items() if "lora_a" in path)


def onto(folder, base, rank=8, **config):
    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading

    checkpoint = open_checkpoint(base)
    model, _ = loading.build(base, dtype="float32")
    lora.inject(model, rank=rank, alpha=16, **config)
    adapter = peft_folder.read(folder, checkpoint, model.arch)
    return peft_folder.onto(adapter, model.arch, lora.initial(model, 0), lora.layout(model), config.get("dora", False))


@pytest.fixture
def foreign(base32, tmp_path):
    """As tools of the text-only class write it: bfloat16, rsLoRA, Q and V alone, names without language_model."""
    rng, made = np.random.default_rng(0), {}
    for layer, name in ((0, "q_proj"), (0, "v_proj"), (2, "q_proj")):
        out, inside = open_checkpoint(base32).info(f"model.language_model.layers.{layer}.self_attn.{name}.weight").shape
        stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        made[f"{stem}.lora_A.default.weight"] = rng.standard_normal((4, inside)).astype(ml_dtypes.bfloat16)
        made[f"{stem}.lora_B.default.weight"] = rng.standard_normal((out, 4)).astype(ml_dtypes.bfloat16)
    folder = tmp_path / "foreign"
    folder.mkdir()
    save_file(made, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "bias": "none",
              "alpha_pattern": {"v_proj": 10}}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def change(folder, **values):
    config = json.loads((folder / "adapter_config.json").read_text()) | values
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_foreign_adapter_is_taken_up_and_what_it_leaves_out_starts_fresh(foreign, base32):
    held = load_file(foreign / "adapter_model.safetensors")
    values, notes = onto(foreign, base32)
    pairs = weights.split_lora(architecture(open_checkpoint(base32)), values)
    for (layer, name), alpha in {(0, "q_proj"): 6, (0, "v_proj"): 10, (2, "q_proj"): 6}.items():
        a, b = pairs[f"model.language_model.layers.{layer}.self_attn.{name}.weight"]
        stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        b_OR, a_RI = (held[f"{stem}.lora_{which}.default.weight"].astype(np.float64) for which in "BA")
        np.testing.assert_allclose(16 / 8 * (b @ a), alpha / 2 * (b_OR @ a_RI), rtol=1e-4, atol=1e-4)
    fresh = pairs["model.language_model.layers.0.self_attn.k_proj.weight"]
    assert np.abs(fresh[0]).max() > 0 and np.abs(fresh[1]).max() == 0
    assert "3 modules of rank 4 taken up" in notes[0] and notes[1] == "23 modules that it leaves out start fresh"


def test_a_foreign_adapter_that_does_not_fit_is_refused(foreign, base32):
    with pytest.raises(UserError, match="has rank 4, lora.rank must be at least that"):
        onto(foreign, base32, rank=2)
    with pytest.raises(UserError, match="v_proj.weight: lora.targets and lora.layers do not train it"):
        onto(foreign, base32, exclude=("kv_einsum", "k_einsum"))
    with pytest.raises(UserError, match="at rank 3 do not give|of rank 3 do not give"):
        change(foreign, r=3)
        read(foreign, base32)


@pytest.mark.parametrize("values, said", [
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"), ({"bias": "all"}, "bias 'all'"),
    ({"peft_type": "LOHA"}, "peft_type must be LORA"), ({"r": 0}, "r must be a number above 0"),
    ({"lora_alpha": None}, "lora_alpha must be a number"),
])  # fmt: skip
def test_what_would_be_lost_of_a_foreign_adapter_is_refused(values, said, foreign, base32):
    change(foreign, **values)
    with pytest.raises(UserError, match=said):
        read(foreign, base32)


@pytest.mark.parametrize("name", [
    "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "base_model.model.lm_head.lora_A.weight",
])  # fmt: skip
def test_a_tensor_for_another_tower_or_layer_is_refused(name, foreign, base32):
    held = load_file(foreign / "adapter_model.safetensors")
    save_file(held | {name: np.ones((4, 8), np.float32)}, foreign / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(name)}: no weight of the base's text tower takes it"):
        read(foreign, base32)


def test_a_folder_without_an_adapter_is_said(base32, tmp_path):
    with pytest.raises(UserError, match="has no adapter_config.json and no adapter_model.safetensors"):
        read(tmp_path, base32)


# --- the card ----------------------------------------------------------------------------------------------


def test_the_card_has_recipe_counts_figures_and_licence(whole_merged):
    text = (whole_merged / card.CARD).read_text()
    for words in ("base_model: float32", "license: apache-2.0", "26 tensors are changed", "| rows trained on | 40 |",
                  "| last training loss |", "| tokens trained on |", "rank: 4", "train.jsonl", "modified version"):
        assert words in text
    assert "/tmp" not in text, "where something lay on a disk is nobody's business"


def test_no_place_on_a_disk_stands_in_the_card_and_no_config_is_changed_for_it(base32):
    config = {"data": {"path": ["/home/me/rows.jsonl", "gs://b/rows.jsonl"], "cache": "/home/me/cache", "limit": 3},
              "train": {"compile_cache": "/home/me/xla", "seed": 1}, "lora": {"init_from": "/home/me/adapter"},
              "distributed": {"coordinator": "10.0.0.1"}, "run_dir": "/home/me/run"}  # fmt: skip
    before = json.dumps(config)
    text = card.files(open_checkpoint(base32), {"base": "x", "method": "lora", "config": config}, 3)[card.CARD].decode()
    assert "/home" not in text and "10.0.0.1" not in text and json.dumps(config) == before
    for words in ("rows.jsonl", "gs://b/rows.jsonl", "init_from: adapter", "seed: 1", "limit: 3"):
        assert words in text


def test_a_base_under_the_gemma_terms_brings_their_notice(base32, tmp_path):
    shutil.copytree(base32, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: gemma\n---\n# x\n")
    about = {"base": "hf://google/gemma-3-4b-it@main", "method": "lora"}
    found = card.files(open_checkpoint(tmp_path / "base"), about, 3)
    assert found["NOTICE"].decode().startswith("Gemma is provided under and subject to the Gemma Terms of Use")
    assert b"base_model: google/gemma-3-4b-it\n" in found["README.md"] and b"Terms of Use" in found["README.md"]


def test_gemma_3_without_a_card_is_under_the_gemma_terms():
    assert card.licence_of(_Base({"model_type": "gemma3_text"})) == "gemma"
    assert card.licence_of(_Base({"model_type": "gemma4"})) == "apache-2.0"
    assert card.licence_of(_Base({"model_type": "llama"})) is None


class _Base:
    folder = Path("/nonexistent")

    def __init__(self, config):
        self.config = config


# --- verify sees it ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify_asks_peft_and_a_zeroed_adapter_would_be_seen(whole_run, whole_merged, monkeypatch):
    pytest.importorskip("peft")
    from gemma_tpu.handoff.verify import verify

    found = verify(whole_run, merged=whole_merged)
    assert found["ok"] and found["clients"]["peft"]["max_logit_difference"] <= found["clients"]["peft"]["bound"]
    assert found["samples"]["before"] and found["samples"]["after"] is not None
    write = peft_folder.write

    def zeroed(out, parts, **options):
        return write(out, {n: LowRank(0 * p.b, p.a, p.scale) for n, p in parts.items()}, **options)

    monkeypatch.setattr(peft_folder, "write", zeroed)
    broken = verify(whole_run, merged=whole_merged)
    assert not broken["ok"] and any("peft's logits differ" in failure for failure in broken["failures"])


def test_verify_takes_a_base_that_has_moved_and_refuses_another(whole_run, whole_merged, base32, base16, tmp_path):
    from gemma_tpu.handoff.verify import verify

    shutil.copytree(base32, tmp_path / "moved")
    shutil.copytree(whole_merged, tmp_path / "merged")
    with pytest.raises(UserError, match="is not the base"):
        verify(whole_run, merged=whole_merged, base=base16)
    name = "model.language_model.layers.2.self_attn.q_proj.weight"
    overwrite(tmp_path / "merged", name, lambda array: -array)
    found = verify(whole_run, merged=tmp_path / "merged", base=tmp_path / "moved")
    assert not found["ok"] and found["max_ulp_tensor"] == name
