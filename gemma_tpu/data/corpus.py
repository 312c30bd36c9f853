"""A corpus is a dataset ready to train on: tokenised rows in flat arrays, and the account of every row read.

Nothing is dropped in silence: a row is kept, or counted under a reason with the lines it happened on, and a
corpus that could not train anything is refused by the rule that emptied it.

Shapes: N kept rows.
"""

import hashlib
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.data import tokens, transforms
from gemma_tpu.data.datafiles import DataFile
from gemma_tpu.data.encoding import Encoded, Encoder, Settings, Tokenizer, encode
from gemma_tpu.data.packing import padding_waste
from gemma_tpu.data.rows import Account, Tally, chunks, files_of
from gemma_tpu.data.selection import Chosen, choose
from gemma_tpu.data.tokens import Tokens
from gemma_tpu.data.workers import Pool, cores
from gemma_tpu.errors import UserError
from gemma_tpu.schema import DataConfig

LANE = 128  # a recommended length is a multiple of the TPU's lane width
WORTH_KEEPING = 0.995  # the share of rows that the recommended length holds
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)  # that a report gives the share of rows for
ALONE = 3.0  # seconds of work in this process before others are started: about what starting them costs
SAID_EVERY = 10.0  # seconds

Path_ = str | Sequence[str]


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows in flat arrays: a million rows are a few arrays, not a million objects. They may be a map of files
    on disk, of which only what is asked for comes into memory."""

    ids: np.ndarray  # int32, rows end to end, among them those that were left out
    mask: np.ndarray  # bool, True where the token is a trained target
    starts: np.ndarray  # int64 [N], where each kept row begins
    lengths: np.ndarray  # int64 [N]
    targets: np.ndarray  # int64 [N]
    file_N: np.ndarray
    line_N: np.ndarray
    hash_N: np.ndarray  # uint64, of the row's ids and mask
    measured: np.ndarray  # length of every row that was tokenised, before any was dropped or cut
    files: list[DataFile]
    format: str
    rows: int
    dropped: Tally
    max_seq_len: int
    pad_id: int
    notes: list[str]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.starts[row], self.starts[row] + self.lengths[row])
        return self.ids[span], self.mask[span]

    def pieces(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """What lies on the sheet of a row, one segment each."""
        return [self[row]]

    @cached_property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def target_tokens(self) -> int:
        return int(self.targets.sum())

    @cached_property
    def percentiles(self) -> dict[str, int]:
        """Of the lengths as read: this is what max_seq_len is chosen by."""
        cuts = np.percentile(self.measured, [50, 90, 99, 100], method="higher").astype(int)
        return dict(zip(("p50", "p90", "p99", "max"), cuts.tolist(), strict=True))

    @cached_property
    def padding_waste(self) -> dict[str, float]:
        return padding_waste(self.lengths, self.max_seq_len)

    @cached_property
    def share_kept(self) -> dict[str, float]:
        """Of the rows as read, by max_seq_len."""
        return {str(length): float((self.measured <= length).mean()) for length in LENGTHS}

    @property
    def recommended_max_seq_len(self) -> int:
        """The smallest multiple of 128 that holds 99.5 % of the rows as read."""
        needed = float(np.quantile(self.measured, WORTH_KEEPING, method="higher"))
        return int(-(-needed // LANE) * LANE)

    @cached_property
    def fingerprint(self) -> int:
        """Of the tokenised rows: a resumed run must see the rows that it was started on."""
        return zlib.crc32(np.ascontiguousarray(self.hash_N).data, zlib.crc32(np.ascontiguousarray(self.lengths).data))

    def where(self, row: int) -> str:
        """`train.jsonl:17`, the line that kept row `row` came from."""
        return f"{self.files[self.file_N[row]].name}:{self.line_N[row]}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": len(self),
            "dropped": dict(self.dropped.counts),
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "percentiles": self.percentiles,
            "mean": self.tokens / len(self),
            "share_kept": self.share_kept,
            "max_seq_len": self.max_seq_len,
            "padding_waste": self.padding_waste,
            "packing_efficiency": 1 - self.padding_waste["pack"],
            "recommended_max_seq_len": self.recommended_max_seq_len,
            "format": self.format,
            "notes": self.notes,
        }

    def report(self) -> str:
        names = [file.name for file in self.files]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more files" if len(names) > 4 else "")
        table = [
            ("data", f"{shown}, format {self.format}"),
            ("rows", f"{self.rows:,}"),
            ("kept", f"{len(self):,}"),
            ("dropped", f"{self.dropped.total():,}"),
        ]
        for reason, count in self.dropped.counts.items():
            where = self.dropped.where(reason)
            table.append((f"  {reason}", f"{count:,}" + (f" ({where})" if where else "")))
        table += [
            ("tokens", f"{self.tokens:,}"),
            ("target tokens", f"{self.target_tokens:,} ({self.target_tokens / self.tokens:.1%})"),
            ("length as read", "  ".join(f"{k} {v:,}" for k, v in self.percentiles.items())),
            ("max_seq_len", f"{self.max_seq_len:,} (99.5 % of rows fit in {self.recommended_max_seq_len:,})"),
            ("padding", "  ".join(f"{k} {v:.1%}" for k, v in self.padding_waste.items())),
        ]
        table += [("note", note) for note in self.notes]
        width = max(len(name) for name, _ in table)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in table)


def prepare(section: DataConfig, tokenizer: Tokenizer, path: Path_ | float | None = None, side: str = "") -> Prepared:
    """Reads and tokenises data.path, less the share that data.validation holds out.

    `path` asks for the held-out rows instead: the value of data.validation. Rows of their own are read under the same
    rules, without data.limit and data.weights, which are about training rows. `side` (chosen, rejected) is for
    preference pairs.
    """
    if path is None or isinstance(path, float):
        files = files_of(section)
    else:
        section = replace(section, limit=None, weights=None, validation=None)
        files = files_of(section, path)
    found = _tokenised(section, tokenizer, files, side)
    account = found.account
    if section.strict:
        account.raise_refused()
    names = _names(files)
    if not account.rows:
        raise UserError(f"{names}: the dataset is empty; it must hold at least one row")
    held_out = isinstance(path, float)
    share = section.validation if isinstance(section.validation, float) else None
    chosen = choose(section, found, files, share, held_out)
    dropped = Tally()
    if not held_out:  # what could not be tokenised belongs to neither part; it is counted with the training rows
        dropped.merge(account.dropped)
        dropped.merge(account.refused)
    dropped.merge(chosen.dropped)
    if not len(chosen.rows):
        _refuse_empty(section, names, found, dropped)
    left = dropped.total() - chosen.dropped.total()
    return _laid_out(section, tokenizer, files, found, chosen, dropped, rows=chosen.considered + left)


def _laid_out(section: DataConfig, tokenizer: Tokenizer, files: list[DataFile], found: Tokens, chosen: Chosen,
              dropped: Tally, rows: int) -> Prepared:  # fmt: skip
    offsets = np.cumsum(found.lengths) - found.lengths
    kept = chosen.rows
    return Prepared(
        ids=found.ids, mask=found.mask, starts=offsets[kept], lengths=chosen.lengths, targets=chosen.targets,
        file_N=found.files[kept], line_N=found.lines[kept], hash_N=found.hashes[kept],
        measured=found.lengths[chosen.measured], files=files, format=found.account.formats(section.format), rows=rows,
        dropped=dropped, max_seq_len=section.max_seq_len, pad_id=tokenizer.pad_id,
        notes=[*found.account.notes(), *chosen.notes],
    )  # fmt: skip


# --- tokenising, once ---


def _tokenised(section: DataConfig, tokenizer: Tokenizer, files: list[DataFile], side: str) -> Tokens:
    """From the cache where it has them, else by all cores, and kept for the next start."""
    names = transforms.names_of(section.transform)
    settings = Settings(dict(section.columns), names, section.train_on, side)
    folder = getattr(tokenizer, "folder", None)  # one without a folder cannot be named, nor made in another process
    workers = section.workers or cores()
    pool = Pool(settings, folder, workers) if folder is not None and workers > 1 else None
    account = Account()
    each = section.weights is not None

    def results() -> Iterator[Encoded]:
        source = chunks(files, section, section.limit, account, each)
        yield from _told(encode(source, Encoder(settings, tokenizer), pool, ALONE))
        yield Encoded(account=account)  # what the reading of the files counted

    try:
        if folder is None or section.cache is None or not all(file.identity for file in files):
            return tokens.collect(results())
        root = Path(section.cache).expanduser()
        key = tokens.key_of([
            [file.identity for file in files], section.format, section.limit, each and [f.origin for f in files],
            settings.columns, [[name, transforms.identity(name)] for name in names], settings.train_on, side,
            tokenizer_identity(folder),
        ])  # fmt: skip
        return tokens.load(root, key) or tokens.write(root, key, results())
    finally:
        if pool is not None:
            pool.close()


def tokenizer_identity(folder: Path) -> str:
    """Of everything beside the weights: tokenizer, chat template, the ids that end a turn."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        wanted = path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json")
        if wanted and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _told(results: Iterable[Encoded]) -> Iterator[Encoded]:
    """Says now and then how far it is: a million rows take minutes."""
    start = said = time.monotonic()
    rows = 0
    for encoded in results:
        rows += encoded.account.rows
        now = time.monotonic()
        if now - said >= SAID_EVERY:
            print(f"tokenised {rows:,} rows, {rows / (now - start):,.0f} a second", file=sys.stderr, flush=True)
            said = now
        yield encoded


# --- data that cannot train anything ---


def _names(files: Sequence[DataFile]) -> str:
    names = [file.where for file in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more files" if len(names) > 5 else "")


def _refuse_empty(section: DataConfig, names: str, found: Tokens, dropped: Tally) -> None:
    """By the rule that emptied it."""
    rows, counts = found.account.rows, dropped.counts
    if counts["no_target"] == rows:
        raise UserError(f"{names}: {_nothing_to_train(section, found.account)}")
    if counts["too_long"] == rows:
        raise UserError(
            f"{names}: all {rows:,} rows are longer than data.max_seq_len ({section.max_seq_len:,}): "
            f"the shortest has {found.lengths.min():,} tokens, the longest {found.lengths.max():,}. Raise "
            "data.max_seq_len, or set data.overlong: truncate"
        )
    reasons = "\n".join(f"  {line}" for line in dropped.details())
    raise UserError(f"{names}: none of the {rows:,} rows is left to train on; dropped:\n{reasons}")


def _nothing_to_train(section: DataConfig, account: Account) -> str:
    """Two different mistakes end in an empty loss mask: rows without answers, and a mask that misses them."""
    rule = f"data.train_on={section.train_on} trains "
    rule += {"all": "every token but the first", "last_assistant": "the last assistant turn"}.get(
        section.train_on, "the assistant turns"
    )
    if not account.answered:
        return (
            f"none of the {account.rows:,} rows has an assistant turn, and {rule}, so every loss mask is "
            "empty. Add the answers as assistant turns, or set data.train_on: all"
        )
    return (
        f"the loss masks of all {account.rows:,} rows are empty, though {account.answered:,} have an assistant turn; "
        f"{rule}. Either every such turn has weight 0, or the model folder's chat template does not render those turns "
        "where the mask looks"
    )
