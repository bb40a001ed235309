"""The HTTP protocol of `lorafleet replica`: httptools, and h11 where httptools answers wrongly."""

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Seconds for a client to send a request's headers.
HEADERS_S = 10.0

# HTTP/1.0 knows no chunks; after an offered upgrade, httptools expects no body.
_FOR_H11 = re.compile(rb"\A[^\r\n]* HTTP/1\.0\r\n|\r\nupgrade[ \t]*:", re.IGNORECASE)


class _Tolerant(H11Protocol):
    def _unsupported_upgrade_warning(self) -> None:
        pass  # a client may offer h2c with every request


class HttpProtocol(HttpToolsProtocol):
    """Looks at a connection's first bytes: clients offer an upgrade with their first request.
    Closes connections that are idle, or whose headers come too slowly.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._arguments = arguments
        self._seen = False
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # no other request is in the pipeline
            self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEADERS_S, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def data_received(self, data: bytes) -> None:
        seen, self._seen = self._seen, True
        head, whole, _ = data.partition(b"\r\n\r\n")
        if seen or not whole or not _FOR_H11.search(head + b"\r\n"):
            super().data_received(data)
            return
        self._stop_waiting()
        transport = self.transport
        assert isinstance(transport, asyncio.Transport)
        self.connections.discard(self)
        other = _Tolerant(**self._arguments)
        transport.set_protocol(other)
        other.connection_made(transport)
        other.data_received(data)
