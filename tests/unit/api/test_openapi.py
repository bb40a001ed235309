"""The document of the API: whole, valid, and true to the types that parse requests."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from replica.api.openai_protocol import ChatRequest
from tests.serving import app_with, client_of
from tests.stub_engine import StubEngine


async def document() -> dict[str, Any]:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


async def test_every_route_is_in_it() -> None:
    paths = (await document())["paths"]
    assert {"/v1/chat/completions", "/v1/models/{name}", "/metrics", "/docs"} <= paths.keys()
    assert set(paths["/ping"]) == {"get", "post"}
    for path, operations in paths.items():
        for said in operations.values():
            assert said["summary"]
            assert {"200", "500"} <= said["responses"].keys(), path


async def test_fields_are_those_that_are_parsed() -> None:
    schemas = (await document())["components"]["schemas"]
    chat = schemas["ChatRequest"]
    assert chat["properties"].keys() == ChatRequest.model_fields.keys()
    assert chat["required"] == ["messages"]
    assert "best_of" not in chat["properties"] and "suffix" in chat["description"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


async def test_adapters_are_loaded_from_paths_and_from_forms() -> None:
    said = await document()
    content = said["paths"]["/v1/load_lora_adapter"]["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json", "multipart/form-data"}
    form = said["components"]["schemas"]["UploadAdapterRequest"]
    assert content["multipart/form-data"]["schema"]["$ref"].endswith("/UploadAdapterRequest")
    assert form["required"] == ["lora_name", "files"]
    assert form["properties"]["files"]["items"] == {"type": "string", "format": "binary"}
    assert not any(path.startswith("/internal") for path in said["paths"])


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("prompt", ["a", ["a"], [1], [[1]]], [1, {}]),
        ("stop", ["a", ["a"], None], [1, [""]]),
        ("temperature", [0, 0.5, None], [-1, "warm"]),
    ],
)
async def test_a_field_takes_in_the_document_what_it_takes(
    field: str, good: list[Any], bad: list[Any]
) -> None:
    schemas = (await document())["components"]["schemas"]
    validator = Draft202012Validator(schemas["CompletionRequest"]["properties"][field])
    assert all(map(validator.is_valid, good))
    assert not any(map(validator.is_valid, bad))


async def test_errors_have_the_shape_that_it_names() -> None:
    said = await document()
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post("/v1/completions", json={"prompt": "a", "temperature": -1})
    operation = said["paths"]["/v1/completions"]["post"]
    assert str(answer.status_code) in operation["responses"]
    Draft202012Validator(said["components"]["schemas"]["Error"]).validate(answer.json())


async def test_its_page_needs_nothing_from_elsewhere() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        page = (await client.get("/docs")).text
    assert "POST /v1/chat/completions" in page
    assert "<b><code>messages</code>" in page
    assert "number &gt;= 0 | null" in page
    assert "http:" not in page and "https:" not in page and "<script" not in page
