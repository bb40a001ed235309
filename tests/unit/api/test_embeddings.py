"""POST /v1/embeddings, as OpenAI's and vLLM's clients use it."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI

from replica.api.openai_protocol import CHOICES_MAX
from replica.api.text import INLINE_CHARACTERS, Text
from tests.serving import ADAPTER, BASE, app_with, client_of, live, text
from tests.stub_engine import StubEngine


def unit(*values: float) -> list[float]:
    """The stub's states begin with the length of the prompt and its first token."""
    return (np.array(values) / np.linalg.norm(values)).tolist()


async def post(engine: StubEngine, **fields: Any) -> httpx.Response:
    async with client_of(await app_with(engine)) as client:
        return await client.post("/v1/embeddings", json={"model": BASE, **fields})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("ab", [(2, text().word_tokens("a")[0])]),
        (["ab", "c"], [(2, text().word_tokens("a")[0]), (1, text().word_tokens("c")[0])]),
        ([7, 8, 9], [(3, 7)]),
        ([[7, 8], [9]], [(2, 7), (1, 9)]),
    ],
)
async def test_each_input_has_one_of_length_1(given: Any, wanted: list[tuple[int, int]]) -> None:
    engine = StubEngine()
    body = (await post(engine, input=given)).json()
    for entry, (length, first) in zip(body["data"], wanted, strict=True):
        assert entry["object"] == "embedding"
        assert entry["embedding"] == pytest.approx(unit(length, first, -3, 0), abs=1e-6)
    assert [entry["index"] for entry in body["data"]] == list(range(len(wanted)))
    tokens = sum(length for length, _ in wanted)
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert all(r.sampling.embeds and r.sampling.max_tokens == 1 for r in engine.seen)


async def test_fewer_dimensions_have_length_1_again() -> None:
    body = (await post(StubEngine(), input=[7, 8, 9], dimensions=2)).json()
    assert body["data"][0]["embedding"] == pytest.approx(unit(3, 7), abs=1e-6)


async def test_base64_is_float32_in_little_endian() -> None:
    body = (await post(StubEngine(), input=[7], encoding_format="base64")).json()
    found = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    assert found.tolist() == pytest.approx(unit(1, 7, -3, 0), abs=1e-6)


async def test_openais_client_gets_an_adapters_embeddings() -> None:
    engine = StubEngine()
    async with (
        live(await app_with(engine)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        found = await client.embeddings.create(model="poet", input=["a", "b"])
    assert found.model == "poet" and len(found.data[1].embedding) == 4
    assert {request.digest for request in engine.seen} == {ADAPTER.digest}


async def test_many_inputs_run_a_batch_at_a_time() -> None:
    engine = StubEngine(queue_max=CHOICES_MAX)
    count = 2 * CHOICES_MAX + 3
    body = (await post(engine, input=[[5 + i % 300, 6] for i in range(count)])).json()
    assert [entry["index"] for entry in body["data"]] == list(range(count))
    for i, entry in enumerate(body["data"]):
        assert entry["embedding"] == pytest.approx(unit(2, 5 + i % 300, -3, 0), abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "empty"),
        ({"input": [7, 320]}, "input", "320"),
        ({"input": 5}, "input", "5"),
        ({"input": ["a"] * 2049}, "input", "2049"),
        ({"input": "x" * 200}, "input", "128"),
        ({"input": "a", "dimensions": 0}, "dimensions", "0"),
        ({"input": "a", "dimensions": 5}, "dimensions", "5"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
        ({"input": "a", "normalize": False}, "normalize", "false"),
        ({"input": "a", "stream": True}, "stream", "true"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_input_is_named(fields: dict[str, Any], field: str, word: str) -> None:
    answer = await post(StubEngine(), **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field and error["message"].startswith(field)
    assert word in error["message"]


async def test_long_inputs_together_are_tokenized_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    encode = Text.encode

    async def noted(self: Text, given: str, **options: Any) -> tuple[int, ...]:
        asked.append(options["among_many"])
        return await encode(self, given, **options)

    monkeypatch.setattr(Text, "encode", noted)
    app = await app_with(StubEngine())
    async with client_of(app) as client:
        for length in (4, INLINE_CHARACTERS // 2 + 1):
            body = {"model": BASE, "input": ["a" * length] * 2, "truncate_prompt_tokens": 1}
            answer = await client.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
    assert asked == [False, False, True, True]
