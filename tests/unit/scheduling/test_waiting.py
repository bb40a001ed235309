"""The queue: by adapter, so that none hides another; by priority, then arrival."""

from replica.scheduling.request import Request, Sampling
from replica.scheduling.waiting import Waiting


def request(name: str, place: str | None = None, priority: int = 0) -> Request:
    return Request(name, (1,), Sampling(), place, place, priority, 0.0)


def names(waiting: Waiting, *places: str | None) -> list[str]:
    return [r.id for r in waiting.in_order(places or None, lambda _: 0.0)]


def test_arrival_counts_across_adapters_and_priority_before_it() -> None:
    waiting = Waiting()
    for name, place, priority in (("1", "a", 0), ("2", None, 0), ("3", "b", -5), ("4", "a", 0)):
        waiting.add(request(name, place, priority))
    assert names(waiting) == ["3", "1", "2", "4"]
    assert names(waiting, None, "a") == ["1", "2", "4"]
    assert waiting.head("a").id == "1" and sorted(waiting.adapter_keys()) == ["a", "b"]
    assert len(waiting) == 4


def test_less_of_a_share_goes_first_within_a_priority() -> None:
    waiting = Waiting()
    had = {"a": 5.0, "b": 1.0}
    for name, place, priority in (("1", "a", 0), ("2", "b", 0), ("3", "a", -1)):
        waiting.add(request(name, place, priority))
    assert [r.id for r in waiting.in_order(None, lambda place: had[place or ""])] == ["3", "2", "1"]


def test_one_that_comes_back_stands_where_it_stood() -> None:
    waiting = Waiting()
    first, second = request("1", "a"), request("2", "a")
    waiting.add(first)
    waiting.add(second)
    waiting.remove(first)
    waiting.add(first)
    assert names(waiting) == ["1", "2"]


def test_who_is_taken_while_the_queue_is_read_hides_nobody() -> None:
    waiting = Waiting()
    for i in range(6):
        waiting.add(request(str(i), "ab"[i % 2]))
    seen = []
    for r in waiting.in_order(None, lambda _: 0.0):
        seen.append(r.id)
        if int(r.id) % 3 == 0:
            waiting.remove(r)
    assert seen == list("012345") and names(waiting) == ["1", "2", "4", "5"]


def test_all_begun_tells_whether_everyone_has_a_token() -> None:
    waiting = Waiting()
    begun, fresh = request("1", "a"), request("2", "a")
    begun.output.append(7)
    begun.tokens += 1
    waiting.add(begun)
    assert waiting.all_begun("a")
    waiting.add(fresh)
    assert not waiting.all_begun("a")
    waiting.remove(fresh)
    assert waiting.all_begun("a")
    waiting.remove(begun)
    assert not waiting.waited_for("a") and len(waiting) == 0
