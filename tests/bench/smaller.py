"""Scales a published table down, in proportion, to a toy model on a CPU."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import EngineConfig
from cluster.values import Tier
from replica.scheduling.plan import Work
from replica.simulation.cards import Card
from replica.simulation.cards import image_bytes as card_bytes
from replica.simulation.upstream import CHUNK_TOKENS, Policy, Table
from replica.simulation.workloads import Arrival, Stream, arrivals

_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Size:
    """The toy's size, and the divisors that scale the published table.

    ranks, lengths: divisors of ranks, and of prompt and output lengths. times: the divisor of all
    times, such as gaps between arrivals, the quantum, thresholds and loads. paced: a step lasts as
    long as on the card with `lengths` times the tokens, in proportion.
    """

    hidden: int
    layers: int
    ranks: int
    lengths: int
    times: int
    paced: bool

    def rank(self, published: int) -> int:
        return published // self.ranks or 1

    @property
    def context(self) -> int:
        return _CONTEXT // self.lengths


@dataclass(frozen=True, slots=True)
class Requests:
    """prompts: one an arrival."""

    coming: Sequence[Arrival]
    prompts: Sequence[tuple[int, ...]]


def requests(table: Table, size: Size, all_base: bool, seed: int) -> Requests:
    """The table's requests, from scaled distributions. all_base: all name the base model."""
    streams = (table.all_base() if all_base else table).streams
    coming = arrivals([_smaller(stream, size) for stream in streams], seed)
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(3, 512) for _ in range(a.prompt_tokens)) for a in coming]
    return Requests(coming, prompts)


class Pace:
    """The card's times for the toy's steps and copies: the simulator's device model.

    rank: the published rank of the table's largest adapter. image_bytes: that adapter's bytes in
    the toy. A copy's time is proportional to its bytes.
    """

    def __init__(self, card: Card, size: Size, rank: int, image_bytes: int) -> None:
        self._card = card
        self._size = size
        self.copy_bytes_per_s = image_bytes / card.copy_s(card_bytes(rank)) * size.times

    def step_s(self, rows: Sequence[Work], ranks: Mapping[str | None, int]) -> float:
        """ranks: the published ones."""
        lengths = self._size.lengths
        context = lengths * sum(work.end for work in rows)
        prompt_tokens = lengths * sum(w.end - w.start for w in rows if w.end - w.start > 1)
        rank_sum = sum(ranks[digest] for digest in {work.request.digest for work in rows})
        return self._card.batch_s(context, prompt_tokens, rank_sum) * lengths / self._size.times

    def copy_s(self, size: int, source: Tier = Tier.HOST) -> float:
        return size / self.copy_bytes_per_s

    def move_s(self, size: int) -> float:
        return 0.0


def engine_config(table: Table, policy: Policy, size: Size, place_bytes: int) -> EngineConfig:
    """The engine configuration, without the model. place_bytes: the toy's largest image."""
    packed = table.packed and not policy.upstream
    return EngineConfig(
        model="",
        device="cpu",
        adapter_memory=table.places * place_bytes,
        host_memory=len(table.ranks) * place_bytes,
        loads_in_flight_max=1 if policy.upstream else 8,
        slots_max=len(table.ranks) if packed else table.places + (not policy.switches.base_pinned),
        directory_slots=64,
        batch_rows_max=128,
        step_tokens_max=CHUNK_TOKENS // size.lengths,
        queue_max=10_000,
        base_slot=policy.switches.base_slot,
        on_miss=policy.switches.on_miss,
        overlap=policy.switches.overlap,
        prefetch_depth=policy.switches.prefetch_depth,
        park=policy.sharing.park,
        quantum_s=policy.sharing.quantum_s / size.times,
        ttft_target_s=policy.sharing.ttft_target_s / size.times,
        tpot_target_s=policy.sharing.tpot_target_s / size.times,
        drain_wait_threshold_s=policy.sharing.drain_wait_threshold_s / size.times,
        eviction="cost" if policy.eviction == "cost" else "lru",
        prefix_cache=False,
    )


def _smaller(stream: Stream, size: Size) -> Stream:
    return dataclasses.replace(
        stream,
        rate=stream.rate * size.times,
        prompt_tokens_max=stream.prompt_tokens_max // size.lengths,
        output_tokens_max=stream.output_tokens_max // size.lengths,
    )
