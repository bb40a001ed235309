"""Adapters and KV pages in one memory on the paged path: the same tokens as with a memory each."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import AdapterRefused, ConfigError
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine import largest_step
from replica.engine.engine import Engine
from replica.model.decoder import rotary_tables
from replica.model.logit_rules import Draw
from replica.model.native import NativeModel
from replica.model.paged_executor import PagedExecutor
from replica.model.sampling import Choice
from replica.model.weights import load_weights
from replica.scheduling.adapter import PageMove
from replica.scheduling.request import NewRequest, Sampling
from tests.kernels.pipelined import PAGE_TOKENS, TINY, adapters_of
from tests.models import make_model
from tests.until import WORK_S

PAGE_BYTES = 2 * 2 * 32 * 4 * PAGE_TOKENS
CONTEXT_PAGES = 128 // PAGE_TOKENS


GRADIENTS = True  # as in an engine, whose loaders know nothing of inference mode


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return make_model(tmp_path / "model", **TINY)


def engine(model: str, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "kernels": "triton",
        "rank_max": 32,
        "page_tokens": PAGE_TOKENS,
        "directory_slots": 8,
        "batch_rows_max": 6,
        "step_tokens_max": 48,
        "page_wait_max_s": 0.2,
        "quantum_s": 0.01,
        "seed": 0,
    }
    return Engine(EngineConfig(model, **defaults | settings))


class Watched:
    """Registers adapters, runs requests in waves, and notes what the memory went through."""

    def __init__(self, made: Engine, paths: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = made
        self.moves: list[PageMove] = []
        self.capacities: list[int] = []
        self.got: dict[str, list[int]] = {}
        self.digests: list[str | None] = [None]
        for path in paths:
            info = inspect(path, made.shape, 32)
            made.register(Version(path, info.digest, path, info.rank, info.parameters), path)
            self.digests.append(info.digest)
        move_pages = made.runner.move_pages

        def moved(moves: Sequence[PageMove]) -> None:
            self.moves += moves
            move_pages(moves)

        monkeypatch.setattr(made.runner, "move_pages", moved)

    def add(self, name: str, which: int, prompt: int, tokens: int) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        first = len(self.got) % 7
        request = NewRequest(
            name, tuple(range(first + 2, first + 2 + prompt)), sampling, self.digests[which]
        )
        self.got[name] = []
        self.engine.add(request)

    def run(self, steps: int | None = None) -> None:
        deadline_s = time.monotonic() + WORK_S
        while self.engine.has_work and steps != 0:
            assert time.monotonic() < deadline_s, self.engine.report()
            for delta in self.engine.step():
                assert delta.error is None, delta.error
                self.got[delta.request_id].extend(delta.tokens)
            self.engine.scheduler.check()
            self.capacities.append(self.engine.scheduler.adapter_cache.extents.capacity)
            steps = None if steps is None else steps - 1


def waves(made: Engine, paths: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Base requests take pages; adapters come beside them; long prompts take them back; again."""
    watched = Watched(made, paths, monkeypatch)
    for turn in range(2):
        for i in range(4):
            watched.add(f"{turn} base {i}", 0, 20 + 9 * i, 4 + 6 * i)
        watched.run(steps=6)
        for which in (1, 2, 3):
            watched.add(f"{turn} adapter {which}", which, 10 + which, 5)
        watched.run()
        for i in range(5):
            watched.add(f"{turn} long {i}", i % 2, 80, 12)
        watched.run()
    made.close()
    return watched


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("depth", [1, 2])
def test_adapters_grow_into_pages_and_long_prompts_take_them_back(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    paths = adapters_of(tmp_path, llama)
    apart = engine(llama, kv_memory=2**20, adapter_memory=2**20)
    expected = waves(apart, paths, monkeypatch)
    memory = (CONTEXT_PAGES + 68 + 1) * PAGE_BYTES
    one = engine(llama, device_memory=memory, headroom_pages=2, plan_depth=depth)
    assert one.report().capacity_pages == CONTEXT_PAGES + 68
    one.runner.arena.memory.fill_(torch.nan)  # what was there before is nobody's
    found = waves(one, paths, monkeypatch)
    assert found.got == expected.got
    assert found.moves, "a page lay where the arena grew"
    assert max(found.capacities) > 60 * PAGE_BYTES, "all three adapters were there"
    assert min(found.capacities[20:]) < 40 * PAGE_BYTES, "and one of them left for pages"
    report = one.report()
    assert report.evictions > 0 and report.capacity_bytes >= found.capacities[-1]


def test_an_adapter_beyond_what_a_context_leaves_is_refused(llama: str, tmp_path: Path) -> None:
    path = adapters_of(tmp_path, llama)[1]
    info = inspect(path, engine(llama).shape, 32)
    version = Version("large", info.digest, path, info.rank, info.parameters)
    pages = -(-info.parameters * 4 // PAGE_BYTES)
    enough = engine(llama, device_memory=(CONTEXT_PAGES + pages + 1) * PAGE_BYTES)
    enough.register(version, path)
    small = engine(llama, device_memory=(CONTEXT_PAGES + pages) * PAGE_BYTES)
    with pytest.raises(AdapterRefused, match="for adapters"):
        small.register(version, path)
    for each in (enough, small):
        each.close()


def test_where_pages_are_not_pieces_of_memory_it_is_refused(llama: str) -> None:
    with pytest.raises(ConfigError, match=r"device_memory: adapters share .* only where Triton"):
        engine(llama, kernels="torch", device_memory=2**24)


@pytest.mark.usefixtures("by_reference")
def test_one_memory_is_what_the_model_and_the_largest_step_leave(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the same runner asks CUDA what is free; here a step runs and CUDA is played."""
    measured: list[int] = []
    choice = PagedExecutor._choice

    def chosen(self: PagedExecutor, logits: torch.Tensor, draws: Sequence[Draw]) -> Choice:
        measured.append(len(logits))
        return choice(self, logits, draws)

    def free_beside(device: torch.device, step: Callable[[], None]) -> tuple[int, int]:
        step()
        return 1000 * PAGE_BYTES + 4096, 4096

    made = engine(llama)
    runner, config = (
        made.runner,
        dataclasses.replace(
            made.config, adapter_memory=None, kv_memory=None, memory_utilization=0.5
        ),
    )
    monkeypatch.setattr(largest_step, "free_beside", free_beside)
    monkeypatch.setattr(PagedExecutor, "_choice", chosen)
    weights = load_weights(llama, made.shape, torch.float32, torch.device("cpu"))
    cos_sin = rotary_tables(made.shape, made.shape.context, torch.float32, torch.device("cpu"))
    model = NativeModel(made.shape, weights, cos_sin)
    sized = runner._sized(config, model, "triton")
    assert sized.device_memory == 500 * PAGE_BYTES
    assert max(measured) == config.batch_rows_max, "every row may draw from some of the vocabulary"
    assert runner._sized(sized, model, "triton") is sized
    made.close()
