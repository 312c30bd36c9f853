"""One safetensors file's header, read and checked: 8 bytes of length, JSON, then the tensors' bytes.

Everything in it comes from outside, so whatever it says, the answer is a Shard or one UserError.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.storage.remote import Source

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8), "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32), "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8), "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32), "F64": np.dtype(np.float64), "C64": np.dtype(np.complex64),
}

_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
_FIRST_READ = 64 << 10
_MAX_RANK = 32
_MAX_BYTES = 1 << 62  # of a tensor and of any offset: what numpy and pread can address


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard; `start` and `end` are byte positions in the file, header included."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, which start at `data_start`."""

    name: str
    data_start: int
    tensors: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        return self.tensors[-1].end if self.tensors else self.data_start


def read_shard(source: Source, name: str) -> Shard:
    """Reads and checks one header; every bad tensor of the file is named in one UserError."""
    size = source.size(name)
    first = source.read(name, 0, min(size, _FIRST_READ))  # from far away, one request instead of two
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES) or length < 2:
        raise UserError(f"{name} is truncated or not a safetensors file: it has {size} bytes and "
                        f"its first 8 give a header of {length}")
    raw = first[8 : 8 + length] + source.read(name, len(first), max(len(first), 8 + length))
    header = plain.from_json(raw, f"the header of {name}")
    if not isinstance(header, dict):
        raise UserError(f"the header of {name} must be a JSON object, not {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    tensors, problems = [], []
    if not isinstance(metadata, dict):
        problems.append("__metadata__ is not an object")
    for tensor, entry in header.items():
        try:
            dtype, shape, (start, end) = _parse_entry(entry)
            tensors.append(TensorInfo(tensor, dtype, shape, name, 8 + length + start, 8 + length + end))
        except ValueError as error:
            problems.append(f"{plain.cut(ascii(tensor))}: {error}")
    tensors.sort(key=lambda t: (t.start, t.end))
    if not problems:  # a tensor left out above would only make false gaps
        problems = list(_layout_problems(tensors, 8 + length, size))
    if problems:
        raise UserError(f"{name} is damaged: {plain.first(problems, between='; ')}")
    return Shard(name, 8 + length, tuple(tensors))


def _parse_entry(entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("its entry needs dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"dtype {plain.cut(ascii(code))} is not one of {', '.join(DTYPES)}")
    if not _is_naturals(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"shape {plain.cut(ascii(shape))} must be a list of at most {_MAX_RANK} whole numbers")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {plain.cut(ascii(offsets))} must be two whole numbers")
    # Zero dims are skipped here: numpy refuses [0, 2**40, 2**40] although it holds nothing.
    if math.prod(dim for dim in shape if dim) * DTYPES[code].itemsize > _MAX_BYTES:
        raise ValueError(f"shape {plain.cut(ascii(shape))} is too large to address")
    need = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != need:
        raise ValueError(f"data_offsets {offsets} span {offsets[1] - offsets[0]} bytes, {code} "
                         f"{plain.cut(ascii(shape))} needs {need}")
    return DTYPES[code], tuple(shape), (offsets[0], offsets[1])


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_BYTES for item in value)


def _layout_problems(tensors: list[TensorInfo], data_start: int, size: int) -> Iterator[str]:
    """The format allows no gap, no overlap and nothing after the last tensor."""
    position, before = data_start, "the header"
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps" if tensor.start < position else "leaves a gap after"
            yield f"{plain.cut(ascii(tensor.name))} {kind} {before}"
        position, before = max(position, tensor.end), plain.cut(ascii(tensor.name))
    if size < position:
        yield f"truncated: its header describes {position} bytes and the file has {size}"
    elif size > position:
        yield f"{size - position} bytes follow the last tensor"
