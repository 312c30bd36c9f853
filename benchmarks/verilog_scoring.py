"""Scoring speed: verilog-eval's 156 references in the sandbox, ours and the official verdict.

    python benchmarks/verilog_scoring.py [CLONE] [--json FILE]     # a clone of github.com/NVlabs/verilog-eval
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from gemma_tpu.evaluation import sandbox, verilog, verilog_eval

CLONE = Path(__file__).resolve().parents[1] / "verilog-eval"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", nargs="?", type=Path, default=CLONE, help="by default verilog-eval in this checkout")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    problems = verilog_eval.load(args.clone)
    print(f"{len(problems)} problems, {sandbox.cores()} cores, box: {sandbox.require()}, {verilog.require_iverilog()}")
    start = time.perf_counter()
    verdicts = verilog_eval.self_check(problems)
    both = time.perf_counter() - start
    start = time.perf_counter()
    ready = verilog_eval.measured(problems)
    ours = time.perf_counter() - start
    passed = sum(one.passed for one in verdicts)
    official = Counter(one.official for one in verdicts)
    print(f"both verdicts, in the sandbox   {both:6.1f} s")
    print(f"our verdict alone               {ours:6.1f} s   {1000 * ours / len(ready):.0f} ms a design")
    print(f"{passed} of {len(problems)} pass; the official scorer: {dict(official)}")
    print("cannot pass here: " + ", ".join(one.id for one in ready if one.unscorable))
    if args.json:
        found = {"both_s": both, "ours_s": ours, "passed": passed, "problems": len(problems), "official": official}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
