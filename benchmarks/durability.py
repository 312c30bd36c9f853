"""What the loop costs beside the step, what checkpoints cost, and whether memory stays flat.

    python benchmarks/durability.py [--steps 2000] [--json FILE]

Three figures on the tiny CPU config's own model, in one process, on a machine that does nothing else:

loop        The time of a run's steps with everything on (journal, TensorBoard, console, faults, meter) against the
            same compiled step on the same batches called in a bare loop; the two alternate in blocks, so that a
            machine whose speed drifts drifts for both. Goal: at most 3 % more.
checkpoints The time in which a run waits for its saves, with saves 10 s apart, as a share of the run; beside it what
            steps took beyond the median step, which is where writing in the background shows. Goal: at most 3 %.
memory      Resident memory of a run of --steps updates of a really small model: the median of each tenth of the run,
            without the first, against their mean; and the compilations after the first step. Goals: 2 %, and 0.
            Medians, because memory is read while a step is in flight: single readings differ by its working buffers,
            none, one or two of them. The lowest reading of each tenth is beside it: what a leak would lift.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

BLOCK, BLOCKS = 10, 8


def tiny_run(folder: Path, name: str, small: bool, *overrides: str):
    """A config on a random base: the tiny CPU config's sizes, or the really small ones of the tests."""
    from runs_helper import write_base

    from gemma_tpu import config
    from gemma_tpu.tiny.checkpoint import write_tiny

    base = folder / ("small" if small else "tiny")
    if not base.exists():
        write_base(base) if small else write_tiny(base, dtype="float32")
    return config.load("configs/tiny_cpu.yaml", [
        f"model.path={base}", f"run_dir={folder / name}", "data.validation=null", "log.progress=false", *overrides,
    ])  # fmt: skip


def trainer_of(config):
    """What the recipe assembles, caught before it trains."""
    from gemma_tpu import assets, cli
    from gemma_tpu.training import train

    caught, fit = [], train.Trainer.fit
    train.Trainer.fit = lambda self: caught.append(self) or {"steps": 0}
    try:
        cli._recipe(assets.find("recipes", config.recipe))(config)
    finally:
        train.Trainer.fit = fit
    return caught[0]


def loop_overhead(folder: Path) -> dict:
    """Blocks of the bare step and of the same step inside the loop's bookkeeping, in turn."""
    import jax

    from gemma_tpu.training import meter
    from gemma_tpu.training.logbook import Logbook

    steps = 2 * BLOCK * (BLOCKS + 1)
    trainer = trainer_of(tiny_run(folder, "loop", False, f"train.steps={steps}", "data.limit=200"))
    trainer.run.write_config(trainer.config)
    seconds: dict[str, list[float]] = {"bare": [], "loop": []}
    with jax.set_mesh(trainer.mesh):
        compiled = trainer.compile(trainer.loader[0])
        batches = iter(trainer.loader)
        log = Logbook(trainer.config, trainer.run, trainer.loader, 0, meter.Rates(1e9, 1e12, 1.0))
        log.begin()
        number = 0
        for block in range(BLOCKS + 1):
            ready = [next(batches) for _ in range(BLOCK)]
            begun = time.perf_counter()
            for batch in ready:
                trainer.state, found = compiled(trainer.state, trainer.parts.frozen, trainer.program.place(batch))
            jax.block_until_ready(found)
            bare, begun = time.perf_counter() - begun, time.perf_counter()
            for _ in range(BLOCK):
                batch, number = log.wait_for(batches), number + 1
                trainer.state, found = compiled(trainer.state, trainer.parts.frozen, trainer.program.place(batch))
                log.dispatched(number, found, batch["tokens"].size)
            log.catch_up()
            if block:  # the first one warms up
                seconds["bare"].append(bare)
                seconds["loop"].append(time.perf_counter() - begun)
        log.close()
        batches.close()
    ratios = [loop / bare for loop, bare in zip(seconds["loop"], seconds["bare"], strict=True)]
    return {
        "step_ms": round(1e3 * statistics.median(seconds["bare"]) / BLOCK, 2),
        "overhead": round(statistics.median(ratios) - 1, 4),
        "blocks": [round(ratio - 1, 4) for ratio in ratios],
    }


def checkpoint_overhead(folder: Path) -> dict:
    from gemma_tpu.run import metrics

    summary = trainer_of(tiny_run(
        folder, "saving", False, "train.steps=160", "data.limit=200", "checkpoint.every=100000",
        "checkpoint.seconds=10",
    )).fit()  # fmt: skip
    saved = sorted(int(path.name) for path in (folder / "saving" / "checkpoints").iterdir())
    steps = [row["step_s"] for row in metrics.read(folder / "saving" / "metrics.jsonl")]
    slower = sum(steps) - len(steps) * statistics.median(steps)
    return {"seconds": summary["seconds"], "share": summary["saving_share"],
            "slower_steps": round(slower / summary["seconds"], 4), "kept": saved}  # fmt: skip


def memory(folder: Path, steps: int) -> dict:
    from gemma_tpu.run import metrics

    summary = trainer_of(tiny_run(
        folder, "memory", True, f"train.steps={steps}", "data.limit=100", "data.max_seq_len=192", "log.every=200",
        "checkpoint.every=500", "train.batch_size=2",
    )).fit()  # fmt: skip
    held = [row["host_gib"] for row in metrics.read(folder / "memory" / "metrics.jsonl")]
    tenths = [held[at : at + steps // 10] for at in range(steps // 10, steps, steps // 10)]
    medians = [statistics.median(tenth) for tenth in tenths]
    mean = statistics.fmean(medians)
    return {"steps": steps, "seconds": summary["seconds"], "mean_gib": round(mean, 4),
            "lowest": round(min(medians) / mean - 1, 4), "highest": round(max(medians) / mean - 1, 4),
            "medians": [round(one, 4) for one in medians], "lowest_readings": [min(tenth) for tenth in tenths],
            "recompiled": summary["recompiled"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the memory run (2000)")
    parser.add_argument("--only", choices=("loop", "checkpoints", "memory"))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    from gemma_tpu.hardware import devices

    devices.quiet()
    devices.cpu(1)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {"loop": loop_overhead, "checkpoints": checkpoint_overhead,
                 "memory": lambda folder: memory(folder, args.steps)}  # fmt: skip
        for part, measure in parts.items():
            if args.only in (None, part):
                found[part] = measure(folder)
                print(part, json.dumps(found[part]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
