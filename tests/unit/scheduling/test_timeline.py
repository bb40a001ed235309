"""The timeline of each request, and counts of all events."""

from replica.scheduling.timeline import Event, Timelines
from replica.scheduling.turns import Sharing
from tests.core import begin, new, run, scheduler, settle


def events(core: object, name: str) -> list[str]:
    return [entry.event.value for entry in core.timelines.timeline(name)]  # type: ignore[attr-defined]


def test_a_timeline_runs_from_queued_to_done() -> None:
    core = scheduler()
    core.add(new("x", "a", max_tokens=2), 1.0)
    run(core, 1.0)
    core.loaded("a", 1.5)
    run(core, 2.0)
    run(core, 2.1)
    timeline = core.timelines.timeline("x")
    assert [(entry.at_s, entry.event.value) for entry in timeline] == [
        (1.0, "queued"),
        (1.0, "load started"),
        (1.5, "load done"),
        (2.0, "running"),
        (2.0, "first token"),
        (2.1, "done"),
    ]
    assert timeline[0].detail == "adapter disk" and timeline[-1].detail == "finished"


def test_parking_and_resuming_are_recorded() -> None:
    core = scheduler(sharing=Sharing(quantum_s=0.5), arena=40)
    begin(core, new("x", "a", max_tokens=60))
    core.add(new("y", "b", max_tokens=3), 0.0)
    for step in range(40):
        settle(core, 0.5 + step * 0.05)
    names = events(core, "x")
    assert names.index("parked") < names.index("resumed")
    assert core.timelines.counts[Event.PARKED] == core.timelines.counts[Event.RESUMED] == 1


def test_a_failed_load_and_a_cancel_are_recorded() -> None:
    core = scheduler()
    core.add(new("x", "a"), 0.0)
    run(core)
    core.load_failed("a", "broken", 0.0)
    run(core)
    assert events(core, "x")[-2:] == ["load failed", "done"]
    core.add(new("y"), 0.0)
    core.cancel("y", 0.5)
    assert core.timelines.timeline("y")[-1].detail == "cancelled"


def test_a_preemption_is_recorded() -> None:
    core = scheduler(pages=4)
    core.add(new("old", prompt=30, max_tokens=30), 0.0)
    core.add(new("new", prompt=30, max_tokens=30), 0.0)
    while core.has_work:
        run(core)
    assert "preempted" in events(core, "new") and "preempted" not in events(core, "old")


def test_the_oldest_request_and_the_middle_of_a_long_timeline_are_forgotten() -> None:
    timelines = Timelines(requests_max=2, events_max=4)
    for name in ("a", "b", "c"):
        timelines.note(name, 0.0, Event.QUEUED)
    assert timelines.timeline("a") == [] and timelines.timeline("b") and timelines.timeline("c")
    for at_s in range(1, 9):
        timelines.note("c", float(at_s), Event.PARKED)
    assert [entry.at_s for entry in timelines.timeline("c")] == [0.0, 1.0, 7.0, 8.0]
    assert timelines.counts == {Event.QUEUED: 3, Event.PARKED: 8}


def test_an_unknown_request_has_no_timeline() -> None:
    assert Timelines().timeline("nobody") == []
