"""What every section gets: the device, the sizes, the time it may take, where findings go."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.config import EngineConfig
from replica.shape import ModelShape
from tests.bench.on_gpu.floors import Rates
from tests.bench.on_gpu.models import LLAMA_8B, TINY, write_model
from tests.bench.on_gpu.report import Report
from tests.bench.on_gpu.timing import Timer


@dataclass(slots=True)
class Setting:
    """directory: for the model's configuration. tiny: sizes for a processor, to see that it runs.

    until_s: the monotonic time at which the section that runs is to begin nothing new.
    dtypes, tables, variants: what sections are limited to; empty: to nothing.
    """

    device: torch.device
    tiny: bool
    directory: Path
    report: Report
    seed: int = 0
    until_s: float = float("inf")
    dtypes: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    shape: ModelShape = field(init=False)
    timer: Timer = field(init=False)
    _rates: Rates | None = None

    def __post_init__(self) -> None:
        self.shape = write_model(self.directory / "model", TINY if self.tiny else LLAMA_8B)
        self.timer = Timer(self.device, repeats=2 if self.tiny else 30)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model and its adapters. The interpreter is wrong on bf16."""
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def rates(self) -> Rates:
        """Measured once, at the first question."""
        if self._rates is None:
            rates = self._rates = self.timer.rates(self.tiny)
            for what, value, unit in (
                ("copy within the device, read + written", rates.bytes_per_s / 1e12, " TB/s"),
                ("matmul", rates.flop_per_s / 1e12, " TFLOP/s"),
                ("copy in, page-locked", rates.copy_in_bytes_per_s / 1e9, " GB/s"),
            ):
                self.report.add("rates", what, value, unit)
        return self._rates

    def has_time(self, section: str, what: str) -> bool:
        """Whether to begin `what`; what is left out is said."""
        if time.monotonic() < self.until_s:
            return True
        self.report.skipped(section, what)
        return False

    def config(self, **fields: Any) -> EngineConfig:
        """Of an engine with random weights, that works on a processor as it does on a GPU."""
        return EngineConfig(
            str(self.directory / "model"),
            device="cuda" if self.device.type == "cuda" else "cpu",
            load_format="dummy",
            kernels="triton",
            plan_depth=2,
            seed=self.seed,
            **fields,
        )
