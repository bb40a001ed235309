"""The engine in its own process: streams, errors, and the death of either side."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import EngineConfig
from cluster.errors import (
    AdapterRefused,
    EngineFailed,
    ModelNotFound,
    ModelUnsupported,
    QueueFull,
    StartupError,
)
from cluster.values import AdapterState, Tier, Version
from replica.adapters.adapter_files import inspect
from replica.engine.link import EngineLink
from replica.model.shape import read_shape
from replica.scheduling.request import Delta, Finish, NewRequest, Sampling
from tests.models import edit_config, make_adapter, make_model
from tests.until import TIMEOUT_S, until, until_now

GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
# More tokens than a request can generate before its test ends it.
ENDLESS = Sampling(max_tokens=8000, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = tmp_path_factory.mktemp("link") / "base"
    return make_model(base, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> Version:
    path = make_adapter(tmp_path_factory.mktemp("adapter") / "a", model, rank=8)
    info = inspect(path, read_shape(model), rank_max=64)
    return Version("a", info.digest, path, info.rank, info.parameters)


@pytest.fixture
async def link(model: str) -> AsyncIterator[EngineLink]:
    link = EngineLink(
        EngineConfig(model, threads=1, queue_max=4, batch_rows_max=2, kv_memory=2**24)
    )
    await link.start()
    yield link
    await link.stop()


async def collect(link: EngineLink, request: NewRequest) -> list[Delta]:
    return [delta async for delta in link.generate(request)]


async def test_tokens_stream_and_the_last_delta_says_why(link: EngineLink) -> None:
    deltas = await collect(link, NewRequest("r", (5, 6, 7), GREEDY))
    assert sum(len(d.tokens) for d in deltas) == 8
    assert [d.last for d in deltas] == [False] * 7 + [True]
    assert deltas[-1].finish is Finish.LENGTH


async def test_an_adapter_is_loaded_on_demand_and_its_tier_is_told(
    link: EngineLink, adapter: Version
) -> None:
    changes: list[AdapterState] = []
    link.on_residency(changes.extend)
    await link.register(adapter, adapter.uri)
    base = await collect(link, NewRequest("base", (5, 6, 7), GREEDY))
    tuned = await collect(link, NewRequest("tuned", (5, 6, 7), GREEDY, adapter.digest))
    assert [d.tokens for d in base] != [d.tokens for d in tuned]
    await until(lambda: [e.tier for e in link.adapter_states()] == [Tier.DEVICE])
    assert [e.tier for e in changes] == [Tier.DISK, Tier.LOADING, Tier.DEVICE]
    await link.forget(adapter.digest)
    await until(lambda: link.adapter_states() == [])
    (refused,) = await collect(link, NewRequest("late", (5,), GREEDY, adapter.digest))
    assert isinstance(refused.error, ModelNotFound)


async def test_an_adapter_larger_than_the_arena_is_refused(model: str, adapter: Version) -> None:
    link = EngineLink(EngineConfig(model, threads=1, adapter_memory=4096))
    await link.start()
    with pytest.raises(AdapterRefused, match="4096"):
        await link.register(adapter, adapter.uri)
    await link.stop()


async def test_files_that_changed_since_they_were_registered_never_answer(
    link: EngineLink, model: str, adapter: Version, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", model, rank=8, seed=9)
    await link.register(adapter, other)
    (failed,) = await collect(link, NewRequest("r", (5,), GREEDY, adapter.digest))
    assert failed.error is not None and failed.error.status == 503
    assert "changed" in failed.error.message
    assert (await collect(link, NewRequest("base", (5,), GREEDY)))[-1].finish is not None


async def test_closing_the_stream_frees_pages(link: EngineLink) -> None:
    stream = link.generate(NewRequest("r", (5, 6), ENDLESS))
    assert (await anext(stream)).tokens
    await until(lambda: link.report().running == 1)
    await stream.aclose()
    await until(lambda: link.report().running == 0)
    report = link.report()
    assert report.free_pages == report.capacity_pages


async def test_a_full_queue_is_told_to_the_one_that_found_it_full(link: EngineLink) -> None:
    """Two requests run and four wait."""

    def ask(count: int) -> list[asyncio.Task[list[Delta]]]:
        names = (f"{count}-{i}" for i in range(count))
        return [
            asyncio.create_task(collect(link, NewRequest(name, (5, 6), ENDLESS))) for name in names
        ]

    running = ask(2)
    await until(lambda: link.report().running == 2)
    more = ask(10)
    await until(lambda: sum(task.done() for task in more) == 6)
    for task in more:
        if task.done():
            (refused,) = task.result()
            assert isinstance(refused.error, QueueFull)
    await until(lambda: (link.report().running, link.report().waiting) == (2, 4))
    for task in [*running, *more]:
        task.cancel()
    await asyncio.gather(*running, *more, return_exceptions=True)
    await until(lambda: (link.report().running, link.report().waiting) == (0, 0))


async def test_a_killed_engine_fails_its_streams_and_the_next_ones(link: EngineLink) -> None:
    stream = link.generate(NewRequest("r", (5, 6), ENDLESS))
    await anext(stream)
    assert link.pid is not None
    os.kill(link.pid, signal.SIGKILL)
    deltas = [delta async for delta in stream]
    assert isinstance(deltas[-1].error, EngineFailed)
    assert not link.alive
    (late,) = await collect(link, NewRequest("late", (5,), GREEDY))
    assert isinstance(late.error, EngineFailed)
    with pytest.raises(EngineFailed):
        await link.forget("x")


STUCK_ENGINE = """
import sys
from replica.adapters import loader
from replica.engine import engine_process

def read(*_, **options):
    open(sys.argv[2]).read()

loader.read_image = read
engine_process.main()
"""


@pytest.fixture
async def stuck(
    model: str, adapter: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EngineLink]:
    """An engine whose loader waits in a read that does not end, for a request that waits too."""
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([command[0], "-c", STUCK_ENGINE, command[-1], pipe], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    link = EngineLink(EngineConfig(model, threads=1, kv_memory=2**24))
    await link.start()
    await link.register(adapter, adapter.uri)
    waiting = asyncio.create_task(collect(link, NewRequest("r", (5, 6), GREEDY, adapter.digest)))
    writers: list[int] = []

    def reader_has_opened() -> bool:
        with contextlib.suppress(OSError):
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    await until(reader_has_opened)
    yield link
    deltas = await asyncio.wait_for(waiting, TIMEOUT_S)
    assert isinstance(deltas[-1].error, EngineFailed)
    os.close(writers[0])
    await link.stop()


async def test_an_engine_that_raises_ends_though_a_loader_is_stuck_in_a_read(
    stuck: EngineLink,
) -> None:
    bug = NewRequest("bug", (), GREEDY)  # the scheduler asserts that there is a prompt
    deltas = await asyncio.wait_for(collect(stuck, bug), TIMEOUT_S)
    assert isinstance(deltas[-1].error, EngineFailed)
    assert not stuck.alive
    pid = stuck.pid
    assert pid is not None
    await until(lambda: not _runs(pid))


async def test_an_engine_that_stops_ends_by_itself_though_a_loader_is_stuck_in_a_read(
    stuck: EngineLink,
) -> None:
    await stuck.stop()
    assert stuck._process is not None
    assert stuck._process.returncode >= 0, "it had to be killed"


async def test_a_model_that_cannot_be_served_is_named_at_start(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    edit_config(path, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(ModelUnsupported, match="mamba"):
        await EngineLink(EngineConfig(path)).start()
    with pytest.raises(StartupError, match="nowhere"):
        await EngineLink(EngineConfig(str(tmp_path / "nowhere"))).start()


def test_the_engine_dies_with_its_parent(model: str) -> None:
    script = f"""
import asyncio, sys
from cluster.config import EngineConfig
from replica.engine.link import EngineLink
link = EngineLink(EngineConfig({model!r}, threads=1))
asyncio.run(link.start())
print(link.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        os.kill(engine, 0)
        parent.kill()
    until_now(lambda: not _runs(engine))


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
