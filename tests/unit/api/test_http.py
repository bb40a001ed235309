"""Around the API: origins of web pages, compressed bodies, unknown fields, paths."""

import gzip
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import httpx
import pytest

from replica.api import bodies
from replica.api.openai_protocol import MESSAGES_MAX
from tests.serving import ADAPTER, BASE, CONFIG, app_with, client_of
from tests.stub_engine import StubEngine

PAGE = "https://chat.example.com"
BODY: dict[str, Any] = {"model": BASE, "prompt": [5], "max_tokens": 1}
COMPLETIONS = "/v1/completions"


async def send(content: bytes, encoding: str = "gzip", **config: Any) -> httpx.Response:
    async with client_of(await app_with(StubEngine(), config=replace(CONFIG, **config))) as client:
        headers = {"content-encoding": encoding, "content-type": "application/json"}
        return await client.post(COMPLETIONS, content=content, headers=headers)


@pytest.mark.parametrize("origin", [PAGE, "https://evil.example"])
async def test_a_web_page_of_an_allowed_origin_alone_may_ask(origin: str) -> None:
    config = replace(CONFIG, allowed_origins=(PAGE,))
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    async with client_of(await app_with(StubEngine(), config=config)) as client:
        preflight = await client.options(COMPLETIONS, headers={"origin": origin, **asks})
        answer = await client.post(COMPLETIONS, json=BODY, headers={"origin": origin})
        error = await client.post(COMPLETIONS, json={}, headers={"origin": origin})
    allowed = PAGE if origin == PAGE else None
    assert preflight.status_code == (200 if allowed else 400)
    assert (answer.status_code, error.status_code) == (200, 400)
    for each in (preflight, answer, error):
        assert each.headers.get("access-control-allow-origin") == allowed
    assert "x-lorafleet-replica" in answer.headers["access-control-expose-headers"]


async def test_without_allowed_origins_no_web_page_is_answered() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post(COMPLETIONS, json=BODY, headers={"origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("origin", "status"), [(None, 200), ("http://localhost", 200), (PAGE, 403), ("null", 403)]
)
async def test_without_keys_a_web_page_of_others_changes_no_adapter(
    origin: str | None, status: int
) -> None:
    config = replace(CONFIG, allowed_origins=("*",))
    headers = {"origin": origin} if origin else {}
    async with client_of(await app_with(StubEngine(), config=config)) as client:
        body = {"lora_name": ADAPTER.name}
        answer = await client.post("/v1/unload_lora_adapter", json=body, headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["param"] == "origin"


async def test_a_body_may_be_gzip() -> None:
    packed = gzip.compress(json.dumps(BODY).encode())
    for encoding in ("gzip", "x-gzip", "GZIP"):
        assert (await send(packed, encoding)).status_code == 200
    assert (await send(json.dumps(BODY).encode(), "identity")).status_code == 200


async def test_a_body_may_not_inflate_beyond_the_limit() -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    assert len(bomb) < 20_000
    await send(b"{}", "identity")  # what is only made once
    tracemalloc.start()
    try:
        answer = await send(bomb, body_bytes_max=20_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_body_of_too_many_values_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "COMMAS_MAX", 10)
    for values, status in ((10, 200), (11, 400)):
        packed = gzip.compress(json.dumps({"prompt": [5] * values, "max_tokens": 1}).encode())
        answer = await send(packed)
        assert answer.status_code == status, answer.text
    assert "has 11 commas, the maximum is 10" in answer.text


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/chat/completions", "messages"), ("/v1/responses", "input"), ("/tokenize", "messages")],
)
async def test_a_chat_of_too_many_messages_is_refused(path: str, field: str) -> None:
    body = {field: [{"role": "user", "content": "x"}] * (MESSAGES_MAX + 1)}
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [
        (b"{}", "gzip", 400),
        (gzip.compress(b"{}")[:-1], "gzip", 400),
        (gzip.compress(b"{}") * 2, "gzip", 400),
        (b"{}", "br", 415),
    ],
)
async def test_other_encodings_are_refused_by_name(
    content: bytes, encoding: str, status: int
) -> None:
    answer = await send(content, encoding)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, "content-encoding")


async def test_unknown_fields_are_named_in_the_answer() -> None:
    body = {**BODY, "temprature": 0, "best_of": 1, "ü\n": 1}
    others = {f"f{n}": 1 for n in range(99)}
    async with client_of(await app_with(StubEngine())) as client:
        named = await client.post(COMPLETIONS, json=body)
        none = await client.post(COMPLETIONS, json=BODY)
        many = await client.post("/tokenize", json={"prompt": "a", **others})
    assert (named.status_code, many.status_code) == (200, 200)
    assert named.headers["x-lorafleet-ignored-fields"] == "temprature, %C3%BC%0A"
    assert many.headers["x-lorafleet-ignored-fields"].endswith("f15, and 83 more")
    assert "x-lorafleet-ignored-fields" not in none.headers


async def test_strict_refuses_unknown_fields_and_names_them() -> None:
    config = replace(CONFIG, strict_fields=True)
    async with client_of(await app_with(StubEngine(), config=config)) as client:
        answer = await client.post(COMPLETIONS, json={**BODY, "temprature": 0, "x": 1})
        assert (await client.post(COMPLETIONS, json={**BODY, "best_of": 1})).status_code == 200
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "temprature")
    assert error["message"].endswith("temprature, x")


async def test_another_method_is_told_which_ones_there_are() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.delete(COMPLETIONS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_a_slash_at_the_end_of_a_path_makes_no_difference() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        assert (await client.post(f"{COMPLETIONS}/", json=BODY)).status_code == 200
        assert (await client.get("/v1/models/")).json() == (await client.get("/v1/models")).json()
        assert (await client.get("/")).status_code == 404


@pytest.mark.parametrize("switch", [False, True])
async def test_default_is_the_base_model_where_a_switch_says_so(switch: bool) -> None:
    engine, config = StubEngine(), replace(CONFIG, default_is_base=switch)
    async with client_of(await app_with(engine, config=config)) as client:
        answer = await client.post(COMPLETIONS, json={**BODY, "model": "default"})
        card = await client.get("/v1/models/default")
        taken = await client.post(
            "/v1/load_lora_adapter", json={"lora_name": "default", "lora_path": "/a"}
        )
    if switch:
        assert (answer.json()["model"], card.json()["id"]) == (BASE, BASE)
        assert taken.status_code == 400
    else:
        assert (answer.status_code, card.status_code, taken.status_code) == (404, 404, 200)
