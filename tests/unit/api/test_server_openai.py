"""The API as OpenAI's client sees it over a real connection, whole and streamed."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from cluster.errors import EngineFailed
from replica.api.access import Rules
from replica.api.server import Server
from tests.serving import ADAPTER, BASE, CONFIG, Book, app_with, client_of, live, text
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S

ASK: Any = [{"role": "user", "content": "hi"}]
PROSE = "Hällo wörld, this goes on. "
VERSE = "Roses are red; "


async def scripted(**options: Any) -> StubEngine:
    base, adapter = await text().encode(PROSE), await text().encode(VERSE)
    return StubEngine(scripts={None: base, ADAPTER.digest: adapter}, **options)


@pytest.fixture
async def engine() -> StubEngine:
    return await scripted()


@pytest.fixture
async def app(engine: StubEngine) -> Server:
    return await app_with(engine)


@pytest.fixture
async def client(app: Server) -> AsyncIterator[AsyncOpenAI]:
    async with live(app) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


@pytest.mark.parametrize(("model", "prose"), [(BASE, PROSE), (ADAPTER.name, VERSE)])
async def test_chat(client: AsyncOpenAI, model: str, prose: str) -> None:
    answer = await client.chat.completions.create(model=model, messages=ASK, max_tokens=14)
    (choice,) = answer.choices
    assert answer.model == model
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content == prose.encode()[:14].decode()
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6  # <|begin|><|user|>hi<|end|><|assistant|>
    assert answer.usage.completion_tokens == 14
    assert answer.usage.total_tokens == 20


@pytest.mark.parametrize(("model", "prose"), [(BASE, PROSE), (ADAPTER.name, VERSE)])
async def test_chat_streamed(client: AsyncOpenAI, model: str, prose: str) -> None:
    stream = await client.chat.completions.create(
        model=model, messages=ASK, max_tokens=14, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.model for chunk in chunks} == {model}
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(piece or "" for piece in pieces) == prose.encode()[:14].decode()
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize(("model", "prose"), [(BASE, PROSE), (ADAPTER.name, VERSE)])
async def test_completion(client: AsyncOpenAI, model: str, prose: str) -> None:
    answer = await client.completions.create(model=model, prompt="hi")
    (choice,) = answer.choices
    assert answer.object == "text_completion"
    assert choice.text == (2 * prose).encode()[:16].decode()  # The default is 16 tokens.
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 16)


@pytest.mark.parametrize(("model", "prose"), [(BASE, PROSE), (ADAPTER.name, VERSE)])
async def test_completion_streamed(client: AsyncOpenAI, model: str, prose: str) -> None:
    stream = await client.completions.create(model=model, prompt="hi", max_tokens=14, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == prose.encode()[:14].decode()
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_the_engine_gets_the_adapters_digest(client: AsyncOpenAI, engine: StubEngine) -> None:
    await client.completions.create(model=ADAPTER.name, prompt="hi", max_tokens=1)
    await client.completions.create(model=BASE, prompt="hi", max_tokens=1)
    assert [request.digest for request in engine.seen] == [ADAPTER.digest, None]
    assert len({request.id for request in engine.seen}) == 2


async def test_two_choices_have_their_own_seeds_and_share_the_prompt(
    client: AsyncOpenAI, engine: StubEngine
) -> None:
    answer = await client.chat.completions.create(
        model=BASE, messages=ASK, max_tokens=5, n=2, seed=7
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [request.sampling.seed for request in engine.seen] == [7, 8]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 10)


async def test_a_first_token_without_a_whole_character_is_told() -> None:
    """Who measures takes the time of the first event."""
    app = await app_with(StubEngine(scripts={None: await text().encode("ä€ ")}))
    async with live(app) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = await client.completions.create(
            model=BASE, prompt="hi", max_tokens=12, n=2, stream=True
        )
        chunks = [chunk.choices[0] async for chunk in stream]
    for index in (0, 1):
        own = [choice.text for choice in chunks if choice.index == index]
        # Six bytes; then only what completes a character has an event, and the last token.
        assert own == ["", "ä", "€", " ", "ä", "€", " "]


async def test_two_choices_streamed_come_interleaved(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=BASE, messages=ASK, max_tokens=5, n=2, stream=True
    )
    texts = {0: "", 1: ""}
    order = []
    async for chunk in stream:
        order.append(chunk.choices[0].index)
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "Häll", 1: "Häll"}
    assert order != sorted(order)


async def test_prompts_of_every_shape(client: AsyncOpenAI, engine: StubEngine) -> None:
    hi = list(await text().encode("hi"))
    shapes: list[Any] = ["hi", ["hi", "hi"], hi, [hi, hi, hi]]
    for prompt in shapes:
        answer = await client.completions.create(model=BASE, prompt=prompt, max_tokens=2, n=2)
        count = len(prompt) if isinstance(prompt[0], list) or prompt == ["hi", "hi"] else 1
        assert [choice.index for choice in answer.choices] == list(range(2 * count))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 2 * count
        assert answer.usage.completion_tokens == 4 * count
    assert {request.prompt for request in engine.seen} == {tuple(hi)}


async def test_include_usage_adds_a_final_usage_chunk(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=BASE, messages=ASK, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 5)


async def test_usage_with_every_chunk(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=BASE,
        prompt="hi",
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert counts == [1, 2, 3, 3]


async def test_chat_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=BASE, messages=ASK, max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.bytes for entry in logprobs.content] == [[byte] for byte in "Hä".encode()]
    first = logprobs.content[0]
    assert (first.token, first.logprob) == ("H", -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("H", -0.5), ("I", -1.2)]


async def test_chat_logprobs_without_alternatives_and_streamed(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=BASE, messages=ASK, max_tokens=3, logprobs=True, stream=True
    )
    entries = []
    async for chunk in stream:
        if chunk.choices[0].logprobs is not None:
            entries += chunk.choices[0].logprobs.content or []
    assert len(entries) == 3  # One of them for a token without text of its own.
    assert all(entry.top_logprobs == [] for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(client: AsyncOpenAI, stream: bool) -> None:
    answers = await client.completions.create(
        model=ADAPTER.name, prompt="hi", max_tokens=3, logprobs=2, stream=stream
    )
    chunks = [chunk async for chunk in answers] if stream else [answers]
    logprobs = [chunk.choices[0].logprobs for chunk in chunks]
    assert [item for entry in logprobs for item in entry.tokens] == ["R", "o", "s"]
    assert [item for entry in logprobs for item in entry.token_logprobs] == [-0.5] * 3
    assert [item for entry in logprobs for item in entry.text_offset] == [0, 1, 2]
    assert logprobs[0].top_logprobs[0] == {"R": -0.5, "S": -1.2}


async def test_no_logprobs_unless_asked_for(client: AsyncOpenAI, engine: StubEngine) -> None:
    answer = await client.completions.create(model=BASE, prompt="hi", max_tokens=1)
    assert answer.choices[0].logprobs is None
    assert engine.seen[0].sampling.logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_before_it(
    client: AsyncOpenAI, engine: StubEngine, stream: bool
) -> None:
    answers = await client.completions.create(
        model=BASE, prompt="hi", max_tokens=50, stop=["never", "wörld"], stream=stream
    )
    chunks = [chunk async for chunk in answers] if stream else [answers]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hällo "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].stop_reason == "wörld"
    if not stream:
        assert answers.usage.completion_tokens == len("Hällo wörld".encode())
    assert list(engine.ended.values()) == ["cancelled"]


async def test_tokens_after_a_stop_in_the_same_step_do_not_count() -> None:
    engine = await scripted(tokens_per_step=8)
    async with client_of(await app_with(engine)) as client:
        body = {"model": ADAPTER.name, "prompt": "hi", "max_tokens": 40, "stop": "s"}
        body |= {"return_token_ids": True, "logprobs": 0}
        answer = (await client.post("/v1/completions", json=body)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "Ro"
    assert answer["usage"]["completion_tokens"] == 3
    assert choice["token_ids"] == list(await text().encode("Ros"))
    assert len(choice["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize(
    ("options", "answer", "reason"),
    [
        ({"stop": "wö"}, "Hällo ", "wö"),
        ({"stop": "wö", "include_stop_str_in_output": True}, "Hällo wö", "wö"),
        ({"stop": "l", "min_tokens": 6}, "Hällo wör", "l"),
        ({"stop": "zz"}, PROSE.encode()[:20].decode(), None),
        ({"stop_token_ids": ["w"]}, "Hällo ", "w"),
        ({"stop_token_ids": ["w"], "include_stop_str_in_output": True}, "Hällo w", "w"),
    ],
)
async def test_ways_to_stop(options: dict[str, Any], answer: str, reason: str | None) -> None:
    engine = await scripted()
    expected: Any = reason
    if "stop_token_ids" in options:
        (token,) = await text().encode(options["stop_token_ids"][0])
        options = {**options, "stop_token_ids": [token]}
        expected = token
    async with client_of(await app_with(engine)) as client:
        body = {"model": BASE, "prompt": "hi", "max_tokens": 20, **options}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == answer
    assert choice["stop_reason"] == expected
    assert choice["finish_reason"] == ("length" if reason is None else "stop")


async def test_the_end_of_sequence_token_is_counted_and_not_shown() -> None:
    script = (*await text().encode("bye"), 1)
    engine = StubEngine(script=script, eos=frozenset({1}))
    async with client_of(await app_with(engine)) as client:
        body = {"model": BASE, "messages": ASK, "skip_special_tokens": False}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "bye"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert answer["usage"]["completion_tokens"] == 4


async def test_sampling_reaches_the_engine_as_sent() -> None:
    engine = await scripted()
    sent = {"temperature": 0, "top_p": 0.5, "top_k": -1, "seed": -3, "min_tokens": 2}
    sent |= {"ignore_eos": True, "stop_token_ids": [9], "logprobs": True}
    async with client_of(await app_with(engine)) as client:
        body = {"model": BASE, "messages": ASK, "max_completion_tokens": 4, "max_tokens": 9}
        answer = await client.post("/v1/chat/completions", json=body | sent)
    assert answer.status_code == 200
    sampling = engine.seen[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (4, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.seed, sampling.ignore_eos, sampling.logprobs) == (-3, True, 0)
    assert sampling.stop_tokens == {9}


async def test_default_max_tokens() -> None:
    engine = await scripted()
    async with client_of(await app_with(engine)) as client:
        await client.post("/v1/chat/completions", json={"model": BASE, "messages": ASK})
        await client.post("/v1/completions", json={"model": BASE, "prompt": "x" * 120})
    assert [request.sampling.max_tokens for request in engine.seen] == [128 - 6, 8]


async def test_default_max_tokens_is_what_the_kv_pages_leave() -> None:
    engine = StubEngine(capacity_pages=2)  # 32 tokens, less than the context of 128
    async with client_of(await app_with(engine)) as client:
        chat = await client.post("/v1/chat/completions", json={"model": BASE, "messages": ASK})
        for length in (10, 28):
            await client.post("/v1/completions", json={"model": BASE, "prompt": "x" * length})
    assert chat.json()["choices"][0]["finish_reason"] == "length"
    assert [request.sampling.max_tokens for request in engine.seen] == [32 - 6, 16, 4]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "hi", "max_tokens": 31}, ["2 prompt tokens", "31", "33", "32"]),
        ({"prompt": "x" * 32}, ["32 tokens", "32"]),
        ({"prompt": "x" * 10**6}, ["at least", "32"]),
    ],
)
async def test_what_the_kv_pages_cannot_hold_is_refused(
    body: dict[str, Any], words: list[str]
) -> None:
    engine = StubEngine(capacity_pages=2)
    async with client_of(await app_with(engine)) as client:
        answer = await client.post("/v1/completions", json={"model": BASE, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert all(word in error["message"] for word in [*words, "KV capacity"])
    assert engine.seen == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
async def test_token_ids_as_vllm_returns_them(kind: str, stream: bool) -> None:
    engine = await scripted()
    body = {"model": BASE, "max_tokens": 3, "stream": stream, "return_token_ids": True}
    body |= {"messages": ASK} if kind == "chat/completions" else {"prompt": "hi"}
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(f"/v1/{kind}", json=body)
    chunks = events(answer.text) if stream else [answer.json()]
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert tuple(ids) == (await text().encode(PROSE))[:3]
    where = chunks if kind == "chat/completions" else [chunk["choices"][0] for chunk in chunks]
    assert where[0]["prompt_token_ids"] == list(engine.seen[0].prompt)
    assert all("prompt_token_ids" not in later for later in where[1:])


def events(body: str) -> list[dict[str, Any]]:
    *data, done = body.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in data]


async def test_echo_repeats_the_prompt(client: AsyncOpenAI) -> None:
    hi = list(await text().encode("hi "))
    for prompt in ("hi ", hi):
        answer = await client.completions.create(
            model=BASE, prompt=prompt, max_tokens=1, echo=True, stop="hi"
        )
        assert answer.choices[0].text == "hi H"


async def test_content_parts_and_continue_final_message() -> None:
    engine = await scripted()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "so"}]
    body = {"model": BASE, "messages": messages, "max_tokens": 1}
    body |= {"continue_final_message": True, "add_generation_prompt": False}
    async with client_of(await app_with(engine)) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    rendered = text().decode(engine.seen[0].prompt, skip_special_tokens=False)
    assert rendered == "<|begin|><|user|>a\nb<|end|><|assistant|>so"


async def test_models(client: AsyncOpenAI) -> None:
    base, adapter = (await client.models.list()).data
    assert (base.id, adapter.id) == (BASE, ADAPTER.name)
    assert base.model_extra is not None
    assert adapter.model_extra is not None
    assert (base.model_extra["parent"], base.model_extra["root"]) == (None, BASE)
    assert (adapter.model_extra["parent"], adapter.model_extra["root"]) == (BASE, ADAPTER.name)
    assert (await client.models.retrieve(ADAPTER.name)).id == ADAPTER.name


async def test_errors_raise_the_clients_exceptions(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nobody", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(model=BASE, messages=ASK, temperature=-9)


async def test_the_client_sees_an_error_in_mid_stream(
    client: AsyncOpenAI, engine: StubEngine
) -> None:
    engine.fail, engine.fail_after = EngineFailed("the engine's process died"), 2
    stream = await client.chat.completions.create(model=BASE, messages=ASK, stream=True)
    with pytest.raises(openai.APIError, match="the engine's process died"):
        async for _ in stream:
            pass


async def test_the_client_sends_its_key() -> None:
    app = await app_with(await scripted(), config=replace(CONFIG, rules=Rules(("secret",))))
    async with live(app) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="secret") as client:
        assert len((await client.models.list()).data) == 2
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


async def test_every_response_names_its_replica_and_request_id(app: Server) -> None:
    async with client_of(app) as client:
        for path in ("/health", "/v1/models", "/nowhere", "/metrics", "/v1/adapters"):
            answer = await client.get(path, headers={"x-request-id": "mine-1"})
            assert answer.headers["x-lorafleet-replica"] == "r-1"
            assert answer.headers["x-request-id"] == "mine-1"
        odd = await client.get("/health", headers={"x-request-id": "a b"})
        assert odd.headers["x-request-id"] not in ("", "a b")


async def test_many_adapters_come_in_one_call() -> None:
    book = Book()
    async with client_of(await app_with(await scripted(), book)) as client:
        entries = [{"lora_name": f"a{i}", "lora_path": "/a", "weight": 2.0} for i in range(3)]
        book.pending = ("r-2",)
        loaded = await client.post("/v1/load_lora_adapters", json={"adapters": entries})
        body = loaded.json()
        assert (body["sequence"], body["pending"]) == (1, ["r-2"])
        assert [each["id"] for each in body["data"]] == ["a0", "a1", "a2"]
        assert [(v.name, v.weight) for v in book.versions()] == [(f"a{i}", 2.0) for i in range(3)]
        again = await client.post("/v1/load_lora_adapters", json={"adapters": entries})
        assert again.status_code == 400
        entries.append({"lora_name": "a3", "lora_path": "/a"})
        inplace = {"adapters": entries, "load_inplace": True}
        assert (await client.post("/v1/load_lora_adapters", json=inplace)).status_code == 200


async def test_adapters_come_and_go() -> None:
    book = Book()
    async with client_of(await app_with(await scripted(), book)) as client:
        body: dict[str, Any] = {"lora_name": "new", "lora_path": "/a"}
        loaded = await client.post("/v1/load_lora_adapter", json=body)
        assert loaded.text == "Success: LoRA adapter 'new' added successfully."
        assert loaded.headers["x-lorafleet-sequence"] == "1"
        again = await client.post("/v1/load_lora_adapter", json=body)
        assert again.status_code == 400
        book.pending = ("r-2", "r-3")
        inplace = await client.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
        assert inplace.status_code == 200
        assert inplace.text.endswith(" Not yet acknowledged by: r-2, r-3.")
        assert inplace.headers["x-lorafleet-pending"] == "r-2, r-3"
        book.failed = {"r-4": "no such directory"}
        unread = await client.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
        assert " Could not be read by: r-4 (no such directory)." in unread.text
        assert unread.headers["x-lorafleet-failed"] == "r-4"
        assert unread.headers["x-lorafleet-applied"] == "r-1"
        book.pending, book.failed = (), {}
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
        assert gone.text == "Success: LoRA adapter 'new' removed successfully."
        missing = await client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
        assert missing.status_code == 404


async def test_an_adapter_is_added_with_its_pin_and_weight() -> None:
    async with client_of(await app_with(await scripted(), Book())) as client:
        body: dict[str, Any] = {"lora_name": "a", "lora_path": "/a"}
        await client.post("/v1/load_lora_adapter", json=body | {"pinned": True, "weight": 2.5})
        await client.post("/v1/load_lora_adapter", json=body | {"lora_name": "b", "weight": 3})
        await client.post("/v1/load_lora_adapter", json=body | {"lora_name": "c"})
        listed = (await client.get("/v1/adapters")).json()["data"]
        again = await client.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
        assert again.status_code == 200
        after = (await client.get("/v1/adapters")).json()["data"][0]
    assert [(e["id"], e["pinned"], e["weight"]) for e in listed] == [
        ("a", True, 2.5),
        ("b", False, 3.0),
        ("c", False, 1.0),
    ]
    assert (after["pinned"], after["weight"]) == (False, 1.0)


async def test_metrics_are_prometheus_text(app: Server) -> None:
    async with client_of(app) as client:
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert "# TYPE lorafleet_steps_total counter" in lines
    assert "# HELP lorafleet_running Rows in the batch." in lines
    assert "lorafleet_running 0.0" in lines
    assert 'lorafleet_adapters{tier="device"} 1.0' in lines


async def test_many_streams_at_once_do_not_mix() -> None:
    engine = await scripted()
    async with live(await app_with(engine)) as url, httpx.AsyncClient(timeout=TIMEOUT_S) as client:

        async def one(model: str) -> str:
            body = {"model": model, "prompt": "hi", "max_tokens": 14, "stream": True}
            answer = await client.post(f"{url}/v1/completions", json=body)
            return "".join(event["choices"][0]["text"] for event in events(answer.text))

        texts = await asyncio.gather(*(one((BASE, ADAPTER.name)[i % 2]) for i in range(32)))
    assert texts == [PROSE.encode()[:14].decode(), VERSE[:14]] * 16
    assert engine.running == {}


async def test_a_lower_priority_number_goes_first_as_in_vllm(
    client: AsyncOpenAI, engine: StubEngine
) -> None:
    await client.completions.create(
        model=BASE, prompt="x", max_tokens=1, extra_body={"priority": -3}
    )
    assert engine.seen[-1].priority == -3


async def test_a_requests_timeline(client: AsyncOpenAI, app: Server) -> None:
    answer = await client.completions.create(model=BASE, prompt="x", max_tokens=2, n=2)
    async with client_of(app) as http:
        timeline = await http.get(f"/v1/requests/{answer.id}")
        unknown = await http.get("/v1/requests/nobody")
    assert timeline.json()["object"] == "request.timeline"
    assert [len(choice) for choice in timeline.json()["choices"]] == [1, 1]
    assert timeline.json()["choices"][0][0]["event"] == "queued"
    assert unknown.status_code == 404 and "nobody" in unknown.text
