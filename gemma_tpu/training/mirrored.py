"""A run folder kept in a bucket while the run goes on, for machines that may vanish: what lies there is fetched
before the run starts, and what the run changes is copied there every minute and at its end.

Checkpoints are not among it: a run on such a machine saves them in the bucket itself (checkpoint.folder).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.storage.remote import BucketSource
from gemma_tpu.storage.retry import explain, persist

EVERY = 60.0  # seconds
ATTEMPTS = 3
_LEFT = ("checkpoints/", "merged/")  # too large, and of no use to a run that goes on

Say = Callable[[str], None]


class Mirror:
    def __init__(self, folder: Path, url: str, say: Say):
        self._folder, self._bucket, self._say = folder, BucketSource(url), say
        self._known: dict[str, tuple[int, int]] = {}  # by name: size and time of what the bucket has too

    def fetch(self) -> int:
        """Brings here what the bucket has and this folder has not; how many files that were."""
        there = self._listed()
        missing = [name for name in there if not name.startswith(_LEFT) and not (self._folder / name).exists()]
        for name in missing:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._bucket.read(name, 0, there[name]))
            self._known[name] = _state(path)
        return len(missing)

    def _listed(self) -> dict[str, int]:
        try:
            return {name: file.size for name, file in self._bucket.list(recursive=True).items()}
        except UserError:
            if self._bucket.fs.exists(self._bucket.base):  # it is there and cannot be listed
                raise
            return {}

    def push(self) -> int:
        """Copies to the bucket what has changed here since the last time; how many files that were."""
        changed = {name: state for name, state in self._here().items() if self._known.get(name) != state}
        for name, state in changed.items():
            data = (self._folder / name).read_bytes()

            def upload(name: str = name, data: bytes = data) -> None:
                self._bucket.fs.makedirs(self._bucket.path(name).rpartition("/")[0], exist_ok=True)
                self._bucket.fs.pipe_file(self._bucket.path(name), data)

            persist(upload, f"copying {name} to {self._bucket.where}", ATTEMPTS, self._bucket.count_retry)
            self._known[name] = state
        return len(changed)

    def _here(self) -> dict[str, tuple[int, int]]:
        if not self._folder.is_dir():
            return {}
        names = [path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()]
        return {name: _state(self._folder / name) for name in sorted(names)
                if not name.startswith((*_LEFT, ".")) and "/." not in name}  # fmt: skip

    def try_to_push(self) -> bool:
        """A bucket that does not answer must not end a run: its checkpoints, saved by other means, decide that."""
        try:
            self.push()
            return True
        except Exception as error:  # every store's client says in its own way what is wrong
            self._say(f"warning: {self._folder} could not be copied to {self._bucket.where}: {explain(error)}")
            return False


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def kept(folder: Path, url: str, say: Say, every: float = EVERY) -> Iterator[None]:
    """While this is open, `folder` is also at `url`. What the folder has already is never replaced."""
    mirror = Mirror(folder, url, say)
    try:
        found = mirror.fetch()
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from error
    if found:
        say(f"{found} files of the run folder came from {url}")
    done = threading.Event()

    def run() -> None:
        while not done.wait(every):
            mirror.try_to_push()

    thread = threading.Thread(target=run, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=600)
        began = time.monotonic()
        if mirror.try_to_push():
            say(f"the run folder is in {url} ({time.monotonic() - began:.1f} s)")
