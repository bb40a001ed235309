"""Turns a validated HTTP request into a `Call`: resolves the model, tokenizes, checks lengths."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from cluster.errors import BadRequest, ContextLengthExceeded, ModelNotFound
from replica.api.completion import Call
from replica.api.interfaces import Adapters, Claim
from replica.api.openai_protocol import (
    CHOICES_MAX,
    PROMPT_LOGPROBS_MAX,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    read_messages,
    read_prompts,
    shown,
)
from replica.api.reasoning import BEGIN, reasons
from replica.api.sampling import SamplingReader, check_characters
from replica.api.structured import checked
from replica.api.text import INLINE_CHARACTERS, OwnTemplate, Text
from replica.api.tools import ToolFormat, ToolUse, format_of, read_tools

T = TypeVar("T")

# OpenAI's default of `max_tokens` for /v1/completions.
COMPLETION_TOKENS = 16
# Adapters' chat templates in memory, of at most 128 KiB each, and tokenizers with tokens of theirs.
TEMPLATES_KEPT = 256


class CallReader:
    """Builds calls with one replica's adapter names, tokenizer and limits.

    A call holds a claim on its adapter's version. Whoever gets the call releases it.

    base: the base model's name. context: the model's limit, in tokens. kv_tokens: what all KV pages
    hold. tool_format: how the model writes calls of tools; None: as its chat template teaches.
    base_names: all that requests may call the base model.
    """

    def __init__(
        self,
        adapters: Adapters,
        text: Text,
        base: str,
        context: int,
        kv_tokens: int,
        sampling: SamplingReader,
        tool_format: ToolFormat | None,
        base_names: Set[str],
    ) -> None:
        self._adapters = adapters
        self._text = text
        self._base = base
        # Of prompt and answer together.
        self._tokens_max = min(context, kv_tokens)
        self._limit = f"{'context length' if context <= kv_tokens else 'KV capacity'} of "
        self._limit += f"{self._tokens_max}"
        self._sampling = sampling
        self._tool_format = tool_format
        self._base_names = base_names
        # By digest, the adapters' own.
        self._templates: dict[str, str] = {}
        self._texts: dict[str, Text] = {}

    async def chat(self, request: ChatRequest) -> Call:
        async with self.claim(request.model, request.lora_path) as (model, claim):
            text = await self.text(claim)
            own = await self.own_template(claim)
            template = text.chat_template if own is None else own.text
            tools = read_tools(request, self._tool_format or format_of(template), text)
            resume = bool(request.continue_final_message)
            rendered = await text.render(
                read_messages(request),
                own,
                add_generation_prompt=not resume and request.add_generation_prompt is not False,
                continue_final_message=resume,
                template_arguments=request.chat_template_kwargs,
                tools=() if tools is None else tools.definitions,
            )
            requested = request.max_completion_tokens or request.max_tokens
            # The template writes the special tokens, so the tokenizer adds none unless asked to.
            special = bool(request.add_special_tokens)
            prompt = await self._encode(text, rendered, special, request, requested or 1)
            top = (request.top_logprobs or 0) if request.logprobs else None
            call = await self._call(
                request, "chatcmpl", model, claim, text, (prompt,), requested, None, top
            )
            if tools is not None:
                call = await self._with_tools(call, tools)
            splits = reasons(template) and request.separate_reasoning is not False
            # An answer that must follow a grammar cannot think.
            if splits and call.sampling.grammar is None:
                hidden = call.skip_special_tokens and not text.is_special(BEGIN)
                begun = rendered.rstrip().endswith(BEGIN)
                call = replace(call, thinks=begun, skip_special_tokens=hidden)
            return call

    async def own_template(self, claim: Claim | None) -> OwnTemplate | None:
        """The chat template of the claimed version; None for the base model's. Raises
        AdapterFailed.
        """
        if claim is None or not claim.version.template:
            return None
        digest = claim.version.digest
        text = self._templates.get(digest)
        if text is None:
            text = await asyncio.to_thread(self._adapters.chat_template, digest)
            _keep(self._templates, digest, text)
        eos_token = claim.version.eos_token
        eos_text = None if eos_token is None else (await self.text(claim)).added_text(eos_token)
        return OwnTemplate(claim.version.name, text, eos_text)

    async def text(self, claim: Claim | None) -> Text:
        """That of the claimed version; None: the base model's. Raises AdapterFailed."""
        if claim is None or not claim.version.added_tokens:
            return self._text
        digest = claim.version.digest
        text = self._texts.get(digest)
        if text is None:
            tokens = await asyncio.to_thread(self._adapters.added_tokens, digest)
            text = await asyncio.to_thread(self._text.with_added, tokens)
            _keep(self._texts, digest, text)
        return text

    async def _with_tools(self, call: Call, tools: ToolUse) -> Call:
        sampling = call.sampling
        if tools.grammar is not None:
            if sampling.grammar is not None:
                raise BadRequest(
                    "tool_choice: a call that must be made excludes a format of the answer",
                    field="tool_choice",
                )
            grammar = await asyncio.to_thread(checked, "tools", tools.grammar)
            sampling = replace(sampling, grammar=grammar)
        hidden = call.skip_special_tokens and not call.text.is_special(tools.format.mark)
        return replace(call, sampling=sampling, tools=tools, skip_special_tokens=hidden)

    async def completion(
        self,
        request: CompletionRequest,
        default: int = COMPLETION_TOKENS,
        choices_max: int = CHOICES_MAX,
    ) -> Call:
        """default: of `max_tokens`."""
        async with self.claim(request.model, request.lora_path) as (model, claim):
            text = await self.text(claim)
            special = request.add_special_tokens is not False
            # The engine generates one token at least; `prompt_only` drops it.
            requested = 1 if request.max_tokens == 0 else request.max_tokens
            room = requested or default
            prompts: list[tuple[int, ...]] = []
            echoes: list[str] = []
            given = read_prompts(request.prompt, choices_max)
            many = sum(len(each) for each in given if isinstance(each, str)) > INLINE_CHARACTERS
            for prompt in given:
                if isinstance(prompt, str):
                    tokens = await self._encode(text, prompt, special, request, room, many)
                else:
                    tokens = self._truncated(tuple(prompt), request, room)
                    self._sampling.check(tokens, "prompt")
                prompts.append(tokens)
                if not request.echo:
                    continue
                if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
                    echoes.append(prompt)
                else:
                    echoes.append(await text.decode_long(tokens))
            call = await self._call(
                request,
                "cmpl",
                model,
                claim,
                text,
                tuple(prompts),
                requested,
                default,
                request.logprobs,
                request.best_of,
                choices_max,
            )
            only = request.max_tokens == 0
            return replace(call, prompt_only=only, echoes=tuple(echoes))

    async def _encode(
        self,
        text: Text,
        words: str,
        special: bool,
        request: GenerationRequest,
        room: int,
        among_many: bool = False,
    ) -> tuple[int, ...]:
        """room: tokens that a truncated prompt leaves for the answer."""
        tokens_min, field = text.tokens_min(words), request.prompt_field
        # Refuse it before the cost of tokenizing it.
        if tokens_min > self._tokens_max and request.truncate_prompt_tokens is None:
            raise ContextLengthExceeded(
                f"{field}: at least {tokens_min} tokens, over the {self._limit}", field=field
            )
        tokens = await text.encode(words, add_special_tokens=special, among_many=among_many)
        return self._truncated(tokens, request, room)

    def _truncated(
        self, prompt: tuple[int, ...], request: GenerationRequest, room: int
    ) -> tuple[int, ...]:
        """The last `truncate_prompt_tokens`, as in vLLM; −1: as many as fit before an answer."""
        count = request.truncate_prompt_tokens
        if count == -1:
            count = max(1, self._tokens_max - room)
        return prompt if count is None else prompt[max(0, len(prompt) - count) :]

    @asynccontextmanager
    async def claim(
        self, model: str | None, lora_path: str | None = None
    ) -> AsyncIterator[tuple[str, Claim | None]]:
        """The model's name, and a claim that outlives the block, unless the block raises. None for
        the base model.
        """
        model = self._base if model in self._base_names else model or self._base
        if lora_path is not None:
            if model not in (self._base, lora_path):
                raise BadRequest(
                    f"lora_path: {shown(lora_path)} and model: {shown(model)} differ",
                    field="lora_path",
                )
            model = lora_path
        if model == self._base:
            yield model, None
            return
        model = model.removeprefix(f"{self._base}:")  # as SGLang writes it
        claim = await self._adapters.claim(model)
        if claim is None:
            raise ModelNotFound(f"the model {shown(model)} does not exist", field="model")
        try:
            yield model, claim
        except BaseException:
            claim.release()
            raise

    async def _call(
        self,
        request: GenerationRequest,
        kind: str,
        model: str,
        claim: Claim | None,
        text: Text,
        prompts: tuple[tuple[int, ...], ...],
        requested: int | None,
        default: int | None,
        logprobs: int | None,
        best_of: int | None = None,
        choices_max: int = CHOICES_MAX,
    ) -> Call:
        """requested: the client's max_tokens. default: used where the client gives none; None: as
        many as fit. best_of: None: as many choices as the client gets.
        """
        n, field = (request.n or 1, "n") if best_of is None else (best_of, "best_of")
        choices = len(prompts) * n
        if choices > choices_max:
            raise BadRequest(
                f"{field}: {choices} choices ({field} × prompts), over the limit of {choices_max}",
                field=field,
            )
        longest = max(len(prompt) for prompt in prompts)
        for prompt in prompts:
            if not prompt:
                raise BadRequest(f"{request.prompt_field}: is empty", field=request.prompt_field)
            self._sampling.check(prompt, request.prompt_field)
        if self._sampling.defaults.max_tokens is not None:
            default = min(default or self._tokens_max, self._sampling.defaults.max_tokens)
        max_tokens = self._max_tokens(request, longest, requested, default)
        check_characters("stop", sum(map(len, request.stop)))
        sampling = await self._sampling.read(text, request, max_tokens, logprobs)
        eos_token = None if claim is None else claim.version.eos_token
        if eos_token is not None and not sampling.ignore_eos:
            sampling = replace(sampling, stop_tokens=sampling.stop_tokens | {eos_token})
        _check_prompt_logprobs(sampling.prompt_logprobs, n * sum(map(len, prompts)))
        if best_of is not None and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)  # which choice is best
        return Call(
            id=f"{kind}-{uuid.uuid4().hex}",
            model=model,
            digest=None if claim is None else claim.version.digest,
            prompts=prompts,
            n=n,
            kept=None if best_of is None else request.n or 1,
            sampling=sampling,
            text=text,
            stops=tuple(request.stop),
            include_stop=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
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


def _keep(kept: dict[str, T], digest: str, value: T) -> None:
    """In place of the oldest, if there are many."""
    while len(kept) >= TEMPLATES_KEPT:
        del kept[next(iter(kept))]
    kept[digest] = value


def _check_prompt_logprobs(top: int | None, tokens: int) -> None:
    """tokens: of the prompts of all choices."""
    if top is None or tokens * (top + 1) <= PROMPT_LOGPROBS_MAX:
        return
    raise BadRequest(
        f"prompt_logprobs: {tokens} prompt tokens × {top + 1} are over the limit of "
        f"{PROMPT_LOGPROBS_MAX} log-probabilities",
        field="prompt_logprobs",
    )
