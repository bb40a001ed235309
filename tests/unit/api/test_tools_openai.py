"""Tools as OpenAI's client sees them: its documented loop, whole and streamed."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from replica.api.server import ServerConfig, build_app
from replica.api.text import Text
from replica.api.tools import ToolFormat
from tests.models import EOS, write_tokenizer
from tests.serving import BASE, Book, client_of, live
from tests.stub_engine import StubEngine

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}"
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = 'Sure.<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ASK: Any = [{"role": "user", "content": "?"}]


@pytest.fixture
def text(tmp_path: Path) -> Text:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return Text.read(str(tmp_path))


@pytest.fixture
async def engine(text: Text) -> StubEngine:
    return StubEngine(script=(*await text.encode(CALL), EOS), eos=frozenset({EOS}))


@pytest.fixture
async def client(engine: StubEngine, text: Text) -> AsyncIterator[AsyncOpenAI]:
    config = ServerConfig(base=BASE, context=1000, vocab=320)
    app = build_app(engine, Book(), text, config)
    async with live(app) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


async def test_a_call_and_its_result_go_round(
    client: AsyncOpenAI, engine: StubEngine, text: Text
) -> None:
    answer = await client.chat.completions.create(model=BASE, messages=ASK, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Sure."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert '"The weather now"' in text.decode(engine.seen[0].prompt)

    engine.script = (*await text.encode("It rains."), EOS)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [*ASK, choice.message, result]
    answer = await client.chat.completions.create(model=BASE, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    # The template gets the arguments as an object, not as text.
    assert '"arguments": {"city": "Oslo"}' in text.decode(engine.seen[1].prompt)


async def test_a_template_that_does_not_tell_how_calls_are_written_may_be_told(
    engine: StubEngine, tmp_path: Path
) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("<tool_call>", ""))
    text = Text.read(str(tmp_path))
    for tool_format in (None, ToolFormat.HERMES):
        config = ServerConfig(base=BASE, context=1000, vocab=320, tool_format=tool_format)
        async with client_of(build_app(engine, Book(), text, config)) as client:
            body = {"model": BASE, "messages": ASK, "tools": TOOLS}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
        if tool_format is None:
            assert "--tool-parser" in answer["error"]["message"]
        else:
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == "weather"


async def test_a_call_streams(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=BASE, messages=ASK, tools=TOOLS, stream=True
    )
    content, calls, finish = "", dict[int, list[str]](), None
    async for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            calls.setdefault(call.index, []).append(call.function.arguments or "")
            assert call.function.name == "weather" and call.id
        finish = choice.finish_reason or finish
    assert (content, finish) == ("Sure.", "tool_calls")
    assert {i: json.loads("".join(parts)) for i, parts in calls.items()} == {0: {"city": "Oslo"}}


async def test_without_tools_the_text_stays_as_it_is(client: AsyncOpenAI) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = await client.chat.completions.create(model=BASE, messages=ASK, **fields)
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].finish_reason == "stop"


async def test_a_call_that_must_be_made_reaches_the_engine_as_a_grammar(
    client: AsyncOpenAI, engine: StubEngine
) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = await client.chat.completions.create(
            model=BASE, messages=ASK, tools=TOOLS, tool_choice=choice
        )
        assert "weather" in (engine.seen[-1].sampling.grammar or "")
        assert answer.choices[0].finish_reason == ("stop" if choice is named else "tool_calls")
    with pytest.raises(openai.BadRequestError, match="excludes a format"):
        await client.chat.completions.create(
            model=BASE,
            messages=ASK,
            tools=TOOLS,
            tool_choice="required",
            response_format={"type": "json_object"},
        )


async def test_a_wrong_schema_of_a_tool_is_refused(client: AsyncOpenAI) -> None:
    wrong: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]
    with pytest.raises(openai.BadRequestError, match="tools"):
        await client.chat.completions.create(
            model=BASE, messages=ASK, tools=wrong, tool_choice="required"
        )
