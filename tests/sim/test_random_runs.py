"""Random runs of the pure core: the invariants hold after each step, and all work ends.

`python -m tests.sim.seeds` does thousands.
"""

import pytest

from tests.sim.random_run import run_seed


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("block", range(15))
def test_the_invariants_hold_and_all_work_ends(block: int, depth: int) -> None:
    for seed in range(block * 20, block * 20 + 20):
        run_seed(seed, depth)
