"""What a model thinks is told apart from its answer, whole and in any pieces."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from replica.api.reasoning import ReasoningReader, reasons
from replica.api.server import ServerConfig, build_app
from replica.api.text import Text
from tests.models import write_tokenizer
from tests.serving import BASE, Book, client_of
from tests.stub_engine import StubEngine

EOS = 1
# Thinks unless told otherwise, as DeepSeek's; the prompt begins it.
TEMPLATE = (
    "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if tools %}<tool_call>{% endif %}"
    "{% if begin is not defined or begin %}<think>\n{% endif %}"
)
ASK: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
UNBEGUN = {"chat_template_kwargs": {"begin": False}}


@pytest.fixture
def text(tmp_path: Path) -> Text:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return Text.read(str(tmp_path))


class Server:
    """Answers with what `says` gives."""

    def __init__(self, text: Text) -> None:
        self.text, self.engine = text, StubEngine(eos=frozenset({EOS}))

    async def post(self, says: str, path: str = "chat/completions", **body: Any) -> httpx.Response:
        self.engine.script = (*self.text.word_tokens(says), EOS)
        config = ServerConfig(base=BASE, context=1000, vocab=320)
        app = build_app(self.engine, Book(), self.text, config)
        async with client_of(app) as client:
            answer = await client.post(f"/v1/{path}", json={**ASK, **body})
        assert answer.status_code == 200, answer.text
        return answer


@pytest.fixture
async def server(text: Text) -> AsyncIterator[Server]:
    yield Server(text)


CASES = [
    # (begun by the prompt, said, thought, answered)
    (True, "so</think>\n\nyes", "so", "\n\nyes"),
    (True, "so</thin", "so</thin", ""),
    (True, "a < b </think></think>", "a < b ", "</think>"),
    (False, "<think>\nso</think>yes", "\nso", "yes"),
    (False, " \n<think>so", "so", ""),
    (False, "yes <think>no</think>", "", "yes <think>no</think>"),
    (False, "\n<thi", "", "\n<thi"),
    (False, "", "", ""),
]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(("begun", "said", "thought", "answered"), CASES)
def test_the_split_does_not_depend_on_the_pieces(
    begun: bool, said: str, thought: str, answered: str, size: int
) -> None:
    reader = ReasoningReader(begun)
    parts = [reader.push(said[at : at + size]) for at in range(0, len(said), size)]
    thoughts, answers = zip(*parts, reader.flush(), strict=True)
    assert ("".join(thoughts), "".join(answers)) == (thought, answered)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat_has_it_beside_its_content(server: Server, begun: bool, stream: bool) -> None:
    said = "hm, so</think>yes" if begun else "<think>hm, so</think>yes"
    answer = await server.post(said, stream=stream, **({} if begun else UNBEGUN))
    if stream:
        events = [e.removeprefix("data: ") for e in answer.text.split("\n\n") if "{" in e]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        assert not any(d.get("content") and d.get("reasoning_content") for d in deltas[:-1])
        message = {
            key: "".join(d.get(key) or "" for d in deltas)
            for key in ("reasoning_content", "content")
        }
    else:
        message = answer.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, so", "yes")


async def test_an_answer_that_only_thinks_has_no_content(server: Server) -> None:
    message = (await server.post("so")).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("so", None)


async def test_calls_of_tools_may_follow(server: Server) -> None:
    said = 'so</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "f"}}]
    message = (await server.post(said, tools=tools)).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "so" and message["content"] is None
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"separate_reasoning": False}),
        ("chat/completions", {"guided_regex": "(.|\n)*"}),
        ("responses", {"input": "hi"}),
        ("completions", {"prompt": "hi", "max_tokens": 99}),
    ],
)
async def test_elsewhere_the_text_is_whole(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = (await server.post("so</think>yes", path, **body)).text
    assert "so</think>yes" in answer and "reasoning_content" not in answer


def test_the_template_tells_whether_a_model_thinks() -> None:
    assert reasons(TEMPLATE) and not reasons("{{ messages }}") and not reasons(None)
