"""The loop: plan → run → commit. One engine drives one device from one thread."""

import random
import time
from collections.abc import Callable

from cluster.config import EngineConfig
from cluster.errors import AdapterRefused
from cluster.values import LoadReport, Residency, Version
from replica import eviction
from replica.extents import Extents
from replica.loader import Loader
from replica.pages import Pages
from replica.request import Delta, NewRequest
from replica.residency import Residency as Directory
from replica.runner import Row, Runner
from replica.scheduler import Chosen, Limits, Plan, Scheduler, Work
from replica.shape import read_shape

# Weight of the newest measurement in the smoothed rates of the load report.
_SMOOTHING = 0.1


def _nothing() -> None:
    pass


class Engine:
    """Everything one device does. Not thread-safe: one thread calls it.

    wake: called from a loader thread when a load has ended, for whoever waits for work.
    steps: batches run. idle: nothing ran in the last step, and nothing will until a request comes
    or a load ends.
    """

    def __init__(self, config: EngineConfig, wake: Callable[[], None] = _nothing) -> None:
        self.config = config
        self.shape = read_shape(config.model)
        self.runner = Runner(config, self.shape)
        arena = self.runner.arena
        slots = config.directory_slots - 1
        self.scheduler = Scheduler(
            Limits(
                batch_rows_max=config.batch_rows_max,
                step_tokens_max=max(config.step_tokens_max, config.batch_rows_max),
                queue_max=config.queue_max,
                loads_in_flight_max=config.loads_in_flight_max,
                context=min(config.context_tokens_max or self.shape.context, self.shape.context),
                eos_tokens=self.shape.eos_tokens,
            ),
            Pages(self.runner.page_count, config.page_tokens),
            Directory(
                Extents(arena.capacity_bytes, arena.alignment),
                min(config.slots_max or slots, slots),
                eviction.lru,
                config.load_retry_s,
                config.load_retry_max_s,
            ),
        )
        self._loader = Loader(
            self.shape,
            self.runner.dtype,
            arena,
            config.rank_max,
            config.loads_in_flight_max,
            wake,
        )
        self.idle = True
        self._seeds: dict[str, int] = {}
        self._random = random.Random(config.seed)
        self.steps = 0
        self._step_s = 0.0
        self._copy_bytes_per_s = 0.0

    def register(self, version: Version, path: str) -> None:
        """From now on requests may name `version.digest`. Raises AdapterRefused."""
        extents = self.scheduler.residency.extents
        size = version.parameters * self.runner.image_dtype_bytes
        if extents.aligned(size) > extents.capacity:
            raise AdapterRefused(
                f"lora_path: the image of {version.name!r} takes {size} bytes; "
                f"adapter_memory holds {extents.capacity}",
                field="lora_path",
            )
        self.scheduler.residency.register(
            version.digest, path, size, version.pinned, time.monotonic()
        )

    def forget(self, digest: str) -> None:
        """No new requests for it. Those that were accepted still run with it."""
        self.scheduler.forget(digest)

    def add(self, request: NewRequest) -> None:
        """Raises a FleetError when the request cannot be accepted."""
        self.scheduler.add(request, time.monotonic())
        seed = request.sampling.seed
        self._seeds[request.id] = self._random.getrandbits(63) if seed is None else seed

    def cancel(self, request_id: str) -> None:
        """Frees its pages and its claim on the adapter at once."""
        if self.scheduler.cancel(request_id, time.monotonic()):
            del self._seeds[request_id]

    @property
    def has_work(self) -> bool:
        """A request has not ended. It may wait for a load: see `step`."""
        return self.scheduler.has_work

    def step(self) -> list[Delta]:
        """One step: at most one batch. Returns at once when there is nothing to run."""
        self._take_in_loads()
        start_s = time.monotonic()
        plan = self.scheduler.step(start_s)
        self._make_rooms(plan)
        deltas = list(plan.failed)
        if plan.rows:
            sampled = self.runner.run([self._row(work) for work in plan.rows])
            chosen = [None if s is None else Chosen(s.token, s.logprobs) for s in sampled]
            end_s = time.monotonic()
            deltas += self.scheduler.commit(plan, chosen, end_s)
            self.steps += 1
            self._step_s = _smooth(self._step_s, end_s - start_s)
        self._clear_slots()
        for delta in deltas:
            if delta.last:
                del self._seeds[delta.request_id]
        self.idle = not plan.rows
        return deltas

    def residency(self) -> list[Residency]:
        return self._dated(self.scheduler.residency.entries())

    def changes(self) -> list[Residency]:
        """What changed in `residency()` since the last call."""
        return self._dated(self.scheduler.residency.changes())

    def report(self) -> LoadReport:
        scheduler = self.scheduler
        requests = [*scheduler.waiting, *scheduler.running.values()]
        extents = scheduler.residency.extents
        return LoadReport(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            queued_tokens=sum(max(len(r.prompt) - r.computed, 0) for r in requests),
            remaining_tokens=sum(r.remaining for r in requests),
            step_s=self._step_s,
            copy_bytes_per_s=self._copy_bytes_per_s,
            free_bytes=extents.free,
            capacity_bytes=extents.capacity,
            free_pages=scheduler.pages.free,
            capacity_pages=scheduler.pages.capacity,
            steps=self.steps,
        )

    def close(self) -> None:
        self._loader.close()

    def _row(self, work: Work) -> Row:
        request = work.request
        return Row(
            tokens=request.slice(work.start, work.end),
            position=work.start,
            pages=request.pages,
            slot=work.slot,
            sampling=request.sampling if work.sample else None,
            seed=self._seeds[request.id],
            generated=len(request.output),
        )

    def _make_rooms(self, plan: Plan) -> None:
        arena = self.runner.arena
        for room in plan.rooms:
            for evict in room.evictions:
                arena.clear(evict.slot)
            for move in room.moves:
                arena.move(move.slot, move.source, move.target, move.bytes)
            self._loader.begin(room.load)

    def _take_in_loads(self) -> None:
        now_s = time.monotonic()
        for ended in self._loader.ended():
            load = ended.load
            if ended.layout is None:
                self.scheduler.residency.failed(load.digest, ended.error or "", now_s)
                continue
            self.runner.arena.place(load.slot, load.offset, ended.layout)
            self.scheduler.loaded(load.digest, now_s)
            rate = load.bytes / max(ended.seconds, 1e-6)
            self._copy_bytes_per_s = _smooth(self._copy_bytes_per_s, rate)
        self._clear_slots()

    def _clear_slots(self) -> None:
        for evict in self.scheduler.evictions():
            self.runner.arena.clear(evict.slot)

    def _dated(self, entries: list[Residency]) -> list[Residency]:
        """The engine counts monotonic time; the fleet speaks Unix time."""
        offset_s = time.time() - time.monotonic()
        return [
            Residency(e.digest, e.tier, e.bytes, e.since_s + offset_s, e.reason) for e in entries
        ]


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
