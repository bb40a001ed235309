"""Pages that rows will need are left free; recomputed tokens are bounded over any run."""

import math
import random

import pytest

from replica.scheduling.growth import RECOMPUTED_MAX, Growth
from replica.scheduling.request import Phase, Request, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.timeline import Event
from tests.core import begin, new, ran, run, scheduler


def row(tokens: int, left: int, pages: int | None = None) -> Request:
    request = Request("r", (1,) * tokens, Sampling(), None, None, 0, 0.0, Phase.RUNNING)
    request.tokens_max = tokens + left
    request.pages = list(range(-(-tokens // 16) if pages is None else pages))
    return request


def spent(recomputed: int, needed: int = 10_000, outputs: float = 2.0) -> Growth:
    growth = Growth(16, 1000, outputs)
    growth.computed(needed, recomputed)
    return growth


def test_a_row_is_expected_to_grow_to_its_bound_or_the_horizon() -> None:
    growth = Growth(16, 10_000)
    assert growth.horizon == 2 * 256
    assert growth.of(row(32, 16)) == 1
    assert growth.of(row(32, 4096)) == 512 // 16


def test_the_horizon_follows_recent_outputs() -> None:
    growth = Growth(16, 10_000)
    for _ in range(100):
        growth.ended(20)
    growth.computed(1, 0)
    assert growth.horizon == pytest.approx(40, rel=0.01)


def test_recomputed_tokens_stretch_the_horizon_to_infinity() -> None:
    window = 20 * 1000  # half of what counts as recent
    some, most = int(window * RECOMPUTED_MAX / 2), int(window * RECOMPUTED_MAX)
    assert spent(some).horizon == pytest.approx(2 * 512, rel=0.01)
    assert spent(most).horizon == math.inf
    assert spent(most, outputs=0.0).horizon == math.inf
    assert spent(most - 1, outputs=0.0).horizon == 0
    assert spent(most).of(row(32, 4096)) == 4096 // 16


def test_old_recomputed_tokens_are_forgotten() -> None:
    growth = spent(1000)
    assert growth.horizon == math.inf
    for _ in range(20):
        growth.computed(10_000, 0)
    assert growth.horizon < math.inf


def test_rows_that_end_give_their_pages_to_longer_ones() -> None:
    growth = Growth(16, 10_000)
    short, long = row(160, 16), row(160, 320)
    assert growth.peak([long], []) == pytest.approx(320 // 16, abs=2)
    assert growth.peak([short, long], []) <= 320 // 16 - 10 + 3, "the short row gives back 10"
    assert growth.peak([short], [long]) == growth.of(long) + growth.peak([short], [])


def test_with_an_infinite_horizon_all_that_rows_may_need_is_left_free() -> None:
    growth = spent(1000)
    rows = [row(160, 16), row(160, 320)]
    assert growth.peak(rows, []) == 1 + 20


def test_a_run_that_recomputes_without_end_fails_its_check() -> None:
    growth = Growth(16, 1000)
    growth.computed(1000, 1000)
    growth.check(rows_max=8)
    growth.computed(0, 10_000)
    with pytest.raises(AssertionError, match="again and again"):
        growth.check(rows_max=8)


def test_a_request_is_admitted_only_if_running_rows_can_grow() -> None:
    core = scheduler(pages=8, growth_outputs=2.0)
    begin(core, new("old", prompt=30, max_tokens=64))
    core.add(new("new", prompt=30, max_tokens=64), 0.0)
    assert ran(run(core)[0]) == ["old"], "4 of 6 free pages are left for old"
    core.add(new("short", prompt=8, max_tokens=8), 0.0)
    assert ran(run(core)[0]) == ["old", "short"]


def test_a_request_alone_runs_whatever_its_bound() -> None:
    core = scheduler(pages=8, context=128, growth_outputs=2.0)
    core.add(new("long", prompt=30, max_tokens=98), 0.0)
    assert ran(run(core)[0]) == ["long"]


def thrash(core: Scheduler, seed: int, steps: int) -> None:
    """Outputs that no mean predicts, on a memory of a few rows. `run` checks the invariants."""
    rng = random.Random(seed)
    number, now_s = 0, 0.0
    for _ in range(steps):
        while len(core.waiting) < 10:
            output = rng.choice([1, 1, 1, 120])
            core.add(new(f"r{number}", None, rng.randint(40, 60), max_tokens=output), now_s)
            number += 1
        run(core, now_s)
        now_s += 0.05


def test_little_is_recomputed_whatever_the_requests(seed: int) -> None:
    core = scheduler(pages=24, context=256, rows=16, tokens=128)
    thrash(core, seed, 2000)
    assert core.timelines.counts[Event.PREEMPTED] > 0
    assert core.growth.over_needed <= 1 + 2 * RECOMPUTED_MAX


def test_with_a_fixed_horizon_rows_recompute_without_end(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Growth, "horizon", property(lambda _: 0.0, lambda *_: None), raising=False)
    core = scheduler(pages=24, context=256, rows=16, tokens=128)
    with pytest.raises(AssertionError, match="again and again"):
        thrash(core, seed, 2000)
