"""Adapters in S3, for which moto stands: named by URL, and found by name under a prefix."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from cluster.config import FleetConfig
from replica.api.server import build_app
from replica.serving.local_catalog import LocalCatalog
from tests.serving import CONFIG, client_of
from tests.serving import text as tokenizer
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine

PREFIX = "s3://bucket/adapters"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A bucket with the adapters `mine` and `broken` under a prefix."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in Path(write_adapter(tmp_path / "mine")).iterdir():
        client.upload_file(str(path), "bucket", f"adapters/mine/{path.name}")
    client.put_object(Bucket="bucket", Key="adapters/broken/adapter_config.json", Body=b"[]")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def catalog(tmp_path: Path, engine: StubEngine, **settings: Any) -> LocalCatalog:
    model = settled_config(write_model_config(tmp_path / "base"))
    return LocalCatalog(engine, FleetConfig(model, directory=str(tmp_path / "fleet"), **settings))


async def ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "hello", "max_tokens": 2}
    return await client.post("/v1/completions", json=body)


@pytest.mark.usefixtures("bucket")
async def test_an_adapter_is_loaded_by_its_url(tmp_path: Path) -> None:
    engine = StubEngine()
    adapters = catalog(tmp_path, engine, adapter_roots=(PREFIX,))
    async with client_of(build_app(engine, adapters, tokenizer(), CONFIG)) as client:
        for path, status, said in (
            (f"{PREFIX}/mine", 200, "added successfully"),
            (f"{PREFIX}/none", 400, "not found"),
            (f"{PREFIX}/../mine", 400, "outside the allowed adapter roots"),
            ("s3://other/mine", 400, "outside the allowed adapter roots"),
        ):
            name = path.rpartition("/")[2]
            answer = await client.post(
                "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}
            )
            assert (answer.status_code, said in answer.text) == (status, True), answer.text
        assert (await ask(client, "mine")).status_code == 200
    (version,) = adapters.versions()
    kept = tmp_path / "fleet" / "adapters" / version.digest
    for path in (tmp_path / "mine").iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("bucket")
async def test_many_who_ask_for_a_name_under_a_prefix_cause_one_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    get = s3fs.S3FileSystem._get_file

    async def counted(self: Any, source: str, *rest: Any, **options: Any) -> Any:
        fetched.append(source)
        return await get(self, source, *rest, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", counted)
    engine = StubEngine()
    adapters = catalog(tmp_path, engine, adapter_sources=(PREFIX,))
    async with client_of(build_app(engine, adapters, tokenizer(), CONFIG)) as client:
        answers = await asyncio.gather(*(ask(client, "mine") for _ in range(50)))
        assert {answer.status_code for answer in answers} == {200}
        mine = [source for source in fetched if "/mine/" in source]
        assert sorted(Path(source).name for source in mine) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert (await ask(client, "unknown")).status_code == 404
        broken = await ask(client, "broken")
        assert (broken.status_code, broken.json()["error"]["param"]) == (400, "model")
    assert [version.name for version in adapters.versions()] == ["mine"]
