"""The local catalog answers as a fleet's catalog does, without Redis."""

import asyncio
import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.config import FleetConfig
from cluster.errors import AdapterRefused, BadRequest, ConfigError, ModelNotFound
from cluster.values import Version
from replica.api.server import build_app
from replica.api.text import INLINE_CHARACTERS, Text
from replica.serving.local_catalog import LocalCatalog
from tests.serving import CONFIG, client_of
from tests.serving import text as tokenizer
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S, until


@pytest.fixture
def config(tmp_path: Path) -> FleetConfig:
    engine = settled_config(write_model_config(tmp_path / "base"))
    roots = (str(tmp_path / "adapters"),)
    return FleetConfig(engine=engine, adapter_roots=roots, directory=str(tmp_path / "fleet"))


async def test_adapters_come_and_go(config: FleetConfig, tmp_path: Path) -> None:
    engine = StubEngine()
    adapters = LocalCatalog(engine, config)
    done = await adapters.add("a", write_adapter(tmp_path / "adapters" / "a"))
    assert (done.name, done.sequence, done.pending) == ("a", 1, ())
    version = await adapters.find("a")
    assert version is not None and version.digest == done.digest
    assert adapters.versions() == [version]
    assert [entry.digest for entry in engine.adapter_states()] == [done.digest]
    assert (await adapters.remove("a")).digest == done.digest
    assert (await adapters.find("a"), adapters.versions(), engine.adapter_states()) == (
        None,
        [],
        [],
    )
    with pytest.raises(ModelNotFound):
        await adapters.remove("a")


async def test_files_that_are_slow_to_come_hold_up_no_other_change(
    config: FleetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = LocalCatalog(StubEngine(), config)
    slow, others = (write_adapter(tmp_path / "adapters" / name) for name in ("slow", "other"))
    begun, go_on, add = threading.Event(), threading.Event(), adapters._validation.store.add

    def held(uri: str) -> Any:
        if uri == slow:
            begun.set()
            assert go_on.wait(TIMEOUT_S)
        return add(uri)

    monkeypatch.setattr(adapters._validation.store, "add", held)
    adding = asyncio.create_task(adapters.add("slow", slow))
    assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
    async with asyncio.timeout(TIMEOUT_S / 2):
        await adapters.add("other", others)
        await adapters.remove("other")
    go_on.set()
    await adding
    assert [version.name for version in adapters.versions()] == ["slow"]


async def test_configured_adapters_are_added_at_start(config: FleetConfig, tmp_path: Path) -> None:
    flags = {"a": write_adapter(tmp_path / "outside")}
    adapters = LocalCatalog(StubEngine(), dataclasses.replace(config, adapters=flags))
    await adapters.start()
    assert [version.name for version in adapters.versions()] == ["a"]
    bad = dataclasses.replace(config, adapters={"b": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match=r"adapters\.b"):
        await LocalCatalog(StubEngine(), bad).start()


async def test_a_refused_adapter_changes_nothing(config: FleetConfig, tmp_path: Path) -> None:
    engine = StubEngine()
    adapters = LocalCatalog(engine, config)
    inside = write_adapter(tmp_path / "adapters" / "a")
    outside = write_adapter(tmp_path / "outside")
    with pytest.raises(BadRequest, match="outside the allowed adapter roots") as caught:
        await adapters.add("a", outside)
    assert caught.value.field == "lora_path"
    with pytest.raises(BadRequest) as caught:
        await adapters.add("base", inside)
    assert caught.value.field == "lora_name"
    with pytest.raises(AdapterRefused):
        await adapters.add("a", str(tmp_path / "adapters" / "nothing"))
    assert (adapters.versions(), engine.adapter_states()) == ([], [])


async def test_a_name_is_re_pointed_only_with_load_inplace(
    config: FleetConfig, tmp_path: Path
) -> None:
    engine = StubEngine()
    adapters = LocalCatalog(engine, config)
    old = await adapters.add("a", write_adapter(tmp_path / "adapters" / "a"))
    path = write_adapter(tmp_path / "adapters" / "b", seed=1)
    with pytest.raises(BadRequest, match="already loaded"):
        await adapters.add("a", path)
    new = await adapters.add("a", path, load_inplace=True)
    assert new.digest != old.digest
    assert [entry.digest for entry in engine.adapter_states()] == [new.digest]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
async def test_a_request_keeps_the_version_it_resolved_while_it_is_tokenized(
    config: FleetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, n: int
) -> None:
    engine, adapters, (old, new) = await catalog_with_two(config, tmp_path)
    begun, gate, encode = asyncio.Event(), asyncio.Event(), Text.encode

    async def gated(self: Text, text: str, **options: bool) -> tuple[int, ...]:
        begun.set()
        await gate.wait()
        return await encode(self, text, **options)

    monkeypatch.setattr(Text, "encode", gated)
    app = build_app(engine, adapters, tokenizer(), dataclasses.replace(CONFIG, context=10**5))
    prompt = "x" * (INLINE_CHARACTERS + 1)
    body = {"model": "a", "prompt": prompt, "messages": [{"role": "user", "content": prompt}]}
    body |= {"max_tokens": 2, "n": n}
    async with client_of(app) as client:
        asking = asyncio.create_task(client.post(f"/v1/{kind}", json=body))
        await begun.wait()
        adding = asyncio.create_task(adapters.add("a", new, load_inplace=True))
        await until(lambda: adapters.versions()[0].digest != old)
        gate.set()
        answer = await asking
        await adding
    assert answer.status_code == 200, answer.text
    assert [request.digest for request in engine.seen] == [old] * n
    assert [entry.digest for entry in engine.adapter_states()] == [adapters.versions()[0].digest]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_version_is_forgotten_while_requests_that_the_engine_has_still_run(
    config: FleetConfig, tmp_path: Path, n: int
) -> None:
    engine, adapters, (_old, new) = await catalog_with_two(config, tmp_path)
    engine.hold = True
    async with client_of(build_app(engine, adapters, tokenizer(), CONFIG)) as client:
        body = {"model": "a", "prompt": "hi", "n": n}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: len(engine.running) == n)
        done = await asyncio.wait_for(adapters.add("a", new, load_inplace=True), TIMEOUT_S)
        assert [entry.digest for entry in engine.adapter_states()] == [done.digest]
        engine.hold = False
        assert (await asking).status_code == 200


@pytest.mark.parametrize(
    ("body", "closing", "status"),
    [
        ({"prompt": "hi", "max_tokens": 1000}, False, 400),
        ({"prompt": 5}, False, 400),
        ({"prompt": "hi"}, True, 503),
    ],
)
async def test_a_request_that_fails_before_the_engine_releases_its_version(
    config: FleetConfig, tmp_path: Path, body: dict[str, Any], closing: bool, status: int
) -> None:
    engine, adapters, (_, new) = await catalog_with_two(config, tmp_path)
    app = build_app(engine, adapters, tokenizer(), CONFIG)
    if closing:
        app.close()
    async with client_of(app) as client:
        answer = await client.post("/v1/completions", json={"model": "a", **body})
    assert answer.status_code == status
    await asyncio.wait_for(adapters.add("a", new, load_inplace=True), TIMEOUT_S)


async def catalog_with_two(
    config: FleetConfig, directory: Path
) -> tuple[StubEngine, LocalCatalog, tuple[str, str]]:
    """A catalog in which "a" is an adapter; its digest, and the path of another adapter."""
    engine = StubEngine()
    adapters = LocalCatalog(engine, config)
    old = await adapters.add("a", write_adapter(directory / "adapters" / "a"))
    return engine, adapters, (old.digest, write_adapter(directory / "adapters" / "b", seed=1))


async def test_names_of_one_content_share_its_pin_and_weight(
    config: FleetConfig, tmp_path: Path
) -> None:
    class RecordingEngine(StubEngine):
        async def register(self, version: Version, path: str) -> None:
            await super().register(version, path)
            registered.append((version.pinned, version.weight, path))

    registered: list[tuple[bool, float, str]] = []
    adapters = LocalCatalog(RecordingEngine(), config)
    path = write_adapter(tmp_path / "adapters" / "a")
    await adapters.add("a", path, pinned=True, weight=2.0)
    await adapters.add("b", path, weight=3.0)
    await adapters.remove("b")
    await adapters.add("b", path, weight=0.5)
    await adapters.add("a", write_adapter(tmp_path / "adapters" / "c", seed=1), load_inplace=True)
    local = registered[0][2]
    assert [entry for entry in registered if entry[2] == local] == [
        (True, 2.0, local),
        (True, 3.0, local),
        (True, 2.0, local),
        (True, 2.0, local),
        (False, 0.5, local),
    ]


async def test_one_of_two_concurrent_adds_of_a_name_wins(
    config: FleetConfig, tmp_path: Path
) -> None:
    adapters = LocalCatalog(StubEngine(), config)
    paths = [write_adapter(tmp_path / "adapters" / str(seed), seed=seed) for seed in range(2)]
    outcomes = await asyncio.gather(
        *(adapters.add("a", path) for path in paths), return_exceptions=True
    )
    assert sum(isinstance(outcome, BadRequest) for outcome in outcomes) == 1


async def test_it_describes_itself_as_a_fleet_of_one(config: FleetConfig, tmp_path: Path) -> None:
    adapters = LocalCatalog(StubEngine(), config, "local")
    path = write_adapter(tmp_path / "adapters" / "a")
    done = await adapters.add("a", path, pinned=True, weight=2.0)
    page = await adapters.describe()
    (entry,) = page["data"]
    assert (entry["id"], entry["digest"]) == ("a", done.digest)
    assert (entry["pinned"], entry["weight"]) == (True, 2.0)
    assert entry["residency"]["local"]["tier"] == "device"
    assert (page["object"], page["sequence"]) == ("list", 1)
    assert page["replicas"][0]["id"] == "local"


def test_it_needs_no_redis_and_no_ray() -> None:
    script = "import sys, replica.serving.local_catalog; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"redis", "ray", "torch", "fastapi"} & set(loaded.stdout.split())
