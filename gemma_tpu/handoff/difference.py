"""What differs between two checkpoints, and by how many representable numbers two arrays are apart."""

from typing import TypedDict

import ml_dtypes
import numpy as np

from gemma_tpu.storage.shards import Checkpoint

_BLOCK_ELEMENTS = 4 << 20
# float dtype -> (its bits as a signed integer, an integer that holds any distance)
_BITS: dict[np.dtype, tuple[type[np.signedinteger], type[np.signedinteger]]] = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, np.int32),
    np.dtype(np.float16): (np.int16, np.int32),
    np.dtype(np.float32): (np.int32, np.int64),
}


class Difference(TypedDict):
    """Names of tensors."""

    identical: list[str]  # dtype, shape and bytes are equal
    changed: dict[str, float]  # the largest |a - b|, for equal dtype and shape; NaN where either side holds one
    reshaped: list[str]  # dtype or shape differ
    missing: list[str]  # in a alone
    extra: list[str]  # in b alone


def compare(a: Checkpoint, b: Checkpoint) -> Difference:
    """Compares every tensor of two checkpoints, in blocks."""
    names_a, names_b = set(a.names()), set(b.names())
    result: Difference = {"identical": [], "changed": {}, "reshaped": [],
                          "missing": sorted(names_a - names_b), "extra": sorted(names_b - names_a)}  # fmt: skip
    for name in sorted(names_a & names_b):
        one, other = a.info(name), b.info(name)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            result["reshaped"].append(name)
            continue
        difference = _max_difference(a, b, name)
        if difference is None:
            result["identical"].append(name)
        else:
            result["changed"][name] = difference
    return result


def _max_difference(a: Checkpoint, b: Checkpoint, name: str) -> float | None:
    """None when all bytes are equal; a sign of zero that differs is a change of 0.0."""
    largest, size = None, a.info(name).size
    for start in range(0, size, _BLOCK_ELEMENTS):
        stop = min(start + _BLOCK_ELEMENTS, size)
        x, y = a.read_flat(name, start, stop), b.read_flat(name, start, stop)
        if np.array_equal(x.view(np.uint8), y.view(np.uint8)):
            continue
        wide = np.complex128 if x.dtype.kind == "c" else np.float64
        with np.errstate(invalid="ignore"):  # inf - inf: the NaN is the answer
            block = float(np.abs(x.astype(wide) - y.astype(wide)).max())
        # np.maximum keeps a NaN; max() may not.
        largest = block if largest is None else float(np.maximum(largest, block))
    return largest


def ulp_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many representable numbers lie between x and y, elementwise; +0 and -0 are one number.

    bfloat16, float16 and float32. A NaN is the largest integer away from everything, itself included, so
    that a bound on the distance catches it.
    """
    if x.dtype != y.dtype or x.shape != y.shape or x.dtype not in _BITS:
        raise ValueError(f"needs two arrays of one shape in {', '.join(d.name for d in _BITS)}, not "
                         f"{x.dtype} {x.shape} and {y.dtype} {y.shape}")
    bits, wide = _BITS[x.dtype]

    def rank(array: np.ndarray) -> np.ndarray:
        # A float is sign and magnitude; counted from zero in both directions, neighbours differ by 1.
        signed = np.ascontiguousarray(array).view(bits).astype(wide)
        return np.where(signed < 0, np.iinfo(bits).min - signed, signed)

    distance: np.ndarray = np.abs(rank(x) - rank(y))
    distance[np.isnan(x) | np.isnan(y)] = np.iinfo(wide).max
    return distance
