"""Requests end to end, through a fleet of two replicas started by the command line."""

import asyncio
import contextlib
import gzip
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from redis import Redis

from replica.serving.process import AGAIN_S
from tests.fleet import ANSWER_S, START_S, Fleet, ReplicaProcess, eventually, fleet
from tests.models import make_adapter, make_model
from tests.until import until

pytestmark = pytest.mark.ray

NAMES = tuple(f"a{i}" for i in range(5))
LEASE_S = 3.0
ROWS, QUEUE = 16, 40
PAGE = "https://chat.example.com"


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
    arguments += ["--allowed-origin", PAGE]
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
    """HAProxy passes on 256 KiB of a body. It truncates chunked bodies without saying so."""
    body = b'{"user": "' + b"x" * 300_000 + b'", "prompt": "hello", "max_tokens": 4, '
    body += b'"temperature": 0, "model": "a1"}'
    expected = running.complete("a1", temperature=0).json()["choices"][0]["text"]
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:70_000], body[70_000:]])):
        url = f"{running.url}/v1/completions"
        answer = httpx.post(url, content=content, headers=headers, timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected


def test_each_replica_tells_of_all(running: Fleet) -> None:
    replicas = {replica.id: f"http://127.0.0.1:{replica.port}" for replica in running.replicas()}
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    for owner, url in replicas.items():
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S).json()
        for asked in (*replicas.values(), running.url):
            timeline = httpx.get(f"{asked}/v1/requests/{answer['id']}", timeout=ANSWER_S)
            assert timeline.status_code == 200, timeline.text
            assert timeline.json()["replica"] == owner
    text = httpx.get(f"{running.url}/metrics/fleet", timeout=ANSWER_S).text
    assert set(re.findall(r'^lorafleet_up{replica="(.*)"} 1$', text, re.M)) == replicas.keys()
    assert set(re.findall(r'^lorafleet_steps_total{replica="(.*)"} ', text, re.M)) == set(replicas)


async def test_haproxy_passes_on_what_the_api_takes(running: Fleet) -> None:
    body: dict[str, Any] = {"model": "a1", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    expected = running.complete("a1", temperature=0).json()["choices"][0]["text"]
    packed = gzip.compress(json.dumps({**body, "unheard": 1}).encode())
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json", "Origin": PAGE}
    async with httpx.AsyncClient(base_url=running.url, timeout=ANSWER_S) as http:
        answer = await http.post("/v1/completions/", content=packed, headers=headers)
        asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        preflight = await http.options("/v1/completions", headers=asks)
    assert answer.json()["choices"][0]["text"] == expected
    assert answer.headers["x-lorafleet-ignored-fields"] == "unheard"
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)


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
    def holders(name: str) -> set[str]:
        entry = next(e for e in running.adapters()["data"] if e["id"] == name)
        return {r for r, held in entry["residency"].items() if held["tier"] == "device"}

    def stays(name: str) -> bool:
        running.complete(name)
        resident = eventually(lambda: holders(name), f"{name} is resident")
        # Those before may have left it on both, which then take turns.
        return {running.complete(name).headers["x-lorafleet-replica"] for _ in range(3)} <= resident

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


def two_without(running: Fleet, victim: ReplicaProcess) -> list[ReplicaProcess]:
    """Waits for the two replicas that are there once the victim has been replaced."""

    def found() -> list[ReplicaProcess] | None:
        now = running.replicas()
        ids = {replica.id for replica in now}
        pages = {entry["id"] for entry in running.adapters()["replicas"]}
        return now if len(now) == 2 and pages == ids and victim.id not in ids else None

    replicas: list[ReplicaProcess] = eventually(found, "two replicas again", START_S)
    return replicas


async def test_a_killed_replica_costs_no_request_without_a_byte(running: Fleet) -> None:
    """These answers are not streamed, so all of them are without a byte until they are whole."""
    before = running.replicas()
    victim = before[0]
    store = Redis.from_url(f"unix://{running.directory}/redis/redis.sock", decode_responses=True)

    def residencies_of(replica: ReplicaProcess) -> set[str]:
        return set(store.scan_iter(f"lf2:default-*:residency:{replica.id}:*"))

    def leased() -> bool:
        left_ms = [store.pttl(key) for key in residencies_of(victim)]
        return len(left_ms) == 1 and 0 < left_ms[0] <= LEASE_S * 1000

    await asyncio.to_thread(eventually, leased, "its residency has a lease")
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
    assert failures == []

    now = await asyncio.to_thread(two_without, running, victim)
    for name in NAMES:
        answer = running.complete(name)
        assert answer.status_code == 200, f"{answer.text} {answer.headers}"
    right = lambda: equals_engines(running, now)  # noqa: E731
    await asyncio.to_thread(eventually, right, "residency is right after the return")
    store.close()


async def test_a_stopped_engine_costs_only_its_own_streams_and_starts_again(
    running: Fleet,
) -> None:
    def engines() -> list[psutil.Process]:
        processes = running.processes()
        return [p for p in processes if "replica.engine.engine_process" in p.cmdline()]

    def stalled() -> list[int]:
        return [entry["load"]["stalled"] for entry in running.adapters()["replicas"]]

    assert stalled() == [0, 0]
    victim = engines()[0]
    models = ["tiny", "a0", "a1", "a2"] * 2
    log: list[tuple[float, bool]] = []
    async with httpx.AsyncClient(base_url=running.url, timeout=ANSWER_S) as http:
        enough = asyncio.Event()
        clients = [asyncio.create_task(keep_asking(http, m, enough, log)) for m in models]
        await until(lambda: len(log) > 2 * len(models))
        victim.suspend()
        gone = lambda: not victim.is_running() and len(engines()) == 2  # noqa: E731
        await asyncio.to_thread(eventually, gone, "another engine runs")
        enough.set()
        await asyncio.gather(*clients)
    assert all(good for _, good in log)
    await asyncio.to_thread(eventually, lambda: stalled() == [0, 0], "both serve")


def test_a_replica_whose_engine_keeps_ending_is_replaced(running: Fleet) -> None:
    victim = running.replicas()[0]
    process = psutil.Process(victim.pid)

    def gone() -> bool:
        with contextlib.suppress(psutil.Error):
            for child in process.children():
                if "replica.engine.engine_process" in child.cmdline():
                    child.kill()
            return process.status() == psutil.STATUS_ZOMBIE
        return not process.is_running()

    eventually(gone, "Serve ends the replica", START_S)
    two_without(running, victim)
    assert running.complete("tiny").status_code == 200


def test_haproxy_listens_on_this_machine_only(running: Fleet) -> None:
    listening = set()
    for process in running.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that a change of targets has replaced
            if process.name() == "haproxy":
                listening |= {each.laddr.ip for each in process.net_connections("tcp")}
    assert listening == {"127.0.0.1"}


async def test_ctrl_c_lets_a_stream_end_and_leaves_nothing(running: Fleet) -> None:
    """The last test of this file: it ends the fleet."""
    body = {"model": "a0", "prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=ANSWER_S) as http,
        http.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.aiter_lines()
        await anext(lines)
        ending = asyncio.create_task(asyncio.to_thread(running.stop, signal.SIGINT))
        rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
    status, took_s, left = await ending
    assert (status, left) == (0, [])
    assert took_s < 30  # Serve's default drain time
    lines = running.output().splitlines()  # on a busy machine some come again, with the time taken
    said = [line for line in lines if not re.search(r": \d+ s$", line)]
    ray, dtype, memory, replicas, ready, stopping = said
    assert (ray, replicas) == ("lorafleet: starting Ray", "lorafleet: starting 2 replicas of tiny")
    assert dtype == "lorafleet: dtype: float32 on cpu"
    assert memory.startswith("lorafleet: memory: ") and "(2 of rank 8)" in memory
    assert ready == f"ready: {running.url}/v1"
    assert stopping.startswith("lorafleet: stopping: what runs may end, for 600 s at most")


async def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing(files: Path, tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    # So many rows take longer than the rest of the test on any machine.
    many = {**body, "n": 32}
    with fleet(["--model", str(files / "tiny"), "--device", "cpu"], tmp_path) as running:
        async with (
            httpx.AsyncClient(base_url=running.url, timeout=ANSWER_S) as http,
            http.stream("POST", "/v1/completions", json=many) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            running.process.send_signal(signal.SIGINT)

            async def refused() -> bool:
                one = {**body, "max_tokens": 1}
                try:
                    answer = await http.post("/v1/completions", json=one, timeout=1.0)
                except httpx.ReadTimeout:
                    return False  # it waits for one of so many rows to end
                except httpx.HTTPError:
                    return True
                assert answer.status_code in (200, 503)
                if answer.status_code == 503:
                    code = answer.json()["error"]["code"]
                    assert code in ("unavailable", "shutting_down"), answer.text
                return answer.status_code == 503

            await until(refused)  # the first one has been heard
            heard_s = time.monotonic()
            await until(lambda: time.monotonic() > heard_s + AGAIN_S)
            status, _, left = await asyncio.to_thread(running.stop, signal.SIGINT)
            with pytest.raises(httpx.HTTPError):
                async for _ in lines:
                    pass
    assert (status, left) == (1, [])


async def test_a_stream_that_outlasts_the_drain_time_ends_with_an_error(
    files: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("drain_s: 1.0\nengine: {hang_s: 600.0}\n")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    arguments = ["--model", str(files / "tiny"), "--device", "cpu", "--config", str(settings)]
    with fleet(arguments, tmp_path) as running:
        (engine,) = [
            p for p in running.processes() if "replica.engine.engine_process" in p.cmdline()
        ]
        async with (
            httpx.AsyncClient(base_url=running.url, timeout=ANSWER_S) as http,
            http.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            engine.suspend()
            stopping = asyncio.create_task(asyncio.to_thread(running.stop, signal.SIGINT))
            rest = [line async for line in lines if line]
        status, _, left = await stopping
    assert (status, left) == (0, [])
    assert '"shutting_down"' in rest[-1]


def test_the_end_of_rays_control_store_is_said(files: Path, tmp_path: Path) -> None:
    with fleet(["--model", str(files / "tiny"), "--device", "cpu"], tmp_path) as running:
        (store,) = [p for p in running.processes() if p.name() == "gcs_server"]
        store.kill()
        eventually(lambda: "(gcs_server) has ended" in running.output(), "it is said")
        for _ in range(4):  # HAProxy asks two routers in turn, and may ask each for the first time
            answer = running.complete("tiny")
            assert answer.status_code == 200, answer.text
        for process in [*running.processes(), running.process]:
            process.kill()
        running.process.wait()
