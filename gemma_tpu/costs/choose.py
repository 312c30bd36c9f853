"""Which accelerator for a workload: every slice held against it, those that suit ranked by cost, the others with why.

Training is planned by arithmetic on the best mesh of each slice; serving is the bound of `inference` times the share
that measured servers reached. What a figure is made of stands beside it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gemma_tpu import config
from gemma_tpu.costs import cost, paper
from gemma_tpu.costs.cost_sources import fastest
from gemma_tpu.costs.demand import Demand, Serving, Training
from gemma_tpu.estimate import advice, inference, roofline
from gemma_tpu.estimate.inference import Load, Server
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.hardware.prices import Prices
from gemma_tpu.planning import plan, subject
from gemma_tpu.planning.sweep import SLICES
from gemma_tpu.planning.workload import PACKED_FULL, Workload
from gemma_tpu.step.job import Job

MORE = ("h100x2", "h100x4", "h200x2", "b200x2", "mi300x1")
BUSY = 0.7  # of what a server can do at most: above it queues grow without bound when requests come in bursts
BUCKET = 128


@dataclass(frozen=True)
class Choice:
    """One slice (or several alike) for the workload. `refused`: what it cannot meet; then the rest may be missing."""

    place: Slice
    refused: tuple[str, ...] = ()
    usd: float | None = None  # of all runs, or of all months; porting included
    usd_per_million: float | None = None  # tokens trained, or generated
    tokens_per_s: float | None = None  # of one slice: trained, or generated at most
    hours: float | None = None  # of a run
    slices: int = 1
    latency_ms: tuple[float, float] | None = None  # to the first token of a lone request, between tokens
    limited_by: str = ""
    notes: tuple[str, ...] = ()

    @property
    def chips(self) -> int:
        return self.slices * self.place.chips


def choose(demand: Training | Serving, prices: Prices) -> list[Choice]:
    """Those that suit, the cheapest first, then the others."""
    model = subject.find_model(demand.model)
    found = []
    for name in dict.fromkeys((*SLICES, *MORE)):
        place = next((one for one in chips.slices() if one.name == name), None)
        if place is None:  # the user's hardware file may have fewer
            continue
        refused = tuple(_refusals(demand, place, prices))
        if refused:
            found.append(Choice(place, refused))
        elif isinstance(demand, Training):
            found.append(_trained(demand, place, prices, model))
        else:
            found.append(_served(demand, place, prices, model))
    return sorted(found, key=lambda one: (bool(one.refused), one.usd or math.inf, one.place.chip.name, one.chips))


def way(demand: Demand) -> str:
    return "own" if demand.where == "on-premises" else demand.pay


def _refusals(demand: Demand, place: Slice, prices: Prices) -> Iterator[str]:
    """What no speed makes up for."""
    tpu = place.chip.kind == "tpu"
    if demand.where == "on-premises" and tpu:
        yield "TPUs run in Google Cloud alone, and you need hardware on your premises"
    if demand.where == "google-cloud" and not tpu and prices.knows(place, way(demand)):
        source = prices.hour(place, way(demand)).source
        if place.name not in prices.machines and not re.search("Google|a3-", source):
            yield f"its price is not of Google Cloud ({source})"
    if demand.custom_ops == "cuda" and tpu:
        yield "your CUDA kernels do not run on a TPU: each would be written again in Pallas"
    if demand.custom_ops == "pallas" and not tpu:
        yield "your Pallas kernels for TPUs do not run on a GPU"
    if demand.most_chips is not None and place.chips > demand.most_chips:
        yield f"{place.chips} chips, and most_chips is {demand.most_chips}"
    if not prices.knows(place, way(demand)) and not (demand.where == "on-premises" and tpu):
        yield f"no {way(demand)} price is known (--prices FILE)"


def _porting(demand: Demand, place: Slice, prices: Prices) -> float:
    """Code of one's own for GPUs on a TPU: what the paper's authors spent."""
    if place.chip.kind == "tpu" and demand.code == "pytorch":
        return prices["porting.tpu_hours"] * prices["engineering.usd_hour"]
    return 0.0


# --- training ---


def laid_out(demand: Training, place: Slice) -> float:
    """Positions that are computed for each token of a row: what static shapes waste."""
    if demand.shapes == "fixed":
        return 1.0
    if demand.packing:
        return 1 / PACKED_FULL
    if place.chip.kind == "gpu":
        return 1.0  # rows one behind another with their lengths beside them: nothing is padded
    if demand.shapes == "bounded":
        return 1 + BUCKET / 2 / demand.row_tokens
    return demand.max_seq_len / demand.row_tokens


def _trained(demand: Training, place: Slice, prices: Prices, model: subject.Subject) -> Choice:
    chosen = config.load(demand.config)
    chosen = replace(chosen, model=replace(chosen.model, path=demand.model),
                     data=replace(chosen.data, max_seq_len=demand.max_seq_len))  # fmt: skip
    best = advice.best_on(model.architecture, Job.of(chosen, {}, "full"), place)
    if best is None:
        return Choice(place, ("the model, its adapter and one row do not fit with any mesh or remat",))
    chosen = advice.apply(chosen, best.job)
    positions = demand.tokens * laid_out(demand, place)
    steps = math.ceil(positions / best.job.tokens_per_update)
    load = Workload(steps, round(demand.tokens), 1 - demand.tokens / positions, "the workload file", False)
    made = plan.make(chosen, demand.config, place, model, load, compiled=False, suggest=False)
    undisturbed = made.hours
    assert undisturbed is not None  # `load` says how many updates
    compiling = prices["compile.tpu_minutes"] / 60 if place.chip.kind == "tpu" and demand.changes == "often" else 0.0
    training = cost.Training(place, undisturbed + compiling, demand.tokens, False, "planned")
    usd = sum(cost.run_usd(training, prices, way(demand))) / 2
    hours = cost.preempted(training.hours, prices).hours if way(demand) == "spot" else training.hours
    if demand.deadline_hours is not None and hours > demand.deadline_hours:
        return Choice(place, (f"{hours:.1f} h, and the deadline is {demand.deadline_hours:g}",), hours=hours)
    parts, whole = made.estimate.parts, sum(made.estimate.parts.values())
    links = (parts["fsdp links"] + parts["tp links"]) / whole
    notes = [f"padding {1 - demand.tokens / positions:.0%}"]
    notes += [f"links {links:.0%} of a step"] if links > 0.02 else []
    notes += [f"compiles for {compiling * 60:g} min"] if compiling else []
    notes += [f"{made.peak_gib * place.chip.devices:.0f} of {place.chip.hbm_gib:.0f} GiB"]
    return Choice(
        place, (), usd * demand.runs + _porting(demand, place, prices), usd / demand.tokens * 1e6,
        demand.tokens / undisturbed / 3600, hours, 1, None, made.estimate.limited_by, tuple(notes),
    )  # fmt: skip


# --- serving ---


def padded_prompt(demand: Serving, place: Slice) -> int:
    """Tokens that a prompt is computed as: a TPU's server pads it to a bucket that was compiled."""
    if place.chip.kind == "gpu" or demand.shapes == "fixed":
        return demand.prompt_tokens
    if demand.shapes == "bounded":
        return demand.prompt_tokens + BUCKET // 2
    return round(demand.prompt_tokens * 4 / 3)  # powers of two, lengths evenly spread between two of them


def _served(demand: Serving, place: Slice, prices: Prices, model: subject.Subject) -> Choice:
    load, share = Load(padded_prompt(demand, place), demand.output_tokens), paper.reached(place.chip.kind)
    first, why = fastest(model.architecture, place, load, kv_bytes=demand.kv_bytes)
    if first is None:
        return Choice(place, (why,))
    roomy = [one for one in inference.servers(model.architecture, place, demand.kv_bytes) if one.most_rows(load)]
    ttft = min(one.prefill_s(load.prompt) for one in roomy) / share * 1e3
    if demand.ttft_ms is not None and ttft > demand.ttft_ms:
        return Choice(place, (f"a lone prompt takes {ttft:,.0f} ms, and ttft_ms is {demand.ttft_ms:g}",))
    limit = math.inf if demand.ttft_ms is None else demand.ttft_ms
    prompt = [one for one in roomy if one.prefill_s(load.prompt) / share * 1e3 <= limit]
    suited = [(one, rows) for one in prompt if (rows := _rows_within(one, load, share, demand.tpot_ms))]
    if not suited:
        least = min(one.tpot_s(load, 1) for one in prompt) / share * 1e3
        return Choice(place, (f"{least:,.0f} ms between tokens of a lone request, and tpot_ms is {demand.tpot_ms:g}",))
    server, rows = max(suited, key=lambda pair: pair[0].output_tokens_per_s(load, pair[1]))
    ttft = server.prefill_s(load.prompt) / share * 1e3
    most = server.output_tokens_per_s(load, rows) * share
    needed = demand.requests_per_s * demand.output_tokens
    count = math.ceil(needed / (most * BUSY))
    if demand.most_chips is not None and count * place.chips > demand.most_chips:
        return Choice(place, (f"{count} of them ({count * place.chips} chips) would be needed for {needed:,.0f} "
                              f"tokens/s, and most_chips is {demand.most_chips}",))  # fmt: skip
    serving = cost.Serving(place, most, False, "")
    hour = cost.serving_hour(serving, prices, way(demand)).usd * count
    parts = server.step_parts(rows, load.prompt + load.output / 2)
    notes = [f"tp {server.tp}", f"{rows} requests at once", f"{needed / (count * most):.0%} busy"]
    if place.chip.kind == "tpu" and demand.changes == "often":
        notes.append(f"each change compiles for {prices['compile.tpu_minutes']:g} min")
    if load.prompt > demand.prompt_tokens:
        notes.append(f"prompts padded to {load.prompt:,}")
    return Choice(
        place, (), hour * cost.MONTH * demand.months + _porting(demand, place, prices),
        hour / (needed * 3600) * 1e6, most, None, count, (ttft, server.tpot_s(load, rows) / share * 1e3),
        max(parts, key=parts.__getitem__), tuple(notes),
    )  # fmt: skip


def _rows_within(server: Server, load: Load, share: float, tpot_ms: float | None) -> int:
    """The most requests at once whose tokens come fast enough; 0 where not even a lone one's do."""
    low, high = 0, server.most_rows(load)
    if tpot_ms is None:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        good = server.tpot_s(load, middle) / share * 1e3 <= tpot_ms
        low, high = (middle, high) if good else (low, middle - 1)
    return low


# --- the questions ---


def answers(demand: Training | Serving, found: list[Choice]) -> list[tuple[str, str]]:
    """The questions that decide, in order, each with this workload's own figures."""
    arch = subject.find_model(demand.model).architecture
    best = [one for one in found if not one.refused]
    shapes = {"fixed": "one shape", "bounded": "shapes of known buckets", "variable": "shapes that nobody knows before"}
    steady = "its graph changes often: every change compiles again" if demand.changes == "often" else "its graph stays"
    ops = {"none": "none: every operation runs on both", "cuda": "CUDA kernels: TPUs are out",
           "pallas": "Pallas kernels for TPUs: GPUs are out"}[demand.custom_ops]  # fmt: skip
    first = best[0] if best else None
    bottleneck = "; ".join(f"{one.place.name}: {one.limited_by}" for one in best[:3]) or "nothing suits"
    spread = "nothing suits" if first is None else (
        f"{first.place.name}, the cheapest: {first.chips} chip{'s' * (first.chips > 1)}"
        + (f", {first.notes[1]}" if len(first.notes) > 1 and first.notes[1].startswith("links") else "")
    )  # fmt: skip
    where = {"any": "anywhere", "google-cloud": "in Google Cloud", "on-premises": "on your premises: TPUs are out"}
    return [
        ("mostly matrix products, and stable?", f"{_products(arch, demand):.0%} of the FLOPs; {shapes[demand.shapes]}; "
                                                f"{steady}"),
        ("operations of your own?", ops),
        ("waits for memory or arithmetic?", bottleneck),
        ("over many devices?", spread),
        ("training or serving?", demand.kind),
        ("where must it run?", where[demand.where]),
    ]  # fmt: skip


def _products(arch: Architecture, demand: Training | Serving) -> float:
    """The share of useful FLOPs that are products with weights; the rest is attention over the context."""
    if isinstance(demand, Serving):
        load = Load(demand.prompt_tokens, demand.output_tokens)
        scores = inference.attention_of_request(arch, load)
        return 1 - scores / inference.flops_of_request(arch, load)
    weights = sum(sum(roofline.layer_matmuls(arch, layer).values()) for layer in arch.layers) + arch.vocab * arch.hidden
    scores = sum(roofline.attention_flops(arch, layer, demand.max_seq_len) for layer in arch.layers)
    return 4 * weights / (4 * weights + 3 * scores)
