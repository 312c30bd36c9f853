"""Packing figures: padding left, steps saved, time and memory of the plan, and how fast batches are made.

    python benchmarks/packing.py [--json F]

Lengths are drawn lognormal with the published figures of CodeV-R1 (mean 922, 99th percentile 2,553, cut at
3,072), 10,000 rows for the padding and 1,000,000 for time and memory, which a process of its own measures.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gemma_tpu.data.batches import Loader, make_loader
from gemma_tpu.data.packing import best_fit, bucket_widths, padding_waste

MEAN, P99, LONGEST, SHORTEST = 922, 2553, 3072, 32
NINE = (2000, 5000, 1000, 8000, 3000, 3000, 2100, 4000, 4000)
ROWS, MANY, CAPACITY, BATCH = 10_000, 1_000_000, 4096, 8


def codev_lengths(rows: int, seed: int = 0) -> np.ndarray:
    """Lognormal(mu, sigma): the mean is exp(mu + sigma²/2), the 99th percentile exp(mu + 2.326 sigma)."""
    z99 = 2.3263
    sigma = z99 - np.sqrt(z99**2 - 2 * np.log(P99 / MEAN))
    mu = np.log(MEAN) - sigma**2 / 2
    drawn = np.random.default_rng(seed).lognormal(mu, sigma, rows)
    return np.clip(drawn.astype(np.int64), SHORTEST, LONGEST)


class Rows:
    """Rows of random tokens with these lengths, as the loader takes them."""

    pad_id, fingerprint = 0, 0

    def __init__(self, lengths: np.ndarray):
        self.lengths, self.tokens = lengths, int(lengths.sum())
        self._ids = np.random.default_rng(1).integers(5, 1000, int(lengths.max()), dtype=np.int32)
        self._mask = np.ones(len(self._ids), bool)

    def __len__(self) -> int:
        return len(self.lengths)

    def pieces(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self._ids[: self.lengths[row]], self._mask[: self.lengths[row]])]


def loader_of(rows: Rows, packing: str) -> Loader:
    return make_loader(rows, max_seq_len=CAPACITY, packing=packing, batch_size=BATCH, accumulation=1, seed=0)


def padding(lengths: np.ndarray) -> list[dict]:
    found = []
    for capacity in (3072, 4096, 8192, 32768):
        waste = padding_waste(lengths, capacity)
        widths = bucket_widths(lengths, capacity).tolist()
        found.append({"sheet": capacity, **waste, "efficiency": 1 - waste["pack"], "widths": widths})
    return found


def batches(lengths: np.ndarray) -> dict[str, dict]:
    """An epoch in each way: its steps, what of it is padding, and batches a second on one thread."""
    rows, found = Rows(lengths), {}
    for packing in ("off", "bucket", "pack"):
        loader = loader_of(rows, packing)
        begun = time.perf_counter()
        for step in range(100):
            loader[step]
        made = 100 / (time.perf_counter() - begun)
        positions = loader.positions_per_step * loader.steps_per_epoch
        found[packing] = {"steps": loader.steps_per_epoch, "padding": loader.padding_share, "positions": positions,
                          "widths": loader.widths.tolist(), "batches_per_s": made}  # fmt: skip
    return found


def plan_many(capacity: int) -> dict:
    """Time and memory of a million lengths; the process that runs this does nothing else."""
    lengths = codev_lengths(MANY)
    begun = time.perf_counter()
    sheets = len(best_fit(lengths, capacity))
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    efficiency = float(lengths.sum()) / (sheets * capacity)
    return {"sheet": capacity, "sheets": sheets, "efficiency": efficiency, "seconds": seconds, "peak_mib": peak}


def measure() -> dict:
    lengths = codev_lengths(ROWS)
    many = []
    for capacity in (4096, 32768):
        command = [sys.executable, __file__, "--many", str(capacity)]
        many.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    bins = best_fit(np.array(NINE), 8192)
    return {
        "rows": {"mean": float(lengths.mean()), "p99": float(np.percentile(lengths, 99)), "max": int(lengths.max())},
        "padding": padding(lengths), "epoch": batches(lengths), "many": many,
        "nine": [[NINE[i] for i in items] for items in bins], "nine_padding": len(bins) * 8192 - sum(NINE),
    }  # fmt: skip


def show(found: dict) -> None:
    rows = found["rows"]
    print(f"{ROWS:,} rows: mean {rows['mean']:.0f}, p99 {rows['p99']:.0f}, max {rows['max']}")
    print("share of padding:\n  sheet   one row   buckets    packed  efficiency  lengths of the buckets")
    for row in found["padding"]:
        shares = "  ".join(f"{row[name]:>8.2%}" for name in ("pad", "bucket", "pack"))
        widths = ", ".join(map(str, row["widths"]))
        print(f"{row['sheet']:>7,}  {shares}  {row['efficiency']:>10.2%}  {widths}")
    print(f"one epoch at {CAPACITY:,}, {BATCH} rows a batch:")
    plain = found["epoch"]["off"]
    for name, row in found["epoch"].items():
        steps, positions = row["steps"] / plain["steps"], row["positions"] / plain["positions"]
        print(f"  {name:<7} {row['steps']:>6,} steps ({steps:.3f} of off), {positions:.3f} of its positions, "
              f"{row['padding']:.2%} padding, {row['batches_per_s']:,.0f} batches/s made")  # fmt: skip
    for row in found["many"]:
        print(f"{MANY:,} rows at {row['sheet']:,}: {row['sheets']:,} sheets, {row['efficiency']:.2%} full, "
              f"{row['seconds']:.1f} s, peak {row['peak_mib']:,.0f} MiB")  # fmt: skip
    print(f"nine requests on sheets of 8,192: {found['nine']}, {found['nine_padding']} tokens of padding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--many", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.many:
        print(json.dumps(plan_many(args.many)))
        return
    found = measure()
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
