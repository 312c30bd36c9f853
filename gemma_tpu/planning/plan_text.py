"""A plan in words: aligned tables on a terminal, and the sentences that the page repeats."""

from collections.abc import Iterator

from gemma_tpu.compiled.buffers import Buffer
from gemma_tpu.estimate.advice import HEADROOM, Option
from gemma_tpu.pages.columns import table
from gemma_tpu.planning import calibration
from gemma_tpu.planning.plan import ANALYTIC, Plan

# What the parts of a step's time are called, and what they say of the slice.
PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "kernel": "attention kernels",
    "memory": "norms and other passes over memory",
    "copy": "copies",
    "collective_sync": "collectives that nothing hides",
    "collective_exposed": "waiting for collectives",
    "prefetch_exposed": "waiting for HBM",
    "host_exposed": "waiting for host memory",
    "fsdp links": "weight gathers (fsdp)",
    "tp links": "gathers and scatters of activations (tp)",
    "network": "gradients over the network between slices",
}
BASES = {"analytic": "by arithmetic", "schedule": "by the compiler's schedule", "cycles": "by the compiler's cycles"}
COMPUTE = ("matmul", "attention", "kernel")
LINKS = ("collective_sync", "collective_exposed", "fsdp links", "tp links", "network")
REST = "everything else"
MINOR = 0.005  # of the step: smaller parts are summed


def render(plan: Plan) -> str:
    """The whole report."""
    parts = [
        "\n".join(_head(plan)), "\n".join(_heads(plan)), verdict(plan), "\n".join(_memory(plan)),
        "\n".join(_time(plan)), "\n".join(_cost(plan)), limits(plan), "\n".join(_advice(plan)),
        "\n".join(_assumptions(plan)),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def duration(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def dollars(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 0.1 else f"${usd:.2g}"


def gib(plan: Plan, of_device: float) -> float:
    """GiB of a chip, from those of one of its devices."""
    return of_device * plan.place.chip.devices


def mesh_name(plan: Plan) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in plan.job.mesh if size > 1) or "one device"


# --- sections ---


def _head(plan: Plan) -> Iterator[str]:
    job, arch = plan.job, plan.subject.architecture
    trains = f"LoRA rank {job.rank}" if job.method == "lora" else "all of it"
    valid = [str(one) for one in plan.meshes if one.valid and one.sizes != dict(job.mesh)]
    refused = [one for one in plan.meshes if not one.valid]
    yield f"plan of {plan.source} on {plan.place}; every figure is predicted"
    rows = [
        ("model", f"{plan.subject.name}, {len(arch.layers)} layers, {plan.parameters:,} parameters, {job.dtype}"),
        ("", plan.subject.told),
        ("trains", f"{plan.trainable:,} parameters ({trains})"),
        ("batch", f"{job.rows * job.accumulation} rows of {job.tokens} an update"
                  + (f", in {job.accumulation} micro-batches" if job.accumulation > 1 else "")),
        ("remat", plan.remat),
        ("mesh", mesh_name(plan) + (f"; also valid: {'; '.join(valid)}" if valid else "")),
        *(("", f"not {one}: {one.reason}") for one in refused),
    ]  # fmt: skip
    yield from table(rows)


def _heads(plan: Plan) -> list[str]:
    from gemma_tpu.gemma.mesh import format_heads

    text = format_heads(list(plan.heads), plan.job.size("tp"), plan.job.replicate_kv)
    return [f"  {line}" for line in text.splitlines()]


def verdict(plan: Plan) -> str:
    peak, limit = gib(plan, plan.peak_gib), gib(plan, plan.limit_gib)
    fits = "fits" if plan.fits else "DOES NOT FIT"
    about = ANALYTIC[plan.place.chip.kind]
    source = f"by arithmetic, to about {about:.0%}" if plan.compilation is None else "by the compiler's word"
    said = f"{fits}: peak {peak:.1f} of {limit:.2f} GiB a chip, {source}"
    if plan.compilation is None and abs(plan.peak_gib - plan.limit_gib) < about * plan.limit_gib:
        said += "; too close to tell" + (": plan without --fast" if plan.could_be_compiled else "")
    elif plan.fits and plan.peak_gib > (1 - HEADROOM) * plan.limit_gib:
        said += f"; less than {HEADROOM:.0%} free, where XLA begins to recompute on its own account"
    return f"{said}\nlongest row that fits {plan.longest_sequence:,}; most rows a micro-batch {plan.largest_batch}"


def _memory(plan: Plan) -> Iterator[str]:
    scale = plan.place.chip.devices
    yield f"memory of a chip, analytic: {plan.memory.total * scale:.1f} GiB"
    rows = [(name, f"{size * scale:.2f}") for name, size in plan.memory.rows()]
    yield from table([row for row in rows if row[1] != "0.00"], (1,))
    if plan.compilation and plan.compilation.memory:
        yield "the compiler's largest buffers, GiB of a device"
        yield from table(_buffers(plan.compilation.memory.largest), (0, 1))


def _buffers(largest: list[Buffer], count: int = 6) -> list[tuple[str, ...]]:
    """Buffers of the same name in one row: (GiB of all, how many, what)."""
    sums: dict[tuple[str, str], list[int]] = {}
    for one in largest:
        sums.setdefault((one.kind, one.name), []).append(one.bytes)
    rows = sorted(sums.items(), key=lambda row: -sum(row[1]))[:count]
    return [(f"{sum(sizes) / 2**30:.2f}", f"x{len(sizes)}", f"{kind} {name}") for (kind, name), sizes in rows]


def parts(plan: Plan) -> list[tuple[str, float]]:
    """(what, seconds) of a step, the largest first, in the scale of the calibrated step."""
    found = dict(plan.walk.by_kind) if plan.walk and plan.basis == "schedule" else dict(plan.estimate.parts)
    if plan.basis == "cycles":
        found = {}
    scale = plan.step_s / plan.predicted_step_s
    large = {name: s * scale for name, s in found.items() if s * scale >= MINOR * plan.step_s}
    rest = sum(found.values()) * scale - sum(large.values())
    rows = sorted(((PARTS.get(name, name), s) for name, s in large.items()), key=lambda row: -row[1])
    return [*rows, *([(REST, rest)] if rest > 1e-3 * plan.step_s else [])]


def _time(plan: Plan) -> Iterator[str]:
    rate = f"{plan.tokens_per_s:,.0f} tokens/s, MFU {plan.mfu:.1%}"
    yield f"time of a step, predicted {BASES[plan.basis]}: {duration(plan.step_s)}, {rate}"
    rows = [(name, duration(seconds), f"{seconds / plan.step_s:.0%}") for name, seconds in parts(plan)]
    yield from table(rows, (1, 2))
    if plan.compilation and plan.walk:
        hidden, took = plan.walk.hidden_seconds, plan.compilation.seconds
        since = f", on {plan.compilation.kept}" if plan.compilation.kept else ""
        yield f"  collectives beside compute {duration(hidden)}; the compiler took {took:.0f} s{since}"
        yield "the largest costs"
        costs = plan.walk.costs[:8]
        yield from table([(duration(one.seconds), f"x{one.count}", one.kind, one.name) for one in costs], (0, 1))
    yield f"FLOPs: {plan.estimate.formula}"
    yield str(plan.calibration or calibration.REFERENCE)


def _cost(plan: Plan) -> Iterator[str]:
    place, load = plan.place, plan.workload
    prices = place.chip.sources["prices"]
    if load.steps is None:
        yield f"cost: {load.told}"
    else:
        real = plan.useful_tokens_per_s
        padded = "" if real is None else f"; {load.padding:.1%} padding, {real:,.0f} tokens of rows a second"
        yield f"cost: {load.steps:,} updates, {plan.hours:.2f} h without start-up{padded}"
        yield f"  ({load.told})"
        yield "  " + money(plan)
    million = plan.usd_per_million
    if million:
        yield f"  {dollars(million)} a million tokens on demand"
    yield f"  prices: {prices}; yours in a file that GEMMA_TPU_HARDWARE names"


def money(plan: Plan) -> str:
    usd, spot = plan.usd(plan.place.usd), plan.usd_spot
    demand = f"{dollars(usd)} on demand" if usd is not None else "on demand: not known"
    return demand + (f", {dollars(spot[0])} to {dollars(spot[1])} spot" if spot else ", spot: not known")


def limits(plan: Plan) -> str:
    """What limits the run, in one paragraph."""
    ideal = plan.job.tokens_per_update * plan.estimate.flops_per_token / (
        plan.place.chips * plan.place.chip.bf16_tflops * 1e12
    )  # fmt: skip
    found = dict(plan.walk.by_kind) if plan.walk else dict(plan.estimate.parts)
    whole = sum(found.values())
    compute, links = (sum(found.get(name, 0.0) for name in names) / whole for names in (COMPUTE, LINKS))
    memory = 1 - compute - links
    name, share = max((("compute", compute), ("links", links), ("memory", memory)), key=lambda pair: pair[1])
    said = (
        f"What limits it: {name}, {share:.0%} of the step (compute {compute:.0%}, memory {memory:.0%}, "
        f"links {links:.0%}). The useful arithmetic alone would take {duration(ideal)} at the full peak of "
        f"{plan.place.chip.bf16_tflops:g} TFLOP/s a chip; the step takes {plan.step_s / ideal:.2f} times that."
    )
    again = plan.estimate.formula.partition("; ")[2]
    if again:
        said += f" Of the compute, remat repeats some: {again}."
    if not plan.fits:
        said += " Memory comes first: it does not fit."
    return said


KINDS = {"remat": "other remat", "accumulation": "more micro-batches", "mesh": "another mesh",
         "int8": "an int8 base", "slice": "another slice"}  # fmt: skip


def option_line(plan: Plan, one: Option) -> tuple[str, ...]:
    """(kind, tokens/s, memory, what to put on the command line)."""
    changes = [f"--on {one.place.name}"] if one.place.name != plan.place.name else []
    changes += [f"'{text}'" if "[" in text else text for text in one.overrides(plan.config, plan.job)]
    peak = one.memory.total * plan.memory_bias * one.place.chip.devices
    memory = f"{peak:.1f} of {one.place.chip.hbm_gib:.2f} GiB"
    return KINDS[one.kind], f"{one.estimate.tokens_per_s:,.0f} tokens/s", memory, " ".join(changes)


def _advice(plan: Plan) -> Iterator[str]:
    if plan.options:
        yield ("what would fit" if not plan.fits else "what would be faster") + " (analytic)"
        yield from table([option_line(plan, one) for one in plan.options], (1,))
    elif not plan.fits:
        yield "nothing that is known fits: no remat, accumulation, mesh, int8 base or slice"


def _assumptions(plan: Plan) -> Iterator[str]:
    yield "assumptions"
    yield from (f"  - {line}" for line in assumptions(plan))
    if plan.walk and plan.walk.unknown:
        yield "not understood in the schedule"
        yield from (f"  - {line}" for line in plan.walk.unknown)


def assumptions(plan: Plan) -> list[str]:
    return list(plan.walk.assumptions if plan.walk else plan.estimate.assumptions)
