"""Who may do what: with and without keys, and what one key can learn of another."""

from dataclasses import replace

import httpx
import pytest
from starlette.types import Message

from replica.api import asgi
from replica.api.access import Rules
from replica.scheduling.timeline import Event, TimelineEvent
from tests.raw_http import exchange
from tests.serving import CONFIG, Book, app_with, client_of, live
from tests.stub_engine import StubEngine

KEYS = Rules(("sk-use", "sk,with comma"), ("sk-admin",), "sk-operator")
NEW = {"lora_name": "new", "lora_path": "/adapters/new"}
REQUEST = {"model": "tiny", "prompt": "hello", "max_tokens": 2}


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


async def status(
    rules: Rules, key: str | None, path: str, body: object = None, **headers: str
) -> int:
    app = await app_with(StubEngine(), config=replace(CONFIG, rules=rules))
    async with client_of(app) as client:
        method = "GET" if body is None else "POST"
        answer = await client.request(method, path, json=body, headers=bearer(key) | headers)
        return answer.status_code


@pytest.mark.parametrize(
    ("key", "use", "see", "change"),
    [
        (None, 401, 401, 401),
        ("wrong", 401, 401, 401),
        ("sk", 401, 401, 401),
        ("sk,with", 401, 401, 401),
        ("sk-use", 200, 403, 403),
        ("sk,with comma", 200, 403, 403),
        ("sk-admin", 200, 200, 200),
        ("sk-operator", 200, 200, 200),
    ],
)
async def test_each_kind_of_key_has_its_rights(
    key: str | None, use: int, see: int, change: int
) -> None:
    assert await status(KEYS, key, "/v1/models") == use
    assert await status(KEYS, key, "/v1/completions", REQUEST) == use
    for path in ("/v1/adapters", "/metrics"):
        assert await status(KEYS, key, path) == see
    for path, body in (
        ("/v1/load_lora_adapter", NEW),
        ("/v1/load_lora_adapters", {"adapters": [NEW]}),
        ("/v1/unload_lora_adapter", {"lora_name": "poet"}),
    ):
        assert await status(KEYS, key, path, body) == change


async def test_metrics_may_be_opened() -> None:
    assert await status(replace(KEYS, open_metrics=True), None, "/metrics") == 200
    assert await status(Rules(), None, "/metrics") == 200


async def test_where_no_admin_key_is_configured_the_refusal_says_so() -> None:
    app = await app_with(StubEngine(), config=replace(CONFIG, rules=Rules(("sk-use",))))
    async with client_of(app) as client:
        answer = await client.get("/v1/adapters", headers=bearer("sk-use"))
    assert "admin_keys" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("fleet.internal:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("", 403),
    ],
)
async def test_without_keys_changes_are_for_names_of_this_fleet(host: str, expected: int) -> None:
    rules = Rules(hosts=("fleet.internal",))
    gone = {"lora_name": "poet"}
    assert await status(rules, None, "/v1/unload_lora_adapter", gone, host=host) == expected
    # A key says more than a name.
    assert await status(KEYS, "sk-admin", "/v1/unload_lora_adapter", gone, host=host) == 200


async def test_what_a_web_page_can_send_anywhere_changes_nothing() -> None:
    book = Book()
    app = await app_with(StubEngine(), book)
    async with client_of(app) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/mixed", ""):
            answer = await client.post(
                "/v1/load_lora_adapter",
                content=b'{"lora_name": "new", "lora_path": "/a"}',
                headers={"content-type": kind},
            )
            assert answer.status_code == 415
            assert answer.json()["error"]["code"] == "unsupported_media_type"
    assert book.versions() == []


async def test_unloading_needs_what_loading_needs() -> None:
    off = Rules(operator_key="sk-operator", changes=False)
    for path, body in (
        ("/v1/load_lora_adapter", NEW),
        ("/v1/unload_lora_adapter", {"lora_name": "poet"}),
    ):
        assert await status(off, None, path, body) == 403
        assert await status(off, "sk-operator", path, body) == 200


async def test_an_operators_adapter_may_come_from_anywhere() -> None:
    trusted = []

    class Noting(Book):
        async def add(self, name: str, path: str, **options: object) -> object:  # type: ignore[override]
            trusted.append(options["trusted"])
            return await super().add(name, path, **options)  # type: ignore[arg-type]

    app = await app_with(StubEngine(), Noting(), replace(CONFIG, rules=KEYS))
    async with client_of(app) as client:
        for i, key in enumerate(("sk-admin", "sk-operator")):
            body = {**NEW, "lora_name": f"n{i}"}
            await client.post("/v1/load_lora_adapter", json=body, headers=bearer(key))
    assert trusted == [False, True]


async def test_a_timeline_is_told_to_the_key_that_asked() -> None:
    engine = StubEngine()

    async def timeline(request_id: str) -> list[TimelineEvent]:
        return [TimelineEvent(0.0, Event.QUEUED, "")] if request_id.endswith("-0") else []

    engine.timeline = timeline  # type: ignore[method-assign]
    app = await app_with(engine, config=replace(CONFIG, rules=KEYS))
    async with client_of(app) as client:
        answer = await client.post("/v1/completions", json=REQUEST, headers=bearer("sk-use"))
        path = f"/v1/requests/{answer.json()['id']}"
        found = {
            key: (await client.get(path, headers=bearer(key))).status_code
            for key in ("sk-use", "sk,with comma", "sk-admin")
        }
        forged = path[:-1] + ("0" if path[-1] != "0" else "1")
        assert (await client.get(forged, headers=bearer("sk-use"))).status_code == 404
    assert found == {"sk-use": 200, "sk,with comma": 404, "sk-admin": 200}


async def salts(rules: Rules, *keys: str | None) -> list[str | None]:
    engine = StubEngine()
    app = await app_with(engine, config=replace(CONFIG, rules=rules))
    async with client_of(app) as client:
        for key in keys:
            answer = await client.post("/v1/completions", json=REQUEST, headers=bearer(key))
            assert answer.status_code == 200
    return [request.salt for request in engine.seen]


async def test_keys_share_no_cached_prefix_unless_they_are_to() -> None:
    first, other, again = await salts(KEYS, "sk-use", "sk,with comma", "sk-use")
    assert first == again != other
    assert first is not None and other is not None and "sk" not in first
    assert await salts(replace(KEYS, shared_prefixes=True), "sk-use", "sk-admin") == [None, None]
    assert await salts(Rules(), None) == [None]


async def test_models_are_listed_without_their_paths() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        listed = (await client.get("/v1/models")).text
    assert "/" not in listed.replace("application/json", "")


async def test_a_websocket_is_refused() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    app = await app_with(StubEngine())
    await app({"type": "websocket", "path": "/v1/models", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close"}]  # which servers answer with 403


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "BODY_S", 0.05)
    async with live(await app_with(StubEngine())) as url:
        port = httpx.URL(url).port
        assert port is not None
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        answer = await exchange(port, head)
    assert answer.startswith(b"HTTP/1.1 408") and b"body_too_slow" in answer


@pytest.mark.parametrize("depth", [900, 990])
async def test_lists_within_lists_are_the_clients_fault(depth: int) -> None:
    body = '{"model":"tiny","messages":[{"role":"user","content":"x","extra":%s}]}'
    body %= "[" * depth + "]" * depth
    app = await app_with(StubEngine())
    async with client_of(app) as client:
        answer = await client.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
