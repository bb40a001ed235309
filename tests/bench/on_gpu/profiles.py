"""What torch's profiler saw of the device: when kernels and copies ran, and what they were."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.bench.on_gpu.figures import Interval

Trace = Mapping[str, Any]
"""In Chrome's format: times in microseconds."""


def profiled(run: Callable[[], object], path: Path) -> Trace:
    """On CUDA; kept at `path`, which ends in .json.gz."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    with gzip.open(path) as file:
        trace: Trace = json.load(file)
    return trace


def intervals(trace: Trace, category: str, bytes_min: int = 0) -> list[Interval]:
    """Seconds. category: kernel, gpu_memcpy, …"""
    return [
        (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in trace["traceEvents"]
        if event.get("cat") == category
        and event.get("args", {}).get("bytes", bytes_min) >= bytes_min
    ]


def kernel_seconds(trace: Trace) -> list[tuple[str, float, int]]:
    """Name, seconds in all and how often, those that took longest first."""
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            seconds[event["name"]] += event["dur"] / 1e6
            counts[event["name"]] += 1
    return [(name, took, counts[name]) for name, took in seconds.most_common()]
