"""POST /v1/responses: OpenAI's newer endpoint, for text and tools, without stored state.

A request becomes a chat request; the answer's pieces become output items and their events.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, WithJsonSchema

from cluster.errors import BadRequest
from replica.api.completion import Call, Piece
from replica.api.openai_protocol import (
    MESSAGES_MAX,
    TOOLS_MAX,
    UNSUPPORTED,
    ChatRequest,
    Number,
    refuse_unsupported,
    shown,
    validated,
)
from replica.api.response_encoder import Answer, Usage
from replica.api.tools import ToolCall
from replica.scheduling.request import Finish

# Known field → its neutral values.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    **UNSUPPORTED,
    "add_generation_prompt": (True,),
    "background": (False,),
    "continue_final_message": (False,),
    "conversation": (),
    "echo": (False,),
    "include": ([], ["reasoning.encrypted_content"]),  # there is none
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "max_tool_calls": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "prompt_logprobs": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
# What chats take beside the fields of `ResponsesRequest`.
_OF_CHAT = (
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "chat_template_kwargs",
    "frequency_penalty",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "top_k",
    "truncate_prompt_tokens",
)
# Read by `_messages`.
Input = Annotated[Any, WithJsonSchema(TypeAdapter(str | list[dict[str, Any]]).json_schema())]


class ResponsesRequest(BaseModel):
    """What the answer depends on, with `_OF_CHAT`; `store`, `metadata` and the like are ignored."""

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = _UNSUPPORTED
    passed_on: ClassVar[Sequence[str]] = _OF_CHAT

    model: Annotated[str, Field(min_length=1)] | None = None
    lora_path: str | None = None
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    priority: int | None = None

    def as_chat(self) -> ChatRequest:
        """Raises BadRequest naming the field."""
        for field in ("text", "tools", "tool_choice"):
            _dumped([[getattr(self, field)]], field)  # the answer repeats it, deeper
        fields: dict[str, Any] = {
            "model": self.model,
            "lora_path": self.lora_path,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_nested(tool) for tool in self.tools or []] or None,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _format((self.text or {}).get("format")),
            "priority": self.priority,
            "separate_reasoning": False,
        }
        more = self.model_extra or {}
        fields |= {name: more[name] for name in _OF_CHAT if name in more}
        refuse_unsupported(self.text or {}, {"verbosity": ("medium",)}, "text.")
        if isinstance(self.tool_choice, dict):
            name = self.tool_choice.get("name")
            fields["tool_choice"] = {"type": "function", "function": {"name": name}}
        return validated(ChatRequest, fields)

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        if not isinstance(self.input, list) or not self.input:
            raise BadRequest(
                f"input: should be a string or a list of items (got {shown(self.input)})",
                field="input",
            )
        if len(self.input) > MESSAGES_MAX:
            raise BadRequest(
                f"input: has {len(self.input)} items, the maximum is {MESSAGES_MAX}", field="input"
            )
        for index, item in enumerate(self.input):
            self._add(messages, item, f"input[{index}]")
        if not messages:
            raise BadRequest("input: has no message", field="input")
        return messages

    def _add(self, messages: list[dict[str, Any]], item: Any, where: str) -> None:
        match item:
            case {"type": "function_call", "name": str(name), "arguments": str(arguments)}:
                call = {
                    "id": item.get("call_id"),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                last = messages[-1] if messages else {}
                if last.get("role") == "assistant":
                    last.setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            case {"type": "function_call_output", "output": output}:
                content = output if isinstance(output, str) else _dumped(output, where)
                messages.append(
                    {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
                )
            case {"type": "reasoning"}:
                pass  # of an earlier turn; templates leave it out too
            case {"role": str(role), "content": content} if (
                item.get("type", "message") == "message"
            ):
                role = "system" if role == "developer" else role
                messages.append({"role": role, "content": _text_of(content)})
            case _:
                raise BadRequest(f"{where}: not supported (got {shown(item)})", field=where)


class ResponsesEncoder:
    """Implements `ResponseEncoder` for the one choice of a response."""

    def __init__(self, call: Call, request: ResponsesRequest) -> None:
        self._call, self._request = call, request
        self._created = int(time.time())
        self._sequence = 0
        self._text: list[str] = []
        self._message: int | None = None  # the output index of the message that is open
        self._output: list[dict[str, Any]] = []
        self._begun = False

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        events = b""
        if not self._begun:
            self._begun = True
            shown_now = self._response("in_progress", [], None)
            events += self._event("response.created", response=shown_now)
            events += self._event("response.in_progress", response=shown_now)
        if piece.text:
            events += self._more_text(piece.text)
        for call in piece.calls:
            events += self._close_message() + self._whole_call(call)
        if piece.finish is not None:
            if not self._output and self._message is None:
                events += self._more_text("")
            events += self._close_message()
            status = _status(piece.finish)
            events += self._event(
                f"response.{status}", response=self._response(status, self._output, usage)
            )
        return events

    def end(self, usage: Usage) -> bytes:
        return b""  # `response.completed` is the last event

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        (answer,) = answers
        assert answer.last is not None and answer.last.finish is not None
        text, status = "".join(answer.text), _status(answer.last.finish)
        output = [_message(self._item_id("msg"), text)] if text or not answer.calls else []
        output += [self._call_item(call) for call in answer.calls]
        return orjson.dumps(self._response(status, output, usage))

    def _more_text(self, text: str) -> bytes:
        events = b""
        if self._message is None:
            self._message = len(self._output)
            item = {**_message(self._item_id("msg"), ""), "status": "in_progress", "content": []}
            self._output.append(item)
            events += self._event(
                "response.output_item.added", output_index=self._message, item=item
            )
            events += self._event("response.content_part.added", **self._place(), part=_part(""))
        self._text.append(text)
        if text:
            events += self._event(
                "response.output_text.delta", **self._place(), delta=text, logprobs=[]
            )
        return events

    def _close_message(self) -> bytes:
        if self._message is None:
            return b""
        text = "".join(self._text)
        item = _message(self._output[self._message]["id"], text)
        place = self._place()
        events = self._event("response.output_text.done", **place, text=text, logprobs=[])
        events += self._event("response.content_part.done", **place, part=_part(text))
        events += self._event("response.output_item.done", output_index=self._message, item=item)
        self._output[self._message] = item
        self._message, self._text = None, []
        return events

    def _whole_call(self, call: ToolCall) -> bytes:
        index, item = len(self._output), self._call_item(call)
        self._output.append(item)
        open_item = {**item, "status": "in_progress", "arguments": ""}
        place = {"item_id": item["id"], "output_index": index}
        arguments = "response.function_call_arguments"
        return (
            self._event("response.output_item.added", output_index=index, item=open_item)
            + self._event(f"{arguments}.delta", **place, delta=call.arguments)
            + self._event(f"{arguments}.done", **place, name=call.name, arguments=call.arguments)
            + self._event("response.output_item.done", output_index=index, item=item)
        )

    def _place(self) -> dict[str, Any]:
        assert self._message is not None
        item_id = self._output[self._message]["id"]
        return {"item_id": item_id, "output_index": self._message, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._call.id}_{len(self._output)}"

    def _call_item(self, call: ToolCall) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": f"fc_{call.id}",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: Usage | None
    ) -> dict[str, Any]:
        request, sampling = self._request, self._call.sampling
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._call.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "model": self._call.model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }


def _dumped(value: object, field: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:  # orjson parses deeper nesting than it serializes
        raise BadRequest(f"{field}: is nested too deep", field=field) from error


def _status(finish: Finish) -> str:
    return "incomplete" if finish is Finish.LENGTH else "completed"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(item_id: str, text: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": item_id,
        "role": "assistant",
        "status": "completed",
        "content": [_part(text)],
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """A function's fields lie beside `type` here, and below `function` in chats."""
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": tool.get("type"), "function": function}


def _format(given: object) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise BadRequest(f"text.format: should be an object (got {shown(given)})", field="text")
    if given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": given}
    return given


def _text_of(content: object) -> object:
    """Parts of text, as chats name them; `read_messages` refuses the rest."""
    if not isinstance(content, list):
        return content
    kinds = ("input_text", "output_text")
    return [
        {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in kinds else part
        for part in content
    ]
