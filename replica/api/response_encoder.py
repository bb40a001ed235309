"""Encodes pieces as OpenAI's JSON: bodies, and stream chunks built around cached fixed parts."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from replica.api.completion import Call, Piece
from replica.api.logprobs import (
    completion_logprobs,
    prompt_logprobs,
    prompt_offsets,
    token_name,
)
from replica.api.openai_protocol import GenerationRequest
from replica.api.text import Text
from replica.api.tools import ToolCall
from replica.scheduling.request import Finish, PromptResult, TokenLogprobs

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Token counts over all choices of a call. Each prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.completion_tokens += len(piece.tokens)
        self.cached_tokens = max(self.cached_tokens, piece.cached_tokens)

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """What the client asked to receive beside the text."""

    logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    prompt_logprobs: int | None = None

    @classmethod
    def of(cls, request: GenerationRequest, logprobs: bool) -> "ResponseOptions":
        return cls(
            logprobs=logprobs,
            token_ids=bool(request.return_token_ids),
            tokens_as_ids=bool(request.return_tokens_as_token_ids),
            include_usage=request.include_usage,
            continuous_usage=request.continuous_usage,
            prompt_logprobs=request.prompt_logprobs,
        )


@dataclass(slots=True)
class Answer:
    """One choice, accumulated from its pieces."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    thought: list[str] = field(default_factory=list)
    prompt: PromptResult | None = None
    cached_tokens: int = 0
    last: Piece | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.calls += piece.calls
        self.thought.append(piece.thought)
        self.prompt = piece.prompt or self.prompt
        self.cached_tokens = max(self.cached_tokens, piece.cached_tokens)
        self.last = piece


def likeliest(answers: Sequence[Answer], n: int, kept: int) -> list[Answer]:
    """Of each prompt's n answers, those with the highest mean log-probability, best first."""

    def mean(answer: Answer) -> float:
        return sum(entry.logprob for entry in answer.logprobs) / max(len(answer.logprobs), 1)

    prompts = [answers[begin : begin + n] for begin in range(0, len(answers), n)]
    return [each for own in prompts for each in sorted(own, key=mean, reverse=True)[:kept]]


class ResponseEncoder(Protocol):
    """Encodes the response to one call."""

    def chunk(self, piece: Piece, usage: Usage) -> bytes: ...

    def end(self, usage: Usage) -> bytes:
        """What closes a stream."""

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes: ...


class _Frame:
    """The fixed parts of a stream's chunks: `head` before the choices, `tail` after them.

    plain: chunks carry only text, so they can be built by concatenation.
    """

    def __init__(self, call: Call, options: ResponseOptions, kind: str) -> None:
        constant = {"id": call.id, "object": kind, "created": int(time.time()), "model": call.model}
        self.head = b"data: " + orjson.dumps(constant)[:-1] + b',"choices":'
        self.tail = (b',"usage":null' if options.include_usage else b"") + b"}\n\n"
        self.plain = not (options.logprobs or options.token_ids or options.continuous_usage)
        self._include_usage = options.include_usage
        self._continuous = options.continuous_usage

    def chunk(self, choice: dict[str, Any], usage: Usage) -> bytes:
        choices = orjson.dumps([choice])
        if self._continuous:
            return self.head + choices + b',"usage":' + orjson.dumps(usage.json()) + b"}\n\n"
        return self.head + choices + self.tail

    def end(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return self.head + b'[],"usage":' + orjson.dumps(usage.json()) + b"}\n\n" + DONE


class ChatEncoder:
    def __init__(self, call: Call, options: ResponseOptions) -> None:
        self._call, self._options, self._text = call, options, call.text
        self._frame = _Frame(call, options, "chat.completion.chunk")
        self._started: set[int] = set()
        self._called: Counter[int] = Counter()  # tools, by choice
        self._prefixes = [
            self._frame.head + b'[{"index":%d,"delta":{"content":' % index
            for index in range(call.choices)
        ]
        self._suffix = b'},"logprobs":null,"finish_reason":null}]' + self._frame.tail

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        start = b""
        if piece.index not in self._started:
            self._started.add(piece.index)
            start = self._first(piece.index)
        if self._frame.plain and piece.finish is None and not (piece.calls or piece.thought):
            if not piece.text:
                return start
            return start + self._prefixes[piece.index] + orjson.dumps(piece.text) + self._suffix
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.logprobs),
        }
        if piece.thought:
            choice["delta"]["reasoning_content"] = piece.thought
        if piece.calls:
            first = self._called[piece.index]
            self._called[piece.index] += len(piece.calls)
            calls = enumerate(piece.calls, first)
            choice["delta"]["tool_calls"] = [{"index": i, **_call(call)} for i, call in calls]
        choice["finish_reason"] = self._finish(piece, self._called[piece.index])
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._options.token_ids:
            choice["token_ids"] = piece.tokens
        return start + self._frame.chunk(choice, usage)

    def _first(self, index: int) -> bytes:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        prompt = b""
        if self._options.token_ids:
            prompt = b',"prompt_token_ids":' + orjson.dumps(self._call.prompts[0])
        return self._frame.head + orjson.dumps([choice]) + prompt + self._frame.tail

    def end(self, usage: Usage) -> bytes:
        return self._frame.end(usage)

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.last is not None
            content = "".join(answer.text)
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            if self._call.thinks is not None:
                message["reasoning_content"] = "".join(answer.thought) or None
                message["content"] = content or None
            if answer.calls:
                message["content"] = content or None
                message["tool_calls"] = [_call(call) for call in answer.calls]
            choice: dict[str, Any] = {
                "index": index,
                "message": message,
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": self._finish(answer.last, len(answer.calls)),
                "stop_reason": answer.last.stop_reason,
            }
            if self._options.token_ids:
                choice["token_ids"] = answer.tokens
            choices.append(choice)
        body = _envelope(self._call, "chat.completion", choices, usage)
        if self._options.token_ids:
            body["prompt_token_ids"] = self._call.prompts[0]
        return orjson.dumps(body | _of_prompt(self._text, answers[0], self._options))

    def _finish(self, piece: Piece, calls: int) -> str | None:
        tools = self._call.tools
        if calls and piece.finish is Finish.STOP and tools is not None and not tools.named:
            return "tool_calls"
        return piece.finish

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._options.logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token, entry.logprob),
                    "top_logprobs": [self._token(*top) for top in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        name, data = token_name(self._text, token, self._options.tokens_as_ids)
        return {"token": name, "logprob": logprob, "bytes": list(data)}


class CompletionEncoder:
    def __init__(self, call: Call, options: ResponseOptions) -> None:
        self._call, self._options, self._text = call, options, call.text
        self._frame = _Frame(call, options, "text_completion")
        self._started: set[int] = set()
        self._offsets = [len(echo) for echo in call.echoes for _ in range(call.n)]
        self._offsets = self._offsets or [0] * call.choices
        self._prefixes = [
            self._frame.head + b'[{"index":%d,"text":' % index for index in range(call.choices)
        ]
        self._suffix = b',"logprobs":null,"finish_reason":null}]' + self._frame.tail

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        first = piece.index not in self._started
        if first:
            self._started.add(piece.index)
        if self._frame.plain and piece.finish is None:
            # A first token that has no text yet is told: clients take the time.
            if not piece.text and not first:
                return b""
            return self._prefixes[piece.index] + orjson.dumps(piece.text) + self._suffix
        choice = self._choice(
            piece.index, piece.text, piece.tokens, piece.logprobs, piece, piece.prompt
        )
        if self._options.token_ids and first:
            choice["prompt_token_ids"] = self._call.prompts[piece.index // self._call.n]
        return self._frame.chunk(choice, usage)

    def end(self, usage: Usage) -> bytes:
        return self._frame.end(usage)

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.last is not None
            text = "".join(answer.text)
            choice = self._choice(
                index, text, answer.tokens, answer.logprobs, answer.last, answer.prompt
            )
            choice |= _of_prompt(self._text, answer, self._options)
            if self._options.token_ids:
                choice["prompt_token_ids"] = self._call.prompts[index // self._call.n]
            choices.append(choice)
        return orjson.dumps(_envelope(self._call, "text_completion", choices, usage))

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        end: Piece,
        prompt: PromptResult | None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs, prompt),
            "finish_reason": end.finish,
        }
        if end.finish is not None:
            choice["stop_reason"] = end.stop_reason
        if self._options.token_ids:
            choice["token_ids"] = tokens
        return choice

    def _logprobs(
        self, index: int, entries: Sequence[TokenLogprobs], prompt: PromptResult | None
    ) -> dict[str, Any] | None:
        """prompt: on a choice's first part. With `echo` its tokens go before the answer's."""
        if not self._options.logprobs:
            return None
        text, as_ids = self._text, self._options.tokens_as_ids
        listed: list[TokenLogprobs | int] = []
        offsets: list[int] = []
        if self._call.echoes and prompt is not None:
            tokens = self._call.prompts[index // self._call.n]
            listed += [tokens[0], *prompt.logprobs]
            offsets += prompt_offsets(text, tokens, self._call.echoes[index // self._call.n])
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token_name(text, entry.token, as_ids)[0])
        top = self._call.sampling.logprobs or 0
        return completion_logprobs(text, [*listed, *entries], offsets, top, as_ids)


def _of_prompt(text: Text, answer: Answer, options: ResponseOptions) -> dict[str, Any]:
    if options.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": prompt_logprobs(text, answer.prompt, options.prompt_logprobs)}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _envelope(call: Call, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {
        "id": call.id,
        "object": kind,
        "created": int(time.time()),
        "model": call.model,
        "choices": choices,
        "usage": usage.json(),
    }
