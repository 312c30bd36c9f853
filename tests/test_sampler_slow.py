"""Greedy tokens of every tiny architecture are those of transformers, 200 prompts each, in mixed batches."""

import warnings

import helpers
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_tpu
from gemma_tpu.sampling.sampler import Sampler, Settings
from gemma_tpu.tiny.checkpoint import ARCHS, write_tiny
from gemma_tpu.tiny.tokenizer import SPECIAL

pytestmark = pytest.mark.slow
PROMPTS, NEW, ROWS = 200, 12, 16
MEDIA = [SPECIAL[name] for name in ("<|image|>", "<|audio|>", "<|video|>")]
GAP = 1e-4  # of the reference's two largest logits: closer ones may change places by rounding


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_greedy_tokens_are_those_of_transformers(arch, tmp_path):
    """Prompts of 30 lengths from one token to twice the window, mixed; every tenth is a neighbour's beginning."""
    pytest.importorskip("torch")
    folder = without_media(write_tiny(tmp_path / "model", arch, dtype="float32"))
    model = gemma_tpu.load(folder)
    rng = np.random.default_rng(1)
    window = min(layer.window for layer in model.arch.layers if layer.window)
    lengths = rng.choice(rng.integers(1, 2 * window + 1, 30), PROMPTS)
    prompts = [row.tolist() for row in helpers.random_rows(lengths, model.arch.vocab, seed=2)]
    for number in range(10, PROMPTS, 10):
        prompts[number] = prompts[number - 1][: len(prompts[number - 1]) // 2 + 1]
    assert sum(len(prompt) > window for prompt in prompts) >= 50
    asked = Sampler(model, rows=ROWS)
    ours = asked.run(prompts, (), Settings(max_new_tokens=NEW))
    assert asked.stats.programs == {"prefill": 1, "decode": 1}
    assert {len(one.tokens) for one in ours} == {NEW}
    excused = 0
    wanted = greedy(helpers.reference(folder), prompts)
    for number, (one, (theirs, gaps)) in enumerate(zip(ours, wanted, strict=True)):
        assert not set(theirs) & set(MEDIA)
        if one.tokens != theirs:
            step = next(i for i in range(NEW) if one.tokens[i] != theirs[i])
            print(f"{arch}, prompt {number}, step {step}: {one.tokens[step]}, theirs {theirs[step]}, "
                  f"{gaps[step]:.1e} ahead")  # fmt: skip
            assert gaps[step] < GAP
            excused += 1
    print(f"{arch}: {PROMPTS - excused} of {PROMPTS} prompts the same, {excused} excused")


def without_media(folder):
    """A model that never says that a picture follows: where a random one does, the reference wants the picture and
    embeds padding in its place. The rows of these tokens are zero, in the embedding that is the head too."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("embed_tokens.weight")]:
            tensors[name] = tensors[name].copy()
            tensors[name][MEDIA] = 0
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


def greedy(model, prompts):
    """What the reference continues each prompt with, and how far its largest logit is ahead of the next at each
    step. Prompts of one length go together: no padding comes into the reference."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # models as small as these wait longer for a second thread than it helps
    model.generation_config.eos_token_id = None
    how = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    found = {}
    for length in {len(prompt) for prompt in prompts}:
        mine = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[number] for number in mine])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        top_tb2 = torch.stack(out.logits).topk(2).values
        gaps_bt = (top_tb2[..., 0] - top_tb2[..., 1]).T
        for at, number in enumerate(mine):
            found[number] = out.sequences[at, length:].tolist(), gaps_bt[at].tolist()
    return [found[number] for number in range(len(prompts))]
