"""Merge an Orbax checkpoint into Hugging Face safetensors; the same as `gemma-tpu merge`.

    python scripts/orbax_to_hf.py runs/tiny_cpu --out models/mine
    python scripts/orbax_to_hf.py --checkpoint ckpts --layout tunix --base models/gemma --rank 64 --alpha 64 --out m
"""

import argparse
import sys

from gemma_tpu.cli import run_script
from gemma_tpu.commands import handoff_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    handoff_cli.add_merge_arguments(parser)
    return run_script(handoff_cli.merge, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
