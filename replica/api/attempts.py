"""What becomes of a request when the engine ends under it, before any byte was sent.

    runs ── engine ends ──> counted ── first death ──> runs again: here, or where HAProxy asks
                               │            └── the retry budget is spent ──> RetriesSpent
                               └── second death, on whichever replica ──> Poisoned

After the first byte the client gets an error event, and the death counts too. One engine's end is
one death for all equal requests, and an answer clears them: only what ends engines is refused.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b

from cluster.errors import EngineFailed, EngineGone, ModelNotFound, Poisoned, RetriesSpent
from replica.api.completion import Call
from replica.api.interfaces import Suspects

DEATHS_MAX = 2
# Of the requests that one engine had, about a batch goes to other replicas. The rest would fill
# their queues, so it waits for the next engine here.
ELSEWHERE_MAX = 64
# How long a death counts, and how long a request is refused.
KEPT_S = 600.0
_KEPT_MAX = 10_000
# Of a process' requests, the part that may run again. A fleet that loses engine after engine does
# little more work for it.
RETRY_SHARE = 0.2
_RETRY_AFTER_S = 5.0


class RetryBudget:
    """How many requests of this process may still run again after an engine's end.

    Each process counts its own, so a fleet runs again at most RETRY_SHARE of its requests, and
    `burst` for each live replica.
    """

    def __init__(self, burst: int) -> None:
        self._burst = self._left = float(burst)

    def asked(self) -> None:
        """A request has come."""
        self._left = min(self._left + RETRY_SHARE, self._burst)

    def spend(self) -> None:
        """Raises RetriesSpent."""
        if self._left < 1.0:
            raise RetriesSpent(
                "the engine ended while the request ran, and too many requests have run again "
                "lately",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._left -= 1.0


class Attempts:
    """elsewhere_bytes: size of the largest body that HAProxy sends to another replica after a 502;
    0 if there is no other. engine_holds: the most requests that one engine has at once, which may
    all run again when it ends.
    """

    def __init__(self, suspects: Suspects, elsewhere_bytes: int, engine_holds: int) -> None:
        self._suspects = suspects
        self._elsewhere_bytes = elsewhere_bytes
        self._budget = RetryBudget(engine_holds)
        self._death, self._left = "", 0

    async def run(
        self, call: Call, body_bytes: int, attempt: Callable[[], Awaitable[None]]
    ) -> None:
        """attempt: raises EngineFailed only if nothing was sent.

        Raises Poisoned, RetriesSpent, EngineFailed.
        """
        self._budget.asked()
        if self._suspects.any and self._suspects.poisoned(_digest(call)):
            raise _poisoned()
        try:
            await attempt()
        except EngineFailed as error:
            await self._count(call, error)
            if isinstance(error, EngineGone):
                raise
            self._budget.spend()
            if self._goes_elsewhere(body_bytes, error.death):
                raise
            await self._again(call, attempt, error)

    def _goes_elsewhere(self, body_bytes: int, death: str) -> bool:
        if body_bytes > self._elsewhere_bytes:
            return False
        if death != self._death:
            self._death, self._left = death, ELSEWHERE_MAX
        self._left -= 1
        return self._left >= 0

    async def died(self, call: Call, error: EngineFailed) -> int:
        """Counts the death of an engine under the call; returns the deaths so far."""
        return await self._suspects.died(_digest(call), error.death)

    async def answered(self, call: Call) -> None:
        if self._suspects.any:
            await self._suspects.cleared(_digest(call))

    async def _again(
        self, call: Call, attempt: Callable[[], Awaitable[None]], first: EngineFailed
    ) -> None:
        try:
            await attempt()
        except EngineFailed as error:
            await self._count(call, error)
            raise
        except ModelNotFound:  # its version has been removed meanwhile
            raise first from None

    async def _count(self, call: Call, error: EngineFailed) -> None:
        if not isinstance(error, EngineGone) and await self.died(call, error) >= DEATHS_MAX:
            raise _poisoned()


def _poisoned() -> Poisoned:
    return Poisoned(
        f"{DEATHS_MAX} engines ended while they ran this request; it is refused for "
        f"{KEPT_S / 60:.0f} minutes"
    )


def _digest(call: Call) -> str:
    """The same for two requests that compute the same."""
    content = repr((call.digest, call.prompts, call.n, call.sampling))
    return blake2b(content.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class _Deaths:
    """until_s: when they are forgotten."""

    names: frozenset[str]
    until_s: float


class LocalSuspects:
    """`interfaces.Suspects` of a single process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: dict[str, _Deaths] = {}

    @property
    def any(self) -> bool:
        return bool(self._deaths)

    def suspected(self, digest: str) -> bool:
        return digest in self._deaths

    def poisoned(self, digest: str) -> bool:
        return len(self._names(digest)) >= DEATHS_MAX

    async def died(self, digest: str, death: str) -> int:
        names = self._names(digest) | {death}
        self._deaths.pop(digest, None)
        while len(self._deaths) >= _KEPT_MAX:
            del self._deaths[next(iter(self._deaths))]  # the oldest
        self._deaths[digest] = _Deaths(names, self._clock() + KEPT_S)
        return len(names)

    async def cleared(self, digest: str) -> None:
        self._deaths.pop(digest, None)

    def _names(self, digest: str) -> frozenset[str]:
        found = self._deaths.get(digest)
        if found is not None and self._clock() >= found.until_s:
            del self._deaths[digest]
            found = None
        return found.names if found is not None else frozenset()
