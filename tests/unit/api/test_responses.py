"""The Responses API as OpenAI's client and its event types see it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from replica.api.server import ServerConfig, build_app
from replica.api.text import Text
from tests.models import EOS, write_tokenizer
from tests.serving import BASE, Book, live
from tests.stub_engine import StubEngine
from tests.unit.api.test_tools_openai import CALL, TEMPLATE

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": None,
    }
]
DEEP: Any = json.loads("[" * 300 + "]" * 300)


@pytest.fixture
def text(tmp_path: Path) -> Text:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return Text.read(str(tmp_path))


@pytest.fixture
async def engine(text: Text) -> StubEngine:
    return StubEngine(script=(*await text.encode("Hello."), EOS), eos=frozenset({EOS}))


@pytest.fixture
async def client(engine: StubEngine, text: Text) -> AsyncIterator[AsyncOpenAI]:
    app = build_app(engine, Book(), text, ServerConfig(base=BASE, context=1000, vocab=320))
    async with live(app) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


async def test_a_text(client: AsyncOpenAI, engine: StubEngine, text: Text) -> None:
    answer = await client.responses.create(
        model=BASE, input="hi", instructions="Be brief.", temperature=0.5, max_output_tokens=50
    )
    assert (answer.status, answer.output_text, answer.error) == ("completed", "Hello.", None)
    assert answer.id.startswith("resp_") and answer.model == BASE
    assert answer.usage is not None and answer.usage.output_tokens == 7
    assert answer.usage.total_tokens == answer.usage.input_tokens + 7
    (seen,) = engine.seen
    assert seen.sampling.temperature == 0.5 and seen.sampling.max_tokens == 50
    assert text.decode(seen.prompt, skip_special_tokens=False).startswith(
        "<|system|>Be brief.<|user|>hi"
    )


async def test_an_answer_that_is_cut_is_incomplete(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model=BASE, input="hi", max_output_tokens=3)
    assert (answer.status, answer.output_text) == ("incomplete", "Hel")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


async def test_a_streams_events_add_up(client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model=BASE, input="hi", stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Hello."
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "Hello."
    assert last.response.usage is not None and last.response.usage.output_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_and_its_result_go_round(
    client: AsyncOpenAI, engine: StubEngine, text: Text, stream: bool
) -> None:
    engine.script = (*await text.encode(CALL), EOS)
    asked: Any = [{"role": "user", "content": [{"type": "input_text", "text": "?"}]}]
    answer: Any
    if stream:
        events = [
            event
            async for event in await client.responses.create(
                model=BASE, input=asked, tools=TOOLS, stream=True
            )
        ]
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert [json.loads(event.arguments) for event in done] == [{"city": "Oslo"}]
        answer = events[-1].response  # type: ignore[union-attr]
    else:
        answer = await client.responses.create(model=BASE, input=asked, tools=TOOLS)
    message, call = answer.output
    assert message.content[0].text == "Sure."
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "weather",
        {"city": "Oslo"},
    )
    engine.script = (*await text.encode("It rains."), EOS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    follow: Any = [*asked, *(item.model_dump() for item in answer.output), result]
    again = await client.responses.create(model=BASE, input=follow, tools=TOOLS)
    assert again.output_text == "It rains."
    prompt = text.decode(engine.seen[-1].prompt, skip_special_tokens=False)
    assert "<|user|>?<|assistant|>Sure.<tool_call>" in prompt
    assert prompt.endswith("<|tool|>rain")


async def test_a_format_becomes_a_grammar(client: AsyncOpenAI, engine: StubEngine) -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    await client.responses.create(model=BASE, input="hi", text=form)
    assert engine.seen[-1].sampling.grammar is not None
    choice: Any = {"type": "function", "name": "weather"}
    await client.responses.create(model=BASE, input="hi", tools=TOOLS, tool_choice=choice)
    assert "weather" in (engine.seen[-1].sampling.grammar or "")


async def test_sampling_fields_are_those_of_chats(client: AsyncOpenAI, engine: StubEngine) -> None:
    fields: dict[str, Any] = {
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": 1},
        "allowed_token_ids": [5, 6],
        "bad_words": ["a"],
        "seed": 7,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": ["x"],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "guided_regex": "a+",
        "truncate_prompt_tokens": 3,
    }
    await client.responses.create(model=BASE, input="hi", extra_body=fields)
    messages: Any = [{"role": "user", "content": "hi"}]
    await client.chat.completions.create(model=BASE, messages=messages, extra_body=fields)
    response, chat = engine.seen
    assert response.sampling.grammar and response.sampling.seed == 7
    assert (response.sampling, response.prompt) == (chat.sampling, chat.prompt)
    assert len(response.prompt) == 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"text": {"format": {"type": "xml"}}}, "response_format.type"),
        ({"temperature": -1}, "temperature"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": [DEEP]}]}, "input[0]"),
        ({"tools": TOOLS * 200}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"x": DEEP}}]}, "tools"),
        ({"text": {"x": DEEP}}, "text"),
        ({"n": 2}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"echo": True}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    client: AsyncOpenAI, engine: StubEngine, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model=BASE, input="hi", extra_body=fields)
    assert caught.value.param == field
    assert engine.seen == []


async def test_fields_without_effect_are_tolerated(client: AsyncOpenAI) -> None:
    neutral: dict[str, Any] = {"n": 1, "stop": [], "guided_json": None, "store": True}
    neutral |= {"response_format": {"type": "text"}, "truncation": "disabled", "max_tokens": None}
    answer = await client.responses.create(model=BASE, input="hi", extra_body=neutral)
    assert answer.output_text == "Hello."
