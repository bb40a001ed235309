"""Requests end to end, through a fleet of two replicas started by the command line."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from redis import Redis

from tests.fleet import ANSWER_S, START_S, Fleet, ReplicaProcess, eventually, fleet
from tests.models import make_adapter, make_model
from tests.until import until

pytestmark = pytest.mark.ray

NAMES = tuple(f"a{i}" for i in range(5))
LEASE_S = 3.0
ROWS, QUEUE = 16, 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "tiny", max_position_embeddings=4096)
    for i, name in enumerate([*NAMES, "extra"]):
        make_adapter(root / "adapters" / name, model, seed=i + 1)
    return root


@pytest.fixture(scope="module")
def running(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two places per replica, so that five adapters do not fit."""
    arguments = ["--model", str(files / "tiny"), "--replicas", "2", "--device", "cpu"]
    for name in NAMES:
        arguments += ["--adapter", f"{name}={files / 'adapters' / name}"]
    arguments += ["--adapter-root", str(files / "adapters"), "--slots-max", "2"]
    arguments += ["--batch-rows-max", str(ROWS), "--queue-max", str(QUEUE)]
    with fleet(arguments, tmp_path_factory.mktemp("fleet")) as started:
        yield started


@pytest.fixture
def client(running: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0) as made:
        yield made


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_base_and_adapter_stream_what_they_answer_whole(client: openai.OpenAI) -> None:
    texts = {}
    for model in ("tiny", "a0", "a1"):
        ask: dict[str, Any] = {"model": model, "prompt": "hello", "max_tokens": 12}
        whole = client.completions.create(**ask, temperature=0)
        streamed = client.completions.create(**ask, temperature=0, stream=True)
        texts[model] = whole.choices[0].text
        assert text_of(streamed) == texts[model]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
    assert len(set(texts.values())) == 3, "adapters must change the answer"


def test_chat_with_choices_logprobs_and_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="a0",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=5,
        n=2,
        logprobs=True,
        top_logprobs=2,
        seed=1,
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 10


def test_a_prompt_that_hides_the_model_from_the_router_is_served_all_the_same(
    running: Fleet,
) -> None:
    """HAProxy passes on 64 KiB of a body. It truncates chunked bodies without saying so."""
    body = b'{"stop": ["' + b"x" * 100_000 + b'"], "prompt": "hello", "max_tokens": 4, '
    body += b'"temperature": 0, "model": "a1"}'
    expected = running.complete("a1", temperature=0).json()["choices"][0]["text"]
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:70_000], body[70_000:]])):
        url = f"{running.url}/v1/completions"
        answer = httpx.post(url, content=content, headers=headers, timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected


def test_bad_requests_are_answered_by_a_replica(running: Fleet) -> None:
    unknown = running.complete("nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    garbage = httpx.post(
        f"{running.url}/v1/completions", content=b'{"model": "a0", ', timeout=ANSWER_S
    )
    assert garbage.status_code == 400
    assert garbage.json()["error"]["type"] == "invalid_request_error"
    assert unknown.headers["x-lorafleet-replica"].startswith("SERVE_REPLICA::")


def test_an_adapter_keeps_going_where_it_is(running: Fleet) -> None:
    def on_device(name: str) -> bool:
        entry = next(e for e in running.adapters()["data"] if e["id"] == name)
        return any(at["tier"] == "device" for at in entry["residency"].values())

    def stays(name: str) -> bool:
        first = running.complete(name).headers["x-lorafleet-replica"]
        eventually(lambda: on_device(name), f"{name} is resident")
        return {running.complete(name).headers["x-lorafleet-replica"] for _ in range(3)} == {first}

    # On a busy machine a replica's lease may run out in between; then the other one is asked.
    assert sum(map(stays, NAMES)) >= len(NAMES) - 1


def equals_engines(running: Fleet, replicas: list[ReplicaProcess]) -> bool:
    """Redis has the same state of each replica as the replica's own port."""
    page = running.adapters()
    if [entry["id"] for entry in page["replicas"]] != [replica.id for replica in replicas]:
        return False
    for replica in replicas:
        held = [entry["residency"].get(replica.id) for entry in page["data"]]
        metrics = replica.metrics()
        for tier in ("device", "loading", "host", "disk", "failed"):
            published = sum(1 for at in held if at and at["tier"] == tier)
            if published != metrics[f'lorafleet_adapters{{tier="{tier}"}}']:
                return False
        occupied = metrics["lorafleet_capacity_bytes"] - metrics["lorafleet_free_bytes"]
        if sum(at["bytes"] for at in held if at and at["tier"] == "device") != occupied:
            return False
    return True


def test_residency_is_what_the_engines_report(running: Fleet, files: Path) -> None:
    replicas = running.replicas()
    assert len(replicas) == 2

    def devices(name: str) -> int:
        entry = next(e for e in running.adapters()["data"] if e["id"] == name)
        return sum(at["tier"] == "device" for at in entry["residency"].values())

    for name in NAMES * 2:  # five adapters over two times two places: evictions
        assert running.complete(name).status_code == 200
    eventually(lambda: equals_engines(running, replicas), "residency is right after evictions")
    assert sum(replica.metrics()["lorafleet_evictions_total"] for replica in replicas) > 0
    assert sum(map(devices, NAMES)) <= 4  # the number depends on the router's choices
    body = {"lora_name": "extra", "lora_path": str(files / "adapters" / "extra")}
    loaded = httpx.post(f"{running.url}/v1/load_lora_adapter", json=body, timeout=ANSWER_S)
    assert loaded.status_code == 200, loaded.text
    assert running.complete("extra").status_code == 200
    eventually(lambda: devices("extra") == 1, "the new adapter is resident")
    eventually(lambda: equals_engines(running, replicas), "residency is right after a load")
    gone = httpx.post(
        f"{running.url}/v1/unload_lora_adapter", json={"lora_name": "extra"}, timeout=ANSWER_S
    )
    assert gone.status_code == 200, gone.text
    assert running.complete("extra").status_code == 404
    eventually(lambda: equals_engines(running, replicas), "residency is right after an unload")


async def open_stream(http: httpx.AsyncClient, stack: contextlib.AsyncExitStack) -> httpx.Response:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    return await stack.enter_async_context(http.stream("POST", "/v1/completions", json=body))


async def test_64_slow_requests_are_in_the_engines_at_once_and_the_bound_is_ours(
    running: Fleet,
) -> None:
    def inside() -> int:
        loads = [entry["load"] for entry in running.adapters()["replicas"]]
        return sum(load["running"] + load["waiting"] for load in loads)

    limits = httpx.Limits(max_connections=None)
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=running.url, limits=limits, timeout=ANSWER_S)
        )
        opening = [asyncio.create_task(open_stream(http, stack)) for _ in range(64)]
        await asyncio.to_thread(eventually, lambda: inside() == 64, "64 are in the engines")
        more = [asyncio.create_task(open_stream(http, stack)) for _ in range(80)]
        refused = []
        for task in asyncio.as_completed(more, timeout=ANSWER_S):
            answer = await task
            # HAProxy gives a client 5 s to send its request, which a busy machine may not keep to.
            if answer.status_code not in (200, 408):
                refused.append(answer)
            # Some of the first may have ended meanwhile, on a slow machine.
            if len(refused) >= 10:
                break
        assert await asyncio.to_thread(inside) <= 2 * (ROWS + QUEUE)
        for answer in refused:
            assert answer.status_code == 429
            assert "retry-after" in answer.headers
            await answer.aread()
            assert answer.json()["error"]["code"] == "queue_full"
        assert all(answer.headers.get("x-lorafleet-replica") for answer in refused)
        for task in [*opening, *more]:
            task.cancel()
        await asyncio.gather(*opening, *more, return_exceptions=True)
    # The clients are gone, so their requests must leave the engines at once.
    await asyncio.to_thread(eventually, lambda: inside() == 0, "the engines are empty")


async def keep_asking(
    http: httpx.AsyncClient, model: str, enough: asyncio.Event, log: list[tuple[float, bool]]
) -> None:
    while not enough.is_set():
        body = {"model": model, "prompt": "hello", "max_tokens": 24, "ignore_eos": True}
        try:
            answer = await http.post("/v1/completions", json=body)
            log.append((time.monotonic(), answer.status_code == 200))
        except httpx.HTTPError:
            log.append((time.monotonic(), False))


async def test_a_killed_replica_costs_only_what_it_was_running(running: Fleet) -> None:
    before = running.replicas()
    victim = before[0]
    store = Redis.from_url(f"unix://{running.directory}/redis/redis.sock", decode_responses=True)

    def residencies_of(replica: ReplicaProcess) -> list[str]:
        return list(store.scan_iter(f"lf:default:residency:{replica.id}:*"))

    assert [0 < store.pttl(key) <= LEASE_S * 1000 for key in residencies_of(victim)] == [True]
    models = ["tiny", "a0", "a1", "a2"] * 2
    log: list[tuple[float, bool]] = []
    async with httpx.AsyncClient(base_url=running.url, timeout=ANSWER_S) as http:
        enough = asyncio.Event()
        clients = [asyncio.create_task(keep_asking(http, m, enough, log)) for m in models]
        await until(lambda: len(log) > 2 * len(models))
        killed_s = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        gone = lambda: not residencies_of(victim)  # noqa: E731
        await asyncio.to_thread(eventually, gone, "the dead replica's residency has run out")
        # The other replica goes on.
        gone_s = time.monotonic()
        await until(lambda: sum(at_s > gone_s for at_s, good in log if good) > len(models))
        enough.set()
        await asyncio.gather(*clients)
    failures = [at_s - killed_s for at_s, good in log if not good]
    assert len(failures) <= len(models), f"{len(failures)} failed: {failures}"
    assert all(at_s >= 0 for at_s in failures)

    def returned() -> list[ReplicaProcess] | None:
        now = running.replicas()
        pages = {entry["id"] for entry in running.adapters()["replicas"]}
        return now if len(now) == 2 and pages == {replica.id for replica in now} else None

    now = await asyncio.to_thread(eventually, returned, "two replicas again", START_S)
    assert victim.id not in {replica.id for replica in now}
    for name in NAMES:
        answer = running.complete(name)
        assert answer.status_code == 200, f"{answer.text} {answer.headers}"
    right = lambda: equals_engines(running, now)  # noqa: E731
    await asyncio.to_thread(eventually, right, "residency is right after the return")
    store.close()


def test_haproxy_listens_on_this_machine_only(running: Fleet) -> None:
    haproxy = [process for process in running.processes() if process.name() == "haproxy"]
    listening = [c.laddr for process in haproxy for c in process.net_connections("tcp")]
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_it_stops_quickly_and_leaves_nothing(running: Fleet) -> None:
    """The last test of this file: it ends the fleet."""
    status, took_s, left = running.stop(signal.SIGINT)
    assert (status, left) == (0, [])
    assert took_s < 30  # Serve's default drain time
    dtype, memory, ready = running.output().splitlines()
    assert dtype == "lorafleet: dtype: float32 on cpu"
    assert memory.startswith("lorafleet: memory: ") and "(2 of rank 8)" in memory
    assert ready == f"ready: {running.url}/v1"
