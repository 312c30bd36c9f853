"""HTTP/1.1 on asyncio streams, as far as measuring needs it: a request out, a body in as it comes, each piece stamped.

Connections are kept and used again. No proxy, no redirect, no compression: whatever stands between a request and the
clock would be measured with it.
"""

import asyncio
import contextlib
import json
import resource
import ssl
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

KEPT = 4.0  # seconds that an idle connection is trusted: uvicorn closes them after 5
HEAD = 1 << 20  # bytes of a line or a head at most


class Broken(Exception):
    """A request that failed on the way."""

    def __init__(self, kind: str, said: str):
        super().__init__(said)
        self.kind, self.said = kind, said


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    pieces: AsyncIterator[tuple[float, bytes]]  # each with the clock when it came

    async def read(self) -> bytes:
        return b"".join([piece async for _, piece in self.pieces])


@dataclass
class _Line:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0
    used: bool = False

    @property
    def fresh(self) -> bool:
        return not self.reader.at_eof() and time.perf_counter() - self.idle_since < KEPT


class Wire:
    """All connections to one server. `silence`: seconds without a byte after which a request counts as stalled."""

    def __init__(self, url: str, key: str | None = None, silence: float = 600.0):
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path, self._silence = parts.path.rstrip("/"), silence
        self._idle: list[_Line] = []
        self.reconnected = 0
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept: */*\r\n"
        self._headers += f"Authorization: Bearer {key}\r\n" if key else ""

    @contextlib.asynccontextmanager
    async def post(self, path: str, body: Any) -> AsyncIterator[Answer]:
        data = json.dumps(body).encode()
        head = (f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n")  # fmt: skip
        line, done = None, False
        try:
            line, status, headers = await self._open(head.encode() + data)
            pieces = self._pieces(line, headers)
            yield Answer(status, headers, pieces)
            done = True
        finally:
            if line is not None:
                keep = done and headers.get("connection", "").lower() != "close"
                self._release(line, keep and await _ended(pieces))

    async def close(self) -> None:
        for line in self._idle:
            line.writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await line.writer.wait_closed()
        self._idle.clear()

    async def _open(self, data: bytes) -> tuple[_Line, int, dict[str, str]]:
        """Sends it. A kept connection that turns out to be closed is replaced once: nothing was answered on it."""
        while True:
            line = await self._take()
            try:
                line.writer.write(data)
                await line.writer.drain()
                return line, *await self._head(line)
            except (ConnectionError, Broken) as error:
                line.writer.close()
                closed = isinstance(error, ConnectionError) or error.kind == "closed"
                if line.used and closed:
                    self.reconnected += 1
                    continue
                raise error if isinstance(error, Broken) else Broken("closed", _told(error)) from None
            except BaseException:
                line.writer.close()
                raise

    async def _take(self) -> _Line:
        while self._idle:
            line = self._idle.pop()
            if line.fresh:
                line.used = True
                return line
            line.writer.close()
        try:
            async with asyncio.timeout(self._silence):
                return _Line(*await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=HEAD))
        except TimeoutError:
            raise Broken("no_connection", f"no connection within {self._silence:g} s") from None
        except OSError as error:
            raise Broken("no_connection", _told(error)) from None

    def _release(self, line: _Line, keep: bool) -> None:
        if keep and not line.reader.at_eof():
            line.idle_since = time.perf_counter()
            self._idle.append(line)
        else:
            line.writer.close()

    async def _head(self, line: _Line) -> tuple[int, dict[str, str]]:
        raw = await self._within(line.reader.readuntil(b"\r\n\r\n"))
        first, *rest = raw.decode("latin-1").split("\r\n")
        try:
            status = int(first.split(" ", 2)[1])
        except (IndexError, ValueError):
            raise Broken("not_http", f"no HTTP answer: {first[:80]!r}") from None
        pairs = (one.partition(":") for one in rest if one)
        return status, {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def _pieces(self, line: _Line, headers: dict[str, str]) -> AsyncIterator[tuple[float, bytes]]:
        reader = line.reader
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := await self._chunk_size(reader):
                piece = await self._within(reader.readexactly(size + 2))
                yield time.perf_counter(), piece[:-2]
            while (await self._within(reader.readline())).strip():
                pass  # trailers
        elif "content-length" in headers:
            left = _length(headers["content-length"])
            while left:
                piece = await self._within(reader.read(min(left, HEAD)))
                if not piece:
                    raise Broken("closed", f"the connection was closed {left} bytes before the end")
                left -= len(piece)
                yield time.perf_counter(), piece
        else:
            while piece := await self._within(reader.read(HEAD)):
                yield time.perf_counter(), piece

    async def _chunk_size(self, reader: asyncio.StreamReader) -> int:
        raw = await self._within(reader.readline())
        try:
            return int(raw.partition(b";")[0], 16)
        except ValueError:
            if not raw:
                raise Broken("closed", "the connection was closed before the end") from None
            raise Broken("not_http", f"no size of a chunk: {raw[:40]!r}") from None

    async def _within(self, reading: Awaitable[bytes]) -> bytes:
        try:
            async with asyncio.timeout(self._silence):
                return await reading
        except TimeoutError:
            raise Broken("stalled", f"no byte for {self._silence:g} s") from None
        except asyncio.IncompleteReadError:
            raise Broken("closed", "the connection was closed before the end") from None
        except (asyncio.LimitOverrunError, ValueError):  # readuntil and readline say it each in its own way
            raise Broken("not_http", f"a line or a head of more than {HEAD} bytes") from None
        except OSError as error:
            raise Broken("closed", _told(error)) from None


def lift_limit() -> None:
    """As many open connections as the system lets this process have: an open loop has no bound of its own."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _ended(pieces: AsyncIterator[tuple[float, bytes]]) -> bool:
    """Has the body been read to its end, so that the connection can be used again?"""
    try:
        async with asyncio.timeout(1.0):
            async for _ in pieces:
                return False
    except (Broken, TimeoutError):
        return False
    return True


def _length(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Broken("not_http", f"Content-Length {text[:40]!r}") from None


def _told(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
