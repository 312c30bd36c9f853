"""The demo from nothing, in a folder that is removed: the commands of `make demo`, their times and what they found.

    python benchmarks/demo.py [--folder /tmp] [--json FILE]

A tiny random Gemma 4, its general skill by full fine-tuning, the LoRA, the merge, the proof, and base and tuned model
on held-out problems and rows. Needs iverilog and bubblewrap, and torch, transformers and peft for the whole proof.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def steps(folder: Path) -> dict[str, list[str]]:
    """By name, in order: the arguments of `gemma-tpu`."""
    random, base, skill, run = (str(folder / name) for name in ("random", "base", "skill", "run"))
    return {
        "tiny": ["tiny", random, "--dtype", "float32"],
        "train_base": ["train", "configs/tiny_base.yaml", f"model.path={random}", f"run_dir={skill}"],
        "merge_base": ["merge", skill, "--out", base],
        "train": ["train", "configs/tiny_cpu.yaml", f"model.path={base}", f"run_dir={run}"],
        "merge": ["merge", run],
        "verify": ["verify", run],
        "eval": ["eval", "tiny", run],
        "loss": ["eval", "loss", run],
    }


def call(words: list[str]) -> dict[str, Any]:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "gemma_tpu", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"gemma-tpu {' '.join(words)} ended with {done.returncode}")
    return json.loads(done.stdout) | {"wall_s": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write what each command answered there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="demo-bench-") as name:
        found = {step: call(words) for step, words in steps(Path(name)).items()}
    for verdicts in (found["eval"], found["eval"]["base"]):  # every completion: too much for a result file
        verdicts.pop("per_problem", None)
    rate = {name: found["eval"]["pass_at_k"]["1"] if name == "tuned" else found["eval"]["base"]["pass_at_k"]["1"]
            for name in ("base", "tuned")}  # fmt: skip
    found["pass_at_1"] = {name: dict(zip(("share", "low", "high"), three, strict=True)) for name, three in rate.items()}
    for step in steps(Path()):
        print(f"{step:<12}{found[step]['wall_s']:>8.1f} s")
    print(json.dumps(found["pass_at_1"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
