"""Twenty losses of TRL + PEFT beside ours, from one YAML, the same first adapter and the same batches.

    python benchmarks/baseline.py [packed padded accumulated] [--json FILE]

The functions are those of tests/test_baseline.py; TRL is where `make test-baseline` puts it (GEMMA_TPU_CLIENTS names
another folder). About a minute for each case on two cores.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "recipes" / "gpu_baseline")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"


def main() -> None:
    import test_baseline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(test_baseline.CASES)}; packed")
    parser.add_argument("--json", type=Path, help="write the differences there")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(test_baseline.CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(test_baseline.CASES)}")
    import batches
    import hand_over
    from runs_helper import write_base

    from gemma_tpu.pages import comparison

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in args.cases or ["packed"]:
            place = folder / case
            place.mkdir()
            beside = (hand_over, batches)
            runs = test_baseline.side_by_side(beside, place, write_base(place / "base"), **test_baseline.CASES[case])
            found[case] = comparison.apart(*runs)
            print(case, json.dumps(found[case]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
