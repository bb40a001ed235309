"""What each endpoint that runs the model makes of a body: a call, and the encoder of its answer."""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from cluster.errors import BadRequest
from replica.api.call import CallReader
from replica.api.completion import Call
from replica.api.embeddings import INPUTS_MAX, EmbeddingsEncoder, EmbeddingsRequest
from replica.api.openai_protocol import ChatRequest, CompletionRequest
from replica.api.response_encoder import (
    ChatEncoder,
    CompletionEncoder,
    ResponseEncoder,
    ResponseOptions,
)
from replica.api.responses import ResponsesEncoder, ResponsesRequest
from replica.api.sglang import NEW_TOKENS, GenerateEncoder, GenerateRequest
from replica.scheduling.request import Sampling

Prepared = tuple[Call, Callable[[Call], ResponseEncoder]]
"""The encoder is made for the call that runs: it has its final id."""


class Kinds:
    def __init__(self, reader: CallReader) -> None:
        self._reader = reader

    async def chat(self, request: ChatRequest) -> Prepared:
        options = ResponseOptions.of(request, bool(request.logprobs))
        call = await self._reader.chat(request)
        return call, lambda call: ChatEncoder(call, options)

    async def completion(self, request: CompletionRequest) -> Prepared:
        options = ResponseOptions.of(request, request.logprobs is not None)
        call = await self._reader.completion(request)
        return call, lambda call: CompletionEncoder(call.given, options)

    async def response(self, request: ResponsesRequest) -> Prepared:
        call = await self._reader.chat(request.as_chat())
        call = replace(call, id=f"resp_{uuid.uuid4().hex}")
        return call, lambda call: ResponsesEncoder(call, request)

    async def generate(self, request: GenerateRequest) -> Prepared:
        with _named(request.names):
            call = await self._reader.completion(request.as_completion(), NEW_TOKENS)
        try:
            request.check_start(call.prompts)
        except BaseException:
            call.release()
            raise
        return call, lambda call: GenerateEncoder(call, request)

    async def embeddings(self, request: EmbeddingsRequest) -> Prepared:
        with _named({"prompt": "input", "n": "input"}):
            call = await self._reader.completion(request.as_completion(), choices_max=INPUTS_MAX)
        sampling = Sampling(max_tokens=1, temperature=0.0, embeds=True)
        call = replace(call, id=f"embd-{uuid.uuid4().hex}", sampling=sampling)
        return call, lambda call: EmbeddingsEncoder(call, request)


@contextlib.contextmanager
def _named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name a field of `names` name what it stands for instead."""
    try:
        yield
    except BadRequest as error:
        field = error.field or ""
        if field not in names:
            raise
        message = names[field] + error.message.removeprefix(field)
        raise type(error)(message, field=names[field]) from error
