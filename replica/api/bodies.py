"""Reads a request's body into the type that parses it: bounded, inflated, no field passed over."""

import asyncio
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TypeVar
from urllib.parse import quote

from pydantic import BaseModel
from starlette.requests import Request

from cluster.errors import BadRequest
from replica.api import asgi
from replica.api.openai_protocol import parsed

Kind = TypeVar("Kind", bound=BaseModel)

IGNORED_HEADER = "x-lorafleet-ignored-fields"
_IGNORED_SHOWN_MAX = 16
_FIELD_SHOWN_MAX = 64
_GZIP = 16 + zlib.MAX_WBITS
# Whatever its values are, a body with so many is parsed in about a second at most. Nothing else is
# answered meanwhile.
COMMAS_MAX = 2**20


class Bodies:
    """limit: most bytes of a body, also once it is inflated. strict: unknown fields are refused;
    else an answer names them. until_cut: around the wait for the client.
    """

    def __init__(
        self, limit: int, strict: bool, until_cut: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        self._limit, self._strict, self._until_cut = limit, strict, until_cut

    async def read(self, kind: type[Kind], http: Request) -> tuple[Kind, int]:
        """The request, and the size of its body. Raises FleetError."""
        async with self._until_cut():
            body = await asgi.read_body(http, self._limit)
        encoding = http.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("gzip", "x-gzip"):
            body = await asyncio.to_thread(_inflated, body, self._limit)
        elif encoding != "identity":
            raise asgi.UnsupportedMediaType(
                f"content-encoding: must be gzip (got {encoding})", field="content-encoding"
            )
        commas = body.count(b",")
        if commas > COMMAS_MAX:
            raise BadRequest(
                f"the body has {commas} commas, the maximum is {COMMAS_MAX}: send it in parts"
            )
        request, unknown = parsed(kind, body)
        if unknown and self._strict:
            raise BadRequest(
                f"{unknown[0]}: unknown field; all unknown ones: {', '.join(unknown)}",
                field=unknown[0],
            )
        http.scope["ignored"] = unknown
        return request, len(body)


def _inflated(body: bytes, limit: int) -> bytes:
    """Raises BadRequest, and BodyTooLarge before it takes more memory than the limit."""
    inflater = zlib.decompressobj(_GZIP)
    try:
        content = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest("the body is not gzip", field="content-encoding") from error
    if len(content) > limit:
        raise asgi.BodyTooLarge(f"the request body is larger than {limit} bytes when inflated")
    if not inflater.eof or inflater.unused_data:
        raise BadRequest("the body is not one whole gzip member", field="content-encoding")
    return content


def ignored_header(scope: Mapping[str, object]) -> list[tuple[bytes, bytes]]:
    """Names the fields that nothing read, as a header can hold them."""
    unknown = scope.get("ignored")
    if not isinstance(unknown, list) or not unknown:
        return []
    shown = [quote(name[:_FIELD_SHOWN_MAX]) for name in unknown[:_IGNORED_SHOWN_MAX]]
    if len(unknown) > len(shown):
        shown.append(f"and {len(unknown) - len(shown)} more")
    return [(IGNORED_HEADER.encode(), ", ".join(shown).encode())]
