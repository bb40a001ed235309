"""The configuration: frozen dataclasses that check themselves."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.errors import ConfigError

_THREADS_MAX = 1024
_SLOTS_MAX = 2**16
_DRAIN_MAX_S = 86_400
_ORIGIN = re.compile(r"\*|https?://[^/\s]+")
DEFAULT_MODEL = "default"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine on one device.

    `replica/engine/sizing.py` chooses the sizes that are left open. The scheduling switches default
    to the best known policy; their other values exist for comparison.
    """

    model: str
    """Directory of a Hugging Face checkpoint, or its id on the Hub (OWNER/NAME)."""
    served_model_name: str | None = None
    """Name of the base model on the API. Default: that of the checkpoint's directory or id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda. auto takes a CUDA device if torch finds one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, KV pages and images. auto takes the checkpoint's type on CUDA. On a CPU it
    takes float32, or bfloat16 if the checkpoint has it and the CPU computes it natively."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto reads the checkpoint. dummy makes random weights and reads config.json only."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """auto, torch or triton. auto takes triton on CUDA and torch on a CPU."""
    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs at startup. Off launches every kernel of a step."""
    adapter_memory: int | None = None
    """Bytes of device memory for adapter images. Default: chosen at startup."""
    host_memory: int | None = None
    """Bytes of host memory for evicted images; 0 keeps none. Default: chosen at startup."""
    host_kv_memory: int | None = None
    """Bytes of host memory for KV pages of rows that left the batch, and for cached prefixes.
    Default: chosen at startup."""
    rank_max: int = 256
    """Largest adapter rank accepted."""
    slots_max: int | None = None
    """Most adapters on the device at once. Default: what memory and `directory_slots` allow."""
    directory_slots: int = 256
    """Rows of the table of resident adapters. The base model takes one."""
    kv_memory: int | None = None
    """Bytes of device memory for KV pages. Default: chosen at startup."""
    device_memory: int | None = None
    """Bytes that adapters and KV pages share; needs triton. Default: chosen at startup on a GPU."""
    memory_utilization: float = 0.9
    """Fraction of the available memory that sizes chosen at startup may use."""
    replica_memory: int | None = None
    """Bytes of host memory for one replica. Default: its share of the memory on the machine."""
    rank_expected: int | None = None
    """Adapter rank that chosen sizes allow for. Default: largest known at startup, else 64."""
    headroom_pages: int | None = None
    """KV pages that adapters leave free in `device_memory`. Default: enough for a full step."""
    page_tokens: int = 16
    """Tokens per KV page."""
    context_tokens_max: int | None = None
    """Longest prompt plus output, in tokens. Default: the model's limit, or what fits in memory."""
    batch_rows_max: int = 64
    """Most requests computed in one step."""
    step_tokens_max: int | None = None
    """Most tokens computed in one step. Longer prompts are prefilled in chunks. Default: 1,024 on
    CUDA, 512 on a CPU."""
    plan_depth: Literal[1, 2] | None = None
    """2 launches a step while the last one runs; 1 waits for it. Default: 2 on CUDA, 1 on a CPU."""
    queue_max: int = 1024
    """Requests that may wait beyond a full batch. Any more are answered 429."""
    load_retry_s: float = 1.0
    """Seconds before a failed adapter load is retried. Doubles with each failure."""
    load_retry_max_s: float = 60.0
    """Longest such pause in seconds. Once it is reached, requests that have tokens fail too."""
    loads_in_flight_max: int = 2
    """Most adapter loads at a time."""
    threads: int | None = None
    """CPU threads for compute. Default: torch's choice."""
    tensor_parallel: int = 1
    """Ranks (GPUs or CPU processes) that share the model. Memory sizes and threads are per rank."""
    hang_s: float = 5.0
    """Seconds without progress after which the engine is started again; more where a step may take
    longer."""
    seed: int | None = None
    """Seed of dummy weights (default: 0) and of requests that give no seed (default: random)."""
    base_slot: Literal["pinned", "shared"] = "pinned"
    """pinned always has the base model ready. shared makes it compete for a slot."""
    on_miss: Literal["skip", "block"] = "skip"
    """skip passes over requests that cannot run yet. block stops at the first one."""
    overlap: bool = True
    """Load adapters while the batch computes. Off (refused for a fleet) stops it during a load."""
    prefetch_depth: int = 8
    """Adapters to load ahead for requests that do not fit in the batch yet."""
    park: bool = True
    """Park running rows, with their KV pages, so that a starving adapter gets their place."""
    quantum_s: float = 0.5
    """Shortest time in seconds that an adapter keeps its place before its rows may be parked."""
    ttft_target_s: float = 1.0
    """Seconds to a request's first token that scheduling aims at. Longer waits count as late."""
    tpot_target_s: float = 0.05
    """Mean seconds per later token that scheduling aims at. Rows that meet it may be parked."""
    parked_pages_max: int | None = None
    """Most KV pages that parked rows may keep on the device. Default: all."""
    page_copies: bool = True
    """Copy the KV pages of rows that leave the batch to host memory, and back when they return. Off
    computes their tokens again if the device runs out of pages."""
    drain_wait_threshold_s: float = 0.0
    """Without `park`: seconds an adapter starves before another is drained. 0 never drains."""
    eviction: Literal["cost", "lru", "fifo"] = "cost"
    """Idle adapter that leaves first: cost (cheapest to lose), lru (least recent) or fifo."""
    page_wait_max_s: float = 2.0
    """Seconds a prompt may be passed over for lack of pages before pages are reserved for it."""
    growth_outputs: float = 2.0
    """Growth of a row to keep pages free for, in recent mean outputs; 0 keeps none free."""
    fair_share: bool = False
    """Give adapters batch space in turn, by the tokens they were served and their weights."""
    prefix_cache: bool = True
    """Share the KV pages of common prompt prefixes between requests for one adapter version."""

    def __post_init__(self) -> None:
        for name in (
            "memory_utilization",
            "rank_max",
            "directory_slots",
            "page_tokens",
            "batch_rows_max",
            "queue_max",
            "loads_in_flight_max",
            "quantum_s",
            "ttft_target_s",
            "tpot_target_s",
            "hang_s",
            "tensor_parallel",
        ):
            _positive(name, getattr(self, name))
        for name in (
            "slots_max",
            "adapter_memory",
            "kv_memory",
            "device_memory",
            "replica_memory",
            "rank_expected",
            "context_tokens_max",
            "step_tokens_max",
            "threads",
        ):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in (
            "host_memory",
            "host_kv_memory",
            "headroom_pages",
            "load_retry_s",
            "load_retry_max_s",
            "prefetch_depth",
            "parked_pages_max",
            "drain_wait_threshold_s",
            "page_wait_max_s",
            "growth_outputs",
        ):
            if getattr(self, name) is not None:
                _not_negative(name, getattr(self, name))
        for name, most in (("threads", _THREADS_MAX), ("directory_slots", _SLOTS_MAX)):
            if getattr(self, name) is not None:
                _at_most(name, getattr(self, name), most)
        _at_most("memory_utilization", self.memory_utilization, 1)
        for name in ("adapter_memory", "kv_memory"):
            if self.device_memory is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"device_memory: {self.device_memory}, but {name} is {getattr(self, name)}: "
                    "set either device_memory, or adapter_memory and kv_memory",
                    field="device_memory",
                )
        slots = self.directory_slots - 1  # the base model takes one
        if slots < (self.slots_max or 1):
            name = "slots_max" if slots else "directory_slots"
            raise ConfigError(
                f"{name}: {getattr(self, name)}, but directory_slots {self.directory_slots} leaves "
                f"{slots} slots for adapters",
                field=name,
            )

    @property
    def sized(self) -> bool:
        """True if the memory of adapters and KV pages is set."""
        apart = self.adapter_memory is not None and self.kv_memory is not None
        return apart or self.device_memory is not None

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step, which has one of each row at least."""
        chosen = self.step_tokens_max or (1024 if self.device == "cuda" else 512)
        return max(chosen, self.batch_rows_max)

    @property
    def base_name(self) -> str:
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """The whole fleet."""

    engine: EngineConfig
    """Configuration of each replica's engine."""
    name: str = "default"
    """Name of the fleet; it separates fleets that share one Redis."""
    replicas: int = 1
    """Number of replicas."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapters registered at startup: name → path."""
    adapter_roots: tuple[str, ...] = ()
    """Directories from which the API may load adapters. Default: none."""
    adapter_sources: tuple[str, ...] = ()
    """Directories or URLs in which a model that nobody registered is looked up by name. Default:
    none."""
    redis_url: str | None = None
    """URL of the fleet's Redis, also redis+sentinel://. Default: an embedded one in `directory`."""
    directory: str = ".fleet"
    """Directory on local disk for copies of adapters, logs and the embedded Redis."""
    adapter_disk: int | None = None
    """Bytes of disk for copies of adapters, shared like `directory`. Default: half of the disk."""
    api_keys: tuple[str, ...] = ()
    """Keys that may use models, sent as bearer tokens. Default: no key is needed."""
    admin_keys: tuple[str, ...] = ()
    """Keys that may also change adapters and see the whole fleet. Default: none."""
    allowed_hosts: tuple[str, ...] = ()
    """Without keys: names of this fleet, beside loopback, to which changes may be sent."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the API, such as https://chat.example.com. * allows all.
    Default: none."""
    strict_fields: bool = False
    """Refuse a request with unknown fields. Off names them in a header of the answer."""
    default_is_base: bool = False
    """Also call the base model `default`."""
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral"] = "auto"
    """How the model writes calls of tools: hermes (Qwen's too), llama3_json or mistral. auto reads
    it off the chat template."""
    request_log: str | None = None
    """File to which each request adds a line of JSON, without its text. Default: none."""
    open_metrics: bool = False
    """Answer /metrics without a key."""
    shared_prefixes: bool = False
    """Share cached prompt prefixes between API keys, which shows one what others asked."""
    source_connections_max: int | None = None
    """Most connections of one client address. Default: half of all that HAProxy takes."""
    lease_s: float = 3.0
    """Seconds that a silent replica stays in the fleet's view."""
    report_s: float = 0.2
    """Seconds between the load reports of a replica; at most half of `lease_s`."""
    drain_s: float = 600.0
    """Seconds that a stopping replica may keep running its requests. A second Ctrl-C ends them."""
    acknowledge_s: float = 5.0
    """Seconds to wait for all replicas to apply a change of the catalog."""
    gpus_per_replica: float | None = None
    """GPUs per replica. Default: one per rank of `tensor_parallel`."""
    cpus_per_replica: float = 1.0
    """CPU cores that Ray reserves per replica."""

    def __post_init__(self) -> None:
        for name in (
            "replicas",
            "lease_s",
            "report_s",
            "acknowledge_s",
            "adapter_disk",
            "source_connections_max",
        ):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("drain_s", "cpus_per_replica"):
            _not_negative(name, getattr(self, name))
        _at_most("drain_s", self.drain_s, _DRAIN_MAX_S)
        if not self.host:
            raise ConfigError(
                "host: '' is no address; 0.0.0.0 listens on every interface", field="host"
            )
        for name in ("api_keys", "admin_keys"):
            if not all(getattr(self, name)):
                raise ConfigError(f"{name}: an empty key would match any request", field=name)
        if set(self.api_keys) & set(self.admin_keys):
            raise ConfigError("admin_keys: one of them is in api_keys too", field="admin_keys")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                what = f"allowed_origins: {origin!r} is neither * nor like https://example.com:8080"
                raise ConfigError(what, field="allowed_origins")
        if self.default_is_base and DEFAULT_MODEL in self.adapters:
            what = f"default_is_base: an adapter is called {DEFAULT_MODEL!r} too"
            raise ConfigError(what, field="default_is_base")
        if self.gpus_per_replica is not None:
            _not_negative("gpus_per_replica", self.gpus_per_replica)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} is not between 0 and 65535", field="port")
        ranks, gpus = self.engine.tensor_parallel, self.gpus_per_replica
        if ranks > 1 and gpus not in (None, ranks):
            what = f"gpus_per_replica: {gpus}, but tensor_parallel {ranks} needs {ranks} GPUs"
            raise ConfigError(f"{what} per replica; leave it out", field="gpus_per_replica")
        if not self.engine.overlap:
            what = "engine.overlap: false is for benchmarks: a read that hangs stops all requests"
            raise ConfigError(what, field="engine.overlap")
        if self.report_s * 2 > self.lease_s:
            raise ConfigError(
                f"report_s: {self.report_s} must be at most half of lease_s {self.lease_s}, so "
                "that one lost report does not end the lease",
                field="report_s",
            )

    @property
    def replica_gpus(self) -> float:
        if self.gpus_per_replica is None:
            return self.engine.tensor_parallel
        return self.gpus_per_replica


def _positive(name: str, value: float) -> None:
    if not value > 0:  # NaN fails too
        raise ConfigError(f"{name}: {value} must be more than 0", field=name)


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{name}: {value} must be at least 0", field=name)


def _at_most(name: str, value: float, most: float) -> None:
    if not value <= most:
        raise ConfigError(f"{name}: {value} must be at most {most}", field=name)
