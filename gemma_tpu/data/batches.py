"""From prepared rows to batches: any step's batch is served by its index alone.

A batch is a pure function of (rows, seed, step). That is the whole resume story: the iterator's state is one
integer, and on several hosts each slices the same global batch. Grain does the loading ahead of the step.

A batch has one length, and all batches have it but with packing "bucket", whose few lengths are the loader's `widths`.

Shapes: N kept rows, S sheets an epoch, B sheets a batch, T tokens a sheet, W widths.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from gemma_tpu.data.packing import Bins, Encoded, best_fit, bucket_widths, fill, longest_first, one_each
from gemma_tpu.data.rows import Tally
from gemma_tpu.errors import UserError

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """What batches are made of: corpus.Prepared, or pairs, of which both pieces stay together."""

    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def rows(self) -> int: ...  # read, kept or not
    @property
    def dropped(self) -> Tally: ...
    @property
    def tokens(self) -> int: ...
    @property
    def fingerprint(self) -> int: ...
    @property
    def pad_id(self) -> int: ...

    def __len__(self) -> int: ...
    def pieces(self, row: int, /) -> Sequence[Encoded]: ...
    def where(self, row: int, /) -> str: ...


AHEAD = 2  # batches that lie on the devices before their step
READY = 4  # and on the host before that


class BatchIterator(Iterator[Any]):
    """Batches made ahead of the step. Its whole state is the global index of the next one, and the plan that this
    index counts in: neither hosts nor devices are in it, so that a run goes on with other ones."""

    def __init__(self, loader: "Loader", place: Callable[[Batch], Any] | None):
        self._loader, self._place, self._plan = loader, place, loader.plan
        self._next = 0
        self._iterator: Any = None  # grain's, which has no types

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._dataset())
        batch = next(self._iterator)
        self._next += 1
        return batch

    def _dataset(self) -> Any:
        import grain  # here: it brings JAX along, and preparing data needs neither

        rest = grain.MapDataset.source(self._loader)[self._next :]
        batches = rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=READY))
        if self._place is None:
            return batches
        return grain.experimental.ThreadPrefetchIterDataset(batches.map(self._place), prefetch_buffer_size=AHEAD)

    def get_state(self) -> dict[str, Any]:
        """JSON-able; `next_index` is the batch that comes next."""
        return {"next_index": self._next, "plan": self._plan}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["plan"] != self._plan:
            raise UserError(
                f"the saved position counts batches of {state['plan']}; the data now gives {self._plan}. "
                "Resume with the rows, data.*, train.batch_size, train.accumulation and train.seed that the "
                "run was started with, or start a new run folder"
            )
        self.close()
        self._next = state["next_index"]

    def close(self) -> None:
        """Ends the threads that work ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


@dataclass(frozen=True)
class Epoch:
    """One epoch's order: batch b is order_S[b * batch_size : (b + 1) * batch_size], of width width_of_batch[b]."""

    row_of_rank_N: np.ndarray
    order_S: np.ndarray
    width_of_batch: np.ndarray  # index into the loader's widths


class Loader:
    """Random access to the batches of a run; see make_loader."""

    def __init__(
        self,
        prepared: Rows,
        bins: Bins,
        *,
        widths: np.ndarray,
        batch_size: int,
        accumulation: int,
        seed: int,
        keep_partial: bool,
    ):
        self.prepared, self.seed = prepared, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self._bins = bins  # over ranks (0 is the longest row), so that each epoch may fill it with other rows
        full, left = divmod(len(bins), batch_size)
        self._padded = bool(left) and (keep_partial or not full)
        self.steps_per_epoch = full + self._padded
        self.total_steps = self.steps_per_epoch
        self.widths, self._width_of_sheet = _used(widths, prepared.lengths, len(bins), batch_size, self._padded)
        self.notes: list[str] = []
        self._say_partial(full, left)
        self._epoch = lru_cache(maxsize=2)(self._shuffle)  # two: prefetching runs ahead over the border
        first = self.widths[self._epoch(0).width_of_batch]
        self.positions_per_step = float(first.mean()) * batch_size  # padding too; the same in every epoch
        # Of all that would be laid out: rows that an epoch leaves out are neither its tokens nor its padding.
        left_out = 0 if self._padded else left * int(self.widths[-1])
        self.padding_share = 1 - prepared.tokens / (self.positions_per_step * self.steps_per_epoch + left_out)

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step counted from 0, every leaf [accumulation, batch_size // accumulation, T]."""
        sheets = [[piece for row in rows for piece in self.prepared.pieces(row)] for rows in self._sheets(step)]
        sheets += [[]] * (self.batch_size - len(sheets))
        width = self.width_of(step)
        batch = fill(sheets, width, self.prepared.pad_id)
        shape = (self.accumulation, self.batch_size // self.accumulation, width)
        return {name: leaf.reshape(shape) for name, leaf in batch.items()}

    def __iter__(self) -> BatchIterator:
        return self.iterate()

    def iterate(self, place: Callable[[Batch], Any] | None = None) -> BatchIterator:
        """The batches in order; `place` puts one on the devices, ahead of the step that takes it."""
        return BatchIterator(self, place)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """Indices of the kept rows in a step's batch; prepared.where(row) names the file and line."""
        return [int(row) for rows in self._sheets(step) for row in rows]

    def width_of(self, step: int) -> int:
        epoch, batch = divmod(step, self.steps_per_epoch)
        return int(self.widths[self._epoch(epoch).width_of_batch[batch]])

    def first_steps(self, start: int = 0) -> dict[int, int]:
        """width -> the first step from `start` on that has it: what a run from there has to compile."""
        found: dict[int, int] = {}
        for step in range(start, self.total_steps):
            if len(found) == len(self.widths):
                break
            found.setdefault(self.width_of(step), step)
        return found

    def _sheets(self, step: int) -> list[np.ndarray]:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        chosen = order.order_S[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [order.row_of_rank_N[self._bins[sheet]] for sheet in chosen.tolist()]

    def _shuffle(self, epoch: int) -> Epoch:
        """The epoch's rows by rank and its order of sheets. Rows of one length change places, so that a row
        gets new neighbours while the plan, and with it the number of steps, stays.

        What does not fill a batch of its own width goes into the next wider one; other rows each time.
        """
        rng = np.random.default_rng([self.seed, epoch])
        row_of_rank_N = longest_first(self.prepared.lengths, rng)
        if len(self.widths) == 1:
            order_S = rng.permutation(len(self._bins))
            return Epoch(row_of_rank_N, order_S, np.zeros(self.steps_per_epoch, np.int64))
        size, left_S, batches = self.batch_size, np.zeros(0, np.int64), []
        for width in range(len(self.widths)):
            pool_S = rng.permutation(np.concatenate([np.flatnonzero(self._width_of_sheet == width), left_S]))
            full = len(pool_S) // size * size
            batches += [(width, batch) for batch in pool_S[:full].reshape(-1, size)]
            left_S = pool_S[full:]
        shuffled = [batches[i] for i in rng.permutation(len(batches))]
        if self._padded:
            shuffled.append((len(self.widths) - 1, left_S))
        order_S = np.concatenate([batch for _, batch in shuffled])
        return Epoch(row_of_rank_N, order_S, np.array([width for width, _ in shuffled]))

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

    @property
    def plan(self) -> str:
        """What the index of a batch counts in."""
        widths = ", ".join(f"{width:,}" for width in self.widths.tolist())
        return (
            f"{len(self.prepared):,} rows (checksum {self.prepared.fingerprint:08x}) on {len(self._bins):,} "
            f"sheets of {widths}, {self.batch_size:,} a batch in {self.accumulation:,} parts, "
            f"{self.steps_per_epoch:,} batches an epoch, seed {self.seed}"
        )


def make_loader(
    prepared: Rows,
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

    packing "pack" lays many rows on a sheet, "off" one, and "bucket" one on a sheet of the shortest of a few widths
    that holds it, a batch having one width. No batch crosses an epoch, and the rows that do not fill an epoch's last
    batch are left out, or padded with `keep_partial` (held-out loss wants every row).
    """
    if packing not in ("off", "bucket", "pack"):
        raise UserError(f"data.packing is {packing!r}: it must be off, bucket or pack")
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
        widths=bucket_widths(lengths, max_seq_len) if packing == "bucket" else np.array([max_seq_len]),
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        keep_partial=keep_partial,
    )
    if packing == "bucket":
        told = ", ".join(f"{width:,}" for width in loader.widths.tolist())
        loader.notes.append(f"data.packing=bucket: batches of {told} tokens a row, each length compiled once")
    loader.total_steps = steps or loader.steps_per_epoch * (epochs or 1)
    if steps and epochs:
        loader.notes.append(f"train.steps ({steps:,}) sets the run's length, not train.epochs ({epochs:,})")
    return loader


def _used(
    widths: np.ndarray, lengths_N: np.ndarray, sheets: int, batch_size: int, padded: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The widths that get a batch, and the index of each sheet's: sheets go by rank, one row each if there are several
    widths. Rows of a width that they cannot fill one batch of take the next."""
    while len(widths) > 1:
        by_rank_N = np.searchsorted(widths, np.sort(lengths_N)[::-1])
        left, empty = 0, None
        for width in range(len(widths)):
            total = int((by_rank_N == width).sum()) + left
            left = total % batch_size
            if total < batch_size and not (padded and width == len(widths) - 1) and empty is None:
                empty = width
        if empty is None:
            return widths, by_rank_N
        if empty == len(widths) - 1:  # nothing is wider: the rows below it must go along
            empty -= 1
        widths = np.delete(widths, empty)
    return widths, np.zeros(sheets, np.int64)
