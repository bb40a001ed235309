"""Step and copy times, checked by hand."""

from types import SimpleNamespace

import pytest

from replica.scheduling.plan import Work
from replica.simulation.cards import A100, CARDS, H200, UPSTREAM_LOAD_S, image_bytes

RANKS = {None: 0, "a": 16, "b": 64}


def work(start: int, end: int, digest: str | None = None) -> Work:
    return Work(SimpleNamespace(digest=digest), start, end, 0, sample=True)  # type: ignore[arg-type]


def test_a_decode_step_streams_weights_keys_values_and_each_active_adapter_once() -> None:
    rows = [work(999, 1000, "b"), work(499, 500, "b"), work(9, 10)]
    read = 15.0e9 + 1510 * 131_072 + 64 * 5.24e6
    assert H200.step_s(rows, RANKS) == pytest.approx(H200.fixed_s + read / (0.8 * 4.8e12))


def test_weights_alone_take_3_9_ms_on_an_h200() -> None:
    assert H200.step_s([work(0, 1)], RANKS) - H200.fixed_s == pytest.approx(3.9e-3, rel=0.01)


def test_a_prompt_adds_its_computing_time() -> None:
    without, with_prompt = ([work(0, 1)], [work(0, 1), work(0, 2048)])
    added = H200.step_s(with_prompt, RANKS) - H200.step_s(without, RANKS)
    assert added == pytest.approx(H200.prompt_s(2048) + 2048 * 131_072 / (0.8 * 4.8e12))
    assert H200.prompt_s(2048) == pytest.approx(0.0475, rel=0.02)


def test_copies_run_at_the_rate_of_pcie() -> None:
    assert H200.copy_s(image_bytes(16)) == pytest.approx(1.5e-3, rel=0.03)
    assert H200.copy_s(image_bytes(256)) == pytest.approx(24e-3, rel=0.03)
    assert A100.copy_s(10**9) == pytest.approx(0.04)


@pytest.mark.parametrize("name", [c.name for c in (H200, A100)])
def test_upstream_loads_slower_and_pays_for_each_tensor_but_computes_the_same(name: str) -> None:
    card = CARDS[name]
    upstream = card.as_upstream()
    assert upstream.copy_s(0) == pytest.approx(UPSTREAM_LOAD_S) == pytest.approx(0.0224)
    assert upstream.copy_s(10**9) - upstream.copy_s(0) > 2 * card.copy_s(10**9)
    rows = [work(0, 100, "a"), work(9, 10)]
    assert upstream.step_s(rows, RANKS) == card.step_s(rows, RANKS)


def test_pages_are_half_of_what_the_weights_leave() -> None:
    assert A100.pages * 16 * 131_072 == pytest.approx(32.5e9, rel=0.001)
