"""How long a client may take to say what it asks: the web server itself waits for ever for the end of a head."""

import asyncio
from typing import Any

from uvicorn.protocols.http import h11_impl

HEAD_SECONDS = 20.0  # from the connection, or the first byte of another request on it, to the end of the head
BODY_SECONDS = 60.0  # for the body
IDLE = h11_impl.h11.IDLE  # type: ignore[attr-defined]


class Patient(h11_impl.H11Protocol):
    """Hangs up on who does not come to the end of a head: such connections cost nothing, and thousands cost files."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._bell: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._hear()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self.conn.their_state is not IDLE:
            self._hear()
        elif self._bell is None:
            self._bell = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _hear(self) -> None:
        if self._bell is not None:
            self._bell.cancel()
            self._bell = None
