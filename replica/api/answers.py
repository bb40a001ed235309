"""Gives a call's answer, whole or streamed, and runs it again where that is safe."""

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import EngineFailed, FleetError
from replica.api import asgi
from replica.api.attempts import Attempts
from replica.api.completion import Call, run
from replica.api.interfaces import Engine
from replica.api.metrics import Metrics, Watch
from replica.api.response_encoder import Answer, ResponseEncoder, Usage, likeliest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sent:
    """About one HTTP request. received_s: when its body had arrived, monotonic."""

    stream: bool
    body_bytes: int
    received_s: float


class Answers:
    def __init__(self, engine: Engine, attempts: Attempts, metrics: Metrics) -> None:
        self._engine, self._attempts, self._metrics = engine, attempts, metrics

    async def give(
        self,
        call: Call,
        encoder: ResponseEncoder,
        sent: Sent,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Watches for the disconnect of who asked. Raises FleetError before the first byte.

        Leaves in the scope what the last attempt did: `ran`, for the log of requests.
        """
        watches: list[Watch] = []

        def attempt() -> Awaitable[None]:
            watch = self._metrics.watch(call, sent.received_s)
            watches.append(watch)
            if sent.stream:
                work = self._stream(call, encoder, watch, send)
            else:
                work = self._whole(call, encoder, watch, scope, receive, send)
            return asgi.until_disconnect(receive, watch.until_end(work))

        try:
            await self._attempts.run(call, sent.body_bytes, attempt)
        finally:
            if watches:
                scope["ran"] = watches[-1].ran()

    async def _whole(
        self,
        call: Call,
        encoder: ResponseEncoder,
        watch: Watch,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        usage = Usage(call.prompt_tokens)
        answers = [Answer() for _ in range(call.choices)]
        async with aclosing(run(self._engine, call)) as pieces:
            async for piece in pieces:
                usage.add(piece)
                watch.piece(piece)
                answers[piece.index].add(piece)
        if call.kept is not None:
            answers = likeliest(answers, call.n, call.kept)
        if any(answer.prompt is not None for answer in answers):  # of whole prompts
            body = await asyncio.to_thread(encoder.body, answers, usage)
        else:
            body = encoder.body(answers, usage)
        response = Response(body, media_type="application/json")
        await self._attempts.answered(call)
        await response(scope, receive, send)

    async def _stream(
        self,
        call: Call,
        encoder: ResponseEncoder,
        watch: Watch,
        send: Send,
    ) -> None:
        """An error before the first piece is a plain answer with its own status."""
        usage = Usage(call.prompt_tokens)
        started = False
        try:
            async with aclosing(run(self._engine, call)) as pieces:
                async for piece in pieces:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": list(asgi.EVENT_STREAM),
                            }
                        )
                    usage.add(piece)
                    watch.piece(piece)
                    if piece.prompt is None:
                        chunk = encoder.chunk(piece, usage)
                    else:  # of a whole prompt
                        chunk = await asyncio.to_thread(encoder.chunk, piece, usage)
                    if chunk:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await self._attempts.answered(call)
            end = encoder.end(usage)
        except FleetError as error:
            if not started:
                raise
            if isinstance(error, EngineFailed):
                await self._attempts.died(call, error)
            end = b"data: " + asgi.error_body(error) + b"\n\n"
        except Exception:  # Our bug: the stream still says that it broke off.
            if not started:
                raise
            log.exception("%s failed in mid-stream", call.id)
            end = b"data: " + asgi.error_body(FleetError("internal error")) + b"\n\n"
        await send({"type": "http.response.body", "body": end})
