"""The command line: arguments in, one package call, an exit code out.

Exit 0: fine, 1: the run failed, 2: the input is wrong. JAX and what needs it is imported inside the commands,
so that `--help` and a wrong path answer at once.
"""

import argparse
import contextlib
import errno
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma_tpu import __version__, assets, config
from gemma_tpu.commands import (
    bench_cli,
    choose_cli,
    cost_cli,
    data_cli,
    eval_cli,
    find_cli,
    handoff_cli,
    launch_cli,
    lite_cli,
    plan_cli,
    sample_cli,
    serve_cli,
    train_cli,
)
from gemma_tpu.commands.arguments import any_target as _any_target
from gemma_tpu.commands.arguments import positive as _positive
from gemma_tpu.commands.arguments import seed as _seed
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.hardware import devices
from gemma_tpu.run.metrics import say
from gemma_tpu.schema import Config
from gemma_tpu.tiny.archs import ARCHS
from gemma_tpu.tiny.checkpoint import DTYPES, write_tiny

NO_HOME = "Could not determine home directory."  # what Path.expanduser says of a user that is not there
EXAMPLES = """\
examples:
  gemma-tpu doctor                                      what this machine has of what a run needs
  gemma-tpu ls                                          the configs that ship: slice, memory, tokens/s, price
  gemma-tpu init                                        a config for your data, model and slice
  gemma-tpu tiny models/tiny-random                     a small random Gemma 4, in the published layout
  gemma-tpu validate configs/tiny_cpu.yaml              what is wrong with a config, before it costs anything
  gemma-tpu data configs/tiny_cpu.yaml --show 3         the rows it trains on, and which tokens of them
  gemma-tpu plan configs/gemma4_31b_v5p8_fast.yaml      does it fit, how fast, how much: before anything is rented
  gemma-tpu cost configs/gemma4_31b_v5p8_fast.yaml --serve-on v6e-8 --against h100x2    training and serving in dollars
  gemma-tpu choose configs/workloads/serve_31b_chat.yaml      which accelerators suit, ranked by cost
  gemma-tpu train configs/tiny_cpu.yaml optim.lr=1e-3   train; the same command again goes on where it stopped
  gemma-tpu merge runs/tiny_cpu                         the adapter into the base's safetensors
  gemma-tpu verify runs/tiny_cpu                        proof that the merge is right
  gemma-tpu adapter runs/tiny_cpu --out adapters/mine   the adapter alone, as a PEFT folder
  gemma-tpu eval tiny runs/tiny_cpu                     pass@1 on held-out problems, base and tuned
  gemma-tpu compare runs/a/eval_tiny.json runs/b/eval_tiny.json    is the difference significant?
  gemma-tpu bench http://127.0.0.1:8000 --preset paper  a server under load: latency, throughput, saturation
  gemma-tpu sample runs/tiny_cpu --prompt "..."         text from the tuned model; without a prompt, a chat

TARGET is a run folder (its adapter is applied) or a model folder.
Exit codes: 0 fine, 1 the run failed, 2 the input is wrong."""

Result = dict[str, Any]
Command = Callable[[argparse.Namespace], tuple[Result, int]]  # what --json prints, and the exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        return _run(args)
    except BrokenPipeError:  # the reader of stdout has gone (`| head`); there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(args: argparse.Namespace) -> int:
    devices.quiet()
    # Under --json stdout carries the one object; whatever a library prints goes to stderr.
    stdout = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with stdout:
        result, code = _guarded(lambda: args.command(args))
    if args.json:
        print(json.dumps(_plain(result), allow_nan=False), flush=True)
    return code


def run_script(call: Callable[..., Any], *args: Any) -> int:
    """For recipes and scripts that are run by themselves: the messages and exit codes of the command line."""
    devices.quiet()
    return _guarded(lambda: (call(*args), 0))[1]


def _guarded(call: Callable[[], tuple[Result, int]]) -> tuple[Result, int]:
    try:
        return call()
    except UserError as error:
        return _failed(error), 2
    except RunError as error:
        return _failed(error), 1
    except KeyboardInterrupt:
        return _failed("interrupted"), 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a path that was given, wherever it is looked at first
            raise
        return _failed(f"{error.filename}: {error.strerror}"), 2
    except RuntimeError as error:
        if str(error) != NO_HOME:
            raise
        return _failed("a path begins with ~NAME, and NAME is no user of this machine; write ~/ or the whole path"), 2


def _failed(error: object) -> Result:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return {"error": str(error)}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: such a number is null there."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- commands: each returns what --json prints and the exit code ---


def train(args: argparse.Namespace) -> tuple[Result, int]:
    run_config = config.load(args.config, args.overrides)
    return train_cli.run(run_config, _recipe(assets.find("recipes", run_config.recipe)), args.rehearse,
                         args.mirror)  # fmt: skip


def _recipe(path: Path) -> Callable[[Config], Result]:
    """The `main` of a recipe file, the user's own or a shipped one."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"recipe {path}: must be a Python file with a function main(config)")
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[Config], Result] | None = getattr(module, "main", None)
    if not callable(main):
        raise UserError(f"recipe {path}: has no function main(config)")
    return main


def validate(args: argparse.Namespace) -> tuple[Result, int]:
    run_config = config.load(args.config, args.overrides)
    devices.cpu()
    from gemma_tpu.onboarding.validate import validate

    found = validate(run_config)
    for line in found.checked:
        say(f"ok           {line}")
    for line in found.not_checked:
        say(f"not checked  {line}")
    for line in found.problems:
        say(f"error        {line}".replace("\n", "\n" + " " * 13))
    return {"ok": not found.problems, **vars(found)}, 2 if found.problems else 0


def tiny(args: argparse.Namespace) -> tuple[Result, int]:
    out = write_tiny(args.out, arch=args.arch, seed=args.seed, dtype=args.dtype)
    say(f"wrote {out}: random weights in the layout of {args.arch}, {args.dtype}, seed {args.seed}")
    return {"out": str(out), "arch": args.arch, "seed": args.seed, "dtype": args.dtype}, 0


def stage(args: argparse.Namespace) -> tuple[Result, int]:
    from gemma_tpu.storage.stage import stage

    return stage(args.source, args.target, overwrite=args.overwrite, say=say), 0


def sample(args: argparse.Namespace) -> tuple[Result, int]:
    target = _any_target(args.target)
    prompts = [*args.prompt, *map(_read_prompt, args.prompt_file)]
    return sample_cli.run(args, target, prompts, _settings(args))


# --- what the user points at ---


def _read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: not UTF-8 text (byte {error.start})") from None


def _settings(args: argparse.Namespace) -> Any:
    from gemma_tpu.sampling.sampler import Settings

    return Settings(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                    top_p=args.top_p, seed=args.seed, min_p=args.min_p,
                    repetition_penalty=args.repetition_penalty)  # fmt: skip


# --- arguments ---


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse ends a list of positionals at the first option: in `train CONFIG --json optim.lr=1e-3` the
    # override is left over.
    if rest and "overrides" in args and not any(word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


class Parser(argparse.ArgumentParser):
    """Help is printed as it is written, and an option is never guessed from its first letters."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)


def build_parser() -> Parser:
    about = "LoRA fine-tuning of Gemma on TPU, from a YAML file to merged safetensors."
    parser = Parser(prog="gemma-tpu", description=about, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"gemma-tpu {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    find_cli.add_commands(commands, _command)
    _add_configured(commands)
    _add_tiny(commands)
    _add_stage(commands)
    handoff_cli.add_commands(commands, _command)
    _add_sample(commands)
    lite_cli.add_arguments(_command(commands, "serve-lite", lite_cli.run, lite_cli.ABOUT, lite_cli.EXAMPLE))
    _add_eval(commands)
    return parser


def _add_configured(commands: Any) -> None:
    for name, run, about in (
        ("train", train, "train a config; the same command again goes on where it stopped"),
        ("validate", validate, "hold a config against its checkpoint and data, without training"),
    ):
        one = _command(commands, name, run, about, f"gemma-tpu {name} configs/tiny_cpu.yaml train.steps=20")
        one.add_argument("config", metavar="CONFIG", help="a YAML file, yours or a shipped one by its name")
        one.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="e.g. optim.lr=1e-4")
        if name == "train":
            train_cli.add_arguments(one)
    data_cli.add_arguments(_command(commands, "data", data_cli.run, data_cli.ABOUT, data_cli.EXAMPLE))
    plan_cli.add_arguments(_command(commands, "plan", plan_cli.run, plan_cli.ABOUT, plan_cli.EXAMPLE))
    launch_cli.add_arguments(_command(commands, "launch", launch_cli.run, launch_cli.ABOUT, launch_cli.EXAMPLE))
    serve_cli.add_arguments(_command(commands, "serve", serve_cli.run, serve_cli.ABOUT, serve_cli.EXAMPLE))
    bench_cli.add_arguments(_command(commands, "bench", bench_cli.run, bench_cli.ABOUT, bench_cli.EXAMPLE))
    cost_cli.add_arguments(_command(commands, "cost", cost_cli.run, cost_cli.ABOUT, cost_cli.EXAMPLE))
    choose_cli.add_arguments(_command(commands, "choose", choose_cli.run, choose_cli.ABOUT, choose_cli.EXAMPLE))


def _add_tiny(commands: Any) -> None:
    example = "gemma-tpu tiny models/tiny-random --dtype float32"
    one = _command(commands, "tiny", tiny, "write a small random checkpoint in the published layout", example)
    one.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    one.add_argument("--arch", choices=sorted(ARCHS), default="gemma4-31b")
    one.add_argument("--seed", type=_seed, default=0, help="the same seed writes the same bytes (0)")
    one.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")


def _add_stage(commands: Any) -> None:
    example = "gemma-tpu stage google/gemma-4-31B-it gs://bucket/gemma-4-31B-it"
    about = "copy a checkpoint from the hub into a bucket, past the disk; goes on where it stopped"
    one = _command(commands, "stage", stage, about, example)
    one.add_argument("source", metavar="HUB_ID", help="org/name[@revision], a folder or a URL; HF_TOKEN for gated ones")
    one.add_argument("target", metavar="BUCKET", help="gs://, s3:// or a folder")
    one.add_argument("--overwrite", action="store_true", help="let files of the target be replaced")


def _add_sample(commands: Any) -> None:
    example = 'gemma-tpu sample runs/tiny_cpu --prompt "Write a Verilog module for a 4-bit counter."'
    about = "complete prompts with a run, a model or a server; a chat where no prompt is given"
    one = _command(commands, "sample", sample, about, example)
    one.add_argument("target", metavar="TARGET", help="a run folder (adapter applied), a model folder, or the URL "
                     "of an OpenAI-compatible server")  # fmt: skip
    repeated: dict[str, Any] = {"action": "append", "default": []}
    one.add_argument("--prompt", metavar="TEXT", **repeated, help="may be repeated")
    one.add_argument("--prompt-file", metavar="FILE", type=Path, **repeated,
                     help="the whole file is one prompt; may be repeated")  # fmt: skip
    one.add_argument("--system", metavar="TEXT", help="a system turn before each prompt")
    one.add_argument("--raw", action="store_true", help="continue the text as it stands, without template")
    one.add_argument("--n", type=_positive, default=1, help="completions of each prompt (1)")
    _add_drawing(one, max_new_tokens=256)
    sample_cli.add_arguments(one)


def _add_eval(commands: Any) -> None:
    about, example = "Measure a run or a model.", "example: gemma-tpu eval tiny runs/tiny_cpu"
    group = commands.add_parser("eval", help="measure a run or a model", description=about, epilog=example)
    evals = group.add_subparsers(metavar="EVAL", required=True)

    for name, run, about, example, add in eval_cli.EVALS:
        add(_command(evals, name, run, about, example))
    eval_cli.add_compare(_command(commands, "compare", eval_cli.compare, *eval_cli.COMPARE))


def _command(commands: Any, name: str, run: Command, about: str, example: str) -> Parser:
    about_it = f"{about[0].upper()}{about[1:]}."
    one: Parser = commands.add_parser(name, help=about, description=about_it, epilog=f"example: {example}")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    one.set_defaults(command=run, parser=one)
    return one


def _add_drawing(one: Parser, max_new_tokens: int) -> None:
    one.add_argument("--max-new-tokens", metavar="N", type=_positive, default=max_new_tokens,
                     help="(%(default)s)")  # fmt: skip
    one.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (%(default)s)")
    one.add_argument("--top-k", metavar="K", type=int, default=0, help="0: all tokens (%(default)s)")
    one.add_argument("--top-p", metavar="P", type=float, default=1.0, help="(%(default)s)")
    one.add_argument("--min-p", metavar="P", type=float, default=0.0,
                     help="leave out tokens below P times the likeliest (%(default)s)")  # fmt: skip
    one.add_argument("--repetition-penalty", metavar="X", type=float, default=1.0, help="(%(default)s)")
    one.add_argument("--seed", type=_seed, default=0, help="(%(default)s)")
