"""One prompt of 100,000 tokens among short base requests, on an H200 as the cards describe it."""

import random
import statistics

import pytest

from cluster.config import EngineConfig
from cluster.costs import Costs
from replica.scheduling.assembly import Division, assemble
from replica.simulation.cards import H200, PAGE_BYTES
from replica.simulation.simulator import Simulator
from replica.simulation.workloads import Arrival

CONTEXT = 131_072


def ttft_s(step_tokens: int, rate: float, prompt_tokens: int) -> tuple[float, list[float]]:
    """TTFT of the long prompt, and of the base requests that come before its first token.

    rate: base requests a second, of 20 to `prompt_tokens` tokens. 0: there are none.
    """
    config = EngineConfig("simulated", step_tokens_max=step_tokens, directory_slots=2)
    costs = Costs(H200.copy_bytes_per_s, H200.step_s((), {}), H200.prompt_s(1))
    memory = Division(40_000, PAGE_BYTES, CONTEXT // 16, 10**9, shared=False)
    core = assemble(
        config,
        context=CONTEXT,
        eos_tokens=frozenset(),
        memory=memory,
        alignment=256,
        costs=costs,
    )
    core.adapter_cache.register("a", "", 10**8, pinned=False, now_s=0.0)
    rng, at_s = random.Random(0), 0.0
    coming = [Arrival(0.0, "a", 100_000, 4, "long")]
    while rate and at_s < 10.0:
        at_s += rng.expovariate(rate)
        length = rng.randint(20, prompt_tokens)
        coming.append(Arrival(at_s, None, length, rng.randint(1, 20), "base"))
    records = Simulator(core, H200, {None: 0, "a": 16}, depth=2).run(coming)
    (long,) = (r for r in records if r.arrival.stream == "long")
    base = [r for r in records if r.arrival.stream == "base" and r.arrival.at_s < long.ttft_s]
    return long.ttft_s, [r.ttft_s for r in base]


@pytest.mark.parametrize("step_tokens", [512, 2048])
def test_short_base_prompts_pass_a_long_one(step_tokens: int) -> None:
    """When the long one took all of every step, they waited 2.1 and 1.3 s on average."""
    long_s, base_s = ttft_s(step_tokens, 5.0, 200)
    assert statistics.fmean(base_s) < 0.2 and max(base_s) < 0.3
    assert long_s < 1.05 * ttft_s(step_tokens, 0.0, 0)[0]


@pytest.mark.parametrize("step_tokens", [512, 2048])
def test_a_long_prompt_does_not_starve_among_many_short_ones(step_tokens: int) -> None:
    """They ask for more than the kept tokens. 8/7, and what their decode rows take of a step."""
    long_s, base_s = ttft_s(step_tokens, 40.0, 500)
    assert len(base_s) > 100
    assert long_s < 1.2 * ttft_s(step_tokens, 0.0, 0)[0]
