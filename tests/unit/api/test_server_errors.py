"""Bad input and failures: the status, code, field and message of each answer."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.errors import (
    AdapterFailed,
    AdapterRefused,
    BadRequest,
    CatalogUnavailable,
    EngineFailed,
    EngineGone,
    FleetError,
    LogitsNotFinite,
    QueueFull,
)
from cluster.values import LoadReport
from replica.api.access import Rules
from replica.api.openai_protocol import UNSUPPORTED
from tests.serving import ADAPTER, BASE, CONFIG, Book, app_with, client_of, live
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S, until

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": BASE, **HELLO, **fields}
    return CHAT, {key: value for key, value in body.items() if value is not ...}


def plain(**fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": BASE, "prompt": "hi", **fields}
    return PLAIN, {key: value for key, value in body.items() if value is not ...}


# (path, body), status, code, field, words of the message.
BAD: list[tuple[tuple[str, Any], int, str, str | None, list[str]]] = [
    # Unknown model
    (chat(model="nobody"), 404, "model_not_found", "model", ["nobody"]),
    (plain(model="nobody"), 404, "model_not_found", "model", ["nobody"]),
    (chat(lora_path="nobody"), 404, "model_not_found", "model", ["nobody"]),
    (chat(model="poet", lora_path="x"), 400, "invalid_value", "lora_path", ["poet", "x"]),
    (chat(model=""), 400, "invalid_value", "model", ["model"]),
    (chat(model=7), 400, "invalid_value", "model", ["model", "7"]),
    # Wrong types
    ((CHAT, [1, 2]), 400, "invalid_value", None, ["not a JSON object", "[1,2]"]),
    (chat(messages=...), 400, "invalid_value", "messages", ["messages: required"]),
    (chat(messages="hi"), 400, "invalid_value", "messages", ["messages", '"hi"']),
    (chat(messages=[]), 400, "invalid_value", "messages", ["messages", "[]"]),
    (chat(messages=["hi"]), 400, "invalid_value", "messages[0]", ["messages[0]", '"hi"']),
    (chat(messages=[{}]), 400, "invalid_value", "messages[0].role", ["null"]),
    (
        chat(messages=[{"role": "user", "content": 5}]),
        400,
        "invalid_value",
        "messages[0].content",
        ["messages[0].content", "5"],
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        400,
        "invalid_value",
        "messages[0].content[0].type",
        ["only text", "image_url"],
    ),
    (plain(prompt=...), 400, "invalid_value", "prompt", ["prompt: required"]),
    (plain(prompt=5), 400, "invalid_value", "prompt", ["prompt", "5"]),
    (plain(prompt=[1, "a"]), 400, "invalid_value", "prompt", ["prompt", '[1,"a"]']),
    (plain(prompt=[1.5]), 400, "invalid_value", "prompt", ["[1.5]"]),
    (plain(prompt=[[1], [True]]), 400, "invalid_value", "prompt", ["true"]),
    (chat(temperature="hot"), 400, "invalid_value", "temperature", ['"hot"']),
    (chat(stream="perhaps"), 400, "invalid_value", "stream", ['"perhaps"']),
    (chat(stop=5), 400, "invalid_value", "stop", ["5"]),
    (chat(stop=["a", 5]), 400, "invalid_value", "stop[1]", ["5"]),
    (chat(stop=""), 400, "invalid_value", "stop[0]", ['""']),
    (chat(stop=["x"] * 33), 400, "invalid_value", "stop", ["32"]),
    (chat(max_tokens=1.5), 400, "invalid_value", "max_tokens", ["1.5"]),
    (chat(seed=2**63), 400, "invalid_value", "seed", [str(2**63)]),
    (chat(stream=True, stream_options=5), 400, "invalid_value", "stream_options", ["5"]),
    (chat(stream_options={}), 400, "invalid_value", "stream_options", ["stream: true"]),
    # Out of range
    (chat(temperature="inf"), 400, "invalid_value", "temperature", ['"inf"']),
    (chat(min_p=1.5), 400, "invalid_value", "min_p", ["1.5"]),
    (chat(presence_penalty=2.5), 400, "invalid_value", "presence_penalty", ["2.5"]),
    (chat(frequency_penalty=-3), 400, "invalid_value", "frequency_penalty", ["-3"]),
    (chat(repetition_penalty=0.009), 400, "invalid_value", "repetition_penalty", ["0.01", "0.009"]),
    (chat(logit_bias={"320": 1}), 400, "invalid_value", "logit_bias", ['"320"', "319"]),
    (chat(logit_bias={"x": 1}), 400, "invalid_value", "logit_bias", ['"x"']),
    (chat(logit_bias={"005": 1}), 400, "invalid_value", "logit_bias", ['"005"']),
    (chat(logit_bias={"1" * 5000: 1}), 400, "invalid_value", "logit_bias", ["319"]),
    (chat(stop=["a" * 8192, "b"]), 400, "invalid_value", "stop", ["8193", "8192"]),
    (chat(bad_words=["a" * 8192]), 400, "invalid_value", "bad_words", ["8193", "8192"]),
    (chat(allowed_token_ids=[]), 400, "invalid_value", "allowed_token_ids", ["[]"]),
    (chat(allowed_token_ids=[320]), 400, "invalid_value", "allowed_token_ids", ["320", "319"]),
    (chat(bad_words=[""]), 400, "invalid_value", "bad_words[0]", ['""']),
    (chat(truncate_prompt_tokens=-2), 400, "invalid_value", "truncate_prompt_tokens", ["-2"]),
    (chat(temperature=-1), 400, "invalid_value", "temperature", ["-1"]),
    (chat(top_p=0), 400, "invalid_value", "top_p", ["0"]),
    (chat(top_p=1.01), 400, "invalid_value", "top_p", ["1.01"]),
    (chat(top_k=-2), 400, "invalid_value", "top_k", ["-2"]),
    (chat(n=0), 400, "invalid_value", "n", ["0"]),
    (chat(n=1000), 400, "invalid_value", "n", ["1000"]),
    (plain(n=100, prompt=["a", "b"]), 400, "invalid_value", "n", ["200", "128"]),
    (chat(max_tokens=0), 400, "invalid_value", "max_tokens", ["0"]),
    (chat(max_completion_tokens=-1), 400, "invalid_value", "max_completion_tokens", ["-1"]),
    (chat(min_tokens=-1), 400, "invalid_value", "min_tokens", ["-1"]),
    (chat(min_tokens=9, max_tokens=8), 400, "invalid_value", "min_tokens", ["9", "8"]),
    (chat(logprobs=True, top_logprobs=21), 400, "invalid_value", "top_logprobs", ["21"]),
    (chat(top_logprobs=2), 400, "invalid_value", "top_logprobs", ["logprobs: true"]),
    (plain(logprobs=21), 400, "invalid_value", "logprobs", ["21"]),
    (plain(max_tokens=0), 400, "invalid_value", "max_tokens", ["0", "echo"]),
    (plain(prompt_logprobs=21), 400, "invalid_value", "prompt_logprobs", ["21"]),
    (chat(prompt_logprobs=-1), 400, "invalid_value", "prompt_logprobs", ["-1"]),
    (chat(prompt_logprobs=1, stream=True), 400, "invalid_value", "prompt_logprobs", ["stream"]),
    (plain(best_of=0), 400, "invalid_value", "best_of", ["0"]),
    (plain(best_of=2, n=3), 400, "invalid_value", "best_of", ["2", "3"]),
    (plain(best_of=2, stream=True), 400, "invalid_value", "best_of", ["2", "stream"]),
    (plain(best_of=65, prompt=["a", "b"]), 400, "invalid_value", "best_of", ["130", "128"]),
    (chat(echo=True), 400, "invalid_value", "echo", ["echo"]),
    (chat(stop_token_ids=[320]), 400, "invalid_value", "stop_token_ids", ["320", "319"]),
    (chat(chat_template_kwargs={"tokenize": 1}), 400, "invalid_value", ..., ["tokenize"]),
    # Empty prompts, ids outside the vocabulary
    (plain(prompt=""), 400, "invalid_value", "prompt", ["empty"]),
    (plain(prompt=[]), 400, "invalid_value", "prompt", ["empty"]),
    (plain(prompt=[[]]), 400, "invalid_value", "prompt", ["empty"]),
    (plain(prompt=["a", ""]), 400, "invalid_value", "prompt", ["empty"]),
    (plain(prompt=[7, 320]), 400, "invalid_value", "prompt", ["prompt[1]", "320", "319"]),
    (plain(prompt=[[7, -1]]), 400, "invalid_value", "prompt", ["prompt[1]", "-1"]),
    (plain(prompt=[2**63]), 400, "invalid_value", "prompt", ["prompt[0]", str(2**63)]),
    # Over the context
    (plain(max_tokens=127), 400, "context_length_exceeded", "prompt", ["2", "127", "129", "128"]),
    (chat(max_tokens=123), 400, "context_length_exceeded", "messages", ["6", "123", "128"]),
    (plain(prompt="x" * 128), 400, "context_length_exceeded", "prompt", ["128 tokens"]),
    (plain(prompt="x" * 10**6), 400, "context_length_exceeded", "prompt", ["at least", "128"]),
]


@pytest.mark.parametrize(
    ("sent", "status", "code", "field", "words"), BAD, ids=[str(row[0][1])[:60] for row in BAD]
)
async def test_bad_input(
    sent: tuple[str, Any], status: int, code: str, field: str | None, words: list[str]
) -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(sent[0], json=sent[1])
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert field is ... or error["param"] == field
    for word in words:
        assert word in error["message"]
    assert engine.seen == []  # The request did not reach the engine.


VALUES: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "best_of": 3,
    "suffix": "end",
}


@pytest.mark.parametrize("field", UNSUPPORTED)
async def test_an_unsupported_field_is_refused_by_name(field: str) -> None:
    path, body = chat(**{field: VALUES.get(field, "something")})
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: not supported (got ")


async def test_fields_without_effect_are_tolerated() -> None:
    neutral = {field: values[0] for field, values in UNSUPPORTED.items() if values}
    path, body = chat(
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=True,
        spaces_between_special_tokens=False,
        never_heard_of=1,
        max_tokens=2,
        temperature=None,
        stop=None,
        **neutral,
    )
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a": NaN}', b"[" * 5000])
async def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post(CHAT, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not valid JSON: ")


async def test_a_model_without_a_chat_template_says_so() -> None:
    from replica.api.server import build_app
    from tests.unit.api.test_text import spaced_text

    app = build_app(StubEngine(), Book(), spaced_text(), CONFIG)
    path, body = chat()
    async with client_of(app) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


@pytest.mark.parametrize("size", [1001, 100_000])
async def test_an_oversized_body_gets_413(size: int) -> None:
    """Over a real connection: the client must be able to read the answer while it still sends."""
    app = await app_with(StubEngine(), config=replace(CONFIG, body_bytes_max=1000))
    async with live(app) as url, httpx.AsyncClient() as client:
        answer = await client.post(url + CHAT, content=b"x" * size)
        assert answer.status_code == 413
        assert "1000" in answer.json()["error"]["message"]
        path, body = chat()
        assert (await client.post(url + path, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/nowhere", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
    ],
)
async def test_unknown_routes(method: str, path: str, status: int, code: str) -> None:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


FAILURES = [
    (QueueFull("1024 requests are waiting", retry_after_s=2.5), 429, "3"),
    (AdapterFailed("poet: its files are gone", field="model", retry_after_s=0.2), 503, "1"),
    (EngineGone("the engine's process is gone"), 502, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("error", "status", "retry_after"), FAILURES)
async def test_an_error_before_the_first_token_has_its_status(
    error: FleetError, status: int, retry_after: str | None, n: int, stream: bool
) -> None:
    engine = StubEngine()
    engine.fail = error
    path, body = chat(stream=stream, n=n)
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert answer.json()["error"] == {
        "message": error.message,
        "type": error.type,
        "param": error.field,
        "code": error.code,
    }
    assert engine.running == {}


@pytest.mark.parametrize("fail_after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_logits_that_are_not_finite_are_a_server_error_that_names_the_adapter(
    stream: bool, fail_after: int
) -> None:
    engine = StubEngine()
    engine.fail, engine.fail_after = LogitsNotFinite("the logits are not finite"), fail_after
    path, body = chat(model=ADAPTER.name, stream=stream)
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == (200 if stream and fail_after else 500)
    last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"] == {
        "message": f"{ADAPTER.name}: the logits are not finite",
        "type": "server_error",
        "param": "model",
        "code": "logits_not_finite",
    }


async def test_a_full_engine_queue_gets_429() -> None:
    engine = StubEngine(queue_max=1)
    engine.hold = True
    path, body = chat(max_tokens=2)
    async with client_of(await app_with(engine)) as client:
        first = asyncio.create_task(client.post(path, json=body))
        await until(lambda: len(engine.running) == 1)
        second = await client.post(path, json=body)
        engine.hold = False
        assert (await first).status_code == 200
    assert second.status_code == 429
    assert second.headers["retry-after"] == "1"


@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_in_mid_stream_is_the_last_event(n: int) -> None:
    engine = StubEngine()
    engine.fail, engine.fail_after = EngineFailed("the engine's process died"), 2
    path, body = chat(stream=True, n=n)
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert '"content"' in events[-2]
    assert events[-1].startswith('data: {"error":{"message":"the engine\'s process died"')
    assert engine.running == {}
    assert len(engine.ended) == n


async def test_an_internal_error_gets_500_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = StubEngine()
    app = await app_with(engine)
    path, body = chat()
    engine.generate = None  # type: ignore[method-assign, assignment]
    async with client_of(app) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "NoneType" in caplog.text
    assert "NoneType" not in answer.text


async def test_while_shutting_down_new_requests_are_refused_and_running_ones_finish() -> None:
    engine = StubEngine()
    engine.hold = True
    app = await app_with(engine)
    path, body = chat(max_tokens=3)
    async with client_of(app) as client:
        running = asyncio.create_task(client.post(path, json=body))
        await until(lambda: len(engine.running) == 1)
        app.close()
        late = await client.post(path, json=body)
        health = await client.get("/health")
        drained = asyncio.create_task(asyncio.wait_for(app.drained(), TIMEOUT_S))
        engine.hold = False
        assert (await running).status_code == 200
        await drained
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert late.headers["retry-after"] == "1"
    assert health.status_code == 503
    assert app.active == 0


async def test_health_follows_the_engine() -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        assert (await client.get("/health")).status_code == 200
        await engine.stop()
        answer = await client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_failed"


async def test_an_engine_that_stalls_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        monkeypatch.setattr(engine, "report", lambda: LoadReport(stalled=1))
        assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nowhere", "/v1/adapters"])
async def test_without_the_right_key_everything_under_v1_is_401(
    headers: dict[str, str], path: str
) -> None:
    app = await app_with(StubEngine(), config=replace(CONFIG, rules=Rules(("right", "other"))))
    async with client_of(app) as client:
        answer = await client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/health")).status_code == 200
        allowed = await client.get("/v1/models", headers={"authorization": "Bearer other"})
        assert allowed.status_code == 200


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (AdapterRefused("lora_path: rank 512 is over 256", field="lora_path"), 400),
        (BadRequest("lora_path: outside the allowed roots", field="lora_path"), 400),
        (CatalogUnavailable("Redis cannot be reached"), 503),
    ],
)
async def test_a_refused_adapter_is_not_registered(refusal: FleetError, status: int) -> None:
    book = Book()
    book.refusal = refusal
    async with client_of(await app_with(StubEngine(), book)) as client:
        answer = await client.post(
            "/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "/a"}
        )
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == refusal.message
    assert answer.json()["error"]["param"] == refusal.field
    assert book.versions() == []


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "a"}, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_path": "a"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "", "lora_path": "a"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": BASE, "lora_path": "a"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "poet", "lora_path": "a"}, "lora_name"),
        ("/v1/load_lora_adapters", {}, "adapters"),
        ("/v1/load_lora_adapters", {"adapters": []}, "adapters"),
        ("/v1/load_lora_adapters", {"adapters": [{"lora_name": "b"}]}, "adapters[0].lora_path"),
        (
            "/v1/load_lora_adapters",
            {"adapters": [{"lora_name": "b", "lora_path": "/a"}] * 1025},
            "adapters",
        ),
        (
            "/v1/load_lora_adapters",
            {"adapters": [{"lora_name": BASE, "lora_path": "/a"}]},
            "lora_name",
        ),
        ("/v1/unload_lora_adapter", {}, "lora_name"),
        ("/v1/unload_lora_adapter", {"lora_name": BASE}, "lora_name"),
    ],
)
async def test_bad_adapter_requests(path: str, body: dict[str, Any], field: str) -> None:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", "0"),
        ("weight", "-0.5"),
        ("weight", "-1e+300"),
        ("weight", "1e-7"),
        ("weight", "10000000.0"),
        ("weight", '"2"'),
        ("weight", "null"),
        ("pinned", "1"),
        ("pinned", '"yes"'),
    ],
)
async def test_a_wrong_weight_or_pin_is_named_with_its_value(field: str, value: str) -> None:
    book = Book()
    body = f'{{"lora_name": "a", "lora_path": "/a", "{field}": {value}}}'
    async with client_of(await app_with(StubEngine(), book)) as client:
        answer = await client.post(
            "/v1/load_lora_adapter",
            content=body.encode(),
            headers={"content-type": "application/json"},
        )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(f"{field}: "), error
    assert f"(got {value})" in error["message"], error
    assert book.versions() == []


@pytest.mark.parametrize("field", ["model", "stop", "logit_bias", "tools"])
@pytest.mark.parametrize("depth", [200, 300, 1000, 1100])
async def test_deep_nesting_gets_400(field: str, depth: int) -> None:
    body = b'{"model": "tiny", "%s": %b%b}' % (field.encode(), b"[" * depth, b"]" * depth)
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400, answer.text
