"""A workload's file: each field, each default, and each error by field and value."""

import itertools
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import ConfigError
from replica.serving.settings import read_workload
from replica.simulation.cards import CARDS, DISK_BYTES_PER_S, MeasuredCard
from replica.simulation.traces import Recorded
from replica.simulation.workload_file import Arrivals, Workload, arrivals, parse

TRACE = Path(__file__).parents[2] / "traces" / "azure_conv.csv"
LEAST: dict[str, Any] = {
    "card": "a10g-llama8b",
    "adapters": {"count": 4},
    "arrivals": {"rate": 2.5, "requests": 150},
}
APART = {"places": 2, "kv_pages": 100}
NUMBERS = {"decode_ms": 30, "prefill_token_us": 60, "copy_gb_s": {"host": 25}}


def workload(**changed: object) -> Workload:
    """From YAML. A field of None is left out."""
    fields = {name: value for name, value in (LEAST | changed).items() if value is not None}
    return parse(yaml.safe_load(yaml.safe_dump(fields)))


def adapters(found: Workload, seed: int = 0) -> Counter[str | None]:
    return Counter(a.adapter for a in arrivals(found, [], 10_000, seed))


def test_every_field_of_a_file_with_all_of_them() -> None:
    found = parse(
        yaml.safe_load("""
        card: h200-llama8b
        places: 17
        kv_pages: 2146
        host_memory: 64GiB
        adapters: {count: 3, ranks: [16]}
        popularity: {weights: [3, 2, 1]}
        base_share: 0.1
        arrivals: {trace: t.csv, start: 4000, requests: 400, rate: 1.8}
        prompt_tokens: [200, 3000]
        output_tokens: [600, 600]
        seeds: 3
        engine: {park: false}
        """)
    )
    assert found == Workload(
        card=CARDS["h200-llama8b"].with_files(DISK_BYTES_PER_S),
        arrivals=Arrivals(requests=400, rate=1.8, trace="t.csv", start=4000),
        ranks=(16, 16, 16),
        weights=(3.0, 2.0, 1.0),
        places=17,
        kv_pages=2146,
        host_memory=64 * 2**30,
        base_share=0.1,
        prompt_tokens=(200, 3000),
        output_tokens=(600, 600),
        seeds=3,
        engine={"park": False},
    )
    assert not found.shared


def test_the_readmes_example_is_a_workload() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(card:.*?)```", readme, re.DOTALL)
    found = parse(yaml.safe_load(example))
    assert (found.places, len(found.ranks), found.arrivals.requests) == (4, 32, 200)


def test_the_defaults_are_one_memory_and_equal_adapters() -> None:
    found = workload()
    assert found.shared and found.memory is found.host_memory is None
    assert found.ranks == (16,) * 4 and found.weights == (1.0,) * 4
    assert (found.base_share, found.seeds, found.engine) == (0.0, 1, {})
    assert (found.prompt_tokens, found.output_tokens) == ((1, 1024), (1, 512))
    assert (found.arrivals.trace, found.arrivals.start) == (None, 0)


@pytest.mark.parametrize("name", [f"{card}-llama8b" for card in ("h200", "h100", "a100", "l40s")])
def test_cards_are_found_by_name(name: str) -> None:
    assert workload(card=name).card.name == name  # type: ignore[union-attr]


def test_a_card_may_be_given_by_numbers() -> None:
    numbers = {**NUMBERS, "copy_gb_s": {"host": 25, "disk": 1.5}}
    found = workload(card=numbers, memory="6GB").card
    assert found == MeasuredCard(
        pytest.approx(0.030),
        pytest.approx(60e-6),
        25e9,
        1.5e9,  # type: ignore[arg-type]
    )
    assert workload(card=NUMBERS, memory="6GB").card.disk_bytes_per_s == DISK_BYTES_PER_S


@pytest.mark.parametrize(
    ("written", "read"), [("6GB", 6 * 10**9), ("4GiB", 2**32), (5_000, 5_000), ("1.5KiB", 1536)]
)
def test_sizes_have_units_or_are_bytes(written: object, read: int) -> None:
    assert workload(memory=written).memory == read
    assert workload(adapter_memory=written, kv_pages=10).adapter_memory == read
    assert workload(host_memory=written).host_memory == read


def test_host_memory_may_be_zero() -> None:
    assert workload(host_memory=0).host_memory == 0


def test_ranks_repeat_over_the_adapters() -> None:
    assert workload(adapters={"count": 5, "ranks": [8, 64]}).ranks == (8, 64, 8, 64, 8)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"crad": 1}, "workload: unknown key 'crad' (known: adapter_memory, adapters, "),
        ({"card": None}, "card: required"),
        ({"card": "b200"}, "card: 'b200' is not one of h200-llama8b, h100-llama8b"),
        ({"card": {"decode_ms": 1}}, "card.copy_gb_s: None is not a mapping"),
        ({"card": {**NUMBERS, "decode_ms": 0}}, "card.decode_ms: 0 must be more than 0"),
        ({"card": {**NUMBERS, "watts": 1}}, "card: unknown key 'watts'"),
        ({"card": NUMBERS}, "memory: required, because the card"),
        ({"memory": "6 apples"}, "memory: '6 apples' is not a size"),
        ({"memory": -1}, "memory: '-1' is not a size"),
        ({"memory": "6GB", "kv_pages": 1}, "memory: 6000000000, but kv_pages is given too"),
        ({"memory": "6GB", **APART}, "memory: 6000000000, but places is given too"),
        ({"adapter_memory": "1GB", **APART}, "places: adapter_memory is given too"),
        ({"places": 2}, "kv_pages: required beside places"),
        ({"adapter_memory": "1GB"}, "kv_pages: required beside adapter_memory"),
        ({"kv_pages": 2}, "places or adapter_memory: required beside kv_pages"),
        ({**APART, "places": 0}, "places: 0 is not a whole number of at least 1"),
        ({**APART, "kv_pages": 1.5}, "kv_pages: 1.5 is not a whole number of at least 1"),
        ({"adapters": None}, "adapters: required"),
        ({"adapters": 4}, "adapters: 4 is not a mapping"),
        ({"adapters": {"ranks": [16]}}, "adapters.count: None is not a whole number"),
        ({"adapters": {"count": 65_536}}, "adapters.count: 65536 is more than 65535"),
        ({"adapters": {"count": 2, "ranks": 16}}, "adapters.ranks: 16 is not a list"),
        ({"adapters": {"count": 2, "ranks": [16, 0]}}, "adapters.ranks[1]: 0 is not"),
        ({"popularity": "zipf"}, "popularity: 'zipf' is not a mapping"),
        ({"popularity": {}}, "popularity: {} is not uniform, {zipf: S} or {weights: [4 numbers]}"),
        ({"popularity": {"zipf": -1}}, "popularity.zipf: -1 must be at least 0"),
        ({"popularity": {"zipf": "1"}}, "popularity.zipf: '1' is not a number"),
        ({"popularity": {"zipf": 1, "weights": [1] * 4}}, "popularity: {'weights': [1, 1, 1, 1],"),
        ({"popularity": {"weights": [1, 2]}}, "popularity: {'weights': [1, 2]} is not uniform"),
        ({"popularity": {"weights": [1, 2, -3, 4]}}, "popularity.weights[2]: -3 must be"),
        ({"popularity": {"weights": [0] * 4}}, "popularity.weights: [0, 0, 0, 0] are all 0"),
        ({"base_share": 1.5}, "base_share: 1.5 must be at least 0 and at most 1"),
        ({"base_share": float("nan")}, "base_share: nan must be"),
        ({"arrivals": None}, "arrivals: required"),
        ({"arrivals": {"rate": 1}}, "arrivals.requests: required"),
        ({"arrivals": {"rate": 1, "requests": 0}}, "arrivals.requests: 0 is not"),
        ({"arrivals": {"rate": -1, "requests": 9}}, "arrivals.rate: -1.0 must be more than 0"),
        ({"arrivals": {"rate": "fast", "requests": 9}}, "arrivals.rate: 'fast' is not of type"),
        ({"arrivals": {"requests": 9}}, "arrivals.rate: required without a trace"),
        ({"arrivals": {"requests": 9, "trace": "t", "start": -1}}, "arrivals.start: -1 must not"),
        ({"arrivals": {"requests": 9, "rate": 1, "start": 5}}, "arrivals.start: 5, but there is"),
        ({"arrivals": {"requests": 9, "rate": 1, "burst": 5}}, "arrivals: unknown key 'burst'"),
        ({"prompt_tokens": [9, 8]}, "prompt_tokens: [9, 8] is not [least, most]"),
        ({"prompt_tokens": 9}, "prompt_tokens: 9 is not a list"),
        ({"output_tokens": [0, 8]}, "output_tokens[0]: 0 is not a whole number"),
        ({"seeds": 0}, "seeds: 0 is not a whole number of at least 1"),
        ({"seeds": True}, "seeds: True is not a whole number of at least 1"),
        ({"engine": {"prak": False}}, "engine: unknown key 'prak'"),
        ({"engine": {"park": 1}}, "engine.park: 1 is not of type bool"),
        ({"engine": {"quantum_s": -1}}, "quantum_s: -1.0 must be more than 0"),
        ({"engine": {"host_memory": "1GB"}}, "engine: unknown key 'host_memory'"),
    ],
)
def test_an_error_names_its_field_and_value(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(words)) as raised:
        workload(**changed)
    assert raised.value.field is not None


def test_the_same_seed_gives_the_same_arrivals() -> None:
    found = workload(base_share=0.2)
    assert arrivals(found, [], 10_000, 1) == arrivals(found, [], 10_000, 1)
    assert arrivals(found, [], 10_000, 1) != arrivals(found, [], 10_000, 2)


def test_without_a_trace_arrivals_are_poisson_and_lengths_uniform() -> None:
    many = {"rate": 4, "requests": 20_000}
    drawn = arrivals(
        workload(arrivals=many, prompt_tokens=[200, 300], output_tokens=[6, 6]), [], 10_000, 0
    )
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(drawn)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(
        0.25, rel=0.03
    )  # exponential: equal to the mean
    lengths = [a.prompt_tokens for a in drawn]
    assert (min(lengths), max(lengths)) == (200, 300)
    assert statistics.fmean(lengths) == pytest.approx(250, rel=0.01)
    assert {a.output_tokens for a in drawn} == {6}


def test_popularity_by_zipf_falls_with_the_rank() -> None:
    many = {"rate": 4, "requests": 40_000}
    counts = adapters(workload(arrivals=many, popularity={"zipf": 0.8}))
    total = sum(i**-0.8 for i in range(1, 5))
    for i in range(4):
        assert counts[f"a{i}"] / 40_000 == pytest.approx((i + 1) ** -0.8 / total, abs=0.01)


def test_popularity_by_weights_and_the_base_models_share() -> None:
    many = {"rate": 4, "requests": 40_000}
    found = workload(arrivals=many, popularity={"weights": [3, 0, 1, 0]}, base_share=0.25)
    counts = adapters(found)
    assert set(counts) == {None, "a0", "a2"}
    assert counts[None] / 40_000 == pytest.approx(0.25, abs=0.01)
    assert counts["a0"] / counts["a2"] == pytest.approx(3, rel=0.05)


def traced(rate: float | None) -> Workload:
    return workload(arrivals={"trace": "t", "requests": 3, "rate": rate})


THREE = [Recorded(100.0, 900, 100, (7, 8)), Recorded(101.0, 10, 5), Recorded(104.0, 50, 2000)]


def test_a_trace_is_played_from_its_first_request_as_recorded() -> None:
    drawn = arrivals(traced(None), THREE, 10_000, 0)
    assert [a.at_s for a in drawn] == [0.0, 1.0, 4.0]
    assert [(a.prompt_tokens, a.output_tokens) for a in drawn] == [(900, 100), (10, 5), (50, 2000)]
    assert [a.blocks for a in drawn] == [(7, 8), (), ()]


def test_a_rate_is_the_mean_at_which_a_trace_is_played() -> None:
    """Two gaps in 4 s are 0.5 requests a second. At a rate of 2 they take 1 s, in proportion."""
    assert [a.at_s for a in arrivals(traced(2.0), THREE, 10_000, 0)] == [0.0, 0.25, 1.0]


def test_requests_recorded_at_the_same_time_stay_so() -> None:
    assert [a.at_s for a in arrivals(traced(2.0), [THREE[0]] * 3, 10_000, 0)] == [0.0] * 3


def test_the_lengths_of_a_trace_are_cut_to_what_fits() -> None:
    """The prompt is cut first; the output only if it alone is too long."""
    drawn = arrivals(traced(None), THREE, 500, 0)
    assert [(a.prompt_tokens, a.output_tokens) for a in drawn] == [(400, 100), (10, 5), (1, 499)]


def test_seeds_change_only_which_adapter_a_traced_request_names() -> None:
    found, recorded = traced(None), THREE * 20
    first, second = (arrivals(found, recorded, 10_000, seed) for seed in (0, 1))
    assert [a.adapter for a in first] != [a.adapter for a in second]
    assert [(a.at_s, a.prompt_tokens) for a in first] == [(a.at_s, a.prompt_tokens) for a in second]


def written(directory: Path, **changed: object) -> Path:
    file = directory / "workload.yaml"
    file.write_text(yaml.safe_dump(LEAST | changed))
    return file


def test_a_trace_is_found_beside_the_workload_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE.read_text())
    file = written(tmp_path, arrivals={"trace": "t.csv", "start": 40, "requests": 60, "rate": 1.8})
    found, recorded = read_workload(file)
    assert (found.arrivals.trace, len(recorded)) == ("t.csv", 60)
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + TRACE.read_bytes())  # as Excel saves it
    assert read_workload(file)[1] == recorded


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"trace": str(TRACE), "start": 41, "requests": 60},
            f"arrivals: 60 requests from number 41 on, but {TRACE} has 100",
        ),
        ({"trace": "no.csv", "requests": 60}, "arrivals.trace: "),
        ({"trace": "workload.yaml", "requests": 60}, "no column TIMESTAMP"),
        ({"trace": ".", "requests": 60}, "arrivals.trace: "),
    ],
)
def test_a_trace_without_the_requests_is_named(
    asked: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_workload(written(tmp_path, arrivals=asked))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "card: required"),
        ("- a", "not a mapping of settings"),
        ("a: [", "workload.yaml: line "),
    ],
)
def test_a_file_that_is_no_workload_is_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "workload.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_workload(file)
