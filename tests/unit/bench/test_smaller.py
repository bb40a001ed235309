"""A table made smaller keeps its proportions."""

from types import SimpleNamespace

import pytest

from replica.scheduling.plan import Work
from replica.simulation.cards import H200, image_bytes
from replica.simulation.upstream import TABLES
from tests.bench.smaller import Pace, Size, engine_config, requests

SIZE = Size(hidden=64, layers=2, ranks=4, lengths=4, times=6, paced=True)
TOY_BYTES = 65_536


def work(start: int, end: int, digest: str | None = None) -> Work:
    return Work(SimpleNamespace(digest=digest), start, end, 0, sample=True)  # type: ignore[arg-type]


def pace() -> Pace:
    return Pace(H200, SIZE, rank=16, image_bytes=TOY_BYTES)


def test_a_step_lasts_in_proportion_to_the_cards_with_all_the_tokens() -> None:
    ranks = {None: 0, "a": 16}
    few = [work(99, 100, "a"), work(0, 50), work(9, 10)]
    all_of_them = [work(399, 400, "a"), work(0, 200), work(39, 40)]
    expected = H200.step_s(all_of_them, ranks) * 4 / 6
    assert pace().step_s(few, ranks) == pytest.approx(expected)


def test_a_copy_takes_in_proportion_to_its_bytes() -> None:
    whole_s = H200.copy_s(image_bytes(16)) / 6
    assert pace().copy_s(TOY_BYTES) == pytest.approx(whole_s)
    assert pace().copy_s(TOY_BYTES // 4) == pytest.approx(whole_s / 4)


def test_requests_come_faster_and_are_shorter() -> None:
    table = TABLES["14795"]
    small = requests(table, SIZE, all_base=False, seed=0)
    assert len(small.coming) == len(small.prompts) == 200
    assert max(a.prompt_tokens for a in small.coming) <= 512
    assert max(a.output_tokens for a in small.coming) <= 256
    assert small.coming[-1].at_s == pytest.approx(100 / 2 / 6, rel=0.3)
    assert [len(p) for p in small.prompts] == [a.prompt_tokens for a in small.coming]
    assert any(a.adapter for a in small.coming)
    assert not any(a.adapter for a in requests(table, SIZE, all_base=True, seed=0).coming)


def test_times_of_the_policy_are_shorter_too() -> None:
    table = TABLES["17913"]
    config = engine_config(table, table.after, SIZE, place_bytes=TOY_BYTES)
    assert config.drain_wait_threshold_s == pytest.approx(3.0 / 6)
    assert config.quantum_s == pytest.approx(0.5 / 6)
    assert config.adapter_memory == 3 * TOY_BYTES
    assert config.slots_max == 3 and config.loads_in_flight_max == 1
    assert not config.overlap and not config.park
