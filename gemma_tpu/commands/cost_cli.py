"""`gemma-tpu cost`: its arguments, and what it prints."""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_tpu.commands.arguments import page_option, write_page
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import prices

Result = dict[str, Any]
ABOUT = "what training and serving cost: a run, a million tokens, an evaluation, hours and tokens of service"
EXAMPLE = "gemma-tpu cost configs/gemma4_31b_v5p8_fast.yaml --serve-on v6e-8 --against h100x2 --html cost.html"
LOAD = "1024/512"
HOURS, TOKENS = (1.0, 8.0, 24.0), (1e8, 1e9)


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("training", metavar="TRAINING", nargs="?",
                     help="a config (it is planned), the JSON of a plan, a run folder (what it measured), or "
                     "paper:tpu, paper:gpu")  # fmt: skip
    one.add_argument("overrides", metavar="key=value", nargs="*", default=[],
                     help="of the config (train.steps=200) or of the prices (engineering.usd_hour=140)")  # fmt: skip
    one.add_argument("--on", metavar="SLICE", help="where it trains; else by the config's name or the run's devices")
    one.add_argument("--serve", metavar="BENCH", help="JSON of `gemma-tpu bench` or `vllm bench serve`; or "
                     "paper:tpu/4096 and the like")
    one.add_argument("--serve-on", metavar="SLICE", help="where it serves; without --serve by arithmetic")
    one.add_argument("--at", metavar="QPS", help="of every bench's sweep the point at this rate")
    one.add_argument("--load", metavar="IN/OUT[@ROWS]", help="requests of the arithmetic, and how many at once "
                     f"({LOAD}, as many as fit)")  # fmt: skip
    one.add_argument("--model", metavar="MODEL", help="what is served, where TRAINING does not say")
    one.add_argument("--pay", choices=prices.WAYS, default="on-demand", help="(%(default)s)")
    group = one.add_argument_group("the other side of a comparison")
    group.add_argument("--against", metavar="SLICE", help="the same training planned there, and served there")
    group.add_argument("--against-training", metavar="TRAINING", help="another run, plan or config")
    group.add_argument("--against-serve", metavar="BENCH", help="another bench's JSON")
    group.add_argument("--against-serve-on", metavar="SLICE", help="where the other side serves (--against)")
    group.add_argument("--against-pay", choices=prices.WAYS, help="(as --pay)")
    group.add_argument("--against-engineering-hours", metavar="H", type=amount, default=0.0, help="(0)")
    more = one.add_argument_group("what else is paid")
    more.add_argument("--engineering-hours", metavar="H", type=amount, default=0.0, help="once, e.g. porting (0)")
    more.add_argument("--storage-gb", metavar="GB", type=amount, default=0.0, help="while it serves (0)")
    more.add_argument("--hours", metavar="H,H", type=amounts, help="of serving (1,8,24)")
    more.add_argument("--tokens", metavar="N,N", type=amounts, help="served (1e8,1e9)")
    tuned = one.add_argument_group("an optimisation: --serve is what came of it")
    tuned.add_argument("--before", metavar="BENCH", help="a bench's JSON of before")
    tuned.add_argument("--effort-hours", metavar="H", type=amount, default=0.0, help="of an engineer, for it (0)")
    tuned.add_argument("--tokens-per-day", metavar="N", type=amount, help="to say in days when it is repaid")
    one.add_argument("--prices", metavar="NAME|FILE", help=f"a set of prices ({prices.DEFAULT})")
    one.add_argument("--paper", action="store_true", help="the paper's tables of cost, printed and computed")
    page_option(one)


def amount(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return number


def amounts(text: str) -> tuple[float, ...]:
    return tuple(map(amount, text.split(",")))


amount.__name__ = "number"
amounts.__name__ = "list of numbers"


def run(args: argparse.Namespace) -> tuple[Result, int]:
    if args.training and re.fullmatch(r"[a-z_.]+=.*", args.training):  # no TRAINING: this is an override
        args.overrides, args.training = [args.training, *args.overrides], None
    if args.paper:
        return _paper(args)
    _check(args)
    from gemma_tpu.costs import cost_text, costing

    report = _report(args)
    print(cost_text.render(report))
    if args.html:
        from gemma_tpu.costs import cost_page

        write_page(args.html, cost_page.page_of(report))
    return costing.to_json(report), 0


def _check(args: argparse.Namespace) -> None:
    if not (args.training or args.serve or args.serve_on):
        raise UserError("the cost of what? Give TRAINING (a config, a plan's JSON, a run folder), --serve BENCH or "
                        "--serve-on SLICE; --paper alone shows the paper's tables")  # fmt: skip
    if args.before and not args.serve:
        raise UserError("--before needs --serve: the bench of what the optimisation came to")
    idle = list(_idle(args))
    if idle:
        raise UserError("these options would change nothing:\n  " + "\n  ".join(idle))
    if args.tokens_per_day == 0:
        raise UserError("--tokens-per-day 0: must be above 0")


def _idle(args: argparse.Namespace) -> Iterator[str]:
    """Options that are given and have nothing to act on, each with what it wants."""
    second = any([args.against, args.against_training, args.against_serve, args.against_serve_on])
    here = args.serve or args.serve_on
    served = here or args.against_serve or args.against_serve_on
    reckoned = (args.serve_on and not args.serve) or (args.against_serve_on and not args.against_serve) or (
        args.against and here and not args.against_serve)  # fmt: skip
    wants = [
        (args.before, "--before BENCH", ("effort_hours", "tokens_per_day")),
        (second, "--against SLICE", ("against_pay", "against_engineering_hours")),
        (args.serve or args.against_serve, "--serve BENCH", ("at",)),
        (served, "--serve BENCH or --serve-on SLICE", ("model", "hours", "tokens", "storage_gb")),
        (reckoned, "--serve-on SLICE without --serve", ("load",)), (args.training, "TRAINING", ("on",)),
    ]  # fmt: skip
    for there, what, names in wants:
        yield from (f"--{name.replace('_', '-')} needs {what}" for name in names if getattr(args, name) and not there)


def _report(args: argparse.Namespace) -> Any:
    from gemma_tpu.costs import cost, cost_sources
    from gemma_tpu.costs.costing import Report

    listed, changes = _split(args)
    training, model = cost_sources.training(args.training, args.on, changes) if args.training else (None, "")
    arch = _architecture(args.model or model, needed=bool(args.serve_on or args.against) and not args.serve)
    load, rows = _load(args.load or LOAD)

    def serving(bench: str | None, on: str | None) -> Any:
        from gemma_tpu.hardware import chips

        if bench:
            return cost_sources.bench(bench, on, arch, args.at)
        return cost_sources.reckoned(arch, chips.find(on), load, rows) if on else None

    first = cost.side(
        "", training, serving(args.serve, args.serve_on), listed, args.pay,
        engineering_hours=args.engineering_hours, storage_gb=args.storage_gb,
    )  # fmt: skip
    sides = [first]
    second = _second_training(args, changes), serving(args.against_serve, _second_place(args, first))
    if any(second):
        sides.append(cost.side(
            "", *second, listed, args.against_pay or args.pay,
            engineering_hours=args.against_engineering_hours, storage_gb=args.storage_gb,
        ))  # fmt: skip
    optimisation = None
    if args.before:
        before = cost_sources.bench(args.before, args.serve_on, arch, args.at)
        hour = cost.serving_hour(before, listed, args.pay).usd
        effort = args.effort_hours * listed["engineering.usd_hour"]
        optimisation = cost.Optimisation(before, first.serving, before.usd_per_million(hour),
                                         first.serving.usd_per_million(hour), effort)  # fmt: skip
    return Report(listed, _named(sides), args.hours or HOURS, args.tokens or TOKENS, optimisation, args.tokens_per_day)


def _split(args: argparse.Namespace) -> tuple[prices.Prices, list[str]]:
    """The price set under the overrides that are of prices, and the overrides that are of the config."""
    sections = {name.partition(".")[0] for name in prices.load().values}
    ours = [text for text in args.overrides if text.partition(".")[0] in sections]
    changes = [text for text in args.overrides if text not in ours]
    if changes and not args.training:
        known = ", ".join(sorted(sections))
        raise UserError(f"{' '.join(changes)}: there is no config that this could change; prices begin with {known}")
    return prices.load(args.prices or prices.DEFAULT, ours), changes


def _second_place(args: argparse.Namespace, first: Any) -> str | None:
    """Served where the other side trains, if the first one serves at all."""
    if args.against_serve_on or args.against_serve:
        return args.against_serve_on or args.against
    return args.against if first.serving else None


def _second_training(args: argparse.Namespace, changes: Sequence[str]) -> Any:
    from gemma_tpu.costs import cost_sources

    if args.against_training:
        return cost_sources.training(args.against_training, args.against, [])[0]
    if not (args.against and args.training):
        return None
    path = Path(args.training).expanduser()
    if path.suffix == ".json" or args.training.startswith(cost_sources.PAPER):
        raise UserError(f"--against {args.against}: {args.training} is of one slice and cannot be planned for another; "
                        "give its config, or the other side as --against-training")  # fmt: skip
    source = str(path / "config.yaml") if path.is_dir() else args.training
    return cost_sources.training(source, args.against, changes)[0]


def _architecture(model: str, needed: bool) -> Any:
    from gemma_tpu.planning import subject

    if model:
        return subject.find_model(model).architecture
    if needed:
        raise UserError("which model is served? Give --model, e.g. --model gemma-4-31B-it")
    return None


def _load(text: str) -> tuple[Any, int | None]:
    from gemma_tpu.estimate.inference import Load

    found = re.fullmatch(r"(\d+)/(\d+)(?:@(\d+))?", text)
    numbers = [int(one) for one in found.groups() if one] if found else [0]
    if min(numbers) < 1:
        raise UserError(f"--load {text}: must be IN/OUT or IN/OUT@ROWS in whole numbers, like 1024/512@32")
    return Load(numbers[0], numbers[1]), numbers[2] if len(numbers) > 2 else None


def _named(sides: Sequence[Any]) -> tuple[Any, ...]:
    """By their slices; where those are alike, by their order too."""
    from dataclasses import replace

    places = [[one.place.name for one in (side.training, side.serving) if one] for side in sides]
    names = [" + ".join(dict.fromkeys(each)) for each in places]
    if len(set(names)) < len(names):
        names = [f"{name}, {side.way}" for name, side in zip(names, sides, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({at})" for at, name in enumerate(names, 1)]
    return tuple(replace(side, name=name) for side, name in zip(sides, names, strict=True))


def _paper(args: argparse.Namespace) -> tuple[Result, int]:
    from gemma_tpu.costs import cost_text, costing, paper

    if (args.prices or paper.SET) != paper.SET:
        raise UserError(f"--paper: its tables are made of its own prices; --prices must be {paper.SET}")
    goes_with = ("paper", "prices", "html", "json", "hours", "tokens", "command", "parser")
    other = [f"{name}={value}" for name, value in vars(args).items()
             if name not in goes_with and value != args.parser.get_default(name)]  # fmt: skip
    if other:
        raise UserError(f"--paper: stands alone; leave out {', '.join(other)}")
    print(cost_text.paper_text())
    report = costing.Report(prices.load(paper.SET), tuple(paper.sides().values()), args.hours or HOURS,
                            args.tokens or TOKENS)
    if args.html:
        from gemma_tpu.costs import cost_page

        write_page(args.html, cost_page.paper_page(report))
    tables = [
        {"name": name, "rows": [{"what": what, "unit": unit} | {
            kind: one and {"printed": one.printed, "computed": one.value, "agrees": one.agrees}
            for kind, one in zip((*paper.KINDS, "ratio"), cells, strict=True)} for what, unit, cells in rows]}
        for name, rows in paper.tables()
    ]  # fmt: skip
    found = [{"id": one.id, "place": one.place, "printed": one.printed, "computed": one.value, "why": one.why}
             for one in paper.discrepancies()]  # fmt: skip
    return costing.to_json(report) | {"tables": tables, "discrepancies": found}, 0
