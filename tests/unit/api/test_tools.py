"""Tools: the calls that a model writes, whole and in any pieces, and what is refused."""

import json
from typing import Any

import orjson
import pytest
from llguidance import LLMatcher, LLTokenizer

from cluster.errors import BadRequest
from replica.api.openai_protocol import ChatRequest, parsed, read_messages, validated
from replica.api.tools import ToolCall, ToolFormat, ToolReader, ToolUse, format_of, read_tools
from tests.models import write_tokenizer
from tests.serving import text

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TIME = '{"name": "clock", "arguments": {}}'
HERMES, LLAMA, MISTRAL = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.MISTRAL


def asked(tool_format: ToolFormat | None = HERMES, **fields: Any) -> ToolUse | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], **fields}
    return read_tools(parsed(ChatRequest, json.dumps(body).encode())[0], tool_format, text())


def read(tool_format: ToolFormat, answer: str, size: int, parallel: bool = True) -> tuple[str, Any]:
    """Content and (name, arguments) of the calls, from pieces of `size` characters."""
    use = ToolUse(tool_format, (), parallel, None, False)
    reader, content, calls = ToolReader(use), "", list[ToolCall]()
    for at in range(0, len(answer), size):
        more, found = reader.push(answer[at : at + size])
        content, calls = content + more, calls + found
    more, found = reader.flush()
    return content + more, [(c.name, json.loads(c.arguments)) for c in calls + found]


TWO = [("weather", {"city": "Oslo"}), ("clock", {})]
NO, QUOTE = "<tool_call>no</tool_call>", '<tool_call>"</tool_call>'
MARKED = r'{"name": "f", "arguments": {"x": "a\"</tool_call>"}}'
ANSWERS = [
    (HERMES, f"<tool_call>\n{OSLO}\n</tool_call>", "", TWO[:1]),
    (HERMES, f"<tool_call>{OSLO}</tool_call>\n<tool_call>{TIME}</tool_call>\n", "", TWO),
    (HERMES, f"Let me see. <tool_call>{OSLO}</tool_call>", "Let me see. ", TWO[:1]),
    (HERMES, f"<tool_call>{OSLO}</tool_call>\n\nHere \n it  is.", "\n\nHere \n it  is.", TWO[:1]),
    (HERMES, f"<tool_call>{OSLO}</tool_call>\n<tool_call>no</tool_call>", f"\n{NO}", TWO[:1]),
    (HERMES, f"{NO}\n<tool_call>{TIME}", f"{NO}\n", TWO[1:]),
    (HERMES, f"<tool_call>{MARKED}</tool_call>!", "!", [("f", {"x": 'a"</tool_call>'})]),
    (HERMES, f"<tool_call>{MARKED}", "", [("f", {"x": 'a"</tool_call>'})]),
    (HERMES, f'<tool_call>"</tool_call> <tool_call>{TIME}</tool_call>', f"{QUOTE} ", TWO[1:]),
    (HERMES, '<tool_call>{"x": "</tool_call> so', '<tool_call>{"x": "</tool_call> so', []),
    (HERMES, "2 < 3 and <tool> is no call", "2 < 3 and <tool> is no call", []),
    (HERMES, "<tool_call>not json</tool_call>!", "<tool_call>not json</tool_call>!", []),
    (HERMES, "<tool_call>{", "<tool_call>{", []),
    (LLAMA, OSLO.replace("arguments", "parameters"), "", TWO[:1]),
    (LLAMA, f"<|python_tag|>{OSLO}; {TIME}", "", TWO),
    (LLAMA, "It is { fine", "It is { fine", []),
    (LLAMA, '{"colour": "red"}', '{"colour": "red"}', []),
    (MISTRAL, f"[TOOL_CALLS][{OSLO}, {TIME}]", "", TWO),
    (MISTRAL, f"Well: [TOOL_CALLS] [{OSLO}]", "Well: ", TWO[:1]),
    (MISTRAL, "[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
    (MISTRAL, "[TOOL", "[TOOL", []),
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("tool_format", "answer", "content", "calls"), ANSWERS)
def test_calls_are_read_whatever_the_pieces(
    tool_format: ToolFormat, answer: str, content: str, calls: Any, size: int
) -> None:
    assert read(tool_format, answer, size) == (content, calls)


def test_without_parallel_calls_the_first_one_counts() -> None:
    answer = f"<tool_call>{OSLO}</tool_call><tool_call>{TIME}</tool_call>"
    assert read(HERMES, answer, 5, parallel=False) == ("", TWO[:1])
    assert read(MISTRAL, f"[TOOL_CALLS][{OSLO}, {TIME}]", 5, parallel=False) == ("", TWO[:1])
    assert read(LLAMA, f"{OSLO}; {TIME}", 5, parallel=False) == ("", TWO[:1])


DEEP = '{"x": ' + "[" * 400 + "]" * 400 + "}"


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        (given, given)
        for given in (
            '{"x": 123456789012345678901234567890}',
            '{"x": 1e999, "y": 1.10}',
            '{"x": ' + "9" * 5000 + "}",
            r'{"x": "\ud800"}',
            '{ "x":\n[ 1,2 ]}',
            DEEP,
        )
    ]
    + [(r'"{\"x\": \"\ud800!\ud800\"}"', '{"x": "\ufffd!\ufffd"}')],
)
@pytest.mark.parametrize("form", [(HERMES, "", ""), (MISTRAL, "[", "]"), (LLAMA, "", "")])
def test_arguments_are_as_the_model_wrote_them(
    form: tuple[ToolFormat, str, str], written: str, arguments: str
) -> None:
    tool_format, before, after = form
    reader = ToolReader(ToolUse(tool_format, (), True, None, False))
    call = f'{{"arguments": {written} , "name": "f\\ud800"}}'
    content, _ = reader.push(f"{tool_format.mark}{before}{call}{after}")
    rest, (found,) = reader.flush()
    assert (content + rest, found.name, found.arguments) == ("", "f\ufffd", arguments)
    orjson.dumps(found)


@pytest.mark.parametrize(
    "call",
    [
        OSLO[:-1],
        OSLO.replace(":", ""),
        OSLO.replace(",", ""),
        "{1: 2}",
        "{" * 3000,
        "[" * 3000 + "]" * 3000,
    ],
)
def test_what_is_no_call_stays_content(call: str) -> None:
    answer = f"<tool_call>{call}</tool_call>"
    assert read(HERMES, answer, 1000) == (answer, [])


def test_content_before_a_call_does_not_wait_for_it() -> None:
    reader = ToolReader(ToolUse(HERMES, (), True, None, False))
    assert reader.push("Hello <to")[0] == "Hello "
    assert reader.push("ad>")[0] == "<toad>"


@pytest.mark.parametrize(
    ("tool_format", "choice", "good", "bad"),
    [
        (HERMES, "required", f"<tool_call>\n{OSLO}\n</tool_call>", "Oslo"),
        (HERMES, "required", "\n".join([f"<tool_call>\n{TIME}\n</tool_call>"] * 2), OSLO),
        (HERMES, "weather", f"<tool_call>\n{OSLO}\n</tool_call>", f"<tool_call>\n{TIME}\n"),
        (LLAMA, "required", OSLO.replace("arguments", "parameters"), OSLO),
        (MISTRAL, "required", f"[TOOL_CALLS][{OSLO}, {TIME}]", "[TOOL_CALLS][]"),
        (MISTRAL, "clock", f"[TOOL_CALLS][{TIME}]", f"[TOOL_CALLS][{OSLO}]"),
    ],
)
def test_a_call_that_must_be_made_follows_a_grammar(
    tmp_path: Any, tool_format: ToolFormat, choice: str, good: str, bad: str
) -> None:
    write_tokenizer(tmp_path)
    tokenizer = LLTokenizer(str(tmp_path / "tokenizer.json"), n_vocab=320, eos_token=[0])
    named = choice not in ("none", "auto", "required")
    given = {"type": "function", "function": {"name": choice}} if named else choice
    use = asked(tool_format, tools=[WEATHER, CLOCK], tool_choice=given)
    assert use is not None and use.grammar is not None and use.named == named
    matcher = LLMatcher(tokenizer, use.grammar)
    assert matcher.consume_tokens(tokenizer.tokenize_str(good)), matcher.get_error()
    assert matcher.is_accepting()
    matcher = LLMatcher(tokenizer, use.grammar, log_level=0)
    assert not matcher.consume_tokens(tokenizer.tokenize_str(bad))


@pytest.mark.parametrize("name", ["f", 'g"\\n|é'])
def test_each_functions_references_are_its_own(tmp_path: Any, name: str) -> None:
    write_tokenizer(tmp_path)
    tokenizer = LLTokenizer(str(tmp_path / "tokenizer.json"), n_vocab=320, eos_token=[0])

    def tool(name: str, kind: str) -> dict[str, Any]:
        schema = {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": kind}}}
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    use = asked(tools=[tool("n", "integer"), tool(name, "string")], tool_choice="required")
    assert use is not None and use.grammar is not None
    for called, value, good in ((name, '"a"', True), (name, "1", False), ("n", "1", True)):
        call = (
            f'{{"name": {json.dumps(called, ensure_ascii=False)}, "arguments": {{"x": {value}}}}}'
        )
        matcher = LLMatcher(tokenizer, use.grammar, log_level=0)
        tokens = tokenizer.tokenize_str(f"<tool_call>\n{call}\n</tool_call>")
        assert matcher.consume_tokens(tokens) == good, matcher.get_error()


def test_a_model_may_call_unless_told_otherwise() -> None:
    use = asked(tools=[WEATHER])
    assert use is not None and use.grammar is None and use.parallel
    assert asked(tools=[WEATHER], tool_choice="none") is None
    assert asked() is None
    assert asked(None, tools=[]) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{"type": "browser"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [CLOCK, {"function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[1].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"function": "weather"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
    ],
)
def test_wrong_tools_are_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        asked(**fields)
    assert caught.value.field == field


def test_a_model_whose_template_knows_no_tools_says_so() -> None:
    with pytest.raises(BadRequest, match="template knows no tools"):
        asked(None, tools=[WEATHER])


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        ("{{ messages }}", None),
        (None, None),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ('{% if tools %}{"name": .., "parameters": ..}{% endif %}', LLAMA),
    ],
)
def test_the_template_tells_the_format(template: str | None, tool_format: Any) -> None:
    assert format_of(template) == tool_format


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (r'{"x": "\ud800"}', {"x": "\ufffd"}),
        (r'{"x\udfff": ["a\ud83d\ude00"]}', {"x\ufffd": ["a\U0001f600"]}),
        ('{"x": NaN}', None),
        ("[1]", None),
        ("{" * 5000, None),
        ('{"x":' * 5000 + "1" + "}" * 5000, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_sent_back_may_escape_half_a_surrogate_pair(
    arguments: str, read: dict[str, Any] | None
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    request = validated(ChatRequest, {"messages": [message]})
    if read is None:
        with pytest.raises(BadRequest, match="arguments are a JSON object") as caught:
            read_messages(request)
        assert caught.value.field == "messages[0].tool_calls"
        return
    (found,) = read_messages(request)
    assert found["tool_calls"][0]["function"]["arguments"] == read
