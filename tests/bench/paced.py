"""Slows an engine down to another device's pace: steps and loads last at least as long as there.

The engine computes at full speed. Results are withheld until the time they are due.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from replica.adapters.loader import Loaded
from replica.engine.engine import Engine
from replica.model.launch import Row, Ticket
from replica.scheduling.plan import Plan, Work
from replica.scheduling.request import PromptResult, Sampled


@dataclass(frozen=True, slots=True)
class _HeldTicket:
    ticket: Ticket
    due_s: float
    ended: Callable[[bool], None]

    def results(self) -> list[Sampled | None]:
        sampled = self.ticket.results()
        rest_s = self.due_s - time.monotonic()
        self.ended(rest_s <= 0)
        time.sleep(max(rest_s, 0.0))
        return sampled

    def prompts(self) -> dict[int, PromptResult]:
        return self.ticket.prompts()


class PacedSteps:
    """Paces an engine's steps. step_s: the least time of a batch, including its plan, excluding
    the loads that it waited for.

    late: the number of batches that took longer.
    """

    def __init__(self, engine: Engine, step_s: Callable[[Sequence[Work]], float]) -> None:
        self.late = 0
        self._step_s = step_s
        self._overlap = engine.config.overlap
        self._start_s = 0.0
        self._rows: Sequence[Work] = ()
        scheduler: Any = engine.scheduler
        runner: Any = engine.runner
        self._plan, self._without_ended = scheduler.step, scheduler.without_ended
        self._launch = runner.launch
        scheduler.step, scheduler.without_ended = self._planned, self._shortened
        runner.launch = self._launched

    def _planned(self, now_s: float) -> Plan:
        plan: Plan = self._plan(now_s)
        self._start_s, self._rows = now_s, plan.rows
        return plan

    def _shortened(self, plan: Plan) -> Plan:
        shorter: Plan = self._without_ended(plan)
        self._rows = shorter.rows
        return shorter

    def _launched(self, rows: Sequence[Row]) -> Ticket:
        began_s = self._start_s if self._overlap else time.monotonic()
        due_s = began_s + self._step_s(self._rows)
        return _HeldTicket(self._launch(rows), due_s, self._count)

    def _count(self, late: bool) -> None:
        self.late += late


class PacedLoads:
    """Limits the total rate of an engine's loads to `bytes_per_s`."""

    def __init__(self, engine: Engine, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()
        loader: Any = engine._loader
        self._load = loader._load
        loader._load = self._paced

    def _paced(self, load: Any, *rest: Any) -> Loaded:
        start_s = time.monotonic()
        ended: Loaded = self._load(load, *rest)
        with self._lock:
            self._free_s = max(self._free_s, start_s) + load.bytes / self._bytes_per_s
            rest_s = self._free_s - time.monotonic()
        time.sleep(max(rest_s, 0.0))
        return dataclasses.replace(ended, seconds=time.monotonic() - start_s)
