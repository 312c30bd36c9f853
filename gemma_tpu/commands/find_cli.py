"""The commands that find and start: `ls`, `cp`, `init`, `schema`, `doctor` and `completion`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tpu.errors import UserError
from gemma_tpu.onboarding import catalogue, completion, doctor
from gemma_tpu.run.metrics import say

Result = dict[str, Any]


def ls(args: argparse.Namespace) -> tuple[Result, int]:
    found = catalogue.entries()
    print(catalogue.render(found))
    return found, 0


def cp(args: argparse.Namespace) -> tuple[Result, int]:
    target = catalogue.copy(args.name, args.dest)
    say(f"wrote {target}")
    return {"copied": args.name, "to": str(target)}, 0


def schema(args: argparse.Namespace) -> tuple[Result, int]:
    from gemma_tpu.onboarding import json_schema

    made = json_schema.make()
    print(json.dumps(made, indent=1, ensure_ascii=False))
    return made, 0


def examine(args: argparse.Namespace) -> tuple[Result, int]:
    found = doctor.run(args.folder, args.bucket, print)
    print(f"\n{doctor.verdict(found)}")
    good = all(one.state != "wrong" for one in found)
    return {"ok": good, "checks": [vars(one) for one in found]}, 0 if good else 1


def complete(args: argparse.Namespace) -> tuple[Result, int]:
    text = completion.script(args.commands, args.shell)
    print(text)
    return {"shell": args.shell, "script": text}, 0


def init(args: argparse.Namespace) -> tuple[Result, int]:
    if args.out.exists():
        raise UserError(f"{args.out} exists: init never overwrites; give another --out")
    given = {name: getattr(args, name) or "" for name in ("data", "model", "slice")}
    missing = [name for name, value in given.items() if not value]
    if missing and not sys.stdin.isatty():
        raise UserError(f"init asks on a terminal, and this is none: give {', '.join(f'--{name}' for name in missing)}")
    for name in missing:
        given[name] = _ask(name)
    from gemma_tpu.hardware import devices
    from gemma_tpu.onboarding import new_config
    from gemma_tpu.planning import plan
    from gemma_tpu.planning.workload import workload

    devices.cpu()
    chosen, model, place, notes = new_config.make(new_config.Answers(**given))
    made = plan.make(chosen, str(args.out), place, model, workload(chosen), compiled=False, suggest=False)
    new_config.write(args.out, new_config.render(chosen, place, str(args.out)))
    for line in notes:
        say(line)
    rate = f"about {made.tokens_per_s:,.0f} tokens/s, {made.peak_gib:.1f} of {made.limit_gib:.1f} GiB a chip"
    say(f"wrote {args.out}: {model.name} on {place}\npredicted by arithmetic: {rate}\n"
         f"next: gemma-tpu plan {args.out} --on {place.name}, then gemma-tpu data {args.out} --show 3")  # fmt: skip
    return {"out": str(args.out), **given, "tokens_per_s": made.tokens_per_s, "fits": made.fits,
            "peak_gib_per_chip": made.peak_gib, "limit_gib": made.limit_gib, "notes": notes}, 0  # fmt: skip


def _ask(name: str) -> str:
    from gemma_tpu.gemma import sizes
    from gemma_tpu.hardware import chips

    small = [one.name for one in chips.slices() if one.chip.kind == "tpu" and one.chips <= 8]
    question = {
        "data": "your rows (a file, a folder, gs://..., hf://datasets/org/name)",
        "model": f"the model ({', '.join(sizes.known())}, or a folder)",
        "slice": f"the slice ({', '.join(small)}, ...)",
    }[name]
    print(f"{question}: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip()
    if not answer:
        raise UserError(f"--{name}: nothing was given")
    return answer


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    command(commands, "ls", ls, "list the configs and recipes that ship, with what is planned of each", "gemma-tpu ls")

    example = "gemma-tpu cp gemma4_12b_v5e4.yaml mine.yaml"
    one = command(commands, "cp", cp, "copy a shipped config or recipe; never overwrites", example)
    one.add_argument("name", metavar="NAME", help="as `gemma-tpu ls` has it")
    one.add_argument("dest", metavar="DEST", type=Path, help="a new file, or a folder")

    example = "gemma-tpu init --data rows.jsonl --model gemma4-12b --slice v5e-4 --out mine.yaml"
    one = command(commands, "init", init, "write a config for your data, model and slice; asks for what is not given",
                  example)  # fmt: skip
    one.add_argument("--data", metavar="PATH", help="your rows: a file, a folder, gs://..., hf://datasets/org/name")
    one.add_argument("--model", metavar="MODEL", help="gemma4-31b, google/gemma-4-31B-it, or a folder")
    one.add_argument("--slice", metavar="SLICE", help="e.g. v6e-4")
    one.add_argument("--out", metavar="FILE", type=Path, default=Path("mine.yaml"), help="(%(default)s)")

    example = "gemma-tpu schema > gemma_tpu.schema.json"
    one = command(commands, "schema", schema, "the config's JSON Schema, for editors that complete and check", example)
    one.epilog += ("\n\nin VS Code with the YAML extension, the first line of a config:\n"
                   "  # yaml-language-server: $schema=gemma_tpu.schema.json")  # fmt: skip

    example = "gemma-tpu doctor --bucket gs://mine/runs"
    one = command(commands, "doctor", examine, "what this machine has of what a run needs; each thing's fix", example)
    one.add_argument("--folder", metavar="DIR", type=Path, default=Path("."), help="whose disk is looked at (here)")
    one.add_argument("--bucket", metavar="URL", help="write, read and remove a small file there")
    one.epilog += "\nexit code 1: something is there and wrong; what is only missing is listed with what it is for"

    example = 'eval "$(gemma-tpu completion bash)"       # in ~/.bashrc; zsh in ~/.zshrc'
    one = command(commands, "completion", complete, "completion of commands, options and config keys", example)
    one.add_argument("shell", choices=completion.SHELLS)
    one.set_defaults(commands=commands.choices)
