"""Arrivals by seed, with the distributions of the published measurements."""

import itertools
import statistics
from collections import Counter

from replica.simulation.workloads import Arrival, Stream, arrivals

NAMES = ("a", "b", "c", "d")
MANY = Stream("s", 20_000, 4.0, 512, 64, NAMES)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert arrivals([MANY], 1) == arrivals([MANY], 1)
    assert arrivals([MANY], 1) != arrivals([MANY], 2)


def test_a_stream_does_not_depend_on_other_streams() -> None:
    other = Stream("other", 50, 1.0, 8, 8)
    both = arrivals([MANY, other], 1)
    assert [a for a in both if a.stream == "s"] == arrivals([MANY], 1)


def test_all_streams_come_in_order_of_time() -> None:
    times = [a.at_s for a in arrivals([MANY, Stream("other", 50, 1.0, 8, 8)], 1)]
    assert times == sorted(times) and len(times) == 20_050


def test_gaps_are_exponential_with_the_stated_rate() -> None:
    times = [a.at_s for a in arrivals([MANY], 1)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = statistics.fmean(gaps)
    assert abs(mean - 0.25) < 0.01
    assert abs(statistics.pstdev(gaps) - mean) < 0.01  # exponential: they are equal
    assert abs(sum(gap > mean for gap in gaps) / len(gaps) - 0.368) < 0.02


def test_lengths_are_uniform_from_one_to_the_stated_number() -> None:
    drawn = arrivals([MANY], 1)
    for lengths, most in (
        ([a.prompt_tokens for a in drawn], 512),
        ([a.output_tokens for a in drawn], 64),
    ):
        assert min(lengths) == 1 and max(lengths) == most
        assert abs(statistics.fmean(lengths) / ((most + 1) / 2) - 1) < 0.02
        assert abs(statistics.pstdev(lengths) / (most / 12**0.5) - 1) < 0.02


def test_uniform_names_each_adapter_equally_often() -> None:
    counts = Counter(a.adapter for a in arrivals([MANY], 1))
    assert set(counts) == set(NAMES)
    assert all(abs(count - 5000) < 250 for count in counts.values())


def test_distinct_names_them_in_turn() -> None:
    drawn = arrivals([Stream("s", 9, 4.0, 8, 8, NAMES, "distinct")], 1)
    assert [a.adapter for a in drawn] == [*NAMES, *NAMES, "a"]


def test_skewed_names_each_adapter_alpha_times_less_often_than_the_one_before() -> None:
    counts = Counter(
        a.adapter for a in arrivals([Stream("s", 20_000, 4.0, 8, 8, NAMES, "skewed", 3.0)], 1)
    )
    for often, rare in itertools.pairwise(NAMES):
        assert 2.5 < counts[often] / counts[rare] < 3.5


def test_a_stream_without_adapters_names_the_base_model() -> None:
    drawn = arrivals([Stream("base", 5, 1.0, 8, 8)], 1)
    assert all(isinstance(a, Arrival) and a.adapter is None for a in drawn)


def test_prompts_are_equal_in_shared_blocks_and_nowhere_else() -> None:
    def prompt(number: int, tokens: int, *blocks: int) -> tuple[int, ...]:
        return Arrival(0.0, None, tokens, 1, "s", blocks).prompt(number)

    first, second = prompt(0, 1200, 7, 8), prompt(1, 1400, 7, 9)
    assert (len(first), len(second)) == (1200, 1400)
    assert first[:512] == second[:512]
    assert not set(first[512:]) & set(second)
    assert len(set(first)) == 1200  # 7 and 8 have no token in common either
    assert prompt(2, 600, 7, 8) == first[:600]  # a prompt may end within its last block
    assert not set(prompt(3, 50)) & set(prompt(4, 50))
