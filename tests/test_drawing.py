"""Drawing follows the distribution asked for, by a chi-square test, and keeps what transformers' rules keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gemma_tpu.sampling import drawing
from gemma_tpu.sampling.drawing import Settings

DRAWS = 4000
LOGITS = np.random.default_rng(8).normal(size=24).astype(np.float32) * 1.5


def draws(seed: int = 1, logits: np.ndarray = LOGITS, seen=None, **settings) -> np.ndarray:
    """Many draws from LOGITS, each with a key of its own, by the function that sampling draws with."""
    asked = Settings(**settings)
    keys_B2 = np.random.default_rng(seed).integers(0, 2**32, (DRAWS, 2), np.uint32)
    logits_BV = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    drawn_B = jnp.zeros(DRAWS, jnp.int32)
    run = jax.jit(lambda: drawing.draw(logits_BV, seen, keys_B2, drawn_B, asked.rules, asked.numbers))
    return np.asarray(run()[0])


def softmax(logits_V: np.ndarray, temperature: float) -> np.ndarray:
    scaled_V = (logits_V.astype(np.float64) - logits_V.max()) / temperature
    return np.exp(scaled_V) / np.exp(scaled_V).sum()


def fits(drawn: np.ndarray, probability_V: np.ndarray) -> float:
    """p of a chi-square test: the likely tokens each, the unlikely ones together."""
    expected_V = probability_V / probability_V.sum() * len(drawn)
    counted_V = np.bincount(drawn, minlength=len(expected_V))
    likely_V = expected_V >= 8
    assert likely_V.sum() >= 3 and counted_V[expected_V == 0].sum() == 0
    observed, expected = (np.append(of[likely_V], of[~likely_V].sum()) for of in (counted_V, expected_V))
    kept = expected > 0
    return stats.chisquare(observed[kept], expected[kept]).pvalue


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawing_follows_the_softmax_at_its_temperature(temperature):
    drawn = draws(temperature=temperature)
    assert fits(drawn, softmax(LOGITS, temperature)) > 1e-3
    assert fits(drawn, softmax(LOGITS, temperature * 1.3)) < 1e-6, "the test can tell"


@pytest.mark.parametrize("k", [pytest.param(2, marks=pytest.mark.slow), 9, 24, 1000])
def test_top_k_draws_the_k_likeliest_and_no_other(k):
    allowed = np.argsort(-LOGITS)[:k]
    probability_V = np.zeros(24)
    probability_V[allowed] = softmax(LOGITS, 1.5)[allowed]
    drawn = draws(temperature=1.5, top_k=k)
    assert set(drawn) <= set(allowed)
    if k > 2:
        assert fits(drawn, probability_V) > 1e-3


@pytest.mark.parametrize("p", [0.3, 0.6, 0.95])
def test_top_p_draws_the_smallest_set_that_reaches_p_and_no_other(p):
    probability_V = softmax(LOGITS, 1.5)
    order = np.argsort(-probability_V)
    needed = int(np.searchsorted(np.cumsum(probability_V[order]), p)) + 1
    kept_V = np.zeros(24)
    kept_V[order[:needed]] = probability_V[order[:needed]]
    drawn = draws(temperature=1.5, top_p=p)
    assert set(drawn) == set(order[:needed])
    if needed > 2:
        assert fits(drawn, kept_V) > 1e-3


def test_top_p_is_the_same_when_every_draw_is_refused(monkeypatch):
    """The bisection alone, without the draws before it: p = 0.3 of 24 tokens refuses most of them anyway."""
    monkeypatch.setattr(drawing, "TRIES", 0)
    test_top_p_draws_the_smallest_set_that_reaches_p_and_no_other(0.6)


def test_top_p_counts_within_what_top_k_left():
    """Of 0.4 0.3 0.2 0.1, k = 2 leaves 4/7 and 3/7, so that p = 0.5 leaves the first alone."""
    logits_V = np.log(np.array([0.1, 0.3, 0.4, 0.2]))
    assert set(draws(logits=logits_V, temperature=1.0, top_k=2, top_p=0.5)) == {2}


@pytest.mark.parametrize("narrow", [
    {"top_p": 1e-6}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"top_k": 1}, {"min_p": 1.0})),
], ids=str)  # fmt: skip
def test_what_leaves_one_token_is_greedy(narrow):
    assert set(draws(temperature=1.0, **narrow)) == {LOGITS.argmax()}


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_min_p_leaves_out_what_is_below_its_share_of_the_likeliest(p):
    probability_V = softmax(LOGITS, 1.5)
    kept_V = np.where(probability_V >= p * probability_V.max(), probability_V, 0)
    drawn = draws(temperature=1.5, min_p=p)
    assert set(drawn) == set(np.flatnonzero(kept_V)) and 2 < len(set(drawn)) < 24
    assert fits(drawn, kept_V) > 1e-3


def test_the_rules_together_keep_what_transformers_keeps():
    torch = pytest.importorskip("torch")
    from transformers import generation

    seen_V = np.arange(24) % 3 == 0
    wanted = torch.tensor(LOGITS)[None]
    for rule in (
        generation.RepetitionPenaltyLogitsProcessor(1.3), generation.TemperatureLogitsWarper(1.5),
        generation.TopKLogitsWarper(15), generation.TopPLogitsWarper(0.9), generation.MinPLogitsWarper(0.1),
    ):  # fmt: skip
        wanted = rule(torch.tensor(np.flatnonzero(seen_V))[None], wanted)
    drawn = draws(temperature=1.5, top_k=15, top_p=0.9, min_p=0.1, repetition_penalty=1.3, seen=seen_V[None])
    assert fits(drawn, softmax(wanted[0].numpy(), 1.0)) > 1e-3
    assert set(drawn) == set(np.flatnonzero(np.isfinite(wanted[0].numpy())))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}], ids=str)
def test_a_large_vocabulary_is_drawn_from_as_well(settings):
    """5,000 tokens: several groups, the last of them not full. Tokens of a hundred likelihoods, counted together."""
    logits_V = np.random.default_rng(2).permutation(np.repeat(np.linspace(-3, 3, 100), 50))
    probability_V = softmax(logits_V, 1.0)
    if settings:
        above_V = np.array([probability_V[probability_V > p].sum() for p in probability_V])
        probability_V = np.where(above_V < 0.9, probability_V, 0)
    kind_V = np.unique(logits_V, return_inverse=True)[1]
    drawn = kind_V[draws(logits=logits_V, temperature=1.0, **settings)]
    assert fits(drawn, np.bincount(kind_V, probability_V)) > 1e-3


def test_the_logprob_of_a_greedy_token_is_the_largest():
    rules, numbers = Settings().rules, Settings().numbers
    keys, drawn = jnp.zeros((1, 2), jnp.uint32), jnp.zeros(1, jnp.int32)
    token, logprob = drawing.draw(jnp.asarray(LOGITS)[None], None, keys, drawn, rules, numbers)
    assert int(token[0]) == LOGITS.argmax()
    assert float(logprob[0]) == pytest.approx(np.log(softmax(LOGITS, 1.0).max()), abs=1e-6)


def test_a_token_without_probability_is_never_drawn_whatever_the_rounding():
    p_BV = np.zeros((64, 40), np.float32)
    p_BV[:, [3, 17]] = 1e-7, 1.0
    u_B = np.linspace(0, 1, 64, dtype=np.float32)
    assert set(np.asarray(drawing._pick(jnp.asarray(p_BV), jnp.asarray(u_B)))) <= {3, 17}
