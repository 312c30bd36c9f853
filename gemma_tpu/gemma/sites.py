"""The projections of a model that an adapter can sit on, and which of them a config chooses.

Targets are names or one regex over module names, the checkpoint's (`q_proj`) or ours (`kv_einsum`). A target that
matches nothing is an error, and so is a projection that exists, was not excluded and was not matched: a layer
type that silently gets no adapter is how published recipes went wrong.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tpu.errors import UserError
from gemma_tpu.gemma.mesh import RULES
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import ExpertProjection, Projection, weight_letters
from gemma_tpu.gemma.variants import Block

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Ours -> the checkpoint's names. Where K and V are one tensor, its adapter holds an A for K and an A for V.
NAMES = {"kv_einsum": ("k_proj", "v_proj"), "k_einsum": ("k_proj",)}


Matcher = Callable[[str, "Site"], bool]  # whether a target means a site


@dataclass(frozen=True)
class Site:
    """One projection of one slot of a block, standing for `repeats` layers."""

    block: Block
    slot: int
    path: str  # blocks.0.5.attention.k_einsum
    projection: Projection | ExpertProjection

    @property
    def name(self) -> str:
        return self.projection.name

    @property
    def of_experts(self) -> bool:
        """Routed experts get adapters only where a target names them: 128 of each, and few frameworks serve them."""
        return isinstance(self.projection, ExpertProjection)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return NAMES.get(self.name, (self.name,))

    @property
    def layers(self) -> list[int]:
        return [self.block.layer_index(self.slot, repeat) for repeat in range(self.block.repeats)]

    @property
    def _letters(self) -> tuple[str, str, str]:
        one = self.projection
        return ("E", "O", "I") if isinstance(one, ExpertProjection) else weight_letters(one.equation)

    def a_shape(self, rank: int) -> tuple[int, ...]:
        stack, _, inside = self._dims()
        return (self.block.repeats, *stack, rank, *inside)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        stack, out, _ = self._dims()
        return (self.block.repeats, *stack, *out, rank)

    @property
    def lead(self) -> tuple[int, ...]:
        """The dims that tell its adapters apart: layers, and K and V where both are in one tensor."""
        stack = () if self.of_experts else self._dims()[0]
        return (self.block.repeats, *stack)

    @property
    def b_dims(self) -> tuple[int, ...]:
        """The dims of A before its rank."""
        return (self.block.repeats, *self._dims()[0])

    def _dims(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        (stack, out, _), dims = self._letters, self.projection.w.shape[1:]
        inside = len(stack) + len(out)
        return dims[: len(stack)], dims[len(stack) : inside], dims[inside:]

    @property
    def fan_in(self) -> int:
        return int(np.prod(self._dims()[2]))

    def axes(self) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """Logical axes of A and B: those of the base weight, and the adapter's own rank where those leave fsdp free."""
        stack, out, _ = self._letters
        named = self.projection.w.get_metadata()["axes"][1:]
        split, end = len(stack), len(stack) + len(out)

        def rank(others: Sequence[str | None]) -> str | None:
            return None if any("fsdp" in RULES.get(axis or "", ()) for axis in others) else "rank"

        a = ("layers", *named[:split], rank((*named[:split], *named[end:])), *named[end:])
        return a, ("layers", *named[:end], rank(named[:end]))


def sites(model: Decoder) -> Iterator[Site]:
    for b, (block, layers) in enumerate(zip(model.arch.blocks, model.blocks, strict=True)):
        for slot, layer in enumerate(layers):
            for part in ("attention", "mlp", "experts"):
                for name, module in vars(getattr(layer, part, None) or object).items():
                    if isinstance(module, Projection | ExpertProjection):
                        yield Site(block, slot, f"blocks.{b}.{slot}.{part}.{name}", module)


def select(model: Decoder, targets: str | Sequence[str], exclude: Sequence[str] = ()) -> list[Site]:
    """The sites that `targets` (names, or one regex) picks; refuses what matches nothing or leaves something out."""
    every = list(sites(model))
    if isinstance(targets, str):
        targets = ALL if targets == "all" else (targets,)
        match: Matcher = _regex_matcher
    else:
        match = _name_matcher
    hits = {target: [site for site in every if match(target, site)] for target in targets}
    left_out = {name: [site for site in every if _name_matcher(name, site)] for name in exclude}
    # One of the seven may be absent by architecture (v_proj, where every layer takes V from K): no mistake.
    unknown = [t for t, found in {**hits, **left_out}.items() if not found and t not in ALL]
    if unknown:
        named = ", ".join(map(repr, unknown))
        raise UserError(f"lora.targets: nothing matches {named}; there are:\n{inventory(every)}")
    excluded = {site.path for found in left_out.values() for site in found}
    chosen = {site.path for found in hits.values() for site in found} - excluded
    forgotten = [s for s in every if not s.of_experts and s.path not in chosen and s.path not in excluded]
    if forgotten:
        raise UserError(
            "lora.targets leaves out projections that exist; add them, or name them in lora.exclude:\n"
            + inventory(forgotten)
        )
    if not chosen:
        raise UserError("lora.targets minus lora.exclude leaves nothing to train")
    parts = [site for site in every if _in_part(site, targets, match) or _in_part(site, exclude, _name_matcher)]
    if parts:
        raise UserError(
            "lora.targets and lora.exclude take a whole projection (K and V of a kv_einsum, and its layers, are one "
            "tensor); these are named in part:\n" + inventory(parts)
        )
    return [site for site in every if site.path in chosen]


def _name_matcher(target: str, site: Site) -> bool:
    return target == site.name or target in site.hf_names


def _regex_matcher(target: str, site: Site) -> bool:
    if site.of_experts and "experts" not in target:
        return False
    return any(re.search(target, name) for name in (site.path, *_hf_paths(site)))


def _hf_paths(site: Site) -> list[str]:
    part = "" if site.of_experts else "self_attn." if ".attention." in site.path else "mlp."
    return [f"layers.{i}.{part}{name}" for i in site.layers for name in site.hf_names]


def _in_part(site: Site, targets: Sequence[str], match: Matcher) -> bool:
    """Do the targets name some of the checkpoint's tensors that this site stands for, but not all of them?"""
    if match is _regex_matcher:
        if any(re.search(target, site.path) for target in targets):
            return False
        named = [any(re.search(target, path) for target in targets) for path in _hf_paths(site)]
    else:
        if site.name in targets:
            return False
        named = [name in targets for name in site.hf_names]
    return any(named) and not all(named)


def inventory(found: Sequence[Site]) -> str:
    rows: dict[tuple[str, str], list[int]] = {}
    for site in found:
        kind = site.block.period[site.slot].kind
        rows.setdefault((site.name, kind), []).extend(site.layers)
    lines = []
    for (name, kind), layers in rows.items():
        hf = "" if NAMES.get(name) is None else f" ({', '.join(NAMES[name])} in the checkpoint)"
        lines.append(f"  {name}{hf}: {len(layers)} {kind} layers")
    return "\n".join(lines)
