"""Images share no byte of the arena, and slide together if no hole is large enough."""

import copy
import random
from collections.abc import Iterable
from typing import Any

import pytest

from replica.scheduling import extents as extents_module
from replica.scheduling.extents import Extents, Shift


def test_the_first_hole_that_fits_is_taken() -> None:
    extents = Extents(1024, alignment=1)
    assert [extents.take(d, 100) for d in "abc"] == [0, 100, 200]
    extents.give_back("b")
    assert extents.take("large", 101) == 300
    assert extents.take("small", 99) == 100


def test_sizes_and_capacity_are_aligned() -> None:
    extents = Extents(1000, alignment=256)
    assert extents.capacity == 768
    assert extents.take("a", 1) == 0
    assert extents.take("b", 257) == 256
    assert extents.free == 0


def test_scattered_bytes_become_one_hole() -> None:
    extents = Extents(10, alignment=1)
    for digest, size in (("a", 3), ("b", 2), ("c", 3)):
        extents.take(digest, size)
    extents.give_back("b")
    assert extents.free == 4 and extents.take("d", 4) is None
    assert extents.slide(immovable=()) == [Shift("c", 5, 3, 3)]
    assert extents.take("d", 4) == 6


def test_an_extent_that_is_being_copied_into_does_not_move() -> None:
    extents = Extents(10, alignment=1)
    for digest in "abcd":
        extents.take(digest, 2)
    extents.give_back("a")
    extents.give_back("c")
    assert extents.slide(immovable={"b"}) == [Shift("d", 6, 4, 2)]
    assert extents.offset("b") == 2


@pytest.mark.parametrize("seed", range(20))
def test_no_byte_is_ever_shared_or_lost(seed: int) -> None:
    rng = random.Random(seed)
    extents = Extents(4096, alignment=64)
    held: dict[str, int] = {}
    for step in range(300):
        action = rng.random()
        if action < 0.5:
            size = rng.randint(1, 900)
            free = extents.free
            if extents.take(str(step), size) is None:
                assert extents.free == free
            else:
                held[str(step)] = extents.aligned(size)
        elif held and action < 0.9:
            digest = rng.choice(sorted(held))
            extents.give_back(digest)
            del held[digest]
        else:
            fixed = set(rng.sample(sorted(held), len(held) // 3))
            before = {digest: extents.offset(digest) for digest in held}
            for slide in extents.slide(fixed):
                assert slide.digest not in fixed
                assert slide.source == before[slide.digest] and slide.target < slide.source
        extents.check()
        assert extents.free == extents.capacity - sum(held.values()), f"seed {seed}"


@pytest.mark.parametrize("seed", range(20))
def test_packed_predicts_what_sliding_gives(seed: int) -> None:
    rng = random.Random(seed)
    extents = Extents(400, alignment=1)
    for name in range(30):
        extents.take(str(name), rng.randint(1, 20))
    for name in range(0, 30, 3):
        extents.give_back(str(name))
    left = [str(name) for name in range(30) if name % 3]
    gone, immovable = rng.sample(left, 5), rng.sample(left, 3)
    end, hole = extents.packed(gone, immovable)
    trial = copy.deepcopy(extents)
    for name in gone:
        trial.give_back(name)
    trial.slide([name for name in immovable if name not in gone])
    trial.check()
    assert trial.end == end
    trial.resize(end)
    assert hole == 0 or trial.hole(hole) is not None
    assert trial.take("does not", hole + 1) is None


def test_an_image_comes_and_goes_without_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory may hold thousands, and a load asks several times."""
    extents = Extents(4000, alignment=1)
    sorts: list[int] = []

    def counted(items: Iterable[Any]) -> list[Any]:
        found = sorted(items)
        sorts.append(len(found))
        return found

    monkeypatch.setattr(extents_module, "sorted", counted, raising=False)
    for number in range(4000):
        extents.take(str(number), 1)
    for number in range(0, 4000, 40):
        assert extents.hole(1) is None
        extents.give_back(str(number))
        assert extents.take(f"new {number}", 1) == number
    assert not sorts
    extents.check()
