"""Which loads begin, and which prompts wait for other loads."""

import pytest

from replica.scheduling.loads import Switches
from replica.scheduling.turns import Sharing
from tests.core import begin, loaded, new, ran, run, scheduler, settle

LARGE = {"x": 10, "y": 10, "z": 10, "large": 30}


def test_prompts_wait_for_loads_that_end_within_half_a_prefill() -> None:
    core = scheduler(loads=2)  # 10 ms a copy; 50 ms + 1 ms a token to prefill
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.01)
    plan, _ = run(core, 0.01)
    assert ran(plan) == [] and plan.wake_s == pytest.approx(0.02)
    core.loaded("b", 0.02)
    assert ran(run(core, 0.02)[0]) == ["x", "y"]


def test_no_prompt_waits_for_a_copy_longer_than_it_saves() -> None:
    core = scheduler(loads=2, copy_bytes_per_s=1000.0)  # 40 ms a copy
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.04)
    assert ran(run(core, 0.04)[0]) == ["x"]


def test_no_prompt_waits_long_for_a_late_copy() -> None:
    core = scheduler(loads=2)
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.01)
    assert ran(run(core, 0.021)[0]) == [], "b was expected by now, and gets a moment more"
    assert ran(run(core, 0.026)[0]) == ["x"]


def test_a_prompt_waits_at_most_one_prefill() -> None:
    core = scheduler(loads=2, arena=200)
    core.add(new("x", "a"), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.0)
    core.add(new("y", "b"), 0.06)
    assert ran(run(core, 0.06)[0]) == ["x"]


def test_base_prompts_and_decodes_never_wait_for_loads() -> None:
    core = scheduler(loads=2, arena=200)
    begin(core, new("old", "c", max_tokens=60))
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.01)
    core.add(new("base"), 0.01)
    assert ran(run(core, 0.01)[0]) == ["old", "base"]


def test_no_prompt_waits_for_a_failed_load() -> None:
    core = scheduler(loads=2)
    core.add(new("x", "a"), 0.0)
    core.add(new("y", "b"), 0.0)
    run(core, 0.0)
    core.loaded("a", 0.01)
    core.load_failed("b", "broken", 0.01)
    assert ran(run(core, 0.01)[0]) == ["x"]


def test_without_overlap_the_batch_waits_and_then_runs_at_once() -> None:
    core = scheduler(switches=Switches(overlap=False))
    core.add(new("x", "a"), 0.0)
    plan, _ = run(core, 0.0)
    assert loaded(plan) == ["a"] and ran(plan) == ["x"]


def test_with_on_miss_block_a_cold_first_request_blocks_the_rest() -> None:
    core = scheduler(switches=Switches(on_miss="block"))
    begin(core, new("warm", "b", max_tokens=60))
    core.add(new("cold", "a"), 0.0)
    core.add(new("behind", "b"), 0.0)
    core.add(new("base"), 0.0)
    plan, _ = run(core, 0.0)
    assert ran(plan) == ["warm"] and loaded(plan) == ["a"]


def test_with_base_slot_shared_the_base_model_competes_for_a_slot() -> None:
    core = scheduler(switches=Switches(base_slot="shared", overlap=False), slots=1)
    begin(core, new("x", "a", max_tokens=60))
    core.add(new("base"), 0.0)
    assert ran(run(core, 0.0)[0]) == ["x"]
    core.cancel("x", 0.0)
    assert ran(run(core, 0.0)[0]) == ["base"]


def test_a_smaller_image_uses_a_hole_that_a_larger_one_cannot() -> None:
    core = scheduler(arena=50, sizes={"a": 40, "big": 40, "tiny": 10})
    begin(core, new("x", "a", max_tokens=60))
    core.add(new("cold", "big"), 0.0)
    core.add(new("small", "tiny"), 0.0)
    assert loaded(run(core, 0.0)[0]) == ["tiny"]


def test_small_images_do_not_take_the_places_of_a_large_one_forever() -> None:
    """Each slice that ends lets one small image in. The large one needs all places at once."""
    core = scheduler(arena=30, sizes=LARGE, sharing=Sharing(quantum_s=0.5), rows=16)
    names = "xyz"
    now_s, number = 0.0, 0
    for digest in names:
        begin(core, new(f"first-{digest}", digest, max_tokens=100), now_s=now_s)
        now_s += 0.17
    core.adapter_cache.register("w", "/w", 10, pinned=False, now_s=now_s)
    core.add(new("waits", "large", max_tokens=2), now_s)
    since_s = now_s
    while "waits" not in core.running_set.running and now_s - since_s < 20.0:
        for digest in "wxyz":
            if not core.waiting.waited_for(digest) and len(core.running_set.running) < 12:
                core.add(new(f"n{number}", digest, max_tokens=100), now_s)
                number += 1
        settle(core, now_s)
        now_s += 0.05
    bound_s = core.drainer.turns.bound_s(waiting=5, places=1, bytes_max=30)
    assert now_s - since_s <= bound_s


def test_an_adapter_that_fits_nowhere_does_not_stop_the_others() -> None:
    sizes = {"p": 60, "large": 90, "a": 30, "b": 30}
    core = scheduler(sizes=sizes, pinned="p")
    settle(core, 0.0)
    core.add(new("never", "large"), 0.0)
    begin(core, new("x", "a", max_tokens=60), now_s=1.0)
    core.add(new("y", "b"), 50.0)
    assert loaded(run(core, 50.0)[0]) == ["b"]


def test_a_pinned_adapter_without_requests_parks_no_row() -> None:
    core = scheduler(arena=40, sharing=Sharing(quantum_s=0.1))
    begin(core, new("x", "a", max_tokens=60))
    core.adapter_cache.register("b", "/b", 40, pinned=True, now_s=0.0)
    assert loaded(run(core, 9.0)[0]) == []
    core.add(new("y", "b"), 9.0)
    assert loaded(run(core, 9.0)[0]) == ["b"]


def test_an_idle_adapter_stays_until_the_copy_that_replaces_it_can_begin() -> None:
    """A request for it meanwhile needs no load. Copies run one after another, 0.4 s each."""
    core = scheduler(copy_bytes_per_s=100.0)
    begin(core, new("x", "a", max_tokens=2), new("y", "b", max_tokens=2))
    run(core, 0.5)
    core.add(new("s", "c"), 1.0)
    core.add(new("t", "d"), 1.0)
    assert loaded(run(core, 1.0)[0]) == ["c"]
    kept = next(digest for digest in "ab" if core.adapter_cache.usable(digest))
    assert loaded(run(core, 1.3)[0]) == []
    core.add(new("again", kept, max_tokens=1), 1.3)
    assert "again" in ran(run(core, 1.3)[0])
    assert loaded(run(core, 1.36)[0]) == ["d"]


def test_a_step_tries_few_of_many_starving_adapters() -> None:
    """To look for a place for each of a thousand took 0.2 s in every step."""
    names = [f"a{i}" for i in range(60)]
    sharing = Sharing(park=False, drain_wait_threshold_s=1.0)
    core = scheduler(sizes=dict.fromkeys(names, 40), slots=60, pages=1000, sharing=sharing)
    begin(core, *(new(name, name, max_tokens=100) for name in names[:2]))
    for name in names[2:]:
        core.add(new(name, name), 0.0)
    drain, tried = core.drainer.drain, list[str]()

    def counted(digest: str, *arguments: object) -> None:
        tried.append(digest)
        drain(digest, *arguments)  # type: ignore[arg-type]

    core.drainer.drain = counted  # type: ignore[method-assign]
    run(core, 1.0)
    assert list(core.drainer.drains) == names[:2], "each place is drained for one that starves"
    assert 2 < len(tried) <= 10
    tried.clear()
    run(core, 1.1)
    assert 0 < len(tried) <= 10
