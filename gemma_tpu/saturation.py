"""Which rates a server keeps up with, and whether a run was long enough to tell.

While requests arrive at a rate that a server keeps up with, as many finish as arrive once the first have had the time
to: the number in flight has levelled off. So the second half of a point's arrivals is looked at. It keeps up where at
least 90 % as many finish in that time as arrive in it, beyond what chance explains; the saturation QPS of a shape is
the highest rate of its sweep below the first that it does not keep up with.

A point whose arrivals last less than three times as long as a request takes has no such level, at any rate: 30 requests
at QPS 32 have all arrived before the first has finished, and say nothing about QPS 32.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEAST_TIMES = 3.0  # arrivals last at least so many times as long as a request
ENOUGH = 0.9

Card = dict[str, Any]


def arrival_seconds(point: Mapping[str, Any]) -> float:
    """From the first request to the last."""
    if math.isinf(float(point["qps"])):
        return 0.0
    if point.get("requests"):
        times = [one["scheduled"] for one in point["requests"]]
        return max(times) - min(times)
    return (point["completed"] + point["failed"] - 1) / float(point["qps"])


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
    if point["e2e_ms"]["p50"] is not None:
        return point["e2e_ms"]["p50"]
    first, more = point["ttft_ms"]["p50"], point["tpot_ms"]["p50"]
    if first is None or more is None or not point["completed"]:
        return None
    return first + more * (point["output_tokens"] / point["completed"] - 1)


def steady(point: Mapping[str, Any], unloaded: float | None) -> bool:
    """Did requests arrive for long enough?"""
    return unloaded is not None and 1e3 * arrival_seconds(point) >= LEAST_TIMES * unloaded


def keeps_up(point: Mapping[str, Any], unloaded: float | None) -> tuple[bool | None, float | None]:
    """Does the server keep up, and what share of the second half of arrivals finishes meanwhile? None: cannot tell."""
    if point["failed"] > (1 - ENOUGH) * (point["completed"] + point["failed"]):
        return False, None
    if not steady(point, unloaded) or not point.get("requests"):
        return None, None
    whole = [one for one in point["requests"] if "error" not in one]
    sent = np.array([one["sent"] for one in whole])
    done = sent + np.array([one["e2e_ms"] for one in whole]) / 1e3
    half, end = (sent.min() + sent.max()) / 2, sent.max()
    arrived, finished = int((sent > half).sum()), int(((done > half) & (done <= end)).sum())
    in_flight = int((sent <= half).sum() - (done <= half).sum())
    # The number in flight is a Poisson one: the difference of two such varies by sqrt(2 n).
    allowed = (1 - ENOUGH) * arrived + 2 * math.sqrt(2 * in_flight)
    return bool(arrived - finished <= allowed), round(finished / arrived, 4) if arrived else None


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
