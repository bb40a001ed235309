"""A version is served to the end, whatever happens to the directory that it was added from."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.config import EngineConfig, FleetConfig
from cluster.holds import Holds
from cluster.values import Tier
from replica.api.interfaces import Claim
from replica.engine.link import EngineLink
from replica.scheduling.request import NewRequest, Sampling
from replica.serving.local_catalog import LocalCatalog
from tests.models import make_adapter, make_model
from tests.until import until

GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)
ENDLESS = Sampling(max_tokens=4000, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the adapters "old" and "new"."""
    directory = tmp_path_factory.mktemp("made")
    model = make_model(directory / "model", max_position_embeddings=4096)
    for seed, name in enumerate(("old", "new")):
        make_adapter(directory / name, model, rank=8, seed=seed)
    return directory


class Replica:
    """An engine with one place for adapters and no host tier, so that each change reads files."""

    def __init__(self, made: Path, directory: Path) -> None:
        engine = EngineConfig(
            str(made / "model"), threads=1, slots_max=1, host_memory=0, kv_memory=2**24
        )
        self.engine = EngineLink(engine)
        self._config = FleetConfig(engine, directory=str(directory))
        self._requests = 0

    async def start(self) -> None:
        await self.engine.start()
        config = FleetConfig(self.engine.config, directory=self._config.directory)
        self.catalog = LocalCatalog(self.engine, config)

    async def stop(self) -> None:
        await self.catalog.stop()
        await self.engine.stop()

    async def add(self, name: str, path: Path) -> str:
        return (await self.catalog.add(name, str(path), load_inplace=True, trusted=True)).digest

    async def claim(self, name: str) -> Claim:
        claim = await self.catalog.claim(name)
        assert claim is not None
        return claim

    async def answer(self, digest: str | None) -> list[int]:
        self._requests += 1
        tokens: list[int] = []
        request = NewRequest(f"r{self._requests}", (5, 6, 7), GREEDY, digest)
        async for delta in self.engine.generate(request):
            assert delta.error is None, delta.error
            tokens += delta.tokens
        return tokens

    def holds(self, digest: str) -> bool:
        return Holds(Path(self._config.directory) / "adapters").held(digest)

    def tiers(self) -> dict[str, Tier]:
        return {state.digest: state.tier for state in self.engine.adapter_states()}


@pytest.fixture
async def replica(made: Path, tmp_path: Path) -> AsyncIterator[Replica]:
    replica = Replica(made, tmp_path / "fleet")
    await replica.start()
    yield replica
    await replica.stop()


async def test_a_directory_may_go_once_the_load_was_answered(
    replica: Replica, made: Path, tmp_path: Path
) -> None:
    digest = await replica.add("a", Path(shutil.copytree(made / "old", tmp_path / "a")))
    shutil.rmtree(tmp_path / "a")
    base = await replica.answer(None)
    assert await replica.answer(digest) != base


async def test_an_old_version_is_read_again_after_its_directory_was_overwritten(
    replica: Replica, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "old", tmp_path / "a")
    old = await replica.add("a", tmp_path / "a")
    answer, claim = await replica.answer(old), await replica.claim("a")
    shutil.copytree(made / "new", tmp_path / "a", dirs_exist_ok=True)
    adding = asyncio.create_task(replica.add("a", tmp_path / "a"))
    new = (await until_renamed(replica, old)).version.digest
    assert await replica.answer(new) != answer, "it takes the only place"
    assert await replica.answer(old) == answer
    claim.release()
    assert await adding == new


async def until_renamed(replica: Replica, old: str) -> Claim:
    found: list[Claim] = []

    async def renamed() -> bool:
        claim = await replica.claim("a")
        claim.release()
        found.append(claim)
        return claim.version.digest != old

    await until(renamed)
    return found[-1]


async def test_names_of_one_content_need_neither_of_their_directories(
    replica: Replica, made: Path, tmp_path: Path
) -> None:
    for name in "ab":
        shutil.copytree(made / "old", tmp_path / name)
        digest = await replica.add(name, tmp_path / name)
    other = await replica.add("c", made / "new")
    answer = await replica.answer(digest)
    await replica.catalog.remove("b")
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    assert await replica.answer(other) != answer, "it takes the only place"
    assert await replica.answer(digest) == answer


async def test_a_forgotten_version_keeps_its_files_until_its_last_request_has_ended(
    replica: Replica, made: Path
) -> None:
    old = await replica.add("a", made / "old")
    stream = replica.engine.generate(NewRequest("long", (5,), ENDLESS, old))
    await anext(stream)
    new = await replica.add("a", made / "new")
    assert replica.tiers().keys() == {old, new} and replica.holds(old) and replica.holds(new)
    await stream.aclose()
    await until(lambda: not replica.holds(old))
    assert replica.holds(new)
    await replica.catalog.remove("a")
    await until(lambda: not replica.holds(new))


async def test_a_version_forgotten_and_added_again_stays_held(replica: Replica, made: Path) -> None:
    old = await replica.add("a", made / "old")
    stream = replica.engine.generate(NewRequest("long", (5,), ENDLESS, old))
    await anext(stream)
    await replica.catalog.remove("a")
    assert await replica.add("a", made / "old") == old
    await stream.aclose()
    await replica.answer(old)
    assert replica.holds(old)
    await replica.catalog.remove("a")
    await until(lambda: not replica.holds(old))
