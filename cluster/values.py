"""Ids and values that every package uses."""

from dataclasses import dataclass, fields
from enum import StrEnum


class Tier(StrEnum):
    """Where a replica has a version."""

    DEVICE = "device"
    LOADING = "loading"
    HOST = "host"
    DISK = "disk"
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A text that is one token wherever it occurs, with the options of `tokenizers`.

    normalized: it is looked for in the normalized text.
    """

    id: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable content of an adapter.

    digest: SHA-256 (hex) of the canonical adapter config, the tensors file, and what it says of
    chats if that differs from the base model.
    uri: path or URL of the files, as the operator gave it.
    rank: the largest rank of its projections.
    parameters: elements of its image.
    pinned: never evicted.
    invocation: the tokens that activate it, if it is an activated LoRA.
    weight: its share of the batch, relative to other adapters, with `fair_share`.
    template: True if it has a chat template of its own, which is among its files.
    eos_token: ends its answers too, beside the base model's tokens.
    added_tokens: True if it has tokens that the base model's tokenizer lacks, among its files.
    """

    name: str
    digest: str
    uri: str
    rank: int
    parameters: int
    pinned: bool = False
    weight: float = 1.0
    invocation: tuple[int, ...] = ()
    template: bool = False
    eos_token: int | None = None
    added_tokens: bool = False


VERSION_FIELDS = tuple(field.name for field in fields(Version))


@dataclass(frozen=True, slots=True)
class AdapterState:
    """The state of one version on one replica.

    bytes: size of the image in that tier. since_s: Unix time. reason: why it failed.
    """

    digest: str
    tier: Tier
    bytes: int
    since_s: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How busy one replica is.

    queued_tokens: prompt tokens that waiting and running requests still have to compute.
    remaining_tokens: most tokens that waiting and running requests may still generate.
    step_s: smoothed duration of a step.
    copy_bytes_per_s, host_bytes_per_s: smoothed rates of adapter loads from disk and from host
    memory.
    free_bytes, capacity_bytes: adapter memory; free means without an eviction.
    free_pages, capacity_pages: KV pages. If adapters and pages share memory, both capacities are
    the current ones.
    steps: steps since start. A reader can tell a stuck engine from an idle one by it.
    capture_fallback: 0: decode steps run as configured. 1: they are captured without a separate
    stream for the shrink kernel, because capturing with one failed. 2: they are not captured.
    host_locked_bytes: page-locked memory for images. The system may lock less than `host_memory`.
    streams: requests that the replica's server holds open. age_s: age of what the engine says here;
    streams and stalled are the server's.
    stalled: 1 while the engine hangs or is started again.

    Counters since start:
    hits_device, hits_loading, misses: requests by the tier of their adapter on arrival.
    wasted_loads: loads that no row used.
    parks, resumes, preemptions: rows. A preempted row computes its tokens again.
    """

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    remaining_tokens: int = 0
    step_s: float = 0.0
    copy_bytes_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    free_bytes: int = 0
    capacity_bytes: int = 0
    free_pages: int = 0
    capacity_pages: int = 0
    steps: int = 0
    hits_device: int = 0
    hits_loading: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    wasted_loads: int = 0
    drains: int = 0
    parks: int = 0
    resumes: int = 0
    preemptions: int = 0
    capture_fallback: int = 0
    host_locked_bytes: int = 0
    streams: int = 0
    age_s: float = 0.0
    stalled: int = 0
