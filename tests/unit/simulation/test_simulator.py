"""The simulator: one seed gives one run, and every arrival ends with all its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cluster.costs import Costs
from cluster.values import Tier
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.admission import Limits
from replica.scheduling.extents import Extents
from replica.scheduling.loads import Switches
from replica.scheduling.pages import Pages
from replica.scheduling.plan import Work
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.turns import Sharing
from replica.scheduling.victims import ORDERS
from replica.simulation.simulator import RequestStats, Simulator, figures, percentile
from replica.simulation.workloads import Arrival, Stream, arrivals

ADAPTERS = tuple("abcd")
STREAMS = (Stream("base", 30, 5.0, 60, 30), Stream("lora", 60, 10.0, 60, 30, ADAPTERS))


class Device:
    """A step takes 10 ms, and 0.1 ms a prompt token. An image of 10 bytes takes 50 ms."""

    def step_s(self, rows: Sequence[Work], ranks: Mapping[str | None, int]) -> float:
        tokens = sum(work.end - work.start for work in rows if work.end - work.start > 1)
        return 0.01 + 1e-4 * tokens

    def copy_s(self, size: int, source: Tier = Tier.HOST) -> float:
        return size * 5e-3

    def move_s(self, size: int) -> float:
        return 0.0


def simulator(mixed: bool = True, depth: int = 1, **switches: Any) -> Simulator:
    costs = Costs(copy_bytes_per_s=200.0, decode_s=0.01, prefill_token_s=1e-4)
    adapter_cache = AdapterCache(Extents(20, 1), 2, ORDERS["cost"], costs.copy_s, 1.0, 60.0)
    for adapter in ADAPTERS:
        adapter_cache.register(adapter, "", 10, pinned=False, now_s=0.0)
    limits = Limits(
        batch_rows_max=16,
        step_tokens_max=64,
        queue_max=1000,
        loads_in_flight_max=2,
        context=1000,
    )
    sharing = Sharing(park=switches.pop("park", True))
    core = Scheduler(
        limits, Pages(60, 16, cache=False), adapter_cache, costs, Switches(**switches), sharing
    )
    ranks = {None: 0, **dict.fromkeys(ADAPTERS, 1)}
    return Simulator(core, Device(), ranks, check=True, mixed=mixed, depth=depth)


def lives(records: Sequence[RequestStats]) -> list[tuple[float | None, float, float, int]]:
    return [(r.first_s, r.last_s, r.gap_max_s, r.tokens) for r in records]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("mixed", "depth"), [(True, 1), (True, 2), (False, 1), (False, 2)])
@pytest.mark.parametrize(
    "switches",
    [{}, {"park": False}, {"overlap": False, "park": False}, {"on_miss": "block", "park": False}],
)
def test_every_arrival_ends_once_with_its_tokens(
    seed: int, mixed: bool, depth: int, switches: dict[str, Any]
) -> None:
    coming = arrivals(STREAMS, seed)
    run = simulator(mixed, depth, **switches)
    records = run.run(coming)
    assert [r.arrival for r in records] == coming
    for record in records:
        assert record.tokens == record.arrival.output_tokens
        assert record.first_s is not None
        assert record.arrival.at_s < record.first_s <= record.last_s
        assert record.gap_max_s <= record.last_s - record.first_s
    assert not run.scheduler.has_work
    assert run.scheduler.pages.free == run.scheduler.pages.capacity


def test_the_same_seed_gives_the_same_run() -> None:
    coming = arrivals(STREAMS, 7)
    assert lives(simulator().run(coming)) == lives(simulator().run(coming))
    assert lives(simulator().run(coming)) != lives(simulator().run(arrivals(STREAMS, 8)))


def test_a_lone_request_takes_what_the_device_says() -> None:
    (record,) = simulator().run([Arrival(1.0, None, 40, 5, "s")])
    assert record.ttft_s == pytest.approx(0.01 + 40 * 1e-4)
    assert record.e2e_s == pytest.approx(record.ttft_s + 4 * 0.01)
    assert record.gap_max_s == pytest.approx(0.01)


def test_planned_ahead_a_request_waits_for_the_step_planned_before_it_came() -> None:
    coming = [Arrival(0.0, None, 1, 50, "base"), Arrival(0.105, None, 1, 5, "late")]
    ttft_s = [simulator(depth=depth).run(coming)[1].ttft_s for depth in (1, 2)]
    assert ttft_s == [pytest.approx(0.005 + 0.01), pytest.approx(0.005 + 0.01 + 0.01)]


def test_a_cold_adapter_adds_its_copy() -> None:
    (record,) = simulator().run([Arrival(1.0, "a", 40, 5, "s")])
    assert record.ttft_s == pytest.approx(0.05 + 0.01 + 40 * 1e-4)


def test_two_copies_run_one_after_another() -> None:
    """There is one copy engine."""
    records = simulator().run([Arrival(1.0, "a", 1, 1, "s"), Arrival(1.0, "b", 1, 1, "s")])
    assert max(r.ttft_s for r in records) == pytest.approx(0.1 + 0.01)


def test_without_overlap_a_copy_stops_the_batch() -> None:
    coming = [Arrival(0.0, None, 40, 50, "base"), Arrival(0.1, "a", 40, 5, "lora")]
    stopped = simulator(overlap=False, park=False).run(coming)[0]
    assert stopped.gap_max_s > 0.05
    assert simulator().run(coming)[0].gap_max_s < 0.02


def test_prompts_computed_alone_delay_the_decodes() -> None:
    coming = [Arrival(0.0, None, 2, 50, "base"), Arrival(0.1, None, 50, 5, "base")]
    alone, mixed = (simulator(mixed=m).run(coming)[0].gap_max_s for m in (False, True))
    assert mixed == pytest.approx(0.01 + 50 * 1e-4)
    assert alone == pytest.approx(0.02 + 50 * 1e-4)


def test_figures_are_in_milliseconds_over_all_requests() -> None:
    coming = [Arrival(0.0, None, 40, 3, "s"), Arrival(1.0, None, 40, 5, "s")]
    found = figures(simulator().run(coming))
    assert found.ttft_mean_ms == pytest.approx(14.0)
    assert found.e2e_mean_ms == pytest.approx(14.0 + 30.0)
    assert found.itl_max_ms == pytest.approx(10.0) and found.tpot_p50_ms == pytest.approx(10.0)


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert percentile([4.0], 0.99) == 4.0
