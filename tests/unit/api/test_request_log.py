"""The log of requests: a line each, whatever becomes of it, and never its text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, QueueFull
from replica.api.access import Rules
from replica.api.request_log import RequestLog
from tests.serving import ADAPTER, BASE, CONFIG, app_with, client_of
from tests.stub_engine import StubEngine

SECRET = "nobody may read this"
COMPLETIONS = "/v1/completions"


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert SECRET not in text
    return [json.loads(line) for line in text.splitlines()]


async def test_what_ran_is_logged_with_its_cost(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    config = replace(CONFIG, request_log=str(path))
    async with client_of(await app_with(StubEngine(), config=config)) as client:
        for stream in (False, True):
            body = {"model": ADAPTER.name, "prompt": SECRET, "max_tokens": 3, "n": 2}
            answer = await client.post(COMPLETIONS, json={**body, "stream": stream})
            assert answer.status_code == 200
        await client.get("/v1/models")
    whole, streamed = lines(path)
    assert answer.text.startswith(f'data: {{"id":"{streamed["id"]}"')
    for entry in (whole, streamed):
        assert (entry["status"], entry["code"], entry["key"]) == (200, None, None)
        assert (entry["model"], entry["adapter"]) == (ADAPTER.name, ADAPTER.digest)
        assert (entry["prompt_tokens"], entry["completion_tokens"]) == (20, 6)
        assert entry["finish"] == ["length", "length"]
        assert 0 <= entry["ttft_s"] <= entry["took_s"]
        assert (entry["path"], entry["replica"]) == (COMPLETIONS, "r-1")
    assert path.stat().st_mode & 0o777 == 0o600


async def test_what_is_refused_is_logged_with_the_reason(tmp_path: Path) -> None:
    path, engine = tmp_path / "requests", StubEngine()
    rules = Rules(api_keys=("sk-one", "sk-two"), admin_keys=("sk-admin",), operator_key="sk-own")
    config = replace(CONFIG, request_log=str(path), rules=rules)
    async with client_of(await app_with(engine, config=config)) as client:
        engine.fail = QueueFull("full")
        for key, model in (("", BASE), ("sk-two", "no"), ("sk-admin", BASE), ("sk-own", BASE)):
            headers = {"authorization": f"Bearer {key}"}
            await client.post(COMPLETIONS, json={"model": model, "prompt": SECRET}, headers=headers)
    found = [(entry["status"], entry["code"], entry["key"]) for entry in lines(path)]
    assert found == [
        (401, "invalid_api_key", None),
        (404, "model_not_found", "api_keys[1]"),
        (429, "queue_full", "admin_keys[0]"),
        (429, "queue_full", "operator"),
    ]
    assert lines(path)[2]["finish"] == ["abort"]


async def test_a_long_path_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    config = replace(CONFIG, request_log=str(path))
    async with client_of(await app_with(StubEngine(), config=config)) as client:
        await client.post("/" + "x" * 60_000)
    (entry,) = lines(path)
    assert entry["path"] == "/" + "x" * 255


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"request_log: .*No such file"):
        RequestLog(str(tmp_path / "no" / "file"), "r")
