"""Turns `response_format`, `structured_outputs` and vLLM's `guided_…` fields into a grammar."""

import asyncio
import re
from typing import Any

import orjson
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from cluster.errors import BadRequest
from replica.api.openai_protocol import GenerationRequest, shown

# One space, or a line and its indentation: without a bound, a model may go on with white space
# until its tokens run out.
_WHITESPACE = r"(\n {0,16}| ?)"
_CHARACTERS_MAX = 2**16  # of a regex or a grammar
_GRAMMAR_MAX = 2**18  # of what any field becomes
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


async def grammar_of(request: GenerationRequest) -> str | None:
    """In llguidance's form; None if the answer is free. Raises BadRequest naming the field."""
    found = [each for each in _sources(request) if each is not None]
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(field for field, _, _ in found)
        raise BadRequest(f"{found[1][0]}: only one of {names} may be given", field=found[1][0])
    field, kind, value = found[0]
    # A large grammar takes a second, without the GIL.
    return await asyncio.to_thread(_compiled, field, kind, value)


def _sources(request: GenerationRequest) -> list[tuple[str, str, Any] | None]:
    """(field, kind, value) of each field that is given."""
    given: list[tuple[str, str, Any] | None] = [_response_format(request.response_format)]
    outputs = request.structured_outputs or {}
    for kind, value in outputs.items():
        if value is not None and value is not False:
            field = f"structured_outputs.{kind}"
            if kind not in _KINDS:
                raise BadRequest(f"{field}: not supported (got {shown(value)})", field=field)
            given.append((field, kind, value))
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{kind}")
        given.append(None if value is None else (f"guided_{kind}", kind, value))
    return given


def _response_format(given: dict[str, Any] | None) -> tuple[str, str, Any] | None:
    kind = (given or {}).get("type", "text" if given is None else None)
    match kind:
        case "text":
            return None
        case "json_object":
            return "response_format", kind, True
        case "json_schema":
            assert given is not None
            field = "response_format.json_schema"
            wrapper = given.get("json_schema")
            schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
            if not isinstance(schema, dict | bool):
                raise BadRequest(
                    f"{field}.schema: should be a JSON schema (got {shown(schema)})", field=field
                )
            return field, "json", schema
    raise BadRequest(
        f"response_format.type: should be text, json_object or json_schema (got {shown(kind)})",
        field="response_format.type",
    )


def json_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})


def _compiled(field: str, kind: str, value: Any) -> str:
    try:
        grammar = _grammar(kind, value)
    except (TypeError, ValueError, GbnfToLarkError) as error:
        raise BadRequest(f"{field}: {error} (got {shown(value)})", field=field) from error
    return checked(field, grammar)


def checked(field: str, grammar: str) -> str:
    """Raises BadRequest if llguidance refuses the grammar."""
    if len(grammar) > _GRAMMAR_MAX:
        raise BadRequest(
            f"{field}: a grammar of {len(grammar)} characters, over the limit of {_GRAMMAR_MAX}",
            field=field,
        )
    refused, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if refused:
        raise BadRequest(f"{field}: {' '.join(messages).strip()}", field=field)
    return grammar


def _grammar(kind: str, value: Any) -> str:
    """Raises TypeError or ValueError."""
    if kind == "json_object":
        value, kind = {"type": "object"}, "json"
    if kind == "json":
        if isinstance(value, str):
            value = orjson.loads(value)
        if isinstance(value, bool):
            value = {} if value else {"not": {}}
        if not isinstance(value, dict):
            raise TypeError("should be a JSON schema")
        return json_grammar(value)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(c, str) for c in value):
            raise TypeError("should be a list of strings")
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, value)))
    if not isinstance(value, str) or not 0 < len(value) <= _CHARACTERS_MAX:
        raise TypeError(f"should be a string of 1 to {_CHARACTERS_MAX} characters")
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    return LLMatcher.grammar_from_lark(any_to_lark(value))  # vLLM's users write GBNF or Lark
