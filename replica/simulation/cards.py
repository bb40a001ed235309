"""Time of a step and of a copy on known cards, for Llama-3.1-8B in bf16, from hardware arithmetic.

Decode reads all weights once a step: 8.03 G parameters less the embedding table are 15.0 GB. Keys
and values of one token are 2 × 32 layers × 8 heads × 128 × 2 B = 128 KiB. An adapter of rank r on
all seven projections is 5.24 MB × r. Kernels reach about 80% of the memory bandwidth. A step also
has a fixed cost (launches, sampling, the server's Python):

    step = fixed + (15.0 GB + 128 KiB × context + 5.24 MB × Σ ranks) ÷ (0.8 × bandwidth)
                 + prompt tokens × 2 × 8.03 G FLOP ÷ (0.7 × peak)

Copies from pinned host memory run at the rate of PCIe: 55 GB/s for gen5 (H200), 25 GB/s for gen4
(A100). Bandwidth and peak are 4.8 TB/s and 990 TFLOP/s (H200), 2.04 TB/s and 312 TFLOP/s (A100 80
GB). A prefill of 2,048 tokens takes 1.28 ms a layer on an H200, which is 70% of the peak.

The measured servers load an adapter tensor by tensor, 448 of them at about 50 µs each, from memory
that is not pinned:

    upstream's load = 448 × 50 µs + bytes ÷ upstream rate

`fixed_s` and `upstream_bytes_per_s` are not hardware figures. Each is fitted to one published
figure per card. All other published figures are predicted, and `comparison.py` checks them:

    H200  fixed_s 4.5 ms: 14795's mean E2E of the base stream without LoRA traffic, 4,829 ms
          upstream rate 11 GB/s: 15512-large's mean TTFT before, 2,221 ms
    A100  fixed_s 4.7 ms: 17913's mean E2E − mean TTFT before, 4,150 ms
          upstream rate 3 GB/s: the same after, 4,223 ms

The H100, L40S and A10G have the vendors' figures, and `fixed_s` of the nearest card above.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.values import Tier
from replica.scheduling.plan import Work

WEIGHT_BYTES = 15.0e9
KV_TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
PAGE_BYTES = 16 * KV_TOKEN_BYTES
ALL_WEIGHT_BYTES = 16.06e9  # with the embedding table
RANK_BYTES = 5.24e6
TOKEN_FLOP = 2 * 8.03e9
UPSTREAM_LOAD_S = 448 * 50e-6
_BANDWIDTH_SHARE = 0.8
_PEAK_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Card:
    """bytes_per_s: memory bandwidth.
    copy_bytes_per_s: host to device.
    disk_bytes_per_s: files to device; None for the same rate.
    upstream_bytes_per_s: None if no server was measured.
    load_s: fixed cost of a load.
    """

    name: str
    bytes_per_s: float
    flop_per_s: float
    copy_bytes_per_s: float
    fixed_s: float
    memory_bytes: float
    upstream_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    load_s: float = 0.0

    def step_s(self, rows: Sequence[Work], ranks: Mapping[str | None, int]) -> float:
        """ranks: by adapter. Each active adapter is read once, however many rows it has."""
        context = sum(work.end for work in rows)
        active = {work.request.digest for work in rows}
        rank_sum = sum(ranks[digest] for digest in active if digest is not None)
        prompt_tokens = sum(w.end - w.start for w in rows if w.end - w.start > 1)
        return self.batch_s(context, prompt_tokens, rank_sum)

    def batch_s(self, context: float, prompt_tokens: float, rank_sum: int) -> float:
        read = WEIGHT_BYTES + KV_TOKEN_BYTES * context + RANK_BYTES * rank_sum
        return (
            self.fixed_s
            + read / (_BANDWIDTH_SHARE * self.bytes_per_s)
            + self.prompt_s(prompt_tokens)
        )

    def prompt_s(self, tokens: float) -> float:
        """What prompt tokens add to a step."""
        return TOKEN_FLOP * tokens / (_PEAK_SHARE * self.flop_per_s)

    def copy_s(self, size: int, source: Tier = Tier.HOST) -> float:
        rate = self.copy_bytes_per_s
        if source is Tier.DISK and self.disk_bytes_per_s is not None:
            rate = self.disk_bytes_per_s
        return self.load_s + size / rate

    def move_s(self, size: int) -> float:
        return 2 * size / (_BANDWIDTH_SHARE * self.bytes_per_s)

    def with_files(self, bytes_per_s: float) -> "Card":
        """The same card; adapters that host memory does not hold are read from files."""
        return dataclasses.replace(self, disk_bytes_per_s=bytes_per_s)

    def as_upstream(self) -> "Card":
        """The same card, loading at the rate of the measured servers."""
        assert self.upstream_bytes_per_s is not None
        return dataclasses.replace(
            self, copy_bytes_per_s=self.upstream_bytes_per_s, load_s=UPSTREAM_LOAD_S
        )

    @property
    def pages(self) -> int:
        """KV pages of 16 tokens in half of the memory that the weights leave."""
        return int((self.memory_bytes - WEIGHT_BYTES) / 2 / PAGE_BYTES)

    @property
    def shared_pages(self) -> int:
        """Pages of 16 tokens that adapters and KV share. A tenth of the memory is left to torch."""
        return int((0.9 * self.memory_bytes - ALL_WEIGHT_BYTES) / PAGE_BYTES)


H200 = Card("h200-llama8b", 4.8e12, 990e12, 55e9, 0.0045, 141e9, upstream_bytes_per_s=11e9)
H100 = Card("h100-llama8b", 3.35e12, 990e12, 55e9, 0.0045, 80e9)
A100 = Card("a100-llama8b", 2.04e12, 312e12, 25e9, 0.0047, 80e9, upstream_bytes_per_s=3e9)
L40S = Card("l40s-llama8b", 0.864e12, 362e12, 25e9, 0.0047, 48e9)
A10G = Card("a10g-llama8b", 0.6e12, 125e12, 25e9, 0.0047, 24e9)
CARDS = {card.name: card for card in (H200, H100, A100, L40S, A10G)}
# Includes reading, hashing and copying the files.
DISK_BYTES_PER_S = 1.3e9


@dataclass(frozen=True, slots=True)
class MeasuredCard:
    """A card known only by its decode step, its time per prompt token, and its copy rates."""

    decode_s: float
    prefill_token_s: float
    copy_bytes_per_s: float
    disk_bytes_per_s: float

    def step_s(self, rows: Sequence[Work], ranks: Mapping[str | None, int]) -> float:
        prompt_tokens = sum(w.end - w.start for w in rows if w.end - w.start > 1)
        return self.decode_s + self.prompt_s(prompt_tokens)

    def prompt_s(self, tokens: float) -> float:
        return tokens * self.prefill_token_s

    def copy_s(self, size: int, source: Tier = Tier.HOST) -> float:
        return size / (self.disk_bytes_per_s if source is Tier.DISK else self.copy_bytes_per_s)

    def move_s(self, size: int) -> float:
        """Hidden behind a step."""
        return 0.0


def image_bytes(rank: int) -> int:
    return int(RANK_BYTES * rank)
