"""Adapters that nobody registered, found by name in the directories and URLs of `adapter_sources`.

What is not there, is refused or fails is not looked at again for `_KEPT_S`.
"""

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from urllib.parse import quote

from cluster.adapter_paths import CONFIG_FILE, check_allowed, is_url
from cluster.errors import (
    AdapterFailed,
    AdapterMissing,
    AdapterRefused,
    BadRequest,
    FleetError,
)
from cluster.versions import is_name

log = logging.getLogger(__name__)

Add = Callable[[str, str], Awaitable[object]]

_KEPT_S = 10.0
_KEPT_MAX = 10_000
# Names that are looked up at once: each takes a thread, which changes of adapters need too.
_LOOKED_UP_MAX = 3
# And names whose turn comes. More would wait for longer than clients do.
_WAITING_MAX = 32


class Sources:
    """For one event loop. base_name: the base model's. add: registers a name and a path. now:
    monotonic seconds.
    """

    def __init__(
        self, sources: Sequence[str], base_name: str, add: Add, now: Callable[[], float]
    ) -> None:
        self._sources = sources
        self._base_name = base_name
        self._add = add
        self._now = now
        # Until when, and why if there is a reason.
        self._unknown: OrderedDict[str, tuple[float, FleetError | None]] = OrderedDict()
        self._adding: dict[str, asyncio.Task[bool]] = {}
        self._looking = asyncio.Semaphore(_LOOKED_UP_MAX)

    async def resolve(self, name: str) -> bool:
        """True if the name is registered now. Many may wait for one name; it is added once.

        Raises what adding it raises, and AdapterFailed while too many others are looked up.
        """
        if not self._sources or not is_name(name, self._base_name):
            return False
        until, error = self._unknown.get(name, (0.0, None))
        if self._now() < until:
            if error is not None:
                raise error
            return False
        task = self._adding.get(name)
        if task is None:
            if len(self._adding) >= _LOOKED_UP_MAX + _WAITING_MAX:
                raise AdapterFailed(
                    f"model: {name!r} was not looked up: too many other names are",
                    field="model",
                    retry_after_s=1.0,
                )
            task = self._adding[name] = asyncio.create_task(self._resolve(name))
            task.add_done_callback(lambda _: self._adding.pop(name, None))
        return await asyncio.shield(task)

    async def _resolve(self, name: str) -> bool:
        async with self._looking:
            for place in await asyncio.to_thread(lambda: list(self._places(name))):
                try:
                    await self._add(name, place)
                    return True
                except AdapterMissing:
                    continue
                except BadRequest as error:
                    # Where it lies is not for whoever may only use models.
                    message = error.message.replace(place, name)
                    refused = AdapterRefused(f"model: {name!r}: {message}", field="model")
                    self._keep(name, refused)
                    raise refused from error
                except AdapterFailed as error:
                    log.warning("%s: %s", name, error.message)
                    failed = AdapterFailed(
                        f"model: {name!r} could not be loaded; the server's log says why",
                        field="model",
                        retry_after_s=_KEPT_S,
                    )
                    self._keep(name, failed)
                    raise failed from error
        self._keep(name, None)
        return False

    def _keep(self, name: str, error: FleetError | None) -> None:
        now_s = self._now()
        self._unknown[name] = now_s + _KEPT_S, error
        self._unknown.move_to_end(name)
        while len(self._unknown) > _KEPT_MAX or next(iter(self._unknown.values()))[0] <= now_s:
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
