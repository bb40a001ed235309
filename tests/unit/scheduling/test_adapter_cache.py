"""Adapters come and go by the table in `residency.py`; none in use is ever touched."""

import pytest

from cluster.values import Tier
from replica.scheduling import victims
from replica.scheduling.adapter import ArenaChange, Evict
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.extents import Extents


def adapter_cache(capacity: int = 100, slots: int = 8) -> AdapterCache:
    return AdapterCache(
        Extents(capacity, alignment=1),
        slots,
        victims.lru,
        lambda size, _: size / 100,
        1.0,
        8.0,
    )


def registered(*digests: str, size: int = 40, capacity: int = 100, slots: int = 8) -> AdapterCache:
    directory = adapter_cache(capacity, slots)
    for digest in digests:
        directory.register(digest, f"/{digest}", size, pinned=False, now_s=0.0)
    return directory


def room_for(directory: AdapterCache, digest: str, now_s: float) -> ArenaChange | None:
    victims = directory.victim_search.for_image(digest)
    return None if victims is None else directory.make_room(digest, victims, now_s)


def bring(directory: AdapterCache, digest: str, now_s: float) -> None:
    assert room_for(directory, digest, now_s) is not None
    directory.loaded(digest, now_s)
    directory.check()


def test_a_load_takes_a_slot_and_bytes_at_once() -> None:
    directory = registered("a", "b")
    first, second = room_for(directory, "a", 0.0), room_for(directory, "b", 0.0)
    assert first is not None and second is not None
    assert (first.load.slot, first.load.offset) != (second.load.slot, second.load.offset)
    assert first.load.slot != 0 and second.load.slot != 0
    assert directory.extents.free == 20
    assert not directory.usable("a")
    directory.check()


def test_the_least_recently_used_leaves_first() -> None:
    directory = registered("a", "b", "c")
    bring(directory, "a", 1.0)
    bring(directory, "b", 2.0)
    directory.claim("a", 0.0)
    directory.acquire("a", 3.0)
    directory.release("a", 4.0)
    directory.unclaim("a")
    change = room_for(directory, "c", 5.0)
    assert change is not None and [e.digest for e in change.evictions] == ["b"]


def test_an_adapter_with_a_running_row_is_never_evicted() -> None:
    directory = registered("a", "b", "c")
    for now_s, digest in enumerate("ab"):
        bring(directory, digest, now_s)
        directory.claim(digest, 0.0)
        directory.acquire(digest, now_s)
    assert room_for(directory, "c", 9.0) is None
    assert directory.usable("a") and directory.usable("b")
    directory.check()


def test_a_copy_in_flight_is_never_evicted() -> None:
    directory = registered("a", "b", "c")
    assert room_for(directory, "a", 0.0) and room_for(directory, "b", 0.0)
    assert room_for(directory, "c", 1.0) is None


def test_a_pinned_adapter_is_never_evicted() -> None:
    directory = registered("b", "c", capacity=80)
    directory.register("a", "/a", 40, pinned=True, now_s=0.0)
    bring(directory, "a", 0.0)
    bring(directory, "b", 5.0)
    change = room_for(directory, "c", 9.0)
    assert change is not None and [e.digest for e in change.evictions] == ["b"]


def test_an_adapter_loaded_for_a_waiting_request_is_kept_until_it_has_run() -> None:
    directory = registered("a", "b", capacity=40)
    directory.claim("a", 0.0)
    directory.claim("b", 0.0)
    bring(directory, "a", 0.0)
    assert room_for(directory, "b", 1.0) is None
    directory.acquire("a", 2.0)
    directory.release("a", 3.0)
    assert room_for(directory, "b", 4.0) is not None


def test_a_cancelled_request_no_longer_keeps_its_adapter() -> None:
    directory = registered("a", "b", capacity=40)
    directory.claim("a", 0.0)
    bring(directory, "a", 0.0)
    directory.unclaim("a")
    assert room_for(directory, "b", 1.0) is not None


def test_victims_are_as_many_as_the_bytes_ask_for() -> None:
    directory = registered("a", "b", "c", size=30)
    directory.register("large", "/large", 90, pinned=False, now_s=0.0)
    for now_s, digest in enumerate("abc"):
        bring(directory, digest, now_s)
    change = room_for(directory, "large", 9.0)
    assert change is not None and [e.digest for e in change.evictions] == ["a", "b", "c"]
    directory.check()


@pytest.mark.parametrize("size, victims", [(40, ["large"]), (70, ["b", "large"])])
def test_those_that_a_larger_one_after_them_makes_needless_stay(
    size: int, victims: list[str]
) -> None:
    directory = adapter_cache()
    for digest, bytes in (("a", 10), ("b", 20), ("large", 50), ("c", 20), ("new", size)):
        directory.register(digest, f"/{digest}", bytes, pinned=False, now_s=0.0)
    for now_s, digest in enumerate(("a", "b", "large", "c")):
        bring(directory, digest, float(now_s))
    assert directory.victim_search.for_image("new") == victims


def test_scattered_bytes_slide_together_instead_of_a_third_eviction() -> None:
    directory = registered("a", "b", "c", "d", size=25)
    for now_s, digest in enumerate("abcd"):
        bring(directory, digest, now_s)
    for digest in "bd":
        directory.claim(digest, 0.0)
        directory.acquire(digest, 9.0)
    directory.register("large", "/large", 50, pinned=False, now_s=9.0)
    change = room_for(directory, "large", 9.0)
    assert change is not None
    assert [e.digest for e in change.evictions] == ["a", "c"]
    assert [(m.slot, m.target) for m in change.slides] == [(2, 0), (4, 25)]
    assert change.load.offset == 50


def test_nothing_is_evicted_when_it_would_not_be_enough() -> None:
    directory = registered("a", "b")
    directory.register("large", "/large", 90, pinned=False, now_s=0.0)
    bring(directory, "a", 0.0)
    bring(directory, "b", 1.0)
    directory.claim("b", 0.0)
    directory.acquire("b", 2.0)
    assert room_for(directory, "large", 9.0) is None
    assert directory.usable("a")
    directory.check()


def test_slots_bound_the_residents_too() -> None:
    directory = registered("a", "b", size=1, slots=1)
    bring(directory, "a", 0.0)
    change = room_for(directory, "b", 1.0)
    assert change is not None and change.evictions == (Evict("a", 1),) and change.load.slot == 1


def test_a_failed_load_frees_its_place_and_waits_longer_each_time() -> None:
    directory = registered("a")
    pauses = []
    for _ in range(5):
        assert room_for(directory, "a", 0.0) is not None
        directory.failed("a", "broken", 0.0)
        pauses.append(directory.adapters["a"].retry_s)
        directory.check()
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert directory.extents.free == 100
    assert directory.entries()[0].reason == "broken"


def test_a_forgotten_adapter_stays_until_its_requests_have_ended() -> None:
    directory = registered("a")
    bring(directory, "a", 0.0)
    directory.claim("a", 0.0)
    directory.acquire("a", 1.0)
    assert directory.forget("a") == []
    assert directory.usable("a")
    directory.release("a", 2.0)
    assert directory.unclaim("a") == [Evict("a", 1)]
    assert "a" not in directory.adapters and directory.extents.free == 100
    directory.check()


def test_one_forgotten_while_it_loads_leaves_when_the_copy_has_ended() -> None:
    directory = registered("a")
    assert room_for(directory, "a", 0.0) is not None
    assert directory.forget("a") == []
    directory.check()
    assert directory.loaded("a", 1.0) == [Evict("a", 1)]
    directory.check()
    assert [e.tier for e in directory.changes()] == [Tier.ABSENT]


def test_one_registered_again_before_it_left_stays() -> None:
    directory = registered("a")
    bring(directory, "a", 0.0)
    directory.claim("a", 0.0)
    directory.forget("a")
    directory.register("a", "/a", 40, pinned=False, now_s=1.0)
    assert directory.unclaim("a") == []
    assert directory.usable("a")


def test_changes_are_told_once() -> None:
    directory = registered("a")
    assert [(e.digest, e.tier) for e in directory.changes()] == [("a", Tier.DISK)]
    room_for(directory, "a", 0.0)
    directory.loaded("a", 1.0)
    assert [(e.digest, e.tier, e.bytes) for e in directory.changes()] == [("a", Tier.DEVICE, 40)]
    assert directory.changes() == []


def test_illegal_steps_raise_and_change_nothing() -> None:
    directory = registered("a")
    for illegal in (
        lambda: directory.loaded("a", 0.0),
        lambda: directory.failed("a", "?", 0.0),
        lambda: directory.acquire("a", 0.0),
        lambda: directory.release("a", 0.0),
        lambda: directory.unclaim("a"),
    ):
        with pytest.raises(AssertionError):
            illegal()
        directory.check()
        assert directory.adapters["a"].tier is Tier.DISK


def test_a_pin_ends_when_the_adapter_is_forgotten_even_if_requests_are_left() -> None:
    directory = registered("b", capacity=40)
    directory.register("a", "/a", 40, pinned=True, now_s=0.0)
    bring(directory, "a", 0.0)
    directory.claim("a", 0.0)
    directory.acquire("a", 1.0)
    directory.release("a", 2.0)
    assert room_for(directory, "b", 3.0) is None
    directory.forget("a")
    assert room_for(directory, "b", 3.0) is not None
    directory.check()


def test_what_is_being_copied_does_not_slide_with_the_others() -> None:
    directory = registered("a", "b", "c", "d", "e", size=20)
    bring(directory, "a", 0.0)
    assert room_for(directory, "b", 1.0) is not None  # its copy goes on
    for digest in "cde":
        bring(directory, digest, 2.0)
    for digest in "ace":
        directory.forget(digest)
    directory.register("large", "/large", 40, pinned=False, now_s=4.0)
    assert directory.victim_search.for_image("large") == []
    change = directory.make_room("large", [], 4.0)
    assert [(m.slot, m.source, m.target) for m in change.slides] == [(4, 60, 40)]
    assert change.load.offset == 60
    directory.loaded("b", 5.0)
    directory.check()


def test_pins_leave_room_for_the_largest_other_image() -> None:
    directory = registered("a", size=40, slots=3)
    assert directory.refusal("a", 40, pinned=True) is None
    assert "100" in (directory.refusal("huge", 101, pinned=False) or "")
    assert directory.refusal("p", 60, pinned=True) is None
    assert "pinned adapters take 61" in (directory.refusal("p", 61, pinned=True) or "")
    directory.register("p", "/p", 60, pinned=True, now_s=0.0)
    assert "largest other one 41" in (directory.refusal("b", 41, pinned=False) or "")
    for digest in "qr":
        directory.register(digest, "/", 0, pinned=True, now_s=0.0)
    assert "3 places" in (directory.refusal("s", 0, pinned=True) or "")
