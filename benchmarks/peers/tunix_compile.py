"""Tunix's train step with the paper's settings, compiled for v5p-8 by the TPU compiler of Tunix's own environment.

    tunix_compile.py LAYERS DUMP_FOLDER

Gemma 4 31B geometry, tp=4, one row padded to 3072 a micro-step, remat on the layer, eight micro-steps an update by
optax.MultiSteps, rank 64; the projections that the recipe's pattern matches, which leaves out K of the global layers;
bfloat16 weights, and activations in float32, since the recipe leaves `dtype` at its default.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma4 import model as gemma4
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

TOPOLOGY, TOKENS, RANK, ACCUMULATION = "v5p:2x2x1", 3072, 64, 8
PROJECTIONS = ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*up_proj|.*down_proj"


def constrain(x: jax.Array, axes: tuple[str | None, ...], eager: bool = False) -> jax.Array:
    """Tunix's `shard` as it acts on a TPU: it does nothing where the first local device is a CPU, as it is here."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def build(layers: int) -> PeftTrainer:
    config = dataclasses.replace(gemma4.ModelConfig.gemma4_31b(), num_layers=layers, param_dtype=jnp.bfloat16)
    model = gemma4.Gemma4(config, rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=RANK, alpha=float(RANK))
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
    for layer in model.layers:  # only now: under remat qwix cannot create its parameters
        layer.config.remat_config = gemma4.RematConfig.DECODER
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-4, 100, 1244)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.001))
    trainer = PeftTrainer(
        model, optimizer, TrainingConfig(eval_every_n_steps=10**9, gradient_accumulation_steps=ACCUMULATION)
    )
    return trainer.with_gen_model_input_fn(lambda batch: {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    })


def placed(module: nnx.Module) -> nnx.Module:
    """The module with shapes and shardings in place of arrays."""
    graph, state = nnx.split(module)
    shapes = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        state, nnx.get_partition_spec(state),
    )  # fmt: skip
    return nnx.merge(graph, shapes)


def main(layers: int, folder: str) -> None:
    gemma4.shard = constrain
    made: list[PeftTrainer] = []

    def parts() -> tuple[nnx.Module, nnx.Optimizer]:
        made.append(build(layers))
        return made[0].model, made[0].optimizer

    model, optimizer = nnx.eval_shape(parts)
    trainable = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    print(f"{layers} layers, {trainable:,} trainable parameters", flush=True)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    batch = TrainingInput(
        input_tokens=jax.ShapeDtypeStruct((1, TOKENS), jnp.int32, sharding=rows),
        input_mask=jax.ShapeDtypeStruct((1, TOKENS), jnp.bool_, sharding=rows),
    )
    step = nnx.jit(made[0].create_train_step_fn(), donate_argnames=("optimizer",))
    with mesh:
        lowered = step.lower(placed(model), placed(optimizer), batch)
    lowered.lowered.compile(compiler_options={
        "xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*train_step.*",
    })  # fmt: skip


if __name__ == "__main__":
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = Mesh(np.array(chips).reshape(1, 4), ("fsdp", "tp"))
    main(int(sys.argv[1]), sys.argv[2])
