"""Which rates a server keeps up with, and whether a run was long enough to tell.

A server that gets more than it can do has a backlog that grows, and requests take longer and longer: of every second
of arrivals at rho times its capacity, rho - 1 seconds are left over. So the E2E of the second half of a point's
requests is looked at. A rate is not kept up with where it grows by more than a ninth of a second for each second of
arrivals (less than 90 % of what arrives is done), and by more than half of what an unloaded request takes. The
saturation QPS of a shape is the highest rate of its sweep below the first that the server does not keep up with.

A point whose arrivals last less than three times as long as a request takes cannot tell, at any rate: 30 requests
at QPS 32 have all arrived before the first has finished, and say nothing about QPS 32. Nor can one in which requests
take longer and longer only because more and more are in flight: where they take less than three times as long as an
unloaded one, arrivals must last three times as long as that.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEAST_TIMES = 3.0  # arrivals last at least so many times as long as a request
LEAST_RISE = 0.5  # of what an unloaded request takes
LEAST_REQUESTS = 5  # in the second half
ENOUGH = 0.9  # of what arrives, to be done

Card = dict[str, Any]


def arrival_seconds(point: Mapping[str, Any]) -> float:
    """From the first request to the last."""
    if math.isinf(float(point["qps"])):
        return 0.0
    if point.get("requests"):
        times: list[float] = [one["scheduled"] for one in point["requests"]]
        return max(times) - min(times)
    count: int = point["completed"] + point["failed"]
    return (count - 1) / float(point["qps"])


def unloaded_ms(points: Sequence[Mapping[str, Any]]) -> float | None:
    """What a request of a shape takes where little waits: the fastest tenth at the lowest rate (should that rate be
    too much already, the first requests did not know it yet)."""
    finite = [one for one in points if not math.isinf(float(one["qps"])) and one["completed"]]
    if not finite:
        return None
    lowest = min(finite, key=lambda one: float(one["qps"]))
    if lowest.get("requests"):
        return float(np.percentile([one["e2e_ms"] for one in lowest["requests"] if "error" not in one], 10))
    return whole_ms(lowest)


def whole_ms(point: Mapping[str, Any]) -> float | None:
    """The median E2E; where a file has none, by the medians of its parts."""
    whole, first, more = (_median(point, name) for name in ("e2e_ms", "ttft_ms", "tpot_ms"))
    if whole is not None:
        return whole
    if first is None or more is None or not point["completed"]:
        return None
    tokens: float = point["output_tokens"] / point["completed"]
    return first + more * (tokens - 1)


def _median(point: Mapping[str, Any], name: str) -> float | None:
    found: float | None = point[name]["p50"]
    return found


def steady(point: Mapping[str, Any], unloaded: float | None) -> bool:
    """Did requests arrive for long enough?"""
    return unloaded is not None and 1e3 * arrival_seconds(point) >= LEAST_TIMES * unloaded


def keeps_up(point: Mapping[str, Any], unloaded: float | None) -> tuple[bool | None, float | None]:
    """Does the server keep up, and what share of the arrivals does it get done? None: cannot tell."""
    if point["failed"] > (1 - ENOUGH) * (point["completed"] + point["failed"]):
        return False, None
    if unloaded is None or not steady(point, unloaded) or not point.get("requests"):
        return None, None
    whole = [one for one in point["requests"] if "error" not in one]
    sent, took = np.array([one["sent"] for one in whole]), np.array([one["e2e_ms"] for one in whole])
    late = sent > (sent.min() + sent.max()) / 2
    if late.sum() < LEAST_REQUESTS:
        return None, None
    growth = float(np.polyfit(sent[late], took[late], 1)[0]) / 1e3  # seconds of E2E for each second of arrivals
    done = round(1 / (1 + max(0.0, growth)), 4)
    rise = 1e3 * growth * float(np.ptp(sent[late]))
    if done >= ENOUGH or rise <= LEAST_RISE * unloaded:
        return True, done
    middle = float(np.median(took))
    proven = middle >= LEAST_TIMES * unloaded or 1e3 * arrival_seconds(point) >= LEAST_TIMES * middle
    return (False, done) if proven else (None, done)


def of_shape(points: Sequence[Card]) -> Card:
    """What the points of one shape say together: {qps, first_not, told}."""
    finite = sorted((one for one in points if not math.isinf(float(one["qps"]))), key=lambda one: float(one["qps"]))
    failing = [float(one["qps"]) for one in finite if one["keeps_up"] is False]
    first_not = min(failing, default=None)
    good = [float(one["qps"]) for one in finite
            if one["keeps_up"] and (first_not is None or float(one["qps"]) < first_not)]  # fmt: skip
    unknown = [f"{float(one['qps']):g}" for one in finite if one["keeps_up"] is None]
    highest = max(good, default=None)
    if not finite:
        told = "no finite QPS was measured"
    elif first_not is not None:
        told = (f"keeps up to QPS {highest:g}, not with {first_not:g}" if highest is not None
                else f"does not keep up with QPS {first_not:g}, the lowest that can be told")  # fmt: skip
    elif highest is not None:
        told = f"keeps up to QPS {highest:g}, the highest that can be told: it saturates above"
    else:
        told = "cannot be told"
    if unknown:
        told += f"; QPS {', '.join(unknown)} too short to tell"
    reached = highest if first_not is not None else None
    return {"qps": reached, "at_least": highest, "first_not": first_not, "told": told}
