"""Merge an Orbax checkpoint of a run into Hugging Face safetensors; the same as `gemma-tpu merge`.

    python scripts/orbax_to_hf.py runs/tiny_cpu --out models/mine
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import gemma_tpu
from gemma_tpu.cli import run_script


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, help="folder to write; by default the run's own merged/")
    parser.add_argument("--base", type=Path, help="where the base lies now, if it has moved since training")
    parser.add_argument("--step", type=int, help="a checkpoint's step; by default the latest")
    args = parser.parse_args()
    return run_script(partial(gemma_tpu.merge, out=args.out, base=args.base, step=args.step), args.run_dir)


if __name__ == "__main__":
    sys.exit(main())
