"""`gemma-tpu serve-lite`: a model behind OpenAI's interface, to try it and to test against it."""

import argparse
import atexit
import importlib.util
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from gemma_tpu.commands import sample_cli
from gemma_tpu.commands.arguments import positive, target
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.run.metrics import say

Result = dict[str, Any]
ABOUT = "a run or a model behind OpenAI's interface, for trying and for tests"
EXAMPLE = "gemma-tpu serve-lite runs/tiny_cpu --port 8000"
ROUNDED = 64  # buckets are multiples of it
CONTEXT = 4096  # of a sequence, where the model has more and nobody asks for more


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("target", metavar="TARGET", help="a run folder (adapter applied) or a model folder")
    one.add_argument("--host", default="127.0.0.1", help="(%(default)s: this machine alone; there is no password)")
    one.add_argument("--port", type=_port, default=8000, help="(%(default)s; 0: any that is free)")
    one.add_argument("--name", metavar="NAME", help="of the model, as clients ask for it (the folder's)")
    one.add_argument("--slots", metavar="N", type=positive, default=16, help="generated at a time (%(default)s)")
    one.add_argument("--max-len", metavar="N", type=positive,
                     help=f"tokens of a prompt with its completion (the model's context, up to {CONTEXT})")  # fmt: skip
    one.add_argument("--buckets", metavar="N,…", type=_buckets,
                     help=f"sizes of prefill, multiples of {ROUNDED} (64, 256, 1024 … up to --max-len)")  # fmt: skip
    one.add_argument("--burst", metavar="N", type=positive, default=4,
                     help="tokens of a slot between two looks of the host (%(default)s)")  # fmt: skip
    one.add_argument("--max-wait-ms", metavar="MS", type=_milliseconds, default=5.0,
                     help="a prompt waits so long for others to be computed with (%(default)s)")  # fmt: skip
    one.add_argument("--queue", metavar="N", type=positive, default=256,
                     help="prompts that may wait; one more gets 429 (%(default)s)")  # fmt: skip
    one.add_argument("--max-prompts", metavar="N", type=positive, default=128, help="of a request (%(default)s)")
    one.add_argument("--max-n", metavar="N", type=positive, default=128, help="samples of a prompt (%(default)s)")
    one.add_argument("--max-body", metavar="MIB", type=positive, default=8, help="of a request (%(default)s)")
    one.add_argument("--drain", metavar="S", type=positive, default=60,
                     help="at the end, seconds for what is running (%(default)s)")  # fmt: skip
    one.add_argument("--mesh", metavar="AXIS=N,…", help="e.g. fsdp=2,tp=2; all accelerators, or one CPU, if left out")


def run(args: argparse.Namespace) -> tuple[Result, int]:
    for name in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"serve-lite needs {name}: pip install 'gemma_tpu[serve]'")
    folder = target(args.target)
    sizes = None if args.mesh is None else sample_cli.mesh_sizes(args.mesh)
    name = args.name or folder.resolve().name
    with _listen(args.host, args.port) as listener:
        address = _address(listener)
        served = _load(args, folder, name, sizes)
        say(f"serve-lite is for trying a model and for tests; production is vLLM: gemma-tpu serve {args.target}")
        if not _loopback(args.host):
            say(f"warning: {args.host} can be reached from other machines, and nobody is asked for a password")
        return _serve(args, served, listener, address)


def buckets_for(capacity: int, asked: list[int] | None) -> list[int]:
    """The last one holds the longest prompt."""
    last = -(-capacity // ROUNDED) * ROUNDED
    if asked is not None:
        beyond = [size for size in asked if size > last]
        if beyond:
            raise UserError(f"--buckets: {beyond[0]} is more than a prompt can have ({last}, by --max-len {capacity})")
    sizes = asked or [ROUNDED * 4**power for power in range(20)]
    return sorted({size for size in sizes if size < last} | {last})


def _load(args: argparse.Namespace, folder: Path, name: str, sizes: dict[str, int] | None) -> Any:
    from gemma_tpu.adapter import adapters
    from gemma_tpu.data.tokenizer import Tokenizer
    from gemma_tpu.gemma import loading
    from gemma_tpu.lite import app
    from gemma_tpu.lite.engine import Engine
    from gemma_tpu.lite.metrics import Metrics
    from gemma_tpu.lite.programs import Device
    from gemma_tpu.lite.requests import Limits
    from gemma_tpu.sampling import completions
    from gemma_tpu.storage.shards import open_checkpoint

    base = adapters.base_of(folder)
    context = loading.architecture(open_checkpoint(base)).context
    if args.max_len is not None and args.max_len > context:
        raise UserError(f"--max-len is {args.max_len}: the model's context is {context}")
    capacity = args.max_len or min(context, CONTEXT)
    buckets = buckets_for(capacity, args.buckets)
    tokenizer = Tokenizer(base)
    model, _ = adapters.load_target(folder, mesh=completions.mesh_for(folder, sizes))
    device = Device(model, slots=args.slots, capacity=capacity, buckets=buckets, burst=args.burst)
    engine = Engine(device, Metrics(), max_wait=args.max_wait_ms / 1000, queue=args.queue)
    limits = Limits(args.max_prompts, args.max_n, args.max_body * 2**20)
    return app.Served(engine, tokenizer, name, model.arch.vocab, limits)


def _serve(args: argparse.Namespace, served: Any, listener: socket.socket, address: str) -> tuple[Result, int]:
    import uvicorn

    from gemma_tpu.lite import app

    engine, device = served.engine, served.engine.device
    options = uvicorn.Config(app.build(served), log_config=None, log_level="critical", access_log=False,
                             timeout_graceful_shutdown=args.drain, server_header=False)  # fmt: skip
    server = uvicorn.Server(options)

    def end(*_: Any) -> None:
        server.should_exit = True

    # Once it runs, the web server has handlers of its own: it stops, waits for what is running, and raises the signal
    # once more. That is not to end this process before it has said its last word.
    before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGINT)}
    say(f"{address}/v1 serves {served.name}: {device.slots} slots of {device.capacity} tokens, prefill in buckets of "
         f"{', '.join(map(str, device.buckets))}; compiling, {address}/health says when it is ready")  # fmt: skip
    engine.start()
    threading.Thread(target=_announce, args=(engine, address), daemon=True).start()
    try:
        server.run(sockets=[listener])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return _ended(engine, address)


def _announce(engine: Any, address: str) -> None:
    if engine.when_compiled():
        say(f"ready: {address}/v1 ({engine.device.compiled()} programs compiled; SIGTERM or Ctrl-C ends it)")


def _ended(engine: Any, address: str) -> tuple[Result, int]:
    compiling, failed = engine.state == "compiling", engine.state == "failed"
    engine.stop()
    if failed:
        raise RunError(f"the device failed: {engine.progress}")
    counts = engine.metrics.totals()
    say(f"stopped: {counts['answered']} prompts answered, {counts['generated']} tokens generated, "
         f"{counts['recompiles']} recompilations")  # fmt: skip
    if compiling:  # the compiler's thread cannot be stopped, and must not be there while the interpreter ends
        atexit.register(os._exit, 0)
    return {"url": f"{address}/v1", **counts}, 0


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded: a port that is taken is said at once."""
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(where)
    except OSError as error:
        found.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give another --port, or 0 for any") from None
    return found


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 65536:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 65535")
    return number


def _milliseconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 60_000:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 60000")
    return number


def _buckets(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) > 0 and int(word) % ROUNDED == 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text} must be multiples of {ROUNDED}, as in 64,256,1024")
    return sorted({int(word) for word in words})


# argparse names the type in "invalid … value".
_port.__name__, _milliseconds.__name__, _buckets.__name__ = "integer", "number", "list"
