"""When the engine's process sends a load report."""

import itertools
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, cast

import pytest

from cluster.config import EngineConfig
from cluster.values import LoadReport
from replica.engine.engine import Engine
from replica.engine.engine_process import _REPORT_S, Server
from replica.engine.messages import Hangup, Message, Wake
from replica.engine.pulse import Pulse
from replica.scheduling.request import Outputs


class SteppedEngine:
    """Idle once; then each step takes `step_s` of its own time, until `steps` are over."""

    def __init__(self, step_s: float, steps: int, ended: Callable[[], None]) -> None:
        self.idle, self.wake_s = True, None
        self.config = EngineConfig("stub")
        self.committed_s, self.taken = 100.0, 0
        self._step_s, self._steps, self._ended = step_s, steps, ended

    def step(self) -> Outputs:
        self.taken += 1
        if self.taken > 1:
            self.idle = False
            self.committed_s += self._step_s
        if self.taken == self._steps:
            self._ended()
        return Outputs()

    def changes(self) -> list[Any]:
        return []

    def report(self) -> LoadReport:
        return LoadReport(steps=self.taken, step_s=0.0)


class Sent:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
        self.messages.append(message)


@pytest.mark.parametrize("step_s, apart", [(0.02, 3), (0.1, 1), (0.0001, 500)])
def test_a_busy_engine_reports_at_an_interval_of_time_however_long_its_first_steps_take(
    step_s: float, apart: int
) -> None:
    """The first report, of an idle engine, knows no step time."""
    inbox: SimpleQueue[Any] = SimpleQueue()
    for _ in range(2):
        inbox.put(Wake())
    sent = Sent()
    engine = SteppedEngine(step_s, 2 * apart + 2, lambda: inbox.put(Hangup()))
    Server(cast(Any, sent), cast(Engine, engine), inbox, Pulse()).serve()
    reports = [message.report.steps for message in sent.messages if message.report is not None]
    assert reports[0] == 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(reports)]
    assert gaps and all(abs(gap - apart) <= 1 for gap in gaps), f"{gaps} steps, {_REPORT_S} s"
