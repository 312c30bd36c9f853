"""The report of a cost: one or two ways to do the same work, over hours and over tokens, with all that was assumed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tpu.costs import cost
from gemma_tpu.costs.cost import BreakEven, Optimisation, Preempted, Serving, Side, Training
from gemma_tpu.hardware.prices import WAYS, Prices

SPOT = ("spot.preemptions_per_hour", "spot.checkpoint_minutes", "spot.save_seconds", "spot.restart_minutes")
OWN = ("own.years", "own.utilisation", "own.upkeep_per_year", "own.idle_power", "own.usd_kwh", "own.pue")


@dataclass(frozen=True)
class Report:
    prices: Prices
    sides: tuple[Side, ...]  # one, or two that are compared
    hours: tuple[float, ...]  # of serving
    tokens: tuple[float, ...]  # generated
    optimisation: Optimisation | None = None
    tokens_per_day: float | None = None

    @property
    def by_hours(self) -> BreakEven | None:
        if len(self.sides) < 2 or not all(one.hourly for one in self.sides):
            return None
        a, b = self.sides
        return cost.break_even(a.name, a.fixed, a.per_hour, b.name, b.fixed, b.per_hour)

    @property
    def by_tokens(self) -> BreakEven | None:
        """In millions of output tokens."""
        if len(self.sides) < 2:
            return None
        a, b = self.sides
        if a.per_million is None or b.per_million is None:
            return None
        return cost.break_even(a.name, a.fixed, a.per_million, b.name, b.fixed, b.per_million)

    def ways(self, training: Training) -> dict[str, tuple[float, float]]:
        """Dollars of the run for every way to pay that has a price."""
        known = [way for way in WAYS if self.prices.knows(training.place, way)]
        return {way: cost.run_usd(training, self.prices, way) for way in known}

    def preempted(self, training: Training) -> Preempted:
        return cost.preempted(training.hours, self.prices)

    def evaluation(self, side: Side) -> float | None:
        return None if side.serving is None else side.serving.usd_per_evaluation(self.prices, side.per_hour)

    def assumptions(self) -> list[str]:
        """Every price and assumption that a figure of this report was made of."""
        places = [one.place for side in self.sides for one in (side.training, side.serving) if one]
        trained = any(side.training for side in self.sides)
        ways = {way for way in WAYS for place in places if self.prices.knows(place, way)}
        ways = ways if trained else {side.way for side in self.sides}
        rows = [line for way in WAYS if way in ways for line in self.prices.sources(places, way)]
        if "spot" in ways:
            rows += [*self.prices.told(*SPOT), "spot, where one figure is needed: the middle of lowest and highest"]
        rows += self.prices.told(*OWN) if "own" in ways else []
        rows += [line for side in self.sides for line in _told(side)]
        if any(side.serving for side in self.sides):
            rows += self.prices.told("evaluation.completions", "evaluation.tokens")
            rows.append("$ per 1M tokens generated: at this throughput all the time; an idle hour costs as much")
        used = {name for side in self.sides for name in (*side.once, *side.hourly)}
        if "engineering" in used or self.optimisation:
            rows += self.prices.told("engineering.usd_hour")
        rows += self.prices.told("storage.usd_gb_month") if "storage" in used else ["storage: none is counted"]
        return list(dict.fromkeys(rows))


def _told(side: Side) -> list[str]:
    return [f"{side.name}: {one.told}" for one in (side.training, side.serving) if one]


# --- as data ---


def to_json(report: Report) -> dict[str, Any]:
    """The first side stands at the top, under the keys that --json promises."""
    first = report.sides[0]
    return {
        "training_usd": first.once.get("training"),
        "usd_per_million_tokens": _per_million(first),
        "serving_usd_per_million_tokens": first.per_million,
        "break_even": {"hours": _crossing(report.by_hours, 1.0), "tokens": _crossing(report.by_tokens, cost.MILLION)},
        "prices": report.prices.name,
        "sides": [_side(report, one) for one in report.sides],
        "optimisation": _optimisation(report),
        "assumptions": report.assumptions(),
    }  # fmt: skip


def _per_million(side: Side) -> float | None:
    return side.training.usd_per_million(side.once["training"]) if side.training else None


def _crossing(found: BreakEven | None, scale: float) -> dict[str, Any] | None:
    if found is None:
        return None
    at = None if found.at is None else found.at * scale
    return {"at": at, "cheaper_before": found.before, "cheaper_after": found.after}


def _side(report: Report, side: Side) -> dict[str, Any]:
    return {
        "name": side.name, "way": side.way, "once_usd": dict(side.once), "usd_per_hour": dict(side.hourly),
        "training": side.training and _training(report, side, side.training),
        "serving": side.serving and serving_json(side.serving, side.per_million),
        "evaluation_usd": report.evaluation(side),
        "total_usd": {
            "hours": {f"{hours:g}": side.after_hours(hours) for hours in report.hours},
            "tokens": {f"{tokens:g}": side.after_tokens(tokens) for tokens in report.tokens},
        },
    }  # fmt: skip


def _training(report: Report, side: Side, one: Training) -> dict[str, Any]:
    spot = report.preempted(one)
    ways = {way: list(usd) for way, usd in report.ways(one).items()}
    return {
        "slice": one.place.name, "chips": one.place.chips, "hours": one.hours, "accelerator_hours": one.chip_hours,
        "tokens": one.tokens, "measured": one.measured, "usd": ways,
        "usd_per_million_tokens": _per_million(side), "source": one.told,
        "spot": {"paid_hours": spot.hours, "factor": spot.factor, "preemptions": spot.preemptions,
                 "best_checkpoint_minutes": spot.best_checkpoint_minutes},
    }  # fmt: skip


def serving_json(one: Serving, per_million: float | None) -> dict[str, Any]:
    return {
        "slice": one.place.name, "chips": one.place.chips, "output_tokens_per_s": one.output_tokens_per_s,
        "prompt_tokens_per_s": one.prompt_tokens_per_s, "measured": one.measured,
        "accelerator_hours_per_million_tokens": one.chip_hours_per_million, "usd_per_million_tokens": per_million,
        "latency_ms": {name: dict(each) for name, each in one.latency_ms.items()},
        "utilisation": {"mfu": one.mfu, "of_bound": one.of_bound}, "source": one.told,
    }  # fmt: skip


def _optimisation(report: Report) -> Mapping[str, Any] | None:
    one = report.optimisation
    if one is None:
        return None
    return {
        "before": serving_json(one.before, one.usd_before), "after": serving_json(one.after, one.usd_after),
        "effort_usd": one.effort_usd, "saved_usd_per_million_tokens": one.saved,
        "repaid_after_tokens": one.repaid_after_tokens, "tokens_per_day": report.tokens_per_day,
        "repaid_after_days": one.repaid_after_days(report.tokens_per_day) if report.tokens_per_day else None,
    }  # fmt: skip
