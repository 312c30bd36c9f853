"""Preference training on pairs of answers: DPO, length-normalised DPO, IPO or SimPO. Copy it to change it.

    gemma-tpu train CONFIG recipe=dpo.py preference.loss=dpo data.path=pairs.jsonl

The same model, step and loop as recipes/lora_sft.py; the rows are pairs, and the loss is of pairs. The reference is the
frozen base, with the adapter off: there is no second model in memory.
"""

from functools import partial
from typing import Any

import jax

import gemma_tpu
from gemma_tpu.adapter import lora, start
from gemma_tpu.data.batches import make_loader
from gemma_tpu.data.pairs import PairRows
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.gemma import loading, mesh
from gemma_tpu.run import runs
from gemma_tpu.run.metrics import say
from gemma_tpu.schema import Config
from gemma_tpu.training import program
from gemma_tpu.training.train import Trainer


def main(config: Config) -> dict[str, Any]:
    run = runs.open_run(config)
    model, checkpoint = loading.build(
        config.model.path, dtype=config.model.dtype, quantise=config.model.quantise
    )

    # The mesh, with every head count held against tp before anything is allocated.
    rows = config.train.batch_size // config.train.accumulation
    sizes = mesh.sizes(config.mesh, model.arch, jax.device_count(), rows, mesh.slice_count())
    device_mesh = mesh.build(sizes)
    say(mesh.check_heads(model.arch, sizes["tp"], config.mesh.replicate_kv))

    # The pairs: both answers of each on one sheet, as segments that do not see each other.
    tokenizer = Tokenizer(config.model.path)
    batches = partial(
        make_loader, max_seq_len=config.data.max_seq_len, packing=config.data.packing,
        batch_size=config.train.batch_size, accumulation=config.train.accumulation, seed=config.train.seed,
    )  # fmt: skip
    pairs = PairRows(config.data, tokenizer)
    say(pairs.report())
    loader = batches(pairs, epochs=config.train.epochs, steps=config.train.steps)
    held_out, validation = None, config.data.validation
    if validation is not None and not isinstance(validation, float):  # PairRows has refused a share
        held_out = batches(PairRows(config.data, tokenizer, validation), keep_partial=True)

    # What trains, and for what: `adapt` takes the loss from config.preference.
    chosen = program.adapt(model, config)
    if chosen:
        say(lora.table(chosen))
    say(f"preference loss {config.preference.loss}, beta {config.preference.beta:g}")
    if config.lora.init_from is not None and config.preference.loss != "simpo":
        say("note: the reference is the base without the adapter of lora.init_from; to stay near to that one, merge it "
            "and point model.path at the result")  # fmt: skip

    # Shardings, then the weights, streamed onto their shards.
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
    say(f"done: {summary['steps']} updates on pairs; {run.path}/ holds metrics.jsonl, loss.png and checkpoints/")
    return summary
