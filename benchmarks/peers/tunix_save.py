"""A checkpoint of Tunix's own making for the tests of `merge --layout tunix`: tests/fixtures/tunix.

    .bench-envs/tunix/bin/python benchmarks/peers/tunix_save.py tests/fixtures/tunix

A tiny random Gemma 4 (local and k_eq_v global layers), its LoRA by qwix with the paper's names, two steps of training
and a save by Tunix's CheckpointManager. Beside it: the base in the published layout, and the logits that Tunix itself
computes with and without the adapter.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from safetensors.numpy import save_file
from tunix.models.gemma4.model import AttentionType, Gemma4, ModelConfig
from tunix.sft import utils
from tunix.sft.checkpoint_manager import CheckpointManager

RANK, ALPHA = 3, 7.5
TEXT = {
    "model_type": "gemma4_text", "vocab_size": 80, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1,
    "head_dim": 8, "global_head_dim": 16, "sliding_window": 6, "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0, "max_position_embeddings": 256,
}  # fmt: skip
PROJECTIONS = ".*(q_einsum|k_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)"
NORMS = {
    "pre_attention_norm.scale": "input_layernorm.weight",
    "post_attention_norm.scale": "post_attention_layernorm.weight",
    "pre_ffw_norm.scale": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.scale": "post_feedforward_layernorm.weight",
    "attn._query_norm.scale": "self_attn.q_norm.weight", "attn._key_norm.scale": "self_attn.k_norm.weight",
    "skip_scale": "layer_scalar",
}  # fmt: skip


def build() -> Gemma4:
    model = Gemma4(ModelConfig(
        num_layers=4, num_embed=TEXT["vocab_size"], embed_dim=16, hidden_dim=24, num_heads=4, head_dim=8,
        num_kv_heads=2, num_global_kv_heads=1, global_key_size=16, sliding_window_size=6,
        attention_pattern=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL), k_eq_v_global=True,
    ), rngs=nnx.Rngs(0))  # fmt: skip
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)

    def random(path, x):
        name = ".".join(map(str, path))
        if "scale" in name or "scalar" in name:
            size = 0.5 if "_query" in name or "_key" in name else 0.7
            return size * (1 + 0.1 * rng.standard_normal(x.shape))
        return rng.standard_normal(x.shape) * (0.3 if "embedding" in name else 0.25)

    flat = [(path, leaf.replace(jnp.asarray(random(path, leaf[...]), jnp.float32)))
            for path, leaf in nnx.to_flat_state(state)]  # fmt: skip
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def published(model: Gemma4) -> dict[str, np.ndarray]:
    """The base's tensors under the names of the published files."""
    tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, w = ".".join(map(str, path)), np.asarray(leaf[...])
        found = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if not found:
            top = {"embedder.input_embedding": "embed_tokens.weight", "final_norm.scale": "norm.weight"}[name]
            tensors[f"model.{top}"] = w
            continue
        layer, rest = f"model.layers.{found[1]}.", found[2]
        if rest in NORMS:
            tensors[layer + NORMS[rest]] = w
        elif rest == "attn.q_einsum.w":  # N D H
            tensors[layer + "self_attn.q_proj.weight"] = w.transpose(0, 2, 1).reshape(-1, w.shape[1])
        elif rest == "attn.k_einsum.w":
            tensors[layer + "self_attn.k_proj.weight"] = w.transpose(0, 2, 1).reshape(-1, w.shape[1])
        elif rest == "attn.kv_einsum.w":
            for number, which in enumerate("kv"):
                one = w[number]
                tensors[layer + f"self_attn.{which}_proj.weight"] = one.transpose(0, 2, 1).reshape(-1, one.shape[1])
        elif rest == "attn.attn_vec_einsum.w":  # N H D
            tensors[layer + "self_attn.o_proj.weight"] = w.reshape(-1, w.shape[-1]).T
        else:
            kind = re.fullmatch(r"mlp\.(gate|up|down)_proj\.kernel", rest)
            tensors[layer + f"mlp.{kind[1]}_proj.weight"] = w.T
    return {name: np.ascontiguousarray(w, np.float32) for name, w in tensors.items()}


def logits(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
    mask = jnp.asarray(tokens > 0)
    out = model(jnp.asarray(tokens), utils.build_positions_from_mask(mask), None, utils.make_causal_attn_mask(mask))
    return np.asarray(out[0] if isinstance(out, tuple) else out, np.float32)


def main(out: Path) -> None:
    model = build()
    tokens = np.random.default_rng(1).integers(3, TEXT["vocab_size"], (2, 20))
    (out / "base").mkdir(parents=True)
    save_file(published(model), out / "base" / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Gemma4ForCausalLM"], **TEXT}
    (out / "base" / "config.json").write_text(json.dumps(config, indent=1))
    before = logits(model, tokens)
    provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
    rng = np.random.default_rng(2)
    lora = [(path, leaf.replace(jnp.asarray(0.1 * rng.standard_normal(leaf[...].shape), jnp.float32)))
            for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]  # fmt: skip
    nnx.update(model, nnx.from_flat_state(lora))
    for path, leaf in lora:
        print(".".join(map(str, path)), leaf[...].shape)
    manager = CheckpointManager(str((out / "checkpoints").resolve()))
    manager.save(2, model, save_only_lora_params=True, force=True)
    manager.close()
    after = logits(model, tokens)
    save_file({"tokens": tokens.astype(np.int32), "base": before, "tuned": after}, out / "logits.safetensors")
    print("largest change of a logit:", np.abs(after - before).max(), "of", np.abs(before).max())


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(Path(sys.argv[1]))
