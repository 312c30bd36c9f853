"""Which tensors go into which file of a written checkpoint: the base's own shards, or new ones of a given size."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.storage.header import DTYPES, Shard, TensorInfo
from gemma_tpu.storage.shards import INDEX_FILE, SINGLE_FILE, Checkpoint

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class OutShard:
    """A file to write: its header, then these tensors (as they stand in the base) one after the other."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(t.end - t.start for t in self.tensors)


@dataclass(frozen=True)
class Layout:
    shards: tuple[OutShard, ...]
    index: bytes | None  # a new index, where the base's does not fit these shards

    @property
    def files(self) -> set[str]:
        return {shard.name for shard in self.shards} | ({INDEX_FILE} if self.index else set())


def like_base(base: Checkpoint) -> Layout:
    """The base's shards with their names and their headers, byte for byte; its index is copied with the other files."""
    return Layout(tuple(OutShard(s.name, base.read_header(s.name), s.tensors) for s in base.shards.values()), None)


def cut(base: Checkpoint, max_bytes: int) -> Layout:
    """New shards of at most `max_bytes` of tensors, in the base's order; a larger tensor has a shard to itself."""
    groups: list[list[TensorInfo]] = []
    room = 0
    for tensor in (t for shard in base.shards.values() for t in shard.tensors):
        size = tensor.end - tensor.start
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= size
    metadata = _metadata(base, next(iter(base.shards.values())))
    if len(groups) == 1:
        return Layout((_shard(SINGLE_FILE, groups[0], metadata),), None)
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    shards = tuple(_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": base.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return Layout(shards, json.dumps(index, indent=2).encode() + b"\n")


def parse_size(text: str) -> int:
    """ "5GB", "800 MiB" or bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise UserError(f"a shard's size must be a number above 0 with KB, MB, GB, MiB or GiB, like 5GB, not {text!r}")
    return size


def _metadata(base: Checkpoint, shard: Shard) -> dict[str, str]:
    header = plain.from_json(base.read_header(shard.name)[8:], f"the header of {shard.name}")
    metadata: dict[str, str] = header.get("__metadata__", {"format": "pt"})
    return metadata


def _shard(name: str, tensors: Sequence[TensorInfo], metadata: dict[str, str]) -> OutShard:
    """Wide dtypes first, so that every tensor is aligned to its own elements."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}  # and for each tensor its dtype, shape and place
    at = 0
    for tensor in ordered:
        end = at + tensor.end - tensor.start
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return OutShard(name, len(text).to_bytes(8, "little") + text, tuple(ordered))
