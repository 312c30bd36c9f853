"""What a request's tokens say in milliseconds, and what many requests say together.

TTFT  from sending a request to its first token
TPOT  (last token - first token) / (output tokens - 1); requests of one token have none
ITL   time from one token to the next, of every token of every request
E2E   from sending a request to its last token

These are the definitions of `vllm bench serve`, with one difference: it takes a chunk for a token in ITL. Where a
server sends several tokens in a chunk, here each has its share of the wait, so that the ITLs of a request always add
up to E2E - TTFT; the waits between chunks, which a reader sees, are kept beside them as `chunk_gap`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_tpu.errors import UserError

PERCENTILES = (50, 90, 99)
SLO = ("ttft", "tpot", "e2e")

Chunk = tuple[float, int]  # when it came, and the tokens in it


@dataclass
class Reply:
    """One request and what came back; times are seconds since the point began."""

    number: int
    scheduled: float
    sent: float = 0.0
    asked_input: int | None = None  # tokens of the prompt by the tokenizer
    asked_output: int = 0
    input_tokens: int | None = None  # as the server counts them
    chunks: list[Chunk] = field(default_factory=list)  # those with tokens
    counted_by: str = ""  # usage, tokenizer or chunks
    finish_reason: str | None = None
    error: str | None = None  # its kind; None: all went well
    said: str = ""  # what is known of the error

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.chunks)

    @property
    def ttft(self) -> float:
        return self.chunks[0][0] - self.sent

    @property
    def e2e(self) -> float:
        return self.chunks[-1][0] - self.sent

    @property
    def tpot(self) -> float | None:
        more = self.output_tokens - 1
        return (self.e2e - self.ttft) / more if more else None

    @property
    def gaps(self) -> list[float]:
        """Between chunks."""
        return [later - earlier for (earlier, _), (later, _) in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def itl(self) -> list[float]:
        """Before each token but the first."""
        found = [0.0] * (self.chunks[0][1] - 1)
        for gap, (_, count) in zip(self.gaps, self.chunks[1:], strict=True):
            found += [gap / count] * count
        return found

    def to_json(self) -> dict[str, Any]:
        found = {"scheduled": round(self.scheduled, 6), "sent": round(self.sent, 6), "input_tokens": self.input_tokens,
                 "output_tokens": self.output_tokens}  # fmt: skip
        if not self.ok:
            return found | {"error": self.error, "said": self.said}
        tpot = None if self.tpot is None else round(1e3 * self.tpot, 4)
        return found | {"ttft_ms": round(1e3 * self.ttft, 4), "tpot_ms": tpot, "e2e_ms": round(1e3 * self.e2e, 4)}


def percentiles(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Of seconds, in milliseconds; between two values linearly."""
    if not len(values):
        return {**{f"p{p}": None for p in PERCENTILES}, "mean": None}
    found = np.percentile(values, PERCENTILES) * 1e3
    return {**{f"p{p}": round(float(x), 4) for p, x in zip(PERCENTILES, found, strict=True)},
            "mean": round(1e3 * float(np.mean(values)), 4)}  # fmt: skip


def parse_slo(text: str | None) -> dict[str, float]:
    """"ttft=500,tpot=50" in milliseconds."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.strip().partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in SLO or not 0 < found[name] < float("inf"):
            raise UserError(
                f"--slo {text}: {part.strip()!r} is wrong; milliseconds of {', '.join(SLO)}, as in ttft=500,tpot=50"
            )
    return found


def meets(request: Mapping[str, Any], slo: Mapping[str, float]) -> bool:
    """A request that failed meets nothing; one of a single token has no TPOT and meets any."""
    return "error" not in request and all((request[f"{name}_ms"] or 0.0) <= most for name, most in slo.items())


def goodput(requests: Sequence[Mapping[str, Any]], duration: float, slo: Mapping[str, float]) -> dict[str, Any]:
    """Requests a second that meet every bound of the SLO, and their share of all that were sent."""
    if not slo:
        return {"goodput": None, "good_share": None}
    good = sum(meets(one, slo) for one in requests)
    return {"goodput": round(good / duration, 6), "good_share": round(good / len(requests), 6)}


def summary(replies: Sequence[Reply], duration: float, slo: Mapping[str, float]) -> dict[str, Any]:
    """What a point measured. `duration` reaches from its beginning to the last answer, as in `vllm bench serve`."""
    whole = [one for one in replies if one.ok]
    output = sum(one.output_tokens for one in whole)
    read = sum(one.input_tokens or one.asked_input or 0 for one in whole)
    requests = [one.to_json() for one in replies]
    return {
        "completed": len(whole),
        "failed": len(replies) - len(whole),
        "failures": dict(Counter(one.error for one in replies if not one.ok)),
        "duration": round(duration, 6),
        "input_tokens": read,
        "output_tokens": output,
        "request_throughput": round(len(whole) / duration, 6),
        "input_throughput": round(read / duration, 4),
        "output_throughput": round(output / duration, 4),
        "ttft_ms": percentiles([one.ttft for one in whole]),
        "tpot_ms": percentiles([one.tpot for one in whole if one.tpot is not None]),
        "itl_ms": percentiles([gap for one in whole for gap in one.itl]),
        "e2e_ms": percentiles([one.e2e for one in whole]),
        "chunk_gap_ms": percentiles([gap for one in whole for gap in one.gaps]),
        "tokens_per_chunk": round(output / max(1, sum(len(one.chunks) for one in whole)), 4) if whole else None,
        "counted_by": sorted({one.counted_by for one in whole}),
        "lag_ms": percentiles([one.sent - one.scheduled for one in replies]),
        **goodput(requests, duration, slo),
        "requests": requests,
    }
