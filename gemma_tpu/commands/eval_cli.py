"""`gemma-tpu eval` and `gemma-tpu compare`: their arguments, and the pages they write."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_tpu.commands.arguments import any_target, page_option, positive, run_folder, seed, write_page
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import scorecard, scoring
from gemma_tpu.evaluation.answering import Draw
from gemma_tpu.evaluation.verilog_eval import TASKS
from gemma_tpu.evaluation.verilog_prompts import SETTINGS, STYLES
from gemma_tpu.run.metrics import say

Result = dict[str, Any]
Add = Callable[[argparse.ArgumentParser], None]


# --- eval tiny ---


def tiny(args: argparse.Namespace) -> tuple[Result, int]:
    where, draw = any_target(args.target), _draw(args, Draw(max_new_tokens=192))
    from gemma_tpu.evaluation import evaluate

    found = evaluate.tiny(where, base=args.base, unsafe=args.unsafe_no_sandbox, draw=draw, step=args.step,
                          served=args.model, concurrency=args.concurrency, out=args.out, ks=args.k)  # fmt: skip
    return _finish(found, args.html)


def _add_tiny(one: argparse.ArgumentParser) -> None:
    _add_target(one)
    _add_sampling(one, "1, greedy, 192 new tokens")
    _add_scoring(one)


# --- eval verilog ---


def verilog(args: argparse.Namespace) -> tuple[Result, int]:
    sources = [name for name, given in (("TARGET", args.target), ("--samples", args.samples),
                                        ("--self-check", args.self_check)) if given]  # fmt: skip
    if len(sources) != 1:
        raise UserError(
            "eval verilog scores a TARGET, --samples FILE or --self-check, one of the three"
            + (f"; given: {', '.join(sources)}" if sources else "")
        )
    common = {"task": args.task, "only": args.only, "unsafe": args.unsafe_no_sandbox, "workers": args.workers,
              "timeout": args.timeout}
    if args.target is None:
        _refuse_sampling(args, sources[0])
    if args.self_check:
        if args.k or args.out:
            raise UserError("--self-check takes neither --k nor --out: each reference is one sample")
        return _finish(scoring.self_check(args.problems, **common), args.html)
    if args.samples:
        found = scoring.stored(args.samples, args.problems, out=args.out, ks=args.k, **common)
        return _finish(found, args.html)
    where, draw = any_target(args.target), _draw(args, SETTINGS[args.settings or "official-low"])
    from gemma_tpu.evaluation import evaluate

    found = evaluate.verilog_bench(
        where, args.problems, style=args.style or "official", shots=args.shots or 0, draw=draw, base=args.base,
        step=args.step, served=args.model, concurrency=args.concurrency, out=args.out, ks=args.k, **common,
    )  # fmt: skip
    return _finish(found, args.html)


def _refuse_sampling(args: argparse.Namespace, source: str) -> None:
    names = ("n", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "settings", "style", "shots", "step",
             "model", "concurrency")  # fmt: skip
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    given += [] if args.base else ["--no-base"]
    if given:
        raise UserError(f"{', '.join(given)}: nothing is sampled with {source}")


def _add_verilog(one: argparse.ArgumentParser) -> None:
    _add_target(one, nargs="?")
    one.add_argument("--problems", metavar="DIR", type=Path, required=True,
                     help="a clone of github.com/NVlabs/verilog-eval")  # fmt: skip
    one.add_argument("--task", choices=TASKS, default=TASKS[0], help="(%(default)s)")
    one.add_argument("--samples", metavar="FILE", type=Path,
                     help="score stored completions: JSONL of {problem, sample, completion}")  # fmt: skip
    one.add_argument("--self-check", action="store_true", help="score the benchmark's own references")
    one.add_argument("--style", metavar="STYLE",
                     help=f"{', '.join(STYLES)}, or a file with {{prompt}} in it (official)")  # fmt: skip
    one.add_argument("--shots", metavar="N", type=int, help="examples of the official prompt, 0 to 4 (0)")
    one.add_argument("--settings", choices=tuple(SETTINGS),
                     help="; ".join(f"{name}: {it}" for name, it in SETTINGS.items()) + " (official-low)")  # fmt: skip
    one.add_argument("--only", metavar="PROBLEM", action="append", default=[],
                     help="problems whose names begin so, e.g. Prob031; may be repeated")  # fmt: skip
    one.add_argument("--timeout", metavar="S", type=positive, default=30,
                     help="seconds for a compilation or a simulation (%(default)s, the official limit)")  # fmt: skip
    one.add_argument("--workers", metavar="N", type=positive, help="simulations at a time (all cores)")
    _add_sampling(one, "as --settings says")
    _add_scoring(one)


# --- eval prompts, eval loss ---


def prompts(args: argparse.Namespace) -> tuple[Result, int]:
    if Path(args.file).is_dir():  # TARGET FILE is as clear as FILE TARGET
        args.file, args.target = Path(args.target), str(args.file)
    where, draw = any_target(args.target), _draw(args, Draw(max_new_tokens=256))
    from gemma_tpu.evaluation import evaluate

    found = evaluate.prompts(where, args.file, args.scorer, draw=draw, base=args.base, step=args.step,
                             served=args.model, concurrency=args.concurrency, out=args.out)  # fmt: skip
    return _finish(found, args.html)


def _add_prompts(one: argparse.ArgumentParser) -> None:
    one.add_argument("file", metavar="FILE", type=Path, help="JSONL of {prompt or messages, id, ...}")
    _add_target(one)
    one.add_argument("--scorer", metavar="MODULE:FUNCTION", required=True,
                     help="called with a row and a completion; returns a bool or a number from 0 to 1")  # fmt: skip
    _add_sampling(one, "1, greedy, 256 new tokens")


def loss(args: argparse.Namespace) -> tuple[Result, int]:
    run = run_folder(args.target)
    from gemma_tpu.evaluation import evaluate

    return evaluate.loss(run, args.step), 0


def _add_loss(one: argparse.ArgumentParser) -> None:
    one.add_argument("target", metavar="TARGET", type=Path, help="a run folder")
    one.add_argument("--step", type=positive, help="a checkpoint's step; by default the latest")


# --- compare ---


def compare(args: argparse.Namespace) -> tuple[Result, int]:
    first, second = scorecard.read(args.a), scorecard.read(args.b)
    names = (str(args.a), str(args.b))
    if first.get("eval") != second.get("eval"):
        raise UserError(f"{names[0]} is of eval {first.get('eval')}, {names[1]} of eval {second.get('eval')}")
    found = scorecard.compare(first, second, names)
    settings = ("task", "style", "shots", "draw", "iverilog", "scorer")
    found["settings_differ"] = {
        key: [first.get(key), second.get(key)] for key in settings if first.get(key) != second.get(key)
    }
    for key, (left, right) in found["settings_differ"].items():
        say(f"note: {key} differs: {left} and {right}")
    for name, entry in zip(names, (first, second), strict=True):
        values = "  ".join(f"pass@{k} {v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})" for k, v in entry["pass_at_k"].items())
        print(f"{name}: {values}")
    for what in ("wins", "losses"):
        print(f"{what} of {names[1]}: {len(found[what])}")
        for problem, (left, right) in found[what].items():
            print(f"  {problem}: {left:.2f} -> {right:.2f}")
    print(found["sentence"])
    if args.html:
        from gemma_tpu.evaluation import eval_page

        write_page(args.html, eval_page.compare_page(found, first, second))
    return found, 0


def add_compare(one: argparse.ArgumentParser) -> None:
    what = "a results file of `gemma-tpu eval`, or the folder that holds one"
    one.add_argument("a", metavar="A", type=Path, help=what)
    one.add_argument("b", metavar="B", type=Path, help="the same of another run, on the same problems")
    page_option(one)


COMPARE = ("two evaluations side by side: wins, losses, and whether the difference is significant",
           "gemma-tpu compare runs/a/eval_tiny.json runs/b/eval_tiny.json")  # fmt: skip

# name, what runs, what it is, an example, its arguments
EVALS: tuple[tuple[str, Callable, str, str, Add], ...] = (
    ("tiny", tiny, "pass@k on the bundled Verilog problems, by simulation in a sandbox",
     "gemma-tpu eval tiny runs/tiny_cpu --n 5 --temperature 0.8", _add_tiny),
    ("verilog", verilog, "pass@k on verilog-eval v2, by simulation in a sandbox; again: goes on where it stopped",
     "gemma-tpu eval verilog runs/mine --problems verilog-eval --settings paper --html eval.html", _add_verilog),
    ("loss", loss, "loss on the held-out rows of a run's config, base and tuned",
     "gemma-tpu eval loss runs/tiny_cpu", _add_loss),
    ("prompts", prompts, "prompts of your own, scored by a function of your own",
     "gemma-tpu eval prompts mine.jsonl runs/mine --scorer my_scorers:exact", _add_prompts),
)  # fmt: skip


# --- shared ---


def _add_target(one: argparse.ArgumentParser, **more: Any) -> None:
    one.add_argument("target", metavar="TARGET", **more,
                     help="a run folder (adapter applied), a model folder, or a server's URL")  # fmt: skip
    one.add_argument("--model", metavar="NAME", help="which of a server's models; by default its only one")
    one.add_argument("--concurrency", metavar="N", type=positive, help="requests to a server at a time (16)")


def _add_sampling(one: argparse.ArgumentParser, default: str) -> None:
    one.add_argument("--no-base", dest="base", action="store_false", help="leave out the base of a run")
    one.add_argument("--step", type=positive, help="a checkpoint's step; by default the latest")
    # --samples was this option's name in `eval tiny`; in `eval verilog` it names stored ones.
    names = ("--n",) if any("--samples" in action.option_strings for action in one._actions) else ("--n", "--samples")
    one.add_argument(*names, dest="n", metavar="N", type=positive, help=f"samples of each problem ({default})")
    one.add_argument("--temperature", metavar="T", type=float, help="0 is greedy")
    one.add_argument("--top-p", metavar="P", type=float)
    one.add_argument("--top-k", metavar="K", type=int, help="0: all tokens")
    one.add_argument("--max-new-tokens", metavar="N", type=positive)
    one.add_argument("--seed", type=seed, help="(0)")
    one.add_argument("--out", metavar="DIR", type=Path, help="where samples and results are kept")
    page_option(one, "write a page with every sample, log and verdict")


def _add_scoring(one: argparse.ArgumentParser) -> None:
    one.add_argument("--k", metavar="K,K", type=_ks, default=(), help="the ks of pass@k, e.g. 1,5 (1, 5, 10, n)")
    one.add_argument("--unsafe-no-sandbox", action="store_true",
                     help="simulate without isolation where no sandbox works")  # fmt: skip


def _ks(text: str) -> tuple[int, ...]:
    return tuple(positive(word) for word in text.split(","))


_ks.__name__ = "list of integers"


def _draw(args: argparse.Namespace, default: Draw) -> Draw:
    names = ("n", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(default, **given)


def _finish(found: Result, html: Path | None) -> tuple[Result, int]:
    if html:
        from gemma_tpu.evaluation import eval_page

        write_page(html, eval_page.page_of(found))
    return scorecard.brief(found), 0
