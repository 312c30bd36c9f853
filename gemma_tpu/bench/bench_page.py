"""The page of a measurement: throughput and latency over the rate, where the time goes, every doubt."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gemma_tpu.bench.bench_text import (
    COMPARED,
    HEAD,
    LATENCIES,
    NAMES,
    compared_cell,
    figure,
    rate,
    shape,
)
from gemma_tpu.bench.saturation import ENOUGH, LEAST_TIMES
from gemma_tpu.pages.page import (
    COLOURS,
    Axis,
    Bar,
    Curve,
    Dot,
    Section,
    bars,
    bullets,
    details,
    facts,
    legend,
    page,
    paragraph,
    plot,
    table,
)

Card = dict[str, Any]
Series = tuple[str, Sequence[Card]]
PARTS = ("queue", "prefill", "decode", "server_other", "transport")
DEFINED = (
    "TTFT: from sending a request to its first token. TPOT: time per output token after the first. ITL: from one token "
    "to the next. E2E: to the last token. All as `vllm bench serve` defines them, except that of several tokens in one "
    "chunk each has its share of the wait.",
    f"A rate is kept up with if E2E does not grow through the second half of the requests: at least {ENOUGH:.0%} of "
    f"what arrives is done. Arrivals must last {LEAST_TIMES:g} times as long as a request, or nothing can be told.",
    "Throughput is over all of a point, from its first request to its last answer.",
    "An outlined dot is the point at QPS inf: all requests at once.",
)


def page_of(found: Card) -> str:
    series = _series(found)
    server = found["server"]
    about = ", ".join(str(part) for part in (server["url"], found["settings"]["source"], server.get("version"),
                                             found["client"].get("date")) if part)  # fmt: skip
    sections = [
        Section("", _facts(found)),
        Section("Doubts", _doubts(found)),
        *_pictures(series),
        Section("Saturation", bullets([f"{name}: {one['told']}" for name, one in found["saturation"].items()])),
        Section("Where the time goes", _split(found)),
        Section("Every point", _points(found)),
        Section("The server and the load", _settings(found)),
        Section("Definitions", bullets(DEFINED)),
    ]
    return page(f"Serving {server['model']}", about, sections)


def compare_page(found: Card, cards: Sequence[Card]) -> str:
    """Several runs, each with a colour of its own in one picture for each shape."""
    names = [one["name"] for one in found["runs"]]
    shapes = list(dict.fromkeys(row["shape"] for row in found["points"]))
    sections = [Section("", table(("run", "model", "measured by", "version", "KV cache"), [
        [one[key] or "" for key in ("name", "model", "source", "version", "kv_dtype")] for one in found["runs"]]))]
    for each in shapes:
        series = [(name, [one for one in card["points"] if shape(one) == each])
                  for name, card in zip(names, cards, strict=True)]  # fmt: skip
        sections += [Section(f"{each}: {one.title}", one.body) for one in _pictures([one for one in series if one[1]])]
    head = ("in/out", "QPS", "run", *(label for _, _, label in COMPARED), "doubts")
    rows = [(row["shape"], row["qps"], name, *(compared_cell(row[label], at) for _, _, label in COMPARED),
             ", ".join(row["flags"][at] or ()))
            for row in found["points"] for at, name in enumerate(names)]  # fmt: skip
    sections += [Section("Point by point", table(head, rows, tuple(range(3, 3 + len(COMPARED)))) if rows else ""),
                 Section("In one run only", bullets(found["alone"])),
                 Section("Saturation", bullets([f"{one['name']}, {key}: {told}" for one in found["runs"]
                                                for key, told in one["saturation"].items()])),
                 Section("Definitions", bullets(DEFINED))]  # fmt: skip
    return page("Serving compared", " and ".join(names), sections)


def _series(found: Card) -> list[Series]:
    shapes: dict[str, list[Card]] = {}
    for one in found["points"]:
        shapes.setdefault(shape(one), []).append(one)
    return list(shapes.items())


def _facts(found: Card) -> str:
    if found["point"] is None:
        return paragraph("No request completed.", "bad")
    where = f"{shape(found['point'])} at QPS {rate(found['point'])}"
    total = found["total"]
    qps = found["saturation_qps"]
    rows = [
        ("most output tokens/s", figure(found["output_throughput"]), where, ""),
        ("saturation QPS", "not reached" if qps is None else f"{qps:g}", shape(found["point"]), ""),
        ("TTFT p50, p99", " / ".join(figure(found["ttft_ms"][p]) for p in ("p50", "p99")) + " ms", where, ""),
        ("TPOT p50, p99", " / ".join(figure(found["tpot_ms"][p]) for p in ("p50", "p99")) + " ms", where, ""),
        ("requests", f"{total['completed']:,}", f"{total['failed']} failed, {total['points']} points",
         "bad" if total["failed"] else ""),
    ]  # fmt: skip
    if found["slo"] and found["goodput"] is not None:
        bounds = ", ".join(f"{name} {most:g} ms" for name, most in found["slo"].items())
        rows.append(("goodput", f"{found['goodput']:.2f}/s", bounds, ""))
    return facts(rows)


def _doubts(found: Card) -> str:
    lines = [f"{shape(one)} at QPS {rate(one)}: {name}: {said}" for one in found["points"]
             for name, said in one["flags"].items() if name != "burst"]  # fmt: skip
    return bullets([f"{name}: {said}" for name, said in found["flags"].items()] + lines)


def _pictures(series: Sequence[Series]) -> list[Section]:
    """Throughput and the latencies over the rate, a line for each of the series."""
    made = [
        Section("Output tokens a second", _picture(series, lambda one: one["output_throughput"], "tokens/s", False)),
    ]
    for name in LATENCIES:
        for part in ("p50", "p99"):
            body = _picture(series, partial(_latency, name, part), "ms", True)
            made.append(Section(f"{NAMES[name]}, {part}", body))
    return [one for one in made if one.body]


def _latency(name: str, part: str, one: Card) -> float | None:
    found: float | None = one[name][part]
    return found


def _picture(series: Sequence[Series], value: Callable[[Card], float | None], unit: str, log: bool) -> str:
    found = [(name, [(one, number) for one in points if (number := value(one))]) for name, points in series]
    values = [number for _, points in found for _, number in points]
    finite = [float(one["qps"]) for _, points in found for one, _ in points if not math.isinf(float(one["qps"]))]
    if not values:
        return ""
    least, most = (min(finite), max(finite)) if finite else (1.0, 1.0)
    end = most * 2  # where QPS inf is drawn
    marks = _spread([(qps, f"{qps:g}") for qps in sorted(set(finite))], most / least)
    some = any(math.isinf(float(one["qps"])) for _, points in found for one, _ in points)
    x = Axis("requests a second", least / 1.3, end * 1.3, log=True, marks=[*marks, *([(end, "inf")] if some else [])])
    low, high = min(values), max(values)
    wide = log and 1e-9 < low < high / 8  # a file from elsewhere may say -1 ms, or 5e-324
    top = min(high, 1e300)
    y = Axis(unit, low / 1.6, top * 1.6, log=True) if wide else Axis(unit, 0.0, top * 1.15 if high > 1e-9 else 1.0)
    curves, dots = [], []
    for at, (name, points) in enumerate(found):
        finite_points = [(float(one["qps"]), number) for one, number in points if not math.isinf(float(one["qps"]))]
        curves += [Curve(finite_points, at % COLOURS)] if finite_points else []
        for one, number in points:
            infinite = math.isinf(float(one["qps"]))
            told = f"{name} at QPS {rate(one)}: {figure(number)} {unit}"
            place = end if infinite else float(one["qps"])
            dots.append(Dot(place, number, "", told, at % COLOURS, 4.5, True, infinite))
    drawn = plot(x, y, curves, dots, f"{unit} over requests a second", height=270)
    return drawn + legend([(name, at % COLOURS) for at, (name, _) in enumerate(found)])


def _spread(marks: Sequence[tuple[float, str]], span: float) -> list[tuple[float, str]]:
    """Without those whose words would stand in the words of the one before, on an axis of logarithms."""
    found: list[tuple[float, str]] = []
    for one in marks:
        if not found or math.log(one[0] / found[-1][0]) > 0.05 * math.log(4 * max(span, 2)):
            found.append(one)
    return found


def _split(found: Card) -> str:
    """Bars that begin where the one before ends: a request on its way through the server."""
    parts = []
    for one in found["points"]:
        if not one.get("split_ms"):
            continue
        rows, start = [], 0.0
        for at, part in enumerate(PARTS):
            value = max(0.0, one["split_ms"].get(part, 0.0))
            rows.append(Bar(part.replace("_", " "), start + value, f"{figure(value)} ms", at, True, start))
            start += value
        name = f"{shape(one)} at QPS {rate(one)}"
        parts.append(details(f"{name}: {figure(start)} ms", bars(rows, f"where a request of {name} spends its time")))
    if not parts:
        return paragraph("The server's /metrics do not say.", "note")
    told = "The mean of each point, by the server's own clocks; transport is all that the server does not see."
    return paragraph(told, "note") + "".join(parts)


def _points(found: Card) -> str:
    head = [*HEAD[:6], *(f"{NAMES[name]} {part}" for name in LATENCIES for part in ("p50", "p90", "p99")), "keeps up"]
    head += ["goodput/s"] if found["slo"] else []
    rows = []
    for one in found["points"]:
        able = {True: "yes", False: "no", None: "cannot tell"}[one["keeps_up"]]
        numbers = [one["request_throughput"], one["input_throughput"], one["output_throughput"]]
        numbers += [one[name][part] for name in LATENCIES for part in ("p50", "p90", "p99")]
        done = f"{one['completed']}" + (f" ({one['failed']} failed)" if one["failed"] else "")
        more = [figure(one["goodput"])] if found["slo"] else []
        rows.append([shape(one), rate(one), done, *map(figure, numbers), able, *more])
    return table(head, rows, tuple(range(1, len(head))))


def _settings(found: Card) -> str:
    rows = [(name, value) for name, value in found["server"].items() if name != "settings" and value is not None]
    rows += list((found["server"].get("settings") or {}).items())
    rows += [(name, value) for name, value in found["settings"].items() if name != "notes" and value is not None]
    rows += list((found["settings"].get("notes") or {}).items())
    rows += [(f"client {name}", value) for name, value in found["client"].items() if value is not None]
    return table(("", ""), [(name.replace("_", " "), value) for name, value in rows])
