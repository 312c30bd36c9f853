"""The GPU baseline: the same batches, the same first adapter, the same rates; and on a CPU the same losses.

TRL is asked in a process of its own, from a folder beside this environment's packages: `make test-baseline`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from gemma_tpu import cli, config
from gemma_tpu.data.packing import fill
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import hf_config, sizes
from gemma_tpu.pages import comparison
from gemma_tpu.tiny import archs
from gemma_tpu.tiny import config as tiny_config

HERE = Path(__file__).parent.parent / "recipes" / "gpu_baseline"
BESIDE = Path(os.environ.get("GEMMA_TPU_CLIENTS", HERE.parent.parent / ".client-envs")) / "trl"


@pytest.fixture(scope="module")
def recipe():
    """hand_over and batches, as a script of that folder sees them."""
    sys.path.insert(0, str(HERE))
    try:
        import batches
        import hand_over

        yield hand_over, batches
    finally:
        sys.path.remove(str(HERE))
        for name in ("batches", "hand_over"):
            sys.modules.pop(name, None)


def write(folder: Path, base: Path, **more) -> Path:
    tree = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"limit": 60, "max_seq_len": 256, "validation": None, "packing": "pack", "cache": None},
        "lora": {"rank": 4, "alpha": 8}, "mesh": {"fsdp": 2, "tp": 2},
        "train": {"steps": 20, "batch_size": 4, "accumulation": 1},
        "optim": {"lr": 1e-2, "warmup_steps": 5, "weight_decay": 0.1},
        "log": {"progress": False, "tensorboard": False}, "checkpoint": {"every": 1000},
        "run_dir": str(folder / "ours"),
    }  # fmt: skip
    for name, section in more.items():
        tree[name] |= section
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


class OneUpdate:
    """A loader of one update with known sheets."""

    batch_size = 2

    def __init__(self, sheets, width):
        self.batch = {name: leaf[None] for name, leaf in fill(sheets, width, pad_id=0).items()}

    def __getitem__(self, step):
        return self.batch


def row(ids, trained):
    return np.array(ids, np.int32), np.array(trained, bool)


def test_labels_are_our_targets_at_the_token_that_is_predicted_and_never_cross_a_row(recipe):
    packed = [[row([5, 6, 7], [0, 0, 1]), row([8, 9], [1, 1])], [row([3, 4], [0, 1])]]
    found = recipe[1].Sheets(OneUpdate(packed, 8)).take([0, 1])
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]], "what pads both sheets is cut off"
    assert found["labels"].tolist() == [[-100, -100, 7, -100, 9], [-100, 4, -100, -100, -100]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    alone = recipe[1].Sheets(OneUpdate([[row([5, 6], [0, 1])], [row([3, 4, 2], [0, 1, 1])]], 8)).take([0, 1])
    assert alone["position_ids"].tolist() == [[0, 1, 2]] * 2, "one row a sheet needs no mask for its padding"


def test_an_update_has_the_same_rows_on_any_number_of_devices(recipe, tmp_path, base32):
    split = recipe[1].split
    for size, accumulation, devices, wanted in ((8, 8, 2, (1, 4)), (8, 1, 2, (4, 1)), (8, 1, 8, (1, 1)),
                                                (12, 2, 4, (1, 3)), (12, 4, 1, (3, 4))):  # fmt: skip
        chosen = config.load(write(tmp_path, base32, train={"batch_size": size, "accumulation": accumulation}))
        rows, times = split(chosen, devices)
        assert (rows, times) == wanted and rows * times * devices == size
    with pytest.raises(UserError, match=r"batch_size \(12\) must divide by the number of devices \(8\)"):
        split(chosen, 8)


def test_what_is_handed_over_is_the_first_state_of_our_own_run(recipe, tmp_path, base32):
    from safetensors.numpy import load_file

    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading
    from gemma_tpu.step import optim
    from gemma_tpu.training import program

    file, out = write(tmp_path, base32), tmp_path / "theirs"
    record = recipe[0].main(str(file), [f"run_dir={out}"])
    chosen = config.load(file)
    model, _ = loading.build(chosen.model.path, dtype="float32")
    program.adapt(model, chosen)
    first = lora.initial(model, chosen.train.seed)
    held = load_file(out / "start" / "adapter_model.safetensors")
    ours = sorted(float(np.abs(a).sum()) for path, a in first.items() if path.endswith("lora_a"))
    theirs = sum(float(np.abs(a).sum()) for name, a in held.items() if "lora_A" in name)
    assert theirs == pytest.approx(sum(ours)), "every A, and no other"
    assert all(not b.any() for name, b in held.items() if "lora_B" in name)
    rate, _ = optim.schedule(chosen.optim, 20)
    assert record["rates"] == pytest.approx([float(rate(step)) for step in range(20)], rel=1e-5)
    assert record["rates"][0] > 0, "the first update moves"
    loader = recipe[1].loader_of(chosen)
    assert record["plan"] == loader.plan and record["steps"] == 20
    (out / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds a run already"):
        recipe[0].main(str(file), [f"run_dir={out}"])


def test_what_has_no_counterpart_is_refused_by_name_all_at_once(recipe, tmp_path, base32):
    file = write(tmp_path, base32, lora={"dora": True}, optim={"name": "lion", "loraplus_ratio": 16.0})
    with pytest.raises(UserError) as error:
        recipe[0].main(str(file), [])
    assert all(key in str(error.value) for key in ("lora.dora = True", "optim.name = lion", "loraplus_ratio = 16.0"))


@pytest.mark.parametrize("name, devices", [("h100x2", 2), ("h100x8", 8)])
def test_launch_configs_have_keys_that_accelerate_knows(name, devices):
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    found = load_config_from_file(str(HERE / f"{name}.yaml"))  # refuses unknown keys
    assert found.num_processes == devices and str(found.distributed_type.value) == "FSDP"
    known = {action.dest for action in launch_command_parser()._actions}
    assert not set(found.fsdp_config) - known and found.fsdp_config["fsdp_version"] == 2


# --- with TRL ---


def theirs(run_dir: Path, *launch: str, script: Path = HERE / "train.py") -> subprocess.CompletedProcess:
    if not BESIDE.is_dir() and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not here: make test-baseline")
    paths = os.pathsep.join([str(HERE.parent.parent), str(BESIDE)])
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, *launch, str(script), str(run_dir)], text=True, capture_output=True,
        env=kept | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=900,
    )  # fmt: skip


TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def side_by_side(recipe, tmp_path, base, *launch, script=HERE / "train.py", **more):
    """(our run, theirs) of one config."""
    file, out = write(tmp_path, base, **more), tmp_path / "theirs"
    assert cli.main(["train", str(file)]) == 0
    recipe[0].main(str(file), [f"run_dir={out}"])
    done = theirs(out, *launch, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert theirs(out).returncode == 2, "a second run into the same folder is refused"
    return comparison.read([tmp_path / "ours", out])


CASES = {
    "packed": {}, "padded": {"data": {"packing": "off"}},
    "accumulated": {"train": {"accumulation": 2, "remat": "full"}, "optim": {"clip": 0.05}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_twenty_losses_and_gradient_norms_agree_with_ours(recipe, tmp_path, base32, case):
    runs = side_by_side(recipe, tmp_path, base32, **CASES[case])
    found = comparison.apart(*runs)
    print(case, json.dumps(found))
    assert found["updates"] == 20
    losses = [row["loss"] for row in runs[0].rows]
    assert max(losses) - min(losses) > 0.05, "it learns, or agreement would mean little"
    assert found["max_loss_difference"] < 1e-3 and found["max_grad_norm_difference"] < 0.01
    assert [line for line in comparison.all_warnings(runs) if not line.startswith("cost")] == []
    assert (tmp_path / "theirs" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data parallel", "FSDP2", "FSDP2 in bfloat16"])
def test_two_processes_find_the_same_losses(recipe, tmp_path, base32, how):
    """By gloo. Of accelerate's FSDP2 a CPU is refused: the script below lets it pass, and all else is as on GPUs."""
    script = Path(__file__).parent / "fsdp2_on_cpu.py" if "FSDP2" in how else HERE / "train.py"
    dtype, bounds = ("bfloat16", (0.03, 0.1)) if "bfloat16" in how else ("float32", (1e-3, 0.01))
    runs = side_by_side(recipe, tmp_path, base32, *TWO, script=script, model={"dtype": dtype})
    found = comparison.apart(*runs)
    print(how, json.dumps(found))
    assert runs[1].summary["devices"] == 2 and found["updates"] == 20
    assert found["max_loss_difference"] < bounds[0] and found["max_grad_norm_difference"] < bounds[1]
    assert (tmp_path / "theirs" / "sharded").exists() == ("FSDP2" in how)
    held = comparison_of_adapters(tmp_path / "theirs")
    assert held > 0, "what was trained is in adapter/, gathered from both"


def comparison_of_adapters(run_dir: Path) -> float:
    """How far B has moved; it starts as zero."""
    from safetensors.numpy import load_file

    first, last = (load_file(run_dir / name / "adapter_model.safetensors") for name in ("start", "adapter"))
    assert {name: x.shape for name, x in first.items()} == {name: x.shape for name, x in last.items()}
    return min(float(np.abs(x).max()) for name, x in last.items() if "lora_B" in name)


@pytest.mark.parametrize("size", ["gemma4-e2b", "gemma4-e4b", "gemma3-270m", "gemma3-1b", "gemma3-4b", "gemma3-12b"])
def test_the_random_weights_of_the_gpu_benchmark_have_the_published_geometry(monkeypatch, size):
    monkeypatch.syspath_prepend(str(HERE.parent.parent / "benchmarks"))
    import peers_gpu

    row = archs.ARCHS[size]
    dims = replace(row.dims, **peers_gpu.dims(size))
    assert not row.broken_rules(dims)
    made = hf_config.from_config(tiny_config.model_config(dims, "bfloat16", True, size))
    published = sizes.architecture(size)
    assert made.layers == published.layers and sizes.parameters(made) == sizes.parameters(published)
    assert replace(made, prefix=published.prefix) == published


def test_the_gpu_benchmark_takes_medians_of_what_came_after_the_first_updates(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(HERE.parent.parent / "benchmarks"))
    import peers_gpu

    rows = [{"step": n, "tokens_per_s": rate, "mfu": 0.5} for n, rate in enumerate((1, 2, 30, 10, 20), start=1)]
    rows.insert(3, {"step": 3, "val_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert peers_gpu.figures(tmp_path) == {"tokens_per_s": 20, "mfu": 0.5, "memory_gib": None, "updates": 3}


@pytest.mark.parametrize("python, words", [("/nowhere/python", "No such file"), (None, "has no torch, trl")])
def test_the_gpu_benchmark_asks_for_its_peer_before_it_trains(monkeypatch, tmp_path, python, words):
    monkeypatch.syspath_prepend(str(HERE.parent.parent / "benchmarks"))
    import peers_gpu

    bare = tmp_path / "python"  # a Python that has nothing of the kind
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(SystemExit, match=words):
        peers_gpu.check_peer(Path(python or bare))
