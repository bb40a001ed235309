"""Which fields constrain an answer, and what their grammars accept."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from cluster.errors import BadRequest
from replica.api.openai_protocol import CompletionRequest, parsed
from replica.api.structured import grammar_of
from tests.models import write_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return LLTokenizer(str(directory / "tokenizer.json"), n_vocab=320, eos_token=[0])


async def compiled(**fields: Any) -> str | None:
    body = json.dumps({"model": "tiny", "prompt": "a", **fields}).encode()
    return await grammar_of(parsed(CompletionRequest, body)[0])


def accepts(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    matcher = LLMatcher(tokenizer, grammar)
    return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()


FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
GBNF = 'root ::= "yes" | "no" digit\ndigit ::= [0-9]'
FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": FORMAT}, '{"a": 1}', '{"b": 1}'),
    ({"response_format": FORMAT}, '{\n  "a": 1\n}', '{"a": "1"}'),
    ({"response_format": {"type": "json_object"}}, '{"x": [1, {}]}', "[1]"),
    ({"structured_outputs": {"json": SCHEMA}}, '{"a":1}', "{}"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":1}', "{}"),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": "[ab]+c"}}, "abc", "ab"),
    ({"structured_outputs": {"choice": ['say "hi"', "no"]}}, 'say "hi"', "say"),
    ({"structured_outputs": {"grammar": GBNF}}, "no7", "no"),
    ({"guided_json": SCHEMA}, '{"a": 22}', '{"a": }'),
    ({"guided_regex": "x{3}"}, "xxx", "xx"),
    ({"guided_choice": ["a", "b"]}, "b", "c"),
    ({"guided_grammar": 'start: "q" | "r"'}, "r", "s"),
]


@pytest.mark.parametrize(("fields", "good", "bad"), FORMS)
async def test_each_form_accepts_what_it_describes(
    tokenizer: LLTokenizer, fields: dict[str, Any], good: str, bad: str
) -> None:
    grammar = await compiled(**fields)
    assert grammar is not None
    assert accepts(tokenizer, grammar, good)
    assert not accepts(tokenizer, grammar, bad)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False}},
    ],
)
async def test_an_answer_is_free_unless_a_field_says_otherwise(fields: dict[str, Any]) -> None:
    assert await compiled(**fields) is None


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", '"xml"'),
        ({"response_format": {}}, "response_format.type", "null"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "null"),
        ({"guided_json": {"type": "number or so"}}, "guided_json", "number or so"),
        ({"guided_json": "{"}, "guided_json", '"{"'),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": ""}, "guided_regex", "1 to"),
        ({"guided_choice": []}, "guided_choice", "list of strings"),
        ({"guided_grammar": "start: what"}, "guided_grammar", "what"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", "::="),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "x"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "only one of"),
    ],
)
async def test_a_wrong_constraint_is_refused_by_name(
    fields: dict[str, Any], field: str, word: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        await compiled(**fields)
    assert caught.value.field == field
    assert word in caught.value.message


async def test_white_space_has_an_end(tokenizer: LLTokenizer) -> None:
    grammar = await compiled(response_format=FORMAT)
    assert grammar is not None
    assert not accepts(tokenizer, grammar, '{  "a": 1}')
    assert not accepts(tokenizer, grammar, '{\n\n"a": 1}')
