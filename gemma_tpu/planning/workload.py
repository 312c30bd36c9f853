"""How long a config's run is: updates and tokens, from its rows where they are here, else by a stated assumption."""

import math
from dataclasses import dataclass

import numpy as np

from gemma_tpu.data.batches import make_loader
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.datafiles import is_here
from gemma_tpu.data.packing import best_fit
from gemma_tpu.data.pairs import PairRows
from gemma_tpu.data.rows import Reader
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.schema import Config

CHARACTERS_PER_TOKEN = 3.3  # of code and English with Gemma's vocabulary; for rows that cannot be tokenised here
TURN_TOKENS = 5  # the markers around each message
PACKED_FULL = 0.98  # of each sheet, where the lengths are not known
# Datasets that the shipped configs name, for planning before the download: share of rows kept, their mean tokens.
KNOWN = {"codev_r1": (0.9959, 922, "the paper's count for CodeV-R1: 9,959 of 10,000 rows kept, 922 tokens on average")}


@dataclass(frozen=True)
class Workload:
    """A whole run. None: nothing that is here or given in the config tells."""

    steps: int | None
    tokens: int | None  # of the rows, over all epochs
    padding: float | None  # share of the positions that hold no token
    told: str  # where the figures come from
    counted: bool  # from the very rows, by the model's own tokenizer


def workload(config: Config) -> Workload:
    """Counted from the rows, else estimated from their text, else from what is known of the dataset."""
    if not is_here(config.data.path):
        return _without_rows(config)
    try:
        tokenizer = Tokenizer(config.model.path)
    except UserError:
        return _without_rows(config) if config.preference.loss else _from_text(config)
    return _counted_pairs(config, tokenizer) if config.preference.loss else _counted(config, tokenizer)


def _counted_pairs(config: Config, tokenizer: Tokenizer) -> Workload:
    train, data = config.train, config.data
    rows = PairRows(data, tokenizer)
    loader = make_loader(
        rows, max_seq_len=data.max_seq_len, packing=data.packing, batch_size=train.batch_size,
        accumulation=train.accumulation, seed=train.seed, epochs=train.epochs, steps=train.steps,
    )  # fmt: skip
    steps, padding = loader.total_steps, loader.padding_share
    return Workload(steps, _tokens(config, steps, padding), padding, f"{rows.report()}, tokenised here", counted=True)


def _counted(config: Config, tokenizer: Tokenizer) -> Workload:
    train, data = config.train, config.data
    rows = prepare(data, tokenizer)
    loader = make_loader(
        rows, max_seq_len=data.max_seq_len, packing=data.packing, batch_size=train.batch_size,
        accumulation=train.accumulation, seed=train.seed, epochs=train.epochs, steps=train.steps,
    )  # fmt: skip
    steps, padding = loader.total_steps, loader.padding_share
    told = f"{len(rows):,} of {rows.rows:,} rows, {rows.tokens:,} tokens an epoch, tokenised here"
    if data.packing == "bucket":
        told += f"; time is reckoned as if every update had rows of {data.max_seq_len:,}"
    return Workload(steps, round(steps * loader.positions_per_step * (1 - padding)), padding, told, counted=True)


def _from_text(config: Config) -> Workload:
    """No tokenizer here: the rows' characters stand for their tokens."""
    data = config.data
    lengths = np.array([
        math.ceil(row.characters / CHARACTERS_PER_TOKEN)
        + TURN_TOKENS * len(row.messages)
        for row in Reader(data)
    ], dtype=np.int64)  # fmt: skip
    kept = lengths[lengths <= data.max_seq_len] if data.overlong != "truncate" else lengths.clip(max=data.max_seq_len)
    if not len(kept):
        raise UserError(f"no row of data.path is short enough for data.max_seq_len {data.max_seq_len}")
    told = (
        f"{len(kept):,} rows of about {kept.mean():,.0f} tokens: model.path has no tokenizer here, so a token is "
        f"taken as {CHARACTERS_PER_TOKEN:g} characters"
    )
    sheets = len(best_fit(np.sort(kept)[::-1], data.max_seq_len)) if data.packing == "pack" else len(kept)
    return _laid_out(config, sheets, int(kept.sum()), told)


def _without_rows(config: Config) -> Workload:
    data = config.data
    known = KNOWN.get(data.transform) if isinstance(data.transform, str) else None
    where = data.path if isinstance(data.path, str) else ", ".join(data.path)
    if known and data.limit:
        share, mean, source = known
        rows = round(data.limit * share)
        full = PACKED_FULL if data.packing == "pack" else mean / data.max_seq_len
        sheets = math.ceil(rows * mean / (full * data.max_seq_len))
        return _laid_out(config, sheets, rows * mean, f"{where} is not here; by {source}")
    if config.train.steps is not None:
        return Workload(config.train.steps, None, None, f"{where} is not here: padding is not known", counted=False)
    return Workload(None, None, None, f"{where} is not here, and train.epochs alone does not say how many updates",
                    counted=False)  # fmt: skip


def _laid_out(config: Config, sheets: int, tokens: int, told: str) -> Workload:
    """Sheets of one epoch into batches: those that do not fill one are left out, as the loader does."""
    per_epoch = max(1, sheets // config.train.batch_size)
    steps = config.train.steps or per_epoch * (config.train.epochs or 1)
    padding = max(0.0, 1 - tokens / (sheets * config.data.max_seq_len))
    return Workload(steps, _tokens(config, steps, padding), padding, told, counted=False)


def _tokens(config: Config, steps: int, padding: float) -> int:
    return round(steps * config.train.batch_size * config.data.max_seq_len * (1 - padding))
