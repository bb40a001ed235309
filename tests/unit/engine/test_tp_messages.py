"""Commands to workers are complete and short. A load ends when it has ended on every rank."""

import pickle
import random
from collections import deque

import pytest

from cluster.errors import EngineFailed
from cluster.values import Tier
from replica.adapters.image import Image, Layout
from replica.adapters.loader import Loaded, Loader
from replica.engine.tensor_parallel import JointLoader, TensorParallelWorkers
from replica.engine.tp_messages import AdapterLoaded, Answer, Command, Drop, LoadAdapter, PageTables
from replica.model.launch import Row
from replica.scheduling.adapter import Load
from replica.scheduling.request import Sampling

LAYOUT = Layout(None, None, None, None)  # type: ignore[arg-type]


def row(seed: int, position: int, pages: list[int], **fields: object) -> Row:
    settings = {"slot": 1, "sampling": Sampling(), "generated": 3, "carry": None} | fields
    return Row([position], position, pages, seed=seed, **settings)  # type: ignore[arg-type]


def told(row: Row) -> tuple[object, ...]:
    """The row without what only sampling needs."""
    wanted = row.sampling is not None
    pages, base = list(row.pages), row.base_until
    return (row.tokens, row.position, pages, row.slot, row.carry, base, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_rows_arrive_as_they_were_whatever_happened_to_their_pages(seed: int) -> None:
    """Requests grow, lose their pages, get new ones, pause, and may share a seed."""
    rng = random.Random(seed)
    here, there = PageTables(), PageTables()
    requests = [(rng.randrange(6), [rng.randrange(99)]) for _ in range(8)]
    for _ in range(60):
        for _, pages in requests:
            match rng.randrange(6):
                case 0 | 1:
                    pages.append(rng.randrange(99))
                case 2:
                    pages[rng.randrange(len(pages))] = rng.randrange(99)
                case 3:
                    del pages[rng.randrange(1, len(pages) + 1) :]
        rows = [
            row(
                key,
                5,
                pages,
                sampling=rng.choice([None, Sampling()]),
                carry=rng.choice([None, 1]),
                base_until=rng.choice([0, 9]),
            )
            for key, pages in rng.sample(requests, rng.randrange(9))
        ]
        step = pickle.loads(pickle.dumps(here.pack(rows)))
        assert list(map(told, there.unpack(step))) == list(map(told, rows))


def test_a_decode_step_of_long_sequences_is_a_short_message() -> None:
    tables = PageTables()
    rows = [row(2**62 + n, 8190, list(range(n, n + 512))) for n in range(64)]
    first = len(pickle.dumps(tables.pack(rows)))
    again = len(pickle.dumps(tables.pack(rows)))
    assert first > 64 * 512
    assert again < 64 * 64


class FakeWorkers(TensorParallelWorkers):
    """Two workers that give the test's answers."""

    def __init__(self) -> None:
        self.told: list[Command] = []
        self.answers: deque[tuple[int, Answer]] = deque()
        self.gone = False

    @property
    def count(self) -> int:
        return 2

    def tell(self, command: Command) -> None:
        self.told.append(command)

    def hear(self, *, wait: bool = False) -> tuple[int, Answer] | None:
        if self.gone:
            raise EngineFailed("rank 1 of 3 is gone")
        assert self.answers or not wait, "waits for ever"
        return self.answers.popleft() if self.answers else None


class FakeLoader(Loader):
    def __init__(self) -> None:
        self.done: list[Loaded] = []

    def begin(self, load: Load, image: Image | None, keep: bool) -> None: ...

    def run(self, load: Load, image: Image | None, keep: bool) -> Loaded:
        return Loaded(load, LAYOUT, 1.0)

    def ended(self) -> list[Loaded]:
        done, self.done = self.done, []
        return done


def load_of(digest: str) -> Load:
    return Load(digest, "/a", 1, 0, 256, Tier.DISK)


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


@pytest.fixture
def own() -> FakeLoader:
    return FakeLoader()


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_load_has_ended_when_it_has_on_every_rank(
    last: int, workers: FakeWorkers, own: FakeLoader
) -> None:
    loader, load = JointLoader(own, workers), load_of("a")
    loader.begin(load, None, True)
    assert workers.told == [LoadAdapter(load, from_host=False, keep=True)]
    for rank in sorted(range(3), key=lambda rank: rank == last):
        assert loader.ended() == []
        if rank:
            workers.answers.append((rank, AdapterLoaded("a", None)))
        else:
            own.done.append(Loaded(load, LAYOUT, 1.0))
    (ended,) = loader.ended()
    assert ended.layout is LAYOUT and ended.error is None
    assert loader.ended() == []
    assert len(workers.told) == 1, "nobody drops anything"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_load_that_failed_on_one_rank_failed_on_all(
    failing: int, workers: FakeWorkers, own: FakeLoader
) -> None:
    loader, load = JointLoader(own, workers), load_of("a")
    for _ in range(2):  # it may be retried
        loader.begin(load, None, True)
        for rank in (1, 2):
            error = "broken" if rank == failing else None
            workers.answers.append((rank, AdapterLoaded("a", error)))
        here = Loaded(load, None, 1.0, "broken") if failing == 0 else Loaded(load, LAYOUT, 1.0)
        own.done.append(here)
        (ended,) = loader.ended()
        assert ended.layout is None and ended.image is None
        assert ended.error == (f"rank {failing}: broken" if failing else "broken")
        assert workers.told[-1] == Drop("a")
    loader.begin(load, None, False)
    workers.answers.extend([(1, AdapterLoaded("a", None)), (2, AdapterLoaded("a", None))])
    own.done.append(Loaded(load, LAYOUT, 1.0))
    assert [ended.error for ended in loader.ended()] == [None]


def test_loads_beside_each_other_are_not_mixed_up(workers: FakeWorkers, own: FakeLoader) -> None:
    loader = JointLoader(own, workers)
    for digest in "ab":
        loader.begin(load_of(digest), None, False)
    workers.answers.extend([(1, AdapterLoaded("b", None)), (2, AdapterLoaded("b", None))])
    workers.answers.append((1, AdapterLoaded("a", None)))
    own.done.extend([Loaded(load_of("a"), LAYOUT, 1.0), Loaded(load_of("b"), LAYOUT, 1.0)])
    assert [ended.load.digest for ended in loader.ended()] == ["b"]
    # A third load, without overlap, waits for its own answers and records those of others.
    workers.answers.extend((2, AdapterLoaded(digest, None)) for digest in "ac")
    workers.answers.append((1, AdapterLoaded("c", "broken")))
    assert loader.run(load_of("c"), None, False).error == "rank 1: broken"
    assert [ended.load.digest for ended in loader.ended()] == ["a"]


def test_a_lost_rank_is_found_where_loads_are_looked_for(
    workers: FakeWorkers, own: FakeLoader
) -> None:
    """The engine polls in every step, even if it has nothing to run."""
    loader = JointLoader(own, workers)
    workers.gone = True
    with pytest.raises(EngineFailed):
        loader.ended()
