"""The plan of a config on a slice: whether it fits, how fast it will be, what it costs, what limits it.

Analytic by arithmetic, or by the chip's own compiler's schedule of the very step that `train` runs. Every figure is a
prediction; a calibration by a real run corrects the time.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tpu import config as configs
from gemma_tpu.compiled.walk import Walk
from gemma_tpu.errors import UserError
from gemma_tpu.estimate import advice, budget, roofline
from gemma_tpu.estimate.budget import MeshChoice
from gemma_tpu.hardware import gpus
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.planning import calibration, compilation
from gemma_tpu.planning.calibration import Calibration
from gemma_tpu.planning.compilation import Compilation
from gemma_tpu.planning.subject import Subject
from gemma_tpu.planning.workload import Workload
from gemma_tpu.schema import Config
from gemma_tpu.step.job import Job, placed

if TYPE_CHECKING:
    from gemma_tpu.gemma.mesh import HeadRow

ANALYTIC = {"tpu": 0.10, "gpu": 0.20}  # how far the analytic memory may be from the compiler's
WORTH = 1.02  # how much faster a suggestion must be to be made
UNKNOWN_STEPS = 1000  # of the learning rate's schedule, where nothing tells how long the run is


@dataclass(frozen=True)
class Plan:
    config: Config
    source: str
    place: Slice
    subject: Subject
    job: Job
    remat: str  # in words
    meshes: tuple[MeshChoice, ...]
    heads: tuple["HeadRow", ...]
    memory: budget.Memory
    estimate: roofline.Estimate
    workload: Workload
    calibrations: Mapping[str, Calibration]  # of this chip, by basis, as they were when the plan was made
    trainable: int
    parameters: int
    longest_sequence: int
    largest_batch: int
    compilation: Compilation | None = None
    full: bool = False
    options: tuple[advice.Option, ...] = ()

    @property
    def could_be_compiled(self) -> bool:
        return self.place.chip.kind == "tpu" or not _no_compiler(self.place)

    # --- memory ---

    @property
    def peak_gib(self) -> float:
        """Of one device."""
        return self.memory.total if self.compilation is None else self.compilation.peak_gib

    @property
    def limit_gib(self) -> float:
        return self.place.chip.device_hbm_gib

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.limit_gib

    @property
    def memory_bias(self) -> float:
        """The compiler's peak over the analytic one: what other analytic peaks are corrected by."""
        return self.peak_gib / self.memory.total

    # --- time ---

    @property
    def walk(self) -> Walk | None:
        return self.compilation.walk if self.compilation else None

    @property
    def basis(self) -> str:
        if self.walk is None:
            return "analytic"
        return "cycles" if self.full and self.walk.cycles_seconds else "schedule"

    @property
    def predicted_step_s(self) -> float:
        """By the model of time alone, before any calibration."""
        if self.walk is None:
            return self.estimate.step_s
        return (self.walk.cycles_seconds if self.full else None) or self.walk.seconds

    @property
    def calibration(self) -> Calibration | None:
        return self.calibrations.get(self.basis)

    @property
    def step_s(self) -> float:
        return self.predicted_step_s / (self.calibration.ratio if self.calibration else 1.0)

    @property
    def tokens_per_s(self) -> float:
        """Positions of the batch a second, padding counted."""
        return self.job.tokens_per_update / self.step_s

    @property
    def useful_tokens_per_s(self) -> float | None:
        padding = self.workload.padding
        return None if padding is None else self.tokens_per_s * (1 - padding)

    @property
    def mfu(self) -> float:
        peak = self.place.chips * self.place.chip.bf16_tflops * 1e12
        return self.tokens_per_s * self.estimate.flops_per_token / peak

    # --- cost ---

    @property
    def hours(self) -> float | None:
        """Of the updates alone: loading, compiling and saving come on top."""
        return None if self.workload.steps is None else self.workload.steps * self.step_s / 3600

    def usd(self, hour: float | None) -> float | None:
        return None if hour is None or self.hours is None else hour * self.hours

    @property
    def usd_spot(self) -> tuple[float, float] | None:
        spot = self.place.spot_usd
        return None if spot is None or self.hours is None else (spot[0] * self.hours, spot[1] * self.hours)

    @property
    def usd_per_million(self) -> float | None:
        """For a million positions, on demand."""
        hour = self.place.usd
        return None if hour is None else hour / 3600 / self.tokens_per_s * 1e6


# --- making one ---


def make(
    config: Config, source: str, place: Slice, subject: Subject, workload: Workload, *,
    compiled: bool = True, full: bool = False, dump: Path | None = None, say: Callable[[str], None] = print,
    suggest: bool = True,
) -> Plan:  # fmt: skip
    """The plan of a config; with `compiled`, by asking the chip's compiler, whose dumps go to `dump`."""
    plan = _analytic(config, source, place, subject, workload)
    if compiled and place.chip.kind == "gpu" and (why := _no_compiler(place, full)):
        unkept = "; --dump has nothing to keep" if dump else ""
        say(f"note: {place.name} is planned by arithmetic alone: {why}{unkept}")
    elif compiled:
        plan = _corrected(replace(plan, compilation=_compile(plan, dump, full, say), full=full))
    return replace(plan, options=tuple(_options(plan))) if suggest else plan


def _no_compiler(place: Slice, full: bool = False) -> str:
    """Why no compiler is asked of these GPUs; nothing where one can be."""
    if place.compiler_name is None:
        return f"XLA's compiler cannot be told of a {place.chip.name} that is not here"
    if not gpus.installed():
        return "XLA's compiler for GPUs comes with JAX's CUDA plugin: pip install 'gemma_tpu[cuda]'"
    return "--full asks for a TPU compiler's cycles, which no GPU's compiler has; leave it out" if full else ""


def _corrected(plan: Plan) -> Plan:
    """What would still fit, now that the compiler has said how far the analytic memory is off."""
    chip = replace(plan.place.chip, hbm_gib=plan.place.chip.hbm_gib / plan.memory_bias)
    place, arch = replace(plan.place, chip=chip), plan.subject.architecture
    return replace(
        plan, longest_sequence=budget.longest_sequence(arch, plan.job, place),
        largest_batch=budget.largest_batch(arch, plan.job, place),
    )  # fmt: skip


def _analytic(config: Config, source: str, place: Slice, subject: Subject, workload: Workload) -> Plan:
    from gemma_tpu.gemma import mesh as meshes

    arch = subject.architecture
    _check(config, subject)
    rows = config.train.batch_size // config.train.accumulation
    sizes = meshes.sizes(config.mesh, arch, place.devices, rows, place.slices)
    if config.train.remat == "auto":
        remat, said = advice.choose_remat(arch, config, place, sizes)
    else:
        remat, said = config.train.remat, ""
    job = Job.of(config, sizes, remat)
    variables = placed(arch, job)
    trained = [one.parameters for one in variables if one.trains]
    return Plan(
        config=config, source=source, place=place, subject=subject, job=job, remat=said or advice.describe(remat, job),
        meshes=tuple(budget.valid_meshes(arch, place, job)), heads=tuple(meshes.head_table(arch, sizes["tp"])),
        memory=budget.memory(arch, job, place), estimate=roofline.estimate(arch, job, place), workload=workload,
        calibrations=calibration.of_chip(place.chip.name), trainable=sum(trained),
        parameters=sum(one.parameters for one in variables if job.method == "full" or not one.trains),
        longest_sequence=budget.longest_sequence(arch, job, place),
        largest_batch=budget.largest_batch(arch, job, place),
    )  # fmt: skip


def _check(config: Config, subject: Subject) -> None:
    if config.data.max_seq_len > subject.architecture.context:
        raise UserError(
            f"data.max_seq_len is {config.data.max_seq_len}, and {subject.name} was made for "
            f"{subject.architecture.context} positions"
        )


@contextmanager
def _folder(dump: Path | None) -> Iterator[Path]:
    """The user's folder, which must hold nothing yet, or one that goes away."""
    if dump is None:
        with tempfile.TemporaryDirectory(prefix="gemma_tpu_plan_") as temporary:
            yield Path(temporary)
        return
    if dump.exists() and (not dump.is_dir() or any(dump.iterdir())):
        raise UserError(f"--dump {dump}: must be a new or empty folder")
    dump.mkdir(parents=True, exist_ok=True)
    yield dump.resolve()


def _compile(plan: Plan, dump: Path | None, full: bool, say: Callable[[str], None]) -> Compilation:
    request = {
        "config": configs.to_dict(plan.config), "topology": plan.place.compiler_name, "slices": plan.place.slices,
        "mesh": dict(plan.job.mesh), "architecture": plan.subject.config, "remat": plan.job.remat,
        "total_steps": plan.workload.steps or UNKNOWN_STEPS,
    }  # fmt: skip
    known = compilation.kept(request, plan.place, full) if dump is None else None
    if known:
        say(f"the train step for {plan.place.name} as the compiler had it on {known.kept} ({compilation.folder()})")
        return known
    with _folder(dump) as folder:
        whose = "XLA's GPU" if plan.place.chip.kind == "gpu" else "the TPU"
        say(f"compiling the train step for {plan.place.name} by {whose} compiler on this machine "
            f"({compilation.compiler(plan.place)}) ...")  # fmt: skip
        return compilation.compile_step(request, plan.place, folder, full, say)


# --- what to change ---


def _options(plan: Plan) -> Iterator[advice.Option]:
    """What would fit where this does not; where it does, what would be faster on the same slice."""
    arch = plan.subject.architecture
    if not plan.fits:
        yield from advice.fixes(arch, plan.job, plan.place, bias=plan.memory_bias)
        return
    best = advice.best_on(arch, plan.job, plan.place, bias=plan.memory_bias)
    kept = advice.with_remat(arch, plan.job, plan.place, "remat", bias=plan.memory_bias)
    seen = plan.estimate.tokens_per_s
    for one in (*kept, *((replace(best, kind="mesh"),) if best else ())):
        if one.estimate.tokens_per_s > seen * WORTH:
            seen = one.estimate.tokens_per_s
            yield one


# --- as data ---


def to_json(plan: Plan) -> dict[str, Any]:
    """The keys that --json promises; `per_chip` figures are of a whole chip, which may hold two devices."""
    devices, spot = plan.place.chip.devices, plan.usd_spot
    walked = plan.walk
    return {
        "slice": plan.place.name, "chips": plan.place.chips, "devices": plan.place.devices,
        "config": plan.source, "model": plan.subject.told, "mesh": dict(plan.job.mesh),
        "meshes": [{"mesh": one.sizes, "refused": one.reason} for one in plan.meshes],
        "remat": plan.job.remat if isinstance(plan.job.remat, str) else list(plan.job.remat),
        "fits": plan.fits, "peak_gib_per_chip": round(plan.peak_gib * devices, 3),
        "limit_gib": round(plan.limit_gib * devices, 3),
        "analytic_peak_gib_per_chip": round(plan.memory.total * devices, 3),
        "memory_gib_per_device": {name: round(gib, 4) for name, gib in plan.memory.rows()},
        "flops_per_token": plan.estimate.flops_per_token, "flops_formula": plan.estimate.formula,
        "step_s": plan.step_s, "analytic_step_s": plan.estimate.step_s, "tokens_per_s": plan.tokens_per_s,
        "useful_tokens_per_s": plan.useful_tokens_per_s, "mfu": plan.mfu, "basis": plan.basis,
        "time_s": dict(walked.by_kind) if walked else dict(plan.estimate.parts),
        "costs": [{"name": c.name, "kind": c.kind, "seconds": c.seconds, "count": c.count}
                  for c in (walked.costs[:20] if walked else ())],
        "calibration": str(plan.calibration) if plan.calibration else calibration.REFERENCE,
        "calibrated": plan.calibration is not None,
        "compile_s": round(plan.compilation.seconds, 2) if plan.compilation else None,
        "steps": plan.workload.steps, "tokens": plan.workload.tokens, "padding_share": plan.workload.padding,
        "workload": plan.workload.told, "tokens_counted": plan.workload.counted,
        "hours": plan.hours, "usd": plan.usd(plan.place.usd), "usd_spot": None if spot is None else list(spot),
        "usd_per_million_tokens": plan.usd_per_million,
        "trainable_params": plan.trainable, "parameters": plan.parameters,
        "heads": [{"name": row.name, "heads": row.heads, "layers": row.layers, "per_device": row.per_device,
                   "divides": row.divides} for row in plan.heads],
        "longest_sequence": plan.longest_sequence, "largest_batch": plan.largest_batch,
        "advice": [option_json(plan, one) for one in plan.options],
        "assumptions": list(walked.assumptions if walked else plan.estimate.assumptions),
        "not_understood": list(walked.unknown) if walked else [],
    }  # fmt: skip


def option_json(plan: Plan, one: advice.Option) -> dict[str, Any]:
    devices = one.place.chip.devices
    return {
        "change": one.kind, "slice": one.place.name, "overrides": one.overrides(plan.config, plan.job),
        "peak_gib_per_chip": round(one.memory.total * plan.memory_bias * devices, 2),
        "limit_gib": round(one.place.chip.hbm_gib, 2), "tokens_per_s": one.estimate.tokens_per_s,
        "mfu": one.estimate.mfu, "basis": "analytic",
    }  # fmt: skip
