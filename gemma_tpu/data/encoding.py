"""Rows into token ids and masks, a chunk at a time: the work that is done by all cores side by side.

Which process does a chunk changes nothing: a chunk's result is a function of the chunk and of the settings.
"""

import hashlib
import itertools
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gemma_tpu.data.formats import Conversation, Preference, RowFault, Text
from gemma_tpu.data.rows import Account, Chunk, Converter, Row
from gemma_tpu.data.tokenizer import Draft, Rendered, Tools, TrainOn
from gemma_tpu.errors import UserError

SIDES = ("chosen", "rejected")
THOUGHTS_LOST = "messages whose reasoning the chat template leaves out"


class Tokenizer(Protocol):
    """A row is drafted, its texts are encoded among those of other rows, and then it is finished."""

    pad_id: int

    def draft(self, messages: list[dict[str, Any]], train_on: TrainOn, *, tools: Tools = None) -> Draft: ...
    def draft_text(self, text: str) -> Draft: ...
    def encode_all(self, texts: list[str]) -> list[list[int]]: ...
    def finish(self, draft: Draft, encoded: Iterator[list[int]]) -> Rendered: ...


@dataclass(frozen=True)
class Settings:
    """All that shapes the tokens of a row beside the row itself and the tokenizer."""

    columns: dict[str, str]
    transforms: tuple[str, ...]
    train_on: TrainOn
    side: str = ""  # of preference pairs: which answer


@dataclass
class Encoded:
    """The rows of a chunk end to end, and the account of those that are not among them."""

    ids: "array[int]" = field(default_factory=lambda: array("i"))
    mask: bytearray = field(default_factory=bytearray)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    targets: "array[int]" = field(default_factory=lambda: array("q"))
    files: "array[int]" = field(default_factory=lambda: array("i"))
    lines: "array[int]" = field(default_factory=lambda: array("q"))
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    account: Account = field(default_factory=Account)

    def add(self, row: Row, ids: list[int], mask: list[bool]) -> None:
        row_ids, row_mask = array("i", ids), bytes(mask)
        self.ids.extend(row_ids)
        self.mask += row_mask
        self.lengths.append(len(ids))
        self.targets.append(row_mask.count(1))
        self.files.append(row.place.file)
        self.lines.append(row.place.line)
        digest = hashlib.blake2b(row_ids.tobytes() + row_mask, digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little"))


@dataclass
class Drafted:
    """A chunk whose texts are still to be encoded."""

    rows: list[tuple[Row, Draft]]
    texts: list[str]
    account: Account


class Encoder:
    """One process's share of the work."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer):
        self._settings, self.tokenizer = settings, tokenizer
        self._converter = Converter(settings.columns, settings.transforms)

    def __call__(self, chunk: Chunk) -> Encoded:
        drafted = self.draft(chunk)
        return self.finish(drafted, self.tokenizer.encode_all(drafted.texts))

    def draft(self, chunk: Chunk) -> Drafted:
        if chunk.form == "preference" and not self._settings.side:
            raise UserError(f"{chunk.records[0][0].text} is a preference pair (chosen and rejected), which has no "
                            "single answer to train on: this recipe takes conversations or text")  # fmt: skip
        out = Drafted([], [], Account())
        for row in self._converter.rows(chunk, out.account):
            try:
                draft = self._drafted(row)
            except UserError as error:
                out.account.fault(RowFault("template", str(error)), row.place.text)
            else:
                out.rows.append((row, draft))
                out.texts += draft.texts
        return out

    def _drafted(self, row: Row) -> Draft:
        parsed, train_on = row.parsed, self._settings.train_on
        if isinstance(parsed, Text):
            return self.tokenizer.draft_text(parsed.text)
        if isinstance(parsed, Preference):
            messages = parsed.prompt + getattr(parsed, self._settings.side)
            return self.tokenizer.draft(messages, train_on, tools=parsed.tools)
        assert isinstance(parsed, Conversation)
        return self.tokenizer.draft(parsed.messages, train_on, tools=parsed.tools)

    def finish(self, drafted: Drafted, ids: list[list[int]]) -> Encoded:
        out, encoded = Encoded(account=drafted.account), iter(ids)
        for row, draft in drafted.rows:
            found = self.tokenizer.finish(draft, encoded)
            if len(found.ids) != len(found.mask):
                raise ValueError(f"{row.place.text}: {len(found.ids)} ids and {len(found.mask)} mask entries")
            if found.lost:
                out.account.said[THOUGHTS_LOST] += found.lost
            mask = [False, *found.mask[1:]]  # nothing stands before the first token: it is never a target
            if any(mask):
                out.add(row, found.ids, mask)
            else:
                out.account.fault(RowFault("no_target", "no token of it is trained"), row.place.text)
        return out


def encode(chunks: Iterable[Chunk], encoder: Encoder, pool: Any, alone: float) -> Iterator[Encoded]:
    """Every chunk's result, in order. For `alone` seconds they are made here, and on until the processes are ready:
    starting them takes seconds of every core, in which a small file is done. A chunk is drafted while the texts of the
    one before are encoded, which all cores do and which leaves this thread free."""
    waiting, start = iter(chunks), time.monotonic()
    held = None
    with ThreadPoolExecutor(1, "encode") as thread:
        for chunk in waiting:
            if pool is not None and time.monotonic() - start >= alone and pool.ready():
                waiting = itertools.chain([chunk], waiting)
                break
            drafted = encoder.draft(chunk)
            under_way = thread.submit(encoder.tokenizer.encode_all, drafted.texts)
            if held is not None:
                yield encoder.finish(held[0], held[1].result())
            held = drafted, under_way
        if held is not None:
            yield encoder.finish(held[0], held[1].result())
    if pool is not None:
        yield from pool.ordered(waiting)


def arrays(encoded: Encoded) -> dict[str, np.ndarray]:
    """Views of a chunk's columns, by name."""
    return {
        "ids": np.frombuffer(encoded.ids, np.int32), "mask": np.frombuffer(encoded.mask, np.bool_),
        "lengths": np.frombuffer(encoded.lengths, np.int64), "targets": np.frombuffer(encoded.targets, np.int64),
        "files": np.frombuffer(encoded.files, np.int32), "lines": np.frombuffer(encoded.lines, np.int64),
        "hashes": np.frombuffer(encoded.hashes, np.uint64),
    }  # fmt: skip
