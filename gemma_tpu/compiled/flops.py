"""Floating point operations of compiled instructions: dots, convolutions (what TPU makes of dots), attention kernels.

Counted from shapes and dim numbers, a multiply-add as 2. Padding that XLA adds to turn a batched dot into a
convolution is not work: only the places where a window meets a real element count.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from gemma_tpu.compiled.hlo import Computation, Instruction, Module, Shape

# bf16 passes of one float32 product by operand_precision
PASSES = {"default": 1, "high": 3, "highest": 6}


@dataclass(frozen=True)
class Matmul:
    """One product: its operations, and how many of the unit's operations they take."""

    flops: float
    unit: str  # the peak it is held against: bf16 or int8
    passes: int = 1


def products(module: Module, instruction: Instruction, owner: Computation) -> tuple[Matmul, ...]:
    """The products that one scheduled instruction executes, those inside of its fusions included."""
    if instruction.opcode in ("dot", "convolution"):
        return (_product(instruction, owner),)
    if instruction.opcode != "fusion":
        return ()
    return tuple(
        each
        for name in instruction.called
        for inner in module.computations[name].instructions
        for each in products(module, inner, module.computations[name])
    )


def _product(instruction: Instruction, owner: Computation) -> Matmul:
    left, right = (owner.by_name[name].shape for name in instruction.operands[:2])
    count = _dot(instruction, left) if instruction.opcode == "dot" else _convolution(instruction, left, right)
    narrow = all(shape.bits <= 8 and shape.dtype != "pred" for shape in (left, right))
    precision = (instruction.attribute("operand_precision") or "default").strip("{}").split(",")
    wide = max(left.bits, right.bits) > 16
    passes = max(PASSES.get(each.strip(), 1) for each in precision) if wide else 1
    return Matmul(count, "int8" if narrow else "bf16", passes)


def _dot(instruction: Instruction, left: Shape) -> float:
    contracted = (instruction.attribute("lhs_contracting_dims") or "{}").strip("{}")
    return 2.0 * instruction.shape.elements * math.prod(left.dims[int(dim)] for dim in contracted.split(",") if dim)


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> float:
    image, kernel, out = re.split("_|->", instruction.needs("dim_labels"))
    labelled = sorted(set(image) - set("bf"))
    slides = _slides(instruction.attribute("window") or "{}", len(labelled))
    batch = left.dims[image.index("b")] // int(instruction.attribute("batch_group_count") or 1)
    features = right.dims[kernel.index("i")] * instruction.shape.dims[out.index("f")]
    spatial = 1
    for label, slide in zip(labelled, slides, strict=True):
        spatial *= _meetings(
            left.dims[image.index(label)],
            right.dims[kernel.index(label)],
            instruction.shape.dims[out.index(label)],
            slide,
        )
    return 2.0 * batch * features * spatial


class _Slide(NamedTuple):
    """How a window moves along one dim."""

    stride: int
    low: int  # padding in front
    dilated: int
    window_dilated: int


def _slides(text: str, dims: int) -> list[_Slide]:
    """`{size=3x1 stride=2x1 pad=1_1x0_0}`; what the text leaves out is as usual."""
    words = {key: value.split("x") for key, _, value in (word.partition("=") for word in text.strip("{}").split())}
    strides, dilated, window_dilated = (
        [int(each) for each in words.get(name, ["1"] * dims)] for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = [int(each.split("_")[0]) for each in words.get("pad", ["0_0"] * dims)]
    return [_Slide(*each) for each in zip(strides, low, dilated, window_dilated, strict=True)]


@cache
def _meetings(size: int, window: int, out: int, slide: _Slide) -> int:
    """Pairs of an output place and a window place that meet an element, not padding and not a hole of dilation."""
    base = np.arange(out, dtype=np.int64) * slide.stride - slide.low
    last = (size - 1) * slide.dilated
    count = 0
    for offset in range(window):
        place = base + offset * slide.window_dilated
        count += int(np.count_nonzero((place >= 0) & (place <= last) & (place % slide.dilated == 0)))
    return count


# What its kernels are called as; the last is what JAX writes from jaxlib 0.10.3 on.
PALLAS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call_ffi")


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: its products and the bytes it streams, or None where nothing is known of it."""

    name: str
    flops: float | None
    streamed: dict[int, float]  # operand -> bytes, where a kernel reads an operand more than once
    note: str


def kernel(instruction: Instruction, owner: Computation) -> Kernel:
    name = _kernel_name(instruction)
    splash = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    if splash:
        return _splash(instruction, owner, name, splash[1])
    flash = re.search(r"flash_(forward|dq|dkv)_(\d+)x(\d+)(?:_(\d+))?", name)
    if flash:
        window = int(flash[4]) if flash[4] else None
        return _flash(instruction, owner, name, flash[1], (int(flash[2]), int(flash[3])), window)
    estimate = re.search(r'"cost_estimate":\{[^}]*?"flops":"?([\d.e+]+)', instruction.attributes)
    if estimate:
        return Kernel(name, float(estimate[1]), {}, f"kernel {name}: FLOPs from the cost estimate its author wrote")
    return Kernel(name, None, {}, f"kernel {name}: FLOPs unknown, counted by its bytes")


def _kernel_name(instruction: Instruction) -> str:
    path = instruction.op_name.split("/")
    if path[-1] == "pallas_call" and len(path) > 1:
        return path[-2]
    return re.sub(r"[.\d]+$", "", instruction.name)


# products of one block of the score matrix, and which operands the kernel reads again for every block
_SPLASH = {"fwd": (2, ("k", "v")), "dq": (3, ("k", "v")), "dkv": (4, ("q", "do"))}


def _splash(instruction: Instruction, owner: Computation, name: str, which: str) -> Kernel:
    operands = [owner.by_name[each].shape for each in instruction.operands]
    first = next(at for at, shape in enumerate(operands) if shape.bits in (16, 32) and shape.dtype[0] in "bf")
    places = {"q": first, "k": first + 1, "v": first + 2}
    q, k = operands[first], operands[first + 1]
    after = [at for at in range(first + 3, len(operands)) if operands[at].dims == q.dims]
    places |= {"do": after[-1]} if after else {}
    told = _told(instruction)
    rows, head = (q.dims[-1], q.dims[-2]) if told.get("q_layout") == 2 else (q.dims[-2], q.dims[-1])
    columns = k.dims[-1] if told.get("k_layout") == 2 else k.dims[-2]
    suffix = "" if which == "fwd" else f"_{which}"
    block = (told.get(f"block_q{suffix}", rows), told.get(f"block_kv{suffix}", columns))
    grid = next((shape.dims for shape in operands[:first] if len(shape.dims) == 3), None)
    live, masked = _live_blocks(rows // block[0], columns // block[1], block, grid, which)
    count, again = _SPLASH[which]
    large = [shape for shape in instruction.shapes if len(shape.dims) >= len(k.dims) and shape.elements >= k.elements]
    if which == "dkv" and len(large) > 2:
        count = 5  # the fused backward writes dq beside dk and dv
    heads = q.elements // (rows * head)
    flops = 2.0 * count * heads * live * block[0] * block[1] * head
    size = block[1] if which != "dkv" else block[0]
    streamed = {places[each]: heads * live * size * head * q.bits / 8 for each in again if each in places}
    return Kernel(
        name, flops, streamed, f"kernel {name}: {count} products over {masked} of {block[0]} x {block[1]} blocks"
    )


def _flash(
    instruction: Instruction, owner: Computation, name: str, which: str, block: tuple[int, int], window: int | None
) -> Kernel:
    """Ours for GPUs (gemma/flash.py), whose name has its blocks and its window; keys and values come from the cache."""
    q = owner.by_name[instruction.operands[0]].shape
    rows, tokens, heads, head = q.dims
    live = 0
    for start in range(0, tokens, block[0]):
        first = 0 if window is None else max(0, start + 1 - window)
        live += -(-(start + block[0]) // block[1]) - first // block[1]
    count = {"forward": 2, "dq": 3, "dkv": 4}[which]
    flops = 2.0 * count * rows * heads * live * block[0] * block[1] * head
    every = tokens // block[0] * (tokens // block[1])
    return Kernel(name, flops, {}, f"kernel {name}: {count} products over {live} of {every} blocks, its operands read "
                                   "once from memory, then from the cache")  # fmt: skip


def _told(instruction: Instruction) -> dict[str, int]:
    """Block sizes and layouts, which splash attention writes beside its call."""
    found = re.search(r'"xprof_metadata":\s*"((?:[^"\\]|\\.)*)"', instruction.attributes)
    return json.loads(found[1].replace('\\"', '"')) if found else {}


def _live_blocks(
    rows: int, columns: int, block: tuple[int, int], grid: tuple[int, ...] | None, which: str
) -> tuple[int, str]:
    """Blocks of the score matrix that are computed: causal, and within the shrunk grid of a window."""
    causal = [min(columns, math.ceil((row + 1) * block[0] / block[1])) for row in range(rows)]
    width = columns if grid is None else grid[-1] if which != "dkv" else grid[-2]
    if which == "dkv":
        per_column = [sum(count > column for count in causal) for column in range(columns)]
        live = sum(min(width, count) for count in per_column)
        shrunk = width < rows
    else:
        live = sum(min(width, count) for count in causal)
        shrunk = width < columns
    return live, f"the {'window' if shrunk else 'causal'} {live} of {rows * columns}"
