"""What a scrape shows: histograms of requests under vLLM's names, and the replica's own state."""

import dataclasses
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram, exposition
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.values import AdapterState, LoadReport, Tier
from replica.api.completion import Call, Piece

CONTENT_TYPE = exposition.CONTENT_TYPE_PLAIN_0_0_4

# vLLM's buckets, in seconds.
_LATE_S = (0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, *_LATE_S, 160.0, 640.0, 2560.0)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, *_LATE_S[1:])
_WHOLE_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(d * 10**e for e in range(6) for d in (1, 2, 5))

# Models beyond these share one label, or thousands of adapters would make as many series.
_MODELS_MAX = 32
_OTHERS = "other"

# Name of a field of LoadReport → what it is. Counters end in `_total` in a scrape.
_COUNTERS = {
    "steps": "Steps of the engine.",
    "hits_device": "Requests whose adapter was on the device when they came.",
    "hits_loading": "Requests whose adapter was on its way to the device when they came.",
    "misses": "Requests whose adapter was neither on the device nor on its way.",
    "loads": "Adapter loads to the device.",
    "evictions": "Adapters evicted from the device.",
    "wasted_loads": "Loads that no row used.",
    "drains": "Adapters that were let run out to make room.",
    "parks": "Rows parked so that others could run.",
    "resumes": "Parked rows that run again.",
    "preemptions": "Rows that lost their KV pages.",
}
_GAUGES = {
    "running": "Rows in the batch.",
    "waiting": "Requests that wait for a row.",
    "queued_tokens": "Prompt tokens still to compute.",
    "remaining_tokens": "Most tokens that current requests may still generate.",
    "step_s": "Smoothed duration of a step, in seconds.",
    "copy_bytes_per_s": "Smoothed rate of adapter loads from disk.",
    "host_bytes_per_s": "Smoothed rate of adapter loads from host memory.",
    "free_bytes": "Adapter memory that is free without an eviction.",
    "capacity_bytes": "Adapter memory.",
    "free_pages": "Free KV pages.",
    "capacity_pages": "KV pages.",
    "capture_fallback": "0: decode steps are captured as configured; 1: without the shrink stream; "
    "2: not captured.",
    "host_locked_bytes": "Page-locked host memory for images.",
    "streams": "Requests that the replica's server holds open.",
    "age_s": "Age of the engine's part of this report, in seconds.",
    "stalled": "1 while the engine hangs or is started again.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """The replica's state at a scrape. active: HTTP requests in progress."""

    report: LoadReport
    residency: Sequence[AdapterState]
    active: int


class Metrics:
    """base: the base model's name, which labels what concerns the whole replica."""

    def __init__(self, base: str, snapshot: Callable[[], Snapshot]) -> None:
        self._models = {base}
        self._registry = CollectorRegistry()
        self._registry.register(_State(base, snapshot))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> PrometheusCounter:
            return PrometheusCounter(name, text, ["model_name", *labels], registry=self._registry)

        self.first_s = histogram(
            "vllm:time_to_first_token_seconds",
            "From the arrival of a request's body to its first token.",
            _FIRST_S,
        )
        self.gap_s = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _TOKEN_S
        )
        self.token_s = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time of a token after the first, an answer.",
            _TOKEN_S,
        )
        self.whole_s = histogram(
            "vllm:e2e_request_latency_seconds",
            "From the arrival of a request's body to its last token.",
            _WHOLE_S,
        )
        self.queue_s = histogram(
            "vllm:request_queue_time_seconds",
            "From the engine's receipt of a request to its first row, loads included.",
            _WHOLE_S,
        )
        self.prefill_s = histogram(
            "vllm:request_prefill_time_seconds", "From the first row to the first token.", _WHOLE_S
        )
        self.decode_s = histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _WHOLE_S
        )
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS
        )
        self.longest = histogram(
            "vllm:request_max_num_generation_tokens",
            "Tokens of the longest of a request's answers.",
            _TOKENS,
        )
        self.prompted = counter("vllm:prompt_tokens", "Prompt tokens.")
        self.generated = counter("vllm:generation_tokens", "Generated tokens.")
        self.cached = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.looked_up = counter("vllm:prefix_cache_queries", "Prompt tokens looked up there.")
        self.ended = counter(
            "vllm:request_success", "Answers, by how they ended.", "finished_reason"
        )

    def watch(self, call: Call, received_s: float) -> "Watch":
        """received_s: when the request's body had arrived, monotonic."""
        name = call.model
        if name not in self._models:
            if len(self._models) < _MODELS_MAX:
                self._models.add(name)
            else:
                name = _OTHERS
        return Watch(self, name, call, received_s)

    def render(self) -> bytes:
        return exposition.generate_latest(self._registry)


class Watch:
    """Counts one call's pieces as they leave."""

    def __init__(self, metrics: Metrics, model: str, call: Call, received_s: float) -> None:
        self._metrics = metrics
        self._model = model
        self._call = call
        self._received_s = received_s
        self._open = set(range(call.choices))
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._tokens: Counter[int] = Counter()
        self._queued_s = 0.0
        self._cached_tokens = 0
        self._finishes = ["abort"] * call.choices
        self._gap = metrics.gap_s.labels(model)
        self._generated = metrics.generated.labels(model)

    def piece(self, piece: Piece) -> None:
        now_s, index = time.monotonic(), piece.index
        before_s = self._last_s.get(index)
        if before_s is None:
            self._began(piece, now_s)
        else:
            self._gap.observe(now_s - before_s)
        self._last_s[index] = now_s
        self._tokens[index] += len(piece.tokens)
        self._generated.inc(len(piece.tokens))
        if piece.finish is not None:
            self._ended(index, piece.finish.value, now_s)

    async def until_end(self, work: Awaitable[None]) -> None:
        """Choices that have not ended with the work were given up, or have failed."""
        try:
            await work
        finally:
            if self._open:
                self._metrics.ended.labels(self._model, "abort").inc(len(self._open))

    def ran(self) -> dict[str, object]:
        """About the call, for a log. Seconds are from the arrival of the request's body."""
        call, first_s = self._call, min(self._first_s.values(), default=None)
        return {
            "id": call.id,
            "model": call.model,
            "adapter": call.digest,
            "prompt_tokens": call.prompt_tokens,
            "cached_tokens": self._cached_tokens,
            "completion_tokens": self._tokens.total(),
            "queued_s": round(self._queued_s, 6),
            "ttft_s": None if first_s is None else round(first_s - self._received_s, 6),
            "finish": self._finishes,
        }

    def _began(self, piece: Piece, now_s: float) -> None:
        metrics, model = self._metrics, self._model
        prompt = len(self._call.prompts[piece.index // self._call.n])
        self._first_s[piece.index] = now_s
        self._queued_s = max(self._queued_s, piece.queued_s)
        self._cached_tokens = max(self._cached_tokens, piece.cached_tokens)
        metrics.first_s.labels(model).observe(now_s - self._received_s)
        metrics.queue_s.labels(model).observe(piece.queued_s)
        prefill_s = now_s - self._received_s - piece.queued_s
        metrics.prefill_s.labels(model).observe(max(prefill_s, 0.0))
        metrics.prompt_tokens.labels(model).observe(prompt)
        metrics.prompted.labels(model).inc(prompt)
        metrics.looked_up.labels(model).inc(prompt)
        metrics.cached.labels(model).inc(piece.cached_tokens)

    def _ended(self, index: int, reason: str, now_s: float) -> None:
        metrics, model, count = self._metrics, self._model, self._tokens[index]
        decode_s = now_s - self._first_s[index]
        metrics.whole_s.labels(model).observe(now_s - self._received_s)
        metrics.decode_s.labels(model).observe(decode_s)
        metrics.output_tokens.labels(model).observe(count)
        if count > 1:
            metrics.token_s.labels(model).observe(decode_s / (count - 1))
        metrics.ended.labels(model, reason).inc()
        self._finishes[index] = reason
        self._open.remove(index)
        if not self._open:
            metrics.longest.labels(model).observe(max(self._tokens.values()))


class _State(Collector):
    def __init__(self, base: str, snapshot: Callable[[], Snapshot]) -> None:
        self._base, self._snapshot = base, snapshot

    def describe(self) -> list[Metric]:
        return []  # else registering it would take a snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        report = snapshot.report
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"lorafleet_{name}", text, value=getattr(report, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"lorafleet_{name}", text, value=getattr(report, name))
        yield GaugeMetricFamily(
            "lorafleet_http_requests_active", "HTTP requests in progress.", value=snapshot.active
        )
        tiers = Counter(entry.tier for entry in snapshot.residency)
        adapters = GaugeMetricFamily("lorafleet_adapters", "Adapters by tier.", labels=["tier"])
        for tier in Tier:
            adapters.add_metric([tier.value], tiers[tier])
        yield adapters
        used = report.capacity_pages - report.free_pages
        for name, text, value in (
            ("num_requests_running", _GAUGES["running"], report.running),
            ("num_requests_waiting", _GAUGES["waiting"], report.waiting),
            (
                "kv_cache_usage_perc",
                "Share of the KV pages that are in use, 0 to 1.",
                used / max(report.capacity_pages, 1),
            ),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._base], value)
            yield gauge
        preempted = CounterMetricFamily(
            "vllm:num_preemptions", _COUNTERS["preemptions"], labels=["model_name"]
        )
        preempted.add_metric([self._base], report.preemptions)
        yield preempted
