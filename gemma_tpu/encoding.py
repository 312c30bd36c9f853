"""Rows into token ids and masks, a chunk at a time: the work that is done by all cores side by side.

Which process does a chunk changes nothing: a chunk's result is a function of the chunk and of the settings.
"""

import hashlib
import inspect
import itertools
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gemma_tpu.errors import UserError
from gemma_tpu.formats import Conversation, Preference, RowFault, Text
from gemma_tpu.rows import Account, Chunk, Converter, Row

SIDES = ("chosen", "rejected")


class Tokenizer(Protocol):
    pad_id: int

    def training(self, messages: list[dict[str, Any]], train_on: str) -> tuple[list[int], list[bool]]: ...


@dataclass(frozen=True)
class Settings:
    """All that shapes the tokens of a row beside the row itself and the tokenizer."""

    columns: dict[str, str]
    transforms: tuple[str, ...]
    train_on: str
    side: str = ""  # of preference pairs: which answer


@dataclass
class Encoded:
    """The rows of a chunk end to end, and the account of those that are not among them."""

    ids: array = field(default_factory=lambda: array("i"))
    mask: bytearray = field(default_factory=bytearray)
    lengths: array = field(default_factory=lambda: array("q"))
    targets: array = field(default_factory=lambda: array("q"))
    files: array = field(default_factory=lambda: array("i"))
    lines: array = field(default_factory=lambda: array("q"))
    hashes: array = field(default_factory=lambda: array("Q"))
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


class Encoder:
    """One process's share of the work."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer):
        self._settings, self._tokenizer = settings, tokenizer
        self._converter = Converter(settings.columns, settings.transforms)
        self._takes_tools = "tools" in inspect.signature(tokenizer.training).parameters

    def __call__(self, chunk: Chunk) -> Encoded:
        out = Encoded()
        if chunk.form == "preference" and not self._settings.side:
            raise UserError(f"{chunk.records[0][0].text} is a preference pair (chosen and rejected), which has no "
                            "single answer to train on: this recipe takes conversations or text")  # fmt: skip
        for row in self._converter.rows(chunk, out.account):
            try:
                ids, mask = self._tokens(row)
                if not any(mask):
                    raise RowFault("no_target", "no token of it is trained")
            except RowFault as fault:
                out.account.fault(fault, row.place.text)
            except UserError as error:
                out.account.fault(RowFault("template", str(error)), row.place.text)
            else:
                out.add(row, ids, mask)
        said = getattr(self._tokenizer, "said", None)  # what the template left out, as the tokenizer counts it
        if said:
            out.account.said.update(said)
            said.clear()
        return out

    def _tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """Ids and mask. The first token is never a target: nothing stands before it."""
        parsed = row.parsed
        if isinstance(parsed, Text):
            ids = self._tokenizer.encode(parsed.text, bos=True)
            eos = self._tokenizer.eos_id
            ids = ids if eos is None else [*ids, eos]
            return ids, [False] + [True] * (len(ids) - 1)
        if isinstance(parsed, Preference):
            ids, mask = self._rendered(parsed.prompt + getattr(parsed, self._settings.side), parsed.tools)
        else:
            assert isinstance(parsed, Conversation)
            ids, mask = self._rendered(parsed.messages, parsed.tools)
        if len(ids) != len(mask):
            raise ValueError(f"{row.place.text}: the tokenizer gave {len(ids)} ids and {len(mask)} mask entries")
        return ids, [False, *mask[1:]]

    def _rendered(self, messages: list[dict], tools: list[dict] | None) -> tuple[list[int], list[bool]]:
        if tools is None:
            return self._tokenizer.training(messages, self._settings.train_on)
        if not self._takes_tools:
            raise RowFault("template", "it declares tools, which the tokenizer cannot render")
        return self._tokenizer.training(messages, self._settings.train_on, tools=tools)


def encode(chunks: Iterable[Chunk], encoder: Encoder, pool: Any, alone: float) -> Iterator[Encoded]:
    """Every chunk's result, in order. For `alone` seconds they are made here, and on until the processes are ready:
    starting them takes seconds of every core, in which a small file is done."""
    waiting, start = iter(chunks), time.monotonic()
    for chunk in waiting:
        if pool is not None and time.monotonic() - start >= alone and pool.ready():
            yield from pool.ordered(itertools.chain([chunk], waiting))
            return
        yield encoder(chunk)


def arrays(encoded: Encoded) -> dict[str, np.ndarray]:
    """Views of a chunk's columns, by name."""
    return {
        "ids": np.frombuffer(encoded.ids, np.int32), "mask": np.frombuffer(encoded.mask, np.bool_),
        "lengths": np.frombuffer(encoded.lengths, np.int64), "targets": np.frombuffer(encoded.targets, np.int64),
        "files": np.frombuffer(encoded.files, np.int32), "lines": np.frombuffer(encoded.lines, np.int64),
        "hashes": np.frombuffer(encoded.hashes, np.uint64),
    }  # fmt: skip
