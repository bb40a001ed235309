"""Messages between the server's process and the engine's process."""

from dataclasses import dataclass, field

from cluster.errors import FleetError
from cluster.values import AdapterState, LoadReport, Version
from replica.scheduling.request import NewRequest, Outputs
from replica.scheduling.timeline import TimelineEvent


@dataclass(frozen=True, slots=True)
class Submit:
    request: NewRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class Register:
    call: int
    version: Version
    path: str


@dataclass(frozen=True, slots=True)
class Forget:
    call: int
    digest: str


@dataclass(frozen=True, slots=True)
class GetTimeline:
    """Asks for the timeline of one request."""

    call: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Wake:
    """A load has ended."""


@dataclass(frozen=True, slots=True)
class Hangup:
    """The other side is gone or stops."""


Command = Submit | Cancel | Register | Forget | GetTimeline | Wake | Hangup
Result = FleetError | list[TimelineEvent] | None


@dataclass(slots=True)
class Message:
    """What the engine sends after a step. done: finished calls, each with its result or error."""

    outputs: Outputs = field(default_factory=Outputs)
    residency: list[AdapterState] = field(default_factory=list)
    report: LoadReport | None = None
    done: list[tuple[int, Result]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.outputs or self.residency or self.report or self.done)
