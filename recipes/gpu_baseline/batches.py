"""The batches of a run as PyTorch takes them: rows, masks and order are those of the plan that `gemma-tpu train` runs.

Neither torch nor JAX is needed here. Shapes: B sheets, T tokens of a sheet.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gemma_tpu.data.batches import Loader, make_loader
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.schema import Config

IGNORED = -100  # a label that is no target, in transformers


def loader_of(config: Config) -> Loader:
    """The very batches of recipes/lora_sft.py."""
    train, data = config.train, config.data
    return make_loader(
        prepare(data, Tokenizer(config.model.path)), max_seq_len=data.max_seq_len, packing=data.packing,
        batch_size=train.batch_size, accumulation=train.accumulation, seed=train.seed, epochs=train.epochs,
        steps=train.steps,
    )  # fmt: skip


def split(config: Config, devices: int) -> tuple[int, int]:
    """(rows on a device at once, micro-batches of an update): the same rows an update on any number of devices."""
    size, together = config.train.batch_size, config.train.batch_size // config.train.accumulation
    if size % devices:
        raise UserError(f"train.batch_size ({size}) must divide by the number of devices ({devices})")
    rows = max(1, together // devices)
    while size % (rows * devices):
        rows -= 1
    return rows, size // (rows * devices)


class Sheets:
    """A run's sheets by their number: sheet n belongs to update n // batch_size."""

    def __init__(self, loader: Loader):
        self.loader = loader
        self._update = lru_cache(maxsize=2)(self._flat)

    def _flat(self, update: int) -> dict[str, np.ndarray]:
        return {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in self.loader[update].items()}

    def take(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """input_ids, position_ids and labels [B, T] of these sheets, which are of one update.

        Labels are our targets, moved to the token that is predicted. Positions start again with each row: by that
        transformers keeps rows of one sheet apart. Columns that are padding in all of them are cut off, as TRL does.
        """
        updates = {number // self.loader.batch_size for number in numbers}
        if len(updates) != 1:
            raise ValueError(f"sheets {list(numbers)} are of {len(updates)} updates")
        batch = self._update(updates.pop())
        at = [number % self.loader.batch_size for number in numbers]
        segments_BT = batch["segment_ids"][at]
        width = max(2, int((segments_BT > 0).sum(axis=1).max()))
        labels_BT = np.full((len(at), width), IGNORED, np.int64)
        trained_BT = batch["weights"][at, : width - 1] > 0
        labels_BT[:, 1:] = np.where(trained_BT, batch["targets"][at, : width - 1], IGNORED)
        positions_BT = batch["positions"][at, :width]
        if segments_BT.max() <= 1:  # one row a sheet: nobody sees the padding behind it, and no mask is needed
            positions_BT = np.broadcast_to(np.arange(width), labels_BT.shape)
        return {"input_ids": batch["tokens"][at, :width].astype(np.int64), "labels": labels_BT,
                "position_ids": positions_BT.astype(np.int64)}  # fmt: skip

    def counts(self, update: int) -> dict[str, int]:
        """Of a whole update, over all devices."""
        batch = self._update(update)
        return {"tokens": int((batch["segment_ids"] > 0).sum()), "target_tokens": int((batch["weights"] > 0).sum())}

    def positions(self, update: int, rows: int) -> int:
        """Positions that are computed, in micro-batches of `rows` sheets cut to their longest."""
        first, size = update * self.loader.batch_size, self.loader.batch_size
        return sum(self.take(range(first + at, first + at + rows))["input_ids"].size for at in range(0, size, rows))
