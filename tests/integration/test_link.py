"""The engine in its own process: streams, errors, and the death of either side."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
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
from replica.engine import link as link_module
from replica.engine.child import EngineChild, Spare
from replica.engine.link import STRIKES_MAX, EngineLink
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


async def test_damaged_files_fail_their_own_requests(
    link: EngineLink, adapter: Version, tmp_path: Path
) -> None:
    shutil.copytree(adapter.uri, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "adapter_model.safetensors", 10_000)
    await link.register(adapter, str(tmp_path / "cut"))
    (failed,) = await collect(link, NewRequest("r", (5,), GREEDY, adapter.digest))
    assert failed.error is not None and failed.error.status == 503
    assert "the file holds" in failed.error.message
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


async def test_a_killed_engine_fails_what_it_ran_and_the_next_one_serves_the_rest(
    link: EngineLink, adapter: Version
) -> None:
    await link.register(adapter, adapter.uri)
    stream = link.generate(NewRequest("r", (5, 6), ENDLESS))
    await anext(stream)
    killed = link.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    deltas = [delta async for delta in stream]
    assert isinstance(deltas[-1].error, EngineFailed)
    assert (link.alive, link.report().stalled, link.adapter_states()) == (True, 1, [])
    waiting = asyncio.create_task(collect(link, NewRequest("w", (5,), GREEDY, adapter.digest)))
    await link.register(replace(adapter, name="b", digest="b"), adapter.uri)
    assert (await waiting)[-1].finish is Finish.LENGTH
    assert link.pid != killed
    assert link.report().stalled == 0
    assert [entry.digest for entry in link.adapter_states()] == sorted([adapter.digest, "b"])


@pytest.mark.parametrize("busy", [True, False])
async def test_a_stopped_engine_is_said_to_stall_and_is_replaced(model: str, busy: bool) -> None:
    link = EngineLink(EngineConfig(model, threads=1, kv_memory=2**24, hang_s=0.5))
    await link.start()
    stalled: list[int] = []
    spares: list[int] = []

    def changed(_: list[AdapterState]) -> None:
        stalled.append(link.report().stalled)
        if link._spare._child is not None:
            spares.append(link._spare._child.pid)

    link.on_residency(changed)
    stream = link.generate(NewRequest("r", (5, 6), ENDLESS))
    while link._child is not None and (await anext(stream)).tokens:
        if link.report().steps > 20:  # so that what a step takes is known
            break
    if not busy:
        await stream.aclose()
        await until(lambda: link.report().running == 0)
    stopped = link.pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    took_s = await until(lambda: link.report().stalled == 1)
    assert took_s >= 0.25
    if busy:
        deltas = [delta async for delta in stream]
        assert "has not moved" in str(deltas[-1].error)
    await until(lambda: link.report().stalled == 0)
    assert stalled[:2] == [1, 1]
    assert link.pid != stopped
    assert link.pid == spares[0], "the next process was started before the hung one was killed"
    assert (await collect(link, NewRequest("next", (5,), GREEDY)))[-1].finish is Finish.LENGTH
    await link.stop()


def test_a_spare_process_is_there_while_it_is_wanted() -> None:
    spare = Spare(lambda: EngineChild(lambda _: None, lambda *_: None))
    spare.keep(True)
    spare.keep(True)
    kept = spare.take()
    assert kept.process.poll() is None
    spare.keep(True)
    assert spare._child is not None and spare._child is not kept
    other = spare._child.process
    spare.keep(False)
    assert other.returncode is not None
    assert spare._child is None
    kept.discard()
    assert kept.process.returncode is not None


async def test_a_link_that_stops_leaves_no_spare_process(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_WATCH_S", 1000.0)  # or else it would end the spare soon
    link = EngineLink(EngineConfig(model, threads=1, kv_memory=2**24))
    await link.start()
    link._spare.keep(True)
    assert link._spare._child is not None
    process = link._spare._child.process
    await link.stop()
    assert process.returncode is not None


async def test_an_engine_that_keeps_ending_is_given_up(
    link: EngineLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_BACKOFF_S", 0.0)
    for killed in range(STRIKES_MAX):
        pid = link.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: link._strikes == killed + 1 and link.report().stalled == 0)  # noqa: B023
    pid = link.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not link.alive)
    (late,) = await collect(link, NewRequest("late", (5,), GREEDY))
    assert isinstance(late.error, EngineFailed)
    with pytest.raises(EngineFailed):
        await link.forget("x")


async def test_an_engine_that_is_started_again_can_be_stopped(link: EngineLink) -> None:
    pid = link.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: link.pid != pid)
    await link.stop()
    assert not link.alive


STUCK_ENGINE = """
import sys
from replica.adapters import loader
from replica.engine import engine_process

def read(*_, **options):
    open(sys.argv[3]).read()

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
        fds = command[command.index("-m") + 2 :]
        return popen([command[0], "-c", STUCK_ENGINE, *fds, pipe], **options)

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
    pid = stuck.pid
    assert pid is not None
    deltas = await asyncio.wait_for(collect(stuck, bug), TIMEOUT_S)
    assert isinstance(deltas[-1].error, EngineFailed)
    await until(lambda: not _runs(pid))


async def test_an_engine_that_stops_ends_by_itself_though_a_loader_is_stuck_in_a_read(
    stuck: EngineLink,
) -> None:
    await stuck.stop()
    assert stuck._child is not None
    assert stuck._child.process.returncode >= 0, "it had to be killed"


async def test_a_model_that_cannot_be_served_is_named_at_start(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    edit_config(path, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(ModelUnsupported, match="MambaForCausalLM"):
        await EngineLink(EngineConfig(path)).start()
    with pytest.raises(StartupError, match="nowhere"):
        await EngineLink(EngineConfig(str(tmp_path / "nowhere"))).start()


def test_the_engine_dies_with_its_parent(model: str) -> None:
    script = f"""
import asyncio, sys
from cluster.config import EngineConfig
from replica.engine import link as link_module
from replica.engine.link import STRIKES_MAX, EngineLink
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
