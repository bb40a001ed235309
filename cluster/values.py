"""Ids and values that every room speaks."""

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Where a version is on one replica."""

    DEVICE = "device"
    LOADING = "loading"
    HOST = "host"
    DISK = "disk"
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable content of an adapter.

    digest: SHA-256 (hex) over the canonical adapter config and the tensors file.
    uri: where the files are, as the operator named them (a path or a URL).
    rank: the largest rank of any of its projections.
    parameters: weights in its image; times the size of the dtype it is the image's bytes.
    pinned: never evicted. weight: of its requests where the batch is shared fairly.
    """

    name: str
    digest: str
    uri: str
    rank: int
    parameters: int
    pinned: bool = False
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterState:
    """What one replica says of one version.

    bytes: what the image takes in that tier. since_s: Unix time. reason: why it failed.
    """

    digest: str
    tier: Tier
    bytes: int
    since_s: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How busy one replica is.

    queued_tokens: prompt tokens not yet computed, of all requests waiting or running.
    remaining_tokens: upper bound of what running and waiting requests may still generate.
    step_s: smoothed duration of one step. copy_bytes_per_s: smoothed rate of adapter loads.
    free_bytes: for adapters, without an eviction, of capacity_bytes. free_pages: that can be taken,
    of capacity_pages. Where they share one memory, both capacities are what there is for each now.
    steps: steps run since start, so that a reader can tell a stuck engine from an idle one.
    capture_fallback: 0 as configured; 1: decode steps are captured without the shrink's own stream,
    for the capture with it failed; 2: none is. host_locked_bytes: page-locked for adapter images,
    less than `host_memory` where the system did not lock as much.

    Counted since start: requests for an adapter by where it was when they came (`hits_device`,
    `hits_loading`, else `misses`), loads, evictions, loads that no row used, drains, rows parked,
    resumed, and put back to compute their tokens again.
    """

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    remaining_tokens: int = 0
    step_s: float = 0.0
    copy_bytes_per_s: float = 0.0
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
