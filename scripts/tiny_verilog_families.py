"""The richer families of the tiny dataset: LoRA trains on them, and the held-out problems come from them."""

from tiny_verilog_circuits import (
    BUSES,
    PATTERNS,
    RESETS,
    SIGNS,
    STYLES,
    WIDTHS,
    Circuit,
    Family,
    Names,
    Options,
    Port,
    bits,
    expression,
    hidden,
    listed,
    state,
)

GATES = {"and": "{}", "or": "{}", "xor": "{}", "nand": "~({})", "nor": "~({})", "xnor": "~({})"}
SYMBOL = {
    "and": "&",
    "or": "|",
    "xor": "^",
    "nand": "&",
    "nor": "|",
    "xnor": "^",
    "add": "+",
    "subtract": "-",
}


def gate(o: Options, n: Names) -> Circuit:
    names = n.data[: o["inputs"]]
    value = GATES[o["op"]].format(f" {SYMBOL[o['op']]} ".join(names))
    phrase = f"{bits(o['width'])} {o['inputs']}-input {o['op']} gate " + n.word(
        f"of {listed(names)} to {n.out}", f"with inputs {listed(names)}, output {n.out}"
    )
    return expression(o, n, phrase, [Port(p, o["width"]) for p in names], o["width"], value)


def mux2(o: Options, n: Names) -> Circuit:
    a, b = n.data[:2]
    phrase = f"{bits(o['width'])} 2-to-1 multiplexer, " + n.word(
        f"{n.out} is {a} when {n.select} is {o['sense']}, otherwise {b}",
        f"{n.select} {o['sense']} gives {a} on {n.out}, otherwise {b}",
    )
    test = n.select if o["sense"] == "high" else f"!{n.select}"
    ports = [Port(n.select), Port(a, o["width"]), Port(b, o["width"])]
    return expression(o, n, phrase, ports, o["width"], f"{test} ? {a} : {b}")


def mux4(o: Options, n: Names) -> Circuit:
    a, b, c, d = n.data
    phrase = f"{bits(o['width'])} 4-to-1 multiplexer, " + n.word(
        f"{n.select} selects {listed(n.data)} to {n.out}", f"{n.out} is one of {listed(n.data)} by {n.select}"
    )
    ports = [Port(n.select, 2), *(Port(p, o["width"]) for p in n.data)]
    s = n.select
    value = f"{s}[1] ? ({s}[0] ? {d} : {c}) : ({s}[0] ? {b} : {a})"
    return expression(o, n, phrase, ports, o["width"], value)


def add(o: Options, n: Names) -> Circuit:
    a, b, c = n.data[:3]
    symbol, extra = {
        "adder": ("+", ""),
        "subtractor": ("-", ""),
        "adder with carry": ("+", "+"),
        "subtractor with borrow": ("-", "-"),
    }[o["kind"]]
    phrase = f"{bits(o['width'])} {o['kind']}{' ' + c if extra else ''}, " + n.word(
        f"operands {a} and {b}, result {n.out}", f"{a} and {b} to {n.out}"
    )
    ports = [Port(a, o["width"]), Port(b, o["width"]), *([Port(c)] if extra else [])]
    value = f"{a} {symbol} {b}" + (f" {extra} {c}" if extra else "")
    return expression(o, n, phrase, ports, o["width"], value)


COMPARISONS = {
    "equal to": "==",
    "not equal to": "!=",
    "less than": "<",
    "greater than": ">",
    "at most": "<=",
    "at least": ">=",
}


def compare(o: Options, n: Names) -> Circuit:
    a, b = n.data[:2]
    phrase = f"{o['sign']} {bits(o['width'])} comparator, " + n.word(
        f"{n.out} is high when {a} is {o['relation']} {b}", f"{a} {o['relation']} {b} sets {n.out}"
    )
    ports = [Port(p, o["width"], signed=o["sign"] == "signed") for p in (a, b)]
    return expression(o, n, phrase, ports, 1, f"({a} {COMPARISONS[o['relation']]} {b})")


REDUCTIONS = {
    "parity": "^",
    "inverted parity": "~^",
    "all ones": "&",
    "not all ones": "~&",
    "any one": "|",
    "all zeros": "~|",
}


def reduce(o: Options, n: Names) -> Circuit:
    a = n.data[0]
    phrase = f"{bits(o['width'])} {o['kind']} detector " + n.path(a)
    return expression(o, n, phrase, [Port(a, o["width"])], 1, f"{REDUCTIONS[o['kind']]}{a}")


def reverse(o: Options, n: Names) -> Circuit:
    a, width = n.data[0], o["width"]
    inverted = "inverted " if o["inverted"] else ""
    phrase = f"{inverted}{bits(width)} reverse of {a}" + n.word(f" to {n.out}", f", output {n.out}")
    value = ("~" if inverted else "") + "{" + ", ".join(f"{a}[{i}]" for i in range(width)) + "}"
    return expression(o, n, phrase, [Port(a, width)], width, value)


def extreme(o: Options, n: Names) -> Circuit:
    a, b = n.data[:2]
    signed = o["sign"] == "signed"
    phrase = f"{o['sign']} {bits(o['width'])} {o['kind']} of {a} and {b}" + n.word(
        f" to {n.out}", f", output {n.out}"
    )
    value = f"({a} {'<' if o['kind'] == 'minimum' else '>'} {b}) ? {a} : {b}"
    return expression(
        o, n, phrase, [Port(p, o["width"], signed=signed) for p in (a, b)], o["width"], value, signed
    )


ALU = ("add", "subtract", "and", "or", "xor")


def alu(o: Options, n: Names) -> Circuit:
    a, b = n.data[:2]
    phrase = (
        f"{bits(o['width'])} {o['first']} unit of {a} and {b} to {n.out} when {n.select} is high, "
        + n.word(f"otherwise {o['second']}", f"{o['second']} when low")
    )
    ports = [Port(n.select), Port(a, o["width"]), Port(b, o["width"])]
    value = f"{n.select} ? {a} {SYMBOL[o['first']]} {b} : {a} {SYMBOL[o['second']]} {b}"
    return expression(o, n, phrase, ports, o["width"], value)


def decoder(o: Options, n: Names) -> Circuit:
    a, lines = n.data[0], 2 ** o["bits"]
    phrase = f"{o['bits']}-to-{lines} decoder, {o['active']} outputs, " + n.word(
        f"{a} selects a bit of {n.out}", f"input {a}, output {n.out}"
    )
    value = f"1 << {a}" if o["active"] == "active-high" else f"~(1 << {a})"
    return expression(o, n, phrase, [Port(a, o["bits"])], lines, value)


def priority(o: Options, n: Names) -> Circuit:
    a, lines = n.data[0], o["lines"]
    width = 2 if lines <= 4 else 3
    phrase = f"{lines}-input priority encoder, {o['first']} bit of {a} first, " + n.word(
        f"index on {n.out}", f"output {n.out}"
    )
    order = range(lines - 1, 0, -1) if o["first"] == "highest" else range(lines - 1)
    last = 0 if o["first"] == "highest" else lines - 1
    value = " : ".join(f"{a}[{i}] ? {i}" for i in order) + f" : {last}"
    return expression(o, n, phrase, [Port(a, lines)], width, value)


def gray(o: Options, n: Names) -> Circuit:
    a = n.data[0]
    inverted = "inverted " if o["inverted"] else ""
    phrase = f"{inverted}{bits(o['width'])} gray encoder " + n.path(a)
    value = f"~({a} ^ ({a} >> 1))" if inverted else f"{a} ^ ({a} >> 1)"
    return expression(o, n, phrase, [Port(a, o["width"])], o["width"], value)


def counter(o: Options, n: Names) -> Circuit:
    phrase = f"{bits(o['width'])} {o['way']} counter {n.out}" + n.word(
        f" counting by {o['step']}", f" with step {o['step']}"
    )
    return state(o, n, phrase, [], o["width"], f"{n.out} {'+' if o['way'] == 'up' else '-'} {o['step']}")


def modulo(o: Options, n: Names) -> Circuit:
    q, last = n.out, o["last"]
    if o["way"] == "up":
        phrase, value = f"from 0 to {last}", f"({q} == {last}) ? 0 : {q} + 1"
    else:
        phrase, value = f"from {last} to 0", f"({q} == 0) ? {last} : {q} - 1"
    phrase = f"{bits(o['width'])} modulo {o['way']} counter {q} " + n.word(f"counting {phrase}", phrase)
    return state(o, n, phrase, [], o["width"], value)


def updown(o: Options, n: Names) -> Circuit:
    q, up = n.out, n.select
    test = up if o["sense"] == "high" else f"!{up}"
    phrase = f"{bits(o['width'])} counter {q}, up when {up} is {o['sense']}, " + n.word(
        "otherwise down", "else down"
    )
    phrase += f", step {o['step']}"
    return state(o, n, phrase, [Port(up)], o["width"], f"{test} ? {q} + {o['step']} : {q} - {o['step']}")


def load_counter(o: Options, n: Names) -> Circuit:
    q, d, symbol = n.out, n.data[0], "+" if o["way"] == "up" else "-"
    phrase = f"{bits(o['width'])} {o['way']} counter {q}, step {o['step']}, " + n.word(
        f"load {d} when {n.load} is high", f"{n.load} loads {d}"
    )
    ports = [Port(n.load, 1, "load"), Port(d, o["width"])]
    return state(o, n, phrase, ports, o["width"], f"{n.load} ? {d} : {q} {symbol} {o['step']}")


def moved(q: str, width: int, way: str, incoming: str) -> str:
    if way == "left":
        return f"{{{q}[{width - 2}:0], {incoming}}}"
    return f"{{{incoming}, {q}[{width - 1}:1]}}"


def shift(o: Options, n: Names) -> Circuit:
    q, d = n.out, n.data[0]
    phrase = f"{bits(o['width'])} {o['way']} shift register {q} " + n.word(
        f"with serial input {d}", f"taking bit {d}"
    )
    return state(o, n, phrase, [Port(d)], o["width"], moved(q, o["width"], o["way"], d))


def rotate(o: Options, n: Names) -> Circuit:
    q, d, width = n.out, n.data[0], o["width"]
    edge = f"{q}[{width - 1}]" if o["way"] == "left" else f"{q}[0]"
    phrase = f"{bits(width)} {o['way']} rotate register {q}, " + n.word(
        f"load {d} when {n.load} is high", f"{n.load} loads {d}"
    )
    ports = [Port(n.load, 1, "load"), Port(d, width)]
    return state(o, n, phrase, ports, width, f"{n.load} ? {d} : {moved(q, width, o['way'], edge)}")


def accumulator(o: Options, n: Names) -> Circuit:
    q, d = n.out, n.data[0]
    phrase = f"{bits(o['width'])} {o['op']} accumulator {q} " + n.word(f"of {d}", f"with input {d}")
    return state(o, n, phrase, [Port(d, o["width"])], o["width"], f"{q} {SYMBOL[o['op']]} {d}")


def saturating(o: Options, n: Names) -> Circuit:
    q, d = n.out, n.data[0]
    value = f"(&{q}) ? {q} : {q} + 1" if o["way"] == "up" else f"(|{q}) ? {q} - 1 : {q}"
    phrase = f"{bits(o['width'])} saturating {o['way']} counter {q}, " + n.word(
        f"load {d} when {n.load} is high", f"{n.load} loads {d}"
    )
    ports = [Port(n.load, 1, "load"), Port(d, o["width"])]
    return state(o, n, phrase, ports, o["width"], f"{n.load} ? {d} : {value}")


def edge(o: Options, n: Names) -> Circuit:
    d, p = n.data[0], "p"
    value = {"rising": f"{d} & ~{p}", "falling": f"~{d} & {p}", "any": f"{d} ^ {p}"}[o["kind"]]
    phrase = f"{bits(o['width'])} {o['kind']} edge detector " + n.path(d)
    return hidden(o, n, phrase, [Port(d, o["width"])], o["width"], (p, o["width"]), f"{p} <= {d};", value)


def sequence(o: Options, n: Names) -> Circuit:
    d, p, length = n.data[0], "p", len(o["pattern"])
    phrase = f"{bits(length)} sequence detector of {o['pattern']} " + n.word(
        f"on {d} to {n.out}", f"in {d}, output {n.out}"
    )
    statement = f"{p} <= {moved(p, length, 'left', d)};"
    return hidden(o, n, phrase, [Port(d)], 1, (p, length), statement, f"({p} == {length}'b{o['pattern']})")


def divider(o: Options, n: Names) -> Circuit:
    p, last = "p", o["last"]
    phrase = f"clock divider {n.out}, {bits(o['width'])} counter, " + n.word(
        f"pulse at {last}", f"high when it is {last}"
    )
    statement = f"{p} <= ({p} == {last}) ? 0 : {p} + 1;"
    return hidden(o, n, phrase, [], 1, (p, o["width"]), statement, f"({p} == {last})")


def machine(o: Options, n: Names) -> Circuit:
    go, p, states = n.data[0], "p", o["states"]
    phrase = f"state machine of {states} states, " + n.word(
        f"waits in state {o['wait']} for {go}, {n.out} high in state {o['high']}",
        f"state {o['wait']} waits for {go}, state {o['high']} sets {n.out}",
    )
    steps = []
    for i in range(states):
        following = (i + 1) % states
        steps.append(
            f"      {i}: {p} <= " + (f"{go} ? {following} : {i};" if i == o["wait"] else f"{following};")
        )
    statement = f"case ({p})\n" + "\n".join(steps) + "\n    endcase"
    return hidden(o, n, phrase, [Port(go)], 1, (p, 2), statement, f"({p} == {o['high']})")


def fits(o: Options) -> bool:
    return bool(o["last"] < 2 ** o["width"])


ACCUMULATED = ("add", "subtract", "or", "xor")  # "and" would stay at its reset value
LASTS = (2, 3, 5, 6, 9, 11, 12, 13)
WAYS = ("up", "down")
TRAIN = (
    Family("gate", gate, {"op": tuple(GATES), "inputs": (2, 3), "width": WIDTHS, "style": STYLES}),
    Family("mux2", mux2, {"sense": ("high", "low"), "width": WIDTHS, "style": STYLES}),
    Family(
        "add",
        add,
        {
            "kind": ("adder", "subtractor", "adder with carry", "subtractor with borrow"),
            "width": BUSES,
            "style": STYLES,
        },
    ),
    Family(
        "compare",
        compare,
        {"relation": tuple(COMPARISONS), "sign": SIGNS, "width": BUSES, "style": STYLES},
        lambda o: o["sign"] == "unsigned" or "equal" not in o["relation"],  # where a sign makes no difference
    ),
    Family("reduce", reduce, {"kind": tuple(REDUCTIONS), "width": BUSES, "style": STYLES}),
    Family("decoder", decoder, {"bits": (2, 3, 4), "active": ("active-high", "active-low"), "style": STYLES}),
    Family("counter", counter, {"way": WAYS, "step": (1, 2, 3), "width": BUSES, "style": RESETS}),
    Family("modulo", modulo, {"way": WAYS, "last": LASTS, "width": (2, 3, 4, 5, 6), "style": RESETS}, fits),
    Family("updown", updown, {"sense": ("high", "low"), "step": (1, 2, 3), "width": BUSES, "style": RESETS}),
    Family("load_counter", load_counter, {"way": WAYS, "step": (1, 2, 3), "width": BUSES, "style": RESETS}),
    Family("shift", shift, {"way": ("left", "right"), "width": BUSES[1:], "style": RESETS}),
    Family("edge", edge, {"kind": ("rising", "falling", "any"), "width": WIDTHS, "style": RESETS}),
    Family("divider", divider, {"last": LASTS, "width": (2, 3, 4, 5, 6), "style": RESETS}, fits),
    Family("machine", machine, {"states": (3, 4), "wait": (0, 1, 2), "high": (0, 1, 2), "style": RESETS}),
)
# Their operands and options are as rich, but they teach the base model: nothing of them is held out.
GENERAL = (
    Family("sequence", sequence, {"pattern": PATTERNS, "style": RESETS}),
    Family("mux4", mux4, {"width": WIDTHS, "style": STYLES}),
    Family("reverse", reverse, {"inverted": (False, True), "width": (2, 3, 4, 5, 6), "style": STYLES}),
    Family(
        "extreme", extreme, {"kind": ("minimum", "maximum"), "sign": SIGNS, "width": BUSES, "style": STYLES}
    ),
    Family(
        "alu",
        alu,
        {"first": ALU, "second": ALU, "width": BUSES, "style": STYLES},
        lambda o: o["first"] != o["second"],
    ),
    Family("priority", priority, {"lines": (3, 4, 5), "first": ("highest", "lowest"), "style": STYLES}),
    Family("gray", gray, {"inverted": (False, True), "width": BUSES, "style": STYLES}),
    Family("rotate", rotate, {"way": ("left", "right"), "width": BUSES[1:], "style": RESETS}),
    Family("accumulator", accumulator, {"op": ACCUMULATED, "width": BUSES, "style": RESETS}),
    Family("saturating", saturating, {"way": WAYS, "width": BUSES, "style": RESETS}),
)
