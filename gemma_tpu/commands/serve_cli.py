"""`gemma-tpu serve`: the vLLM command for a merged model on a machine, what it will take, and the deed."""

import argparse
from pathlib import Path
from typing import Any

from gemma_tpu.commands.arguments import positive
from gemma_tpu.estimate.serving_memory import KV_BYTES
from gemma_tpu.launch import scripts
from gemma_tpu.run.metrics import say
from gemma_tpu.serving import vllm_command

Result = dict[str, Any]
ABOUT = "serve a merged model by vLLM on TPU, GPU or CPU: the command for that, or the deed"
EXAMPLE = "gemma-tpu serve models/mine --on v6e-8 --run"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", metavar="MODEL_DIR", help="a merged folder, or a published model such as "
                     "google/gemma-4-31B-it")  # fmt: skip
    one.add_argument("--on", metavar="SLICE", required=True, help="this machine: v6e-8, h100x2, cpu, ...")
    one.add_argument("--tp", metavar="N", type=positive, help="devices that share the model; all that its heads allow")
    one.add_argument("--max-len", metavar="TOKENS", type=positive,
                     help=f"prompt and answer together ({vllm_command.USUAL_CONTEXT})")  # fmt: skip
    one.add_argument("--kv-dtype", choices=list(KV_BYTES), default="bfloat16", help="of the KV cache (%(default)s)")
    one.add_argument("--served-name", metavar="NAME", help="how requests call it; by default local/FOLDER")
    one.add_argument("--port", metavar="N", type=positive, default=8000, help="(%(default)s)")
    one.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    one.add_argument("--image", help="in place of the table's")
    one.add_argument("--bare", action="store_true", help="the vllm of this environment, no container")
    one.add_argument("--from-hub", metavar="ORG/NAME",
                     help="have the server fetch it from there: what gemma-tpu merge --push has pushed")  # fmt: skip
    one.add_argument("--hub-cache", metavar="DIR", type=Path,
                     help="links to the model for images that take no folder; by default beside the model")  # fmt: skip
    one.add_argument("--cache", metavar="DIR", type=Path, default=Path("~/.cache/gemma_tpu/serving"),
                     help="of compiled programs, kept for the next start (%(default)s)")  # fmt: skip
    one.add_argument("--run", action="store_true", help="do it; without this the script for it is printed")
    one.add_argument("--detach", action="store_true", help="return when the server is ready, and leave it running")


def run(args: argparse.Namespace) -> tuple[Result, int]:
    wish = vllm_command.Wish(
        tp=args.tp, context=args.max_len, kv_dtype=args.kv_dtype, served_name=args.served_name, port=args.port,
        host=args.host, image=args.image, container=not args.bare, hub_cache=args.hub_cache, cache=args.cache,
        from_hub=args.from_hub, detach=args.detach,
    )  # fmt: skip
    one = vllm_command.settle(args.model, args.on, wish)
    say(_table(one))
    text = vllm_command.script(one)
    result = vllm_command.to_json(one) | {"script": text}
    if not args.run:
        if not args.json:
            print(text, end="")
        say("printed, not done: add --run, or keep it as a file and run that with bash")
        return result, 0
    return result, scripts.run(text)


def _table(one: vllm_command.Serving) -> str:
    lines = [f"model     {one.model.told}", f"served    as {one.name}, up to {one.context:,} tokens"]
    lines += [f"note      {note}" for note in one.notes]
    memory = one.memory
    if memory is None:
        return "\n".join(lines)
    lines += ["", f"GiB of one device of {one.place} (arithmetic, not measured)",
              f"  weights             {memory.weights:8.2f}",
              f"  programs, reserve   {memory.reserve:8.2f}  an assumption",
              f"  KV cache            {memory.for_cache:8.2f}",
              f"  taken               {memory.taken:8.2f}  {one.machine['utilisation']:.0%} of {memory.limit:.2f}", "",
              "sequences that fit at once, all of this length"]  # fmt: skip
    head = "".join(f"{dtype + ' KV':>24}" for dtype in memory.per_sequence)
    lines.append(f"  {'tokens':>8}{head}")
    for context in memory.per_sequence["bfloat16"]:
        cells = "".join(f"{memory.sequences(dtype, context):>8,} x {sizes[context]:8.3f} GiB"
                        for dtype, sizes in memory.per_sequence.items())  # fmt: skip
        lines.append(f"  {context:>8,}{cells}")
    return "\n".join(lines) + "\n"
