"""What `lorafleet status` shows."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from router.tables import ADAPTERS_SHOWN, adapter_table, load_table, narrowed, show

LOAD = {"running": 0, "waiting": 0, "queued_tokens": 0, "step_s": 0.0, "stalled": 0}
LOAD |= {"free_pages": 8, "capacity_pages": 10}


def shown(used: int, capacity: int) -> str:
    load = {**LOAD, "free_bytes": capacity - used, "capacity_bytes": capacity}
    written = io.StringIO()
    Console(file=written, width=80).print(load_table({"replicas": [{"id": "x#one", "load": load}]}))
    return written.getvalue()


def test_small_adapters_are_not_rounded_away() -> None:
    assert "84K/64M" in shown(84 * 2**10, 64 * 2**20)
    assert "0B/64M" in shown(0, 64 * 2**20)
    assert "1.5G/21.7G" in shown(3 * 2**29, int(21.7 * 2**30))
    assert "2/10" in shown(0, 2**20)


def page(count: int) -> dict[str, Any]:
    """Adapters a0, a1, …; a7 is on a device."""
    adapter = {"rank": 8, "weight": 1.0, "digest": "d" * 64, "path": "/" + "p" * 200}
    adapter |= {"pinned": False}
    on_device = {"x#one": {"tier": "device"}}
    data = [
        {**adapter, "id": f"a{n}", "residency": on_device if n == 7 else {}} for n in range(count)
    ]
    return {"data": data, "replicas": []}


def test_of_thousands_of_adapters_those_on_devices_are_shown_first() -> None:
    short, left = narrowed(page(3000), "", every=False)
    assert [adapter["id"] for adapter in short["data"][:3]] == ["a7", "a0", "a1"]
    assert (len(short["data"]), left) == (ADAPTERS_SHOWN, 3000 - ADAPTERS_SHOWN)
    assert narrowed(page(3000), "", every=True)[1] == 0
    found, left = narrowed(page(3000), "a299", every=False)
    assert (len(found["data"]), left) == (11, 0)


def test_a_pipe_gets_whole_columns_and_json_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    short, left = narrowed(page(30), "", every=False)
    show(short, [adapter_table(short)], left, as_json=False)
    said = capsys.readouterr().out
    assert "p" * 200 in said and "and 10 more adapters" in said
    show(page(30), [], 0, as_json=True)
    assert json.loads(capsys.readouterr().out) == page(30)
