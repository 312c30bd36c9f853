"""One of several processes with four fake devices each, loading checkpoints together: what it read, and if it is right.

    python streaming_child.py COORDINATOR PROCESSES PROCESS REQUESTS

REQUESTS: JSON list of [folder, mesh sizes, worth moving]; prints a JSON list of what `figures` returns for each.
"""

import json
import math
import sys
import threading
from typing import Any

import jax
import numpy as np

from gemma_tpu.gemma import loading, mesh, streaming, weights
from gemma_tpu.gemma.projection import Base
from gemma_tpu.storage import shards
from gemma_tpu.storage.shards import Checkpoint


def count_reads(checkpoint: Checkpoint) -> list[int]:
    """Lengths of all reads from here on."""
    real, lengths, lock = checkpoint.source.read_into, [], threading.Lock()

    def read_into(name: str, start: int, view: memoryview) -> None:
        with lock:
            lengths.append(len(view))
        real(name, start, view)

    checkpoint.source.read_into = read_into
    return lengths


def wrong_variables(model: Any, checkpoint: Checkpoint) -> list[str]:
    """Those of which a shard here differs from the tensors as the checkpoint has them."""
    loaded = {path: variable[...] for path, variable in loading.variables(model, Base).items()}
    wanted = {path: np.zeros(array.shape, array.dtype) for path, array in loaded.items()}
    for entry in weights.entries(model.arch):
        wanted[entry.path][entry.index] = checkpoint.read(entry.hf).reshape(entry.shape)
    return [
        path for path, array in loaded.items() for shard in array.addressable_shards
        if np.asarray(shard.data).tobytes() != wanted[path][shard.index].tobytes()
    ]  # fmt: skip


def figures(folder: str, sizes: dict[str, int], worth_moving: int) -> dict[str, Any]:
    streaming.WORTH_MOVING = worth_moving
    shards._LARGE_ROW_BYTES = worth_moving  # of an expert that is smaller, all would be read for a part
    model, checkpoint = loading.build(folder, dtype="float32")
    shardings, _ = loading.place(model, mesh.build(sizes))
    lengths = count_reads(checkpoint)
    loading.load_base(model, checkpoint, shardings)
    read = sum(lengths)
    arrays = loading.variables(model, Base)
    placed = all(variable[...].sharding == shardings[path] for path, variable in arrays.items())
    tensors = {entry.hf: math.prod(entry.shape) * 4 for entry in weights.entries(model.arch)}
    small = sum(size for size in tensors.values() if size < worth_moving)
    return {"read": read, "total": sum(tensors.values()), "small": small, "placed": placed,
            "wrong": wrong_variables(model, checkpoint)}  # fmt: skip


def main() -> None:
    coordinator, processes, process, requests = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(coordinator, int(processes), int(process))
    print(json.dumps([figures(*request) for request in json.loads(requests)]))


if __name__ == "__main__":
    main()
