"""The random tensors of a tiny checkpoint: their published names and shapes, their scales, their shards.

Scales: activations stay of order one from embedding to logits, attention starts neither flat nor sharp, and
each layer adds to the residual stream less than it carries, so that gradients reach the first layer.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from gemma_tpu.tiny.archs import ARCHS, TinyArch, TinyDims
from gemma_tpu.tiny.towers import BOUNDS, GEMMA4_NORMS, Shape

SHARDS = 3


def tensor_shapes(sizes: TinyDims, text_only: bool = False, arch: str = "gemma4-31b") -> dict[str, Shape]:
    """Name and shape of every tensor of the published files, or of the class that has no towers."""
    row = ARCHS[arch]
    text_only = text_only or not row.towers
    prefix = "model." if text_only else row.family.prefix
    text: dict[str, Shape] = {"embed_tokens.weight": (sizes.vocab, sizes.hidden), "norm.weight": (sizes.hidden,)}
    if width := sizes.per_layer_input:
        text |= {
            "embed_tokens_per_layer.weight": (sizes.vocab, sizes.layers * width),
            "per_layer_model_projection.weight": (sizes.layers * width, sizes.hidden),
            "per_layer_projection_norm.weight": (width,),
        }
    for layer in range(sizes.layers):
        text |= {f"layers.{layer}.{name}": shape for name, shape in _layer(row, sizes, layer).items()}
    shapes = {prefix + name: shape for name, shape in text.items()}
    for tower in () if text_only else row.towers:
        shapes |= tower.shapes(sizes.hidden)
    return shapes


def write_weights(folder: Path, shapes: dict[str, Shape], seed: int, dtype: str, gemma3: bool = False) -> None:
    """Writes the tensors in three shards with an index, as the hub has them."""
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file

    numpy_dtype = np.dtype(bfloat16 if dtype == "bfloat16" else np.float32)
    names = sorted(shapes)
    # Cut by count and not by layer: in published checkpoints the tensors of one layer straddle shards too.
    cuts = [len(names) * i // SHARDS for i in range(SHARDS + 1)]
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(SHARDS):
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        shard = {
            name: np.asarray(_random(name, shapes[name], seed, gemma3), numpy_dtype)
            for name in names[cuts[i] : cuts[i + 1]]
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes files that only their owner can read
        weight_map |= dict.fromkeys(shard, file)
        total += sum(array.nbytes for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _layer(row: TinyArch, sizes: TinyDims, layer: int) -> dict[str, Shape]:
    """One decoder layer. Those that share keys and values have their own in the published files all the same."""
    kv_heads, head_dim = row.kv_shape(sizes, layer)
    hidden, queries, kv, mlp = sizes.hidden, sizes.heads * head_dim, kv_heads * head_dim, row.mlp(sizes, layer)
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    } | {f"{norm}.weight": (hidden,) for norm in GEMMA4_NORMS}
    if row.k_eq_v and sizes.is_global(layer):
        del shapes["self_attn.v_proj.weight"]
    if not row.family.is_gemma3:
        shapes["layer_scalar"] = (1,)
    if width := sizes.per_layer_input:
        shapes |= {
            "per_layer_input_gate.weight": (width, hidden),
            "per_layer_projection.weight": (hidden, width),
            "post_per_layer_input_norm.weight": (hidden,),
        }
    if count := sizes.experts:
        shapes |= {
            "router.proj.weight": (count, hidden),
            "router.scale": (hidden,),
            "router.per_expert_scale": (count,),
            "experts.gate_up_proj": (count, 2 * sizes.expert_mlp, hidden),
            "experts.down_proj": (count, hidden, sizes.expert_mlp),
            "post_feedforward_layernorm_1.weight": (hidden,),
            "pre_feedforward_layernorm_2.weight": (hidden,),
            "post_feedforward_layernorm_2.weight": (hidden,),
        }
    return shapes


def _random(name: str, shape: Shape, seed: int, gemma3: bool) -> np.ndarray:
    """The values depend on seed and name alone: both layouts of one seed hold the same text tower."""
    short = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(short.encode())]))
    normal = generator.standard_normal(shape, dtype=np.float32)
    if name.endswith("layer_scalar"):
        return 0.75 + 0.25 * np.tanh(normal)  # between 0.5 and 1
    if name.endswith(BOUNDS):
        return (normal + 8) * np.float32(-1 if name.endswith("min") else 1)  # wide: few activations are clipped
    if name.endswith(".bias"):
        return 0.1 * normal
    if name.endswith("router.proj.weight"):
        return normal  # the router divides by sqrt(hidden) itself; even scores would make the choice a matter of noise
    if len(shape) != 1:
        # Also right for the embedding: the model multiplies it by sqrt(hidden), and reads logits with it.
        inside = np.prod(shape[1:]) if len(shape) == 4 else shape[-1]
        return normal * np.float32(inside**-0.5)
    scale = 1 + 0.1 * normal
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # Where the attention scale is 1, norms of 1 would give the scores a deviation of sqrt(head_dim).
        scale = scale if gemma3 else scale * np.float32(shape[0] ** -0.25)
    elif "post_" in name:
        # Each branch starts as the smaller part of the residual stream, which trains faster from random weights.
        scale = 0.4 * scale
    # Gemma 3's own norms multiply by 1 + weight; those of its vision tower do not.
    return scale - 1 if gemma3 and not name.startswith("vision_tower.") else scale
