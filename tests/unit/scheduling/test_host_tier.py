"""Host memory keeps the images that were used last, and reports those that it dropped."""

from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.host_tier import HostTier
from tests.core import scheduler


def kept(digests: str) -> AdapterCache:
    """Adapters of 40 bytes whose images host memory keeps, beside up to 80 bytes more."""
    cache = scheduler(arena=160).adapter_cache
    cache.host = HostTier(40 * len(digests))
    for digest in digests:
        cache.begin_on_host(digest)
        cache.make_room(digest, [], 0.0)
        cache.loaded(digest, 0.0)
    return cache


def test_an_image_in_use_on_the_device_stays_in_host_memory() -> None:
    cache = kept("abc")
    for digest in "ab":
        cache.claim(digest, 1.0)
        cache.acquire(digest, 1.0)
    cache.release("a", 2.0)
    assert [cache.host.drop_oldest() for _ in "abc"] == ["c", "b", "a"]


def test_an_image_that_is_loaded_from_host_memory_stays_there() -> None:
    cache = scheduler().adapter_cache
    cache.host = HostTier(80)
    cache.begin_on_host("a")
    cache.begin_on_host("b")
    cache.make_room("a", [], 0.0)
    assert cache.host.drop_oldest() == "b"


def test_each_dropped_image_is_reported_once() -> None:
    cache = kept("abc")
    cache.drop_from_host()
    cache.keep_on_host("d")
    cache.forget("b")
    assert cache.host.drops() == ["a", "b"]
    assert cache.host.drops() == []


def test_an_image_that_came_back_is_not_reported() -> None:
    host = HostTier(1)
    host.keep("a", 1)
    host.keep("b", 1)
    host.keep("a", 1)
    assert host.drops() == ["b"]
