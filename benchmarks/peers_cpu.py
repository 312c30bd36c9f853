"""Useful tokens a second of one LoRA training step on this CPU: gemma_tpu beside TRL + PEFT and Tunix + qwix.

    python benchmarks/peers_cpu.py [--tokens 640] [--envs .bench-envs] [--rounds 5] [--steps 10] [--cores N]
                                   [--only ours …] [--json F]

Useful tokens are those that are not padding. Everybody trains the same tiny Gemma 4 geometry in float32 with LoRA on
every projection, AdamW, no dropout and nothing recomputed, on the same rows, each token a target. Ours and TRL packed
get sheets of 640 tokens, one a step (4.3 rows); TRL padded and Tunix get 4 rows a step, padded to the longest of the
four and to 384; with --tokens 2560 a step is four times that for everybody. The peers run their own trainers in
environments of their own, which the first call installs (about 4 GB). All contenders are alive at once and take
turns, A B C D A B C D …; the first turn warms up and compiles and does not count; figures are medians over turns,
ratios are medians of the ratios within one round. Run it on idle cores: OpenMP's threads wait for each other by
spinning, so that other work costs TRL far more than its share; where cores cannot be had alone, `--cores 1` is fair
to all.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from peers import environments

HERE = Path(__file__).resolve().parent
# The proportions of Gemma 4 31B: half as many KV heads as query heads, an eighth in global layers, heads twice as
# wide there, V is K there, a window about as long as the mean row.
MODEL = {
    "layers": 6, "pattern": 5, "hidden": 256, "mlp": 1024, "heads": 8, "kv_heads": 4, "global_kv_heads": 1,
    "head_dim": 64, "global_head_dim": 128, "window": 128, "vocab": 4096,
}  # fmt: skip
TRAINING = {"rank": 16, "alpha": 16, "lr": 1e-3, "rows_per_step": 4, "padded": 384, "packed": 640}
ROWS, MEAN, SPREAD, SHORTEST, SEED = 2048, 146, 0.5, 16, 0


@dataclass(frozen=True)
class Contender:
    title: str
    script: str
    env: str | None  # None: this Python
    arguments: tuple[str, ...] = ()


CONTENDERS = {
    "ours": Contender("gemma_tpu, packed", "ours.py", None),
    "trl-padded": Contender("TRL + PEFT, padded, sdpa", "trl_cpu.py", "trl", ("padded",)),
    "trl-packed": Contender("TRL + PEFT, packed, sdpa", "trl_cpu.py", "trl", ("packed",)),
    "tunix": Contender("Tunix + qwix, padded to 384", "tunix_cpu.py", "tunix"),
}


def draw_rows() -> list[list[int]]:
    """Random ids in rows of lognormal length, between the shortest and what Tunix pads to, mean as said."""
    rng = np.random.default_rng(SEED)
    lengths = np.empty(0)
    center = math.log(MEAN) - SPREAD**2 / 2 + 0.045  # what is drawn over the maximum is drawn again
    while len(lengths) < ROWS:
        drawn = rng.lognormal(center, SPREAD, ROWS).round()
        lengths = np.concatenate([lengths, drawn[(drawn >= SHORTEST) & (drawn <= TRAINING["padded"])]])[:ROWS]
    return [rng.integers(256, MODEL["vocab"], int(n)).tolist() for n in lengths]


def training(tokens: int) -> dict[str, Any]:
    """Of a step of so many packed tokens; four padded rows for 640."""
    rows = tokens * TRAINING["rows_per_step"] // TRAINING["packed"]
    return TRAINING | {"packed": tokens, "rows_per_step": max(1, rows)}


def write_inputs(folder: Path, tokens: int) -> Path:
    """The checkpoint, the rows and the settings; returns the settings file."""
    from gemma_tpu.tiny.checkpoint import write_tiny

    write_tiny(folder / "model", "gemma4-31b", dtype="float32", text_only=True, **MODEL)
    rows = draw_rows()
    (folder / "rows.json").write_text(json.dumps(rows))
    lengths = np.array([len(row) for row in rows])
    print(f"{len(rows):,} rows of mean {lengths.mean():.1f} tokens, p99 {np.percentile(lengths, 99):.0f}, longest "
          f"{lengths.max()}", file=sys.stderr)  # fmt: skip
    files = {"checkpoint": str(folder / "model"), "rows": str(folder / "rows.json")}
    settings = training(tokens) | {"model": MODEL} | files
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    return folder / "settings.json"


class Runner:
    """One contender's process, which waits for its turn."""

    def __init__(self, name: str, envs: Path, settings: Path, cores: set[int], log: IO[str]):
        self.name, self.contender = name, CONTENDERS[name]
        python = Path(sys.executable) if self.contender.env is None else environments.python(self.contender.env, envs)
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        more = {"PYTHONPATH": os.pathsep.join(paths)} if self.contender.env is None else {}
        script = HERE / "peers" / self.contender.script
        self._log = log
        self._process = subprocess.Popen(
            [python, script, settings, *self.contender.arguments], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            env=os.environ | more | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                                     "OMP_NUM_THREADS": str(len(cores))},
        )  # fmt: skip

    def turn(self, steps: int) -> dict[str, Any]:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._log.flush()
            last = Path(self._log.name).read_text()[-3000:]
            raise SystemExit(f"{self.name} ended with {code} before its answer:\n{last}")
        return json.loads(answer)

    def stop(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """The answers of every round after the first; the contenders take turns."""
    settings, steps = write_inputs(folder, arguments.tokens), arguments.steps
    cores = set(sorted(os.sched_getaffinity(0))[: arguments.cores])
    runners = []
    try:
        for name in arguments.only:  # one after another: compiling beside a rival's start would only slow both
            log = (folder / f"{name}.log").open("w")
            runners.append(Runner(name, arguments.envs, settings, cores, log))
            begun = time.monotonic()
            first = runners[-1].turn(2 * steps)
            print(f"{name}: warm after {time.monotonic() - begun:.0f} s, {first}", file=sys.stderr)
        found = []
        for number in range(arguments.rounds):
            found.append({runner.name: runner.turn(steps) for runner in runners})
            rates = ", ".join(f"{name} {rate(answer):,.0f}" for name, answer in found[-1].items())
            print(f"round {number + 1}: {rates}", file=sys.stderr)
        return found
    finally:
        for runner in runners:
            runner.stop()


def rate(answer: dict[str, Any]) -> float:
    return answer["tokens"] / answer["seconds"]


def table(found: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    lines = []
    for name, last in found[-1].items():
        rates = [rate(answers[name]) for answers in found]
        line = {
            "name": name, "title": CONTENDERS[name].title, "tokens_per_s": round(statistics.median(rates)),
            "lowest": round(min(rates)), "highest": round(max(rates)), "base": last["base"],
            "trainable": last["trainable"],
            "tokens_per_cpu_s": round(statistics.median(a[name]["tokens"] / a[name]["cpu_seconds"] for a in found)),
        }  # fmt: skip
        if "ours" in found[-1]:
            ratios = [rate(answers["ours"]) / rate(answers[name]) for answers in found]
            line["ours_over_it"] = round(statistics.median(ratios), 2)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TRAINING["packed"], help="of a packed sheet, one a step (640)")
    parser.add_argument("--envs", type=Path, default=environments.DEFAULT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of one turn")
    parser.add_argument("--cores", type=int, help="how many of this machine's cores everybody may use; all if left out")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write settings and figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    lines = table(found)
    print("| contender | useful tokens/s, median (range) | a second of CPU | ours over it | parameters | trainable |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        print(f"| {line['title']} | {line['tokens_per_s']:,} ({line['lowest']:,} to {line['highest']:,}) | "
              f"{line['tokens_per_cpu_s']:,} | {line.get('ours_over_it', '')} | {line['base']:,} | "
              f"{line['trainable']:,} |")  # fmt: skip
    if arguments.json:
        kept = {"model": MODEL, "training": training(arguments.tokens), "packages": environments.PACKAGES,
                "rounds": found}  # fmt: skip
        over = {line["name"]: line["ours_over_it"] for line in lines if "ours_over_it" in line}
        arguments.json.write_text(json.dumps(kept | {"table": lines, "ours_over": over}, indent=1) + "\n")


if __name__ == "__main__":
    main()
