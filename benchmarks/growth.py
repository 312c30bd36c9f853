"""How cost grows: against sequence length, rows, layers, adapted projections and devices, with the exponent fitted.

    python benchmarks/growth.py [--only attention rows layers targets devices] [--rounds 5] [--json FILE]

Each part is measured at four or five sizes in a process of its own, on this CPU, on tiny models in float32. A cost
that is c * size^p is a line of slope p in logarithms; p is fitted there by least squares and stands with its standard
error. Times are the least of the rounds, which take turns over the sizes: what other work adds to a time is never
negative. Memory is what XLA's compiler says a program needs, not measured while it runs.

attention  a row of T tokens, forward and backward: seconds, and memory of the compiled program's temporaries; layers
           with a window and without. Blocks keep memory at the first power of T; a full score matrix would be T^2.
rows       `prepare`, JSONL to token ids, one process: seconds and MB that Python holds at most.
layers     the train step: seconds of a step, of tracing and lowering it, and of compiling. Layers are stacked and
           scanned from 9 periods on (up to 8 a CPU has them unrolled), so the sizes begin above that.
targets    the same by how many of the seven projections have an adapter: q; q, o; q, o, k, v; all.
devices    the step on fsdp=1 to 8 fake devices, all of the same rows: seconds of compiling; memory of one device.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
LENGTHS, WINDOW, HEADS, KV_HEADS, HEAD_DIM = (1024, 2048, 4096, 8192), 256, 4, 2, 32
ROWS = (1000, 2000, 4000, 8000)
LAYERS = (18, 36, 72, 144)  # in periods of two
# In the order in which they get adapters; K and V of a layer are one tensor, so they come together.
PROJECTIONS = ("q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = (1, 2, 4, 7)
DEVICES = (1, 2, 4, 8)
MODEL = {"pattern": 1, "hidden": 64, "mlp": 128, "heads": 4, "kv_heads": 2, "global_kv_heads": 2, "head_dim": 16,
         "global_head_dim": 16, "window": 64, "vocab": 1024}  # fmt: skip
Sizes = list[dict[str, float]]


def fit(points: list[tuple[float, float]]) -> dict[str, float]:
    """The exponent of cost = c * size^p, its standard error, and the share of the variance that the line explains."""
    if len(points) < 3 or min(min(pair) for pair in points) <= 0:
        raise ValueError(f"an exponent needs three sizes or more, and costs above zero: {points}")
    x, y = np.log(np.array(points, float)).T
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    left = float(((dy - slope * dx) ** 2).sum())
    spread = float(dy @ dy)
    return {"exponent": slope, "error": math.sqrt(left / (len(points) - 2) / float(dx @ dx)),
            "explained": 1 - left / spread if spread else 1.0}  # fmt: skip


def least(calls: dict[float, Callable[[], float]], rounds: int) -> dict[float, float]:
    """The least of what each call answers, the calls in turn."""
    found = [{size: call() for size, call in calls.items()} for _ in range(rounds)]
    return {size: min(one[size] for one in found) for size in calls}


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# --- what is measured: each gives {size: {cost: value}} by name ------------------------------------------------------


def attention(folder: Path, rounds: int) -> dict[str, Sizes]:
    import jax
    import jax.numpy as jnp

    from gemma_tpu.gemma.attention import attention as attend

    def program(tokens: int, window: int | None) -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(0)
        shapes = [(1, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
        segments = jnp.ones((1, tokens), jnp.int32)

        def loss(q: Any, k: Any, v: Any) -> Any:
            return attend(q, k, v, segments, segments, scale=HEAD_DIM**-0.5, window=window).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile(), arrays

    found = {}
    for name, window in (("attention_global", None), ("attention_window", WINDOW)):
        made = {float(tokens): program(tokens, window) for tokens in LENGTHS}
        for run, arrays in made.values():
            jax.block_until_ready(run(*arrays))
        seconds = least({size: lambda run=run, arrays=arrays: timed(lambda: jax.block_until_ready(run(*arrays)))
                         for size, (run, arrays) in made.items()}, rounds)  # fmt: skip
        memory = {size: run.memory_analysis().temp_size_in_bytes for size, (run, _) in made.items()}
        found[name] = [{"size": size, "seconds": seconds[size], "memory": memory[size]} for size in made]
    return found


def rows(folder: Path, rounds: int) -> dict[str, Sizes]:
    import tracemalloc

    import prepare as benchmark

    from gemma_tpu.data.corpus import prepare
    from gemma_tpu.data.packing import best_fit
    from gemma_tpu.data.tokenizer import Tokenizer
    from gemma_tpu.schema import DataConfig

    settings = json.loads(benchmark.write_inputs(folder, ROWS[-1]).read_text())
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    tokenizer = Tokenizer(settings["model"])

    def run(count: int) -> None:
        section = DataConfig(path=str(folder / f"{count}.jsonl"), cache=None, validation=None, workers=1,
                             max_seq_len=settings["length"], overlong="truncate")  # fmt: skip
        best_fit(prepare(section, tokenizer).lengths, settings["length"])

    def held(count: int) -> float:
        tracemalloc.start()
        run(count)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return float(peak)

    for count in ROWS:
        (folder / f"{count}.jsonl").write_text("".join(lines[:count]))
    seconds = least({float(n): lambda n=n: timed(lambda: run(n)) for n in ROWS}, min(rounds, 2))
    return {"rows": [{"size": float(n), "seconds": seconds[float(n)], "memory": held(n)} for n in ROWS]}


def parts_of(base: Path, devices: int = 1, targets: int = len(PROJECTIONS)) -> Any:
    """All of which `gemma-tpu train` makes its program: config, model, checkpoint, shardings and mesh."""
    import jax

    from gemma_tpu import config as configs
    from gemma_tpu.gemma import loading, mesh
    from gemma_tpu.training import program

    config = configs.from_dict({
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"max_seq_len": 128, "validation": None},
        "lora": {"targets": list(PROJECTIONS[:targets]), "exclude": list(PROJECTIONS[targets:]), "rank": 8, "alpha": 8},
        "train": {"steps": 100, "epochs": None, "batch_size": 8, "accumulation": 1, "remat": "none"},
    })  # fmt: skip
    model, checkpoint = loading.build(base, dtype="float32")
    on = mesh.build({"fsdp": devices}, jax.devices()[:devices])
    program.adapt(model, config)
    shardings, _ = loading.place(model, on)
    return config, model, checkpoint, shardings, on


def compiled(base: Path, run: bool, devices: int = 1, targets: int = len(PROJECTIONS)) -> tuple[dict[str, float], Any]:
    """Seconds of tracing and of compiling, memory of one device; with `run` what makes one step, too."""
    import jax

    from gemma_tpu.adapter import start
    from gemma_tpu.gemma import loading
    from gemma_tpu.training import program

    config, model, checkpoint, shardings, on = parts_of(base, devices, targets)
    if run:
        loading.load_base(model, checkpoint, shardings)
        start.begin(model, config.lora, config.train.seed, shardings)
    else:
        program.abstract(model, shardings)
    made = program.build(config, model, shardings, on, config.train.steps, "none")
    shapes = made.abstract_batch(1, config.train.batch_size, config.data.max_seq_len)
    begun = time.perf_counter()
    lowered = made.lower(made.abstract_state(), shapes)
    traced = time.perf_counter()
    executable = made.compile(lowered)
    costs = {"trace_s": traced - begun, "compile_s": time.perf_counter() - traced}
    memory = executable.memory_analysis()
    costs["memory"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if not run:
        return costs, None
    rng = np.random.default_rng(0)
    values = {"tokens": rng.integers(256, MODEL["vocab"], (1, 8, 128)), "segment_ids": np.ones((1, 8, 128)),
              "positions": np.arange(128)[None, None].repeat(8, 1), "targets": np.full((1, 8, 128), 300),
              "weights": np.ones((1, 8, 128))}  # fmt: skip
    batch = made.place({name: values[name].astype(shapes[name].dtype) for name in shapes})
    state = made.first_state()

    def step() -> None:
        nonlocal state
        with jax.set_mesh(on):
            state, found = executable(state, made.parts.frozen, batch)
            jax.block_until_ready(found)

    step()
    return costs, step


def of_steps(cases: dict[float, tuple[Path, int]], rounds: int) -> Sizes:
    """Costs of the train step of (base, targets); each is compiled twice, and the quicker time counts."""
    first = {size: compiled(base, True, targets=targets) for size, (base, targets) in cases.items()}
    again = {size: compiled(base, False, targets=targets)[0] for size, (base, targets) in cases.items()}
    seconds = least({size: lambda step=step: timed(step) for size, (_, step) in first.items()}, rounds)
    return [{"size": size, "step_s": seconds[size], "memory": costs["memory"],
             **{name: min(costs[name], again[size][name]) for name in ("trace_s", "compile_s")}}
            for size, (costs, _) in first.items()]  # fmt: skip


def base_of(folder: Path, layers: int) -> Path:
    from gemma_tpu.tiny.checkpoint import write_tiny

    return write_tiny(folder / f"base-{layers}", "gemma4-31b", dtype="float32", text_only=True, tokenizer=False,
                      layers=layers, **MODEL)  # fmt: skip


def layers(folder: Path, rounds: int) -> dict[str, Sizes]:
    compiled(base_of(folder, 20), False)  # what only a process's first program costs
    return {"layers": of_steps({float(n): (base_of(folder, n), len(PROJECTIONS)) for n in LAYERS}, rounds)}


def targets(folder: Path, rounds: int) -> dict[str, Sizes]:
    base = base_of(folder, LAYERS[0])
    compiled(base, False)
    return {"targets": of_steps({float(n): (base, n) for n in TARGETS}, rounds)}


def devices(folder: Path, rounds: int) -> dict[str, Sizes]:
    base = base_of(folder, LAYERS[0])
    compiled(base, False)
    twice = {n: [compiled(base, False, n)[0] for _ in range(2)] for n in DEVICES}
    return {"devices": [{"size": float(n), "memory": both[0]["memory"],
                         "compile_s": min(one["trace_s"] + one["compile_s"] for one in both)}
                        for n, both in twice.items()]}  # fmt: skip


PARTS = {one.__name__: one for one in (attention, rows, layers, targets, devices)}


# --- the parent ------------------------------------------------------------------------------------------------------


def exponents(sizes: Sizes) -> dict[str, Any]:
    """The sizes, and the fit of each cost."""
    costs = [name for name in sizes[0] if name != "size"]
    return {"sizes": sizes, **{name: fit([(one["size"], one[name]) for one in sizes]) for name in costs}}


def run(part: str, rounds: int) -> dict[str, Any]:
    count = DEVICES[-1] if part == "devices" else 1
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    command = [sys.executable, __file__, "--part", part, "--rounds", str(rounds)]
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | flags | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"growth of {part} could not be measured: its process ended with {done.returncode}")
    return {name: exponents(sizes) for name, sizes in json.loads(done.stdout.splitlines()[-1]).items()}


def show(found: dict[str, Any]) -> None:
    print(f"{'cost':<28}{'exponent':>9}{'error':>8}   sizes: what each costs")
    for name, costs in found.items():
        for cost, fitted in costs.items():
            if cost != "sizes":
                told = ", ".join(f"{one['size']:g}: {one[cost]:.3g}" for one in costs["sizes"])
                print(f"{name + ' ' + cost:<28}{fitted['exponent']:>9.2f}{fitted['error']:>8.2f}   {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="of timings (5)")
    parser.add_argument("--json", type=Path, help="write sizes, costs and exponents there")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PARTS[args.part](Path(folder), args.rounds)))
        return
    found: dict[str, Any] = {}
    for part in args.only:
        begun = time.perf_counter()
        found |= run(part, args.rounds)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
