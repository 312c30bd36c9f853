"""How the next token is drawn from the logits: repetition penalty, temperature, top-k, top-p, min-p, in this order.

Top-p needs no sorted vocabulary. A token is drawn from the whole distribution and kept if the tokens above it do not
reach p already, which holds for all but 1 - p of the draws; what is drawn again is drawn from the same distribution,
so the kept tokens have exactly the cut one. After TRIES refusals the cut itself is found, by bisection over the bits
of a float. Each sample has a key of its own, and its random numbers depend on nothing else.

Letters: B rows, V vocabulary, g groups of h tokens each, t tries, N stop ids.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_tpu.errors import UserError

TRIES = 6

Span = tuple[jax.Array, jax.Array]  # of a bisection, for each row: the lower end, the upper end
Tries = tuple[jax.Array, jax.Array, jax.Array]  # how many, the token of each row, whether it is kept


@dataclass(frozen=True)
class Settings:
    """What a user asks for. Temperature 0 is greedy; the others, as they stand here, leave the distribution whole."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}: it must be at least 1"),
                (not 0 <= self.temperature < math.inf, f"temperature is {self.temperature}: it must be at least 0"),
                (self.top_k < 0, f"top_k is {self.top_k}: it must be at least 0 (0: all tokens)"),
                (not 0 < self.top_p <= 1, f"top_p is {self.top_p}: it must be above 0 and at most 1"),
                (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}: it must be from 0 to 1"),
                (not 0 < self.repetition_penalty < math.inf,
                 f"repetition_penalty is {self.repetition_penalty}: it must be above 0 (1: none)"),
            )
            if bad
        ]  # fmt: skip
        if wrong:
            raise UserError("; ".join(wrong))

    @property
    def rules(self) -> "Rules":
        draws = self.temperature > 0
        return Rules(draws, self.top_k if draws else 0, draws and self.top_p < 1, draws and self.min_p > 0,
                     self.repetition_penalty != 1)  # fmt: skip

    @property
    def numbers(self) -> "Numbers":
        return Numbers(*(jnp.float32(x) for x in (self.temperature or 1.0, self.top_p, self.min_p,
                                                  self.repetition_penalty)))  # fmt: skip


class Rules(NamedTuple):
    """What of it is compiled; the numbers may change without a new program."""

    draws: bool
    top_k: int
    top_p: bool
    min_p: bool
    penalty: bool


class Numbers(NamedTuple):
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array


def draw(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B2: jax.Array, drawn_B: jax.Array, rules: Rules,
    numbers: Numbers,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(token, the model's own log-probability of it). `seen_BV` is kept for a penalty only; `drawn_B` counts the
    tokens that a sample has already."""
    chosen_BV = logits_BV
    if rules.penalty:
        assert seen_BV is not None
        chosen_BV = penalise(logits_BV, seen_BV, numbers.penalty)
    token_B = at_random(chosen_BV, keys_B2, drawn_B, rules, numbers) if rules.draws else likeliest(chosen_BV)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B, logit_B - jax.nn.logsumexp(logits_BV, axis=1)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    held_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, held_BV, logits_BV)


def likeliest(x_BV: jax.Array) -> jax.Array:
    """The first of the largest. As two plain reductions: the one over pairs that argmax means is slow on a CPU."""
    top_B1 = jnp.max(x_BV, axis=1, keepdims=True)
    index_V = jnp.arange(x_BV.shape[1], dtype=jnp.int32)
    return jnp.min(jnp.where(x_BV >= top_B1, index_V, x_BV.shape[1] - 1), axis=1)


def at_random(
    logits_BV: jax.Array, keys_B2: jax.Array, drawn_B: jax.Array, rules: Rules, numbers: Numbers
) -> jax.Array:
    x_BV = logits_BV / numbers.temperature
    if 0 < rules.top_k < x_BV.shape[1]:
        kth_B1 = jax.lax.top_k(x_BV, rules.top_k)[0][:, -1:]
        x_BV = jnp.where(x_BV < kth_B1, -jnp.inf, x_BV)
    p_BV = jnp.exp(x_BV - jnp.max(x_BV, axis=1, keepdims=True))
    allowed_BV = jnp.where(p_BV >= numbers.min_p, p_BV, 0.0) if rules.min_p else p_BV
    u_Bt = jax.vmap(_uniforms)(keys_B2, drawn_B)
    if not rules.top_p:
        return _pick(allowed_BV, u_Bt[:, 0])
    limit_B = numbers.top_p * _sum(p_BV)

    def unsure(loop: Tries) -> jax.Array:
        tries, _, kept_B = loop
        return (tries < TRIES) & ~jnp.all(kept_B)

    def again(loop: Tries) -> Tries:
        tries, token_B, kept_B = loop
        new_B = _pick(allowed_BV, jax.lax.dynamic_index_in_dim(u_Bt, tries, axis=1, keepdims=False))
        mine_B = jnp.take_along_axis(p_BV, new_B[:, None], axis=1)[:, 0]
        return tries + 1, jnp.where(kept_B, token_B, new_B), kept_B | (_above(p_BV, mine_B) < limit_B)

    zeros_B = jnp.zeros(x_BV.shape[:1], jnp.int32)
    _, token_B, kept_B = jax.lax.while_loop(unsure, again, (jnp.int32(0), zeros_B, zeros_B > 0))

    def cut() -> jax.Array:
        nucleus_BV = jnp.where(p_BV >= _threshold(p_BV, limit_B)[:, None], allowed_BV, 0.0)
        return jnp.where(kept_B, token_B, _pick(nucleus_BV, u_Bt[:, TRIES]))

    chosen_B: jax.Array = jax.lax.cond(jnp.all(kept_B), lambda: token_B, cut)
    return chosen_B


def _uniforms(key_2: jax.Array, drawn: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), drawn)
    return jax.random.uniform(key, (TRIES + 1,))


def _threshold(p_BV: jax.Array, limit_B: jax.Array) -> jax.Array:
    """The smallest value that the tokens above it do not carry to the limit: what is at least this is the nucleus."""
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)  # positive floats sort like their bits

    def halve(_: jax.Array, span: Span) -> Span:
        low_B, high_B = span  # too low, good
        middle_B = (low_B + high_B) // 2
        good_B = _above(p_BV, jax.lax.bitcast_convert_type(middle_B, jnp.float32)) < limit_B
        return jnp.where(good_B, low_B, middle_B), jnp.where(good_B, middle_B, high_B)

    high_B = jnp.max(bits_BV, axis=1)
    high_B = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(high_B, -1), high_B))[1]
    return jax.lax.bitcast_convert_type(high_B, jnp.float32)


def _above(p_BV: jax.Array, value_B: jax.Array) -> jax.Array:
    """The mass of the tokens that are likelier than this."""
    return _sum(jnp.where(p_BV > value_B[:, None], p_BV, 0.0))


def _sum(p_BV: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sum(_grouped(p_BV), axis=1), axis=1)


def _grouped(p_BV: jax.Array) -> jax.Array:
    """[B, g, h]: sums over groups first round less, and are no chain of additions that each wait for the last."""
    B, V = p_BV.shape
    h = 1 << (math.isqrt(V - 1).bit_length() if V > 1 else 0)
    return jnp.pad(p_BV, ((0, 0), (0, -V % h))).reshape(B, -1, h)


def _pick(p_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The token where the running sum of p passes u of the whole: first its group, then its place there."""
    p_Bgh = _grouped(p_BV)
    sums_Bg = jnp.sum(p_Bgh, axis=2)
    cumulated_Bg = jnp.cumsum(sums_Bg, axis=1)
    group_B, below_B = _crossing(sums_Bg, cumulated_Bg, u_B * cumulated_Bg[:, -1])
    p_Bh = jnp.take_along_axis(p_Bgh, group_B[:, None, None], axis=1)[:, 0]
    place_B, _ = _crossing(p_Bh, jnp.cumsum(p_Bh, axis=1), u_B * cumulated_Bg[:, -1] - below_B)
    return group_B * p_Bgh.shape[2] + place_B


def _crossing(p_Bn: jax.Array, cumulated_Bn: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the first place with p > 0 whose running sum is above the target, the sum before it); where rounding leaves
    none, the last with p > 0."""
    index_n = jnp.arange(p_Bn.shape[1], dtype=jnp.int32)
    last_B = jnp.max(jnp.where(p_Bn > 0, index_n, 0), axis=1)
    passed_Bn = (p_Bn > 0) & (cumulated_Bn > target_B[:, None])
    place_B = jnp.minimum(jnp.min(jnp.where(passed_Bn, index_n, p_Bn.shape[1]), axis=1), last_B)
    at_B1 = place_B[:, None]
    below_B1 = jnp.take_along_axis(cumulated_Bn, at_B1, axis=1) - jnp.take_along_axis(p_Bn, at_B1, axis=1)
    return place_B, below_B1[:, 0]
