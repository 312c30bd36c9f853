"""Results of a pool's jobs in their order, while a bounded number of the next ones are under way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Result = TypeVar("Result")


def in_order(pool: Executor, jobs: Iterable[Callable[[], Result]], ahead: int) -> Iterator[Result]:
    """At most `ahead` results wait in memory; those that nobody asks for any more are not begun."""
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
