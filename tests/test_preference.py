"""Losses on pairs against their formulas in torch, the reference without a second model, and whole runs on pairs."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import QUICK, SMALL, load, logits, loss_and_grads, micro_batches, random_rows, relative_error, sheet
from runs_helper import run_config, train

from gemma_tpu.data.batches import make_loader
from gemma_tpu.data.pairs import PairRows
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.schema import DataConfig, PreferenceConfig
from gemma_tpu.step import preference

LOSSES = {
    "dpo": PreferenceConfig("dpo", beta=0.3), "dpo_norm": PreferenceConfig("dpo_norm", beta=2.0),
    "ipo": PreferenceConfig("ipo", beta=0.5), "simpo": PreferenceConfig("simpo", beta=2.0, margin=0.5),
}  # fmt: skip


def pairs_batch(vocab):
    """Two pairs on the first sheet, one on the second; chosen before rejected."""
    rows = random_rows([14, 11, 9, 12, 20, 17], vocab)
    return sheet([rows[:4], rows[4:]], 48, first_target=4)


def by_torch(section, policy, reference, batch):
    """The mean loss, from two sets of logits, segment by segment."""
    import torch

    losses = []
    for row in range(2):
        scores = []
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            seen = (batch["segment_ids"][row] == segment) & (batch["weights"][row] > 0)
            targets = torch.tensor(batch["targets"][row][seen]).long()[:, None]
            own, base = (x[row][seen].log_softmax(-1).gather(1, targets).sum() for x in (policy, reference))
            score = own if section.loss == "simpo" else own - base
            scores.append(score if section.loss == "dpo" else score / seen.sum())
        for chosen, rejected in zip(scores[::2], scores[1::2], strict=True):
            delta = chosen - rejected
            losses.append((delta - 1 / (2 * section.beta)) ** 2 if section.loss == "ipo"
                          else -torch.nn.functional.logsigmoid(section.beta * delta - section.margin))  # fmt: skip
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in LOSSES if name != "dpo")]
)
def test_the_loss_is_the_formulas(tiny, name):
    torch = pytest.importorskip("torch")
    folder = tiny(**SMALL)
    model, section = load(folder, rank=3), LOSSES[name]
    model.objective = preference.Pairs(section)
    batch = pairs_batch(model.arch.vocab)
    policy, reference = (torch.tensor(logits(one, batch["tokens"], batch["segment_ids"], batch["positions"]))
                         for one in (model, load(folder)))  # fmt: skip
    wanted = by_torch(section, policy, reference, batch).item()
    batches = {name: x[None] for name, x in batch.items()}
    loss, grads = loss_and_grads(model, batches)
    assert abs(loss - wanted) <= 1e-5
    assert max(np.abs(grad).max() for grad in grads.values()) > 1e-4
    in_two, again = loss_and_grads(model, micro_batches(batch, 2))
    assert abs(in_two - wanted) <= 1e-5
    for path, grad in grads.items():
        assert relative_error(again[path], grad) <= 1e-4, path


@pytest.mark.slow
def test_the_gradient_predicts_the_change_of_the_loss(tiny):
    from gemma_tpu.step import step

    model = load(tiny(**SMALL), rank=3)
    model.objective = preference.Pairs(LOSSES["dpo"])
    batch = micro_batches(pairs_batch(model.arch.vocab))
    _, grads = loss_and_grads(model, batch)
    parts, trained = step.take_apart(model)
    norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
    run = jax.jit(lambda trained: step.mean_loss_and_grads(parts, trained, parts.frozen, batch)[0],
                  compiler_options=QUICK)  # fmt: skip
    moved = [float(run({path: x + sign * 0.02 * grads[path] / norm for path, x in trained.items()}))
             for sign in (1, -1)]  # fmt: skip
    assert (moved[0] - moved[1]) / 0.04 == pytest.approx(norm, rel=0.02)


def test_with_the_adapter_off_the_model_is_its_base_and_keeps_its_adapter(tiny):
    folder = tiny(**SMALL)
    model = load(folder, rank=3)
    tokens = random_rows([16], SMALL["vocab"])[0][None]
    before = logits(model, tokens)
    bare = logits(preference.without_adapter(model), tokens)
    np.testing.assert_allclose(bare, logits(load(folder), tokens), atol=1e-6)
    np.testing.assert_array_equal(before, logits(model, tokens))
    assert np.abs(before - bare).max() > 0.1


def test_at_the_start_policy_and_reference_agree_and_every_pair_costs_ln_2(tiny):
    model = load(tiny(**SMALL), rank=3)
    from gemma_tpu.gemma import loading

    zeros = {path: np.zeros(v.shape, np.float32) for path, v in loading.variables(model).items()
             if path.endswith("lora_b")}  # fmt: skip
    loading.assign(model, zeros)
    model.objective = preference.Pairs(LOSSES["dpo"])
    loss, _ = loss_and_grads(model, micro_batches(pairs_batch(model.arch.vocab)))
    assert loss == pytest.approx(np.log(2), abs=1e-5)


# --- rows --------------------------------------------------------------------------------------------------


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(number, better="yes, certainly", worse="no"):
    return {"prompt": f"Is {number} a number?", "chosen": better, "rejected": worse}


def test_both_forms_of_a_pair_are_the_same_pair(base32, tmp_path):
    messages = [{"role": "user", "content": "Is 1 a number?"}]
    long = {side: [*messages, {"role": "assistant", "content": text}] for side, text in
            (("chosen", "yes, certainly"), ("rejected", "no"))}  # fmt: skip
    file = written(tmp_path / "pairs.jsonl", [pair(1), long, {**pair(1), "prompt": messages}])
    rows = PairRows(DataConfig(path=str(file), max_seq_len=128), Tokenizer(base32))
    assert len(rows) == 3
    for other in rows.pairs[1:]:
        for one, two in zip(rows.pairs[0], other, strict=True):
            np.testing.assert_array_equal(one[0], two[0])
            np.testing.assert_array_equal(one[1], two[1])


def test_pairs_stay_together_and_every_one_is_seen_once_an_epoch(base32, tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(["word"] * int(n)) for n in rng.integers(1, 30, 40)]
    file = written(tmp_path / "pairs.jsonl", [pair(i, text, "no " + text) for i, text in enumerate(texts)])
    rows = PairRows(DataConfig(path=str(file), max_seq_len=256), Tokenizer(base32))
    loader = make_loader(rows, max_seq_len=256, packing="pack", batch_size=1, accumulation=1, seed=3)
    seen = [pair for step in range(loader.steps_per_epoch) for pair in loader.rows_of(step)]
    assert sorted(seen) == list(range(len(rows))) and len(rows) > 30
    for step in range(loader.steps_per_epoch):
        batch = {name: leaf[0, 0] for name, leaf in loader[step].items()}
        sides = [side[0] for number in loader.rows_of(step) for side in rows.pairs[number]]
        for segment, ids in enumerate(sides, start=1):
            np.testing.assert_array_equal(batch["tokens"][batch["segment_ids"] == segment], ids)


def test_lines_that_are_no_pairs_are_named_and_what_is_dropped_is_counted(base32, tmp_path):
    section, tokenizer = DataConfig(path=str(tmp_path / "pairs.jsonl"), max_seq_len=128), Tokenizer(base32)
    bad = [pair(1), {"chosen": "yes"}, {**pair(2), "chosen": [{"role": "user", "content": "x"}]}, [1]]
    written(tmp_path / "pairs.jsonl", bad)
    rows = PairRows(section, tokenizer)
    assert len(rows) == 1 and all(f"pairs.jsonl:{line}" in rows.report() for line in (2, 3, 4))
    with pytest.raises(UserError) as error:
        PairRows(replace(section, strict=True), tokenizer)
    assert "3 of 4 rows cannot be used" in str(error.value)
    assert all(f"pairs.jsonl:{line}: " in str(error.value) for line in (2, 3, 4))
    written(tmp_path / "pairs.jsonl", [pair(1), pair(2, "same", "same"), pair(3, "long " * 200, "no")])
    rows = PairRows(section, tokenizer)
    assert len(rows) == 1 and "no_difference: 1 (pairs.jsonl:2)" in rows.report() and "overlong: 1" in rows.report()


# --- a run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, beta", [("dpo", 0.1), ("simpo", 2.0)])  # SimPO's scores are of a token, not of all
def test_a_run_on_pairs_learns_them_and_its_checkpoint_merges(base32, tmp_path, name, beta):
    import gemma_tpu

    file = written(tmp_path / "pairs.jsonl", [pair(number) for number in range(64)])
    run = run_config(base32, tmp_path / "run", "recipe=dpo.py", f"preference.loss={name}", f"data.path={file}",
                     f"preference.beta={beta}", "data.max_seq_len=128", "train.steps=12", "lora.dropout=0")  # fmt: skip
    train(run)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert name != "dpo" or losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    assert gemma_tpu.merge(tmp_path / "run")["tensors_changed"] > 0


def test_a_loss_without_its_recipe_is_refused(tmp_path):
    from gemma_tpu import config

    for wrong in ({"preference": {"loss": "dpo"}}, {"recipe": "dpo.py"}):
        with pytest.raises(UserError, match="preference.loss .* and recipe"):
            config.from_dict(wrong)
    with pytest.raises(UserError, match="train.method must be lora"):
        config.from_dict({"recipe": "dpo.py", "preference": {"loss": "dpo"}, "train": {"method": "full"}})
