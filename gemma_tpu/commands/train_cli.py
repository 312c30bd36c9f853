"""The commands `train`, with its rehearsal, and `report`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tpu.commands.arguments import page_option, write_page
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import devices, distributed
from gemma_tpu.run import metrics, runs
from gemma_tpu.schema import Config
from gemma_tpu.training import mirrored, trackers

REPORT = ("make a run's report.html again, also while it trains; or compare runs",
          "gemma-tpu report runs/mine --compare runs/mine_gpu --html both.html")  # fmt: skip


def run(
    config: Config, recipe: Callable[[Config], Any], rehearse: bool, mirror: str | None = None
) -> tuple[Any, int]:
    """On this host's devices, and with the other hosts where there are some."""
    if mirror:
        _check_mirror(config, rehearse, mirror)
    trackers.require(config.log.trackers)
    if config.mesh.cpu_devices:
        devices.cpu(config.mesh.cpu_devices)
    distributed.start(config.distributed)
    devices.require()
    if not distributed.is_first():
        metrics.silence()
    with distributed.together():
        if mirror:
            with mirrored.kept(Path(config.run_dir).expanduser(), mirror, metrics.say):
                return recipe(config), 0
        if not rehearse:
            return recipe(config), 0
        from gemma_tpu.planning import rehearsal

        result = rehearsal.rehearse(config, recipe)
        return result, 0 if result["ok"] else 1


def _check_mirror(config: Config, rehearse: bool, mirror: str) -> None:
    if "://" not in mirror:
        raise UserError(f"--mirror {mirror}: must be in a bucket, like gs://bucket/runs/mine")
    if rehearse:
        raise UserError("--mirror and --rehearse do not go together: a rehearsal leaves nothing to keep")
    if config.checkpoint.folder is None:  # a folder of its own may be a bucket that is mounted
        raise UserError(f"--mirror {mirror} keeps all but the checkpoints: set checkpoint.folder to a bucket too, "
                        f"e.g. {mirror.rstrip('/')}/checkpoints")  # fmt: skip


def report(args: argparse.Namespace) -> tuple[Any, int]:
    if args.compare:
        return _compare(args)
    if args.html:
        raise UserError("--html belongs to --compare: a run's own page is report.html in its folder")
    runs.read_config(args.run_dir)
    from gemma_tpu.pages.report import write

    page = write(runs.RunFolder(args.run_dir))
    print(f"wrote {page}", file=sys.stderr, flush=True)
    return {"report": str(page)}, 0


def _compare(args: argparse.Namespace) -> tuple[Any, int]:
    from gemma_tpu.pages import comparison, comparison_page

    found = comparison.read([args.run_dir, *args.compare])
    print(comparison.render(found))
    if args.html:
        write_page(args.html, comparison_page.page_of(found))
    return comparison.to_json(found), 0


def add_arguments(one: argparse.ArgumentParser) -> None:
    about = "ten updates, a save, a restore, a merge, a sample: what would fail later fails now"
    one.add_argument("--rehearse", action="store_true", help=about)
    about = "fetch the run folder from this bucket first, and copy it there each minute: for machines that may vanish"
    one.add_argument("--mirror", metavar="gs://...", help=about)


def add_report_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run_dir of a config that was trained")
    one.add_argument("--compare", metavar="RUN_DIR", type=Path, nargs="+", default=[],
                     help="in place of that: these runs beside it, also those of recipes/gpu_baseline")  # fmt: skip
    page_option(one, "with --compare: write a page with pictures")
