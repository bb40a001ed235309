"""A fault in one measurement of the GPU bench leaves the others' results."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch

from cluster.values import Version
from lora_kernels import attention, fused
from replica.model import graphs
from replica.simulation.upstream import Table
from tests.bench.on_gpu import check, decode, times, trace, upstream
from tests.bench.on_gpu.report import Report
from tests.bench.on_gpu.setting import Setting

pytestmark = [
    pytest.mark.usefixtures("by_reference"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are replaced for a CPU"),
]


GRADIENTS = True  # as in an engine, whose loaders know nothing of inference mode


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(torch.device("cpu"), True, tmp_path, Report(None, lambda text: None))


def fault(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("a fault put in by hand")


def found(setting: Setting) -> set[str]:
    return {finding.what for finding in setting.report.findings}


def failed(setting: Setting) -> list[str]:
    return [what.partition(": RuntimeError")[0] for _, what in setting.report.failures]


@pytest.mark.parametrize(
    ("section", "where", "name", "fails", "left"),
    [
        (
            check,
            fused,
            "silu_mul",
            ["gated activation float32"],
            ["norms float32, 3 × 24", "sampling float32, 33 × 300"],
        ),
        (
            times,
            attention,
            "prefill",
            ["attention, prefill 1 × 8 of 8"],
            ["attention, decode 2 × 20", "LoRA 4 rows, r4 × 2, a layer's 8 launches"],
        ),
        (
            decode,
            decode,
            "_matmuls_s",
            ["LoRA in prefill of 1 × 16", "LoRA in prefill of 2 × 4"],
            ["LoRA in decode, r16 × 8 at 2 rows", "step of 2 × 20, over the bandwidth floor"],
        ),
        (
            decode,
            decode,
            "_step_s",
            [
                "LoRA in decode, r16 × 8 at 2 rows",
                "LoRA in decode, r16 × 1 at 2 rows",
                "top-p 0.9 instead of greedy in decode, r16 × 8 at 2 rows",
                "1 rows",
                "2 rows",
                "the engine's steps, base",
                "the engine's steps, r16 × 8",
            ],
            ["LoRA in a step of 1 decodes and 8 prompt tokens", "LoRA in prefill of 2 × 4"],
        ),
        (
            trace,
            trace,
            "counted",
            ["device idle during loads"],
            ["device idle without loads"],
        ),
    ],
)
def test_a_fault_leaves_the_others_results(
    section: ModuleType,
    where: ModuleType,
    name: str,
    fails: list[str],
    left: list[str],
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting.kernels = ("norms", "gated", "sampling")
    setting.dtypes = ("float32",)
    monkeypatch.setattr(where, name, fault)
    section.run(setting)
    assert failed(setting) == fails
    assert found(setting) >= set(left)


def test_captures_that_fail_lose_no_measurement(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "keep", fault)
    decode.run(setting)
    captures = next(f for f in setting.report.findings if f.what == "captures that failed")
    assert captures.value == graphs.Captured.NOT_AT_ALL and not captures.holds
    assert not setting.report.failures
    assert {"LoRA in prefill of 1 × 16", "step of 2 × 20, over the bandwidth floor"} <= found(
        setting
    )


def test_a_workload_that_fails_leaves_the_other_variant_and_the_next(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay(
        setting: Setting, table: Table, variant: str, versions: Mapping[str, Version]
    ) -> None:
        if variant == "places":
            fault()
        setting.report.add("upstream", f"{table.name} {variant}", 1.0)

    monkeypatch.setattr(upstream, "_replay", replay)
    setting.tables = ("17913", "15512-small")
    upstream.run(setting)
    assert failed(setting) == ["17913 places", "15512-small places"]
    assert found(setting) == {"17913 shared", "15512-small shared"}
