"""What training and serving cost: arithmetic over hours, tokens and prices. Nothing is read here, nothing is printed.

Preemptions of spot machines come at random, one in 1/rate hours on average (a Poisson process): work since the last
checkpoint is lost, and a restart is paid for. Waiting for a new machine costs time and no money.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma_tpu.hardware.chips import Slice
from gemma_tpu.hardware.prices import Hour, Prices

MILLION = 1e6
MONTH = 730.0  # hours
Percentiles = Mapping[str, float]  # p50, p90, p99


@dataclass(frozen=True)
class Training:
    place: Slice
    hours: float
    tokens: float | None  # of rows, padding left out; None: not known
    measured: bool
    told: str  # where the figures come from

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.tokens is None else self.tokens / self.hours / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.place.chips

    def usd_per_million(self, usd: float) -> float | None:
        return None if self.tokens is None else usd / self.tokens * MILLION


@dataclass(frozen=True)
class Serving:
    place: Slice
    output_tokens_per_s: float
    measured: bool
    told: str
    prompt_tokens_per_s: float | None = None
    latency_ms: Mapping[str, Percentiles] = field(default_factory=dict)  # ttft, tpot, itl, e2e
    mfu: float | None = None  # share of the peak that useful FLOPs are
    bound: float | None = None  # output tokens/s that the arithmetic allows at the same load

    @property
    def tokens_per_hour(self) -> float:
        return self.output_tokens_per_s * 3600

    @property
    def chip_hours_per_million(self) -> float:
        return self.place.chips * MILLION / self.tokens_per_hour

    @property
    def of_bound(self) -> float | None:
        return None if self.bound is None else self.output_tokens_per_s / self.bound

    def usd_per_million(self, usd_hour: float) -> float:
        return usd_hour / self.tokens_per_hour * MILLION

    def usd_per_evaluation(self, prices: Prices, usd_hour: float) -> float:
        """Completions of a benchmark on a server that has nothing else to do, at this throughput."""
        return prices["evaluation.completions"] * prices["evaluation.tokens"] / self.tokens_per_hour * usd_hour


# --- spot ---


@dataclass(frozen=True)
class Preempted:
    """A run on machines that may be taken away."""

    hours: float  # paid for, on average
    factor: float  # over the hours of an undisturbed run
    preemptions: float  # on average
    best_checkpoint_minutes: float  # where saving and losing cost least together


def preempted(hours: float, prices: Prices) -> Preempted:
    """Saves, lost work and restarts on top of a run's hours.

    A segment of work and its save take t hours. Failures at a rate r a restart of R hours after each: the expected
    time until the segment is through is (e^(rt) - 1)(1/r + R). A restart that is itself cut short is neglected.
    """
    rate, restart = prices["spot.preemptions_per_hour"], prices["spot.restart_minutes"] / 60
    save = prices["spot.save_seconds"] / 3600
    segments = max(1.0, hours / (prices["spot.checkpoint_minutes"] / 60))
    each = hours / segments + save
    if rate == 0:
        return Preempted(segments * each, segments * each / hours, 0.0, math.inf)
    paid = segments * math.expm1(rate * each) * (1 / rate + restart)
    best = math.sqrt(2 * save / rate) * 60  # Young's first-order optimum
    return Preempted(paid, paid / hours, segments * math.expm1(rate * each), best)


def run_usd(training: Training, prices: Prices, way: str) -> tuple[float, float]:
    """Dollars of the run, lowest and highest; on spot machines with what preemptions add."""
    hour = prices.hour(training.place, way)
    hours = preempted(training.hours, prices).hours if way == "spot" else training.hours
    return hours * hour.low, hours * hour.high


def serving_hour(serving: Serving, prices: Prices, way: str) -> Hour:
    """A server that is taken away comes up again: the restart is paid for and serves nothing."""
    hour = prices.hour(serving.place, way)
    if way != "spot":
        return hour
    more = 1 + prices["spot.preemptions_per_hour"] * prices["spot.restart_minutes"] / 60
    return Hour(hour.low * more, hour.high * more, way, hour.source)


def utilisation_that_pays(place: Slice, prices: Prices) -> float | None:
    """The share of the hours from which on hardware of one's own is cheaper than on demand; above 1: never."""
    if not (prices.knows(place, "own") and prices.knows(place, "on-demand")):
        return None
    one, rent = prices.owned[place.chip.name], prices.hour(place).usd / place.chips
    capital = one.usd * (1 / prices["own.years"] + prices["own.upkeep_per_year"]) / (365 * 24)
    power, idle = one.watts / 1000 * prices["own.pue"] * prices["own.usd_kwh"], prices["own.idle_power"]
    left = rent - power * (1 - idle)
    return math.inf if left <= 0 else (capital + power * idle) / left


# --- total cost of ownership ---


@dataclass(frozen=True)
class Side:
    """One way to do it all: what is paid once, and what every hour of serving costs."""

    name: str
    training: Training | None
    serving: Serving | None
    way: str  # on-demand, spot, own
    once: Mapping[str, float]  # dollars, by what for
    hourly: Mapping[str, float]

    @property
    def fixed(self) -> float:
        return sum(self.once.values())

    @property
    def per_hour(self) -> float:
        return sum(self.hourly.values())

    @property
    def per_million(self) -> float | None:
        """Of output tokens, at the throughput of the measurement: a server that is never idle."""
        return None if self.serving is None else self.serving.usd_per_million(self.per_hour)

    def after_hours(self, hours: float) -> float:
        return self.fixed + hours * self.per_hour

    def after_tokens(self, tokens: float) -> float | None:
        return None if self.per_million is None else self.fixed + tokens / MILLION * self.per_million


def side(
    name: str, training: Training | None, serving: Serving | None, prices: Prices, way: str, *,
    engineering_hours: float = 0.0, storage_gb: float = 0.0,
) -> Side:  # fmt: skip
    once, hourly = {}, {}
    if training is not None:
        once["training"] = sum(run_usd(training, prices, way)) / 2
    if engineering_hours:
        once["engineering"] = engineering_hours * prices["engineering.usd_hour"]
    if serving is not None:
        hourly["serving"] = serving_hour(serving, prices, way).usd
    if storage_gb:
        hourly["storage"] = storage_gb * prices["storage.usd_gb_month"] / MONTH
    return Side(name, training, serving, way, once, hourly)


@dataclass(frozen=True)
class BreakEven:
    """Where two straight lines of cost cross. No crossing: one of them is cheaper from the start and stays so."""

    at: float | None
    before: str  # cheaper up to there
    after: str

    def told(self, unit: str) -> str:
        if self.at is None:
            return f"{self.after} is cheaper from the start and stays so" if self.after else "both cost the same"
        return f"{self.before} is cheaper up to {self.at:,.4g} {unit}, {self.after} beyond"


def break_even(a: str, fixed_a: float, rate_a: float, b: str, fixed_b: float, rate_b: float) -> BreakEven:
    if (fixed_a, rate_a) == (fixed_b, rate_b):
        return BreakEven(None, "", "")
    at = (fixed_b - fixed_a) / (rate_a - rate_b) if rate_a != rate_b else -1.0
    if at > 0:
        return BreakEven(at, *((a, b) if fixed_a < fixed_b else (b, a)))
    cheaper = a if (fixed_a, rate_a) < (fixed_b, rate_b) else b
    return BreakEven(None, cheaper, cheaper)


# --- an optimisation ---


@dataclass(frozen=True)
class Optimisation:
    """Before and after, in the three numbers that decide: accelerator-hours, latency at the load, utilisation."""

    before: Serving
    after: Serving
    usd_before: float  # for a million output tokens
    usd_after: float
    effort_usd: float

    @property
    def saved(self) -> float:
        return self.usd_before - self.usd_after

    @property
    def repaid_after_tokens(self) -> float | None:
        """None: it never is."""
        if self.effort_usd == 0:
            return 0.0 if self.saved >= 0 else None
        return self.effort_usd / self.saved * MILLION if self.saved > 0 else None

    def repaid_after_days(self, tokens_per_day: float) -> float | None:
        tokens = self.repaid_after_tokens
        return None if tokens is None else tokens / tokens_per_day
