"""The base families of the tiny dataset: general skill for the tiny base model, in the same language.

They teach Verilog syntax, copying names and expressions, widths, clocks and resets, and answer none of the
richer families' specifications.
"""

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
    always,
    bits,
    expression,
    hidden,
    listed,
    state,
)

OPERATORS = ("&", "|", "^", "+", "-", "<", ">", "==", "!=", ">=")


def copy_expression(o: Options, n: Names) -> Circuit:
    a, b, c = n.data[:3]
    names = [a, b, c][: o["terms"]]
    value = {2: f"{a} {o['op']} ~{b}", 3: f"({a} {o['op']} {b}) {o['other']} ~{c}"}[o["terms"]]
    phrase = f"{bits(o['width'])} " + n.word(f"{n.out} = {value}", f"expression {value}, output {n.out}")
    return expression(o, n, phrase, [Port(p, o["width"]) for p in names], o["width"], value)


def wire(o: Options, n: Names) -> Circuit:
    a = n.data[0]
    phrase = f"{bits(o['width'])} {o['kind']} " + n.path(a)
    value = {"copy": a, "inversion": f"~{a}"}[o["kind"]]
    return expression(o, n, phrase, [Port(a, o["width"], signed=o["sign"] == "signed")], o["width"], value)


def constant(o: Options, n: Names) -> Circuit:
    phrase = f"{bits(o['width'])} constant {o['value']} " + n.word(f"on {n.out}", f"output {n.out}")
    return expression(o, n, phrase, [], o["width"], str(o["value"]))


def two_constants(o: Options, n: Names) -> Circuit:
    phrase = f"{bits(o['width'])} {n.out}, " + n.word(
        f"{o['value']} when {n.select} is {o['sense']}, otherwise {o['other']}",
        f"{n.select} {o['sense']} gives {o['value']}, otherwise {o['other']}",
    )
    test = n.select if o["sense"] == "high" else f"!{n.select}"
    return expression(o, n, phrase, [Port(n.select)], o["width"], f"{test} ? {o['value']} : {o['other']}")


def bit(o: Options, n: Names) -> Circuit:
    a = n.data[0]
    phrase = f"bit {o['index']} of {bits(o['width'])} {a}" + n.word(f" to {n.out}", f", output {n.out}")
    return expression(o, n, phrase, [Port(a, o["width"])], 1, f"{a}[{o['index']}]")


def slice_(o: Options, n: Names) -> Circuit:
    a, width = n.data[0], o["width"]
    low, high, kept = {"low": (0, width - 2, width - 1), "high": (1, width - 1, width - 1)}[o["part"]]
    phrase = f"{o['part']} {bits(kept)} part of {bits(width)} {a}" + n.word(
        f" to {n.out}", f", output {n.out}"
    )
    return expression(o, n, phrase, [Port(a, width)], kept, f"{a}[{high}:{low}]")


def join(o: Options, n: Names) -> Circuit:
    names = n.data[: o["parts"]]
    phrase = f"{bits(o['parts'])} {n.out} " + n.word(
        f"joins bits {listed(names)}", f"is bits {listed(names)}"
    )
    value = "{" + ", ".join(names) + "}"
    phrase, value = (f"inverted {phrase}", f"~{value}") if o["inverted"] else (phrase, value)
    return expression(o, n, phrase, [Port(p) for p in names], o["parts"], value)


def spread(o: Options, n: Names) -> Circuit:
    a = n.data[0]
    phrase = f"{bits(o['width'])} copies of bit {a}" + n.word(f" to {n.out}", f", output {n.out}")
    return expression(o, n, phrase, [Port(a)], o["width"], f"{{{o['width']}{{{a}}}}}")


def move(o: Options, n: Names) -> Circuit:
    a = n.data[0]
    phrase = f"{bits(o['width'])} {a} {o['op']} {o['by']}" + n.word(f" to {n.out}", f", output {n.out}")
    value = f"{a} {o['op']} {o['by']}"
    return expression(o, n, phrase, [Port(a, o["width"])], o["width"], value)


def flip(o: Options, n: Names) -> Circuit:
    phrase = f"{bits(o['width'])} " + n.word(f"flip of {n.out} every cycle", f"{n.out} flips each cycle")
    return state(o, n, phrase, [], o["width"], f"~{n.out}")


def hold(o: Options, n: Names) -> Circuit:
    d, q = n.data[0], n.out
    test = n.load if o["sense"] == "high" else f"!{n.load}"
    phrase = f"{bits(o['width'])} {q} " + n.word(
        f"takes {d} when {n.load} is {o['sense']}, otherwise keeps",
        f"keeps unless {n.load} is {o['sense']}, then {d}",
    )
    ports = [Port(n.load, 1, "load"), Port(d, o["width"])]
    return state(o, n, phrase, ports, o["width"], f"{test} ? {d} : {q}")


def delay(o: Options, n: Names) -> Circuit:
    d, p = n.data[0], "p"
    value = {"inverted": f"~{p}", "plain": p}[o["kind"]]
    phrase = f"{o['kind']} {bits(o['width'])} delay " + n.path(d)
    return hidden(o, n, phrase, [Port(d, o["width"])], o["width"], (p, o["width"]), f"{p} <= {d};", value)


def match(o: Options, n: Names) -> Circuit:
    d, p, length = n.data[0], "p", len(o["pattern"])
    phrase = f"{bits(length)} stored {d} equals {o['pattern']} " + n.word(f"on {n.out}", f"sets {n.out}")
    return hidden(
        o, n, phrase, [Port(d, length)], 1, (p, length), f"{p} <= {d};", f"({p} == {length}'b{o['pattern']})"
    )


def table(o: Options, n: Names) -> Circuit:
    s, q, values = n.data[0], n.out, o["values"]
    phrase = f"{bits(2)} table {' '.join(str(v) for v in values)} " + n.word(
        f"at {s} to {q}", f"by {s}, output {q}"
    )
    steps = "\n".join(f"      {i}: {q} <= {v};" for i, v in enumerate(values))
    tail, ports, body = always(o["style"], n, q, f"case ({s})\n{steps}\n    endcase")
    return Circuit(phrase + tail, (*ports, Port(s, 2)), Port(q, 2), body, True)


NUMBERS = (0, 1, 2, 3, 5, 6, 7, 9, 11, 12, 13)
TABLES = tuple(
    (i, j, k, m)
    for i in range(4)
    for j in range(4)
    for k in range(4)
    for m in range(4)
    if len({i, j, k, m}) >= 3
)
BASE = (
    Family(
        "copy_expression",
        copy_expression,
        {"terms": (2, 3), "op": OPERATORS, "other": ("&", "|", "^"), "width": WIDTHS, "style": STYLES},
    ),
    Family("wire", wire, {"kind": ("copy", "inversion"), "sign": SIGNS, "width": WIDTHS, "style": STYLES}),
    Family("constant", constant, {"value": NUMBERS, "width": BUSES[2:], "style": STYLES}),
    Family(
        "two_constants",
        two_constants,
        {"value": NUMBERS, "other": NUMBERS, "sense": ("high", "low"), "width": BUSES[2:], "style": STYLES},
    ),
    Family(
        "bit",
        bit,
        {"index": (0, 1, 2, 3, 5, 6), "width": BUSES, "style": STYLES},
        lambda o: o["index"] < o["width"],
    ),
    Family("slice", slice_, {"part": ("low", "high"), "width": BUSES[1:], "style": STYLES}),
    Family("join", join, {"parts": (2, 3, 4), "inverted": (False, True), "style": STYLES}),
    Family("spread", spread, {"width": BUSES, "style": STYLES}),
    Family("move", move, {"op": ("<<", ">>", "+", "-"), "by": (1, 2, 3), "width": BUSES, "style": STYLES}),
    Family("flip", flip, {"width": WIDTHS, "style": RESETS}),
    Family("hold", hold, {"sense": ("high", "low"), "width": WIDTHS, "style": RESETS}),
    Family("delay", delay, {"kind": ("inverted", "plain"), "width": WIDTHS, "style": RESETS}),
    Family("match", match, {"pattern": PATTERNS, "style": RESETS}),
    Family("table", table, {"values": TABLES, "style": RESETS}),
)
