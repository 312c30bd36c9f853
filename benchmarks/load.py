"""Times loading onto eight fake devices against reading the same bytes with safetensors alone, and its memory.

    python benchmarks/load.py [--model dense|experts] [--gb 4] [--folder /tmp] [--rounds 3] [--mesh fsdp=8 …]
                              [--json FILE]

Makes a random bfloat16 checkpoint with the layers of Gemma 4 31B or 26B-A4B and loads it on each mesh. fsdp splits
the columns of most matrices, tp their rows, data leaves them whole on every device. CPU devices take over the memory
that was read; `pieces` goes the way of accelerators, which have memory of their own: read in pieces, copied, and put
together on the devices. Each case runs in a process of its own, the files are in the page cache for all of them, and
the rounds take turns; cpu s is what a busy machine does not blur. Memory is what the process had resident at most,
less what it had before and less the parameters themselves (counted once); for `pieces`, where an accelerator would
hold the parameters, it is what lay in the host's buffers at most. Removes what it made.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from gemma_tpu.gemma import hf_config, weights
from gemma_tpu.storage import shards

DEVICES = 8
DENSE = {
    "model_type": "gemma4_text", "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 10240,
    "num_attention_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_key_value_heads": 8,
    "num_global_key_value_heads": 4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
# One period of 5 local layers and a global one: a variable of five experts' tensors, as in 26B-A4B.
EXPERTS = DENSE | {
    "hidden_size": 2816, "intermediate_size": 2112, "num_global_key_value_heads": 2, "num_hidden_layers": 6,
    "enable_moe_block": True, "moe_intermediate_size": 704, "top_k_experts": 8,
}  # fmt: skip
LAYER_GB, EXPERT_GB = 0.226, 0.072  # of a dense layer; of one expert in all six layers
MESHES = ["fsdp=8", "fsdp=2,tp=4", "data=8", "fsdp=8,pieces", "fsdp=2,tp=4,pieces"]


def config_of(model: str, gb: float) -> dict[str, Any]:
    if model == "experts":
        return EXPERTS | {"num_experts": 8 * max(1, round((gb - 0.8) / EXPERT_GB / 8))}
    embed_gb = 2 * DENSE["vocab_size"] * DENSE["hidden_size"] / 1e9
    return DENSE | {"num_hidden_layers": 6 * max(1, round((gb - embed_gb) / LAYER_GB / 6))}


def make(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map, part, number = {}, {}, 0
    table = list(weights.entries(hf_config.from_config(config)))
    for count, entry in enumerate(table, 1):
        bits = rng.integers(0, 1 << 16, size=entry.hf_shape, dtype=np.uint16) & 0xBFFF  # no infinity, no NaN
        part[entry.hf] = bits.view(ml_dtypes.bfloat16)
        if sum(array.nbytes for array in part.values()) > 1e9 or count == len(table):
            number += 1
            file = f"model-{number:05}.safetensors"
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
            part = {}
    (folder / shards.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def child_safetensors(folder: Path) -> dict[str, float]:
    began, cpu, kept = time.perf_counter(), time.process_time(), {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            kept |= {name: file.get_tensor(name) for name in file.keys()}
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "gb": sum(array.nbytes for array in kept.values()) / 1e9}


class Copied:
    """Buffers that a CPU device copies, as accelerators do, since they are not aligned; and how much of them lives."""

    def __init__(self, streaming: Any):
        self.live = self.peak = 0
        self._pages, streaming._pages, streaming.TAKES_OVER = streaming._pages, self.pages, frozenset()

    def pages(self, shape: list[int], dtype: Any) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        owner = self._pages([16 + size], np.dtype(np.uint8))
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(owner, self.free, size)
        return owner[16:].view(dtype).reshape(shape)

    def free(self, size: int) -> None:
        self.live -= size


def child_load(folder: Path, sizes: dict[str, int], pieces: bool) -> dict[str, float]:
    import jax

    from gemma_tpu.gemma import loading, mesh, streaming

    copied = Copied(streaming) if pieces else None
    model, checkpoint = loading.build(folder, dtype="bfloat16")
    shardings, _ = loading.place(model, mesh.build(sizes))
    jax.block_until_ready(jax.device_put(np.zeros(3), jax.devices()[-1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = status_mb("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    loading.load_base(model, checkpoint, shardings)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    parameters = checkpoint.total_bytes / 1e6
    beyond = copied.peak / 1e6 if copied else status_mb("VmHWM") - before - parameters
    return {"seconds": seconds, "cpu": cpu, "gb": parameters / 1e3, "beyond_mb": beyond}


def run(case: str, folder: Path) -> dict[str, float]:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    command = [sys.executable, __file__, "--child", case, "--folder", str(folder)]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(command, env=os.environ | flags | {"PYTHONPATH": root}, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["dense", "experts"], default="dense")
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mesh", nargs="+", default=MESHES)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        words = options.child.split(",")
        sizes = {axis: int(n) for axis, _, n in (word.partition("=") for word in words) if n}
        found = child_load(options.folder, sizes, "pieces" in words) if sizes else child_safetensors(options.folder)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        make(folder, config_of(options.model, options.gb))
        checkpoint = shards.open_checkpoint(folder)
        largest = 2 * max(checkpoint.info(name).size for name in checkpoint.names()) / 1e6
        cases = ["safetensors", *options.mesh]
        rounds = [{case: run(case, folder) for case in cases} for _ in range(options.rounds)]
    print(f"{rounds[0]['safetensors']['gb']:.2f} GB in bfloat16 onto {DEVICES} fake devices, {os.cpu_count()} cores, "
          f"{options.rounds} rounds; largest tensor {largest:.0f} MB, so at most {2 * largest + 400:.0f} MB may be "
          "held beyond the parameters")  # fmt: skip
    print(f"{'case':<20}{'best s':>8}{'GB/s':>7}{'x safetensors':>15}{'cpu s':>8}{'x':>6}{'MB beyond':>11}")
    alone = {key: min(found["safetensors"][key] for found in rounds) for key in ("seconds", "cpu")}
    figures = {}
    for case in cases:
        best = {key: min(found[case][key] for found in rounds) for key in ("seconds", "cpu")}
        beyond = [f"{found[case]['beyond_mb']:.0f}" for found in rounds if "beyond_mb" in found[case]]
        print(f"{case:<20}{best['seconds']:>8.2f}{rounds[0][case]['gb'] / best['seconds']:>7.2f}"
              f"{best['seconds'] / alone['seconds']:>15.2f}{best['cpu']:>8.2f}{best['cpu'] / alone['cpu']:>6.2f}"
              f"{max(beyond, key=int, default=''):>11}")  # fmt: skip
        figures[case] = {"seconds": best["seconds"], "over_safetensors": best["seconds"] / alone["seconds"]}
        if beyond:
            figures[case]["beyond_mb"] = max(found[case]["beyond_mb"] for found in rounds)
    if options.json:
        found = {"cases": figures, "rounds": rounds, "largest_mb": largest}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
