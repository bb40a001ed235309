"""vLLM's `prompt_logprobs`, `echo` with logprobs as lm_eval uses it, and OpenAI's `best_of`."""

import json
from typing import Any

import pytest

from replica.api import call
from replica.api.logprobs import prompt_offsets
from replica.scheduling.request import Delta, PromptResult, TokenLogprobs
from tests.serving import BASE, app_with, client_of, text, tokens_of
from tests.stub_engine import StubEngine

PROMPT = "héllo"
TOKENS = tokens_of(PROMPT)
NAMES = [text().token_bytes(token).decode(errors="replace") for token in TOKENS]


async def ask(engine: StubEngine, path: str = "completions", **fields: Any) -> dict[str, Any]:
    body = {"model": BASE, "max_tokens": 2, **fields}
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_each_prompt_token_but_the_first_has_its_logprobs() -> None:
    engine = StubEngine()
    found = await ask(engine, prompt=[[*TOKENS], [7, 8]], prompt_logprobs=1, n=2)
    assert [request.sampling.prompt_logprobs for request in engine.seen] == [1] * 4
    choices = found["choices"]
    for choice, tokens in zip(choices, [TOKENS, TOKENS, [7, 8], [7, 8]], strict=True):
        first, *rest = choice["prompt_logprobs"]
        assert first is None and choice["logprobs"] is None
        for token, entry in zip(tokens[1:], rest, strict=True):
            name = text().token_bytes(token).decode(errors="replace")
            assert entry == {str(token): {"logprob": -0.5, "rank": 1, "decoded_token": name}}
    assert "prompt_logprobs" not in (await ask(StubEngine(), prompt="a"))["choices"][0]


async def test_a_chat_has_them_beside_its_choices() -> None:
    messages = [{"role": "user", "content": "hi"}]
    found = await ask(StubEngine(), "chat/completions", messages=messages, prompt_logprobs=0)
    assert found["prompt_logprobs"][0] is None
    assert len(found["prompt_logprobs"]) == found["usage"]["prompt_tokens"]


async def test_a_token_that_is_not_among_the_likeliest_comes_first() -> None:
    engine = StubEngine()
    own = TokenLogprobs(9, -4.0, ((5, -0.1), (6, -1.0), (7, -2.0)), rank=12)
    spoil(engine, (own,))
    found = await ask(engine, prompt=[8, 9], prompt_logprobs=2)
    _, entry = found["choices"][0]["prompt_logprobs"]
    assert [(token, e["logprob"], e["rank"]) for token, e in entry.items()] == [
        ("9", -4.0, 12),
        ("5", -0.1, 1),
        ("6", -1.0, 2),
    ]


def spoil(engine: StubEngine, logprobs: tuple[TokenLogprobs, ...]) -> None:
    """Replaces what the engine tells of prompts."""
    right = engine._advance

    def wrong(row: Any) -> Delta:
        delta = right(row)
        return delta._replace(prompt=PromptResult(logprobs) if delta.prompt is not None else None)

    engine._advance = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_covers_prompt_and_answer(stream: bool) -> None:
    engine, body = StubEngine(script=(70, 71)), {"prompt": PROMPT, "echo": True, "logprobs": 1}
    whole = await ask(engine, **body)
    assert engine.seen[0].sampling.prompt_logprobs == 1
    (choice,) = whole["choices"]
    if stream:
        async with client_of(await app_with(StubEngine(script=(70, 71)))) as client:
            sent = {"model": BASE, "max_tokens": 2, "stream": True, **body}
            answer = await client.post("/v1/completions", json=sent)
        events = [event for event in answer.text.split("\n\n") if event.startswith("data: {")]
        assert len(events) == 2
        choice = join(events)
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert logprobs["tokens"][: len(TOKENS)] == NAMES
    assert logprobs["token_logprobs"] == [None, *[-0.5] * (len(TOKENS) + 1)]
    assert logprobs["top_logprobs"] == [None, *({n: -0.5} for n in logprobs["tokens"][1:])]
    assert logprobs["text_offset"][: len(TOKENS)] == [0, 1, 2, 2, 3, 4]
    assert logprobs["text_offset"][len(TOKENS) :] == [5, 6]


def join(events: list[str]) -> dict[str, Any]:
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    keys = choices[0]["logprobs"]
    logprobs = {key: [each for c in choices for each in c["logprobs"][key]] for key in keys}
    return {"text": "".join(c["text"] for c in choices), "logprobs": logprobs}


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_what_lm_eval_sends_for_a_multiple_choice(max_tokens: int) -> None:
    """It drops the last token itself if one was generated."""
    prompts = [[10, 11, 12], [10, 11, 13, 14]]
    sent = {"prompt": prompts, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1}
    found = await ask(StubEngine(), **sent, max_tokens=max_tokens)
    for choice, prompt in zip(found["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        count = len(prompt) + max_tokens
        assert [len(each) for each in logprobs.values()] == [count] * 4
        assert choice["text"][: len(prompt)] == text().decode(prompt)
        assert choice["finish_reason"] == "length"
    usage = {key: found["usage"][key] for key in ("prompt_tokens", "completion_tokens")}
    assert usage == {"prompt_tokens": 7, "completion_tokens": 2 * max_tokens}


async def test_echo_of_nothing_more_than_the_prompt() -> None:
    engine = StubEngine()
    found = await ask(engine, prompt=PROMPT, echo=True, max_tokens=0)
    assert found["choices"][0]["text"] == PROMPT and found["choices"][0]["logprobs"] is None
    assert engine.seen[0].sampling.prompt_logprobs is None


async def test_echo_repeats_what_is_left_of_a_truncated_prompt() -> None:
    sent = {"prompt": PROMPT, "echo": True, "logprobs": 0, "truncate_prompt_tokens": 2}
    (choice,) = (await ask(StubEngine(), **sent, max_tokens=0))["choices"]
    assert choice["text"] == PROMPT[-2:]
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_a_token_that_the_tokenizer_adds_takes_no_space() -> None:
    begin = next(iter(sorted(text().special)))
    assert prompt_offsets(text(), (begin, *TOKENS), PROMPT) == [0, 0, 1, 2, 2, 3, 4]
    name = text().token_bytes(begin).decode()
    assert prompt_offsets(text(), (begin, TOKENS[0]), name + "h") == [0, len(name)]


async def test_more_logprobs_than_a_body_may_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call, "PROMPT_LOGPROBS_MAX", 23)
    async with client_of(await app_with(StubEngine())) as client:
        body = {"model": BASE, "prompt": [[7, 8, 9], [7, 8, 9]], "prompt_logprobs": 3}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt_logprobs"
        body["prompt_logprobs"] = 2
        assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_the_likeliest_of_many_are_given_best_first() -> None:
    engine = StubEngine()
    right, wanted = engine._advance, {"0": -2.0, "1": -1.0, "2": -3.0, "3": -0.1, "4": -5, "5": -4}

    def by_choice(row: Any) -> Delta:
        delta, n = right(row), row.request.id.rpartition("-")[2]
        token = 70 + int(n)
        # The mean decides: the sum of a long answer's would be the least.
        logprob = wanted[n] * (0.5 if row.sent == 1 else 1.5)
        return delta._replace(tokens=(token,), logprobs=(TokenLogprobs(token, logprob, ()),))

    engine._advance = by_choice  # type: ignore[method-assign]
    found = await ask(engine, prompt=["a", "b"], best_of=3, n=2)
    assert [request.sampling.logprobs for request in engine.seen] == [0] * 6
    chosen = ("71", "70", "73", "75")
    texts = [text().decode([int(n)] * 2) for n in chosen]
    assert [(c["index"], c["text"]) for c in found["choices"]] == list(enumerate(texts))
    assert all(choice["logprobs"] is None for choice in found["choices"])
    assert found["usage"]["completion_tokens"] == 12
