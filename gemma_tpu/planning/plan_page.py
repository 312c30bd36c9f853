"""The sections of a plan's page: memory, the roofline, throughput against the batch, cost, and what limits it."""

import itertools
from collections.abc import Iterator, Sequence

from gemma_tpu.compiled.walk import Walk
from gemma_tpu.estimate import budget, roofline
from gemma_tpu.pages import page
from gemma_tpu.pages.page import Axis, Bar, Curve, Dot, Section
from gemma_tpu.planning import calibration, plan_text, sweep
from gemma_tpu.planning.plan import Plan
from gemma_tpu.planning.sweep import Row
from gemma_tpu.planning.workload import Workload

LEGEND = "Outlined: predicted. Filled: measured."
COLOURS = {"weights": 0, "lora": 1, "moments": 4, "gradients": 5, "gathered": 3, "relaid": 6, "recomputed": 7}
SAVED, PASSING = 2, 1
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # for each device that holds rows


def page_of(made: Plan, others: Sequence[Row]) -> str:
    """The page of one plan; `others` are the slices that its cost is compared with."""
    # On its own slice the plan itself, which may be compiled where the others are not.
    rows = [Row(made.place, made, None) if row.place.name == made.place.name else row for row in others]
    sections = [
        Section("", _facts(made)),
        Section("What limits it", page.paragraph(plan_text.limits(made))),
        Section("Memory of a chip", _memory(made)),
        Section("Time of a step", _time(made)),
        Section("Roofline", _roofline(made)),
        Section("Throughput against the batch", _batches(made)),
        Section("Cost", _cost(made) + _costs(rows)),
        Section("What would fit" if not made.fits else "What would be faster", _advice(made)),
        Section("Heads and mesh", _heads(made)),
        Section("Assumptions", page.bullets(plan_text.assumptions(made))),
    ]
    about = f"{made.source} on {made.place}: a prediction. {made.subject.told}. {LEGEND}"
    return page.page(f"Plan: {made.subject.name} on {made.place.name}", about, sections)


def sweep_page(source: str, rows: Sequence[Row], load: Workload) -> str:
    """The page of a sweep: the slices side by side."""
    sections = [
        Section("Tokens a second", _throughputs(rows)),
        Section("Cost of the run", _costs(rows)),
        Section("The table", _table(rows)),
        Section("Assumptions", page.bullets([
            load.told, "Each slice with the mesh, micro-batches and remat that are fastest on it for the same updates.",
            f"GPUs: the roofline of their datasheets, with {roofline.GPU_SHARES}.",
            calibration.REFERENCE,
        ])),
    ]  # fmt: skip
    return page.page(f"Slices for {source}", f"Every figure is predicted. {LEGEND}", sections)


# --- one plan ---


def _facts(made: Plan) -> str:
    spot = made.usd_spot
    usd = made.usd(made.place.usd)
    real = made.useful_tokens_per_s
    return page.facts([
        ("memory", "fits" if made.fits else "does not fit",
         f"{plan_text.gib(made, made.peak_gib):.1f} of {plan_text.gib(made, made.limit_gib):.2f} GiB a chip",
         "good" if made.fits else "bad"),
        ("step, predicted", plan_text.duration(made.step_s), plan_text.BASES[made.basis], ""),
        ("tokens a second, predicted", f"{made.tokens_per_s:,.0f}", "" if real is None else f"{real:,.0f} of rows", ""),
        ("MFU, predicted", f"{made.mfu:.1%}", f"{made.estimate.flops_per_token / 1e9:.0f} GFLOP a token", ""),
        ("run, predicted", "-" if made.hours is None else f"{made.hours:.2f} h",
         "" if made.workload.steps is None else f"{made.workload.steps:,} updates", ""),
        ("cost, predicted", "-" if usd is None else plan_text.dollars(usd),
         "" if spot is None else f"spot {plan_text.dollars(spot[0])} to {plan_text.dollars(spot[1])}", ""),
    ])  # fmt: skip


def _memory(made: Plan) -> str:
    scale = made.place.chip.devices
    rows = [(name, gib * scale, _colour(name)) for name, gib in made.memory.rows() if gib * scale >= 0.005]
    drawn = page.stack(rows, made.limit_gib * scale, "GiB", "Predicted memory of a chip by category")
    if made.compilation is None:
        return drawn + page.paragraph("By arithmetic; the compiler was not asked.", "note")
    return drawn + page.paragraph(
        f"The stack is the arithmetic; the compiler's own peak is {made.peak_gib * scale:.2f} GiB.", "note"
    )


def _colour(category: str) -> int:
    return COLOURS.get(category, SAVED if category.startswith("saved") else PASSING)


def _time(made: Plan) -> str:
    rows = [Bar(name, s, f"{plan_text.duration(s)}  {s / made.step_s:.0%}") for name, s in plan_text.parts(made)]
    known = made.calibration
    rows.append(Bar("whole step", made.step_s, f"{plan_text.duration(made.step_s)} predicted", 1))
    told = known or calibration.REFERENCE
    if known and known.slice == made.place.name:
        seen = known.measured_step_s
        text = f"{plan_text.duration(seen)}, its own config"
        rows.append(Bar(f"measured: {known.run}", seen, text, 1, measured=True))
    drawn = page.bars(rows, "Predicted time of a step by what it is spent on") + page.paragraph(str(told), "note")
    if made.walk:
        head = ("time", "times", "kind", "what")
        costs = [(plan_text.duration(one.seconds), one.count, one.kind, one.name) for one in made.walk.costs[:12]]
        drawn += page.table(head, costs, right=(0, 1))
    return drawn


def _roofline(made: Plan) -> str:
    """Operations of this step by FLOPs for each byte of HBM, under the roof of the device."""
    chip = made.place.chip
    dots = list(_walked(made.walk) if made.walk else _by_arithmetic(made))
    if not dots:
        return ""
    low = min(0.5, *(dot.x for dot in dots)) / 1.5
    high = max(1e5, *(dot.x for dot in dots)) * 1.5
    peak, slope = chip.device_bf16_tflops * 1e12, chip.device_hbm_gbs * 1e9
    bottom = min(peak / 1e3, *(dot.y for dot in dots)) / 2
    start = max(low, bottom / slope)
    roof = Curve([(start, start * slope), (peak / slope, peak), (high, peak)], None,
                 f"{chip.device_bf16_tflops:g} TFLOP/s")  # fmt: skip
    x, y = Axis("FLOPs for each byte of HBM", low, high, True), Axis("FLOP/s of a device", bottom, peak * 2.2, True)
    told = (
        "The area of a dot is its share of the step. Dots lie on the roof because the model of time puts them there: "
        "left of the ridge they wait for memory, right of it for arithmetic."
    )
    return page.plot(x, y, [roof], dots, "Roofline of the step's operations, predicted") + page.paragraph(told, "note")


def _walked(walk: Walk) -> Iterator[Dot]:
    counted = (one for one in walk.costs if one.flops and one.bytes and one.seconds)
    for one in itertools.islice(counted, 24):
        share = one.seconds / walk.seconds
        told = f"{one.name}: {plan_text.duration(one.seconds)}, {share:.1%} of the step"
        colour = 3 if one.kind == "kernel" else 0
        yield Dot(one.flops / one.bytes, one.flops / one.seconds, "", told, colour, 3 + 28 * share**0.5)


def _by_arithmetic(made: Plan) -> Iterator[Dot]:
    """The forward products of one layer, its adapters' and the head's."""
    arch, job, chip = made.subject.architecture, made.job, made.place.chip
    tp, tokens = job.size("tp"), job.tokens_here
    shapes = {name: (arch.hidden, weights / arch.hidden / tp, 0)
              for name, weights in roofline.layer_matmuls(arch, arch.layers[0]).items()}  # fmt: skip
    if job.method == "lora":
        shapes |= {"adapter A": (arch.hidden, float(job.rank), 1), "adapter B": (job.rank, arch.layers[0].mlp / tp, 1)}
    shapes["head"] = (arch.hidden, float(arch.vocab), 2)
    for name, (inside, outside, colour) in shapes.items():
        flops, moved = 2 * tokens * inside * outside, (inside * outside + tokens * (inside + outside)) * job.itemsize
        rate = min(chip.device_bf16_tflops * 1e12, flops / moved * chip.device_hbm_gbs * 1e9)
        shown = name if colour else ""
        yield Dot(flops / moved, rate, shown, f"{name}: {flops / moved:,.0f} FLOPs a byte", colour, 6.0)


def _batches(made: Plan) -> str:
    """Tokens a second by rows of a micro-batch, with this remat and with full; empty dots do not fit."""
    arch, share = made.subject.architecture, made.job.size("data") * made.job.size("fsdp")
    curves, dots, most = [], [], 0.0
    ratio = made.calibration.ratio if made.calibration and made.basis == "analytic" else 1.0
    for colour, remat in enumerate(dict.fromkeys((made.job.remat, "full"))):
        points = []
        for rows in (share * count for count in ROWS):
            job = made.job.change(rows=rows, remat=remat, accumulation=1)
            rate = roofline.estimate(arch, job, made.place).tokens_per_s * ratio
            fits = budget.memory(arch, job, made.place).total * made.memory_bias <= made.limit_gib
            points.append((float(rows), rate))
            kind = "fits" if fits else "does not fit"
            dots.append(Dot(rows, rate, "", f"{rows} rows: {rate:,.0f} tokens/s, {kind}", colour, 4.5, empty=not fits))
        most = max(most, *(rate for _, rate in points))
        name = "remat full" if remat == "full" else "this remat"
        curves.append(Curve(points, colour, name))
    bound = roofline.limit_tokens_per_s(arch, made.job, made.place)
    last = float(share * ROWS[-1])
    curves.append(Curve([(0.0, bound), (last, bound)], None, "useful work at the full peak"))
    x, y = Axis("rows of a micro-batch", 0.0, last * 1.02), Axis("tokens/s", 0.0, max(most, bound) * 1.12)
    return page.plot(x, y, curves, dots, "Predicted tokens a second against rows of a micro-batch") + page.paragraph(
        "By arithmetic. Dots without filling do not fit.", "note"
    )


def _cost(made: Plan) -> str:
    source = made.place.chip.sources["prices"]
    length = f"{made.workload.told}. " if made.workload.steps is not None else f"Not known: {made.workload.told}. "
    return page.paragraph(f"{plan_text.money(made)}, without start-up. {length}Prices: {source}.")


def _advice(made: Plan) -> str:
    if not made.options:
        return page.paragraph("Nothing that is known." if not made.fits else "Nothing on this slice, by arithmetic.")
    head = ("change", "predicted", "memory", "on the command line")
    return page.table(head, [plan_text.option_line(made, one) for one in made.options], right=(1, 2))


def _heads(made: Plan) -> str:
    tp = made.job.size("tp")
    rows = [(row.name, row.heads, row.layers, f"{row.per_device:g}" + ("" if row.divides else ", copied"))
            for row in made.heads]  # fmt: skip
    meshes = [(str(one), one.reason or "valid") for one in made.meshes]
    return page.table(("heads", "count", "layers", f"for each device, tp={tp}"), rows, (1, 2)) + page.table(
        ("mesh of this slice", ""), meshes
    )


# --- many slices ---


def _throughputs(rows: Sequence[Row]) -> str:
    bars = []
    for row in rows:
        made, colour = row.fitting, _family(row)
        text = "does not fit" if made is None else f"{made.tokens_per_s:,.0f}  MFU {made.mfu:.0%}"
        bars.append(Bar(_named(row), None if made is None else made.tokens_per_s, text, colour))
    return page.bars(bars, "Predicted tokens a second by slice")


def _costs(rows: Sequence[Row]) -> str:
    """What the run costs on demand, and as spot from the lowest to the highest."""
    drawn = []
    for row in rows:
        made = row.fitting
        usd = None if made is None else made.usd(row.place.usd)
        if made is None or usd is None:
            continue
        drawn.append(Bar(_named(row), usd, f"{plan_text.dollars(usd)} on demand, {made.hours:.2f} h", _family(row)))
        if made.usd_spot:
            low, high = made.usd_spot
            drawn.append(Bar("spot", high, f"{plan_text.dollars(low)} to {plan_text.dollars(high)}", 7, start=low))
    return page.bars(drawn, "Predicted cost of the run by slice") if drawn else page.paragraph("No prices are known.")


def _named(row: Row) -> str:
    return f"{row.place.name} (roofline)" if row.basis == "roofline" else row.place.name


def _family(row: Row) -> int:
    return {"v5e": 2, "v5p": 0, "v6e": 1, "tpu7x": 3}.get(row.place.chip.name, 7)


def _table(rows: Sequence[Row]) -> str:
    return page.table(sweep.HEAD, [sweep.cells(row) for row in rows], right=sweep.RIGHT)
