"""Every kind of adapter against PEFT's own: forward, gradient, start, and the merge, on one device and on meshes."""

import warnings
from functools import partial

import jax
import numpy as np
import pytest
from helpers import (
    EVEN,
    QUICK,
    SEVEN,
    SMALL,
    largest_difference,
    load,
    logits,
    loss_and_grads,
    mesh_of,
    micro_batches,
    padded_rows,
    reference,
    reference_logits,
    relative_error,
)

from gemma_tpu.adapter import lora, lowrank, start
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading
from gemma_tpu.gemma.projection import LoRA
from gemma_tpu.schema import LoraConfig, Table
from gemma_tpu.step import step
from gemma_tpu.storage.shards import open_checkpoint

PATTERNS = dict(
    rank_pattern=Table({"mlp.up_proj": 5, r"layers\.2\..*q_proj": 2, "v_proj": 4}),
    alpha_pattern=Table({"down_proj": 9.0, r"layers\.[01]\..*o_proj": 2.0}),
)
KINDS = {
    "plain": {},
    "patterns": PATTERNS,
    "layers": dict(layers=(1, 2)),
    "rslora": dict(rslora=True),
    "dora": dict(dora=True),
    "pissa": dict(init="pissa"),
    "all at once": dict(PATTERNS, layers=(0, 1, 3), rslora=True, dora=True, init="pissa"),
}
THEIRS = {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "layers": "layers_to_transform",
          "rslora": "use_rslora", "dora": "use_dora"}  # fmt: skip


def adapted(folder, mesh, begun=False, **kind):
    """The model with every adapter tensor moved from where it started (or as it starts)."""
    section = LoraConfig(rank=3, alpha=4.5, **kind)
    model, checkpoint = loading.build(folder, dtype="float32")
    lora.inject_config(model, section)
    shardings, _ = loading.place(model, mesh)
    loading.load_base(model, checkpoint, shardings)
    start.begin(model, section, 0, shardings)
    values = {path: np.asarray(v[...]) for path, v in loading.variables(model, LoRA).items()}
    if not begun:
        values = moved(model, values)
        loading.assign(model, loading.put(values, shardings))
    return model, values, lora.record(model, section)


def moved(model, values):
    rng = np.random.default_rng(0)
    found = {}
    for site in lora.sites(model):
        for name in ("lora_a", "lora_b", "lora_magnitude"):
            if (path := f"{site.path}.{name}") not in values:
                continue
            noise = (0.1 * rng.standard_normal(values[path].shape)).astype(np.float32)
            if name == "lora_magnitude":
                found[path] = values[path] * (1 + noise)
            elif name == "lora_a":
                found[path] = values[path] + lora.within_ranks(site, noise)
            else:  # B's rank is its last dim: bring it where A has its own
                turned = np.moveaxis(noise, -1, len(site.b_dims))
                found[path] = values[path] + np.moveaxis(lora.within_ranks(site, turned), len(site.b_dims), -1)
    return values | found


def peft_model(folder, kind, adapters):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    asked = {THEIRS[name]: list(value) if name == "layers" else value for name, value in kind.items() if name in THEIRS}
    if "layers" in kind:
        asked["layers_pattern"] = "layers"
    start_as = "pissa" if kind.get("init") == "pissa" else True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=list(SEVEN), init_lora_weights=start_as, **asked)
        model = peft.get_peft_model(reference(folder), config)
    held = [name for name, _ in model.named_modules() if name.endswith(".lora_A.default")]
    assert len(held) == len(adapters)
    for hf, one in adapters.items():
        module = model.get_submodule("base_model.model." + hf.removesuffix(".weight"))
        assert module.scaling["default"] == pytest.approx(one.scale) and module.r["default"] == one.rank
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.tensor(one.a))
            module.lora_B["default"].weight.copy_(torch.tensor(one.b))
            if one.magnitude is not None:
                module.lora_magnitude_vector["default"].weight.copy_(torch.tensor(one.magnitude))
    return model.eval()


def peft_grads(model, batch):
    import torch

    tensors = {name: torch.tensor(x) for name, x in batch.items()}
    found = model(input_ids=tensors["tokens"].long(), attention_mask=(tensors["segment_ids"] > 0).long()).logits
    losses = torch.nn.functional.cross_entropy(
        found.flatten(0, 1), tensors["targets"].long().flatten(), reduction="none"
    )
    loss = (losses * tensors["weights"].flatten()).sum() / tensors["weights"].sum()
    model.zero_grad()
    loss.backward()
    grads = {}
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", ()):
            parts = {"a": module.lora_A["default"].weight, "b": module.lora_B["default"].weight}
            if "default" in module.lora_magnitude_vector:
                parts["magnitude"] = module.lora_magnitude_vector["default"].weight
            grads[name.removeprefix("base_model.model.") + ".weight"] = {k: p.grad.numpy() for k, p in parts.items()}
    return loss.item(), grads


@pytest.mark.parametrize("name", [
    "all at once", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "all at once"),
])  # fmt: skip
def test_forward_and_gradients_are_pefts(tiny, name):
    kind, folder = KINDS[name], tiny(**SMALL, text_only=True)
    model, values, record = adapted(folder, mesh_of(), **kind)
    adapters = lowrank.by_tensor(model.arch, values, record)
    theirs = peft_model(folder, kind, adapters)
    batch = padded_rows(model.arch.vocab)
    real = batch["segment_ids"] > 0
    loss, grads = loss_and_grads(model, micro_batches(batch))
    wanted_loss, wanted = peft_grads(theirs, batch)
    assert abs(loss - wanted_loss) <= 1e-5
    found = logits(model, batch["tokens"], batch["segment_ids"])[real]
    assert largest_difference(found, reference_logits(theirs, batch["tokens"], real)[real]) <= 1e-4
    ours = lowrank.by_tensor(model.arch, grads, record)
    assert set(ours) == set(wanted)
    for hf, parts in wanted.items():
        for name, grad in parts.items():
            assert relative_error(getattr(ours[hf], name), grad) <= 1e-4, (hf, name)
    for path, grad in grads.items():  # nothing pulls at where PiSSA started
        assert not (path.endswith("0") and grad.any()), path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all at once", "patterns", "dora", "pissa"])
def test_what_merges_is_what_the_model_with_its_adapter_computes(tiny, tmp_path, kind):
    """And PEFT's own merge gives the same weights."""
    from gemma_tpu.handoff.patch import LowRank, write_patched

    folder = tiny(**SMALL, text_only=True)
    model, values, record = adapted(folder, mesh_of(), **KINDS[kind])
    adapters = lowrank.by_tensor(model.arch, values, record)
    wide = {hf: (one, *one.wide) for hf, one in adapters.items()}
    updates = {hf: LowRank(b, a, one.scale, one.magnitude) for hf, (one, a, b) in wide.items()}
    write_patched(open_checkpoint(folder), tmp_path / "merged", updates)
    batch = padded_rows(model.arch.vocab)
    real = batch["segment_ids"] > 0
    found = logits(model, batch["tokens"], batch["segment_ids"])[real]
    merged = logits(load(tmp_path / "merged"), batch["tokens"], batch["segment_ids"])[real]
    assert largest_difference(found, merged) <= 1e-5 * np.abs(found).max()
    base, after = open_checkpoint(folder), open_checkpoint(tmp_path / "merged")
    theirs = peft_model(folder, KINDS[kind], adapters).merge_and_unload().state_dict()
    for hf, one in adapters.items():
        ours = after.read(hf)
        np.testing.assert_allclose(ours, one.merged(base.read(hf)), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(ours, theirs[hf].numpy(), atol=2e-5)


@pytest.mark.slow
def test_pissa_starts_where_pefts_does_and_changes_nothing_yet(tiny):
    folder = tiny(**SMALL, text_only=True)
    model, values, record = adapted(folder, mesh_of(), begun=True, init="pissa")
    adapters = lowrank.by_tensor(model.arch, values, record)
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=list(SEVEN), init_lora_weights="pissa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(reference(folder), config)
    base = open_checkpoint(folder)
    for hf, one in adapters.items():
        module = theirs.get_submodule("base_model.model." + hf.removesuffix(".weight"))
        a, b = (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        signs = np.sign((a.numpy() * one.a).sum(1))
        # Singular vectors in float32 are as exact as their values are apart: 2e-5 off in one run, 5e-6 in another.
        np.testing.assert_allclose(one.a, a.numpy() * signs[:, None], atol=1e-4)
        np.testing.assert_allclose(one.b, b.numpy() * signs, atol=1e-4)
        residual = module.get_base_layer().weight.detach().numpy()
        np.testing.assert_allclose(base.read(hf) - one.scale * one.b0 @ one.a0, residual, atol=1e-4)
    batch = padded_rows(model.arch.vocab)
    same = logits(model, batch["tokens"], batch["segment_ids"])
    assert largest_difference(same, logits(load(folder), batch["tokens"], batch["segment_ids"])) <= 1e-5


def test_a_wide_weight_starts_from_the_same_singular_values_without_a_full_svd(monkeypatch):
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.standard_normal((96, 80)), full_matrices=False)
    w = ((u * 0.9 ** np.arange(80)) @ v).astype(np.float32)
    exact = start._largest(w, 6)
    monkeypatch.setattr(start, "EXACT", 8)
    found = start._largest(w, 6)
    product = [np.asarray(u * s @ v) for u, s, v in (exact, found)]
    assert relative_error(product[1], product[0]) <= 1e-3
    np.testing.assert_allclose(found[1], exact[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "all at once"])
@pytest.mark.parametrize("split", [(2, 2), pytest.param((4, 1), marks=pytest.mark.slow),
                                   pytest.param((1, 4), marks=pytest.mark.slow)])  # fmt: skip
def test_a_mesh_changes_neither_loss_nor_gradients(tiny, kind, split):
    folder, found = tiny(**EVEN), []
    for mesh in (mesh_of(), mesh_of(*split)):
        model, _, _ = adapted(folder, mesh, **KINDS[kind])
        batch = padded_rows(model.arch.vocab, 32)
        batch = {name: np.concatenate([x, x[:1]]) for name, x in batch.items()}
        found.append(loss_and_grads(model, micro_batches(batch), mesh))
    (one, grads), (many, split_grads) = found
    assert abs(one - many) <= 1e-5
    for path, grad in grads.items():
        assert np.abs(grad - split_grads[path]).max() <= 1e-4 * max(np.abs(grad).max(), 1e-3), path


# --- what an update may not touch --------------------------------------------------------------------------


@pytest.mark.slow
def test_updates_leave_alone_what_lies_beyond_a_layers_rank_and_where_pissa_started(tiny):
    import optax

    from gemma_tpu.schema import OptimConfig
    from gemma_tpu.step import optim

    folder = tiny(**SMALL)
    model, values, record = adapted(folder, mesh_of(), **KINDS["all at once"])
    _, trained = step.take_apart(model)
    _, grads = loss_and_grads(model, micro_batches(padded_rows(model.arch.vocab, 32)))
    for name in ("adamw", "lion", "adafactor", "muon"):
        section = OptimConfig(name=name, lr=0.01, weight_decay=0.1, loraplus_ratio=4.0)
        tx = optim.optimizer(section, optax.constant_schedule(0.01), optim.roles(model))

        @partial(jax.jit, compiler_options=QUICK)
        def update(trained, state, tx=tx):
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state

        now, state = update(trained, jax.jit(tx.init, compiler_options=QUICK)(trained))
        now, state = update(now, state)
        now = {path: np.asarray(x) for path, x in now.items()}
        assert set(lowrank.by_tensor(model.arch, now, record)) != set()  # refuses what is not zero beyond a rank
        for path, value in now.items():
            same = np.array_equal(value, values[path])
            assert same == path.endswith(("lora_a0", "lora_b0")), (name, path)
        moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
        moving = sum(x.size for path, x in trained.items() if not path.endswith("0"))
        assert moments <= 2 * moving + 64 * len(trained), name


def test_lora_plus_and_weight_decay_move_as_pefts_optimizer_does():
    import optax

    from gemma_tpu.schema import OptimConfig
    from gemma_tpu.step import optim

    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from peft.optimizers import create_loraplus_optimizer

    net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    theirs = {"lora_a": net.base_model.model[0].lora_A["default"].weight,
              "lora_b": net.base_model.model[0].lora_B["default"].weight,
              "lora_magnitude": net.base_model.model[0].lora_magnitude_vector["default"].weight}  # fmt: skip
    with torch.no_grad():
        for one in theirs.values():
            one.uniform_(-1, 1)
    adamw = create_loraplus_optimizer(net, torch.optim.AdamW, lr=0.02, loraplus_lr_ratio=8.0, betas=(0.8, 0.95),
                                      loraplus_weight_decay=0.1)  # fmt: skip
    ours = {name: one.detach().numpy().copy() for name, one in theirs.items()}
    roles = {"lora_a": optim.Role(), "lora_b": optim.Role(faster=True),
             "lora_magnitude": optim.Role(faster=True)}  # fmt: skip
    section = OptimConfig(lr=0.02, weight_decay=0.1, loraplus_ratio=8.0, clip=None, b1=0.8, b2=0.95)
    tx = optim.optimizer(section, optax.constant_schedule(0.02), roles)
    state, rng = tx.init(ours), np.random.default_rng(0)
    for _ in range(4):
        grads = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in ours.items()}
        for name, one in theirs.items():
            one.grad = torch.tensor(grads[name])
        adamw.step()
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, one in theirs.items():
        np.testing.assert_allclose(ours[name], one.detach().numpy(), atol=5e-6)


# --- what is refused, and what is said ---------------------------------------------------------------------


def build(tiny):
    return loading.build(tiny(**SMALL), dtype="float32")[0]


def test_a_pattern_that_decides_nothing_and_a_layer_that_is_not_there_are_errors(tiny):
    with pytest.raises(UserError, match="lora.rank_pattern: 'q_porj' decides nothing"):
        lora.inject(build(tiny), rank=4, alpha=4, rank_pattern={"q_porj": 8})
    with pytest.raises(UserError, match="lora.layers: 4, 9: the model's layers are 0 to 3"):
        lora.inject(build(tiny), rank=4, alpha=4, layers=[0, 4, 9])


def test_the_table_counts_what_trains_and_says_what_is_held_beside_it(tiny):
    model = build(tiny)
    text = lora.table(lora.inject(model, rank=4, alpha=4, rank_pattern={r"layers\.0\..*": 6}, layers=[0, 1, 2]))
    assert "4-6" in text
    total = int(text.splitlines()[-2].split()[-1].replace(",", ""))
    held = sum(int(np.prod(v.shape)) for v in loading.variables(model, LoRA).values())
    assert total == lora.count(model) < held and f"held in memory: {held:,}" in text


