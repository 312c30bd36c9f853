"""What can happen to one tensor of a checkpoint, checked against it and computed block by block.

An update is a Replace (the whole tensor) or one or more LowRank. A block is float64(W) + sum of scale * B @ A, with a
DoRA magnitude each row rescaled to it, and rounded once to the tensor's own dtype. float64 because W and its delta can
cancel: summed in float32, about one element in a million then lands many bfloat16 steps from the exact result.

Shapes: O = out features, I = in features (the layout of the files), R = rank; stacked experts have an E in front.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from gemma_tpu.adapter.lowrank import to_length
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.gemma.quantise import round_trip
from gemma_tpu.storage.header import TensorInfo
from gemma_tpu.storage.shards import Checkpoint

FLOATS = tuple(np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
Index = tuple[slice, ...]
BLOCK_ELEMENTS = 1 << 19  # 4 MiB in float64; twice that takes 2.4 times as long an element: fresh pages each time


@dataclass(frozen=True)
class LowRank:
    """W + scale * b @ a, with b [O, R] and a [R, I]; for a stack of experts b [E, O, R] and a [E, R, I].

    With a magnitude [O] (DoRA), each row of that sum is then brought to its magnitude's length. `quantised`, a kind and
    a block: W is taken as a run saw it that held it so.
    """

    b: np.ndarray
    a: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    quantised: tuple[str, int] | None = None


@dataclass(frozen=True)
class Replace:
    """The whole tensor. A float array is rounded once to the tensor's dtype; any other must have it."""

    array: np.ndarray


Update = LowRank | Replace | Sequence[LowRank]
Edit = Replace | tuple[LowRank, ...]  # an Update after its checks


@dataclass
class TensorChange:
    """What one update did: moved = elements whose stored value differs from the base's."""

    elements: int
    moved: int = 0
    max_delta: float = 0.0

    def add(self, other: "TensorChange") -> None:
        self.moved += other.moved
        self.max_delta = max(self.max_delta, other.max_delta)


# --- checks before anything is written ---


def check(base: Checkpoint, updates: Mapping[str, Update]) -> dict[str, Edit]:
    """The updates as edits; every one that does not fit the base is named in one UserError."""
    if not updates:
        raise UserError(f"no updates for {base.where}: the result would be the base itself")
    unused = sorted(name for name in updates if name not in base)
    if unused:
        raise UserError(f"{base.where} has no tensor for {len(unused)} of {len(updates)} updates: {', '.join(unused)}")
    edits: dict[str, Edit] = {}
    misfits, infinite = [], []
    for name, update in updates.items():
        edit = edits[name] = as_edit(update)
        misfits += [f"{name}: {problem}" for problem in _misfits(base.info(name), edit)]
        if not isinstance(edit, Replace) and not all(map(_is_finite, edit)):
            infinite.append(name)
    if misfits:
        raise UserError("updates do not fit the base:" + "".join(f"\n  - {misfit}" for misfit in misfits))
    if infinite:
        raise RunError(f"NaN or infinity in the update of {', '.join(infinite)}: not written")
    return edits


def as_edit(update: Update) -> Edit:
    return update if isinstance(update, Replace) else (update,) if isinstance(update, LowRank) else tuple(update)


def digest(edits: Mapping[str, Edit]) -> str:
    """Equal for equal updates: an interrupted merge goes on only with the same ones."""
    found = hashlib.blake2b(digest_size=16)
    for name, edit in sorted(edits.items()):
        parts: Sequence[Replace | LowRank] = (edit,) if isinstance(edit, Replace) else edit
        for part in parts:
            rest = [getattr(part, key, None) for key in ("scale", "quantised")]
            found.update(repr((name, type(part).__name__, *rest)).encode())
            for array in vars(part).values():
                if isinstance(array, np.ndarray):
                    found.update(repr((array.shape, array.dtype.name)).encode())
                    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _misfits(info: TensorInfo, edit: Edit) -> Iterator[str]:
    shape = list(info.shape)
    if isinstance(edit, Replace):
        if edit.array.shape != info.shape:
            yield f"its shape {list(edit.array.shape)} must be the base's {shape}"
        if edit.array.dtype != info.dtype and not {edit.array.dtype, info.dtype} <= {*FLOATS}:
            yield f"{edit.array.dtype} cannot replace {info.dtype}"
        return
    if not edit:
        yield "its list of updates is empty"
    for part in edit:
        b, a = list(part.b.shape), list(part.a.shape)
        if len(a) != len(b) or len(b) not in (2, 3) or b[-1] != a[-2] or a[:-2] != b[:-2] or [*b[:-1], a[-1]] != shape:
            yield f"b {b} @ a {a} must give the base's {shape}"
        if info.dtype not in FLOATS:
            yield f"a delta cannot be added to {info.dtype} (quantised weights need their scales)"
        if part.magnitude is not None and part.magnitude.shape != info.shape[:-1]:
            yield f"its magnitude {list(part.magnitude.shape)} must be one number a row of {shape}"
        if part.magnitude is not None and len(edit) > 1:
            yield "an update with a magnitude must be the only one of its tensor"
        if part.quantised is not None and len(edit) > 1:
            yield "an update of a quantised base must be the only one of its tensor"


def _is_finite(part: LowRank) -> bool:
    arrays = [array for array in (part.b, part.a, part.magnitude) if array is not None]
    return math.isfinite(part.scale) and all(np.isfinite(array).all() for array in arrays)


# --- arithmetic ---


def blocks(shape: Sequence[int]) -> Iterator[Index]:
    """Cuts the first dim, and where one expert of a stack is too large its rows too, so that a block has about
    BLOCK_ELEMENTS; rows stay whole, and a scalar is one block."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if len(shape) > 2 and inner > BLOCK_ELEMENTS:
        for first in range(shape[0]):
            yield from ((slice(first, first + 1), *rest) for rest in blocks(shape[1:]))
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, inner))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])),)


class Tensor:
    """One tensor under its edit. `block` may be called from several threads."""

    def __init__(self, base: Checkpoint, info: TensorInfo, edit: Edit | None):
        self.base, self.info, self.edit = base, info, edit
        self._a_RI: np.ndarray | None = None
        if isinstance(edit, tuple) and len(info.shape) == 2:  # once, and not again for every block of rows
            self._a_RI = np.concatenate([np.asarray(part.a, np.float64) for part in edit])

    def block(self, index: Index) -> tuple[str, np.ndarray, TensorChange | None]:
        """(name, the new elements in the tensor's dtype, what changed or None for a tensor that stays)"""
        old = self.base.read_slice(self.info.name, index)
        if self.edit is None:
            return self.info.name, old, None
        if isinstance(self.edit, Replace):
            new = np.asarray(self.edit.array[index])
            wide = np.complex128 if old.dtype.kind == "c" else np.float64
            with np.errstate(invalid="ignore"):  # not finite: refused by name below
                largest = float(np.abs(new.astype(wide) - old.astype(wide)).max(initial=0.0))
            return self._rounded(old, new, largest)
        sum_OI = self._delta(self.edit, index)
        largest = float(max(sum_OI.max(initial=0.0), -sum_OI.min(initial=0.0)))
        # bfloat16 widens to float32 without loss, and numpy adds in place only what it knows itself.
        wide_old = old.astype(np.float32) if old.dtype.itemsize < 4 else old
        part = self.edit[0]
        sum_OI += seen(wide_old, part)
        if part.magnitude is not None or part.quantised is not None:
            sum_OI = _to_magnitude(sum_OI, part, index)
            largest = float(np.abs(sum_OI - wide_old).max(initial=0.0))
        return self._rounded(old, sum_OI, largest)

    def exact(self, index: Index) -> np.ndarray:
        """The block in float64, before it is rounded."""
        if isinstance(self.edit, Replace):
            whole: np.ndarray = self.edit.array[index].astype(np.float64)
            return whole
        old = self.base.read_slice(self.info.name, index).astype(np.float64)
        if self.edit is None:
            return old
        part = self.edit[0]
        return _to_magnitude(seen(old, part) + self._delta(self.edit, index), part, index)

    def _delta(self, parts: tuple[LowRank, ...], index: Index) -> np.ndarray:
        a_RI = self._a_RI
        if a_RI is None:  # of a stack, A is wanted whole, but of these experts alone
            experts = index[: len(self.info.shape) - 2]
            a_RI = np.concatenate([np.asarray(part.a[experts], np.float64) for part in parts], axis=-2)
        b_OR = np.concatenate([np.asarray(part.b[index], np.float64) * part.scale for part in parts], axis=-1)
        delta: np.ndarray = b_OR @ a_RI
        return delta

    def _rounded(self, old: np.ndarray, exact: np.ndarray, largest: float) -> tuple[str, np.ndarray, TensorChange]:
        """Rounds once to the tensor's dtype and counts what moved."""
        with np.errstate(over="ignore"):  # beyond the dtype's range is an infinity, refused below
            new = np.ascontiguousarray(exact.astype(self.info.dtype, copy=False))
        if not _all_finite(new):
            culprit = "the result" if np.isfinite(old).all() else "the base"
            raise RunError(f"{self.info.name}: NaN or infinity in {culprit}: nothing was written")
        bits = f"u{old.dtype.itemsize}"  # numpy compares a foreign type like bfloat16 one by one
        moved = old.view(bits) != new.view(bits) if old.dtype in FLOATS else old != new
        return self.info.name, new, TensorChange(self.info.size, int(np.count_nonzero(moved)), largest)


def _to_magnitude(sum_OI: np.ndarray, part: LowRank, index: Index) -> np.ndarray:
    magnitude = part.magnitude
    with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros has no direction: refused as NaN
        return to_length(sum_OI, None if magnitude is None else magnitude[index].astype(np.float64))


def seen(w_OI: np.ndarray, part: LowRank) -> np.ndarray:
    """The base's rows as the update's run computed with them."""
    return w_OI if part.quantised is None else round_trip(w_OI, *part.quantised)


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype == ml_dtypes.bfloat16:  # its exponent all ones, by bits
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())
