"""Where the figures of a cost come from: a planned config, a plan's or a bench's JSON, a run that was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from gemma_tpu import config, plain
from gemma_tpu.bench import bench_file
from gemma_tpu.bench.measuring import Judge, assess
from gemma_tpu.costs import paper
from gemma_tpu.costs.cost import Serving, Training
from gemma_tpu.errors import UserError
from gemma_tpu.estimate import inference, roofline
from gemma_tpu.estimate.inference import Load, Server
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.planning import plan, subject
from gemma_tpu.planning.workload import workload
from gemma_tpu.run import metrics, runs
from gemma_tpu.schema import Config

LATENCIES = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = ("p50", "p90", "p99")
PAPER, PAPER_KINDS = "paper:", paper.KINDS
# What `vllm bench serve` calls them in its result files.
VLLM = {"p50": "median_{}_ms", "p90": "p90_{}_ms", "p99": "p99_{}_ms"}


# --- training ---


def training(source: str, on: str | None, overrides: Sequence[str]) -> tuple[Training, str]:
    """What a source says of a run, and the model that it is about. `paper:tpu` and `paper:gpu` are the paper's runs."""
    if source.startswith(PAPER):
        _no_overrides(source, overrides, "the paper's run")
        found = paper.training(_paper_kind(source, PAPER_KINDS))
        if on is not None and chips.find(on) != found.place:
            raise UserError(f"--on {on}: {source} ran on {found.place.name}")
        return found, paper.data()["measured"]["model"]
    path = Path(source).expanduser()
    if path.is_dir():
        _no_overrides(source, overrides, "a run")
        return _of_run(path, on)
    if path.suffix == ".json":
        _no_overrides(source, overrides, "a plan's JSON")
        return _of_plan(path, on)
    chosen = config.load(source, overrides)
    place, _ = subject.find_slice(on, source)
    return planned(chosen, source, place), chosen.model.path


def planned(chosen: Config, source: str, place: Slice) -> Training:
    """By arithmetic, on the best mesh, micro-batches and remat where the config's own do not suit the slice."""
    from gemma_tpu.estimate import advice
    from gemma_tpu.step.job import Job

    model, load = subject.find_model(chosen.model.path), workload(chosen)
    if load.steps is None:
        raise UserError(f"{source}: the length of the run is not known: {load.told}; give train.steps=N")
    best = advice.best_on(model.architecture, Job.of(chosen, {}, "full"), place)
    if best is None:
        raise UserError(f"{source}: does not fit {place.name} with any mesh, micro-batches or remat; "
                        f"gemma-tpu plan {source} --sweep shows what does")  # fmt: skip
    made = plan.make(advice.apply(chosen, best.job), source, place, model, load, compiled=False, suggest=False)
    how = "calibrated by a run" if made.calibration else "by arithmetic, not calibrated"
    if place.chip.kind == "gpu":
        how += f", a GPU by its datasheet and {roofline.GPU_SHARES}"
    told = f"{source} planned for {place.name}, {how}, without start-up; {load.told}"
    assert made.hours is not None  # the steps are known
    return Training(place, made.hours, load.tokens, False, told)


def _paper_kind(source: str, known: Sequence[str]) -> str:
    """What stands after `paper:`."""
    if source.removeprefix(PAPER) not in known:
        raise UserError(f"{source}: the paper measured {', '.join(PAPER + one for one in known)}")
    return source.removeprefix(PAPER)


def _no_overrides(source: str, overrides: Sequence[str], what: str) -> None:
    if overrides:
        raise UserError(f"{source}: {what} cannot be changed afterwards: {' '.join(overrides)} only suit a config")


def _of_run(path: Path, on: str | None) -> tuple[Training, str]:
    theirs, folder = runs.read_config(path), runs.RunFolder(path)
    rows = [row for row in metrics.read(folder.metrics, metrics.PACE) if row["tokens_per_s"] > 0 and row["tokens"] > 0]
    summary = runs.read_summary(folder)
    seconds, tokens = sum(row["tokens"] / row["tokens_per_s"] for row in rows), sum(row["tokens"] for row in rows)
    if not rows:
        raise UserError(f"{path}: no update has been measured there yet")
    kind, count = summary.get("device_kind"), summary.get("devices")
    place = chips.of_devices(kind, count, summary.get("slices", 1)) if kind and count else None
    if on is not None:
        asked = chips.find(on)
        if kind and asked != place:
            raise UserError(f"--on {asked.name}: {path} was measured on {count} x {kind}; its hours are not those of "
                            "another machine (give its config to plan for one)")  # fmt: skip
        place = asked
    if place is None:
        where = f"ran on {count} x {kind}, which is no slice with a price" if kind else "does not say what it ran on"
        raise UserError(f"{path} {where}; give --on SLICE if it ran on one, or its config to plan for one")
    told = f"{path}: {len(rows):,} updates measured, without start-up, saving and held-out losses"
    return Training(place, seconds / 3600, tokens, True, told), theirs.model.path


def _of_plan(path: Path, on: str | None) -> tuple[Training, str]:
    tree = _json(path)
    if "sweep" in tree:
        raise UserError(f"{path}: a sweep has many slices; save one plan: gemma-tpu plan CONFIG --on SLICE --json")
    for key in ("slice", "hours", "fits"):
        if key not in tree:
            raise UserError(f"{path}: no key {key!r}: not what `gemma-tpu plan CONFIG --json` prints")
    plain.require(tree, _PLAN, str(path))
    if not tree["fits"]:
        raise UserError(f"{path}: that plan does not fit {tree['slice']}")
    if not tree["hours"] or tree["hours"] < 0:
        raise UserError(f"{path}: the plan did not know how long the run is: {tree.get('workload', '')}")
    if on is not None and chips.find(on).name != tree["slice"]:
        raise UserError(f"--on {on}: the plan in {path} is of {tree['slice']}")
    hours, tokens = tree["hours"], tree.get("tokens")
    if not _positive(hours) or not (tokens is None or _positive(tokens)):
        raise UserError(f"{path}: hours is {hours!r} and tokens is {tokens!r}: both must be numbers above 0")
    told = f"{path}, planned ({tree.get('basis')}); {tree.get('workload', '')}"
    try:
        place = chips.find(tree["slice"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Training(place, tree["hours"], tree.get("tokens"), False, told), ""


_PLAN = {"slice": str, "hours": (float, None), "fits": bool, "tokens?": (float, None), "basis?": (str, None),
         "workload?": str}  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    tree = plain.json_file(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object")
    return tree


# --- serving ---


def bench(source: str, on: str | None, arch: Architecture | None, at: str | None = None) -> Serving:
    """A bench's JSON: ours, as kept or as said, or a result file of `vllm bench serve`; `paper:tpu/4096` is what the
    paper printed.

    `at` picks the point of a sweep with that rate of requests; else it is the one with the most output tokens.
    """
    if source.startswith(PAPER):
        if at is not None:
            raise UserError(f"--at {at}: {source} is one point of the paper, which printed no others")
        return _of_paper(source, on)
    path = Path(source).expanduser()
    tree: Mapping[str, Any] = _json(path)
    if tree.get("format") == bench_file.FORMAT:  # as the bench keeps it, in place of what it says with --json
        tree = assess(bench_file.read(path), Judge({}))
    points = [one for one in tree.get("points") or () if isinstance(one, dict)]
    on, doubts = on or tree.get("on"), tree.get("flags")  # our own bench knows where, and what to doubt
    if on is None:
        raise UserError(f"{source}: on which slice was it measured? Give --serve-on SLICE (--against-serve-on)")
    place = chips.find(on)
    if at is not None:
        tree = _point(path, points, at)
    rate = tree.get("output_throughput")
    if not _positive(rate):
        raise UserError(f"{path}: output_throughput is {rate!r}; what `gemma-tpu bench --json` or `vllm bench serve "
                        "--save-result` writes has output tokens a second there")  # fmt: skip
    failed = tree.get("failed") or 0
    told = f"{path}: {tree.get('completed', '?')} requests measured" + (f", {failed} failed" if failed else "")
    told += f", at {at} a second" if at is not None else ""
    if at is None and len(points) > 1:
        told += f", the point with the most output tokens of {len(points)} (--at QPS for another)"
    told += f"; the bench has doubts: {'; '.join(map(str, doubts))}" if doubts else ""
    load, latency = _load_of(tree), _latencies(path, tree)
    prompt_rate = rate / load.output * load.prompt if load else None
    mfu = bound = None
    if arch is not None and load is not None:
        requests_per_s = rate / load.output
        mfu = inference.flops_of_request(arch, load) * requests_per_s / _peak(place)
        if "e2e" in latency:  # Little's law says how many requests were at work at once
            rows = max(1, round(requests_per_s * next(iter(latency["e2e"].values())) / 1e3))
            bound = _bound(arch, place, load, rows)
    return Serving(place, float(rate), True, told, prompt_rate, latency, mfu, bound)


def _of_paper(source: str, on: str | None) -> Serving:
    prompts = [point["prompt"] for point in paper.data()["measured"]["serving"]["points"]]
    kind, _, prompt = _paper_kind(source, [f"{kind}/{one}" for kind in paper.KINDS for one in prompts]).partition("/")
    found = paper.serving(kind, int(prompt))
    if on is not None and chips.find(on) != found.place:
        raise UserError(f"{source} was measured on {found.place.name}, not on {on}")
    return found


def _peak(place: Slice) -> float:
    return place.chips * place.chip.bf16_tflops * 1e12


def _bound(arch: Architecture, place: Slice, load: Load, rows: int) -> float | None:
    """What arithmetic allows a slice that has so many requests at work in all."""
    every = inference.servers(arch, place)
    rates = [one.output_tokens_per_s(load, max(1, round(rows / one.replicas))) for one in every]
    return max(rates, default=None)


def _point(path: Path, points: Sequence[Mapping[str, Any]], at: str) -> Mapping[str, Any]:
    """The point of a sweep that was measured at this rate."""
    if not points:
        raise UserError(f"--at {at}: {path} is no sweep with points at several rates")
    found = [one for one in points if _rate(one.get("qps")) == _rate(at)]
    if len(found) != 1:
        rates = ", ".join(str(one.get("qps")) for one in points)
        many = "has no point" if not found else f"has {len(found)} points"
        raise UserError(f"--at {at}: {path} {many} at that rate; it has {rates}")
    return found[0]


def _rate(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _load_of(tree: Mapping[str, Any]) -> Load | None:
    """The mean request: as asked for, else as counted."""
    asked = point if isinstance(point := tree.get("point"), dict) else tree
    prompt, output = asked.get("input"), asked.get("output")
    if _positive(prompt) and _positive(output):
        return Load(round(prompt), round(output))
    done, read, written = (tree.get(key) for key in ("completed", "total_input_tokens", "total_output_tokens"))
    if _positive(done) and _positive(read) and _positive(written):
        return Load(round(read / done), max(1, round(written / done)))
    return None


def _latencies(path: Path, tree: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for name in LATENCIES:
        ours, theirs = tree.get(f"{name}_ms"), "e2el" if name == "e2e" else name
        each = ours if isinstance(ours, dict) else {at: tree.get(key.format(theirs)) for at, key in VLLM.items()}
        kept = {at: float(value) for at in PERCENTILES if _positive(value := each.get(at))}
        if kept:
            found[name] = kept
    if not found:
        raise UserError(f"{path}: no latencies there (ttft_ms, tpot_ms, …, or median_ttft_ms, p99_ttft_ms, …)")
    return found


def reckoned(arch: Architecture, place: Slice, load: Load, rows: int | None, kv_bytes: int = 2) -> Serving:
    """By arithmetic, times the share of it that the paper's servers reached; the best tensor parallelism."""
    best, most = fastest(arch, place, load, rows, kv_bytes)
    if best is None:
        raise UserError(f"{place.name} cannot serve {load}: {most}")
    used = rows or best.most_rows(load)
    bound, share = best.output_tokens_per_s(load, used), paper.reached(place.chip.kind)
    told = (
        f"{load} on {place.name}, tp {best.tp} x {best.replicas}, {used} requests at once on each: arithmetic allows "
        f"{bound:,.0f} output tokens/s, of which the paper's {place.chip.kind.upper()} server reached {share:.0%}"
    )
    useful = inference.flops_of_request(arch, load) / load.output
    rate = bound * share
    tpot, ttft = best.tpot_s(load, used) / share * 1e3, best.prefill_s(load.prompt) / share * 1e3
    latency = {"ttft": {"alone": ttft}, "tpot": {"mean": tpot}}
    prompts, mfu = rate / load.output * load.prompt, useful * rate / _peak(place)
    return Serving(place, rate, False, told, prompts, latency, mfu, bound)


def fastest(
    arch: Architecture, place: Slice, load: Load, rows: int | None = None, kv_bytes: int = 2,
) -> tuple[Server | None, str]:  # fmt: skip
    """The server with the most output tokens a second, or why there is none."""
    every = list(inference.servers(arch, place, kv_bytes))
    if not every:
        need = inference.weights_held(arch) * 2 / 2**30
        return None, (f"its weights take {need:.1f} GiB and {inference.USABLE:.0%} of the HBM is "
                      f"{place.chips * place.chip.hbm_gib * inference.USABLE:.1f} GiB, and tensor parallelism must "
                      f"divide {arch.heads} heads")  # fmt: skip
    if load.context > arch.context:
        return None, f"the model was made for {arch.context:,} tokens"
    roomy = [one for one in every if one.most_rows(load) >= (rows or 1)]
    if not roomy:
        most = max(one.most_rows(load) for one in every)
        return None, f"the cache beside the weights holds {most} such sequences" + (f", not {rows}" if rows else "")
    return max(roomy, key=lambda one: one.output_tokens_per_s(load, rows or one.most_rows(load))), ""


def _positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and plain.number(value) and value > 0
