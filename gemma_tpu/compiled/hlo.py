"""Read the text of a compiled, scheduled HLO module: computations, instructions, shapes, trip counts.

The text is what XLA writes with `xla_dump_to`. Lines are split once and everything else is parsed when asked for,
because a module of a scanned 31B step has 40,000 lines of which a walk looks at a third.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # the others end in their width: f8e4m3fn is f8
HBM, HOST = 0, 5  # memory spaces of a layout, S(n); 1 is the on-chip VMEM, the rest scalars and semaphores

_LEAF = re.compile(r"([a-z]\w*)\[([0-9,<=]*)\](?:\{([^}]*)\})?|\btoken\[\]")
_OPERAND = re.compile(r"%([^\s,(){}]+)")
_NAME = re.compile(r"(ROOT )?%([^\s=]+) = ")
_PAREN = re.compile(r"[()]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations|branch_computations)"
    r"=(\{[^}]*\}|%[^\s,)}]+)"
)


@dataclass(frozen=True)
class Shape:
    """One array: its dims, and where and how it lies in memory."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()  # dims from minor to major
    tile: tuple[int, ...] = ()
    space: int = HBM

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        found = re.match(r"[a-z]+(\d+)", self.dtype)
        return BITS[self.dtype] if self.dtype in BITS else int(found[1]) if found else 0

    @cached_property
    def bytes(self) -> int:
        """Bytes as they lie in memory: the minor dims are padded to whole tiles."""
        dims = list(self.dims)
        if self.tile and len(self.tile) <= len(dims) == len(self.order):
            for size, dim in zip(reversed(self.tile), self.order, strict=False):
                dims[dim] = -(-dims[dim] // size) * size
        return math.prod(dims) * self.bits // 8


@cache
def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, a (nested) tuple flattened."""
    found = []
    for leaf in _LEAF.finditer(text):
        if leaf[1] is None:
            continue
        layout, _, rest = (leaf[3] or "").partition(":")
        tile = re.search(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        found.append(
            Shape(
                leaf[1],
                _ints(leaf[2].replace("<=", "")),
                _ints(layout),
                _ints(tile[1]) if tile else (),
                int(space[1]) if space else HBM,
            )
        )
    return tuple(found)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


@dataclass(eq=False)
class Instruction:
    name: str
    opcode: str
    type: str
    arguments: str  # the text between the parentheses
    attributes: str  # everything after them
    computation: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return shapes(self.type)

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return () if self.opcode == "constant" else tuple(_OPERAND.findall(self.arguments))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations this calls, in the order they are written."""
        return tuple(name for group in _CALLED.findall(self.attributes) for name in _OPERAND.findall(group))

    def attribute(self, name: str) -> str | None:
        """`name=value`, the value up to the next comma outside of its brackets."""
        found = re.search(rf"(?:^|[\s,]){re.escape(name)}=", self.attributes)
        if not found:
            return None
        depth, start = 0, found.end()
        for at in range(start, len(self.attributes)):
            char = self.attributes[at]
            depth += (char in "{[(") - (char in "}])")
            if depth == 0 and char == "," or depth < 0:
                return self.attributes[start:at]
        return self.attributes[start:]

    def needs(self, name: str) -> str:
        """An attribute that this opcode never lacks."""
        value = self.attribute(name)
        if value is None:
            raise ValueError(f"the {self.opcode} {self.name} of {self.computation} has no {name}")
        return value

    @property
    def index(self) -> int:
        """The place in the tuple that a get-tuple-element takes."""
        return int(self.needs("index"))

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def channel(self) -> str | None:
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found[1] if found else None

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate, in the dump only after code generation; its largest integer means unknown."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found and 0 < int(found[1]) < 2**62 else None


@dataclass(eq=False)
class Computation:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    marked: Instruction | None = None  # the one that the text calls ROOT

    @property
    def root(self) -> Instruction:
        """What the computation returns; a whole text marks one in each."""
        if self.marked is None:
            raise ValueError(f"the computation {self.name} has no ROOT: is its text cut off?")
        return self.marked

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(each.arguments): each for each in self.instructions if each.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {each.name: [] for each in self.instructions}
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                if operand in found:
                    found[operand].append(each)
        return found


@dataclass(eq=False)
class Module:
    name: str
    computations: dict[str, Computation]
    entry: Computation
    scheduled: bool
    partitions: int
    frames: dict[str, str]  # stack_frame_id -> "loss.py:53"

    def source(self, instruction: Instruction) -> str:
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if frame:
            return self.frames.get(frame[1], "")
        line = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        return f"{Path(line[1]).name}:{line[2]}" if line else ""

    def called(self, instruction: Instruction, role: str) -> Computation:
        """The computation that an instruction calls in one role: `body`, `condition`."""
        return self.computations[instruction.needs(role).strip("{}%")]

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Every instruction of the computations that this one calls, at any depth."""
        for name in instruction.called:
            for each in self.computations[name].instructions if name in self.computations else ():
                yield each
                yield from self.inside(each)


def parse(text: str) -> Module:
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    here: Computation | None = None
    lines = text.split("\n")
    for line in _joined(lines):
        if line.startswith("  "):
            if here is not None:
                _add(here, line[2:])
        elif line.endswith("{") and (line.startswith("%") or line.startswith("ENTRY ")):
            name = re.split(r"[\s(]", line.removeprefix("ENTRY ").removeprefix("%"), maxsplit=1)[0]
            here = computations[name] = Computation(name)
            entry = here if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            here = None
    head = lines[0]
    if entry is None:
        raise ValueError(f"no ENTRY computation in the HLO text that begins {head[:80]!r}")
    count = re.search(r"num_partitions=(\d+)", head)
    named = re.match(r"HloModule ([^\s,]+)", head)
    return Module(
        named[1] if named else "",
        computations,
        entry,
        "is_scheduled=true" in head,
        int(count[1]) if count else 1,
        _frames(lines),
    )


def load(path: Path) -> Module:
    return parse(path.read_text())


def _joined(lines: list[str]) -> Iterator[str]:
    """Lines, with an instruction whose attributes hold newlines (a kernel's metadata) put together again."""
    held: str | None = None
    for line in lines:
        begins = line.startswith(("  %", "  ROOT %"))
        ends = line == "}" or line.startswith("}, ") or line == ""
        if held is not None and not begins and not ends:
            held += " " + line
            continue
        if held is not None:
            yield held
        held = line if begins else None
        if not begins:
            yield line
    if held is not None:
        yield held


def _add(here: Computation, line: str) -> None:
    found = _NAME.match(line)
    if not found:
        return
    rest = line[found.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    kind, after = rest[:end], rest[end:].lstrip()
    opcode, _, _ = after.partition("(")
    close = _closing(after, len(opcode))
    made = Instruction(
        found[2], opcode, kind, after[len(opcode) + 1 : close - 1], after[close:].lstrip(", "), here.name
    )
    here.instructions.append(made)
    if found[1]:
        here.marked = made


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PAREN.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _frames(lines: list[str]) -> dict[str, str]:
    """The tables at the head of the text: stack frame -> file location -> file name and line."""
    tables: dict[str, dict[str, str]] = {}
    here: dict[str, str] | None = None
    for line in lines[1:]:
        if line.startswith(("%", "ENTRY ")):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            here = tables.setdefault(line, {})
        elif here is not None and line:
            key, _, value = line.partition(" ")
            here[key] = value
    frames = {}
    for key, value in tables.get("StackFrames", {}).items():
        place = re.search(r"file_location_id=(\d+)", value)
        location = tables.get("FileLocations", {}).get(place[1], "") if place else ""
        found = re.search(r"file_name_id=(\d+).*?\bline=(\d+)", location)
        if found:
            frames[key] = f"{Path(tables['FileNames'][found[1]].strip(chr(34))).name}:{found[2]}"
    return frames
