"""What happened to each of the most recent requests, and when: why a request waited."""

from collections import Counter, OrderedDict
from enum import StrEnum
from typing import NamedTuple


class Event(StrEnum):
    QUEUED = "queued"
    LOAD_STARTED = "load started"
    LOAD_DONE = "load done"
    LOAD_FAILED = "load failed"
    RUNNING = "running"
    FIRST_TOKEN = "first token"
    PARKED = "parked"
    RESUMED = "resumed"
    PREEMPTED = "preempted"
    DONE = "done"


class TimelineEvent(NamedTuple):
    at_s: float
    event: Event
    detail: str = ""


class Timelines:
    """Timelines of the last `requests_max` requests, and the total count of each event."""

    def __init__(self, requests_max: int = 4096, events_max: int = 64) -> None:
        self.counts: Counter[Event] = Counter()
        self._requests_max = requests_max
        self._events_max = events_max
        self._lines: OrderedDict[str, list[tuple[float, Event, str]]] = OrderedDict()

    def note(self, request_id: str, at_s: float, event: Event, detail: str = "") -> None:
        self.counts[event] += 1
        line = self._lines.get(request_id)
        if line is None:
            line = self._lines[request_id] = []
            if len(self._lines) > self._requests_max:
                self._lines.popitem(last=False)
        if len(line) == self._events_max:
            # Keep the start and the latest events; the middle of a long timeline repeats itself.
            del line[self._events_max // 2]
        line.append((at_s, event, detail))

    def timeline(self, request_id: str) -> list[TimelineEvent]:
        """Empty if the request is unknown or too old."""
        return list(map(TimelineEvent._make, self._lines.get(request_id, ())))
