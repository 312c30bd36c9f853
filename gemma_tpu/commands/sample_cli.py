"""`gemma-tpu sample`: its own options, and what it prints. Without a prompt it is a chat."""

import argparse
import sys
from pathlib import Path
from typing import Any

from gemma_tpu.errors import UserError
from gemma_tpu.sampling import asking, chat
from gemma_tpu.sampling.asking import Asked
from gemma_tpu.sampling.endpoint import CONCURRENCY, Endpoint

Result = dict[str, Any]
OF_SERVERS, OF_MODELS = ("model", "concurrency", "resume"), ("rows", "mesh")
AXES = ("data", "fsdp", "expert", "tp")


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--stop", metavar="TEXT", action="append", default=[],
                     help="end a completion before this text; may be repeated")  # fmt: skip
    here = one.add_argument_group("of a run or a model")
    here.add_argument("--rows", metavar="N", type=int, help="completed at a time (16)")
    here.add_argument("--mesh", metavar="AXIS=N,…", help="e.g. fsdp=2,tp=2; all accelerators, or one CPU, if left out")
    server = one.add_argument_group("of a server")
    server.add_argument("--model", metavar="NAME", help="which of the server's models; its only one if left out")
    server.add_argument("--concurrency", metavar="N", type=int, help=f"requests at a time ({CONCURRENCY})")
    server.add_argument("--resume", metavar="FILE", type=Path, help="keep every answer there, ask none of them again")


def run(args: argparse.Namespace, target: str | Path, prompts: list[str], settings: Any) -> tuple[Result, int]:
    """`target` is a folder, or the URL of a server."""
    _check(args, target, prompts)
    # Here, so that what is wrong with the request is said before a model is loaded.
    wanted = asking.every(prompts, n=args.n, system=args.system, raw=args.raw, temperature=settings.temperature)
    asking.check_stop(args.stop)
    how: dict[str, Any] = {"stop": tuple(args.stop)}
    if isinstance(target, Path):
        write = _open(args, target, max(1, len(wanted))).write
    else:
        write = Endpoint(target, model=args.model, concurrency=args.concurrency or CONCURRENCY).write
        how |= {"resume": args.resume} if args.resume else {}
    if not prompts:
        return {"target": str(target), **chat.chat(write, settings, system=args.system, stop=how["stop"])}, 0
    return _complete(args, target, prompts, wanted, write, settings, how), 0


def _check(args: argparse.Namespace, target: str | Path, prompts: list[str]) -> None:
    wrong, kind = (OF_SERVERS, "a folder") if isinstance(target, Path) else (OF_MODELS, "a server")
    given = [f"--{name}" for name in wrong if getattr(args, name) is not None]
    if given:
        raise UserError(f"{' and '.join(given)}: nothing that {kind} has; {target} is {kind}")
    small = [name for name in ("rows", "concurrency") if getattr(args, name) is not None and getattr(args, name) < 1]
    if small:
        raise UserError("; ".join(f"--{name} is {getattr(args, name)}: it must be at least 1" for name in small))
    if not prompts:
        if args.json:
            raise UserError("nothing to continue: with --json give --prompt TEXT or --prompt-file FILE")
        chatless = [f"--{name}" for name, used in
                    (("raw", args.raw), ("n", args.n > 1), ("resume", args.resume is not None)) if used]  # fmt: skip
        if chatless:
            named = ", no ".join(chatless)
            raise UserError(f"without a prompt this is a chat, which has no {named}; give --prompt TEXT")


def _open(args: argparse.Namespace, target: Path, wanted: int) -> Any:
    from gemma_tpu.sampling.completions import ROWS, mesh_for, open_writer

    sizes = None if args.mesh is None else mesh_sizes(args.mesh)
    return open_writer(target, mesh=mesh_for(target, sizes), rows=args.rows or min(ROWS, wanted))


def mesh_sizes(text: str) -> dict[str, int]:
    found = {}
    for part in text.split(","):
        axis, _, number = part.strip().partition("=")
        if axis not in AXES or not number.isdigit() or int(number) < 1 or axis in found:
            known = ", ".join(AXES)
            raise UserError(f"--mesh {text}: {part!r} is wrong; each axis once, as in fsdp=2,tp=2; axes: {known}")
        found[axis] = int(number)
    return found


def _complete(
    args: argparse.Namespace, target: str | Path, prompts: list[str], wanted: list[Asked], write: Any, settings: Any,
    how: dict[str, Any],
) -> Result:  # fmt: skip
    alone = len(wanted) == 1
    if alone:
        how["on_text"] = lambda _, text: print(text, end="", flush=True)
    made = write(wanted, settings, **how)
    found = [{"prompt": prompts[number // args.n], **one} for number, one in enumerate(made)]
    if alone:
        print(flush=True)
    else:
        for number, one in enumerate(found, start=1):
            print(f"--- {number} of {len(found)}: {' '.join(one['prompt'].split())[:80]}")
            print(one["text"], flush=True)
    cut = sum(one["finish_reason"] == "length" for one in found)
    if cut:
        print(f"note: {cut} of {len(found)} completions were cut at --max-new-tokens {args.max_new_tokens}",
              file=sys.stderr, flush=True)  # fmt: skip
    return {"target": str(target), **found[0], "samples": found}
