"""The next token of every row by rules of its own: what a server draws, whose rows are strangers to each other.

One program for all: greedy rows beside drawn ones, each with its temperature, top_k, top_p, min_p and penalty. What
no row asks for costs nothing. The same settings give the token that `drawing` gives.

Letters: B rows, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tpu.sampling import drawing
from gemma_tpu.sampling.drawing import Numbers, Rules, Span

COMPILED = Rules(draws=True, top_k=0, top_p=True, min_p=True, penalty=True)  # what must be ready for any row


Given = Any  # an array: numpy's where a caller fills it in, JAX's inside of the program


class RowNumbers(NamedTuple):
    temperature_B: Given  # 0: greedy
    top_k_B: Given  # 0: all tokens
    top_p_B: Given
    min_p_B: Given
    penalty_B: Given  # 1: none


def draw(
    logits_BV: jax.Array, seen_BV: jax.Array, keys_B2: jax.Array, drawn_B: jax.Array, numbers: RowNumbers
) -> tuple[jax.Array, jax.Array]:
    """(token, the model's own log-probability of it), as `drawing.draw` gives them."""
    penalty_B1 = numbers.penalty_B[:, None]
    held_BV = drawing.penalise(logits_BV, seen_BV, penalty_B1)
    greedy_B = drawing.likeliest(held_BV)
    draws_B = numbers.temperature_B > 0

    def drawn() -> jax.Array:
        x_BV = jax.lax.cond(jnp.any(numbers.top_k_B > 0), lambda: _cut(held_BV, numbers.top_k_B), lambda: held_BV)
        warm_B1 = jnp.where(draws_B, numbers.temperature_B, 1.0)[:, None]
        of_rows = Numbers(warm_B1, numbers.top_p_B, numbers.min_p_B[:, None], penalty_B1)
        return drawing.at_random(x_BV, keys_B2, drawn_B, COMPILED, of_rows)

    token_B = jnp.where(draws_B, jax.lax.cond(jnp.any(draws_B), drawn, lambda: greedy_B), greedy_B)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B, logit_B - jax.nn.logsumexp(logits_BV, axis=1)


def _cut(x_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Minus infinity below the k-th largest of each row, whose k is no constant: found by halving the range of what
    it can be, 32 times."""
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.int32)
    order_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # integers that sort like the floats
    wanted_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, x_BV.shape[1]), x_BV.shape[1])

    def halve(_: jax.Array, span: Span) -> Span:
        low_B, high_B = span  # enough tokens are at least this, too few
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, which the sum of two could not hold
        enough_B = jnp.sum(order_BV >= middle_B[:, None], axis=1) >= wanted_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    low_B, high_B = jnp.min(order_BV, axis=1), jnp.max(order_BV, axis=1)
    low_B, _ = jax.lax.fori_loop(0, 32, halve, (low_B, high_B + 1))
    return jnp.where(order_BV >= low_B[:, None], x_BV, -jnp.inf)
