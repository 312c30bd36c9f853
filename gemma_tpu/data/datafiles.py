"""From what data.path says to the files behind it, here or far away, in an order that does not depend on the disk.

A name is a file, a folder (every data file in it), a pattern like data/*.jsonl, or one of these behind gs://, s3:// or
hf://datasets/org/name/; hf://datasets/org/name alone is a dataset of the hub, read through the datasets library.
"""

import gzip
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl

from gemma_tpu.assets import resolve
from gemma_tpu.errors import UserError
from gemma_tpu.storage.remote import BucketSource, Source, restore_url

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".md": "text",
}  # fmt: skip
BUFFER = 8 << 20  # bytes that are asked of a bucket at a time


@dataclass(frozen=True)
class DataFile:
    """One file of rows, or one dataset of the hub."""

    where: str  # as messages name it
    name: str
    kind: str
    identity: str  # changes when the content does; empty where that cannot be known
    source: Source | None = None  # where it is not on this machine
    origin: int = 0  # which entry of data.path it belongs to
    size: int = 0

    def open(self) -> BinaryIO:
        try:
            stream = open(self.where, "rb") if self.source is None else self._remote(self.source)
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read: {error.strerror}") from None
        return cast(BinaryIO, _Gzip(stream)) if self.name.endswith(".gz") else stream

    def _remote(self, source: Source) -> BinaryIO:
        return io.BufferedReader(_Ranges(source, self.name, self.size), BUFFER)


class _Gzip(gzip.GzipFile):
    """Closes what it reads from."""

    def __init__(self, under: BinaryIO):
        self._under = under
        super().__init__(fileobj=under)

    def close(self) -> None:
        super().close()
        self._under.close()


class _Ranges(io.RawIOBase):
    """A file of a Source as a stream that can seek; each read is one that the source repeats when interrupted."""

    def __init__(self, source: Source, name: str, size: int):
        self._source, self._name, self._size, self._at = source, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:  # whatever has memory; that type has a name from Python 3.12 on
        view = memoryview(buffer)
        count = max(0, min(len(view), self._size - self._at))
        self._source.read_into(self._name, self._at, view[:count])
        self._at += count
        return count


def expand(path: str | Path | Sequence[str | Path], key: str = "data.path") -> list[DataFile]:
    """Every file that data.path names; all that names nothing is refused at once."""
    names = [path] if isinstance(path, str | Path) else list(path)
    if not names:
        raise UserError(f"{key} is an empty list: name at least one file")
    found: list[DataFile] = []
    wrong: list[str] = []
    for origin, name in enumerate(names):
        try:
            found += _files(restore_url(name), origin)
        except UserError as error:
            wrong.append(f"  {error}")
    if wrong:
        raise UserError("\n".join([f"{key} must name files of rows:", *wrong]))
    return found


def is_here(path: str | Sequence[str]) -> bool:
    """Whether all of it lies on this machine, so that reading it costs nothing."""
    names = [path] if isinstance(path, str) else path
    try:
        return not any("://" in restore_url(name) for name in names) and bool(expand(path))
    except UserError:
        return False


def _files(name: str, origin: int) -> list[DataFile]:
    if "://" in name and not name.startswith("file://"):
        return _remote(name, origin)
    path = resolve(name.removeprefix("file://"))
    if path.is_file():
        return [_local(path, origin)]
    if path.is_dir():
        inside = [p for p in sorted(path.rglob("*")) if p.is_file() and kind_of(p.name) and not _hidden(p, path)]
        if not inside:
            raise UserError(f"{path}: a folder without data files ({', '.join(KINDS)}, also .gz)")
        return [_local(p, origin) for p in inside]
    if re.search(r"[*?\[]", path.name):
        inside = sorted(p for p in path.parent.glob(path.name) if p.is_file() and not _hidden(p, path.parent))
        if not inside:
            raise UserError(f"{path}: no file fits the pattern")
        return [_local(p, origin) for p in inside]
    raise UserError(f"{path}: no such file")


def kind_of(name: str) -> str | None:
    return KINDS.get(Path(name.removesuffix(".gz")).suffix.lower())


def _local(path: Path, origin: int) -> DataFile:
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return DataFile(str(path), path.name, kind_of(path.name) or "jsonl", identity, None, origin, status.st_size)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _remote(url: str, origin: int) -> list[DataFile]:
    if url.startswith("hf://"):
        dataset = _hub_dataset(url, origin)
        if dataset is not None:
            return [dataset]
        if not url.startswith("hf://datasets/"):
            raise UserError(f"{url}: a dataset of the hub is written hf://datasets/org/name[@revision][?split=train], "
                            "a file of it hf://datasets/org/name/file.jsonl")  # fmt: skip
    folder, _, last = url.rstrip("/").rpartition("/")
    pattern = bool(re.search(r"[*?\[]", last))
    found, source = [], None
    if not folder.endswith(":/"):  # else `last` is a whole bucket
        source = BucketSource(folder)
        files = source.list().values()
        found = [file for file in files if (fnmatch(file.name, last) if pattern else file.name == last)]
    if not found and not pattern:
        source = BucketSource(url)
        found = [file for file in source.list(recursive=True).values() if kind_of(file.name)]
    if source is None or not found:
        raise UserError(f"{url}: no data file of that name")
    return [
        DataFile(f"{source.where}/{file.name}", file.name, kind_of(file.name) or "jsonl",
                 f"{source.where}/{file.name} {file.size} {file.version}" if file.version else "",
                 source, origin, file.size)
        for file in sorted(found, key=lambda file: file.name)
    ]  # fmt: skip


HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^?/@]+))?(?:\?(.*))?")


def _hub_dataset(url: str, origin: int) -> DataFile | None:
    """hf://datasets/org/name[@revision][?split=train&name=main], which the datasets library reads."""
    found = HUB.fullmatch(url.rstrip("/"))
    if found is None:
        return None
    options = dict(parse_qsl(found[3] or "", keep_blank_values=True))
    unknown = sorted(options.keys() - {"split", "name"})
    if unknown:
        raise UserError(f"{url}: {', '.join(unknown)} is unknown after the ?; split=... and name=... can stand there")
    commit = _commit(found[1], found[2])
    identity = f"{url} {commit}" if commit else ""
    return DataFile(url, found[1].rpartition("/")[2], "hub", identity, None, origin)


def _commit(repo: str, revision: str | None) -> str | None:
    """What the revision is now; None where the hub cannot be asked, and then nothing is cached."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, revision=revision).sha
    except Exception:  # offline, gated, renamed: opening it says which, this only decides about the cache
        return None
