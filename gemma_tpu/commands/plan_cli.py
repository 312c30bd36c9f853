"""`gemma-tpu plan`: its arguments, and what it prints."""

import argparse
from pathlib import Path
from typing import Any

from gemma_tpu import config
from gemma_tpu.commands.arguments import page_option, write_page
from gemma_tpu.errors import UserError
from gemma_tpu.planning import calibration
from gemma_tpu.run.metrics import say

Result = dict[str, Any]
ABOUT = "predict memory, time and cost of a run on a slice, without the slice"
EXAMPLE = "gemma-tpu plan configs/gemma4_31b_v5p8_fast.yaml --on v5p-8 --html plan.html"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML file; may be left out with --calibrate")
    one.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="e.g. train.remat=auto")
    one.add_argument("--on", metavar="SLICE", help="e.g. v5p-8 (4 chips), 2xv5p-8 (two of them), h100x8; else the "
                     "devices here, or the config's name")  # fmt: skip
    one.add_argument("--fast", action="store_true", help="by arithmetic alone, in seconds")
    one.add_argument("--full", action="store_true", help="with code generation, for a TPU compiler's cycles (minutes)")
    one.add_argument("--dump", metavar="DIR", type=Path, help="keep what the compiler writes, in a new folder")
    page_option(one)
    one.add_argument("--sweep", action="store_true", help="the usual slices side by side, by arithmetic")
    one.add_argument("--compile", action="store_true",
                     help="with --sweep: compile for each TPU slice (minutes; what is done is kept)")  # fmt: skip
    one.add_argument("--calibrate", metavar="RUN_DIR", type=Path,
                     help="correct the model of time by what this run measured")  # fmt: skip


def run(args: argparse.Namespace) -> tuple[Result, int]:
    _check(args)
    result: Result = {}
    if args.calibrate:
        result["calibrated_by"] = _calibrate(args)
        if args.config is None:
            return result, 0
    return _plan(args, result)


def _check(args: argparse.Namespace) -> None:
    if args.config is None and not args.calibrate:
        raise UserError("which config? gemma-tpu plan CONFIG; without one only --calibrate RUN_DIR is possible")
    pairs = [("--fast", "--full"), ("--fast", "--dump"), ("--fast", "--compile"), ("--sweep", "--full")]
    for left, right in pairs:
        if getattr(args, left[2:]) and getattr(args, right[2:]):
            raise UserError(f"{left} and {right} do not go together")
    if args.compile and not args.sweep:
        raise UserError("--compile belongs to --sweep; a plan of one slice is compiled unless --fast is given")
    if args.sweep and args.on:
        raise UserError("--sweep plans for every slice; leave out --on")


def _plan(args: argparse.Namespace, result: Result) -> tuple[Result, int]:
    from gemma_tpu.planning import plan_text, subject
    from gemma_tpu.planning.workload import workload

    chosen = config.load(args.config, args.overrides)
    model = subject.find_model(chosen.model.path)
    load = workload(chosen)
    if args.sweep:
        return _sweep(args, chosen, model, load, result)
    place, why = subject.find_slice(args.on, args.config)
    say(f"slice: {place}, by {why}")
    made = _make(args, chosen, args.config, place, model, load)
    print(plan_text.render(made))
    if args.html:
        from gemma_tpu.planning import plan_page, sweep

        others = sweep.sweep(chosen, args.config, model, load, compiled=False, dump=None, say=say)
        write_page(args.html, plan_page.page_of(made, others))
    from gemma_tpu.planning.plan import to_json

    return to_json(made) | result, 0


def _make(args: argparse.Namespace, chosen: Any, source: str, place: Any, model: Any, load: Any) -> Any:
    from gemma_tpu.planning import plan

    return plan.make(chosen, source, place, model, load, compiled=not args.fast, full=args.full, dump=args.dump,
                     say=say)  # fmt: skip


def _sweep(args: argparse.Namespace, chosen: Any, model: Any, load: Any, result: Result) -> tuple[Result, int]:
    from gemma_tpu.planning import sweep

    rows = sweep.sweep(chosen, args.config, model, load, compiled=args.compile, dump=args.dump, say=say)
    print(sweep.render(rows, load))
    if args.html:
        from gemma_tpu.planning import plan_page

        write_page(args.html, plan_page.sweep_page(args.config, rows, load))
    return {"config": args.config, "sweep": [sweep.row_json(row) for row in rows]} | result, 0


def _calibrate(args: argparse.Namespace) -> list[Result]:
    """Predict the run's own config on its own slice, and keep measured over predicted for every basis."""
    from gemma_tpu.hardware import chips
    from gemma_tpu.planning import subject
    from gemma_tpu.planning.workload import workload
    from gemma_tpu.run import runs

    measured = calibration.measure(args.calibrate)
    place = measured.place
    if args.on and not args.sweep:
        asked = chips.find(args.on)
        if measured.device and place is None or place and place != asked:
            raise UserError(f"--on {asked.name}: {args.calibrate} ran on {measured.device} and calibrates that alone")
        place = asked
    if place is None:
        if measured.device is None:
            raise UserError(f"{args.calibrate} does not say what it ran on; give --on SLICE")
        raise UserError(f"{args.calibrate} ran on {measured.device}, which is no known slice: it cannot calibrate one")
    theirs = runs.read_config(args.calibrate)
    source = str(args.calibrate / "config.yaml")
    made = _make(argparse.Namespace(**(vars(args) | {"dump": None})), theirs, source, place,
                 subject.find_model(theirs.model.path), workload(theirs))  # fmt: skip
    predicted = {"analytic": made.estimate.step_s, made.basis: made.predicted_step_s}
    if made.walk:
        predicted["schedule"] = made.walk.seconds
    found = [calibration.compare(measured, place, basis, seconds) for basis, seconds in predicted.items()]
    for one in found:
        path = calibration.store(one)
        say(f"{one.chip}, {one.basis}: {one}")
    say(f"kept in {path}")
    return [vars(one) for one in found]
