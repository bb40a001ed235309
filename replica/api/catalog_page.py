"""Builds the body of GET /v1/adapters, for a single replica and for a fleet."""

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.values import AdapterState, Version


def catalog_page(
    versions: Iterable[Version],
    sequence: int,
    residency: Mapping[str, Mapping[str, AdapterState]],
    replicas: list[dict[str, Any]],
) -> dict[str, Any]:
    """residency: replica id → digest → the state that this replica reports."""
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
            replica_id: _state(held[version.digest])
            for replica_id, held in sorted(residency.items())
            if version.digest in held
        },
    }


def _state(state: AdapterState) -> dict[str, Any]:
    return {
        "tier": state.tier.value,
        "bytes": state.bytes,
        "since": state.since_s,
        "reason": state.reason,
    }
