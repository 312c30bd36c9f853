"""Writes the tiny dataset of specification -> Verilog pairs, and the held-out problems with testbenches.

    python scripts/make_tiny_verilog.py --out gemma_tpu/bundled/tiny_verilog
    python scripts/make_tiny_verilog.py --check     # the bundled files are what this generator writes

Deterministic. Held-out and validation rows are combinations of options that training never shows, different
in keywords, numbers or operators and not only in names; the script says how many held-out answers stand in
the other files once identifiers are renamed, and fails unless that is none.
"""

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

from tiny_verilog_basics import BASE
from tiny_verilog_circuits import FAMILY_WORDS, MODULES, VERILOG_WORDS, Circuit, Family, Names, Options, Port, span
from tiny_verilog_families import GENERAL, TRAIN

BUNDLED = Path(__file__).resolve().parent.parent / "gemma_tpu" / "bundled" / "tiny_verilog"
SEED = 21
ROWS = {"base": 4800, "train": 4900, "validation": 200, "heldout": 60}
OPENINGS = ("Write module {}:", "Design module {}:", "Verilog module {}:")
STYLE_WEIGHT = {"comb": 4.0, "plain": 2.0, "plain+en": 1.5}  # the plain styles are the frequent ones
TOKEN = re.compile(r"\d*'[bdh][0-9a-fA-F]+|\d+|[A-Za-z_]\w*|<=|>=|==|!=|<<|>>|~&|~\||~\^|&&|\|\||\S")
KEYWORDS = set(
    "module endmodule input output reg wire assign always posedge negedge or if else case endcase "
    "begin end signed".split()
)
Row = dict[str, Any]  # a conversation, or a problem with its testbench
CYCLES, QUIET_CYCLES = 500, 300  # random resets only after the quiet ones, so that wide states are reached


def canonical(verilog: str) -> str:
    """The code with its identifiers renamed in order of appearance: what is left is its structure."""
    names: dict[str, str] = {}
    out = []
    for token in TOKEN.findall(verilog):
        if re.match(r"[A-Za-z_]", token) and token not in KEYWORDS:
            token = names.setdefault(token, f"i{len(names)}")
        out.append(token)
    return " ".join(out)


def combinations(family: Family) -> list[Options]:
    options = (dict(zip(family.axes, values, strict=True)) for values in product(*family.axes.values()))
    return [o for o in options if family.allowed(o)]


def weight(options: Options) -> float:
    return STYLE_WEIGHT.get(options["style"], 1.0)


def draw(rng: random.Random, family: Family, combos: list[Options], count: int) -> list[Options]:
    """`count` combinations drawn without repetition, the frequent styles likelier."""
    order = sorted(combos, key=lambda o: rng.random() ** (1 / weight(o)), reverse=True)
    return order[:count]


def row(circuit: Circuit, module: str, opening: str) -> Row:
    return {
        "messages": [
            {"role": "user", "content": circuit.specification(module, opening)},
            {"role": "assistant", "content": circuit.verilog(module)},
        ]
    }


def answer(entry: Row) -> str:
    return str(entry["messages"][1]["content"])


class Build:
    """All four files in memory: `files` maps a name to its rows, `tally` to the rows of each family."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.files: dict[str, list[Row]] = {name: [] for name in ROWS}
        self.tally: dict[str, Counter[str]] = {name: Counter() for name in ROWS}
        self.reserved: set[str] = set()
        kept = [(family, *self.split(family, i)) for i, family in enumerate(TRAIN)]
        for family, combos in [(f, combos) for f, combos, _, _ in kept]:
            self.fill("train", family, combos, ROWS["train"] // len(TRAIN), MODULES)
        for family, _, _, validation in kept:
            for options in validation:
                self.add("validation", family, options, MODULES)
        for family, _, heldout, _ in kept:
            for options in heldout:
                self.add_problem(family, options)
        words = [w + "_m" if w in VERILOG_WORDS else w for w in FAMILY_WORDS]
        for family in GENERAL + BASE:
            self.fill("base", family, combinations(family), ROWS["base"] // len(GENERAL + BASE), MODULES + words)
        for name in ("base", "train", "validation"):
            self.rng.shuffle(self.files[name])

    def split(self, family: Family, index: int) -> tuple[list[Options], list[Options], list[Options]]:
        """What trains, the held-out and the validation combinations of a family, apart in structure."""
        combos = combinations(family)
        heldout_count = ROWS["heldout"] // len(TRAIN) + (index < ROWS["heldout"] % len(TRAIN))
        validation_count = ROWS["validation"] // len(TRAIN) + (index < ROWS["validation"] % len(TRAIN))
        chosen = draw(self.rng, family, combos, heldout_count + validation_count)
        heldout, validation = chosen[:heldout_count], chosen[heldout_count:]
        apart = {self.structure(family, o) for o in chosen}
        if len(apart) != len(chosen):
            raise SystemExit(f"{family.name}: two reserved combinations have one structure")
        self.reserved |= apart
        return [o for o in combos if self.structure(family, o) not in apart], heldout, validation

    def structure(self, family: Family, options: Options) -> str:
        return canonical(family.build(options, Names(random.Random(0))).verilog("m"))

    def fill(self, name: str, family: Family, combos: list[Options], count: int, modules: list[str]) -> None:
        """`count` rows: every combination once as long as the rows last, then again with other names."""
        chosen: list[Options] = []
        while len(chosen) < count:
            chosen += draw(self.rng, family, combos, count - len(chosen))
        for options in chosen:
            self.add(name, family, options, modules)

    def add(self, name: str, family: Family, options: Options, modules: list[str]) -> None:
        circuit = family.build(options, Names(self.rng))
        self.files[name].append(row(circuit, self.rng.choice(modules), self.rng.choice(OPENINGS)))
        self.tally[name][family.name] += 1

    def add_problem(self, family: Family, options: Options) -> None:
        circuit, module = family.build(options, Names(self.rng)), self.rng.choice(MODULES)
        number = self.tally["heldout"][family.name] = self.tally["heldout"][family.name] + 1
        self.files["heldout"].append(
            {
                "id": f"{family.name}_{number}",
                "family": family.name,
                "prompt": circuit.specification(module, self.rng.choice(OPENINGS)),
                "reference": circuit.verilog(module),
                "top": module,
                "samples": 2 * CYCLES,
                "exact_ports": True,
                "testbench": testbench(circuit, module),
            }
        )


def drive(port: Port, first: Port | None, output_width: int) -> str:
    """The statement that gives an input its next value, with small, extreme and equal values often enough.

    Late resets come mostly when the output is not zero, so that their timing shows.
    """
    number, name, width = "$random(tb_seed)", port.name, port.width
    if port.kind in ("reset", "reset_n"):
        on, off = ("1", "0") if port.kind == "reset" else ("0", "1")
        shows = f"(tb_want !== 0 && {{{number}}} % {2 if output_width == 1 else 8} == 0)"
        late = f"tb_i >= {QUIET_CYCLES} && ({{{number}}} % 32 == 0 || {shows})"
        return f"{name} = (tb_i < 3 || ({late})) ? {on} : {off};"
    if port.kind in ("enable", "load"):
        return f"{name} = {{{number}}} % 8 {'!= 0' if port.kind == 'enable' else '== 0'};"
    if width == 1:
        return f"{name} = {number};"
    lines = [f"case ({{{number}}} % 8)", f"0: {name} = 0;", f"1: {name} = -1;"]
    lines.append(f"2: {name} = 1 << ({{{number}}} % {width});")
    if first is not None and first.width == width:
        lines += [f"3: {name} = {first.name};", f"4: {name} = {first.name} + 1;"]
    return " ".join([*lines, f"default: {name} = {number};", "endcase"])


def testbench(circuit: Circuit, module: str) -> str:
    """A bench that drives the reference and the design alike and counts differences.

    The scorer fills the names, so that a design cannot know them. Each side has its own copy of the stimulus,
    and the output is compared where the reference knows it.
    """
    out, width = circuit.output.name, circuit.output.width
    clock = next((p.name for p in circuit.inputs if p.kind == "clock"), None)
    driven = [p for p in circuit.inputs if p.kind != "clock"]
    data = [p for p in driven if p.kind == "data" and p.width > 1]
    lines = ["`timescale 1ns/1ps", "module {{TB}};", "  integer tb_i, tb_seed, tb_samples, tb_bad;"]
    for p in circuit.inputs:
        lines += [
            f"  reg {span(p.width)}{p.name};",
            f"  wire {span(p.width)}tb_ref_{p.name} = {p.name}, tb_dut_{p.name} = {p.name};",
        ]
    lines.append(f"  wire {span(width)}tb_want, tb_got;")
    for module_name, instance, side, result in (
        ("{{REF}}", "{{REF_INST}}", "ref", "tb_want"),
        (module, "{{DUT_INST}}", "dut", "tb_got"),
    ):
        ports = "".join(f".{p.name}(tb_{side}_{p.name}), " for p in circuit.inputs)
        lines.append(f"  {module_name} {instance}({ports}.{out}({result}));")
    check = "tb_samples = tb_samples + 1; if (tb_want !== (tb_want ^ tb_got ^ tb_want)) tb_bad = tb_bad + 1;"
    lines += ["  initial begin", "    tb_seed = 7; tb_samples = 0; tb_bad = 0;"]
    lines += [f"    {clock} = 0;"] if clock else []
    lines.append(f"    for (tb_i = 0; tb_i < {CYCLES}; tb_i = tb_i + 1) begin")
    lines += [f"      {drive(p, data[0] if data and p in data[1:] else None, width)}" for p in driven]
    lines += [f"      #2 {check}", f"      {f'{clock} = 1; ' if clock else ''}#2 {check}"]
    lines += [f"      #1 {clock} = 0; #1;"] if clock else []
    lines += [
        "    end",
        '    $display("{{SECRET}} %0d %0d", tb_samples, tb_bad);',
        "    $finish;",
        "  end",
        "endmodule",
    ]
    return "\n".join(lines) + "\n"


def found_elsewhere(files: dict[str, list[Row]]) -> dict[str, int]:
    """For each other file, how many held-out answers stand in it once identifiers are renamed."""
    wanted = [canonical(problem["reference"]) for problem in files["heldout"]]
    found = {}
    for name in ("base", "train", "validation"):
        there = {canonical(answer(entry)) for entry in files[name]}
        found[name] = sum(structure in there for structure in wanted)
    return found


def readme(build: Build) -> str:
    counts = "\n".join(f"- `{name}.jsonl`: {len(rows)}" for name, rows in build.files.items())
    families = ", ".join(f.name for f in TRAIN)
    return f"""# Tiny Verilog

Short specifications and the Verilog modules that answer them, written by `scripts/make_tiny_verilog.py` from
this project's own templates; same licence as the project. For the demo and the tests: small enough that a
model of two million parameters learns it on a CPU.

{counts}

`base` holds other families than the rest and gives the tiny base model general skill. `heldout` holds
problems with a reference and a self-checking testbench; their combinations of options appear in no other
file, whatever the names. Families of train, validation and held-out: {families}.
"""


def contents(build: Build) -> dict[str, str]:
    out = {f"{name}.jsonl": "".join(json.dumps(r) + "\n" for r in rows) for name, rows in build.files.items()}
    return out | {"README.md": readme(build)}


def report(build: Build, found: dict[str, int]) -> None:
    for name, rows in build.files.items():
        texts = [
            (r["prompt"], r["reference"]) if name == "heldout" else (r["messages"][0]["content"], answer(r))
            for r in rows
        ]
        mean = [sum(len(t[i]) for t in texts) / len(texts) for i in (0, 1)]
        print(f"{name}: {len(rows)} rows, mean characters {mean[0]:.0f} specification, {mean[1]:.0f} answer")
        print("  " + ", ".join(f"{family} {count}" for family, count in build.tally[name].items()))
    for name, count in found.items():
        print(f"held-out answers found in {name} after renaming: {count} of {len(build.files['heldout'])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=BUNDLED, help="folder to write (default: the bundled one)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the bundled files")
    args = parser.parse_args()
    build = Build()
    found = found_elsewhere(build.files)
    report(build, found)
    if any(found.values()):
        print("held-out answers stand in another file: nothing written", file=sys.stderr)
        return 1
    files = {name: text.encode() for name, text in contents(build).items()}
    if args.check:
        stale = [
            n for n, b in files.items() if not (BUNDLED / n).is_file() or (BUNDLED / n).read_bytes() != b
        ]
        print(
            f"differ from the bundled files: {', '.join(stale)}"
            if stale
            else "the bundled files are up to date"
        )
        return 1 if stale else 0
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        part = args.out / (name + ".part")
        part.write_bytes(data)
        os.replace(part, args.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
