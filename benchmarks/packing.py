"""Packing figures: padding left, time and memory of the plan.

    python benchmarks/packing.py

Lengths are drawn lognormal with the published figures of CodeV-R1 (mean 922, 99th percentile 2,553, cut at
3,072), 10,000 rows for the padding and 1,000,000 for time and memory.
"""

import resource
import time

import numpy as np

from gemma_tpu.packing import best_fit, padding_waste

MEAN, P99, LONGEST, SHORTEST = 922, 2553, 3072, 32


def codev_lengths(rows: int, seed: int = 0) -> np.ndarray:
    """Lognormal(mu, sigma): the mean is exp(mu + sigma²/2), the 99th percentile exp(mu + 2.326 sigma)."""
    z99 = 2.3263
    sigma = z99 - np.sqrt(z99**2 - 2 * np.log(P99 / MEAN))
    mu = np.log(MEAN) - sigma**2 / 2
    drawn = np.random.default_rng(seed).lognormal(mu, sigma, rows)
    return np.clip(drawn.astype(np.int64), SHORTEST, LONGEST)


def main() -> None:
    lengths = codev_lengths(10_000)
    p99 = np.percentile(lengths, 99)
    print(f"10,000 rows: mean {lengths.mean():.0f}, p99 {p99:.0f}, max {lengths.max()}")
    print("share of padding:")
    print("  sheet   one row   buckets    packed  efficiency")
    for capacity in (3072, 4096, 8192, 32768):
        waste = padding_waste(lengths, capacity)
        shares = "  ".join(f"{waste[name]:>8.2%}" for name in ("pad", "bucket", "pack"))
        print(f"{capacity:>7,}  {shares}  {1 - waste['pack']:>10.2%}")
    lengths = codev_lengths(1_000_000)
    for capacity in (4096, 32768):
        start = time.perf_counter()
        sheets = len(best_fit(lengths, capacity))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"1,000,000 rows at {capacity:,}: {sheets:,} sheets, {seconds:.1f} s, peak {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
