"""From a run to a folder that a server may load: merge, then prove the merge. Copy it to change it.

    python recipes/merge.py runs/tiny_cpu

The weights are streamed shard by shard: memory is that of a few tensors, whatever the size of the model.
"""

import sys
from pathlib import Path
from typing import Any

import gemma_tpu
from gemma_tpu.cli import run_script
from gemma_tpu.errors import RunError
from gemma_tpu.handoff import verify
from gemma_tpu.run.metrics import say


def main(run_dir: str | Path, out: str | Path | None = None, step: int | None = None) -> dict[str, Any]:
    # W + alpha / rank * B A in float32 and one rounding; rank and alpha are those of the checkpoint. Without
    # `out` the run's own merged/ is written; a folder of yours is never overwritten.
    merged = gemma_tpu.merge(run_dir, out=out, step=step)

    # Every changed tensor against the exact sum, every other byte for byte, and the logits of the merged
    # folder against base + adapter (and against transformers, where torch is installed).
    proof = verify.verify(run_dir, merged=merged["out"], step=merged["step"])
    if not proof["ok"]:
        raise RunError(f"{merged['out']} must not be served: {'; '.join(proof['failures'])}")

    say(f"{merged['out']} is ready: the base's own files, with {merged['tensors_changed']} tensors tuned")
    return {"merge": merged, "verify": proof}


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python recipes/merge.py RUN_DIR [OUT]")
    sys.exit(run_script(main, *sys.argv[1:]))
