"""A model folder as a cache of the Hugging Face hub, for programs that take the name of a repository alone.

models--ORG--NAME/refs/main names a revision, and snapshots/REVISION holds the files: hard links to the folder's own,
so that nothing is copied and a container sees them without the folder, or symbolic links where the two lie on
different disks. The revision is made of the files' names, sizes and times: a changed model is another one.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from gemma_tpu.errors import RunError, UserError

_OURS = ".gemma-tpu"  # in a repository's folder: it was made here, and may be made again
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Cached:
    root: Path  # what HF_HUB_CACHE names
    repository: str
    revision: str
    linked: bool  # symbolic links: whoever reads them needs the model's folder at its own path too

    @property
    def snapshot(self) -> Path:
        return _folder(self.root, self.repository) / "snapshots" / self.revision


def repository_of(folder: Path) -> str:
    """local/NAME: a name that the hub's own rules take, whatever the folder is called."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    return "local/" + (re.sub(r"-{2,}|\.{2,}", "-", name)[:80] or "model")


def check(repository: str) -> None:
    org, slash, name = repository.partition("/")
    wrong = not slash or "--" in repository or ".." in repository or len(repository) > 96
    if wrong or not _NAME.fullmatch(org) or not _NAME.fullmatch(name):
        raise UserError(f"{repository!r} is no name of a repository: ORG/NAME of letters, digits, '-', '_' and '.'")


def make(folder: Path, root: Path, repository: str) -> Cached:
    """The cache with this folder as its repository; what is there and right already stays."""
    check(repository)
    folder, root = folder.resolve(), root.expanduser().resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    home = _folder(root, repository)
    if home.exists() and not (home / _OURS).exists():
        raise UserError(f"{home} is there and was not made by gemma-tpu: give another --hub-cache or --served-name")
    found = Cached(root, repository, _revision(folder, files), False)
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / _OURS).touch()
        linked = _links(files, folder, found.snapshot)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(found.revision)
        for old in (home / "snapshots").iterdir():
            if old.name != found.revision:  # links of ours to a model that has changed; they hold its space
                shutil.rmtree(old)
    except OSError as error:
        raise RunError(f"{home} cannot be written: {error.strerror}; give another --hub-cache") from error
    return Cached(root, repository, found.revision, linked)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _folder(root: Path, repository: str) -> Path:
    return root / f"models--{repository.replace('/', '--')}"


def _revision(folder: Path, files: list[Path]) -> str:
    states = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha1(repr(states).encode()).hexdigest()


def _links(files: list[Path], folder: Path, snapshot: Path) -> bool:
    """Whether any of them is a symbolic link."""
    if snapshot.exists():
        shutil.rmtree(snapshot)  # links alone; a call that was cut off may have left half of them
    snapshot.mkdir(parents=True)
    linked = False
    for path in files:
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            target.symlink_to(path.resolve())
            linked = True
    return linked


def main(words: list[str]) -> int:
    """FOLDER ROOT ORG/NAME, as the scripts of `gemma-tpu serve` call it."""
    try:
        made = make(Path(words[0]), Path(words[1]), words[2])
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"{made.snapshot}: {'symbolic' if made.linked else 'hard'} links to {words[0]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
