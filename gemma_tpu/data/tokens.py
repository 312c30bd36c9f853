"""Tokenised rows in flat arrays, in memory or in a folder that the next start finds again.

An entry of the cache is named by a hash of all that shaped it, is written beside its place and renamed when complete,
and is read by memory map: the rows may be larger than memory. What comes after tokenising (lengths, mixing, the split)
is no part of it, so that trying another max_seq_len costs nothing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.data.encoding import Encoded, arrays
from gemma_tpu.data.rows import Account, Tally
from gemma_tpu.errors import RunError

DTYPES = {
    "ids": np.int32, "mask": np.bool_, "lengths": np.int64, "targets": np.int64, "files": np.int32,
    "lines": np.int64, "hashes": np.uint64,
}  # fmt: skip
META = "rows.json"
_PARTIAL = ".partial-"
# What turns a record into tokens, as code: a change of it makes every entry another one.
_CODE = ("records", "formats", "turns", "transforms", "rows", "encoding", "tokens", "tokenizer", "template")


@dataclass(frozen=True)
class Tokens:
    """Every row that could be tokenised, of any length, in the order of the files."""

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray  # of ids and mask: the same row is the same number wherever it stands
    account: Account


def collect(results: Iterable[Encoded]) -> Tokens:
    """All chunks in memory."""
    grown = {name: bytearray() for name in DTYPES}
    account = Account()
    for encoded in results:
        account.merge(encoded.account)
        for name, values in arrays(encoded).items():
            grown[name] += values.tobytes()
    return Tokens(**{name: np.frombuffer(grown[name], DTYPES[name]) for name in DTYPES}, account=account)


def key_of(parts: object) -> str:
    """The name of an entry: a hash of everything that shaped it, the code and the libraries' versions included."""
    from importlib.metadata import version

    code = hashlib.sha256()
    for name in _CODE:
        path = Path(__file__).with_name(f"{name}.py")
        code.update(path.read_bytes() if path.is_file() else b"")
    libraries = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
    text = json.dumps([parts, code.hexdigest(), libraries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(root: Path, key: str) -> Tokens | None:
    """The entry, or None where there is none that is whole."""
    folder = root / key
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        found = {name: _map(folder / f"{name}.bin", DTYPES[name]) for name in DTYPES}
        if {name: len(values) for name, values in found.items()} != meta["sizes"]:
            return None
        return Tokens(**found, account=_account(meta["account"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: made anew
        return None


def write(root: Path, key: str, results: Iterable[Encoded]) -> Tokens:
    """Writes an entry while the chunks come, whole or not at all, and gives it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(root)
        with _partial(root) as folder:
            account, sizes = _fill(folder, results)
            (folder / META).write_text(json.dumps({"sizes": sizes, "account": _plain(account)}), encoding="utf-8")
            _publish(folder, root / key)
    except OSError as error:
        raise RunError(f"the tokenised rows cannot be kept in {root} ({error.strerror}): set data.cache to a folder "
                       "with room, or to null") from None  # fmt: skip
    found = load(root, key)
    if found is None:
        raise RunError(f"{root / key}: the tokenised rows cannot be read back; is the disk full?")
    return found


def _fill(folder: Path, results: Iterable[Encoded]) -> tuple[Account, dict[str, int]]:
    account, sizes = Account(), dict.fromkeys(DTYPES, 0)
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in DTYPES}
        for encoded in results:
            account.merge(encoded.account)
            for name, values in arrays(encoded).items():
                streams[name].write(values.data)
                sizes[name] += len(values)
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    return account, sizes


def _publish(folder: Path, place: Path) -> None:
    """In its place by one rename; where another process was first, its entry is the same and stays."""
    if place.is_dir() and load(place.parent, place.name) is None:
        shutil.rmtree(place, ignore_errors=True)
    try:
        os.rename(folder, place)
    except OSError:
        if not place.is_dir():
            raise


@contextlib.contextmanager
def _partial(root: Path) -> Iterator[Path]:
    """A folder to write into, locked while it is written, gone afterwards unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # filesystems without locks: then nothing is cleared there either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _clear_abandoned(root: Path) -> None:
    """What a killed run left: its lock went with it."""
    for folder in root.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if any(folder.iterdir()):  # an empty one may be just about to be locked
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _map(path: Path, dtype: type[np.generic]) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _plain(account: Account) -> dict[str, Any]:
    plain = {one.name: getattr(account, one.name) for one in fields(account)}
    return {name: vars(value) if isinstance(value, Tally) else value for name, value in plain.items()}


def _account(plain: dict[str, Any]) -> Account:
    def tally(one: dict[str, Any]) -> Tally:
        places = {reason: [(place, detail) for place, detail in found] for reason, found in one["places"].items()}
        return Tally(Counter(one["counts"]), places)

    return Account(
        rows=plain["rows"], answered=plain["answered"], said=Counter(plain["said"]), forms=Counter(plain["forms"]),
        refused=tally(plain["refused"]), dropped=tally(plain["dropped"]),
    )  # fmt: skip
