"""Holds the files of the versions that the engine has, in the node's store.

    register ──> held, wanted ── forget ──> held ── the engine has dropped it ──> released
                      ^                      │
                      └────── register ──────┘

A forgotten version may still run, and be loaded again, until its last request has ended.
"""

import asyncio
import threading

from cluster.store import Store, stamps
from cluster.values import AdapterState, Tier, Version
from cluster.versions import Book
from replica.adapters.adapter_files import AdapterInfo
from replica.api.interfaces import Engine

# Files copied at a time.
_FETCHES_MAX = 4


class HeldFiles:
    """Registers versions with the engine, and forgets them. One call at a time for each version.

    book: the names of a version, which may have been added from different places.
    """

    def __init__(self, engine: Engine, store: Store[AdapterInfo], book: Book) -> None:
        self._engine = engine
        self._store = store
        self._book = book
        self._fetches = asyncio.Semaphore(_FETCHES_MAX)
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._wanted: set[str] = set()
        engine.on_residency(self._release_dropped)

    async def register(self, version: Version, *, again: bool = False) -> None:
        """Copies the files to the store if they are not there. Raises FleetError.

        again: it has failed, so what is there may be damaged.
        """
        digest, uris = version.digest, self._uris(version)
        with self._lock:
            before = digest in self._wanted
            self._wanted.add(digest)
        try:
            if again or not self._held_by_add(digest):
                async with self._fetches:
                    await asyncio.to_thread(self._fetch, uris, digest, again)
            await self._engine.register(version, self._store.path(digest))
        except BaseException:
            if not before:
                self._unregistered(digest)
            raise

    async def forget(self, digest: str) -> None:
        with self._lock:
            self._wanted.discard(digest)
        await self._engine.forget(digest)

    async def seen(self, version: Version) -> object:
        """Differs from what it was before if the files that `register` copies have changed."""
        return await asyncio.to_thread(lambda: [stamps(uri) for uri in self._uris(version)])

    def _uris(self, version: Version) -> list[str]:
        others = sorted({other.uri for other in self._book.names_of(version.digest).values()})
        return [version.uri, *(uri for uri in others if uri != version.uri)]

    def _held_by_add(self, digest: str) -> bool:
        """Holds a version that is new here, and that an add in this process has just checked."""
        with self._lock:
            if digest in self._held or not self._store.hold_again(digest):
                return False
            self._held.add(digest)
            return True

    def _fetch(self, uris: list[str], digest: str, again: bool) -> None:
        if again:
            self._store.drop_damaged(digest)
        self._store.fetch(uris, digest)
        with self._lock:
            again = digest in self._held
            self._held.add(digest)
        if again:
            self._store.release(digest)  # one hold is enough

    def _unregistered(self, digest: str) -> None:
        """The engine may still have the version, from a registration before `forget`."""
        with self._lock:
            self._wanted.discard(digest)
        if all(state.digest != digest for state in self._engine.adapter_states()):
            self._release_dropped([AdapterState(digest, Tier.ABSENT, 0, 0.0)])

    def _release_dropped(self, states: list[AdapterState]) -> None:
        """Any thread may call it. states: what changed. If nothing did, the engine may have been
        started again, without what had been forgotten.
        """
        dropped = {state.digest for state in states if state.tier is Tier.ABSENT}
        present = {state.digest for state in self._engine.adapter_states()} if not states else None
        with self._lock:
            if present is not None:
                dropped = self._held - present
            released = sorted((dropped & self._held) - self._wanted)
            self._held.difference_update(released)
        for digest in released:
            self._store.release(digest)
