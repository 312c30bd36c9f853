"""The random tensors of a tiny checkpoint: their published names and shapes, their scales, their shards.

Scales: activations stay of order one from embedding to logits, attention starts neither flat nor sharp, and
each layer adds to the residual stream less than it carries, so that gradients reach the first layer.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from gemma_tpu.tiny_config import VISION, TinyDims

SHARDS = 3
NORMS = [f"{place}_layernorm" for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
Shape = tuple[int, ...]


def tensor_shapes(sizes: TinyDims, text_only: bool) -> dict[str, Shape]:
    """Name and shape of every tensor, as Gemma4ForConditionalGeneration (Gemma4ForCausalLM) saves them."""
    prefix = "model." if text_only else "model.language_model."
    text = {"embed_tokens.weight": (sizes.vocab, sizes.hidden), "norm.weight": (sizes.hidden,)}
    for layer in range(sizes.layers):
        text |= {f"layers.{layer}.{name}": shape for name, shape in _layer(sizes, layer).items()}
    shapes = {prefix + name: shape for name, shape in text.items()}
    return shapes if text_only else shapes | _vision(sizes.hidden)


def write_weights(folder: Path, shapes: dict[str, Shape], seed: int, dtype: str) -> None:
    """Writes the tensors in three shards with an index, as the hub has them."""
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file

    numpy_dtype = np.dtype(bfloat16 if dtype == "bfloat16" else np.float32)
    names = sorted(shapes)
    # Cut by count and not by layer: in published checkpoints the tensors of one layer straddle shards too.
    cuts = [len(names) * i // SHARDS for i in range(SHARDS + 1)]
    weight_map = {}
    total = 0
    for i in range(SHARDS):
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        shard = {
            name: _random(name, shapes[name], seed).astype(numpy_dtype)
            for name in names[cuts[i] : cuts[i + 1]]
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes files that only their owner can read
        weight_map |= dict.fromkeys(shard, file)
        total += sum(array.nbytes for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _layer(sizes: TinyDims, layer: int) -> dict[str, Shape]:
    """One decoder layer. Global layers have their own head size, and no v_proj: their V is their K."""
    is_global = sizes.is_global(layer)
    head_dim = sizes.global_head_dim if is_global else sizes.head_dim
    kv = (sizes.global_kv_heads if is_global else sizes.kv_heads) * head_dim
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (sizes.heads * head_dim, sizes.hidden),
        "self_attn.k_proj.weight": (kv, sizes.hidden),
        "self_attn.v_proj.weight": (kv, sizes.hidden),
        "self_attn.o_proj.weight": (sizes.hidden, sizes.heads * head_dim),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (sizes.mlp, sizes.hidden),
        "mlp.up_proj.weight": (sizes.mlp, sizes.hidden),
        "mlp.down_proj.weight": (sizes.hidden, sizes.mlp),
        "layer_scalar": (1,),
    }
    if is_global:
        del shapes["self_attn.v_proj.weight"]
    return shapes | {f"{norm}.weight": (sizes.hidden,) for norm in NORMS}


def _vision(text_hidden: int) -> dict[str, Shape]:
    hidden, mlp, head_dim = VISION["hidden_size"], VISION["intermediate_size"], VISION["head_dim"]
    heads, kv = VISION["num_attention_heads"] * head_dim, VISION["num_key_value_heads"] * head_dim
    layer: dict[str, Shape] = {
        "self_attn.q_proj.linear.weight": (heads, hidden),
        "self_attn.k_proj.linear.weight": (kv, hidden),
        "self_attn.v_proj.linear.weight": (kv, hidden),
        "self_attn.o_proj.linear.weight": (hidden, heads),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.linear.weight": (mlp, hidden),
        "mlp.up_proj.linear.weight": (mlp, hidden),
        "mlp.down_proj.linear.weight": (hidden, mlp),
    } | {f"{norm}.weight": (hidden,) for norm in NORMS}
    tower = {
        "std_bias": (hidden,),
        "std_scale": (hidden,),
        "patch_embedder.position_embedding_table": (2, VISION["position_embedding_size"], hidden),
        "patch_embedder.input_proj.weight": (hidden, 3 * VISION["patch_size"] ** 2),
    }
    for i in range(VISION["num_hidden_layers"]):
        tower |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    named = {f"model.vision_tower.{name}": shape for name, shape in tower.items()}
    return named | {"model.embed_vision.embedding_projection.weight": (text_hidden, hidden)}


def _random(name: str, shape: Shape, seed: int) -> np.ndarray:
    """The values depend on seed and name alone: both layouts of one seed hold the same text tower."""
    key = zlib.crc32(name.removeprefix("model.").removeprefix("language_model.").encode())
    normal = np.random.Generator(np.random.PCG64([seed, key])).standard_normal(shape, dtype=np.float32)
    if name.endswith("layer_scalar"):
        return 0.75 + 0.25 * np.tanh(normal)  # between 0.5 and 1
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # The attention scale is 1: with norms of 1 the scores would have a deviation of sqrt(head_dim).
        return (1 + 0.1 * normal) * np.float32(shape[0] ** -0.25)
    if "post_" in name and len(shape) == 1:
        # Each branch starts as the smaller part of the residual stream, which trains faster from random weights.
        return 0.4 * (1 + 0.1 * normal)
    if len(shape) == 1:
        return 1 + 0.1 * normal
    # Also right for the embedding: the model multiplies it by sqrt(hidden), and reads logits with it.
    return normal * np.float32(shape[-1] ** -0.5)
