"""Counts, for each version, the requests that have resolved its name and are not in the engine yet.

    name ── claim ──> held ── release: the engine has the request, or it has failed ──> free

A catalog changes what a name resolves to, waits until the old version is free, and forgets it.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from cluster.values import Version
from replica.api.interfaces import Claim


class Claims:
    """Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._waits: dict[str, Future[None]] = {}

    def claim(self, resolve: Callable[[], Version | None]) -> Claim | None:
        """resolve: looks up a name. A change on another thread comes either before the lookup, or
        after the claim.
        """
        with self._lock:
            version = resolve()
            if version is None:
                return None
            self._held[version.digest] += 1
        return Claim(version, partial(self._release, version.digest))

    def held(self, digest: str) -> bool:
        with self._lock:
            return digest in self._held

    async def wait_free(self, digest: str) -> None:
        """Returns when no request holds the version. Only one caller may wait for it."""
        with self._lock:
            if digest not in self._held:
                return
            wait = self._waits[digest] = Future()
        await asyncio.wrap_future(wait)

    def _release(self, digest: str) -> None:
        with self._lock:
            self._held[digest] -= 1
            if self._held[digest]:
                return
            del self._held[digest]
            wait = self._waits.pop(digest, None)
        if wait is not None and wait.set_running_or_notify_cancel():
            wait.set_result(None)
