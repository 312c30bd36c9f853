"""Times the streaming merge against a plain copy of the same files and against a whole-model numpy merge.

    python benchmarks/merge_bench.py [--gib 2] [--rank 64] [--folder /tmp]

Makes a random bfloat16 checkpoint of four shards, with Gemma 4 31B's projections (fewer layers) and an
embedding that stays as it is, and changes every projection. Each case runs in a process of its own, so its
peak memory is its own, and counts until fsync has returned. Needs free disk for twice the checkpoint; removes
what it made.
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

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_tpu.patch import LowRank, peak_rss_mib, write_patched
from gemma_tpu.shards import INDEX_FILE, open_checkpoint

BF16 = ml_dtypes.bfloat16
SHARDS = 4
PROJECTIONS = {"q_proj": (8192, 5376), "k_proj": (4096, 5376), "v_proj": (4096, 5376), "o_proj": (5376, 8192),
               "gate_proj": (21504, 5376), "up_proj": (21504, 5376), "down_proj": (5376, 21504)}
EMBED = (16384, 5376)


def make_base(folder: Path, gib: float) -> None:
    rng = np.random.default_rng(0)
    names = [f"layers.{layer}.{name}" for layer in range(64) for name in PROJECTIONS]
    shapes, room = {"embed_tokens": EMBED}, gib * 2**30 - 2 * np.prod(EMBED)
    for name in names:
        shape = PROJECTIONS[name.rsplit(".", 1)[1]]
        if 2 * np.prod(shape) <= room:
            shapes[name] = shape
            room -= 2 * np.prod(shape)
    weight_map = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = list(shapes)[number::SHARDS]
        tensors = {name: (rng.standard_normal(shapes[name], np.float32) * 0.02).astype(BF16) for name in part}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


def make_updates(base: Path, rank: int) -> dict[str, LowRank]:
    rng = np.random.default_rng(1)
    checkpoint, updates = open_checkpoint(base), {}
    for name in checkpoint.names():
        if name != "embed_tokens":
            out, inner = checkpoint.info(name).shape
            updates[name] = LowRank(rng.standard_normal((out, rank), np.float32) * 0.01,
                                    rng.standard_normal((rank, inner), np.float32) * 0.01, 1.0)
    return updates


def copy(base: Path, out: Path, rank: int) -> None:
    out.mkdir()
    for path in base.iterdir():
        shutil.copyfile(path, out / path.name)
        sync(out / path.name)


def naive(base: Path, out: Path, rank: int) -> None:
    """Loads the whole model, adds every delta in float32, saves it again."""
    updates = make_updates(base, rank)
    files = sorted(base.glob("*.safetensors"))
    model = {path.name: load_file(path) for path in files}
    out.mkdir()
    for tensors in model.values():
        for name, array in tensors.items():
            if name in updates:
                part = updates[name]
                tensors[name] = (array.astype(np.float32) + part.scale * (part.b @ part.a)).astype(BF16)
    for file, tensors in model.items():
        save_file(tensors, out / file)
        sync(out / file)


def streaming(base: Path, out: Path, rank: int) -> None:
    write_patched(open_checkpoint(base), out, make_updates(base, rank))


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


CASES = {"copy": copy, "write_patched": streaming, "whole model in numpy": naive}


def run_case(case: str, base: Path, out: Path, rank: int) -> None:
    began = time.monotonic()
    CASES[case](base, out, rank)
    print(json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time(),
                      "peak_rss_mib": peak_rss_mib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, options.folder / "base", options.folder / "out", options.rank)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        base, out = Path(scratch) / "base", Path(scratch) / "out"
        base.mkdir()
        make_base(base, options.gib)
        checkpoint = open_checkpoint(base)
        print(f"{checkpoint.total_bytes / 2**30:.2f} GiB bfloat16, {len(checkpoint.names())} tensors, "
              f"{SHARDS} shards, rank {options.rank}, {os.cpu_count()} cores")
        print(f"{'case':<22}{'seconds':>10}{'CPU s':>10}{'MiB/s':>10}{'peak RSS MiB':>15}")
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", scratch, "--rank",
                       str(options.rank)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout)
            rate = checkpoint.total_bytes / 2**20 / result["seconds"]
            print(f"{case:<22}{result['seconds']:>10.2f}{result['cpu']:>10.2f}{rate:>10.0f}"
                  f"{result['peak_rss_mib']:>15.0f}")
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
