"""The schedule and the optimizer: what they do at the edges, and AdamW against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.schema import OptimConfig
from gemma_tpu.step import optim

PAPER = OptimConfig(lr=1e-4, schedule="cosine", warmup_steps=100)


def rates(section: OptimConfig, steps: int) -> np.ndarray:
    rate, _ = optim.schedule(section, steps)
    return np.array([float(rate(step)) for step in range(steps)])


def test_the_papers_schedule_rises_for_100_steps_and_falls_to_zero():
    values = rates(PAPER, 1244)
    np.testing.assert_allclose(values[[0, 49, 99, 100]], [1e-6, 5e-5, 1e-4, 1e-4], rtol=1e-5)
    np.testing.assert_allclose(values[100 + 572], 5e-5, rtol=1e-3)  # half way down
    assert 0 < values[-1] < 1e-9
    assert (np.diff(values[:100]) > 0).all() and (np.diff(values[100:]) < 0).all()
    assert optim.schedule(PAPER, 1244)[1] == []


@pytest.mark.parametrize("warmup", [0, 1, 20, 100])
@pytest.mark.parametrize("steps", [1, 2, 10, 100, 150])
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_first_step_already_moves_and_no_rate_is_above_the_peak(shape, steps, warmup):
    values = rates(OptimConfig(lr=0.01, schedule=shape, warmup_steps=warmup), steps)
    assert values[0] > 0
    assert values.max() <= 0.01 * (1 + 1e-6)
    assert values[warmup if warmup < steps else steps // 10] == pytest.approx(0.01)  # the peak is reached


@pytest.mark.parametrize(("steps", "clamped"), [(100, 10), (25, 2), (5, 0)])
def test_a_warm_up_longer_than_the_run_is_clamped_and_said(steps, clamped):
    rate, notes = optim.schedule(PAPER, steps)
    assert notes == [f"optim.warmup_steps 100 clamped to {clamped}: the run has {steps} steps"]
    assert float(rate(clamped)) == pytest.approx(1e-4)
    assert optim.schedule(PAPER, 101)[1] == []


def test_linear_and_constant_are_what_they_say():
    linear = rates(OptimConfig(lr=1.0, schedule="linear", warmup_steps=0), 10)
    np.testing.assert_allclose(linear, 1 - np.arange(10) / 10, rtol=1e-5)
    assert (rates(OptimConfig(lr=0.5, schedule="constant", warmup_steps=2), 9)[1:] == 0.5).all()


def run(section: OptimConfig, params: dict, grads: list[dict]) -> dict:
    tx = optim.optimizer(section, optax.constant_schedule(section.lr))
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def random_run(steps: int = 5):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    grads = [
        {name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        for size in (3.0, 0.01, 30.0, 0.1, 1.0)[:steps]
    ]
    return params, grads


@pytest.mark.parametrize("clip", [None, 1.0])
def test_clipping_and_adamw_equal_torchs(clip):
    torch = pytest.importorskip("torch")
    section = OptimConfig(lr=0.02, weight_decay=0.1, clip=clip, b1=0.8, b2=0.95, eps=1e-6)
    params, grads = random_run()
    found = run(section, jax.tree.map(jnp.asarray, params), grads)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in params.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    for grad in grads:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[name])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adamw.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), atol=2e-6)


def test_clipping_bounds_the_global_norm_and_leaves_small_gradients_alone():
    params, (big, small) = random_run(2)
    tx = optim.optimizer(OptimConfig(clip=0.5, b1=0.0, weight_decay=0.0), optax.constant_schedule(0.01))

    def first_moment(grad):  # with b1 = 0 it is the gradient after clipping
        _, state = tx.update(grad, tx.init(params), params)
        return optax.tree.get(state, "mu")

    assert float(optax.tree.norm(big)) > 0.5 > float(optax.tree.norm(small))
    assert float(optax.tree.norm(first_moment(big))) == pytest.approx(0.5, rel=1e-5)
    for name, grad in small.items():
        np.testing.assert_allclose(first_moment(small)[name], grad, rtol=1e-6)


def test_weight_decay_shrinks_what_has_no_gradient():
    params = {"a": jnp.full((3,), 2.0)}
    still = [{"a": jnp.zeros(3)}] * 2
    moved = run(OptimConfig(lr=0.1, weight_decay=0.5, clip=1.0), params, still)
    np.testing.assert_allclose(moved["a"], 2.0 * (1 - 0.1 * 0.5) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(run(OptimConfig(lr=0.1, weight_decay=0.0), params, still)["a"], params["a"])


# --- the other schedules -----------------------------------------------------------------------------------


def test_wsd_rises_stays_and_falls_in_its_last_share():
    section = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=10, decay_ratio=0.25)
    values = rates(section, 100)
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert (values[9:76] == 1).all()
    np.testing.assert_allclose(values[75:], 1 - np.arange(25) / 25, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rates(OptimConfig(lr=1.0, schedule="wsd", warmup_steps=0), 50)[39:42], [1, 1, 0.9])


def test_a_decay_that_the_warm_up_leaves_no_room_for_is_clamped_and_said():
    _, notes = optim.schedule(OptimConfig(schedule="wsd", warmup_steps=9, decay_ratio=0.5), 10)
    assert notes == ["optim.decay_ratio 0.5 clamped to 1 steps: after the warm-up the run has no more"]


def test_a_warm_up_may_be_a_share_of_the_run():
    section = OptimConfig(lr=1.0, schedule="constant", warmup_steps=0, warmup_ratio=0.1)
    values = rates(section, 200)
    np.testing.assert_allclose(values[[0, 9, 19, 20]], [0.05, 0.5, 1.0, 1.0], rtol=1e-5)
    assert rates(section, 3)[0] > 0


# --- the other optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_each_is_optaxs_own_with_its_own_betas(name):
    params, grads = random_run(3)
    section = OptimConfig(name=name, lr=0.02, weight_decay=0.1, clip=None, b1=0.8, b2=0.95)
    rate = optax.constant_schedule(0.02)
    theirs = {
        "lion": lambda: optax.lion(rate, b1=0.8, b2=0.95, weight_decay=0.1),
        "adafactor": lambda: optax.adafactor(rate, momentum=0.8, decay_rate=0.95, weight_decay_rate=0.002),
        "muon": lambda: optax.contrib.muon(rate, beta=0.8, adam_b2=0.95, weight_decay=0.1),
    }[name]()
    found, wanted, state = run(section, params, grads), params, theirs.init(params)
    for grad in grads:
        updates, state = theirs.update(grad, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-7)
        assert not np.allclose(value, params[path])


def test_norms_scalars_and_magnitudes_do_not_decay_and_loraplus_moves_b_faster(tiny):
    from helpers import SMALL

    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading
    from gemma_tpu.gemma.projection import Base

    model, _ = loading.build(tiny(**SMALL), dtype="float32")
    lora.inject(model, rank=4, alpha=4, dora=True)
    roles = {path.rpartition(".")[2]: role for path, role in optim.roles(model).items()}
    assert {name for name, role in roles.items() if role.decays} == {"lora_a", "lora_b"}
    assert {name for name, role in roles.items() if role.faster} == {"lora_b", "lora_magnitude"}  # LoRA+'s
    model.trains = Base
    still = {path for path, role in optim.roles(model).items() if not role.decays}
    assert all("norm" in path or "scalar" in path for path in still) and len(still) > 10
    assert "embed.w" not in still and optim.roles(model)["embed.w"].matrix is None  # Muon leaves it to Adam


def test_what_stands_still_does_not_move_and_has_no_moments():
    params = {"start": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}
    roles = {"start": optim.Role(still=True, decays=False), "b": optim.Role()}
    rate, _ = optim.schedule(OptimConfig(warmup_steps=0), 10)
    made = optim.optimizer(OptimConfig(warmup_steps=0), rate, roles)
    state = made.init(params)
    updates, _ = made.update(params, state, params)
    assert not np.any(updates["start"]) and np.all(updates["b"])
    assert sum(leaf.shape == (2, 3) for leaf in jax.tree.leaves(state)) == 2, "of b alone"


def test_muon_is_told_which_dims_a_matrix_maps_from_and_to(tiny):
    from helpers import SMALL

    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading
    from gemma_tpu.gemma.projection import LoRA
    from gemma_tpu.gemma.weights import lora_entries

    model, _ = loading.build(tiny(**SMALL), dtype="float32")
    lora.inject(model, rank=3, alpha=3)
    roles, found = optim.roles(model), loading.variables(model, LoRA)
    for entry in lora_entries(model.arch).values():
        *_, out, inside = entry.hf_shape
        stem = entry.path.removesuffix(".w")
        for name, wanted in (("lora_a", [inside, 3]), ("lora_b", [3, out])):
            shape = np.array(found[f"{stem}.{name}"].shape)
            assert [np.prod(shape[list(dims)]) for dims in roles[f"{stem}.{name}"].matrix] == wanted, stem


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_what_an_optimizer_holds_of_a_tensor_lies_as_that_tensor_does(name):
    """A moment as the whole tensor, Adafactor's sums over one dim as the other: a copy on every device costs memory."""
    mesh = meshes.build({"fsdp": 2, "tp": 2})
    trained = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in (("w", (256, 128)), ("v", (512,)))}
    specs = {"w": PartitionSpec("fsdp", "tp"), "v": PartitionSpec("tp")}
    state = jax.eval_shape(optim.optimizer(OptimConfig(name=name), optax.constant_schedule(1.0)).init, trained)
    placed = optim.state_shardings(state, trained, meshes.shardings(mesh, specs))
    wanted = {(256, 128): specs["w"], (512,): specs["v"], (256,): PartitionSpec("fsdp"), (128,): PartitionSpec("tp")}
    found = {}
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert sharding.spec == wanted.get(leaf.shape, PartitionSpec()), leaf.shape
        found[leaf.shape] = sharding
    assert {(512,), (256,), (128,)} <= set(found) if name == "adafactor" else {(256, 128), (512,)} <= set(found)


@pytest.mark.parametrize(("warmup", "clamped"), [(8, False), (9, True)])
def test_a_decay_that_the_run_has_no_steps_for_is_said(warmup, clamped):
    section = OptimConfig(schedule="wsd", decay_ratio=0.2, warmup_steps=warmup)
    notes = optim.schedule(section, 10)[1]
    assert bool(notes) == clamped and all("clamped to 1 steps" in note for note in notes)
