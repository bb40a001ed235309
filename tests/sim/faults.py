"""Breaks each part of the core in ten ways or more, and expects a test to fail each time.

A fault replaces a text in one file, in a copy of the tree. Run with `python -m tests.sim.faults`.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("cluster", "replica", "tests", "kernels", "pyproject.toml", "lorafleet.py")
TESTS = ["tests/unit/scheduling"]
TESTS += ["tests/sim/test_bounds.py", "tests/sim/test_random_runs.py", "tests/sim/test_stateful.py"]
# Ten times what they take. With some faults a loop has no end.
_DEADLINE_S = 900


@dataclass(frozen=True, slots=True)
class Fault:
    part: str
    what: str
    file: str
    text: str
    instead: str


def _fault(part: str, what: str, file: str, text: str, instead: str) -> Fault:
    return Fault(part, what, f"replica/{file}.py", text, instead)


FAULTS = (
    # Scheduler, running set, loads
    _fault(
        "scheduler",
        "a row that left the batch is not looked at again",
        "scheduling/request",
        "        self.decodes_until = self.quiet_until = 0\n",
        "",
    ),
    _fault(
        "scheduler",
        "a row decodes past its last token without a look",
        "scheduling/decode",
        "request.decodes_until = min(until, request.tokens_max - 1)",
        "request.decodes_until = until",
    ),
    _fault(
        "scheduler",
        "a row decodes without a look beyond its pages",
        "scheduling/decode",
        "until = len(request.pages) * page_tokens",
        "until = (len(request.pages) + 1) * page_tokens",
    ),
    _fault(
        "scheduler",
        "a row with a grammar decodes without a look",
        "scheduling/decode",
        "        if not request.stepwise:\n            until",
        "        if True:\n            until",
    ),
    _fault(
        "scheduler",
        "a token that fills a page commits without a look",
        "scheduling/scheduler",
        "min(page_end - 1, request.tokens_max - 2)",
        "min(page_end, request.tokens_max - 2)",
    ),
    _fault(
        "scheduler",
        "the last token by length commits without a look",
        "scheduling/scheduler",
        "min(page_end - 1, request.tokens_max - 2)",
        "min(page_end - 1, request.tokens_max - 1)",
    ),
    _fault(
        "scheduler",
        "a stop token commits without a look",
        "scheduling/scheduler",
        "if logprobs is None and finite and allowed and token not in request.stops:",
        "if logprobs is None and finite and allowed:",
    ),
    _fault(
        "scheduler",
        "a token that is not allowed commits without a look",
        "scheduling/scheduler",
        "if logprobs is None and finite and allowed and token not in request.stops:",
        "if logprobs is None and token not in request.stops:",
    ),
    _fault(
        "scheduler",
        "a token that commits without a look loses its log-probabilities",
        "scheduling/scheduler",
        "if logprobs is None and finite and allowed and token not in request.stops:",
        "if finite and allowed and token not in request.stops:",
    ),
    _fault(
        "scheduler",
        "tokens that commit without a look count for no share",
        "scheduling/scheduler",
        "                    if share:\n"
        "                        self.share.served(request.adapter_key, end - start, sample)\n",
        "",
    ),
    _fault(
        "scheduler",
        "a request that cannot run stops the scan",
        "scheduling/admission_order",
        "not (admitted or self._switches.skip)",
        "not admitted",
    ),
    _fault(
        "scheduler",
        "parked rows wait for pages they already hold",
        "scheduling/running_set",
        "return [*parked, waiter]",
        "return [waiter]",
    ),
    _fault(
        "scheduler",
        "a request passed over for pages is not retried while there are none",
        "scheduling/running_set",
        "return [*parked, waiter]",
        "return parked",
    ),
    _fault(
        "scheduler",
        "an ended request keeps its claim on the adapter",
        "scheduling/scheduler",
        "self._evictions += self.adapter_cache.unclaim(adapter_key)",
        "pass",
    ),
    _fault(
        "scheduler",
        "base prompts wait for loads",
        "scheduling/prefill_groups",
        "and adapter_cache.adapters[request.adapter_key].fresh",
        "or True",
    ),
    _fault(
        "scheduler",
        "a whole prompt is computed at once, beyond the step's tokens",
        "scheduling/prefill",
        "end = min(request.tokens, start + tokens)",
        "end = request.tokens",
    ),
    _fault(
        "scheduler",
        "a row takes its next page one token late",
        "scheduling/decode",
        "if tokens > len(request.pages) * page_tokens and (",
        "if tokens - 1 > len(request.pages) * page_tokens and (",
    ),
    _fault(
        "scheduler",
        "a stop token ends a request before min_tokens",
        "scheduling/scheduler",
        "if token in request.stops and len(output) > request.sampling.min_tokens:",
        "if token in request.stops:",
    ),
    _fault(
        "scheduler",
        "the oldest row is preempted when pages run out",
        "scheduling/running_set",
        "newest = next(r for r in reversed(self.running.values()) if r.copying is None)",
        "newest = next(r for r in self.running.values() if r.copying is None)",
    ),
    _fault(
        "scheduler",
        "a row that lost its pages does not recompute them",
        "scheduling/kept_pages",
        "        self.forget(request)\n        request.computed = 0\n",
        "        self.forget(request)\n",
    ),
    _fault(
        "scheduler",
        "a parked row frees its pages",
        "scheduling/kept_pages",
        "        enter(self.parked, request)\n",
        "        enter(self.parked, request)\n        self.forget(request)\n",
    ),
    _fault(
        "scheduler",
        "no pages are saved for an overdue request",
        "scheduling/running_set",
        "saved = self.saved.from_request(request, now_s)\n        kept",
        "saved = 0\n        kept",
    ),
    _fault(
        "scheduler",
        "a cold request with a large prompt never gets a place, and so no pages",
        "scheduling/loads",
        "        if self._running_set.has_pages_for(self._waiting.head(digest)):\n"
        "            return True\n",
        "        return self._running_set.has_pages_for(self._waiting.head(digest))\n",
    ),
    _fault(
        "scheduler",
        "one load too many is in flight",
        "scheduling/loads",
        "if self._adapter_cache.loading >= self._in_flight_max:",
        "if self._adapter_cache.loading > self._in_flight_max:",
    ),
    _fault(
        "scheduler",
        "parked rows lose their pages to any new request",
        "scheduling/running_set",
        "drop=alone, requester=request",
        "drop=True, requester=request",
    ),
    _fault(
        "scheduler",
        "pages are saved for a request that a drain keeps out",
        "scheduling/running_set",
        "self.placed(request) and may_admit(request)",
        "self.placed(request)",
    ),
    _fault(
        "scheduler",
        "the prompts of parked rows count as if they held no pages",
        "scheduling/page_demand",
        "waiting.prompt_tokens - begun",
        "waiting.prompt_tokens",
    ),
    # Drainer
    _fault(
        "drainer",
        "any victim that ends soon is waited for",
        "scheduling/drainer",
        "ending.sort(key=lambda a: (left[a.digest], a.digest))",
        "pass",
    ),
    _fault(
        "drainer",
        "a draining adapter takes every request that was waiting",
        "scheduling/drainer",
        "if r.adapter_key == victim and r.remaining <= left.get(victim, 0)",
        "if r.adapter_key == victim",
    ),
    _fault(
        "drainer",
        "a draining adapter takes any short request",
        "scheduling/drainer",
        "if drain is None or request.id in drain.admitted:",
        "if drain is None or request.remaining < 100:",
    ),
    _fault(
        "drainer",
        "a drained place is not reserved",
        "scheduling/drainer",
        "return {victim for victim, drain in self.drains.items() if drain.starving != digest}",
        "return set()",
    ),
    _fault(
        "drainer",
        "a drain goes on after the waiting request was cancelled",
        "scheduling/drainer",
        "waits = starving is not None and starving.starved_s is not None",
        "waits = True",
    ),
    _fault(
        "drainer",
        "a drain starts before its threshold",
        "scheduling/drainer",
        "if not threshold_s or starved_s is None or now_s - starved_s < threshold_s:",
        "if not threshold_s or starved_s is None:",
    ),
    _fault(
        "drainer",
        "a slice lasts one copy",
        "scheduling/turns",
        "return max(self.sharing.quantum_s, _COPIES_PER_SLICE * copies_s)",
        "return copies_s",
    ),
    _fault(
        "drainer",
        "slow copies do not lengthen a slice",
        "scheduling/turns",
        "return max(self.sharing.quantum_s, _COPIES_PER_SLICE * copies_s)",
        "return self.sharing.quantum_s",
    ),
    _fault(
        "drainer",
        "a victim that would end sooner is parked",
        "scheduling/drainer",
        "if left[victim.digest] * self._costs.decode_s <= copies_s:",
        "if False:",
    ),
    _fault(
        "drainer",
        "a victim that ends soon takes new requests",
        "scheduling/drainer",
        "return Victims(closed=frozenset(waited_for) & {victim.digest for victim in ending})",
        "return Victims()",
    ),
    _fault(
        "drainer",
        "a pinned adapter in use is a victim",
        "scheduling/drainer",
        "a.users > 0 and not a.pinned]",
        "a.users > 0]",
    ),
    _fault(
        "drainer",
        "small images take a large one's places forever",
        "scheduling/drainer",
        "return self._victims(digest, spared, self._in_use()) is not None",
        "return False",
    ),
    # AdapterCache
    _fault(
        "adapter cache",
        "an adapter in use counts as idle",
        "scheduling/victims",
        "            if a.users == 0\n            and not a.pinned",
        "            if not a.pinned",
    ),
    _fault(
        "adapter cache",
        "a pin protects nothing",
        "scheduling/victims",
        "            and not a.pinned\n            and not (spare_fresh",
        "            and not (spare_fresh",
    ),
    _fault(
        "adapter cache",
        "a fresh adapter is evicted",
        "scheduling/victims",
        "and not (spare_fresh and a.fresh and a.wanted and a.digest not in lacking)",
        "and True",
    ),
    _fault(
        "adapter cache",
        "the slice starts at the load",
        "scheduling/adapter_cache",
        "            adapter.slice_s = now_s\n",
        "            adapter.slice_s = adapter.since_s\n",
    ),
    _fault(
        "adapter cache",
        "the slice restarts with each row",
        "scheduling/adapter_cache",
        "            adapter.slice_s = now_s\n",
        "        adapter.slice_s = now_s\n",
    ),
    _fault(
        "adapter cache",
        "an image that is being copied slides",
        "scheduling/adapter_cache",
        "shifts = self.extents.slide(immovable=self.victim_search.loading())",
        "shifts = self.extents.slide(immovable=())",
    ),
    _fault(
        "adapter cache",
        "a failed load keeps its bytes",
        "scheduling/adapter_cache",
        "        self.extents.give_back(adapter.digest)\n        self.slots.give_back(adapter)\n",
        "        self.slots.give_back(adapter)\n",
    ),
    _fault(
        "adapter cache",
        "a failed load is retried at once",
        "scheduling/backoff",
        "adapter.retry_s = now_s + pause_s",
        "adapter.retry_s = now_s",
    ),
    _fault(
        "adapter cache",
        "a forgotten adapter leaves before its requests end",
        "scheduling/adapter_cache",
        "if not adapter.leaving or adapter.claims or adapter.held or",
        "if not adapter.leaving or adapter.users or adapter.held or",
    ),
    _fault(
        "adapter cache",
        "redundant victims are evicted",
        "scheduling/victims",
        "if not victims or enough(others):",
        "if not victims:",
    ),
    _fault(
        "adapter cache",
        "the last necessary victim stays",
        "scheduling/victims",
        "return [*_without_redundant(before, [last], enough), last]",
        "return _without_redundant(before, [last], enough)",
    ),
    _fault(
        "adapter cache",
        "an evicted adapter does not starve",
        "scheduling/adapter_cache",
        "        self._starve(adapter, now_s)\n        return Evict(adapter.digest, slot)",
        "        return Evict(adapter.digest, slot)",
    ),
    # Pages
    _fault(
        "pages",
        "a prefix matches across versions",
        "scheduling/pages",
        "        link: Root | int = root\n        pages: list[int] = []",
        "        link: Root | int = None\n        pages: list[int] = []",
    ),
    _fault(
        "pages",
        "a page matches whatever came before it",
        "scheduling/pages",
        "            pages.append(page)\n            link = self._links[page]",
        "            pages.append(page)",
    ),
    _fault(
        "pages",
        "the whole prompt is matched, and no token is left to compute",
        "scheduling/running_set",
        "most = request.tokens - 1\n",
        "most = request.tokens\n",
    ),
    _fault(
        "pages",
        "a matched page is not held",
        "scheduling/pages",
        "            self._holders[page] += 1",
        "            self._holders[page] = 1",
    ),
    _fault(
        "pages",
        "a matched page stays free",
        "scheduling/pages",
        "            self._unused.pop(page, None)\n",
        "",
    ),
    _fault(
        "pages",
        "a page with a second holder is freed",
        "scheduling/pages",
        "            if holders[page]:\n                continue\n",
        "",
    ),
    _fault(
        "pages",
        "a reused page keeps its old key",
        "scheduling/pages",
        "        del self._known[key]\n",
        "",
    ),
    _fault(
        "pages",
        "the newest prefix is forgotten first",
        "scheduling/pages",
        "self._unused.popitem(last=False)",
        "self._unused.popitem(last=True)",
    ),
    _fault(
        "pages",
        "the start of a prefix is forgotten before its end",
        "scheduling/pages",
        "for page in reversed(pages):",
        "for page in pages:",
    ),
    _fault(
        "pages",
        "fewer pages are taken than asked for",
        "scheduling/pages",
        "        if count > self.free:\n            return None\n",
        "        if count > self.free:\n            count = self.free\n",
    ),
    _fault(
        "pages",
        "a row fits whole beside ended ones, though these still hold pages",
        "scheduling/page_demand",
        "self._most_of(request) + self._ended\n",
        "self._most_of(request)\n",
    ),
    _fault(
        "pages",
        "a row fits whole beside parked ones that will need pages",
        "scheduling/page_demand",
        "        if self._kept.parked:\n            return False\n",
        "",
    ),
    _fault(
        "pages",
        "a row fits whole though pages are saved for another",
        "scheduling/page_demand",
        "return most + spare <= ",
        "return most <= ",
    ),
    _fault(
        "pages",
        "a row fits whole if its prompt fits",
        "scheduling/page_demand",
        "self._pages.needed(request.tokens_max) + _ROUNDING",
        "self._pages.needed(request.tokens) + _ROUNDING",
    ),
    _fault(
        "pages",
        "rows that left count among those that fit whole",
        "scheduling/page_demand",
        "self._most -= self._most_of(request)",
        "pass",
    ),
    # One memory for adapters and pages
    _fault(
        "budget",
        "the arena grows over pages that rows hold",
        "scheduling/pages",
        "            if self._holders[page] or page in self._unused:",
        "            if page in self._unused:",
    ),
    _fault(
        "budget",
        "a copied page keeps its old id in the prefix cache",
        "scheduling/pages",
        "            self._known[key] = target\n",
        "",
    ),
    _fault(
        "budget",
        "rows keep the ids of copied pages",
        "scheduling/loads",
        "        self._running_set.rename(change.page_moves)\n",
        "",
    ),
    _fault(
        "budget",
        "parked rows keep the ids of copied pages",
        "scheduling/running_set",
        "for request in [*self.running.values(), *self.parked.values(), *ended]:",
        "for request in [*self.running.values(), *ended]:",
    ),
    _fault(
        "budget",
        "a shrinking arena gives back bytes that hold an image",
        "scheduling/adapter_cache",
        "shifts = self.extents.slide(self.victim_search.loading()) if self.extents.end > end"
        " else []",
        "shifts: list[Shift] = []",
    ),
    _fault(
        "budget",
        "bytes that are being copied into are given back",
        "scheduling/victims",
        "return self._extents.packed(victims, immovable=loading)[0] <= end",
        "return True",
    ),
    _fault(
        "budget",
        "an adapter is evicted though memory is free",
        "scheduling/victims",
        "return self._extents.capacity if budget is None else budget.limit_bytes(reserved)",
        "return self._extents.capacity",
    ),
    _fault(
        "budget",
        "the arena leaves no headroom",
        "scheduling/budget",
        "spare = max(pages.free - self.headroom - reserved, 0)",
        "spare = max(pages.free - reserved, 0)",
    ),
    _fault(
        "budget",
        "the arena takes the pages of the last context",
        "scheduling/budget",
        "self._first_max = pages.total - context_pages",
        "self._first_max = pages.total",
    ),
    _fault(
        "budget",
        "rows are preempted while idle adapters stay",
        "scheduling/page_supply",
        "            if self.make(count - self._pages.free, now_s, drop, requester):\n"
        "                continue\n",
        "",
    ),
    _fault(
        "budget",
        "new requests take the pages that a starving adapter waits for",
        "scheduling/running_set",
        "kept = 0 if alone else self.saved.from_request_for_adapter(request)",
        "kept = 0",
    ),
    _fault(
        "budget",
        "a request that waits longer than a starving adapter is delayed for it",
        "scheduling/saved_pages",
        "request is self.request and self._since_s <= since_s else count",
        "request is self.request and self._since_s < 0 else count",
    ),
    _fault(
        "budget",
        "a new request evicts adapters that others wait for",
        "scheduling/victims",
        "if a.digest not in keep and (wanted or not a.wanted)]",
        "if a.digest not in keep]",
    ),
    _fault(
        "budget",
        "a request evicts its own adapter for pages",
        "scheduling/page_supply",
        "if requester is not None and requester.adapter_key:",
        "if False:",
    ),
    # Steps in flight
    _fault(
        "in flight",
        "a row that ends by length in flight is planned again",
        "scheduling/decode",
        "        if tokens >= request.tokens_max:\n            return False",
        "        if False:\n            return False",
    ),
    _fault(
        "in flight",
        "pages of a request that ends in flight are free at once",
        "scheduling/scheduler",
        "        if self.in_flight.references(request):\n            self.in_flight.deferred_free",
        "        if False:\n            self.in_flight.deferred_free",
    ),
    _fault(
        "in flight",
        "an ended request frees its pages at the first commit, not the last",
        "scheduling/scheduler",
        "        self.in_flight.commit(plan)\n        deltas, tokens =",
        "        self.in_flight.commit(plan)\n"
        "        for request in self.in_flight.deferred_free:\n"
        "            request.step = 0\n"
        "        deltas, tokens =",
    ),
    _fault(
        "in flight",
        "a forgotten adapter leaves during a step in flight",
        "scheduling/adapter_cache",
        "if not adapter.leaving or adapter.claims or adapter.held or",
        "if not adapter.leaving or adapter.claims or",
    ),
    _fault(
        "in flight",
        "an adapter of a step in flight is evicted at once",
        "scheduling/in_flight",
        "c.slides or c.page_moves or self._uses(c) for c in arena_changes",
        "c.slides or c.page_moves for c in arena_changes",
    ),
    _fault(
        "in flight",
        "images slide during a step in flight",
        "scheduling/in_flight",
        "c.slides or c.page_moves or self._uses(c) for c in arena_changes",
        "c.page_moves or self._uses(c) for c in arena_changes",
    ),
    _fault(
        "in flight",
        "pages are copied elsewhere during a step in flight",
        "scheduling/in_flight",
        "c.slides or c.page_moves or self._uses(c) for c in arena_changes",
        "c.slides or self._uses(c) for c in arena_changes",
    ),
    _fault(
        "in flight",
        "a preempted row's pages are reused before its step commits",
        "scheduling/kept_pages",
        "        self._in_flight.reuse_pages_of(request)\n        self._pages.give_back",
        "        self._pages.give_back",
    ),
    _fault(
        "in flight",
        "a client sees a token after the last one",
        "scheduling/scheduler",
        "                if request.phase in ENDED:\n                    continue",
        "                if request.phase is Phase.CANCELLED:\n                    continue",
    ),
    _fault(
        "in flight",
        "the token of a row that was parked in flight is lost",
        "scheduling/scheduler",
        "                if request.phase in ENDED:\n                    continue",
        "                continue",
    ),
    _fault(
        "in flight",
        "a prefix is found before its step has committed",
        "scheduling/scheduler",
        "self.running_set.publish(request, end)",
        "self.running_set.publish(request, request.computed)",
    ),
    _fault(
        "in flight",
        "a request that left the batch is admitted by the same plan",
        "scheduling/admission_order",
        "            if self._in_flight.references(request):\n                continue",
        "            if False:\n                continue",
    ),
    _fault(
        "in flight",
        "a dropped row counts as computed",
        "scheduling/plan",
        "    work.request.computed, work.request.step = work.start, 0\n",
        "    work.request.step = 0\n",
    ),
    # Retries, the host tier
    _fault(
        "backoff",
        "requests that have tokens fail at once",
        "scheduling/backoff",
        "if adapter.given_up or not request.begun:",
        "if True:",
    ),
    _fault(
        "backoff",
        "requests that have tokens wait for ever",
        "scheduling/backoff",
        "if adapter.given_up or not request.begun:",
        "if not request.begun:",
    ),
    _fault(
        "backoff",
        "requests without tokens wait too",
        "scheduling/backoff",
        "if adapter.given_up or not request.begun:",
        "if adapter.given_up:",
    ),
    _fault(
        "backoff",
        "an adapter is loaded during its pause",
        "scheduling/loads",
        "            if digest in paused:\n",
        "            if False:\n",
    ),
    _fault(
        "backoff",
        "a drain goes on for an adapter that may not load",
        "scheduling/drainer",
        "                or drain.starving in paused\n",
        "",
    ),
    _fault(
        "backoff",
        "nothing wakes the engine for a retry",
        "scheduling/scheduler",
        "filter(None, (hold_s, retry_s))",
        "filter(None, (hold_s,))",
    ),
    _fault(
        "backoff",
        "a request that waits for a retry blocks the rest",
        "scheduling/admission_order",
        "if request.adapter_key not in closed and self",
        "if self",
    ),
    _fault(
        "backoff",
        "a row that has tokens fails with a load of the same step",
        "scheduling/scheduler",
        "            if request.output:\n",
        "            if False:\n",
    ),
    _fault(
        "backoff",
        "a registration leaves the pause",
        "scheduling/adapter_cache",
        "            if adapter.tier is Tier.FAILED:\n",
        "            if False:\n",
    ),
    _fault(
        "host tier",
        "a row that starts does not use the image in host memory",
        "scheduling/adapter_cache",
        "        adapter.use(now_s)\n        self.host.touch(digest)\n",
        "        adapter.use(now_s)\n",
    ),
    _fault(
        "host tier",
        "a dropped image is reported twice",
        "scheduling/host_tier",
        "        self._dropped.clear()\n",
        "",
    ),
    _fault(
        "host tier",
        "a dropped image is not reported",
        "scheduling/host_tier",
        "        self._dropped.add(digest)\n",
        "",
    ),
    _fault(
        "adapter cache",
        "old uses keep their weight",
        "scheduling/adapter",
        "use = now_s / _HALF_LIFE_S",
        "use = 0.0",
    ),
    # Growth, and where parking pays
    _fault(
        "growth",
        "recomputed tokens do not stretch the horizon",
        "scheduling/growth",
        "self.horizon = self._outputs * self._output.value / (1 - spent)",
        "pass",
    ),
    _fault(
        "growth",
        "the horizon stays finite when the recompute allowance is spent",
        "scheduling/growth",
        "        self.horizon = math.inf\n        if spent < 1:\n",
        "        if True:\n            spent = min(spent, 0.5)\n",
    ),
    _fault(
        "growth",
        "rows that end give no pages back",
        "scheduling/growth",
        "alive, tokens = alive - rows, tokens - own",
        "pass",
    ),
    _fault(
        "growth",
        "a new request leaves no pages for rows to grow",
        "scheduling/running_set",
        "grown += max(self._growth.of(request) - count, 0) + self._kept.owed_before(request)",
        "grown = 0",
    ),
    _fault(
        "growth",
        "rows are parked though their pages cannot stay",
        "scheduling/running_set",
        "leave = not self._kept.may_stay(rows) or (",
        "leave = not self._kept.may_stay(rows) and (",
    ),
    _fault(
        "growth",
        "tokens found in the prefix cache count as recomputed",
        "scheduling/running_set",
        "                self._kept.forget(request)\n                if not returns:",
        "                self._kept.lose(request)\n                if not returns:",
    ),
    _fault(
        "turns",
        "an adapter is never overdue",
        "scheduling/turns",
        "return waited_s >= most * turns * self._turn_s(adapter)",
        "return False",
    ),
    _fault(
        "turns",
        "all adapters are funded",
        "scheduling/turns",
        "            if needed <= free:",
        "            if True:",
    ),
    _fault(
        "turns",
        "no adapter is funded",
        "scheduling/turns",
        "            if needed <= free:",
        "            if False:",
    ),
    _fault(
        "turns",
        "one request is worth as much as many",
        "scheduling/turns",
        "per_work = standing.on_time / max(",
        "per_work = 1 / max(",
    ),
    _fault(
        "turns",
        "a late adapter takes any place that is not pressing",
        "scheduling/turns",
        "return own > _FASTER * its",
        "return True",
    ),
    _fault(
        "turns",
        "a late adapter takes no place",
        "scheduling/turns",
        "return own > _FASTER * its",
        "return False",
    ),
    _fault(
        "turns",
        "a late adapter keeps its place from no pressing one",
        "scheduling/turns",
        "return victim in self._funded or own > its",
        "return True",
    ),
    _fault(
        "turns",
        "rows that are ahead of their target keep their place",
        "scheduling/turns",
        "return victim in self._funded or own > its",
        "return own > its",
    ),
    _fault(
        "turns",
        "rows that began are overdue as soon as others",
        "scheduling/turns",
        "most = _OVERDUE_BEGUN if self._waiting.all_begun(digest) else _OVERDUE",
        "most = _OVERDUE",
    ),
    _fault(
        "turns",
        "a pressing place is taken",
        "scheduling/turns",
        "        if self.pressing(victim):\n            return False\n",
        "",
    ),
    _fault(
        "turns",
        "a row that missed the first target is on time",
        "scheduling/turns",
        "            elif first_s - request.arrived_s > self.sharing.ttft_target_s:",
        "            elif False:",
    ),
    _fault(
        "turns",
        "a row is never late for its later tokens",
        "scheduling/turns",
        "ready_s = min(ready_s, ends_s - left_s - copy_s)",
        "ready_s = min(ready_s, math.inf)",
    ),
    _fault(
        "turns",
        "standings outlive a change of the requests",
        "scheduling/turns",
        "self._standings.pop(digest, None)",
        "pass",
    ),
    _fault(
        "turns",
        "a row counts all the tokens that its client allows",
        "scheduling/turns",
        "left_s = min(request.remaining, most) * decode_s",
        "left_s = request.remaining * decode_s",
    ),
    _fault(
        "turns",
        "the overdue do not go first",
        "scheduling/turns",
        "return priority, 0 if self.overdue(digest) else 2, starved_s, digest",
        "return priority, 2, starved_s, digest",
    ),
    _fault(
        "turns",
        "the pressing do not go first",
        "scheduling/turns",
        "if self.pressing(digest) and not self.overdue(digest):",
        "if False:",
    ),
    _fault(
        "turns",
        "a place that is being loaded is funded",
        "scheduling/turns",
        "duty * (1 + self._adapter_cache.copy_s(adapter) / slice_s)",
        "duty",
    ),
    _fault(
        "turns",
        "who waited shortest goes first",
        "scheduling/turns",
        "return priority, 0 if self.overdue(digest) else 2, starved_s, digest",
        "return priority, 0 if self.overdue(digest) else 2, -starved_s, digest",
    ),
    _fault(
        "turns",
        "nobody waits for who starved longest while prompts pile up",
        "scheduling/turns",
        "        if not parks:\n            return starving\n",
        "",
    ),
    _fault(
        "drainer",
        "rows are parked though pages are short",
        "scheduling/loads",
        "if pages_short or self._prompts_pile_up():",
        "if self._prompts_pile_up():",
    ),
    _fault(
        "drainer",
        "rows are parked though prompts pile up",
        "scheduling/loads",
        "if pages_short or self._prompts_pile_up():",
        "if pages_short:",
    ),
    _fault(
        "drainer",
        "no drain starts if no row may be parked",
        "scheduling/drainer",
        "        if self.sharing.park and not threshold_s:\n",
        "        if False:\n",
    ),
    _fault(
        "drainer",
        "a request without pages keeps its place from parked rows",
        "scheduling/victims",
        "and not (spare_fresh and a.fresh and a.wanted and a.digest not in lacking)",
        "and not (spare_fresh and a.fresh and a.wanted)",
    ),
    _fault(
        "prefill",
        "a long prompt leaves nothing to shorter ones",
        "scheduling/prefill",
        "kept = left = min(int(self._saved), tokens)",
        "kept = left = 0",
    ),
    _fault(
        "prefill",
        "kept tokens that nobody took are not saved",
        "scheduling/prefill",
        "self._saved = min(self._saved + tokens * _KEPT, self._saved_max)",
        "self._saved = min(tokens * _KEPT, self._saved_max)",
    ),
    _fault(
        "prefill",
        "kept tokens are saved without a limit",
        "scheduling/prefill",
        "self._saved = min(self._saved + tokens * _KEPT, self._saved_max)",
        "self._saved += tokens * _KEPT",
    ),
    _fault(
        "prefill",
        "short prompts spend nothing of what is kept, and starve the long one",
        "scheduling/prefill",
        "self._saved -= kept - left",
        "pass",
    ),
    _fault(
        "prefill",
        "a long prompt shares its steps with one of its own length",
        "scheduling/prefill",
        "most = shortest = int(_left(long) * _KEPT)",
        "most = shortest = _left(long)",
    ),
    _fault(
        "prefill",
        "of the prompts that do not fit the first goes first",
        "scheduling/prefill",
        "for request in sorted(late, key=_left):",
        "for request in late:",
    ),
    _fault(
        "prefill",
        "every prompt that does not fit joins the batch",
        "scheduling/prefill",
        "shortest = min(shortest, needed - 1)",
        "pass",
    ),
    _fault(
        "prefill",
        "a prompt that does not fit keeps out shorter ones",
        "scheduling/prefill",
        "longest = min(most, max(left, shortest))",
        "longest = min(most, left)",
    ),
    _fault(
        "prefill",
        "a long prompt takes no more than its part though nobody else asks",
        "scheduling/prefill",
        "tokens -= kept - left\n",
        "tokens -= kept\n",
    ),
    _fault(
        "priority",
        "the less urgent park the more urgent",
        "scheduling/loads",
        "Spared(keep | self._more_urgent(digest) |",
        "Spared(keep |",
    ),
    _fault(
        "priority",
        "an adapter is parked though a more urgent request waits for a row of it",
        "scheduling/loads",
        "if self._waiting.most_urgent < priority:",
        "if False:",
    ),
    _fault(
        "priority",
        "more urgent rows do not keep their adapter's place",
        "scheduling/loads",
        "urgent.add(request.adapter_key)",
        "pass",
    ),
    _fault(
        "priority",
        "an adapter is drained for a less urgent one",
        "scheduling/loads",
        "self._drainer.reserved_for_others(digest) | self._more_urgent(digest)",
        "self._drainer.reserved_for_others(digest)",
    ),
    _fault(
        "priority",
        "a drain keeps out more urgent requests",
        "scheduling/drainer",
        "return request.priority < drain.priority",
        "return False",
    ),
    _fault(
        "priority",
        "the victim that is worth least goes first, however urgent",
        "scheduling/drainer",
        "(-urgency[a.digest], self.turns.worth(a.digest))",
        "self.turns.worth(a.digest)",
    ),
    _fault(
        "priority",
        "the newest row loses its pages, however urgent",
        "scheduling/kept_pages",
        "if last is not None and last.priority > request.priority:",
        "if False:",
    ),
    _fault(
        "priority",
        "parked rows lose their pages to less urgent ones",
        "scheduling/page_supply",
        "return len(running) > 1 and",
        "return False and",
    ),
    _fault(
        "priority",
        "pages saved for a request are kept from more urgent ones",
        "scheduling/saved_pages",
        "exempt = waiter is None or request is waiter or request.priority < waiter.priority",
        "exempt = waiter is None or request is waiter",
    ),
    _fault(
        "priority",
        "a prompt in progress goes before a more urgent one",
        "scheduling/prefill",
        "order = heapq.merge(begun, waiting, key=_priority)",
        "order = iter([*begun, *waiting])",
    ),
    _fault(
        "priority",
        "a long prompt leaves tokens to less urgent ones",
        "scheduling/prefill",
        " or request.priority > long.priority:",
        ":",
    ),
    # Page copies
    _fault(
        "page copies",
        "a row is computed before its pages are back",
        "scheduling/scheduler",
        "return admitted and request.copying is None",
        "return admitted",
    ),
    _fault(
        "page copies",
        "a returned row decodes before its pages are back",
        "scheduling/decode",
        "        if request.copying is not None:\n"
        "            return False  # it has returned, but its pages have not yet\n",
        "",
    ),
    _fault(
        "page copies",
        "a row returns while its pages still leave",
        "scheduling/in_flight",
        "request.step > self.committed or request.copying is not None",
        "request.step > self.committed",
    ),
    _fault(
        "page copies",
        "pages are free as soon as their copy begins",
        "scheduling/page_copies",
        "        self._freeing[copy.number] = self._device.sole(request.pages)\n"
        "        self.out += count\n",
        "        self._freeing[copy.number] = self._device.sole(request.pages)\n"
        "        self._device.give_back(request.pages)\n"
        "        request.pages = []\n",
    ),
    _fault(
        "page copies",
        "host pages are free as soon as the copy back begins",
        "scheduling/page_copies",
        "        self.back += count - found\n",
        "        self.back += count - found\n        self._forget(request)\n",
    ),
    _fault(
        "page copies",
        "a copy out does not wait for the step that fills its pages",
        "scheduling/kept_pages",
        "        self._in_flight.reuse_pages_of(request)\n        self._copies.leave(request)",
        "        self._copies.leave(request)",
    ),
    _fault(
        "page copies",
        "a row in host memory forgets what it computed",
        "scheduling/running_set",
        "        if request.host_pages:\n            return prefix.pages\n",
        "",
    ),
    _fault(
        "page copies",
        "a row that returns is given more of a prefix than it computed",
        "scheduling/running_set",
        "        return min(request.computed, most)\n",
        "        pass\n",
    ),
    _fault(
        "page copies",
        "one page less than was computed is copied",
        "scheduling/page_copies",
        "return self._device.needed(request.computed)",
        "return request.computed // self._device.page_tokens",
    ),
    _fault(
        "page copies",
        "the pages of an ended request never leave host memory",
        "scheduling/page_copies",
        "        request.pages = []\n        self._forget(request)\n",
        "        request.pages = []\n",
    ),
    _fault(
        "page copies",
        "a planned copy reads where its pages were before they moved",
        "scheduling/page_copies",
        "tuple(renamed.get(p, p) for p in c.pages)",
        "c.pages",
    ),
    _fault(
        "page copies",
        "every row gives up its pages for one that needs a page",
        "scheduling/kept_pages",
        "        if self.arriving <= 0:\n            return False\n",
        "        return False\n",
    ),
    _fault(
        "page copies",
        "more pages are copied than host memory has",
        "scheduling/page_copies",
        "        if sum(counts) > self.host.free or not all(counts):",
        "        if not all(counts):",
    ),
    _fault(
        "page copies",
        "new requests take the pages that a row in host memory needs",
        "scheduling/kept_pages",
        "return self._owed[priority]",
        "return 0",
    ),
    _fault(
        "page copies",
        "rows whose adapter is away keep pages from one that could run",
        "scheduling/running_set",
        "if not sent_away and self._kept.send_away(missing):",
        "if False:",
    ),
    _fault(
        "page copies",
        "a row that returned is parked again before it ran",
        "scheduling/running_set",
        "r.copying or r.computed == r.back_at for r in rows",
        "r.copying for r in rows",
    ),
    _fault(
        "page copies",
        "pages are copied however long it takes",
        "scheduling/page_copies",
        "return copies_s < self._costs.prefill_s(request.computed)",
        "return True",
    ),
    _fault(
        "page copies",
        "a prefix is known in host memory before its copy is done",
        "scheduling/page_copies",
        "        self._saving[copy.number] = known\n",
        "        self._publish(request, known)\n",
    ),
    _fault(
        "page copies",
        "a prefix in host memory serves any adapter",
        "scheduling/page_copies",
        "host.match(request.root, tokens",
        "host.match(None, tokens",
    ),
    _fault(
        "page copies",
        "what a prefix adds is copied from its start",
        "scheduling/page_copies",
        "request.pages[count - missing : count], pages, out=True",
        "request.pages[:missing], pages, out=True",
    ),
    _fault(
        "page copies",
        "a prefix comes from host memory however short it is",
        "scheduling/page_copies",
        "return copies_s + 2 * self._costs.decode_s < computed_s",
        "return True",
    ),
    _fault(
        "page copies",
        "host memory has less of a prefix than the device, and that counts",
        "scheduling/page_copies",
        "if missing <= 0 or not self._is_sooner_back(missing):",
        "if not self._is_sooner_back(missing):",
    ),
    _fault(
        "page copies",
        "prefixes are saved while requests wait for pages",
        "scheduling/running_set",
        " and not self.short_of_pages:",
        ":",
    ),
    _fault(
        "page copies",
        "a whole prompt comes from host memory, and no logits choose a token",
        "scheduling/running_set",
        "self._copies.bring(request, len(found), _matchable(request))",
        "self._copies.bring(request, len(found), request.tokens)",
    ),
    _fault(
        "page copies",
        "prefixes wait for each other's copies",
        "scheduling/page_copies",
        " or not count or self._freeing:",
        " or not count:",
    ),
    _fault(
        "page copies",
        "pages are copied back though the device still has them",
        "scheduling/page_copies",
        "request.pages[found:count], request.host_pages[found:]",
        "request.pages[:count], request.host_pages",
    ),
    _fault(
        "page copies",
        "without overlap a row returns before its adapter is loaded",
        "scheduling/scheduler",
        "        if placed and request.host_pages and not self.switches.overlap:\n",
        "        if False:\n",
    ),
    _fault(
        "pages",
        "an earlier match stays the longest though the next page is cached",
        "scheduling/pages",
        "return not following or key not in self._known",
        "return True",
    ),
    _fault(
        "pages",
        "an earlier match stays the longest though its pages were filled again",
        "scheduling/pages",
        "if prefix.links != tuple(map(self._links.__getitem__, prefix.pages)):",
        "if -1 in map(self._links.__getitem__, prefix.pages):",
    ),
    _fault(
        "pages",
        "a waiting prompt's prefix is forgotten like any other",
        "scheduling/pages",
        "                self._unused.move_to_end(page)\n",
        "                pass\n",
    ),
    _fault(
        "scheduler",
        "each request that finds no pages matches its prefix in each step",
        "scheduling/running_set",
        "elif not self._is_current(request.prefix, request):",
        "elif True:",
    ),
    _fault(
        "scheduler",
        "a request is passed over though its prefix grew",
        "scheduling/running_set",
        "following = request.slice(start, end) if end <= _matchable(request) else ()",
        "following = ()",
    ),
    _fault(
        "loads",
        "a step looks for a place for every starving adapter",
        "scheduling/loads",
        "if size <= fits_ahead or (tries >= _TRIES and size >= none_idle):",
        "if size <= fits_ahead:",
    ),
    _fault(
        "adapter cache",
        "an adapter counts twice in its own registration",
        "scheduling/adapter",
        "        if own is not None and not own.pinned:\n",
        "        if False:\n",
    ),
    _fault(
        "adapter cache",
        "an adapter that left counts in registrations",
        "scheduling/adapter",
        "self._sizes -= Counter([adapter.bytes])",
        "pass",
    ),
)


def first_failure(fault: Fault) -> str | None:
    """The first test that fails with the fault; None if all pass."""
    with tempfile.TemporaryDirectory() as directory:
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(directory) / name)
        file = Path(directory) / fault.file
        text = file.read_text()
        assert text.count(fault.text) == 1, (
            f"{fault.file} does not have this text once: {fault.text!r}"
        )
        file.write_text(text.replace(fault.text, fault.instead))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [test for test in TESTS if (ROOT / test).exists()]
        environment = {**os.environ, "PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            run = subprocess.run(
                command,
                cwd=directory,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_DEADLINE_S,
            )
        except subprocess.TimeoutExpired:
            return f"a test does not end: {_DEADLINE_S} s"
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert failed and run.returncode == 1, run.stdout + run.stderr
    return failed[0].split()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="a part, or words of a fault")
    options = parser.parse_args()
    faults = [f for f in FAULTS if options.only in f"{f.part}: {f.what}"]
    missed = 0
    with multiprocessing.Pool(options.processes) as pool:
        for fault, failure in zip(faults, pool.imap(first_failure, faults), strict=True):
            missed += failure is None
            print(f"{fault.part}: {fault.what}\n    {failure or 'NOT FOUND'}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
