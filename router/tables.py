"""The body of GET /v1/adapters as tables for a terminal."""

from typing import Any

from rich.table import Table


def load_table(page: dict[str, Any]) -> Table:
    """A row a replica: its load."""
    table = Table(title="replicas")
    for heading in ("replica", "running", "waiting", "queued tokens", "step", "adapters", "pages"):
        table.add_column(heading, justify="left" if heading == "replica" else "right")
    for replica in page["replicas"]:
        load = replica["load"]
        table.add_row(
            _short(replica["id"]),
            str(load["running"]),
            str(load["waiting"]),
            str(load["queued_tokens"]),
            f"{load['step_s'] * 1e3:.1f} ms",
            _used(load["free_bytes"], load["capacity_bytes"], " MiB", 2**20),
            _used(load["free_pages"], load["capacity_pages"], "", 1),
        )
    return table


def tier_table(page: dict[str, Any]) -> Table:
    """A row an adapter: its tier on each replica."""
    table = Table(title="adapters")
    table.add_column("adapter")
    replicas = [replica["id"] for replica in page["replicas"]]
    for replica_id in replicas:
        table.add_column(_short(replica_id))
    for adapter in page["data"]:
        held = [adapter["residency"].get(replica_id) for replica_id in replicas]
        table.add_row(_name(adapter), *(entry["tier"] if entry else "-" for entry in held))
    return table


def adapter_table(page: dict[str, Any]) -> Table:
    """A row an adapter: what it is."""
    table = Table()
    for heading in ("adapter", "rank", "weight", "version", "on device", "path"):
        table.add_column(heading)
    for adapter in page["data"]:
        tiers = [entry["tier"] for entry in adapter["residency"].values()]
        table.add_row(
            _name(adapter),
            str(adapter["rank"]),
            f"{adapter['weight']:g}",
            adapter["digest"][:12],
            str(tiers.count("device")),
            adapter["path"],
        )
    return table


def _name(adapter: dict[str, Any]) -> str:
    return f"{adapter['id']} (pinned)" if adapter["pinned"] else str(adapter["id"])


def _short(replica_id: str) -> str:
    return replica_id.rpartition("#")[2]


def _used(free: int, capacity: int, unit: str, scale: int) -> str:
    return f"{(capacity - free) / scale:.0f}/{capacity / scale:.0f}{unit}"
