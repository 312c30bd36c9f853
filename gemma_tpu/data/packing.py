"""Packing: many rows on one fixed-size sheet, told apart by segment ids and by positions that restart.

A static shape compiles once; padding is compute thrown away. On rows as long as CodeV-R1's, one row a sheet
of 4,096 leaves 77 % padding and best-fit decreasing over the whole dataset 0.5 % (benchmarks/packing.py).

Shapes: N rows (by rank: 0 is the longest), S sheets, B sheets of a batch, T tokens of a sheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tpu.errors import UserError

Encoded = tuple[np.ndarray, np.ndarray]  # the ids of one row, and its mask of trained targets
LEAVES = ("tokens", "segment_ids", "positions", "targets", "weights")
BUCKET = 128  # a bucket's length is a multiple of the TPU's lanes, as its attention kernel wants
BUCKETS = 4  # lengths, each compiled by itself; rows like CodeV-R1's keep 23 % padding, with a fifth length 19 %


@dataclass(frozen=True)
class Bins:
    """Which items share a sheet, flat: sheet s holds items_N[starts_S[s]:starts_S[s + 1]]."""

    items_N: np.ndarray
    starts_S: np.ndarray

    def __len__(self) -> int:
        return len(self.starts_S) - 1

    def __getitem__(self, sheet: int) -> np.ndarray:
        if not 0 <= sheet < len(self):  # also what ends plain iteration
            raise IndexError(f"sheet {sheet} of {len(self)}")
        return self.items_N[self.starts_S[sheet] : self.starts_S[sheet + 1]]


def longest_first(lengths_N: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Row indices by decreasing length; rows of one length stay in order, or `rng` shuffles them."""
    if rng is None:
        return np.argsort(-lengths_N, kind="stable")
    shuffled_N = rng.permutation(len(lengths_N))
    return shuffled_N[np.argsort(-lengths_N[shuffled_N], kind="stable")]


def best_fit(lengths_N: np.ndarray, capacity: int) -> Bins:
    """Best-fit decreasing: longest row first, each into the fullest sheet that still has room for it.

    Open sheets stand in one stack per number of free tokens, and bit f of an integer says that stack f is not
    empty: the best sheet for a row is the lowest bit at or above its length. That is O(n log n) for the sort
    and one short integer shift a row, with no dependence on the number of sheets.
    """
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    _check_lengths(lengths_N, capacity)
    order_N = longest_first(lengths_N)
    shortest = int(lengths_N.min(initial=capacity))
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    sheets = 0
    sheet_of = []
    for length in lengths_N[order_N].tolist():
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            sheet = stacks[free].pop()
            if not stacks[free]:
                occupied ^= 1 << free
        else:
            free, sheet = capacity, sheets
            sheets += 1
        sheet_of.append(sheet)
        free -= length
        if free >= shortest:  # a fuller sheet is closed for good
            if not stacks[free]:
                occupied |= 1 << free
            stacks[free].append(sheet)
    sheet_of_N = np.array(sheet_of, dtype=np.int64)
    items_N = order_N[np.argsort(sheet_of_N, kind="stable")]
    starts_S = np.concatenate([[0], np.cumsum(np.bincount(sheet_of_N, minlength=sheets))])
    return Bins(items_N, starts_S.astype(np.int64))


def one_each(count: int) -> Bins:
    """No packing: item i alone on sheet i."""
    return Bins(np.arange(count), np.arange(count + 1))


def fill(sheets: Sequence[Sequence[Encoded]], width: int, pad_id: int) -> dict[str, np.ndarray]:
    """Lays rows out on sheets: `sheets[b]` lists its rows, and an empty list is a sheet of padding.

    Position t predicts token t + 1 of its own segment, so targets and weights are the row shifted by one and
    the last token of a segment has weight 0: nothing is ever predicted across a border.
    """
    shape = (len(sheets), width)
    batch = {name: np.zeros(shape, np.float32 if name == "weights" else np.int32) for name in LEAVES}
    batch["tokens"][:] = batch["targets"][:] = pad_id
    for b, rows in enumerate(sheets):
        at = 0
        for segment, (ids, mask) in enumerate(rows, start=1):
            end = at + len(ids)
            if end > width:
                raise ValueError(f"sheet {b}: {end} tokens do not fit in {width}")
            batch["tokens"][b, at:end] = ids
            batch["segment_ids"][b, at:end] = segment
            batch["positions"][b, at:end] = np.arange(len(ids))
            batch["targets"][b, at : end - 1] = ids[1:]
            batch["weights"][b, at : end - 1] = mask[1:]
            at = end
    return batch


def bucket_widths(lengths_N: np.ndarray, capacity: int, count: int = BUCKETS) -> np.ndarray:
    """At most `count` lengths, the multiples of 128 that pad these rows least; the longest row fits in the last.

    By dynamic programming over the candidates: the least padding of the rows up to candidate j with k lengths ends
    in a length i < j with k - 1 lengths, and all rows between them are padded to j.
    """
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    _check_lengths(lengths_N, capacity)
    longest = int(lengths_N.max(initial=1))
    candidates_C = np.unique(np.minimum(np.arange(1, -(-longest // BUCKET) + 1) * BUCKET, capacity))
    rows_C = np.searchsorted(np.sort(lengths_N), candidates_C, side="right")  # rows that fit in each
    # cost_CC[i, j]: positions of the rows longer than candidate i - 1 (0: none) and no longer than candidate j.
    before_C = np.concatenate([[0], rows_C[:-1]])
    cost_CC = np.where(np.tri(len(candidates_C), dtype=bool).T, (rows_C - before_C[:, None]) * candidates_C, np.inf)
    least_C, chosen = cost_CC[0], [np.zeros(len(candidates_C), np.int64)]
    for _ in range(min(count, len(candidates_C)) - 1):
        total_CC = np.concatenate([[0.0], least_C[:-1]])[:, None] + cost_CC
        chosen.append(total_CC.argmin(axis=0))
        least_C = total_CC.min(axis=0)
    widths, last = [], len(candidates_C) - 1
    for start_C in reversed(chosen):
        widths.append(int(candidates_C[last]))
        last = int(start_C[last]) - 1
        if last < 0:
            break
    return np.array(widths[::-1])


def padding_waste(lengths_N: np.ndarray, capacity: int) -> dict[str, float]:
    """The share of tokens that is padding: every row padded to the capacity, to its bucket, or packed."""
    _check_lengths(lengths_N, capacity)
    if not len(lengths_N):
        return {"pad": 0.0, "bucket": 0.0, "pack": 0.0}
    tokens = int(lengths_N.sum())
    widths = bucket_widths(lengths_N, capacity)
    bucketed = int(widths[np.searchsorted(widths, lengths_N)].sum())
    laid_out = {
        "pad": len(lengths_N) * capacity,
        "bucket": bucketed,
        "pack": len(best_fit(lengths_N, capacity)) * capacity,
    }
    return {name: 1 - tokens / total for name, total in laid_out.items()}


def _check_lengths(lengths_N: np.ndarray, capacity: int) -> None:
    if len(lengths_N) and lengths_N.min() < 1:
        raise ValueError(f"row {int(lengths_N.argmin())} is empty: every row needs at least one token")
    if len(lengths_N) and lengths_N.max() > capacity:
        over = int((lengths_N > capacity).sum())
        raise UserError(
            f"{over:,} rows are longer than a sheet of {capacity:,} tokens, the longest has "
            f"{int(lengths_N.max()):,}: data.max_seq_len must hold the longest row"
        )
