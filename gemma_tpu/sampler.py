"""Text from a model: prompts in rows of one padded shape, one compiled program for prefill and decode together.

Prompts are padded on the right to a multiple of BUCKET and rows to a fixed batch, so that a whole evaluation
compiles once for each bucket. Padding has segment 0: nothing sees it, and the first new tokens overwrite it.

Letters: B rows, P prompt slots, S cache slots, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_tpu.errors import UserError
from gemma_tpu.model import Decoder

BUCKET = 64


@dataclass(frozen=True)
class Settings:
    """How to draw: temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}: it must be at least 1"),
                (not 0 <= self.temperature < math.inf, f"temperature is {self.temperature}: it must be at least 0"),
                (self.top_k < 0, f"top_k is {self.top_k}: it must be at least 0 (0: all tokens)"),
                (not 0 < self.top_p <= 1, f"top_p is {self.top_p}: it must be above 0 and at most 1"),
            )
            if bad
        ]
        if wrong:
            raise UserError("; ".join(wrong))


@dataclass(frozen=True)
class Completion:
    """New tokens without the stop token; finish_reason is "stop" or "length"; a log-probability for each token."""

    tokens: list[int]
    finish_reason: str
    logprobs: list[float]


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], settings: Settings, *,
    rows: int = 16, progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:  # fmt: skip
    """Complete every prompt, `rows` at a time, longest first so that rows of one bucket meet."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + settings.max_new_tokens > model.arch.context:
        raise UserError(
            f"the longest prompt has {longest} tokens; with {settings.max_new_tokens} new ones that is more than the "
            f"model's context of {model.arch.context}"
        )
    if any(not prompt for prompt in prompts):
        raise UserError("an empty prompt cannot be continued; it needs at least the BOS token")
    graph, state = nnx.split(model)
    stop_ids_N, key = np.asarray(stop_ids, np.int32), jax.random.key(settings.seed)
    program = replace(settings, seed=0)  # what is compiled does not depend on the seed
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, Completion] = {}
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        slots = -(-len(prompts[chosen[0]]) // BUCKET) * BUCKET
        tokens_BP, lengths_B = np.zeros((rows, slots), np.int32), np.zeros(rows, np.int32)
        for row, index in enumerate(chosen):
            tokens_BP[row, : len(prompts[index])] = prompts[index]
            lengths_B[row] = len(prompts[index])
        number_B = np.array(chosen + [0] * (rows - len(chosen)), np.int32)  # a prompt's draws do not depend on its row
        new_BN, logprobs_BN, counts_B, stopped_B = _generate(
            graph, state, tokens_BP, lengths_B, number_B, stop_ids_N, key, program
        )
        for row, index in enumerate(chosen):
            end = int(counts_B[row])
            done[index] = Completion(
                np.asarray(new_BN[row, :end]).tolist(), "stop" if stopped_B[row] else "length",
                np.asarray(logprobs_BN[row, :end]).tolist(),
            )  # fmt: skip
        if progress is not None:
            progress(len(done), len(prompts))
    return [done[index] for index in range(len(prompts))]


@partial(jax.jit, static_argnames=("graph", "settings"))
def _generate(graph, state, tokens_BP, lengths_B, number_B, stop_ids_N, key, settings: Settings):
    model: Decoder = nnx.merge(graph, state)
    rows, slots = tokens_BP.shape
    new = settings.max_new_tokens
    keys_B = jax.vmap(lambda number: jax.random.fold_in(key, number))(number_B)

    index_BP = jnp.broadcast_to(jnp.arange(slots), (rows, slots))
    segments_BP = (index_BP < lengths_B[:, None]).astype(jnp.int32)
    x_BPD, cache = model.with_cache(tokens_BP, segments_BP, index_BP, model.empty_cache(rows, slots + new))
    last_B = jnp.maximum(lengths_B - 1, 0)
    logits_BV = model.logits(jnp.take_along_axis(x_BPD, last_B[:, None, None], axis=1))[:, 0]

    def draw(logits_BV, step):
        tokens_B = jax.vmap(lambda key, logits_V: _draw(key, logits_V, step, settings))(keys_B, logits_BV)
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]

    def unfinished(loop: dict[str, Any]):
        return (loop["step"] < new) & ~jnp.all(loop["stopped"])

    def one(loop: dict[str, Any]) -> dict[str, Any]:
        step, stopped_B = loop["step"], loop["stopped"]
        tokens_B, logprobs_B = draw(loop["logits"], step)
        stops_B = stopped_B | jnp.isin(tokens_B, stop_ids_N)
        x_B1D, cache = model.with_cache(
            tokens_B[:, None], jnp.ones((rows, 1), jnp.int32), (lengths_B + step)[:, None], loop["cache"]
        )
        return {
            "step": step + 1,
            "cache": cache,
            "logits": model.logits(x_B1D)[:, 0],
            "tokens": loop["tokens"].at[:, step].set(tokens_B),
            "logprobs": loop["logprobs"].at[:, step].set(logprobs_B),
            "counts": loop["counts"] + (~stops_B).astype(jnp.int32),
            "stopped": stops_B,
        }

    empty = lengths_B == 0  # rows that fill up the batch are finished before they start
    loop = jax.lax.while_loop(unfinished, one, {
        "step": jnp.zeros((), jnp.int32), "cache": cache, "logits": logits_BV,
        "tokens": jnp.zeros((rows, new), jnp.int32), "logprobs": jnp.zeros((rows, new), jnp.float32),
        "counts": jnp.zeros(rows, jnp.int32), "stopped": empty,
    })  # fmt: skip
    return loop["tokens"], loop["logprobs"], loop["counts"], loop["stopped"]


def _draw(key, logits_V, step, settings: Settings):
    if settings.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    scaled_V = logits_V / settings.temperature
    if settings.top_k:
        kth = jax.lax.top_k(scaled_V, min(settings.top_k, scaled_V.shape[0]))[0][-1]
        scaled_V = jnp.where(scaled_V < kth, -jnp.inf, scaled_V)
    if settings.top_p < 1:
        sorted_V = jnp.sort(scaled_V, descending=True)
        before_V = jnp.cumsum(jax.nn.softmax(sorted_V)) - jax.nn.softmax(sorted_V)
        # The smallest set that reaches top_p: a token stays if those above it do not reach it yet.
        threshold = jnp.min(jnp.where(before_V < settings.top_p, sorted_V, jnp.inf))
        scaled_V = jnp.where(scaled_V < threshold, -jnp.inf, scaled_V)
    return jax.random.categorical(jax.random.fold_in(key, step), scaled_V).astype(jnp.int32)
