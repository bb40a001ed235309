"""Arrivals, lengths and adapter choice, drawn by seed, for the bench and the simulator.

The terms are those of SGLang's serving benchmark: Poisson arrivals; lengths drawn uniformly from 1
to the stated number (its default range ratio is 0), so that 512/512 means 256/256 on average;
adapters `uniform`, `distinct` (in turn) or `skewed` (p ∝ α^-i).
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from replica.simulation.traces import BLOCK_TOKENS

_OWN_TOKENS = 2**24

Choice = Literal["uniform", "distinct", "skewed"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come.

    adapter: its name; None for the base model.
    stream: whose figures it counts for.
    blocks: ids of the prompt's parts, `traces.BLOCK_TOKENS` tokens each; equal ids mean equal
        tokens.
    """

    at_s: float
    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    stream: str
    blocks: tuple[int, ...] = ()

    def prompt(self, number: int) -> tuple[int, ...]:
        """Its tokens; outside its blocks they differ from any other request's. number: its own."""
        named = min(len(self.blocks) * BLOCK_TOKENS, self.prompt_tokens)
        known = (block * BLOCK_TOKENS + i for block in self.blocks for i in range(BLOCK_TOKENS))
        own = range(-(number + 1) * _OWN_TOKENS, -(number + 1) * _OWN_TOKENS + _OWN_TOKENS)
        return (*itertools.islice(known, named), *own[: self.prompt_tokens - named])


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one kind. adapters: empty for the base model. rate: requests a second."""

    name: str
    requests: int
    rate: float
    prompt_tokens_max: int
    output_tokens_max: int
    adapters: tuple[str, ...] = ()
    choice: Choice = "uniform"
    alpha: float = 2.0


def arrivals(streams: Iterable[Stream], seed: int) -> list[Arrival]:
    """All streams merged, in order of time. The same seed gives the same arrivals."""
    drawn = [a for stream in streams for a in _draw(stream, random.Random(f"{seed}:{stream.name}"))]
    return sorted(drawn, key=lambda a: (a.at_s, a.stream))


def _draw(stream: Stream, rng: random.Random) -> Iterator[Arrival]:
    now_s = 0.0
    chosen = _choose(stream, rng)
    for _ in range(stream.requests):
        now_s += rng.expovariate(stream.rate)
        yield Arrival(
            now_s,
            next(chosen),
            rng.randint(1, stream.prompt_tokens_max),
            rng.randint(1, stream.output_tokens_max),
            stream.name,
        )


def _choose(stream: Stream, rng: random.Random) -> Iterator[str | None]:
    names: Sequence[str] = stream.adapters
    if not names:
        yield from itertools.repeat(None)
    if stream.choice == "distinct":
        yield from itertools.cycle(names)
    weights = [stream.alpha**-i if stream.choice == "skewed" else 1.0 for i in range(len(names))]
    while True:
        yield rng.choices(names, weights)[0]
