"""The compiled programs of the small server, all of them before the first request: `decode` for its slots, and for
each bucket of prompt tokens `prefill` and `score`.

Letters: B slots, E stored prompts, T tokens of a sheet, c of a chunk, V vocabulary, N likeliest tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_tpu.gemma import loading
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.sampling import row_drawing
from gemma_tpu.sampling.decoding import STOPS, Call, Plan, Programs, Report, Sheet, Starts, compilations
from gemma_tpu.sampling.row_drawing import RowNumbers

LIKELIEST = 20  # alternatives that can be asked for beside a token
STORED = 8  # prompts that are computed and wait for slots
CHUNK = 64  # tokens whose logits live at once, where the tokens of prompts are scored; buckets are multiples of it


Scored = tuple[jax.Array, jax.Array, jax.Array]  # of each token its log-probability, and the likeliest with theirs


class Likeliest(NamedTuple):
    """The likeliest tokens at some places, and their log-probabilities; the first of them the likeliest."""

    ids_XN: np.ndarray
    logprobs_XN: np.ndarray


class Device:
    """The model, its slots and its store. One thread uses it."""

    def __init__(self, model: Decoder, *, slots: int, capacity: int, buckets: Sequence[int], burst: int):
        self.buckets, self.capacity = tuple(buckets), capacity
        self.mesh = getattr(model.embed.w[...].sharding, "mesh", None) or loading.one_device_mesh()
        share = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.slots = -(-slots // share) * share  # every device the same number of them
        self.stored = min(self.slots, STORED)
        graph, state = nnx.split(model)
        self._leaves, tree = jax.tree.flatten(state)
        plan = Plan(
            arch=model.arch, dtype=jnp.dtype(model.dtype), rows=self.slots, capacity=capacity, stored=self.stored,
            prompt=self.buckets[-1], sheet=self.buckets[-1], steps=burst, rules=row_drawing.COMPILED, mesh=self.mesh,
        )  # fmt: skip
        self.burst = burst
        self._programs = Programs(graph, tree, plan)
        self._score, self._likeliest = jax.jit(self._scored), jax.jit(likeliest)

    def compile(self, told: Callable[[int, int], None]) -> None:
        """Every program once, on nothing; `told(how many are ready, of how many)` after each."""
        with jax.set_mesh(self.mesh):
            self._store, self._state = self._programs.start()
            steps: list[Callable[[], object]] = [partial(self._try_bucket, size) for size in self.buckets]
            steps.append(lambda: (self.likeliest_of_stored(), self.likeliest_of_slots()))
            steps.append(lambda: self.decode(self._idle()))
            for number, step in enumerate(steps):
                told(number, len(steps))
                jax.block_until_ready(step())
            told(len(steps), len(steps))

    def _try_bucket(self, size: int) -> object:
        self.prefill(self.empty_sheet(size))
        return self.score(self.empty_sheet(size))

    def compiled(self) -> int:
        """How often something was compiled here since the beginning."""
        jitted = (self._programs.start, self._programs.prefill, self._programs.decode, self._score, self._likeliest)
        return sum(map(compilations, jitted))

    def bucket(self, tokens: int) -> int:
        return next(size for size in self.buckets if size >= tokens)

    def empty_sheet(self, size: int) -> Sheet:
        tokens_1T, segments_1T = np.zeros((2, 1, size), np.int32)
        start_E, length_E = np.zeros((2, self.stored), np.int32)
        return Sheet(tokens_1T, segments_1T, start_E, length_E, np.full(self.stored, self.stored, np.int32))

    def prefill(self, sheet: Sheet) -> None:
        with jax.set_mesh(self.mesh):
            self._store = self._programs.prefill(self._leaves, self._store, sheet)

    def score(self, sheet: Sheet) -> tuple[np.ndarray, Likeliest]:
        """For each place of a sheet: the log-probability of the token behind it, and the likeliest ones there."""
        with jax.set_mesh(self.mesh):
            found = self._score(self._leaves, sheet.tokens_1T, sheet.segments_1T)
        logprob_T, ids_TN, logprobs_TN = jax.device_get(found)
        return logprob_T, Likeliest(ids_TN, logprobs_TN)

    def likeliest_of_stored(self) -> Likeliest:
        """For the first token of each stored prompt."""
        return self._top(self._store.logits_EV)

    def likeliest_of_slots(self) -> Likeliest:
        """For the next token of each slot."""
        return self._top(self._state.logits_BV)

    def decode(self, call: Call) -> Report:
        with jax.set_mesh(self.mesh):
            self._state, report = self._programs.decode(self._leaves, self._state, self._store, call)
        here: Report = jax.device_get(report)
        return here

    def _top(self, logits_XV: jax.Array) -> Likeliest:
        with jax.set_mesh(self.mesh):
            return Likeliest(*jax.device_get(self._likeliest(logits_XV)))

    def _idle(self) -> Call:
        B = self.slots
        row_B, stored_B, limit_B = np.zeros((3, B), np.int32)
        starts = Starts(np.int32(0), row_B, stored_B, np.zeros((B, 2), np.uint32), limit_B)
        return Call(starts, np.ones(B, bool), no_stops(B), neutral(B), np.int32(0), np.int32(B + 1))

    def _scored(self, leaves: Any, tokens_1T: jax.Array, segments_1T: jax.Array) -> Scored:
        model = self._programs.model(leaves)
        x_1TD = model.hidden(tokens_1T, segments_1T)
        next_T = jnp.append(tokens_1T[0, 1:], 0)

        def one(chunk: tuple[jax.Array, jax.Array]) -> Scored:
            x_cD, next_c = chunk
            logits_cV = model.logits(x_cD[None])[0]
            ids_cN, logprobs_cN = likeliest(logits_cV)
            logit_c = jnp.take_along_axis(logits_cV, next_c[:, None], axis=1)[:, 0]
            # The very subtraction that the likeliest went through: where the token is the likeliest, both are equal.
            return logit_c - jax.nn.logsumexp(logits_cV, axis=1), ids_cN, logprobs_cN

        found = jax.lax.map(one, (x_1TD[0].reshape(-1, CHUNK, x_1TD.shape[2]), next_T.reshape(-1, CHUNK)))
        logprob_T, ids_TN, logprobs_TN = (x.reshape(-1, *x.shape[2:]) for x in found)
        return logprob_T, ids_TN, logprobs_TN


def likeliest(logits_XV: jax.Array) -> tuple[jax.Array, jax.Array]:
    values_XN, ids_XN = jax.lax.top_k(logits_XV, min(LIKELIEST, logits_XV.shape[1]))
    return ids_XN, values_XN - jax.nn.logsumexp(logits_XV, axis=1)[:, None]


def neutral(slots: int) -> RowNumbers:
    """Greedy, and nothing else, in every slot; in place, for those that ask for more."""
    ones_B = np.ones(slots, np.float32)
    zeros_B = np.zeros(slots, np.float32)
    return RowNumbers(zeros_B, np.zeros(slots, np.int32), ones_B, zeros_B.copy(), ones_B.copy())


def no_stops(slots: int) -> np.ndarray:
    return np.full((slots, 2 * STOPS), -1, np.int32)
