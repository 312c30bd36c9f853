"""Compile a config's train step for a slice that is not there, by the real compiler, on this machine's CPU: that of
libtpu for TPUs, XLA's in JAX's CUDA plugin for GPUs.

The compiler runs in a child process that dumps what it does. Memory and schedule are on disk long before machine
code is: code generation is 90 % of the time, so the child is ended as soon as the dump that matters is complete.

    python -m gemma_tpu.training.compiling REQUEST.json      (the child; `compile_for` starts it)
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.hardware import chips, gpus
from gemma_tpu.step.job import Policy

SCHEDULES = ("*train_step*after_optimizations_after_buffer_assignment.txt", "*train_step*gpu_after_optimizations.txt")
MEMORY = "*train_step*memory-usage-report.txt"
_OOM = re.compile(r"total memory required[^(]*\(([0-9.]+)([KMG])\) exceeds available HBM \(([0-9.]+)([KMG])\)")
_LOG = "--dump DIR keeps its log"
_UNITS = {"K": 2**-20, "M": 2**-10, "G": 1.0}
# Libtpu looks for a TPU, a metadata server and a lock file unless it is told that none of them matters; JAX's CUDA
# plugin looks for a GPU and for CUDA's libraries.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler said: the folder with its dump, or how much memory was missing."""

    folder: Path
    seconds: float
    needs_gib: float | None = None  # set when it refused: what the program would need, and what there is
    limit_gib: float | None = None

    @property
    def fits(self) -> bool:
        return self.needs_gib is None

    @property
    def schedule(self) -> list[Path]:
        return _schedules(self.folder)


def compile_for(
    config: dict[str, Any], topology: str, mesh: dict[str, int], folder: Path, *, architecture: dict[str, Any],
    remat: Policy, total_steps: int, slices: int = 1, full: bool = False, timeout: float = 3600.0,
) -> Compiled:  # fmt: skip
    """Compile the train step of `config` (a plain tree) on `mesh` for `topology` ("v5p:2x2x1", "h100:8") into `folder`.

    `slices`: so many of it, joined by the data-centre network. `architecture` is a checkpoint's config.json.
    Without `full` it ends where memory and schedule are known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request = folder / "request.json"
    request.write_text(json.dumps({
        "config": config, "topology": topology, "slices": slices, "mesh": mesh, "folder": str(folder),
        "remat": remat, "architecture": architecture, "total_steps": total_steps,
    }, indent=1))  # fmt: skip
    begun = time.monotonic()
    log = folder / "compiler.log"
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "gemma_tpu.training.compiling", str(request)],
            stdout=out, stderr=subprocess.STDOUT, env=os.environ | _ENVIRONMENT,
        )  # fmt: skip
        try:
            while child.poll() is None:
                if not full and _schedule_is_written(folder):
                    return Compiled(folder, time.monotonic() - begun)
                if time.monotonic() - begun > timeout:
                    raise RunError(f"the compiler needed more than {timeout:.0f} s; {_LOG}")
                time.sleep(0.1)
        finally:
            child.kill()
            child.wait()
    seconds = time.monotonic() - begun
    if child.returncode == 0:
        return Compiled(folder, seconds)
    return _refusal(log, child.returncode, folder, seconds)


def _schedule_is_written(folder: Path) -> bool:
    """The memory report is the last of the files that are needed, and a file is complete when it stays as it is."""
    reports = sorted(folder.glob(MEMORY))
    if not reports or not _schedules(folder):
        return False
    sizes = [path.stat().st_size for path in [*reports, *_schedules(folder)]]
    time.sleep(0.5)
    return all(sizes) and sizes == [path.stat().st_size for path in [*reports, *_schedules(folder)]]


def _schedules(folder: Path) -> list[Path]:
    return sorted(path for pattern in SCHEDULES for path in folder.glob(pattern))


def _refusal(log: Path, code: int, folder: Path, seconds: float) -> Compiled:
    text = log.read_text(errors="replace")
    found = _OOM.search(text)
    if found:
        needs, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        return Compiled(folder, seconds, needs, limit)
    if "No module named 'libtpu'" in text or "libtpu.so" in text and "not found" in text:
        raise UserError("compiling for a TPU needs libtpu: pip install 'gemma-tpu[tpu]'; or plan with --fast")
    if "topology not implemented for cuda" in text:
        raise UserError("JAX's CUDA plugin does not load: pip install 'gemma_tpu[cuda]'; or plan with --fast")
    if code < 0:
        raise RunError(f"the compiler was ended by {signal.Signals(-code).name}: most often because this machine's "
                       f"memory was full ({_memory_gib():.0f} GiB in all); {_LOG}")  # fmt: skip
    last = [line for line in text.splitlines() if line.strip()][-1:] or ["no output"]
    raise RunError(f"the compiler stopped: {last[0][:500]}; {_LOG}")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


# --- the child --------------------------------------------------------------------------------------------


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of so many slices by the compiler's name for one."""
    from jax.experimental import topologies

    name, _, shape = topology.partition(":")
    if gpus.known(name):
        chip = chips.chips()[name]
        return gpus.devices(name, math.prod(map(int, shape.split("x"))), chip.hbm_gib, chip.hbm_gbs)
    more: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}
    more |= {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)


def main(request: dict[str, Any]) -> None:
    from gemma_tpu import config as configs
    from gemma_tpu.gemma import hf_config, loading
    from gemma_tpu.gemma import mesh as meshes
    from gemma_tpu.gemma.model import Decoder
    from gemma_tpu.training import program

    config = configs.from_dict(request["config"])
    mesh = meshes.build(request["mesh"], devices(request["topology"], request["slices"]))
    model = Decoder(hf_config.from_config(request["architecture"]), loading.DTYPES[config.model.dtype])
    loading.hold_quantised(model, config.model.quantise)
    program.adapt(model, config)
    shardings, _ = loading.place(model, mesh, config.mesh.replicate_kv)
    program.abstract(model, shardings)
    remat: Policy = tuple(request["remat"]) if isinstance(request["remat"], list) else request["remat"]
    step = program.build(config, model, shardings, mesh, request["total_steps"], remat)
    accumulation = config.train.accumulation
    batch = step.abstract_batch(accumulation, config.train.batch_size // accumulation, config.data.max_seq_len)
    lowered = step.lower(step.abstract_state(), batch)
    step.compile(lowered, {
        "xla_dump_to": request["folder"], "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*train_step.*",
    })  # fmt: skip


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
