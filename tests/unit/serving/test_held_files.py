"""The store holds a version's files for exactly as long as the engine may read them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from cluster.errors import AdapterFailed, AdapterRefused, FleetError
from cluster.values import AdapterState, Tier, Version
from cluster.versions import Book
from replica.serving.held_files import HeldFiles

A, B = "a" * 64, "b" * 64


def version(digest: str) -> Version:
    return Version("name", digest, f"/from/{digest[:1]}", 8, 100)


OTHER = dataclasses.replace(version(B), name="other", uri="/from/elsewhere")
BOOK = Book("base", [version(B), OTHER])


class CountingStore:
    """holds: those not released, by digest."""

    def __init__(self) -> None:
        self.holds: Counter[str] = Counter()
        self.fail: FleetError | None = None
        self.asked: list[str] = []
        self.checked: list[str] = []

    def fetch(self, uris: Sequence[str], digest: str) -> str:
        self.asked = list(uris)
        if self.fail is not None:
            raise self.fail
        self.holds[digest] += 1
        return self.path(digest)

    def hold_again(self, digest: str) -> bool:
        if not self.holds[digest]:
            return False
        self.holds[digest] += 1
        return True

    def drop_damaged(self, digest: str) -> None:
        self.checked.append(digest)

    def path(self, digest: str) -> str:
        return f"/store/{digest}"

    def release(self, digest: str) -> None:
        assert self.holds[digest] > 0
        self.holds[digest] -= 1


class SlowEngine:
    """Drops a forgotten version when the test says, as an engine whose requests still run."""

    def __init__(self) -> None:
        self.tiers: dict[str, Tier] = {}
        self.refuse: FleetError | None = None
        self.registered: list[str] = []
        self._callbacks: list[Callable[[list[AdapterState]], None]] = []

    async def register(self, version: Version, path: str) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.registered.append(path)
        self.tiers[version.digest] = Tier.DISK

    async def forget(self, digest: str) -> None:
        pass

    def drop(self, digest: str) -> None:
        del self.tiers[digest]
        for callback in self._callbacks:
            callback([AdapterState(digest, Tier.ABSENT, 0, 0.0)])

    def adapter_states(self) -> list[AdapterState]:
        return [AdapterState(digest, tier, 1, 0.0) for digest, tier in self.tiers.items()]

    def on_residency(self, callback: Callable[[list[AdapterState]], None]) -> None:
        self._callbacks.append(callback)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def files(store: CountingStore, engine: SlowEngine) -> HeldFiles:
    return HeldFiles(engine, store, BOOK)  # type: ignore[arg-type]


async def test_a_version_is_held_once_however_often_it_is_registered(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    for _ in range(3):
        await files.register(version(A))
    assert engine.registered == [f"/store/{A}"] * 3
    assert store.holds[A] == 1
    await files.forget(A)
    assert store.holds[A] == 1, "its requests may still run"
    engine.drop(A)
    assert store.holds[A] == 0


async def test_a_version_that_this_process_adds_is_not_fetched(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    store.fetch([], A)  # as `Adding` does
    store.fail = AdapterFailed("fetched again")
    await files.register(version(A))
    store.release(A)
    assert store.holds[A] == 1
    store.fail = None
    await files.register(version(A))
    assert store.asked == ["/from/a"] and store.holds[A] == 1, "its files may be gone by now"


async def test_what_has_failed_is_checked_before_it_is_fetched(
    files: HeldFiles, store: CountingStore
) -> None:
    await files.register(version(A))
    assert store.checked == []
    await files.register(version(A), again=True)
    assert store.checked == [A] and store.holds[A] == 1


async def test_a_version_registered_again_stays_held(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    await files.register(version(A))
    await files.forget(A)
    await files.register(version(A))
    engine.drop(A)  # news of the forgetting, which comes late
    assert store.holds[A] == 1
    engine.tiers[A] = Tier.DISK
    await files.forget(A)
    engine.drop(A)
    assert store.holds[A] == 0


async def test_files_come_from_wherever_a_name_was_added_from(
    files: HeldFiles, store: CountingStore
) -> None:
    await files.register(version(A))
    assert store.asked == ["/from/a"]
    await files.register(OTHER)
    assert store.asked == ["/from/elsewhere", "/from/b"]


async def test_other_changes_of_the_engine_release_nothing(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    await files.register(version(A))
    await files.register(version(B))
    await files.forget(A)
    for callback in engine._callbacks:
        callback([AdapterState(A, Tier.HOST, 1, 0.0), AdapterState(B, Tier.ABSENT, 0, 0.0)])
    assert (store.holds[A], store.holds[B]) == (1, 1)


async def test_a_new_engine_releases_what_had_been_forgotten(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    await files.register(version(A))
    await files.register(version(B))
    await files.forget(A)
    (callback,) = engine._callbacks
    callback([])  # the old engine stalls, but has both
    assert (store.holds[A], store.holds[B]) == (1, 1)
    engine.tiers.clear()
    callback([])
    assert (store.holds[A], store.holds[B]) == (0, 1)


async def test_a_version_that_the_engine_refuses_is_not_held(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    engine.refuse = AdapterRefused("too large")
    with pytest.raises(AdapterRefused):
        await files.register(version(A))
    assert store.holds[A] == 0
    engine.refuse = None
    await files.register(version(A))
    assert store.holds[A] == 1


async def test_a_refused_change_of_a_version_leaves_it_as_it_was(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    await files.register(version(A))
    engine.refuse = AdapterRefused("no room for the pin")
    with pytest.raises(AdapterRefused):
        await files.register(version(A))
    engine._callbacks[0]([])
    engine.tiers, known = {}, engine.tiers
    engine._callbacks[0]([])
    assert store.holds[A] == 1, "an engine that is started again gets it"
    engine.tiers = known
    await files.forget(A)
    with pytest.raises(AdapterRefused):
        await files.register(version(A))
    assert store.holds[A] == 1, "the engine still has it"
    engine.drop(A)
    assert store.holds[A] == 0


async def test_files_that_cannot_be_had_are_not_held(
    files: HeldFiles, store: CountingStore, engine: SlowEngine
) -> None:
    store.fail = AdapterFailed("its files changed")
    with pytest.raises(AdapterFailed):
        await files.register(version(A))
    assert engine.registered == [] and store.holds[A] == 0
    store.fail = None
    await files.register(version(A))
    assert store.holds[A] == 1
