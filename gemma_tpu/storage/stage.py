"""Copies a checkpoint from the hub (or anywhere) into a bucket, in chunks through memory: no disk is touched.

A record of what has arrived is kept in the target while the copy runs, so that a second call goes on where the
first stopped; the manifest, with the sha256 of every file, is written last and says that all is there.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.storage.ahead import in_order
from gemma_tpu.storage.hub import HubSource
from gemma_tpu.storage.remote import (
    HIDDEN,
    MANIFEST,
    OTHER_WEIGHTS,
    UNFINISHED,
    BucketSource,
    File,
    Source,
    restore_url,
)
from gemma_tpu.storage.retry import explain, persist
from gemma_tpu.storage.shards import Checkpoint, open_checkpoint
from gemma_tpu.storage.transfer import Transfer

_CHUNK_BYTES = 32 << 20  # also the part size of uploads: 10,000 parts are S3's limit, 312 GiB
_CHUNKS_AHEAD = 2
_UPLOADS = 3
# Here a file appears when its upload is complete; elsewhere it is written under another name and renamed.
_WHOLE_OBJECTS = {"gs", "gcs", "s3", "s3a", "abfs", "abfss", "az"}
_PARTIAL = ".gemma-tpu-partial"


@dataclass(frozen=True)
class Arrived:
    """A file of the target whose content has been checked; `version` is how the target tells it from a later one."""

    size: int
    sha256: str
    version: str
    origin: str  # the source's version of it


def stage(source: str | Path, target: str | Path, *, overwrite: bool = False,
          say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Copies every file of the checkpoint but foreign weight formats; what is there and right already stays.

    Raises UserError where the hub refuses (with the page to accept the licence on), where the source is no complete
    checkpoint, and where files of `target` would be lost; RunError where a copy does not have the source's checksum.
    """
    began = time.monotonic()
    bucket = _open_target(target)
    named = "://" in restore_url(source) or Path(source).exists()
    # Its headers: an incomplete source is refused before anything is copied.
    checkpoint = open_checkpoint(source if named else f"hf://{source}")
    origin = checkpoint.source
    licence, revision = (origin.licence, origin.revision) if isinstance(origin, HubSource) else (None, None)
    if licence is not None:
        say(f"{origin.where} at {revision}, licence: {licence}")
    files, left = _choose(checkpoint)
    if left:
        say(f"{len(left)} files are left behind, as no part of the checkpoint: {', '.join(left)}")
    copy = _Copy(origin, bucket, files)
    copy.check_target(overwrite)
    missing = copy.missing()
    say(f"{len(files) - len(missing)} of {len(files)} files are there and right; "
        f"{sum(file.size for file in missing) / 1e9:.2f} GB to copy")
    copy.run(missing)
    return {
        "source": origin.where, "revision": revision, "licence": licence,
        "target": bucket.where, "manifest": f"{bucket.where}/{MANIFEST}", "files": len(files), "copied": len(missing),
        "skipped": len(files) - len(missing), "left_out": left, "bytes": sum(file.size for file in missing),
        "retries": origin.retries + bucket.retries, "seconds": time.monotonic() - began,
    }  # fmt: skip


def _open_target(target: str | Path) -> BucketSource:
    url = restore_url(target)
    if url.startswith("hf://"):
        raise UserError(f"{url}: the target is a bucket (gs://, s3://) or a folder, not the hub")
    return BucketSource(url if "://" in url else str(Path(url).expanduser().absolute()))


def _choose(checkpoint: Checkpoint) -> tuple[dict[str, File], list[str]]:
    chosen, left = {}, []
    for name, file in sorted(checkpoint.source.list(recursive=True).items()):
        foreign = any(fnmatch(name, pattern) for pattern in (*OTHER_WEIGHTS, *HIDDEN))
        if name in checkpoint.shards or not (foreign or name.endswith(".safetensors") or _is_ours(name)):
            chosen[name] = file
        elif not _is_ours(name):
            left.append(name)
    return chosen, left


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, UNFINISHED)


class _Copy:
    """One copy under way: the files of `origin` that `bucket` is to hold, and those that it holds already."""

    def __init__(self, origin: Source, bucket: BucketSource, files: dict[str, File]):
        self.origin, self.bucket, self.files = origin, bucket, files
        try:
            self.there = bucket.list(recursive=True)
        except UserError:
            if bucket.fs.exists(bucket.base):  # it is there and cannot be listed
                raise
            self.there = {}
        self.record = self._read_record()
        found = self.record.get("files", {})
        self.arrived = {name: Arrived(**entry) for name, entry in found.items()}

    def _read_record(self) -> dict[str, Any]:
        for name in (UNFINISHED, MANIFEST):
            if name in self.there:
                path = self.bucket.path(name)
                record = plain.from_json(self.bucket.read(name, 0, self.there[name].size), path)
                if not isinstance(record, dict) or record.get("format") != 1:
                    raise UserError(f"{path} was not written by this version of gemma-tpu: choose another target")
                return record
        return {}

    def check_target(self, overwrite: bool) -> None:
        """Refuses to replace what a copy of this source did not put there."""
        if overwrite:
            return
        before = self.record.get("source")
        if before and before.partition("@")[0] != self.origin.where.partition("@")[0]:
            raise UserError(f"{self.bucket.where} holds a copy of {before}: choose another target for "
                            f"{self.origin.where}, or allow overwriting it")
        strange = [name for name, file in self.files.items()
                   if name in self.there and name not in self.arrived and not self._is_right(file)]
        if strange:
            raise UserError(f"{self.bucket.where} holds other files of the same names: {', '.join(strange)}; choose "
                            "another target, or allow overwriting them")

    def missing(self) -> list[File]:
        return [file for file in self.files.values() if not self._is_right(file)]

    def _is_right(self, file: File) -> bool:
        """Size and checksum: the recorded one if nothing was written since, else that of the bytes in the bucket."""
        there, known = self.there.get(file.name), self.arrived.get(file.name)
        if there is None or there.size != file.size:
            return False
        if known and there.version and (known.version, known.origin) == (there.version, file.version):
            return True
        if file.sha256 is None and file.git_sha1 is None:
            return False  # nothing to hold it against
        digest = _Digest(file)
        for chunk in _chunks(self.bucket, file):
            digest.update(chunk)
        if digest.problem() is not None:
            return False
        self.arrived[file.name] = Arrived(file.size, digest.sha256, there.version, file.version)
        return True

    def run(self, missing: list[File]) -> None:
        total, done = sum(file.size for file in missing), 0
        if missing:  # a manifest says that all is there, and from here on it is not
            self._write(UNFINISHED, self._state())
            if MANIFEST in self.there:
                self.bucket.fs.rm_file(self.bucket.path(MANIFEST))
        with Transfer("copied", self.origin) as transfer:

            def tell(before: int, part: int) -> None:
                transfer.update(before + part, total)

            for file in missing:
                transfer.update(done, total)
                self._copy(file, partial(tell, done))
                done += file.size
                transfer.update(done, total)
                self._write(UNFINISHED, self._state())
        self._write(MANIFEST, self._state())
        self.bucket.refresh()
        if UNFINISHED in self.bucket.list():
            self.bucket.fs.rm_file(self.bucket.path(UNFINISHED))

    def _copy(self, file: File, progress: Callable[[int], None]) -> None:
        def upload() -> str:
            digest, done = _Digest(file), 0
            with writing(self.bucket, file.name) as out:
                for chunk in _chunks(self.origin, file):
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    progress(done)
                problem = digest.problem()
                if problem is not None:
                    raise RunError(f"{file.name}: {problem}; it was not written, run this again")
            return digest.sha256

        sha256 = persist(upload, f"writing {self.bucket.path(file.name)}", _UPLOADS, self.bucket.count_retry)
        self.bucket.refresh()
        there = self.bucket.list(recursive=True).get(file.name)
        if there is None or there.size != file.size:
            size = "nothing" if there is None else f"{there.size} bytes"
            raise RunError(f"{self.bucket.path(file.name)}: {file.size} bytes were written and {size} arrived")
        self.arrived[file.name] = Arrived(file.size, sha256, there.version, file.version)

    def _state(self) -> dict[str, Any]:
        files = {name: asdict(self.arrived[name]) for name in sorted(self.files) if name in self.arrived}
        return {"format": 1, "source": self.origin.where, "revision": getattr(self.origin, "revision", None),
                "files": files}  # fmt: skip

    def _write(self, name: str, state: dict[str, Any]) -> None:
        def write() -> None:
            with writing(self.bucket, name) as out:
                out.write(json.dumps(state, indent=1).encode() + b"\n")

        persist(write, f"writing {self.bucket.path(name)}", _UPLOADS, self.bucket.count_retry)


class _Digest:
    """The checksums of a stream, held against those that the source vouches for."""

    def __init__(self, file: File):
        self._file, self._sha256 = file, hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if file.git_sha1 else None

    def update(self, chunk: bytes | bytearray) -> None:
        self._sha256.update(chunk)
        if self._git is not None:
            self._git.update(chunk)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def problem(self) -> str | None:
        if self._file.sha256 and self._file.sha256 != self.sha256:
            return f"its bytes have the sha256 {self.sha256}, the hub says {self._file.sha256}"
        if self._git is not None and self._git.hexdigest() != self._file.git_sha1:
            return f"its bytes have the git hash {self._git.hexdigest()}, the hub says {self._file.git_sha1}"
        return None


def _chunks(source: Source, file: File) -> Iterator[bytearray]:
    """The file in order, the next chunks being fetched while one is used."""
    with ThreadPoolExecutor(_CHUNKS_AHEAD, "chunks") as pool:
        starts = range(0, file.size, _CHUNK_BYTES)
        jobs = (partial(source.read, file.name, at, min(at + _CHUNK_BYTES, file.size)) for at in starts)
        yield from in_order(pool, jobs, _CHUNKS_AHEAD)


@contextmanager
def writing(bucket: BucketSource, name: str) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block ends well, and not at all when it does not."""
    fs, path = bucket.fs, bucket.path(name)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    if protocols & _WHOLE_OBJECTS:
        out = fs.open(path, "wb", block_size=_CHUNK_BYTES, autocommit=False)
        try:
            yield out
            out.close()
            out.commit()
        except BaseException:
            try:
                out.discard()
            except Exception as error:  # what stopped the copy matters more
                print(f"{path}: its unfinished upload could not be cancelled ({explain(error)}); it is invisible, and "
                      "the bucket's lifecycle rules for unfinished uploads clear it", file=sys.stderr)
            raise
        return
    fs.makedirs(fs._parent(path), exist_ok=True)
    try:
        with fs.open(path + _PARTIAL, "wb") as out:
            yield out
        fs.mv(path + _PARTIAL, path)
    except BaseException:
        if fs.exists(path + _PARTIAL):
            fs.rm_file(path + _PARTIAL)
        raise
