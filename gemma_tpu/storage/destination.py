"""Where a checkpoint is written: a folder that appears whole by one rename, or a bucket, which has no rename.

Both go on where an interrupted attempt at the same plan stopped: files that are complete stay. In a bucket every
object appears whole, and config.json and the index come last: until they are there, nothing takes it for a model.
"""

import errno
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.storage import stage, staging
from gemma_tpu.storage.remote import UNFINISHED, BucketSource, restore_url
from gemma_tpu.storage.retry import explain, persist
from gemma_tpu.storage.shards import INDEX_FILE

_UPLOADS = 3  # attempts
_LAST = (INDEX_FILE, "config.json")  # what makes a folder a model
_PART = ".part"
Write = Callable[[BinaryIO], None]


class Destination(ABC):
    """Files are written one after the other, each whole or not at all."""

    @abstractmethod
    def has(self, name: str, size: int) -> bool:
        """Did an interrupted attempt at the same plan complete this file?"""

    @abstractmethod
    def write(self, name: str, write: Write) -> None:
        """Lets `write(file)` fill the file."""

    def close(self) -> None:  # noqa: B027  (most have nothing to wait for)
        """Returns when all that was written is there for good."""

    @abstractmethod
    def free(self) -> int | None:
        """Bytes that are left; None where there is no telling."""

    def order(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: (name in _LAST, name))


class Folder(Destination):
    """The disk takes a file while the next one is computed; a file has its name only when the disk has it."""

    def __init__(self, partial: Path):
        self.partial = partial
        self._disk = ThreadPoolExecutor(1, "disk")
        self._last: Future[None] | None = None
        for name in list(staging.walk_names(partial)):
            if name.endswith(_PART):  # was being written when it was killed
                (partial / name).unlink()

    def has(self, name: str, size: int) -> bool:
        path = self.partial / name
        return path.is_file() and path.stat().st_size == size

    def write(self, name: str, write: Write) -> None:
        path = self.partial / name
        path.unlink(missing_ok=True)
        part = path.with_name(path.name + _PART)
        on_disk = staging.begin_file(part, write)

        def finish() -> None:
            on_disk()
            os.rename(part, path)

        self._settle()  # one file at a time is on its way
        self._last = self._disk.submit(finish)

    def close(self) -> None:
        try:
            self._settle()
        finally:
            self._disk.shutdown()

    def _settle(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def free(self) -> int:
        return shutil.disk_usage(self.partial).free


class Bucket(Destination):
    def __init__(self, bucket: BucketSource, plan: str):
        self.bucket, self.plan = bucket, plan
        self.done: dict[str, int] = {}

    def has(self, name: str, size: int) -> bool:
        return self.done.get(name) == size

    def write(self, name: str, write: Write) -> None:
        size = 0

        def upload() -> None:
            nonlocal size
            with stage.writing(self.bucket, name) as out:
                write(out)
                size = out.tell()

        self._persist(upload, name)
        self.done[name] = size
        self.record()

    def free(self) -> None:
        return None

    def record(self) -> None:
        text = json.dumps({"format": 1, "plan": self.plan, "done": self.done, "files": {}}, indent=1)

        def upload() -> None:
            with stage.writing(self.bucket, UNFINISHED) as out:
                out.write(text.encode())

        self._persist(upload, UNFINISHED)

    def remove(self, name: str) -> None:
        self.bucket.fs.rm_file(self.bucket.path(name))

    def _persist(self, upload: Callable[[], None], name: str) -> None:
        persist(upload, f"writing {self.bucket.path(name)}", _UPLOADS, self.bucket.count_retry)


@contextmanager
def opened(out: str | Path, plan: str, files: set[str], overwrite: bool) -> Iterator[Destination]:
    """The place to write `files` to. `plan` tells one merge from another: only its own half-done work is taken up.

    Raises UserError where something of the user's would be lost, RunError where the disk or the bucket fails.
    """
    text = restore_url(out)
    if "://" in text and not text.startswith("file://"):
        with _bucket(text, plan, files, overwrite) as bucket:
            yield bucket
        return
    where = Path(text.removeprefix("file://")).expanduser()
    try:
        with staging.staged(where, files, overwrite, plan) as partial:
            with closing(Folder(partial)) as folder:
                yield folder
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise RunError(f"writing {where} failed: {reason}. {where} is as it was before") from error


@contextmanager
def _bucket(url: str, plan: str, files: set[str], overwrite: bool) -> Iterator[Bucket]:
    if url.startswith("hf://"):
        raise UserError(f"{url}: write to a folder or a bucket (gs://, s3://), and push that to the hub")
    bucket = BucketSource(url)
    there = _listed(bucket)
    target = Bucket(bucket, plan)
    record = _record(bucket, there)
    if record.get("plan") == plan:
        target.done = {name: size for name, size in record["done"].items()
                       if name in there and there[name] == size}  # fmt: skip
    elif there:
        _check(url, there, files, overwrite or "plan" in record)
    # What would make the half-written place a model, or be left over beside the new one, goes first.
    target.record()
    for name in sorted(there, key=lambda name: name not in _LAST):
        if name not in target.done and name != UNFINISHED:
            target.remove(name)
    try:
        yield target
    except (UserError, RunError, KeyboardInterrupt):
        raise
    except Exception as error:  # every store's client says in its own way what is wrong
        raise RunError(f"writing {url} failed: {explain(error)}; the same command again goes on from what is "
                       "there") from error
    target.remove(UNFINISHED)
    bucket.refresh()


def _listed(bucket: BucketSource) -> dict[str, int]:
    try:
        return {name: file.size for name, file in bucket.list(recursive=True).items()}
    except UserError:
        if bucket.fs.exists(bucket.base):  # it is there and cannot be listed
            raise
        return {}


def _record(bucket: BucketSource, there: dict[str, int]) -> dict[str, Any]:
    if UNFINISHED not in there:
        return {}
    found = plain.from_json(bucket.read(UNFINISHED, 0, there[UNFINISHED]), bucket.path(UNFINISHED))
    return found if isinstance(found, dict) and isinstance(found.get("done"), dict) else {}


def _check(url: str, there: dict[str, int], files: set[str], overwrite: bool) -> None:
    """The rule of local folders: without `overwrite` nothing may be there, with it nothing may be lost."""
    if not overwrite:
        raise UserError(f"{url} is not empty: choose another place, or allow overwriting it")
    lost = sorted(name for name in there if name not in files and name != UNFINISHED
                  and not any(fnmatch(name, pattern) for pattern in staging.REPLACEABLE))  # fmt: skip
    if lost:
        raise UserError(f"overwriting {url} would lose files that the new model does not have: "
                        f"{', '.join(lost[:20])}; move them away or choose another place")
