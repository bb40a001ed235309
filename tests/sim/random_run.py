"""One random run of a scheduler, drawn from a seed: arrivals, cancels, failing loads, tiny arenas.

The invariants are checked after every step, and all work ends once the faults stop. At depth 2 each
step is launched before the previous one has committed, and memory that one references must stay.
"""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.costs import Costs
from cluster.errors import FleetError
from replica.engine.prompt_results import PromptResults
from replica.scheduling.adapter import Load
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.budget import Budget
from replica.scheduling.extents import Extents
from replica.scheduling.growth import Growth
from replica.scheduling.host_tier import HostTier
from replica.scheduling.loads import Switches
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.pages import Pages
from replica.scheduling.plan import Plan
from replica.scheduling.request import (
    ENDED,
    Delta,
    Finish,
    NewRequest,
    PromptResult,
    Request,
    Sampled,
    Sampling,
    TokenLogprobs,
)
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.share import Share
from replica.scheduling.turns import Sharing
from replica.scheduling.victims import ORDERS
from tests.sim.memory import Memory


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A launched step. pages: of each row. spans: the bytes of each slot that a row uses. told: by
    row, the log-probabilities of its prompt.
    """

    plan: Plan
    pages: list[list[int]]
    spans: dict[int, tuple[int, int]]
    told: dict[int, PromptResult]

    def pages_written(self, page_tokens: int = 16) -> set[int]:
        """Pages that its rows write tokens to."""
        return {
            page
            for work, pages in zip(self.plan.rows, self.pages, strict=True)
            for page in pages[work.start // page_tokens :]
        }

    def pages_in_use(self) -> dict[int, Request]:
        """Page → a request that computes with it."""
        return {
            page: work.request
            for work, pages in zip(self.plan.rows, self.pages, strict=True)
            for page in pages
        }


class Run:
    """A scheduler, and the events around it, drawn from a seed."""

    def __init__(self, seed: int, depth: int = 1) -> None:
        self.depth = depth
        self.rng = random.Random(seed)
        rng = self.rng
        limits = Limits(
            batch_rows_max=rng.randint(1, 8),
            step_tokens_max=rng.randint(8, 64),
            queue_max=20,
            loads_in_flight_max=rng.randint(1, 3),
            context=rng.randint(32, 96),
            eos_tokens=frozenset({2}),
            parked_pages_max=rng.choice([None, 0, 5]),
            page_wait_max_s=rng.choice([0.0, 0.3, 2.0]),
        )
        costs = Costs(copy_bytes_per_s=rng.choice([200.0, 2000.0]), decode_s=0.05)
        costs.stepped(1, rng.choice([0.05, 0.1]))
        sharing = Sharing(
            park=self.chance(0.6),
            quantum_s=rng.choice([0.1, 0.5]),
            drain_wait_threshold_s=rng.choice([0.0, 0.2]),
        )
        switches = Switches(
            base_slot="pinned" if self.chance(0.8) else "shared",
            on_miss="skip" if self.chance(0.8) else "block",
            overlap=self.chance(0.8),
            prefetch_depth=rng.choice([0, 1, 8]),
        )
        shared = self.chance(0.4)
        pages = Pages(rng.randint(6, 20), 16)
        extents = Extents(0 if shared else rng.randint(60, 200), 1)
        slots = rng.randint(1, 6)
        budget = None
        if shared:
            context_pages = pages.needed(limits.context)
            pages = Pages(context_pages + rng.randint(2, 16), 16)
            budget = Budget(extents, pages, rng.randint(8, 20), context_pages, rng.randint(0, 4))
        adapter_cache = AdapterCache(
            extents,
            slots,
            ORDERS[rng.choice(sorted(ORDERS))],
            costs.copy_s,
            0.2,
            rng.choice([0.4, 1.0]),
            HostTier(rng.choice([0, 100])),
            budget,
        )
        share = Share({"a": 2.0}, on=self.chance(0.3))
        growth = Growth(16, pages.total * 16, rng.choice([0.0, 0.0, 0.02, 2.0]))
        host = None
        if self.chance(0.7):
            host = Pages(rng.randint(1, 24), 16, cache=switches.overlap and self.chance(0.7))
        costs.pages_copied(1, rng.choice([0.001, 0.005, 0.1]))
        copies = PageCopies(pages, host, 1, costs)
        self.core = Scheduler(
            limits, pages, adapter_cache, costs, switches, sharing, share, growth, copies
        )
        self.memory = Memory(self.core)
        self.prompts = PromptResults(supported=True)
        self.launched: deque[LaunchedStep] = deque()
        self.page_copies: list[int] = []
        self.tokens = [2, *[5, 6, 7] * rng.choice([1, 20])]  # 2 ends a request
        self.open: dict[str, Request] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.now_s = 0.0
        self.count = 0

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def events(self) -> None:
        core, rng = self.core, self.rng
        if self.chance(0.1):
            digest = rng.choice("abcdefgh")
            pinned = self.chance(0.05)
            size = rng.randint(1, 60)
            if core.adapter_cache.refusal(digest, size, pinned) is None:
                core.adapter_cache.register(
                    digest, rng.choice("xy"), size, pinned, now_s=self.now_s
                )
        if self.chance(0.02) and core.adapter_cache.adapters:
            core.forget(rng.choice([d for d in sorted(core.adapter_cache.adapters) if d] or ["x"]))
        if self.chance(0.5):
            self.arrive()
        if self.chance(0.05) and self.open:
            victim = rng.choice(sorted(self.open))
            assert core.cancel(victim, self.now_s)
            self.end(victim)

    def unpin(self) -> None:
        for adapter in list(self.core.adapter_cache.adapters.values()):
            if adapter.pinned and not adapter.leaving:
                self.core.adapter_cache.register(
                    adapter.digest, "/", adapter.bytes, False, self.now_s
                )

    def arrive(self) -> None:
        rng = self.rng
        digest = rng.choice([None, None, *"abcdefgh"])
        name = f"r{self.count}"
        self.count += 1
        grammar = "any" if self.count % 5 == 0 else None
        scored = 0 if self.count % 3 == 0 else None
        sampling = Sampling(rng.randint(1, 40), grammar=grammar, prompt_logprobs=scored)
        first = rng.choice([0, 0, 1, 100 * self.count])
        prompt = tuple(range(first, first + rng.randint(1, 60)))
        try:
            request = self.core.add(
                NewRequest(name, prompt, sampling, digest, rng.choice([0, 0, 1])), self.now_s
            )
        except FleetError:
            return
        self.open[name] = request
        self.got[name] = []
        self.prompts.add(request)

    def receive(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            assert delta.request_id in self.open, f"a token for {delta.request_id}, which has ended"
            if delta.error is not None and self.got[delta.request_id]:
                adapters = self.core.adapter_cache.adapters
                adapter = adapters.get(self.open[delta.request_id].adapter_key or "")
                assert adapter is None or adapter.given_up, "it has tokens: it waits for retries"
            if delta.tokens:
                self.check_told(self.open[delta.request_id], delta)
            self.got[delta.request_id] += delta.tokens
            if delta.last:
                request = self.open[delta.request_id]
                length = len(self.got[delta.request_id])
                assert delta.finish is not Finish.STOP or request.output[-1] == 2
                most = min(
                    request.sampling.max_tokens, self.core.limits.context - len(request.prompt)
                )
                assert length == most if delta.finish is Finish.LENGTH else length <= most
                self.end(delta.request_id)

    def check_told(self, request: Request, delta: Delta) -> None:
        """The first token brings what was asked of the prompt, whole, and no other does."""
        first = not self.got[request.id]
        if request.sampling.prompt_logprobs is None or not first:
            assert delta.prompt is None
        else:
            assert delta.prompt is not None
            assert tuple(e.token for e in delta.prompt.logprobs) == request.prompt[1:]

    def end(self, name: str) -> None:
        assert name in self.open and name not in self.ended, f"{name} ended twice"
        assert self.got.pop(name) == self.open.pop(name).output, f"{name} lost a token"
        self.ended.add(name)
        self.prompts.remove(name)

    def finish_loads(self, faults: bool) -> None:
        for load in list(self.memory.copies):
            if faults and not self.chance(0.4):
                continue
            good = not (faults and self.chance(self.fault_rate(load, 0.2)))
            self.memory.end(load, good)
            if good:
                self.core.loaded(load.digest, self.now_s)
            else:
                self.core.load_failed(load.digest, "fault", self.now_s)
        self.clear()

    def fault_rate(self, load: Load, usual: float) -> float:
        """Loads that requests with tokens wait for are rare, so they fail more often."""
        waiting = (r for r in self.open.values() if r.digest == load.digest)
        return 0.6 if any(r.output for r in waiting) else usual

    def clear(self) -> None:
        for evict in self.core.evictions():
            self.assert_slot_unused(evict.slot)
            self.memory.clear(evict)

    def assert_slot_unused(self, slot: int) -> None:
        assert all(slot not in step.spans for step in self.launched), "a step in flight uses it"

    def finish_page_copies(self, faults: bool) -> None:
        """In any order. Copies between host and device may take many steps."""
        for number in list(self.page_copies):
            if not (faults and self.chance(0.6)):
                self.page_copies.remove(number)
                self.memory.end_copy(number)
                self.core.pages_copied(number, self.now_s)
                self.core.check()
        self.clear()

    def begin_page_copies(self, plan: Plan) -> None:
        pages_in_use = {page for step in self.launched for page in step.pages_written()}
        for copy in plan.page_copies:
            assert not pages_in_use & set(copy.pages), (
                "a step in flight writes a page that is copied"
            )
            self.memory.begin_copy(copy)
            self.page_copies.append(copy.number)

    def step(self, faults: bool) -> None:
        self.finish_loads(faults)
        self.finish_page_copies(faults)
        plan = self.core.step(self.now_s)
        self.core.check()
        self.receive(plan.failed)
        for digest in self.core.adapter_cache.backoff.paused(self.now_s):
            assert all(r.begun for r in self.core.waiting.group(digest)), "it was to fail"
            if not plan.rows and self.core.waiting.waited_for(digest):
                assert plan.wake_s is not None, "nothing wakes the engine for the retry"
        if plan.waits:
            self.commit()
        changed = self.apply_changes(plan, faults)
        self.begin_page_copies(plan)
        plan = self.core.without_ended(changed)
        if plan.rows:
            self.launch(plan)
        if self.launched and (len(self.launched) == self.depth or not plan.rows):
            self.commit()
        self.clear()
        self.now_s += 0.05

    def apply_changes(self, plan: Plan, faults: bool) -> Plan:
        for change in plan.arena_changes:
            for freed in (*change.evictions, *change.slides):
                self.assert_slot_unused(freed.slot)
            for move in change.slides:
                self.assert_bytes_unused(move.target, move.bytes)
            pages_in_use = {page for step in self.launched for page in step.pages_in_use()}
            for copied in change.page_moves:
                assert not {copied.source, copied.target} & pages_in_use, (
                    "a page of a step in flight is copied or overwritten"
                )
            self.memory.make(change)
            if change.load is None:
                continue
            self.assert_bytes_unused(change.load.offset, change.load.bytes)
            self.memory.begin(change.load)
            if not self.core.switches.overlap:
                self.load_now(change.load, faults)
        return plan

    def assert_bytes_unused(self, offset: int, size: int) -> None:
        for step in self.launched:
            for begin, end in step.spans.values():
                assert offset + size <= begin or end <= offset, (
                    "bytes of a step in flight are overwritten"
                )

    def load_now(self, load: Load, faults: bool) -> None:
        """Without overlap the batch waits, and rows whose load failed do not run."""
        good = not (faults and load.digest and self.chance(self.fault_rate(load, 0.1)))
        self.memory.end(load, good)
        if not good:
            self.memory.lost.add(load.slot)
            self.receive(self.core.lost(load.digest, "fault", self.now_s))

    def launch(self, plan: Plan) -> None:
        size = self.core.pages.page_tokens
        pages_in_use = {
            page: r for step in self.launched for page, r in step.pages_in_use().items()
        }
        step = LaunchedStep(plan, [], {}, self.told(plan))
        before = {id(work.request) for launched in self.launched for work in launched.plan.rows}
        for work in plan.rows:
            known = len(work.request.prompt) + len(work.request.output)
            carried = id(work.request) in before and (work.start, work.end) == (known, known + 1)
            assert work.end <= known or carried, "an unknown token is computed"
            pages = work.request.pages[: -(-work.end // size)]
            step.pages.append(pages)
            for page in pages[work.start // size :]:
                assert pages_in_use.get(page, work.request) is work.request, (
                    "a page of a step in flight is written"
                )
            if work.slot:
                step.spans[work.slot] = self.memory.span(work.slot)
        self.launched.append(step)
        self.core.check()
        self.check_weights(step)

    def told(self, plan: Plan) -> dict[int, PromptResult]:
        told = {}
        for row, (request, start, end, _, sample) in enumerate(plan.rows):
            asked = self.prompts.asked(request, start, end, sample)
            if asked is not None:
                entries = (TokenLogprobs(token, 0.0, ()) for token in asked.following)
                told[row] = PromptResult(tuple(entries))
        return told

    def commit(self) -> None:
        step = self.launched.popleft()
        self.check_weights(step)
        rows = zip(step.plan.rows, step.pages, strict=True)
        for work, pages in rows:
            if work.request.phase not in ENDED:  # else its result is dropped
                self.memory.compute(work, pages)
        tokens = self.tokens
        chosen = [Sampled(self.rng.choice(tokens)) if w.sample else None for w in step.plan.rows]
        deltas = self.core.commit(step.plan, chosen, self.now_s)
        self.prompts.take(step.plan.rows, step.told)
        self.receive(self.prompts.join(deltas))
        self.core.check()

    def check_weights(self, step: LaunchedStep) -> None:
        self.memory.check()
        for work in step.plan.rows:
            weights = self.memory.weights(work.slot)
            assert weights == work.request.digest, f"{work.request.id} ran with {weights}"
            assert not work.slot or self.memory.span(work.slot) == step.spans[work.slot]


def run_seed(seed: int, depth: int = 1) -> None:
    """Raises AssertionError that names the seed."""
    run = Run(seed, depth)
    try:
        for _ in range(120):
            run.events()
            run.step(faults=True)
        run.unpin()
        for _ in range(4000):
            if not run.core.has_work:
                break
            run.step(faults=False)
        assert not run.core.has_work, "work is left though the faults have stopped"
        assert run.core.pages.free == run.core.pages.capacity
    except (AssertionError, LookupError) as error:
        raise AssertionError(
            f"seed {seed} at depth {depth}: {type(error).__name__} {error}"
        ) from error
