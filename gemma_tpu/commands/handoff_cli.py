"""`gemma-tpu merge`, `verify` and `adapter`: their arguments, and the calls that they stand for."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tpu.commands import train_cli
from gemma_tpu.commands.arguments import positive, run_folder

Result = dict[str, Any]


def merge(args: argparse.Namespace) -> tuple[Result, int]:
    run = None if args.run_dir is None else run_folder(args.run_dir)
    from gemma_tpu.handoff.merging import merge

    # Without --out the run's own merged/ is written, which is this command's to replace.
    overwrite = True if args.overwrite else None
    return merge(run, base=args.base, out=args.out, step=args.step, overwrite=overwrite, push=args.push,
                 max_shard_size=args.max_shard_size, checkpoint=args.checkpoint, layout=args.layout, rank=args.rank,
                 alpha=args.alpha, onto=args.onto), 0  # fmt: skip


def adapter(args: argparse.Namespace) -> tuple[Result, int]:
    run = run_folder(args.run_dir)
    from gemma_tpu.handoff.merging import export_adapter

    return export_adapter(run, out=args.out, base=args.base, step=args.step, native=args.native, reader=args.reader,
                          overwrite=args.overwrite), 0  # fmt: skip


def verify(args: argparse.Namespace) -> tuple[Result, int]:
    run = run_folder(args.run_dir)
    from gemma_tpu.handoff.verify import verify

    result = verify(run, merged=args.merged, base=args.base, step=args.step, onto=args.onto)
    return result, 0 if result["ok"] else 1


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    example = "gemma-tpu merge runs/tiny_cpu --out models/mine"
    one = command(commands, "merge", merge, "merge a run's adapter into its base's safetensors", example)
    add_merge_arguments(one)

    train_cli.add_report_arguments(command(commands, "report", train_cli.report, *train_cli.REPORT))

    example = "gemma-tpu verify runs/tiny_cpu"
    about = "prove a merge: tensors, logits, transformers and PEFT where torch is installed"
    one = command(commands, "verify", verify, about, example)
    _add_run(one)
    one.add_argument("--merged", type=Path, help="the merged folder; by default the run's own merged/")
    _add_onto(one)

    example = "gemma-tpu adapter runs/tiny_cpu --out adapters/mine"
    one = command(commands, "adapter", adapter, "write a run's adapter as a PEFT folder", example)
    _add_run(one)
    one.add_argument("--out", type=Path, required=True, help="folder to write")
    one.add_argument("--native", action="store_true",
                     help="as it was trained, by flags that PEFT reads and others may ignore")  # fmt: skip
    one.add_argument("--for", dest="reader", choices=("vllm",),
                     help="the form for one reader: vLLM wants K's adapter again as V's where V is K")  # fmt: skip
    one.add_argument("--overwrite", action="store_true", help="let --out be a folder that exists")


def add_merge_arguments(one: argparse.ArgumentParser) -> None:
    """Those of the command and of scripts/orbax_to_hf.py."""
    _add_run(one, nargs="?")
    one.add_argument("--out", help="folder or gs:// URL to write; by default the run's own merged/")
    one.add_argument("--overwrite", action="store_true", help="let --out be a folder that exists")
    one.add_argument("--max-shard-size", metavar="SIZE", help="cut new shards, e.g. 5GB; by default the base's own")
    one.add_argument("--push", metavar="ORG/NAME", help="upload the result to the hub, to a private repository if new")
    one.add_argument("--checkpoint", metavar="PATH", type=Path, help="in place of RUN_DIR: what another tool has saved")
    one.add_argument("--layout", choices=("tunix", "peft"), help="whose checkpoint that is")
    one.add_argument("--rank", type=int, help="of a Tunix adapter")
    one.add_argument("--alpha", type=float, help="of a Tunix adapter")
    _add_onto(one)


def _add_run(one: argparse.ArgumentParser, **how: Any) -> None:
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run_dir of a config that was trained", **how)
    one.add_argument("--step", type=positive, help="a checkpoint's step; by default the latest")
    one.add_argument("--base", help="where the base lies now, if it has moved since training")


def _add_onto(one: argparse.ArgumentParser) -> None:
    one.add_argument("--onto", choices=("original", "dequantised"), default="original",
                     help="of a run on a quantised base: the weights as they are in its files, or as training saw them")
