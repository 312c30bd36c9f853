"""Preference rows: JSONL of two answers to one prompt, tokenised and laid out two by two, none lost unseen.

A line is {"chosen": [messages], "rejected": [messages]}, or {"prompt", "chosen", "rejected"} whose values are text or
lists of messages. Both answers of a pair lie on one sheet, one after the other, as segments of their own.

Shapes: N pairs, S sheets an epoch, T tokens a sheet.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.data import Batch, BatchIterator
from gemma_tpu.errors import UserError
from gemma_tpu.packing import Encoded, best_fit, fill, longest_first, one_each
from gemma_tpu.rows import RESPONSES, ROLES, SHOWN, Tally, paths_of
from gemma_tpu.schema import DataConfig
from gemma_tpu.tokenizer import Tokenizer

Messages = list[dict[str, str]]
Pair = tuple[Encoded, Encoded]


class PairRows:
    """The usable pairs of some files, and the account of every line."""

    def __init__(self, section: DataConfig, tokenizer: Tokenizer, path: Any = None):
        _check(section)
        self.files, self.section, self.pad_id = paths_of(path or section.path), section, tokenizer.pad_id
        self.pairs: list[Pair] = []
        self.places: list[str] = []
        self.dropped, refused, self.rows = Tally(), Tally(), 0
        for place, raw in _lines(self.files):
            if self.rows == section.limit:
                break
            self.rows += 1
            try:
                pair = tuple(_encoded(tokenizer, side, section.train_on) for side in _sides(raw))
            except (UserError, ValueError) as error:
                refused.add("refused", f"  {place}: {error}")
                continue
            if sum(len(ids) for ids, _ in pair) > section.max_seq_len:
                if section.overlong == "error":
                    refused.add("refused", f"  {place}: its two answers are longer than data.max_seq_len together")
                self.dropped.add("overlong", place)
            elif np.array_equal(pair[0][0], pair[1][0]):
                self.dropped.add("answers that are equal", place)
            else:
                self.pairs.append(pair)
                self.places.append(place)
        if refused.total():
            more = refused.total() - SHOWN
            told = "\n".join([*refused.places["refused"], *([f"  and {more:,} more"] if more > 0 else [])])
            raise UserError(f"{refused.total():,} of {self.rows:,} lines are no preference pairs:\n{told}")
        if not self.pairs:
            raise UserError(f"no pair of {', '.join(map(str, self.files))} can be used: {self.report()}")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([sum(len(ids) for ids, _ in pair) for pair in self.pairs], np.int64)

    def report(self) -> str:
        dropped = [f"{reason}: {count:,} ({self.dropped.where(reason)})" for reason, count in
                   self.dropped.counts.items()]  # fmt: skip
        return f"pairs {len(self.pairs):,} of {self.rows:,} lines" + "".join(f"; dropped, {one}" for one in dropped)


def _check(section: DataConfig) -> None:
    given = {"data.format": section.format != "auto", "data.transform": section.transform is not None}
    if wrong := [key for key, bad in given.items() if bad]:
        raise UserError(f"{', '.join(wrong)}: preference pairs have one format of their own; remove it")
    if section.overlong == "truncate":
        raise UserError("data.overlong is truncate: a pair that is cut compares other answers; use drop or error")


def _lines(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        try:
            with path.open("rb") as stream:
                for number, raw in enumerate(stream, start=1):
                    if raw.strip():
                        yield f"{path.name}:{number}", raw
        except OSError as error:
            raise UserError(f"data.path {path}: {error.strerror}") from error


def _sides(raw: bytes) -> tuple[Messages, Messages]:
    row = json.loads(raw)
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise UserError('a pair has "chosen" and "rejected"')
    if unknown := sorted(set(row) & {*RESPONSES, "messages"}):
        raise UserError(f"{', '.join(unknown)} beside chosen and rejected: which is meant?")
    prompt = _messages(row.get("prompt", []), "prompt", "user")
    return tuple(prompt + _messages(row[side], side, "assistant") for side in ("chosen", "rejected"))


def _messages(value: Any, key: str, role: str) -> Messages:
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    good = isinstance(value, list) and all(
        isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str) for one in value
    )
    if not good or (key != "prompt" and (not value or ROLES[value[-1]["role"]] != "assistant")):
        raise UserError(f'"{key}" must be text or messages of roles {", ".join(ROLES)}, the answers ending in one')
    return [{"role": ROLES[one["role"]], "content": one["content"]} for one in value]


def _encoded(tokenizer: Tokenizer, messages: Messages, train_on: str) -> Encoded:
    ids, mask = tokenizer.training(messages, train_on)
    return np.asarray(ids, np.int32), np.asarray(mask, bool)


class PairLoader:
    """Batches of pairs by step index alone, as `data.Loader` has them of rows; `train` takes either."""

    def __init__(
        self, rows: PairRows, *, max_seq_len: int, packing: str, batch_size: int, accumulation: int, seed: int,
        epochs: int | None = None, steps: int | None = None, keep_partial: bool = False,
    ):  # fmt: skip
        self.rows, self.max_seq_len, self.seed = rows, max_seq_len, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        lengths = np.sort(rows.lengths)[::-1]
        self._bins = best_fit(lengths, max_seq_len) if packing == "pack" else one_each(len(rows))
        full, left = divmod(len(self._bins), batch_size)
        padded = bool(left) and (keep_partial or not full)
        self.steps_per_epoch = full + padded
        self.total_steps = steps or self.steps_per_epoch * (epochs or 1)
        sheets = self.steps_per_epoch * batch_size if padded else len(self._bins)
        self.padding_share = 1 - int(lengths.sum()) / (sheets * max_seq_len)
        self.notes = [f"{len(rows):,} pairs on {len(self._bins):,} sheets of {max_seq_len:,}; {left:,} of an epoch's "
                      f"do not fill a batch and are {'padded' if padded else 'left out'}"] if left else []  # fmt: skip
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> Batch:
        sheets = [[side for pair in pairs for side in self.rows.pairs[pair]] for pairs in self._sheets(step)]
        batch = fill(sheets + [[]] * (self.batch_size - len(sheets)), self.max_seq_len, self.rows.pad_id)
        shape = (self.accumulation, self.batch_size // self.accumulation, self.max_seq_len)
        return {name: leaf.reshape(shape) for name, leaf in batch.items()}

    def __iter__(self) -> BatchIterator:
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        plan = f"{len(self.rows):,} pairs, {self.batch_size} sheets of {self.max_seq_len} a batch, seed {self.seed}"
        return BatchIterator(iter(grain.MapDataset.source(self).to_iter_dataset(options)), plan)

    def rows_of(self, step: int) -> list[int]:
        return [int(pair) for pairs in self._sheets(step) for pair in pairs]

    def where(self, pair: int) -> str:
        return self.rows.places[pair]

    def _sheets(self, step: int) -> list[np.ndarray]:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        epoch, batch = divmod(step, self.steps_per_epoch)
        by_rank_N, order_S = self._epoch(epoch)
        return [by_rank_N[self._bins[sheet]] for sheet in
                order_S[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()]  # fmt: skip

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        return longest_first(self.rows.lengths, rng), rng.permutation(len(self._bins))
