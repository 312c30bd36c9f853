"""Writes a copy of a checkpoint in which some tensors are changed and every other byte is the base's own.

Shards keep their names, headers and offsets; tensors that no update names are copied byte for byte. A changed
tensor is computed in blocks of rows as float64(W) + sum of scale * B @ A and rounded once to its own dtype.
float64 because W and its delta can cancel: summed in float32, about one element in a million then lands many
bfloat16 steps from the exact result.

Shapes: O = out features, I = in features (the layout of the files), R = rank; stacked experts have an E in front.
"""

import errno
import math
import re
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from gemma_tpu.blas import single_threaded
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.lowrank import to_length
from gemma_tpu.quantise import round_trip
from gemma_tpu.shards import Checkpoint, Shard, TensorInfo
from gemma_tpu.staging import staged, walk_names, write_file

FLOATS = tuple(np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "consolidated*", "tf_model*",
                "flax_model*", "adapter_model*", "*.gguf", "*.pt", "*.pth", "*.onnx")
_BOOKKEEPING = (".git/", ".cache/")  # of the download; .git may hold every weight a second time
Index = tuple[slice, ...]
_BLOCK_ELEMENTS = 1 << 20  # 8 MiB in float64: a worker's block stays near its cache


@dataclass(frozen=True)
class LowRank:
    """W + scale * b @ a, with b [O, R] and a [R, I]; for a stack of experts b [E, O, R] and a [E, R, I].

    With a magnitude [O] (DoRA), each row of that sum is then scaled to this length. `quantised`, a kind and a block:
    W is taken as a run saw it that held it so.
    """

    b: np.ndarray
    a: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    quantised: tuple[str, int] | None = None


@dataclass(frozen=True)
class Replace:
    """The whole tensor. A float array is rounded once to the tensor's dtype; any other must have it."""

    array: np.ndarray


Update = LowRank | Replace | Sequence[LowRank]
Edit = Replace | tuple[LowRank, ...]  # an Update after its checks


@dataclass
class TensorChange:
    """What one update did: moved = elements whose value, once stored, differs from the base's."""

    elements: int
    moved: int = 0
    max_delta: float = 0.0

    def add(self, other: "TensorChange") -> None:
        self.moved += other.moved
        self.max_delta = max(self.max_delta, other.max_delta)


@dataclass
class PatchReport:
    """What was written. left_out: files of the base with other weights or bookkeeping of its download."""

    out: Path
    tensors_changed: int
    tensors_copied: int
    bytes: int = 0
    seconds: float = 0.0
    peak_rss_mib: float = 0.0
    changes: dict[str, TensorChange] = field(default_factory=dict)
    files_copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def write_patched(base: Checkpoint, out: Path, updates: Mapping[str, Update], *,
                  copy_files: Callable[[str], bool] = lambda name: True, overwrite: bool = False,
                  workers: int = 2, progress: Callable[[int, int], None] | None = None) -> PatchReport:
    """Writes `base` with `updates` applied to the folder `out`, which appears only when it is complete.

    `copy_files(relative name)` may turn down files beside the weights; `progress(done, total)` gets bytes of
    weights. Raises UserError for updates that do not fit the base and for an `out` that is taken, RunError
    for values that are not finite and for a disk that fails or fills up.
    """
    began = time.monotonic()
    edits = _check_updates(base, updates)
    files, left_out = _other_files(base)
    left_out += [name for name in files if not copy_files(name)]
    files = [name for name in files if copy_files(name)]
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    _refuse_nested(base.folder.resolve(), Path(out).resolve())
    report = PatchReport(Path(out), len(edits), len(base.names()) - len(edits),
                         changes={name: TensorChange(base.info(name).size) for name in edits},
                         files_copied=files, left_out=sorted(left_out))
    try:
        with staged(Path(out), {*files, *base.shards}, overwrite) as folder:
            _check_space(base, files, folder)
            for name in files:
                source = base.folder / name
                write_file(folder / name, lambda file, source=source: _copy(source, file))
                report.bytes += (folder / name).stat().st_size
            with single_threaded(), ThreadPoolExecutor(workers) as pool:
                for shard in base.shards.values():
                    _write_shard(base, shard, edits, folder / shard.name, report, pool, 2 * workers, progress)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise RunError(f"writing {out} failed: {reason}. {out} is as it was before") from error
    report.seconds = time.monotonic() - began
    report.peak_rss_mib = peak_rss_mib()
    return report


def try_shard(base: Checkpoint, folder: Path, updates: Mapping[str, Update]) -> PatchReport:
    """The smallest shard that the updates change, written into `folder` and deleted again: will a merge work here?"""
    edits = _check_updates(base, updates)
    changed = [one for one in base.shards.values() if any(info.name in edits for info in one.tensors)]
    shard = min(changed, key=lambda one: one.size)
    names = {info.name for info in shard.tensors}
    inside = {name: edit for name, edit in edits.items() if name in names}
    report = PatchReport(folder / shard.name, len(inside), len(names) - len(inside),
                         changes={name: TensorChange(base.info(name).size) for name in inside})
    try:
        with single_threaded(), ThreadPoolExecutor(2) as pool:
            _write_shard(base, shard, inside, report.out, report, pool, 4, None)
    except OSError as error:
        raise RunError(f"writing {report.out} failed: {error.strerror or error}") from error
    finally:
        report.out.unlink(missing_ok=True)
    return report


def peak_rss_mib() -> float:
    """The most memory that this process has had resident, since it began."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(peak[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# --- checks before anything is written ---


def _check_updates(base: Checkpoint, updates: Mapping[str, Update]) -> dict[str, Edit]:
    if not updates:
        raise UserError(f"no updates for {base.folder}: the result would be the base itself")
    unused = sorted(name for name in updates if name not in base)
    if unused:
        raise UserError(f"{base.folder} has no tensor for {len(unused)} of {len(updates)} updates: "
                        f"{', '.join(unused)}")
    edits, misfits, infinite = {}, [], []
    for name, update in updates.items():
        parts = (update,) if isinstance(update, LowRank | Replace) else tuple(update)
        edits[name] = update if isinstance(update, Replace) else parts
        misfits += [f"{name}: {problem}" for problem in _misfits(base.info(name), parts)]
        if any(isinstance(part, LowRank) and not _is_finite(part) for part in parts):
            infinite.append(name)
    if misfits:
        raise UserError("updates do not fit the base:" + "".join(f"\n  - {misfit}" for misfit in misfits))
    if infinite:
        raise RunError(f"NaN or infinity in the update of {', '.join(infinite)}: not written")
    return edits


def _misfits(info: TensorInfo, parts: Sequence[LowRank | Replace]) -> Iterator[str]:
    shape = list(info.shape)
    if not parts:
        yield "its list of updates is empty"
    for part in parts:
        if isinstance(part, Replace):
            if part.array.shape != info.shape:
                yield f"its shape {list(part.array.shape)} must be the base's {shape}"
            if part.array.dtype != info.dtype and not {part.array.dtype, info.dtype} <= {*FLOATS}:
                yield f"{part.array.dtype} cannot replace {info.dtype}"
            continue
        if part.quantised and len(parts) > 1:
            yield "only a single update can quantise the base"
        if part.magnitude is not None and (list(part.magnitude.shape) != shape[:-1] or len(parts) > 1):
            yield f"a magnitude {list(part.magnitude.shape)} must be that of the rows of {shape}, in the only update"
        b, a = list(part.b.shape), list(part.a.shape)
        if len(a) != len(b) or len(b) not in (2, 3) or b[-1] != a[-2] or a[:-2] != b[:-2] or [*b[:-1], a[-1]] != shape:
            yield f"b {b} @ a {a} must give the base's {shape}"
        if info.dtype not in FLOATS:
            yield f"a delta cannot be added to {info.dtype} (quantised weights need their scales)"


def _is_finite(part: LowRank) -> bool:
    arrays = [part.b, part.a, *([] if part.magnitude is None else [part.magnitude])]
    return math.isfinite(part.scale) and all(bool(np.isfinite(array).all()) for array in arrays)


def _other_files(base: Checkpoint) -> tuple[list[str], list[str]]:
    """(files to copy, files to leave) of all but the shards; refuses links that lead out of the folder."""
    root = base.folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # a hub cache: snapshots/<revision>/x -> ../../blobs/<hash>
        allowed.append(root.parent.parent / "blobs")
    copied, left, bad = [], [], []
    for name in walk_names(root):
        path = root / name
        target = path.resolve()
        if name in base.shards:
            continue
        if name.startswith(_BOOKKEEPING):
            left.append(name)
        elif not path.is_file() or not any(target.is_relative_to(place) for place in allowed):
            bad.append(name)
        elif name != base.index_file and any(fnmatch(path.name, pattern) for pattern in WEIGHT_FILES):
            left.append(name)
        else:
            copied.append(name)
    if bad:
        raise UserError(f"{root} holds links that lead out of it or are broken, or special files, which are "
                        f"not copied: {', '.join(sorted(bad))}; replace them by plain files")
    return sorted(copied), left


def _refuse_nested(base: Path, out: Path) -> None:
    if base == out or base.is_relative_to(out) or out.is_relative_to(base):
        raise UserError(f"{out} and the base {base} must be two folders, neither inside the other")


def _check_space(base: Checkpoint, files: list[str], folder: Path) -> None:
    need = sum(shard.size for shard in base.shards.values())
    need += sum((base.folder / name).stat().st_size for name in files)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise RunError(f"{folder.parent} has {free / 2**30:.2f} GiB free and the result needs "
                       f"{need / 2**30:.2f} GiB: make room or choose another disk")


# --- writing ---


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as original:
        shutil.copyfileobj(original, file, 1 << 20)


def _write_shard(base: Checkpoint, shard: Shard, edits: Mapping[str, Edit], path: Path, report: PatchReport,
                 pool: ThreadPoolExecutor, window: int, progress: Callable[[int, int], None] | None) -> None:
    """Blocks are computed by the pool and written here in file order, at most `window` of them in memory."""

    def write(file: BinaryIO) -> None:
        file.write(base.read_header(shard.name))
        report.bytes += shard.data_start
        weights_before = sum(s.size - s.data_start for s in base.shards.values() if s.name < shard.name)
        for name, block, change in _in_order(pool, _jobs(base, shard, edits), window):
            file.write(block.reshape(-1).view(np.uint8))
            report.bytes += block.nbytes
            if change is not None:
                report.changes[name].add(change)
            if progress is not None:
                progress(weights_before + file.tell() - shard.data_start, base.total_bytes)

    write_file(path, write)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable], window: int) -> Iterator:
    pending: deque = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _jobs(base: Checkpoint, shard: Shard, edits: Mapping[str, Edit]) -> Iterator[Callable]:
    """One job a block, in file order; each returns (tensor name, its elements, change or None)."""
    for info in shard.tensors:
        edit = edits.get(info.name)
        if edit is None:
            job = partial(_base_block, base, info)
        elif isinstance(edit, Replace):
            job = partial(_replace_block, base, info, edit)
        else:
            job = partial(_add_block, base, info, edit)
        for index in _blocks(info.shape):
            yield partial(job, index)


def _blocks(shape: Sequence[int]) -> Iterator[Index]:
    """Cuts the first dim, and where one expert of a stack is too large its rows too, so that a block has about
    _BLOCK_ELEMENTS; a scalar is one block."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if len(shape) > 2 and inner > _BLOCK_ELEMENTS:
        for first in range(shape[0]):
            yield from ((slice(first, first + 1), *rest) for rest in _blocks(shape[1:]))
        return
    rows = max(1, _BLOCK_ELEMENTS // max(1, inner))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])),)


def _base_block(base: Checkpoint, info: TensorInfo, index: Index) -> tuple:
    return info.name, base.read_slice(info.name, index), None


def _add_block(base: Checkpoint, info: TensorInfo, parts: tuple[LowRank, ...], index: Index) -> tuple:
    old_OI = base.read_slice(info.name, index)
    experts = index[: len(info.shape) - 2]  # A is wanted whole, but of these experts alone
    a_RI = np.concatenate([np.asarray(part.a[experts], np.float64) for part in parts], axis=-2)
    b_OR = np.concatenate([np.asarray(part.b[index], np.float64) * part.scale for part in parts], axis=-1)
    sum_OI = b_OR @ a_RI
    largest = float(max(sum_OI.max(initial=0.0), -sum_OI.min(initial=0.0)))
    # bfloat16 widens to float32 without loss, and numpy adds in place only what it knows itself.
    old = old_OI.astype(np.float32) if old_OI.dtype.itemsize < 4 else old_OI
    sum_OI += seen(old, parts[0])
    if parts[0].magnitude is not None:  # blocks hold whole rows
        sum_OI = to_length(sum_OI, np.asarray(parts[0].magnitude[index], np.float64))
        largest = float(np.abs(sum_OI - old).max(initial=0.0))
    return _finish(info, old_OI, sum_OI, largest)


def seen(w_OI: np.ndarray, update: LowRank) -> np.ndarray:
    """The base's rows as the update's run computed with them."""
    return w_OI if update.quantised is None else round_trip(w_OI, *update.quantised)


def _replace_block(base: Checkpoint, info: TensorInfo, edit: Replace, index: Index) -> tuple:
    old, new = base.read_slice(info.name, index), np.asarray(edit.array[index])
    wide = np.complex128 if old.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):  # not finite: _finish refuses it by name
        largest = float(np.abs(new.astype(wide) - old.astype(wide)).max(initial=0.0))
    return _finish(info, old, new, largest)


def _finish(info: TensorInfo, old: np.ndarray, exact: np.ndarray, largest: float) -> tuple:
    """Rounds once to the tensor's dtype and counts what moved."""
    with np.errstate(over="ignore"):  # beyond the dtype's range is an infinity, refused below
        new = np.ascontiguousarray(exact.astype(info.dtype, copy=False))
    if not np.isfinite(new).all():
        culprit = "the result" if np.isfinite(old).all() else "the base"
        raise RunError(f"{info.name}: NaN or infinity in {culprit}: nothing was written")
    return info.name, new, TensorChange(info.size, int(np.count_nonzero(old != new)), largest)
