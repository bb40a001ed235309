"""Every setting reaches the part it configures."""

import pytest

from cluster.config import EngineConfig
from cluster.costs import Costs
from replica.scheduling import victims
from replica.scheduling.assembly import Division, assemble
from replica.scheduling.scheduler import Scheduler


def assembled(shared: bool = False, **settings: object) -> Scheduler:
    config = EngineConfig(model="m", **settings)  # type: ignore[arg-type]
    return assemble(
        config,
        context=256,
        eos_tokens=frozenset({2}),
        memory=Division(32, 512, 16, 4096, shared, host_pages=9),
        alignment=256,
        costs=Costs(),
    )


def test_the_defaults_are_the_best_known() -> None:
    core = assembled()
    switches = core.switches
    assert switches.base_pinned and switches.skip and switches.overlap and switches.prefetch_depth
    assert core.page_copies.host is not None and core.page_copies.host.capacity == 9
    assert core.drainer.sharing.park and not core.drainer.sharing.drain_wait_threshold_s
    assert core.adapter_cache.victim_search._order is victims.cost and not core.share.on


def test_each_setting_can_be_changed() -> None:
    core = assembled(
        base_slot="shared",
        on_miss="block",
        overlap=False,
        prefetch_depth=3,
        park=False,
        quantum_s=0.25,
        ttft_target_s=2.0,
        tpot_target_s=0.1,
        drain_wait_threshold_s=1.5,
        eviction="fifo",
        parked_pages_max=7,
        page_wait_max_s=0.5,
        fair_share=True,
        page_copies=False,
    )
    switches, sharing = core.switches, core.drainer.sharing
    assert not (switches.base_pinned or switches.skip or switches.overlap)
    assert switches.prefetch_depth == 3
    assert (sharing.park, sharing.quantum_s) == (False, 0.25)
    assert (sharing.ttft_target_s, sharing.tpot_target_s) == (2.0, 0.1)
    assert sharing.drain_wait_threshold_s == 1.5
    assert core.adapter_cache.victim_search._order is victims.fifo and core.share.on
    assert core.limits.parked_pages_max == 7 and core.limits.page_wait_max_s == 0.5
    assert core.page_copies.host is None


@pytest.mark.parametrize(("asked", "slots"), [(None, 255), (3, 3)])
def test_the_directory_bounds_the_places(asked: int | None, slots: int) -> None:
    assert assembled(slots_max=asked).adapter_cache.slots.count == slots


def test_a_step_holds_at_least_a_token_for_each_row() -> None:
    assert assembled(batch_rows_max=64, step_tokens_max=8).limits.step_tokens_max == 64


@pytest.mark.parametrize(("asked", "headroom"), [(None, 12), (3, 3), (0, 0)])
def test_adapters_that_share_the_memory_of_pages_leave_headroom(
    asked: int | None, headroom: int
) -> None:
    core = assembled(shared=True, batch_rows_max=8, step_tokens_max=64, headroom_pages=asked)
    budget = core.adapter_cache.budget
    assert budget is not None and (budget.headroom, budget.page_bytes) == (headroom, 512)
    assert (core.adapter_cache.extents.capacity, budget.most_bytes) == (0, 16 * 512)
    assert assembled().adapter_cache.budget is None
