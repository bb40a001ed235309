"""Request models: OpenAI's fields and vLLM's extra ones, validated field by field.

Names and defaults follow OpenAI's API reference and vLLM's `protocol.py`. As in vLLM, a number or
a boolean may be written as a string. Unknown fields are left to `Bodies`. A known but unsupported
field is refused if its value would change the answer.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from cluster.errors import BadRequest

CHOICES_MAX = 128
STOPS_MAX = 32
TOP_LOGPROBS_MAX = 20
# Log-probabilities of prompt tokens that one call may ask for, alternatives included.
PROMPT_LOGPROBS_MAX = 2**20
TOOLS_MAX = 128
MESSAGES_MAX = 2**14
# Logits divided by much less would overflow.
REPETITION_PENALTY_MIN = 0.01
SHOWN_VALUE_MAX = 80

# Known field → its neutral values. Any other value is refused, naming the field.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "length_penalty": (1,),
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "prompt_embeds": (),
    "logprob_token_ids": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "thinking_token_budget": (-1,),
    "include_reasoning": (True,),
    "verbosity": ("medium",),
    "chat_template": (),
    "documents": ([],),
    "cache_salt": (),
    # How other servers name an adapter: the base model would answer in its place.
    "adapter_id": (),
    "adapter_source": (),
    "lora_name": (),
    "lora_request": (),
}


def _as_list(value: object) -> object:
    """OpenAI's `stop` is a string or a list of strings."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("should be a string or a list of strings")
    return value


Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=STOPS_MAX)]
Stop = Annotated[Words, BeforeValidator(_as_list, json_schema_input_type=Words | str | None)]
# Read by `read_prompts`.
Prompt = Annotated[
    Any,
    WithJsonSchema(TypeAdapter(str | list[str] | list[int] | list[list[int]]).json_schema()),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that chat completions and completions share."""

    model_config = ConfigDict(extra="ignore")
    prompt_field: ClassVar[str]
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = UNSUPPORTED

    model: Annotated[str, Field(min_length=1)] | None = None  # the base model, as in vLLM
    lora_path: str | None = None  # SGLang's way to name an adapter
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = []
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=REPETITION_PENALTY_MIN)] | None = None
    logit_bias: dict[str, Number] | None = None
    allowed_token_ids: Annotated[list[int], Field(min_length=1)] | None = None
    bad_words: Words | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    seed: Seed | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    priority: int | None = None  # as in vLLM: lower runs earlier
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(GenerationRequest):
    prompt_field = "messages"

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None  # SGLang's


class CompletionRequest(GenerationRequest):
    prompt_field = "prompt"

    unsupported = {name: values for name, values in UNSUPPORTED.items() if name != "best_of"}

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None


Request = TypeVar("Request", bound=BaseModel)


def parsed(kind: type[Request], body: bytes) -> tuple[Request, list[str]]:
    """The request, and the names of fields that `kind` does not know. Raises BadRequest with
    the field's name and value.

    A kind may name fields that it refuses, as `unsupported`, and others, as `passed_on`.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadRequest(f"the body is not a JSON object: {shown(data)}")
    unsupported = getattr(kind, "unsupported", {})
    refuse_unsupported(data, unsupported)
    request = validated(kind, data)
    if isinstance(request, GenerationRequest):
        _check_combinations(request)
    known = {*kind.model_fields, *unsupported, *getattr(kind, "passed_on", ())}
    return request, [name for name in data if name not in known]


def validated(kind: type[Request], data: Mapping[str, Any]) -> Request:
    """Raises BadRequest with the field's name and value."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _bad_request(error) from error


def shown(value: object) -> str:
    """A value as JSON, truncated to SHOWN_VALUE_MAX characters."""
    try:
        text = orjson.dumps(value, default=repr).decode()
    except TypeError:  # orjson parses deeper nesting than it serializes
        text = f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= SHOWN_VALUE_MAX else f"{text[:SHOWN_VALUE_MAX]}…"


def _bad_request(error: ValidationError) -> BadRequest:
    """The first validation error, as `temperature: should be … (got 3)`."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ""
    for part in first["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
    if first["type"] == "missing":
        return BadRequest(f"{field}: required", field=field)
    what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    what = what[:1].lower() + what[1:]
    return BadRequest(f"{field}: {what} (got {shown(first['input'])})", field=field)


def refuse_unsupported(
    data: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]], within: str = ""
) -> None:
    """Raises BadRequest for a field with another than its neutral values. within: goes before the
    field's name.
    """
    for name, neutral in unsupported.items():
        value, field = data.get(name), within + name
        if value is not None and value not in neutral:
            raise BadRequest(f"{field}: not supported (got {shown(value)})", field=field)


def _check_combinations(request: GenerationRequest) -> None:
    """Checks that depend on two fields."""
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options: only with stream: true", field="stream_options")
    if isinstance(request, ChatRequest):
        if request.echo:
            raise BadRequest("echo: not supported in chat (got true)", field="echo")
        if request.top_logprobs and not request.logprobs:
            raise BadRequest(
                f"top_logprobs: {request.top_logprobs} needs logprobs: true", field="top_logprobs"
            )
        if request.add_generation_prompt and request.continue_final_message:
            raise BadRequest(
                "continue_final_message: true excludes add_generation_prompt: true",
                field="continue_final_message",
            )
    if request.prompt_logprobs is not None and request.stream:
        raise BadRequest(
            f"prompt_logprobs: {request.prompt_logprobs} is not available with stream: true",
            field="prompt_logprobs",
        )
    if isinstance(request, CompletionRequest):
        if request.max_tokens == 0 and not request.echo:
            raise BadRequest("max_tokens: 0 needs echo: true", field="max_tokens")
        _check_best_of(request.best_of, request)


def _check_best_of(best_of: int | None, request: CompletionRequest) -> None:
    if best_of is None:
        return
    if best_of < (request.n or 1):
        raise BadRequest(f"best_of: {best_of} is less than n, {request.n}", field="best_of")
    if request.stream and best_of > 1:
        raise BadRequest(f"best_of: {best_of} is not available with stream: true", field="best_of")


def read_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """The validated messages, their content as plain strings. Other keys reach the chat template
    unchanged.
    """
    messages = []
    for i, message in enumerate(request.messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise BadRequest(
                f"{where}.role: should be a string (got {shown(role)})", field=f"{where}.role"
            )
        content = _read_content(message.get("content"), where)
        read = {**message, "content": content}
        if message.get("tool_calls"):
            read["tool_calls"] = _read_calls(message["tool_calls"], f"{where}.tool_calls")
        messages.append(read)
    return messages


def _read_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Earlier calls, with their arguments as objects: templates write them as JSON again."""
    read = []
    for given in calls if isinstance(calls, list) else [calls]:
        call: dict[str, Any] = given if isinstance(given, dict) else {}
        match call:
            case {"function": {"arguments": str() as arguments} as function}:
                with contextlib.suppress(ValueError, RecursionError):
                    arguments = _parsed(arguments or "{}")
            case {"function": {"arguments": arguments} as function}:
                pass
            case _:
                function, arguments = {}, None
        if not isinstance(arguments, dict):
            raise BadRequest(
                f"{where}: should be calls whose arguments are a JSON object (got {shown(given)})",
                field=where,
            )
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def _parsed(arguments: str) -> object:
    """Raises ValueError or RecursionError. Models may escape half a surrogate pair."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return orjson.loads(encodable(json.dumps(json.loads(arguments), ensure_ascii=False)))


def encodable(text: str) -> str:
    """With U+FFFD in place of lone surrogates, which JSON can escape but UTF-8 has not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_content(content: object, where: str) -> str:
    where = f"{where}.content"
    if content is None:
        return ""  # OpenAI omits it in an assistant message that only calls tools.
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(
            f"{where}: should be a string or a list of text parts (got {shown(content)})",
            field=where,
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise BadRequest(
                f"{where}[{i}].type: only text is supported (got {shown(kind)})",
                field=f"{where}[{i}].type",
            )
        if not isinstance(part.get("text"), str):
            raise BadRequest(
                f"{where}[{i}].text: should be a string (got {shown(part.get('text'))})",
                field=f"{where}[{i}].text",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def read_prompts(prompt: object, prompts_max: int) -> list[str] | list[list[int]]:
    """Normalizes the four forms of `prompt` to a list of texts or a list of token lists."""
    given = prompt
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise _wrong_prompt(given)
    if not prompt:
        raise BadRequest("prompt: is empty", field="prompt")
    if all(type(token) is int for token in prompt):
        prompt = [prompt]
    if len(prompt) > prompts_max:
        raise BadRequest(
            f"prompt: {len(prompt)} prompts, over the limit of {prompts_max}", field="prompt"
        )
    if all(isinstance(text, str) for text in prompt):
        return prompt
    if all(isinstance(tokens, list) for tokens in prompt) and all(
        type(token) is int for tokens in prompt for token in tokens
    ):
        return prompt
    raise _wrong_prompt(given)


def _wrong_prompt(given: object) -> BadRequest:
    return BadRequest(
        "prompt: should be a string, a list of strings, a list of token ids or a list of lists "
        f"of token ids (got {shown(given)})",
        field="prompt",
    )
