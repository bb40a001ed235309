"""The API's interfaces: the engine and the adapter catalog that the HTTP server works with."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.config import EngineConfig
from cluster.uploads import Upload
from cluster.values import AdapterState, AddedToken, LoadReport, Version
from replica.scheduling.request import Delta, NewRequest
from replica.scheduling.timeline import TimelineEvent


class Engine(Protocol):
    """An asynchronous engine: `EngineLink` to the engine's process, or a stub in tests."""

    @property
    def alive(self) -> bool:
        """False once the engine can serve no more requests."""

    @property
    def config(self) -> EngineConfig:
        """The configuration. After `start`, every `auto` and None that it resolves has a value."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def generate(self, request: NewRequest) -> AsyncGenerator[Delta, None]:
        """Yields deltas; the final one is `last`. Closing the generator earlier cancels the
        request.

        The request is on its way to the engine, ahead of any later `forget`, when the generator
        waits for the first time. An error arrives as `Delta.error`. May be called from any event
        loop.
        """

    def cut(self, reason: str) -> None:
        """Fails running requests, and all later ones, with ShuttingDown."""

    async def register(self, version: Version, path: str) -> None:
        """Makes `version.digest` available to requests. path: the directory of its files."""

    async def forget(self, digest: str) -> None:
        """Refuses new requests for the version and unloads it after its last running request."""

    async def timeline(self, request_id: str) -> list[TimelineEvent]:
        """A request's events in order; empty if the request is unknown or no longer kept."""

    def adapter_states(self) -> list[AdapterState]:
        """The last known state of every registered version."""

    def report(self) -> LoadReport: ...

    def on_residency(self, callback: Callable[[list[AdapterState]], None]) -> None:
        """Registers a callback for changed adapter states. It may run on any thread."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """A completed catalog change.

    applied: replicas that have it. failed: replicas that could not read the adapter's files → why.
    pending: replicas that did not answer in time. remarks: sentences for whoever added it.
    """

    name: str
    digest: str
    sequence: int
    pending: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    applied: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """An adapter to add. trusted: the path is from the operator's configuration, so it may lie
    outside the roots.
    """

    name: str
    path: str
    pinned: bool = False
    weight: float = 1.0
    trusted: bool = False


class Claim:
    """A version that the engine keeps until `release`, whatever its name is changed to."""

    def __init__(self, version: Version, release: Callable[[], None]) -> None:
        self.version = version
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Idempotent."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Adapters(Protocol):
    """The catalog of adapter names: in memory for a single process, in Redis for a fleet."""

    async def find(self, name: str) -> Version | None: ...

    async def claim(self, name: str) -> Claim | None:
        """Like `find`, and the engine keeps the version until the claim is released."""

    def chat_template(self, digest: str) -> str:
        """The own one of a version that is claimed and has one. Blocking. Raises AdapterFailed."""

    def added_tokens(self, digest: str) -> list[AddedToken]:
        """Those of a version that is claimed and has some. Blocking. Raises AdapterFailed."""

    def versions(self) -> list[Version]:
        """All versions, sorted by name."""

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
        """Adds an adapter. Raises AdapterRefused, BadRequest or CatalogUnavailable, and changes
        nothing in that case.

        trusted: the path is from the operator's configuration, so it may lie outside the roots.
        """

    async def add_all(
        self, adapters: Sequence[NewAdapter], *, load_inplace: bool = False
    ) -> list[Acknowledgement]:
        """Adds adapters, in their order. Raises as `add` does. In a fleet, all are added or none; a
        single process keeps those before the one that it refuses.
        """

    def upload(self) -> Upload:
        """Takes the files of an adapter; what `Upload.keep` returns is a path for `add`."""

    async def remove(self, name: str) -> Acknowledgement:
        """Raises ModelNotFound or CatalogUnavailable."""

    async def describe(self) -> dict[str, Any]:
        """The body of GET /v1/adapters: the catalog and each replica's residency."""


class Suspects(Protocol):
    """The digests of requests that an engine has ended under, kept for a while."""

    @property
    def any(self) -> bool:
        """False if no request is suspected."""

    def poisoned(self, digest: str) -> bool:
        """True if engines have ended under it so often that it is refused."""

    async def died(self, digest: str, death: str) -> int:
        """An engine has ended under it. death: names that end. Returns how many there were."""

    async def cleared(self, digest: str) -> None:
        """It has been answered, so it was not the reason."""
