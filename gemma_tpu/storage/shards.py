"""Reads a checkpoint in the Hugging Face layout: model.safetensors, or an index and its shards, near or far.

Headers are parsed and checked here, all of them before the first tensor is read, so that a broken download
is one message and not a crash in the middle of a load. Tensors come by range reads into fresh arrays: memory
mapping would count every page ever touched as resident, and a 58 GiB checkpoint would look like a leak.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.storage.header import Shard, TensorInfo, read_shard
from gemma_tpu.storage.remote import LocalSource, Source
from gemma_tpu.storage.sources import open_source

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_GATHER_BYTES = 4 << 20  # rows read at once when only some of their columns are wanted; stays in cache
_LARGE_ROW_BYTES = 1 << 20
_SAMPLE_BYTES = 4096

_thread = threading.local()

Bounds = list[tuple[int, int]]  # [low, high) of every dim
ReadInto = Callable[[int, np.ndarray], None]  # fills the array with the bytes from a position of the file on


class Checkpoint:
    """A checked checkpoint. Holds headers only: every read asks its source again."""

    def __init__(self, source: Source, shards: list[Shard], index_file: str | None):
        self.source = source
        self.shards = {shard.name: shard for shard in shards}
        self.index_file = index_file
        self._tensors = {t.name: t for shard in shards for t in shard.tensors}

    @property
    def where(self) -> str:
        """The folder or the URL, as it is named to people."""
        return self.source.where

    @cached_property
    def folder(self) -> Path:
        """The folder on this machine with config and tokenizer: a cache of those files if the weights are remote."""
        return self.source.local_files()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise UserError(f"{self.where} has no tensor {name!r} (it holds {len(self._tensors)} others)")
        return self._tensors[name]

    @property
    def total_bytes(self) -> int:
        return sum(t.end - t.start for t in self._tensors.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands in the checkpoint."""
        if "config.json" not in self.source.list():
            raise UserError(f"{self.where} has no config.json, which says what model it is")
        config = plain.from_json(self.source.read("config.json"), f"{self.where}/config.json")
        if not isinstance(config, dict):
            raise UserError(f"{self.where}/config.json must hold a JSON object, not {type(config).__name__}")
        return config

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor as a fresh array, or a contiguous range of its first dim, reading only those bytes."""
        return self.read_slice(name, () if rows is None else (rows,))

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]` for slices of step 1, without ever holding the whole tensor."""
        info = self.info(name)
        out = _empty(info.dtype, tuple(hi - lo for lo, hi in _bounds(info, index)))
        self.read_slices(name, [(index, out)])
        return out

    def read_slices(self, name: str, wanted: Sequence[tuple[tuple[slice, ...], np.ndarray]]) -> None:
        """Fills every array with its slice of the tensor, converted to the array's dtype.

        What lies together in the file goes straight into its array. Columns of a row cannot be had without
        reading around them: such rows are read in bounded pieces, once for all the arrays that want a part.
        """
        info = self.info(name)
        boxes = []
        for index, out in wanted:
            bounds = _bounds(info, index)
            if out.shape != tuple(hi - lo for lo, hi in bounds):
                raise ValueError(f"{name}: an array of shape {out.shape} cannot take {bounds} of {info.shape}")
            boxes.append((bounds, out) if info.shape else ([(0, 1)], out.reshape(1)))
        _fill(self._reader(info), info.start, info.shape or (1,), boxes, info.dtype)

    def read_flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the tensor in memory order, as a 1-D array."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.size:
            raise ValueError(f"{name}: [{start}, {stop}) is outside its {info.size} elements")
        out = _empty(info.dtype, (stop - start,))
        self._reader(info)(info.start + start * info.dtype.itemsize, out)
        return out

    def read_header(self, shard: str) -> bytes:
        """The shard's bytes before its first tensor: length and JSON, metadata and padding included."""
        return bytes(self.source.read(shard, 0, self.shards[shard].data_start))

    def _reader(self, info: TensorInfo) -> ReadInto:
        def read_into(start: int, out: np.ndarray) -> None:
            try:
                self.source.read_into(info.shard, start, out.reshape(-1).view(np.uint8).data)
            except RunError as error:
                raise RunError(f"{info.name}: {error}") from None

        return read_into

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


def open_checkpoint(where: str | Path) -> Checkpoint:
    """Opens a folder, a bucket URL or a hub id, or says in one UserError everything that is wrong with its weights."""
    source = open_source(where)
    files = source.list()
    if INDEX_FILE not in files and SINGLE_FILE not in files:
        raise UserError(f"{source.where} holds neither {SINGLE_FILE} nor {INDEX_FILE}: it is not a safetensors "
                        "checkpoint")
    if INDEX_FILE not in files:
        shards, problems = _read_shards(source, [SINGLE_FILE])
        _refuse(source, problems)
        return Checkpoint(source, shards, None)

    weight_map = _read_index(source)
    listed = sorted(set(weight_map.values()))
    problems = [f"{INDEX_FILE} names {plain.cut(name)}, which is not there" for name in listed if name not in files]
    if SINGLE_FILE in files and SINGLE_FILE not in listed:
        problems.append(f"both {SINGLE_FILE} and an index of other shards are there: remove the one that is "
                        "not meant")
    shards, shard_problems = _read_shards(source, [name for name in listed if name in files])
    problems += shard_problems + _compare_index(weight_map, shards)
    _refuse(source, problems)
    return Checkpoint(source, shards, INDEX_FILE)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file that is no checkpoint by itself, e.g. an adapter's."""
    source = LocalSource(path.parent)
    shard = read_shard(source, path.name)
    held = Checkpoint(source, [shard], None)
    return {tensor.name: held.read(tensor.name) for tensor in shard.tensors}


def _refuse(source: Source, problems: list[str]) -> None:
    if problems:
        lines = "\n  - " + plain.first(problems, between="\n  - ")
        raise UserError(f"{source.where} is not a complete checkpoint; download it again or mend these:{lines}")


def _read_index(source: Source) -> dict[str, str]:
    path = f"{source.where}/{INDEX_FILE}"
    index = plain.from_json(source.read(INDEX_FILE), path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map (an object of tensor name to shard file name)")
    bad = {str(shard) for shard in weight_map.values() if not _is_shard_name(shard)}
    if bad:
        raise UserError(f"{path}: a shard must be a plain *.safetensors file name beside the index, with no "
                        f"path in it, not {plain.first(plain.cut(ascii(name)) for name in sorted(bad))}")
    return weight_map


def _is_shard_name(name: Any) -> bool:
    return (isinstance(name, str) and name.endswith(".safetensors") and name == os.path.basename(name)
            and "\\" not in name and name.isprintable())


def _read_shards(source: Source, names: list[str]) -> tuple[list[Shard], list[str]]:
    shards, problems = [], []
    for name in names:
        try:
            shards.append(read_shard(source, name))
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
                problems.append(f"{shard.name} {rule}: {plain.first(plain.cut(ascii(one)) for one in sorted(names))}")
    return problems


def _bounds(info: TensorInfo, index: tuple[slice, ...]) -> Bounds:
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


def _scratch(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Memory of this thread that the next call takes again: fresh pages for every band would cost more than it."""
    size = math.prod(shape) * dtype.itemsize
    if getattr(_thread, "scratch", np.empty(0)).nbytes < size:
        _thread.scratch = np.empty(size, np.uint8)
    memory: np.ndarray = _thread.scratch[:size]
    return memory.view(dtype).reshape(shape)


def _fill(read_into: ReadInto, offset: int, shape: tuple[int, ...], boxes: list[tuple[Bounds, np.ndarray]],
          dtype: np.dtype) -> None:
    """Fills each array with its box of the tensor of `shape` that starts at byte `offset`."""
    stride = math.prod(shape[1:]) * dtype.itemsize
    cut: dict[tuple[int, int], list[tuple[Bounds, np.ndarray]]] = {}
    for (rows, *inner), out in boxes:
        whole = all((low, high) == (0, dim) for (low, high), dim in zip(inner, shape[1:], strict=True))
        if whole and out.dtype == dtype and out.flags.c_contiguous and out.size:
            read_into(offset + rows[0] * stride, out)
        elif out.size:
            cut.setdefault(rows, []).append((inner, out))
    for (low, high), parts in cut.items():
        if stride >= _LARGE_ROW_BYTES:
            for row in range(low, high):
                _fill(read_into, offset + row * stride, shape[1:],
                      [(inner, out[row - low]) for inner, out in parts], dtype)
            continue
        step = _GATHER_BYTES // stride
        for row in range(low, high, step):
            band = _scratch(dtype, (min(step, high - row), *shape[1:]))
            read_into(offset + row * stride, band)
            for inner, out in parts:
                part = band[(slice(None), *(slice(lo, hi) for lo, hi in inner))]
                _copy(part, out[row - low : row - low + len(band)])


def _copy(part: np.ndarray, out: np.ndarray) -> None:
    """numpy moves runs of an integer type as blocks, and those of a foreign type like bfloat16 one by one."""
    if part.dtype == out.dtype and part.dtype.itemsize in (1, 2, 4, 8):
        bits = f"u{part.dtype.itemsize}"
        out.view(bits)[...] = part.view(bits)
    else:
        out[...] = part.astype(out.dtype)
