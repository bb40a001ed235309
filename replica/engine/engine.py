"""The loop: plan → launch → commit. One engine drives one device from one thread.

At depth 2 the engine launches the next batch before it reads the tokens of the current one, so the
device never waits for a plan.
"""

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.config import EngineConfig
from cluster.costs import Costs, Smoothed
from cluster.errors import AdapterRefused
from cluster.values import AdapterState, LoadReport, Tier, Version
from replica.adapters.adapter_files import read_adapter
from replica.adapters.image import Image, Layout
from replica.adapters.loader import Loaded, Loader
from replica.engine.grammars import Grammars
from replica.engine.prompt_results import PromptResults
from replica.engine.pulse import SLOW_S, longest_s
from replica.engine.runner import Runner
from replica.engine.tensor_parallel import JointLoader, TensorParallelWorkers, start_ranks
from replica.engine.tp_messages import Drop
from replica.model.checkpoint import read_shape_here
from replica.model.launch import Row, Ticket
from replica.model.shape import Shard
from replica.scheduling.adapter import Load
from replica.scheduling.assembly import assemble
from replica.scheduling.loads import BASE_KEY
from replica.scheduling.plan import Plan, Work
from replica.scheduling.request import Delta, NewRequest, Outputs
from replica.scheduling.timeline import Event, TimelineEvent


def _nothing(*_: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Launched:
    """since_s: when its planning started. allowed_s: the longest time that it may take."""

    plan: Plan
    ticket: Ticket
    since_s: float
    allowed_s: float


class Engine:
    """Runs one device. Not thread-safe: one thread calls it.

    wake: called on another thread when a load or a page copy has ended, for a caller that waits
        for work.
    expect: called before each step with the monotonic time by which it must have ended.
    steps: batches run.
    idle: the last step ran nothing, and no step will until a request comes, a load ends, or the
    monotonic clock reaches `wake_s`.
    depth: most batches in flight.
    committed_s: when the last batch ended, on the monotonic clock.
    """

    def __init__(
        self,
        config: EngineConfig,
        wake: Callable[[], None] = _nothing,
        expect: Callable[[float], None] = _nothing,
    ) -> None:
        self.shape = read_shape_here(config.model)
        self._expect = expect
        self._workers: TensorParallelWorkers | None = None
        if config.tensor_parallel == 1:
            self.runner = Runner(config, self.shape, wake=wake)
        else:
            self.runner, self._workers = start_ranks(config, self.shape, wake)
        # The runner has filled in what the configuration left open.
        self.config = config = self.runner.config
        arena = self.runner.arena
        self.scheduler = assemble(
            config,
            context=min(config.context_tokens_max or self.shape.context, self.shape.context),
            eos_tokens=self.shape.eos_tokens,
            memory=self.runner.memory,
            alignment=arena.alignment,
            costs=Costs(),
        )
        loader = Loader(
            self.shape,
            self.runner.dtype,
            arena,
            config.rank_max,
            config.loads_in_flight_max,
            wake,
            self.runner.busy,
            Shard(0, config.tensor_parallel),
            self.runner.model,
        )
        self._loader = loader if self._workers is None else JointLoader(loader, self._workers)
        self._grammars = Grammars(config.model, self.shape.vocab, self.shape.eos_tokens, wake)
        self._prompts = PromptResults(self.runner.tells_prompts)
        self.depth = config.plan_depth or (2 if self.runner.device.type == "cuda" else 1)
        self._in_flight: deque[_Launched] = deque()
        self.idle = True
        self.wake_s: float | None = None
        self._images: dict[str, Image] = {}  # the host tier
        self._seeds: dict[str, int] = {}
        self._random = random.Random(config.seed)
        self.steps = 0
        self._step_s = Smoothed(0.0)
        self.committed_s = 0.0

    def register(self, version: Version, path: str) -> None:
        """Accepts requests for `version.digest` from now on. Raises AdapterRefused."""
        size = self._parameters(version, path) * self.runner.image_dtype_bytes
        cache = self.scheduler.adapter_cache
        refusal = cache.refusal(version.digest, size, version.pinned)
        if refusal is not None:
            raise AdapterRefused(f"lora_path: {version.name!r} has {refusal}", field="lora_path")
        cache.register(version.digest, path, size, version.pinned, time.monotonic())
        self.scheduler.activations.register(version.digest, version.invocation)
        self.scheduler.share.weigh(version.digest, version.weight)

    def forget(self, digest: str) -> None:
        """Rejects new requests for it. Accepted ones still run."""
        self.scheduler.forget(digest)

    def add(self, request: NewRequest) -> None:
        """Raises FleetError if the request cannot be accepted."""
        self._prompts.check(request)
        accepted = self.scheduler.add(request, time.monotonic())
        seed = request.sampling.seed
        self._seeds[request.id] = self._random.getrandbits(63) if seed is None else seed
        self._prompts.add(accepted)
        if accepted.stepwise:
            self._grammars.add(accepted)

    def cancel(self, request_id: str) -> None:
        """Frees its pages and its adapter as soon as no batch in flight uses them."""
        if self.scheduler.cancel(request_id, time.monotonic()):
            self._forget_request(request_id)

    @property
    def has_work(self) -> bool:
        """True while a request or a batch has not ended. It may be waiting for a load."""
        return self.scheduler.has_work

    def step(self) -> Outputs:
        """Runs at most one batch. Returns at once if nothing can run."""
        self._finish_loads()
        self._finish_page_copies()
        self._clear_slots()  # before the plan gives one of them to another adapter
        start_s = time.monotonic()
        plan = self.scheduler.step(start_s)
        outputs = Outputs(list(plan.failed))
        self.idle, self.wake_s = not plan.rows and not self._in_flight, plan.wake_s
        step_s = self._allowed_s(plan)
        self._expect(start_s + step_s + sum(each.allowed_s for each in self._in_flight))
        if plan.waits:
            outputs += self._commit()
        outputs.deltas += self._apply_arena_changes(plan)
        for copy in plan.page_copies:
            self.runner.copy_pages(copy)
            self.idle = False  # it may have ended already
        plan, broken = self._with_masks(plan)
        outputs.deltas += broken
        if plan.waits or broken or not self.config.overlap:
            plan = self.scheduler.without_ended(plan)
        if plan.rows:
            self._launch(plan, start_s, step_s)
        if self._in_flight and (len(self._in_flight) == self.depth or not plan.rows):
            outputs += self._commit()
        self._clear_slots()
        self._release_dropped()
        for delta in outputs.deltas:
            if delta.last:
                self._forget_request(delta.request_id)
        return outputs

    def timeline(self, request_id: str) -> list[TimelineEvent]:
        """What happened to the request and when, in monotonic seconds."""
        return self.scheduler.timelines.timeline(request_id)

    def adapter_states(self) -> list[AdapterState]:
        return self.scheduler.adapter_cache.entries(_epoch_s())

    def changes(self) -> list[AdapterState]:
        """The adapter states that changed since the last call."""
        return self.scheduler.adapter_cache.changes(_epoch_s())

    def report(self) -> LoadReport:
        scheduler = self.scheduler
        requests = [*scheduler.waiting, *scheduler.running_set.running.values()]
        extents = scheduler.adapter_cache.extents
        limit_bytes = scheduler.adapter_cache.victim_search.limit_bytes()
        return LoadReport(
            running=len(scheduler.running_set.running),
            waiting=len(scheduler.waiting),
            queued_tokens=sum(max(len(r.prompt) - r.computed, 0) for r in requests),
            remaining_tokens=sum(r.remaining for r in requests),
            step_s=self._step_s.value,
            copy_bytes_per_s=scheduler.costs.copy_bytes_per_s,
            host_bytes_per_s=scheduler.costs.host_bytes_per_s,
            free_bytes=limit_bytes - extents.used,
            capacity_bytes=limit_bytes,
            free_pages=scheduler.pages.free,
            capacity_pages=scheduler.pages.capacity,
            steps=self.steps,
            hits_device=scheduler.arrivals[Tier.DEVICE],
            hits_loading=scheduler.arrivals[Tier.LOADING],
            misses=sum(
                count
                for tier, count in scheduler.arrivals.items()
                if tier not in (Tier.DEVICE, Tier.LOADING)
            ),
            loads=scheduler.adapter_cache.loads,
            evictions=scheduler.adapter_cache.evictions,
            wasted_loads=scheduler.adapter_cache.wasted,
            drains=scheduler.drainer.started,
            parks=scheduler.timelines.counts[Event.PARKED],
            resumes=scheduler.timelines.counts[Event.RESUMED],
            preemptions=scheduler.timelines.counts[Event.PREEMPTED],
            capture_fallback=self.runner.capture_fallback,
            host_locked_bytes=self.runner.host_locked_bytes,
        )

    def close(self) -> None:
        self._loader.close()
        self._grammars.close()
        self.runner.close()
        if self._workers is not None:
            self._workers.close()

    def _parameters(self, version: Version, path: str) -> int:
        """Elements of the image on one rank."""
        if self._workers is not None:
            with contextlib.suppress(AdapterRefused):  # its load will fail and give the reason
                return read_adapter(path, self.shape).parameters_of(self.runner.shape)
        return version.parameters

    def _forget_request(self, request_id: str) -> None:
        del self._seeds[request_id]
        self._grammars.remove(request_id)
        self._prompts.remove(request_id)

    def _allowed_s(self, plan: Plan) -> float:
        """The longest time that the plan's step may take."""
        if not self.config.overlap and any(change.load for change in plan.arena_changes):
            return SLOW_S
        return longest_s(self.scheduler.costs.step_s(_prompt_tokens(plan)), self.config.hang_s)

    def _launch(self, plan: Plan, start_s: float, allowed_s: float) -> None:
        before = self._in_flight[-1].plan.rows if self._in_flight else ()
        index = {work.request.id: row for row, work in enumerate(before)}
        rows = [self._row(work, index) for work in plan.rows]
        self._in_flight.append(_Launched(plan, self.runner.launch(rows), start_s, allowed_s))

    def _commit(self) -> Outputs:
        """Reads the tokens of the oldest batch in flight."""
        launched = self._in_flight.popleft()
        sampled = launched.ticket.results()
        now_s = time.monotonic()
        outputs = self.scheduler.commit(launched.plan, sampled, now_s)
        self._prompts.take(launched.plan.rows, launched.ticket.prompts())
        outputs.deltas = self._prompts.join(outputs.deltas)
        for request, _, _, _, sample in launched.plan.rows:
            if request.stepwise and sample and not request.ended:
                self._grammars.advance(request)
        self.steps += 1
        # A batch that was planned ahead started when the one before it ended.
        self._record_step(launched.plan, now_s - max(launched.since_s, self.committed_s))
        self.committed_s = now_s
        return outputs

    def _with_masks(self, plan: Plan) -> tuple[Plan, list[Delta]]:
        """The plan less the rows whose masks are late, and the errors of broken grammars."""
        rows = [w.request for w in plan.rows if w.request.stepwise and w.sample]
        late, broken = self._grammars.wait([request for request in rows if not request.ended])
        if not late and not broken:
            return plan, []
        now_s = time.monotonic()
        failed = [self.scheduler.fail(r, broken[r.id], now_s) for r in rows if r.id in broken]
        plan = self.scheduler.without(plan, lambda w: w.sample and w.request.id in late)
        self.idle = not plan.rows and not self._in_flight
        return plan, failed

    def _row(self, work: Work, before: Mapping[str, int]) -> Row:
        """before: request id → index of its row in the previous batch."""
        request, start, end, slot, sample = work
        unknown = start >= len(request.prompt) + len(request.output)
        return Row(
            tokens=[0] if unknown else request.slice(start, end),
            position=start,
            pages=request.pages,
            slot=slot,
            sampling=request.sampling if sample else None,
            seed=self._seeds[request.id],
            generated=max(end - len(request.prompt), 0),
            carry=before[request.id] if unknown else None,
            past=(request.prompt, request.output) if request.sampling.looks_back else None,
            mask=self._grammars.mask(request) if request.stepwise and sample else None,
            asked=self._prompts.asked(request, start, end, sample),
            base_until=request.base_tokens,
        )

    def _apply_arena_changes(self, plan: Plan) -> list[Delta]:
        """Returns the errors of requests whose load failed. Without overlap it waits for loads."""
        arena = self.runner.arena
        failed: list[Delta] = []
        lost: set[int] = set()  # slots whose load failed; later changes planned for them are void
        for change in plan.arena_changes:
            for evict in change.evictions:
                if evict.digest != BASE_KEY and evict.slot not in lost:
                    arena.clear(evict.slot)
            for slide in change.slides:
                if slide.slot not in lost:
                    arena.slide(slide.slot, slide.source, slide.target, slide.bytes)
            if change.page_moves:
                self.runner.move_pages(change.page_moves)
            if change.load is None:
                continue
            if change.load.digest == BASE_KEY:
                if self.config.overlap:
                    self.scheduler.loaded(BASE_KEY, time.monotonic())
            elif self.config.overlap:
                self._loader.begin(change.load, *self._from_host(change.load))
            else:
                ended = self._loader.run(change.load, *self._from_host(change.load))
                (lost.add if ended.layout is None else lost.discard)(change.load.slot)
                failed += self._finish_blocking_load(ended)
        return failed

    def _finish_blocking_load(self, ended: Loaded) -> list[Delta]:
        """The scheduler planned on the assumption that the load succeeds."""
        if ended.layout is None:
            return self.scheduler.lost(ended.load.digest, ended.error or "", time.monotonic())
        self._place(ended, ended.layout)
        return []

    def _finish_loads(self) -> None:
        now_s = time.monotonic()
        for ended in self._loader.ended():
            if ended.layout is None:
                self.scheduler.load_failed(ended.load.digest, ended.error or "", now_s)
            else:
                self._place(ended, ended.layout)
                self.scheduler.loaded(ended.load.digest, now_s)

    def _finish_page_copies(self) -> None:
        for copied in self.runner.pages_copied():
            self.scheduler.costs.pages_copied(copied.bytes, copied.seconds)
            self.scheduler.pages_copied(copied.copy.number, time.monotonic())

    def _place(self, ended: Loaded, layout: Layout) -> None:
        load = ended.load
        self.runner.arena.place(load.slot, load.offset, layout)
        self.scheduler.costs.copied(load.bytes, load.source, ended.seconds)
        if ended.image is not None and load.digest not in self.scheduler.adapter_cache.host:
            self.scheduler.adapter_cache.keep_on_host(load.digest)
            self._images[load.digest] = ended.image

    def _from_host(self, load: Load) -> tuple[Image | None, bool]:
        """The image in host memory, and True if host memory must keep the image after the load."""
        adapter_cache, pool = self.scheduler.adapter_cache, self.runner.arena.host_pool
        self._release_dropped()
        image = self._images.get(load.digest)
        keep = image is None and adapter_cache.host.fits(load.bytes)
        # The load reads the image into the pool, so older images must leave the pool now. An image
        # larger than the whole pool is kept outside it.
        into = pool if keep and pool is not None and load.bytes <= pool.size else None
        while into is not None and not into.fits(load.bytes):
            if not adapter_cache.drop_from_host():
                break
            self._release_dropped()
        return image, keep

    def _release_dropped(self) -> None:
        """Frees the images that the host tier has dropped."""
        for digest in self.scheduler.adapter_cache.host.drops():
            del self._images[digest]
            if self._workers is not None:
                self._workers.tell(Drop(digest))

    def _record_step(self, plan: Plan, seconds: float) -> None:
        self.scheduler.costs.stepped(_prompt_tokens(plan), seconds)
        self._step_s.take_in(seconds)

    def _clear_slots(self) -> None:
        for evict in self.scheduler.evictions():
            assert evict.digest != BASE_KEY, "the base model is never unloaded"
            self.runner.arena.clear(evict.slot)


def _prompt_tokens(plan: Plan) -> int:
    return sum(work.end - work.start for work in plan.rows if work.end - work.start > 1)


def _epoch_s() -> float:
    """Unix time of monotonic 0: the engine uses monotonic time, the fleet uses Unix time."""
    return time.time() - time.monotonic()
