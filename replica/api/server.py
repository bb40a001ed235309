"""OpenAI's HTTP API over one engine and its adapters."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config import DEFAULT_MODEL
from cluster.downloads import PEER_PATH
from cluster.errors import (
    EngineFailed,
    FleetError,
    ShuttingDown,
)
from replica.api import asgi
from replica.api.access import Access, Caller, Rules
from replica.api.adapter_routes import AdapterRoutes
from replica.api.answers import Answers, Sent
from replica.api.attempts import Attempts, LocalSuspects
from replica.api.bodies import IGNORED_HEADER, Bodies, ignored_header
from replica.api.call import CallReader
from replica.api.completion import Call
from replica.api.embeddings import EmbeddingsRequest
from replica.api.fleet_routes import FleetRoutes, Others, no_others
from replica.api.interfaces import Adapters, Engine, Suspects
from replica.api.kinds import Kinds, Prepared
from replica.api.metrics import CONTENT_TYPE, Metrics, Snapshot
from replica.api.model_cards import ModelCards
from replica.api.openai_protocol import (
    ChatRequest,
    CompletionRequest,
)
from replica.api.openapi import Document
from replica.api.peer_files import Files, PeerFiles, no_files
from replica.api.request_log import RequestLog
from replica.api.response_encoder import ResponseEncoder
from replica.api.responses import ResponsesRequest
from replica.api.sampling import OPENAI_DEFAULTS, SamplingDefaults, SamplingReader
from replica.api.sglang import GenerateRequest
from replica.api.text import Text
from replica.api.text_routes import TextRoutes
from replica.api.tools import ToolFormat

log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response | ASGIApp]]
Body = TypeVar(
    "Body",
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    GenerateRequest,
    EmbeddingsRequest,
)

# Of an answer's headers, those that a web page may read.
_EXPOSED = ("x-request-id", "x-lorafleet-replica", "retry-after", IGNORED_HEADER)

_CUT = "this replica shut down before the answer was complete"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """base: the base model's name on the API.

    context: longest prompt + answer, in tokens. vocab: token ids from the client lie below it.
    elsewhere_bytes: see `Attempts`. names_requests: False where Serve adds x-request-id to answers.
    tool_format: None for the one that the chat template teaches.
    strict_fields, default_is_base, allowed_origins, request_log: see `FleetConfig`.
    """

    base: str
    context: int
    vocab: int
    replica_id: str = "local"
    rules: Rules = field(default_factory=Rules)
    names_requests: bool = True
    defaults: SamplingDefaults = OPENAI_DEFAULTS
    elsewhere_bytes: int = 0
    body_bytes_max: int = 32 * 2**20
    strict_fields: bool = False
    default_is_base: bool = False
    tool_format: ToolFormat | None = None
    allowed_origins: tuple[str, ...] = ()
    request_log: str | None = None

    @property
    def base_names(self) -> frozenset[str]:
        return frozenset((self.base, DEFAULT_MODEL) if self.default_is_base else (self.base,))


class Server:
    """The ASGI application. `close()`, `drained()` and `cut()` end it in good order."""

    def __init__(
        self,
        engine: Engine,
        adapters: Adapters,
        text: Text,
        config: ServerConfig,
        suspects: Suspects,
        others: Others,
        files: Files,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._config = config
        kv_tokens = engine.report().capacity_pages * engine.config.page_tokens
        reader = CallReader(
            adapters,
            text,
            config.base,
            config.context,
            kv_tokens,
            SamplingReader(config.vocab, config.defaults),
            config.tool_format,
            config.base_names,
        )
        self._access = Access(config.rules)
        sizes = {
            "max_total_num_tokens": kv_tokens,
            "max_running_requests": engine.config.batch_rows_max,
            "tp_size": engine.config.tensor_parallel,
        }
        cards = ModelCards(adapters, config.base, config.base_names, config.context, sizes)
        kinds = Kinds(reader)
        self._front: ASGIApp = self._serve
        if config.request_log is not None:
            self._front = RequestLog(config.request_log, config.replica_id).around(self._front)
        if config.allowed_origins:
            self._front = CORSMiddleware(
                self._front,
                config.allowed_origins,
                ["GET", "POST"],
                allow_headers=["*"],
                expose_headers=_EXPOSED,
            )
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._waits: set[asyncio.Timeout] = set()
        self.active = 0
        self._metrics = Metrics(config.base, self._snapshot)
        holds = engine.config.batch_rows_max + engine.config.queue_max
        attempts = Attempts(suspects, config.elsewhere_bytes, holds)
        self._answers = Answers(engine, attempts, self._metrics)
        bodies = Bodies(config.body_bytes_max, config.strict_fields, self._until_cut)
        self._bodies = bodies
        changes = AdapterRoutes(
            adapters,
            config.base_names,
            bodies,
            self._until_cut,
            lambda: self._closing,
            self._access,
        )
        fleet = FleetRoutes(engine, self._metrics, self._access, config.replica_id, others)
        texts = TextRoutes(reader, config.context, config.vocab, bodies)
        self._v1 = Router(
            [
                Route("/chat/completions", self._runs(ChatRequest, kinds.chat), methods=["POST"]),
                Route(
                    "/completions",
                    self._runs(CompletionRequest, kinds.completion),
                    methods=["POST"],
                ),
                Route("/responses", self._runs(ResponsesRequest, kinds.response), methods=["POST"]),
                Route(
                    "/embeddings",
                    self._runs(EmbeddingsRequest, kinds.embeddings),
                    methods=["POST"],
                ),
                Route("/models", cards.all),
                Route("/models/{name:path}", cards.one),
                Route("/adapters", self._describe),
                Route("/requests/{response_id}", fleet.timeline),
                Route("/load_lora_adapter", changes.load, methods=["POST"]),
                Route("/load_lora_adapters", changes.load_all, methods=["POST"]),
                Route("/unload_lora_adapter", changes.unload, methods=["POST"]),
            ],
            redirect_slashes=False,
        )
        document = Document(lambda: {"/v1": self._v1.routes, "": self._router.routes})
        self._router = Router(
            [
                Mount("/v1", self._authorized),
                # Of replicas among themselves, so no part of the document.
                Mount(
                    PEER_PATH,
                    routes=[Route("/{digest}/{name}", PeerFiles(files).file, methods=["GET"])],
                ),
                Route("/openapi.json", document.json),
                Route("/docs", document.page),
                Route("/health", self._health),
                Route("/ping", self._health, methods=["GET", "POST"]),
                Route("/readyz", self._health),
                Route("/health_generate", self._health),  # SGLang's
                Route("/livez", self._live),
                Route("/version", self._version),
                Route("/metrics", self._scrape),
                Route("/metrics/fleet", fleet.scrape),
                Route("/tokenize", self._keyed(texts.tokenize), methods=["POST"]),
                Route("/detokenize", self._keyed(texts.detokenize), methods=["POST"]),
                # SGLang has these at the root.
                Route(
                    "/generate",
                    self._keyed(self._runs(GenerateRequest, kinds.generate)),
                    methods=["POST"],
                ),
                *(
                    Route(path, self._keyed(endpoint))
                    for name, endpoint in (
                        ("model_info", cards.model_info),
                        ("server_info", cards.server_info),
                    )
                    for path in (f"/{name}", f"/get_{name}")
                ),
                Route("/load_lora_adapter", self._keyed(changes.load), methods=["POST"]),
                Route("/unload_lora_adapter", self._keyed(changes.unload), methods=["POST"]),
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
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # the server answers 403
            return
        if scope["type"] != "http":  # its lifespan
            await self._router(scope, receive, send)
            return
        scope["app"] = self  # The router raises its own errors then, for us to answer.
        scope["path"] = scope["path"].rstrip("/") or "/"
        await self._front(scope, receive, self._with_headers(scope, send))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        scope["code"] = error.code
        await asgi.error_response(error)(scope, receive, send)

    async def _authorized(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["caller"] = self._access.caller(Headers(scope=scope))
        await self._v1(scope, receive, send)

    def _keyed(self, endpoint: Endpoint) -> Endpoint:
        async def checked(http: Request) -> Response | ASGIApp:
            http.scope["caller"] = self._access.caller(http.headers)
            return await endpoint(http)

        return checked

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        """Says on every response who answered, and under which request id."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if asgi.REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        extra = [(b"x-lorafleet-replica", self._config.replica_id.encode())]
        if self._config.names_requests:
            extra.append((b"x-request-id", request_id.encode()))

        def wrapped(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], *extra, *ignored_header(scope)]
                message = {**message, "headers": headers}
            return send(message)

        return wrapped

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

    def _runs(self, kind: type[Body], prepare: Callable[[Body], Awaitable[Prepared]]) -> Endpoint:
        """An endpoint that runs the model."""

        async def endpoint(http: Request) -> ASGIApp:
            deadline_s = asgi.deadline_s(http, asyncio.get_running_loop().time())
            request, size = await self._bodies.read(kind, http)
            received_s = time.monotonic()
            call, encoder_of = await prepare(request)
            call = self._owned(call, http, deadline_s)
            sent = Sent(bool(request.stream), size, received_s)
            return partial(self._answer, call, encoder_of(call), sent)

        return endpoint

    def _owned(self, call: Call, http: Request, deadline_s: float | None) -> Call:
        """The call, of who sent the request."""
        caller: Caller = http.scope["caller"]
        call_id = self._access.tagged(call.id, caller)
        return replace(call, id=call_id, salt=caller.salt, deadline_s=deadline_s)

    async def _answer(
        self,
        call: Call,
        encoder: ResponseEncoder,
        sent: Sent,
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
            await self._answers.give(call, encoder, sent, scope, receive, send)
        finally:
            call.release()
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def _describe(self, http: Request) -> Response:
        self._access.check_admin(http.scope["caller"])
        return asgi.JsonResponse(await self._adapters.describe())

    async def _health(self, http: Request) -> Response:
        if self._closing:
            raise ShuttingDown("this replica is shutting down")
        if not self._engine.alive or self._engine.report().stalled:
            error = EngineFailed("the engine does not move")
            error.status = 503  # Probes expect it: the replica is up, but cannot serve.
            raise error
        return asgi.JsonResponse({"status": "ok"})

    async def _live(self, http: Request) -> Response:
        return asgi.JsonResponse({"status": "ok"})

    async def _version(self, http: Request) -> Response:
        return asgi.JsonResponse({"version": version("lorafleet")})

    async def _scrape(self, http: Request) -> Response:
        self._access.check_metrics(http.headers)
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._engine.report(), self._engine.adapter_states(), self.active)


def build_app(
    engine: Engine,
    adapters: Adapters,
    text: Text,
    config: ServerConfig,
    suspects: Suspects | None = None,
    others: Others = no_others,
    files: Files = no_files,
) -> Server:
    """The ASGI application of one replica. engine: has started. The app does not stop it."""
    return Server(engine, adapters, text, config, suspects or LocalSuspects(), others, files)
