"""Renders a replica's state in Prometheus' text format."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from cluster.values import AdapterState, LoadReport, Tier

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = frozenset(
    {
        "steps",
        "hits_device",
        "hits_loading",
        "misses",
        "loads",
        "evictions",
        "wasted_loads",
        "drains",
        "parks",
        "resumes",
        "preemptions",
    }
)


def render(report: LoadReport, residency: Sequence[AdapterState], active: int) -> str:
    """active: HTTP requests in progress."""
    lines = []
    for name, value in [*dataclasses.asdict(report).items(), ("http_requests_active", active)]:
        metric = f"lorafleet_{name}" + ("_total" if name in COUNTERS else "")
        lines.append(f"# TYPE {metric} {'counter' if name in COUNTERS else 'gauge'}")
        lines.append(f"{metric} {value}")
    tiers = Counter(entry.tier for entry in residency)
    lines.append("# TYPE lorafleet_adapters gauge")
    lines += [f'lorafleet_adapters{{tier="{tier}"}} {tiers[tier]}' for tier in Tier]
    return "\n".join(lines) + "\n"
