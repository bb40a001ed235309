"""The published workloads at full size on the in-process engine, beside the published figures.

The same lengths, rates, adapters and arrivals as `replica.simulation.upstream` simulates. At
upstream's places (`places`), and with as much memory for adapters and keys and values together as
the card leaves (`shared`). Adapters lie in host memory when the first request comes: a load is one
copy.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cluster.config import EngineConfig
from cluster.values import Version
from replica.simulation.published import published
from replica.simulation.simulator import Figures, RequestStats, figures
from replica.simulation.upstream import TABLES, Table
from replica.simulation.workloads import arrivals
from tests.bench.on_gpu.floors import image_bytes, weight_bytes
from tests.bench.on_gpu.models import Adapters, scratch
from tests.bench.on_gpu.report import number
from tests.bench.on_gpu.served import counted, served
from tests.bench.on_gpu.setting import Setting

SECTION = "upstream"
NAMES = ("14795", "17913", "15512-large", "15512-small")
VARIANTS = ("places", "shared")

# Table → stream → figure → the most that it may be at upstream's places, in milliseconds.
GOALS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "15512-large": {"lora": {"ttft_mean_ms": 200, "ttft_p99_ms": 700, "tpot_p50_ms": 25}},
    "15512-small": {"lora": {"ttft_p99_ms": 500}},
    "17913": {"lora": {"ttft_p99_ms": 700, "ttft_p50_ms": 150}},
}
SHARED_TTFT_P99_MS = 150
BESIDE_ADAPTERS = 1.2
TITLES = {
    "ttft_mean_ms": "TTFT mean",
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "e2e_mean_ms": "E2E mean",
    "tpot_p50_ms": "TPOT p50",
    "itl_max_ms": "ITL longest",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """What the published numbers are divided by; 1 each but to see that it runs."""

    lengths: int = 1
    requests: int = 1
    adapters: int = 1
    ranks: int = 1

    def table(self, table: Table) -> Table:
        names = list(table.ranks)[: max(len(table.ranks) // self.adapters, 2)]
        streams = tuple(
            dataclasses.replace(
                stream,
                requests=stream.requests // self.requests,
                prompt_tokens_max=stream.prompt_tokens_max // self.lengths,
                output_tokens_max=stream.output_tokens_max // self.lengths,
                adapters=tuple(name for name in stream.adapters if name in names),
            )
            for stream in table.streams
        )
        return dataclasses.replace(
            table,
            streams=streams,
            ranks={name: max(table.ranks[name] // self.ranks, 1) for name in names},
            places=max(table.places // self.adapters, 1),
        )


FULL, TINY = Scale(), Scale(lengths=128, requests=50, adapters=4, ranks=16)


def run(setting: Setting) -> None:
    for name in setting.tables or NAMES:
        setting.attempt(SECTION, name, partial(_measure, name, setting))


def _measure(name: str, setting: Setting) -> None:
    table = (TINY if setting.tiny else FULL).table(TABLES[name])
    written = sum(_image_bytes(setting, rank) for rank in set(table.ranks.values()))
    with scratch(2 * written) as directory:
        adapters = Adapters(directory, setting.shape, setting.dtype, setting.device)
        versions = adapters.versions(table.ranks)
        for variant in setting.variants or VARIANTS:
            setting.attempt(
                SECTION, f"{name} {variant}", partial(_replay, setting, table, variant, versions)
            )


def _replay(setting: Setting, table: Table, variant: str, versions: Mapping[str, Version]) -> None:
    config = config_of(setting, table, variant, versions)
    report, what = setting.report, f"{table.name} {variant}"
    with served(config, versions, setting.device) as server:
        longest = max(stream.prompt_tokens_max for stream in table.streams)
        server.warm([4] if setting.tiny else [longest, longest // 4], 2, setting.seed)
        before = server.engine.report()
        start_s = time.monotonic()
        run = server.replay(arrivals(table.streams, setting.seed), setting.seed)
        report.tell(f"{what}: replayed in {time.monotonic() - start_s:.1f} s")
        found = _by_stream(table, run.records)
        counts = counted(before, server.engine.report())
        _tell(setting, table, variant, found, counts)
        if "base" not in found or variant == "shared":
            return
        if setting.has_time(SECTION, f"{what}: the same streams, all base"):
            run = server.replay(arrivals(table.all_base().streams, setting.seed), setting.seed)
            alone = _by_stream(table, run.records)
            _tell_beside(setting, what, found["base"], alone["base"])


def _by_stream(table: Table, records: Sequence[RequestStats]) -> dict[str, Figures]:
    return {
        stream.name: figures([r for r in records if r.arrival.stream == stream.name])
        for stream in table.streams
    }


def config_of(
    setting: Setting, table: Table, variant: str, versions: Mapping[str, Version]
) -> EngineConfig:
    """Schedules as engines do by default, on that many places or on one budget."""
    sizes = [version.parameters * setting.itemsize for version in versions.values()]
    host_memory = sum(sizes) + len(sizes) * 2**20
    memory: dict[str, Any]
    if variant == "places":
        memory = {
            "adapter_memory": table.places * (max(sizes) + 256),
            "kv_memory": 2**21 if setting.tiny else _kv_bytes(setting, table.places * max(sizes)),
            "slots_max": table.places,
        }
    else:
        memory = {"device_memory": _shared_bytes(setting, table, sum(sizes))}
    return setting.config(
        **memory,
        host_memory=host_memory,
        directory_slots=2 * len(sizes) + 2,
        loads_in_flight_max=4,
        batch_rows_max=8 if setting.tiny else 64,
        step_tokens_max=64 if setting.tiny else 2048,
        context_tokens_max=256 if setting.tiny else 4096,
        queue_max=10_000,
        prefix_cache=False,
    )


def _shared_bytes(setting: Setting, table: Table, adapters: int) -> int:
    """85% of the card that the workload was published on, or of this one, less the weights."""
    if setting.device.type != "cuda":
        return adapters + 2**21
    _, here = torch.cuda.mem_get_info(setting.device)
    weights = weight_bytes(setting.shape, setting.itemsize)
    return int(0.85 * min(here, table.card.memory_bytes)) - weights


def _kv_bytes(setting: Setting, adapters: int) -> int:
    """For a full batch of the longest sequences, or what this card has left."""
    return min(32 * 2**30, setting.room - adapters)


def _image_bytes(setting: Setting, rank: int) -> int:
    return image_bytes(setting.shape, rank, setting.itemsize)


def _tell(
    setting: Setting,
    table: Table,
    variant: str,
    found: Mapping[str, Figures],
    counts: Mapping[str, int],
) -> None:
    for stream, measured in found.items():
        goals = GOALS.get(table.name, {}).get(stream, {})
        if variant == "shared":
            goals = {"ttft_p99_ms": SHARED_TTFT_P99_MS}
        for key, title in TITLES.items():
            stated = [published(table.name, p, stream).get(key) for p in ("before", "after")]
            beside = "published " + " → ".join("–" if s is None else number(s) for s in stated)
            setting.report.add(
                SECTION,
                f"{table.name} {variant} {stream} {title}",
                getattr(measured, key),
                " ms",
                most=goals.get(key),
                beside=beside if any(s is not None for s in stated) else "",
                short=key in goals or stated[1] is not None,
                figures=dataclasses.asdict(measured),
                counts=dict(counts),
            )


def _tell_beside(setting: Setting, what: str, base: Figures, alone: Figures) -> None:
    setting.report.add(
        SECTION,
        f"{what}: base TTFT mean ÷ all base",
        base.ttft_mean_ms / alone.ttft_mean_ms,
        " ×",
        most=BESIDE_ADAPTERS,
        beside=f"all base {number(alone.ttft_mean_ms)} ms",
        all_base=dataclasses.asdict(alone),
    )
