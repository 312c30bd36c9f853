"""What a run has learned: the loss on its held-out rows, and pass@1 by simulation. Copy it to change it.

    python recipes/evaluate.py runs/tiny_cpu

Base and tuned model are measured side by side, with the same prompts, settings and scorer.
"""

import sys
from pathlib import Path
from typing import Any

from gemma_tpu.cli import run_script
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import evaluate, verilog
from gemma_tpu.run import runs
from gemma_tpu.run.metrics import say


def main(run_dir: str | Path) -> dict[str, Any]:
    results: dict[str, Any] = {}

    # Loss per target token, on rows that training never saw.
    if runs.read_config(Path(run_dir)).data.validation is None:
        say("held-out loss was not measured: the run's config has no data.validation")
    else:
        results["loss"] = evaluate.loss(run_dir)

    # Greedy completions of the bundled problems, each compiled and simulated against its testbench. Generated
    # code runs in a sandbox or not at all.
    try:
        verilog.require()
    except UserError as missing:
        say(f"pass@1 was not measured: {missing}")
        return results
    results["tiny"] = evaluate.tiny(run_dir)
    return results


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/evaluate.py RUN_DIR")
    sys.exit(run_script(main, sys.argv[1]))
