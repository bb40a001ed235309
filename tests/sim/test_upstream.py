"""The published tables replayed: the invariants hold, and each effect has the published sign."""

import dataclasses
import json
from collections.abc import Sequence

import pytest
from typer.testing import CliRunner

from cluster.values import Tier
from lorafleet import cli
from replica.simulation.comparison import (
    REPORTED,
    SHARED_TTFT_P99_MS,
    Compared,
    as_json,
    claims,
    itl_bound_ms,
    lines,
)
from replica.simulation.published import PUBLISHED
from replica.simulation.simulator import Figures, RequestStats
from replica.simulation.upstream import POLICIES, SHARED, TABLES, Replay, Table, replay, simulator
from replica.simulation.workloads import arrivals

# The queues that draining helps with build up slowly: 17913 needs all of its requests.
REQUESTS = {"17913": 200}


def shortened(table: Table, requests: int, faster: float = 1.0) -> Table:
    streams = tuple(
        dataclasses.replace(s, requests=requests, rate=s.rate * faster) for s in table.streams
    )
    return dataclasses.replace(table, streams=streams)


@pytest.fixture(scope="module")
def compared() -> dict[str, Compared]:
    """Two seeds of each table, with fewer requests than published."""
    found = {}
    for name, full in TABLES.items():
        table = shortened(full, REQUESTS.get(name, 50))
        replays = {policy: replay(table, policy, range(2)) for policy in (*POLICIES, SHARED)}
        all_base = replay(table.all_base(), "ours", range(2)) if name == "14795" else None
        found[name] = Compared(table, replays, all_base)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TABLES)
def test_the_invariants_hold_after_each_step_and_every_arrival_ends(name: str, policy: str) -> None:
    """The card has so little memory that 14795 also runs short of pages."""
    table = shortened(TABLES[name], 16, faster=4.0)
    table = dataclasses.replace(table, card=dataclasses.replace(table.card, memory_bytes=16.5e9))
    run = simulator(table, policy, check=True)
    coming = arrivals(table.streams, 0)
    records = run.run(coming)
    assert [r.arrival for r in records] == coming
    assert all(r.tokens == r.arrival.output_tokens for r in records)
    assert not run.scheduler.has_work


@pytest.mark.parametrize("name", TABLES)
def test_one_memory_too_small_for_all_adapters_is_shared_in_turn(name: str) -> None:
    """One whole context leaves 1.6 GB: one adapter of rank 256, or six of rank 64."""
    table = shortened(TABLES[name], 16, faster=4.0)
    table = dataclasses.replace(table, card=dataclasses.replace(table.card, memory_bytes=38.7e9))
    run = simulator(table, SHARED, check=True)
    coming = arrivals(table.streams, 0)
    records = run.run(coming)
    assert [r.arrival for r in records] == coming
    assert all(r.tokens == r.arrival.output_tokens for r in records)
    assert not run.scheduler.has_work
    assert run.scheduler.pages.free == run.scheduler.pages.capacity


def test_a_cold_start_reads_each_adapter_from_disk_once() -> None:
    table = shortened(TABLES["15512-small"], 40)
    cold, warm = (simulator(table, "ours", check=True, cold=cold) for cold in (True, False))
    coming = arrivals(table.streams, 0)
    waits_s = [sum(r.ttft_s for r in run.run(coming)) for run in (cold, warm)]
    assert waits_s[0] > waits_s[1]
    cache = cold.scheduler.adapter_cache
    assert all(digest in cache.host for digest in table.ranks)
    assert cold.scheduler.costs.copy_s(10**9, Tier.DISK) == pytest.approx(1 / 1.3)
    assert cold.scheduler.costs.copy_s(10**9, Tier.HOST) == pytest.approx(1 / 55)


def test_the_same_seed_gives_the_same_figures() -> None:
    table = shortened(TABLES["17913"], 20)

    def lives(seed: int) -> list[tuple[float | None, float]]:
        records: Sequence[RequestStats] = simulator(table, "ours").run(
            arrivals(table.streams, seed)
        )
        return [(r.first_s, r.last_s) for r in records]

    assert lives(0) == lives(0) != lives(1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_upstreams_changes_help_as_published(name: str, compared: dict[str, Compared]) -> None:
    before, after = (compared[name].median(p, "lora") for p in ("before", "after"))
    assert after.ttft_mean_ms < before.ttft_mean_ms
    assert after.e2e_mean_ms < before.e2e_mean_ms


def test_a_pinned_base_model_waits_for_no_adapter(compared: dict[str, Compared]) -> None:
    found = compared["14795"]
    assert found.all_base is not None
    alone = found.all_base.median("base")
    assert found.median("before", "base").ttft_mean_ms > 10 * alone.ttft_mean_ms
    assert found.median("after", "base").ttft_mean_ms < 1.5 * alone.ttft_mean_ms
    assert found.median("ours", "base").ttft_mean_ms < 1.1 * alone.ttft_mean_ms


def test_draining_trades_the_median_for_the_tail(compared: dict[str, Compared]) -> None:
    before, after = (compared["17913"].median(p, "lora") for p in ("before", "after"))
    assert after.ttft_p99_ms < before.ttft_p99_ms
    assert after.ttft_p50_ms > before.ttft_p50_ms


def test_overlapping_loads_stop_no_decode(compared: dict[str, Compared]) -> None:
    found = compared["15512-large"]
    assert found.median("before", "lora").itl_max_ms > 300
    assert found.median("after", "lora").itl_max_ms < 100


@pytest.mark.parametrize("name", TABLES)
def test_ours_has_less_than_half_of_either_ttft(name: str, compared: dict[str, Compared]) -> None:
    ours = compared[name].median("ours", "lora")
    for policy in ("before", "after"):
        theirs = compared[name].median(policy, "lora")
        assert ours.ttft_mean_ms < theirs.ttft_mean_ms / 2
        assert ours.ttft_p99_ms < theirs.ttft_p99_ms / 2


@pytest.mark.parametrize("name", TABLES)
def test_no_gap_between_tokens_exceeds_the_turns_of_the_others(
    name: str, compared: dict[str, Compared]
) -> None:
    most = itl_bound_ms(TABLES[name])
    for figures in compared[name].replays["ours"].figures.values():
        assert max(f.itl_max_ms for f in figures) <= most


@pytest.mark.parametrize("name", TABLES)
def test_with_one_memory_no_request_waits_for_a_place(
    name: str, compared: dict[str, Compared]
) -> None:
    for stream, figures in compared[name].replays[SHARED].figures.items():
        assert max(f.ttft_p99_ms for f in figures) <= SHARED_TTFT_P99_MS, stream
        assert max(f.itl_max_ms for f in figures) <= SHARED_TTFT_P99_MS, stream


def test_a_packed_arena_holds_all_six_adapters(compared: dict[str, Compared]) -> None:
    packed, counted = (compared[n].median("ours", "lora") for n in ("17913-packed", "17913"))
    assert packed.e2e_mean_ms < 0.8 * counted.e2e_mean_ms


def test_a_median_is_taken_figure_by_figure() -> None:
    low = Figures(1, 2, 3, 4, 5, 6)
    high = Figures(3, 4, 5, 6, 7, 8)
    assert Replay({"s": [low, high]}).median("s") == Figures(2, 3, 4, 5, 6, 7)


def test_a_claim_that_does_not_hold_is_marked() -> None:
    table = TABLES["17913"]
    good, bad = Figures(1, 1, 1, 1, 1, 1), Figures(900, 900, 9000, 9000, 99_000, 9)
    replays = {
        "before": Replay({"lora": [bad]}),
        "after": Replay({"lora": [good]}),
        "ours": Replay({"lora": [bad]}),
    }
    found = Compared(shortened(table, 5), replays, None, seeds=1)
    assert not any(check.holds for check in claims(found))
    printed = list(lines(found))
    assert "  ✗ lora TTFT P99: 9,000 ≤ 800 (the goal)" in printed
    assert any("ours with copies that take no time: E2E mean" in line for line in printed)


def test_the_json_has_each_table_policy_and_figure(compared: dict[str, Compared]) -> None:
    found = json.loads(json.dumps(as_json(list(compared.values()))))
    assert list(found) == list(TABLES)
    for name, policies in found.items():
        assert list(policies) == ["before", "after", "ours", "shared"]
        for figures in policies.values():
            streams = figures.values() if name == "14795" else [figures]
            assert all(set(stream) == set(REPORTED) for stream in streams)
    assert set(found["14795"]["ours"]) == {"base", "lora"}


def test_ours_runs_at_the_given_depth_and_upstreams_servers_at_1() -> None:
    table = shortened(TABLES["17913"], 10)
    for policy, depths in (("before", [1, 1]), ("after", [1, 1]), ("ours", [1, 2])):
        assert [simulator(table, policy, depth=depth).depth for depth in (1, 2)] == depths
    first, second = (replay(table, "ours", [0], depth).median("lora") for depth in (1, 2))
    assert first != second == replay(table, "ours", [0]).median("lora")


@pytest.mark.parametrize("depth", [1, 2])
def test_the_command_compares_at_the_given_depth(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shortened(TABLES["15512-small"], 10)
    monkeypatch.setattr("replica.simulation.upstream.TABLES", {"15512-small": small})
    monkeypatch.setattr("replica.simulation.comparison.TABLES", {"15512-small": small})
    command = ["simulate", "upstream", "--json", "--seeds", "1", "--depth", str(depth)]
    found = json.loads(CliRunner().invoke(cli, command).output)["15512-small"]["ours"]
    expected = replay(small, "ours", [0], depth).median("lora")
    assert found == {key: round(getattr(expected, key), 1) for key in REPORTED}


def test_the_command_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one short table, because all of them take half a minute."""
    monkeypatch.setattr("replica.simulation.upstream.TABLES", {"15512-small": None})
    small = shortened(TABLES["15512-small"], 10)
    monkeypatch.setitem(TABLES, "15512-small", small)
    result = CliRunner().invoke(cli, ["simulate", "upstream", "--json", "--seeds", "1"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.output)) == {"15512-small"}
