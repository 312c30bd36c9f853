"""From prepared rows to batches: any step's batch is served by its index alone.

A batch is a pure function of (rows, seed, step). That is the whole resume story: the iterator's state is one
integer, and on several hosts each slices the same global batch. Grain does the loading ahead of the step.

Shapes: N kept rows, S sheets an epoch, B sheets a batch, T tokens a sheet.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gemma_tpu.corpus import Prepared, prepare
from gemma_tpu.errors import UserError
from gemma_tpu.packing import Bins, best_fit, fill, longest_first, one_each

__all__ = ["Batch", "BatchIterator", "Loader", "Prepared", "make_loader", "prepare"]

Batch = dict[str, np.ndarray]


class BatchIterator(Iterator[Batch]):
    """Grain's iterator, whose state also names the data and the plan that its index counts in."""

    def __init__(self, iterator: Any, plan: str):
        self._iterator, self._plan = iterator, plan

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """JSON-able; `next_index` is the batch that comes next."""
        return {**self._iterator.get_state(), "plan": self._plan}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["plan"] != self._plan:
            raise UserError(
                f"the saved position counts batches of {state['plan']}; the data now gives {self._plan}. "
                "Resume with the rows, data.*, train.batch_size, train.accumulation and train.seed that the "
                "run was started with, or start a new run folder"
            )
        self._iterator.set_state({k: v for k, v in state.items() if k != "plan"})

    def close(self) -> None:
        """Ends the prefetch thread."""
        self._iterator.close()


class Loader:
    """Random access to the batches of a run; see make_loader."""

    def __init__(
        self,
        prepared: Prepared,
        bins: Bins,
        *,
        max_seq_len: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        keep_partial: bool,
    ):
        self.prepared, self.max_seq_len, self.seed = prepared, max_seq_len, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self._bins = bins  # over ranks (0 is the longest row), so that each epoch may fill it with other rows
        full, left = divmod(len(bins), batch_size)
        self._padded = bool(left) and (keep_partial or not full)
        self.steps_per_epoch = full + self._padded
        self.total_steps = self.steps_per_epoch
        self.notes: list[str] = []
        self._say_partial(full, left)
        laid_out = (self.steps_per_epoch * batch_size if self._padded else len(bins)) * max_seq_len
        self.padding_share = 1 - prepared.tokens / laid_out
        self._epoch = lru_cache(maxsize=2)(self._shuffle)  # two: prefetching runs ahead over the border

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step counted from 0, every leaf [accumulation, batch_size // accumulation, T]."""
        sheets = [[self.prepared[row] for row in rows] for rows in self._sheets(step)]
        sheets += [[]] * (self.batch_size - len(sheets))
        batch = fill(sheets, self.max_seq_len, self.prepared.pad_id)
        shape = (self.accumulation, self.batch_size // self.accumulation, self.max_seq_len)
        return {name: leaf.reshape(shape) for name, leaf in batch.items()}

    def __iter__(self) -> BatchIterator:
        import grain  # here: it brings JAX along, and preparing data needs neither

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        batches = grain.MapDataset.source(self).to_iter_dataset(options)
        return BatchIterator(iter(batches), self._plan())

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """Indices of the kept rows in a step's batch; prepared.where(row) names the file and line."""
        return [int(row) for rows in self._sheets(step) for row in rows]

    def _sheets(self, step: int) -> list[np.ndarray]:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        epoch, batch = divmod(step, self.steps_per_epoch)
        row_of_rank_N, order_S = self._epoch(epoch)
        chosen = order_S[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [row_of_rank_N[self._bins[sheet]] for sheet in chosen.tolist()]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's rows by rank and its order of sheets. Rows of one length change places, so that a row
        gets new neighbours while the plan, and with it the number of steps, stays."""
        rng = np.random.default_rng([self.seed, epoch])
        return longest_first(self.prepared.lengths, rng), rng.permutation(len(self._bins))

    def _say_partial(self, full: int, left: int) -> None:
        if self._padded:
            self.notes.append(
                f"the {'last' if full else 'only'} batch of an epoch holds {left:,} of {self.batch_size:,} "
                f"sheets: filled up with {self.batch_size - left:,} sheets of padding"
            )
        elif left:
            share = left / len(self._bins)
            self.notes.append(
                f"each epoch leaves out {left:,} of {len(self._bins):,} sheets ({share:.1%}), other ones "
                f"each time: they do not fill a batch of {self.batch_size:,}"
            )

    def _plan(self) -> str:
        return (
            f"{len(self.prepared):,} rows (checksum {self.prepared.fingerprint:08x}) on {len(self._bins):,} "
            f"sheets of {self.max_seq_len:,}, {self.batch_size:,} a batch in {self.accumulation:,} parts, "
            f"{self.steps_per_epoch:,} batches an epoch, seed {self.seed}"
        )


def make_loader(
    prepared: Prepared,
    *,
    max_seq_len: int,
    packing: str,
    batch_size: int,
    accumulation: int,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
    keep_partial: bool = False,
) -> Loader:
    """Batches of `batch_size` sheets, for `steps` steps, else for `epochs` epochs (1 when neither is given).

    packing "pack" lays many rows on a sheet, "off" one. No batch crosses an epoch, and the rows that do not
    fill an epoch's last batch are left out, or padded with `keep_partial` (held-out loss wants every row).
    """
    if packing not in ("off", "pack"):
        raise UserError(f"data.packing is {packing!r}: it must be off or pack")
    if batch_size < 1 or accumulation < 1 or batch_size % accumulation:
        raise UserError(
            f"train.accumulation ({accumulation}) must divide train.batch_size ({batch_size}), and both must "
            "be at least 1"
        )
    for name, value in (("steps", steps), ("epochs", epochs)):
        if value is not None and value < 1:
            raise UserError(f"train.{name} is {value}: it must be at least 1")
    lengths = np.sort(prepared.lengths)[::-1]
    if lengths[0] > max_seq_len:
        raise UserError(f"the longest row has {lengths[0]:,} tokens and data.max_seq_len is {max_seq_len:,}")
    bins = best_fit(lengths, max_seq_len) if packing == "pack" else one_each(len(prepared))
    loader = Loader(
        prepared,
        bins,
        max_seq_len=max_seq_len,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        keep_partial=keep_partial,
    )
    loader.total_steps = steps or loader.steps_per_epoch * (epochs or 1)
    if steps and epochs:
        loader.notes.append(f"train.steps ({steps:,}) sets the run's length, not train.epochs ({epochs:,})")
    return loader
