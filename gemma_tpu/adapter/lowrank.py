"""An adapter by the checkpoint's names: what the merge, its proof and the export to PEFT read.

Ours is stacked by repeats and padded to one rank; here each tensor of the checkpoint has its own matrices, of its own
rank. What they make of the weight W:

    W' = W + scale (B A - B0 A0),  and with a magnitude m each row of W' is scaled to the length m
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_tpu.errors import UserError
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.gemma.weights import lora_entries


@dataclass(frozen=True)
class Adapter:
    """Of one tensor of the checkpoint; a stack of experts has the expert as first dim of all but the scale."""

    a: np.ndarray  # [rank, in]
    b: np.ndarray  # [out, rank]
    scale: float
    magnitude: np.ndarray | None = None  # [out]: DoRA's
    a0: np.ndarray | None = None  # where A and B started, taken off again: PiSSA's
    b0: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    @property
    def wide(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, B) of the whole change scale * B A: with a start, of twice the rank. PEFT takes PiSSA so, too."""
        if self.a0 is None or self.b0 is None:  # they come together
            return self.a, self.b
        return np.concatenate([self.a, self.a0], -2), np.concatenate([self.b, -self.b0], -1)

    def merged(self, w_OI: np.ndarray) -> np.ndarray:
        """W' in float64."""
        a, b = self.wide
        return to_length(w_OI.astype(np.float64) + self.scale * (b.astype(np.float64) @ a), self.magnitude)


def to_length(w_OI: np.ndarray, magnitude: np.ndarray | None) -> np.ndarray:
    """Every row scaled to its magnitude."""
    if magnitude is None:
        return w_OI
    scaled: np.ndarray = w_OI * (magnitude / np.sqrt(np.square(w_OI).sum(-1)))[..., None]
    return scaled


def by_tensor(arch: Architecture, values: Mapping[str, np.ndarray], adapter: Mapping[str, Any]) -> dict[str, Adapter]:
    """What a checkpoint holds (`values`, and the `adapter` of its record), by the names of the base's tensors.

    Everything must find its place; layers of a stack that were not chosen are not there.
    """
    layout = adapter.get("layout", {})
    found: dict[str, Adapter] = {}
    used: dict[str, int] = {}  # elements of each value that found their place
    plain = (adapter["rank"], adapter["alpha"] / adapter["rank"])
    for entry in lora_entries(arch).values():
        stem = entry.path.removesuffix(".w")
        held = {name: values[f"{stem}.{name}"] for name in PARTS if f"{stem}.{name}" in values}
        if not held:
            continue
        own = layout.get(stem)
        *experts, out, inside = entry.hf_shape
        lead = held["lora_b"].shape[: len(entry.index)]
        number = int(np.ravel_multi_index(entry.index, lead))
        rank, scale = plain if own is None else (own["ranks"][number], own["scales"][number])
        shapes = {"lora_a": (*experts, -1, inside), "lora_b": (*experts, out, -1), "lora_magnitude": (*experts, out)}
        cut = {name: value[entry.index].reshape(shapes[name.removesuffix("0")]) for name, value in held.items()}
        for name, value in cut.items():
            used[f"{stem}.{name}"] = used.get(f"{stem}.{name}", 0) + value.size
            if name.startswith("lora_a"):
                cut[name], beyond = value[..., :rank, :], value[..., rank:, :]
            elif name.startswith("lora_b"):
                cut[name], beyond = value[..., :rank], value[..., rank:]
            else:
                continue
            if beyond.any():
                raise UserError(f"{stem}.{name}: not zero beyond the rank {rank} of {entry.hf}")
        if rank:
            found[entry.hf] = Adapter(scale=scale, **{name.removeprefix("lora_"): value for name, value in cut.items()})
    if lost := sorted(name for name, value in values.items() if used.get(name, 0) != value.size):
        raise UserError("these adapter tensors belong, in whole or in part, to no weight of the base:\n  "
                        + "\n  ".join(lost))  # fmt: skip
    return found


PARTS = ("lora_a", "lora_b", "lora_magnitude", "lora_a0", "lora_b0")
