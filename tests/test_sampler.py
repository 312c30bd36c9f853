"""Sampling: greedy is the argmax of the plain forward pass, drawing follows the distribution asked for."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from test_drawing import softmax

import gemma_tpu
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import kv_cache
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.sampling import sampler
from gemma_tpu.sampling.sampler import Sampler, Settings, generate

LENGTHS = (5, 30, 17, 64, 1, 70)  # the window is 16
NEW = 20
NEVER = (1022, 1023)
rng = np.random.default_rng(3)
PROMPTS = [rng.integers(8, 1000, n).tolist() for n in LENGTHS]
SHORT = PROMPTS[:5]


@pytest.fixture(scope="module")
def model(base32):
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


# --- drawing -------------------------------------------------------------------------------------------------


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


def test_other_numbers_seeds_and_stop_tokens_compile_nothing_new(model, drawn):
    asked = Sampler(model, rows=4)
    for seed in range(3):
        settings = Settings(max_new_tokens=NEW, temperature=2.0 + seed, top_k=900, seed=seed)
        asked.run(SHORT, (1021, seed, *range(seed)), settings)
        assert asked.stats.programs == {"prefill": 1, "decode": 1}


@pytest.mark.slow
def test_a_sample_does_not_depend_on_what_else_is_asked_for(model, drawn):
    settings = Settings(max_new_tokens=NEW, temperature=2.0, top_k=900, seed=5)
    asked = [SHORT[3], PROMPTS[5], SHORT[1], SHORT[1], SHORT[1]]
    found = generate(model, asked, NEVER, settings, rows=2)
    assert found[0].tokens == drawn[3].tokens and found[2].tokens == drawn[1].tokens
    third = generate(model, [SHORT[1]], NEVER, settings, rows=2, numbers=[2])
    assert third[0].tokens == found[4].tokens, "asked for alone, as a resumed evaluation does"


def test_a_repetition_penalty_holds_for_the_prompt_and_for_what_was_drawn(model, greedy):
    settings = Settings(max_new_tokens=NEW, repetition_penalty=1e6)
    for prompt, made in zip(PROMPTS, generate(model, PROMPTS, NEVER, settings, rows=4), strict=True):
        assert not set(made.tokens) & set(prompt) and len(set(made.tokens)) == NEW
    assert any(len(set(made.tokens)) < NEW for made in greedy), "without it, they repeat"


# --- the batch ----------------------------------------------------------------------------------------------


def test_samples_share_the_prefill_of_their_prompt_and_prompts_share_sheets(model):
    asked, wanted = Sampler(model, rows=3), [prompt for prompt in PROMPTS for _ in range(4)]
    made = asked.run(wanted, NEVER, Settings(max_new_tokens=4, temperature=1.0))
    assert len(made) == 24
    assert asked.stats.prompts == len(PROMPTS) and asked.stats.sheets < len(PROMPTS)
    assert asked.stats.tokens == 24 * 4


def test_rows_are_refilled_as_sequences_end(model, greedy):
    """Six sequences of 1 to 20 tokens in two rows take hardly more steps than their tokens divided by two."""
    asked, limits = Sampler(model, rows=2), [20, 3, 5, 4, 7, 1]
    made = asked.run(PROMPTS, NEVER, Settings(max_new_tokens=NEW), limits=limits)
    assert [one.tokens for one in made] == [one.tokens[:n] for one, n in zip(greedy, limits, strict=True)]
    assert asked.stats.steps <= sum(limits) / 2 + 4 and asked.stats.busy > 0.75


def test_local_layers_keep_their_window_and_no_more(model):
    arch = model.arch
    rings = kv_cache.empty(arch, 3, 256, model.dtype)
    for block, of_block in zip(arch.blocks, rings, strict=True):
        for layer, parts in zip(block.period, of_block, strict=True):
            slots = 256 if layer.window is None else 16
            assert sum(len(k) for k, _ in parts) == block.repeats
            for k, v in parts:
                assert k.shape[3:] == (layer.head_dim, slots) and v.shape[3:] == (slots, layer.head_dim)


def test_tokens_are_told_as_they_come_and_can_be_stopped(model, greedy):
    seen: dict[int, list[int]] = {}
    done = []
    made = generate(
        model, SHORT, NEVER, Settings(max_new_tokens=NEW), rows=4,
        on_tokens=lambda i, tokens: seen.setdefault(i, []).append(len(tokens)),
        on_done=lambda i, one: done.append(i), until=lambda tokens: 11 if len(tokens) >= 11 else None,
    )  # fmt: skip
    assert [one.tokens for one in made] == [one.tokens[:11] for one in greedy[:5]]
    assert all(one.finish_reason == "stop" and len(one.logprobs) == 11 for one in made)
    assert sorted(done) == list(range(5)) and all(counts[0] < 11 for counts in seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tp": 2}, {"tp": 4}, {"fsdp": 4}], ids=str)
def test_a_mesh_of_four_completes_like_one_device(base32, greedy, drawn, sizes):
    model = gemma_tpu.load(base32, mesh=meshes.build(sizes))
    asked = Sampler(model, rows=6)
    made = asked.run(PROMPTS, NEVER, Settings(max_new_tokens=NEW))
    assert [one.tokens for one in made] == [one.tokens for one in greedy]
    assert asked.rows % sizes.get("fsdp", 1) == 0 and asked.stats.programs == {"prefill": 1, "decode": 1}
    settings = Settings(max_new_tokens=NEW, temperature=2.0, top_k=900, seed=5)
    assert [one.tokens for one in asked.run(SHORT, NEVER, settings)] == [one.tokens for one in drawn]


# --- refused ------------------------------------------------------------------------------------------------


def test_limits_beyond_the_maximum_are_refused(model):
    with pytest.raises(UserError, match="limits must be from 1 to max_new_tokens"):
        generate(model, SHORT[:1], NEVER, Settings(max_new_tokens=NEW), limits=[NEW + 1])


def test_wrong_settings_are_named_all_at_once():
    with pytest.raises(UserError) as refused:
        Settings(0, temperature=-1.0, top_k=-2, top_p=0.0, min_p=1.5, repetition_penalty=0)
    for text in ("max_new_tokens is 0", "temperature is -1.0", "top_k is -2", "top_p is 0.0", "min_p is 1.5",
                 "repetition_penalty is 0"):
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
    assert seen[-1] == (6, 6) and seen == sorted(seen)
