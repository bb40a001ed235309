"""A network for tests: it can be cut, and it can be slow."""

import asyncio
import contextlib
import ssl


class Wire:
    """Forwards a port of its own to `port`, until it is cut.

    delay_s: of all that it forwards. tls: what its own port speaks.
    """

    def __init__(self, port: int, delay_s: float = 0.0, tls: ssl.SSLContext | None = None) -> None:
        self._port, self._delay_s, self._tls = port, delay_s, tls
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def join(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, ssl=self._tls
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # accepted just before the cut
            writer.transport.abort()
            return
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError):
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._port)
            self._writers.add(back_writer)
            if self._server is None:
                back_writer.transport.abort()
            await asyncio.gather(
                _pump(reader, back_writer, self._delay_s), _pump(back_reader, writer, 0.0)
            )
            self._writers.discard(back_writer)
        writer.transport.abort()
        self._writers.discard(writer)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            if delay_s:
                await asyncio.sleep(delay_s)  # a network's, not a test that waits
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
