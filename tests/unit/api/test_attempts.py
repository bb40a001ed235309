"""A request outlives the first engine that ends under it. The second end refuses it."""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import EngineFailed, EngineGone, RetriesSpent
from replica.api import attempts
from replica.api.attempts import KEPT_S, LocalSuspects, RetryBudget
from replica.api.server import build_app
from replica.scheduling.request import Delta, NewRequest
from tests.serving import ADAPTER, BASE, CONFIG, Book, app_with, client_of, text
from tests.stub_engine import StubEngine


def died(death: str) -> EngineFailed:
    error = EngineFailed("the engine's process ended while the request ran")
    error.death = death
    return error


class DyingEngine(StubEngine):
    """The first `deaths` requests fail after `fail_after` tokens, with `error` if it is given."""

    def __init__(self, deaths: int, error: EngineFailed | None = None) -> None:
        super().__init__()
        self.deaths, self.error = deaths, error

    async def generate(self, request: NewRequest) -> AsyncGenerator[Delta, None]:
        dies = len(self.seen) < self.deaths
        self.fail = (self.error or died(str(len(self.seen)))) if dies else None
        async with aclosing(super().generate(request)) as deltas:
            async for delta in deltas:
                yield delta


def ask(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": BASE, "prompt": "hi", "max_tokens": 3, **fields}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_without_a_byte_runs_again_on_the_next_engine(stream: bool) -> None:
    engine = DyingEngine(1)
    if not stream:
        engine.fail_after = 2  # tokens of a whole answer are no bytes yet
    path, body = ask(stream=stream)
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(path, json=body)
        engine.deaths = 0
        undisturbed = await client.post(path, json=body)
    assert (answer.status_code, len(engine.seen)) == (200, 3)
    if not stream:
        assert answer.json()["choices"] == undisturbed.json()["choices"]
    else:
        assert answer.text.count("data: ") == undisturbed.text.count("data: ")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_second_death_refuses_the_request_and_no_other(stream: bool) -> None:
    engine = DyingEngine(2)
    path, body = ask(stream=stream)
    async with client_of(await app_with(engine)) as client:
        answers = [await client.post(path, json=body) for _ in range(2)]
        other = await client.post(path, json={**body, "prompt": "ho"})
        named = await client.post(path, json={**body, "model": ADAPTER.name})
    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(400, "poisoned")] * 2
    assert (other.status_code, named.status_code) == (200, 200)
    assert len(engine.seen) == 4, "a poisoned request reached the engine"


async def test_where_haproxy_asks_another_replica_the_first_death_is_a_502() -> None:
    engine = DyingEngine(1)
    path, body = ask()
    config = replace(CONFIG, elsewhere_bytes=200)
    async with client_of(await app_with(engine, config=config)) as client:
        answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
    assert len(engine.seen) == 1


async def test_of_a_long_queue_only_about_a_batch_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "ELSEWHERE_MAX", 3)
    engine = DyingEngine(10, died("one"))
    path, body = ask()
    config = replace(CONFIG, elsewhere_bytes=200)
    async with client_of(await app_with(engine, config=config)) as client:
        bodies = [{**body, "prompt": f"request {n}"} for n in range(10)]
        asked = (client.post(path, json=each) for each in bodies)
        statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
        engine.deaths, engine.error = 100, died("another")
        later = await client.post(path, json=body)
    assert statuses.count(502) == 3
    assert statuses.count(200) == 7
    assert later.status_code == 502


async def test_a_body_that_haproxy_no_longer_has_whole_runs_again_here() -> None:
    engine = DyingEngine(1)
    path, body = ask(user="u" * 200)
    config = replace(CONFIG, elsewhere_bytes=200)
    async with client_of(await app_with(engine, config=config)) as client:
        assert (await client.post(path, json=body)).status_code == 200


async def test_a_death_in_mid_stream_is_an_event_and_counts() -> None:
    engine = DyingEngine(1)
    engine.fail_after = 1
    path, body = ask(stream=True)
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(path, json=body)
        assert '"engine_failed"' in answer.text.strip().split("\n\n")[-1]
        engine.deaths, engine.fail_after = 2, 0
        again = await client.post(path, json=body)
    assert again.json()["error"]["code"] == "poisoned"


@pytest.mark.parametrize("elsewhere_bytes", [0, 200])
async def test_beyond_the_retry_budget_a_death_is_a_503_that_haproxy_does_not_send_again(
    elsewhere_bytes: int,
) -> None:
    engine = DyingEngine(10**6)
    engine.config = replace(engine.config, batch_rows_max=1, queue_max=1)
    path, body = ask()
    config = replace(CONFIG, elsewhere_bytes=elsewhere_bytes)
    again = 502 if elsewhere_bytes else 400  # there it dies again, and is poisoned
    async with client_of(await app_with(engine, config=config)) as client:
        numbers = itertools.count()

        async def status() -> int:
            answer = await client.post(path, json={**body, "prompt": f"request {next(numbers)}"})
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "retries_spent"
                assert "retry-after" in answer.headers
            return answer.status_code

        assert [await status() for _ in range(3)] == [again, again, 503]
        engine.deaths = 0
        assert {await status() for _ in range(5)} == {200}  # a fifth of these may run again
        engine.deaths = 10**6
        assert [await status() for _ in range(2)] == [again, 503]


def test_a_quiet_time_saves_no_more_than_one_engine_holds() -> None:
    budget = RetryBudget(2)
    for _ in range(1000):
        budget.asked()
    budget.spend()
    budget.spend()
    with pytest.raises(RetriesSpent):
        budget.spend()


async def test_without_an_engine_nothing_counts() -> None:
    engine = DyingEngine(3, EngineGone("the engine's process is gone"))
    path, body = ask()
    async with client_of(await app_with(engine)) as client:
        answers = [await client.post(path, json=body) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [502, 502, 502, 200]


async def test_a_version_that_is_gone_by_then_fails_with_the_death() -> None:
    engine, book = DyingEngine(1), Book(ADAPTER)
    app = await app_with(engine, book)
    path, body = ask(model=ADAPTER.name)
    generate = engine.generate

    def forgetting(request: NewRequest) -> AsyncGenerator[Delta, None]:
        if engine.seen:
            engine._registered.clear()
        return generate(request)

    engine.generate = forgetting  # type: ignore[method-assign]
    async with client_of(app) as client:
        answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")


async def test_a_client_that_leaves_between_two_attempts_leaves_nothing_behind() -> None:
    engine = DyingEngine(1)
    path, body = ask()
    waiting = asyncio.Event()

    class Slow(LocalSuspects):
        async def died(self, digest: str, death: str) -> int:
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError

    app = build_app(engine, Book(), text(), CONFIG, Slow())
    async with client_of(app) as client:
        asking = asyncio.create_task(client.post(path, json=body))
        await waiting.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert (engine.running, app.active) == ({}, 0)


async def test_one_end_of_an_engine_is_one_death_for_all_equal_requests() -> None:
    engine = DyingEngine(2, died("one"))
    path, body = ask()
    config = replace(CONFIG, elsewhere_bytes=200)
    async with client_of(await app_with(engine, config=config)) as client:
        answers = [await client.post(path, json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [502, 502, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_clears_what_an_engine_ended_under(stream: bool) -> None:
    """Two engines ended under a common request in ten minutes, for other reasons."""
    engine = DyingEngine(1)
    path, body = ask(stream=stream)
    async with client_of(await app_with(engine)) as client:
        assert (await client.post(path, json=body)).status_code == 200
        engine.deaths = 3
        assert (await client.post(path, json=body)).status_code == 200
    assert len(engine.seen) == 4


async def test_deaths_are_forgotten_after_a_while() -> None:
    now_s = 100.0
    suspects = LocalSuspects(lambda: now_s)
    assert await suspects.died("a", "1") == 1
    now_s += KEPT_S - 1
    assert await suspects.died("a", "1") == 1
    assert await suspects.died("a", "2") == 2
    assert suspects.poisoned("a") and not suspects.poisoned("b")
    now_s += KEPT_S + 1
    assert not suspects.poisoned("a")
    assert not suspects.any
    assert await suspects.died("a", "3") == 1
