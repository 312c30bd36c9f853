"""Bytes between HBM and the chip that one scheduled instruction moves.

What counts is what lives in HBM: buffers that the compiler put into VMEM, scalars and semaphores are free. A fusion
that slices a stack of layers reads the slice; an update in place writes the update; a value passed through is free.
"""

from gemma_tpu.compiled.hlo import HBM, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
               "collective-broadcast")  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
FREE = frozenset(
    """parameter constant bitcast tuple get-tuple-element partition-id replica-id after-all opt-barrier domain
    add-dependency optimization-barrier""".split()
)
FREE_CALLS = frozenset(
    """AllocateBuffer ConcatBitcast SliceId AssumeGatherIndicesInBound NopReturnToken Sharding SPMDFullToShardShape
    SPMDShardToFullShape AsyncCollectiveStart AsyncCollectiveDone""".split()
)

_QUOTED = frozenset(f'"{name}"' for name in FREE_CALLS)


class Traffic:
    """Bytes by instruction of one module; what a fused computation reads and writes is worked out once."""

    def __init__(self, module: Module):
        self.module = module
        self._reads: dict[tuple[str, str], int | None] = {}

    def bytes(self, instruction: Instruction, owner: Computation, space: int = HBM) -> int:
        """Bytes read and written in one memory space."""
        if instruction.opcode in FREE or instruction.attribute("custom_call_target") in _QUOTED:
            return 0
        total = 0
        for place, name in enumerate(instruction.operands):
            operand = owner.by_name.get(name)
            if operand is None:
                continue
            held = sum(shape.bytes for shape in operand.shapes if shape.space == space)
            if held:
                part = self._operand(instruction, place, owner)
                total += held if part is None else min(held, part)
        written = self._written(instruction, owner)
        for shape, part in zip(instruction.shapes, written, strict=True):
            if shape.space == space:
                total += shape.bytes if part is None else min(shape.bytes, part)
        return total

    def _operand(self, instruction: Instruction, place: int, owner: Computation) -> int | None:
        """Bytes read of one operand; None is all of it."""
        name = instruction.operands[place]
        if instruction.opcode == "fusion":
            inner = self.module.computations[instruction.called[0]]
            return self._read(inner, inner.parameters[place].name)
        if instruction.opcode in SLICES and place == 0:
            return sum(shape.bytes for shape in instruction.shapes)
        if instruction.opcode in ("dynamic-update-slice", "scatter") and place == 0:
            return 0 if name not in instruction.operands[1:] else None
        return None

    def _read(self, owner: Computation, name: str) -> int | None:
        key = (owner.name, name)
        if key not in self._reads:
            self._reads[key] = self._read_by_users(owner, name)
        return self._reads[key]

    def _read_by_users(self, owner: Computation, name: str) -> int | None:
        total = 0
        for user in owner.users[name]:
            for place in (at for at, operand in enumerate(user.operands) if operand == name):
                part = self._read_by(owner, user, place)
                if part is None:
                    return None
                total += part
        return total

    def _read_by(self, owner: Computation, user: Instruction, place: int) -> int | None:
        if user.opcode in ("bitcast", "get-tuple-element"):
            return self._read(owner, user.name)
        if user.opcode == "tuple" or user.opcode in COLLECTIVES:
            return 0  # passed through, or moved by the collective that is counted on its own
        if user.opcode == "custom-call":
            return 0 if user.attribute("custom_call_target") in _QUOTED else None
        return self._operand(user, place, owner)

    def _written(self, instruction: Instruction, owner: Computation) -> list[int | None]:
        """Bytes written of each array of the result; None is all of it."""
        if instruction.opcode == "fusion":
            inner = self.module.computations[instruction.called[0]]
            return self._results(inner, inner.root)
        if instruction.opcode == "dynamic-update-slice":
            return [_bytes(owner, instruction.operands[1])]
        if instruction.opcode == "scatter":
            count = len(instruction.shapes)
            return [_bytes(owner, name) for name in instruction.operands[-count:]]
        return [None] * len(instruction.shapes)

    def _results(self, owner: Computation, root: Instruction) -> list[int | None]:
        count = len(root.shapes)
        if root.opcode == "tuple":
            found = [part for name in root.operands for part in self._results(owner, owner.by_name[name])]
            return found if len(found) == count else [None] * count
        if root.opcode == "bitcast" and root.operands[0] in owner.by_name:
            return self._results(owner, owner.by_name[root.operands[0]])
        if root.opcode == "parameter" or root.opcode in COLLECTIVES:
            return [0] * count
        if root.opcode == "custom-call" and root.attribute("custom_call_target") in _QUOTED:
            return [0] * count
        return self._written(root, owner)


def _bytes(owner: Computation, name: str) -> int:
    return sum(shape.bytes for shape in owner.by_name[name].shapes)
