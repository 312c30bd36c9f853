"""Byte ranges of a folder of files, wherever it lies: a local disk, a bucket, or the Hugging Face Hub.

A Source lists its files and reads ranges of them; nothing is staged on disk. Long reads from far away are cut
into parts that are fetched side by side, and an interrupted part is asked for again, a bounded number of
times, counted and said.
"""

import hashlib
import os
import re
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.storage.retry import ATTEMPTS, explain, persist

T = TypeVar("T")

# Of `gemma-tpu stage`: they describe a folder and are no part of the checkpoint in it.
MANIFEST, UNFINISHED = "gemma-tpu-manifest.json", "gemma-tpu-unfinished.json"
# Never needed beside a checkpoint's own shards: the same weights in other formats, bookkeeping of git and hub.
OTHER_WEIGHTS = ("*.bin", "*.gguf", "*.pt", "*.pth", "*.onnx", "*.msgpack", "*.h5", "*.npz")
HIDDEN = (".*", "*/.*")

_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 8
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_VERSIONS = ("etag", "ETag", "md5Hash", "crc32c", "generation", "mtime", "updated", "LastModified", "created")


@dataclass(frozen=True)
class File:
    """A file of a source; the checksums are those that the store itself vouches for."""

    name: str  # relative to the source, with forward slashes
    size: int
    version: str = ""  # changes when the content does
    sha256: str | None = None
    git_sha1: str | None = None


class Source(ABC):
    """A folder of files that can be listed and read in ranges."""

    reads_at_once = 1  # how many reads a caller should have under way to keep it busy
    retries = 0

    def __init__(self, where: str):
        self.where = where

    @abstractmethod
    def list(self, recursive: bool = False) -> dict[str, File]:
        """The files by name; those of folders inside only where asked for."""

    @abstractmethod
    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fills `view` with the file's bytes from `start` on."""

    @abstractmethod
    def local_files(self) -> Path:
        """A folder on this machine that holds the small files: config, tokenizer, template."""

    def size(self, name: str) -> int:
        return self.list()[name].size

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        out = bytearray((self.size(name) if end is None else end) - start)
        self.read_into(name, start, memoryview(out))
        return out


class LocalSource(Source):
    """A folder of this machine, read by pread: every read opens the file, reads and closes it."""

    reads_at_once = 4

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.folder = folder

    def list(self, recursive: bool = False) -> dict[str, File]:
        files = {}
        for place, folders, names in os.walk(self.folder, onerror=self._refuse):
            for name in names:
                path = Path(place, name)
                if path.is_file():
                    status = path.stat()
                    relative = path.relative_to(self.folder).as_posix()
                    files[relative] = File(relative, status.st_size, str(status.st_mtime_ns))
            if not recursive:
                folders.clear()
        return files

    def size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise UserError(f"{self.folder / name} cannot be read: {error.strerror}") from None

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        done = 0
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                while done < len(view):
                    # The kernel gives at most 2 GiB a call.
                    count = os.preadv(file.fileno(), [view[done:]], start + done)
                    if count == 0:
                        raise RunError(f"{self.folder / name} ended at byte {start + done} of the "
                                       f"{start + len(view)} expected: it was changed while it was read")
                    done += count
        except OSError as error:
            kind = RunError if done else UserError
            raise kind(f"{self.folder / name} cannot be read: {error.strerror}") from None

    def local_files(self) -> Path:
        return self.folder

    def _refuse(self, error: OSError) -> None:
        raise UserError(f"{self.folder} cannot be opened ({error.strerror}): give the path of a downloaded "
                        "checkpoint folder, a gs:// or s3:// URL, or hf://org/name") from None


class RemoteSource(Source):
    """What bucket and hub share: parts fetched side by side, retries, the cache of small files."""

    reads_at_once = 16

    def __init__(self, where: str):
        super().__init__(where)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._listed: dict[bool, dict[str, File]] = {}

    @abstractmethod
    def _fetch(self, name: str, start: int, end: int) -> bytes:
        """One range in one request; whatever it raises or leaves out is this class's to judge."""

    @abstractmethod
    def _list(self, recursive: bool) -> dict[str, File]: ...

    def list(self, recursive: bool = False) -> dict[str, File]:
        if recursive not in self._listed:
            found = self._again(lambda: self._list(recursive), f"listing {self.where}")
            bad = sorted(name for name in found if not _is_inside(name))
            if bad:
                raise UserError(f"{self.where} holds names that are no plain relative paths: "
                                f"{', '.join(map(ascii, bad))}")
            self._listed[recursive] = found
        return self._listed[recursive]

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        cuts = range(0, len(view), _PART_BYTES)
        if len(cuts) <= 1:
            self._read_part(name, start, view)
            return
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(_PARTS_AT_ONCE, "range-read")
        parts = [self._pool.submit(self._read_part, name, start + cut, view[cut : cut + _PART_BYTES])
                 for cut in cuts]
        try:
            for part in parts:
                part.result()
        finally:
            for part in parts:
                part.cancel()

    def _read_part(self, name: str, start: int, view: memoryview) -> None:
        def fetch() -> None:
            data = self._fetch(name, start, start + len(view))
            if len(data) != len(view):
                raise EOFError(f"a short read: {len(data)} of {len(view)} bytes came")
            view[:] = data

        what = f"reading bytes {start} to {start + len(view)} of {self.where}/{name}"
        try:
            if len(view):
                self._again(fetch, what)
        except (RunError, UserError):
            raise
        except Exception as error:  # gone, refused: it was there and readable when it was listed
            raise RunError(f"{what} failed: {explain(error)}") from None

    def _again(self, action: Callable[[], T], what: str, attempts: int = ATTEMPTS) -> T:
        return persist(action, what, attempts, self.count_retry)

    def count_retry(self) -> None:
        with self._lock:
            self.retries += 1

    def local_files(self) -> Path:
        files = {name: file for name, file in self.list(recursive=True).items() if is_small(name)}
        identity = repr([(file.name, file.size, file.version) for file in files.values()])
        key = hashlib.sha256(f"{self.where}\n{identity}".encode()).hexdigest()[:32]
        folder = cache_root() / key
        if not folder.exists():
            try:
                self._copy_here(files, folder)
            except OSError as error:
                raise RunError(f"the config and tokenizer of {self.where} cannot be kept in {folder} "
                               f"({error.strerror}): set XDG_CACHE_HOME to a folder with room") from None
        return folder

    def _copy_here(self, files: dict[str, File], folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, file in files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_bytes(self.read(name, 0, file.size))
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its folder is the same
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)


class BucketSource(RemoteSource):
    """A folder of any filesystem that fsspec knows; gs:// and s3:// are extras of this package."""

    def __init__(self, url: str):
        super().__init__(url.rstrip("/"))
        self.fs, self.base = _filesystem(self.where)
        self.base = self.base.rstrip("/")

    def path(self, name: str) -> str:
        return f"{self.base}/{name}"

    def refresh(self) -> None:
        self._listed.clear()

    def list(self, recursive: bool = False) -> dict[str, File]:
        try:
            return super().list(recursive)
        except (RunError, UserError):
            raise
        except FileNotFoundError:
            raise UserError(f"{self.where}: there is nothing of that name") from None
        except Exception as error:  # refused, and every store's client says so in its own way
            raise UserError(f"{self.where} cannot be listed ({explain(error)}): {_CREDENTIALS}") from None

    def _list(self, recursive: bool) -> dict[str, File]:
        self.fs.invalidate_cache()  # what another process has written since counts too
        if recursive:
            found = list(self.fs.find(self.base, detail=True).values())
        else:
            found = self.fs.ls(self.base, detail=True)
        files = {}
        for info in found:
            name = info["name"].lstrip("/").removeprefix(self.base.lstrip("/")).lstrip("/")
            if info["type"] == "file" and name:
                version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
                files[name] = File(name, int(info["size"]), version)
        return files

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        found: bytes = self.fs.cat_file(self.path(name), start=start, end=end)
        return found


def restore_url(where: str | Path) -> str:
    """The text as it was given: Path() takes one of the two slashes of gs://bucket."""
    return re.sub(r"^([a-z][a-z0-9+.-]+):/(?=[^/])", r"\1://", str(where))


def is_small(name: str) -> bool:
    """What is copied to this machine of a remote checkpoint: everything but weights and bookkeeping."""
    left = (*OTHER_WEIGHTS, *HIDDEN, "*.safetensors", MANIFEST, UNFINISHED)
    return not any(fnmatch(name, pattern) for pattern in left)


def cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma_tpu" / "checkpoints"


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        raise UserError(f"{url}: a web address cannot be listed; use a local folder, gs://, s3:// or hf://org/name")
    try:
        fs, base = fsspec.core.url_to_fs(url)
        return fs, base
    except ImportError as error:
        if scheme in _EXTRAS:
            raise UserError(f"{url}: reading {scheme}:// needs one more package: "
                            f"pip install 'gemma_tpu[{_EXTRAS[scheme]}]'") from None
        raise UserError(f"{url}: {explain(error)}") from None
    except ValueError as error:
        raise UserError(f"{url}: {explain(error)}; use a local folder, gs://, s3:// or hf://org/name") from None
    except Exception as error:  # clients look for credentials here, and each fails in its own way
        raise UserError(f"{url} cannot be opened ({explain(error)}): {_CREDENTIALS}") from None


_CREDENTIALS = ("check its name, and your access: `gcloud auth application-default login` for gs://, "
                "AWS_PROFILE or AWS_ACCESS_KEY_ID for s3://")


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and name.isprintable() and "\\" not in name and not {"", ".", ".."} & {*parts}
