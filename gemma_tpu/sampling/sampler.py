"""Token ids in, token ids out: a batch whose rows take up the next sample as soon as their own has ended.

Prompts are computed side by side on packed sheets, each once, however many samples of it are asked for. A sample's
random numbers come from the seed, its prompt and its number among the samples of that prompt: what else is in the
batch, and in which row it stands, changes nothing.
"""

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.sampling import decoding
from gemma_tpu.sampling.decoding import STOPS, Call, Plan, Programs, Sheet, Starts
from gemma_tpu.sampling.drawing import Settings

__all__ = ["Completion", "Sampler", "Settings", "Stats", "generate"]

ROWS = 16
STORED = 16  # prompts that may wait for rows
SHEET = 1024  # tokens of prompts that are computed together, if there are so many
STEPS = 32  # tokens of a row between two looks of the host
WATCHED = 8  # … where text is shown as it comes, or looked through for a stop string

Until = Callable[[list[int]], int | None]


@dataclass(frozen=True)
class Completion:
    """New tokens without the stop token; finish_reason is "stop" or "length"; a log-probability for each token."""

    tokens: list[int]
    finish_reason: str
    logprobs: list[float]


@dataclass
class Stats:
    """What it took. `programs` counts compilations of this shape since the process began."""

    prompts: int = 0  # different ones, each computed once
    sheets: int = 0
    sheet_tokens: int = 0  # with padding
    calls: int = 0
    steps: int = 0
    row_steps: int = 0  # steps times rows
    tokens: int = 0  # of completions
    programs: dict[str, int] = field(default_factory=dict)

    @property
    def busy(self) -> float:
        """The share of what the rows computed that is somebody's token."""
        return self.tokens / self.row_steps if self.row_steps else 0.0


@dataclass
class _Sample:
    number: int  # in the caller's list
    key: np.ndarray
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class _Prompt:
    tokens: tuple[int, ...]
    samples: deque[_Sample] = field(default_factory=deque)


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], settings: Settings, *,
    rows: int = ROWS, progress: Callable[[int, int], None] | None = None, **more: Any,
) -> list[Completion]:  # fmt: skip
    """Complete every prompt; equal prompts are samples of one. `more` is what `Sampler.run` takes besides."""
    return Sampler(model, rows=rows).run(prompts, stop_ids, settings, progress=progress, **more)


class Sampler:
    """A model ready to be asked, on the mesh that it was loaded onto."""

    def __init__(self, model: Decoder, *, rows: int = ROWS):
        self.arch, self.dtype, self.stats = model.arch, jnp.dtype(model.dtype), Stats()
        self._graph, state = nnx.split(model)
        self._leaves, self._tree = jax.tree.flatten(state)
        self.mesh = getattr(model.embed.w[...].sharding, "mesh", None) or loading.one_device_mesh()
        share = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.rows = -(-rows // share) * share  # every device the same number of rows

    def run(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], settings: Settings, *,
        numbers: Sequence[int] | None = None, limits: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None, on_tokens: Callable[[int, list[int]], None] | None = None,
        on_done: Callable[[int, Completion], None] | None = None, until: Until | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Completions in the order of the prompts.

        `numbers` says which sample of its prompt each is, where not all are asked for at once; `limits` how many
        tokens each may have, where that differs. `on_tokens(i, tokens so far)` and `on_done(i, completion)` are
        called as they come; `until(tokens so far)` says how many to keep once a completion should end there.
        """
        _check(self.arch.context, prompts, settings, limits)
        self.stats = Stats()
        if not len(prompts):
            return []
        waiting = _group(prompts, settings, numbers, limits)
        watched = on_tokens is not None or until is not None
        with jax.set_mesh(self.mesh):
            batch = _Batch(self, waiting, stop_ids, settings, WATCHED if watched else STEPS)
            done: dict[int, Completion] = {}
            while len(done) < len(prompts):
                touched = batch.turn()
                for sample, reason in touched:
                    if on_tokens is not None:
                        on_tokens(sample.number, sample.tokens)
                    kept = until(sample.tokens) if until is not None else None
                    if kept is not None:
                        del sample.tokens[kept:], sample.logprobs[kept:]
                        batch.stop(sample)
                        reason = "stop"
                    if reason is not None:
                        done[sample.number] = found = Completion(sample.tokens, reason, sample.logprobs)
                        self.stats.tokens += len(found.tokens)
                        if on_done is not None:
                            on_done(sample.number, found)
                if progress is not None and any(reason for _, reason in touched):
                    progress(len(done), len(prompts))
            self.stats.programs = batch.programs.compiled()
        return [done[number] for number in range(len(prompts))]


def _check(context: int, prompts: Sequence[Sequence[int]], settings: Settings, limits: Sequence[int] | None) -> None:
    if any(not len(prompt) for prompt in prompts):
        raise UserError("an empty prompt cannot be continued; it needs at least the BOS token")
    longest = max(map(len, prompts), default=0)
    new = settings.max_new_tokens
    if limits is not None and not all(1 <= limit <= new for limit in limits):
        raise UserError(f"limits must be from 1 to max_new_tokens ({new})")
    if longest + new > context:
        raise UserError(
            f"the longest prompt has {longest} tokens; with {new} new ones that is more than the model's context of "
            f"{context}"
        )


def _group(
    prompts: Sequence[Sequence[int]], settings: Settings, numbers: Sequence[int] | None, limits: Sequence[int] | None
) -> deque[_Prompt]:
    """Different prompts in their first order, each with its samples."""
    groups: dict[tuple[int, ...], _Prompt] = {}
    for number, prompt in enumerate(prompts):
        tokens = tuple(int(token) for token in prompt)
        group = groups.setdefault(tokens, _Prompt(tokens))
        mine = len(group.samples) if numbers is None else numbers[number]
        limit = settings.max_new_tokens if limits is None else int(limits[number])
        group.samples.append(_Sample(number, key_of(settings.seed, tokens, mine), limit))
    return deque(groups.values())


def key_of(seed: int, prompt: Sequence[int], number: int) -> np.ndarray:
    """What the random numbers of a prompt's sample come from."""
    of_prompt = zlib.crc32(np.asarray(prompt, np.int64).tobytes())
    return np.random.SeedSequence([seed, of_prompt, number]).generate_state(2, np.uint32)


def _bucket(tokens: int) -> int:
    """The next of 64, 72, 80 … 128, 144, 160 … 256, 288 …: at most an eighth of what it holds is padding."""
    step = max(8, 1 << tokens.bit_length() >> 4)
    return max(64, -(-tokens // step) * step)


class _Batch:
    """The rows, the store, and who is in them."""

    def __init__(
        self, sampler: Sampler, waiting: deque[_Prompt], stop_ids: Sequence[int], settings: Settings, steps: int
    ):
        self._waiting, self._settings, self._stats = waiting, settings, sampler.stats
        self._leaves, self._steps = sampler._leaves, steps
        longest = max(len(prompt.tokens) for prompt in waiting)
        whole = sum(len(prompt.tokens) for prompt in waiting)
        self._plan = Plan(
            arch=sampler.arch, dtype=sampler.dtype, rows=sampler.rows,
            capacity=min(_bucket(longest + settings.max_new_tokens), sampler.arch.context),
            stored=min(sampler.rows, STORED), prompt=_bucket(longest),
            sheet=max(_bucket(longest), min(_bucket(whole), SHEET)), steps=STEPS, rules=settings.rules,
            mesh=sampler.mesh,
        )  # fmt: skip
        self.programs: Programs = decoding.programs(sampler._graph, sampler._tree, self._plan)
        self._store, self._state = self.programs.start()
        self._stored: list[_Prompt | None] = [None] * self._plan.stored
        self._rows: list[_Sample | None] = [None] * self._plan.rows
        self._stopped: set[int] = set()
        missing = -len(stop_ids) % STOPS or (STOPS if not len(stop_ids) else 0)
        self._stop_ids = np.array([*stop_ids, *[-1] * missing], np.int32)
        self._numbers = settings.numbers

    def stop(self, sample: _Sample) -> None:
        """It has ended for a reason that the program does not know."""
        for row, mine in enumerate(self._rows):
            if mine is sample:
                self._rows[row] = None
                self._stopped.add(row)

    def turn(self) -> list[tuple[_Sample, str | None]]:
        """One call of `decode`: every sample that has new tokens or has ended, and why it ended."""
        free = [row for row, sample in enumerate(self._rows) if sample is None]
        ready = sum(len(prompt.samples) for prompt in self._stored if prompt)
        while self._waiting and ready < len(free) and None in self._stored:
            ready += self._prefill()
        starts = self._begin(free)
        more = bool(self._waiting) or any(self._stored)
        idle = more and None in self._rows
        call = Call(
            starts, np.array([row not in self._stopped for row in range(self._plan.rows)]), self._stop_ids,
            self._numbers, np.int32(1 if idle else self._steps),
            np.int32(max(1, self._plan.rows // 8) if more else self._plan.rows + 1),
        )  # fmt: skip
        self._stopped.clear()
        self._state, report = self.programs.decode(self._leaves, self._state, self._store, call)
        self._stats.calls += 1
        return self._read(report)

    def _prefill(self) -> int:
        """One sheet: as many of the waiting prompts as it and the store have room for."""
        plan, number, at = self._plan, 0, 0
        tokens_1T, segments_1T = np.zeros((2, 1, plan.sheet), np.int32)
        start_E, length_E = np.zeros((2, plan.stored), np.int32)
        row_E = np.full(plan.stored, plan.stored, np.int32)
        free = [row for row, prompt in enumerate(self._stored) if prompt is None]
        ready = 0
        while self._waiting and number < len(free) and at + len(self._waiting[0].tokens) <= plan.sheet:
            prompt = self._waiting.popleft()
            length = len(prompt.tokens)
            tokens_1T[0, at : at + length], segments_1T[0, at : at + length] = prompt.tokens, number + 1
            start_E[number], length_E[number], row_E[number] = at, length, free[number]
            self._stored[free[number]] = prompt
            number, at, ready = number + 1, at + length, ready + len(prompt.samples)
        sheet = Sheet(tokens_1T, segments_1T, start_E, length_E, row_E)
        self._store = self.programs.prefill(self._leaves, self._store, sheet)
        self._stats.prompts += number
        self._stats.sheets += 1
        self._stats.sheet_tokens += plan.sheet
        return ready

    def _begin(self, free: list[int]) -> Starts:
        """Stored prompts' samples for the rows that are free."""
        rows = self._plan.rows
        row_B, stored_B, limit_B = np.zeros((3, rows), np.int32)
        key_B2, count = np.zeros((rows, 2), np.uint32), 0
        for stored, prompt in enumerate(self._stored):
            while prompt and prompt.samples and count < len(free):
                sample = prompt.samples.popleft()
                self._rows[free[count]] = sample
                row_B[count], stored_B[count], limit_B[count] = free[count], stored, sample.limit
                key_B2[count] = sample.key
                count += 1
            if prompt and not prompt.samples:
                self._stored[stored] = None  # its place may be taken once this call has copied it
        return Starts(np.int32(count), row_B, stored_B, key_B2, limit_B)

    def _read(self, report: decoding.Report) -> list[tuple[_Sample, str | None]]:
        report = jax.device_get(report)
        self._stats.steps += int(report.steps)
        self._stats.row_steps += int(report.steps) * self._plan.rows
        touched: list[tuple[_Sample, str | None]] = []
        for row, sample in enumerate(self._rows):
            if sample is None:
                continue
            count = int(report.emitted_B[row])
            sample.tokens += report.tokens_CB[:count, row].tolist()
            sample.logprobs += report.logprobs_CB[:count, row].tolist()
            reason = None
            if not report.active_B[row]:
                reason = "stop" if report.stopped_B[row] else "length"
                self._rows[row] = None
            touched.append((sample, reason))
        return touched
