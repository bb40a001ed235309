"""The body of GET /v1/adapters, the same for one replica and for a fleet."""

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.values import AdapterState, Version


def catalog_page(
    versions: Iterable[Version],
    sequence: int,
    residency: Mapping[str, Mapping[str, AdapterState]],
    replicas: list[dict[str, Any]],
) -> dict[str, Any]:
    """residency: replica id → digest → what it says."""
    return {
        "object": "list",
        "sequence": sequence,
        "data": [_entry(version, residency) for version in versions],
        "replicas": replicas,
    }


def _entry(version: Version, residency: Mapping[str, Mapping[str, AdapterState]]) -> dict[str, Any]:
    return {
        "id": version.name,
        "digest": version.digest,
        "rank": version.rank,
        "parameters": version.parameters,
        "path": version.uri,
        "pinned": version.pinned,
        "weight": version.weight,
        "residency": {
            replica_id: _where(held[version.digest])
            for replica_id, held in sorted(residency.items())
            if version.digest in held
        },
    }


def _where(entry: AdapterState) -> dict[str, Any]:
    return {
        "tier": entry.tier.value,
        "bytes": entry.bytes,
        "since": entry.since_s,
        "reason": entry.reason,
    }
