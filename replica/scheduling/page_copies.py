"""KV pages in host memory: of rows that left the batch, until they return, and cached prefixes.

    device pages ── out ── pages at both ends ── done ──> host pages
         ^                                                    │
         └── done ── pages at both ends ── in ────────────────┘

A request holds the pages at both ends until the copy is done. So neither end is given to another
while a copy reads or writes it, even if the request ends meanwhile. A row that returns takes its
place in the batch when its copy starts, and is computed again when the copy is done.

Only pages with computed tokens are copied. Full pages that the prefix cache still has on the device
are not copied back.

The full pages of a request that ends are copied too, and stay in host memory as a prefix cache for
as long as no row needs the space. A new request gets from there what the device has forgotten.
"""

from collections.abc import Iterable, Sequence

from cluster.costs import Costs
from replica.scheduling.pages import PageCopy, Pages, Prefix
from replica.scheduling.request import Request

# A row that returns runs for this many times the time of its copies, before it may leave again.
_RUNS = 4


class PageCopies:
    """The host's pages, and the copies that are planned or in progress.

    host: None if no page leaves the device.
    page_bytes: of one page, for the cost of a copy.
    out, back: pages copied to host memory, and back.
    """

    def __init__(self, device: Pages, host: Pages | None, page_bytes: int, costs: Costs) -> None:
        self.host = host
        self.page_bytes = page_bytes
        self.out = self.back = 0
        self._device = device
        self._costs = costs
        self._number = 0
        self._planned: list[PageCopy] = []
        self._requests: dict[int, Request] = {}
        self._freeing: dict[int, int] = {}  # copy → device pages that will be free when it is done
        self._saving: dict[int, Prefix] = {}  # copy → the prefix that its pages will extend

    @property
    def in_progress(self) -> bool:
        """True until every copy is done."""
        return bool(self._requests)

    @property
    def arriving(self) -> int:
        """Device pages that become free when the copies to the host are done."""
        return sum(self._freeing.values())

    def can_leave(self, requests: Sequence[Request]) -> bool:
        """True if the host has pages for all of them and a copy takes less time than computing."""
        if self.host is None or any(request.copying for request in requests):
            return False
        counts = [self._filled(request) for request in requests]
        if sum(counts) > self.host.free or not all(counts):
            return False
        if not all(map(self._pays, counts, requests)):
            self._costs.page_copy_declined()
            return False
        return True

    def tokens_between(self, request: Request) -> int:
        """Decode steps for which a row in host memory should run so that its return pays."""
        copies_s = 2 * self._costs.page_copy_s(len(request.host_pages) * self.page_bytes)
        return 1 + int(_RUNS * copies_s / self._costs.decode_s)

    def leave(self, request: Request) -> None:
        """Copy its pages to the host. Pages without computed tokens are given back at once."""
        count = self._filled(request)
        assert self.host is not None and request.pages and not request.host_pages
        host_pages = self.host.take(count)
        assert host_pages is not None, "see can_leave"
        self._device.give_back(request.pages[count:])
        del request.pages[count:]
        request.host_pages = host_pages
        copy = self._plan(request, request.pages, host_pages, out=True)
        self._freeing[copy.number] = self._device.sole(request.pages)
        self.out += count

    def come_back(self, request: Request, found: int) -> None:
        """Copy to its device pages what these lack. found: pages that the prefix cache had."""
        count = len(request.host_pages)
        if found >= count:
            self._forget(request)
            return
        self._plan(request, request.pages[found:count], request.host_pages[found:], out=False)
        self.back += count - found

    def save(self, request: Request) -> None:
        """It ends. Copy its full pages to the host's prefix cache, if nothing else is on that way.

        They are known there when the copy is done.
        """
        count = request.published if request.pages and not request.host_pages else 0
        if self.host is None or not self.host.caches or not count or self._freeing:
            return
        if not self._is_sooner_back(count):
            return
        known = self._match(self.host, request, count * self._device.page_tokens)
        missing = count - len(known.pages)
        pages = self.host.take(missing) if missing else None
        if pages is None:
            self.host.give_back(known.pages)
            return
        request.host_pages = [*known.pages, *pages]
        copy = self._plan(request, request.pages[count - missing : count], pages, out=True)
        self._freeing[copy.number] = self._device.sole(request.pages)
        self._saving[copy.number] = known
        self.out += missing

    def bring(self, request: Request, found: int, most: int) -> None:
        """A new request has its device pages. Those that the host's prefix cache can fill are not
        computed. found: pages that the device's had. most: tokens that may be matched.
        """
        if self.host is None:
            return
        known = self._match(self.host, request, most)
        missing = len(known.pages) - found
        if missing <= 0 or not self._is_sooner_back(missing):
            self.host.give_back(known.pages)
            return
        request.host_pages = list(known.pages)
        request.computed = len(known.pages) * self.host.page_tokens
        if not request.begun:
            request.cached = request.computed

    def planned(self) -> tuple[PageCopy, ...]:
        """The copies that the plan in progress starts, in this order."""
        planned, self._planned = tuple(self._planned), []
        return planned

    def rename(self, renamed: dict[int, int]) -> None:
        """Device pages moved. The plan in progress moves them before it copies."""
        self._planned = [
            PageCopy(c.number, tuple(renamed.get(p, p) for p in c.pages), c.host_pages, c.out)
            for c in self._planned
        ]

    def done(self, number: int) -> Request:
        """The copy has ended. An ended request keeps its pages until `release`."""
        request = self._requests.pop(number)
        out = self._freeing.pop(number, None) is not None
        request.copying = None
        known = self._saving.pop(number, None)
        if known is not None:
            self._publish(request, known)
        if request.ended:
            return request
        if out:
            self._device.give_back(request.pages)
            request.pages = []
        else:
            self._forget(request)
            request.back_at = request.computed
        return request

    def release(self, request: Request) -> None:
        """It has ended."""
        assert request.copying is None
        self._device.give_back(request.pages)
        request.pages = []
        self._forget(request)

    def check(self, requests: Iterable[Request]) -> None:
        """requests: all that may hold pages."""
        requests = list(requests)
        copying = {r.copying: r for r in requests if r.copying is not None}
        assert copying == self._requests, "a copy without its request"
        assert self._saving.keys() <= self._freeing.keys() <= copying.keys()
        assert {copy.number for copy in self._planned} <= copying.keys()
        if self.host is None:
            assert not any(request.host_pages for request in requests)
        else:
            self.host.check(request.host_pages for request in requests)

    def _plan(
        self, request: Request, pages: Sequence[int], host_pages: Sequence[int], out: bool
    ) -> PageCopy:
        assert request.copying is None, "one copy of a request at a time"
        self._number += 1
        copy = PageCopy(self._number, tuple(pages), tuple(host_pages), out)
        self._planned.append(copy)
        self._requests[copy.number] = request
        request.copying = copy.number
        return copy

    def _forget(self, request: Request) -> None:
        if request.host_pages:
            assert self.host is not None
            self.host.give_back(request.host_pages)
            request.host_pages = []

    def _filled(self, request: Request) -> int:
        """Its pages with computed tokens."""
        return self._device.needed(request.computed)

    def _match(self, host: Pages, request: Request, most: int) -> Prefix:
        """Its prefix in host memory, which is now held."""
        tokens = request.slice(0, request.tokens)
        return host.match(request.root, tokens, most, request.fork(host.page_tokens))

    def _publish(self, request: Request, known: Prefix) -> None:
        assert self.host is not None
        link, size = known.link, self.host.page_tokens
        for index in range(len(known.pages), len(request.host_pages)):
            tokens = request.slice(index * size, (index + 1) * size)
            page = request.host_pages[index]
            link = self.host.publish(link, tokens, page, index, request.fork(size))

    def _is_sooner_back(self, pages: int) -> bool:
        """True if so many pages of a new prompt are copied sooner than they are computed, though it
        then waits for a step. As a copy to the host came before, it counts twice.
        """
        copies_s = 2 * self._costs.page_copy_s(pages * self.page_bytes)
        computed_s = self._costs.prefill_s(pages * self._device.page_tokens)
        return copies_s + 2 * self._costs.decode_s < computed_s

    def _pays(self, pages: int, request: Request) -> bool:
        copies_s = 2 * self._costs.page_copy_s(pages * self.page_bytes)
        return copies_s < self._costs.prefill_s(request.computed)
