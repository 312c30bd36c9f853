"""Adapters on a model's projections: of which rank and scale, what they add, and how A and B start.

Layers of a stack may differ in rank and scale, and some may have no adapter: the stack is as wide as its widest, and
what lies beyond a layer's own rank is zero in A and in B, where no gradient can move it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import jax.numpy as jnp
import numpy as np

from gemma_tpu.errors import UserError
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import Constant, LoRA, shaped
from gemma_tpu.gemma.sites import ALL, Site, inventory, select, sites
from gemma_tpu.schema import LoraConfig


@dataclass(frozen=True)
class Member:
    """One adapter of a stacked site: of one layer, and of K or V where both are in one tensor."""

    layer: int
    names: tuple[str, ...]  # layers.3.self_attn.q_proj and layers.3.q_proj: what a pattern may match


def members(site: Site) -> list[Member]:
    """In the order of the site's leading dims: layer by layer, K before V."""
    part = "" if site.of_experts else "self_attn." if ".attention." in site.path else "mlp."
    apart = site.name == "kv_einsum"  # its K and its V have an adapter each
    names = [(name, site.name) for name in site.hf_names] if apart else [(*site.hf_names, site.name)]
    return [
        Member(layer, tuple(f"layers.{layer}.{part}{name}" for name in every))
        for layer in site.layers for every in names
    ]  # fmt: skip


def inject(
    model: Decoder, *, targets: str | Sequence[str] = ALL, exclude: Sequence[str] = (), rank: int, alpha: float,
    dropout: float = 0.0, rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None, layers: Sequence[int] | None = None, rslora: bool = False,
    dora: bool = False, init: str = "kaiming",
) -> list[Site]:  # fmt: skip
    """Put an adapter on every chosen projection, as shapes; `start.begin` or a checkpoint gives the values."""
    chosen = select(model, targets, exclude)
    if dora and any(site.of_experts for site in chosen):
        raise UserError("lora.dora: routed experts have no DoRA (nor has PEFT); leave experts out of lora.targets")
    wanted = _layers(model, layers)
    ranks = _Pattern("lora.rank_pattern", rank_pattern or {}, rank)
    alphas = _Pattern("lora.alpha_pattern", alpha_pattern or {}, alpha)
    sized: dict[str, tuple[list[int], list[float]]] = {}
    for site in chosen:
        asked = [(member, ranks.of(member), alphas.of(member)) for member in members(site)]
        found = [(r, a) if member.layer in wanted else (0, 0.0) for member, r, a in asked]
        scales = [a / (r**0.5 if rslora else r) if r else 0.0 for r, a in found]
        sized[site.path] = [r for r, _ in found], scales
    ranks.check(chosen)
    alphas.check(chosen)
    chosen = [site for site in chosen if any(sized[site.path][0])]
    for site in chosen:
        _attach(site, *sized[site.path], dropout, dora, init == "pissa")
    return chosen


def inject_config(model: Decoder, section: LoraConfig) -> list[Site]:
    asked = {field.name: getattr(section, field.name) for field in fields(section) if field.name != "init_from"}
    return inject(model, **asked)


def _layers(model: Decoder, layers: Sequence[int] | None) -> set[int]:
    count = len(model.arch.layers)
    if wrong := sorted(layer for layer in layers or () if layer >= count):
        raise UserError(f"lora.layers: {', '.join(map(str, wrong))}: the model's layers are 0 to {count - 1}")
    return set(range(count) if layers is None else layers)


@dataclass
class _Pattern:
    """{pattern: value}: the first pattern that is the end of a module's path, as PEFT reads them, decides."""

    key: str
    table: Mapping[str, Any]
    default: Any
    used: set[str] = field(default_factory=set)

    def of(self, member: Member) -> Any:
        for pattern, value in self.table.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in member.names):
                self.used.add(pattern)
                return value
        return self.default

    def check(self, chosen: Sequence[Site]) -> None:
        if unused := [pattern for pattern in self.table if pattern not in self.used]:
            named = ", ".join(map(repr, unused))
            raise UserError(f"{self.key}: {named} decides nothing; the adapters are on:\n{inventory(chosen)}")


def inject_like(model: Decoder, shapes: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[Site]:
    """The adapters that a checkpoint holds, by its {path: (shape, dtype)} and the `adapter` of its record; every one
    of them must find its place."""
    chosen = [site for site in sites(model) if f"{site.path}.lora_a" in shapes]
    layout = adapter.get("layout", {})
    for site in chosen:
        count = len(members(site))
        own = layout.get(site.path, {"ranks": [adapter["rank"]] * count,
                                     "scales": [adapter["alpha"] / adapter["rank"]] * count})  # fmt: skip
        _attach(site, own["ranks"], own["scales"], 0.0, f"{site.path}.lora_magnitude" in shapes,
                f"{site.path}.lora_a0" in shapes)  # fmt: skip
    placed = {
        f"{site.path}.{name}" for site in chosen for name, value in vars(site.projection).items()
        if isinstance(value, LoRA)
    }  # fmt: skip
    if set(shapes) != placed:
        lost = "\n  ".join(sorted(set(shapes) ^ placed))
        raise UserError(f"these adapter tensors belong to no projection of this model:\n  {lost}")
    return chosen


def _attach(site: Site, ranks: Sequence[int], scales: Sequence[float], dropout: float, dora: bool, pissa: bool) -> None:
    one, rank = site.projection, max(ranks)

    def tensor(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> LoRA:
        return shaped(LoRA, shape, jnp.float32, axes)

    axes_a, axes_b = site.axes()
    one.lora_a, one.lora_b = tensor(site.a_shape(rank), axes_a), tensor(site.b_shape(rank), axes_b)
    if pissa:
        one.lora_a0, one.lora_b0 = tensor(site.a_shape(rank), axes_a), tensor(site.b_shape(rank), axes_b)
    if dora:
        named = site.projection.w.get_metadata()["axes"]
        shape = site.b_shape(rank)[:-1]
        one.lora_magnitude = tensor(shape, named[: len(shape)])
    one.lora_ranks, one.lora_dropout = tuple(ranks), dropout
    one.lora_scale = scales[0] if len(set(scales)) == 1 else tuple(scales)
    if len(set(scales)) > 1:
        shape, axes = site.lead, ("layers", None)[: len(site.lead)]
        if site.of_experts:  # with the experts' dim in front, as all that lies on their devices
            shape, axes = (*shape, one.w.shape[1]), ("layers", "experts")
        one.lora_scales = shaped(Constant, shape, jnp.float32, axes)


def constants(model: Decoder) -> dict[str, np.ndarray]:
    """The values of adapters that a run neither trains nor saves: the scales of stacks whose layers differ."""
    values = {}
    for site in sites(model):
        if (held := site.projection.lora_scales) is not None:
            scales = np.asarray(site.projection.lora_scale, np.float32).reshape(site.lead)
            values[f"{site.path}.lora_scales"] = (
                np.repeat(scales[:, None], held.shape[1], 1) if site.of_experts else scales
            )
    return values


def record(model: Decoder, section: LoraConfig) -> dict[str, Any]:
    """For the record of a checkpoint: rank and scale of every layer of each stack (of its K and its V)."""
    return {"rank": section.rank, "alpha": section.alpha, "layout": layout(model)}


class Layout(TypedDict):
    """Of one stack: its layers (K and V of each, where both are one tensor), one after the other."""

    ranks: list[int]
    scales: list[float]


def layout(model: Decoder) -> dict[str, Layout]:
    found: dict[str, Layout] = {}
    for site in sites(model):
        one = site.projection
        if one.lora_a is not None:
            scales = one.lora_scale if isinstance(one.lora_scale, tuple) else [one.lora_scale] * len(one.lora_ranks)
            found[site.path] = {"ranks": list(one.lora_ranks), "scales": list(scales)}
    return found


def initial(model: Decoder, seed: int) -> dict[str, np.ndarray]:
    """A as PEFT draws it (Kaiming uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in))), B zero."""
    values: dict[str, np.ndarray] = {}
    adapted = [(site, pair) for site in sites(model) if (pair := site.projection.adapter) is not None]
    for number, (site, (a, b)) in enumerate(adapted):
        bound = 1.0 / np.sqrt(site.fan_in)
        draw = np.random.Generator(np.random.PCG64([seed, number]))
        values[f"{site.path}.lora_a"] = within_ranks(site, draw.uniform(-bound, bound, a.shape).astype(np.float32))
        values[f"{site.path}.lora_b"] = np.zeros(b.shape, np.float32)
    return values


def within_ranks(site: Site, a: np.ndarray) -> np.ndarray:
    """A with zeros beyond each layer's own rank."""
    rank_dim = len(site.b_dims)
    ranks = np.asarray(site.projection.lora_ranks).reshape(site.lead + (1,) * (rank_dim - len(site.lead)))
    inside = np.arange(a.shape[rank_dim]) < ranks[..., None]
    return a * inside.reshape(inside.shape + (1,) * (a.ndim - inside.ndim))


def absent(model: Decoder) -> list[str]:
    """Projections that layers lack by architecture: said, and no error."""
    lines = []
    k_eq_v = sum(layer.k_eq_v for layer in model.arch.layers)
    if k_eq_v:
        lines.append(f"v_proj: absent by architecture in {k_eq_v} global layers (V is the K projection there)")
    shared = sum(layer.kv_shared for layer in model.arch.layers)
    if shared:
        lines.append(f"k_proj, v_proj: absent by architecture in {shared} layers that share those of earlier layers")
    return lines


def table(chosen: Sequence[Site]) -> str:
    """What will be trained: module, layers, shape, rank, parameters, dtype; and what is held for nothing."""
    rows: dict[tuple[str, tuple[int, ...]], tuple[int, int, set[int]]] = {}
    for site in chosen:
        shape = tuple(site.projection.w.shape[1:])
        layers, held, ranks = rows.get((site.name, shape), (0, 0, set()))
        found = {rank for rank in site.projection.lora_ranks if rank}
        used = np.asarray(site.projection.lora_ranks).reshape(site.lead).any(axis=tuple(range(1, len(site.lead))))
        rows[site.name, shape] = (layers + int(used.sum()), held + trained(site), ranks | found)
    lines = [f"{'module':<22}{'layers':>7}  {'weight':<22}{'rank':>7}{'parameters':>15}  dtype"]
    for (name, shape), (layers, size, ranks) in rows.items():
        rank = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}"
        lines.append(f"{name:<22}{layers:>7}  {'x'.join(map(str, shape)):<22}{rank:>7}{size:>15,}  float32")
    total = sum(size for _, size, _ in rows.values())
    lines.append(f"{'total':<22}{'':>7}  {'':<22}{'':>7}{total:>15,}")
    parts = [v for one in chosen for v in (*(one.projection.adapter or ()), one.projection.lora_magnitude)]
    in_memory = sum(int(np.prod(v.shape)) for v in parts if v is not None)
    if in_memory > total:
        lines.append(f"held in memory: {in_memory:,}; layers of one stack are as wide as its widest, zeros beyond "
                     "their own")  # fmt: skip
    return "\n".join(lines)


def trained(site: Site) -> int:
    """Numbers of one site that training moves: within each layer's own rank."""
    one = site.projection
    a, b = (int(np.prod(shape)) for shape in (site.a_shape(1), site.b_shape(1)))
    count, sizes = len(one.lora_ranks), sum(one.lora_ranks)
    rows = 0 if one.lora_magnitude is None else b // count * sum(rank > 0 for rank in one.lora_ranks)
    return (a + b) // count * sizes + rows


def shares(model: Decoder) -> dict[str, float]:
    """How much of each adapter tensor trains: what is beyond a layer's own rank, and PiSSA's start, does not."""
    found: dict[str, float] = {}
    for site in sites(model):
        if (ranks := site.projection.lora_ranks):
            inside = sum(ranks) / (len(ranks) * max(ranks))
            chosen = sum(rank > 0 for rank in ranks) / len(ranks)
            found |= {f"{site.path}.lora_a": inside, f"{site.path}.lora_b": inside,
                      f"{site.path}.lora_magnitude": chosen}  # fmt: skip
    return found


def count(model: Decoder) -> int:
    return sum(trained(site) for site in sites(model) if site.projection.lora_a is not None)
