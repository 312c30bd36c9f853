"""A corpus is a dataset ready to train on: tokenised rows in flat arrays, and the account of every row read.

Nothing is dropped in silence: a row is kept, or counted under a reason with the lines it happened on, and a
corpus that could not train anything is refused by the rule that emptied it.

Shapes: N kept rows.
"""

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemma_tpu.errors import UserError
from gemma_tpu.packing import padding_waste
from gemma_tpu.rows import Message, Reader, Row, Tally, paths_of

LANE = 128  # a recommended length is a multiple of the TPU's lane width
WORTH_KEEPING = 0.995  # the share of rows that the recommended length holds


class Tokenizer(Protocol):
    pad_id: int

    def training(self, messages: list[Message], train_on: str) -> tuple[list[int], list[bool]]: ...


class Section(Protocol):
    """The data section of the config, as far as it concerns this module."""

    path: str | Sequence[str]
    format: str
    max_seq_len: int
    train_on: str
    overlong: str
    limit: int | None
    transform: str | None


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows in flat arrays: a million rows are five arrays, not a million objects."""

    ids: np.ndarray  # int32, all kept rows end to end
    mask: np.ndarray  # bool, True where the token is a trained target
    offsets: np.ndarray  # int64 [N + 1]
    file_N: np.ndarray
    line_N: np.ndarray
    measured: np.ndarray  # length of every row that was tokenised, before any was dropped or cut
    files: list[Path]
    format: str
    rows: int
    dropped: Tally
    max_seq_len: int
    pad_id: int
    notes: list[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[row], self.offsets[row + 1])
        return self.ids[span], self.mask[span]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def target_tokens(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def percentiles(self) -> dict[str, int]:
        """Of the lengths as read: this is what max_seq_len is chosen by."""
        cuts = np.percentile(self.measured, [50, 90, 99, 100], method="higher").astype(int)
        return dict(zip(("p50", "p90", "p99", "max"), cuts.tolist(), strict=True))

    @cached_property
    def padding_waste(self) -> dict[str, float]:
        return padding_waste(self.lengths, self.max_seq_len)

    @property
    def recommended_max_seq_len(self) -> int:
        """The smallest multiple of 128 that holds 99.5 % of the rows as read."""
        needed = float(np.quantile(self.measured, WORTH_KEEPING, method="higher"))
        return int(-(-needed // LANE) * LANE)

    @cached_property
    def fingerprint(self) -> int:
        """Of the tokenised rows: a resumed run must see the rows that it was started on."""
        digest = zlib.crc32(np.ascontiguousarray(self.offsets))
        return zlib.crc32(np.ascontiguousarray(self.mask), zlib.crc32(np.ascontiguousarray(self.ids), digest))

    def where(self, row: int) -> str:
        """`train.jsonl:17`, the line that kept row `row` came from."""
        return f"{self.files[self.file_N[row]].name}:{self.line_N[row]}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": len(self),
            "dropped": dict(self.dropped.counts),
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "percentiles": self.percentiles,
            "padding_waste": self.padding_waste,
            "packing_efficiency": 1 - self.padding_waste["pack"],
            "recommended_max_seq_len": self.recommended_max_seq_len,
            "format": self.format,
            "notes": self.notes,
        }

    def report(self) -> str:
        table = [
            ("data", f"{', '.join(p.name for p in self.files)}, format {self.format}"),
            ("rows", f"{self.rows:,}"),
            ("kept", f"{len(self):,}"),
            ("dropped", f"{self.dropped.total():,}"),
        ]
        table += [(f"  {r}", f"{n:,} ({self.dropped.where(r)})") for r, n in self.dropped.counts.items()]
        table += [
            ("tokens", f"{self.tokens:,}"),
            ("target tokens", f"{self.target_tokens:,} ({self.target_tokens / self.tokens:.1%})"),
            ("length as read", "  ".join(f"{k} {v:,}" for k, v in self.percentiles.items())),
            ("max_seq_len", f"{self.max_seq_len:,} (99.5 % of rows fit in {self.recommended_max_seq_len:,})"),
            ("padding", "  ".join(f"{k} {v:.1%}" for k, v in self.padding_waste.items())),
        ]
        table += [("note", note) for note in self.notes]
        width = max(len(name) for name, _ in table)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in table)


class _Store:
    """Grows the flat arrays: C arrays, so that a token costs five bytes and not a Python object."""

    def __init__(self) -> None:
        self.ids, self.mask, self.offsets = array("i"), bytearray(), array("q", [0])
        self.files, self.lines, self.measured = array("i"), array("q"), array("q")
        self.cut, self.answered = 0, 0

    def add(self, row: Row, ids: list[int], mask: list[bool]) -> None:
        self.ids.fromlist(ids)
        self.mask.extend(mask)
        self.offsets.append(len(self.ids))
        self.files.append(row.file)
        self.lines.append(row.line)


def prepare(section: Section, tokenizer: Tokenizer, path: str | Sequence[str] | None = None) -> Prepared:
    """Reads and tokenises data.path. `path` names other rows under the same rules (held-out ones), without
    data.limit, which is a limit on training rows."""
    limit = section.limit if path is None else None
    paths = paths_of(section.path if path is None else path)
    reader = Reader(paths, section.format, section.transform, limit)
    store = _Store()
    for row in reader:
        try:
            ids, mask = tokenizer.training(row.messages, section.train_on)
        except UserError as error:
            reader.refuse("template", row.file, row.line, str(error))
            continue
        if len(ids) != len(mask):
            place = reader.place(row.file, row.line)
            raise ValueError(f"{place}: the tokenizer gave {len(ids)} ids and {len(mask)} mask entries")
        _keep(section, store, reader, row, ids, mask)
    reader.raise_refused()
    _check_kept(section, store, reader)
    notes = reader.notes()
    if store.cut:
        notes.append(f"data.overlong=truncate cut {store.cut:,} rows to {section.max_seq_len:,} tokens")
    return Prepared(
        ids=np.frombuffer(store.ids, np.int32),
        mask=np.frombuffer(store.mask, np.bool_),
        offsets=np.frombuffer(store.offsets, np.int64),
        file_N=np.frombuffer(store.files, np.int32),
        line_N=np.frombuffer(store.lines, np.int64),
        measured=np.frombuffer(store.measured, np.int64),
        files=reader.paths,
        format=reader.formats,
        rows=reader.rows,
        dropped=reader.dropped,
        max_seq_len=section.max_seq_len,
        pad_id=tokenizer.pad_id,
        notes=notes,
    )


def _keep(
    section: Section, store: _Store, reader: Reader, row: Row, ids: list[int], mask: list[bool]
) -> None:
    """Stores the row, or counts why not. The first token is never a target: nothing stands before it."""
    store.answered += any(m["role"] == "assistant" for m in row.messages)
    mask = [False, *mask[1:]]
    if not any(mask):
        reader.dropped.add("no_target", reader.place(row.file, row.line))
        return
    store.measured.append(len(ids))
    if len(ids) > section.max_seq_len:
        if section.overlong != "truncate":  # "error" too: every offender is found before the refusal
            reader.dropped.add("too_long", reader.place(row.file, row.line))
            return
        ids, mask = ids[: section.max_seq_len], mask[: section.max_seq_len]
        if not any(mask):
            reader.dropped.add("no_target_left_after_truncation", reader.place(row.file, row.line))
            return
        store.cut += 1
    store.add(row, ids, mask)


def _check_kept(section: Section, store: _Store, reader: Reader) -> None:
    """Refuses data that cannot train anything, by the rule that emptied it."""
    names = ", ".join(str(p) for p in reader.paths)
    dropped = reader.dropped.counts
    if not reader.rows:
        raise UserError(f"{names}: the dataset is empty; it must hold one JSON object a line")
    if section.overlong == "error" and dropped["too_long"]:
        raise UserError(
            f"{names}: {dropped['too_long']:,} of {reader.rows:,} rows are longer than data.max_seq_len "
            f"({section.max_seq_len:,}), the longest has {max(store.measured):,} tokens: "
            f"{reader.dropped.where('too_long')}. Raise data.max_seq_len, or choose another data.overlong"
        )
    if len(store.offsets) > 1:
        return
    if dropped["no_target"] == reader.rows:
        raise UserError(f"{names}: {_nothing_to_train(section, store, reader)}")
    if dropped["too_long"] == reader.rows:
        raise UserError(
            f"{names}: all {reader.rows:,} rows are longer than data.max_seq_len ({section.max_seq_len:,}): "
            f"the shortest has {min(store.measured):,} tokens, the longest {max(store.measured):,}. Raise "
            "data.max_seq_len, or set data.overlong: truncate"
        )
    reasons = "\n".join(f"  {r}: {n:,} ({reader.dropped.where(r)})" for r, n in dropped.items() if n)
    raise UserError(f"{names}: none of the {reader.rows:,} rows is left to train on; dropped:\n{reasons}")


def _nothing_to_train(section: Section, store: _Store, reader: Reader) -> str:
    """Two different mistakes end in an empty loss mask: rows without answers, and a mask that misses them."""
    rule = f"data.train_on={section.train_on} trains "
    rule += {"all": "every token but the first", "last_assistant": "the last assistant turn"}.get(
        section.train_on, "the assistant turns"
    )
    if not store.answered:
        return (
            f"none of the {reader.rows:,} rows has an assistant turn, and {rule}, so every loss mask is "
            "empty. Add the answers as assistant turns, or set data.train_on: all"
        )
    return (
        f"the loss masks of all {reader.rows:,} rows are empty, though {store.answered:,} have an assistant "
        f"turn; {rule}. The model folder's chat template does not render those turns where the mask looks"
    )
