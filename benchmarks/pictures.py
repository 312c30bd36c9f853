"""The pictures of `make bench`: how cost grows, and what peers need for the same work, of the newest results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims import Claims, figure_of

from gemma_tpu.pages import page
from gemma_tpu.pages.page import Axis, Bar, Curve, Dot

# Claims that are ratios to a peer, as the picture calls them.
PEERS = {
    "trl-padded-wide": "a train step of 2,560 tokens, beside TRL + PEFT padded",
    "trl-packed-wide": "… packed",
    "trl-padded": "… of 640 tokens, padded",
    "trl-packed": "… packed",
    "tunix-step": "… beside Tunix",
    "prepare-few": "preparing rows, beside TRL",
    "merge-faster": "merging 8 GB, beside PEFT",
    "merge-less": "… memory",
    "sampling-transformers": "sampling, beside transformers",
    "sampling-tunix": "… beside Tunix",
}
# Of each picture: the parts and costs of benchmarks/growth.py, as it calls them.
GROWTH = {
    "attention": ("tokens of a row", {
        ("attention_global", "seconds"): "time, no window", ("attention_window", "seconds"): "time, window 256",
        ("attention_global", "memory"): "memory, no window", ("attention_window", "memory"): "memory, window 256",
    }),
    "rows": ("rows", {("rows", "seconds"): "time to prepare", ("rows", "memory"): "memory"}),
    "layers": ("layers", {("layers", "step_s"): "a step", ("layers", "trace_s"): "tracing",
                          ("layers", "compile_s"): "compiling"}),
    "targets": ("adapted projections", {("targets", "step_s"): "a step", ("targets", "trace_s"): "tracing",
                                        ("targets", "compile_s"): "compiling"}),
    "devices": ("fake devices", {("devices", "compile_s"): "tracing and compiling",
                                 ("devices", "memory"): "memory of one"}),
}  # fmt: skip
LINE = 1.45  # by how much a line of the legend is higher than the next, on the logarithmic axis


def draw(results: Mapping[str, Mapping[str, Any]], claims: Claims, folder: Path) -> list[Path]:
    """Writes those for which there is a result, and gives their paths."""
    svgs = {}
    if found := (results.get("growth") or {}).get("figures"):
        svgs |= {f"growth-{name}": growth(found, *GROWTH[name]) for name in GROWTH}
    measured = {name: ratio for name in PEERS if (ratio := _ratio(results, claims, name)) is not None}
    if measured:
        svgs["peers"] = peers(measured)
    if svgs:
        folder.mkdir(parents=True, exist_ok=True)
    for name, svg in svgs.items():
        (folder / f"{name}.svg").write_text(page.standalone(svg))
    return [folder / f"{name}.svg" for name in svgs]


def _ratio(results: Mapping[str, Mapping[str, Any]], claims: Claims, name: str) -> float | None:
    claim = claims.claims[name]
    result = results.get(claim.run)
    if result is None or result["exit"] or result["command"] != claims.runs[claim.run].command:
        return None
    try:
        return figure_of(claim, result)
    except KeyError:  # the table has said so already
        return None


def peers(measured: Mapping[str, float]) -> str:
    """One bar a ratio; above one the work is done so many times faster, or in so much less memory, here."""
    rows = [Bar(words, measured.get(name), f"{measured[name]:.2f} x" if name in measured else "not measured",
                1 if name == "merge-less" else 0, True) for name, words in PEERS.items()]  # fmt: skip
    return page.bars(rows, "How many times faster, or smaller, than a peer on the same CPU")


def growth(found: Mapping[str, Any], size: str, costs: Mapping[tuple[str, str], str]) -> str:
    """Each cost over what it is at the smallest size, on logarithmic axes: the slope is the exponent."""
    curves, dots, heads, ratios = [], [], [], []
    low = min(one["size"] for part, _ in costs for one in found[part]["sizes"])
    high = max(one["size"] for part, _ in costs for one in found[part]["sizes"])
    for colour, ((part, cost), words) in enumerate(costs.items()):
        sizes, fitted = found[part]["sizes"], found[part][cost]
        points = [(one["size"], one[cost] / sizes[0][cost]) for one in sizes]
        ratios += [ratio for _, ratio in points]
        told = f"{words}: exponent {fitted['exponent']:.2f} ± {fitted['error']:.2f}"
        heads.append((told, colour))
        curves.append(Curve(points, colour))
        dots += [Dot(x, ratio, "", f"{words}, {x:g} {size}: {one[cost]:.3g}", colour, 4.0, True)
                 for (x, ratio), one in zip(points, sizes, strict=True)]  # fmt: skip
    top = max([*ratios, 2.0]) * LINE ** (len(heads) + 1)
    for at, (told, colour) in enumerate(heads):
        dots.append(Dot(low * (high / low) ** 0.03, top / LINE ** (at + 0.6), told, told, colour, 5.0, True))
    marks = [(one["size"], f"{one['size']:,g}") for one in found[next(iter(costs))[0]]["sizes"]]
    y = Axis("times the cost at the smallest size", min([*ratios, 1.0]) / 1.2, top, True)
    return page.plot(Axis(size, low, high, True, marks), y, curves, dots, f"Cost against {size}")
