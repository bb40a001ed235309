"""POST /tokenize and /detokenize, as vLLM has them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import BadRequest, ContextLengthExceeded
from replica.api import asgi
from replica.api.bodies import Bodies
from replica.api.call import CallReader
from replica.api.interfaces import Claim
from replica.api.openai_protocol import MESSAGES_MAX, ChatRequest, read_messages, validated
from replica.api.text import Text

# A longer text is not tokenized, as it is far over the context.
_CHARACTERS_PER_TOKEN_MAX = 8


class TokenizeRequest(BaseModel):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(max_length=MESSAGES_MAX)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=2**20)]


class TextRoutes:
    """context: in tokens."""

    def __init__(self, reader: CallReader, context: int, vocab: int, bodies: Bodies) -> None:
        self._reader, self._context, self._vocab, self._bodies = reader, context, vocab, bodies

    async def tokenize(self, http: Request) -> Response:
        request, _ = await self._bodies.read(TokenizeRequest, http)
        if (request.prompt is None) == (request.messages is None):
            raise BadRequest("prompt: either prompt or messages is required", field="prompt")
        words, special, field = request.prompt, request.add_special_tokens is not False, "prompt"
        async with self._claimed(request.model) as (text, claim):
            if words is None:
                field = "messages"
                words = await self._rendered(request, text, claim)
                special = bool(request.add_special_tokens)
        characters_max = _CHARACTERS_PER_TOKEN_MAX * self._context
        if len(words) > characters_max:
            raise ContextLengthExceeded(
                f"{field}: {len(words)} characters, over the limit of {characters_max}, "
                f"{_CHARACTERS_PER_TOKEN_MAX} for each token of the context",
                field=field,
            )
        tokens = await text.encode(words, add_special_tokens=special)
        names = None
        if request.return_token_strs:
            names = await asyncio.to_thread(_names, text, tokens)
        body = {"count": len(tokens), "max_model_len": self._context, "tokens": tokens}
        return asgi.JsonResponse({**body, "token_strs": names})

    @asynccontextmanager
    async def _claimed(self, model: str | None) -> AsyncIterator[tuple[Text, Claim | None]]:
        async with self._reader.claim(model) as (_, claim):
            yield await self._reader.text(claim), claim
        if claim is not None:
            claim.release()

    async def _rendered(self, request: TokenizeRequest, text: Text, claim: Claim | None) -> str:
        chat = validated(ChatRequest, {"messages": request.messages})
        return await text.render(
            read_messages(chat),
            await self._reader.own_template(claim),
            add_generation_prompt=request.add_generation_prompt,
        )

    async def detokenize(self, http: Request) -> Response:
        request, _ = await self._bodies.read(DetokenizeRequest, http)
        lowest, highest = min(request.tokens, default=0), max(request.tokens, default=0)
        if lowest < 0 or highest >= self._vocab:
            wrong = lowest if lowest < 0 else highest
            raise BadRequest(
                f"tokens: {wrong} is not between 0 and {self._vocab - 1}", field="tokens"
            )
        async with self._claimed(request.model) as (text, _):
            pass
        prompt = await text.decode_long(request.tokens, skip_special_tokens=False)
        return asgi.JsonResponse({"prompt": prompt})


def _names(text: Text, tokens: Sequence[int]) -> list[str]:
    return [text.token_bytes(token).decode(errors="replace") for token in tokens]
