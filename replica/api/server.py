"""OpenAI's HTTP API over one engine and its adapters."""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive, Scope, Send

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
    ChatWire,
    CompletionWire,
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


Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


class Server:
    """The ASGI application. `close()`, `drained()` and `cut()` end it in good order."""

    def __init__(
        self, engine: Engine, adapters: Adapters, text: Text, config: ServerConfig
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._text = text
        self._config = config
        self._reader = CallReader(adapters, text, config.base, config.context, config.vocab)
        self._created = int(time.time())
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._waits: set[asyncio.Timeout] = set()
        self.active = 0
        self.routes: Mapping[str, Mapping[str, Endpoint]] = {
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            "/v1/adapters": {"GET": self._describe},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._complete},
            "/v1/load_lora_adapter": {"POST": self._load_adapter},
            "/v1/unload_lora_adapter": {"POST": self._unload_adapter},
        }

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
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return  # No websockets here; the server closes the connection.
        send = self._with_headers(scope, send)
        try:
            await self._endpoint(scope)(scope, receive, send)
        except FleetError as error:
            await asgi.send_error(send, error)
        except asgi.ClientGone:
            pass
        except Exception:  # Our bug: the client gets an answer, the log the trace.
            log.exception("%s %s failed", scope["method"], scope["path"])
            await asgi.send_error(send, FleetError("internal error; the server's log says more"))

    def _endpoint(self, scope: Scope) -> Endpoint:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path.startswith("/v1"):
            self._authorize(scope)
        methods = self.routes.get(path)
        if methods is None and path.startswith("/v1/models/"):
            methods = {"GET": self._model}
        if methods is None and path.startswith("/v1/requests/"):
            methods = {"GET": self._timeline}
        if methods is None:
            raise asgi.NoSuchRoute(f"no route {scope['method']} {path}")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in methods:
            raise asgi.MethodNotAllowed(
                f"{path} takes {', '.join(sorted(methods))}, not {scope['method']}"
            )
        return methods[method]

    def _authorize(self, scope: Scope) -> None:
        if not self._config.api_keys:
            return
        value = asgi.header(scope, b"authorization") or b""
        scheme, _, key = value.partition(b" ")
        # Every key is compared, so that the time taken tells nothing of which was close.
        matches = [hmac.compare_digest(key, known.encode()) for known in self._config.api_keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Unauthorized(
                "no API key: send Authorization: Bearer KEY" if not value else "wrong API key"
            )

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        """Says on every response who answered, and under which request id."""
        given = asgi.header(scope, b"x-request-id") or b""
        request_id = given if asgi.REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        extra = [
            (b"x-lorafleet-replica", self._config.replica_id.encode()),
            (b"x-request-id", request_id),
        ]

        def wrapped(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            return send(message)

        return wrapped

    async def _body(self, receive: Receive) -> bytes:
        async with self._until_cut():
            return await asgi.read_body(receive, self._config.body_bytes_max)

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

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = parse(ChatRequest, await self._body(receive))
        call = await self._reader.chat(request)
        wanted = _wanted(request, bool(request.logprobs))
        encoder = ChatWire(call, wanted, self._text)
        await self._answer(call, encoder, wanted, bool(request.stream), receive, send)

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = parse(CompletionRequest, await self._body(receive))
        call = await self._reader.completion(request)
        wanted = _wanted(request, request.logprobs is not None)
        encoder = CompletionWire(call, wanted, self._text)
        await self._answer(call, encoder, wanted, bool(request.stream), receive, send)

    async def _answer(
        self,
        call: Call,
        encoder: ResponseEncoder,
        wanted: ResponseOptions,
        stream: bool,
        receive: Receive,
        send: Send,
    ) -> None:
        if self._closing:
            raise ShuttingDown("this replica is shutting down", retry_after_s=1.0)
        self.active += 1
        self._idle.clear()
        try:
            if stream:
                work = self._stream(call, encoder, wanted, send)
            else:
                work = self._whole(call, encoder, send)
            await asgi.until_disconnect(receive, work)
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def _whole(self, call: Call, encoder: ResponseEncoder, send: Send) -> None:
        usage = Usage(call.prompt_tokens)
        answers = [Answer() for _ in range(call.choices)]
        async with aclosing(run(self._engine, self._text, call)) as pieces:
            async for piece in pieces:
                usage.add(piece)
                answers[piece.index].add(piece)
        await asgi.send_body(send, 200, encoder.body(answers, usage))

    async def _stream(
        self, call: Call, encoder: ResponseEncoder, wanted: ResponseOptions, send: Send
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
            end = encoder.usage_chunk(usage) + DONE if wanted.include_usage else DONE
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

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        cards = [self._base_card()]
        cards += [self._adapter_card(version) for version in self._adapters.versions()]
        await asgi.send_json(send, {"object": "list", "data": cards})

    async def _model(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix(scope.get("root_path", "")).removeprefix("/v1/models/")
        if name == self._config.base:
            await asgi.send_json(send, self._base_card())
            return
        version = await self._adapters.find(name)
        if version is None:
            raise ModelNotFound(f"the model {shown(name)} does not exist", field="model")
        await asgi.send_json(send, self._adapter_card(version))

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

    async def _describe(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asgi.send_json(send, await self._adapters.describe())

    async def _timeline(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Why did this wait? The timeline of each choice of a response, by the response's id."""
        response_id = scope["path"].rpartition("/")[2]
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
        await asgi.send_json(send, body)

    async def _load_adapter(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = parse(LoadAdapterRequest, await self._body(receive))
        self._check_name(request.lora_name)
        async with self._until_cut():
            done = await self._adapters.add(
                request.lora_name,
                request.lora_path,
                load_inplace=request.load_inplace,
                pinned=request.pinned,
                weight=request.weight,
            )
        await _acknowledge(send, f"Success: LoRA adapter '{done.name}' added successfully.", done)

    async def _unload_adapter(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = parse(UnloadAdapterRequest, await self._body(receive))
        self._check_name(request.lora_name)
        async with self._until_cut():
            done = await self._adapters.remove(request.lora_name)
        await _acknowledge(send, f"Success: LoRA adapter '{done.name}' removed successfully.", done)

    def _check_name(self, name: str) -> None:
        if name == self._config.base:
            raise BadRequest(f"lora_name: {shown(name)} is the base model", field="lora_name")
        if self._closing:
            raise ShuttingDown("this replica is shutting down", retry_after_s=1.0)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._closing:
            raise ShuttingDown("this replica is shutting down")
        if not self._engine.alive:
            error = EngineFailed("the engine is not running")
            error.status = 503  # Probes expect it: the replica is up, but cannot serve.
            raise error
        await asgi.send_json(send, {"status": "ok"})

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = metrics.render(self._engine.report(), self._engine.adapter_states(), self.active)
        await asgi.send_body(send, 200, body.encode(), [metrics.CONTENT_TYPE])


def build_app(engine: Engine, adapters: Adapters, text: Text, config: ServerConfig) -> Server:
    """The ASGI application of one replica. It neither starts nor stops the engine."""
    return Server(engine, adapters, text, config)


def _wanted(request: ChatRequest | CompletionRequest, logprobs: bool) -> ResponseOptions:
    return ResponseOptions(
        logprobs=logprobs,
        token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
    )


async def _acknowledge(send: Send, message: str, done: Acknowledgement) -> None:
    """vLLM's text. Replicas that have not followed yet are named in it and in a header."""
    headers: list[asgi.Header] = [
        asgi.TEXT,
        (b"x-lorafleet-digest", done.digest.encode()),
        (b"x-lorafleet-sequence", str(done.sequence).encode()),
    ]
    if done.pending:
        names = ", ".join(done.pending)
        message += f" Not yet acknowledged by: {names}."
        headers.append((b"x-lorafleet-pending", names.encode()))
    await asgi.send_body(send, 200, message.encode(), headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
