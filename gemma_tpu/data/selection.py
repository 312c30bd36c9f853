"""Which of the tokenised rows are trained on: those short enough, on this side of the split, in the mixture asked for.

Rows are chosen by the hash of their content, not by their place: equal rows stay on one side of the split, and a row
keeps its side when others are added.

Shapes: N rows that are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tpu.data.datafiles import DataFile
from gemma_tpu.data.rows import SHOWN, Tally
from gemma_tpu.data.tokens import Tokens
from gemma_tpu.errors import UserError
from gemma_tpu.schema import DataConfig


@dataclass(frozen=True)
class Chosen:
    rows: np.ndarray  # indices of the kept rows, in the order of the files
    lengths: np.ndarray  # of those, after truncation
    targets: np.ndarray
    measured: np.ndarray  # indices of all rows of this side, of any length
    considered: int
    dropped: Tally
    notes: list[str]


def choose(
    section: DataConfig, found: Tokens, files: Sequence[DataFile], share: float | None, held_out: bool
) -> Chosen:
    """The rows of one side: of the training rows, or of the share that is held out."""
    dropped = Tally()
    notes: list[str] = []
    side_N = np.ones(len(found.lengths), bool)
    if share is not None:
        side_N = _split(found, share, held_out, notes)
    measured = np.flatnonzero(side_N)
    rows, lengths, targets = _short_enough(section, found, files, measured, dropped, notes)
    if section.weights is not None and not held_out:
        kept = _mixed(section, found, files, rows, dropped, notes)
        rows, lengths, targets = rows[kept], lengths[kept], targets[kept]
    return Chosen(rows, lengths, targets, measured, len(measured), dropped, notes)


def _split(found: Tokens, share: float, held_out: bool, notes: list[str]) -> np.ndarray:
    out_N = found.hashes < np.uint64(share * 2**64)
    total, count = len(out_N), int(out_N.sum())
    if total and count in (0, total):
        raise UserError(f"data.validation={share:g} of {total:,} rows holds out {count:,}: rows are drawn one by one, "
                        "and this leaves a side empty. Give another share, more rows, or a file of them")  # fmt: skip
    if not held_out:
        notes.append(f"data.validation={share:g} holds out {count:,} of {total:,} rows, by a hash of their content")
    return out_N if held_out else ~out_N


def _short_enough(
    section: DataConfig, found: Tokens, files: Sequence[DataFile], rows: np.ndarray, dropped: Tally, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """data.overlong: the rows that stay, their lengths and their targets."""
    most = section.max_seq_len
    lengths, targets = found.lengths[rows], found.targets[rows].copy()
    long = np.flatnonzero(lengths > most)
    if not len(long):
        return rows, lengths, targets
    if section.overlong != "truncate":  # "error" too: every offender is found before the refusal
        _count(dropped, "too_long", found, files, rows[long], lambda row: f"{found.lengths[row]:,} tokens")
        if section.overlong == "error":
            raise UserError(
                f"{len(long):,} of {len(rows):,} rows are longer than data.max_seq_len ({most:,}), the longest has "
                f"{lengths.max():,} tokens: {dropped.where('too_long')}. Raise data.max_seq_len, or choose another "
                "data.overlong"
            )
        stay = lengths <= most
        return rows[stay], lengths[stay], targets[stay]
    starts = np.cumsum(found.lengths) - found.lengths
    for at in long:
        start = starts[rows[at]]
        targets[at] = found.mask[start : start + most].sum()
    lengths = np.minimum(lengths, most)
    stay = targets > 0
    _count(dropped, "no_target_left_after_truncation", found, files, rows[~stay], lambda _: "")
    notes.append(f"data.overlong=truncate cut {int(stay[long].sum()):,} rows to {most:,} tokens")
    return rows[stay], lengths[stay], targets[stay]


def _mixed(
    section: DataConfig, found: Tokens, files: Sequence[DataFile], rows: np.ndarray, dropped: Tally, notes: list[str]
) -> np.ndarray:
    """The largest mixture in the shares of data.weights that repeats no row; which of `rows` are in it."""
    weights = np.array(section.weights, float)
    origin_N = np.array([file.origin for file in files])[found.files[rows]]
    there = np.bincount(origin_N, minlength=len(weights))
    paths = [section.path] if isinstance(section.path, str) else section.path
    empty = [path for path, count in zip(paths, there, strict=True) if not count]
    if empty:
        raise UserError(f"data.weights mixes {len(paths)} sources, and no row of {', '.join(empty)} can be used")
    scale = float((there / weights).min())
    if section.limit is not None:
        scale = min(scale, section.limit / weights.sum())
    wanted = np.maximum(1, np.floor(scale * weights + 1e-9).astype(int))
    kept = []
    for origin, path in enumerate(paths):
        mine = np.flatnonzero(origin_N == origin)
        order = mine[np.argsort(found.hashes[rows[mine]], kind="stable")]
        kept.append(order[: wanted[origin]])
        if len(mine) > wanted[origin]:
            dropped.add("left_out_by_weights", "", times=len(mine) - int(wanted[origin]))
        notes.append(f"data.weights: {wanted[origin]:,} of {len(mine):,} rows of {path} "
                     f"({wanted[origin] / wanted.sum():.1%} of the mixture)")  # fmt: skip
    return np.sort(np.concatenate(kept))


def _count(
    dropped: Tally, reason: str, found: Tokens, files: Sequence[DataFile], rows: np.ndarray,
    detail: Callable[[int], str],
) -> None:  # fmt: skip
    for row in rows[:SHOWN].tolist():
        dropped.add(reason, f"{files[found.files[row]].name}:{found.lines[row]}", detail(row))
    if len(rows) > SHOWN:
        dropped.add(reason, "", times=len(rows) - SHOWN)
