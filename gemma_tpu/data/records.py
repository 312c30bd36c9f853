"""The raw records of a file, one after the other, each with the place that a person can find it at.

A file is streamed: JSONL line by line, a JSON array and Parquet piece by piece, so that none needs to fit in memory.
A record is the bytes of a JSONL line (what is wrong in it is its own affair), or a mapping, or a Fault where the
format of the file itself broke for one row. A file that breaks as a whole is a UserError.
"""

import codecs
import csv
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemma_tpu.data.datafiles import HUB, DataFile
from gemma_tpu.errors import UserError
from gemma_tpu.storage.retry import explain, told

BATCH = 256  # rows of a Parquet file that are held at a time
BLOCK = 1 << 20  # bytes of a JSON array that are read at a time


@dataclass(frozen=True)
class Fault:
    """A row that the file's own format does not let through."""

    reason: str
    detail: str


Raw = bytes | dict[str, Any] | Fault
Placed = tuple[int, Raw]  # the line (JSONL, CSV) or the number of the row, from 1


def records(file: DataFile) -> Iterator[Placed]:
    """Every record of the file, blank lines of JSONL included."""
    try:
        yield from _READERS[file.kind](file)
    except (EOFError, OSError, zlib.error) as error:  # gzip raises all three on a damaged file
        raise UserError(f"{file.where}: cannot be read: {told(error) or 'it is damaged'}") from None


def _jsonl(file: DataFile) -> Iterator[Placed]:
    with file.open() as stream:  # bytes: a bad encoding must be nameable by its line
        yield from enumerate(stream, start=1)


def _text(file: DataFile) -> Iterator[Placed]:
    """The whole file is one document."""
    with file.open() as stream:
        raw = stream.read()
    try:
        yield 1, {"text": raw.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield 1, Fault("not_UTF-8", f"byte {error.start} is 0x{raw[error.start]:02x}")


def _json(file: DataFile) -> Iterator[Placed]:
    """An array of objects; or one object a line, which many call .json too; or an object around one array."""
    with file.open() as stream:
        head = stream.read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    if head[:1] == b"[":
        yield from _array(file)
        return
    first = head.split(b"\n", 1)[0]
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        yield from _object(file)
        return
    lines = _jsonl(file)
    one = next(lines)
    second = next(lines, None)
    if second is None and (wrapped := _wrapped(json.loads(first))) is not None:
        yield from enumerate(map(_item, wrapped), start=1)
        return
    yield from itertools.chain([one], [second] if second else [], lines)


def _object(file: DataFile) -> Iterator[Placed]:
    """One object over several lines: a row by itself, or rows under one key."""
    with file.open() as stream:
        try:
            whole = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file.where}: not JSON: {error}") from None
    wrapped = _wrapped(whole)
    for number, item in enumerate([whole] if wrapped is None else wrapped, start=1):
        yield number, _item(item)


def _wrapped(whole: object) -> list[Any] | None:
    """The rows of {"data": [...]}: an object whose only value is a list of objects."""
    if isinstance(whole, dict) and len(whole) == 1:
        (key, value), = whole.items()
        if key in ("data", "train", "rows", "examples") and isinstance(value, list):
            return value
    return None


def _item(item: object) -> Raw:
    if isinstance(item, dict):
        return item
    return Fault("not_JSON", f"it is a JSON {type(item).__name__}, not an object")


def _array(file: DataFile) -> Iterator[Placed]:
    """The objects of an array, read a block at a time."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    with file.open() as stream:
        text, at, number, ended = "", 0, 0, False

        def more(size: int) -> None:
            nonlocal text, at, ended
            raw = stream.read(size)
            ended = not raw
            try:
                text, at = text[at:] + utf8.decode(raw, final=ended), 0
            except UnicodeDecodeError as error:
                raise UserError(f"{file.where}: after row {number} a byte is not UTF-8 ({error.reason})") from None

        more(BLOCK)
        at = text.index("[") + 1
        separated = True
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                separated |= text[at] == ","
                at += 1
            if at == len(text) and not ended:
                more(BLOCK)
                continue
            if text[at : at + 1] == "]":
                return
            try:
                if not separated:
                    raise ValueError("a comma is missing")
                item, end = decoder.raw_decode(text, at)
                if end == len(text) and not ended:
                    raise ValueError  # a number may go on in the next block
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError):
                    raise UserError(f"{file.where}: not JSON after row {number}: {error or 'it ends there'}") from None
                more(max(BLOCK, len(text) - at))  # twice as much, so that a long row is not read again and again
                continue
            number, at, separated = number + 1, end, False
            yield number, _item(item)


def _csv(file: DataFile) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)  # its own limit is 128 KiB, less than a long conversation
    with file.open() as stream:
        # Undecodable bytes come through as half surrogates, so that the row can be named and the rest be read.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, delimiter="\t" if file.name.removesuffix(".gz").endswith(".tsv") else ",")
        try:
            if not reader.fieldnames:
                return
            line = reader.line_num + 1
            for row in reader:
                yield line, _row(row)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{file.where}: not CSV at line {reader.line_num + 1}: {error}") from None


def _row(row: dict[str | Any, Any]) -> Raw:
    """Cells that are there and not empty; a row of another width than the header is one that broke."""
    if None in row:
        return Fault("wrong_columns", f"it has {len(row.pop(None))} more cells than the header")
    if None in row.values():
        return Fault("wrong_columns", f"it has {sum(v is None for v in row.values())} cells less than the header")
    if any("\udc80" <= letter <= "\udcff" for value in row.values() for letter in value if letter > "\ud7ff"):
        return Fault("not_UTF-8", "a cell is not UTF-8")
    return row


def _parquet(file: DataFile) -> Iterator[Placed]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.where}: reading Parquet needs one more package: "
                        "pip install 'gemma_tpu[parquet]'") from None  # fmt: skip
    try:
        with file.open() as stream:
            number = 0
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{file.where}: not a readable Parquet file: {told(error)}") from None


def _hub(file: DataFile) -> Iterator[Placed]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{file.where}: reading a dataset of the hub needs one more package: pip install "
                        "'gemma_tpu[datasets]'; a file needs none: hf://datasets/org/name/file.jsonl") from None
    from urllib.parse import parse_qsl

    named = HUB.fullmatch(file.where.rstrip("/"))
    assert named is not None, "only a name of this form is read from the hub"
    repo, revision, options = named.groups()
    chosen = dict(parse_qsl(options or ""))
    commit = file.identity.rpartition(" ")[2] or revision  # a push meanwhile changes nothing
    try:
        rows = datasets.load_dataset(repo, name=chosen.get("name"), split=chosen.get("split", "train"),
                                     revision=commit, streaming=True)  # fmt: skip
        for number, row in enumerate(rows, start=1):
            yield number, {name: value for name, value in row.items() if value is not None}
    except Exception as error:  # the library has one of its own for every cause: unknown split, no access, no network
        raise UserError(f"{file.where}: {explain(error)}") from None


_READERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet, "text": _text, "hub": _hub}
