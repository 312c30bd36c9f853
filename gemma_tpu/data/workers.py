"""Processes that tokenise side by side, with results in order.

They are plain children of this Python that import the tokenizer and no more: no fork of a process that may hold a TPU
and threads, no second run of the user's main module. Each takes the next chunk when it has done one.
"""

import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from gemma_tpu.data.encoding import Encoded, Encoder, Settings
from gemma_tpu.data.rows import Chunk
from gemma_tpu.errors import RunError, UserError

AHEAD = 3  # chunks for each process that are read before the first of them is needed
_ENDED = ("a process that tokenises has ended; its message stands above. Where memory was short, set data.workers "
          "lower")  # fmt: skip
_START = "import sys; sys.path[:0] = sys.argv[2:]; from gemma_tpu.data import workers; workers.serve(int(sys.argv[1]))"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Started when it is first asked whether it is ready, ended by close."""

    def __init__(self, settings: Settings, folder: Path, count: int):
        self._job, self._count = (settings, folder), count
        self._processes: list[subprocess.Popen[bytes]] = []
        # Each with whether it has said that it is ready; None stands for one that has ended.
        self._idle: queue.SimpleQueue[tuple[Connection, bool] | None] = queue.SimpleQueue()
        self._started: tuple[Connection, ThreadPoolExecutor] | None = None  # to the first process; one for each

    def ready(self) -> bool:
        """Whether the first process can take a chunk; the first question starts them."""
        first, _ = self._running()
        return first.poll(0)

    def ordered(self, chunks: Iterable[Chunk]) -> Iterator[Encoded]:
        under_way: deque[Future[Encoded]] = deque()
        _, threads = self._running()
        for chunk in chunks:
            under_way.append(threads.submit(self._ask, chunk))
            if len(under_way) > AHEAD * self._count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def close(self) -> None:
        """Ends the processes, also in the middle of their work."""
        threads = None if self._started is None else self._started[1]
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.wait()
        for _ in range(self._count):
            self._idle.put(None)
        if threads is not None:  # each blocked read ended with its process
            threads.shutdown(wait=True)
        while not self._idle.empty():
            taken = self._idle.get()
            if taken is not None:
                taken[0].close()

    def _running(self) -> tuple[Connection, ThreadPoolExecutor]:
        if self._started is None:
            connections = [self._start() for _ in range(self._count)]
            self._started = connections[0], ThreadPoolExecutor(self._count, "tokenise")
        return self._started

    def _start(self) -> Connection:
        root = str(Path(__file__).resolve().parents[2])
        # One thread each: the processes already fill the cores. And none of them may reach for an accelerator.
        quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        ours, theirs = socket.socketpair()
        with theirs:
            self._processes.append(subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), root, *filter(None, sys.path)],
                pass_fds=[theirs.fileno()], env=os.environ | quiet, stdin=subprocess.DEVNULL,
            ))  # fmt: skip
        connection = Connection(ours.detach())
        connection.send(self._job)
        self._idle.put((connection, False))
        return connection

    def _ask(self, chunk: Chunk) -> Encoded:
        taken = self._idle.get()
        if taken is None:
            raise RunError(_ENDED)
        connection, greeted = taken
        try:
            if not greeted:
                connection.recv()
            connection.send(chunk)
            kind, found = connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            connection.close()
            self._idle.put(None)  # whoever waits for a process must not wait for this one
            raise RunError(_ENDED) from None
        self._idle.put((connection, True))
        if kind == "wrong":
            raise UserError(found)
        rows: Encoded = found
        return rows


def serve(fd: int) -> None:
    """What a worker runs until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.dup2(2, 1)
    connection = Connection(fd)
    try:
        settings, folder = connection.recv()
    except EOFError:
        return
    encoder = failed = None
    try:
        from gemma_tpu.data.tokenizer import Tokenizer

        encoder = Encoder(settings, Tokenizer(folder))
    except UserError as error:
        failed = str(error)
    connection.send("ready")
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("wrong", failed) if encoder is None else ("rows", encoder(chunk))
        except UserError as error:
            answer = ("wrong", str(error))
        try:
            connection.send(answer)
        except OSError:
            return
