"""Sizes and config files of tiny checkpoints, with the keys that Google's published config.json has.

transformers rewrites such a file when it saves one (`global_head_dim` and `num_global_key_value_heads` go),
so the published form is written out here by hand.
"""

from dataclasses import dataclass
from typing import Any

from gemma_tpu.tiny_tokenizer import SPECIAL

VISION = {  # Gemma 4's vision tower, small; it never runs here, it has to survive loading and merging
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
    "default_output_length": 280,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "standardize": True,
    "use_clipped_linears": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class TinyDims:
    """Sizes of a tiny model; `pattern` sliding layers come before each global one."""

    layers: int = 6
    pattern: int = 5
    hidden: int = 128
    mlp: int = 384
    heads: int = 4
    kv_heads: int = 4
    global_kv_heads: int = 4
    head_dim: int = 32
    global_head_dim: int = 64
    window: int = 128
    vocab: int = 1024
    max_positions: int = 4096

    def is_global(self, layer: int) -> bool:
        return layer % (self.pattern + 1) == self.pattern


GENERATION: dict[str, Any] = {
    "bos_token_id": SPECIAL["<bos>"],
    "do_sample": True,
    "eos_token_id": [SPECIAL["<eos>"], SPECIAL["<turn|>"]],
    "pad_token_id": SPECIAL["<pad>"],
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
}


def model_config(sizes: TinyDims, dtype: str, text_only: bool) -> dict[str, Any]:
    text = _text_config(sizes, dtype)
    if text_only:
        return {"architectures": ["Gemma4ForCausalLM"], **text}
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": SPECIAL["<|audio|>"],
        "boa_token_id": SPECIAL["<|audio>"],
        "boi_token_id": SPECIAL["<|image>"],
        "dtype": dtype,
        "eoa_token_id": SPECIAL["<audio|>"],
        "eoa_token_index": SPECIAL["<audio|>"],
        "eoi_token_id": SPECIAL["<image|>"],
        "eos_token_id": GENERATION["eos_token_id"],
        "image_token_id": SPECIAL["<|image|>"],
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": SPECIAL["<|video|>"],
        "vision_config": VISION | {"dtype": dtype},
        "vision_soft_tokens_per_image": VISION["default_output_length"],
    }


def _text_config(sizes: TinyDims, dtype: str) -> dict[str, Any]:
    kinds = ["full_attention" if sizes.is_global(i) else "sliding_attention" for i in range(sizes.layers)]
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": SPECIAL["<bos>"],
        "dtype": dtype,
        "enable_moe_block": False,
        "eos_token_id": SPECIAL["<eos>"],
        "expert_intermediate_size": None,
        "final_logit_softcapping": 30.0,
        "global_head_dim": sizes.global_head_dim,
        "head_dim": sizes.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": sizes.hidden,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "layer_types": kinds,
        "max_position_embeddings": sizes.max_positions,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": sizes.heads,
        "num_experts": None,
        "num_global_key_value_heads": sizes.global_kv_heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "num_kv_shared_layers": 0,
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
        "sliding_window": sizes.window,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": "vision",
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": sizes.vocab,
        "vocab_size_per_layer_input": sizes.vocab,
    }
