"""Writes a copy of a checkpoint in which some tensors are changed and every other byte is the base's own.

Shard by shard, in blocks of rows that the cores compute side by side and that are written in file order: memory is
that of a few blocks, whatever the size of the model. Shards keep their names, headers and offsets, unless new ones
of a given size are asked for; tensors that no update names are copied byte for byte.
"""

import hashlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma_tpu.adapter import updates
from gemma_tpu.adapter.updates import Edit, LowRank, Replace, TensorChange, Update
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.handoff.blas import single_threaded
from gemma_tpu.storage import layout
from gemma_tpu.storage.ahead import in_order
from gemma_tpu.storage.destination import Destination, Folder, opened
from gemma_tpu.storage.layout import Layout, OutShard
from gemma_tpu.storage.remote import restore_url
from gemma_tpu.storage.shards import INDEX_FILE, Checkpoint
from gemma_tpu.storage.staging import walk_names

__all__ = ["LowRank", "PatchReport", "Replace", "TensorChange", "Update", "peak_rss_mib", "write_patched"]

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "consolidated*", "tf_model*",
                "flax_model*", "adapter_model*", "*.gguf", "*.pt", "*.pth", "*.onnx")
_BOOKKEEPING = (".git/", ".cache/")  # of the download; .git may hold every weight a second time
Progress = Callable[[int, int], None]
Done = tuple[str, np.ndarray, TensorChange | None]  # a tensor's name, a block of it, what was changed in the block
Job = Callable[[], Done]


@dataclass
class PatchReport:
    """What was written. left_out: files of the base with other weights or bookkeeping of its download; resumed:
    shards that an interrupted attempt had finished, whose tensors are not in `changes`."""

    out: str
    tensors_changed: int
    tensors_copied: int
    bytes: int = 0
    seconds: float = 0.0
    peak_rss_mib: float = 0.0
    changes: dict[str, TensorChange] = field(default_factory=dict)
    files_copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)


def write_patched(base: Checkpoint, out: str | Path, changes: Mapping[str, Update], *,
                  copy_files: Callable[[str], bool] = lambda name: True, extra: Mapping[str, bytes] | None = None,
                  max_shard_bytes: int | None = None, overwrite: bool = False, workers: int | None = None,
                  progress: Progress | None = None) -> PatchReport:
    """Writes `base` with `changes` applied to `out`, a folder or a bucket, which holds a model only when all is there.

    `copy_files(relative name)` may turn down files beside the weights; `extra` are files to add, or to write in
    place of the base's; `progress(done, total)` gets bytes of weights. Raises UserError for updates that do not fit
    the base and for an `out` that is taken, RunError for values that are not finite and for a disk that fails or is
    too small.
    """
    began = time.monotonic()
    edits, extra = updates.check(base, changes), dict(extra or {})
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    plan = layout.like_base(base) if max_shard_bytes is None else layout.cut(base, max_shard_bytes)
    if plan.index is not None:
        extra[INDEX_FILE] = plan.index
    files, left_out = _other_files(base, keep_index=max_shard_bytes is None)
    left_out += [name for name in files if not copy_files(name)]
    files = [name for name in files if copy_files(name) and name not in extra]
    _refuse_nested(base, out)
    report = PatchReport(restore_url(out), len(edits), len(base.names()) - len(edits),
                         changes={name: TensorChange(base.info(name).size) for name in edits},
                         files_copied=files, left_out=sorted(left_out))  # fmt: skip
    with opened(out, _digest(base, edits, plan), {*files, *extra, *plan.files}, overwrite) as place:
        _check_space(base, plan, files, place, report)
        writer = _Writer(base, edits, place, report, progress)
        writer.write_shards(plan, workers or _workers(base))
        for name in place.order([*files, *extra]):
            writer.write_file(name, extra.get(name))
    report.seconds = time.monotonic() - began
    report.peak_rss_mib = peak_rss_mib()
    return report


def try_shard(base: Checkpoint, folder: Path, changes: Mapping[str, Update]) -> PatchReport:
    """The smallest shard that the updates change, written into `folder` and deleted again: will a merge work here?"""
    edits = updates.check(base, changes)
    plan = [one for one in layout.like_base(base).shards if any(info.name in edits for info in one.tensors)]
    shard = min(plan, key=lambda one: one.size)
    inside = {info.name: edits[info.name] for info in shard.tensors if info.name in edits}
    report = PatchReport(str(folder / shard.name), len(inside), len(shard.tensors) - len(inside))
    (folder / shard.name).unlink(missing_ok=True)
    try:
        with closing(Folder(folder)) as place:
            _Writer(base, inside, place, report, None).write_shards(Layout((shard,), None), _workers(base))
    except OSError as error:
        raise RunError(f"writing {report.out} failed: {error.strerror or error}") from error
    finally:
        (folder / shard.name).unlink(missing_ok=True)
    return report


def peak_rss_mib() -> float:
    """The most memory that this process has had resident, since it began."""
    status = Path("/proc/self/status")
    # getrusage would count what the parent held when it started this process; not every kernel has the line
    text = status.read_text() if status.exists() else ""
    if peak := re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE):
        return int(peak[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _workers(base: Checkpoint) -> int:
    """One for each core; from far away as many as keep the line busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores, base.source.reads_at_once if "://" in base.where else 1)


# --- checks before anything is written ---


def _digest(base: Checkpoint, edits: Mapping[str, Edit], plan: Layout) -> str:
    """Names this very merge: the base as its files stand now, every update, and what goes into which file."""
    there = base.source.list()
    versions = [(name, there[name].size, there[name].version) for name in sorted(base.shards)]
    shards = [(shard.name, hashlib.sha256(shard.header).hexdigest()) for shard in plan.shards]
    text = json.dumps([base.fingerprint(), versions, updates.digest(edits), shards])
    return hashlib.sha256(text.encode()).hexdigest()


def _other_files(base: Checkpoint, keep_index: bool) -> tuple[list[str], list[str]]:
    """(files to copy, files to leave) of all but the shards; refuses links that lead out of the folder."""
    root = base.folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # a hub cache: snapshots/<revision>/x -> ../../blobs/<hash>
        allowed.append(root.parent.parent / "blobs")
    copied, left, bad = [], [], []
    for name in walk_names(root):
        path = root / name
        target = path.resolve()
        if name in base.shards or (name == base.index_file and not keep_index):
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


def _refuse_nested(base: Checkpoint, out: str | Path) -> None:
    def path(where: str | Path) -> Path:
        text = restore_url(where)
        return Path("/", text.replace("://", "/")) if "://" in text else Path(text).resolve()

    one, other = path(base.where), path(out)
    if one == other or one.is_relative_to(other) or other.is_relative_to(one):
        raise UserError(f"{restore_url(out)} and the base {base.where} must be two folders, neither inside the other")


def _check_space(base: Checkpoint, plan: Layout, files: list[str], place: Destination, report: PatchReport) -> None:
    need = sum(shard.size for shard in plan.shards if not place.has(shard.name, shard.size))
    need += sum((base.folder / name).stat().st_size for name in files)
    free = place.free()
    if free is not None and need > free:
        raise RunError(f"the disk of {report.out} has {free / 2**30:.2f} GiB free and the result needs "
                       f"{need / 2**30:.2f} GiB: make room or choose another disk")


# --- writing ---


@dataclass
class _Writer:
    base: Checkpoint
    edits: Mapping[str, Edit]
    place: Destination
    report: PatchReport
    progress: Progress | None
    done: int = 0  # bytes of weights

    def write_file(self, name: str, content: bytes | None) -> None:
        """One of the other files: the base's, or with the content given."""

        def write(file: BinaryIO) -> None:
            file.write((self.base.folder / name).read_bytes() if content is None else content)

        self.place.write(name, write)
        self.report.bytes += (self.base.folder / name).stat().st_size if content is None else len(content)

    def write_shards(self, plan: Layout, workers: int) -> None:
        with single_threaded(), ThreadPoolExecutor(workers, "merge") as pool:
            for shard in plan.shards:
                if self.place.has(shard.name, shard.size):
                    self.report.resumed.append(shard.name)
                    for tensor in shard.tensors:
                        self.report.changes.pop(tensor.name, None)
                else:
                    self._write_shard(shard, pool, 2 * workers)
                self.report.bytes += shard.size
                self.done += shard.size - len(shard.header)

    def _write_shard(self, shard: OutShard, pool: ThreadPoolExecutor, window: int) -> None:
        """Blocks are computed by the pool and written here in file order, at most `window` of them in memory."""

        def write(file: BinaryIO) -> None:
            done = self.done
            for tensor in shard.tensors:  # from the start: an upload may be tried again
                if tensor.name in self.edits:
                    self.report.changes[tensor.name] = TensorChange(tensor.size)
            file.write(shard.header)
            for name, block, change in in_order(pool, self._jobs(shard), window):
                file.write(block.reshape(-1).view("u1").data)
                if change is not None:
                    self.report.changes[name].add(change)
                done += block.nbytes
                if self.progress is not None:
                    self.progress(done, self.base.total_bytes)

        self.place.write(shard.name, write)

    def _jobs(self, shard: OutShard) -> Iterator[Job]:
        """One job a block, in file order."""
        for info in shard.tensors:
            tensor = updates.Tensor(self.base, info, self.edits.get(info.name))
            for index in updates.blocks(info.shape):
                yield partial(tensor.block, index)
