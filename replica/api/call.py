"""Turns a validated HTTP request into a `Call`: resolves the model, tokenizes, checks lengths."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster.errors import BadRequest, ContextLengthExceeded, ModelNotFound
from replica.api.completion import Call
from replica.api.interfaces import Adapters, Claim
from replica.api.openai_protocol import (
    CHOICES_MAX,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    read_messages,
    read_prompts,
    shown,
)
from replica.api.text import Text
from replica.scheduling.request import Sampling

# OpenAI's default of `max_tokens` for /v1/completions.
COMPLETION_TOKENS = 16


class CallReader:
    """Builds calls with one replica's adapter names, tokenizer and limits.

    A call holds a claim on its adapter's version. Whoever gets the call releases it.

    base: the base model's name. context, vocab: the model's limits, in tokens. kv_tokens: what
    all KV pages hold.
    """

    def __init__(
        self,
        adapters: Adapters,
        text: Text,
        base: str,
        context: int,
        kv_tokens: int,
        vocab: int,
    ) -> None:
        self._adapters = adapters
        self._text = text
        self._base = base
        # Of prompt and answer together.
        self._tokens_max = min(context, kv_tokens)
        self._limit = f"{'context length' if context <= kv_tokens else 'KV capacity'} of "
        self._limit += f"{self._tokens_max}"
        self._vocab = vocab

    async def chat(self, request: ChatRequest) -> Call:
        async with self._claim(request.model) as claim:
            resume = bool(request.continue_final_message)
            rendered = self._text.render_chat(
                read_messages(request),
                add_generation_prompt=not resume and request.add_generation_prompt is not False,
                continue_final_message=resume,
                template_arguments=request.chat_template_kwargs,
            )
            # The template writes the special tokens, so the tokenizer adds none unless asked to.
            prompt = await self._encode(rendered, bool(request.add_special_tokens), "messages")
            top = (request.top_logprobs or 0) if request.logprobs else None
            requested = request.max_completion_tokens or request.max_tokens
            return self._call(request, "chatcmpl", claim, (prompt,), (), requested, None, top)

    async def completion(self, request: CompletionRequest) -> Call:
        async with self._claim(request.model) as claim:
            special = request.add_special_tokens is not False
            prompts: list[tuple[int, ...]] = []
            echoes: list[str] = []
            for prompt in read_prompts(request.prompt):
                if isinstance(prompt, str):
                    tokens = await self._encode(prompt, special, "prompt")
                    echoes.append(prompt)
                else:
                    tokens = tuple(prompt)
                    self._check_vocabulary(tokens, "prompt")
                    echoes.append(self._text.decode(tokens) if request.echo else "")
                prompts.append(tokens)
            if not request.echo:
                echoes = []
            return self._call(
                request,
                "cmpl",
                claim,
                tuple(prompts),
                tuple(echoes),
                request.max_tokens,
                COMPLETION_TOKENS,
                request.logprobs,
            )

    async def _encode(self, text: str, special: bool, field: str) -> tuple[int, ...]:
        tokens_min = self._text.tokens_min(text)
        if tokens_min > self._tokens_max:  # Refuse it before the cost of tokenizing it.
            raise ContextLengthExceeded(
                f"{field}: at least {tokens_min} tokens, over the {self._limit}", field=field
            )
        return await self._text.encode(text, add_special_tokens=special)

    @asynccontextmanager
    async def _claim(self, model: str) -> AsyncIterator[Claim | None]:
        """A claim that outlives the block, unless the block raises. None for the base model."""
        if model == self._base:
            yield None
            return
        claim = await self._adapters.claim(model)
        if claim is None:
            raise ModelNotFound(f"the model {shown(model)} does not exist", field="model")
        try:
            yield claim
        except BaseException:
            claim.release()
            raise

    def _call(
        self,
        request: GenerationRequest,
        kind: str,
        claim: Claim | None,
        prompts: tuple[tuple[int, ...], ...],
        echoes: tuple[str, ...],
        requested: int | None,
        default: int | None,
        logprobs: int | None,
    ) -> Call:
        """requested: the client's max_tokens. default: used where the client gives none; None: as
        many as fit.
        """
        choices = len(prompts) * (request.n or 1)
        if choices > CHOICES_MAX:
            raise BadRequest(
                f"n: {choices} choices (n × prompts), over the limit of {CHOICES_MAX}", field="n"
            )
        longest = max(len(prompt) for prompt in prompts)
        for prompt in prompts:
            if not prompt:
                raise BadRequest(f"{request.prompt_field}: is empty", field=request.prompt_field)
            self._check_vocabulary(prompt, request.prompt_field)
        max_tokens = self._max_tokens(request, longest, requested, default)
        stop_tokens = request.stop_token_ids or []
        self._check_vocabulary(stop_tokens, "stop_token_ids")
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise BadRequest(
                f"min_tokens: {min_tokens} is more than max_tokens, {max_tokens}",
                field="min_tokens",
            )
        return Call(
            id=f"{kind}-{uuid.uuid4().hex}",
            model=request.model,
            digest=None if claim is None else claim.version.digest,
            prompts=prompts,
            n=request.n or 1,
            sampling=Sampling(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=max(0, request.top_k or 0),
                seed=request.seed,
                stop_tokens=frozenset(stop_tokens),
                ignore_eos=bool(request.ignore_eos),
                logprobs=logprobs,
            ),
            stops=tuple(request.stop),
            include_stop=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
            echoes=echoes,
            priority=request.priority or 0,
            claim=claim,
        )

    def _max_tokens(
        self, request: GenerationRequest, prompt: int, requested: int | None, default: int | None
    ) -> int:
        """prompt: tokens of the longest prompt. Raises ContextLengthExceeded."""
        left = self._tokens_max - prompt
        if left < 1:
            raise ContextLengthExceeded(
                f"{request.prompt_field}: {prompt} tokens leave no room for an answer in the "
                f"{self._limit}",
                field=request.prompt_field,
            )
        if requested is None:
            return left if default is None else min(default, left)
        if requested > left:
            raise ContextLengthExceeded(
                f"{request.prompt_field}: {prompt} prompt tokens + max_tokens {requested} = "
                f"{prompt + requested}, over the {self._limit}",
                field=request.prompt_field,
            )
        return requested

    def _check_vocabulary(self, tokens: Sequence[int], field: str) -> None:
        if not tokens or (min(tokens) >= 0 and max(tokens) < self._vocab):
            return
        for i, token in enumerate(tokens):
            if not 0 <= token < self._vocab:
                raise BadRequest(
                    f"{field}[{i}]: token id {shown(token)} is not between 0 and {self._vocab - 1}",
                    field=field,
                )
