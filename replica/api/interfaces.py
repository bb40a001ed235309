"""What the HTTP server needs: an engine and a book of adapters, each with two implementations."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.config import EngineConfig
from cluster.values import AdapterState, LoadReport, Version
from replica.scheduling.request import Delta, NewRequest
from replica.scheduling.timeline import TimelineEvent


class Engine(Protocol):
    """An engine that runs elsewhere: in its own process (`link.py`), or a stub in benchmarks."""

    @property
    def alive(self) -> bool:
        """False once the engine can answer nothing more."""

    @property
    def config(self) -> EngineConfig:
        """With all decided that was left open, once it has started."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def generate(self, request: NewRequest) -> AsyncGenerator[Delta, None]:
        """Deltas up to the one that is `last`. Closed before that, the request is cancelled.

        Errors come as `Delta.error`. May be called from any event loop.
        """

    def cut(self, reason: str) -> None:
        """Requests that run, and any that still come, fail with ShuttingDown."""

    async def register(self, version: Version, path: str) -> None:
        """From now on `version.digest` may be asked for; its files are under `path`."""

    async def forget(self, digest: str) -> None:
        """No new requests for it; it is unloaded when the last running one is done."""

    async def timeline(self, request_id: str) -> list[TimelineEvent]:
        """What happened to a request, and when; empty when it is unknown or too long ago."""

    def adapter_states(self) -> list[AdapterState]:
        """The last known state of every registered version."""

    def report(self) -> LoadReport: ...

    def on_residency(self, callback: Callable[[list[AdapterState]], None]) -> None:
        """Called with the changed entries, on whatever thread learns of them."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """A change of the catalog. pending: replicas that have not confirmed it in time."""

    name: str
    digest: str
    sequence: int
    pending: tuple[str, ...] = ()


class Adapters(Protocol):
    """Names → versions: in memory for one replica alone, in Redis for a fleet."""

    async def find(self, name: str) -> Version | None: ...

    def versions(self) -> list[Version]:
        """By name."""

    async def add(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
        trusted: bool = False,
    ) -> Acknowledgement:
        """Raises AdapterRefused, BadRequest or CatalogUnavailable; then nothing has changed.

        trusted: the path comes from the operator's own flags, not through the API.
        """

    async def remove(self, name: str) -> Acknowledgement:
        """Raises ModelNotFound or CatalogUnavailable."""

    async def describe(self) -> dict[str, Any]:
        """The catalog with what each replica holds, as GET /v1/adapters answers it."""
