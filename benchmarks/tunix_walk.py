"""The paper's program and ours, 31B on v5p-8, compiled by the TPU compiler here and walked by the same walker.

    python benchmarks/tunix_walk.py [--envs .bench-envs] [--dumps DIR] [--layers 6 12] [--json FILE]

Tunix 0.1.7 + qwix 0.1.8 with the paper's settings (benchmarks/peers/tunix_compile.py) is compiled in its own
environment with 6 and with 12 of the 60 layers, which it unrolls; the slope gives 60. Ours is the step that
`gemma-tpu train configs/gemma4_31b_v5p8_fast.yaml` runs, all 60 layers. Useful tokens are those that are not padding:
922 of 3,072 for Tunix, and what packing leaves for ours, on rows of the same lengths. Both are predictions. What the
walker says of the paper's program stands beside the paper's wall-clock average, 763 useful tokens/s, start-up
included: the only calibration there is. Compilers end as soon as the schedule is written; each needs about
a minute on two idle cores. A dump that is there is walked and not made again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packing import codev_lengths
from peers import environments

from gemma_tpu import config
from gemma_tpu.compiled import walk
from gemma_tpu.data.packing import padding_waste
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips
from gemma_tpu.training import compiling

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "gemma4_31b_v5p8_fast.yaml"
SLICE, LAYERS, ARCHITECTURE = "v5p-8", 60, "gemma4-31b"
USEFUL, PADDED, PAPER = 922, 3072, 763  # mean row, what the paper pads to, its useful tokens/s by the wall clock
REMAT = ["q", "k", "v", "attention", "o", "gate", "up", "down", "lora_h"]
_COMPILER = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": SLICE, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One walked program: `tokens` positions in `seconds`, `useful` of them a share that is not padding."""

    seconds: float
    tokens: int
    useful: float

    @property
    def per_second(self) -> float:
        return self.tokens * self.useful / self.seconds


def finished(folder: Path) -> bool:
    """Both the schedule and the memory report are there, and grow no more."""
    files = [*folder.glob(compiling.SCHEDULES[0]), *folder.glob(compiling.MEMORY)]
    if len(files) < 2:
        return False
    before = [path.stat().st_size for path in files]
    time.sleep(1.0)
    return all(before) and before == [path.stat().st_size for path in files]


def compile_tunix(layers: int, folder: Path, envs: Path) -> None:
    if finished(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "compiler.log"
    begun = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(
            [environments.python("tunix", envs), HERE / "peers" / "tunix_compile.py", str(layers), folder],
            stdout=out, stderr=subprocess.STDOUT, env=os.environ | _COMPILER,
        )  # fmt: skip
        try:
            while child.poll() is None and not finished(folder):
                time.sleep(0.5)
        finally:
            child.kill()
            child.wait()
    if not finished(folder):
        raise SystemExit(f"Tunix with {layers} layers did not compile: see {log}")
    print(f"Tunix, {layers} layers: compiled in {time.monotonic() - begun:.0f} s", file=sys.stderr)


def walked(folder: Path, what: str) -> walk.Walk:
    found = walk.walk(folder, chips.find(SLICE))
    kinds = ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in list(found.by_kind.items())[:6])
    print(f"{what}: {found.seconds:.4f} s ({kinds})", file=sys.stderr)
    if found.unknown:
        print(f"  not understood: {'; '.join(found.unknown)}", file=sys.stderr)
    return found


def tunix(layers: tuple[int, int], dumps: Path, envs: Path) -> tuple[Step, dict[int, float]]:
    """The micro-step of 60 layers on the line through two smaller ones."""
    seconds = {}
    for count in layers:
        folder = dumps / f"tunix-{count}"
        compile_tunix(count, folder, envs)
        seconds[count] = walked(folder, f"Tunix, {count} layers").seconds
    low, high = layers
    slope = (seconds[high] - seconds[low]) / (high - low)
    return Step(seconds[high] + slope * (LAYERS - high), PADDED, USEFUL / PADDED), seconds


def ours(dumps: Path) -> Step:
    chosen = config.load(CONFIG)
    folder, length = dumps / "ours", chosen.data.max_seq_len
    remat = REMAT if isinstance(chosen.train.remat, str) else list(chosen.train.remat)
    if not finished(folder):
        mesh = {axis: getattr(chosen.mesh, axis) for axis in ("data", "fsdp", "expert", "tp")}
        compiled = compiling.compile_for(
            config.to_dict(chosen), chips.find(SLICE).compiler_name, mesh, folder,
            architecture=sizes.config(ARCHITECTURE), remat=remat, total_steps=572,
        )  # fmt: skip
        if not compiled.fits:
            raise SystemExit(f"our step needs {compiled.needs_gib:.1f} GiB of {compiled.limit_gib:.1f}")
        print(f"ours: compiled in {compiled.seconds:.0f} s", file=sys.stderr)
    filled = 1 - padding_waste(codev_lengths(10_000), length)["pack"]
    return Step(walked(folder, "ours").seconds, chosen.train.batch_size * length, filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=environments.DEFAULT)
    parser.add_argument("--dumps", type=Path, default=HERE.parent / ".bench-dumps")
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 12], metavar=("LOW", "HIGH"))
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    dumps = arguments.dumps.resolve()
    theirs, measured = tunix(tuple(arguments.layers), dumps, arguments.envs)
    own = ours(dumps)
    ratio, flattery = own.per_second / theirs.per_second, theirs.per_second / PAPER
    print("| 31B on v5p-8, by the roofline walk | seconds | positions | useful | useful tokens/s |")
    print("|---|---|---|---|---|")
    for title, step in (("Tunix + qwix, the paper's settings, a micro-step", theirs), ("ours, packed, a step", own)):
        print(f"| {title} | {step.seconds:.3f} | {step.tokens:,} | {step.useful:.1%} | {step.per_second:,.0f} |")
    print(f"ours over theirs: {ratio:.2f}")
    print(f"calibration: the walk says {theirs.per_second:,.0f} for the paper's program, the paper measured {PAPER} "
          f"over a whole run with start-up: it flatters by at most {flattery:.2f}; by that factor ours would be "
          f"{own.per_second / flattery:,.0f}")  # fmt: skip
    if arguments.json:
        figures: dict[str, Any] = {
            "tunix": vars(theirs), "tunix_layers": measured, "ours": vars(own), "ratio": ratio, "flattery": flattery,
            "tunix_per_second": theirs.per_second, "ours_per_second": own.per_second, "paper_per_second": PAPER,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
