"""HTTP as no client library would send it."""

import asyncio
import re

ANSWER_S = 60.0


async def exchange(port: int, request: bytes, timeout_s: float = ANSWER_S) -> bytes:
    """The bytes of the first answer on a connection of its own; fewer if the server closes it.

    Raises TimeoutError if neither comes.
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?im)^content-length: *(\d+)\r$", head)
            return head + (await reader.readexactly(int(length[1])) if length else b"")
        except asyncio.IncompleteReadError as error:
            return error.partial
        finally:
            writer.transport.abort()
