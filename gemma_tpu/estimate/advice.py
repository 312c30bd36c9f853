"""What to change: which activations to keep, and what would fit or be faster than what a config asks for.

Everything here is answered by the analytic budget, before a compiler or a device is asked.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from gemma_tpu.estimate import budget, roofline
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware.chips import Slice, find, slices
from gemma_tpu.schema import MESH_AXES, Activation, Config
from gemma_tpu.step.job import NAMES, Job, Policy

# Close to its limit XLA recomputes on its own account and stops overlapping (seen on v5p from 10 GiB under).
HEADROOM = 0.10
# XLA's GPU compiler turns stacks of activations over between its loops: its peak was up to 15 % over the arithmetic.
GPU_HEADROOM = 0.20


def headroom(place: Slice) -> float:
    """The share of the memory that whoever chooses for the user leaves free."""
    return GPU_HEADROOM if place.chip.kind == "gpu" else HEADROOM


# --- which activations to keep ---


def choose_remat(
    architecture: Architecture, config: Config, place: Slice | None, mesh: Mapping[str, int]
) -> tuple[Policy, str]:
    """The fastest of the policies whose analytic peak leaves a tenth of the limit free, and a sentence about it.

    Without a slice (a CPU, an unknown chip) no limit is known, and everything that has a name is kept.
    """
    job = Job.of(config, mesh, remat="full")
    if place is None:
        kept = names(job)
        return kept, f"remat auto: keeps {', '.join(kept)}; the memory of this device is not known"
    policy = fastest_policy(architecture, job, place)
    peak = budget.memory(architecture, job.change(remat=policy), place)
    return policy, f"remat auto: {describe(policy, job)}; {_room(peak, place)}"


def fastest_policy(architecture: Architecture, job: Job, place: Slice, bias: float = 1.0) -> Policy:
    """Down the ladder until the headroom is free; keeping nothing where not even that leaves so much.

    `bias`: what an analytic peak is multiplied by, where a compiler has said more of this job.
    """

    def roomy(keeps: tuple[Activation, ...]) -> bool:
        peak = budget.memory(architecture, job.change(remat=_policy(keeps)), place)
        return peak.total * bias <= (1 - headroom(place)) * peak.limit

    order = ladder(architecture, job.change(remat="full"), place.name)
    rungs = (order[dropped:] for dropped in range(len(order) + 1))
    keeps = next((rung for rung in rungs if roomy(rung)), None)
    if keeps is None:
        return "full"
    # The last rung may have freed more than was missing: take back what still has room, the dearest first.
    for name in reversed(order):
        if name not in keeps and roomy((*keeps, name)):
            keeps = (*keeps, name)
    return _policy(keeps)


@lru_cache(256)
def ladder(architecture: Architecture, job: Job, slice_name: str) -> tuple[Activation, ...]:
    """The names in the order to drop them: first what costs the least time for each byte that it frees."""
    place = find(slice_name)
    every = names(job)
    whole = roofline.estimate(architecture, job.change(remat=every), place).step_s
    held = budget.saved(architecture, job.change(remat=every))

    def price(name: Activation) -> tuple[float, float]:
        rest = tuple(one for one in every if one != name)
        slower = roofline.estimate(architecture, job.change(remat=rest), place).step_s - whole
        # Of equal prices the smaller goes first: no more is dropped than must be.
        return float(f"{slower / held[name]:.4g}"), held[name]

    return tuple(sorted((name for name in every if held.get(name)), key=price))


def _policy(keeps: tuple[Activation, ...]) -> Policy:
    return tuple(name for name in NAMES if name in keeps) or "full"


def names(job: Job) -> tuple[Activation, ...]:
    """The activations that this job has."""
    return tuple(name for name in NAMES if name != "lora_h" or job.method == "lora")


def describe(policy: Policy, job: Job) -> str:
    if isinstance(policy, str):
        return {"full": "full: keeps nothing but each layer's input", "none": "none: keeps everything"}[policy]
    held = {name.partition("@")[0] for name in policy}  # q@host is kept too, in the host's memory
    dropped = [name for name in names(job) if name not in held]
    return f"keeps {', '.join(policy)}" + (f"; computes {', '.join(dropped)} again" if dropped else "")


def _room(peak: budget.Memory, place: Slice) -> str:
    said = f"predicted peak {peak.total:.1f} of {peak.limit:.2f} GiB on {place.name}"
    if not peak.fits:
        return f"{said}, which does not fit"
    free = headroom(place)
    return said if peak.total <= (1 - free) * peak.limit else f"{said}, less free than the {free:.0%} that should be"


# --- other ways to run the same updates ---


@dataclass(frozen=True)
class Option:
    """Another way to compute the same updates: what to set, where, and what is predicted of it."""

    kind: str  # remat, accumulation, mesh, int8, slice
    job: Job
    place: Slice
    memory: budget.Memory
    estimate: roofline.Estimate
    auto: bool  # whether its remat is what `train.remat=auto` would choose

    def overrides(self, config: Config, now: Job) -> list[str]:
        """What to put on the command line of `now`, the job of this config, to get it."""
        found = []
        if self.job.remat != now.remat:
            keeps = self.job.remat
            named = keeps if isinstance(keeps, str) else f"[{','.join(keeps)}]"
            found.append(f"train.remat={'auto' if self.auto else named}")
        if self.job.accumulation != config.train.accumulation:
            found.append(f"train.accumulation={self.job.accumulation}")
        if self.job.mesh != now.mesh:
            axes = {"fsdp", "tp", *(axis for axis, size in (*self.job.mesh, *now.mesh) if size > 1)}
            found += [f"mesh.{axis}={size}" for axis, size in self.job.mesh if axis in axes]
        if self.job.replicate_kv and not config.mesh.replicate_kv:
            found.append("mesh.replicate_kv=true")
        if self.job.quantise != now.quantise:
            found.append(f"model.quantise={self.job.quantise}")
        return found


def apply(config: Config, job: Job) -> Config:
    """The config that asks for this job: the same updates, computed another way."""
    axes = {axis: job.size(axis) for axis in MESH_AXES}
    return replace(
        config,
        model=replace(config.model, quantise=job.quantise),
        mesh=replace(config.mesh, auto=False, replicate_kv=job.replicate_kv, **axes),
        train=replace(config.train, accumulation=job.accumulation, remat=job.remat),
    )


def option(kind: str, architecture: Architecture, job: Job, place: Slice) -> Option:
    return Option(
        kind, job, place, budget.memory(architecture, job, place), roofline.estimate(architecture, job, place),
        auto=job.remat == fastest_policy(architecture, job, place),
    )  # fmt: skip


def fixes(architecture: Architecture, job: Job, place: Slice, bias: float = 1.0) -> Iterator[Option]:
    """Ways that fit, for a job that does not: the cheapest first. A coarser base comes after all that change no
    result, and another slice where none of those fits."""
    found = [
        *with_remat(architecture, job, place, "remat", bias),
        *_with_accumulation(architecture, job, place, bias),
        *_with_other_mesh(architecture, job, place, bias),
    ]
    yield from found
    yield from _with_int8(architecture, job, place, bias)
    if not found:
        larger = [one for one in slices() if one.chip.name == place.chip.name and one.devices > place.devices]
        others = [one for one in slices() if one.chip.name != place.chip.name and one.chip.kind == place.chip.kind]
        others.sort(key=lambda one: (one.usd is None, one.usd or one.chips))
        for family in (larger, others):
            options = (best_on(architecture, job, one, bias) for one in family)
            yield from itertools.islice(filter(None, options), 1)


def with_remat(architecture: Architecture, job: Job, place: Slice, kind: str, bias: float = 1.0) -> list[Option]:
    """The job with the fastest policy that leaves headroom, if any policy fits at all."""
    if not _fits(architecture, job.change(remat="full"), place, bias):
        return []
    policy = fastest_policy(architecture, job, place, bias)
    return [option(kind, architecture, job.change(remat=policy), place)]


def _fits(architecture: Architecture, job: Job, place: Slice, bias: float) -> bool:
    peak = budget.memory(architecture, job, place)
    return peak.total * bias <= peak.limit


def _with_accumulation(architecture: Architecture, job: Job, place: Slice, bias: float) -> list[Option]:
    """The fewest micro-batches more with which the update fits: with any remat, and with its own."""
    found: dict[Policy, Option] = {}
    for smaller in _smaller_batches(job):
        for changed in (*(one.job for one in with_remat(architecture, smaller, place, "", bias)), smaller):
            if changed.remat not in found and _fits(architecture, changed, place, bias):
                found[changed.remat] = option("accumulation", architecture, changed, place)
        if job.remat in found:
            break
    return list(found.values())[:2]


def _smaller_batches(job: Job) -> Iterator[Job]:
    """The same update in more micro-batches, whose rows still divide over the mesh."""
    rows, share = job.rows * job.accumulation, job.size("data") * job.size("fsdp")
    for accumulation in range(job.accumulation + 1, rows // share + 1):
        if rows % accumulation == 0 and (rows // accumulation) % share == 0:
            yield job.change(rows=rows // accumulation, accumulation=accumulation)


def _with_other_mesh(architecture: Architecture, job: Job, place: Slice, bias: float) -> list[Option]:
    here = [one for one in every_mesh(architecture, job, place, bias) if one.job.mesh != job.mesh]
    return sorted(here, key=lambda one: -one.estimate.tokens_per_s)[:2]


def _with_int8(architecture: Architecture, job: Job, place: Slice, bias: float) -> list[Option]:
    """The frozen base in eight bits: with this mesh if it fits, else with the best."""
    if job.method == "full" or job.quantise is not None:
        return []
    smaller = job.change(quantise="int8")
    here = with_remat(architecture, smaller, place, "int8", bias)
    best = None if here else best_on(architecture, smaller, place, bias)
    return here or ([replace(best, kind="int8")] if best else [])


def best_on(architecture: Architecture, job: Job, place: Slice, bias: float = 1.0) -> Option | None:
    """The fastest way to compute the same updates on a slice; one with headroom before one without."""

    def rank(one: Option) -> tuple[bool, float]:
        return one.memory.total * bias <= (1 - headroom(place)) * one.memory.limit, one.estimate.tokens_per_s

    best = max(every_mesh(architecture, job, place, bias), key=rank, default=None)
    return best and replace(best, kind="slice")


def every_mesh(architecture: Architecture, job: Job, place: Slice, bias: float = 1.0) -> Iterator[Option]:
    """For each mesh and number of micro-batches the fastest way that fits; KV heads are copied only where a mesh asks
    for it."""
    found: list[Option] = []
    for replicate in dict.fromkeys((job.replicate_kv, True)):
        split = _every_split(architecture, job.change(replicate_kv=replicate), place, bias)
        meshes = {one.job.mesh for one in found}
        found += [one for one in split if one.job.mesh not in meshes]
    yield from found


def _every_split(architecture: Architecture, job: Job, place: Slice, bias: float) -> Iterator[Option]:
    rows, settled = job.rows * job.accumulation, set()
    for accumulation in (count for count in range(1, rows + 1) if rows % count == 0):
        base = job.change(rows=rows // accumulation, accumulation=accumulation)
        for choice in budget.valid_meshes(architecture, place, base):
            changed = base.change(mesh=choice.sizes)
            if not choice.valid or changed.mesh in settled:
                continue
            for one in with_remat(architecture, changed, place, "mesh", bias):
                yield one
                # Nothing is computed again, and no less would stay on the chip: smaller micro-batches gain nothing.
                if one.job.remat == names(job) and changed.tokens_here <= roofline.FEW // 2:
                    settled.add(changed.mesh)
