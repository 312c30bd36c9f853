"""Who is in which slot of the small server: prompts onto sheets, their samples into slots, tokens out of them.

A prompt is computed once, however many samples of it are asked for, and stays in the store until all have begun.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gemma_tpu.lite.programs import Device, Likeliest, neutral, no_stops
from gemma_tpu.sampling import sampler
from gemma_tpu.sampling.decoding import Call, Report, Starts
from gemma_tpu.sampling.drawing import Settings

MOST_STOPS = no_stops(1).shape[1]  # stop ids that a request may have


class Tokens(NamedTuple):
    """New tokens of a sample; `finish` is "stop" or "length" with the last. `likeliest` where they were asked for:
    one entry for each token."""

    sample: int
    tokens: list[int]
    logprobs: list[float]
    likeliest: list[dict[int, float]] | None
    finish: str | None


class Scores(NamedTuple):
    """Log-probabilities of a prompt's own tokens, from the second on."""

    logprobs: list[float]
    likeliest: list[dict[int, float]]


class Failed(NamedTuple):
    message: str


@dataclass(eq=False)
class Ask:
    """One prompt and what is wanted of it. `tell` is called on the device's thread and must not take long."""

    tokens: Sequence[int]
    settings: Settings
    tell: Callable[[Tokens | Scores | Failed], None]
    n: int = 1
    limit: int = 16  # new tokens of each sample; 0 where only the prompt is scored
    stop_ids: Sequence[int] = ()
    likeliest: bool = False  # beside each new token
    scored: bool = False
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None  # when its sheet was computed
    first: float | None = None  # when its first token was there
    samples: "list[Sample]" = field(init=False)

    def __post_init__(self) -> None:
        self.samples = [Sample(self, number) for number in range(self.n if self.limit else 0)]
        self.waiting = deque(self.samples)

    @property
    def over(self) -> bool:
        return not self.scored and all(sample.over for sample in self.samples)

    def cancel(self) -> None:
        """From any thread: nobody waits for it any more."""
        for sample in self.samples:
            sample.over = True
        self.scored = False


@dataclass(eq=False)
class Sample:
    ask: Ask
    number: int
    over: bool = False  # ended, or nobody wants more of it


class Batch:
    def __init__(self, device: Device):
        self.device = device
        self._slots: list[Sample | None] = [None] * device.slots
        self._stored: list[Ask | None] = [None] * device.stored
        self._numbers, self._stops_BN = neutral(device.slots), no_stops(device.slots)

    @property
    def running(self) -> list[Sample]:
        return [sample for sample in self._slots if sample]

    @property
    def room(self) -> int:
        """Slots that are free and for which no stored prompt has a sample."""
        free = self._slots.count(None)
        return max(0, free - sum(len(ask.waiting) for ask in self._stored if ask))

    @property
    def busy(self) -> bool:
        return any(self._slots) or any(ask and ask.waiting for ask in self._stored)

    def chosen(self, waiting: deque[Ask]) -> tuple[int, bool]:
        """(how many of those that wait go onto the next sheet, in order; whether more would not fit)."""
        places, room, at, count = self._stored.count(None), self.room, 0, 0
        for ask in waiting:
            unfit = at + len(ask.tokens) > self.device.buckets[-1]
            if unfit or count == places or (ask.samples and room <= 0):
                return count, True
            at, room, count = at + len(ask.tokens), room - len(ask.samples), count + 1
        return count, count == places or room <= 0

    def prefill(self, asks: Sequence[Ask]) -> tuple[int, int]:
        """Computes them on one sheet and tells the scores; (the bucket, the tokens in it)."""
        total = sum(len(ask.tokens) for ask in asks)
        sheet = self.device.empty_sheet(self.device.bucket(total))
        free = [place for place, ask in enumerate(self._stored) if ask is None]
        at = 0
        for number, ask in enumerate(asks):
            length = len(ask.tokens)
            sheet.tokens_1T[0, at : at + length], sheet.segments_1T[0, at : at + length] = ask.tokens, number + 1
            sheet.start_E[number], sheet.length_E[number] = at, length
            if ask.waiting:
                sheet.row_E[number] = free[number]
                self._stored[free[number]] = ask
            at += length
        if any(ask.waiting for ask in asks):
            self.device.prefill(sheet)
        if any(ask.scored for ask in asks):
            self._tell_scores(asks, *self.device.score(sheet))
        return sheet.tokens_1T.size, total

    def _tell_scores(self, asks: Sequence[Ask], logprob_T: np.ndarray, top: Likeliest) -> None:
        at = 0
        for ask in asks:
            places = slice(at, at + len(ask.tokens) - 1)  # each scores the token behind it
            if ask.scored:
                listed = [dict(zip(ids, values, strict=True)) for ids, values in
                          zip(top.ids_XN[places].tolist(), top.logprobs_XN[places].tolist(), strict=True)]  # fmt: skip
                ask.tell(Scores(logprob_T[places].tolist(), listed))
                ask.scored = False
            at += len(ask.tokens)

    def turn(self, impatient: bool) -> tuple[int, int]:
        """One call of `decode`, and its tokens told: (steps, tokens). `impatient`: it ends as soon as a slot is free,
        for somebody waits."""
        keep_B = np.array([not (sample and sample.over) for sample in self._slots])
        for slot in np.flatnonzero(~keep_B):
            self._free(int(slot))
        before = [sample.ask.likeliest if sample else False for sample in self._slots]
        stored_of = self._begin()
        look = any(sample.ask.likeliest for sample in self.running)
        tops = self._likeliest(before, stored_of) if look else {}
        patience = 1 if impatient or any(self._stored) else self.device.slots + 1
        call = Call(self._starts, keep_B, self._stops_BN, self._numbers,
                    np.int32(1 if look else self.device.burst), np.int32(patience))  # fmt: skip
        report = self.device.decode(call)
        return int(report.steps), self._read(report, tops)

    def _begin(self) -> dict[int, int]:
        """Samples of stored prompts into free slots: which slot begins which stored prompt."""
        slots = self.device.slots
        row_B, stored_B, limit_B = np.zeros((3, slots), np.int32)
        key_B2 = np.zeros((slots, 2), np.uint32)
        begun: dict[int, int] = {}
        free = deque(slot for slot, sample in enumerate(self._slots) if sample is None)
        for place, ask in enumerate(self._stored):
            while ask and ask.waiting and free:
                sample = ask.waiting.popleft()
                if sample.over:
                    continue
                slot, number = free.popleft(), len(begun)
                self._slots[slot], begun[slot] = sample, place
                row_B[number], stored_B[number], limit_B[number] = slot, place, ask.limit
                key_B2[number] = sampler.key_of(ask.settings.seed, ask.tokens, sample.number)
                self._set(slot, ask)
            if ask and not ask.waiting:
                self._stored[place] = None  # its place may be taken once this call has copied it
        self._starts = Starts(np.int32(len(begun)), row_B, stored_B, key_B2, limit_B)
        return begun

    def _free(self, slot: int) -> None:
        self._slots[slot] = None
        self._numbers.temperature_B[slot] = 0  # a program that draws for nobody would cost all

    def _set(self, slot: int, ask: Ask) -> None:
        said, numbers = ask.settings, self._numbers
        numbers.temperature_B[slot], numbers.top_k_B[slot] = said.temperature, min(said.top_k, 2**31 - 1)
        numbers.top_p_B[slot], numbers.min_p_B[slot] = said.top_p, said.min_p
        numbers.penalty_B[slot] = said.repetition_penalty
        self._stops_BN[slot] = -1
        self._stops_BN[slot, : len(ask.stop_ids)] = ask.stop_ids

    def _likeliest(self, before: list[bool], begun: dict[int, int]) -> dict[int, dict[int, float]]:
        """For the one step to come: of slots that go on from their own logits, of others from their prompt's."""
        old = self.device.likeliest_of_slots() if any(before) else None
        new = self.device.likeliest_of_stored() if begun else None
        found = {}
        for slot, sample in enumerate(self._slots):
            if sample and sample.ask.likeliest:
                top, place = (new, begun[slot]) if slot in begun else (old, slot)
                assert top is not None  # it was made above for the likes of this slot
                found[slot] = dict(zip(top.ids_XN[place].tolist(), top.logprobs_XN[place].tolist(), strict=True))
        return found

    def _read(self, report: Report, tops: dict[int, dict[int, float]]) -> int:
        total, now = 0, time.monotonic()
        for slot, sample in enumerate(self._slots):
            if sample is None:
                continue
            count = int(report.emitted_B[slot])
            tokens = report.tokens_CB[:count, slot].tolist()
            logprobs = report.logprobs_CB[:count, slot].tolist()
            finish = None
            if not report.active_B[slot]:
                finish = "stop" if report.stopped_B[slot] else "length"
                self._free(slot)
            listed = None
            if sample.ask.likeliest:  # another program's last digit may differ: what is reported stands
                listed = [tops[slot] | {token: logprob} for token, logprob in zip(tokens, logprobs, strict=True)]
            total += count
            if sample.ask.first is None:
                sample.ask.first = now
            if not sample.over:
                sample.over = finish is not None
                sample.ask.tell(Tokens(sample.number, tokens, logprobs, listed, finish))
        return total

    def asks(self) -> set[Ask]:
        """All that have a sample here, running or to begin."""
        return {ask for ask in self._stored if ask} | {sample.ask for sample in self.running}

    def sweep(self) -> None:
        """Stored prompts that nobody wants any more give their place up."""
        self._stored = [ask if ask and not ask.over else None for ask in self._stored]
