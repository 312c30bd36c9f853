"""Broken files by the thousand: mutants of good ones, files made to break readers, and what a reader may do with them.

A reader may accept a file, or stop with the package's own errors. Such an error names the file, is short, holds no name
of a Python exception, and can be written anywhere. It comes soon, and nothing swells on the way.
"""

import contextlib
import json
import random
import re
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_tpu.errors import RunError, UserError

SECONDS = 10.0  # that one file may take
ROOM = 4 << 30  # bytes that the process may grow by
LONG = 6000  # characters of a message
CLASS_NAME = re.compile(r"\b(?:[A-Z]\w*(?:Error|Exception|Warning)|KeyError|Traceback)\b")

# Values that readers do not expect, as JSON and YAML spell them.
NASTY = [
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    ".nan",
    "-.inf",
    "1e308",
    "5e-324",
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 40,
    "18446744073709551616",
    "0.1",
    "1e4",
    "1_000",
    "0x10",
    "1:30",
    "0o7",
    '""',
    '" "',
    '"\\u0000"',
    '"\\ud800"',
    '"\\u202e"',
    '"' + "x" * 5000 + '"',
    "[]",
    "{}",
    "[[]]",
    "[null]",
    '{"": null}',
    '"../x"',
    '"/etc/passwd"',
    '"~"',
    "2026-13-45",
    "2026-11-02",
    "!!python/object:os.system x",
    "&a",
    "*a",
    "<<: *a",
    "[" * 60 + "]" * 60,
    "[" * 400 + "]" * 400,
    "[" * 20000,
    '{"a":' * 2000,
    "- " * 2000,
    "'",
    '"',
    "#",
    "\t",
    "|",
    ">",
    "...",
    "---",
    "%YAML 9.9",
    "? a",
    ": :",
    "{a: b, a: c}",
    '"\\UFFFFFFFF"',
    "yes",
    "off",
    "~",
    "[1,",
    "1,1",
    "{{ 1/0 }}",
]
RAW = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b"\n",
    b"\x80",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\x1b[2J",
    b"\x85",
    b"\xe2\x80\xa8",
    b"PK\x03\x04",
    b"\x1f\x8b\x08\x00",
    b"\x80\x04\x95",
    b"\xff" * 8,
    b"\x00" * 64,
]
SCALAR = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\b[A-Za-z_][\w-]*\b')

# Whole files that blow up a naive reader.
BOMBS = [
    b"",
    b"\n",
    b" ",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\x00" * 100,
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'""',
    b"NaN",
    b"{" * 1100,
    b"[" * 1100,
    b"[" * 500 + b"]" * 500,
    b'{"a":' * 1100,
    b"- " * 1100,
    b"a: " * 1100,
    b"{a: " * 600,
    b"9" * 20_000,
    b'"' + b"x" * 20_000,
    b"\xed\xa0\x80",
    b'["\\ud800"]',
    b"\x1f\x8b\x08\x00garbage",
    b"PK\x03\x04" + b"\x00" * 60,
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    b"!!python/object/apply:os.system ['true']\n",
    b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(12)),
    b"a: &a\n  b: *a\n",
    b"- &x [*x]\n",
    b"a: 1\na: 2\n",
    b'{"a": 1, "a": 2}',
    b"\r\n".join([b'{"a": 1}'] * 3),
    b"2026-13-45\n",
]
# The same by the megabyte, where there is time for it.
LARGE = [
    b"{" * 900_000, b"[" * 900_000, b'{"a":' * 200_000, b"- " * 400_000, b'"' + b"x" * 1_000_000, b"9" * 1_000_000,
    b"a: " + b"b " * 400_000, b"x\n" * 400_000, b"[" + b"0," * 400_000 + b"0]", b"\x00" * 1_000_000,
    b"".join(b"k%d: 1\n" % n for n in range(60_000)), b"\n" * 1_000_000, b" " * 1_000_000, b"{}\n" * 300_000,
]  # fmt: skip


def mutants(seeds: Sequence[bytes], draw: random.Random) -> Iterator[bytes]:
    """The bombs, the seeds as they are, the large bombs, then for ever mutants of the seeds."""
    yield from BOMBS
    yield from seeds
    yield from LARGE
    while True:
        data = draw.choice(seeds)
        for _ in range(draw.choice([1, 1, 1, 2, 3, 6])):
            data = draw.choice(_WAYS)(data, seeds, draw)
        yield data


def _scalar(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    """Another value in the place of a word, a number or a text."""
    found = list(SCALAR.finditer(data))
    if not found:
        return data
    at = draw.choice(found)
    nasty = draw.choice([*NASTY, *(draw.choice(found).group().decode("utf-8", "replace") for _ in range(4))])
    return data[: at.start()] + nasty.encode("utf-8", "surrogatepass") + data[at.end() :]


def _tree(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    """A JSON value (of one line, where there are several) with a node that is gone, moved or of another kind."""
    lines = data.split(b"\n") if b"\n{" in data else [data]
    number = draw.randrange(len(lines))
    try:
        tree = json.loads(lines[number])
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []
    level = [tree]
    while level:
        here = level.pop()
        keys = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
        places += [(here, key) for key in keys]
        level += [here[key] for key in keys]
    if not places:
        return data
    here, key = draw.choice(places)
    other, name = draw.choice(places)
    values = [
        None,
        True,
        0,
        -1,
        1.5,
        10**30,
        1e308,
        "",
        "x",
        "\x00",
        "\ud800",
        [],
        {},
        [None],
        {"x": None},
        [here[key]],
        {"x": here[key]},
        str(here[key]),
        other[name],
    ]
    value, way = draw.choice(values), draw.randrange(6)
    if way == 0:
        del here[key]
    elif way == 1 and isinstance(here, dict):
        here[draw.choice(["", "__proto__", "x" * 300, "\n", "../..", key + " "])] = value
    elif way == 2 and isinstance(here, list):
        here[:] = here * 3 if len(here) < 1000 else here[:1]
    else:
        here[key] = value
    with contextlib.suppress(ValueError, RecursionError):  # it now holds itself
        lines[number] = json.dumps(tree).encode()
    return b"\n".join(lines)


def _bytes(data: bytes, seeds: Sequence[bytes], draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    end = min(len(data), at + draw.choice([1, 1, 2, 8, 64, 1000]))
    way = draw.randrange(7)
    if way == 0:
        return data[:at] + data[end:]
    if way == 1:
        return data[:at] + draw.choice(RAW) + data[at:]
    if way == 2:
        return data[:at]
    if way == 3:
        return data[:at] + data[at:end] * draw.choice([2, 3, 50]) + data[end:]
    if way == 4:
        other = draw.choice(seeds)
        return data[:at] + other[draw.randrange(len(other) + 1) :]
    if way == 5:
        return data.replace(b"\n", b"\r\n") if b"\r" not in data else data.replace(b"\r", b"")
    return data[:at] + bytes(draw.randrange(256) for _ in range(end - at)) + data[end:]


def _line(data: bytes, seeds: Sequence[bytes], draw: random.Random) -> bytes:
    """Lines swapped, twice, gone, deeper."""
    lines = data.split(b"\n")
    at, other = draw.randrange(len(lines)), draw.choice(draw.choice(seeds).split(b"\n"))
    way = draw.randrange(4)
    if way == 0:
        lines.insert(at, other)
    elif way == 1:
        del lines[at]
    elif way == 2:
        lines[at] = b"  " + lines[at]
    else:
        lines[at] = lines[at] + draw.choice(NASTY).encode()
    return b"\n".join(lines)


def _number(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    """A little-endian number in a binary file."""
    if len(data) < 8:
        return data
    at = draw.choice([0, draw.randrange(len(data) - 7)])
    value = draw.choice([0, 1, 2, 7, 8, 255, 1 << 16, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, len(data)])
    return data[:at] + struct.pack("<Q", value) + data[at + 8 :]


_WAYS = [_scalar, _scalar, _scalar, _tree, _tree, _tree, _bytes, _bytes, _line, _number]


# --- what a reader may do ---


class Slow(BaseException):
    """Not an Exception: a reader that catches everything must not catch this."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends what takes too long, and makes what takes too much memory fail here instead of on the machine."""

    def ring(*_: Any) -> None:
        raise Slow(f"took more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def hold(read: Callable[[], Any], names: Sequence[str], data: bytes) -> str | None:
    """The message of an error of the package, None where the file was accepted; anything else is a finding."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
        return None
    except (UserError, RunError) as error:
        said = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError(f"{type(error).__name__} on {_told(data)}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    problem = wrong_with(said, names)
    assert not problem, f"{problem}: {said[:2000]!r}\non {_told(data)}"
    return said


def wrong_with(said: str, names: Sequence[str]) -> str | None:
    if len(said) > LONG:
        return f"a message of {len(said):,} characters"
    if names and not any(name in said for name in names):
        return "a message that does not name the file"
    if found := CLASS_NAME.search(said):
        return f"a message with {found.group()}"
    if re.search(r"<(?:class|function|module|built-in|\w+ object)|\bat 0x[0-9a-f]{6}", said):
        return "a message with Python's own words"
    return None


def _told(data: bytes) -> str:
    return repr(data) if len(data) <= 3000 else f"{data[:3000]!r}… ({len(data):,} bytes)"


def fuzz(read: Callable[[bytes], Any], names: Sequence[str], seeds: Sequence[bytes], seconds: float, seed: int) -> int:
    """Feeds `read` until the time is over, each bomb and each seed at least; how many files that were."""
    draw, count, least = random.Random(seed), 0, len(BOMBS) + len(seeds)
    accepted = 0
    end = time.monotonic() + seconds
    with watched():
        for data in mutants(seeds, draw):
            if count == least:
                assert accepted, "a reader that takes none of the good files: nothing is tested"
            if count >= least and time.monotonic() > end:
                return count
            said = hold(lambda data=data: read(data), names, data)
            accepted += data in seeds and said is None
            count += 1
    return count
