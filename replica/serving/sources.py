"""Adapters that nobody registered, found by name in the directories and URLs of `adapter_sources`.

What is not there, or is refused, is not looked at again for `_KEPT_S`.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from urllib.parse import quote

from cluster.adapter_paths import CONFIG_FILE, check_allowed, is_url
from cluster.errors import AdapterMissing, AdapterRefused, BadRequest

Add = Callable[[str, str], Awaitable[object]]

_KEPT_S = 10.0
_KEPT_MAX = 10_000


class Sources:
    """For one event loop. add: registers a name and a path. now: monotonic seconds."""

    def __init__(self, sources: Sequence[str], add: Add, now: Callable[[], float]) -> None:
        self._sources = sources
        self._add = add
        self._now = now
        # Until when, and why if there is a reason.
        self._unknown: OrderedDict[str, tuple[float, AdapterRefused | None]] = OrderedDict()
        self._adding: dict[str, asyncio.Task[bool]] = {}

    async def resolve(self, name: str) -> bool:
        """True if the name is registered now. Many may wait for one name; it is added once.

        Raises what adding it raises.
        """
        if not self._sources:
            return False
        until, error = self._unknown.get(name, (0.0, None))
        if self._now() < until:
            if error is not None:
                raise error
            return False
        task = self._adding.get(name)
        if task is None:
            task = self._adding[name] = asyncio.create_task(self._resolve(name))
            task.add_done_callback(lambda _: self._adding.pop(name, None))
        return await asyncio.shield(task)

    async def _resolve(self, name: str) -> bool:
        for path in await asyncio.to_thread(lambda: list(self._places(name))):
            try:
                await self._add(name, path)
                return True
            except AdapterMissing:
                continue
            except BadRequest as error:
                refused = AdapterRefused(f"model: {name!r}: {error.message}", field="model")
                self._keep(name, refused)
                raise refused from error
        self._keep(name, None)
        return False

    def _keep(self, name: str, error: AdapterRefused | None) -> None:
        self._unknown[name] = self._now() + _KEPT_S, error
        self._unknown.move_to_end(name)
        if len(self._unknown) > _KEPT_MAX:
            self._unknown.popitem(last=False)

    def _places(self, name: str) -> Iterator[str]:
        """Directories that have a configuration, and URLs that may."""
        if name != os.path.basename(name) or name.startswith("."):
            return
        for source in self._sources:
            web = source.startswith(("https://", "http://"))
            place = f"{source.rstrip('/')}/{quote(name) if web else name}"
            try:
                check_allowed(place, [source])
            except (BadRequest, ValueError):  # a link out of it, or a name that is no path
                continue
            if is_url(source) or os.path.isfile(f"{place}/{CONFIG_FILE}"):
                yield place
