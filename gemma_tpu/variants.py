"""Architectures as data: what a checkpoint's config.json says, in one frozen record that the model is built from.

The shapes come from config.json, never from a name. transformers rewrites a Gemma 4 config when it saves
(`global_head_dim` becomes `per_layer_config`), so both forms are read here, straight from the JSON.
An architecture or an option that the model does not implement is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_tpu.errors import UserError

TEXT_TYPES = ("gemma4_text",)
MULTIMODAL_TYPES = ("gemma4",)

# Options of the reference that change the computation and that this model has at one value only.
FIXED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False, "vision"),
    "tie_word_embeddings": (True, None),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "enable_moe_block": (False, None),
}

# What the reference takes where a key is absent, for the keys whose absence would change the model.
REFERENCE_DEFAULTS: dict[str, Any] = {"hidden_size_per_layer_input": 256, "global_head_dim": 512}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer kind; `partial` is the share of the head's dims that turn at all."""

    theta: float
    partial: float = 1.0


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Layers that compare equal can share one compiled body."""

    head_dim: int
    kv_heads: int
    mlp: int
    rope: Rope
    window: int | None  # None: attends to everything before it
    k_eq_v: bool = False  # V is the raw K projection; there is no v_proj

    @property
    def kind(self) -> str:
        return "global" if self.window is None else "local"


@dataclass(frozen=True)
class Block:
    """`period` layers, repeated: stacked along a leading axis and scanned. Covers layers first … first + n - 1."""

    first: int
    period: tuple[Layer, ...]
    repeats: int

    def layer_index(self, slot: int, repeat: int) -> int:
        return self.first + repeat * len(self.period) + slot


@dataclass(frozen=True)
class Architecture:
    vocab: int
    hidden: int
    heads: int
    layers: tuple[Layer, ...]
    eps: float
    logit_softcap: float | None
    context: int
    prefix: str  # of the text tower's tensors in the checkpoint, e.g. "model.language_model."

    @property
    def blocks(self) -> tuple[Block, ...]:
        return find_blocks(self.layers)

    def with_prefix(self, prefix: str) -> "Architecture":
        return replace(self, prefix=prefix)


def find_blocks(layers: tuple[Layer, ...], first: int = 0) -> tuple[Block, ...]:
    """Cover the layers with repeated periods, the longest cover first; what does not repeat is one block of its own.

    31B is one block (5 local + 1 global) x 10, so that 60 layers compile like 6.
    """
    if not layers:
        return ()
    best_period, best_repeats = len(layers), 1
    for period in range(1, len(layers) // 2 + 1):
        repeats = 1
        while layers[repeats * period : (repeats + 1) * period] == layers[:period]:
            repeats += 1
        longer = repeats * period > best_period * best_repeats or best_repeats == 1
        if repeats > 1 and longer:
            best_period, best_repeats = period, repeats
    covered = best_period * best_repeats
    head = Block(first, layers[:best_period], best_repeats)
    return (head, *find_blocks(layers[covered:], first + covered))


def from_config(config: Mapping[str, Any]) -> Architecture:
    """The text tower that a checkpoint's config.json describes."""
    model_type = config.get("model_type")
    if model_type in MULTIMODAL_TYPES:
        text, prefix = config.get("text_config"), "model.language_model."
        if not isinstance(text, Mapping):
            raise UserError(f"config.json: model_type {model_type!r} needs a text_config object")
    elif model_type in TEXT_TYPES:
        text, prefix = config, "model."
    else:
        known = ", ".join(MULTIMODAL_TYPES + TEXT_TYPES)
        raise UserError(f"config.json: model_type is {model_type!r}; this version implements: {known}")
    problems = [
        f"{key} is {text.get(key, REFERENCE_DEFAULTS.get(key))!r}; only {allowed[0]!r} is implemented"
        for key, allowed in FIXED_OPTIONS.items()
        if text.get(key, REFERENCE_DEFAULTS.get(key, allowed[0])) not in allowed
    ]
    missing = [key for key in _REQUIRED if text.get(key) is None]
    problems += [f"{key} is missing" for key in missing]
    if problems:
        raise UserError("config.json: " + "; ".join(problems))
    return Architecture(
        vocab=text["vocab_size"],
        hidden=text["hidden_size"],
        heads=text["num_attention_heads"],
        layers=tuple(_layer(text, index) for index in range(text["num_hidden_layers"])),
        eps=float(text.get("rms_norm_eps", 1e-6)),
        logit_softcap=text.get("final_logit_softcapping"),
        context=int(text.get("max_position_embeddings", 131072)),
        prefix=prefix,
    )


_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rope_parameters",
)  # fmt: skip


def _layer(text: Mapping[str, Any], index: int) -> Layer:
    kinds = text["layer_types"]
    if len(kinds) != text["num_hidden_layers"]:
        raise UserError(
            f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers {text['num_hidden_layers']}"
        )
    kind = kinds[index]
    if kind not in ("sliding_attention", "full_attention"):
        raise UserError(f"config.json: layer_types[{index}] is {kind!r}; known: sliding_attention, full_attention")
    full = kind == "full_attention"
    if not full and index == len(kinds) - 1:  # the reference would silently run it as full_attention
        raise UserError(f"config.json: layer_types[{index}] is {kind!r}; the last layer must be full_attention")
    k_eq_v = full and bool(text.get("attention_k_eq_v"))
    rewritten = text.get("per_layer_config")  # present, it says everything: {} where global layers are no different
    override = {int(key): value for key, value in (rewritten or {}).items()}.get(index, {})  # keys like "05"
    head_dim, kv_heads = text["head_dim"], text["num_key_value_heads"]
    if full and rewritten is None:
        head_dim = text.get("global_head_dim", REFERENCE_DEFAULTS["global_head_dim"])
        if k_eq_v:  # the reference reads the global KV head count only for models that share K and V
            kv_heads = text.get("num_global_key_value_heads") or kv_heads
    return Layer(
        head_dim=override.get("head_dim", head_dim),
        kv_heads=override.get("num_key_value_heads", kv_heads),
        mlp=text["intermediate_size"],
        rope=_rope(text["rope_parameters"], kind),
        window=None if full else text["sliding_window"],
        k_eq_v=k_eq_v,
    )


def _rope(parameters: Mapping[str, Any], kind: str) -> Rope:
    entry = parameters.get(kind)
    if not isinstance(entry, Mapping):
        raise UserError(f"config.json: rope_parameters has no entry for {kind}")
    rope_type = entry.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise UserError(f"config.json: rope_parameters.{kind}.rope_type is {rope_type!r}; known: default, proportional")
    if entry.get("factor", 1.0) != 1.0:
        raise UserError(f"config.json: rope_parameters.{kind}.factor is {entry['factor']!r}; only 1.0 is implemented")
    partial = float(entry.get("partial_rotary_factor", 1.0)) if rope_type == "proportional" else 1.0
    return Rope(theta=float(entry["rope_theta"]), partial=partial)


_LOCAL, _GLOBAL = Rope(10_000.0), Rope(1_000_000.0, 0.25)


def gemma4_31b() -> Architecture:
    """The published geometry of Gemma 4 31B, for planning and tests without a checkpoint."""
    local = Layer(head_dim=256, kv_heads=16, mlp=21504, rope=_LOCAL, window=1024)
    full = Layer(head_dim=512, kv_heads=4, mlp=21504, rope=_GLOBAL, window=None, k_eq_v=True)
    return Architecture(
        vocab=262144, hidden=5376, heads=32, layers=((local,) * 5 + (full,)) * 10, eps=1e-6,
        logit_softcap=30.0, context=262144, prefix="model.language_model.",
    )  # fmt: skip
