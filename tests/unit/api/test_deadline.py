"""A request is of no use after the deadline that its client names."""

from typing import Any

import pytest

from replica.api.asgi import DEADLINE_HEADER
from replica.scheduling.request import Delta
from tests.serving import BASE, app_with, client_of
from tests.stub_engine import Row, StubEngine

PATH = "/v1/completions"


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": "hi", "max_tokens": 5, **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_request_whose_deadline_passes_leaves_the_engine(stream: bool, n: int) -> None:
    engine = StubEngine()
    engine.hold = True
    async with client_of(await app_with(engine)) as client:
        body = ask(stream=stream, n=n)
        answer = await client.post(PATH, json=body, headers={DEADLINE_HEADER: "500"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert engine.running == {}
    assert set(engine.ended.values()) == {"cancelled"}


class StallingEngine(StubEngine):
    """Gives no more tokens after three."""

    def _advance(self, row: Row) -> Delta:
        self.hold = row.sent == 2
        return super()._advance(row)


async def test_in_mid_stream_it_is_the_last_event() -> None:
    engine = StallingEngine()
    async with client_of(await app_with(engine)) as client:
        body = ask(stream=True)
        answer = await client.post(PATH, json=body, headers={DEADLINE_HEADER: "1000"})
    events = answer.text.strip().split("\n\n")
    assert answer.status_code == 200 and len(events) > 1
    assert '"deadline_exceeded"' in events[-1]
    assert engine.running == {}


async def test_a_deadline_that_has_passed_is_refused_without_the_engine() -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(PATH, json=ask(), headers={DEADLINE_HEADER: "0"})
    assert (answer.status_code, engine.seen) == (504, [])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_within_its_deadline_is_whole(stream: bool) -> None:
    async with client_of(await app_with(StubEngine())) as client:
        body = ask(stream=stream)
        plain = await client.post(PATH, json=body)
        answer = await client.post(PATH, json=body, headers={DEADLINE_HEADER: "60000"})
    if stream:
        assert answer.text.count("data: ") == plain.text.count("data: ")
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("text", ["soon", "-5", "1.5", "", "9" * 13])
async def test_a_deadline_that_is_no_number_of_milliseconds_is_refused(text: str) -> None:
    async with client_of(await app_with(StubEngine())) as client:
        answer = await client.post(PATH, json=ask(), headers={DEADLINE_HEADER: text})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == DEADLINE_HEADER
