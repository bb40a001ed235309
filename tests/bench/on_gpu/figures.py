"""What is made of measured times: medians, ratios round by round, and the idle share of a span."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence

Interval = tuple[float, float]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """(largest − smallest) ÷ median: a difference smaller than it is noise."""
    return (max(values) - min(values)) / statistics.median(values)


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """rounds: name → time. Each name's median."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def over(rounds: Sequence[Mapping[str, float]], name: str, base: str) -> float:
    """The median of `name` ÷ `base` − 1, taken within each round, so that drifts cancel out."""
    return statistics.median(each[name] / each[base] for each in rounds) - 1


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """In order, those that touch or overlap joined."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def idle_share(busy: Iterable[Interval], begin: float, end: float) -> float:
    """How much of [begin, end] no interval covers, from 0 to 1."""
    covered = 0.0
    for start, stop in merged(busy):
        covered += max(min(stop, end) - max(start, begin), 0.0)
    return 1 - covered / (end - begin)


def covered_share(spans: Sequence[Interval], busy: Iterable[Interval]) -> float:
    """How much of the spans' time together lies under `busy`, from 0 to 1."""
    joined = merged(busy)
    whole = sum(end - begin for begin, end in spans)
    return sum((1 - idle_share(joined, *span)) * (span[1] - span[0]) for span in spans) / whole


def gaps(busy: Iterable[Interval]) -> list[float]:
    """Between one and the next."""
    joined = merged(busy)
    return [after[0] - before[1] for before, after in itertools.pairwise(joined)]
