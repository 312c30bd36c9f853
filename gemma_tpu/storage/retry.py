"""Asking again after an interruption: a bounded number of times, with growing pauses, each of them said."""

import random
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from gemma_tpu.errors import RunError, UserError

T = TypeVar("T")

ATTEMPTS = 6
_LONGEST_WAIT = 30.0
# Asking again cannot help: the file is not there, access is refused, or the request itself is wrong.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError,
              ImportError, LookupError, TypeError, ValueError, AttributeError, UserError)


def persist(action: Callable[[], T], what: str, attempts: int, on_retry: Callable[[], None]) -> T:
    """Does it, again after a growing pause where another try may help; the last failure is a RunError."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except RunError:
            raise
        except Exception as error:  # every store's client has exceptions of its own
            if not may_pass(error):
                raise
            reason = explain(error)
            if attempt == attempts:
                raise RunError(f"{what} failed {attempt} times, last with {reason}") from None
            wait = min(_LONGEST_WAIT, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            print(f"{what} was interrupted ({reason}): trying again in {wait:.1f} s, "
                  f"attempt {attempt + 1} of {attempts}", file=sys.stderr, flush=True)
            on_retry()
            time.sleep(wait)
    raise AssertionError("unreachable")


def may_pass(error: Exception) -> bool:
    status = status_of(error)
    if status is not None and 400 <= status < 500:
        return status in (408, 425, 429)
    return not isinstance(error, _PERMANENT)


def status_of(error: Exception) -> int | None:
    """The HTTP status that the clients of hub, gs and s3 each keep in a place of their own."""
    for holder in (getattr(error, "response", None), error):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int | str) and str(value).isdigit():
                return int(value)
    return None


def explain(error: Exception) -> str:
    """One line, with the kind of the error: what a client says of a network is little without it."""
    text = told(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def told(error: BaseException) -> str:
    """One line of what an error says; the query of a URL may be a signature that gives access, so it is not shown."""
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(str(error).split()))
    return re.sub(r"\b\w+(?:Error|Exception): ", "", text)[:300]
