"""`gemma-tpu bench`: measure a server, show a result again, compare results."""

import argparse
import math
import re
import time
from pathlib import Path
from typing import Any

from gemma_tpu.bench import bench_file, bench_text, latencies, points, scrape
from gemma_tpu.bench.arrivals import KINDS
from gemma_tpu.bench.exchange import PATHS
from gemma_tpu.bench.points import PRESETS, Point
from gemma_tpu.commands.arguments import page_option, positive, seed, write_page
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import chips
from gemma_tpu.run.metrics import say

Result = dict[str, Any]

ABOUT = "measure an OpenAI-compatible server under load, or show and compare what was measured"
EXAMPLE = "gemma-tpu bench http://127.0.0.1:8000 --input 512 --output 256 --qps 1,2,4,inf --prompts 200"
# What only a measurement takes.
MEASURING = ("model", "preset", "points", "input", "output", "qps", "prompts", "data", "endpoint", "arrivals", "seed",
             "temperature", "warmup", "shared_prefix", "tokenizer", "kv_dtype", "note", "timeout", "out")  # fmt: skip


def run(args: argparse.Namespace) -> tuple[Result, int]:
    slo = latencies.parse_slo(args.slo)
    given = [name for name in MEASURING if getattr(args, name) not in (None, [])]
    if args.compare is not None:
        _only_files(args, given, [args.target] if args.target else [])
        return _compare(args, slo)
    if args.target is None:
        raise UserError("nothing to measure: give the URL of a server, a result file, or --compare FILE FILE")
    if "://" not in args.target:
        _only_files(args, given, [])
        if not Path(args.target).exists():
            raise UserError(f"{args.target}: no such file, and no URL of a server, which begins with http://")
        results = bench_file.read(Path(args.target))
        found = _assess(args, results, slo)
    else:
        results, found = _measure(args, slo)
    print(bench_text.show(found), flush=True)
    _write(args, found, None)
    if results.path is not None and "://" in args.target:
        say(f"kept in {results.path}")
    return found, 1 if found["total"]["completed"] == 0 else 0


def _only_files(args: argparse.Namespace, given: list[str], targets: list[str]) -> None:
    if targets:
        raise UserError(f"--compare takes result files alone; leave out {targets[0]}")
    if given:
        named = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{named}: of a measurement, and a result file is one already; give the URL of a server")


def _measure(args: argparse.Namespace, slo: dict[str, float]) -> tuple[bench_file.Results, Result]:
    from gemma_tpu.bench import measuring

    wanted = _points(args)
    notes = _notes(args.note)
    if args.on is not None:
        chips.find(args.on)
    server = scrape.server(args.target, args.model)
    judge = _judge(args, slo, server.to_json())
    tokenizer = args.tokenizer
    if tokenizer is None and server.root is not None and (Path(server.root) / "tokenizer.json").is_file():
        tokenizer = server.root
    settings = measuring.Settings(
        args.endpoint or "completions", args.arrivals or "poisson", args.seed or 0, args.temperature or 0.0,
        2 if args.warmup is None else args.warmup, args.shared_prefix or 0, tokenizer, args.data, args.kv_dtype,
        args.timeout or 600.0,
    )  # fmt: skip
    results = measuring.measure(server, wanted, settings, args.out or _default_out(server), notes, say)
    return results, measuring.assess(results, judge)


def _points(args: argparse.Namespace) -> tuple[Point, ...]:
    own = [name for name in ("input", "output", "qps") if getattr(args, name) is not None]
    ways = [name for name, used in (("--preset", args.preset), ("--points", args.points),
                                    ("--" + ", --".join(own), own)) if used]  # fmt: skip
    if len(ways) != 1:
        told = f"given: {' and '.join(ways)}" if ways else "none is given"
        raise UserError(f"points come from --preset, --points or --input, --output and --qps, one of the three; {told}")
    if args.prompts is not None and not own:
        raise UserError(f"--prompts goes with --input, --output and --qps; {ways[0]} has its own")
    if args.data is not None and (not own or args.input is not None):
        raise UserError("--data brings prompts of its own lengths: give --output, --qps and --prompts with it, no more")
    if args.shared_prefix and args.data:
        raise UserError("--shared-prefix is of random prompts; the prompts of --data are what they are")
    if args.preset:
        return PRESETS[args.preset]
    if args.points:
        return points.read(args.points)
    missing = [name for name in ("input", "output", "qps")
               if getattr(args, name) is None and not (name == "input" and args.data)]  # fmt: skip
    if missing:
        raise UserError(f"--{' and --'.join(missing)} missing: a point is prompts of --input tokens, answers of "
                        "--output tokens, and --qps requests a second")  # fmt: skip
    return points.grid([None] if args.data else args.input, args.output, args.qps, args.prompts or 100)


def _notes(given: list[str]) -> Result:
    found = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not sign or not name:
            raise UserError(f"--note {one}: must be NAME=VALUE, like --note tp=8")
        found[name] = value
    return found


def _default_out(server: scrape.Server) -> Path:
    """A place of its own for every measurement."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", server.model.rstrip("/").rpartition("/")[2]) or "server"
    return Path("runs/bench") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def _assess(args: argparse.Namespace, results: bench_file.Results, slo: dict[str, float]) -> Result:
    from gemma_tpu.bench import measuring

    return measuring.assess(results, _judge(args, slo, results.server))


def _judge(args: argparse.Namespace, slo: dict[str, float], server: Result) -> Any:
    """What results are held against; what is wrong with it is said before an hour of measuring."""
    from gemma_tpu.bench.measuring import Judge

    place = None if args.on is None else chips.find(args.on)
    arch = None
    if place is not None:
        from gemma_tpu.planning.subject import find_model

        served = server.get("root") or server.get("model") or ""
        try:
            arch = find_model(args.weights or served).architecture
        except UserError as error:
            if args.weights is not None:
                raise
            raise UserError(f"--on {place.name}: what the server calls {served} is no model that is known here, so "
                            "its arithmetic is not: give --weights DIR or a published name, like "
                            "google/gemma-4-31B-it") from error  # fmt: skip
    elif args.weights is not None:
        raise UserError("--weights says whose arithmetic is held against --on SLICE; give that too")
    return Judge(slo, place, arch)


def _compare(args: argparse.Namespace, slo: dict[str, float]) -> tuple[Result, int]:
    if len(args.compare) < 2:
        raise UserError("--compare needs two result files or more")
    missing = [name for name in args.compare if not Path(name).is_file()]
    if missing:
        raise UserError(f"--compare: no such file: {', '.join(missing)}")
    cards = [(Path(name).stem, _assess(args, bench_file.read(Path(name)), slo)) for name in args.compare]
    found = bench_text.compare(cards)
    print(bench_text.show_compared(found), flush=True)
    _write(args, found, [card for _, card in cards])
    return found, 0


def _write(args: argparse.Namespace, found: Result, compared: list[Result] | None) -> None:
    if args.html is None:
        return
    from gemma_tpu.bench import bench_page

    text = bench_page.page_of(found) if compared is None else bench_page.compare_page(found, compared)
    write_page(args.html, text)


# --- arguments ---


def _rates(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(qps > 0 for qps in found):
        raise argparse.ArgumentTypeError(f"{text}: rates must be above 0, or inf")
    return found


def _integers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _whole(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return int(text)


def _amount(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and finite")
    return float(text)


def _seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and finite")
    return float(text)


_rates.__name__, _integers.__name__, _whole.__name__ = "rate", "integer", "integer"
_amount.__name__ = _seconds.__name__ = "number"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("target", metavar="URL", nargs="?", help="of the server; or a result file, of this command or "
                     "of `vllm bench serve`, to show again")  # fmt: skip
    one.add_argument("--compare", metavar="FILE", nargs="+", help="result files side by side, in place of URL")
    what = one.add_argument_group("points")
    what.add_argument("--preset", choices=sorted(PRESETS), help="paper: six shapes, QPS 1 to 64 and inf, 30 prompts")
    what.add_argument("--points", metavar="FILE", type=Path, help="YAML: a list of {input, output, qps, prompts}")
    what.add_argument("--input", metavar="N,…", type=_integers, help="tokens of a prompt")
    what.add_argument("--output", metavar="N,…", type=_integers, help="tokens of an answer; one for all, or one each")
    what.add_argument("--qps", metavar="X,…", type=_rates, help="requests a second; inf is all at once")
    what.add_argument("--prompts", metavar="N", type=positive, help="requests of a point (100)")
    what.add_argument("--data", metavar="FILE", help='JSONL of your own prompts: {"prompt": …} or {"messages": …}')
    how = one.add_argument_group("requests")
    how.add_argument("--model", metavar="NAME", help="which of the server's models; its only one if left out")
    how.add_argument("--tokenizer", metavar="DIR", help="of the served model, or hf://org/name; by default the folder "
                     "that the server loaded, if it is here")  # fmt: skip
    how.add_argument("--endpoint", choices=tuple(PATHS), help="(completions)")
    how.add_argument("--arrivals", choices=KINDS, help="(poisson)")
    how.add_argument("--seed", type=seed, help="of the arrivals (0); prompts are new in every run")
    how.add_argument("--temperature", metavar="T", type=_amount, help="0 is greedy (0)")
    how.add_argument("--warmup", metavar="N", type=_whole, help="requests before each shape, not counted (2)")
    how.add_argument("--shared-prefix", metavar="N", type=positive, help="the first N tokens of all prompts are the "
                     "same: what a prefix cache is worth")  # fmt: skip
    how.add_argument("--timeout", metavar="S", type=_seconds, help="seconds of silence that fail a request (600)")
    how.add_argument("--kv-dtype", metavar="TYPE", help="of the server's KV cache, where it says only `auto`")
    how.add_argument("--note", metavar="NAME=VALUE", action="append", default=[],
                     help="a setting of the server to keep with the results; may be repeated")  # fmt: skip
    how.add_argument("--out", metavar="FILE", type=Path, help="the result file; again: goes on with what is missing "
                     "(a new one in runs/bench/)")  # fmt: skip
    then = one.add_argument_group("results")
    then.add_argument("--slo", metavar="NAME=MS,…", help="goodput: requests that meet it, e.g. ttft=500,tpot=50")
    then.add_argument("--on", metavar="SLICE", help="what serves, e.g. v6e-8, H100x2: no TTFT can be under its "
                      "arithmetic floor")  # fmt: skip
    then.add_argument("--weights", metavar="DIR", help="whose arithmetic that is, where the server's name does not "
                      "say it: a model folder or a published name")  # fmt: skip
    page_option(then)
