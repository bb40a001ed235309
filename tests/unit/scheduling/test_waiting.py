"""The queue: grouped by adapter so that none hides another; by priority, then arrival."""

from replica.scheduling.request import Request, Sampling
from replica.scheduling.waiting import Waiting


def request(name: str, adapter_key: str | None = None, priority: int = 0) -> Request:
    return Request(name, (1,), Sampling(), adapter_key, adapter_key, priority, 0.0)


def names(waiting: Waiting, *adapter_keys: str | None) -> list[str]:
    return [r.id for r in waiting.in_order(adapter_keys or None, lambda _: 0.0)]


def test_order_is_by_priority_then_arrival_across_adapters() -> None:
    waiting = Waiting()
    for name, adapter_key, priority in (
        ("1", "a", 0),
        ("2", None, 0),
        ("3", "b", -5),
        ("4", "a", 0),
    ):
        waiting.add(request(name, adapter_key, priority))
    assert names(waiting) == ["3", "1", "2", "4"]
    assert names(waiting, None, "a") == ["1", "2", "4"]
    assert waiting.head("a").id == "1" and sorted(waiting.adapter_keys()) == ["a", "b"]
    assert len(waiting) == 4


def test_a_lower_share_goes_first_within_a_priority() -> None:
    waiting = Waiting()
    had = {"a": 5.0, "b": 1.0}
    for name, adapter_key, priority in (("1", "a", 0), ("2", "b", 0), ("3", "a", -1)):
        waiting.add(request(name, adapter_key, priority))
    assert [r.id for r in waiting.in_order(None, lambda adapter_key: had[adapter_key or ""])] == [
        "3",
        "2",
        "1",
    ]


def test_a_request_that_returns_keeps_its_position() -> None:
    waiting = Waiting()
    first, second = request("1", "a"), request("2", "a")
    waiting.add(first)
    waiting.add(second)
    waiting.remove(first)
    waiting.add(first)
    assert names(waiting) == ["1", "2"]


def test_a_request_removed_during_iteration_hides_no_other() -> None:
    waiting = Waiting()
    for i in range(6):
        waiting.add(request(str(i), "ab"[i % 2]))
    seen = []
    for r in waiting.in_order(None, lambda _: 0.0):
        seen.append(r.id)
        if int(r.id) % 3 == 0:
            waiting.remove(r)
    assert seen == list("012345") and names(waiting) == ["1", "2", "4", "5"]


def test_all_begun_is_true_if_each_request_has_a_token() -> None:
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
