"""A change of the catalog costs what changed, not what is known."""

import asyncio
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from cluster.values import Version
from cluster.versions import Book
from replica.serving.catalog_room import CatalogRoom
from replica.serving.claims import Claims
from replica.serving.held_files import HeldFiles
from replica.serving.reconciler import Reconciler
from tests.small_files import settled_config
from tests.stub_engine import StubEngine

SMALL, LARGE = 50, 2000


class Touched(dict[str, Any]):
    """Counts the entries that an iteration passes, which a count of calls does not see."""

    passed = 0

    def __iter__(self) -> Any:
        type(self).passed += len(self)
        return super().__iter__()

    def copy(self) -> Any:
        type(self).passed += len(self)
        return super().copy()

    def items(self) -> Any:
        type(self).passed += len(self)
        return super().items()

    def values(self) -> Any:
        type(self).passed += len(self)
        return super().values()

    def keys(self) -> Any:
        type(self).passed += len(self)
        return super().keys()


class AllFiles:
    """A store that has the files of all versions."""

    def fetch(self, uris: list[str], digest: str) -> str:
        return self.path(digest)

    def hold_again(self, digest: str) -> bool:
        return False

    def path(self, digest: str) -> str:
        return f"/store/{digest}"


def version(number: int, **fields: Any) -> Version:
    return Version(f"a{number}", f"d{number}", f"/a/{number}", 8, 100 + number % 4, **fields)


def calls(work: Callable[[], object]) -> int:
    """Function calls made, in Python and in C."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def known(number: int) -> tuple[Book, CatalogRoom]:
    book = Book("base", map(version, range(number)), sequence=number)
    book._versions, book._by_digest = Touched(book._versions), Touched(book._by_digest)
    room = CatalogRoom(lambda each: each.parameters)
    room.update({f"d{i}": version(i) for i in range(number)})
    room.others([])
    room._sizes = Touched(room._sizes)
    return book, room


def change(number: int) -> tuple[int, int]:
    """(calls, entries passed) of one change of a catalog of `number` adapters, on its way through
    the book, the room for images and the reconciler."""
    book, room = known(number)

    async def run() -> tuple[int, int]:
        reconciler = Reconciler(
            HeldFiles(StubEngine(), AllFiles(), book),  # type: ignore[arg-type]
            settled_config("model"),
            Claims(),
            book.of_digest,
            lambda entries: None,
            lambda: None,
        )
        reconciler.update([f"d{i}" for i in range(number)], (1, number))
        await reconciler.wait_idle(60.0)
        reconciler._registered = Touched(reconciler._registered)

        def one() -> None:
            digests = book.change({"a7": version(number + 7), "new": version(number)}, number + 1)
            assert digests == {"d7", f"d{number + 7}", f"d{number}"}
            room.update({digest: book.of_digest(digest) for digest in digests})
            room.others(["d1"])
            reconciler.update(digests, (1, number + 1))
            assert reconciler.applied == (1, number)

        Touched.passed = 0
        count = calls(one)
        passed = Touched.passed
        await reconciler.wait_idle(60.0)
        assert reconciler.applied == (1, number + 1)
        return count, passed

    return asyncio.run(run())


def test_a_change_costs_the_same_however_many_adapters_are_known() -> None:
    few, many = change(SMALL), change(LARGE)
    assert few == many
    assert few[1] == 0


def test_the_room_counts_each_pin_and_the_largest_of_the_others() -> None:
    _, room = known(8)
    room.update({"d0": version(0, pinned=True), "d4": version(4, pinned=True), "d3": None})
    assert sorted(room.others([])) == [
        (100, True),
        (100, True),
        (101, False),
        (102, False),
        (103, False),
    ]
    assert sorted(room.others(["d4", "d7", "unknown"])) == [
        (100, True),
        (101, False),
        (102, False),
    ]
