"""A measurement in the terminal: one line a point, then what they say together, then every doubt."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from gemma_tpu.bench.doubts import OURS
from gemma_tpu.bench.saturation import ENOUGH

Card = dict[str, Any]
HEAD = ("in/out", "QPS", "done", "req/s", "in tok/s", "out tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50",
        "p99", "E2E p50", "p99", "keeps up")  # fmt: skip
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
NAMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}


def show(found: Card) -> str:
    """Everything."""
    server, settings = found["server"], found["settings"]
    parts = [
        _about(server, settings, found),
        table(HEAD + (("good",) if found["slo"] else ()), [_row(one, found["slo"]) for one in found["points"]]),
        "milliseconds; req/s, tok/s and good over all of a point, its last answers included" + _generator(found),
        _saturation(found),
        _split(found["points"]),
        _flags(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _about(server: Card, settings: Card, found: Card) -> str:
    lines = [f"{server['model']} at {server['url']}" if server["url"] else f"{server['model']} ({settings['source']})"]
    known = {"version": server.get("version"), **(server.get("settings") or {}), **(settings.get("notes") or {})}
    known |= {"kv dtype": settings["kv_dtype"]} if settings.get("kv_dtype") else {}
    lines += [", ".join(f"{name} {value}" for name, value in known.items() if value is not None)]
    if settings["source"] == OURS:
        prefix = settings["shared_prefix"]
        shared = f"the first {prefix} tokens of each prompt shared" if prefix else "no prompt is used twice"
        what = settings["data"] or f"random prompts, {shared}"
        lines += [f"{settings['endpoint']}, {settings['arrivals']} arrivals (seed {settings['seed']}), {what}; "
                  f"{settings['warmup']} requests to warm up each shape, not counted"]  # fmt: skip
    if found["slo"]:
        lines += ["SLO: " + ", ".join(f"{name} at most {most:g} ms" for name, most in found["slo"].items())]
    return "\n".join(line for line in lines if line)


def _generator(found: Card) -> str:
    """How late the load generator itself was, at worst."""
    worst = [max((one[name]["p99"] or 0.0 for one in found["points"] if one.get(name)), default=None)
             for name in ("lag_ms", "beat_ms")]  # fmt: skip
    if None in worst:
        return ""
    return (f"\nthis client, at worst (p99 of a point): requests sent {figure(worst[0])} ms late, held up for "
            f"{figure(worst[1])} ms")  # fmt: skip


def shape(point: Card) -> str:
    return f"{'own' if point['input'] is None else point['input']}/{point['output']}"


def rate(point: Card) -> str:
    qps = float(point["qps"])
    return "inf" if math.isinf(qps) else f"{qps:g}"


def _row(one: Card, slo: Card) -> tuple[str, ...]:
    done = f"{one['completed']}" + (f"+{one['failed']} failed" if one["failed"] else "")
    numbers = [figure(one[name][part]) for name in LATENCIES for part in ("p50", "p99")]
    able = {True: "yes", False: "no", None: "?"}[one["keeps_up"]]
    mark = "*" if set(one["flags"]) - {"burst"} else ""
    good = ("-" if one["goodput"] is None else f"{one['goodput']:.2f}/s",) if slo else ()
    return (shape(one), rate(one) + mark, done, figure(one["request_throughput"]), figure(one["input_throughput"]),
            figure(one["output_throughput"]), *numbers, "-" if rate(one) == "inf" else able, *good)  # fmt: skip


def figure(value: float | None) -> str:
    """Three digits or all before the point."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns to the right, the first to the left."""
    wide = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    lines = [
        "  ".join(cell.ljust(wide[at]) if at == 0 else cell.rjust(wide[at]) for at, cell in enumerate(row)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _saturation(found: Card) -> str:
    lines = [f"  {name}: {one['told']}" for name, one in found["saturation"].items()]
    rule = f"saturation (a rate is kept up with if E2E does not grow: at least {ENOUGH:.0%} of what arrives is done):"
    return "\n".join([rule, *lines]) if lines else ""


def _split(points: Sequence[Card]) -> str:
    rows = [(shape(one), rate(one), *(figure(value) for value in one["split_ms"].values()))
            for one in points if one.get("split_ms")]  # fmt: skip
    if not rows:
        return ""
    names = next(tuple(one["split_ms"]) for one in points if one.get("split_ms"))
    wide = max(map(len, rows))
    rows = [row for row in rows if len(row) == wide]
    told = "the milliseconds of a mean request, by the server's own clocks (transport: all that it does not see)"
    return told + "\n" + table(("in/out", "QPS", *(name.replace("_", " ") for name in names)), rows)


def _flags(found: Card) -> str:
    lines = [f"  {shape(one)} at QPS {rate(one)}: {name}: {said}" for one in found["points"]
             for name, said in one["flags"].items() if name != "burst"]  # fmt: skip
    lines += [f"  all: {name}: {said}" for name, said in found["flags"].items()]
    bursts = [shape(one) for one in found["points"] if "burst" in one["flags"]]
    if bursts:
        named = ", ".join(bursts)
        lines.append(f"  QPS inf ({named}): burst: all requests at once, a batch that drains: no steady state")
    return "\n".join(["doubts (* above):", *lines]) if lines else ""


# --- several runs ---

NEAR = 0.02  # lengths that differ by less are the same
COMPARED = (("output_throughput", None, "out tok/s"), *((name, "p50", f"{NAMES[name]} p50") for name in LATENCIES))


def compare(cards: Sequence[tuple[str, Card]]) -> Card:
    """Runs side by side where they have the same shape and rate; ratios to the first run."""
    keys: dict[tuple[str, str], list[Card | None]] = {}
    for at, (_, card) in enumerate(cards):
        for one in card["points"]:
            keys.setdefault(_same(one, keys), [None] * len(cards))[at] = one
    rows = [
        {"shape": key[0], "qps": key[1],
         **{label: [None if one is None else _value(one, name, part) for one in points]
            for name, part, label in COMPARED},
         "flags": [None if one is None else sorted(one["flags"]) for one in points]}
        for key, points in keys.items() if sum(one is not None for one in points) > 1
    ]  # fmt: skip
    alone = [f"{key[0]} at QPS {key[1]}: only in {cards[next(at for at, one in enumerate(points) if one)][0]}"
             for key, points in keys.items() if sum(one is not None for one in points) == 1]  # fmt: skip
    return {
        "runs": [{"name": name, "model": card["server"]["model"], "source": card["settings"]["source"],
                  "version": card["server"].get("version"), "kv_dtype": card["settings"].get("kv_dtype")
                  or (card["server"].get("settings") or {}).get("cache_dtype"),
                  "saturation": {key: one["told"] for key, one in card["saturation"].items()}} for name, card in cards],
        "points": rows, "alone": alone,
    }  # fmt: skip


def _same(point: Card, keys: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """The key of this point, or that of one whose lengths are as good as the same: a BOS more, or means of prompts that
    are not all as long as asked for."""
    for key in keys:
        there = key[0].split("/")
        if key[1] == rate(point) and all(map(_near, shape(point).split("/"), there)):
            return key
    return shape(point), rate(point)


def _near(one: str, other: str) -> bool:
    if not (one.isdigit() and other.isdigit()):
        return one == other
    return abs(int(one) - int(other)) <= max(1, NEAR * int(other))


def _value(one: Card, name: str, part: str | None) -> float | None:
    found: float | None = one[name] if part is None else one[name][part]
    return found


def show_compared(found: Card) -> str:
    letters = [chr(ord("A") + at) for at in range(len(found["runs"]))]
    lines = [f"{letter}: {one['name']}: {one['model']}, {one['source']}"
             + (f" {one['version']}" if one["version"] else "") + (f", KV {one['kv_dtype']}" if one["kv_dtype"] else "")
             for letter, one in zip(letters, found["runs"], strict=True)]  # fmt: skip
    rows = []
    for row in found["points"]:
        for at, letter in enumerate(letters):
            cells = [compared_cell(row[label], at) for _, _, label in COMPARED]
            doubts = ", ".join(name for name in row["flags"][at] or () if name != "burst")
            rows.append((row["shape"] if at == 0 else "", row["qps"] if at == 0 else "", letter, *cells, doubts))
    parts = ["\n".join(lines)]
    parts += [table(("in/out", "QPS", "", *(label for _, _, label in COMPARED), "doubts"), rows)] if rows else []
    parts += ["no shape and rate is in more than one of them"] if not rows else []
    parts += ["\n".join(found["alone"])] if found["alone"] else []
    return "\n\n".join(parts)


def compared_cell(values: Sequence[float | None], at: int) -> str:
    """A figure, with its ratio to the first run."""
    value, first = values[at], values[0]
    if at == 0 or value is None or not first:
        return figure(value)
    return f"{figure(value)} ({value / first:.2f}x)"
