"""OpenAI's HTTP API over one engine and its adapters."""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import (
    BadRequest,
    EngineFailed,
    FleetError,
    ModelNotFound,
    ShuttingDown,
    Unauthorized,
)
from cluster.values import Version
from replica.api import asgi, metrics
from replica.api.call import CallReader
from replica.api.completion import Call, run
from replica.api.interfaces import Acknowledgement, Adapters, Engine
from replica.api.openai_protocol import (
    ChatRequest,
    CompletionRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    parse,
    shown,
)
from replica.api.response_encoder import (
    DONE,
    Answer,
    ChatEncoder,
    CompletionEncoder,
    ResponseEncoder,
    ResponseOptions,
    Usage,
)
from replica.api.text import Text

log = logging.getLogger(__name__)

_CUT = "this replica shut down before the answer was complete"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """base: the base model's name on the API. root: where its files are.

    context: longest prompt + answer, in tokens. vocab: token ids from the client lie below it.
    api_keys: when there are any, everything under /v1 needs one.
    """

    base: str
    context: int
    vocab: int
    root: str = ""
    replica_id: str = "local"
    api_keys: tuple[str, ...] = ()
    body_bytes_max: int = 32 * 2**20


class Server:
    """The ASGI application. `close()`, `drained()` and `cut()` end it in good order."""

    def __init__(
        self, engine: Engine, adapters: Adapters, text: Text, config: ServerConfig
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._text = text
        self._config = config
        kv_tokens = engine.report().capacity_pages * engine.config.page_tokens
        self._reader = CallReader(
            adapters, text, config.base, config.context, kv_tokens, config.vocab
        )
        self._created = int(time.time())
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._waits: set[asyncio.Timeout] = set()
        self.active = 0
        self._v1 = Router(
            [
                Route("/chat/completions", self._chat, methods=["POST"]),
                Route("/completions", self._complete, methods=["POST"]),
                Route("/models", self._models),
                Route("/models/{name:path}", self._model),
                Route("/adapters", self._describe),
                Route("/requests/{response_id}", self._timeline),
                Route("/load_lora_adapter", self._load_adapter, methods=["POST"]),
                Route("/unload_lora_adapter", self._unload_adapter, methods=["POST"]),
            ],
            redirect_slashes=False,
        )
        self._router = Router(
            [
                Mount("/v1", self._authorized),
                Route("/health", self._health),
                Route("/ping", self._health, methods=["GET", "POST"]),
                Route("/metrics", self._metrics),
            ],
            redirect_slashes=False,
        )

    def close(self) -> None:
        """From now on new requests are answered 503; running ones go on."""
        self._closing = True

    async def drained(self) -> None:
        """Returns when no request is running. May be awaited in the app's own event loop only."""
        await self._idle.wait()

    def cut(self) -> None:
        """From now on running requests are answered 503 too; streams end with an error event.

        May be called in the app's own event loop only.
        """
        self._closing = True
        self._engine.cut(_CUT)
        now_s = asyncio.get_running_loop().time()
        for wait in self._waits:
            wait.reschedule(now_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # its lifespan; websockets are refused
            await self._router(scope, receive, send)
            return
        scope["app"] = self  # The router raises its own errors then, for us to answer.
        send = self._with_headers(scope, send)
        try:
            await self._router(scope, receive, send)
            return
        except ClientDisconnect:
            return
        except FleetError as failed:
            error = failed
        except HTTPException as failed:
            error = asgi.refused(failed, scope)
        except Exception:  # Our bug: the client gets an answer, the log the trace.
            log.exception("%s %s failed", scope["method"], scope["path"])
            error = FleetError("internal error; the server's log says more")
        await asgi.error_response(error)(scope, receive, send)

    async def _authorized(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._config.api_keys:
            value = Headers(scope=scope).get("authorization", "")
            scheme, _, key = value.partition(" ")
            given = key.encode("latin-1")
            # Every key is compared, so that the time taken tells nothing of which was close.
            matches = [hmac.compare_digest(given, k.encode()) for k in self._config.api_keys]
            if scheme.lower() != "bearer" or not any(matches):
                raise Unauthorized(
                    "no API key: send Authorization: Bearer KEY" if not value else "wrong API key"
                )
        await self._v1(scope, receive, send)

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        """Says on every response who answered, and under which request id."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if asgi.REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        extra = [
            (b"x-lorafleet-replica", self._config.replica_id.encode()),
            (b"x-request-id", request_id.encode()),
        ]

        def wrapped(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            return send(message)

        return wrapped

    async def _body(self, request: Request) -> bytes:
        async with self._until_cut():
            return await asgi.read_body(request, self._config.body_bytes_max)

    @asynccontextmanager
    async def _until_cut(self) -> AsyncIterator[None]:
        """Around what waits for others than the engine."""
        wait = asyncio.timeout(None)
        try:
            async with wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if not wait.expired():
                raise
            raise ShuttingDown(_CUT, retry_after_s=1.0) from None

    async def _chat(self, http: Request) -> ASGIApp:
        request = parse(ChatRequest, await self._body(http))
        call = await self._reader.chat(request)
        options = _options(request, bool(request.logprobs))
        encoder = ChatEncoder(call, options, self._text)
        return partial(self._answer, call, encoder, options, bool(request.stream))

    async def _complete(self, http: Request) -> ASGIApp:
        request = parse(CompletionRequest, await self._body(http))
        call = await self._reader.completion(request)
        options = _options(request, request.logprobs is not None)
        encoder = CompletionEncoder(call, options, self._text)
        return partial(self._answer, call, encoder, options, bool(request.stream))

    async def _answer(
        self,
        call: Call,
        encoder: ResponseEncoder,
        options: ResponseOptions,
        stream: bool,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """An ASGI application: it watches for the disconnect of who asked."""
        self.active += 1
        self._idle.clear()
        try:
            if self._closing:
                raise ShuttingDown("this replica is shutting down", retry_after_s=1.0)
            if stream:
                work = self._stream(call, encoder, options, send)
            else:
                work = self._whole(call, encoder, scope, receive, send)
            await asgi.until_disconnect(receive, work)
        finally:
            call.release()
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def _whole(
        self, call: Call, encoder: ResponseEncoder, scope: Scope, receive: Receive, send: Send
    ) -> None:
        usage = Usage(call.prompt_tokens)
        answers = [Answer() for _ in range(call.choices)]
        async with aclosing(run(self._engine, self._text, call)) as pieces:
            async for piece in pieces:
                usage.add(piece)
                answers[piece.index].add(piece)
        response = Response(encoder.body(answers, usage), media_type="application/json")
        await response(scope, receive, send)

    async def _stream(
        self, call: Call, encoder: ResponseEncoder, options: ResponseOptions, send: Send
    ) -> None:
        """An error before the first piece is a plain answer with its own status."""
        usage = Usage(call.prompt_tokens)
        started = False
        try:
            async with aclosing(run(self._engine, self._text, call)) as pieces:
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
                    chunk = encoder.chunk(piece, usage)
                    if chunk:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            end = encoder.usage_chunk(usage) + DONE if options.include_usage else DONE
        except FleetError as error:
            if not started:
                raise
            end = b"data: " + asgi.error_body(error) + b"\n\n"
        except Exception:  # Our bug: the stream still says that it broke off.
            if not started:
                raise
            log.exception("%s failed in mid-stream", call.id)
            end = b"data: " + asgi.error_body(FleetError("internal error")) + b"\n\n"
        await send({"type": "http.response.body", "body": end})

    async def _models(self, http: Request) -> Response:
        cards = [self._base_card()]
        cards += [self._adapter_card(version) for version in self._adapters.versions()]
        return asgi.JsonResponse({"object": "list", "data": cards})

    async def _model(self, http: Request) -> Response:
        name = http.path_params["name"]
        if name == self._config.base:
            return asgi.JsonResponse(self._base_card())
        version = await self._adapters.find(name)
        if version is None:
            raise ModelNotFound(f"the model {shown(name)} does not exist", field="model")
        return asgi.JsonResponse(self._adapter_card(version))

    def _base_card(self) -> dict[str, Any]:
        return {
            "id": self._config.base,
            "object": "model",
            "created": self._created,
            "owned_by": "lorafleet",
            "root": self._config.root or self._config.base,
            "parent": None,
            "max_model_len": self._config.context,
        }

    def _adapter_card(self, version: Version) -> dict[str, Any]:
        return self._base_card() | {
            "id": version.name,
            "root": version.uri,
            "parent": self._config.base,
        }

    async def _describe(self, http: Request) -> Response:
        return asgi.JsonResponse(await self._adapters.describe())

    async def _timeline(self, http: Request) -> Response:
        """Why did this wait? The timeline of each choice of a response, by the response's id."""
        response_id = http.path_params["response_id"]
        choices: list[list[dict[str, object]]] = []
        while timeline := await self._engine.timeline(f"{response_id}-{len(choices)}"):
            began_s = timeline[0].at_s
            choices.append(
                [
                    {"at_s": round(h.at_s - began_s, 6), "event": h.event, "detail": h.detail}
                    for h in timeline
                ]
            )
        if not choices:
            raise asgi.NoSuchRoute(f"this replica remembers no request {response_id!r}")
        body = {"id": response_id, "object": "request.timeline", "choices": choices}
        return asgi.JsonResponse(body)

    async def _load_adapter(self, http: Request) -> Response:
        request = parse(LoadAdapterRequest, await self._body(http))
        self._check_name(request.lora_name)
        async with self._until_cut():
            done = await self._adapters.add(
                request.lora_name,
                request.lora_path,
                load_inplace=request.load_inplace,
                pinned=request.pinned,
                weight=request.weight,
            )
        return _acknowledge(f"Success: LoRA adapter '{done.name}' added successfully.", done)

    async def _unload_adapter(self, http: Request) -> Response:
        request = parse(UnloadAdapterRequest, await self._body(http))
        self._check_name(request.lora_name)
        async with self._until_cut():
            done = await self._adapters.remove(request.lora_name)
        return _acknowledge(f"Success: LoRA adapter '{done.name}' removed successfully.", done)

    def _check_name(self, name: str) -> None:
        if name == self._config.base:
            raise BadRequest(f"lora_name: {shown(name)} is the base model", field="lora_name")
        if self._closing:
            raise ShuttingDown("this replica is shutting down", retry_after_s=1.0)

    async def _health(self, http: Request) -> Response:
        if self._closing:
            raise ShuttingDown("this replica is shutting down")
        if not self._engine.alive:
            error = EngineFailed("the engine is not running")
            error.status = 503  # Probes expect it: the replica is up, but cannot serve.
            raise error
        return asgi.JsonResponse({"status": "ok"})

    async def _metrics(self, http: Request) -> Response:
        body = metrics.render(self._engine.report(), self._engine.adapter_states(), self.active)
        return Response(body, media_type=metrics.CONTENT_TYPE)


def build_app(engine: Engine, adapters: Adapters, text: Text, config: ServerConfig) -> Server:
    """The ASGI application of one replica. engine: has started. The app does not stop it."""
    return Server(engine, adapters, text, config)


def _options(request: ChatRequest | CompletionRequest, logprobs: bool) -> ResponseOptions:
    return ResponseOptions(
        logprobs=logprobs,
        token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
    )


def _acknowledge(message: str, done: Acknowledgement) -> Response:
    """vLLM's text. Replicas that have not followed yet are named in it and in a header."""
    headers = {
        "x-lorafleet-digest": done.digest,
        "x-lorafleet-sequence": str(done.sequence),
    }
    if done.pending:
        names = ", ".join(done.pending)
        message += f" Not yet acknowledged by: {names}."
        headers["x-lorafleet-pending"] = names
    return PlainTextResponse(message, headers=headers)
