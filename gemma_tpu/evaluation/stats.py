"""What a handful of passes says: pass@k, intervals by resampling problems, and an exact paired test of two runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
ALPHA = 1 - LEVEL
LARGEST = 200_000  # sums of differences that the exact test still lists
_CHUNK = 1 << 22  # numbers drawn at a time, so that thousands of problems need no gigabytes


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate from n samples of which c passed: 1 - C(n-c, k) / C(n, k)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= passed ({c}) <= samples ({n}) and 1 <= k ({k}) <= samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high]: the 95 % bootstrap interval of the mean over problems.

    Where every problem has the same value there is nothing to resample. At 0 and at 1 the bound is then the exact
    binomial one (0 of 156 is compatible with 2.3 %), not an interval of no width.
    """
    values_P = np.asarray(values, float)
    mean = float(values_P.mean())
    if values_P.min() == values_P.max():
        reach = (ALPHA / 2) ** (1 / len(values_P))
        low, high = (0.0, 1 - reach) if mean == 0 else (reach, 1.0) if mean == 1 else (mean, mean)
    else:
        low, high = np.quantile(_means(values_P), [ALPHA / 2, 1 - ALPHA / 2])
    return [round(float(x), 4) for x in (mean, low, high)]


def _means(values_P: np.ndarray) -> np.ndarray:
    random, count = np.random.default_rng(0), len(values_P)
    at_once = max(1, _CHUNK // count)
    sizes = [min(at_once, DRAWS - start) for start in range(0, DRAWS, at_once)]
    return np.concatenate([values_P[random.integers(0, count, (size, count))].mean(axis=1) for size in sizes])


@dataclass(frozen=True)
class Paired:
    """Two runs on the same problems. `difference` is second minus first, with its interval over problems."""

    difference: list[float]
    p_value: float
    wins: list[int]  # places of the problems where the second is better
    losses: list[int]
    exact: bool

    @property
    def significant(self) -> bool:
        return self.p_value < ALPHA

    def sentence(self, first: str, second: str, what: str = "problems") -> str:
        value, low, high = (100 * x for x in self.difference)
        count = f"{len(self.wins)} {what} better, {len(self.losses)} worse"
        test = "exact paired permutation test" if self.exact else "paired permutation test by 100,000 draws"
        p = "p < 0.0001" if self.p_value < 1e-4 else f"p = {self.p_value:.4f}"
        if value == 0 and not self.wins and not self.losses:
            return f"{second} and {first} score the same on every one of the {what}."
        how = "better" if value > 0 else "worse" if value < 0 else "no different on average"
        points = f" by {abs(value):.1f} points" if value else ""
        verdict = "the difference is significant" if self.significant else "the difference is not significant"
        return (
            f"{second} is {how} than {first}{points} (95 % interval {low:+.1f} to {high:+.1f}; {count}): "
            f"{verdict} ({p}, {test})."
        )


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Were the names of the two runs exchanged at random on each problem, how often would they differ this much?"""
    if len(first) != len(second) or not len(first):
        raise ValueError(f"a paired test needs the same problems, not {len(first)} and {len(second)}")
    difference_P = np.asarray(second, float) - np.asarray(first, float)
    whole = _as_integers(difference_P)
    p_value = _exact(whole) if whole is not None else _drawn(difference_P)
    low, high = np.quantile(_means(difference_P), [ALPHA / 2, 1 - ALPHA / 2])
    return Paired(
        [round(float(x), 4) for x in (difference_P.mean(), low, high)], p_value,
        [int(at) for at in np.flatnonzero(difference_P > 1e-12)],
        [int(at) for at in np.flatnonzero(difference_P < -1e-12)], whole is not None,
    )  # fmt: skip


def _as_integers(difference_P: np.ndarray) -> np.ndarray | None:
    """The differences as whole multiples of one unit, as rates of passes are; None where there is no such unit."""
    fractions = [Fraction(float(value)).limit_denominator(100_000) for value in difference_P]
    if any(abs(float(one) - value) > 1e-12 for one, value in zip(fractions, difference_P, strict=True)):
        return None
    unit = math.lcm(*(one.denominator for one in fractions))
    whole_P = [int(one * unit) for one in fractions]
    return np.array(whole_P) if sum(map(abs, whole_P)) <= LARGEST else None


def _exact(whole_P: np.ndarray) -> float:
    """The share of all 2^P choices of signs whose sum is at least as far from 0: a convolution, problem by problem."""
    sizes = [abs(int(value)) for value in whole_P if value]
    chances = np.ones(1)
    for size in sizes:
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    reach = len(chances) // 2
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, chances[np.abs(sums) >= abs(int(whole_P.sum()))].sum()))


def _drawn(difference_P: np.ndarray, draws: int = 100_000) -> float:
    random, least, seen = np.random.default_rng(0), abs(difference_P.sum()) - 1e-12, 0
    at_once = max(1, _CHUNK // len(difference_P))
    for start in range(0, draws, at_once):
        signs = random.choice((-1.0, 1.0), (min(at_once, draws - start), len(difference_P)))
        seen += int((np.abs(signs @ difference_P) >= least).sum())
    return (seen + 1) / (draws + 1)
