"""An engine without a model, for tests and benches: repeats scripted tokens at a set rate."""

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace

from cluster.config import EngineConfig
from cluster.errors import FleetError, ModelNotFound, QueueFull, ShuttingDown
from cluster.values import AdapterState, LoadReport, Tier, Version
from replica.scheduling.request import Delta, Finish, NewRequest, PromptResult, TokenLogprobs
from replica.scheduling.timeline import Event, TimelineEvent


@dataclass(slots=True)
class Row:
    """One running request. sent: the number of tokens sent so far."""

    request: NewRequest
    script: Sequence[int]
    deltas: asyncio.Queue[Delta]
    sent: int = 0


class StubEngine:
    """Implements `replica.api.interfaces.Engine`.

    Every `step_s`, each running request gets `tokens_per_step` tokens: 64 requests and
    step_s=0.0064 make 10,000 tokens/s. A request's first step starts `first_token_s` after its
    arrival. Its tokens repeat the script of its digest in `scripts` (None: the base model), or else
    `script`.

    For tests: `seen` lists every request, `running` those that run, and `ended` each one's end
    ("finished", "failed", "cancelled"). `hold` stops all tokens. With `fail`, each request fails
    after `fail_after` tokens. `paths` are the registered directories. capacity_pages: KV pages that
    it reports.
    """

    def __init__(
        self,
        *,
        step_s: float = 0.0,
        tokens_per_step: int = 1,
        first_token_s: float = 0.0,
        script: Sequence[int] = tuple(range(5, 37)),
        scripts: dict[str | None, Sequence[int]] | None = None,
        eos: frozenset[int] = frozenset(),
        queue_max: int = 4096,
        capacity_pages: int = 2**40,
        config: EngineConfig = EngineConfig("stub"),
    ) -> None:
        self.config = config
        self.step_s = step_s
        self.tokens_per_step = tokens_per_step
        self.first_token_s = first_token_s
        self.script = script
        self.scripts = scripts or {}
        self.eos = eos
        self.queue_max = queue_max
        self.capacity_pages = capacity_pages
        self.seen: list[NewRequest] = []
        self.running: dict[str, NewRequest] = {}
        self.ended: dict[str, str] = {}
        self.hold = False
        self.fail: FleetError | None = None
        self.fail_after = 0
        self.stopped = False
        self.steps = 0
        self._rows: dict[str, Row] = {}
        self._ticker: asyncio.Task[None] | None = None
        self.paths: dict[str, str] = {}
        self._registered: dict[str, Version] = {}
        self._callbacks: list[Callable[[list[AdapterState]], None]] = []

    @property
    def alive(self) -> bool:
        return not self.stopped

    async def start(self) -> None:
        self.stopped = False

    async def stop(self) -> None:
        self.stopped = True
        for row in list(self._rows.values()):
            row.deltas.put_nowait(Delta(row.request.id, error=ShuttingDown("the engine stops")))
        self._rows.clear()
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait({self._ticker})

    async def generate(self, request: NewRequest) -> AsyncGenerator[Delta, None]:
        self.seen.append(request)
        if len(self.running) >= self.queue_max:
            error = QueueFull(f"{self.queue_max} requests are waiting", retry_after_s=1.0)
            self.ended[request.id] = "failed"
            yield Delta(request.id, error=error)
            return
        if request.digest is not None and request.digest not in self._registered:
            self.ended[request.id] = "failed"
            yield Delta(request.id, error=ModelNotFound(f"{request.digest}: not registered"))
            return
        script = self.scripts.get(request.digest, self.script)
        row = Row(request, script, asyncio.Queue())
        self.running[request.id] = request
        end = "cancelled"
        try:
            if self.first_token_s:
                await asyncio.sleep(self.first_token_s)
            self._rows[request.id] = row
            if self._ticker is None or self._ticker.done():
                self._ticker = asyncio.create_task(self._tick())
            while True:
                delta = await row.deltas.get()
                if delta.last:
                    end = "failed" if delta.error is not None else "finished"
                yield delta
                if delta.last:
                    return
        finally:
            self._rows.pop(request.id, None)
            del self.running[request.id]
            self.ended[request.id] = end

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self._rows:
            due = max(due + self.step_s, loop.time() - self.step_s)  # if late, catch up one step
            await asyncio.sleep(max(0.0, due - loop.time()))
            if self.hold:
                continue
            self.steps += 1
            for row in list(self._rows.values()):
                delta = self._advance(row)
                row.deltas.put_nowait(delta)
                if delta.last:
                    del self._rows[row.request.id]

    def _advance(self, row: Row) -> Delta:
        request, sampling = row.request, row.request.sampling
        tokens: list[int] = []
        finish = None
        for _ in range(self.tokens_per_step):
            if self.fail is not None and row.sent >= self.fail_after:
                return Delta(request.id, tuple(tokens), error=self.fail)
            token = row.script[row.sent % len(row.script)]
            row.sent += 1
            tokens.append(token)
            ends = token in sampling.stop_tokens or (token in self.eos and not sampling.ignore_eos)
            if ends and row.sent > sampling.min_tokens:
                finish = Finish.STOP
            elif row.sent >= sampling.max_tokens:
                finish = Finish.LENGTH
            if finish is not None:
                break
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.logprobs is not None:
            logprobs = tuple(_logprobs(token, sampling.logprobs) for token in tokens)
        told = _told(request) if row.sent == len(tokens) and sampling.asks_of_prompt else None
        return Delta(request.id, tuple(tokens), logprobs, finish, prompt=told)

    def cut(self, reason: str) -> None:
        for row in self._rows.values():
            error = ShuttingDown(reason, retry_after_s=1.0)
            row.deltas.put_nowait(Delta(row.request.id, error=error))
        self._rows.clear()

    async def register(self, version: Version, path: str) -> None:
        self._registered[version.digest] = version
        self.paths[version.digest] = path
        self._tell([self._entry(version)])

    async def forget(self, digest: str) -> None:
        self._registered.pop(digest, None)
        self.paths.pop(digest, None)
        self._tell([AdapterState(digest, Tier.ABSENT, 0, 0.0)])

    async def timeline(self, request_id: str) -> list[TimelineEvent]:
        return [TimelineEvent(0.0, Event.QUEUED)] if request_id in self.ended else []

    def adapter_states(self) -> list[AdapterState]:
        return [self._entry(version) for version in self._registered.values()]

    def report(self) -> LoadReport:
        return LoadReport(
            running=len(self.running),
            steps=self.steps,
            step_s=self.step_s,
            capacity_pages=self.capacity_pages,
        )

    def on_residency(self, callback: Callable[[list[AdapterState]], None]) -> None:
        self._callbacks.append(callback)

    def _tell(self, entries: list[AdapterState]) -> None:
        for callback in self._callbacks:
            callback(entries)

    @staticmethod
    def _entry(version: Version) -> AdapterState:
        return AdapterState(version.digest, Tier.DEVICE, 2 * version.parameters, 0.0)


def _told(request: NewRequest) -> PromptResult:
    """Each token of the prompt is the likeliest, after which the next one is half as likely."""
    top, state = request.sampling.prompt_logprobs, None
    scored = () if top is None else request.prompt[1:]
    if request.sampling.embeds:
        state = struct.pack("<4f", len(request.prompt), request.prompt[0], -3.0, 0.0)
    logprobs = (replace(_logprobs(token, top or 0), rank=1) for token in scored)
    return PromptResult(tuple(logprobs), state)


def _logprobs(token: int, count: int) -> TokenLogprobs:
    """The sampled token is the likeliest. Each following id is half as likely as the one before."""
    top = tuple((token + i, -0.5 - 0.7 * i) for i in range(count))
    return TokenLogprobs(token, -0.5, top)
