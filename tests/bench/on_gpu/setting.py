"""What every section gets: the device, the sizes, the time it may take, where findings go."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.config import EngineConfig
from replica.model.shape import ModelShape
from tests.bench.on_gpu.floors import Rates, weight_bytes
from tests.bench.on_gpu.models import LLAMA_8B, TINY, write_model
from tests.bench.on_gpu.report import Report
from tests.bench.on_gpu.timing import Timer

Found = TypeVar("Found")


@dataclass(slots=True)
class Setting:
    """directory: for the model's configuration. tiny: sizes for a processor, to see that it runs.
    layers: of the model, instead of all.

    until_s: the monotonic time at which the section that runs is to begin nothing new.
    kernels, dtypes, tables, variants: what sections are limited to; empty: to nothing.
    """

    device: torch.device
    tiny: bool
    directory: Path
    report: Report
    seed: int = 0
    layers: int | None = None
    until_s: float = float("inf")
    kernels: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    shape: ModelShape = field(init=False)
    timer: Timer = field(init=False)
    _rates: Rates | None = None
    _lost: str | None = None

    def __post_init__(self) -> None:
        model = TINY if self.tiny else LLAMA_8B
        if self.layers is not None:
            model = {**model, "num_hidden_layers": self.layers}
        self.shape = write_model(self.directory / "model", model)
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
                ("read alone", rates.read_bytes_per_s / 1e12, " TB/s"),
                ("matmul", rates.flop_per_s / 1e12, " TFLOP/s"),
                ("copy in, page-locked", rates.copy_in_bytes_per_s / 1e9, " GB/s"),
            ):
                self.report.add("rates", what, value, unit)
        return self._rates

    def has_time(self, section: str, what: str) -> bool:
        """Whether to begin `what`; what is left out is said."""
        if self._lost is not None:
            self.report.skipped(section, what, self._lost)
        elif time.monotonic() < self.until_s:
            return True
        else:
            self.report.skipped(section, what)
        return False

    def attempt(self, section: str, what: str, run: Callable[[], Found]) -> Found | None:
        """What `run` gives; None where there was no time for it, or it failed: that is said, and
        what comes after has its turn, unless CUDA is lost to this process.
        """
        if not self.has_time(section, what):
            return None
        try:
            return run()
        except Exception as error:
            self.report.failed(section, what, error)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                self._lost = f"CUDA is lost to this process since {what!r}"
        return None

    @property
    def room(self) -> int:
        """Bytes of the device's memory beside the model and a tenth for everything else."""
        if self.device.type != "cuda":
            return 2**24
        _, here = torch.cuda.mem_get_info(self.device)
        return int(0.9 * here) - weight_bytes(self.shape, self.itemsize)

    def config(self, **fields: Any) -> EngineConfig:
        """Of an engine with random weights, that works on a processor as it does on a GPU. It locks
        no host memory for KV pages unless told to: locking 16 GiB takes 8 s.
        """
        return EngineConfig(
            str(self.directory / "model"),
            device="cuda" if self.device.type == "cuda" else "cpu",
            load_format="dummy",
            kernels="triton",
            plan_depth=2,
            seed=self.seed,
            **{"host_kv_memory": 0, **fields},
        )
