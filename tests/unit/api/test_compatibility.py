"""What users of vLLM and SGLang send, and the small endpoints that they call."""

import threading
from typing import Any

import pytest

from replica.api.text import Text
from tests.serving import ADAPTER, BASE, CONFIG, app_with, client_of, text
from tests.stub_engine import StubEngine


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({}, None),
        ({"model": None}, None),
        ({"lora_path": ADAPTER.name}, ADAPTER.digest),
        ({"model": BASE, "lora_path": ADAPTER.name}, ADAPTER.digest),
        ({"model": ADAPTER.name, "lora_path": ADAPTER.name}, ADAPTER.digest),
        ({"model": f"{BASE}:{ADAPTER.name}"}, ADAPTER.digest),
        ({"model": BASE, "lora_path": None}, None),
    ],
)
async def test_each_way_to_name_a_model(fields: dict[str, Any], digest: str | None) -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        for path, prompt in (("/v1/completions", "prompt"), ("/v1/responses", "input")):
            answer = await client.post(path, json={prompt: "a", **fields})
            assert answer.status_code == 200, answer.text
            assert engine.seen[-1].digest == digest
            assert answer.json()["model"] == (BASE if digest is None else ADAPTER.name)


@pytest.mark.parametrize("field", ["adapter_id", "adapter_source", "lora_name", "lora_request"])
async def test_an_adapter_named_in_another_servers_way_is_not_answered_by_the_base(
    field: str,
) -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        for path, prompt in (("/v1/completions", "prompt"), ("/v1/responses", "input")):
            answer = await client.post(path, json={"model": BASE, prompt: "a", field: "poet"})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == field
    assert engine.seen == []


async def test_texts_become_tokens_and_tokens_texts() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        body: dict[str, Any] = {"prompt": "häi", "return_token_strs": True}
        answer = (await client.post("/tokenize", json=body)).json()
        assert answer["tokens"] == list(await text().encode("häi"))
        assert (answer["count"], answer["max_model_len"]) == (4, CONFIG.context)
        assert (answer["token_strs"][0], len(answer["token_strs"])) == ("h", 4)
        back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
        assert back.json() == {"prompt": "häi"}
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        answer = (await client.post("/tokenize", json=chat)).json()
        assert text().decode(answer["tokens"], skip_special_tokens=False) == (
            "<|begin|><|user|>hi<|end|><|assistant|>"
        )
        for path, bad, field in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {**body, **chat}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/tokenize", {"prompt": "x" * (8 * CONFIG.context + 1)}, "prompt"),
            ("/detokenize", {"tokens": [320]}, "tokens"),
            ("/detokenize", {}, "tokens"),
        ):
            refused = await client.post(path, json=bad)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


async def test_the_names_of_many_tokens_do_not_stall_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = set[int]()

    def token_bytes(self: Text, token: int) -> bytes:
        threads.add(threading.get_ident())
        return b"x"

    monkeypatch.setattr(Text, "token_bytes", token_bytes)
    async with client_of(await app_with(StubEngine())) as client:
        body = {"prompt": "x" * 8 * CONFIG.context, "return_token_strs": True}
        answer = await client.post("/tokenize", json=body)
    assert answer.json()["token_strs"] == ["x"] * 8 * CONFIG.context
    assert threads and threading.get_ident() not in threads


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/health_generate", "/version"])
async def test_probes_answer(path: str) -> None:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.get(path)
    assert answer.status_code == 200
    assert path != "/version" or answer.json()["version"]


async def test_a_replica_whose_engine_has_ended_is_alive_but_not_ready() -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        await engine.stop()
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503


async def test_sglangs_paths_change_adapters() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        body = {"lora_name": "new", "lora_path": "/a"}
        assert (await client.post("/load_lora_adapter", json=body)).status_code == 200
        names = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        assert "new" in names
        gone = await client.post("/unload_lora_adapter", json={"lora_name": "new"})
        assert gone.status_code == 200
