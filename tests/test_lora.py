"""LoRA against PEFT, and which projections get an adapter: none by accident, none left out in silence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    DIMS,
    QUICK,
    SEVEN,
    SMALL,
    adapter_of,
    compare_with_peft,
    largest_difference,
    load,
    logits,
    mesh_of,
    random_rows,
)

from gemma_tpu.adapter import lora
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading, projection
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import LoRA, Projection, lora_equations, weight_letters
from gemma_tpu.gemma.variants import gemma4_31b


def check_against_peft(folder, layers: int, global_layers: int) -> None:
    pytest.importorskip("peft")
    errors, loss, logit = compare_with_peft(folder)
    assert len(errors) == 7 * layers - global_layers  # V of a global layer is its K
    for name in SEVEN:
        assert sum(f".{name}." in hf for hf in errors) == layers - (global_layers if name == "v_proj" else 0)
    for hf, (a, b) in errors.items():
        assert max(a, b) <= 1e-4, (hf, a, b)
    assert loss <= 1e-5 and logit <= 1e-4


def test_gradients_of_every_a_and_b_and_the_logits_equal_pefts(tiny):
    check_against_peft(tiny(**SMALL, text_only=True), 4, 2)


@pytest.mark.slow
def test_gradients_equal_pefts_over_two_periods_of_six(tiny):
    check_against_peft(tiny(**DIMS, text_only=True), 12, 2)


# --- how an adapter starts ---------------------------------------------------------------------------------


def test_a_starts_as_peft_draws_it_and_b_at_zero(tiny):
    model, _ = loading.build(tiny(**SMALL), dtype="float32")
    lora.inject(model, rank=16, alpha=16)
    values = lora.initial(model, seed=1)
    assert set(values) == set(loading.variables(model, LoRA))
    inside = {"q_proj": 40, "k_einsum": 40, "kv_einsum": 40, "gate_proj": 40, "up_proj": 40, "down_proj": 56}
    for path, x in values.items():
        assert x.dtype == np.float32
        if path.endswith("lora_b"):
            assert not x.any()
            continue
        name, head_dim = path.split(".")[-2], (6, 16)[int(path.split(".")[2])]
        bound = 1 / np.sqrt(inside.get(name, 8 * head_dim))  # o_proj contracts heads and head dim
        assert np.abs(x).max() <= bound
        assert np.abs(x).max() > 0.97 * bound, path
        assert x.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
        assert abs(x.mean()) < 0.1 * bound
    drawn = [x[repeat] for path, x in values.items() if path.endswith("lora_a") for repeat in range(2)]
    assert len({x.tobytes() for x in drawn}) == len(drawn)
    k_and_v = values["blocks.0.0.attention.kv_einsum.lora_a"]
    assert not np.array_equal(k_and_v[:, 0], k_and_v[:, 1])


def test_pefts_own_a_has_the_same_bound():
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(40, 24, bias=False))
    a = (
        peft.get_peft_model(net, peft.LoraConfig(r=16, target_modules=["0"]))
        .base_model.model[0]
        .lora_A["default"]
    )
    assert 0.97 / np.sqrt(40) < a.weight.abs().max().item() <= 1 / np.sqrt(40)


def test_the_start_depends_on_the_seed_and_not_on_the_mesh(tiny):
    first, again, other = (_initial_on(tiny, mesh_of(*shape), seed) for shape, seed in
                           (((1, 1), 1), ((2, 2), 1), ((1, 1), 2)))  # fmt: skip
    for path, x in first.items():
        np.testing.assert_array_equal(x, again[path])
        assert path.endswith("lora_b") or not np.array_equal(x, other[path])


def _initial_on(tiny, mesh, seed):
    model, _ = loading.build(tiny(**SMALL), dtype="float32")
    lora.inject(model, rank=4, alpha=8)
    placed = loading.put(lora.initial(model, seed), loading.place(model, mesh)[0])
    return {path: np.asarray(x) for path, x in placed.items()}


def test_the_scale_is_alpha_over_rank(tiny):
    tokens = random_rows([24], SMALL["vocab"])[0][None]
    folder = tiny(**SMALL)
    found = logits(load(folder, rank=4, alpha=8.0), tokens)
    model = load(folder, rank=4, alpha=4.0)
    doubled = {path: 2 * x for path, x in adapter_of(model).items() if path.endswith("lora_b")}
    loading.assign(model, doubled)
    assert largest_difference(found, logits(model, tokens)) <= 1e-5


# --- selection ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny):
    return loading.build(tiny(**DIMS), dtype="float32")[0]


@pytest.fixture(scope="module")
def big():
    return Decoder(gemma4_31b())


OURS = ("q_proj", "kv_einsum", "k_einsum", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "targets", ["all", SEVEN, OURS, ".*", r"self_attn\.\w+_proj|mlp", r"attention\.|mlp\."], ids=str
)
def test_all_names_of_the_checkpoint_and_ours_and_a_regex_select_everything(model, targets):
    chosen = lora.select(model, targets)
    assert len(chosen) == 6 * 6  # q, kv or k, o, gate, up and down of the six slots
    layers = sorted((site.name, layer) for site in chosen for layer in site.layers)
    assert len(layers) == len(set(layers)) == 12 * 6


def test_a_target_that_matches_nothing_is_an_error_that_lists_what_exists(model):
    with pytest.raises(UserError) as error:
        lora.select(model, [*SEVEN, "qkv_proj", "fc1"])
    said = str(error.value)
    assert "nothing matches 'qkv_proj', 'fc1'" in said
    assert "  q_proj: 10 local layers" in said and "  q_proj: 2 global layers" in said
    assert "  kv_einsum (k_proj, v_proj in the checkpoint): 10 local layers" in said
    assert "  k_einsum (k_proj in the checkpoint): 2 global layers" in said
    with pytest.raises(UserError, match="nothing matches 'lm_head'"):
        lora.select(model, "lm_head")
    with pytest.raises(UserError, match="nothing matches 'lm_head'"):
        lora.select(model, "all", exclude=["lm_head"])


def test_a_forgotten_projection_is_an_error_that_names_its_layers(model):
    with pytest.raises(UserError) as error:
        lora.select(model, [name for name in OURS if name not in ("k_einsum", "up_proj")])
    said = str(error.value)
    assert "leaves out projections that exist" in said and "lora.exclude" in said
    assert "k_einsum (k_proj in the checkpoint): 2 global layers" in said
    assert "up_proj: 10 local layers" in said and "up_proj: 2 global layers" in said
    assert "q_proj" not in said.partition("\n")[2]
    with pytest.raises(UserError, match="leaves out"):
        lora.select(model, "self_attn")


def test_what_is_excluded_by_name_may_be_left_out(model):
    chosen = lora.select(model, "self_attn", exclude=["gate_proj", "up_proj", "down_proj", "k_einsum"])
    assert {site.name for site in chosen} == {"q_proj", "kv_einsum", "o_proj"}
    assert {site.name for site in lora.select(model, "all", exclude=["k_proj", "v_proj"])} == set(OURS) - {
        "kv_einsum", "k_einsum"
    }  # fmt: skip


def test_to_exclude_everything_is_an_error(model):
    with pytest.raises(UserError, match="leaves nothing to train"):
        lora.select(model, "all", exclude=OURS)


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        ([name for name in SEVEN if name != "v_proj"], ()),
        ("all", ["v_proj"]),
        (r"q_proj|v_proj|o_proj|mlp", ["k_einsum"]),
    ],
    ids=["half by names", "half excluded", "half by regex"],
)
def test_half_of_a_kv_tensor_is_refused(model, targets, exclude):
    with pytest.raises(UserError) as error:
        lora.select(model, targets, exclude)
    assert "named in part:\n  kv_einsum (k_proj, v_proj in the checkpoint): 10 local layers" in str(
        error.value
    )


def test_a_regex_that_picks_some_of_the_layers_of_one_tensor_is_refused(model):
    """Layers 0 to 9 touch all six slots of the period, but layers 10 and 11 are stacked with 4 and 5."""
    with pytest.raises(UserError) as error:
        lora.select(model, r"layers\.\d\.")
    assert "named in part" in str(error.value)
    assert "  q_proj: 2 local layers\n" in str(error.value) and "  q_proj: 2 global layers\n" in str(
        error.value
    )


def test_projections_that_layers_lack_by_architecture_are_listed_and_no_error(model, big):
    assert lora.absent(model) == [
        "v_proj: absent by architecture in 2 global layers (V is the K projection there)"
    ]
    assert "in 10 global layers" in lora.absent(big)[0]


# Geometry of 31B, written out: layers x rank x (in + out); K and V of a local layer have an A each.
TABLE_31B = {
    ("q_proj", "32x256x5376"): (50, 50 * 64 * (5376 + 32 * 256)),
    ("q_proj", "32x512x5376"): (10, 10 * 64 * (5376 + 32 * 512)),
    ("kv_einsum", "2x16x256x5376"): (50, 50 * 64 * 2 * (5376 + 16 * 256)),
    ("k_einsum", "4x512x5376"): (10, 10 * 64 * (5376 + 4 * 512)),
    ("o_proj", "5376x32x256"): (50, 50 * 64 * (5376 + 32 * 256)),
    ("o_proj", "5376x32x512"): (10, 10 * 64 * (5376 + 32 * 512)),
    ("gate_proj", "21504x5376"): (60, 60 * 64 * (5376 + 21504)),
    ("up_proj", "21504x5376"): (60, 60 * 64 * (5376 + 21504)),
    ("down_proj", "5376x21504"): (60, 60 * 64 * (5376 + 21504)),
}


def test_31b_at_rank_64_on_everything_has_489717760_parameters_and_the_table_says_where(big):
    lines = lora.table(lora.inject(Decoder(big.arch), rank=64, alpha=64)).splitlines()
    rows = {}
    for line in lines[1:-1]:
        name, layers, shape, rank, parameters, dtype = line.split()
        assert (rank, dtype) == ("64", "float32")
        rows[name, shape] = (int(layers), int(parameters.replace(",", "")))
    assert rows == TABLE_31B
    assert lines[-1].split() == ["total", "489,717,760"]


def test_31b_without_the_global_k_and_with_one_a_for_k_and_v_is_the_papers_count(big):
    chosen = lora.inject(Decoder(big.arch), exclude=["k_einsum"], rank=64, alpha=64)
    total = int(lora.table(chosen).split()[-1].replace(",", ""))
    assert total - 50 * 64 * 5376 == 467_763_200


def test_injection_adds_what_the_table_says_and_nothing_else(tiny):
    model, _ = loading.build(tiny(**DIMS), dtype="bfloat16")
    before = set(loading.variables(model))
    assert lora.count(model) == 0
    chosen = lora.inject(model, targets="all", exclude=["k_einsum"], rank=5, alpha=5)
    adapters = loading.variables(model, LoRA)
    assert set(loading.variables(model)) - before == set(adapters)
    assert {path.rpartition(".")[0] for path in adapters} == {site.path for site in chosen}
    assert not any("k_einsum" in path for path in adapters)
    assert f"{lora.count(model):,}" == lora.table(chosen).split()[-1]
    assert {v.dtype for v in adapters.values()} == {jnp.dtype("float32")}


def test_the_axes_of_an_adapter_come_from_its_base_weight_or_from_its_rank(tiny):
    """Every adapter tensor has one dim for fsdp, so that none of it is held twice."""
    model, _ = loading.build(tiny(**SMALL), dtype="float32")
    lora.inject(model, rank=4, alpha=4)
    axes = {path: v.get_metadata()["axes"] for path, v in loading.variables(model, LoRA).items()}
    assert all(len(axes[path]) == v.ndim for path, v in loading.variables(model, LoRA).items())
    local = "blocks.0.0.attention"
    assert axes[f"{local}.kv_einsum.lora_a"] == ("layers", None, None, "embed")
    assert axes[f"{local}.kv_einsum.lora_b"] == ("layers", None, "kv_heads", None, "rank")
    assert axes[f"{local}.o_proj.lora_a"] == ("layers", "rank", "heads", None)
    assert axes[f"{local}.o_proj.lora_b"] == ("layers", "embed", None)
    assert axes["blocks.0.0.mlp.down_proj.lora_a"] == ("layers", "rank", "mlp")
    assert all(sum(axis in ("embed", "rank") for axis in named) == 1 for named in axes.values())


def test_injecting_what_a_checkpoint_holds_restores_the_same_places(tiny):
    model, _ = loading.build(tiny(**SMALL), dtype="float32")
    lora.inject(model, targets="all", exclude=["k_einsum"], rank=4, alpha=8)
    shapes = {path: (tuple(v.shape), "float32") for path, v in loading.variables(model, LoRA).items()}
    again, _ = loading.build(tiny(**SMALL), dtype="float32")
    lora.inject_like(again, shapes, {"rank": 4, "alpha": 8})
    assert {p: tuple(v.shape) for p, v in loading.variables(again, LoRA).items()} == {
        path: shape for path, (shape, _) in shapes.items()
    }
    assert again.blocks[0][0].mlp.up_proj.lora_scale == 2.0
    with pytest.raises(UserError) as error:
        stray = {"blocks.9.0.mlp.up_proj.lora_a": ((1, 4, 40), "float32")}
        lora.inject_like(again, shapes | stray, {"rank": 4, "alpha": 8})
    assert "blocks.9.0.mlp.up_proj.lora_a" in str(error.value)


def test_equations_say_what_is_in_and_what_is_out():
    assert weight_letters("BTD,CKHD->BTCKH") == ("C", "KH", "D")
    assert weight_letters("BTNH,DNH->BTD") == ("", "D", "NH")
    assert lora_equations("BTD,NHD->BTNH") == ("BTD,RD->BTR", "BTR,NHR->BTNH")
    assert lora_equations("BTD,CKHD->BTCKH") == ("BTD,CRD->BTCR", "BTCR,CKHR->BTCKH")
    with pytest.raises(ValueError, match="stored as"):
        weight_letters("BTD,DF->BTF")


# --- dropout -----------------------------------------------------------------------------------------------


def one_projection(dropout: float) -> Projection:
    rng = np.random.default_rng(0)
    p = Projection("up_proj", "BTD,FD->BTF", (6, 16), ("mlp", "embed"), 1, jnp.float32)
    for name, shape in (("w", (6, 16)), ("lora_a", (3, 16)), ("lora_b", (6, 3))):
        value = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        axes = ("layers", *(None for _ in shape))
        setattr(p, name, (LoRA if name != "w" else projection.Base)(value, axes=axes))
    p.lora_scale, p.lora_dropout = 0.5, dropout
    return p


def test_dropout_is_off_without_a_key_and_keeps_the_expectation_with_one():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 16)), jnp.float32)
    p = one_projection(0.4)
    exact = p(x)
    np.testing.assert_array_equal(exact, one_projection(0.0)(x, jax.random.key(0)))
    drawn = jax.vmap(partial(p, x))(jax.random.split(jax.random.key(0), 8000))
    assert float(drawn.std(axis=0).min()) > 0.1
    error = jnp.abs(drawn.mean(axis=0) - exact) / (drawn.std(axis=0) / np.sqrt(len(drawn)))
    assert float(error.max()) < 5  # standard errors


def test_dropout_acts_on_the_input_of_the_adapter_and_never_on_the_base():
    x = jnp.ones((1, 1, 16))
    p = one_projection(0.999999)
    base = jnp.einsum("BTD,FD->BTF", x, p.w[...])
    np.testing.assert_allclose(p(x, jax.random.key(0)), base, atol=1e-6)


def test_every_layer_and_projection_drops_its_own_inputs_at_the_asked_rate(tiny, monkeypatch):
    seen = []

    def watched(x, key, rate, inner=projection._dropout):
        kept = inner(jnp.ones_like(x), key, rate) > 0
        jax.debug.callback(lambda mask: seen.append(np.asarray(mask)), kept)
        return inner(x, key, rate)

    monkeypatch.setattr(projection, "_dropout", watched)
    model = load(tiny(**SMALL), rank=3, dropout=0.25)
    tokens = random_rows([32], SMALL["vocab"])[0][None]
    graph, state = nnx.split(model)

    @partial(jax.jit, compiler_options=QUICK)
    def run(state, key):
        return nnx.merge(graph, state).hidden(tokens, key=key)

    outputs = []
    for seed in (0, 0, 1):
        outputs.append(np.asarray(run(state, jax.random.key(seed))))
        jax.effects_barrier()
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert largest_difference(outputs[0], outputs[2]) > 0.01
    calls = 4 * 6
    assert len(seen) == 3 * calls
    first, again, other = ([m.tobytes() for m in seen[i * calls : (i + 1) * calls]] for i in range(3))
    assert sorted(first) == sorted(again) and len(set(first)) == calls and not set(first) & set(other)
    assert np.mean([mask.mean() for mask in seen[:calls]]) == pytest.approx(0.75, abs=0.01)

    seen.clear()
    run_without = jax.jit(lambda state: nnx.merge(graph, state).hidden(tokens), compiler_options=QUICK)
    run_without(state)
    jax.effects_barrier()
    assert seen == []
