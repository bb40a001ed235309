"""A small model with adapters through the whole engine on the device: the tokens of plain torch on
the CPU, in float32, greedily.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.config import EngineConfig
from cluster.values import Version
from replica.simulation.workloads import Arrival
from tests.bench.on_gpu.models import Adapters
from tests.bench.on_gpu.served import served
from tests.bench.on_gpu.setting import Setting
from tests.bench.toys import toy_model

SECTION = "check"
# Where two tokens are about as likely, the order of a sum decides.
DIFFERENT_PERCENT = 2.0


def run(setting: Setting) -> None:
    directory = setting.directory / "small"
    hidden, layers = (64, 2) if setting.tiny else (512, 4)
    shape = toy_model(directory, hidden, layers, context=256)
    adapters = Adapters(setting.directory, shape, torch.float32, torch.device("cpu"))
    versions = adapters.versions({"a": 4, "b": 8, "c": 8, "d": 16})
    cpu = torch.device("cpu")
    wanted = _tokens(setting, directory, cpu, versions, {"kernels": "torch"})

    def compare(name: str) -> None:
        found = _tokens(setting, directory, setting.device, versions, _WAYS[name])
        compared, differing = divergence(found, wanted)
        setting.report.add(
            SECTION,
            f"engine, {name}: first tokens that differ, of those compared",
            100 * differing / compared,
            "%",
            most=DIFFERENT_PERCENT,
            beside=f"{differing} of {compared}",
        )

    for name in _WAYS:
        setting.attempt(SECTION, f"engine, {name}", partial(compare, name))


def divergence(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens compared, and requests that went another way: what follows then says nothing."""
    compared = differing = 0
    for own, right in zip(found, wanted, strict=True):
        for token, expected in zip(own, right, strict=True):
            compared += 1
            if token != expected:
                differing += 1
                break
    return compared, differing


_WAYS: Mapping[str, Mapping[str, Any]] = {
    "as it runs": {"kernels": "triton", "plan_depth": 2},
    "one step at a time": {"kernels": "triton", "plan_depth": 1},
    "without graphs": {"kernels": "triton", "cuda_graphs": False},
    "torch": {"kernels": "torch"},
}


def _tokens(
    setting: Setting,
    directory: Path,
    device: torch.device,
    versions: Mapping[str, Version],
    fields: Mapping[str, Any],
) -> list[list[int]]:
    """Of requests for all adapters and the base, on places for half of them."""
    size = max(version.parameters for version in versions.values()) * 4
    config = EngineConfig(
        str(directory),
        device="cuda" if device.type == "cuda" else "cpu",
        adapter_memory=2 * (size + 256),
        slots_max=2,
        kv_memory=2**20 if setting.tiny else 2**26,
        host_memory=2**28,
        batch_rows_max=8,
        step_tokens_max=64,
        **fields,
    )
    tokens = 4 if setting.tiny else 32
    names = (None, "a", "b", "c", "d")
    coming = [
        Arrival(0.0, name, 3 + 7 * i % 50, tokens, "check")
        for i, name in enumerate(names * (1 if setting.tiny else 4))
    ]
    with served(config, versions, device) as server:
        return server.replay(coming, setting.seed).tokens
