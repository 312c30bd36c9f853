"""`gemma-tpu choose`: its arguments, and what it prints."""

import argparse
from typing import Any

from gemma_tpu.hardware import prices

Result = dict[str, Any]
ABOUT = "which accelerators suit a workload, ranked by cost, with figures and reasons"
EXAMPLE = "gemma-tpu choose configs/workloads/serve_31b_chat.yaml"
RIGHT = (1, 2, 3, 4, 5, 6)


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("workload", metavar="WORKLOAD", help="a YAML file, yours or one of configs/workloads/")
    one.add_argument("overrides", metavar="key=value", nargs="*", default=[],
                     help="of the prices, e.g. engineering.usd_hour=140")  # fmt: skip
    one.add_argument("--prices", metavar="NAME|FILE", help=f"a set of prices ({prices.DEFAULT})")


def run(args: argparse.Namespace) -> tuple[Result, int]:
    from gemma_tpu.costs import choose, demand

    wanted = demand.load(args.workload)
    listed = prices.load(args.prices or prices.DEFAULT, args.overrides)
    found = choose.choose(wanted, listed)
    print(render(args.workload, wanted, found, listed))
    return to_json(wanted, found), 0


def render(name: str, wanted: Any, found: list[Any], listed: prices.Prices) -> str:
    from gemma_tpu.costs import choose
    from gemma_tpu.pages.columns import table

    suits, others = [one for one in found if not one.refused], [one for one in found if one.refused]
    parts = [f"{name}: {wanted.kind} of {wanted.model}, paid {choose.way(wanted)}; every figure is predicted"]
    parts.append("\n".join(["the questions", *table(choose.answers(wanted, found))]))
    if suits:
        parts.append("\n".join(["what suits, the cheapest first", *table([_head(wanted), *map(_cells, suits)], RIGHT)]))
    else:
        parts.append("nothing suits: every slice misses something that the workload asks for")
    if others:
        parts.append("\n".join(["what does not, and why", *table(
            [(one.place.name, "; ".join(one.refused)) for one in others])]))  # fmt: skip
    parts.append("\n".join(["made of", *(f"  - {line}" for line in assumptions(wanted, suits, listed))]))
    return "\n\n".join(parts)


def _head(wanted: Any) -> tuple[str, ...]:
    what = f"$ {wanted.runs} runs" if wanted.kind == "training" else f"$ {wanted.months:g} months"
    latency = "hours a run" if wanted.kind == "training" else "ms first, between"
    return ("slice", "chips", what, "$ per 1M", "tokens/s a slice", latency, "waits for", "how")


def _cells(one: Any) -> tuple[str, ...]:
    name = one.place.name if one.slices == 1 else f"{one.slices} x {one.place.name}"
    if one.place.chip.kind == "gpu" and one.latency_ms is None:
        name += " (roofline)"
    latency = f"{one.hours:.2f}" if one.latency_ms is None else "{:,.0f}, {:.0f}".format(*one.latency_ms)
    return (name, str(one.chips), f"{one.usd:,.2f}", f"{one.usd_per_million:.2f}", f"{one.tokens_per_s:,.0f}", latency,
            one.limited_by, ", ".join(one.notes))  # fmt: skip


def assumptions(wanted: Any, suits: list[Any], listed: prices.Prices) -> list[str]:
    from gemma_tpu.costs import choose, paper
    from gemma_tpu.estimate import roofline

    lines = listed.sources([one.place for one in suits], choose.way(wanted))
    if wanted.where == "any" and len(lines) > 1:
        lines.append("these prices are of several clouds and dates; `where: google-cloud` keeps to one of them")
    if wanted.kind == "serving":
        lines += [
            f"speed: what arithmetic allows times what the servers of {paper.ABOUT}, reached of it: "
            f"{paper.reached('tpu'):.0%} on v6e-8, {paper.reached('gpu'):.0%} on two H100; other TPUs and GPUs alike",
            f"servers are {choose.BUSY:.0%} busy at most, and paid for around the clock",
        ]  # fmt: skip
        if wanted.shapes != "fixed":
            lines.append("TPU servers pad a prompt to a compiled bucket: "
                         + (f"of {choose.BUCKET}" if wanted.shapes == "bounded" else "a power of two, 4/3 on average"))
    else:
        lines += [
            "speed: by arithmetic on the best mesh, micro-batches and remat of each slice, without start-up",
            f"GPUs: a roofline of their datasheets, with {roofline.GPU_SHARES}",
            "the only measurements to hold it to: the paper's own programs, 763 tokens/s on v5p-8 and 486 on h100x2",
        ]
    if wanted.changes == "often":
        lines += listed.told("compile.tpu_minutes")
    if wanted.code == "pytorch":
        lines += listed.told("porting.tpu_hours", "engineering.usd_hour")
    return lines


def to_json(wanted: Any, found: list[Any]) -> Result:
    from gemma_tpu.costs import choose

    suits = [one for one in found if not one.refused]
    return {
        "kind": wanted.kind, "model": wanted.model, "pay": choose.way(wanted),
        "best": suits[0].place.name if suits else None,
        "questions": dict(choose.answers(wanted, found)),
        "ranked": [{
            "slice": one.place.name, "slices": one.slices, "chips": one.chips, "usd": one.usd,
            "usd_per_million_tokens": one.usd_per_million, "tokens_per_s": one.tokens_per_s, "hours": one.hours,
            "latency_ms": one.latency_ms and {"ttft": one.latency_ms[0], "tpot": one.latency_ms[1]},
            "waits_for": one.limited_by, "notes": list(one.notes),
        } for one in suits],
        "refused": [{"slice": one.place.name, "why": list(one.refused)} for one in found if one.refused],
    }  # fmt: skip
