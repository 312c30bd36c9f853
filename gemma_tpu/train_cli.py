"""The commands `train`, with its rehearsal, and `report`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tpu import devices, distributed, metrics, runs
from gemma_tpu.schema import Config

REPORT = "make a run's report.html again, also while it trains", "gemma-tpu report runs/tiny_cpu"


def run(config: Config, recipe: Callable[[Config], Any], rehearse: bool) -> tuple[Any, int]:
    """On this host's devices, and with the other hosts where there are some."""
    if config.mesh.cpu_devices:
        devices.cpu(config.mesh.cpu_devices)
    distributed.start(config.distributed)
    devices.require()
    if not distributed.is_first():
        metrics.silence()
    with distributed.together():
        if not rehearse:
            return recipe(config), 0
        from gemma_tpu import rehearsal

        result = rehearsal.rehearse(config, recipe)
        return result, 0 if result["ok"] else 1


def report(args: argparse.Namespace) -> tuple[Any, int]:
    runs.read_config(args.run_dir)
    from gemma_tpu.report import write

    page = write(runs.RunFolder(args.run_dir))
    print(f"wrote {page}", file=sys.stderr, flush=True)
    return {"report": str(page)}, 0


def add_arguments(one: argparse.ArgumentParser) -> None:
    about = "ten updates, a save, a restore, a merge, a sample: what would fail later fails now"
    one.add_argument("--rehearse", action="store_true", help=about)


def add_report_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run_dir of a config that was trained")
