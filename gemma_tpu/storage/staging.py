"""Writes a folder completely or not at all: into a hidden one beside it, renamed when all is on disk.

A run that is killed leaves the target as it was. Its hidden folder is locked while the writer lives, so the
next run can tell an abandoned one from one that is being written. It clears an abandoned one, unless that was
written by the same plan: then it finds there what was finished.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from gemma_tpu.errors import RunError, UserError

REPLACEABLE = ("*.safetensors", "*.safetensors.index.json")
_PLAN = ".gemma-tpu-plan"
_MOST_STRAYS = 20  # enough to name; walking on could mean the whole disk
# What flock answers on network filesystems that have none; there only the user keeps two writers apart.
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def staged(out: Path, files: set[str], overwrite: bool, plan: str | None = None) -> Iterator[Path]:
    """Gives the folder to write `files` (relative names) into; when the block ends well, it becomes `out`.

    With a plan, a folder that an attempt at the same plan has left is given as that left it. A failure clears the
    folder; a kill or Ctrl-C leaves it for the next attempt.
    """
    out = out.resolve()  # a link to a bigger disk stays a link
    check_target(out, files, overwrite)
    partial = out.with_name(f".{out.name}.gemma-tpu-partial")
    previous = out.with_name(f".{out.name}.gemma-tpu-previous")
    lock = _lock(partial, out)
    try:
        _restore(out, previous)
        check_target(out, files, overwrite)
        if plan is None or not _is_planned(partial, plan):
            _clear(partial)
            if plan is not None:
                write_file(partial / _PLAN, lambda file: file.write(plan.encode()))
        yield partial
        (partial / _PLAN).unlink(missing_ok=True)
        _fsync_folders(partial)
        check_target(out, files, overwrite)  # something may have come in while we wrote
        _swap(partial, out, previous)
    except BaseException as error:  # nothing half-written stays, unless it can be gone on with
        if plan is None or not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_target(out: Path, files: set[str], overwrite: bool) -> None:
    """Refuses a target that would lose content: without overwrite any, with it all but old weights."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: give the name of a new folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out} exists and is not empty: choose another folder, or allow overwriting it")
    strays = []
    for name in walk_names(out):
        if name not in files and not any(fnmatch(name, pattern) for pattern in REPLACEABLE):
            strays.append(name)
            if len(strays) == _MOST_STRAYS:
                break
    if strays:
        raise UserError(f"overwriting {out} would lose files that the new model does not have: "
                        f"{', '.join(sorted(strays))}; move them away or choose another folder")


def walk_names(folder: Path) -> Iterator[str]:
    """Relative names of all that is not a folder, links to folders included."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in names + links:
            yield os.path.relpath(os.path.join(place, name), folder)


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Creates a file, lets `write(file)` fill it and returns when the disk has it."""
    begin_file(path, write)()


def begin_file(path: Path, write: Callable[[BinaryIO], object]) -> Callable[[], None]:
    """The same up to where the system has the file; to be followed by the call that it gives, which waits for the
    disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        write(file)
        file.flush()
        fd = os.dup(file.fileno())

    def settle() -> None:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    return settle


def _lock(partial: Path, out: Path) -> int:
    busy = RunError(f"another process is writing {out}: wait for it to end, or choose another folder")
    partial.mkdir(parents=True, exist_ok=True)
    fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(fd)
            raise (busy if isinstance(error, BlockingIOError) else error) from None
    # The other writer may have finished between the two calls: then this folder is its result by now.
    if not partial.exists() or not os.path.samestat(os.stat(partial), os.fstat(fd)):
        os.close(fd)
        raise busy
    return fd


def _restore(out: Path, previous: Path) -> None:
    """Finishes a swap that was killed: the old folder goes back if nothing took its place, else it goes."""
    if not previous.exists():
        return
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(previous)
    else:
        os.rename(previous, out)


def _is_planned(folder: Path, plan: str) -> bool:
    path = folder / _PLAN
    return path.is_file() and path.read_bytes() == plan.encode()


def _clear(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _swap(partial: Path, out: Path, previous: Path) -> None:
    replaces = out.exists() and any(out.iterdir())
    if replaces:
        os.rename(out, previous)
    try:
        os.rename(partial, out)
    except OSError:
        if replaces:
            os.rename(previous, out)
        raise
    _fsync_folder(out.parent)
    if replaces:
        # The new folder is in place: no longer a reason to fail, and the next run clears what is left.
        shutil.rmtree(previous, ignore_errors=True)


def _fsync_folders(folder: Path) -> None:
    for place, _, _ in os.walk(folder):
        _fsync_folder(place)


def _fsync_folder(folder: Path | str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
