"""Reads the file of `lorafleet simulate workload`: card, memory, adapters, arrivals."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from cluster.config import EngineConfig
from cluster.config_loader import load, parse_bytes
from cluster.errors import ConfigError
from replica.simulation.cards import CARDS, DISK_BYTES_PER_S, Card, MeasuredCard
from replica.simulation.traces import Recorded
from replica.simulation.workloads import Arrival

_GIGA = 1e9
# Each has a slot in the directory, beside the base model.
_ADAPTERS_MAX = 65_535
# Fields of EngineConfig that the file states elsewhere, or that a virtual device does not use. The
# others say how requests and adapters are scheduled.
_NOT_SIMULATED = {
    "model",
    "served_model_name",
    "device",
    "dtype",
    "load_format",
    "kernels",
    "cuda_graphs",
    "adapter_memory",
    "host_memory",
    "rank_max",
    "slots_max",
    "directory_slots",
    "kv_memory",
    "device_memory",
    "memory_utilization",
    "replica_memory",
    "rank_expected",
    "page_tokens",
    "context_tokens_max",
    "queue_max",
    "load_retry_s",
    "load_retry_max_s",
    "threads",
    "tensor_parallel",
    "seed",
}


@dataclass(frozen=True, slots=True)
class Arrivals:
    """trace: a file of which `requests` are taken, from number `start` on (0 is the first). Without
        one, arrivals are Poisson.
    rate: mean requests a second; None plays a trace as recorded.
    """

    requests: int
    rate: float | None = None
    trace: str | None = None
    start: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes are in bytes.

    memory: one for KV pages and adapters. Otherwise `places` or `adapter_memory`, and `kv_pages` of
        16 tokens.
    host_memory: None holds all adapters.
    weights: each adapter's share of the requests.
    prompt_tokens, output_tokens: drawn uniformly between the two. A trace has its own lengths.
    engine: fields of EngineConfig that say how requests and adapters are scheduled.
    """

    card: Card | MeasuredCard
    arrivals: Arrivals
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    memory: int | None = None
    places: int | None = None
    adapter_memory: int | None = None
    kv_pages: int | None = None
    host_memory: int | None = None
    base_share: float = 0.0
    prompt_tokens: tuple[int, int] = (1, 1024)
    output_tokens: tuple[int, int] = (1, 512)
    seeds: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        return self.kv_pages is None


def parse(data: object) -> Workload:
    """From parsed YAML. Raises ConfigError that names the field and the value."""
    known = {
        "card",
        "memory",
        "places",
        "adapter_memory",
        "kv_pages",
        "host_memory",
        "adapters",
        "popularity",
        "base_share",
        "arrivals",
        "prompt_tokens",
        "output_tokens",
        "seeds",
        "engine",
    }
    data = _mapping(data, "workload", known)
    for name in ("card", "adapters", "arrivals"):
        if name not in data:
            raise ConfigError(f"{name}: required", field=name)
    card = _card(data["card"])
    adapters = _mapping(data["adapters"], "adapters", {"count", "ranks"})
    count = _whole(adapters.get("count"), "adapters.count")
    if count > _ADAPTERS_MAX:
        raise ConfigError(
            f"adapters.count: {count} is more than {_ADAPTERS_MAX}", field="adapters.count"
        )
    ranks = _wholes(adapters.get("ranks", [16]), "adapters.ranks")
    workload = Workload(
        card,
        _arrivals(data["arrivals"]),
        tuple(ranks[i % len(ranks)] for i in range(count)),
        _weights(data.get("popularity", "uniform"), count),
        memory=_size(data, "memory"),
        places=_optional_whole(data, "places"),
        adapter_memory=_size(data, "adapter_memory"),
        kv_pages=_optional_whole(data, "kv_pages"),
        host_memory=_size(data, "host_memory"),
        base_share=_number(data.get("base_share", 0), "base_share", 0.0, 1.0),
        prompt_tokens=_range(data.get("prompt_tokens", [1, 1024]), "prompt_tokens"),
        output_tokens=_range(data.get("output_tokens", [1, 512]), "output_tokens"),
        seeds=_whole(data.get("seeds", 1), "seeds"),
        engine=_engine(data.get("engine", {})),
    )
    _check_memory(workload)
    return workload


def arrivals(
    workload: Workload, recorded: Sequence[Recorded], context: int, seed: int
) -> list[Arrival]:
    """recorded: the slice of the trace; empty without one. Its lengths are cut to `context`."""
    rng = random.Random(f"workload:{seed}")
    totals = list(accumulate(workload.weights))
    coming = _recorded(workload, recorded, context) if recorded else _drawn(workload, rng)
    names = [adapter_name(i) for i in range(len(workload.ranks))]
    return [
        Arrival(
            request.at_s,
            None
            if rng.random() < workload.base_share
            else rng.choices(names, cum_weights=totals)[0],
            request.prompt_tokens,
            request.output_tokens,
            "workload",
            request.blocks,
        )
        for request in coming
    ]


def adapter_name(index: int) -> str:
    return f"a{index}"


def _recorded(workload: Workload, recorded: Sequence[Recorded], context: int) -> Iterator[Recorded]:
    first_s, last_s = recorded[0].at_s, recorded[-1].at_s
    scale = 1.0
    if workload.arrivals.rate is not None and last_s > first_s:
        scale = (len(recorded) - 1) / (last_s - first_s) / workload.arrivals.rate
    for request in recorded:
        output = min(request.output_tokens, context - 1)
        prompt = min(request.prompt_tokens, context - output)
        yield Recorded((request.at_s - first_s) * scale, prompt, output, request.blocks)


def _drawn(workload: Workload, rng: random.Random) -> Iterator[Recorded]:
    now_s, rate = 0.0, workload.arrivals.rate
    assert rate is not None
    for _ in range(workload.arrivals.requests):
        now_s += rng.expovariate(rate)
        prompt, output = rng.randint(*workload.prompt_tokens), rng.randint(*workload.output_tokens)
        yield Recorded(now_s, prompt, output)


def _card(value: object) -> Card | MeasuredCard:
    if isinstance(value, str):
        if value not in CARDS:
            raise ConfigError(f"card: {value!r} is not one of {', '.join(CARDS)}", field="card")
        return CARDS[value].with_files(DISK_BYTES_PER_S)
    data = _mapping(value, "card", {"decode_ms", "prefill_token_us", "copy_gb_s"})
    rates = _mapping(data.get("copy_gb_s"), "card.copy_gb_s", {"host", "disk"})
    host = _number(rates.get("host"), "card.copy_gb_s.host") * _GIGA
    disk = _number(rates.get("disk", DISK_BYTES_PER_S / _GIGA), "card.copy_gb_s.disk") * _GIGA
    return MeasuredCard(
        _number(data.get("decode_ms"), "card.decode_ms") / 1e3,
        _number(data.get("prefill_token_us"), "card.prefill_token_us") / 1e6,
        host,
        disk,
    )


def _arrivals(value: object) -> Arrivals:
    data = _mapping(value, "arrivals", {"trace", "start", "requests", "rate"})
    read = load(Arrivals, data, "arrivals")
    _whole(read.requests, "arrivals.requests")
    if read.start < 0:
        raise ConfigError(
            f"arrivals.start: {read.start} must not be less than 0", field="arrivals.start"
        )
    if read.start and read.trace is None:
        raise ConfigError(
            f"arrivals.start: {read.start}, but there is no trace", field="arrivals.start"
        )
    if read.rate is None and read.trace is None:
        raise ConfigError("arrivals.rate: required without a trace", field="arrivals.rate")
    if read.rate is not None:
        _number(read.rate, "arrivals.rate")
    return read


def _weights(value: object, count: int) -> tuple[float, ...]:
    if value == "uniform":
        return (1.0,) * count
    data = _mapping(value, "popularity", {"zipf", "weights"})
    if set(data) == {"zipf"}:
        exponent = _number(data["zipf"], "popularity.zipf", 0.0)
        return tuple(i**-exponent for i in range(1, count + 1))
    weights = data.get("weights")
    if set(data) != {"weights"} or not isinstance(weights, list) or len(weights) != count:
        raise ConfigError(
            f"popularity: {value!r} is not uniform, {{zipf: S}} or {{weights: [{count} numbers]}}",
            field="popularity",
        )
    numbers = tuple(_number(w, f"popularity.weights[{i}]", 0.0) for i, w in enumerate(weights))
    if not any(numbers):
        raise ConfigError(f"popularity.weights: {weights!r} are all 0", field="popularity")
    return numbers


def _engine(value: object) -> Mapping[str, Any]:
    data = _mapping(value, "engine", set(EngineConfig.__dataclass_fields__) - _NOT_SIMULATED)
    load(EngineConfig, {"model": "simulated", **data}, "engine")
    return data


def _check_memory(workload: Workload) -> None:
    apart = [
        n for n in ("places", "adapter_memory", "kv_pages") if getattr(workload, n) is not None
    ]
    if workload.memory is not None and apart:
        raise ConfigError(f"memory: {workload.memory}, but {apart[0]} is given too", field="memory")
    if workload.places is not None and workload.adapter_memory is not None:
        raise ConfigError("places: adapter_memory is given too", field="places")
    if apart and (workload.kv_pages is None or len(apart) == 1):
        missing = "kv_pages" if workload.kv_pages is None else "places or adapter_memory"
        raise ConfigError(f"{missing}: required beside {apart[0]}", field=missing.split()[0])
    if not apart and workload.memory is None and isinstance(workload.card, MeasuredCard):
        raise ConfigError(
            "memory: required, because the card does not state its memory", field="memory"
        )


def _mapping(value: object, path: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {value!r} is not a mapping", field=path)
    for key in value:
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {key!r} (known: {', '.join(sorted(known))})", field=path
            )
    return value


def _number(value: object, path: str, least: float | None = None, most: float = 1e18) -> float:
    """least: None for more than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{path}: {value!r} is not a number", field=path)
    if not (value > 0 if least is None else value >= least) or value > most:
        bound = "more than 0" if least is None else f"at least {least:g}"
        raise ConfigError(f"{path}: {value} must be {bound} and at most {most:g}", field=path)
    return float(value)


def _whole(value: object, path: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {value!r} is not a whole number of at least 1", field=path)
    return value


def _optional_whole(data: Mapping[str, Any], name: str) -> int | None:
    return None if data.get(name) is None else _whole(data[name], name)


def _size(data: Mapping[str, Any], name: str) -> int | None:
    value = data.get(name)
    return None if value is None else parse_bytes(str(value), name)


def _wholes(value: object, path: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path}: {value!r} is not a list of whole numbers", field=path)
    return [_whole(item, f"{path}[{i}]") for i, item in enumerate(value)]


def _range(value: object, path: str) -> tuple[int, int]:
    numbers = _wholes(value, path)
    if len(numbers) != 2 or any(a > b for a, b in pairwise(numbers)):
        raise ConfigError(f"{path}: {value!r} is not [least, most]", field=path)
    return numbers[0], numbers[1]
