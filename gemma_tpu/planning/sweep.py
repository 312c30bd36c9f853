"""The usual slices side by side: on each, the fastest way to compute the same updates, and what the run costs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tpu.errors import RunError
from gemma_tpu.estimate import advice, budget, roofline
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.pages.columns import table
from gemma_tpu.planning import plan, plan_text
from gemma_tpu.planning.plan import Plan
from gemma_tpu.planning.subject import Subject
from gemma_tpu.planning.workload import Workload
from gemma_tpu.schema import Config
from gemma_tpu.step.job import Job

SLICES = (
    "v5e-4", "v5e-8", "v5e-16", "v5p-8", "v5p-16", "v5p-32", "v6e-1", "v6e-4", "v6e-8", "v6e-16", "tpu7x-8",
    "h100x1", "h100x8", "h200x1", "h200x8", "b200x1", "b200x8",
)  # fmt: skip


HEAD = ("slice", "chips", "fits", "GiB a chip", "tokens/s", "MFU", "hours", "$", "$ spot", "basis", "how")
RIGHT = (1, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Row:
    """One slice. Without a plan nothing fits there, and `needs_gib` is the least that a device would need."""

    place: Slice
    plan: Plan | None
    needs_gib: float | None
    told: str = ""

    @property
    def fitting(self) -> Plan | None:
        return self.plan if self.plan is not None and self.plan.fits else None

    @property
    def fits(self) -> bool:
        return self.fitting is not None

    @property
    def basis(self) -> str:
        """A GPU of which no compiler was asked is marked as the roofline that it is."""
        if self.place.chip.kind == "gpu" and (self.plan is None or self.plan.compilation is None):
            return "roofline"
        return self.plan.basis if self.plan else "analytic"


def sweep(
    config: Config, source: str, model: Subject, load: Workload, *, compiled: bool, dump: Path | None,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    known = {one.name: one for one in chips.slices()}
    places = [known[name] for name in SLICES if name in known]  # the user's hardware file may have fewer
    found = []
    for number, place in enumerate(places, 1):
        folder = dump / place.name if dump else None
        row = _row(config, source, model, load, place, compiled, folder, _counted(say, number, len(places)))
        if compiled:
            say(f"  {' | '.join(cells(row)[1:-1])}")
        found.append(row)
    return found


def _counted(say: Callable[[str], None], number: int, count: int) -> Callable[[str], None]:
    return lambda text: say(f"{number} of {count}: {text}")


def _row(
    config: Config, source: str, model: Subject, load: Workload, place: Slice, compiled: bool, dump: Path | None,
    say: Callable[[str], None],
) -> Row:  # fmt: skip
    job = Job.of(config, {}, "full")
    best = advice.best_on(model.architecture, job, place)
    if best is None:
        return Row(place, None, _least(model, job, place))
    chosen = advice.apply(config, best.job)
    compiled = compiled and place.chip.kind == "tpu"
    try:
        made = plan.make(chosen, source, place, model, load, compiled=compiled, dump=dump, say=say, suggest=False)
    except RunError as error:
        say(f"{place.name} is planned by arithmetic: {error}")
        made = plan.make(chosen, source, place, model, load, compiled=False, suggest=False)
        return Row(place, made, None, f"not compiled: {str(error).splitlines()[0]}")
    return Row(place, made, None)


def _least(model: Subject, job: Job, place: Slice) -> float | None:
    """GiB that a device would need at the least: full remat, the best mesh, a row for each group of devices."""
    peaks = []
    for replicate in (False, True):
        base = job.change(rows=job.rows * job.accumulation, accumulation=1, replicate_kv=replicate)
        for choice in budget.valid_meshes(model.architecture, place, base):
            if choice.valid:
                share = choice.sizes["data"] * choice.sizes["fsdp"]
                peaks.append(budget.memory(model.architecture, base.change(mesh=choice.sizes, rows=share), place).total)
    return min(peaks, default=None)


# --- as text and as data ---


def render(rows: list[Row], load: Workload) -> str:
    lines = table([HEAD, *map(cells, rows)], right=RIGHT, indent=0)
    notes = [f"note: {row.place.name}: {row.told}" for row in rows if row.told]
    marked = f"roofline: a GPU by its datasheet and {roofline.GPU_SHARES}"
    return "\n".join([
        "every figure is predicted; each slice with the mesh, micro-batches and remat that are fastest on it", *lines,
        marked, f"length of the run: {load.told}", *notes,
    ])  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    place, made = row.place, row.plan
    devices = place.chip.devices
    if made is None:
        needs = "-" if row.needs_gib is None else f"{row.needs_gib * devices:.1f}/{place.chip.hbm_gib:.1f}"
        why = "no mesh of it suits" if row.needs_gib is None else "more than there is, at the least"
        return (place.name, str(place.chips), "no", needs, "-", "-", "-", "-", "-", row.basis, why)
    usd, spot = made.usd(place.usd), made.usd_spot
    return (
        place.name, str(place.chips), "yes" if row.fits else "no",
        f"{made.peak_gib * devices:.1f}/{place.chip.hbm_gib:.1f}", f"{made.tokens_per_s:,.0f}", f"{made.mfu:.0%}",
        "-" if made.hours is None else f"{made.hours:.2f}", "-" if usd is None else f"{usd:,.2f}",
        "-" if spot is None else f"{spot[0]:,.2f}-{spot[1]:,.2f}",
        row.basis + (f" x{made.calibration.ratio:.2f}" if made.calibration else ""), how(made),
    )  # fmt: skip


def how(made: Plan) -> str:
    """The mesh, micro-batches and remat of a row."""
    kept = made.job.remat
    words = [plan_text.mesh_name(made)]
    words += [f"{made.job.accumulation} micro-batches"] if made.job.accumulation > 1 else []
    words += ["KV heads copied"] if made.job.replicate_kv else []
    every = advice.names(made.job)
    short = kept if isinstance(kept, str) else "keep all" if len(kept) == len(every) else f"keep {' '.join(kept)}"
    return ", ".join([*words, f"remat {short}" if short == "full" else short])


def row_json(row: Row) -> dict[str, Any]:
    place = row.place
    if row.plan is None:
        needs = None if row.needs_gib is None else round(row.needs_gib * place.chip.devices, 2)
        return {"slice": place.name, "chips": place.chips, "fits": False, "peak_gib_per_chip": needs,
                "limit_gib": place.chip.hbm_gib, "basis": row.basis}  # fmt: skip
    return plan.to_json(row.plan) | {"basis": row.basis, "told": row.told}
