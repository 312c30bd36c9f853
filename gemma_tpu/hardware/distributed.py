"""Several hosts as one run: how they find each other, agree, and notice that one of them has gone.

A host is a process. Every host runs the same program on its own devices; host 0 alone writes what is written once.
A host that is lost would leave the others waiting in a collective for ever, so each watches the others' heartbeats
and ends itself, with a message, when one stops.
"""

import atexit
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.hardware import devices
from gemma_tpu.schema import DistributedConfig

_BEAT = "gemma_tpu/beat/"
_INTERVAL = 1.0  # seconds between two heartbeats
_DONE, _FAILED = "done", "failed: "

_AGAIN = ("Run the same command again on all hosts (or on another number of them) to go on from the last good "
          "checkpoint")  # fmt: skip

_watch: "Watch | None" = None
_last_word: "LastWord | None" = None


def start(section: DistributedConfig) -> None:
    """Join the other hosts, if there are any; call it before the first array is made."""
    import jax

    address = section.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes, process = _number(section.processes, "JAX_NUM_PROCESSES"), _number(section.process, "JAX_PROCESS_ID")
    given = {"coordinator": address, "processes": processes, "process": process}
    missing = [f"distributed.{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"distributed: {', '.join(missing)} missing; give coordinator, processes and process together "
                        "(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none of them")  # fmt: skip
    if missing and not _on_tpu():
        return
    if process is not None and processes is not None and process >= processes:
        raise UserError(f"distributed.process ({process}) must be below distributed.processes ({processes})")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would swallow a SIGTERM that comes before the loop listens for one.
    jax.config.update("jax_enable_preemption_service", False)
    # The runtime's own heartbeat ends a host without a word that helps; ours is to be the first to speak. Only where
    # host 0 is gone the runtime is faster, and aborts the others at once: what to do then is `LastWord`'s to say.
    silence = int(2 * section.timeout + 30)
    try:
        jax.distributed.initialize(
            address, processes, process, initialization_timeout=int(section.timeout * 5),
            heartbeat_timeout_seconds=silence,
        )  # fmt: skip
    except ValueError:
        if not missing:
            raise
        return  # a TPU machine that is no part of a pod
    except Exception as error:
        raise RunError(f"the hosts did not find each other at {address or 'the pod’s coordinator'}: "
                       f"{str(error).splitlines()[0]}") from error  # fmt: skip
    if jax.process_count() > 1:
        global _watch, _last_word
        if jax.process_index() > 0:
            _last_word = LastWord()
        _watch = Watch(_client(), jax.process_index(), jax.process_count(), section.timeout)
        _watch.begin()


def _number(value: int | None, variable: str) -> int | None:
    if value is not None or variable not in os.environ:
        return value
    text = os.environ[variable]
    if not text.isdigit():
        raise UserError(f"{variable}={text}: must be a whole number")
    return int(text)


def _on_tpu() -> bool:
    """Only there is JAX asked to find the other hosts of a pod by itself: elsewhere it would wait for a server."""
    platforms = devices.setting("jax_platforms")
    if platforms and "tpu" not in platforms:
        return False
    return any(any(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))


def _client() -> Any:
    from jax._src import distributed  # the key-value store of the hosts has no public name

    return distributed.global_state.client


def count() -> int:
    import jax

    return int(jax.process_count())


def is_first() -> bool:
    """Is this the host that writes what is written once?"""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Until every host is here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def place(value: Any, sharding: Any) -> Any:
    """A host array onto its shards; every host has the whole value and puts down what its devices hold."""
    import jax

    if count() == 1:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


class Agreement:
    """The largest of what each host says. On one host the answer is there at once; on several it comes with the
    next step's, so that no host waits for another and all act on it at the same step."""

    def __init__(self) -> None:
        self._pending: Any = None  # of the step before, as a jax.Array, which no name may load here
        self._most: Callable[[Any], Any] | None = None

    def step(self, values: Sequence[int]) -> list[int]:
        """What was agreed in the step before, and this host's own word for the next."""
        if count() == 1:
            return list(values)
        before, self._pending = self._pending, self._ask(values)
        return [0] * len(values) if before is None else self._read(before)

    def now(self, values: Sequence[int]) -> list[int]:
        """The same, waited for."""
        return list(values) if count() == 1 else self._read(self._ask(values))

    def _ask(self, values: Sequence[int]) -> Any:
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(jax.devices()), ("device",))
        if self._most is None:
            whole = NamedSharding(mesh, PartitionSpec())
            self._most = jax.jit(lambda said: said.max(axis=0), out_shardings=whole)
        mine = np.asarray([values], np.int32)
        said = jax.make_array_from_callback(
            (mesh.size, len(values)), NamedSharding(mesh, PartitionSpec("device")), lambda _: mine
        )
        return self._most(said)

    @staticmethod
    def _read(found: Any) -> list[int]:
        import jax

        said: list[int] = jax.device_get(found).tolist()
        return said


class Watch:
    """Heartbeats in the hosts' key-value store: one thread says that this host lives and looks at the others."""

    def __init__(self, client: Any, process: int, processes: int, timeout: float,
                 end: Callable[[str], None] | None = None):  # fmt: skip
        self._client, self._process, self._timeout = client, process, timeout
        self._others = [number for number in range(processes) if number != process]
        self._seen: dict[int, tuple[str, float]] = {}
        self._end = end or _end
        self._last_word: str | None = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        number, unanswered = 0, time.monotonic()
        while self._last_word is None:
            number += 1
            try:
                with self._lock:
                    if self._last_word is None:
                        self._set(str(number))
                        beats = dict(self._client.key_value_dir_get(_BEAT))
                unanswered = time.monotonic()
            except Exception as error:  # the store lives in host 0
                if self._last_word is None and time.monotonic() - unanswered > min(5.0, self._timeout):
                    self._end(f"host 0 does not answer any more ({str(error).splitlines()[0][:200]})")
                    return
                time.sleep(_INTERVAL)
                continue
            lost = self.judge(beats, time.monotonic())
            if lost and self._last_word is None:
                self._end(lost)
                return
            time.sleep(_INTERVAL)

    def judge(self, beats: dict[str, str], now: float) -> str | None:
        """What is wrong with the other hosts, if anything is."""
        by_number = {int(key.rpartition("/")[2]): value for key, value in beats.items()}
        for number in self._others:
            beat = by_number.get(number, "")
            if beat.startswith(_FAILED):
                return f"host {number} stopped: {beat.removeprefix(_FAILED)}"
            if beat == _DONE:
                continue
            if number not in self._seen or self._seen[number][0] != beat:
                self._seen[number] = (beat, now)
            elif now - self._seen[number][1] > self._timeout:
                return f"host {number} has given no sign of life for {self._timeout:.0f} s"
        return None

    def say_last(self, word: str) -> None:
        with self._lock:
            self._last_word = word
            self._set(word)

    def _set(self, value: str) -> None:
        self._client.key_value_set(f"{_BEAT}{self._process}", value, allow_overwrite=True)


class LastWord:
    """A message that is said only if this process ends without having said its own. The runtime aborts a process
    whose host 0 has gone from a thread that no Python code hears of, so a second one waits for the end of a pipe."""

    WAIT = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"

    def __init__(self) -> None:
        told = f"error: this host was ended from outside, or host 0, which holds the run together, is gone. {_AGAIN}"
        self._other = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self.WAIT, told],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._lock = threading.Lock()
        atexit.register(self.withdraw)

    def withdraw(self) -> None:
        """This process ends by itself and says why, or has nothing to say."""
        with self._lock:  # the heartbeat's thread and the main one may both be leaving
            if self._other.returncode is None:
                self._other.communicate(b"it ends by itself")


def _end(why: str) -> None:
    """End this host at once: the main thread may be waiting in a collective that never comes back."""
    print(f"error: {why}; this host stops too. {_AGAIN}", file=sys.stderr, flush=True)
    _exit(1)


def _exit(code: int) -> None:
    """Without waiting for anybody, so without Python's own end."""
    if _last_word is not None:
        _last_word.withdraw()
    os._exit(code)


@contextmanager
def together() -> Iterator[None]:
    """The run itself. A host that ends it for a reason tells the others and leaves at once: a tidy exit would wait
    for them, and they for it."""
    try:
        yield
    except BaseException as error:
        if _watch is not None:
            _leave(_watch, error)
        raise
    if _watch is not None:
        _watch.say_last(_DONE)


# What the collectives and the store of several hosts say when the other end is gone.
_LOST = ("Gloo", "Connection closed by peer", "Connection reset", "UNAVAILABLE", "coordination", "DEADLINE_EXCEEDED",
         "heartbeat")  # fmt: skip


def _leave(watch: "Watch", error: BaseException) -> None:
    known = isinstance(error, UserError | RunError | KeyboardInterrupt)
    if not known and any(word in str(error) for word in _LOST):
        time.sleep(2 * _INTERVAL)  # the heartbeat may know more: a host that stopped for a reason has said it
        _end(f"another host is gone ({str(error).splitlines()[0][:200]})")
    if not known:
        traceback.print_exception(error)
    first, code = str(error).splitlines()[0:1] or [type(error).__name__], 2 if isinstance(error, UserError) else 1
    print(f"error: {error}", file=sys.stderr, flush=True)
    try:
        watch.say_last(_FAILED + first[0])
    finally:
        time.sleep(3 * _INTERVAL)  # host 0 holds the store that the others read the reason from
        _exit(code)
