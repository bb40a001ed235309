"""Random lives of the pure core: every invariant after each step, and all work ends.

`python -m tests.sim.seeds` lives through thousands.
"""

import pytest

from tests.sim.random_run import live


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("block", range(15))
def test_every_invariant_holds_and_all_work_ends(block: int, depth: int) -> None:
    for seed in range(block * 20, block * 20 + 20):
        live(seed, depth)
