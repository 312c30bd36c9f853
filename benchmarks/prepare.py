"""Rows a second from a JSONL file to packed, masked token ids: gemma_tpu beside TRL, same rows, tokenizer and cores.

    python benchmarks/prepare.py [--envs .bench-envs] [--rows 4000] [--rounds 3] [--cores N] [--json FILE]

Both read the same prompt-response rows, render them with the same chat template of Gemma 4, tokenise with the same
tokenizer, train the answers only and pack best-fit into sheets of 4,096. Lengths are lognormal like CodeV-R1's
(benchmarks/packing.py), the text is that of the bundled Verilog rows. Ours is gemma_tpu.data.corpus.prepare without
cache and the plan of packing.best_fit; TRL's is datasets.load_dataset and SFTTrainer's own preparation
(dataset_num_proc = cores, packing=True), without building a model. Both processes live for the whole run and take
turns; the first turn warms up and does not count. The figure is the median of the ratios within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from packing import codev_lengths
from peers import environments

HERE = Path(__file__).resolve().parent
LENGTH = 4096
LETTERS = 2.2  # of the bundled rows for each token of the tiny vocabulary


def write_inputs(folder: Path, rows: int) -> Path:
    """A tokenizer with its template, the rows, and the settings of both."""
    from gemma_tpu.assets import resolve
    from gemma_tpu.tiny.checkpoint import write_tiny

    write_tiny(folder / "model", "gemma4-31b", text_only=True, layers=2, pattern=1, hidden=32, mlp=32, heads=2,
               kv_heads=2, global_kv_heads=1, head_dim=16, global_head_dim=16, window=64, vocab=4096)  # fmt: skip
    source = [json.loads(line) for line in resolve("bundled:tiny_verilog/base.jsonl").read_text().splitlines()]
    pairs = [tuple(turn["content"] for turn in row["messages"][-2:]) for row in source]
    rng = np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w") as file:
        for tokens in codev_lengths(rows).tolist():
            prompt, answer = pairs[rng.integers(len(pairs))]
            while len(prompt) + len(answer) < tokens * LETTERS:
                more = pairs[rng.integers(len(pairs))]
                prompt, answer = f"{prompt}\n{more[0]}", f"{answer}\n\n{more[1]}"
            file.write(json.dumps({"prompt": [{"role": "user", "content": prompt}],
                                   "completion": [{"role": "assistant", "content": answer}]}) + "\n")  # fmt: skip
    settings = {"model": str(folder / "model"), "rows": str(folder / "rows.jsonl"), "length": LENGTH}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "settings.json"


def start(python: Path | str, script: str, settings: Path, cores: list[int]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([str(python), str(HERE / "peers" / script), str(settings)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=environment,
                            preexec_fn=lambda: os.sched_setaffinity(0, cores))  # fmt: skip


def turn(process: subprocess.Popen) -> dict[str, Any]:
    into: IO[str] = process.stdin
    into.write("go\n")
    into.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{process.args[1]} ended with {process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=environments.DEFAULT)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    with tempfile.TemporaryDirectory() as folder:
        settings = write_inputs(Path(folder), args.rows)
        running = {
            "gemma_tpu": start(sys.executable, "ours_prepare.py", settings, cores),
            "TRL": start(environments.python("trl", args.envs), "trl_prepare.py", settings, cores),
        }
        try:
            rounds = [{name: turn(process) for name, process in running.items()} for _ in range(args.rounds + 1)][1:]
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    report(args, rounds)


def report(args: argparse.Namespace, rounds: list[dict[str, dict[str, Any]]]) -> None:
    print(f"{args.rows:,} rows, {args.cores} cores, {args.rounds} rounds\n")
    print("| | rows/s, median (range) | of TRL | tokens | targets | sheets |\n|---|---|---|---|---|---|")
    for name in rounds[0]:
        rates = [args.rows / one[name]["seconds"] for one in rounds]
        ratio = statistics.median(one["TRL"]["seconds"] / one[name]["seconds"] for one in rounds)
        last = rounds[-1][name]
        print(f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {ratio:.2f} | "
              f"{last['tokens']:,} | {last['targets']:,} | {last['sheets']:,} |")  # fmt: skip
    if args.json:
        ratio = statistics.median(one["TRL"]["seconds"] / one["gemma_tpu"]["seconds"] for one in rounds)
        found = {"rows": args.rows, "cores": args.cores, "rounds": rounds, "ours_over_trl": ratio}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
