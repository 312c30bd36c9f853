"""Tunix's turn: its PeftTrainer and loss as they come, qwix LoRA on every projection, rows padded to one length.

Runs in an environment of its own (google-tunix, qwix). Tunix packs no rows for supervised fine-tuning.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.gemma4.model import AttentionType, Gemma4, ModelConfig
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from turns import Rows, Turns, settings

PROJECTIONS = ".*(q_einsum|k_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)"


def build(chosen: dict[str, Any]) -> nnx.Module:
    sizes = chosen["model"]
    locals_, one = (AttentionType.LOCAL_SLIDING,) * sizes["pattern"], (AttentionType.GLOBAL,)
    config = ModelConfig(
        num_layers=sizes["layers"], num_embed=sizes["vocab"], embed_dim=sizes["hidden"], hidden_dim=sizes["mlp"],
        num_heads=sizes["heads"], head_dim=sizes["head_dim"], num_kv_heads=sizes["kv_heads"],
        num_global_kv_heads=sizes["global_kv_heads"], global_key_size=sizes["global_head_dim"],
        sliding_window_size=sizes["window"], attention_pattern=locals_ + one, k_eq_v_global=True,
    )  # fmt: skip
    model = Gemma4(config, rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=chosen["rank"], alpha=chosen["alpha"])
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())


def size(model: nnx.Module, kind: type[nnx.Variable]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, kind)))


def batches(model: nnx.Module, chosen: dict[str, Any], rows: Rows, turns: Turns) -> Iterator[TrainingInput]:
    """Batches without end. A turn is over when the weights that its last step writes are there."""
    trainable = size(model, nnx.LoRAParam)
    about = {"trainable": trainable, "base": size(model, nnx.Param) - trainable}
    rng, width, per_step = np.random.default_rng(0), chosen["padded"], chosen["rows_per_step"]
    while True:
        tokens = 0
        for _ in range(turns.wait()):
            chunk = [rows[i] for i in rng.choice(len(rows), per_step, replace=False)]
            tokens += sum(map(len, chunk))
            ids = np.array([row + [0] * (width - len(row)) for row in chunk], np.int32)
            yield TrainingInput(input_tokens=ids, input_mask=np.arange(width) < np.array([[len(r)] for r in chunk]))
        jax.block_until_ready(nnx.state(model, nnx.LoRAParam))
        turns.done(tokens, **about)


def main() -> None:
    turns = Turns()
    chosen, rows = settings()
    model = build(chosen)
    trainer = PeftTrainer(model, optax.adamw(chosen["lr"]), TrainingConfig(eval_every_n_steps=10**9))
    trainer.with_gen_model_input_fn(lambda batch: {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    })
    trainer.train(batches(model, chosen, rows, turns))


if __name__ == "__main__":
    sys.exit(main())
