"""Adapters move by the table in `adapter_cache.py`; one in use is never touched."""

import pytest

from cluster.values import Tier
from replica.scheduling import victims
from replica.scheduling.adapter import Adapter, ArenaChange, Evict, Pins
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.extents import Extents


def adapter_cache(
    capacity: int = 100, slots: int = 8, order: victims.EvictionOrder = victims.lru
) -> AdapterCache:
    return AdapterCache(
        Extents(capacity, alignment=1),
        slots,
        order,
        lambda size, _: size / 100,
        1.0,
        8.0,
    )


def registered(*digests: str, size: int = 40, capacity: int = 100, slots: int = 8) -> AdapterCache:
    cache = adapter_cache(capacity, slots)
    for digest in digests:
        cache.register(digest, f"/{digest}", size, pinned=False, now_s=0.0)
    return cache


def begin_load(cache: AdapterCache, digest: str, now_s: float) -> ArenaChange | None:
    victims = cache.victim_search.for_image(digest)
    return None if victims is None else cache.make_room(digest, victims, now_s)


def load(cache: AdapterCache, digest: str, now_s: float) -> None:
    assert begin_load(cache, digest, now_s) is not None
    cache.loaded(digest, now_s)
    cache.check()


def test_a_load_takes_a_slot_and_bytes_at_once() -> None:
    cache = registered("a", "b")
    first, second = begin_load(cache, "a", 0.0), begin_load(cache, "b", 0.0)
    assert first is not None and second is not None
    assert (first.load.slot, first.load.offset) != (second.load.slot, second.load.offset)
    assert first.load.slot != 0 and second.load.slot != 0
    assert cache.extents.free == 20
    assert not cache.usable("a")
    cache.check()


def test_the_least_recently_used_leaves_first() -> None:
    cache = registered("a", "b", "c")
    load(cache, "a", 1.0)
    load(cache, "b", 2.0)
    cache.claim("a", 0.0)
    cache.acquire("a", 3.0)
    cache.release("a", 4.0)
    cache.unclaim("a")
    change = begin_load(cache, "c", 5.0)
    assert change is not None and [e.digest for e in change.evictions] == ["b"]


def test_an_adapter_with_a_running_row_is_never_evicted() -> None:
    cache = registered("a", "b", "c")
    for now_s, digest in enumerate("ab"):
        load(cache, digest, now_s)
        cache.claim(digest, 0.0)
        cache.acquire(digest, now_s)
    assert begin_load(cache, "c", 9.0) is None
    assert cache.usable("a") and cache.usable("b")
    cache.check()


def test_a_copy_in_flight_is_never_evicted() -> None:
    cache = registered("a", "b", "c")
    assert begin_load(cache, "a", 0.0) and begin_load(cache, "b", 0.0)
    assert begin_load(cache, "c", 1.0) is None


def test_a_pinned_adapter_is_never_evicted() -> None:
    cache = registered("b", "c", capacity=80)
    cache.register("a", "/a", 40, pinned=True, now_s=0.0)
    load(cache, "a", 0.0)
    load(cache, "b", 5.0)
    change = begin_load(cache, "c", 9.0)
    assert change is not None and [e.digest for e in change.evictions] == ["b"]


def test_an_adapter_loaded_for_a_waiting_request_is_kept_until_it_has_run() -> None:
    cache = registered("a", "b", capacity=40)
    cache.claim("a", 0.0)
    cache.claim("b", 0.0)
    load(cache, "a", 0.0)
    assert begin_load(cache, "b", 1.0) is None
    cache.acquire("a", 2.0)
    cache.release("a", 3.0)
    assert begin_load(cache, "b", 4.0) is not None


def test_a_cancelled_request_no_longer_keeps_its_adapter() -> None:
    cache = registered("a", "b", capacity=40)
    cache.claim("a", 0.0)
    load(cache, "a", 0.0)
    cache.unclaim("a")
    assert begin_load(cache, "b", 1.0) is not None


def test_as_many_victims_leave_as_the_bytes_need() -> None:
    cache = registered("a", "b", "c", size=30)
    cache.register("large", "/large", 90, pinned=False, now_s=0.0)
    for now_s, digest in enumerate("abc"):
        load(cache, digest, now_s)
    change = begin_load(cache, "large", 9.0)
    assert change is not None and [e.digest for e in change.evictions] == ["a", "b", "c"]
    cache.check()


@pytest.mark.parametrize("size, victims", [(40, ["large"]), (70, ["b", "large"])])
def test_victims_that_a_later_larger_one_makes_redundant_stay(
    size: int, victims: list[str]
) -> None:
    cache = adapter_cache()
    for digest, bytes in (("a", 10), ("b", 20), ("large", 50), ("c", 20), ("new", size)):
        cache.register(digest, f"/{digest}", bytes, pinned=False, now_s=0.0)
    for now_s, digest in enumerate(("a", "b", "large", "c")):
        load(cache, digest, float(now_s))
    assert cache.victim_search.for_image("new") == victims


def test_scattered_bytes_slide_together_instead_of_a_third_eviction() -> None:
    cache = registered("a", "b", "c", "d", size=25)
    for now_s, digest in enumerate("abcd"):
        load(cache, digest, now_s)
    for digest in "bd":
        cache.claim(digest, 0.0)
        cache.acquire(digest, 9.0)
    cache.register("large", "/large", 50, pinned=False, now_s=9.0)
    change = begin_load(cache, "large", 9.0)
    assert change is not None
    assert [e.digest for e in change.evictions] == ["a", "c"]
    assert [(m.slot, m.target) for m in change.slides] == [(2, 0), (4, 25)]
    assert change.load.offset == 50


def test_nothing_is_evicted_if_all_victims_would_not_be_enough() -> None:
    cache = registered("a", "b")
    cache.register("large", "/large", 90, pinned=False, now_s=0.0)
    load(cache, "a", 0.0)
    load(cache, "b", 1.0)
    cache.claim("b", 0.0)
    cache.acquire("b", 2.0)
    assert begin_load(cache, "large", 9.0) is None
    assert cache.usable("a")
    cache.check()


def test_slots_also_bound_the_residents() -> None:
    cache = registered("a", "b", size=1, slots=1)
    load(cache, "a", 0.0)
    change = begin_load(cache, "b", 1.0)
    assert change is not None and change.evictions == (Evict("a", 1),) and change.load.slot == 1


def test_a_failed_load_frees_its_place_and_waits_longer_each_time() -> None:
    cache = registered("a")
    pauses = []
    for _ in range(5):
        assert begin_load(cache, "a", 0.0) is not None
        cache.failed("a", "broken", 0.0)
        pauses.append(cache.adapters["a"].retry_s)
        cache.check()
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert cache.extents.free == 100
    assert cache.entries()[0].reason == "broken"


def test_a_forgotten_adapter_stays_until_its_requests_have_ended() -> None:
    cache = registered("a")
    load(cache, "a", 0.0)
    cache.claim("a", 0.0)
    cache.acquire("a", 1.0)
    assert cache.forget("a") == []
    assert cache.usable("a")
    cache.release("a", 2.0)
    assert cache.unclaim("a") == [Evict("a", 1)]
    assert "a" not in cache.adapters and cache.extents.free == 100
    cache.check()


def test_an_adapter_forgotten_during_its_load_leaves_when_the_copy_ends() -> None:
    cache = registered("a")
    assert begin_load(cache, "a", 0.0) is not None
    assert cache.forget("a") == []
    cache.check()
    assert cache.loaded("a", 1.0) == [Evict("a", 1)]
    cache.check()
    assert [e.tier for e in cache.changes()] == [Tier.ABSENT]


def test_an_adapter_registered_again_before_it_left_stays() -> None:
    cache = registered("a")
    load(cache, "a", 0.0)
    cache.claim("a", 0.0)
    cache.forget("a")
    cache.register("a", "/a", 40, pinned=False, now_s=1.0)
    assert cache.unclaim("a") == []
    assert cache.usable("a")


def test_each_change_is_reported_once() -> None:
    cache = registered("a")
    assert [(e.digest, e.tier) for e in cache.changes()] == [("a", Tier.DISK)]
    begin_load(cache, "a", 0.0)
    cache.loaded("a", 1.0)
    assert [(e.digest, e.tier, e.bytes) for e in cache.changes()] == [("a", Tier.DEVICE, 40)]
    assert cache.changes() == []


def test_illegal_steps_raise_and_change_nothing() -> None:
    cache = registered("a")
    for illegal in (
        lambda: cache.loaded("a", 0.0),
        lambda: cache.failed("a", "?", 0.0),
        lambda: cache.acquire("a", 0.0),
        lambda: cache.release("a", 0.0),
        lambda: cache.unclaim("a"),
    ):
        with pytest.raises(AssertionError):
            illegal()
        cache.check()
        assert cache.adapters["a"].tier is Tier.DISK


def test_a_pin_ends_when_the_adapter_is_forgotten_even_if_requests_are_left() -> None:
    cache = registered("b", capacity=40)
    cache.register("a", "/a", 40, pinned=True, now_s=0.0)
    load(cache, "a", 0.0)
    cache.claim("a", 0.0)
    cache.acquire("a", 1.0)
    cache.release("a", 2.0)
    assert begin_load(cache, "b", 3.0) is None
    cache.forget("a")
    assert begin_load(cache, "b", 3.0) is not None
    cache.check()


def test_an_image_being_copied_does_not_slide() -> None:
    cache = registered("a", "b", "c", "d", "e", size=20)
    load(cache, "a", 0.0)
    assert begin_load(cache, "b", 1.0) is not None  # it is still being copied
    for digest in "cde":
        load(cache, digest, 2.0)
    for digest in "ace":
        cache.forget(digest)
    cache.register("large", "/large", 40, pinned=False, now_s=4.0)
    assert cache.victim_search.for_image("large") == []
    change = cache.make_room("large", [], 4.0)
    assert [(m.slot, m.source, m.target) for m in change.slides] == [(4, 60, 40)]
    assert change.load.offset == 60
    cache.loaded("b", 5.0)
    cache.check()


def test_pins_leave_room_for_the_largest_other_image() -> None:
    cache = registered("a", size=40, slots=3)
    assert cache.refusal("a", 40, pinned=True) is None
    assert "100" in (cache.refusal("huge", 101, pinned=False) or "")
    assert cache.refusal("p", 60, pinned=True) is None
    assert "pinned adapters take 61" in (cache.refusal("p", 61, pinned=True) or "")
    cache.register("p", "/p", 60, pinned=True, now_s=0.0)
    assert "largest other one 41" in (cache.refusal("b", 41, pinned=False) or "")
    for digest in "qr":
        cache.register(digest, "/", 0, pinned=True, now_s=0.0)
    assert "3 places" in (cache.refusal("s", 0, pinned=True) or "")
    cache.forget("p")
    assert cache.refusal("b", 41, pinned=False) is None
    cache.check()


def test_a_refusal_looks_at_one_unpinned_adapter_of_each_size() -> None:
    """To look at ten thousand took 1.2 ms of the engine's time, at each registration."""
    pins = Pins()
    adapters = [Adapter(f"{i}", ["/"], 40 + i % 2, False, 0.0) for i in range(500)]
    for adapter in adapters:
        pins.add(adapter)
    assert sorted(pins.others(None)) == [(40, False), (41, False)]
    pins.pin(adapters[0], True)
    assert sorted(pins.others(None)) == [(40, False), (40, True), (41, False)]
    assert sorted(pins.others(adapters[0])) == [(40, False), (41, False)]
    for adapter in adapters[3::2]:
        pins.remove(adapter)
    assert sorted(pins.others(adapters[1])) == [(40, False), (40, True)]
    pins.check([*adapters[::2], adapters[1]])


def use(cache: AdapterCache, digest: str, now_s: float, end_s: float | None = None) -> None:
    """One row runs with it, until `end_s`. It is loaded first if it is absent."""
    cache.claim(digest, now_s)
    if not cache.usable(digest):
        load(cache, digest, now_s)
    cache.acquire(digest, now_s)
    cache.release(digest, now_s if end_s is None else end_s)
    cache.unclaim(digest)


@pytest.mark.parametrize("order", victims.ORDERS.values(), ids=victims.ORDERS)
def test_adapters_that_fell_silent_give_their_places_to_those_in_use(
    order: victims.EvictionOrder,
) -> None:
    cache = adapter_cache(capacity=8, order=order)
    old, current = "abcdefgh", "ijklmnop"
    for digest in old + current:
        cache.register(digest, f"/{digest}", 1, pinned=False, now_s=0.0)
    for use_number in range(4800):
        use(cache, old[use_number % 8], use_number / 80)  # 10 a second each
    for use_number in range(800):
        use(cache, current[use_number % 8], 3600 + use_number * 1.25)  # 0.1 a second each
    assert cache.loads == 16


def test_the_value_of_an_adapter_falls_while_a_row_runs() -> None:
    cache = adapter_cache(capacity=2, order=victims.cost)
    for digest in "abc":
        cache.register(digest, f"/{digest}", 1, pinned=False, now_s=0.0)
    for _ in range(3):
        use(cache, "a", 0.0)
    use(cache, "a", 1.0, end_s=600.0)
    use(cache, "b", 580.0)
    assert cache.victim_search.for_image("c") == ["a"]
