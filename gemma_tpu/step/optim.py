"""The optimizer and its schedule, by optax, from the config's `optim` section."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, muon

from gemma_tpu.gemma import loading
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.sites import sites
from gemma_tpu.schema import OptimConfig

DECAY = 0.2  # of a wsd run, where the config gives none


@dataclass(frozen=True)
class Role:
    """How one tensor is treated. `matrix`: the dims that it maps from and to, where it is a stack of matrices."""

    decays: bool = True
    still: bool = False  # part of the adapter, and never moved: no moments either
    faster: bool = False  # LoRA+ has another rate for it
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def roles(model: Decoder) -> dict[str, Role]:
    """Of everything that trains. Magnitudes go with B in LoRA+, as in PEFT. They do not decay, as they do there: they
    start as the lengths of the base's rows, and to draw those to zero regularises nothing."""
    found = {}
    for path, variable in loading.variables(model, model.trains).items():
        own_dims = len(variable.shape) - path.startswith("blocks.")
        found[path] = Role(decays=own_dims > 1)
    for site in sites(model):
        lead, out = len(site.b_dims), len(site.b_shape(1)) - 1
        inside = len(site.a_shape(1)) - lead - 1
        a = Role(matrix=(tuple(range(lead + 1, lead + 1 + inside)), (lead,)))
        b = Role(matrix=((out,), tuple(range(lead, out))), faster=True)
        whole = Role(matrix=(tuple(range(out, out + inside)), tuple(range(lead, out))))
        still = Role(still=True, decays=False)
        named = {"lora_a": a, "lora_b": b, "lora_a0": still, "lora_b0": still, "w": whole,
                 "lora_magnitude": Role(decays=False, faster=True)}  # fmt: skip
        found |= {path: role for name, role in named.items() if (path := f"{site.path}.{name}") in found}
    return found


# --- schedule ---


def schedule(section: OptimConfig, total_steps: int) -> tuple[optax.Schedule, list[str]]:
    """The learning rate by step, and what had to be changed to make it fit a short run (said, never silent)."""
    warmup, notes = _warmup(section, total_steps)
    rest = decay = max(total_steps - warmup, 1)
    shapes = {
        "cosine": lambda: [optax.cosine_decay_schedule(section.lr, rest)],
        "linear": lambda: [optax.linear_schedule(section.lr, 0.0, rest)],
        "constant": lambda: [optax.constant_schedule(section.lr)],
        "wsd": lambda: [optax.constant_schedule(section.lr), optax.linear_schedule(section.lr, 0.0, max(decay, 1))],
    }
    boundaries = [warmup]
    if section.schedule == "wsd":
        share = section.decay_ratio or DECAY
        wanted = max(1, round(share * total_steps))
        decay = min(wanted, rest)
        if decay < wanted:
            notes.append(f"optim.decay_ratio {share:g} clamped to {decay} steps: after the warm-up the run has no more")
        boundaries.append(total_steps - decay)
    rise = optax.linear_schedule(0.0, section.lr, max(warmup, 1))
    # Step 0 already moves: the ramp counts from 1, or the first batch would be trained at rate zero.
    ramp = optax.join_schedules([lambda step: rise(step + 1), *shapes[section.schedule]()], boundaries)
    return ramp, notes


def _warmup(section: OptimConfig, total_steps: int) -> tuple[int, list[str]]:
    if section.warmup_ratio is not None:
        return min(round(section.warmup_ratio * total_steps), total_steps - 1), []
    if section.warmup_steps < total_steps:
        return section.warmup_steps, []
    clamped = total_steps // 10
    return clamped, [f"optim.warmup_steps {section.warmup_steps} clamped to {clamped}: the run has {total_steps} steps"]


# --- optimizer ---


def optimizer(
    section: OptimConfig, rate: optax.Schedule, roles: Mapping[str, Role] | None = None
) -> optax.GradientTransformation:
    """Clipping, the named optimizer, LoRA+'s ratio. Without roles every tensor decays, and none is special."""
    clip = optax.identity() if section.clip is None else optax.clip_by_global_norm(section.clip)
    moving = {path: role for path, role in (roles or {}).items() if not role.still}
    chain = [clip, _named(section, rate, moving)]
    if section.loraplus_ratio != 1:
        faster = {path: role.faster for path, role in moving.items()}
        chain.append(optax.masked(optax.scale(section.loraplus_ratio), lambda tree: _only(tree, faster)))
    whole = optax.chain(*chain)
    if len(moving) == len(roles or {}):
        return whole
    labels = {path: "still" if role.still else "moving" for path, role in (roles or {}).items()}
    return optax.partition({"moving": whole, "still": optax.set_to_zero()}, labels)


def _only(tree: Any, chosen: Mapping[str, Any]) -> Any:
    """`chosen` as a tree like the optimizer's: what another part of it takes care of is not there."""
    return {path: leaf if isinstance(leaf, optax.MaskedNode) else chosen[path] for path, leaf in tree.items()}


def _named(section: OptimConfig, rate: optax.Schedule, roles: Mapping[str, Role]) -> optax.GradientTransformation:
    given = {name: value for name in ("b1", "b2", "eps") if (value := getattr(section, name)) is not None}
    decays = {path: role.decays for path, role in roles.items()}
    mask = (lambda tree: _only(tree, decays)) if roles else None
    if section.name == "adamw":
        return optax.adamw(rate, weight_decay=section.weight_decay, mask=mask, **given)
    if section.name == "lion":
        return optax.lion(rate, weight_decay=section.weight_decay, mask=mask, **given)
    if section.name == "adafactor":
        theirs = {"b1": "momentum", "b2": "decay_rate", "eps": "eps"}
        # Optax adds this decay to the finished update, the rate not in it: every other optimizer's has the rate.
        decay = (lambda step: section.weight_decay * rate(step)) if section.weight_decay else None
        return optax.adafactor(rate, weight_decay_rate=decay, weight_decay_mask=mask,
                               **{theirs[name]: value for name, value in given.items()})  # fmt: skip
    theirs = {"b1": "beta", "b2": "adam_b2", "eps": "eps"}
    matrices = {path: role.matrix and MuonDimensionNumbers(*role.matrix) for path, role in roles.items()}
    return muon(rate, weight_decay=section.weight_decay, weight_decay_mask=mask,
                muon_weight_dimension_numbers=(lambda tree: _only(tree, matrices)) if roles else None,
                **{theirs[name]: value for name, value in given.items()})  # fmt: skip


# --- its state on a mesh ---


def state_shardings(state: Any, trained: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> Any:
    """Moments lie as the tensor that they belong to; sums over one of its dims as the rest of it; all else is whole."""
    whole = NamedSharding(next(iter(shardings.values())).mesh, PartitionSpec())

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in trained]
        if not names:
            return whole
        shape, sharding = tuple(trained[names[-1]].shape), shardings[names[-1]]
        if tuple(leaf.shape) == shape:
            return sharding
        spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
        for dim in range(len(shape)):
            if tuple(leaf.shape) == shape[:dim] + shape[dim + 1 :]:
                return NamedSharding(sharding.mesh, PartitionSpec(*spec[:dim], *spec[dim + 1 :]))
        return whole

    return jax.tree_util.tree_map_with_path(of, state)


def state_shapes(
    section: OptimConfig, model: Decoder, shardings: Mapping[str, NamedSharding]
) -> list[tuple[tuple[int, ...], tuple[int, ...], jnp.dtype]]:
    """For planning: (shape, shard, dtype) of all that the optimizer holds beside what trains."""
    trained = {
        path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, variable in loading.variables(model, model.trains).items()
    }
    state = jax.eval_shape(optimizer(section, optax.constant_schedule(section.lr), roles(model)).init, trained)
    placed = state_shardings(state, trained, shardings)
    return [
        (tuple(leaf.shape), sharding.shard_shape(tuple(leaf.shape)), leaf.dtype)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    ]
