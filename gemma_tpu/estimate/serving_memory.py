"""Memory of a chip that serves: weights, and how many sequences' keys and values fit beside them.

By the shapes alone, as vLLM splits them over its tensor-parallel group: heads and widths are divided, KV heads that
are fewer than the group are copied. A prediction; what a server has taken it says in its own log.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tpu.gemma.variants import Architecture, Layer

GIB = 2**30
KV_BYTES = {"bfloat16": 2, "fp8": 1}
CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


@dataclass(frozen=True)
class Memory:
    """Of one device, in GiB."""

    limit: float  # what the device has
    taken: float  # of it, by the server
    weights: float
    reserve: float  # activations and compiled programs: an assumption
    per_sequence: Mapping[str, Mapping[int, float]]  # KV cache by dtype and context
    replicas: int  # of the model on the slice; each has its own sequences

    @property
    def for_cache(self) -> float:
        return self.taken - self.weights - self.reserve

    def sequences(self, dtype: str, context: int) -> int:
        """How many fit at once on the whole slice, each of them `context` tokens long."""
        return self.replicas * max(0, math.floor(self.for_cache / self.per_sequence[dtype][context]))


def memory(arch: Architecture, tp: int, replicas: int, hbm_gib: float, machine: Mapping[str, Any], context: int,
           weight_bytes: int, itemsize: int) -> Memory:  # fmt: skip
    """`weight_bytes`: of all files of the checkpoint; what is not the text tower lies whole on each device."""
    contexts = [*(one for one in CONTEXTS if one < context), context]
    return Memory(
        limit=hbm_gib,
        taken=hbm_gib * machine["utilisation"],
        weights=weights_per_device(arch, tp, weight_bytes, itemsize) / GIB,
        reserve=machine["reserve_gib"],
        per_sequence={
            dtype: {one: cache_bytes(arch, tp, one, size, machine) / GIB for one in contexts}
            for dtype, size in KV_BYTES.items()
        },
        replicas=replicas,
    )


def text_bytes(arch: Architecture, itemsize: int) -> int:
    from gemma_tpu.gemma.weights import entries

    return sum(math.prod(one.shape) for one in entries(arch)) * itemsize


def weights_per_device(arch: Architecture, tp: int, weight_bytes: int, itemsize: int) -> float:
    text = text_bytes(arch, itemsize)
    kv = sum(_kv_projection(arch, layer) * itemsize for layer in arch.layers)
    copied = sum(_kv_projection(arch, layer) * itemsize * _copies(layer, tp) for layer in arch.layers)
    return (text - kv + copied) / tp + max(0, weight_bytes - text)


def _kv_projection(arch: Architecture, layer: Layer) -> int:
    if layer.kv_shared:
        return 0
    return (1 if layer.k_eq_v else 2) * layer.kv_heads * layer.head_dim * arch.hidden


def _copies(layer: Layer, tp: int) -> float:
    """How often each KV head lies on the group's devices."""
    return max(1.0, tp / layer.kv_heads)


def cache_bytes(arch: Architecture, tp: int, context: int, itemsize: int, machine: Mapping[str, Any]) -> float:
    """Keys and values of one sequence on one device: of a global layer all, of a sliding one what its window holds
    (where the server forgets the rest), of one that shares another's none."""
    bounded = machine["sliding_bounded"] or len({layer.head_dim for layer in arch.layers}) == 1
    total = 0.0
    for layer in arch.layers:
        if not layer.kv_shared:
            tokens = context if layer.window is None or not bounded else min(layer.window, context)
            total += tokens * token_bytes(layer, tp, itemsize, machine)
    return total


def token_bytes(layer: Layer, tp: int, itemsize: int, machine: Mapping[str, Any]) -> float:
    """K and V of one token in one layer on one device; also where V is K, both are stored."""
    heads = 2 * max(1, layer.kv_heads // tp)
    if machine["cell_bits"]:
        in_cell = machine["cell_bits"] // (8 * itemsize)
        heads = math.ceil(heads / in_cell) * in_cell
    width = math.ceil(layer.head_dim / machine["head_multiple"]) * machine["head_multiple"]
    return heads * width * itemsize


def group_sizes(arch: Architecture, devices: int) -> list[int]:
    """Tensor-parallel sizes that the heads allow: query heads are divided, KV heads divided or copied evenly."""
    return [tp for tp in range(1, devices + 1) if devices % tp == 0 and refusal(arch, tp) is None]


def refusal(arch: Architecture, tp: int) -> str | None:
    """Why a group of this size cannot hold the model; None: it can."""
    if arch.heads % tp:
        return f"{arch.heads} query heads do not divide by {tp}"
    for count in sorted({layer.kv_heads for layer in arch.layers if not layer.kv_shared}):
        if count % tp and tp % count:
            return f"{count} KV heads neither divide by {tp} nor does {tp} divide by them"
    return None
