"""Keeps numpy's BLAS on the calling thread, for code that brings its own threads.

A product of inner size 64 is too thin to share: OpenBLAS, left to itself, spends three times the CPU time on
waiting for its threads, and every worker brings a set of them. numpy has no call for this, OpenBLAS has.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np  # noqa: F401  (loads the library that is looked for below)

_SPELLINGS = ("scipy_openblas_{}64_", "openblas_{}64_", "openblas_{}")  # numpy's wheels, then distributions


@contextlib.contextmanager
def single_threaded() -> Iterator[int]:
    """Limits every OpenBLAS of this process to one thread for the block; gives the number it has limited.

    0 (another BLAS, or a system without /proc) means that nothing was changed: results are the same, slower.
    """
    limited = []
    try:
        for library in _loaded():
            for spelling in _SPELLINGS:
                with contextlib.suppress(AttributeError):  # not this spelling
                    get = getattr(library, spelling.format("get_num_threads"))
                    put = getattr(library, spelling.format("set_num_threads"))
                    limited.append((put, get()))
                    put(1)
                    break
        yield len(limited)
    finally:
        for put, threads in limited:
            put(threads)


def _loaded() -> list[ctypes.CDLL]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "openblas" in line}
    return [ctypes.CDLL(path) for path in sorted(paths)]
