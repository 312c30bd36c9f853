"""Routed experts against every expert on every token, on one device and on meshes, however uneven the routing."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_tpu.gemma import experts
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.experts import Mixture
from gemma_tpu.gemma.projection import LoRA
from gemma_tpu.gemma.variants import Experts

D, F, R, EPS = 16, 12, 2, 1e-6
FROZEN = ("gate_up_proj.w", "down_proj.w")
MESHES = (
    {"fsdp": 4}, {"expert": 4}, {"fsdp": 2, "tp": 2}, {"fsdp": 2, "expert": 2}, {"data": 2, "tp": 2}, {"data": 4},
)  # fmt: skip


class Case:
    """A mixture with adapters on its experts, its inputs, and a loss over what comes out."""

    def __init__(self, count=8, top_k=2, rows=4, tokens=16, bias=None, dropout=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.module = Mixture(SimpleNamespace(hidden=D, eps=EPS), Experts(count, top_k, F), 1, jnp.float32)
        for projection, (out, inside) in ((self.module.gate_up_proj, (2 * F, D)), (self.module.down_proj, (D, F))):
            projection.lora_a = LoRA(jax.ShapeDtypeStruct((1, count, R, inside), jnp.float32))
            projection.lora_b = LoRA(jax.ShapeDtypeStruct((1, count, out, R), jnp.float32))
            projection.lora_scale, projection.lora_dropout = 0.7, dropout
        self.graph, state = nnx.split(self.module)
        flat = nnx.to_flat_state(state)
        self.paths = [".".join(path) for path, _ in flat]
        values = [rng.standard_normal(leaf.shape[1:]) * leaf.shape[-1] ** -0.5 for _, leaf in flat]
        self.values = dict(zip(self.paths, (jnp.asarray(value, jnp.float32) for value in values), strict=True))
        routed = rng.standard_normal((rows, tokens, D))
        if bias is not None:  # inputs near one: what is added to an expert's row is added to its every score
            self.values["router_scale"], routed = jnp.ones(D), 1 + routed
            self.values["router"] += jnp.asarray(bias, jnp.float32)[:, None]
        self.routed = jnp.asarray(routed, jnp.float32)
        self.x, self.c = (jnp.asarray(rng.standard_normal((rows, tokens, D)), jnp.float32) for _ in range(2))
        self.state, self.count, self.top_k = state, count, top_k

    def bound(self, values):
        flat = [(path, leaf.replace(values[".".join(path)])) for path, leaf in nnx.to_flat_state(self.state)]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def ours(self, values, routed, x, key=None):
        out = self.bound(values)(routed, x, key)
        return jnp.sum(out * self.c), out

    def every_expert(self, values, routed, x):
        """What the experts that the router left out give counts zero times."""
        weights_BTk, chosen_BTk = self.bound(values).route(routed)
        weights_BTE = jnp.sum(weights_BTk[..., None] * jax.nn.one_hot(chosen_BTk, self.count), axis=-2)

        def whole(name):
            return values[f"{name}.w"] + 0.7 * values[f"{name}.lora_b"] @ values[f"{name}.lora_a"]

        gate, up = jnp.split(jnp.einsum("BTD,EFD->BTEF", x, whole("gate_up_proj")), 2, axis=-1)
        out = jnp.einsum("BTEF,EDF->BTED", jax.nn.gelu(gate, approximate=True) * up, whole("down_proj"))
        out = jnp.einsum("BTED,BTE->BTD", out, weights_BTE)
        return jnp.sum(out * self.c), out

    def run(self, function, sizes=None):
        graded = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True))
        with jax.set_mesh(mesh_of(sizes or {})):
            (_, out), (dvalues, drouted, dx) = graded(self.values, self.routed, self.x)
        return {"out": out, "routed": drouted, "x": dx, **dvalues}

    def jaxpr(self, sizes=None, names=None, key=None):
        names = names or self.paths

        def loss(part):
            return self.ours({**self.values, **part}, self.routed, self.x, key)[0]

        part = {name: self.values[name] for name in names}
        with jax.set_mesh(mesh_of(sizes or {})):
            return str(jax.make_jaxpr(jax.grad(loss))(part))


def mesh_of(sizes):
    return meshes.build(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])


@functools.cache
def of_every_expert():
    case = Case()
    return case.run(case.every_expert)


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5, err_msg=name)


def pairs_of(case):
    return np.bincount(np.asarray(case.bound(case.values).route(case.routed)[1]).ravel(), minlength=case.count)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(experts, "ROWS", 8)  # so that uneven routing takes several turns here too


@pytest.mark.parametrize("sizes", [
    {}, *MESHES[2:5], *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in (*MESHES[:2], *MESHES[5:])),
], ids=str)  # fmt: skip
def test_outputs_and_all_gradients_are_those_of_every_expert_on_every_token(sizes):
    case = Case()
    assert (pairs_of(case) > 0).all()
    same(case.run(case.ours, sizes), of_every_expert())


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "expert": 2}], ids=str)
def test_no_token_is_dropped_where_all_choose_the_experts_of_one_device(sizes):
    case = Case(bias=[0, 0, 3, 3, 0, 0, 0, 0])
    assert list(pairs_of(case)) == [0, 0, 64, 64, 0, 0, 0, 0]
    found = case.run(case.ours, sizes)
    same(found, case.run(case.every_expert))
    for name in (*FROZEN, "gate_up_proj.lora_a", "down_proj.lora_b"):  # nobody chose those others
        assert not np.asarray(found[name])[[0, 1, 4, 5, 6, 7]].any() and np.asarray(found[name])[[2, 3]].any()


def test_all_tokens_at_one_expert_of_one_and_an_expert_that_nobody_chooses():
    only = Case(top_k=1, bias=[0, 0, 0, 0, 0, 4, 0, 0])
    assert list(np.flatnonzero(pairs_of(only))) == [5]
    unloved = Case(top_k=3, bias=[0, 0, 0, 0, 0, 0, -5, 0])
    assert list(np.flatnonzero(pairs_of(unloved) == 0)) == [6]
    for case in (only, unloved):
        same(case.run(case.ours, {"fsdp": 2, "tp": 2}), case.run(case.every_expert))


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_fewer_than_fsdp_or_not_divided_by_it_are_no_mistake(rows):
    case = Case(rows=rows, tokens=5)
    same(case.run(case.ours, {"fsdp": 4}), case.run(case.every_expert))


def test_experts_that_do_not_divide_are_all_on_every_device_and_tokens_stay():
    case = Case(count=6)
    same(case.run(case.ours, {"fsdp": 4}), case.run(case.every_expert))
    assert "all_gather" not in case.jaxpr({"fsdp": 4}) and "all_gather" in Case().jaxpr({"fsdp": 4})


def test_one_device_runs_without_collectives_and_without_a_loop():
    for said in ("all_gather", "psum", "reduce_scatter", "shard_map", "while"):
        assert said not in Case().jaxpr(), said
        assert said in Case().jaxpr({"fsdp": 2, "expert": 2}), said


def test_frozen_weights_get_no_gradient():
    case = Case()
    without = [name for name in case.paths if not name.endswith("_proj.w")]
    every, some = (case.jaxpr(names=names).count("scatter-add[") for names in (None, without))
    assert every - some == 2  # those of the two weights themselves


def test_the_mixture_survives_rematerialisation_inside_of_a_scan():
    case = Case()

    def scanned(values, routed, x):
        def layer(x, scale):
            run = jax.checkpoint(lambda x, scale: case.ours(values, routed, x * scale)[1], prevent_cse=False)
            return x + run(x, scale), None

        out = jax.lax.scan(layer, x, jnp.asarray([0.5, 0.3]))[0]
        return jnp.sum(out * case.c), out

    def straight(values, routed, x):
        for scale in (0.5, 0.3):
            x = x + case.every_expert(values, routed, x * scale)[1]
        return jnp.sum(x * case.c), x

    same(case.run(scanned, {"fsdp": 2, "tp": 2}), case.run(straight))


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2}], ids=str)
def test_the_backward_pass_drops_what_the_forward_pass_dropped(sizes):
    """The output is linear in the last adapter's B: its gradient gives the exact difference, for the same mask."""
    case = Case(dropout=0.5, bias=[0, 0, 0.5, 0.5, 0, 0, 0, 0])
    name, step = "down_proj.lora_b", jnp.asarray(np.random.default_rng(1).standard_normal((8, D, R)), jnp.float32)

    def loss(b, seed):
        return case.ours({**case.values, name: b}, case.routed, case.x, jax.random.key(seed))[0]

    with jax.set_mesh(mesh_of(sizes)):
        run, b = jax.jit(jax.value_and_grad(loss)), case.values[name]
        (found, slope), (more, _), (again, _), (other, _) = run(b, 0), run(b + step, 0), run(b, 0), run(b, 1)
    np.testing.assert_allclose(jnp.sum(slope * step), more - found, rtol=1e-4)
    assert found == again and abs(found - other) > 1e-3
