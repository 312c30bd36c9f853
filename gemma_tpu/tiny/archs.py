"""The tiny architectures, one row each: the family's layout, small sizes in the proportions of the real ones, towers.

Layer counts keep what the real ones have: whole periods that end in a global layer (Gemma 4), layers that share the
keys and values of lower ones (E2B, E4B), a last period cut short so that the last layer is local (Gemma 3 1B, 4B, 27B).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_tpu.tiny.tokenizer import GEMMA3_WORDS, GEMMA4_WORDS, Words
from gemma_tpu.tiny.towers import (
    AUDIO,
    CLIPPED_VISION,
    SIGLIP,
    STANDARDIZED_VISION,
    UNIFIED_AUDIO,
    UNIFIED_VISION,
    Tower,
)


@dataclass(frozen=True)
class TinyDims:
    """Sizes of a tiny model; `pattern` sliding layers come before each global one. What defaults to 0 may be 0."""

    layers: int = 6
    pattern: int = 5
    hidden: int = 128
    mlp: int = 384
    heads: int = 8
    kv_heads: int = 4
    global_kv_heads: int = 4
    head_dim: int = 32
    global_head_dim: int = 64
    window: int = 64
    vocab: int = 1024
    max_positions: int = 4096
    kv_shared: int = 0  # how many of the last layers use the keys and values of lower ones
    per_layer_input: int = 0  # width of the per-layer embeddings
    experts: int = 0
    top_k: int = 0
    expert_mlp: int = 0
    query_scalar: int = 0  # Gemma 3's query_pre_attn_scalar; 0: head_dim

    def is_global(self, layer: int) -> bool:
        return layer % (self.pattern + 1) == self.pattern

    def is_shared(self, layer: int) -> bool:
        return layer >= self.layers - self.kv_shared


@dataclass(frozen=True)
class Family:
    """`name` is the model_type, `cls` what transformers' classes begin with, `prefix` where the text tower lies."""

    name: str
    cls: str
    prefix: str
    words: Words
    template: str
    lacks: frozenset[str]  # sizes of TinyDims that mean nothing here
    is_gemma3: bool = False


GEMMA4 = Family(
    "gemma4", "Gemma4", "model.language_model.", GEMMA4_WORDS, "chat_template.jinja", frozenset({"query_scalar"})
)
UNIFIED = Family(
    "gemma4_unified", "Gemma4Unified", "model.language_model.", GEMMA4_WORDS, "chat_template.jinja",
    frozenset({"query_scalar", "per_layer_input", "experts", "top_k", "expert_mlp"}),
)  # fmt: skip
GEMMA3 = Family(
    "gemma3", "Gemma3", "language_model.model.", GEMMA3_WORDS, "chat_template_gemma3.jinja",
    frozenset({"global_kv_heads", "global_head_dim", "kv_shared", "per_layer_input", "experts", "top_k", "expert_mlp"}),
    is_gemma3=True,
)  # fmt: skip


@dataclass(frozen=True)
class TinyArch:
    """One size of a family. Without towers it is published as a text-only model."""

    title: str
    family: Family
    dims: TinyDims
    towers: tuple[Tower, ...]
    text: Mapping[str, Any] = field(default_factory=dict)  # text config keys that other sizes have otherwise
    empty_thought: bool = False  # does the generation prompt open and close an empty thought channel
    lists_layers: bool = False  # Gemma 3: does the config list each layer's kind, or only give the period

    @property
    def k_eq_v(self) -> bool:
        return bool(self.text.get("attention_k_eq_v"))

    def lacks(self, size: str) -> bool:
        # Where V is not K, the reference does not read the number of global KV heads.
        return size in self.family.lacks or (size == "global_kv_heads" and not self.k_eq_v)

    def kv_shape(self, sizes: TinyDims, layer: int) -> tuple[int, int]:
        """KV heads and head size of one layer."""
        if self.family.is_gemma3 or not sizes.is_global(layer):
            return sizes.kv_heads, sizes.head_dim
        return sizes.global_kv_heads if self.k_eq_v else sizes.kv_heads, sizes.global_head_dim

    def mlp(self, sizes: TinyDims, layer: int) -> int:
        wide = self.text.get("use_double_wide_mlp") and sizes.is_shared(layer)
        return sizes.mlp * 2 if wide else sizes.mlp

    def broken_rules(self, sizes: TinyDims) -> list[str]:
        """What these sizes may not be, each with its numbers."""
        own, period = sizes.layers - sizes.kv_shared, sizes.pattern + 1
        rules = {  # rule: does it hold
            f"heads ({sizes.heads}) must be a multiple of kv_heads ({sizes.kv_heads})": (
                sizes.heads % sizes.kv_heads == 0
            ),
            f"head_dim ({sizes.head_dim}) must be even": sizes.head_dim % 2 == 0,
            f"layers less kv_shared ({own}) must be at least pattern + 1 ({period}): a local and a global "
            "layer with keys of their own": not sizes.kv_shared or own >= period,
            f"top_k ({sizes.top_k}) must lie between 1 and experts ({sizes.experts})": (
                not sizes.experts or 1 <= sizes.top_k <= sizes.experts
            ),
            f"expert_mlp ({sizes.expert_mlp}) must be at least 1 with experts ({sizes.experts})": (
                not sizes.experts or sizes.expert_mlp > 0
            ),
        }
        if self.family.is_gemma3:
            rules[f"hidden ({sizes.hidden}) must be a multiple of heads ({sizes.heads})"] = (
                sizes.hidden % sizes.heads == 0
            )
        else:
            rules[f"layers ({sizes.layers}) must be a multiple of pattern + 1 ({period})"] = sizes.layers % period == 0
            # The proportional rotation turns a quarter of the pairs of a global head.
            rules[f"global_head_dim ({sizes.global_head_dim}) must be a multiple of 8"] = sizes.global_head_dim % 8 == 0
        if self.k_eq_v:
            rules[f"heads ({sizes.heads}) must be a multiple of global_kv_heads ({sizes.global_kv_heads})"] = (
                sizes.heads % sizes.global_kv_heads == 0
            )
        return [rule for rule, holds in rules.items() if not holds]


_EDGE = {"attention_k_eq_v": False, "use_bidirectional_attention": None}
_LARGE = {"attention_k_eq_v": True, "use_bidirectional_attention": "vision"}
_SCALED = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}

# Float32 against float64 changes no logit of any of them by 3e-5: what compares implementations needs that. Hence the
# wide per-layer embeddings: their gated product is normed, which magnifies the rounding of the few small products.
ARCHS: dict[str, TinyArch] = {
    "gemma4-e2b": TinyArch(
        "Gemma 4 E2B", GEMMA4,
        TinyDims(layers=15, pattern=4, hidden=64, mlp=128, kv_heads=1, kv_shared=10, per_layer_input=48, window=32),
        (CLIPPED_VISION, AUDIO), _EDGE | {"use_double_wide_mlp": True},
    ),
    "gemma4-e4b": TinyArch(
        "Gemma 4 E4B", GEMMA4,
        TinyDims(layers=18, hidden=64, mlp=160, kv_heads=2, kv_shared=6, per_layer_input=48, window=32),
        (CLIPPED_VISION, AUDIO), _EDGE,
    ),
    "gemma4-12b": TinyArch(
        "Gemma 4 12B", UNIFIED, TinyDims(layers=12, hidden=96, mlp=256, global_kv_heads=1),
        (UNIFIED_VISION, UNIFIED_AUDIO), _LARGE, empty_thought=True,
    ),
    "gemma4-26b-a4b": TinyArch(
        "Gemma 4 26B", GEMMA4,
        TinyDims(hidden=64, mlp=48, global_kv_heads=1, experts=8, top_k=2, expert_mlp=16),
        (STANDARDIZED_VISION,), _LARGE, empty_thought=True,
    ),
    "gemma4-31b": TinyArch(
        "Gemma 4 31B", GEMMA4, TinyDims(heads=4, window=128), (STANDARDIZED_VISION,), _LARGE, empty_thought=True,
    ),
    "gemma3-270m": TinyArch(
        "Gemma 3 270M", GEMMA3, TinyDims(hidden=64, mlp=192, heads=4, kv_heads=1, window=32), (),
        lists_layers=True,
    ),
    "gemma3-1b": TinyArch(
        "Gemma 3 1B", GEMMA3, TinyDims(layers=8, hidden=64, mlp=384, heads=4, kv_heads=1, window=32), (),
    ),
    "gemma3-4b": TinyArch(
        "Gemma 3 4B", GEMMA3, TinyDims(layers=10, hidden=64, mlp=256), (SIGLIP,), _SCALED,
    ),
    "gemma3-12b": TinyArch(
        "Gemma 3 12B", GEMMA3, TinyDims(layers=12, hidden=96, mlp=384), (SIGLIP,), _SCALED,
    ),
    "gemma3-27b": TinyArch(
        "Gemma 3 27B", GEMMA3, TinyDims(layers=14, hidden=96, mlp=384, query_scalar=42), (SIGLIP,), _SCALED,
    ),
}  # fmt: skip
