"""Supervised fine-tuning, LoRA or full: the assembly that `gemma-tpu train CONFIG` runs. Copy it to change it.

Data flows config -> mesh -> model -> LoRA -> data -> step -> checkpoint; the one loop: gemma_tpu/training/train.py.
"""

from functools import partial
from typing import Any

import jax

import gemma_tpu
from gemma_tpu.adapter import lora, start
from gemma_tpu.data.batches import make_loader
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.gemma import loading, mesh
from gemma_tpu.run import runs
from gemma_tpu.run.metrics import say
from gemma_tpu.schema import Config
from gemma_tpu.training import program
from gemma_tpu.training.train import Trainer


def main(config: Config) -> dict[str, Any]:
    run = runs.open_run(config)

    # The base as shapes: config.json and the headers are read, no weight yet.
    model, checkpoint = loading.build(
        config.model.path, dtype=config.model.dtype, quantise=config.model.quantise
    )

    # The mesh, with every head count held against tp before anything is allocated.
    rows = config.train.batch_size // config.train.accumulation
    sizes = mesh.sizes(config.mesh, model.arch, jax.device_count(), rows)
    device_mesh = mesh.build(sizes)
    say(f"mesh: {', '.join(f'{axis}={n}' for axis, n in sizes.items())} on {jax.device_count()} "
        f"{jax.devices()[0].device_kind} device(s)")  # fmt: skip
    say(mesh.check_heads(model.arch, sizes["tp"], config.mesh.replicate_kv))

    # The rows: rendered by the checkpoint's own template, masked, packed.
    tokenizer = Tokenizer(config.model.path)
    train_rows = prepare(config.data, tokenizer)
    say(train_rows.report())
    batches = partial(
        make_loader, max_seq_len=config.data.max_seq_len, packing=config.data.packing,
        batch_size=config.train.batch_size, accumulation=config.train.accumulation, seed=config.train.seed,
    )  # fmt: skip
    loader = batches(train_rows, epochs=config.train.epochs, steps=config.train.steps)
    held_out = None
    if config.data.validation is not None:
        held_out_rows = prepare(config.data, tokenizer, config.data.validation)
        held_out = batches(held_out_rows, keep_partial=True)

    # What trains: adapters beside a frozen base, or the base itself.
    chosen = program.adapt(model, config)
    if chosen:
        say(lora.table(chosen))
        for line in lora.absent(model):
            say(line)

    # Shardings, each held against its tensor and the mesh; then the weights, streamed onto their shards.
    shardings, fixes = loading.place(model, device_mesh, config.mesh.replicate_kv)
    for line in mesh.format_fixes(fixes):
        say(line)
    loading.load_base(model, checkpoint, shardings)
    if chosen:
        for line in start.begin(model, config.lora, config.train.seed, shardings, checkpoint):
            say(line)

    trainer = Trainer(
        config, run, device_mesh, model, shardings, loader, held_out,
        base={"folder": str(config.model.path), "fingerprint": checkpoint.fingerprint()},
        version=gemma_tpu.__version__,
    )  # fmt: skip
    summary = trainer.fit()
    say(f"done: {summary['steps']} updates; {run.path}/ holds metrics.jsonl, loss.png and checkpoints/")
    return summary
