"""Encodes pieces as OpenAI's JSON: bodies, and stream chunks built around cached fixed parts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from replica.api.completion import Call, Piece
from replica.api.text import Text
from replica.scheduling.request import TokenLogprobs

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


@dataclass(slots=True)
class Answer:
    """One choice, accumulated from its pieces."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: Piece | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.last = piece


class ResponseEncoder(Protocol):
    """Encodes the response to one call."""

    def chunk(self, piece: Piece, usage: Usage) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

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
        self._continuous = options.continuous_usage

    def chunk(self, choice: dict[str, Any], usage: Usage) -> bytes:
        choices = orjson.dumps([choice])
        if self._continuous:
            return self.head + choices + b',"usage":' + orjson.dumps(usage.json()) + b"}\n\n"
        return self.head + choices + self.tail

    def usage_chunk(self, usage: Usage) -> bytes:
        return self.head + b'[],"usage":' + orjson.dumps(usage.json()) + b"}\n\n"


class ChatEncoder:
    def __init__(self, call: Call, options: ResponseOptions, text: Text) -> None:
        self._call, self._options, self._text = call, options, text
        self._frame = _Frame(call, options, "chat.completion.chunk")
        self._started: set[int] = set()
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
        if self._frame.plain and piece.finish is None:
            if not piece.text:
                return start
            return start + self._prefixes[piece.index] + orjson.dumps(piece.text) + self._suffix
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish,
        }
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

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._frame.usage_chunk(usage)

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.last is not None
            choice: dict[str, Any] = {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": "".join(answer.text),
                    "refusal": None,
                },
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.last.finish,
                "stop_reason": answer.last.stop_reason,
            }
            if self._options.token_ids:
                choice["token_ids"] = answer.tokens
            choices.append(choice)
        body = _envelope(self._call, "chat.completion", choices, usage)
        if self._options.token_ids:
            body["prompt_token_ids"] = self._call.prompts[0]
        return orjson.dumps(body)

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
        name, data = _token_name(self._text, token, self._options)
        return {"token": name, "logprob": logprob, "bytes": list(data)}


class CompletionEncoder:
    def __init__(self, call: Call, options: ResponseOptions, text: Text) -> None:
        self._call, self._options, self._text = call, options, text
        self._frame = _Frame(call, options, "text_completion")
        self._started: set[int] = set()
        self._offsets = [len(echo) for echo in call.echoes for _ in range(call.n)]
        self._offsets = self._offsets or [0] * call.choices
        self._prefixes = [
            self._frame.head + b'[{"index":%d,"text":' % index for index in range(call.choices)
        ]
        self._suffix = b',"logprobs":null,"finish_reason":null}]' + self._frame.tail

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        if self._frame.plain and piece.finish is None:
            if not piece.text:
                return b""
            return self._prefixes[piece.index] + orjson.dumps(piece.text) + self._suffix
        choice = self._choice(piece.index, piece.text, piece.tokens, piece.logprobs, piece)
        if self._options.token_ids and piece.index not in self._started:
            self._started.add(piece.index)
            choice["prompt_token_ids"] = self._call.prompts[piece.index // self._call.n]
        return self._frame.chunk(choice, usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._frame.usage_chunk(usage)

    def body(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.last is not None
            text = "".join(answer.text)
            choice = self._choice(index, text, answer.tokens, answer.logprobs, answer.last)
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
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs),
            "finish_reason": end.finish,
        }
        if end.finish is not None:
            choice["stop_reason"] = end.stop_reason
        if self._options.token_ids:
            choice["token_ids"] = tokens
        return choice

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._options.logprobs:
            return None
        names = [_token_name(self._text, entry.token, self._options)[0] for entry in entries]
        offsets = []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {
            "text_offset": offsets,
            "token_logprobs": [entry.logprob for entry in entries],
            "tokens": names,
            "top_logprobs": [
                {name: entry.logprob}
                | {_token_name(self._text, token, self._options)[0]: p for token, p in entry.top}
                for name, entry in zip(names, entries, strict=True)
            ],
        }


def _envelope(call: Call, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {
        "id": call.id,
        "object": kind,
        "created": int(time.time()),
        "model": call.model,
        "choices": choices,
        "usage": usage.json(),
    }


def _token_name(text: Text, token: int, options: ResponseOptions) -> tuple[str, bytes]:
    """A token's display name in logprobs, and its bytes."""
    data = text.token_bytes(token)
    if options.tokens_as_ids:
        return f"token_id:{token}", data
    return data.decode(errors="replace"), data
