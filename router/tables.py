"""The body of GET /v1/adapters as tables for a terminal."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

ADAPTERS_SHOWN = 20
# Wide enough for what no terminal will cut.
_PIPE_COLUMNS = 10_000


def narrowed(page: dict[str, Any], name: str, every: bool) -> tuple[dict[str, Any], int]:
    """The page with the adapters whose names have `name` in them: those on most devices first,
    ADAPTERS_SHOWN of them or every one. And how many were left out.
    """
    found = [adapter for adapter in page["data"] if name in adapter["id"]]
    found.sort(key=lambda adapter: (-_devices(adapter), adapter["id"]))
    shown = found if every else found[:ADAPTERS_SHOWN]
    return {**page, "data": shown}, len(found) - len(shown)


def show(page: dict[str, Any], tables: Iterable[Table], left: int, as_json: bool) -> None:
    """Prints the page. left: adapters that are not in it. In a pipe no column is cut."""
    if as_json:
        print(json.dumps(page, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
    for table in tables:
        console.print(table)
    if left:
        console.print(f"and {left} more adapters: --all shows them, NAME finds some")


def load_table(page: dict[str, Any]) -> Table:
    """A row a replica: its load."""
    table = Table(title="replicas")
    for heading in ("replica", "running", "waiting", "queued tokens", "step", "adapters", "pages"):
        table.add_column(heading, justify="left" if heading == "replica" else "right")
    for replica in page["replicas"]:
        load = replica["load"]
        capacity = load["capacity_bytes"]
        table.add_row(
            _short(replica["id"]) + (" (stalled)" if load["stalled"] else ""),
            str(load["running"]),
            str(load["waiting"]),
            str(load["queued_tokens"]),
            f"{load['step_s'] * 1e3:.1f} ms",
            f"{_bytes(capacity - load['free_bytes'])}/{_bytes(capacity)}",
            f"{load['capacity_pages'] - load['free_pages']}/{load['capacity_pages']}",
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
        table.add_row(
            _name(adapter),
            str(adapter["rank"]),
            f"{adapter['weight']:g}",
            adapter["digest"][:12],
            str(_devices(adapter)),
            adapter["path"],
        )
    return table


def _devices(adapter: dict[str, Any]) -> int:
    return [entry["tier"] for entry in adapter["residency"].values()].count("device")


def _name(adapter: dict[str, Any]) -> str:
    return f"{adapter['id']} (pinned)" if adapter["pinned"] else str(adapter["id"])


def _short(replica_id: str) -> str:
    return replica_id.rpartition("#")[2]


def _bytes(count: int) -> str:
    """Short, as `du -h` has it: columns are narrow."""
    power = max(count.bit_length() - 1, 0) // 10
    return f"{count / 2 ** (10 * power):.3g}{'BKMGTP'[power]}"
