"""SGLang's own endpoints: POST /generate, and what its clients ask of the server and the model."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import BadRequest
from replica.api.completion import Call, Piece
from replica.api.openai_protocol import (
    CHOICES_MAX,
    REPETITION_PENALTY_MIN,
    TOP_LOGPROBS_MAX,
    CompletionRequest,
    Number,
    Prompt,
    Seed,
    Stop,
    refuse_unsupported,
    validated,
)
from replica.api.response_encoder import DONE, Answer, Usage
from replica.scheduling.request import Finish, TokenLogprobs

NEW_TOKENS = 128
"""SGLang's default of `max_new_tokens`."""
_WITHIN = "sampling_params."
# Known field → its neutral values.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "input_embeds": (),
    "image_data": ([], ""),
    "audio_data": ([], ""),
    "video_data": ([], ""),
    "token_ids_logprob": (),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "session_params": (),
    "session_id": (),
    "custom_logit_processor": (),
    "background": (False,),
    "bootstrap_host": (),
    "extra_key": (),
}
_UNSUPPORTED_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "beam_width": (),
    "custom_params": ({},),
    "stop_regex": ([], ""),
    "structural_tag": (),
}
# A field of `CompletionRequest` → the field here.
_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "ebnf",
    "include_stop_str_in_output": "no_stop_trim",
}


class SamplingParams(BaseModel):
    model_config = ConfigDict(extra="ignore")

    max_new_tokens: Annotated[int, Field(ge=0)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=REPETITION_PENALTY_MIN)] | None = None
    stop: Stop = []
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    logit_bias: dict[str, Number] | None = None
    sampling_seed: Seed | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if isinstance(given, dict):
            refuse_unsupported(given, _UNSUPPORTED_SAMPLING, _WITHIN)
        return given


class GenerateRequest(BaseModel):
    """rid: the answer's id in `meta_info`."""

    model_config = ConfigDict(extra="ignore")
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = _UNSUPPORTED

    text: Prompt | None = None
    input_ids: Prompt | None = None
    sampling_params: SamplingParams | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Field(ge=-1)] | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    return_text_in_logprobs: bool | None = None
    lora_path: str | None = None
    model: str | None = None
    rid: Annotated[str, Field(min_length=1)] | None = None
    priority: int | None = None

    @property
    def names(self) -> dict[str, str]:
        """Fields of `CompletionRequest` → those here that they come from."""
        names = {name: _WITHIN + name for name in SamplingParams.model_fields}
        names |= {theirs: _WITHIN + ours for theirs, ours in _NAMES.items()}
        return names | {"prompt": "text" if self.input_ids is None else "input_ids"}

    @property
    def prompt(self) -> Any:
        return self.text if self.input_ids is None else self.input_ids

    def check_start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises BadRequest."""
        start, shortest = self.logprob_start_len or 0, min(map(len, prompts))
        if self.return_logprob and start >= shortest:
            raise BadRequest(
                f"logprob_start_len: {start} is not below the {shortest} tokens of the input",
                field="logprob_start_len",
            )

    def as_completion(self) -> CompletionRequest:
        """Raises BadRequest."""
        if (self.text is None) == (self.input_ids is None):
            raise BadRequest("text: either text or input_ids is required", field="text")
        names = {ours: theirs for theirs, ours in _NAMES.items()}
        sampling = (self.sampling_params or SamplingParams()).model_dump(exclude_none=True)
        fields = {names.get(name, name): value for name, value in sampling.items()}
        if self.return_logprob:
            fields["logprobs"] = self.top_logprobs_num or 0
            if self.logprob_start_len is not None and self.logprob_start_len >= 0:
                fields["prompt_logprobs"] = fields["logprobs"]
        fields |= {"prompt": self.prompt, "lora_path": self.lora_path or None, "model": self.model}
        return validated(CompletionRequest, fields | {"priority": self.priority})


class GenerateEncoder:
    """Implements `ResponseEncoder`: each part of a stream has the whole text so far."""

    def __init__(self, call: Call, request: GenerateRequest) -> None:
        self._call, self._request, self._text = call, request, call.text
        self._began_s = time.monotonic()
        self._answers = [Answer() for _ in range(call.choices)]

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        answer = self._answers[piece.index]
        answer.add(piece)
        answer.text = ["".join(answer.text)]
        return b"data: " + orjson.dumps(self._result(piece.index, answer)) + b"\n\n"

    def end(self, usage: Usage) -> bytes:
        return DONE

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        results = [self._result(index, answer) for index, answer in enumerate(answers)]
        return orjson.dumps(results if self._several else results[0])

    @property
    def _several(self) -> bool:
        prompt = self._request.prompt
        listed = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return listed or self._call.choices > 1

    def _result(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.last is not None
        prompt = self._call.prompts[index // self._call.n]
        meta = {
            "id": self._request.rid or self._call.id,
            "finish_reason": self._finish(answer.last),
            "prompt_tokens": len(prompt),
            "completion_tokens": len(answer.tokens),
            "cached_tokens": answer.cached_tokens,
            "e2e_latency": time.monotonic() - self._began_s,
        }
        if self._request.return_logprob:
            meta |= self._logprobs(prompt, answer)
        result = {"text": "".join(answer.text), "output_ids": answer.tokens, "meta_info": meta}
        return result | ({"index": index} if self._several else {})

    def _finish(self, piece: Piece) -> dict[str, Any] | None:
        if piece.finish is None:
            return None
        if piece.finish is Finish.LENGTH:
            length = 0 if self._call.prompt_only else self._call.sampling.max_tokens
            return {"type": "length", "length": length}
        matched = piece.stop_reason
        if matched is None and piece.tokens:
            matched = piece.tokens[-1]  # the model's own end
        return {"type": "stop", "matched": matched}

    def _logprobs(self, prompt: Sequence[int], answer: Answer) -> dict[str, Any]:
        """Of each token [logprob, id, text], and of the likeliest beside it. The first token of the
        input has none.
        """
        start = self._request.logprob_start_len
        if start is None or start < 0:
            start = len(prompt) - 1
        told = () if answer.prompt is None else answer.prompt.logprobs[start:]
        entries, inputs = answer.logprobs, [[None, *self._token(prompt[start])]]
        tops: list[list[Any] | None] = [None]
        return {
            "input_token_logprobs": inputs + [self._entry(e.logprob, e.token) for e in told],
            "output_token_logprobs": [self._entry(e.logprob, e.token) for e in entries],
            "input_top_logprobs": tops + [self._top(e) for e in told],
            "output_top_logprobs": [self._top(e) for e in entries],
        }

    def _top(self, entry: TokenLogprobs) -> list[Any]:
        count = self._request.top_logprobs_num or 0
        return [self._entry(logprob, token) for token, logprob in entry.top[:count]]

    def _entry(self, logprob: float, token: int) -> list[Any]:
        return [logprob, *self._token(token)]

    def _token(self, token: int) -> tuple[int, str | None]:
        if not self._request.return_text_in_logprobs:
            return token, None
        return token, self._text.token_bytes(token).decode(errors="replace")
