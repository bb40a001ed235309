"""A name that nobody registered is looked up in directories, once for all who ask."""

import asyncio
from pathlib import Path

import pytest

from cluster.adapter_paths import CONFIG_FILE
from cluster.config import FleetConfig
from cluster.errors import AdapterFailed, AdapterMissing, AdapterRefused, ConfigError
from replica.api.server import build_app
from replica.serving import sources
from replica.serving.local_catalog import LocalCatalog
from replica.serving.settings import read_settings
from replica.serving.sources import Sources
from tests.serving import CONFIG, client_of
from tests.serving import text as tokenizer
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import until


class Asked:
    """What was added, and a clock."""

    def __init__(self, *directories: Path | str) -> None:
        self.added: list[tuple[str, str]] = []
        self.error: AdapterRefused | None = None
        self.missing: set[str] = set()
        self.now_s = 0.0
        self.hold = asyncio.Event()
        self.hold.set()
        self.sources = Sources([str(d) for d in directories], "base", self._add, lambda: self.now_s)

    async def _add(self, name: str, path: str) -> None:
        self.added.append((name, path))
        await self.hold.wait()
        if path in self.missing:
            raise AdapterMissing(path)
        if self.error is not None:
            raise self.error


def adapter(path: Path) -> str:
    path.mkdir(parents=True)
    (path / CONFIG_FILE).write_text("{}")
    return str(path)


async def test_the_first_directory_that_has_it_counts(tmp_path: Path) -> None:
    asked = Asked(tmp_path / "one", tmp_path / "two")
    first, second = adapter(tmp_path / "one" / "a"), adapter(tmp_path / "two" / "b")
    adapter(tmp_path / "two" / "a")
    assert await asked.sources.resolve("a") and await asked.sources.resolve("b")
    assert asked.added == [("a", first), ("b", second)]


async def test_many_at_once_add_it_once(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    adapter(tmp_path / "a")
    assert all(await asyncio.gather(*(asked.sources.resolve("a") for _ in range(50))))
    assert len(asked.added) == 1


async def test_what_is_not_there_is_looked_at_again_later(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    assert not await asked.sources.resolve("a")
    adapter(tmp_path / "a")
    assert not await asked.sources.resolve("a")
    asked.now_s = sources._KEPT_S
    assert await asked.sources.resolve("a")


async def test_the_reason_of_a_refusal_is_kept_as_long(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    adapter(tmp_path / "a")
    asked.error = AdapterRefused("bad rank", field="lora_path")
    for _ in range(2):
        with pytest.raises(AdapterRefused, match="model: 'a': bad rank") as caught:
            await asked.sources.resolve("a")
        assert caught.value.field == "model"
    assert len(asked.added) == 1


async def test_names_never_lead_out_of_a_directory(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    adapter(inside / "deep" / "a")
    outside = adapter(tmp_path / "out")
    (inside / "link").symlink_to(outside)
    asked = Asked(inside)
    for name in ("../out", "deep/a", "..", ".", "", "link", "/", "a\0b", outside, "x" * 5000):
        assert not await asked.sources.resolve(name), name
    assert asked.added == []


async def test_urls_are_tried_in_turn(tmp_path: Path) -> None:
    asked = Asked("https://host/one/", tmp_path, "hf://org", "s3://bucket/two")
    asked.missing = {"https://host/one/a%20b", "hf://org/a b"}
    assert await asked.sources.resolve("a b")
    tried = ["https://host/one/a%20b", "hf://org/a b", "s3://bucket/two/a b"]
    assert asked.added == [("a b", place) for place in tried]


async def test_a_name_that_no_url_has_is_not_asked_for_again() -> None:
    asked = Asked("https://host/one", "hf://org")
    # "::" is fsspec's, and would lead elsewhere.
    asked.missing = {"https://host/one/a%3A%3Afile%3A"}
    for _ in range(2):
        assert not await asked.sources.resolve("a::file:")
    assert [place for _, place in asked.added] == ["https://host/one/a%3A%3Afile%3A"]


async def test_names_that_no_adapter_can_have_are_not_looked_up(tmp_path: Path) -> None:
    asked = Asked("hf://org")
    for name in ("", "base", "Base", "base:a", "x" * 257, "a\tb", " a"):
        assert not await asked.sources.resolve(name), name
    assert (asked.added, len(asked.sources._unknown)) == ([], 0)


async def test_a_source_that_fails_is_not_asked_again_at_once_and_is_not_shown() -> None:
    asked = Asked("https://inside/one")
    asked.error = AdapterFailed("https://inside/one/a: HTTP 500")
    for _ in range(2):
        with pytest.raises(AdapterFailed) as caught:
            await asked.sources.resolve("a")
        assert "inside" not in caught.value.message and caught.value.field == "model"
    assert len(asked.added) == 1
    asked.error, asked.now_s = AdapterRefused("https://inside/one/b: bad rank"), sources._KEPT_S
    with pytest.raises(AdapterRefused, match=r"^model: 'b': b: bad rank"):
        await asked.sources.resolve("b")
    assert list(asked.sources._unknown) == ["b"]  # what has expired is dropped


async def test_a_flood_of_names_is_bounded() -> None:
    asked, hold = Asked("hf://org"), asyncio.Event()
    asked.hold = hold
    most = sources._LOOKED_UP_MAX + sources._WAITING_MAX
    flood = [asyncio.create_task(asked.sources.resolve(f"a{n}")) for n in range(most)]
    await until(lambda: len(asked.added) == sources._LOOKED_UP_MAX)
    with pytest.raises(AdapterFailed, match="too many other names"):
        await asked.sources.resolve("b")
    assert len(asked.added) == sources._LOOKED_UP_MAX
    hold.set()
    assert all(await asyncio.gather(*flood))
    assert await asked.sources.resolve("b")


async def test_the_names_that_are_remembered_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_KEPT_MAX", 3)
    asked = Asked(tmp_path)
    for n in range(9):
        assert not await asked.sources.resolve(str(n))
    assert list(asked.sources._unknown) == ["6", "7", "8"]


async def test_a_server_answers_for_a_name_in_a_directory(tmp_path: Path) -> None:
    config = FleetConfig(
        settled_config(write_model_config(tmp_path / "base")),
        directory=str(tmp_path / "fleet"),
        adapter_sources=(str(tmp_path / "found"),),
    )
    write_adapter(tmp_path / "found" / "mine")
    (tmp_path / "found" / "broken").mkdir()
    (tmp_path / "found" / "broken" / CONFIG_FILE).write_text("[]")
    engine = StubEngine()
    adapters = LocalCatalog(engine, config)
    async with client_of(build_app(engine, adapters, tokenizer(), CONFIG)) as client:
        for model, wanted in (("mine", 200), ("unknown", 404), ("broken", 400), ("mine", 200)):
            body = {"model": model, "prompt": "hello", "max_tokens": 2}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == wanted, answer.text
            if wanted == 400:
                assert answer.json()["error"]["param"] == "model"
    assert [version.name for version in adapters.versions()] == ["mine"]


def test_a_source_is_a_directory_or_a_url(tmp_path: Path) -> None:
    model = write_model_config(tmp_path / "base")
    flags = {"config": None, "model": model}
    made = read_settings({**flags, "adapter_source": [str(tmp_path)]})
    assert made.adapter_sources == (str(tmp_path),)
    with pytest.raises(ConfigError, match=r"--adapter-source .*: no such directory"):
        read_settings({**flags, "adapter_source": [str(tmp_path / "nothing")]})
    made = read_settings({**flags, "adapter_source": ["s3://bucket/prefix"]})
    assert made.adapter_sources == ("s3://bucket/prefix",)
