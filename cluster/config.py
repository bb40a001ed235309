"""What an operator may set: frozen values, every limit named, unknown keys refused when loaded."""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from cluster.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_THREADS_MAX = 1024
_SLOTS_MAX = 2**16
_DRAIN_MAX_S = 86_400


def parse_bytes(text: str, field: str) -> int:
    """'64MiB' → 67108864. A bare number is bytes. Raises ConfigError naming the field."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{field}: {text!r} is not a size such as 64MiB or 2GiB", field=field)
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine on one device.

    model: directory of an HF checkpoint. served_model_name: the base model's name on the API
    (default: the directory's name). dtype auto: what the checkpoint says; on a CPU float32, unless
    that is bfloat16 and the processor computes it natively. load_format dummy: random weights, made
    on the device by `seed`; of the checkpoint only config.json is read.
    kernels auto: triton on CUDA, torch on CPU. triton on CPU: where TRITON_INTERPRET=1 has it
    interpreted, for tests. cuda_graphs: decode steps are captured when the engine starts; off,
    each of their kernels is launched anew.
    adapter_memory: bytes of device memory for adapter images. kv_memory: for keys and values.
    device_memory: for both together, instead of those two (on a GPU): adapters take what pages
    leave free and give it back. host_memory: bytes of host memory for images that left the device
    (page-locked on CUDA), so that they come back without their files; 0: none. Those that are None
    are chosen when the engine starts (replica/engine/sizing.py): on CUDA one device_memory, from
    `memory_utilization` of what is free when the model is there and one largest step has run; on a
    CPU, from as much of `replica_memory`.
    replica_memory: bytes of the machine's memory that one replica may use, model and all; None: the
    cgroup's limit, or what is free, divided by the replicas on this machine. rank_expected: memory
    that is chosen has room for 16 adapters of this rank, where it can; None: the largest rank of
    the adapters known at the start, else 64.
    slots_max: how many adapters may be resident; None: as many as fit the bytes, up to
    `directory_slots`.
    headroom_pages: pages that adapters leave free for rows that run; None: one for each row of a
    full batch, and those of one step's prompts.
    step_tokens_max: prompt and decode tokens computed in one step (prefill is cut into chunks).
    queue_max: requests beyond a full batch; when there are as many, new ones are answered 429.
    threads: CPU threads for compute; None: what torch takes.
    plan_depth: 2: the next step is planned and launched while this one runs; 1: when it has ended;
    None: 2 on CUDA, 1 on the CPU.
    tensor_parallel: how many devices (on a CPU, processes) share the model and each adapter. Sizes
    of memory and threads are those of each.

    How requests and adapters are scheduled; the defaults are the best known, the other settings are
    there to be compared with. base_slot shared: the base model competes for a slot. on_miss block:
    the first request that cannot run stops those behind it. overlap off: a load stops the batch.
    prefetch_depth: adapters loaded ahead of the batch space for them. park: rows leave the batch,
    with their KV pages, for an adapter that starves. quantum_s: the shortest time an adapter keeps
    a place before that. head_start_s: how much longer a parked adapter may starve than one with a
    request that has no token yet. parked_pages_max: pages that parked rows may hold; None: all.
    drain_wait_threshold_s: without parking, how long an adapter starves before another is drained
    for it; 0: never. eviction: which idle adapter leaves first. page_wait_max_s: how long a prompt
    may be passed over for want of pages before pages are saved for it. growth_outputs: how far rows
    are expected to grow, in mean outputs of late: as many pages are left free for them, so that
    none has to be computed again; 0: none are. fair_share: adapters get
    batch space in turn, by the tokens they were served. prefix_cache: prompts that begin alike, for
    the same version of the same adapter, share the pages of what they have in common.
    """

    model: str
    served_model_name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    kernels: Literal["auto", "torch", "triton"] = "auto"
    cuda_graphs: bool = True
    adapter_memory: int | None = None
    host_memory: int | None = None
    rank_max: int = 256
    slots_max: int | None = None
    directory_slots: int = 256
    kv_memory: int | None = None
    device_memory: int | None = None
    memory_utilization: float = 0.9
    replica_memory: int | None = None
    rank_expected: int | None = None
    headroom_pages: int | None = None
    page_tokens: int = 16
    context_tokens_max: int | None = None
    batch_rows_max: int = 64
    step_tokens_max: int = 512
    plan_depth: Literal[1, 2] | None = None
    queue_max: int = 1024
    load_retry_s: float = 1.0
    load_retry_max_s: float = 60.0
    loads_in_flight_max: int = 2
    threads: int | None = None
    tensor_parallel: int = 1
    seed: int | None = None
    base_slot: Literal["pinned", "shared"] = "pinned"
    on_miss: Literal["skip", "block"] = "skip"
    overlap: bool = True
    prefetch_depth: int = 8
    park: bool = True
    quantum_s: float = 0.5
    head_start_s: float = 0.2
    parked_pages_max: int | None = None
    drain_wait_threshold_s: float = 0.0
    eviction: Literal["cost", "lru", "fifo"] = "cost"
    page_wait_max_s: float = 2.0
    growth_outputs: float = 2.0
    fair_share: bool = False
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in (
            "memory_utilization",
            "rank_max",
            "directory_slots",
            "page_tokens",
            "batch_rows_max",
            "step_tokens_max",
            "queue_max",
            "loads_in_flight_max",
            "quantum_s",
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
            "threads",
        ):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in (
            "host_memory",
            "headroom_pages",
            "load_retry_s",
            "load_retry_max_s",
            "prefetch_depth",
            "head_start_s",
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
                    "adapters and pages have one memory or one each",
                    field="device_memory",
                )
        slots = self.directory_slots - 1  # the base model has one
        if slots < (self.slots_max or 1):
            name = "slots_max" if slots else "directory_slots"
            raise ConfigError(
                f"{name}: {getattr(self, name)}, but directory_slots {self.directory_slots} leave "
                f"{slots} for adapters",
                field=name,
            )

    @property
    def sized(self) -> bool:
        """Whether what adapters and KV pages take of the device is given."""
        apart = self.adapter_memory is not None and self.kv_memory is not None
        return apart or self.device_memory is not None

    @property
    def base_name(self) -> str:
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """The whole fleet. adapters: name → path, registered when the fleet starts.

    adapter_roots: directories under which the API may name adapter paths; none: the API may not.
    redis_url: None starts an embedded Redis with its data under `directory`.
    api_keys: when there are any, a request must carry one as `Authorization: Bearer`.
    lease_s: how long a replica that went silent stays in the fleet's view.
    drain_s: how long a stopping replica may go on with what it runs.
    gpus_per_replica: None: one for each of `engine.tensor_parallel` ranks.
    """

    engine: EngineConfig
    name: str = "default"
    replicas: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_roots: tuple[str, ...] = ()
    redis_url: str | None = None
    directory: str = ".fleet"
    api_keys: tuple[str, ...] = ()
    lease_s: float = 3.0
    report_s: float = 0.2
    drain_s: float = 1.0
    acknowledge_s: float = 5.0
    gpus_per_replica: float | None = None
    cpus_per_replica: float = 1.0

    def __post_init__(self) -> None:
        for name in ("replicas", "lease_s", "report_s", "acknowledge_s"):
            _positive(name, getattr(self, name))
        for name in ("drain_s", "cpus_per_replica"):
            _not_negative(name, getattr(self, name))
        _at_most("drain_s", self.drain_s, _DRAIN_MAX_S)
        if not self.host:
            raise ConfigError("host: '' is no address; 0.0.0.0 is all of them", field="host")
        if not all(self.api_keys):
            raise ConfigError("api_keys: '' would let anybody in", field="api_keys")
        if self.gpus_per_replica is not None:
            _not_negative("gpus_per_replica", self.gpus_per_replica)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} is not between 0 and 65535", field="port")
        ranks, gpus = self.engine.tensor_parallel, self.gpus_per_replica
        if ranks > 1 and gpus not in (None, ranks):
            raise ConfigError(
                f"gpus_per_replica: {gpus}, but with tensor_parallel {ranks} a replica needs as "
                "many; leave it out",
                field="gpus_per_replica",
            )
        if self.report_s * 2 > self.lease_s:
            raise ConfigError(
                f"report_s: {self.report_s} leaves no second try within lease_s {self.lease_s}",
                field="report_s",
            )

    @property
    def replica_gpus(self) -> float:
        if self.gpus_per_replica is None:
            return self.engine.tensor_parallel
        return self.gpus_per_replica


def _positive(name: str, value: float) -> None:
    if not value > 0:  # nor NaN
        raise ConfigError(f"{name}: {value} must be more than 0", field=name)


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{name}: {value} must not be less than 0", field=name)


def _at_most(name: str, value: float, most: float) -> None:
    if not value <= most:
        raise ConfigError(f"{name}: {value} must not be more than {most}", field=name)


Config = TypeVar("Config")


def load(kind: type[Config], data: Mapping[str, Any], where: str = "") -> Config:
    """A frozen dataclass from parsed YAML or JSON.

    Sizes may be written '64MiB' where the field's name ends in `_memory`. Unknown keys and wrong
    types raise ConfigError naming the key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'configuration'}: {data!r} is not a mapping", field=where)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{path}: unknown key (known: {known})", field=path)
        if key.endswith("_memory") and isinstance(value, str):
            value = parse_bytes(value, path)
        values[key] = _check(hints[key], value, path)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        path = f"{where}.{missing[0]}" if where else missing[0]
        raise ConfigError(f"{path}: required", field=path)
    return kind(**values)


def _check(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _check(hint, value, path)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise ConfigError(
                f"{path}: {value!r} is not one of {', '.join(map(str, args))}", field=path
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: {value!r} is not a list", field=path)
        return tuple(_check(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {value!r} is not a mapping", field=path)
        return {str(k): _check(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return load(hint, value, path)  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path}: {value!r} is not of type {hint.__name__}", field=path)
    return value
