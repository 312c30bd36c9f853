"""What XLA's GPU compiler says of the train step on GPUs that are not here: memory, and the walk of its schedule.

    PYTHONPATH=.client-envs/cuda python benchmarks/gpu_plans.py [NAME ...]

Needs JAX's CUDA plugin (`make test-gpu-plans` brings it into .client-envs/cuda), no GPU and none of CUDA's libraries;
half a minute for each plan on two cores. Every figure is a prediction: matmuls at the datasheet's peak, nothing from a
cache. NAME picks plans whose model's name starts so. Attention's share is that of what
attention.py made and of flash.py's kernels.
"""

import argparse
import re
import sys
from pathlib import Path

from gemma_tpu import config as configs
from gemma_tpu.hardware import chips, gpus
from gemma_tpu.planning import plan, subject
from gemma_tpu.planning.workload import workload

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FAST, EXPERTS, SMALL = "gemma4_31b_v5p8_fast.yaml", "gemma4_26b_a4b_v6e4.yaml", "gemma3_4b_v6e1.yaml"
# slice, model and rows, config, overrides
PLANS = [
    ("h100x1", "E2B, 8 x 1 rows", "gemma4_e2b_v6e1.yaml", ()),
    ("h100x1", "E4B, 8 x 1 rows", "gemma4_e4b_v6e1.yaml", ()),
    ("h100x1", "12B, 8 x 1 rows", "gemma4_12b_v5e4.yaml",
     ("mesh.tp=1", "mesh.replicate_kv=false", "train.accumulation=8")),
    ("h100x1", "Gemma 3 1B, 8 x 2 rows of 2,048", "gemma3_1b_v5e1.yaml", ("train.accumulation=8",)),
    ("h100x1", "Gemma 3 4B, 8 x 1 rows", SMALL, ()),
    ("h200x1", "Gemma 3 4B, 8 x 1 rows", SMALL, ()),
    ("a100x1", "Gemma 3 4B, 8 x 1 rows", SMALL, ()),
    ("l4x1", "Gemma 3 1B, remat full", "gemma3_1b_v5e1.yaml", ("train.remat=full", "train.accumulation=8")),
    ("h100x8", "31B, 8 rows", FAST, ("mesh.fsdp=8", "train.batch_size=8")),
    ("h100x8", "31B, 16 rows", FAST, ("mesh.fsdp=8", "train.batch_size=16", "train.accumulation=1")),
    ("b200x8", "31B, 4 rows", FAST, ("mesh.fsdp=4", "mesh.tp=2")),
    ("h100x8", "26B-A4B, 8 rows", EXPERTS, ("mesh.fsdp=8", "train.batch_size=8", "train.accumulation=1")),
    ("h200x1", "26B-A4B, 8 x 1 rows", EXPERTS, ("mesh.fsdp=1", "train.batch_size=8", "train.accumulation=8")),
]  # fmt: skip
COLUMNS = ("slice", "plan", "peak GiB a GPU", "analytic", "step s", "tokens/s", "by arithmetic, s",
           "attention's share", "compiler s")  # fmt: skip


def row(slice_: str, name: str, file: str, more: tuple[str, ...]) -> str:
    chosen = configs.load(CONFIGS / file, ["train.remat=auto", *more])
    made = plan.make(chosen, file, chips.find(slice_), subject.find_model(chosen.model.path), workload(chosen),
                     say=lambda text: print(text, file=sys.stderr), suggest=False)  # fmt: skip
    axes = ", ".join(f"{axis}={n}" for axis, n in made.job.mesh if n > 1) or "one GPU"
    attention = [one.seconds for one in made.walk.costs if re.search(r"\(attention\.py|flash_", one.name)]
    cells = (
        f"{slice_}, {axes}", name, f"{made.peak_gib:.1f} of {made.limit_gib:.1f}", f"{made.memory.total:.1f}",
        f"{made.step_s:.3f}", f"{made.tokens_per_s:,.0f}", f"{made.estimate.step_s:.3f}",
        f"{100 * sum(attention) / made.walk.seconds:.0f} %", f"{made.compilation.seconds:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="plans whose model starts so; all if left out")
    args = parser.parse_args()
    if not gpus.installed():
        sys.exit("no CUDA plugin of JAX here; `make test-gpu-plans` brings it, for PYTHONPATH=.client-envs/cuda")
    chosen = [one for one in PLANS if not args.names or one[1].startswith(tuple(args.names))]
    if not chosen:
        parser.error(f"no plan starts so; known: {', '.join(name for _, name, *_ in PLANS)}")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for one in chosen:
        print(row(*one), flush=True)


if __name__ == "__main__":
    main()
