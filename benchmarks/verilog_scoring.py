"""Scoring speed: verilog-eval's 156 references in the sandbox, ours and the official verdict.

    python benchmarks/verilog_scoring.py [CLONE]     # a clone of github.com/NVlabs/verilog-eval

Bound: 20 s on 2 cores for both verdicts in the sandbox.
"""

import sys
import time
from collections import Counter
from pathlib import Path

from gemma_tpu.evaluation import sandbox, verilog, verilog_eval

BOUND = 20.0
CLONE = Path(__file__).parents[1] / "../shared/data/verilog-eval"


def main() -> None:
    clone = Path(sys.argv[1]) if len(sys.argv) > 1 else CLONE
    problems = verilog_eval.load(clone)
    print(f"{len(problems)} problems, {sandbox.cores()} cores, box: {sandbox.require()}, {verilog.require_iverilog()}")
    start = time.perf_counter()
    verdicts = verilog_eval.self_check(problems)
    both = time.perf_counter() - start
    start = time.perf_counter()
    ready = verilog_eval.measured(problems)
    ours = time.perf_counter() - start
    passed = sum(one.passed for one in verdicts)
    official = Counter(one.official for one in verdicts)
    holds = "holds" if both <= BOUND else "BROKEN"
    print(f"both verdicts, in the sandbox   {both:6.1f} s   bound {BOUND:.0f} s: {holds}")
    print(f"our verdict alone               {ours:6.1f} s   {1000 * ours / len(ready):.0f} ms a design")
    print(f"{passed} of {len(problems)} pass; the official scorer: {dict(official)}")
    print("cannot pass here: " + ", ".join(one.id for one in ready if one.unscorable))


if __name__ == "__main__":
    main()
