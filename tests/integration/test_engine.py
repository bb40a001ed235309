"""A real engine in this process under churn: every token comes from the right adapter."""

import dataclasses
import functools
import itertools
import math
import random
import shutil
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.config import EngineConfig
from cluster.errors import ConfigError, LogitsNotFinite
from cluster.values import Tier, Version
from replica.adapters.adapter_files import inspect
from replica.adapters.host_pool import HostPool
from replica.adapters.image import Image
from replica.engine.engine import Engine
from replica.model.shape import read_shape
from replica.scheduling.request import Delta, Finish, NewRequest, Sampling
from tests.bench.paced import PacedLoads, PacedSteps
from tests.late import LateDevice
from tests.models import make_adapter, make_model
from tests.until import WORK_S

ADAPTERS = 12
PROMPTS = [tuple(range(5 + i, 25 + 3 * i)) for i in range(4)]
GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("engine") / "base")


@pytest.fixture(scope="module")
def versions(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    root = tmp_path_factory.mktemp("adapters")
    shape = read_shape(model)
    found = []
    for i in range(ADAPTERS):
        path = make_adapter(root / str(i), model, rank=[4, 8, 16, 32][i % 4], seed=i, strength=0.1)
        info = inspect(path, shape, rank_max=64)
        found.append(Version(f"a{i}", info.digest, path, info.rank, info.parameters))
    return found


def engine(model: str, versions: list[Version], **settings: object) -> Engine:
    made = Engine(EngineConfig(model, threads=1, seed=0, **settings))  # type: ignore[arg-type]
    for version in versions:
        made.register(version, version.uri)
    return made


def drive(engine: Engine, got: dict[str, list[int]]) -> None:
    """Steps until all work has ended. Checks the invariants after each step."""
    deadline = time.monotonic() + WORK_S
    while engine.has_work:
        assert time.monotonic() < deadline, engine.report()
        for delta in engine.step():
            assert delta.error is None, delta.error
            got.setdefault(delta.request_id, []).extend(delta.tokens)
        engine.scheduler.check()


class LoadsOnDemand:
    """A loader's threads: a load runs when the test says."""

    def __init__(self, threads: int) -> None:
        self._waiting: deque[Callable[[], object]] = deque()

    def submit(self, work: Callable[..., object], *arguments: object) -> None:
        self._waiting.append(functools.partial(work, *arguments))

    def carry_out_one(self) -> None:
        if self._waiting:
            self._waiting.popleft()()

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        pass


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a test's engines independent of the machine's speed.

    Each read of the clock takes 50 ms, so steps are long. Time stands still for loaders, so copies
    cost nothing and parking is always worth it. Loads end when the test says.
    """
    looks = itertools.count(1.0, 0.05)
    slow = types.SimpleNamespace(monotonic=lambda: next(looks), time=time.time)
    monkeypatch.setattr("replica.engine.engine.time", slow)
    monkeypatch.setattr(
        "replica.adapters.loader.time", types.SimpleNamespace(monotonic=lambda: 0.0)
    )
    monkeypatch.setattr("replica.adapters.loader.single_threaded", LoadsOnDemand)


@pytest.fixture(scope="module")
def expected(model: str, versions: list[Version]) -> dict[tuple[str | None, int], list[int]]:
    """Greedy tokens of each adapter for each prompt, one request at a time with all resident."""
    alone = engine(model, versions)
    answers = {}
    for digest in [None, *(v.digest for v in versions)]:
        for i, prompt in enumerate(PROMPTS):
            got: dict[str, list[int]] = {}
            alone.add(NewRequest("r", prompt, GREEDY, digest))
            drive(alone, got)
            answers[digest, i] = got["r"]
    alone.close()
    return answers


def test_each_adapter_answers_differently(
    expected: dict[tuple[str | None, int], list[int]],
) -> None:
    """Otherwise the tests below could not detect a wrong adapter's token."""
    for i in range(len(PROMPTS)):
        answers = [tuple(tokens) for (_, prompt), tokens in expected.items() if prompt == i]
        assert len(set(answers)) == ADAPTERS + 1


@pytest.mark.parametrize(
    ("churn_seed", "depth", "late"),
    [(0, 1, False), (1, 1, False), (0, 2, False), (2, 2, False), (3, 1, True), (4, 2, True)],
)
def test_no_token_of_a_wrong_adapter_under_churn(
    model: str,
    versions: list[Version],
    expected: dict[tuple[str | None, int], list[int]],
    churn_seed: int,
    depth: int,
    late: bool,
) -> None:
    """Memory for about three of twelve adapters, few pages, and cancels. late: copies as on a GPU,
    from locked host memory for about as many adapters.
    """
    rng = random.Random(churn_seed)
    largest = max(v.parameters for v in versions) * 4
    made = engine(
        model,
        versions,
        adapter_memory=largest + 2**16,
        kv_memory=2**20,
        batch_rows_max=6,
        plan_depth=depth,
        host_memory=largest + 2**16,
    )
    device = LateDevice(prompt=True)
    pool = HostPool(device.lock(largest + 2**16))
    if late:
        arena = made.runner.arena
        arena._streams, arena.host_pool = device.copy_stream(), pool
    asked: dict[str, tuple[str | None, int]] = {}
    got: dict[str, list[int]] = {}
    cancelled = set()
    for n in range(150):
        name = f"r{n}"
        asked[name] = rng.choice([None, *(v.digest for v in versions)]), rng.randrange(4)
        digest, i = asked[name]
        made.add(NewRequest(name, PROMPTS[i], GREEDY, digest))
        if rng.random() < 0.15:
            victim = rng.choice(sorted(asked))
            if len(got.get(victim, [])) < GREEDY.max_tokens:
                made.cancel(victim)
                cancelled.add(victim)
        for _ in range(rng.randrange(3)):
            for delta in made.step():
                assert delta.error is None
                got.setdefault(delta.request_id, []).extend(delta.tokens)
            made.scheduler.check()
    drive(made, got)
    for name, (digest, i) in asked.items():
        answer = expected[digest, i]
        tokens = got.get(name, [])
        if name not in cancelled:
            assert tokens == answer, f"seed {churn_seed}: {name} of {digest}"
        assert tokens == answer[: len(tokens)], f"seed {churn_seed}: {name} of {digest}"
    report = made.report()
    assert report.free_pages == report.capacity_pages
    made.close()
    pool.check()
    locked = sum(p.memory.numel() for p in (i.piece for i in made._images.values()) if p)
    assert pool.free + locked == largest + 2**16 and (locked > 0) == late


def test_an_adapter_takes_bytes_in_proportion_to_its_rank(
    model: str, versions: list[Version]
) -> None:
    made = engine(model, versions[:4])
    sizes = {
        v.rank: e.bytes for v in versions[:4] for e in made.adapter_states() if e.digest == v.digest
    }
    assert sizes[32] == 8 * sizes[4]
    made.close()


@pytest.mark.usefixtures("driven")
def test_decoding_goes_on_while_adapters_load(model: str, versions: list[Version]) -> None:
    made = engine(model, versions)
    sampling = Sampling(max_tokens=300, temperature=0.0, ignore_eos=True)
    made.add(NewRequest("base", (5, 6), sampling))
    made.step()
    made.add(NewRequest("cold", (5, 6), GREEDY, versions[0].digest))
    got: dict[str, list[int]] = {"base": [], "cold": []}
    for _ in range(20):
        for delta in made.step():
            got[delta.request_id] += delta.tokens
    assert [e.digest for e in made.adapter_states() if e.tier is Tier.LOADING] == [
        versions[0].digest
    ]
    assert (len(got["base"]), got["cold"]) == (20, [])
    threads = made._loader._threads
    assert isinstance(threads, LoadsOnDemand)
    threads.carry_out_one()
    drive(made, got)
    assert len(got["cold"]) == GREEDY.max_tokens
    made.close()


def test_loads_share_the_rate_they_may_go_at(model: str, versions: list[Version]) -> None:
    size = versions[0].parameters * 4
    made = engine(model, versions, loads_in_flight_max=2)
    PacedLoads(made, 10 * size)
    same = [v for v in versions if v.rank == versions[0].rank][:3]
    for i, version in enumerate(same):
        made.add(NewRequest(str(i), PROMPTS[0], GREEDY, version.digest))
    start_s = time.monotonic()
    drive(made, {})
    assert time.monotonic() - start_s >= 0.1 * len(same)
    assert made.scheduler.costs.copy_bytes_per_s < 11 * size
    made.close()


@pytest.mark.parametrize("field", ["kv_memory", "adapter_memory"])
def test_memory_that_is_not_to_be_had_is_named(model: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: \d+ bytes: ") as caught:
        engine(model, [], **{"kv_memory": 2**20, "adapter_memory": 2**20, field: 2**50})
    assert caught.value.field == field


def test_a_batch_lasts_at_least_its_pace(model: str, versions: list[Version]) -> None:
    pace_s = 0.05
    made = Engine(EngineConfig(model, threads=1, seed=0))
    PacedSteps(made, lambda rows: pace_s * len(rows))
    made.add(NewRequest("one", PROMPTS[0], GREEDY, None))
    made.add(NewRequest("two", PROMPTS[1], GREEDY, None))
    steps_s = []
    while made.has_work:
        start_s = time.monotonic()
        made.step()
        steps_s.append(time.monotonic() - start_s)
    assert len(steps_s) == 6 and min(steps_s) >= 2 * pace_s
    assert made.report().step_s >= 2 * pace_s
    made.close()


def test_a_broken_adapter_hurts_only_its_own_requests(
    model: str, versions: list[Version], tmp_path: Path
) -> None:
    made = engine(model, versions[:1])
    made.register(Version("gone", "0" * 64, "", 8, 1000), str(tmp_path / "gone"))
    made.add(NewRequest("r", (5,), GREEDY, "0" * 64))
    made.add(NewRequest("ok", (5,), GREEDY, versions[0].digest))
    ended: dict[str, Delta] = {}
    deadline = time.monotonic() + WORK_S
    while made.has_work:
        assert time.monotonic() < deadline
        ended |= {d.request_id: d for d in made.step() if d.last}
    assert ended["r"].error is not None and ended["r"].error.status == 503
    assert ended["ok"].error is None
    tiers = {e.digest: e for e in made.adapter_states()}
    assert tiers["0" * 64].tier is Tier.FAILED and "gone" in (tiers["0" * 64].reason or "")
    made.close()


@pytest.mark.usefixtures("driven")
@pytest.mark.parametrize("depth", [1, 2])
def test_a_parked_stream_survives_a_reload_that_fails_for_a_while(
    model: str, versions: list[Version], tmp_path: Path, depth: int
) -> None:
    first, second = versions[0], versions[4]
    files, away = tmp_path / "files", tmp_path / "away"
    shutil.copytree(first.uri, files)
    made = engine(model, [second], slots_max=1, host_memory=0, quantum_s=0.001, plan_depth=depth)
    made.register(first, str(files))
    threads = made._loader._threads
    assert isinstance(threads, LoadsOnDemand)
    long = Sampling(max_tokens=300, temperature=0.0, ignore_eos=True)
    answers: list[list[int]] = []
    for fails in (False, True):
        got: dict[str, list[int]] = {}
        tiers = set()
        made.add(NewRequest("stream", PROMPTS[0], long, first.digest))
        while made.has_work:
            for delta in made.step():
                assert delta.error is None, delta.error
                got.setdefault(delta.request_id, []).extend(delta.tokens)
            made.scheduler.check()
            threads.carry_out_one()
            tier = made.scheduler.adapter_cache.adapters[first.digest].tier
            if fails and len(got.get("stream", [])) == 10 and not tiers:
                tiers.add(tier)
                made.add(NewRequest("other", PROMPTS[1], GREEDY, second.digest))
                files.rename(away)
            elif tier is Tier.FAILED and away.exists():
                tiers.add(tier)
                away.rename(files)
        assert (Tier.FAILED in tiers) == fails
        answers.append(got["stream"])
    assert answers[0] == answers[1] and len(answers[0]) == 300
    made.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_an_adapter_whose_forward_pass_overflows_fails_its_own_requests_only(
    model: str,
    versions: list[Version],
    expected: dict[tuple[str | None, int], list[int]],
    tmp_path: Path,
    depth: int,
) -> None:
    path = make_adapter(tmp_path / "hot", model, strength=1e20)
    info = inspect(path, read_shape(model), rank_max=64)
    hot = Version("hot", info.digest, path, info.rank, info.parameters)
    # Pages for half of the requests, so that others take over the pages of those that overflowed.
    made = engine(model, [versions[0], hot], plan_depth=depth, kv_memory=2**18)
    samplings = (GREEDY, Sampling(temperature=1.0), Sampling(top_k=3, logprobs=2))
    wanted = {}
    for n in range(9):
        made.add(NewRequest(f"hot{n}", PROMPTS[n % 4], samplings[n % 3], hot.digest))
        digest = versions[0].digest if n % 2 else None
        made.add(NewRequest(f"{n}", PROMPTS[n % 4], GREEDY, digest))
        wanted[f"{n}"] = expected[digest, n % 4]
    got: dict[str, list[int]] = {}
    errors = {}
    deadline = time.monotonic() + WORK_S
    while made.has_work:
        assert time.monotonic() < deadline
        for delta in made.step():
            if delta.error is not None:
                errors[delta.request_id] = delta.error
            else:
                got.setdefault(delta.request_id, []).extend(delta.tokens)
        made.scheduler.check()
    assert got == wanted
    assert set(errors) == {f"hot{n}" for n in range(9)}
    assert {type(error) for error in errors.values()} == {LogitsNotFinite}
    made.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_penalties_follow_transformers_logits(model: str, depth: int) -> None:
    """Greedy tokens of all rows in one batch against a loop over the model's own logits."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samplings = [
        Sampling(max_tokens=20, temperature=0.0, ignore_eos=True, **fields)
        for fields in (
            {},
            {"repetition_penalty": 1.5},
            {"presence_penalty": 1.0, "frequency_penalty": 0.5},
            {"repetition_penalty": 1.2, "frequency_penalty": -0.5, "logit_bias": ((9, 0.5),)},
            {"bad_words": tuple((t, t) for t in range(320)), "frequency_penalty": -1.0},
        )
    ]
    wanted = {}
    for n, sampling in enumerate(samplings):
        tokens = list(PROMPTS[n % len(PROMPTS)])
        start = len(tokens)
        while len(tokens) < start + sampling.max_tokens:
            with torch.inference_mode():
                logits = reference(torch.tensor([tokens])).logits[0, -1].tolist()
            for token, bias in sampling.logit_bias:
                logits[token] += bias
            for token in set(tokens):
                rate = sampling.repetition_penalty
                logits[token] = logits[token] / rate if logits[token] > 0 else logits[token] * rate
            for token in set(tokens[start:]):
                logits[token] -= sampling.presence_penalty
                logits[token] -= sampling.frequency_penalty * tokens[start:].count(token)
            if sampling.bad_words:
                logits[tokens[-1]] = -math.inf
            tokens.append(max(range(len(logits)), key=logits.__getitem__))
        wanted[f"r{n}"] = tokens[start:]
    made = engine(model, [], plan_depth=depth)
    for n, sampling in enumerate(samplings):
        made.add(NewRequest(f"r{n}", PROMPTS[n % len(PROMPTS)], sampling))
    got: dict[str, list[int]] = {}
    drive(made, got)
    made.close()
    assert got == wanted


def test_the_seed_decides_the_draw_whatever_runs_beside(
    model: str, versions: list[Version]
) -> None:
    sampling = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    made = engine(model, versions)
    alone: dict[str, list[int]] = {}
    made.add(NewRequest("r", PROMPTS[0], sampling))
    drive(made, alone)
    beside: dict[str, list[int]] = {}
    for i, version in enumerate(versions[:5]):
        made.add(NewRequest(f"other{i}", PROMPTS[1], sampling, version.digest))
    made.add(NewRequest("r", PROMPTS[0], sampling))
    drive(made, beside)
    assert beside["r"] == alone["r"]
    made.close()


def test_an_image_in_host_memory_comes_back_without_its_files(
    model: str, versions: list[Version], tmp_path: Path
) -> None:
    first, second = versions[0], versions[4]  # of the same rank
    made = engine(model, [second], adapter_memory=first.parameters * 4 + 2**10)
    moved = tmp_path / "moved"
    shutil.copytree(first.uri, moved)
    made.register(first, str(moved))
    answers = []
    for n, version in enumerate((first, second, first)):
        got: dict[str, list[int]] = {}
        made.add(NewRequest(f"r{n}", PROMPTS[0], GREEDY, version.digest))
        drive(made, got)
        answers.append(got[f"r{n}"])
        if n == 1:
            tiers = {e.digest: e.tier for e in made.adapter_states()}
            assert tiers == {first.digest: Tier.HOST, second.digest: Tier.DEVICE}
            shutil.rmtree(moved)
    assert answers[0] == answers[2] != answers[1]
    made.close()


def test_a_load_looks_at_no_image_in_host_memory_but_its_own_and_the_dropped(
    model: str, versions: list[Version]
) -> None:
    """Host memory may hold thousands."""

    class Unread(dict[str, Image]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("the load looks at each image")

        keys = values = items = __iter__  # type: ignore[assignment]

    size = versions[0].parameters * 4 + 2**10
    made = engine(model, versions, slots_max=1, host_memory=size)
    made._images = Unread()
    for version in (versions[0], versions[4], versions[8], versions[0]):  # of the same rank
        made.add(NewRequest("r", PROMPTS[0], GREEDY, version.digest))
        drive(made, {})
        assert version.digest in made._images
        assert len(made._images) <= 2, "the next load releases what this one dropped"
    assert made.report().loads == 4
    made.close()


def test_the_image_of_a_forgotten_version_leaves_host_memory_at_once(
    model: str, versions: list[Version]
) -> None:
    made = engine(model, versions[:2])
    for version in versions[:2]:
        made.add(NewRequest("r", PROMPTS[0], GREEDY, version.digest))
        drive(made, {})
    made.forget(versions[0].digest)
    made.step()
    assert list(made._images) == [versions[1].digest]
    made.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_the_oldest_image_leaves_locked_memory_for_one_that_is_to_be_read(
    model: str, versions: list[Version], overlap: bool
) -> None:
    first, second = versions[0], versions[4]  # of the same rank
    size = first.parameters * 4
    made = engine(
        model,
        [first, second],
        adapter_memory=size + 2**10,
        host_memory=size + 2**10,
        overlap=overlap,
    )
    device = LateDevice(prompt=True)
    arena = made.runner.arena
    arena._streams, arena.host_pool = device.copy_stream(), HostPool(device.lock(size + 2**10))
    for version in (first, second, first, first):
        made.add(NewRequest("r", PROMPTS[0], GREEDY, version.digest))
        drive(made, {})
        assert list(made._images) == [version.digest]
        assert made._images[version.digest].piece is not None
    tiers = {e.digest: e.tier for e in made.adapter_states()}
    assert tiers == {first.digest: Tier.DEVICE, second.digest: Tier.DISK}
    assert made.report().loads == 3
    made.close()


def test_images_larger_than_what_could_be_locked_are_kept_in_other_memory(
    model: str, versions: list[Version]
) -> None:
    first, second = versions[0], versions[4]
    size = first.parameters * 4
    made = engine(model, [first, second], adapter_memory=size + 2**10, host_memory=2 * size + 2**11)
    device = LateDevice(prompt=True)
    arena = made.runner.arena
    arena._streams, arena.host_pool = device.copy_stream(), HostPool(device.lock(size - 1))
    for version in (first, second):
        made.add(NewRequest("r", PROMPTS[0], GREEDY, version.digest))
        drive(made, {})
    assert {digest: image.piece for digest, image in made._images.items()} == {
        first.digest: None,
        second.digest: None,
    }
    made.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": False},
        {"on_miss": "block", "base_slot": "shared", "park": False, "overlap": False},
        {"park": False, "drain_wait_threshold_s": 0.01},
        {"quantum_s": 0.001, "host_memory": 0},
        {"eviction": "lru", "prefetch_depth": 0, "prefix_cache": False},
        {"fair_share": True, "parked_pages_max": 4, "quantum_s": 0.001},
        {"plan_depth": 2},
        {"plan_depth": 2, "overlap": False},
        {"plan_depth": 2, "quantum_s": 0.001, "kv_memory": 2**18},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_tokens_are_the_same_whatever_the_switches(
    model: str,
    versions: list[Version],
    expected: dict[tuple[str | None, int], list[int]],
    settings: dict[str, object],
) -> None:
    made = engine(model, versions, slots_max=3, batch_rows_max=6, **settings)
    rng = random.Random(1)
    asked = {
        f"r{n}": (rng.choice([None, *(v.digest for v in versions)]), rng.randrange(4))
        for n in range(60)
    }
    for name, (digest, i) in asked.items():
        made.add(NewRequest(name, PROMPTS[i], GREEDY, digest))
    got: dict[str, list[int]] = {}
    drive(made, got)
    assert got == {name: expected[about] for name, about in asked.items()}
    made.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_load_that_fails_without_overlap_hurts_only_its_own_requests(
    model: str, versions: list[Version], tmp_path: Path, depth: int
) -> None:
    made = engine(model, versions[:1], overlap=False, plan_depth=depth)
    made.register(Version("gone", "0" * 64, "", 8, 1000), str(tmp_path / "gone"))
    made.add(NewRequest("r", (5,), GREEDY, "0" * 64))
    made.add(NewRequest("ok", (5,), GREEDY, versions[0].digest))
    ended: dict[str, Delta] = {}
    while made.has_work:
        ended |= {d.request_id: d for d in made.step() if d.last}
        made.scheduler.check()
    assert ended["r"].error is not None and ended["r"].error.status == 503
    assert ended["ok"].error is None
    made.close()


def test_a_story_says_why_a_request_waited(model: str, versions: list[Version]) -> None:
    made = engine(model, versions)
    made.add(NewRequest("r", (5, 6), GREEDY, versions[0].digest))
    drive(made, {})
    events = [happening.event.value for happening in made.timeline("r")]
    assert events == ["queued", "load started", "load done", "running", "first token", "done"]
    assert made.report().misses == 1 and made.report().loads == 1
    made.close()


def test_a_versions_weight_reaches_the_share_of_the_batch(
    model: str, versions: list[Version]
) -> None:
    """One row, and two adapters with equally many requests. One has three times the weight."""
    made = engine(model, [], fair_share=True, batch_rows_max=1, context_tokens_max=64)
    for version, weight in zip(versions, (3.0, 1.0), strict=False):
        made.register(dataclasses.replace(version, weight=weight, pinned=True), version.uri)
    while made.scheduler.adapter_cache.loading or made.scheduler.adapter_cache.pinned_elsewhere(
        0.0
    ):
        made.step()
    sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    for i in range(20):
        for which in range(2):
            made.add(NewRequest(f"{which}-{i}", (5, 6 + i), sampling, versions[which].digest))
    ended = [delta.request_id[0] for _ in range(20) for delta in made.step() if delta.last]
    assert ended.count("0") == pytest.approx(15, abs=1)
    made.close()


@pytest.mark.usefixtures("driven")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pages_short", [False, True])
def test_tokens_are_the_same_at_both_depths(
    model: str, versions: list[Version], temperature: float, pages_short: bool
) -> None:
    """Stop tokens, seeded sampling, logprobs, lengths from 1, and parked or preempted rows.

    12 adapters compete for 3 places, so some are parked. Six rows of 33 tokens or more need 18
    pages, and there are 10, so some rows lose theirs.
    """
    rng = random.Random(2)
    asked = []
    for n in range(60):
        sampling = Sampling(
            max_tokens=rng.randint(1, 20),
            min_tokens=rng.choice([0, 4, 16]),
            temperature=temperature,
            seed=n,
            stop_tokens=frozenset(rng.sample(range(320), 40)),
            logprobs=rng.choice([None, None, 2]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            bad_words=rng.choice([(), tuple((t, t) for t in range(320))]),
        )
        digest = rng.choice([None, *(v.digest for v in versions)])
        asked.append(NewRequest(f"r{n}", rng.choice(PROMPTS), sampling, digest))
    told = []
    for depth in (1, 2):
        made = engine(
            model,
            versions,
            slots_max=3,
            batch_rows_max=6,
            quantum_s=0.001,
            kv_memory=2**17 if pages_short else 2**22,
            growth_outputs=0.0,
            plan_depth=depth,
        )
        threads = made._loader._threads
        assert isinstance(threads, LoadsOnDemand)
        for request in asked:
            made.add(request)
        deltas: dict[str, list[Delta]] = {}
        while made.has_work:
            for delta in made.step():
                deltas.setdefault(delta.request_id, []).append(delta)
            made.scheduler.check()
            if rng.random() < 0.5:
                threads.carry_out_one()
        told.append(
            {
                name: ([t for d in own for t in d.tokens], own[-1].finish, len(own))
                for name, own in deltas.items()
            }
        )
        report = made.report()
        assert report.preemptions if pages_short else report.parks
        assert report.free_pages == report.capacity_pages
        made.close()
    assert told[0] == told[1]
    finishes = {finish for _, finish, _ in told[0].values()}
    assert finishes == {Finish.STOP, Finish.LENGTH}


def test_a_bug_on_a_loaders_thread_ends_the_engine_instead_of_the_load(
    model: str, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its requests would wait without end and without a reason."""
    made = engine(model, versions[:1])

    def load(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(made._loader, "_load", load)
    made.add(NewRequest("r", (5, 6), GREEDY, versions[0].digest))
    deadline = time.monotonic() + WORK_S
    with pytest.raises(AssertionError, match="a bug"):
        while time.monotonic() < deadline:
            made.step()
    made.close()
