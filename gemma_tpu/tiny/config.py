"""The config files of tiny checkpoints, with the keys that Google's published config.json has.

transformers rewrites such a file when it saves one (`global_head_dim`, `num_global_key_value_heads`, `rope_scaling`
and others go), so the published forms are written out here by hand.
"""

from typing import Any

from gemma_tpu.tiny.archs import ARCHS, TinyArch, TinyDims
from gemma_tpu.tiny.tokenizer import GEMMA3_WORDS, SPECIAL

GENERATION: dict[str, Any] = {  # the ids are the same in both families
    "bos_token_id": SPECIAL["<bos>"],
    "do_sample": True,
    "eos_token_id": [SPECIAL["<eos>"], SPECIAL["<turn|>"]],
    "pad_token_id": SPECIAL["<pad>"],
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
}
# What stands beside the towers' configs in a multimodal file.
_GEMMA4_OUTER: dict[str, Any] = {
    "audio_config": None,
    "audio_token_id": SPECIAL["<|audio|>"],
    "boa_token_id": SPECIAL["<|audio>"],
    "boi_token_id": SPECIAL["<|image>"],
    "eoa_token_id": SPECIAL["<audio|>"],
    "eoa_token_index": SPECIAL["<audio|>"],
    "eoi_token_id": SPECIAL["<image|>"],
    "eos_token_id": GENERATION["eos_token_id"],
    "image_token_id": SPECIAL["<|image|>"],
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "video_token_id": SPECIAL["<|video|>"],
    "vision_soft_tokens_per_image": 280,
}
_GEMMA3_OUTER: dict[str, Any] = {
    "boi_token_index": GEMMA3_WORDS.special["<start_of_image>"],
    "eoi_token_index": GEMMA3_WORDS.special["<end_of_image>"],
    "eos_token_id": GENERATION["eos_token_id"],
    "image_token_index": GEMMA3_WORDS.special["<image_soft_token>"],
    "initializer_range": 0.02,
    "mm_tokens_per_image": 4,
}
_GEMMA4_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": SPECIAL["<bos>"],
    "eos_token_id": SPECIAL["<eos>"],
    "expert_intermediate_size": None,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "pad_token_id": SPECIAL["<pad>"],
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_double_wide_mlp": False,
}
# Only the text-only sizes of Gemma 3 write these; the multimodal ones leave out what is the reference's default.
_GEMMA3_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": SPECIAL["<bos>"],
    "cache_implementation": "hybrid",
    "eos_token_id": GENERATION["eos_token_id"],
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "pad_token_id": SPECIAL["<pad>"],
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10_000,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "use_cache": True,
}


def model_config(sizes: TinyDims, dtype: str, text_only: bool = False, arch: str = "gemma4-31b") -> dict[str, Any]:
    """config.json of the architecture; `text_only` for the class that has no towers."""
    row = ARCHS[arch]
    family = row.family
    dtype_key = {"torch_dtype" if family.is_gemma3 else "dtype": dtype}
    text = _gemma3_text(row, sizes) if family.is_gemma3 else _gemma4_text(row, sizes) | dtype_key
    text = dict(sorted({**text, **row.text, "model_type": f"{family.name}_text"}.items()))
    if text_only or not row.towers:
        return {"architectures": [f"{family.cls}ForCausalLM"], **dict(sorted((text | dtype_key).items()))}
    towers = {f"{tower.part}_config": tower.config_for(sizes.hidden) for tower in row.towers}
    if not family.is_gemma3:
        towers = {name: config | dtype_key for name, config in towers.items()}
    outer = (_GEMMA3_OUTER if family.is_gemma3 else _GEMMA4_OUTER) | towers | dtype_key
    outer |= {"architectures": [f"{family.cls}ForConditionalGeneration"], "model_type": family.name}
    return dict(sorted((outer | {"text_config": text}).items()))


def _sizes(sizes: TinyDims) -> dict[str, Any]:
    return {
        "head_dim": sizes.head_dim,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": sizes.max_positions,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "sliding_window": sizes.window,
        "vocab_size": sizes.vocab,
    }


def _layer_types(sizes: TinyDims) -> list[str]:
    return ["full_attention" if sizes.is_global(i) else "sliding_attention" for i in range(sizes.layers)]


def _gemma4_text(row: TinyArch, sizes: TinyDims) -> dict[str, Any]:
    return _GEMMA4_TEXT | _sizes(sizes) | {
        "enable_moe_block": sizes.experts > 0,
        "global_head_dim": sizes.global_head_dim,
        "hidden_size_per_layer_input": sizes.per_layer_input,
        "layer_types": _layer_types(sizes),
        "moe_intermediate_size": sizes.expert_mlp or None,
        "num_experts": sizes.experts or None,
        "num_global_key_value_heads": sizes.global_kv_heads if row.k_eq_v else None,
        "num_kv_shared_layers": sizes.kv_shared,
        "top_k_experts": sizes.top_k or None,
        "vocab_size_per_layer_input": sizes.vocab,
    }  # fmt: skip


def _gemma3_text(row: TinyArch, sizes: TinyDims) -> dict[str, Any]:
    """The older keys: RoPE under three names, and mostly a period instead of a list of layer kinds."""
    text = _sizes(sizes) | {"query_pre_attn_scalar": sizes.query_scalar or sizes.head_dim}
    period = sizes.pattern + 1
    if row.towers:
        return text | ({} if period == 6 else {"sliding_window_pattern": period})
    if row.lists_layers:
        return _GEMMA3_TEXT | text | {"_sliding_window_pattern": period, "layer_types": _layer_types(sizes)}
    return _GEMMA3_TEXT | text | {"sliding_window_pattern": period}
