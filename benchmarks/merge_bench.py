"""The merge beside a plain copy of the same files and beside PEFT's merge_and_unload + save_pretrained.

    python benchmarks/merge_bench.py [--layers 8] [--rank 64] [--folder /tmp] [--json FILE]

A random bfloat16 Gemma 4 with the 31B's widths (8 of its layers and an eighth of its vocabulary: 8 GB in 20 shards, no
tensor above 400 MB), and a run folder with an Orbax checkpoint of rank 64 on every projection. Each case runs in a
process of its own, so that its peak memory is its own, and counts from its start, imports included, until the disk has
the files. Then every changed element is held against float64. Needs free disk for twice the checkpoint and 12 GB of
memory for PEFT; removes what it made.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemma_tpu.handoff.patch import peak_rss_mib
from gemma_tpu.storage.shards import INDEX_FILE, open_checkpoint

SHARDS = 20
CONFIG = {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "vocab_size": 32768, "hidden_size": 5376,
    "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
    "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0, "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def make_base(folder: Path, layers: int) -> None:
    from gemma_tpu.gemma import hf_config, weights

    kinds = ["full_attention" if (i + 1) % 6 == 0 or i == layers - 1 else "sliding_attention" for i in range(layers)]
    config = CONFIG | {"num_hidden_layers": layers, "layer_types": kinds}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    entries = list(weights.entries(hf_config.from_config(config)))
    weight_map, sizes = {}, [0] * SHARDS
    parts: list[list[Any]] = [[] for _ in range(SHARDS)]
    for entry in sorted(entries, key=lambda entry: -np.prod(entry.hf_shape)):  # the next one to the emptiest shard
        number = int(np.argmin(sizes))
        sizes[number] += int(np.prod(entry.hf_shape))
        parts[number].append(entry)
    parts = [part for part in parts if part]
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        tensors = {entry.hf: draw(rng, entry.hf_shape) for entry in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) < 2:
        return np.ones(shape, ml_dtypes.bfloat16)
    return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)


def make_run(base: Path, run: Path, rank: int) -> None:
    """A run folder as training leaves it, with random values in its checkpoint."""
    import jax.numpy as jnp

    from gemma_tpu import config
    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading
    from gemma_tpu.gemma.projection import LoRA
    from gemma_tpu.run.checkpoint import Checkpoints, shapes_of
    from gemma_tpu.run.runs import RunFolder

    made = config.from_dict({"model": {"path": str(base)}, "lora": {"rank": rank, "alpha": rank}, "run_dir": str(run)})
    model, checkpoint = loading.build(base, dtype="bfloat16")
    lora.inject(model, rank=rank, alpha=rank)
    rng = np.random.default_rng(1)
    values = {path: jnp.asarray(rng.standard_normal(v.shape, np.float32) * 0.01)
              for path, v in loading.variables(model, LoRA).items()}  # fmt: skip
    RunFolder(run).write_config(made)
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    checkpoints.save(1, values, {"count": jnp.zeros(())}, {
        "config": config.to_dict(made), "method": "lora", "version": "0", "shapes": shapes_of(values),
        "base": {"folder": str(base), "fingerprint": checkpoint.fingerprint()},
        "adapter": {"rank": rank, "alpha": float(rank)},
    })  # fmt: skip
    checkpoints.close()


def copy(scratch: Path, out: Path) -> None:
    out.mkdir()
    for path in (scratch / "base").iterdir():
        shutil.copyfile(path, out / path.name)
        sync(out / path.name)


def ours(scratch: Path, out: Path) -> None:
    import gemma_tpu

    gemma_tpu.merge(scratch / "run", out=out)


def theirs(scratch: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(scratch / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, scratch / "adapter").merge_and_unload().save_pretrained(out)
    for path in out.iterdir():
        sync(path)


def export(scratch: Path, out: Path) -> None:
    from gemma_tpu.handoff.merging import export_adapter

    export_adapter(scratch / "run", out=scratch / "adapter")


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def precision(scratch: Path, out: Path) -> dict[str, float]:
    """Every changed tensor against round(float64(W) + scale * B A)."""
    from gemma_tpu.adapter import adapters, updates
    from gemma_tpu.gemma import loading
    from gemma_tpu.handoff import difference, merging

    base, merged = open_checkpoint(scratch / "base"), open_checkpoint(out)
    edits = updates.check(base, merging.updates_of(adapters.read(scratch / "run"), loading.architecture(base)))
    worst, least = 0, 1.0
    for name, edit in edits.items():
        tensor, same = updates.Tensor(base, base.info(name), edit), 0
        for index in updates.blocks(base.info(name).shape):
            wanted = tensor.exact(index).astype(np.float32).astype(ml_dtypes.bfloat16)
            apart = difference.ulp_distance(merged.read_slice(name, index), wanted)
            worst, same = max(worst, int(apart.max())), same + int((apart == 0).sum())
        least = min(least, same / base.info(name).size)
    copied = [name for name in base.names() if name not in edits]
    equal = all(base.read(name).tobytes() == merged.read(name).tobytes() for name in copied)
    return {"max_ulp": worst, "least_identical": least, "tensors": len(edits), "copied_equal": equal}


CASES = {"copy": copy, "merge": ours, "export": export, "peft": theirs}


def run_case(case: str, scratch: Path) -> dict[str, float]:
    os.sync()  # what came before has left the disk alone
    began = time.monotonic()
    command = [sys.executable, __file__, "--case", case, "--folder", str(scratch)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        CASES[options.case](options.folder, options.folder / options.case)
        print(json.dumps({"peak": peak_rss_mib(), "cpu": time.process_time()}))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="merge-bench-") as name:
        scratch = Path(name)
        (scratch / "base").mkdir()
        make_base(scratch / "base", options.layers)
        make_run(scratch / "base", scratch / "run", options.rank)
        report(scratch, options)


def report(scratch: Path, options: argparse.Namespace) -> None:
    base = open_checkpoint(scratch / "base")
    largest = max(base.info(name).end - base.info(name).start for name in base.names()) / 2**20
    print(f"{base.total_bytes / 1e9:.2f} GB bfloat16, {len(base.names())} tensors, {len(base.shards)} shards, largest "
          f"tensor {largest:.0f} MiB, rank {options.rank}, {len(os.sched_getaffinity(0))} cores")  # fmt: skip
    print(f"{'case':<8}{'seconds':>10}{'CPU s':>10}{'MB/s':>8}{'peak MiB':>10}", flush=True)
    found = {}
    for case in ("copy", "merge") if options.no_peft else ("copy", "merge", "export", "peft"):
        one = found[case] = run_case(case, scratch)
        rate = base.total_bytes / 1e6 / one["seconds"]
        print(f"{case:<8}{one['seconds']:>10.1f}{one['cpu']:>10.1f}{rate:>8.0f}{one['peak']:>10.0f}", flush=True)
        if case == "merge":
            exact = precision(scratch, scratch / "merge")
        shutil.rmtree(scratch / case, ignore_errors=True)
    merged = found["merge"]
    figures: dict[str, Any] = {
        "over_copy": merged["seconds"] / found["copy"]["seconds"],
        "peak_beyond_two_tensors_mib": merged["peak"] - 2 * largest,
        **exact,
    }
    if not options.no_peft:
        figures |= {"faster_than_peft": found["peft"]["seconds"] / merged["seconds"],
                    "less_memory_than_peft": found["peft"]["peak"] / merged["peak"]}  # fmt: skip
    for name, value in figures.items():
        print(f"{name:<30}{value:>12.6g}")
    if options.json:
        options.json.write_text(json.dumps({"cases": found, "largest_mib": largest, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
