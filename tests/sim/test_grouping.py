"""Simulated loads and prefills: a group waits for its last member if that is cheaper."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from cluster.costs import Costs
from cluster.values import Tier
from replica.scheduling import victims
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.extents import Extents
from replica.scheduling.loads import Switches
from replica.scheduling.pages import Pages
from replica.scheduling.plan import Work
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from replica.simulation.simulator import Simulator
from replica.simulation.workloads import Arrival


@dataclass(frozen=True, slots=True)
class Device:
    """In seconds. A step with prompts takes `prefill_s`, however many prompts it has."""

    load_s: float
    prefill_s: float
    decode_s: float = 0.001

    def step_s(self, rows: Sequence[Work], ranks: Mapping[str | None, int]) -> float:
        return self.prefill_s if any(w.end - w.start > 1 for w in rows) else self.decode_s

    def copy_s(self, size: int, source: Tier = Tier.HOST) -> float:
        return self.load_s

    def move_s(self, size: int) -> float:
        return 0.0


def ttft_s(device: Device, adapters: int) -> list[float]:
    """Of one request for each adapter, all arriving at once."""
    costs = Costs(1.0 / device.load_s, device.decode_s, device.prefill_s / 10)
    adapter_cache = AdapterCache(
        Extents(adapters, 1), adapters, victims.lru, costs.copy_s, 1.0, 8.0
    )
    ranks: dict[str | None, int] = {None: 0}
    for i in range(adapters):
        adapter_cache.register(f"a{i}", "/", 1, pinned=False, now_s=0.0)
        ranks[f"a{i}"] = 8
    limits = Limits(64, 4096, 100, adapters, context=128)
    core = Scheduler(limits, Pages(640, 16), adapter_cache, costs, Switches(), Sharing())
    coming = [Arrival(0.0, f"a{i}", 10, 1, "") for i in range(adapters)]
    records = Simulator(core, device, ranks, check=True).run(coming)
    return [record.ttft_s for record in records]


def blocking_s(device: Device, adapters: int) -> list[float]:
    """All loads one after another, then one prefill."""
    return [adapters * device.load_s + device.prefill_s] * adapters


def overlapping_s(device: Device, adapters: int) -> list[float]:
    """A prefill starts as soon as a new image is loaded, with all that are."""
    done: list[float] = []
    now_s = 0.0
    while len(done) < adapters:
        now_s = max(now_s, (len(done) + 1) * device.load_s)
        here = min(adapters, int(now_s / device.load_s + 1e-9))
        now_s += device.prefill_s
        done += [now_s] * (here - len(done))
    return done


def test_four_short_loads_and_one_prefill_take_their_sum() -> None:
    device = Device(load_s=0.002, prefill_s=0.02)
    assert max(ttft_s(device, 4)) == pytest.approx(0.028, abs=0.0015)
    assert max(overlapping_s(device, 4)) == pytest.approx(0.042)


@pytest.mark.parametrize("seed", range(40))
def test_never_worse_than_the_better_of_blocking_and_overlapping(seed: int) -> None:
    rng = random.Random(seed)
    device = Device(load_s=rng.uniform(0.0005, 0.05), prefill_s=rng.uniform(0.005, 0.05))
    adapters = rng.randint(1, 6)
    ours = statistics.fmean(ttft_s(device, adapters))
    blocking = statistics.fmean(blocking_s(device, adapters))
    overlapping = statistics.fmean(overlapping_s(device, adapters))
    assert ours <= 1.05 * min(blocking, overlapping), f"seed {seed}: {device}, {adapters} adapters"
