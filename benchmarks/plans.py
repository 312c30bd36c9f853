"""What the planner says of every shipped config, and of 31B on other slices: memory, speed and price, by the compiler.

    python benchmarks/plans.py [--full] [--json FILE] [NAME ...]

Needs libtpu (the tpu extra) and no TPU; half a minute for each plan on two cores. Every figure is a prediction: the
roofline walk of the schedule that the TPU compiler made of the very step that `train` runs. `--full` lets the compiler
finish and adds the time by its own cycle estimates, for some minutes each. NAME picks plans whose name starts so.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAST = "gemma4_31b_v5p8_fast.yaml"
# name, config, more arguments
PLANS = [
    *((file.stem, file.name, ()) for file in sorted((ROOT / "configs").glob("gemma*.yaml"))),
    ("31b on v5p-32", FAST, ("--on", "v5p-32", "mesh.fsdp=16", "train.batch_size=16")),
    ("31b on 2xv5p-8", FAST, ("--on", "2xv5p-8", "mesh.data=2", "train.batch_size=8")),
    ("31b on v6e-4", FAST, ("--on", "v6e-4", "mesh.fsdp=1", "mesh.tp=4", "train.batch_size=2")),
    ("31b on v6e-8", FAST, ("--on", "v6e-8", "mesh.fsdp=8", "train.batch_size=8")),
    ("31b on v5e-8", FAST,
     ("--on", "v5e-8", "mesh.fsdp=1", "mesh.tp=8", "mesh.replicate_kv=true", "train.batch_size=1")),
    ("31b on tpu7x-8", FAST, ("--on", "tpu7x-8", "mesh.fsdp=8", "train.batch_size=8")),
    ("31b on v5p-8, remat full", FAST, ("train.remat=full",)),
    ("31b on v5p-8, fsdp=2 tp=2", FAST, ("mesh.fsdp=2", "mesh.tp=2")),
    ("gemma 3 27b on v5p-8", "gemma3_27b_v6e4.yaml",
     ("--on", "v5p-8", "mesh.fsdp=4", "mesh.tp=1", "train.batch_size=4", "train.accumulation=1")),
]  # fmt: skip
COLUMNS = ("plan", "slice and mesh", "keeps", "peak GiB a chip", "analytic", "step s", "tokens/s", "MFU",
           "$ a M tokens", "compiler s")  # fmt: skip


def plan(config: str, more: tuple[str, ...]) -> dict:
    command = [sys.executable, "-m", "gemma_tpu", "plan", f"configs/{config}", "--json", *more]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command[1:])}:\n{found.stderr}")
    return json.loads(found.stdout)


def row(name: str, found: dict) -> str:
    keeps = found["remat"] if isinstance(found["remat"], str) else ", ".join(found["remat"])
    axes = ", ".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1) or "one chip"
    fit = f"{found['peak_gib_per_chip']:.1f} of {found['limit_gib']:.1f}{'' if found['fits'] else ': does not fit'}"
    price = found.get("usd_per_million_tokens")
    cells = (
        name, f"{found['slice']}, {axes}", keeps, fit, f"{found['analytic_peak_gib_per_chip']:.1f}",
        f"{found['step_s']:.3f}", f"{found['tokens_per_s']:,.0f}", f"{100 * found['mfu']:.0f} %",
        "" if price is None else f"{price:.3f}", f"{found['compile_s']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="plans whose name starts so; all if left out")
    parser.add_argument("--full", action="store_true", help="by the compiler's own cycles, too")
    parser.add_argument("--json", type=Path, help="write the plans there, by name")
    args = parser.parse_args()
    chosen = [one for one in PLANS if not args.names or any(one[0].startswith(word) for word in args.names)]
    if not chosen:
        parser.error(f"no plan starts so; known: {', '.join(name for name, _, _ in PLANS)}")
    plans = {}
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, config, more in chosen:
        plans[name] = plan(config, (*more, *(("--full",) if args.full else ())))
        print(row(name, plans[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(plans, indent=1) + "\n")


if __name__ == "__main__":
    main()
