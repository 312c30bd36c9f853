"""Tokens a second, MFU and memory of LoRA training on this GPU: gemma_tpu beside TRL + PEFT, one after the other.

    python benchmarks/peers_gpu.py gemma3-4b [--updates 12] [--tokens 4096] [--rows 8] [--python PY] [--keep DIR]

Random weights in the published geometry, written first (`--keep` leaves them for the next call); the bundled rows,
packed; bfloat16; LoRA rank 16 on every projection; one row of so many tokens at a time. Ours keeps what fits
(`remat: auto`), the peer has gradient checkpointing and sdpa attention, both from the same YAML, adapter, sheets and
rates (recipes/gpu_baseline). PY is a Python with torch, trl, peft and accelerate, by default this one. The first two
updates compile and warm up; the figures are medians of the others. On a CPU, `tiny` tries the script itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from gemma_tpu.gemma import sizes
from gemma_tpu.tiny.checkpoint import write_tiny

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "recipes" / "gpu_baseline"
SIZES = ("gemma4-e2b", "gemma4-e4b", "gemma3-270m", "gemma3-1b", "gemma3-4b", "gemma3-12b")
WARM_UP = 2
FIGURES = ("tokens_per_s", "mfu", "memory_gib")


def dims(size: str) -> dict[str, int]:
    """The published sizes, as the writer of tiny checkpoints wants them; of `tiny` none."""
    if size == "tiny":
        return {}
    arch = sizes.architecture(size)
    first = next(layer for layer in arch.layers if layer.kind == "local")
    last = next(layer for layer in arch.layers if layer.kind == "global")
    found = {
        "layers": len(arch.layers), "pattern": arch.layers.index(last), "hidden": arch.hidden, "mlp": first.mlp,
        "heads": arch.heads, "kv_heads": first.kv_heads, "head_dim": first.head_dim, "window": first.window,
        "vocab": arch.vocab, "max_positions": arch.context,
    }  # fmt: skip
    if size.startswith("gemma4"):
        shared = sum(layer.kv_shared for layer in arch.layers)
        found |= {"global_head_dim": last.head_dim, "kv_shared": shared, "per_layer_input": arch.per_layer_input}
    return found


def write_config(folder: Path, base: Path, args: argparse.Namespace, name: str) -> Path:
    tree = {
        "model": {"path": str(base), "dtype": "bfloat16"},
        "data": {"path": "bundled:tiny_verilog/train.jsonl", "max_seq_len": args.tokens, "validation": None,
                 "cache": None},
        "lora": {"rank": 16, "alpha": 32}, "mesh": {"fsdp": 1, "tp": 1},
        "train": {"steps": args.updates, "batch_size": args.rows, "accumulation": args.rows, "remat": "auto"},
        "optim": {"lr": 1e-4, "warmup_steps": 2}, "checkpoint": {"every": 100_000},
        "log": {"progress": False, "tensorboard": False, "every": 1}, "run_dir": str(folder / name),
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def call(*command: object) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    print("+", *command, file=sys.stderr)
    if subprocess.run([*map(str, command)], cwd=ROOT, env=environment, stdout=sys.stderr).returncode:
        sys.exit(f"this call failed: {' '.join(map(str, command))}")


def check_peer(python: Path) -> None:
    """That the peer could run at all."""
    try:
        found = subprocess.run([python, "-c", "import torch, trl, peft, accelerate"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--python {python}: {error.strerror}")
    if found.returncode:
        last = found.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        sys.exit(f"--python {python} has no torch, trl, peft and accelerate: {last[0]}")


def figures(run: Path) -> dict[str, float | None]:
    """Medians of the updates after the first ones."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("tokens_per_s")][WARM_UP:]
    return {name: statistics.median(found) if (found := [row[name] for row in rows if row.get(name)]) else None
            for name in FIGURES} | {"updates": len(rows)}  # fmt: skip


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=[*SIZES, "tiny"])
    parser.add_argument("--updates", type=int, default=12, help="of each side; the first two do not count")
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--rows", type=int, default=8, help="an update")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="that of the peer")
    parser.add_argument("--keep", type=Path, help="folder where the random checkpoint stays")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    if args.updates <= WARM_UP:
        parser.error(f"--updates {args.updates}: the first {WARM_UP} do not count, so more are needed")
    check_peer(args.python)  # before anything is written or trained: the machine costs by the hour
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = (args.keep or folder) / f"{args.size}-random"
        if not base.exists():
            write_tiny(base, "gemma3-4b" if args.size == "tiny" else args.size, text_only=True, **dims(args.size))
        call(sys.executable, "-m", "gemma_tpu", "train", write_config(folder, base, args, "ours"))
        call(sys.executable, BASELINE / "hand_over.py", write_config(folder, base, args, "theirs"))
        call(args.python, BASELINE / "train.py", folder / "theirs")
        found: dict[str, dict[str, Any]] = {side: figures(folder / side) for side in ("ours", "theirs")}
    ratio = found["ours"]["tokens_per_s"] / found["theirs"]["tokens_per_s"]
    print("| | tokens/s | MFU | GiB |\n|---|---|---|---|")
    for title, side in (("gemma_tpu, packed", "ours"), ("TRL + PEFT, packed, sdpa, gradient checkpointing", "theirs")):
        rate, mfu, memory = (found[side][name] for name in FIGURES)
        print(f"| {title} | {cell(rate, ',.0f')} | {cell(mfu, '.1%')} | {cell(memory, '.1f')} |")
    print(f"\n{args.size}, {args.rows} rows of {args.tokens} tokens an update: {ratio:.2f} x")
    if args.json:
        args.json.write_text(json.dumps(found | {"ratio": ratio, "size": args.size}, indent=1) + "\n")


if __name__ == "__main__":
    main()
