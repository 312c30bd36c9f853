"""A frozen weight in fewer bits: int8 by rows, or nf4 in blocks whose scales are 8 bits themselves.

int8: each row (output channel) is 127 steps of its own scale to either side. nf4: sixteen values, dense where a normal
distribution is, times the largest magnitude of a block of 64 inputs; those scales lie on 256 even steps between the
smallest and the largest of their row. QLoRA quantises them to 8-bit floats by blocks of 256: even steps are nearer
(they all have one magnitude), and need no table, which would be a slow gather on a TPU.

The same functions serve numpy (a merge) and JAX (training): `xp` is one or the other.
"""

import math
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

Array = Any  # numpy's or JAX's: to name JAX's would import it
BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STORED = {"int8": np.dtype(np.int8), "nf4": np.dtype(ml_dtypes.uint4)}
PARTS = ("w", "w_scale", "w_low", "w_step")


def block_of(width: int) -> int:
    """Inputs that share a scale: 64, or what of it divides the last dim of a weight."""
    return math.gcd(BLOCK, width)


def parts(kind: str, shape: tuple[int, ...], inside: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of what stands for a weight of this shape, whose last `inside` dims are its inputs."""
    out, single = shape[: len(shape) - inside], np.dtype(np.float32)
    held = {"w": (shape, STORED[kind])}
    if kind == "int8":
        return held | {"w_step": (out, single)}
    blocks = (*shape[:-1], shape[-1] // block_of(shape[-1]))
    return held | {"w_scale": (blocks, np.dtype(np.uint8)), "w_low": (out, single), "w_step": (out, single)}


def encode(w: Array, kind: str, inside: int, xp: ModuleType = np, block: int | None = None) -> dict[str, Array]:
    """The parts of a weight. `block`: where the dims of this view are not those that training had."""
    w, dims = w.astype(np.float32), tuple(range(-inside, 0))
    if kind == "int8":
        step = _or_one(xp.max(xp.abs(w), axis=dims) / np.float32(127), xp)
        codes = xp.clip(xp.round(w / _beside(step, inside)), -127, 127)
        return {"w": codes.astype(np.int8), "w_step": step}
    block = block or block_of(w.shape[-1])
    blocks = w.reshape(*w.shape[:-1], -1, block)
    largest = xp.max(xp.abs(blocks), axis=-1)
    low = xp.min(largest, axis=dims)
    step = _or_one((xp.max(largest, axis=dims) - low) / np.float32(255), xp)
    scale = xp.round((largest - _beside(low, inside)) / _beside(step, inside))
    even = blocks / _or_one(largest, xp)[..., None]
    codes = sum((even > np.float32((a + b) / 2)).astype(np.uint8) for a, b in zip(NF4, NF4[1:], strict=False))
    return {"w": codes.reshape(w.shape).astype(STORED[kind]), "w_scale": scale.astype(np.uint8), "w_low": low,
            "w_step": step}  # fmt: skip


def decode(held: dict[str, Array], kind: str, inside: int, xp: ModuleType = np) -> Array:
    """The weight that the parts stand for, in float32."""
    codes, step = held["w"], _beside(held["w_step"], inside)
    if kind == "int8":
        return codes.astype(np.float32) * step
    scale = _beside(held["w_low"], inside) + step * held["w_scale"].astype(np.float32)
    width = codes.shape[-1] // scale.shape[-1]
    return _values(codes, xp) * xp.repeat(scale, width, axis=-1)


def round_trip(w_OI: np.ndarray, kind: str, block: int) -> np.ndarray:
    """What a run computed with in place of this weight: rows of a checkpoint's matrix, any number of them."""
    rounded: np.ndarray = decode(encode(w_OI, kind, 1, block=block), kind, 1)
    return rounded


def _values(codes: Array, xp: ModuleType) -> Array:
    """The sixteen values, chosen bit by bit: selects run where everything else does, a lookup does not."""
    if xp is np:
        return np.asarray(NF4, np.float32)[codes.astype(np.uint8)]
    codes, values = codes.astype(np.int32), [np.float32(value) for value in NF4]
    for bit in range(4):
        is_odd = (codes >> bit) & 1 == 1
        values = [xp.where(is_odd, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _or_one(x: Array, xp: ModuleType) -> Array:
    """Rows and blocks of zeros are divided by one."""
    return xp.where(x == 0, np.float32(1), x)


def _beside(row: Array, inside: int) -> Array:
    return row.reshape(*row.shape, *(1,) * inside)
