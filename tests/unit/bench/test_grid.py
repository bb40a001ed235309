"""The grid covers each pair of values, and its marks are those of its goals."""

import dataclasses
import itertools

import pytest

from replica.simulation.workload import WorkloadFigures
from tests.bench.grid import AXES, Cell, Found, cells, marks

FIGURES = WorkloadFigures(
    goodput=0.5,
    ttft_mean_ms=1.0,
    ttft_p50_ms=1.0,
    ttft_p99_ms=100.0,
    e2e_mean_ms=1000.0,
    e2e_p99_ms=1.0,
    itl_max_ms=1.0,
    makespan_s=10.0,
    computed_over_needed=1.0,
    loads=1.0,
    parks=0.0,
)
CELL = Cell("4", 8, "uniform", 0.8, "poisson", 8192, 55.0)


def missed(cell: Cell, split: float | None = None, **ours: float) -> list[str]:
    found = Found(FIGURES, FIGURES, dataclasses.replace(FIGURES, **ours), FIGURES, split)
    return [mark.goal for mark in marks(cell, found) if not mark.kept]


def test_sixty_cells_cover_each_pair_of_values() -> None:
    chosen = cells()
    assert len(set(chosen)) == 60 and cells() == chosen
    for (i, one), (j, other) in itertools.combinations(enumerate(AXES), 2):
        for a, b in itertools.product(one, other):
            scarce = (i, j) != (0, 1) or not a.isdigit() or b > int(a)
            shared = j == 5 and i == 0 and not a.isdigit()  # no pages of their own
            values = [dataclasses.astuple(cell) for cell in chosen]
            assert not scarce or shared or any(v[i] == a and v[j] == b for v in values), (a, b)


@pytest.mark.parametrize(
    ("ours", "goals"),
    [
        ({}, []),
        ({"goodput": 0.47}, ["goodput"]),
        ({"ttft_p99_ms": 101.0}, ["TTFT P99"]),
        ({"computed_over_needed": 1.03}, ["computed ÷ needed"]),
        ({"makespan_s": 10.6}, ["makespan"]),
        ({"e2e_mean_ms": 1110.0}, ["E2E mean"]),
    ],
)
def test_each_goal_is_missed_by_its_own_figure(ours: dict[str, float], goals: list[str]) -> None:
    assert missed(CELL, **ours) == goals


def test_the_mean_to_the_last_token_is_no_goal_above_what_skip_finishes() -> None:
    assert missed(dataclasses.replace(CELL, load=1.2), e2e_mean_ms=1110.0) == []


def test_one_memory_is_compared_with_the_best_division() -> None:
    cell = dataclasses.replace(CELL, places="8 GiB")
    assert cell.memory == 8 * 2**30
    assert missed(cell, split=0.5) == [] and missed(cell, split=0.51) == ["goodput of one memory"]
