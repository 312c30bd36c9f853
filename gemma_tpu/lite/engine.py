"""The scheduler of the small server: one thread that owns the device, and a queue in front of it."""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence

import jax

from gemma_tpu.lite.batch import Ask, Batch, Failed
from gemma_tpu.lite.metrics import Metrics
from gemma_tpu.lite.programs import Device

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Busy(Exception):
    """The queue is full."""


class NotReady(Exception):
    """It compiles, drains, has stopped or failed."""


class Engine:
    """`state` goes from compiling to ready to draining to stopped; or to failed."""

    def __init__(self, device: Device, metrics: Metrics, *, max_wait: float, queue: int):
        self.device, self.metrics = device, metrics
        self.state, self.progress = "compiling", ""
        self._batch, self._max_wait, self._queue = Batch(device), max_wait, queue
        self._waiting: deque[Ask] = deque()
        self._taken: list[Ask] = []  # by the turn that goes on
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        metrics.slots.set(device.slots)

    def start(self) -> None:
        self._thread.start()

    def submit(self, asks: Sequence[Ask]) -> None:
        """All of them or none."""
        with self._changed:
            if self.state != "ready":
                raise NotReady(self.state)
            if len(self._waiting) + len(asks) > self._queue:
                raise Busy(f"{len(self._waiting)} prompts wait already, of at most {self._queue}; ask again later")
            self._waiting.extend(asks)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()

    def cancel(self, asks: Sequence[Ask]) -> None:
        with self._changed:
            for ask in asks:
                ask.cancel()
            self._changed.notify_all()

    def when_compiled(self) -> bool:
        """Waits for it; False where it was in vain."""
        with self._changed:
            self._changed.wait_for(lambda: self.state != "compiling")
            return self.state == "ready"

    def drain(self) -> None:
        """No new requests; what was accepted is finished."""
        with self._changed:
            if self.state == "ready":
                self.state = "draining"
            self._changed.notify_all()

    def stop(self, timeout: float | None = None) -> bool:
        """Drains, and waits; whether the thread has ended. While it compiles it cannot be stopped."""
        compiling = self.state == "compiling"
        self.drain()
        if self._thread.is_alive() and not compiling:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- on the thread ---

    def _run(self) -> None:
        try:
            self._compile()
            while self._wait():
                self._turn()
            self.state = "stopped"
        except Exception as error:  # whatever it is: nobody may wait for a thread that is gone
            self._fail(error)

    def _compile(self) -> None:
        def told(ready: int, of: int) -> None:
            self.progress = f"{ready} of {of} programs"

        self.device.compile(told)
        self.metrics.programs.set(self.device.compiled())
        jax.monitoring.register_event_duration_secs_listener(self._note)
        with self._changed:
            self.state = "ready"
            self._changed.notify_all()

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Whatever this thread has compiled after that."""
        if event == _COMPILED and threading.current_thread() is self._thread:
            self.metrics.recompiles.inc()

    def _wait(self) -> bool:
        """Until there is something to do; False when all is done and nothing more may come."""
        with self._changed:
            self._sweep()
            while not self._waiting and not self._batch.busy:
                if self.state != "ready":
                    return False
                self._changed.wait()
                self._sweep()
            while not self._batch.busy and (left := self._left()) > 0:
                self._changed.wait(left)
                self._sweep()
            return True

    def _left(self) -> float:
        """Seconds for which the first of those that wait may wait for company; 0 where no more would fit."""
        if not self._waiting or self._batch.chosen(self._waiting)[1] or self.state != "ready":
            return 0.0
        return self._waiting[0].arrived + self._max_wait - time.monotonic()

    def _sweep(self) -> None:
        """What nobody wants any more."""
        self._waiting = deque(ask for ask in self._waiting if not ask.over)
        self._batch.sweep()
        self.metrics.waiting.set(len(self._waiting))

    def _turn(self) -> None:
        with self._changed:
            count = self._batch.chosen(self._waiting)[0] if self._left() <= 0 else 0
            asks = self._taken = [self._waiting.popleft() for _ in range(count)]
            more = bool(self._waiting)
            self.metrics.waiting.set(len(self._waiting))
        if asks:
            now = time.monotonic()
            for ask in asks:
                ask.began = now
            self.metrics.sheet(*self._batch.prefill(asks))
        if self._batch.busy:
            steps, tokens = self._batch.turn(impatient=more)
            self.metrics.slot_steps.inc(steps * self.device.slots)
            self.metrics.generation_tokens.inc(tokens)
        self.metrics.running.set(len(self._batch.running))

    def _fail(self, error: Exception) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        text = f"{type(error).__name__}: {reason} ({last.filename.rpartition('/')[2]}:{last.lineno})"
        print(f"error: the device's thread has ended: {text}", file=sys.stderr, flush=True)
        with self._changed:
            self.state, self.progress = "failed", text
            self._changed.notify_all()
            asks = {*self._taken, *self._waiting, *self._batch.asks()}
        for ask in asks:
            ask.tell(Failed("the server's device has failed; restart it"))
