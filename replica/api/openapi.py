"""GET /openapi.json, made from the routes and from the types that parse requests; and its page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.metadata import version
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.errors import (
    AdapterFailed,
    BadRequest,
    CatalogUnavailable,
    DeadlineExceeded,
    EngineFailed,
    FleetError,
    Forbidden,
    LogitsNotFinite,
    ModelNotFound,
    QueueFull,
    ShuttingDown,
    StoreFull,
    Unauthorized,
)
from replica.api import asgi
from replica.api.access import FORM as _FORM
from replica.api.access import JSON as _JSON
from replica.api.adapter_routes import (
    LoadAdapterRequest,
    LoadAdaptersRequest,
    UnloadAdapterRequest,
    UploadAdapterRequest,
)
from replica.api.embeddings import EmbeddingsRequest
from replica.api.openai_protocol import (
    ChatRequest,
    CompletionRequest,
)
from replica.api.responses import ResponsesRequest
from replica.api.sglang import GenerateRequest
from replica.api.text_routes import DetokenizeRequest, TokenizeRequest

_REF = "#/components/schemas/{model}"
_TEXT, _EVENTS = "text/plain", "text/event-stream"

Errors = tuple[type[FleetError], ...]
_KEYED: Errors = (BadRequest, Unauthorized, FleetError, ShuttingDown)
_BODY: Errors = (asgi.BodyTooSlow, asgi.BodyTooLarge, asgi.UnsupportedMediaType)
_RUN: Errors = (
    *_KEYED,
    *_BODY,
    ModelNotFound,
    QueueFull,
    LogitsNotFinite,
    EngineFailed,
    AdapterFailed,
    DeadlineExceeded,
)
_TEXTS: Errors = (*_KEYED, *_BODY, ModelNotFound, AdapterFailed)
_CHANGE: Errors = (
    *_KEYED,
    *_BODY,
    Forbidden,
    ModelNotFound,
    AdapterFailed,
    CatalogUnavailable,
    StoreFull,
)


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document says of a route. body: the type that parses it. media: of its answers.
    form: the type of a form that it takes as well.
    """

    summary: str
    errors: Errors = (FleetError,)
    body: type[BaseModel] | None = None
    media: tuple[str, ...] = (_JSON,)
    form: type[BaseModel] | None = None

    @property
    def bodies(self) -> dict[str, type[BaseModel]]:
        kinds = {_JSON: self.body, _FORM: self.form}
        return {media: kind for media, kind in kinds.items() if kind is not None}


_RUNS = (_JSON, _EVENTS)
_LOAD = Operation("Add an adapter.", _CHANGE, LoadAdapterRequest, (_TEXT,), UploadAdapterRequest)
_UNLOAD = Operation("Remove an adapter.", _CHANGE, UnloadAdapterRequest, (_TEXT,))
_HEALTH = Operation("Does the engine move?", (FleetError, ShuttingDown))
# Path → what its route is for. Every route of `Server` has a line.
OPERATIONS: Mapping[str, Operation] = {
    "/v1/chat/completions": Operation("Continue a chat.", _RUN, ChatRequest, _RUNS),
    "/v1/completions": Operation("Continue a text.", _RUN, CompletionRequest, _RUNS),
    "/v1/responses": Operation("Answer, without stored state.", _RUN, ResponsesRequest, _RUNS),
    "/v1/embeddings": Operation("States of inputs' last tokens.", _RUN, EmbeddingsRequest),
    "/v1/models": Operation("The base model and the adapters.", _KEYED),
    "/v1/models/{name}": Operation("One model.", (*_KEYED, ModelNotFound)),
    "/v1/adapters": Operation(
        "The catalog, where each adapter is, and each replica's load.",
        (*_KEYED, Forbidden, CatalogUnavailable),
    ),
    "/v1/requests/{response_id}": Operation(
        "Why did a request wait? Its timeline.", (*_KEYED, asgi.NoSuchRoute)
    ),
    "/v1/load_lora_adapter": _LOAD,
    "/v1/load_lora_adapters": Operation(
        "Add adapters in one change.", _CHANGE, LoadAdaptersRequest
    ),
    "/v1/unload_lora_adapter": _UNLOAD,
    "/load_lora_adapter": _LOAD,
    "/unload_lora_adapter": _UNLOAD,
    "/tokenize": Operation("The tokens of a text.", _TEXTS, TokenizeRequest),
    "/detokenize": Operation("The text of tokens.", _TEXTS, DetokenizeRequest),
    "/generate": Operation("SGLang's own endpoint.", _RUN, GenerateRequest, _RUNS),
    **dict.fromkeys(
        ("/model_info", "/get_model_info"), Operation("The model, in SGLang's words.", _KEYED)
    ),
    **dict.fromkeys(
        ("/server_info", "/get_server_info"), Operation("The server, in SGLang's words.", _KEYED)
    ),
    "/health": _HEALTH,
    "/health_generate": _HEALTH,
    "/ping": _HEALTH,
    "/readyz": _HEALTH,
    "/livez": Operation("Does the process answer?"),
    "/version": Operation("The program's version."),
    "/metrics": Operation(
        "The replica's metrics, for Prometheus.",
        (FleetError, Unauthorized, Forbidden),
        media=(_TEXT,),
    ),
    "/metrics/fleet": Operation(
        "The metrics of all replicas of a fleet.",
        (FleetError, Unauthorized, Forbidden),
        media=(_TEXT,),
    ),
    "/openapi.json": Operation("This document."),
    "/docs": Operation("This document as a page.", media=("text/html",)),
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_HEADERS = {
    asgi.DEADLINE_HEADER: (
        "Milliseconds that the client waits.",
        {"type": "string", "pattern": asgi.MILLISECONDS},
    ),
    "x-lorafleet-model": (
        "The model, for the router of a fleet, where a body has it late.",
        {"type": "string"},
    ),
}


class Document:
    """routes: by the prefix of their paths; asked for when somebody first wants the document."""

    def __init__(self, routes: Callable[[], Mapping[str, Sequence[BaseRoute]]]) -> None:
        self._routes = routes

    async def json(self, http: Request) -> Response:
        return Response(self._json, media_type=_JSON)

    async def page(self, http: Request) -> Response:
        return HTMLResponse(self._page)

    @cached_property
    def _json(self) -> bytes:
        return orjson.dumps(self._document)

    @cached_property
    def _page(self) -> str:
        return page(self._document)

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(
            (prefix, route)
            for prefix, routes in self._routes().items()
            for route in routes
            if isinstance(route, Route)
        )


def document(routes: Iterable[tuple[str, Route]]) -> dict[str, Any]:
    """OpenAPI 3.1. Raises KeyError for a route that has no line in OPERATIONS."""
    bodies = {body for each in OPERATIONS.values() for body in each.bodies.values()}
    kinds = sorted(bodies, key=lambda body: body.__name__)
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
    for kind in kinds:
        refused = sorted(getattr(kind, "unsupported", ()))
        schema = schemas["$defs"][kind.__name__]
        schema.pop("description", None)  # for who reads the code
        if refused:
            schema["description"] = f"Refused by name, unless neutral: {', '.join(refused)}."
    paths: dict[str, dict[str, Any]] = {}
    for prefix, route in routes:
        path = prefix + route.path_format
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(path, method, route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lorafleet", "version": version("lorafleet")},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, method: str, route: Route) -> dict[str, Any]:
    operation = OPERATIONS[path]
    said: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{method.lower()}{path.replace('/', '_').translate(_NO_BRACES)}",
        "responses": {"200": _response("Done.", operation.media), **_refusals(operation.errors)},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.param_convertors
    ]
    if operation.errors is _RUN:
        parameters += [
            {"name": name, "in": "header", "description": text, "schema": schema}
            for name, (text, schema) in _HEADERS.items()
        ]
    if parameters:
        said["parameters"] = parameters
    if Unauthorized in operation.errors:
        said["security"] = [{}, {"key": []}]
    if operation.body is not None:
        content = {
            media: {"schema": {"$ref": _REF.format(model=body.__name__)}}
            for media, body in operation.bodies.items()
        }
        said["requestBody"] = {"required": True, "content": content}
    return said


_NO_BRACES = str.maketrans("", "", "{}")


def _response(text: str, media: Iterable[str], schema: Mapping[str, Any] = {}) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": schema} for kind in media}}


def _refusals(errors: Errors) -> dict[str, Any]:
    codes: dict[int, list[str]] = {}
    for error in errors:
        codes.setdefault(error.status, []).append(error.code)
    schema = {"$ref": _REF.format(model="Error")}
    return {
        str(status): _response(", ".join(names), (_JSON,), schema)
        for status, names in sorted(codes.items())
    }


def page(document: Mapping[str, Any]) -> str:
    """Plain HTML of a document: an operation's line, its fields and its statuses. No scripts."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>lorafleet</title>",
        "<style>body{font:15px sans-serif;margin:2em}td,th{text-align:left;padding:0 1em 0 0}"
        "</style><h1>lorafleet</h1><p>For programs: <a href=openapi.json>openapi.json</a>",
    ]
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, said in operations.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(said['summary'])}")
            if "requestBody" in said:
                name = said["requestBody"]["content"][_JSON]["schema"]["$ref"].rpartition("/")[2]
                parts.append(_fields(schemas[name]))
            rows = "".join(
                f"<tr><td>{status}<td>{escape(answer['description'])}"
                for status, answer in said["responses"].items()
            )
            parts.append(f"<table><tr><th>status<th>{rows}</table>")
    return "\n".join(parts)


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td>{'<b>' if name in required else ''}<code>{escape(name)}</code>"
        f"<td><code>{escape(_kind(each))}</code>"
        for name, each in schema["properties"].items()
    )
    said = escape(schema.get("description", ""))
    return f"<table><tr><th>field (bold: required)<th>type{rows}</table><p>{said}"


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, such as `integer >= 1 | null`."""
    if "anyOf" in schema:
        return " | ".join(map(_kind, schema["anyOf"]))
    name = schema.get("type") or schema.get("$ref", "any").rpartition("/")[2]
    if name == "array":
        name = f"list of {_kind(schema.get('items', {}))}"
    words = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([name, *words])


_BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "minLength": "length >=",
    "minItems": "length >=",
    "maxItems": "length <=",
}
