"""Request models: OpenAI's fields and vLLM's extra ones, validated field by field.

Names and defaults follow OpenAI's API reference and vLLM's `protocol.py`. Unknown fields are
ignored, as in vLLM. A known but unsupported field is refused if its value would change the answer.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cluster.errors import BadRequest

CHOICES_MAX = 128
STOPS_MAX = 32
TOP_LOGPROBS_MAX = 20
# The fair share is a running sum of tokens / weight; larger weights would round tokens away.
WEIGHT_MAX = 1e6
SHOWN_VALUE_MAX = 80

# Known field → its neutral values. Any other value is refused, naming the field.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "truncate_prompt_tokens": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "thinking_token_budget": (-1,),
    "verbosity": ("medium",),
    "chat_template": (),
    "documents": ([],),
    "cache_salt": (),
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


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_as_list),
    Field(max_length=STOPS_MAX),
]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that chat completions and completions share."""

    model_config = ConfigDict(strict=True, extra="ignore")
    prompt_field: ClassVar[str]

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = []
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Seed | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
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

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest):
    prompt_field = "prompt"

    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False
    pinned: bool = False
    weight: Annotated[float, Field(ge=1 / WEIGHT_MAX, le=WEIGHT_MAX)] = 1.0


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    lora_name: Annotated[str, Field(min_length=1)]


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """Parses and validates a body. Raises BadRequest with the field's name and value."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadRequest(f"the body is not a JSON object: {shown(data)}")
    if issubclass(kind, GenerationRequest):
        _refuse_unsupported(data)
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _bad_request(error) from error
    if isinstance(request, GenerationRequest):
        _check_combinations(request)
    return request


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


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    for field, neutral in UNSUPPORTED.items():
        value = data.get(field)
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
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise BadRequest(
            "echo: not supported with logprobs, which would need prompt logprobs", field="echo"
        )


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
        messages.append({**message, "content": _read_content(message.get("content"), where)})
    return messages


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


def read_prompts(prompt: object) -> list[str] | list[list[int]]:
    """Normalizes the four forms of `prompt` to a list of texts or a list of token lists."""
    wrong = BadRequest(
        "prompt: should be a string, a list of strings, a list of token ids or a list of lists "
        f"of token ids (got {shown(prompt)})",
        field="prompt",
    )
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise wrong
    if not prompt:
        raise BadRequest("prompt: is empty", field="prompt")
    if all(type(token) is int for token in prompt):
        prompt = [prompt]
    if len(prompt) > CHOICES_MAX:
        raise BadRequest(
            f"prompt: {len(prompt)} prompts, over the limit of {CHOICES_MAX}", field="prompt"
        )
    if all(isinstance(text, str) for text in prompt):
        return prompt
    if all(isinstance(tokens, list) for tokens in prompt) and all(
        type(token) is int for tokens in prompt for token in tokens
    ):
        return prompt
    raise wrong
