"""`train --rehearse`: a short run on the real devices that meets now whatever would fail later.

Ten updates of the config's own program, with its own rows: load, compile, train, save, restore, merge of one shard,
sample; each is timed, and what the planner predicted stands beside what was measured. The run's own folder and
checkpoints are not touched: the rehearsal has a folder beside them, which may be deleted.
"""

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma_tpu.adapter import adapters
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.estimate import advice, budget, roofline
from gemma_tpu.gemma import loading, mesh
from gemma_tpu.handoff import patch
from gemma_tpu.handoff.merging import updates_of
from gemma_tpu.hardware import chips, distributed
from gemma_tpu.run import checkpoint, metrics, runs
from gemma_tpu.run.metrics import say
from gemma_tpu.sampling import completions, sampler
from gemma_tpu.schema import Config
from gemma_tpu.step.job import Job
from gemma_tpu.storage.shards import open_checkpoint
from gemma_tpu.training import faults  # fmt: skip

STEPS = 10
SUFFIX = "-rehearsal"
LIMIT_S = 600.0  # what a rehearsal is meant to take at most
T = TypeVar("T")


@dataclass
class Check:
    name: str
    ok: bool
    seconds: float
    told: str


def config_for(config: Config) -> Config:
    """The same run, cut to a few updates, in a folder of its own beside the run's."""
    folder = config.checkpoint.folder
    return replace(
        config,
        train=replace(config.train, steps=STEPS, epochs=None),
        optim=replace(config.optim, warmup_steps=min(config.optim.warmup_steps, STEPS // 2)),
        checkpoint=replace(config.checkpoint, every=STEPS, seconds=None, keep=1, keep_best=0,
                           folder=None if folder is None else f"{folder.rstrip('/')}{SUFFIX}"),
        eval=replace(config.eval, every=None, patience=None),
        log=replace(config.log, trackers=(), every=1),
        run_dir=f"{config.run_dir.rstrip('/')}{SUFFIX}",
    )  # fmt: skip


def rehearse(config: Config, recipe: Callable[[Config], Any]) -> dict[str, Any]:
    """Run it; returns every check with its time. A check that fails is said, and those after it still run."""
    begun, short = time.monotonic(), config_for(config)
    run = runs.RunFolder(Path(short.run_dir).expanduser())
    _clear(run, short)
    checks: list[Check] = []
    summary = _do(checks, f"load, compile, {STEPS} updates, save", lambda: recipe(short), _trained) or {}
    gc.collect()  # the devices are to hold one model at a time
    if checks[-1].ok:
        found = _do(checks, "restore", lambda: _restore(run, short), lambda one: f"step {one.step}")
        if distributed.is_first() and found is not None:
            _do(checks, "merge of one shard", lambda: _merge_one(found, config.model.path, run), lambda told: told)
            _do(checks, "sample", lambda: _sample(run), lambda told: told)
        if distributed.is_first():
            _do(checks, "room for the checkpoints", lambda: _room(config, run, short), lambda told: told)
    distributed.barrier("the rehearsal is over")  # a host that is done would wait for this one for five minutes alone
    compared = _compare(config, run, summary) if summary else {}
    seconds = time.monotonic() - begun
    ok = all(one.ok for one in checks)
    _say(checks, compared, seconds, ok)
    result = {"ok": ok, "seconds": round(seconds, 1), "checks": [asdict(one) for one in checks],
              "predicted": compared.get("predicted"), "measured": compared.get("measured")}  # fmt: skip
    if run.path.is_dir() and distributed.is_first():
        runs.write_text(run.path / "rehearsal.json", json.dumps(result, indent=1) + "\n")
    return result


def _clear(run: runs.RunFolder, short: Config) -> None:
    """An earlier rehearsal goes; anything else of that name stays, and is refused by the run itself."""
    distributed.barrier("before the rehearsal")
    if distributed.is_first() and (run.path / "config.yaml").exists():
        if not runs.read_config(run.path).run_dir.endswith(SUFFIX):
            raise UserError(f"{run.path} holds a run that is no rehearsal; move it, or give another run_dir")
        shutil.rmtree(run.path)
    if short.checkpoint.folder is not None:
        checkpoint.delete_all(short.checkpoint.folder, _is_rehearsal)
    distributed.barrier("after an earlier rehearsal has gone")


def _is_rehearsal(record: Mapping[str, Any]) -> bool:
    return str(record["config"]["run_dir"]).endswith(SUFFIX)


def _do(checks: list[Check], name: str, action: Callable[[], T], tell: Callable[[T], str]) -> T | None:
    begun = time.monotonic()
    try:
        found = action()
        told, ok = tell(found), True
    except (UserError, RunError) as error:
        found, told, ok = None, str(error), False
    except Exception as error:
        if not faults.is_memory(error):
            raise
        found, told, ok = None, f"out of memory: {str(error).strip().splitlines()[0][:300]}", False
    if not ok and distributed.count() > 1:  # the others are waiting in it: this ends them too, with the reason
        raise RunError(f"{name}: {told}")
    checks.append(Check(name, ok, round(time.monotonic() - begun, 1), told))
    return found


def _trained(summary: Mapping[str, Any]) -> str:
    skipped = summary.get("skipped", 0)
    if skipped:
        raise RunError(f"{skipped} of {summary['steps']} updates had a loss or gradient that is no number")
    return f"{summary['steps']} updates, loss {summary.get('loss', float('nan')):.4f}"


def _restore(run: runs.RunFolder, short: Config) -> adapters.Trained:
    """As a merge reads it; of several hosts every one takes part, and each has all of it."""
    if distributed.count() == 1:
        return adapters.read(run.path)
    checkpoints = checkpoint.Checkpoints(checkpoint.folder_of(run.path, short.checkpoint.folder))
    try:
        latest = checkpoints.latest
        if latest is None:
            raise RunError(f"no checkpoint was saved in {checkpoints.folder}")
        record = checkpoints.record(latest)
        whole = NamedSharding(mesh.build({"data": jax.device_count()}), PartitionSpec())
        values = checkpoints.restore_trained(latest, dict.fromkeys(record["shapes"], whole))
        return adapters.Trained(run.path, latest, record, values)
    finally:
        checkpoints.close()


def _merge_one(found: adapters.Trained, model: str, run: runs.RunFolder) -> str:
    """The smallest shard that the run changes, merged to a file that is deleted again."""
    base = open_checkpoint(model)
    report = patch.try_shard(base, run.path, updates_of(found, loading.architecture(base)))
    whole, free = (size / 2**30 for size in (base.total_bytes, shutil.disk_usage(run.path).free))
    return (f"{report.tensors_changed} tensors of it changed, {report.bytes / 2**20:,.1f} MiB; all shards: "
            f"{whole:,.1f} GiB, {free:,.1f} free" + (": too little, give --out another disk" if whole > free else ""))


def _sample(run: runs.RunFolder) -> str:
    if distributed.count() > 1:
        return "left out on several hosts: `gemma-tpu sample` does it afterwards"
    settings, place = sampler.Settings(max_new_tokens=16), completions.mesh_for(run.path)
    made = completions.complete(run.path, ["Hello."], settings, mesh=place)
    return repr(" ".join(made[0]["text"].split())[:100])


def _room(config: Config, run: runs.RunFolder, short: Config) -> str:
    """Do the checkpoints that are kept, and the one in the making, fit on the disk?"""
    if config.checkpoint.folder is not None and "://" in config.checkpoint.folder:
        return "a bucket: no limit that could be asked for"
    folder = Path(checkpoint.folder_of(run.path, short.checkpoint.folder)).expanduser()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    count = config.checkpoint.keep + config.checkpoint.keep_best + 1
    free = shutil.disk_usage(folder).free
    if size * count > free:
        raise RunError(
            f"{count} checkpoints of {size / 2**30:.2f} GiB (checkpoint.keep, keep_best and the one in the making) "
            f"need {size * count / 2**30:.1f} GiB; {free / 2**30:.1f} are free in {folder}"
        )
    return f"{count} of {size / 2**20:,.1f} MiB, {free / 2**30:,.1f} GiB free"


def _compare(config: Config, run: runs.RunFolder, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The planner's arithmetic beside the steps after the first two, which warm up."""
    rows = metrics.read(run.metrics, metrics.STEPS)
    steps = [row["step_s"] for row in rows[2:]]
    if not steps:
        return {}
    measured: dict[str, Any] = {"step_s": round(float(np.median(steps)), 5), "tokens": rows[-1]["tokens"]}
    if rows[-1].get("memory_gib") is not None:
        measured["memory_gib"] = rows[-1]["memory_gib"]
    place = chips.of_devices(summary.get("device_kind", ""), summary.get("devices", 1), summary.get("slices", 1))
    if place is None:
        return {"measured": measured}
    arch = loading.architecture(open_checkpoint(config.model.path))
    job = Job.of(config, summary["mesh"], "full" if config.train.remat == "auto" else None)
    if config.train.remat == "auto":
        job = job.change(remat=advice.fastest_policy(arch, job, place))
    predicted = {
        "step_s": round(roofline.estimate(arch, job, place).step_s, 5),
        "memory_gib": round(budget.memory(arch, job, place).total, 3),
    }
    return {"measured": measured, "predicted": predicted}


def _say(checks: list[Check], compared: Mapping[str, Any], seconds: float, ok: bool) -> None:
    say(f"rehearsal: {'everything went well' if ok else 'something would fail'}, {seconds:.0f} s"
        + (f", more than the {LIMIT_S:.0f} s it is meant to take" if seconds > LIMIT_S else ""))  # fmt: skip
    for one in checks:
        say(f"  {'ok   ' if one.ok else 'error'} {one.name:<34} {one.seconds:>7.1f} s  {one.told}")
    for key, value in compared.get("measured", {}).items():
        guess = compared.get("predicted", {}).get(key)
        beside = "" if guess is None else f"   predicted {guess:g}, {value / guess - 1:+.0%}"
        say(f"  {key:<40} measured {value:g}{beside}")
