"""What the tiny dataset's circuits are made of: ports, names, clocking styles, and the shapes of a module.

A family is a builder plus the axes of its options; a builder turns options and names into a Circuit, which
knows its specification and its Verilog.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]  # one choice on each axis of a family
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
BUSES = WIDTHS[1:]
PATTERNS = tuple(f"{i:0{length}b}" for length in (3, 4) for i in range(2**length))
SIGNS = ("signed", "unsigned")
RESETS = ("sync", "async", "low", "sync+en", "async+en", "low+en")
STYLES = ("comb", "plain", "plain+en", *RESETS)
MODULES = (
    "core tile block slot node part dut stage logic_a logic_b top_a top_b item piece chip device"
).split()
# Names of modules in the base rows only: words of the richer families, so that their tokens have been trained
# (embeddings are no LoRA target) while what they mean is still to be learnt.
FAMILY_WORDS = (
    "gate multiplexer adder subtractor parity reverse minimum maximum decoder encoder gray counter modulo "
    "shift rotate register accumulator saturating edge detector rising falling sequence divider toggle "
    "states machine counting left right up down load signed priority highest lowest less greater equal "
    "subtract add nand nor xor xnor and or otherwise inverted"
).split()
VERILOG_WORDS = {"and", "or", "xor", "nand", "nor", "xnor", "signed", "priority", "edge", "sequence"}
DATA = "a b c d x w din data".split()
OUTPUTS = "y q z out res".split()


@dataclass(frozen=True)
class Port:
    name: str
    width: int = 1
    kind: str = "data"  # data | load | enable | clock | reset | reset_n: what the testbench drives it with
    signed: bool = False


@dataclass(frozen=True)
class Circuit:
    """What a builder returns: the specification without the module's name, the ports, and the body."""

    phrase: str
    inputs: tuple[Port, ...]
    output: Port
    body: str
    output_is_reg: bool

    def specification(self, module: str, opening: str) -> str:
        return f"{opening.format(module)} {self.phrase}."

    def verilog(self, module: str) -> str:
        ports = [f"input {sign(p)}{span(p.width)}{p.name}" for p in self.inputs]
        reg = "reg " if self.output_is_reg else ""
        ports.append(f"output {reg}{sign(self.output)}{span(self.output.width)}{self.output.name}")
        return f"module {module}({', '.join(ports)});\n{self.body}endmodule\n"


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[Options, "Names"], Circuit]
    axes: dict[str, tuple[Any, ...]]
    allowed: Callable[[Options], bool] = field(default=lambda options: True)


class Names:
    """The port names of one row, drawn from small pools, and a choice between two wordings."""

    def __init__(self, rng: random.Random):
        self.data = rng.sample(DATA, 4)
        self.out = rng.choice(OUTPUTS)
        self.select = rng.choice(("s", "sel", "pick"))
        self.load = rng.choice(("ld", "load", "set"))
        self.clock = rng.choice(("clk", "clock", "ck"))
        self.reset = rng.choice(("rst", "reset", "clr"))
        self.enable = rng.choice(("en", "ce", "run"))
        self.wording = rng.randrange(2)

    def path(self, source: str) -> str:
        return self.word(f"of {source} to {self.out}", f"from {source}, output {self.out}")

    def word(self, first: str, second: str) -> str:
        return (first, second)[self.wording]


def span(width: int) -> str:
    return "" if width == 1 else f"[{width - 1}:0] "


def sign(port: Port) -> str:
    return "signed " if port.signed else ""


def bits(width: int) -> str:
    return f"{width}-bit"


def listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]


def clocking(style: str, n: Names) -> tuple[str, list[Port], str, str]:
    """The phrase, the ports, the always line and the guard ("if (rst) % <= 0;\\n else ") of a style."""
    reset, _, enable = style.partition("+")
    low = reset == "low"
    name = n.reset + "_n" if low else n.reset
    said = {
        "plain": "",
        "sync": "synchronous reset ",
        "async": "asynchronous reset ",
        "low": "active-low asynchronous reset ",
    }[reset]
    tail = ([said + name] if said else []) + ([f"enable {n.enable}"] if enable else [])
    phrase = n.word(f", clock {n.clock}", f", clocked by {n.clock}") + "".join(f", {part}" for part in tail)
    ports = [Port(n.clock, 1, "clock")]
    ports += [Port(name, 1, "reset_n" if low else "reset")] if said else []
    ports += [Port(n.enable, 1, "enable")] if enable else []
    edge = {"async": f" or posedge {name}", "low": f" or negedge {name}"}.get(reset, "")
    guard = f"if ({'!' if low else ''}{name}) % <= 0;\n    else " if said else ""
    guard += f"if ({n.enable}) " if enable else ""
    return phrase, ports, f"  always @(posedge {n.clock}{edge})\n    ", guard


def always(style: str, n: Names, target: str, statement: str) -> tuple[str, list[Port], str]:
    phrase, ports, line, guard = clocking(style, n)
    return phrase, ports, line + guard.replace("%", target) + statement + "\n"


def expression(
    o: Options, n: Names, phrase: str, inputs: list[Port], width: int, value: str, signed: bool = False
) -> Circuit:
    """The output is a function of the inputs: an assign, or a register in one of the clocked styles."""
    output = Port(n.out, width, signed=signed)
    if o["style"] == "comb":
        return Circuit(phrase, tuple(inputs), output, f"  assign {n.out} = {value};\n", False)
    tail, ports, body = always(o["style"], n, n.out, f"{n.out} <= {value};")
    return Circuit(f"registered {phrase}{tail}", (*ports, *inputs), output, body, True)


def state(o: Options, n: Names, phrase: str, inputs: list[Port], width: int, following: str) -> Circuit:
    """The output is a register and its next value a function of itself and the inputs."""
    tail, ports, body = always(o["style"], n, n.out, f"{n.out} <= {following};")
    return Circuit(phrase + tail, (*ports, *inputs), Port(n.out, width), body, True)


def hidden(
    o: Options,
    n: Names,
    phrase: str,
    inputs: list[Port],
    width: int,
    register: tuple[str, int],
    statement: str,
    value: str,
) -> Circuit:
    """The output is a function of a register inside."""
    tail, ports, body = always(o["style"], n, register[0], statement)
    body = f"  reg {span(register[1])}{register[0]};\n{body}  assign {n.out} = {value};\n"
    return Circuit(phrase + tail, (*ports, *inputs), Port(n.out, width), body, False)
