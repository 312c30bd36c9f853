"""Greedy tokens of every tiny architecture are those of transformers, 200 prompts each, in mixed batches."""

import warnings

import helpers
import numpy as np
import pytest

import gemma_tpu
from gemma_tpu.sampler import Sampler, Settings
from gemma_tpu.tiny import ARCHS, write_tiny

pytestmark = pytest.mark.slow
PROMPTS, NEW, ROWS = 200, 12, 16
GAP = 1e-4  # of the reference's two largest logits: closer ones may change places by rounding


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_greedy_tokens_are_those_of_transformers(arch, tmp_path):
    """Prompts of 1 to 150 tokens where the window is 64; every tenth is a neighbour's beginning."""
    torch = pytest.importorskip("torch")
    folder = write_tiny(tmp_path / "model", arch, dtype="float32")
    model = gemma_tpu.load(folder)
    lengths = np.random.default_rng(1).integers(1, 151, PROMPTS)
    prompts = [row.tolist() for row in helpers.random_rows(lengths, model.arch.vocab, seed=2)]
    for number in range(10, PROMPTS, 10):
        prompts[number] = prompts[number - 1][: len(prompts[number - 1]) // 2 + 1]
    window = min(layer.window for layer in model.arch.layers if layer.window)
    assert sum(len(prompt) > window for prompt in prompts) >= 50
    asked = Sampler(model, rows=ROWS)
    ours = asked.run(prompts, (), Settings(max_new_tokens=NEW))
    assert asked.stats.programs == {"prefill": 1, "decode": 1}
    theirs = helpers.reference(folder)
    theirs.generation_config.eos_token_id = None
    how = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    excused = 0
    for number, (prompt, mine) in enumerate(zip(prompts, ours, strict=True)):
        ids = torch.tensor([prompt])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)
        wanted = out.sequences[0, len(prompt) :].tolist()
        assert len(wanted) == len(mine.tokens) == NEW
        if mine.tokens != wanted:
            step = next(i for i in range(NEW) if mine.tokens[i] != wanted[i])
            top = out.logits[step][0].topk(2).values
            gap = float(top[0] - top[1])
            print(f"{arch}, prompt {number}, step {step}: {mine.tokens[step]}, theirs {wanted[step]}, {gap:.1e} ahead")
            assert gap < GAP
            excused += 1
    print(f"{arch}: {PROMPTS - excused} of {PROMPTS} prompts the same, {excused} excused")
