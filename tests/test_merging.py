"""The merge, against W + scale * B A worked out by hand from the arrays that Orbax wrote."""

import dataclasses
import json
import math
import shutil

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import Hub
from runs_helper import DIMS, STEPS, files, run_config, saved, tensors, train, write_base

import gemma_tpu
from gemma_tpu.adapter import adapters
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import weights
from gemma_tpu.gemma.loading import architecture
from gemma_tpu.handoff import merging
from gemma_tpu.storage.shards import open_checkpoint

PERIOD = DIMS["pattern"] + 1
SCALE = 8 / 4  # alpha / rank of runs_helper's config
OURS = {"q_proj": "attention.q_proj", "o_proj": "attention.o_proj", "gate_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj"}  # fmt: skip


def pair(arrays: dict, layer: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in] and B [out, rank] of one projection of one layer, cut out of the stacks by hand."""
    repeat, slot = divmod(layer, PERIOD)
    is_global = slot == DIMS["pattern"]
    if name in ("k_proj", "v_proj"):
        stem = f"blocks.0.{slot}.attention." + ("k_einsum" if is_global else "kv_einsum")
        index = (repeat,) if is_global else (repeat, {"k_proj": 0, "v_proj": 1}[name])
    else:
        stem, index = f"blocks.0.{slot}.{OURS[name]}", (repeat,)
    a, b = arrays[f"{stem}.lora_a"][index], arrays[f"{stem}.lora_b"][index]
    return a.reshape(4, -1).astype(np.float64), b.reshape(-1, 4).astype(np.float64)


def projection(tensor: str) -> tuple[int, str] | None:
    parts = tensor.split(".")
    if not tensor.startswith("model.language_model.layers.") or not tensor.endswith("_proj.weight"):
        return None
    return int(parts[3]), parts[5]


# --- K and V, and everything else, at every split -----------------------------------------------------------


@pytest.fixture(scope="module", params=[
    ("float32", "float32", 2, 2),
    pytest.param(("bfloat16", "bfloat16", 1, 4), marks=pytest.mark.slow),
    pytest.param(("bfloat16", "float32", 1, 4), marks=pytest.mark.slow),
    pytest.param(("bfloat16", "bfloat16", 4, 1), marks=pytest.mark.slow),
    pytest.param(("float32", "float32", 4, 1), marks=pytest.mark.slow),
    pytest.param(("bfloat16", "bfloat16", 2, 2), marks=pytest.mark.slow),
    pytest.param(("float32", "float32", 1, 4), marks=pytest.mark.slow),
    pytest.param(("bfloat16", "float32", 4, 1), marks=pytest.mark.slow),
], ids=lambda p: f"{p[0]}-in-{p[1]}-fsdp{p[2]}-tp{p[3]}")  # fmt: skip
def trained(request, whole_run, base32, base16, tmp_path_factory):
    """(base folder, run folder, merged folder, what merge returned)."""
    stored, computed, fsdp, tp = request.param
    if request.param == ("float32", "float32", 2, 2):
        out = tmp_path_factory.mktemp("merge") / "merged"
        return base32, whole_run, out, gemma_tpu.merge(whole_run, step=3, out=out)
    base = base32 if stored == "float32" else base16
    run_dir = tmp_path_factory.mktemp("merge") / "run"
    overrides = f"mesh.fsdp={fsdp}", f"mesh.tp={tp}", f"model.dtype={computed}"
    train(run_config(base, run_dir, *overrides, "train.steps=3", "lora.dropout=0"))
    return base, run_dir, run_dir / "merged", gemma_tpu.merge(run_dir)


def test_every_projection_is_its_base_plus_its_own_adapter(trained):
    base, run_dir, merged, report = trained
    before, after, arrays = tensors(base), tensors(merged), saved(run_dir, 3)
    found = {name: where for name in before if (where := projection(name))}
    local = DIMS["layers"] * DIMS["pattern"] // PERIOD
    assert len(found) == DIMS["layers"] * 6 + local, "v_proj in the local layers alone"
    for name, (layer, module) in found.items():
        a, b = pair(arrays, layer, module)
        delta = SCALE * (b @ a)
        assert np.abs(delta).max() > 1e-3, f"{name} was not trained"
        want = (before[name].astype(np.float64) + delta).astype(before[name].dtype)
        assert after[name].dtype == before[name].dtype
        same = (after[name] == want).mean()
        assert same > 0.999, f"{name}: {same:.2%} equal"
        np.testing.assert_allclose(after[name].astype(np.float64), want.astype(np.float64), rtol=2**-7)
    assert report["tensors_changed"] == len(found)
    assert report["tensors_copied"] == len(before) - len(found)


def test_k_and_v_have_adapters_of_their_own(trained):
    """Or the check above could pass on two equal halves."""
    arrays = saved(trained[1], 3)
    for layer in range(0, DIMS["layers"], PERIOD):
        (a_k, b_k), (a_v, b_v) = pair(arrays, layer, "k_proj"), pair(arrays, layer, "v_proj")
        assert np.abs(a_k - a_v).max() > 0.01 and np.abs(b_k - b_v).max() > 0.001


def test_what_is_not_trained_is_the_bases_byte_for_byte(trained):
    base, _, merged, report = trained
    before, after = files(base), files(merged)
    assert b"fine-tuned" in (card := after.pop("README.md"))
    assert before.keys() == after.keys(), "shards, index, config, tokenizer, template, generation config"
    differing = {name for name in before if before[name] != after[name]}
    assert differing and all(name.endswith(".safetensors") for name in differing)
    assert len(list(merged.glob("*.safetensors"))) == 3
    assert report["bytes"] == len(card) + sum(map(len, after.values()))
    one, other = tensors(base), tensors(merged)
    still = [name for name in one if projection(name) is None]
    assert len(still) == report["tensors_copied"] and any("vision" in name for name in still)
    assert all(one[name].tobytes() == other[name].tobytes() for name in still)


def test_the_report_has_the_contracts_keys(trained):
    _, _, merged, report = trained
    assert report.keys() >= {"out", "tensors_changed", "tensors_copied", "bytes", "peak_rss_mib", "seconds"}
    assert report["out"] == str(merged) and report["step"] == 3 and report["left_out"] == []


# --- full fine-tuning ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_run(base16, tmp_path_factory):
    """Everything trained in float32 on a base that is stored in bfloat16."""
    run_dir = tmp_path_factory.mktemp("full") / "run"
    train(run_config(base16, run_dir, "train.method=full", "train.steps=3"))
    return run_dir


def test_a_full_run_exports_what_was_trained_rounded_once(full_run, base16):
    report = gemma_tpu.merge(full_run)
    before, after, arrays = tensors(base16), tensors(full_run / "merged"), saved(full_run, 3)
    assert all(array.dtype == np.float32 for array in arrays.values())
    text = [name for name in before if name.startswith("model.language_model.")]
    assert report["tensors_changed"] == len(text)
    same_bytes = [name for name in before if name not in text]
    assert all(before[name].tobytes() == after[name].tobytes() for name in same_bytes)
    kv = arrays["blocks.0.0.attention.kv_einsum.w"]
    by_hand = {
        "model.language_model.embed_tokens.weight": arrays["embed.w"],
        "model.language_model.norm.weight": arrays["final_norm.w"],
        "model.language_model.layers.2.self_attn.k_proj.weight": kv[1, 0],
        "model.language_model.layers.2.self_attn.v_proj.weight": kv[1, 1],
        "model.language_model.layers.3.self_attn.k_proj.weight": arrays["blocks.0.1.attention.k_einsum.w"][1],
        "model.language_model.layers.3.self_attn.o_proj.weight": arrays["blocks.0.1.attention.o_proj.w"][1],
        "model.language_model.layers.0.layer_scalar": arrays["blocks.0.0.layer_scalar"][0],
        "model.language_model.layers.1.mlp.down_proj.weight": arrays["blocks.0.1.mlp.down_proj.w"][0],
    }  # fmt: skip
    for name, want in by_hand.items():
        want = want.reshape(before[name].shape).astype(jnp.bfloat16)
        assert after[name].tobytes() == want.tobytes(), name
        assert (after[name] != before[name]).any(), f"{name} was not trained"


def test_a_full_run_loads_as_what_it_merges_to(full_run, base16, tmp_path):
    gemma_tpu.merge(full_run, out=tmp_path / "merged")
    tuned, merged = gemma_tpu.load(base16, adapter=full_run), gemma_tpu.load(tmp_path / "merged")
    assert_equal(tuned(*probe()), merged(*probe()))


# --- load ---------------------------------------------------------------------------------------------------


def probe() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two packed rows with padding: tokens, segments, positions; longer than the window."""
    tokens = np.random.default_rng(0).integers(0, 1024, (2, 48))
    segments = np.array([[1] * 30 + [2] * 18, [1] * 40 + [0] * 8])
    positions = np.concatenate([np.r_[0:30, 0:18][None], np.r_[0:40, 0:8][None]])
    return tuple(array.astype(np.int32) for array in (tokens, segments, positions))


def assert_equal(one, other, bound: float = 0.0) -> None:
    seen = probe()[1] > 0
    assert np.abs(np.asarray(one) - np.asarray(other))[seen].max() <= bound * np.abs(np.asarray(other)).max()


def test_load_gives_float32_logits_that_the_adapter_changes(whole_run, whole_merged, base32):
    base = gemma_tpu.load(base32)(*probe())
    tuned = gemma_tpu.load(base32, adapter=whole_run)(*probe())
    merged = gemma_tpu.load(whole_merged)(*probe())
    assert base.shape == tuned.shape == (2, 48, 1024) and base.dtype == tuned.dtype == jnp.float32
    assert float(jnp.abs(tuned - base).max()) > 0.1
    assert_equal(tuned, merged, 1e-5)


@pytest.mark.slow
def test_load_works_without_segments_on_a_mesh_and_at_another_dtype(whole_run, base32):
    from gemma_tpu.gemma import mesh as meshes

    tokens, _, _ = probe()
    alone = gemma_tpu.load(base32, adapter=whole_run)(tokens)
    mesh = meshes.build({"fsdp": 2, "tp": 2})
    split = gemma_tpu.load(base32, adapter=str(whole_run), mesh=mesh)
    assert len(split.embed.w[...].sharding.device_set) == 4
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(split(tokens), alone, atol=1e-4)
    half = gemma_tpu.load(base32, adapter=whole_run, dtype="bfloat16")
    assert half.embed.w[...].dtype == jnp.bfloat16 and half(tokens).dtype == jnp.float32
    assert float(jnp.abs(half(tokens) - alone).max()) < 0.5


def test_a_model_has_its_own_dtype_unless_told(base16, base32):
    assert gemma_tpu.load(base16).embed.w[...].dtype == jnp.bfloat16
    assert gemma_tpu.load(base32).embed.w[...].dtype == jnp.float32


# --- where it goes, and what is refused ---------------------------------------------------------------------


@pytest.fixture
def copy(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def test_merging_twice_replaces_the_runs_own_folder(copy, whole_merged):
    gemma_tpu.merge(copy, step=3)
    assert files(copy / "merged") != files(whole_merged)
    gemma_tpu.merge(copy)
    assert files(copy / "merged") == files(whole_merged)
    assert {"config.yaml", "metrics.jsonl"} <= files(copy).keys()


def test_a_folder_of_somebody_elses_is_never_written(copy, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is not empty"):
        gemma_tpu.merge(copy, out=tmp_path / "mine")
    with pytest.raises(UserError, match="would lose files.*notes.txt"):
        gemma_tpu.merge(copy, out=tmp_path / "mine", overwrite=True)
    gemma_tpu.merge(copy)
    (copy / "merged" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="would lose files.*notes.txt"):
        gemma_tpu.merge(copy)
    assert files(tmp_path / "mine") == {"notes.txt": b"keep"} and (copy / "merged" / "config.json").exists()


def test_rank_and_alpha_come_from_the_checkpoint(copy, whole_merged):
    text = (copy / "config.yaml").read_text()
    assert "alpha: 8" in text and "rank: 4" in text
    (copy / "config.yaml").write_text(text.replace("alpha: 8", "alpha: 800").replace("rank: 4", "rank: 2"))
    gemma_tpu.merge(copy)
    assert files(copy / "merged") == files(whole_merged)


def test_another_base_is_refused(copy, tmp_path):
    other = write_base(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="is not the base that .* was trained on"):
        gemma_tpu.merge(copy, base=other)
    with pytest.raises(UserError, match="is not the base that .* was trained on"):
        gemma_tpu.load(other, adapter=copy)
    assert not (copy / "merged").exists()


def test_a_base_that_has_moved_is_found_by_its_fingerprint(copy, base32, tmp_path, whole_merged):
    shutil.copytree(base32, tmp_path / "moved")
    gemma_tpu.merge(copy, base=tmp_path / "moved")
    assert files(copy / "merged") == files(whole_merged)


@pytest.mark.slow
def test_a_run_on_a_base_of_the_hub_trains_and_merges_to_the_bytes_of_one_on_a_folder(
    base32, whole_run, whole_merged, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Hub(files(base32), monkeypatch) as hub:
        train(run_config(f"hf://{hub.repo}", tmp_path / "run"))
        hub.reads.clear()
        gemma_tpu.merge(tmp_path / "run", out=tmp_path / "merged")  # the run knows where its base is
        assert any(name.endswith(".safetensors") for name in hub.reads)
    ours, theirs = saved(tmp_path / "run", STEPS), saved(whole_run, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(ours[path].tobytes() == theirs[path].tobytes() for path in theirs)
    merged, wanted = files(tmp_path / "merged"), files(whole_merged)
    assert b"base_model: org/model\n" in merged.pop("README.md") and wanted.pop("README.md")
    assert merged == wanted


def test_a_base_in_a_bucket_merges_to_the_bytes_of_the_folder(copy, base32, whole_merged, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, data in files(base32).items():
        fsspec.filesystem("memory").pipe_file(f"/merge/base/{name}", data)
    gemma_tpu.merge(copy, base="memory://merge/base")
    assert files(copy / "merged") == files(whole_merged)


def with_values(run_dir, change) -> adapters.Trained:
    trained = adapters.read(run_dir)
    values = dict(trained.values)
    change(values)
    shapes = {path: [list(value.shape), str(value.dtype)] for path, value in values.items()}
    return dataclasses.replace(trained, values=values, record=trained.record | {"shapes": shapes})


def updates(trained: adapters.Trained, base) -> dict:
    return merging.updates_of(trained, architecture(open_checkpoint(base)))


@pytest.mark.parametrize("path", ["blocks.0.7.mlp.up_proj.lora_a", "blocks.0.0.mlp.experts.lora_b"])
def test_an_adapter_tensor_without_a_place_is_an_error_that_names_it(path, whole_run, base32):
    odd = with_values(whole_run, lambda values: values.update({path: jnp.ones((2, 4, 8))}))
    with pytest.raises(UserError, match=f"belong, in whole or in part, to no weight of the base:\n  {path}"):
        updates(odd, base32)
    with pytest.raises(UserError, match=f"belong to no projection of this model:\n  {path}"):
        gemma_tpu.load(base32, adapter=odd)


@pytest.mark.parametrize("lost", ["layers.0.self_attn.v_proj", "layers.2.self_attn.k_proj", "layers.3.mlp"])
def test_half_of_k_and_v_or_a_layer_that_is_left_over_is_an_error(lost, whole_run, base32, monkeypatch):
    """The tensor is used, but not all of it."""
    entries = weights.entries
    monkeypatch.setattr(weights, "entries", lambda arch: (e for e in entries(arch) if lost not in e.hf))
    with pytest.raises(UserError, match="belong, in whole or in part, to no weight of the base"):
        updates(adapters.read(whole_run), base32)


def test_a_fully_trained_tensor_without_a_place_is_an_error(full_run, base16):
    odd = with_values(full_run, lambda values: values.update({"blocks.0.9.layer_scalar": jnp.ones((2, 1))}))
    with pytest.raises(UserError, match="belong to no weight of the base:\n  blocks.0.9.layer_scalar"):
        updates(odd, base16)


def test_a_folder_that_is_no_run_is_said(base32, tmp_path):
    with pytest.raises(UserError, match="no config.yaml here; is it a run folder"):
        gemma_tpu.merge(base32)
    with pytest.raises(UserError, match="no config.yaml here"):
        gemma_tpu.merge(tmp_path / "nowhere")


def test_the_record_names_everything_that_a_merge_needs(whole_run, base32):
    record = adapters.read(whole_run).record
    assert (record["adapter"]["rank"], record["adapter"]["alpha"], record["method"]) == (4, 8.0, "lora")
    assert {*map(str, record["adapter"]["layout"]["blocks.0.0.mlp.up_proj"]["scales"])} == {"2.0"}
    assert record["base"]["folder"] == str(base32)
    assert record["config"]["lora"]["rank"] == 4 and record["version"] == gemma_tpu.__version__
    assert json.dumps(record), "plain data"


def test_onto_dequantised_every_weight_is_seen_in_the_blocks_of_its_own_inputs(base32):
    arch = architecture(open_checkpoint(base32))
    trained = adapters.Trained(base32, 1, {"config": {"model": {"quantise": "nf4"}}}, {})
    found = merging._onto_dequantised(trained, arch, {})
    assert set(found) == {entry.hf for entry in weights.lora_entries(arch).values()}
    for hf, one in found.items():
        layer, module = int(hf.split("layers.")[1].split(".")[0]), hf.split(".")[-2]
        head = DIMS["head_dim"] if (layer + 1) % PERIOD else DIMS["global_head_dim"]
        width = {"down_proj": DIMS["mlp"], "o_proj": head}.get(module, DIMS["hidden"])  # a block lies in one head
        assert one.quantised == ("nf4", math.gcd(64, width)), hf
