"""The step: weighted by real targets over micro-batches, blind to packing, and none of the base comes out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    QUICK,
    SMALL,
    largest_difference,
    load,
    loss_and_grads,
    make_grader,
    mesh_of,
    micro_batches,
    random_rows,
    relative_error,
    sheet,
)

from gemma_tpu.adapter import lora
from gemma_tpu.gemma import loading
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.projection import Base, LoRA
from gemma_tpu.step import step

VOCAB = SMALL["vocab"]
RATE = optax.constant_schedule(0.01)


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny(**SMALL), rank=3)


def uneven_batch():
    """Six rows with very different numbers of targets; the fifth has none."""
    batch = sheet([[row] for row in random_rows([32, 30, 9, 5, 20, 28], VOCAB)], 32)
    batch["weights"][4] = 0
    return batch


@pytest.fixture(scope="module")
def one_big_batch(model):
    return loss_and_grads(model, micro_batches(uneven_batch()))


def test_micro_batches_with_unequal_targets_equal_one_big_batch(model, one_big_batch):
    batch = micro_batches(uneven_batch(), 3)
    targets = np.asarray(batch["weights"].sum((1, 2)))
    assert len(set(targets)) == 3
    loss, grads = loss_and_grads(model, batch)
    wanted_loss, wanted = one_big_batch
    assert abs(loss - wanted_loss) <= 1e-6
    assert largest_difference(grads, wanted) <= 1e-6
    assert max(np.abs(grad).max() for grad in wanted.values()) > 0.01


def test_packed_rows_have_the_loss_and_the_gradients_of_the_same_rows_unpacked(model):
    lengths = [30, 9, 21, 40, 24]
    rows = random_rows(lengths, VOCAB)
    packed = sheet([rows[:3], rows[3:], [], [], []], 64)  # rows of padding alone must not count either
    alone = sheet([[row] for row in rows], 64)
    assert packed["weights"].sum() == alone["weights"].sum()
    grade = make_grader(model)
    loss, grads = grade(micro_batches(packed))
    wanted_loss, wanted = grade(micro_batches(alone))
    assert abs(loss - wanted_loss) <= 1e-5
    for path in wanted:
        assert relative_error(grads[path], wanted[path]) <= 1e-4, path


# --- what trains and what is frozen ------------------------------------------------------------------------


def make(model, *, dropout=False, seed=0, optimizer=None):
    parts, trained = step.take_apart(model)
    optimizer = optimizer or optax.adamw(RATE)
    run = step.make_train_step(parts, optimizer, RATE, remat="none", seed=seed, dropout=dropout)
    state = {"trained": trained, "opt": optimizer.init(trained), "step": jnp.zeros((), jnp.int32)}
    return parts, run, state


def test_the_gradient_tree_has_the_adapters_leaves_and_no_other(model, one_big_batch):
    adapters = loading.variables(model, LoRA)
    assert set(one_big_batch[1]) == set(adapters)
    assert all(one_big_batch[1][path].shape == v.shape for path, v in adapters.items())
    assert all(".lora_" in path for path in adapters)


def test_nothing_of_the_size_of_the_base_comes_out_of_the_jitted_step(model):
    parts, run, state = make(model)
    batch = micro_batches(uneven_batch())
    out_state, metrics = jax.eval_shape(run, state, parts.frozen, batch)
    assert jax.tree.structure(out_state) == jax.tree.structure(state)
    adapter_bytes = sum(x.nbytes for x in state["trained"].values())
    out_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((out_state, metrics)))
    assert 3 * adapter_bytes <= out_bytes <= 3 * adapter_bytes + 64  # adapter and two moments; a few scalars
    frozen_bytes = sum(x.nbytes for x in jax.tree.leaves(parts.frozen))
    assert frozen_bytes > 2 * adapter_bytes
    assert {type(leaf) for _, leaf in nnx.to_flat_state(parts.frozen)} == {Base}


@pytest.fixture(scope="module")
def jitted(model):
    """(the step compiled, the frozen base, a fresh state that may be donated)"""
    parts, run, state = make(model)
    return (
        jax.jit(run, donate_argnums=0, compiler_options=QUICK),
        parts.frozen,
        lambda: jax.tree.map(jnp.copy, state),
    )


def test_a_jitted_step_moves_the_adapter_alone_and_donates_its_state(jitted):
    run, frozen, fresh = jitted
    frozen_before = jax.tree.map(np.array, frozen)
    state = fresh()
    before = {path: np.array(x) for path, x in state["trained"].items()}
    losses = []
    for _ in range(3):
        held = state["trained"]
        state, metrics = run(state, frozen, micro_batches(uneven_batch(), 2))
        assert all(x.is_deleted() for x in held.values())
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2]
    assert all(not np.array_equal(before[path], x) for path, x in state["trained"].items())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, frozen), frozen_before)
    assert int(state["step"]) == 3


def test_metrics_count_real_tokens_and_targets(jitted, one_big_batch):
    run, frozen, fresh = jitted
    batch = uneven_batch()
    _, metrics = run(fresh(), frozen, micro_batches(batch, 2))
    assert int(metrics["tokens"]) == 32 + 30 + 9 + 5 + 20 + 28
    assert int(metrics["target_tokens"]) == (batch["weights"] > 0).sum()
    loss, grads = one_big_batch
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["lr"]) == pytest.approx(0.01)


def test_a_batch_without_any_target_is_zero_and_not_nan(jitted):
    run, frozen, fresh = jitted
    batch = uneven_batch()
    batch["weights"][:] = 0
    state, metrics = run(fresh(), frozen, micro_batches(batch, 2))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["target_tokens"] == 0
    assert all(np.isfinite(x).all() for x in state["trained"].values())


def test_full_training_has_a_gradient_for_every_tensor_and_a_tied_head(tiny):
    model = load(tiny(**SMALL))
    model.trains = Base
    batch = micro_batches(sheet([[row] for row in random_rows([24], VOCAB)], 24))
    loss, grads = loss_and_grads(model, batch)
    assert set(grads) == set(loading.variables(model))
    assert all(np.abs(grad).max() > 0 for grad in grads.values())
    # Along its own direction the embedding's gradient, of input and head, predicts the change of the loss.
    parts, trained = step.take_apart(model)
    run = jax.jit(
        lambda trained: step.make_eval_step(parts)(trained, parts.frozen, batch), compiler_options=QUICK
    )
    slope, size = grads["embed.w"], 1e-2
    direction = slope / np.linalg.norm(slope)
    moved = [
        float(
            run(trained | {"embed.w": trained["embed.w"] + sign * size * direction})[0]
            / batch["weights"].sum()
        )
        for sign in (1, -1)
    ]
    assert (moved[0] - moved[1]) / (2 * size) == pytest.approx(np.linalg.norm(slope), rel=0.01)
    assert loss == pytest.approx(float(run(trained)[0] / batch["weights"].sum()), rel=1e-6)


def test_the_eval_step_gives_the_summed_loss_and_the_targets(model, one_big_batch):
    parts, trained = step.take_apart(model)
    run = jax.jit(step.make_eval_step(parts), compiler_options=QUICK)
    total, targets = run(trained, parts.frozen, micro_batches(uneven_batch(), 2))
    assert float(targets) == uneven_batch()["weights"].sum()
    assert float(total / targets) == pytest.approx(one_big_batch[0], rel=1e-6)


# --- dropout -----------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_seed_step_and_micro_batch_and_off_in_evaluation(tiny):
    model = load(tiny(**SMALL), rank=3, dropout=0.3)
    row = sheet([[random_rows([24], VOCAB)[0]]], 24)
    twice = {name: jnp.asarray(np.stack([x, x])) for name, x in row.items()}  # two equal micro-batches

    @partial(jax.jit, compiler_options=QUICK)
    def loss_at(seed, number):
        parts, run, state = make(model, dropout=True, seed=seed)
        return run(state | {"step": number}, parts.frozen, twice)[1]["loss"]

    losses = {(seed, number): float(loss_at(seed, number)) for seed in (0, 7) for number in (0, 1, 2)}
    assert len(set(losses.values())) == 6
    assert float(loss_at(7, 1)) == losses[7, 1]

    parts, trained = step.take_apart(model)

    @partial(jax.jit, compiler_options=QUICK)
    def loss_with(key):
        micro = {name: jnp.asarray(x) for name, x in row.items()}
        return step.summed_loss(parts.merge(trained, parts.frozen), micro, key, "none") / row["weights"].sum()

    key = jax.random.fold_in(jax.random.key(7), 1)
    halves = [float(loss_with(jax.random.fold_in(key, number))) for number in (0, 1)]
    assert abs(halves[0] - halves[1]) > 1e-4
    assert losses[7, 1] == pytest.approx(np.mean(halves), rel=1e-6)

    total, targets = jax.jit(step.make_eval_step(parts), compiler_options=QUICK)(trained, parts.frozen, twice)
    without = float(loss_with(None))
    assert float(total / targets) == pytest.approx(without, rel=1e-6)
    assert all(abs(loss - without) > 1e-4 for loss in losses.values())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tp": 2}, {"data": 2, "fsdp": 2}], ids=str)
def test_the_step_runs_sharded_with_the_losses_of_one_device(tiny, sizes):
    """Two updates on four, from PEFT's start, equal two updates on one device; data is what goes over slices."""
    batch = sheet([[row] for row in random_rows([32, 24], VOCAB)], 32)

    def losses(mesh):
        model, checkpoint = loading.build(tiny(**SMALL), dtype="float32")
        lora.inject(model, rank=4, alpha=8)
        shardings, _ = loading.place(model, mesh)
        loading.load_base(model, checkpoint, shardings)
        loading.assign(model, loading.put(lora.initial(model, 0), shardings))
        parts, run, state = make(model)
        with jax.set_mesh(mesh):
            jitted = jax.jit(run, compiler_options=QUICK)
            state, first = jitted(state, parts.frozen, micro_batches(batch))
            _, second = jitted(state, parts.frozen, micro_batches(batch))
        return np.array([first["loss"], second["loss"]])

    one, four = losses(mesh_of()), losses(meshes.build(sizes, jax.devices()[:4]))
    assert one[1] < one[0]
    np.testing.assert_allclose(four, one, atol=1e-5)
