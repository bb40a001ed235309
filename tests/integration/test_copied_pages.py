"""KV pages of rows off the batch move to host memory and back; no token differs or comes twice."""

import itertools
import time
import types
from contextlib import closing
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from cluster.costs import Costs
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.model.memory import kv_page_bytes
from replica.model.shape import read_shape
from replica.scheduling.page_copies import PageCopies
from replica.scheduling.request import NewRequest, Sampling
from replica.scheduling.timeline import Event
from tests.models import make_adapter, make_model

ROWS = 6
ROW_PAGES = 4  # of one row at its end
PAGE_TOKENS = 4


@pytest.fixture(autouse=True)
def _copies_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, copying a toy's pages may take longer than computing them."""
    still = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("replica.engine.page_copier.time", still)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("page-copies") / "base")


@pytest.fixture(scope="module")
def versions(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    root = tmp_path_factory.mktemp("page-copies-adapters")
    return [version(model, root / str(i), i) for i in range(2)]


def version(model: str, path: Path, seed: int) -> Version:
    directory = make_adapter(path, model, rank=8, seed=seed, strength=0.1)
    info = inspect(directory, read_shape(model), rank_max=64)
    return Version(str(seed), info.digest, directory, info.rank, info.parameters)


def answers(engine: Engine, versions: list[Version]) -> dict[str, list[int]]:
    """Tokens of `ROWS` rows that arrive at once and grow from one page to `ROW_PAGES`."""
    for version in versions:
        engine.register(version, version.uri)
    digests = [None, *(version.digest for version in versions)]
    sampling = Sampling(max_tokens=PAGE_TOKENS * ROW_PAGES - 3, temperature=0.0, ignore_eos=True)
    for i in range(ROWS):
        prompt = tuple(range(5 + i, 8 + i))
        engine.add(NewRequest(f"r{i}", prompt, sampling, digests[i % len(digests)]))
    got: dict[str, list[int]] = {f"r{i}": [] for i in range(ROWS)}
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            got[delta.request_id] += delta.tokens
        engine.scheduler.check()
    return got


def config(model: str, pages: int, **settings: object) -> EngineConfig:
    ranks = settings.get("tensor_parallel", 1)
    assert isinstance(ranks, int)
    part = read_shape(model).divided(ranks)
    page = kv_page_bytes(EngineConfig(model, page_tokens=PAGE_TOKENS), part, 4)
    return EngineConfig(
        model,
        device="cpu",
        dtype="float32",
        threads=1,
        context_tokens_max=PAGE_TOKENS * ROW_PAGES,
        page_tokens=PAGE_TOKENS,
        adapter_memory=2**22,
        kv_memory=pages * page,
        growth_outputs=0.0,
        **{"host_kv_memory": 100 * page, **settings},  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def copies_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they do depends on the machine: this model computes its few tokens in no time."""
    monkeypatch.setattr(Costs, "page_copy_s", lambda self, size: 0.0)


@pytest.fixture(scope="module")
def unhurried(model: str, versions: list[Version]) -> dict[str, list[int]]:
    with closing(Engine(config(model, ROWS * ROW_PAGES))) as engine:
        got = answers(engine, versions)
        assert engine.scheduler.page_copies.back == 0
    return got


@pytest.mark.parametrize("depth", [1, 2])
def test_with_pages_for_a_third_of_the_rows_no_token_is_wrong_or_computed_twice(
    model: str, versions: list[Version], unhurried: dict[str, list[int]], depth: int
) -> None:
    scarce = config(model, ROWS * ROW_PAGES // 3, plan_depth=depth)
    with closing(Engine(scarce)) as engine:
        assert answers(engine, versions) == unhurried
        scheduler = engine.scheduler
        assert scheduler.page_copies.back > 0
        assert scheduler.growth.over_needed == 1.0
        host = scheduler.page_copies.host
        assert host is not None and host.free == host.capacity
        assert scheduler.pages.free == scheduler.pages.capacity


def test_parked_rows_keep_their_pages_in_host_memory(
    model: str,
    versions: list[Version],
    unhurried: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look at the clock takes 50 ms, and loads take no time, so adapters take turns."""
    looks = itertools.count(1.0, 0.05)
    clock = types.SimpleNamespace(monotonic=lambda: next(looks), time=time.time)
    monkeypatch.setattr("replica.engine.engine.time", clock)
    still = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("replica.adapters.loader.time", still)
    turns = {"slots_max": 1, "quantum_s": 0.001, "parked_pages_max": 0}
    with closing(Engine(config(model, ROWS * ROW_PAGES, **turns))) as engine:
        assert answers(engine, versions) == unhurried
        assert engine.scheduler.timelines.counts[Event.PARKED] > 0
        assert engine.scheduler.page_copies.back > 0
        assert engine.scheduler.growth.over_needed == 1.0


@pytest.mark.parametrize("depth", [1, 2])
def test_prefixes_that_the_device_forgot_come_back_from_host_memory(
    model: str, versions: list[Version], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three models are asked four prompts each, one after another, and the same again."""
    monkeypatch.setattr(PageCopies, "_is_sooner_back", lambda self, pages: pages > 0)
    prompts = [tuple(range(3 + 7 * i, 14 + 7 * i)) for i in range(4)]
    sampling = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)
    with closing(Engine(config(model, ROW_PAGES + 2, plan_depth=depth))) as engine:
        for version in versions:
            engine.register(version, version.uri)
        digests = [None, *(version.digest for version in versions)]
        first, second = (
            [ask(engine, prompt, digest, sampling) for prompt in prompts for digest in digests]
            for _ in range(2)
        )
        assert [tokens for tokens, _ in first] == [tokens for tokens, _ in second]
        assert {cached for _, cached in first} == {0}
        assert {cached for _, cached in second} == {2 * PAGE_TOKENS}
        assert engine.scheduler.page_copies.back == 2 * len(first)


def ask(
    engine: Engine, prompt: tuple[int, ...], digest: str | None, sampling: Sampling
) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were cached."""
    engine.add(NewRequest("only", prompt, sampling, digest))
    tokens, cached = [], 0
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            tokens += delta.tokens
            cached += delta.cached_tokens
        engine.scheduler.check()
    return tokens, cached


def test_without_page_copies_tokens_are_computed_again(
    model: str, versions: list[Version], unhurried: dict[str, list[int]]
) -> None:
    scarce = config(model, ROWS * ROW_PAGES // 3, page_copies=False)
    with closing(Engine(scarce)) as engine:
        assert answers(engine, versions) == unhurried
        assert engine.scheduler.page_copies.out == 0
        assert engine.scheduler.growth.over_needed > 1.02


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"kernels": "triton"}, {"tensor_parallel": 2}])
def test_kernels_and_ranks_copy_the_same_pages(
    model: str,
    versions: list[Version],
    unhurried: dict[str, list[int]],
    settings: dict[str, object],
) -> None:
    scarce = config(model, ROWS * ROW_PAGES // 3, rank_max=8, plan_depth=2, **settings)
    with closing(Engine(scarce)) as engine:
        assert answers(engine, versions) == unhurried
        assert engine.scheduler.page_copies.back > 0
        assert engine.scheduler.growth.over_needed == 1.0
