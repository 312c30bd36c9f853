"""Preference rows: two answers to one prompt, tokenised, and laid out two by two on the sheets of the one loader.

They are read as every row is (`rows.Reader`, the format `preference`). Both answers of a pair lie on one sheet, one
after the other, as segments of their own.

Shapes: N pairs.
"""

import zlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gemma_tpu.data.encoding import THOUGHTS_LOST
from gemma_tpu.data.formats import Preference
from gemma_tpu.data.packing import Encoded
from gemma_tpu.data.rows import Reader, Row, Tally
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.data.turns import Message, RowFault
from gemma_tpu.errors import UserError
from gemma_tpu.schema import DataConfig

Pair = tuple[Encoded, Encoded]


class PairRows:
    """The usable pairs of some files, and the account of every row. `data.make_loader` takes it as it takes rows."""

    def __init__(self, section: DataConfig, tokenizer: Tokenizer, path: str | Sequence[str] | None = None):
        _check(section)
        self.pad_id, self._tokenizer, self._train_on = tokenizer.pad_id, tokenizer, section.train_on
        self.pairs: list[Pair] = []
        self.places: list[str] = []
        self.dropped = Tally()
        reader = Reader(section, path)
        self.account = reader.account
        for row in reader:
            self._take(row, section)
        if not self.pairs:
            raise UserError("\n".join(["no pair can be used:", *self.account.refused.details(),
                                       *self.dropped.details()]))  # fmt: skip

    def _take(self, row: Row, section: DataConfig) -> None:
        if not isinstance(row.parsed, Preference):
            raise UserError(f"{row.place.text} is no pair: preference training takes rows with chosen and rejected")
        try:
            pair = self._encoded(row.parsed)
        except (RowFault, UserError) as error:
            fault = error if isinstance(error, RowFault) else RowFault("template", str(error))
            self.account.fault(fault, row.place.text)
            return
        length = sum(len(ids) for ids, _ in pair)
        if length <= section.max_seq_len:
            self.pairs.append(pair)
            self.places.append(row.place.text)
        elif section.overlong == "error":
            raise UserError(f"{row.place.text}: its two answers have {length:,} tokens together, over data.max_seq_len "
                            f"({section.max_seq_len:,}), and data.overlong is error")  # fmt: skip
        else:
            self.dropped.add("overlong", row.place.text)

    def _encoded(self, parsed: Preference) -> Pair:
        def side(answer: list[Message]) -> Encoded:
            found = self._tokenizer.row(parsed.prompt + answer, self._train_on, tools=parsed.tools)
            if not any(found.mask[1:]):
                raise RowFault("no_target", "no token of an answer is trained")
            if found.lost:
                self.account.said[THOUGHTS_LOST] += found.lost
            return np.asarray(found.ids, np.int32), np.asarray(found.mask, bool)

        return side(parsed.chosen), side(parsed.rejected)

    def __len__(self) -> int:
        return len(self.pairs)

    def pieces(self, number: int) -> Pair:
        """What lies on the sheet of a pair, one segment each."""
        return self.pairs[number]

    def where(self, number: int) -> str:
        return self.places[number]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([sum(len(ids) for ids, _ in pair) for pair in self.pairs], np.int64)

    @property
    def rows(self) -> int:
        """Rows read."""
        return self.account.rows

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def fingerprint(self) -> int:
        """Of the tokenised pairs: a resumed run must see the pairs that it was started on."""
        found = 0
        for pair in self.pairs:
            for ids, mask in pair:
                found = zlib.crc32(mask.data, zlib.crc32(ids.data, found))
        return found

    def report(self) -> str:
        lines = [f"pairs {len(self):,} of {self.account.rows:,} rows, {self.tokens:,} tokens"]
        for tally, word in ((self.account.refused, "not usable"), (self.account.dropped, "dropped"),
                            (self.dropped, "dropped")):  # fmt: skip
            lines += [f"{word}, {reason}: {count:,} ({tally.where(reason)})" for reason, count in tally.counts.items()]
        return "; ".join([*lines, *self.account.notes()])


def _check(section: DataConfig) -> None:
    if section.format not in ("auto", "preference"):
        raise UserError(f"data.format is {section.format}: pairs have the format preference; set that, or auto")
    if section.transform is not None:
        raise UserError("data.transform works on conversations, not on preference pairs; remove it")
    if section.overlong == "truncate":
        raise UserError("data.overlong is truncate: a pair that is cut compares other answers; use drop or error")
    if isinstance(section.validation, float):
        raise UserError(f"data.validation is {section.validation}: held-out pairs come from a file of their own")
