"""Vision and audio towers of tiny checkpoints: their configs, and their tensors under the published names.

None of them runs here. They are in the files because published checkpoints have them, and because loading and
merging must carry them through untouched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
TEXT = -1  # in a shape or a config: the text tower's hidden size
GEMMA4_NORMS = [f"{place}_layernorm" for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@dataclass(frozen=True)
class Tower:
    """`part` is vision or audio; `layer` is repeated under `layers` as often as the config says."""

    part: str
    config: Mapping[str, Any]
    rest: Mapping[str, Shape]
    layers: str = ""
    layer: Mapping[str, Shape] = field(default_factory=dict)

    def config_for(self, text_hidden: int) -> dict[str, Any]:
        return {key: text_hidden if value == TEXT else value for key, value in self.config.items()}

    def shapes(self, text_hidden: int) -> dict[str, Shape]:
        shapes = dict(self.rest)
        for i in range(self.config.get("num_hidden_layers", 0)):
            shapes |= {f"{self.layers}.{i}.{name}": shape for name, shape in self.layer.items()}
        if self.config.get("use_clipped_linears"):
            linears = [name.removesuffix("linear.weight") for name in shapes if name.endswith(".linear.weight")]
            shapes |= {f"{linear}{bound}": () for linear in linears for bound in BOUNDS}
        return {name: tuple(text_hidden if n == TEXT else n for n in shape) for name, shape in shapes.items()}


_VISION = {
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
_VISION_REST: dict[str, Shape] = {
    "model.vision_tower.patch_embedder.position_embedding_table": (2, 64, 32),
    "model.vision_tower.patch_embedder.input_proj.weight": (32, 3 * 4**2),
    "model.embed_vision.embedding_projection.weight": (TEXT, 32),
}
_VISION_LAYER: dict[str, Shape] = {
    "self_attn.q_proj.linear.weight": (32, 32),
    "self_attn.k_proj.linear.weight": (32, 32),
    "self_attn.v_proj.linear.weight": (32, 32),
    "self_attn.o_proj.linear.weight": (32, 32),
    "self_attn.q_norm.weight": (16,),
    "self_attn.k_norm.weight": (16,),
    "mlp.gate_proj.linear.weight": (64, 32),
    "mlp.up_proj.linear.weight": (64, 32),
    "mlp.down_proj.linear.weight": (32, 64),
} | {f"{norm}.weight": (32,) for norm in GEMMA4_NORMS}
# 26B and 31B have the larger encoder, which standardizes its output; E2B's and E4B's clips what its linears see.
STANDARDIZED_VISION = Tower(
    "vision", _VISION,
    _VISION_REST | {f"model.vision_tower.{name}": (32,) for name in ("std_bias", "std_scale")},
    "model.vision_tower.encoder.layers", _VISION_LAYER,
)  # fmt: skip
CLIPPED_VISION = Tower(
    "vision", _VISION | {"standardize": False, "use_clipped_linears": True}, _VISION_REST,
    "model.vision_tower.encoder.layers", _VISION_LAYER,
)  # fmt: skip

_FEED_FORWARD: dict[str, Shape] = {
    "ffw_layer_1.linear.weight": (128, 32),
    "ffw_layer_2.linear.weight": (32, 128),
    "pre_layer_norm.weight": (32,),
    "post_layer_norm.weight": (32,),
}
AUDIO = Tower(  # a conformer
    "audio",
    {
        "model_type": "gemma4_audio",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "silu",
        "subsampling_conv_channels": [16, 8],
        "conv_kernel_size": 5,
        "residual_weight": 0.5,
        "attention_chunk_size": 12,
        "attention_context_left": 13,
        "attention_context_right": 0,
        "attention_logit_cap": 50.0,
        "attention_invalid_logits_value": -1e9,
        "use_clipped_linears": True,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1e10,
        "output_proj_dims": 48,
        "initializer_range": 0.02,
    },
    {
        "model.audio_tower.subsample_conv_projection.layer0.conv.weight": (16, 1, 3, 3),
        "model.audio_tower.subsample_conv_projection.layer0.norm.weight": (16,),
        "model.audio_tower.subsample_conv_projection.layer1.conv.weight": (8, 16, 3, 3),
        "model.audio_tower.subsample_conv_projection.layer1.norm.weight": (8,),
        "model.audio_tower.subsample_conv_projection.input_proj_linear.weight": (32, 16 // 4 * 8),
        "model.audio_tower.output_proj.weight": (48, 32),
        "model.audio_tower.output_proj.bias": (48,),
        "model.embed_audio.embedding_projection.weight": (TEXT, 48),
    },
    "model.audio_tower.layers",
    {f"feed_forward{i}.{name}": shape for i in (1, 2) for name, shape in _FEED_FORWARD.items()}
    | {f"self_attn.{name}.linear.weight": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "post")}
    | {
        "self_attn.per_dim_scale": (16,),
        "self_attn.relative_k_proj.weight": (32, 32),
        "lconv1d.linear_start.linear.weight": (64, 32),
        "lconv1d.linear_end.linear.weight": (32, 32),
        "lconv1d.depthwise_conv1d.weight": (32, 1, 5),
        "lconv1d.pre_layer_norm.weight": (32,),
        "lconv1d.conv_norm.weight": (32,),
        "norm_pre_attn.weight": (32,),
        "norm_post_attn.weight": (32,),
        "norm_out.weight": (32,),
    },
)

# The unified model has no encoders: patches and audio frames are projected straight into the text tower. The
# published file says vision_embedder where transformers' class says embed_vision.
UNIFIED_VISION = Tower(
    "vision",
    {
        "model_type": "gemma4_unified_vision",
        "patch_size": 2,
        "pooling_kernel_size": 3,
        "model_patch_size": 6,
        "mm_embed_dim": TEXT,
        "mm_posemb_size": 16,
        "num_soft_tokens": 280,
        "output_proj_dims": TEXT,
        "rms_norm_eps": 1e-6,
    },
    {
        "model.vision_embedder.pos_embedding": (16, 2, TEXT),
        "model.vision_embedder.patch_dense.weight": (TEXT, 3 * 6**2),
        "model.vision_embedder.patch_dense.bias": (TEXT,),
        "model.embed_vision.embedding_projection.weight": (TEXT, TEXT),
    }
    | {f"model.vision_embedder.patch_ln1.{kind}": (3 * 6**2,) for kind in ("weight", "bias")}
    | {f"model.vision_embedder.patch_ln2.{kind}": (TEXT,) for kind in ("weight", "bias")}
    | {f"model.vision_embedder.pos_norm.{kind}": (TEXT,) for kind in ("weight", "bias")},
)
UNIFIED_AUDIO = Tower(
    "audio",
    {"model_type": "gemma4_unified_audio", "audio_embed_dim": 20, "audio_samples_per_token": 20, "rms_norm_eps": 1e-6},
    {"model.embed_audio.embedding_projection.weight": (TEXT, 20)},
)

SIGLIP = Tower(  # Gemma 3's
    "vision",
    {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "image_size": 28,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 7,
        "vision_use_head": False,
    },
    {
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (32, 3, 7, 7),
        "vision_tower.vision_model.embeddings.patch_embedding.bias": (32,),
        "vision_tower.vision_model.embeddings.position_embedding.weight": ((28 // 7) ** 2, 32),
        "vision_tower.vision_model.post_layernorm.weight": (32,),
        "vision_tower.vision_model.post_layernorm.bias": (32,),
        "multi_modal_projector.mm_input_projection_weight": (32, TEXT),
        "multi_modal_projector.mm_soft_emb_norm.weight": (32,),
    },
    "vision_tower.vision_model.encoder.layers",
    {f"self_attn.{name}_proj.weight": (32, 32) for name in ("q", "k", "v", "out")}
    | {f"self_attn.{name}_proj.bias": (32,) for name in ("q", "k", "v", "out")}
    | {f"layer_norm{i}.{kind}": (32,) for i in (1, 2) for kind in ("weight", "bias")}
    | {"mlp.fc1.weight": (48, 32), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (32, 48), "mlp.fc2.bias": (32,)},
)
