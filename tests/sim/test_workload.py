"""Simulated workloads: invariants at each step, figures by hand, no collapse under overload."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.errors import ConfigError
from lorafleet import cli
from replica.simulation.cards import PAGE_BYTES, image_bytes
from replica.simulation.traces import BLOCK_TOKENS, Recorded, read_trace
from replica.simulation.workload import POLICIES, Slo, WorkloadFigures, simulate, table
from replica.simulation.workload_file import parse

TRACES = Path(__file__).parents[1] / "traces"
# A step takes 10 ms, and 0.1 ms a prompt token. An adapter of rank 16 loads from host memory in
# 8.4 ms, from its files in 838 ms.
NUMBERS = {"decode_ms": 10, "prefill_token_us": 100, "copy_gb_s": {"host": 10, "disk": 0.1}}
HOST_MS, DISK_MS = (image_bytes(16) / rate * 1e3 for rate in (10e9, 0.1e9))
KEYS = [
    "goodput",
    "ttft_mean_ms",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "e2e_mean_ms",
    "e2e_p99_ms",
    "itl_max_ms",
    "makespan_s",
    "computed_over_needed",
    "loads",
    "parks",
]


def recorded(name: str, requests: int) -> list[Recorded]:
    return read_trace((TRACES / f"azure_{name}.csv").read_text().splitlines(), name)[:requests]


def traced(
    coming: list[Recorded], policy: str, rate: float | None = None, check: bool = False, **file: Any
) -> WorkloadFigures:
    arrivals = {"trace": "kept", "requests": len(coming), "rate": rate}
    return simulate(parse({"arrivals": arrivals, **file}), policy, coming, Slo(), check)


def lone(*coming: Recorded, **file: Any) -> WorkloadFigures:
    """Requests that all name the only adapter, on a card of round numbers."""
    one = {"card": NUMBERS, "places": 1, "kv_pages": 2000, "adapters": {"count": 1}}
    return traced(list(coming), "ours", check=True, **(one | file))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "memory",
    [
        {"places": 3, "kv_pages": 1000},
        {"adapter_memory": "500MB", "kv_pages": 300},
        {"memory": "1GB"},
    ],
    ids=["places", "bytes", "one memory"],
)
def test_the_invariants_hold_after_each_step(policy: str, memory: dict[str, Any]) -> None:
    found = traced(
        recorded("conv", 24),
        policy,
        rate=4.0,
        check=True,
        card="a10g-llama8b",
        adapters={"count": 12, "ranks": [8, 16, 64]},
        base_share=0.1,
        host_memory="400MB",
        **memory,
    )
    assert found.loads > 3 and found.ttft_p99_ms >= found.ttft_p50_ms > 0
    if policy != "ours":
        assert found.parks == 0
    elif "places" in memory:
        assert found.parks > 0


OVERLOADS = {
    "too few places": ("conv", 2.0, 6, 1500, 32),
    "too few pages": ("conv", 3.0, 8, 800, 64),
    "long prompts": ("code", 4.0, 8, 1000, 64),
}


@pytest.mark.parametrize("name", OVERLOADS)
def test_under_overload_the_default_policy_is_no_worse_than_skip(name: str) -> None:
    """Within the spread of the seeds: one alone is off by 4%.

    Parked rows that lose their pages are recomputed turn after turn, which once made the default
    ten times slower here.
    """
    trace, rate, places, pages, adapters = OVERLOADS[name]
    skip, ours = (
        traced(
            recorded(trace, 100),
            policy,
            rate,
            card="a10g-llama8b",
            places=places,
            kv_pages=pages,
            adapters={"count": adapters},
            popularity={"zipf": 0.8},
            base_share=0.1,
            seeds=12,
        )
        for policy in ("skip", "ours")
    )
    assert skip.ttft_mean_ms > 10_000  # overloaded
    assert ours.ttft_mean_ms <= 1.03 * skip.ttft_mean_ms
    assert ours.e2e_mean_ms <= 1.15 * skip.e2e_mean_ms
    assert ours.makespan_s <= 1.05 * skip.makespan_s
    assert ours.computed_over_needed <= 1.1


def test_recomputed_tokens_are_counted() -> None:
    """If no pages are left free for growth, rows preempt each other and lose what is not copied."""
    crowded: dict[str, Any] = {
        "rate": 10.0,
        "card": "a10g-llama8b",
        "places": 8,
        "kv_pages": 400,
        "adapters": {"count": 8},
    }
    conv = recorded("conv", 40)
    without = {"growth_outputs": 0, "page_copies": False}
    assert traced(conv, "ours", **crowded, engine=without).computed_over_needed > 1.02
    assert traced(conv, "ours", **crowded).computed_over_needed < 1.01


def test_a_lone_request_takes_what_the_card_says() -> None:
    found = lone(Recorded(5.0, 300, 11))
    assert found.ttft_mean_ms == pytest.approx(HOST_MS + 10 + 300 * 0.1)
    assert found.e2e_mean_ms == pytest.approx(found.ttft_mean_ms + 10 * 10)
    assert found.itl_max_ms == pytest.approx(10)
    assert found.makespan_s == pytest.approx(found.e2e_mean_ms / 1e3)
    assert (found.loads, found.parks, found.computed_over_needed) == (1, 0, 1)


def test_goodput_is_the_share_that_met_both_targets() -> None:
    """A token every 10 ms, the first after about 48 ms."""
    workload = parse(
        {
            "card": NUMBERS,
            "memory": "1GB",
            "adapters": {"count": 1},
            "arrivals": {"trace": "t", "requests": 2},
        }
    )
    coming = [Recorded(0.0, 300, 11), Recorded(60.0, 500, 11)]
    aims = {"ttft_target_s": 0.055, "tpot_target_s": 0.05}
    aimed = dataclasses.replace(workload, engine=dict(workload.engine) | aims)
    assert simulate(aimed, "ours", coming, Slo()).goodput == 0.5, "the targets are those aimed at"
    for slo, share in ((Slo(), 1), (Slo(0.055, 0.05), 0.5), (Slo(1, 0.009), 0), (Slo(0, 1), 0)):
        assert simulate(workload, "ours", coming, slo).goodput == share


@pytest.mark.parametrize(
    ("host_memory", "copy_ms"),
    [(None, HOST_MS), ("90MB", HOST_MS), ("80MB", DISK_MS), (0, DISK_MS)],
)
def test_an_adapter_that_host_memory_cannot_hold_loads_from_its_files(
    host_memory: object, copy_ms: float
) -> None:
    found = lone(Recorded(0.0, 300, 11), host_memory=host_memory)
    assert found.ttft_mean_ms == pytest.approx(copy_ms + 10 + 300 * 0.1)


def test_an_adapter_read_from_files_stays_in_host_memory() -> None:
    """Two adapters share one place in turn. Host memory holds both, or the last one used."""
    file = {
        "adapters": {"count": 2},
        "popularity": {"weights": [1, 1]},
        "base_share": 0.0,
    }
    apart = [Recorded(60.0 * i, 300, 11) for i in range(30)]
    both, one = (lone(*apart, **file, host_memory=size) for size in ("170MB", "90MB"))
    assert both.loads == one.loads > 5
    assert both.ttft_p99_ms == pytest.approx(HOST_MS + 40)
    # The adapter named first is not the one that host memory starts with.
    assert one.ttft_mean_ms == pytest.approx(40 + one.loads * DISK_MS / len(apart))


def test_prompts_that_share_blocks_find_them_in_the_prefix_cache() -> None:
    """Three of the second prompt's four blocks are the first's."""
    tokens = 4 * BLOCK_TOKENS
    first = Recorded(0.0, tokens, 5, (1, 2, 3, 4))
    alike, other = (Recorded(60.0, tokens, 5, blocks) for blocks in ((1, 2, 3, 9), (5, 6, 7, 8)))
    saved_ms = lone(first, other).ttft_mean_ms - lone(first, alike).ttft_mean_ms
    assert saved_ms * 2 == pytest.approx(3 * BLOCK_TOKENS * 0.1 + 10)  # one step of 1,024
    without = lone(first, alike, engine={"prefix_cache": False})
    assert without.ttft_mean_ms == pytest.approx(lone(first, other).ttft_mean_ms)


def test_prompts_without_blocks_share_nothing() -> None:
    twice = [Recorded(0.0, 2048, 5), Recorded(60.0, 2048, 5)]
    with_cache, without = (lone(*twice, engine={"prefix_cache": on}) for on in (True, False))
    assert with_cache == without


def test_steps_are_planned_ahead_unless_the_file_says_otherwise() -> None:
    """Planned ahead, a request waits for the step planned before it came."""
    coming = [Recorded(0.0, 1, 50), Recorded(0.1, 1, 5)]
    ahead, after = (lone(*coming, **more) for more in ({}, {"engine": {"plan_depth": 1}}))
    assert ahead.ttft_mean_ms - after.ttft_mean_ms == pytest.approx(10 / 2)


def test_each_figure_is_its_own_median_over_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    by_seed = [(0.9, 5), (0.1, 1), (0.5, 9)]

    def run(*arguments: Any) -> WorkloadFigures:
        goodput, loads = by_seed[arguments[4]]
        return WorkloadFigures(goodput, 1, 1, 1, 1, 1, 1, 1, 1, loads, 0)

    monkeypatch.setattr("replica.simulation.workload._run", run)
    found = lone(Recorded(0.0, 300, 11), seeds=3)
    assert (found.goodput, found.loads) == (0.5, 5)


def test_in_one_memory_the_longest_prompt_leaves_room_for_an_adapter() -> None:
    adapter_pages = -(-image_bytes(16) // PAGE_BYTES)
    memory = (adapter_pages + 20 + 1) * PAGE_BYTES
    file: dict[str, Any] = {"places": None, "kv_pages": None, "memory": memory}
    assert lone(Recorded(0.0, 5000, 11), **file).ttft_mean_ms == pytest.approx(
        HOST_MS + 10 + (20 * 16 - 11) * 0.1
    )
    with pytest.raises(ConfigError, match=r"memory: \d+ bytes do not hold an adapter of rank 16"):
        lone(Recorded(0.0, 5000, 11), **file | {"memory": memory - 20 * PAGE_BYTES})


def test_an_adapter_larger_than_its_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapter_memory: 1000 bytes hold no adapter of rank 16"):
        lone(Recorded(0.0, 300, 11), places=None, adapter_memory=1000)


def test_drawn_requests_that_do_not_fit_are_refused() -> None:
    file = {
        "card": NUMBERS,
        "places": 1,
        "kv_pages": 10,
        "adapters": {"count": 1},
        "arrivals": {"rate": 1, "requests": 5},
        "prompt_tokens": [1, 100],
        "output_tokens": [1, 61],
    }
    with pytest.raises(ConfigError, match="prompt_tokens: 100 and output_tokens 61 are 161 tokens"):
        simulate(parse(file), "ours", [], Slo())
    simulate(parse(file | {"output_tokens": [1, 60]}), "ours", [], Slo(), check=True)


def test_the_json_is_the_figures_of_each_policy(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    arrivals = {"trace": str(TRACES / "azure_code.csv"), "start": 90, "requests": 10, "rate": 2}
    file.write_text(
        yaml.safe_dump(
            {"card": "h200-llama8b", "adapters": {"count": 4}, "arrivals": arrivals, "seeds": 2}
        )
    )
    command = ["simulate", "workload", str(file), "--json", "--policy", "resident"]
    result = CliRunner().invoke(cli, [*command, "--policy", "ours"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == ["resident", "ours"]
    for figures in found.values():
        assert list(figures) == KEYS
        assert all(isinstance(value, int | float) for value in figures.values())
        assert figures["goodput"] == 1
    again = CliRunner().invoke(cli, [*command, "--policy", "ours"])
    assert again.output == result.output


def test_the_table_has_a_row_for_each_figure_and_a_column_for_each_policy() -> None:
    figures = WorkloadFigures(0.5, 1234.5, 1, 2, 3, 4, 5, 6, 1.25, 7, 8)
    head, *rows = table({"ours": figures, "skip": dataclasses.replace(figures, goodput=0.75)})
    assert head.split() == ["ours", "skip"]
    assert [row.split()[0] for row in rows] == KEYS
    assert rows[0].split() == ["goodput", "0.50", "0.75"]
    assert rows[1].split()[1] == "1,234" and rows[8].split()[1] == "1.25"
    assert {len(line) for line in (head, *rows)} == {len(head)}
