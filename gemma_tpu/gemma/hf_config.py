"""config.json -> Architecture: the families that are known, their reference defaults, and what is refused.

A published config leaves out what equals the reference's default, so each family carries those defaults here.
`tests/test_architectures.py` holds them against the installed transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.gemma.variants import Architecture, Experts, Layer, Rope

Text = Mapping[str, Any]
KINDS = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class Family:
    """What one model_type means: where its text tower lies, what an absent key stands for, what cannot be changed."""

    name: str
    prefix: str
    defaults: Mapping[str, Any]
    multimodal: bool = False
    norm_offset: float = 0.0
    is_gemma3: bool = False


# Options that change the computation, with the values that are implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False, "vision"),
    "tie_word_embeddings": (True,),
}
_COMMON: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "use_bidirectional_attention": None, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "final_logit_softcapping": None, "max_position_embeddings": 131072,
}  # fmt: skip
_GEMMA4: dict[str, Any] = _COMMON | {
    "vocab_size": 262144, "num_hidden_layers": 30, "sliding_window": 512, "global_head_dim": 512,
    "num_global_key_value_heads": None, "attention_k_eq_v": False, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "use_double_wide_mlp": False,
    "enable_moe_block": False,
}  # fmt: skip
_UNIFIED: dict[str, Any] = _GEMMA4 | {
    "sliding_window": 1024, "max_position_embeddings": 262144, "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
}  # fmt: skip
_GEMMA3: dict[str, Any] = _COMMON | {
    "vocab_size": 262208, "num_hidden_layers": 26, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "use_bidirectional_attention": False,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("gemma4", "model.language_model.", _GEMMA4, multimodal=True),
        Family("gemma4_text", "model.", _GEMMA4),
        Family("gemma4_unified", "model.language_model.", _UNIFIED, multimodal=True),
        Family("gemma4_unified_text", "model.", _UNIFIED),
        Family("gemma3", "language_model.model.", _GEMMA3, multimodal=True, norm_offset=1.0, is_gemma3=True),
        Family("gemma3_text", "model.", _GEMMA3, norm_offset=1.0, is_gemma3=True),
    )
}
# Where a text tower may lie; classes disagree, and a checkpoint saved by another class keeps its config.json.
PREFIXES = ("model.language_model.", "language_model.model.", "model.")


def from_config(config: Mapping[str, Any]) -> Architecture:
    """The text tower that a checkpoint's config.json describes."""
    kind = config.get("model_type", "")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        said = plain.shown(config.get("model_type"))
        raise UserError(f"config.json: model_type is {said}; this version implements: {known}")
    given = config.get("text_config") if family.multimodal else config
    if not isinstance(given, Mapping):
        raise UserError(f"config.json: model_type {family.name!r} needs a text_config object")
    plain.require(given, _FORM, "config.json")
    text = {**family.defaults, **{key: value for key, value in given.items() if value is not None}}
    fixed = _FIXED | ({"use_bidirectional_attention": (False,)} if family.is_gemma3 else {})
    problems = [
        f"{key} is {plain.shown(text[key])}; only {allowed[0]!r} is implemented"
        for key, allowed in fixed.items()
        if text[key] not in allowed
    ]
    if family.multimodal and config.get("tie_word_embeddings") is False:
        problems.append("tie_word_embeddings is False; only True is implemented")
    problems += _wrong_numbers(text) + _wrong_overrides(text)
    if problems:
        raise UserError("config.json: " + "; ".join(problems))
    kinds, ropes = _layer_kinds(text), _ropes(text, family)
    if not family.is_gemma3:
        kinds[-1] = "full_attention"  # the reference forces it, whatever the file says
    _check_shared(text, kinds)
    per_layer = text["hidden_size_per_layer_input"]
    return Architecture(
        vocab=text["vocab_size"], hidden=text["hidden_size"], heads=text["num_attention_heads"],
        layers=tuple(_layer(text, family, kinds, ropes, index) for index in range(len(kinds))),
        eps=float(text["rms_norm_eps"]), logit_softcap=text["final_logit_softcapping"],
        context=text["max_position_embeddings"], prefix=family.prefix, norm_offset=family.norm_offset,
        query_scale=text["query_pre_attn_scalar"] ** -0.5 if family.is_gemma3 else 1.0,
        v_norm=not family.is_gemma3, layer_scalar=not family.is_gemma3,
        per_layer_input=per_layer, per_layer_vocab=text["vocab_size_per_layer_input"] if per_layer else 0,
    )  # fmt: skip


_MOST = 1 << 31  # of any count: what is above it was never a model
_ROPE = {
    "rope_type?": (str, None), "type?": (str, None), "rope_theta?": (float, None), "factor?": (float, None),
    "partial_rotary_factor?": (float, None),
}  # fmt: skip
_FORM = {  # of what is not checked one by one below
    "rms_norm_eps?": (float, None), "final_logit_softcapping?": (float, None), "query_pre_attn_scalar?": (float, None),
    "rope_theta?": (float, None), "rope_local_base_freq?": (float, None), "rope_scaling?": (_ROPE, None),
    "rope_parameters?": ({"sliding_attention?": (_ROPE, None), "full_attention?": (_ROPE, None)}, None),
    "per_layer_config?": ({str: {"head_dim?": int, "num_key_value_heads?": int}}, None),
    "global_head_dim?": (int, None), "num_global_key_value_heads?": (int, None), "num_kv_shared_layers?": (int, None),
    "hidden_size_per_layer_input?": (int, None), "vocab_size_per_layer_input?": (int, None),
    "sliding_window_pattern?": (int, None), "_sliding_window_pattern?": (int, None),
    "attention_k_eq_v?": (bool, None), "use_double_wide_mlp?": (bool, None), "enable_moe_block?": (bool, None),
}  # fmt: skip
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings",
)  # fmt: skip
_PER_LAYER = ("head_dim", "num_key_value_heads")
_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")


def _wrong_numbers(text: Text) -> list[str]:
    wrong = [
        f"{key} is {plain.shown(text.get(key))}; it must be a positive integer"
        for key in (*_COUNTS, *(_EXPERTS if text.get("enable_moe_block") else ()))
        if not isinstance(text.get(key), int) or isinstance(text.get(key), bool) or not 1 <= text[key] < _MOST
    ]
    if not wrong and text["num_hidden_layers"] > 1000:
        wrong.append(f"num_hidden_layers is {text['num_hidden_layers']}; at most 1000 can be meant")
    for key in ("sliding_window_pattern", "_sliding_window_pattern", "global_head_dim", "num_global_key_value_heads"):
        if text.get(key) is not None and not 1 <= text[key] < _MOST:
            wrong.append(f"{key} is {text[key]}; it must be a positive integer")
    for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
        if not 0 <= text[key] < _MOST:
            wrong.append(f"{key} is {text[key]}; it must not be negative")
    if not text.get("query_pre_attn_scalar", 1) > 0:
        wrong.append(f"query_pre_attn_scalar is {text['query_pre_attn_scalar']}; it must be above 0")
    shared = text.get("num_kv_shared_layers", 0)
    if not wrong and not 0 <= shared < text["num_hidden_layers"]:
        wrong.append(f"num_kv_shared_layers is {shared}; it must be less than num_hidden_layers")
    return wrong


def _wrong_overrides(text: Text) -> list[str]:
    """What differs for a single layer, and is nothing that a layer can have of its own here."""
    numbers = [number for number in text.get("per_layer_config") or {} if not re.fullmatch(r"[0-9]{1,4}", number)]
    if numbers:
        return [f"per_layer_config holds {plain.first(map(plain.shown, numbers), 5)}; its keys are numbers of layers"]
    return [
        f"{plain.below(f'per_layer_config.{number}', key)} is {plain.shown(value)}; a layer may have its own "
        f"{' and '.join(_PER_LAYER)} only"
        for number, layer in (text.get("per_layer_config") or {}).items()
        for key, value in layer.items()
        if key not in _PER_LAYER and value != text.get(key)
    ]


def _check_shared(text: Text, kinds: list[str]) -> None:
    """Layers that share keys and values need an earlier layer of their kind that has some."""
    own = len(kinds) - text.get("num_kv_shared_layers", 0)
    lacking = sorted(set(kinds[own:]) - set(kinds[:own]))
    if lacking:
        raise UserError(
            f"config.json: num_kv_shared_layers is {len(kinds) - own}, which leaves no {' and no '.join(lacking)} "
            "layer with keys and values of its own"
        )


def _layer_kinds(text: Text) -> list[str]:
    count = text["num_hidden_layers"]
    kinds = text.get("layer_types")
    if kinds is None:
        pattern = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
        return [KINDS[(index + 1) % pattern == 0] for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        told = f"{len(kinds)} entries" if isinstance(kinds, list) else plain.shown(kinds)
        raise UserError(f"config.json: layer_types has {told} for num_hidden_layers {count}")
    unknown = sorted({str(kind) for kind in kinds if kind not in KINDS})
    if unknown:
        named = plain.first(map(plain.cut, unknown), 5)
        raise UserError(f"config.json: layer_types holds {named}; known: {', '.join(KINDS)}")
    return list(kinds)


def _layer(text: Text, family: Family, kinds: list[str], ropes: dict[str, Rope], index: int) -> Layer:
    full = kinds[index] == "full_attention"
    window = None if full else text["sliding_window"]
    head_dim, kv_heads, mlp = text["head_dim"], text["num_key_value_heads"], text["intermediate_size"]
    if family.is_gemma3:
        return Layer(head_dim, kv_heads, mlp, ropes[kinds[index]], window)
    k_eq_v = full and bool(text["attention_k_eq_v"])
    shared = index >= len(kinds) - text["num_kv_shared_layers"]
    if full:
        head_dim = text["global_head_dim"]
        if k_eq_v:  # the reference reads the global KV head count only for models that share K and V
            kv_heads = text["num_global_key_value_heads"] or kv_heads
    overrides = {int(key): value for key, value in (text.get("per_layer_config") or {}).items()}  # keys like "05"
    override = overrides.get(index, {})
    if text.get("per_layer_config") is not None and not override:  # the rewritten form, which drops the global keys
        head_dim, kv_heads = text["head_dim"], text["num_key_value_heads"]
    experts = None
    if text["enable_moe_block"]:
        experts = Experts(*(text[key] for key in _EXPERTS))
    return Layer(
        head_dim=override.get("head_dim", head_dim), kv_heads=override.get("num_key_value_heads", kv_heads),
        mlp=mlp * 2 if shared and text["use_double_wide_mlp"] else mlp,
        rope=ropes[kinds[index]], window=window, k_eq_v=k_eq_v and not shared, kv_shared=shared, experts=experts,
    )  # fmt: skip


def _ropes(text: Text, family: Family) -> dict[str, Rope]:
    """Both layer kinds' rotary embeddings; Gemma 3 files hold them under three older keys."""
    found = text.get("rope_parameters")
    if found is None and family.is_gemma3:
        found = {"sliding_attention": {}, "full_attention": dict(text.get("rope_scaling") or {})}
    if found is None:
        full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
        found = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": full}
    thetas = {"sliding_attention": text.get("rope_local_base_freq", 1e4), "full_attention": text.get("rope_theta", 1e6)}
    return {kind: _rope(found.get(kind), kind, thetas[kind]) for kind in KINDS}


def _rope(entry: Any, kind: str, theta: float) -> Rope:
    if not isinstance(entry, Mapping):
        raise UserError(f"config.json: rope_parameters has no entry for {kind}")
    entry = {key: value for key, value in entry.items() if value is not None}
    rope_type = entry.get("rope_type", entry.get("type", "default"))
    if rope_type not in ("default", "proportional", "linear"):
        raise UserError(
            f"config.json: rope_parameters.{kind}.rope_type is {plain.shown(rope_type)}; known: default, proportional, "
            "linear"
        )
    return Rope(
        theta=float(entry.get("rope_theta", theta)),
        partial=float(entry.get("partial_rotary_factor", 1.0)) if rope_type == "proportional" else 1.0,
        factor=float(entry.get("factor", 1.0)) if rope_type != "default" else 1.0,
    )
