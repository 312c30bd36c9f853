"""The sizes that Google publishes, for planning without a checkpoint: the text half of their config.json.

A run never looks here: its shapes come from its own checkpoint. An entry goes through the parser of
checkpoints, so a key that it leaves out is the family's default there.
"""

import copy
import math
from typing import Any

from gemma_tpu.errors import UserError
from gemma_tpu.gemma import hf_config
from gemma_tpu.gemma.variants import Architecture

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _gemma4(period: int, **text: Any) -> dict[str, Any]:
    """Each `period` of layers ends with a global one, and so does the model."""
    layers = text["num_hidden_layers"]
    kinds = ([_SLIDING] * (period - 1) + [_FULL]) * (layers // period)
    ropes = {
        _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    common = {
        "head_dim": 256, "global_head_dim": 512, "layer_types": kinds, "rope_parameters": ropes,
        "final_logit_softcapping": 30.0, "vocab_size": 262144,
    }  # fmt: skip
    return {"model_type": "gemma4", "text_config": common | text}


def _gemma4_large(**text: Any) -> dict[str, Any]:
    """Every layer with keys of its own; in the global ones V is K, and the number of KV heads is another."""
    common = {
        "attention_k_eq_v": True, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "sliding_window": 1024, "max_position_embeddings": 262144, "use_bidirectional_attention": "vision",
    }  # fmt: skip
    return _gemma4(6, **common | text)


def _gemma4_edge(period: int, **text: Any) -> dict[str, Any]:
    """Per-layer embeddings, and upper layers that take over the keys and values of lower ones."""
    common = {
        "attention_k_eq_v": False, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144,
        "sliding_window": 512, "max_position_embeddings": 131072, "num_attention_heads": 8,
    }  # fmt: skip
    return _gemma4(period, **common | text)


def _gemma3_text(**text: Any) -> dict[str, Any]:
    common = {
        "model_type": "gemma3_text", "vocab_size": 262144, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "max_position_embeddings": 32768, "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6,
    }  # fmt: skip
    return common | text


def _gemma3(**text: Any) -> dict[str, Any]:
    """The multimodal sizes: 64 more tokens, a longer context, global positions scaled by 8."""
    inner = _gemma3_text(
        vocab_size=262208, sliding_window=1024, max_position_embeddings=131072,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    return {"model_type": "gemma3", "text_config": inner | text}


# name -> (repository on the Hugging Face hub, its config.json)
_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-e2b": ("google/gemma-4-E2B-it", _gemma4_edge(
        5, num_hidden_layers=35, hidden_size=1536, intermediate_size=6144, num_key_value_heads=1,
        num_kv_shared_layers=20, use_double_wide_mlp=True)),
    "gemma4-e4b": ("google/gemma-4-E4B-it", _gemma4_edge(
        6, num_hidden_layers=42, hidden_size=2560, intermediate_size=10240, num_key_value_heads=2,
        num_kv_shared_layers=18)),
    "gemma4-12b": ("google/gemma-4-12B-it", _gemma4_large(
        num_hidden_layers=48, hidden_size=3840, intermediate_size=15360, num_attention_heads=16,
        num_key_value_heads=8, num_global_key_value_heads=1) | {"model_type": "gemma4_unified"}),
    "gemma4-26b-a4b": ("google/gemma-4-26B-A4B-it", _gemma4_large(
        num_hidden_layers=30, hidden_size=2816, intermediate_size=2112, num_attention_heads=16,
        num_key_value_heads=8, num_global_key_value_heads=2,
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704)),
    "gemma4-31b": ("google/gemma-4-31B-it", _gemma4_large(
        num_hidden_layers=60, hidden_size=5376, intermediate_size=21504, num_attention_heads=32,
        num_key_value_heads=16, num_global_key_value_heads=4)),
    "gemma3-270m": ("google/gemma-3-270m-it", _gemma3_text(
        num_hidden_layers=18, hidden_size=640, intermediate_size=2048, num_attention_heads=4,
        num_key_value_heads=1)),
    "gemma3-1b": ("google/gemma-3-1b-it", _gemma3_text(
        num_hidden_layers=26, hidden_size=1152, intermediate_size=6912, num_attention_heads=4,
        num_key_value_heads=1)),
    "gemma3-4b": ("google/gemma-3-4b-it", _gemma3(
        num_hidden_layers=34, hidden_size=2560, intermediate_size=10240, num_attention_heads=8,
        num_key_value_heads=4)),
    "gemma3-12b": ("google/gemma-3-12b-it", _gemma3(
        num_hidden_layers=48, hidden_size=3840, intermediate_size=15360, num_attention_heads=16,
        num_key_value_heads=8)),
    "gemma3-27b": ("google/gemma-3-27b-it", _gemma3(
        num_hidden_layers=62, hidden_size=5376, intermediate_size=21504, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168)),
}  # fmt: skip


def known() -> list[str]:
    return list(_SIZES)


def hub_id(name: str) -> str:
    """The instruction-tuned checkpoint of this size on the Hugging Face hub."""
    return _size(name)[0]


def config(name: str) -> dict[str, Any]:
    """The config.json of this size, as far as it decides the text tower; the caller's to change."""
    return copy.deepcopy(_size(name)[1])


def architecture(name: str) -> Architecture:
    return hf_config.from_config(config(name))


def _size(name: str) -> tuple[str, dict[str, Any]]:
    if name not in _SIZES:
        raise UserError(f"{name!r} is no known size; known: {', '.join(_SIZES)}")
    return _SIZES[name]


# The counts import the table of weights when they run: it brings JAX, which the names above do without.


def parameters(arch: Architecture) -> int:
    """Every parameter of the text tower: the tied head once, per-layer embeddings and experts included."""
    from gemma_tpu.gemma.weights import entries

    return sum(math.prod(entry.shape) for entry in entries(arch))


def lora_parameters(arch: Architecture, rank: int) -> int:
    """What `lora.targets: all` trains: A and B on every projection of every layer, not on routed experts."""
    from gemma_tpu.gemma.weights import EXPERTS, lora_entries

    dense = [entry for entry in lora_entries(arch).values() if not entry.hf.endswith(EXPERTS)]
    return sum(rank * sum(entry.hf_shape) for entry in dense)
