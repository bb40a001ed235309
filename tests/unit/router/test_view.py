"""The router's view: the replicas' last reports, and picks that these do not include yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.values import AdapterState, LoadReport, Tier
from router.policy import Candidate, RoutingWeights, rank
from router.view import View

FR = "f" * 64


@dataclass(frozen=True)
class State:
    report: LoadReport = field(default_factory=LoadReport)
    residency: Mapping[str, AdapterState] = field(default_factory=dict)
    seen_s: float = 0.0


def holding(tier: Tier, image_bytes: int = 0) -> dict[str, AdapterState]:
    return {FR: AdapterState(FR, tier, image_bytes, 0.0)}


def only(view: View, state: State | None, digest: str | None, now_s: float) -> Candidate:
    states = {} if state is None else {"a": state}
    (candidate,) = view.candidates(["a"], states, digest, now_s)
    return candidate


def own_picks(view: View, replica_id: str) -> int:
    """The number of picks that the replica's last report does not include yet."""
    return len(view._picks.get(replica_id, ()))


def test_a_pick_counts_at_once() -> None:
    view = View()
    view.picked("a", None, 100, now_s=10.0)
    candidate = only(view, State(LoadReport(running=2, queued_tokens=7), seen_s=9.9), None, 10.0)
    assert (candidate.requests, candidate.queued_tokens) == (3, 107)


def test_a_pick_is_forgotten_once_a_later_report_shows_it() -> None:
    view = View(transit_s=0.05)
    view.picked("a", None, 100, now_s=10.0)
    assert only(view, State(seen_s=10.04), None, 10.04).requests == 1  # sent before it arrived
    assert only(view, State(seen_s=10.06), None, 10.06).requests == 0


def test_picks_expire_without_reports() -> None:
    view = View(pick_life_s=2.0)
    view.picked("a", None, 100, now_s=10.0)
    assert only(view, None, None, 11.9).requests == 1
    assert only(view, None, None, 12.1).requests == 0
    assert own_picks(view, "a") == 0


def test_picks_of_a_replica_that_is_gone_are_dropped() -> None:
    view = View()
    view.picked("a", None, 1, now_s=10.0)
    view.picked("b", None, 1, now_s=10.0)
    view.candidates(["b"], {}, None, 10.0)
    assert (own_picks(view, "a"), own_picks(view, "b")) == (0, 1)


def test_a_replica_without_a_report_is_a_candidate_of_unknown_load() -> None:
    candidate = only(View(), None, FR, 1.0)
    assert (candidate.known, candidate.tier, candidate.requests) == (False, Tier.ABSENT, 0)


def test_the_base_model_is_on_every_device() -> None:
    assert only(View(), None, None, 1.0).tier is Tier.DEVICE


def test_a_pick_for_a_cold_adapter_counts_as_loading() -> None:
    view = View()
    assert only(view, State(), FR, 10.0).tier is Tier.ABSENT
    view.picked("a", FR, 10, now_s=10.0)
    assert only(view, State(), FR, 10.0).tier is Tier.LOADING
    assert only(view, State(), "another", 10.0).tier is Tier.ABSENT


def test_a_pick_does_not_make_a_failed_load_look_better() -> None:
    view = View()
    view.picked("a", FR, 10, now_s=10.0)
    assert only(view, State(residency=holding(Tier.FAILED)), FR, 10.0).tier is Tier.FAILED


def test_a_candidate_has_the_rates_that_its_replica_measured() -> None:
    report = LoadReport(copy_bytes_per_s=1e9, host_bytes_per_s=25e9)
    candidate = only(View(), State(report=report), FR, 1.0)
    assert (candidate.copy_bytes_per_s, candidate.host_bytes_per_s) == (1e9, 25e9)


def test_the_size_of_an_image_is_known_from_any_replica() -> None:
    states = {"a": State(residency=holding(Tier.DEVICE, 4096)), "b": State()}
    assert [c.image_bytes for c in View().candidates(["a", "b"], states, FR, 1.0)] == [4096] * 2


def test_a_burst_spreads_over_idle_replicas() -> None:
    """60 requests between two reports: no replica may get all of them."""
    view, ids = View(), ["a", "b", "c"]
    states = {name: State(seen_s=9.9) for name in ids}
    for _ in range(60):
        best = rank(view.candidates(ids, states, None, 10.0), "base", RoutingWeights())[0]
        view.picked(best.replica_id, None, 100, now_s=10.0)
    assert [own_picks(view, name) for name in ids] == [20, 20, 20]


def test_a_burst_for_one_cold_adapter_starts_on_one_replica() -> None:
    view, ids = View(), ["a", "b", "c"]
    states = {name: State(seen_s=9.9) for name in ids}
    for _ in range(3):
        best = rank(view.candidates(ids, states, FR, 10.0), FR, RoutingWeights())[0]
        view.picked(best.replica_id, FR, 10, now_s=10.0)
    assert sorted(own_picks(view, name) for name in ids) == [0, 0, 3]


def test_the_server_s_streams_count_though_the_engine_s_report_is_older() -> None:
    """A replica that has just got 40 requests, in its first long step."""
    view = View(transit_s=0.05)
    view.picked("a", None, 100, now_s=10.0)
    state = State(LoadReport(running=0, streams=40, age_s=1.0), seen_s=10.2)
    candidate = only(view, state, None, 10.2)
    assert (candidate.requests, candidate.queued_tokens) == (40, 100)
    later = State(LoadReport(running=1, streams=40, age_s=0.0), seen_s=10.4)
    assert only(view, later, None, 10.4).queued_tokens == 0


def test_an_engine_counts_as_silent_by_its_own_time_and_the_reader_s() -> None:
    view = View()
    assert only(view, State(LoadReport(age_s=1.0), seen_s=10.0), None, 10.3).silent_s == 0.0
    assert only(view, State(LoadReport(age_s=3.0), seen_s=10.0), None, 11.0).silent_s == 4.0


def test_a_replica_is_full_with_the_picks_that_are_on_their_way() -> None:
    view = View(queue_max=10)
    state = State(LoadReport(waiting=9), seen_s=9.9)
    assert not only(view, state, None, 10.0).full
    view.picked("a", None, 1, now_s=10.0)
    assert only(view, state, None, 10.0).full
    assert only(view, State(LoadReport(stalled=1)), None, 10.0).stalled


def test_one_of_two_routers_counts_its_picks_twice() -> None:
    view = View()
    view.routers = 2
    view.picked("a", None, 100, now_s=10.0)
    candidate = only(view, State(LoadReport(running=2, queued_tokens=7), seen_s=9.9), None, 10.0)
    assert (candidate.requests, candidate.queued_tokens) == (4, 207)
