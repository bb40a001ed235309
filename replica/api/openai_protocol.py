"""What clients may send: OpenAI's requests with vLLM's extra fields, checked field by field.

Field names and defaults follow OpenAI's API reference and vLLM's `protocol.py`. Unknown fields are
ignored, as there. A known field that would change the answer and is not supported is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cluster.errors import BadRequest

CHOICES_MAX = 128
STOPS_MAX = 32
TOP_LOGPROBS_MAX = 20
# Shares are sums of tokens divided by weights: beyond this they would lose tokens to rounding.
WEIGHT_MAX = 1e6
SHOWN_VALUE_MAX = 80

# Known field → the values that ask for nothing. Anything else is refused by name.
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
    """OpenAI's `stop` is a string or a list of them."""
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
    """What chat and plain completions have in common."""

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
    priority: int | None = None  # as in vLLM: lower is handled earlier
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
    """Raises BadRequest naming the field and its value."""
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
        _check_together(request)
    return request


def shown(value: object) -> str:
    """A value as JSON, cut short."""
    try:
        text = orjson.dumps(value, default=repr).decode()
    except TypeError:  # orjson reads deeper nesting than it writes
        text = f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= SHOWN_VALUE_MAX else f"{text[:SHOWN_VALUE_MAX]}…"


def _bad_request(error: ValidationError) -> BadRequest:
    """The first thing that is wrong, as `temperature: should be … (got 3)`."""
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


def _check_together(request: GenerationRequest) -> None:
    """What concerns two fields at once."""
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
            "echo: with logprobs it would need the prompt's, which are not supported", field="echo"
        )


def read_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Messages with plain string content, checked. Other keys go to the template as they are."""
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
        return ""  # As in an assistant's turn that only called a tool.
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
    """The four shapes of `prompt`, as a list of texts or a list of token lists."""
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
            f"prompt: {len(prompt)} prompts are more than {CHOICES_MAX}", field="prompt"
        )
    if all(isinstance(text, str) for text in prompt):
        return prompt
    if all(isinstance(tokens, list) for tokens in prompt) and all(
        type(token) is int for tokens in prompt for token in tokens
    ):
        return prompt
    raise wrong
