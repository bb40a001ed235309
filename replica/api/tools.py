"""Tools: which a request offers, how the model writes a call, and reading calls from its text."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from cluster.errors import BadRequest
from replica.api.openai_protocol import ChatRequest, encodable, shown
from replica.api.stop_strings import overlap
from replica.api.text import Text


class ToolFormat(StrEnum):
    """How a model writes calls, by vLLM's names of its parsers.

    hermes      <tool_call>{"name": …, "arguments": {…}}</tool_call>, any number (Qwen, Hermes)
    llama3_json {"name": …, "parameters": {…}}, separated by ";" (Llama 3)
    mistral     [TOOL_CALLS][{"name": …, "arguments": {…}}, …] (Mistral)
    """

    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"
    MISTRAL = "mistral"

    @property
    def mark(self) -> str:
        """What begins a call; "" if the whole answer is one."""
        return _BEGIN.get(self, "")


_BEGIN = {ToolFormat.HERMES: "<tool_call>", ToolFormat.MISTRAL: "[TOOL_CALLS]"}
_END = "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


def format_of(template: str | None) -> ToolFormat | None:
    """The format that a chat template teaches; None if it knows no tools."""
    if template is None or "tools" not in template:
        return None
    for tool_format, begin in _BEGIN.items():
        if begin in template:
            return tool_format
    return ToolFormat.LLAMA3_JSON if '"parameters"' in template else None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """arguments: a JSON object, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request. forced: the answer must be a call; grammar makes it one.

    named: the one tool that it must call; OpenAI then reports `stop`, not `tool_calls`.
    """

    format: ToolFormat
    definitions: tuple[dict[str, Any], ...]
    parallel: bool
    grammar: str | None
    named: bool


def read_tools(request: ChatRequest, tool_format: ToolFormat | None, text: Text) -> ToolUse | None:
    """None if the model shall not call any. Raises BadRequest naming the field."""
    definitions = [_definition(tool, i) for i, tool in enumerate(request.tools or [])]
    names = [tool["function"]["name"] for tool in definitions]
    choice = request.tool_choice
    if choice is None:
        choice = "auto" if names else "none"
    chosen = names
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in names:
            raise BadRequest(
                f"tool_choice: {shown(name)} is none of the tools", field="tool_choice"
            )
        chosen = [name]
    elif choice not in ("none", "auto", "required"):
        raise BadRequest(
            f"tool_choice: should be none, auto, required or a tool (got {shown(choice)})",
            field="tool_choice",
        )
    if choice == "none":
        return None
    if not names:
        raise BadRequest(f"tool_choice: {shown(choice)} needs tools", field="tool_choice")
    if tool_format is None:
        raise BadRequest(
            "tools: this model's chat template knows no tools (or not how it writes calls: "
            "--tool-parser)",
            field="tools",
        )
    parallel = request.parallel_tool_calls is not False
    grammar = None
    if choice != "auto":
        offered = [tool["function"] for tool in definitions if tool["function"]["name"] in chosen]
        many = parallel and choice == "required"
        grammar = _grammar(offered, tool_format, many, text)
    return ToolUse(
        tool_format, tuple(definitions), parallel, grammar, named=isinstance(choice, dict)
    )


def _definition(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    field = f"tools[{index}]"
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise BadRequest(f"{field}: only functions are supported (got {shown(tool)})", field=field)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise BadRequest(
            f"{field}.function.name: should be a string (got {shown(name)})",
            field=f"{field}.function.name",
        )
    if parameters is not None and not isinstance(parameters, dict):
        raise BadRequest(
            f"{field}.function.parameters: should be a JSON schema (got {shown(parameters)})",
            field=f"{field}.function.parameters",
        )
    kind = (parameters or {}).get("type", "object")
    if kind != "object":
        raise BadRequest(
            f"{field}.function.parameters: their type should be object (got {shown(kind)})",
            field=f"{field}.function.parameters",
        )
    return {"type": "function", "function": {**function, "parameters": parameters or {}}}


def _grammar(
    functions: Sequence[Mapping[str, Any]], tool_format: ToolFormat, many: bool, text: Text
) -> str:
    """In Lark: one call, or with `many` one or more. Raises BadRequest.

    Each function's schema is a rule of its own, so that its `$ref`s find its `$defs`.
    """
    key = "parameters" if tool_format is ToolFormat.LLAMA3_JSON else "arguments"
    rules = "body: " + " | ".join(f"call{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        begin = f'{{"name": {_json(function["name"])}, "{key}": '
        schema = {
            **function["parameters"],
            "type": "object",
            "x-guidance": {"whitespace_pattern": " ?"},
        }
        rules += f'\ncall{i}: {_json(begin)} args{i} "}}"\nargs{i}: %json {_json(schema)}'
    match tool_format:
        case ToolFormat.HERMES:
            begin, end = text.literal(tool_format.mark), text.literal(_END)
            call = f'{begin} "\\n" body "\\n" {end}'
            start = f'({call}) ("\\n" {call})*' if many else call
        case ToolFormat.LLAMA3_JSON:
            start = 'body (";" body)*' if many else "body"
        case ToolFormat.MISTRAL:
            bodies = 'body (", " body)*' if many else "body"
            start = f'{text.literal(tool_format.mark)} "[" {bodies} "]"'
    return f"start: {start}\n{rules}\n"


def _json(value: object) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise BadRequest("tools: a schema is nested too deep", field="tools") from error


class ToolReader:
    """Splits one choice's text, as it arrives, into content and calls.

    Text that looks like a call but is none becomes content, so nothing is lost but the blanks
    around calls, and the calls after the first if the request wants one only.
    """

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._held = ""
        self._inside = False  # after a begin mark
        self._plain = False  # what remains is content
        self._count = 0
        self._gap: str | None = None  # the blanks since a call, while there is no other text

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        self._held += text
        return self._read(final=False)

    def flush(self) -> tuple[str, list[ToolCall]]:
        """At the end of the text."""
        return self._read(final=True)

    def _read(self, final: bool) -> tuple[str, list[ToolCall]]:
        if self._use.format is ToolFormat.LLAMA3_JSON:
            return self._read_whole(final)
        content, calls = "", list[ToolCall]()
        begin = self._use.format.mark
        while True:
            if not self._inside:
                before, mark, after = self._held.partition(begin)
                if not mark:
                    kept = 0 if final else overlap(self._held, begin)
                    content += self._said(self._take(len(self._held) - kept))
                    break
                content += self._said(before)
                self._held, self._inside = after, True
            at = self._end()
            if at is None and not final:
                break
            found = self._calls(self._held if at is None else self._held[:at])
            if found is None and self._use.format is ToolFormat.HERMES and _END in self._held:
                at = self._held.index(_END)
            body = self._take(len(self._held) if at is None else at + len(_END))
            self._inside = False
            if found is None:
                content += self._said(begin + body)
            else:
                self._gap = ""
                calls += found
        return content, calls

    def _read_whole(self, final: bool) -> tuple[str, list[ToolCall]]:
        """Llama's: the answer is calls or content."""
        start = self._held.lstrip().removeprefix(_PYTHON_TAG)
        if start and start[0] != "{" and not _PYTHON_TAG.startswith(start):
            self._plain = True
        if not (self._plain or final):
            return "", []
        found = None if self._plain else self._calls(start)
        text = self._take(len(self._held))
        return (text, []) if found is None else ("", found)

    def _end(self) -> int | None:
        """Where the end mark is; one in a JSON string does not count."""
        if self._use.format is not ToolFormat.HERMES or _END not in self._held:
            return None
        marks = (found.start() for found in _STRING_OR_END.finditer(self._held) if found[0] == _END)
        return next(marks, None)

    def _said(self, text: str) -> str:
        """Content, from now on: blanks after a call wait for what follows."""
        if self._gap is None:
            return text
        self._gap += text
        if not self._gap.strip():
            return ""
        text, self._gap = self._gap, None
        return text

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _calls(self, text: str) -> list[ToolCall] | None:
        """The calls in a JSON object, an array, or objects in sequence; None if any is not one."""
        found = list[ToolCall]()
        try:
            at = _skip(text, 0, _SEPARATORS)
            while at < len(text):
                calls, at = self._call(text, at)
                found += calls
                at = _skip(text, at, _SEPARATORS)
        except (ValueError, RecursionError):
            return None
        if not found:
            return None
        if not self._use.parallel:
            found = found[: max(0, 1 - self._count)]
        self._count += len(found)
        return found

    def _call(self, text: str, at: int) -> tuple[list[ToolCall], int]:
        """The calls in the JSON object or array at `at`, and its end. Raises ValueError."""
        members, end = _members(text, at)
        if text[at] == "[":
            return [call for _, start, _ in members for call in self._call(text, start)[0]], end
        sources = {key: text[start:stop] for key, start, stop in members}
        name = json.loads(sources.get("name", "null"))
        if not isinstance(name, str):
            raise ValueError("a call without a name")
        # As the model wrote it: encoding it again would change numbers.
        arguments = sources.get("arguments", sources.get("parameters", "{}"))
        if arguments.startswith('"'):
            arguments = json.loads(arguments)
        # Mistral's chat template takes ids of nine letters and digits.
        length = 9 if self._use.format is ToolFormat.MISTRAL else 24
        prefix = "" if self._use.format is ToolFormat.MISTRAL else "call_"
        call_id = prefix + uuid.uuid4().hex[:length]
        return [ToolCall(call_id, encodable(name), encodable(arguments))], end


_BLANKS = re.compile(r"[ \n\t\r]*")
_SEPARATORS = re.compile(r"[ \n\t\r;,]*")
# A string that is not complete yet reaches to the end.
_STRING_OR_END = re.compile(rf'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|{_END}', re.DOTALL)
# Numbers are not of interest; Python refuses to convert some.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)


def _skip(text: str, at: int, what: re.Pattern[str] = _BLANKS) -> int:
    found = what.match(text, at)
    assert found is not None
    return found.end()


def _members(text: str, at: int) -> tuple[list[tuple[str, int, int]], int]:
    """(key, start, end) of each value in the JSON object or array at `at`, and the end of it all.

    An array's keys are "". Raises ValueError, and RecursionError if nested too deep.
    """
    closing = {"{": "}", "[": "]"}.get(text[at])
    if closing is None:
        raise ValueError("neither an object nor an array")
    found = list[tuple[str, int, int]]()
    at = _skip(text, at + 1)
    if text[at : at + 1] == closing:
        return found, at + 1
    while True:
        key = ""
        if closing == "}":
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, at)
            if not isinstance(key, str) or text[at : at + 1] != ":":
                raise ValueError("a key should be a string, and a colon follow it")
            at = _skip(text, at + 1)
        start, (_, at) = at, _DECODER.raw_decode(text, at)
        found.append((key, start, at))
        at = _skip(text, at)
        if text[at : at + 1] == closing:
            return found, at + 1
        if text[at : at + 1] != ",":
            raise ValueError("a comma should follow a value")
        at = _skip(text, at + 1)
