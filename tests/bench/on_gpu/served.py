"""One engine at a time, in this process, with the adapters that requests will name."""

import gc
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cluster.config import EngineConfig
from cluster.values import LoadReport, Version
from replica.engine.engine import Engine
from replica.simulation.workloads import Arrival
from tests.bench.replay import Replay, replay


@dataclass(frozen=True, slots=True)
class Served:
    """digests: by the adapter's name, None for the base model."""

    engine: Engine
    woken: threading.Event
    digests: Mapping[str | None, str | None]

    def replay(self, coming: Sequence[Arrival], seed: int) -> Replay:
        """Prompts are drawn at random: no two begin alike."""
        rng = random.Random(seed)
        vocab = self.engine.shape.vocab
        prompts = [tuple(rng.randrange(3, vocab) for _ in range(a.prompt_tokens)) for a in coming]
        return replay(self.engine, self.woken, coming, prompts, self.digests)

    def settle(self) -> None:
        """Until all that was asked for has ended. Whoever asks an engine for steps all the time
        while it waits for a load leaves the load's thread no time.
        """
        while self.engine.has_work:
            self.woken.clear()
            self.engine.step()
            if self.engine.idle:
                self.woken.wait(1.0)

    def warm(self, prompt_tokens: Sequence[int], output_tokens: int, seed: int) -> None:
        """Each adapter, and the base model, with prompts of each of these lengths.

        Afterwards host memory holds all adapters (it is large enough, or this fails), and kernels
        are compiled for what will come.
        """
        for length in prompt_tokens:
            self.replay(
                [Arrival(0.0, name, length, output_tokens, "warm") for name in self.digests], seed
            )
        host = self.engine.scheduler.adapter_cache.host
        absent = [name for name, d in self.digests.items() if d is not None and d not in host]
        assert not absent, f"not in host memory after the warm-up: {absent}"


def release(device: torch.device) -> None:
    """What is no longer referred to goes back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def served(
    config: EngineConfig, versions: Mapping[str, Version], device: torch.device
) -> Iterator[Served]:
    release(device)  # of the engine before
    woken = threading.Event()
    engine = Engine(config, wake=woken.set)
    try:
        digests: dict[str | None, str | None] = {None: None}
        for name, version in versions.items():
            engine.register(version, version.uri)
            digests[name] = version.digest
        yield Served(engine, woken, digests)
    finally:
        engine.close()


def counted(before: LoadReport, after: LoadReport) -> dict[str, int]:
    names = ("steps", "loads", "evictions", "wasted_loads", "parks", "resumes", "preemptions")
    return {name: getattr(after, name) - getattr(before, name) for name in names}
