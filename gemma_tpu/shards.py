"""Reads a checkpoint folder in the Hugging Face layout: model.safetensors, or an index and its shards.

Headers are parsed and checked here, all of them before the first tensor is read, so that a broken download
is one message and not a crash in the middle of a load. Tensors come through pread into fresh arrays: memory
mapping would count every page ever touched as resident, and a 58 GiB checkpoint would look like a leak.
"""

import hashlib
import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.header import Shard, TensorInfo, open_file, parse_json, read_file, read_shard

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_GATHER_BYTES = 16 << 20  # rows read at once when only some of their columns are wanted
_LARGE_ROW_BYTES = 1 << 20
_SAMPLE_BYTES = 4096


class Checkpoint:
    """A checked checkpoint folder. Holds headers only; every read opens the file, reads and closes it."""

    def __init__(self, folder: Path, shards: list[Shard], index_file: str | None):
        self.folder = folder
        self.shards = {shard.name: shard for shard in shards}
        self.index_file = index_file
        self._tensors = {t.name: t for shard in shards for t in shard.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise UserError(f"{self.folder} has no tensor {name!r} (it holds {len(self._tensors)} others)")
        return self._tensors[name]

    @property
    def total_bytes(self) -> int:
        return sum(t.end - t.start for t in self._tensors.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands in the folder."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise UserError(f"{self.folder} has no config.json, which says what model it is")
        config = parse_json(read_file(path), str(path))
        if not isinstance(config, dict):
            raise UserError(f"{path} must hold a JSON object, not {type(config).__name__}")
        return config

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor as a fresh array, or a contiguous range of its first dim, reading only those bytes."""
        return self.read_slice(name, () if rows is None else (rows,))

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]` for slices of step 1, without ever holding the whole tensor.

        Columns of a row cannot be had without reading around them, so a slice that cuts an inner dim
        reads the rows it crosses in bounded pieces and keeps its part.
        """
        info = self.info(name)
        bounds = _bounds(info, index)
        out = _empty(info.dtype, tuple(hi - lo for lo, hi in bounds))
        with open_file(self.folder / info.shard) as file:
            if info.shape:
                _read_box(file.fileno(), info.start, info.shape, bounds, out)
            else:
                _read_into(file.fileno(), out, info.start)
        return out

    def read_flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the tensor in memory order, as a 1-D array."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.size:
            raise ValueError(f"{name}: [{start}, {stop}) is outside its {info.size} elements")
        out = _empty(info.dtype, (stop - start,))
        with open_file(self.folder / info.shard) as file:
            _read_into(file.fileno(), out, info.start + start * info.dtype.itemsize)
        return out

    def read_header(self, shard: str) -> bytes:
        """The shard's bytes before its first tensor: length and JSON, metadata and padding included."""
        out = np.empty(self.shards[shard].data_start, np.uint8)
        with open_file(self.folder / shard) as file:
            _read_into(file.fileno(), out, 0)
        return out.tobytes()

    def fingerprint(self) -> str:
        """A cheap identity of the weights: sha256 over each name, dtype, shape, and its first and last 4 KiB.

        Equal fingerprints mean the same set of tensors with the same edges, however they are sharded. Any
        training run moves the edges of some tensor, so a different base is told apart; a file edited only in
        the middle of a tensor is not. It guards against mix-ups, not against forgery.
        """
        digest = hashlib.sha256()
        for name in self.names():
            info = self._tensors[name]
            digest.update(json.dumps([name, info.dtype.name, list(info.shape)]).encode())
            edge = min(info.size, _SAMPLE_BYTES // info.dtype.itemsize)
            digest.update(self.read_flat(name, 0, edge).tobytes())
            digest.update(self.read_flat(name, info.size - edge, info.size).tobytes())
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint folder, or says in one UserError everything that is wrong with its weight files."""
    folder = Path(folder)
    try:
        files = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError as error:
        raise UserError(f"{folder} cannot be opened ({error.strerror}): give the path of a downloaded "
                        "checkpoint folder") from None
    if INDEX_FILE not in files and SINGLE_FILE not in files:
        raise UserError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: it is not a safetensors "
                        "checkpoint")
    if INDEX_FILE not in files:
        shards, problems = _read_shards(folder, [SINGLE_FILE])
        _refuse(folder, problems)
        return Checkpoint(folder, shards, None)

    weight_map = _read_index(folder / INDEX_FILE)
    listed = sorted(set(weight_map.values()))
    problems = [f"{INDEX_FILE} names {name}, which is not there" for name in listed if name not in files]
    if SINGLE_FILE in files and SINGLE_FILE not in listed:
        problems.append(f"both {SINGLE_FILE} and an index of other shards are there: remove the one that is "
                        "not meant")
    shards, shard_problems = _read_shards(folder, [name for name in listed if name in files])
    problems += shard_problems + _compare_index(weight_map, shards)
    _refuse(folder, problems)
    return Checkpoint(folder, shards, INDEX_FILE)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"{folder} is not a complete checkpoint; download it again or mend these:{lines}")


def _read_index(path: Path) -> dict[str, str]:
    index = parse_json(read_file(path), str(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map (an object of tensor name to shard file name)")
    bad = {str(shard) for shard in weight_map.values() if not _is_shard_name(shard)}
    if bad:
        raise UserError(f"{path}: a shard must be a plain *.safetensors file name beside the index, with no "
                        f"path in it, not {', '.join(map(ascii, sorted(bad)))}")
    return weight_map


def _is_shard_name(name: Any) -> bool:
    return (isinstance(name, str) and name.endswith(".safetensors") and name == os.path.basename(name)
            and "\\" not in name and name.isprintable())


def _read_shards(folder: Path, names: list[str]) -> tuple[list[Shard], list[str]]:
    shards, problems = [], []
    for name in names:
        try:
            shards.append(read_shard(folder / name))
        except UserError as error:
            problems.append(str(error))
    return shards, problems


def _compare_index(weight_map: dict[str, str], shards: list[Shard]) -> list[str]:
    """What the index and the headers of the readable shards disagree on."""
    problems = []
    for shard in shards:
        here = {t.name for t in shard.tensors}
        wanted = {name for name, file in weight_map.items() if file == shard.name}
        unlisted = {name for name in here if name not in weight_map}
        elsewhere = {name for name in here if weight_map.get(name, shard.name) != shard.name}
        for names, rule in (
            (wanted - here, "lacks tensors that the index says it holds"),
            (unlisted, "holds tensors that the index does not list"),
            (elsewhere, "holds tensors that the index lists under another shard"),
        ):
            if names:
                problems.append(f"{shard.name} {rule}: {', '.join(map(ascii, sorted(names)))}")
    return problems


def _bounds(info: TensorInfo, index: tuple[slice, ...]) -> list[tuple[int, int]]:
    if len(index) > len(info.shape):
        raise ValueError(f"{info.name}: {len(index)} slices for shape {info.shape}")
    bounds = []
    for dim, part in zip(info.shape, index + (slice(None),) * (len(info.shape) - len(index)), strict=True):
        low, high, step = part.indices(dim)
        if step != 1:
            raise ValueError(f"{info.name}: only slices of step 1 can be read, not {part}")
        bounds.append((low, max(low, high)))
    return bounds


def _empty(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(math.prod(shape) * dtype.itemsize, np.uint8).view(dtype).reshape(shape)


def _read_box(fd: int, offset: int, shape: tuple[int, ...], bounds: list[tuple[int, int]],
              out: np.ndarray) -> None:
    """Fills `out` with the box `bounds` of the tensor of `shape` that starts at byte `offset`."""
    (low, high), inner = bounds[0], bounds[1:]
    stride = math.prod(shape[1:]) * out.dtype.itemsize
    if out.size == 0:
        return
    if all((lo, hi) == (0, dim) for (lo, hi), dim in zip(inner, shape[1:], strict=True)):
        _read_into(fd, out, offset + low * stride)
    elif stride >= _LARGE_ROW_BYTES:
        for row in range(low, high):
            _read_box(fd, offset + row * stride, shape[1:], inner, out[row - low])
    else:
        step = _GATHER_BYTES // stride
        keep = (slice(None), *(slice(lo, hi) for lo, hi in inner))
        for row in range(low, high, step):
            rows = _empty(out.dtype, (min(step, high - row), *shape[1:]))
            _read_into(fd, rows, offset + row * stride)
            out[row - low : row - low + len(rows)] = rows[keep]


def _read_into(fd: int, array: np.ndarray, offset: int) -> None:
    view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)  # the kernel gives at most 2 GiB a call
        if count == 0:
            raise RunError(f"a weight file ended at byte {offset + done}: it was changed while it was read")
        done += count
