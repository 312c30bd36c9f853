"""Sampling: greedy is the argmax of the plain forward pass, drawing follows the distribution asked for."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gemma_tpu
from gemma_tpu import sampler
from gemma_tpu.errors import UserError
from gemma_tpu.sampler import Settings, generate

LENGTHS = (5, 30, 17, 64, 1, 70)  # the window is 16 and a bucket 64: two programs
NEW = 20
NEVER = (1022, 1023)
rng = np.random.default_rng(3)
PROMPTS = [rng.integers(8, 1000, n).tolist() for n in LENGTHS]
SHORT = PROMPTS[:5]  # one bucket, one program


@pytest.fixture(scope="module")
def model(base32, compile_cache):
    return gemma_tpu.load(base32)


@pytest.fixture(scope="module")
def plain(model):
    """Logits after each of the given token rows, by the forward pass without a cache."""
    forward = jax.jit(lambda tokens_BT, segments_BT: model(tokens_BT, segments_BT))

    def last_logits(rows: list[list[int]]) -> np.ndarray:
        tokens_BT, segments_BT = np.zeros((2, len(LENGTHS), 100), np.int32)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row)], segments_BT[number, : len(row)] = row, 1
        logits_BTV = forward(tokens_BT, segments_BT)
        return np.stack([logits_BTV[number, len(row) - 1] for number, row in enumerate(rows)])

    return last_logits


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, NEVER, Settings(max_new_tokens=NEW), rows=4)


def test_greedy_is_the_argmax_of_the_plain_forward_pass_at_every_step(greedy, plain):
    """For prompts shorter and longer than the window, in rows of mixed length, two batches of them."""
    rows = [list(prompt) for prompt in PROMPTS]
    for step in range(NEW):
        logits_BV = plain(rows)
        logprobs_BV = logits_BV - np.log(np.exp(logits_BV).sum(-1, keepdims=True))
        for number, row in enumerate(rows):
            token = greedy[number].tokens[step]
            best = int(logits_BV[number].argmax())
            if token != best:
                gap = logits_BV[number, best] - logits_BV[number, token]
                assert gap < 1e-4, f"prompt {number}, step {step}: {token} instead of {best}, {gap:.2g} apart"
            assert greedy[number].logprobs[step] == pytest.approx(logprobs_BV[number, token], abs=1e-4)
            row.append(token)
    assert all(c.finish_reason == "length" and len(c.tokens) == len(c.logprobs) == NEW for c in greedy)
    assert len({tuple(c.tokens) for c in greedy}) == len(PROMPTS), "the prompts matter"


def test_greedy_is_what_transformers_generates(greedy, base32):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base32, dtype=torch.float32).eval()
    plainly = dict(do_sample=False, temperature=None, top_k=None, top_p=None, eos_token_id=None,
                   pad_token_id=0, return_dict_in_generate=True, output_logits=True)  # fmt: skip
    for prompt, ours in zip(PROMPTS, greedy, strict=True):
        tokens, seen = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
        out = theirs.generate(tokens, attention_mask=seen, max_new_tokens=NEW, **plainly)
        for step, token in enumerate(out.sequences[0, len(prompt) :].tolist()):
            if token != ours.tokens[step]:
                top = out.logits[step][0].topk(2).values
                assert float(top[0] - top[1]) < 1e-4, f"step {step}: {ours.tokens[step]}, theirs {token}"
                break


def test_the_adapter_changes_the_text_and_merging_does_not(whole_run, whole_merged, base32, greedy):
    settings = Settings(max_new_tokens=NEW)
    tuned = generate(gemma_tpu.load(base32, adapter=whole_run), SHORT, NEVER, settings, rows=4)
    merged = generate(gemma_tpu.load(whole_merged), SHORT, NEVER, settings, rows=4)
    assert [c.tokens for c in tuned] == [c.tokens for c in merged]
    assert [c.tokens for c in tuned] != [c.tokens for c in greedy[:5]]


# --- stopping -----------------------------------------------------------------------------------------------


def test_a_stop_token_ends_its_row_alone_and_is_not_part_of_it(model, greedy):
    stop = greedy[1].tokens[7]
    stopped = generate(model, SHORT, (1023, stop), Settings(max_new_tokens=NEW), rows=4)
    for before, after in zip(greedy[:5], stopped, strict=True):
        ends = stop in before.tokens
        want = before.tokens[: before.tokens.index(stop)] if ends else before.tokens
        assert after.tokens == want and after.finish_reason == ("stop" if ends else "length")
        np.testing.assert_allclose(after.logprobs, before.logprobs[: len(want)], atol=1e-5)
    assert len(stopped[1].tokens) <= 7 and stopped[1].finish_reason == "stop"
    assert any(c.finish_reason == "length" for c in stopped)


def test_a_row_that_stops_at_once_is_empty(model, greedy):
    first = generate(model, PROMPTS[:1], (1023, greedy[0].tokens[0]), Settings(max_new_tokens=NEW), rows=4)
    assert first == [sampler.Completion([], "stop", [])]


def test_no_prompts_give_no_completions(model):
    assert generate(model, [], NEVER, Settings()) == []


# --- drawing ------------------------------------------------------------------------------------------------

DRAWS = 4000
LOGITS = np.random.default_rng(8).normal(size=24).astype(np.float32) * 1.5


def draws(seed: int = 1, **settings) -> np.ndarray:
    """Many draws from LOGITS, by the function that `generate` draws with."""
    drawn = partial(sampler._draw, logits_V=jnp.asarray(LOGITS), step=0, settings=Settings(**settings))
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(jnp.arange(DRAWS))
    return np.asarray(jax.jit(jax.vmap(drawn))(keys))


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


@pytest.mark.parametrize("k", [2, 9, 24, 1000])
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


def test_top_p_counts_within_what_top_k_left():
    """Of 0.4 0.3 0.2 0.1, k = 2 leaves 4/7 and 3/7, so that p = 0.5 leaves the first alone."""
    logits_V = jnp.log(jnp.array([0.1, 0.3, 0.4, 0.2]))
    settings = Settings(temperature=1.0, top_k=2, top_p=0.5)
    drawn = {int(sampler._draw(jax.random.key(n), logits_V, 0, settings)) for n in range(50)}
    assert drawn == {2}


def test_top_p_of_next_to_nothing_is_greedy():
    for narrow in ({"top_p": 1e-6}, {"top_k": 1}):
        assert set(draws(temperature=1.0, **narrow)) == {LOGITS.argmax()}


@pytest.fixture(scope="module")
def drawn(model):
    settings = Settings(max_new_tokens=NEW, temperature=2.0, top_k=900, seed=5)
    return generate(model, SHORT, NEVER, settings, rows=4)


def test_the_logprob_is_the_models_own_whatever_the_temperature(drawn, plain):
    """Of every token, so also: each was drawn given all that was drawn before it."""
    rows = [list(prompt) for prompt in SHORT]
    for step in range(NEW):
        logits_BV = plain(rows)
        for number, row in enumerate(rows):
            token = drawn[number].tokens[step]
            want = np.log(softmax(logits_BV[number], 1.0)[token])
            assert drawn[number].logprobs[step] == pytest.approx(want, abs=1e-4)
            row.append(token)


def test_the_same_seed_gives_the_same_text_in_whatever_rows_it_stands(model, drawn):
    settings = Settings(max_new_tokens=NEW, temperature=2.0, top_k=900, seed=5)
    again = generate(model, SHORT, NEVER, settings, rows=7)
    assert [c.tokens for c in again] == [c.tokens for c in drawn]
    other = generate(model, SHORT, NEVER, replace(settings, seed=6), rows=4)
    assert all(a.tokens != b.tokens for a, b in zip(drawn, other, strict=True))


def test_samples_of_one_prompt_differ_from_draw_to_draw(model):
    settings = Settings(max_new_tokens=NEW, temperature=2.0, top_k=900, seed=5)
    made = generate(model, [PROMPTS[1]] * 4, NEVER, settings, rows=4)
    assert len({tuple(c.tokens) for c in made}) == 4
    assert all(len(set(c.tokens)) > NEW // 2 for c in made), "each step draws anew"


def test_another_seed_or_stop_token_compiles_nothing_new(model, drawn):
    before = sampler._generate._cache_size()
    for seed in range(3):
        settings = Settings(max_new_tokens=NEW, temperature=2.0, top_k=900, seed=seed)
        generate(model, SHORT, (1021, seed), settings, rows=4)
    assert sampler._generate._cache_size() == before


# --- refused ------------------------------------------------------------------------------------------------


def test_wrong_settings_are_named_all_at_once():
    with pytest.raises(UserError) as refused:
        Settings(max_new_tokens=0, temperature=-1.0, top_k=-2, top_p=0.0)
    for text in ("max_new_tokens is 0", "temperature is -1.0", "top_k is -2", "top_p is 0.0"):
        assert text in str(refused.value)
    with pytest.raises(UserError, match="top_p is 1.5: it must be above 0 and at most 1"):
        Settings(top_p=1.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_temperature_that_is_no_number_is_refused(bad):
    with pytest.raises(UserError, match="temperature is"):
        Settings(temperature=bad)


def test_a_prompt_that_does_not_fit_is_refused_before_any_work(model):
    with pytest.raises(UserError, match="prompt has 4077 tokens; with 20 new ones .* context of 4096"):
        generate(model, [[5], [5] * 4077], NEVER, Settings(max_new_tokens=NEW))


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UserError, match="an empty prompt cannot be continued"):
        generate(model, [[5], []], NEVER, Settings(max_new_tokens=NEW))


def test_progress_counts_prompts(model):
    seen = []
    generate(model, PROMPTS, NEVER, Settings(max_new_tokens=NEW), rows=4, progress=lambda *a: seen.append(a))
    assert seen == [(4, 6), (6, 6)]
