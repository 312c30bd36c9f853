"""gemma_tpu's turn: the program that `gemma-tpu train` compiles, fed by its own loader, packed."""

import sys
from typing import Any

import jax
import numpy as np
from turns import Rows, Turns, settings

from gemma_tpu import config as configs
from gemma_tpu.adapter import start
from gemma_tpu.data.batches import Loader, make_loader
from gemma_tpu.gemma import loading, mesh
from gemma_tpu.training import program


class Ids:
    """Rows that no tokenizer made, as `data.make_loader` wants them; every token is a target."""

    pad_id, fingerprint = 0, 0

    def __init__(self, rows: Rows):
        self.rows = [np.asarray(row, np.int32) for row in rows]
        self.lengths = np.array([len(row) for row in rows])
        self.tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.rows[row], np.ones(len(self.rows[row]), bool))]


def assemble(chosen: dict[str, Any], rows: Rows) -> tuple[program.Program, Loader, int]:
    """The recipe's assembly on one device, without its run folder; and the number of parameters in all."""
    config = configs.from_dict({
        "model": {"path": chosen["checkpoint"], "dtype": "float32"},
        "data": {"max_seq_len": chosen["packed"], "packing": "pack", "validation": None},
        "lora": {"rank": chosen["rank"], "alpha": chosen["alpha"], "dropout": 0.0},
        "train": {"steps": 1_000_000, "epochs": None, "batch_size": 1, "accumulation": 1, "remat": "none"},
        "optim": {"lr": chosen["lr"], "warmup_steps": 0, "schedule": "constant"},
    })
    model, checkpoint = loading.build(config.model.path, dtype=config.model.dtype)
    device_mesh = mesh.build({}, jax.devices()[:1])
    program.adapt(model, config)
    shardings, _ = loading.place(model, device_mesh)
    loading.load_base(model, checkpoint, shardings)
    start.begin(model, config.lora, config.train.seed, shardings)
    loader = make_loader(Ids(rows), max_seq_len=config.data.max_seq_len,
                         packing="pack", batch_size=1, accumulation=1, seed=0, steps=config.train.steps)  # fmt: skip
    parameters = sum(int(np.prod(v.shape)) for v in loading.variables(model).values())
    step = program.build(config, model, shardings, device_mesh, loader.total_steps, config.train.remat)
    return step, loader, parameters


def main() -> None:
    turns = Turns()
    chosen, rows = settings()
    step, loader, parameters = assemble(chosen, rows)
    trainable = sum(int(np.prod(x.shape)) for x in step.trained.values())
    about = {"trainable": trainable, "base": parameters - trainable}
    batches, state, compiled = iter(loader), step.first_state(), None
    with jax.set_mesh(step.mesh):
        while steps := turns.wait():
            pending, tokens = None, 0
            for _ in range(steps):
                batch = step.place(next(batches))
                compiled = compiled or step.compile(step.lower(state, batch))
                state, found = compiled(state, step.parts.frozen, batch)
                # As the training loop does: the metrics are read one step behind.
                pending, ready = found, pending
                tokens += int(ready["tokens"]) if ready else 0
            turns.done(tokens + int(pending["tokens"]), loss=float(pending["loss"]), **about)


if __name__ == "__main__":
    sys.exit(main())
