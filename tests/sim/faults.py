"""Break the core by hand, ten ways a part, and see a test fail: `python -m tests.sim.faults`.

Each fault is a text in a file and what takes its place, applied to a copy of the tree.
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
    # Scheduler, batch, loads
    _fault(
        "scheduler",
        "one that cannot run stops the scan",
        "scheduling/scheduler",
        "                if self.switches.skip:\n"
        "                    continue\n"
        "                break",
        "                break",
    ),
    _fault(
        "scheduler",
        "parked rows wait for pages that they have",
        "scheduling/running_set",
        "return [*parked, self._passed_over[0]]",
        "return [self._passed_over[0]]",
    ),
    _fault(
        "scheduler",
        "who was passed over for pages is not asked again while there are none",
        "scheduling/running_set",
        "return [*parked, self._passed_over[0]]",
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
        "prompts wait for company though base does not need any",
        "scheduling/prefill_groups",
        "and adapter_cache.adapters[request.adapter_key].fresh",
        "or True",
    ),
    _fault(
        "scheduler",
        "the whole prompt at once, beyond the step's tokens",
        "scheduling/scheduler",
        "end = min(request.tokens, start + budget)",
        "end = request.tokens",
    ),
    _fault(
        "scheduler",
        "a page is looked for one token late",
        "scheduling/scheduler",
        "if tokens > len(request.pages) * page_tokens and (",
        "if tokens - 1 > len(request.pages) * page_tokens and (",
    ),
    _fault(
        "scheduler",
        "the end token counts before min_tokens",
        "scheduling/scheduler",
        "if token in request.stops and len(request.output) > request.sampling.min_tokens:",
        "if token in request.stops:",
    ),
    _fault(
        "scheduler",
        "an older row gives way when pages run out",
        "scheduling/running_set",
        "newest = next(reversed(self.running.values()))",
        "newest = next(iter(self.running.values()))",
    ),
    _fault(
        "scheduler",
        "a row that lost its pages does not compute them again",
        "scheduling/running_set",
        "        request.computed = request.published = 0",
        "        request.published = 0",
    ),
    _fault(
        "scheduler",
        "a parked row gives its pages back",
        "scheduling/running_set",
        "            self.parked[request.id] = request\n",
        "            self.parked[request.id] = request\n            self._forget_pages(request)\n",
    ),
    _fault(
        "scheduler",
        "pages are saved for nobody",
        "scheduling/running_set",
        "saved = 0 if self._is_overdue(request, now_s) else self._saved(now_s)",
        "saved = 0",
    ),
    _fault(
        "scheduler",
        "a cold request with a large prompt gets no place, and so no pages, for ever",
        "scheduling/loads",
        "        if self._running_set.has_pages_for(self._waiting.head(digest)):\n"
        "            return True\n",
        "        return self._running_set.has_pages_for(self._waiting.head(digest))\n",
    ),
    _fault(
        "scheduler",
        "more loads at once than there may be",
        "scheduling/loads",
        "if self._adapter_cache.loading >= self._in_flight_max:",
        "if self._adapter_cache.loading > self._in_flight_max:",
    ),
    _fault(
        "scheduler",
        "parked rows lose their pages whenever a new request wants them",
        "scheduling/running_set",
        "drop=alone, requester=request",
        "drop=True, requester=request",
    ),
    # Drainer
    _fault(
        "drainer",
        "of those that end soon any is waited for",
        "scheduling/drainer",
        "ending.sort(key=lambda a: (left[a.digest], a.digest))",
        "pass",
    ),
    _fault(
        "drainer",
        "a draining adapter takes everyone who was waiting",
        "scheduling/drainer",
        "if r.adapter_key == victim and r.remaining <= left.get(victim, 0)",
        "if r.adapter_key == victim",
    ),
    _fault(
        "drainer",
        "a draining adapter takes whoever is short enough by now",
        "scheduling/drainer",
        "return drain is None or request.id in drain.admitted",
        "return drain is None or request.remaining < 100",
    ),
    _fault(
        "drainer",
        "the place that was freed is anybody's",
        "scheduling/drainer",
        "return {victim for victim, drain in self.drains.items() if drain.starving != digest}",
        "return set()",
    ),
    _fault(
        "drainer",
        "a drain goes on after its waiter was cancelled",
        "scheduling/drainer",
        "waits = starving is not None and starving.starved_s is not None",
        "waits = True",
    ),
    _fault(
        "drainer",
        "the threshold is not waited for",
        "scheduling/drainer",
        "if not threshold_s or starved_s is None or now_s - starved_s < threshold_s:",
        "if not threshold_s or starved_s is None:",
    ),
    _fault(
        "drainer",
        "a slice is as short as a copy",
        "scheduling/drainer",
        "return max(self.sharing.quantum_s, _COPIES_PER_SLICE * copies_s)",
        "return copies_s",
    ),
    _fault(
        "drainer",
        "five copies do not lengthen a slice",
        "scheduling/drainer",
        "return max(self.sharing.quantum_s, _COPIES_PER_SLICE * copies_s)",
        "return self.sharing.quantum_s",
    ),
    _fault(
        "drainer",
        "it parks who would have ended sooner",
        "scheduling/drainer",
        "if left[victim.digest] * self._costs.decode_s <= copies_s:",
        "if False:",
    ),
    _fault(
        "drainer",
        "one that will end soon takes new requests",
        "scheduling/drainer",
        "return Victims(closed=frozenset(waited_for) & {victim.digest for victim in ending})",
        "return Victims()",
    ),
    _fault(
        "drainer",
        "pinned adapters are victims",
        "scheduling/drainer",
        "a.users > 0 and not a.pinned]",
        "a.users > 0]",
    ),
    _fault(
        "drainer",
        "small images take a large one's places for ever",
        "scheduling/drainer",
        "return self._victims(digest, keep, self._in_use()) is not None",
        "return False",
    ),
    # AdapterCache
    _fault(
        "adapter cache",
        "one in use is an idle candidate",
        "scheduling/victims",
        "            and a.users == 0\n            and not a.pinned",
        "            and not a.pinned",
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
        "one that was loaded for a request and has not run is evicted",
        "scheduling/victims",
        "and not (spare_fresh and a.fresh and a.wanted and a.digest not in lacking)",
        "and True",
    ),
    _fault(
        "adapter cache",
        "the slice starts at the load",
        "scheduling/adapter_cache",
        "        if adapter.fresh:\n            adapter.fresh, adapter.slice_s = False, now_s",
        "        if adapter.fresh:\n"
        "            adapter.fresh, adapter.slice_s = False, adapter.since_s",
    ),
    _fault(
        "adapter cache",
        "the slice starts anew with each row",
        "scheduling/adapter_cache",
        "        if adapter.fresh:\n            adapter.fresh, adapter.slice_s = False, now_s",
        "        adapter.fresh, adapter.slice_s = False, now_s",
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
        "        assert adapter.slot is not None\n        self.extents.give_back(adapter.digest)\n",
        "        assert adapter.slot is not None\n",
    ),
    _fault(
        "adapter cache",
        "a failed load is tried again at once",
        "scheduling/adapter_cache",
        "adapter.retry_s = now_s + pause_s",
        "adapter.retry_s = now_s",
    ),
    _fault(
        "adapter cache",
        "a forgotten adapter leaves under its requests",
        "scheduling/adapter_cache",
        "if not adapter.leaving or adapter.claims or adapter.held or",
        "if not adapter.leaving or adapter.users or adapter.held or",
    ),
    _fault(
        "adapter cache",
        "more is evicted than the bytes ask for",
        "scheduling/victims",
        "if not victims or enough(others):",
        "if not victims:",
    ),
    _fault(
        "adapter cache",
        "the last of those that are enough stays",
        "scheduling/victims",
        "return [*_without_redundant(before, [last], enough), last]",
        "return _without_redundant(before, [last], enough)",
    ),
    _fault(
        "adapter cache",
        "one that is evicted does not starve",
        "scheduling/adapter_cache",
        "        self._starve(adapter, now_s)\n        return Evict(adapter.digest, slot)",
        "        return Evict(adapter.digest, slot)",
    ),
    # Pages
    _fault(
        "pages",
        "a prefix of any version will do",
        "scheduling/pages",
        "        link: Root | int = root\n        pages: list[int] = []",
        "        link: Root | int = None\n        pages: list[int] = []",
    ),
    _fault(
        "pages",
        "a prefix is found whatever came before it",
        "scheduling/pages",
        "            pages.append(page)\n            link = self._links[page]",
        "            pages.append(page)",
    ),
    _fault(
        "pages",
        "the whole prompt is found, and no token left to compute",
        "scheduling/running_set",
        "tokens, request.tokens - 1)",
        "tokens, request.tokens)",
    ),
    _fault(
        "pages",
        "a found page is not held",
        "scheduling/pages",
        "            self._holders[page] = self._holders.get(page, 0) + 1",
        "            self._holders.setdefault(page, 1)",
    ),
    _fault(
        "pages",
        "a found page stays free",
        "scheduling/pages",
        "            self._unused.pop(page, None)\n",
        "",
    ),
    _fault(
        "pages",
        "a page with a second holder is given away",
        "scheduling/pages",
        "            if self._holders[page]:\n                continue\n",
        "",
    ),
    _fault(
        "pages",
        "a page that is taken anew keeps its old name",
        "scheduling/pages",
        "        del self._known[self._keys.pop(page)]\n",
        "        self._keys.pop(page)\n",
    ),
    _fault(
        "pages",
        "the youngest prefix is forgotten first",
        "scheduling/pages",
        "            if len(self._free) == self.first:\n"
        "                self._forget(next(iter(self._unused)))",
        "            if len(self._free) == self.first:\n"
        "                self._forget(next(reversed(self._unused)))",
    ),
    _fault(
        "pages",
        "the beginning of a prefix goes before its end",
        "scheduling/pages",
        "for page in reversed(pages):",
        "for page in pages:",
    ),
    _fault(
        "pages",
        "the last page is taken though there is one too few",
        "scheduling/pages",
        "        if count > self.free:\n            return None\n",
        "        if count > self.free:\n            count = self.free\n",
    ),
    # One memory for adapters and pages
    _fault(
        "budget",
        "the arena grows over pages that rows hold",
        "scheduling/pages",
        "            if page in self._holders or page in self._unused:",
        "            if page in self._unused:",
    ),
    _fault(
        "budget",
        "a page that was copied keeps its old name for those who look for its prefix",
        "scheduling/pages",
        "            self._known[key] = target\n",
        "",
    ),
    _fault(
        "budget",
        "rows go on with the pages that they had before these were copied",
        "scheduling/loads",
        "        self._running_set.rename(change.page_moves)\n",
        "",
    ),
    _fault(
        "budget",
        "only rows that run follow their pages",
        "scheduling/running_set",
        "for request in [*self.running.values(), *self.parked.values(), *ended]:",
        "for request in [*self.running.values(), *ended]:",
    ),
    _fault(
        "budget",
        "a shrinking arena gives back bytes that an image lies in",
        "scheduling/adapter_cache",
        "shifts = self.extents.slide(self.victim_search.loading()) if self.extents.end > end"
        " else []",
        "shifts: list[Shift] = []",
    ),
    _fault(
        "budget",
        "a place is given back that is being copied into",
        "scheduling/victims",
        "return self._extents.packed(victims, immovable=loading)[0] <= end",
        "return True",
    ),
    _fault(
        "budget",
        "someone is evicted though memory is free",
        "scheduling/victims",
        "return self._extents.capacity if self._budget is None else self._budget.limit_bytes",
        "return self._extents.capacity",
    ),
    _fault(
        "budget",
        "adapters leave no headroom",
        "scheduling/budget",
        "spare = max(pages.free - self.headroom - self.reserved, 0)",
        "spare = max(pages.free - self.reserved, 0)",
    ),
    _fault(
        "budget",
        "the arena may take everything",
        "scheduling/budget",
        "self._first_max = pages.total - context_pages",
        "self._first_max = pages.total",
    ),
    _fault(
        "budget",
        "rows are put back while idle adapters stay",
        "scheduling/running_set",
        "            if self._make_pages(count - self._pages.free, now_s, drop, requester):\n"
        "                continue\n",
        "",
    ),
    _fault(
        "budget",
        "new requests take the pages that a starving adapter waits for",
        "scheduling/running_set",
        "kept = 0 if alone else self._must_leave(request)",
        "kept = 0",
    ),
    _fault(
        "budget",
        "a request that waits longer than the adapter is held up for it",
        "scheduling/running_set",
        "waiter[0] is request and waiter[1] <= since_s else count",
        "waiter[0] is request and waiter[1] < 0 else count",
    ),
    _fault(
        "budget",
        "a new request has adapters evicted that others wait for",
        "scheduling/victims",
        "if c.digest not in keep and (wanted or not c.wanted)]",
        "if c.digest not in keep]",
    ),
    _fault(
        "budget",
        "a request has its own adapter evicted for its pages",
        "scheduling/running_set",
        "if requester is not None and requester.adapter_key:",
        "if False:",
    ),
    # Steps in flight
    _fault(
        "in flight",
        "a row that ends by length in flight is planned once more",
        "scheduling/scheduler",
        "            if tokens >= request.tokens_max:\n                continue",
        "            if False:\n                continue",
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
        "what lingers goes when the first of the steps that name it commits",
        "scheduling/scheduler",
        "        self.in_flight.commit(plan)\n        deltas = []",
        "        self.in_flight.commit(plan)\n"
        "        for request in self.in_flight.deferred_free:\n"
        "            request.step = 0\n"
        "        deltas = []",
    ),
    _fault(
        "in flight",
        "a forgotten adapter leaves under a step in flight",
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
        "images slide under a step in flight",
        "scheduling/in_flight",
        "c.slides or c.page_moves or self._uses(c) for c in arena_changes",
        "c.page_moves or self._uses(c) for c in arena_changes",
    ),
    _fault(
        "in flight",
        "pages are copied elsewhere under a step in flight",
        "scheduling/in_flight",
        "c.slides or c.page_moves or self._uses(c) for c in arena_changes",
        "c.slides or self._uses(c) for c in arena_changes",
    ),
    _fault(
        "in flight",
        "the pages of a row that gives way are another's before its step commits",
        "scheduling/running_set",
        "        self._in_flight.reuse_pages_of(request)\n",
        "",
    ),
    _fault(
        "in flight",
        "a client sees the token behind the last one",
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
        "one that left the batch comes back in the same plan",
        "scheduling/scheduler",
        "            if self.in_flight.references(request):\n                continue",
        "            if False:\n                continue",
    ),
    _fault(
        "in flight",
        "a row that is not carried out counts as computed",
        "scheduling/scheduler",
        "                work.request.computed = work.start\n",
        "",
    ),
    # Growth, and where parking pays
    _fault(
        "growth",
        "what was computed again stretches no horizon",
        "scheduling/growth",
        "self.horizon = self._outputs * self._output.value / (1 - spent)",
        "pass",
    ),
    _fault(
        "growth",
        "with all spent the horizon still ends",
        "scheduling/growth",
        "        self.horizon = math.inf\n        if spent < 1:\n",
        "        if True:\n            spent = min(spent, 0.5)\n",
    ),
    _fault(
        "growth",
        "rows that end give no pages back",
        "scheduling/growth",
        "alive, tokens = alive - ending[pages][0], tokens - ending[pages][1]",
        "pass",
    ),
    _fault(
        "growth",
        "a new request leaves rows nothing to grow",
        "scheduling/running_set",
        "grown = self.peak + max(self._growth.of(request) - count, 0)",
        "grown = 0",
    ),
    _fault(
        "growth",
        "rows are parked though their pages cannot stay",
        "scheduling/running_set",
        "if self._growth.spent >= 1 or needed > self._pages.free:",
        "if False:",
    ),
    _fault(
        "growth",
        "tokens found in the prefix cache count as computed again",
        "scheduling/running_set",
        "            if found:\n                self._forget_pages(request)\n",
        "            if found:\n                self._lose_pages(request)\n",
    ),
    _fault(
        "drainer",
        "who was parked takes any place",
        "scheduling/drainer",
        "own_left is None or left[victim.digest] / victim.users > own_left",
        "True",
    ),
    _fault(
        "drainer",
        "who was parked is never due",
        "scheduling/drainer",
        "return now_s - adapter.starved_s >= self._due_s(adapter)",
        "return False",
    ),
    _fault(
        "drainer",
        "a parked adapter that must wait holds up new requests",
        "scheduling/loads",
        "if victims is None and self._drainer.sharing.park and not begun:",
        "if victims is None and self._drainer.sharing.park:",
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
        "nobody is drained for where nobody is parked",
        "scheduling/drainer",
        "        if self.sharing.park and not threshold_s:\n",
        "        if False:\n",
    ),
    _fault(
        "drainer",
        "a place is kept for a request without pages while rows that hold some wait",
        "scheduling/victims",
        "and not (spare_fresh and a.fresh and a.wanted and a.digest not in lacking)",
        "and not (spare_fresh and a.fresh and a.wanted)",
    ),
)


def first_failure(fault: Fault) -> str | None:
    """The first test that fails with the fault; None when all pass."""
    with tempfile.TemporaryDirectory() as directory:
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(directory) / name)
        file = Path(directory) / fault.file
        text = file.read_text()
        assert text.count(fault.text) == 1, f"{fault.file}: not there once: {fault.text!r}"
        file.write_text(text.replace(fault.text, fault.instead))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [test for test in TESTS if (ROOT / test).exists()]
        environment = {**os.environ, "PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
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
