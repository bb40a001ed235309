"""Reads an adapter's fields and files from a form, the files onto disk as they come."""

import asyncio
from collections.abc import Container
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from cluster.errors import BadRequest
from cluster.uploads import Upload
from replica.api import asgi
from replica.api.openai_protocol import shown

# A client has this long for this much, again and again; the store bounds the whole.
PROGRESS_S = 60.0
PROGRESS_BYTES = 2**20

FILES = "files"
_FIELD_BYTES_MAX = 4096
_PARTS_MAX = 16
_PIECE_BYTES = 2**16
# What the parser may hold: a piece, the headers of a part.
_BUFFER_BYTES_MAX = 4 * _PIECE_BYTES


async def read_form(http: Request, upload: Upload, known: Container[str]) -> dict[str, Any]:
    """The fields, and under `files` the names of those that were written. known: the fields' names.

    Raises BadRequest, UnsupportedMediaType, BodyTooSlow or StoreFull.
    """
    if http.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise asgi.UnsupportedMediaType(
            "content-encoding: files are sent as they are", field="content-encoding"
        )
    form = await asyncio.to_thread(_Form, http.headers["content-type"], upload, known)
    now_s = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(PROGRESS_S) as patience, aclosing(http.stream()) as stream:
            left = PROGRESS_BYTES
            async for part in stream:
                for start in range(0, len(part), _PIECE_BYTES):
                    await asyncio.to_thread(form.feed, part[start : start + _PIECE_BYTES])
                left -= len(part)
                if left <= 0:
                    left = PROGRESS_BYTES
                    patience.reschedule(now_s() + PROGRESS_S)
    except TimeoutError as error:
        if not patience.expired():
            raise
        raise asgi.BodyTooSlow(
            f"{PROGRESS_BYTES} bytes of the body took more than {PROGRESS_S:.0f} s"
        ) from error
    await asyncio.to_thread(form.feed, None)
    return form.fields


class _Form:
    """Blocking."""

    def __init__(self, content_type: str, upload: Upload, known: Container[str]) -> None:
        from werkzeug.http import parse_options_header  # most fleets get no files
        from werkzeug.sansio import multipart

        _, options = parse_options_header(content_type)
        boundary = options.get("boundary", "")
        if not boundary.isascii() or not 1 <= len(boundary) <= 70:
            raise BadRequest("content-type: has no boundary", field="content-type")
        self._decoder = multipart.MultipartDecoder(
            boundary.encode(), _BUFFER_BYTES_MAX, max_parts=_PARTS_MAX
        )
        self._multipart = multipart
        self._upload, self._known = upload, known
        self._value: bytes | None = None  # None: it is in a file
        self._name = ""
        self.fields: dict[str, Any] = {}

    def feed(self, data: bytes | None) -> None:
        """None: the end. Raises BadRequest or StoreFull."""
        from werkzeug.exceptions import RequestEntityTooLarge

        ends = (self._multipart.NeedData, self._multipart.Epilogue)
        try:
            self._decoder.receive_data(data)
            while not isinstance(event := self._decoder.next_event(), ends):
                self._take(event)
        except (ValueError, RequestEntityTooLarge) as error:
            raise BadRequest(f"the body is not well-formed multipart/form-data: {error}") from error

    def _take(self, event: Any) -> None:
        match event:
            case self._multipart.File(name=name, filename=filename):
                if name != FILES:
                    raise BadRequest(f"{FILES}: a file came as {shown(name)}", field=FILES)
                self._upload.open(filename)
                self._value = None
                self.fields.setdefault(FILES, []).append(filename)
            case self._multipart.Field(name=name):
                if name in (None, FILES):
                    raise BadRequest(f"{FILES}: has no filename", field=FILES)
                if name not in self._known or name in self.fields:
                    reason = "comes twice" if name in self.fields else "unknown field"
                    raise BadRequest(f"{name[:100]}: {reason}", field=name[:100])
                self._name, self._value = name, b""
            case self._multipart.Data(data=data) if self._value is None:
                self._upload.write(data)
            case self._multipart.Data(data=data, more_data=more):
                self._value = (self._value or b"") + data
                if len(self._value) > _FIELD_BYTES_MAX:
                    raise BadRequest(f"{self._name}: larger than {_FIELD_BYTES_MAX} bytes")
                if not more:
                    self.fields[self._name] = self._value.decode()
