"""What each scheduled instruction of a module does: operations, bytes, a collective; and what to call it."""

import re
from collections import Counter
from dataclasses import dataclass

from gemma_tpu.compiled import flops, links
from gemma_tpu.compiled.hlo import HBM, Computation, Instruction, Module, Shape
from gemma_tpu.compiled.traffic import COLLECTIVES, FREE_CALLS, Traffic
from gemma_tpu.hardware.chips import Slice

Collective = tuple[Instruction, Computation]  # with the computation that names its operands
_PLUMBING = re.compile(r"(jit|jvp|transpose|vmap)\(.*\)|while|body|cond|closed_call|checkpoint|rematted_computation|"
                       r"shard_map|")  # fmt: skip
_ALL_LINKS = "every chip receives over all of its links to chips of its group at once"
_ROUTED = "each pair over the shortest way, axis by axis; the busiest link counts"
_HOW = {
    "all-gather": _ALL_LINKS,
    "reduce-scatter": _ALL_LINKS,
    "all-reduce": f"as a reduce-scatter and an all-gather; {_ALL_LINKS}",
}


@dataclass(frozen=True)
class Work:
    """What one instruction does while it holds the core."""

    kind: str  # matmul, kernel, copy, memory
    flops: float = 0.0
    compute: float = 0.0  # seconds at the peak
    bytes: float = 0.0
    memory: float = 0.0  # seconds at the HBM bandwidth
    cycles: float | None = None  # seconds by the compiler's estimate
    transfer: links.Transfer | None = None


class Works:
    """The work of each instruction, found once; notes what had to be assumed and what was not understood."""

    def __init__(self, module: Module, place: Slice, clock_ghz: float | None):
        self.module, self.place, self.clock_ghz = module, place, clock_ghz
        self.traffic = Traffic(module)
        self.bandwidth = place.chip.device_hbm_gbs * 1e9
        self.assumptions: dict[str, None] = {}
        self.unknown: Counter[str] = Counter()
        self._works: dict[Instruction, Work] = {}
        self._names: dict[Instruction, str] = {}
        self._collectives: dict[Instruction, Collective | None] = {}
        self._transfers: dict[Instruction, links.Transfer | None] = {}

    def of(self, each: Instruction, here: Computation) -> Work:
        if each not in self._works:
            self._works[each] = self._call(each, here) if each.opcode == "custom-call" else self._work(each, here)
        return self._works[each]

    def _work(self, each: Instruction, here: Computation) -> Work:
        moved = float(self.traffic.bytes(each, here))
        products = flops.products(self.module, each, here)
        done = sum(one.flops for one in products)
        kind = "matmul" if done else "copy" if each.opcode in ("copy", "transpose", "reshape") else "memory"
        found = self.collective(each, here)
        if each.opcode in ("send", "recv", "infeed", "outfeed"):
            self.unknown[f"{each.opcode}, counted by its bytes in HBM"] += 1
        return Work(
            kind,
            done,
            sum(one.flops * one.passes / self._peak(one.unit) for one in products),
            moved,
            moved / self.bandwidth,
            each.cycles / (self.clock_ghz * 1e9) if each.cycles and self.clock_ghz and not found else None,
            self.transfer(*found) if found else None,
        )

    def _call(self, each: Instruction, here: Computation) -> Work:
        target = (each.attribute("custom_call_target") or "").strip('"')
        if target in FREE_CALLS:
            return Work("memory")
        moved = float(self.traffic.bytes(each, here))
        if target not in flops.PALLAS:
            self.unknown[f"custom call {target}, counted by its bytes"] += 1
            return Work("memory", bytes=moved, memory=moved / self.bandwidth)
        kernel = flops.kernel(each, here)
        for place, streamed in kernel.streamed.items():
            shape = here.by_name[each.operands[place]].shape
            moved += max(0.0, streamed - shape.bytes) if shape.space == HBM else 0.0
        if kernel.flops is None:
            self.unknown[kernel.note] += 1
        else:
            self.assumptions[kernel.note] = None
        done = kernel.flops or 0.0
        return Work("kernel", done, done / self._peak("bf16"), moved, moved / self.bandwidth)

    def _peak(self, unit: str) -> float:
        chip = self.place.chip
        whole = (chip.int8_tflops or chip.bf16_tflops) if unit == "int8" else chip.bf16_tflops
        return whole / chip.devices * 1e12

    def moved(self, each: Instruction, here: Computation) -> float:
        """Bytes in HBM of something that runs in the background: the instruction that its wrappers wrap."""
        if each.opcode == "copy-start":
            source, into = here.by_name[each.operands[0]].shape, each.shapes[0]
            return float(sum(shape.bytes for shape in (source, into) if shape.space == HBM))
        while each.called and each.opcode in ("async-start", "call", "custom-call"):
            here = self.module.computations[each.called[0]]
            each = here.root
            if each.opcode == "async-done":
                each = here.by_name[each.operands[0]]
        return float(self.traffic.bytes(each, here))

    # --- collectives ---

    def collective(self, each: Instruction, here: Computation) -> Collective | None:
        """The collective that an instruction is or holds, at any depth."""
        if each not in self._collectives:
            self._collectives[each] = self._find_collective(each, here)
        return self._collectives[each]

    def _find_collective(self, each: Instruction, here: Computation) -> Collective | None:
        if each.opcode.removesuffix("-start") in COLLECTIVES:
            return each, here
        for name in each.called if each.opcode not in ("while", "conditional") else ():
            inner = self.module.computations[name]
            for one in inner.instructions:
                found = self.collective(one, inner)
                if found:
                    return found
        return None

    def transfer(self, one: Instruction, owner: Computation) -> links.Transfer | None:
        if one not in self._transfers:
            self._transfers[one] = self._transfer(one, owner)
        return self._transfers[one]

    def _transfer(self, one: Instruction, owner: Computation) -> links.Transfer | None:
        kind = one.opcode.removesuffix("-start")
        if kind == "all-reduce" and "all-reduce-scatter" in owner.name:
            kind = "reduce-scatter"  # kept as an all-reduce and a slice of it, in one fusion
        made = links.transfer(kind, one, shapes_of(one, owner), self.module.partitions)
        if made is None:
            self.unknown[f"{kind} whose groups were not understood ({one.name}), taken as nothing"] += 1
        else:
            self.assumptions[f"{kind}: {_HOW.get(kind, _ROUTED)}"] = None
        return made

    def transfers(self) -> list[links.Transfer]:
        """Every collective of the module."""
        found = []
        for owner in self.module.computations.values():
            for each in owner.instructions:
                if each.opcode.removesuffix("-start") in COLLECTIVES:
                    found.append(self.transfer(each, owner))
        return [one for one in found if one is not None]

    def end(self, each: Instruction) -> str | None:
        """Which end of an asynchronous collective a custom fusion is: AsyncCollectiveStart or AsyncCollectiveDone."""
        if each.opcode == "fusion" and "kind=kCustom" in each.attributes:
            root = self.module.computations[each.called[0]].root
            found = re.search(r'custom_call_target="(AsyncCollective\w+)"', root.attributes)
            return found[1] if found else None
        return None

    # --- names ---

    def name(self, each: Instruction) -> str:
        if each not in self._names:
            self._names[each] = self._name(each)
        return self._names[each]

    def _name(self, each: Instruction) -> str:
        """`recompute BTD,FD->BTF/dot_general (model.py:141)`; of a fusion with products, its largest."""
        told = each
        if each.opcode == "fusion":
            inside = [one for one in self.module.inside(each) if one.opcode in ("dot", "convolution")]
            told = max(inside, key=lambda one: one.shape.elements, default=each)
        path = [part for part in told.op_name.split("/") if not _PLUMBING.fullmatch(part)]
        if not path:
            stem = re.sub(r"[.\d]+$", "", each.name)
            return f"{stem} {each.type.split('{')[0].lstrip('(')}"
        phase = ""
        for mark, word in (("rematted_computation", "recompute "), ("transpose(", "backward "), ("jvp(", "forward ")):
            if mark in told.op_name:
                phase = word
                break
        source = self.module.source(told)
        return phase + "/".join(path[-2:]) + (f" ({source})" if source else "")


def shapes_of(each: Instruction, here: Computation) -> list[Shape]:
    """Of the operands."""
    return [shape for name in each.operands if name in here.by_name for shape in here.by_name[name].shapes]
