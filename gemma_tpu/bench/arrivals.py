"""When requests arrive: an open loop, so that a slow server is asked no less often than a fast one."""

import math
from typing import Literal

import numpy as np

Arrivals = Literal["poisson", "constant"]
KINDS: tuple[Arrivals, ...] = ("poisson", "constant")


def times(count: int, qps: float, kind: Arrivals, seed: int) -> list[float]:
    """Seconds from the start of a point at which each of `count` requests is sent; all at 0 where qps is infinite.

    The gaps of a Poisson process are exponential. Their sum is scaled to count / qps, as `vllm bench serve` does it:
    30 gaps left as they are drawn miss the rate that a table names by 18 % on average.
    """
    if math.isinf(qps):
        return [0.0] * count
    gaps = np.ones(count) if kind == "constant" else np.random.default_rng([seed, count]).exponential(size=count)
    return [float(x) for x in np.cumsum(gaps) * (count / qps / gaps.sum())]
