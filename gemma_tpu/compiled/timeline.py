"""Time in a program that works, copies and communicates at once.

The core does one thing after another. Copies between HBM and VMEM wait in one queue for the bandwidth that the core
leaves; collectives share each link of the slice equally. Waiting for either is time in which nothing else is done.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SMALLEST = 1e-13  # seconds: what is left below it is rounding


@dataclass(eq=False)
class Transfer:
    """Something on the links: seconds that are left on each of them when it has the link for itself."""

    left: dict[Any, float]


@dataclass(eq=False)
class Pending:
    """Something started and not yet waited for."""

    name: str
    kind: str  # collective, host, copy
    alone: float  # seconds that it takes with nothing beside it
    bytes: float
    transfer: Transfer | None = None
    ticket: float = 0.0  # a copy: done when this much of the queue is served


@dataclass
class Timeline:
    now: float = 0.0
    queued: float = 0.0  # seconds of copies asked for, and done, at the full bandwidth
    served: float = 0.0
    moving: list[Transfer] = field(default_factory=list)
    pending: dict[str, deque[Pending]] = field(default_factory=dict)

    def run(self, seconds: float, memory: float) -> None:
        """The core works, `memory` of these seconds with the HBM; the copies have the rest."""
        self._flow(seconds, None)
        self._pass(seconds, max(0.0, seconds - memory))

    def copy(self, seconds: float) -> float:
        """Queue a copy; returns its ticket."""
        self.queued += seconds
        return self.queued

    def send(self, loads: Mapping[Any, float]) -> Transfer:
        made = Transfer({link: seconds for link, seconds in loads.items() if seconds > SMALLEST})
        if made.left:
            self.moving.append(made)
        return made

    def finish(self, transfer: Transfer) -> float:
        """Do nothing until it has arrived; returns how long that was."""
        waited = self._flow(math.inf, transfer)
        self._pass(waited, waited)
        return waited

    def finish_copy(self, ticket: float) -> float:
        waited = max(0.0, ticket - self.served)
        self.run(waited, 0.0)
        return waited

    def skip(self, seconds: float) -> None:
        """Time passes and all stays as it is: turns of a loop that are like the one before."""
        self.now += seconds

    def start(self, key: str, made: Pending) -> None:
        self.pending.setdefault(key, deque()).append(made)

    def take(self, key: str) -> Pending | None:
        """What was started first under this key."""
        queue = self.pending.get(key)
        return queue.popleft() if queue else None

    def _pass(self, seconds: float, free: float) -> None:
        self.now += seconds
        self.served = min(self.queued, self.served + free)

    def _flow(self, seconds: float, until: Transfer | None) -> float:
        """Move what is on the links for some seconds, or until one of them has arrived; returns the seconds."""
        passed = 0.0
        while self.moving and passed < seconds and (until is None or until.left):
            users = Counter(link for one in self.moving for link in one.left)
            step = min(left * users[link] for one in self.moving for link, left in one.left.items())
            step = min(step, seconds - passed)
            for one in self.moving:
                after = {link: left - step / users[link] for link, left in one.left.items()}
                one.left = {link: left for link, left in after.items() if left > SMALLEST}
            self.moving = [one for one in self.moving if one.left]
            passed += step
        return passed
