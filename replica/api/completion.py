"""Runs a call's choices concurrently on the engine and yields their text piece by piece."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.errors import DeadlineExceeded, LogitsNotFinite
from replica.api.interfaces import Claim, Engine
from replica.api.openai_protocol import CHOICES_MAX
from replica.api.reasoning import ReasoningReader
from replica.api.stop_strings import StopStrings
from replica.api.text import Detokenizer, Text
from replica.api.tools import ToolCall, ToolReader, ToolUse
from replica.scheduling.request import (
    Delta,
    Finish,
    NewRequest,
    PromptResult,
    Sampling,
    TokenLogprobs,
)

SEED_RANGE = 2**63


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, ready to run.

    model: the name in the request. digest: its adapter's; None for the base model.
    prompts: each gets `n` choices; choice i continues prompt i // n.
    echoes: the text to put before each prompt's answer; empty without `echo`.
    prompt_only: the token that is generated is no part of the answer.
    kept: of each prompt's choices, how many the client gets: the likeliest; None: all of them.
    thinks: reasoning is split from the answer; True if the prompt begins it.
    tools: those that the answer may call. priority: lower runs first.
    claim: keeps the adapter's version until the engine has the requests of all choices.
    deadline_s: on the event loop's clock; the answer is of no use later.
    salt: cached prefixes are shared with this salt only.
    text: converts between its text and tokens.
    """

    id: str
    model: str
    digest: str | None
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    text: Text
    n: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echoes: tuple[str, ...] = ()
    prompt_only: bool = False
    kept: int | None = None
    thinks: bool | None = None
    tools: ToolUse | None = None
    priority: int = 0
    claim: Claim | None = None
    deadline_s: float | None = None
    salt: str | None = None

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def given(self) -> "Call":
        """The call with the choices that the client gets."""
        return self if self.kept is None else replace(self, n=self.kept, kept=None)

    def release(self) -> None:
        if self.claim is not None:
            self.claim.release()

    def request(self, index: int) -> NewRequest:
        """The engine's request for choice `index`. Choices of one seeded call get distinct seeds,
        wrapped to the int64 range.
        """
        sampling = self.sampling
        if sampling.seed is not None and index % self.n:
            seed = (sampling.seed + index % self.n + SEED_RANGE) % (2 * SEED_RANGE) - SEED_RANGE
            sampling = replace(sampling, seed=seed)
        return NewRequest(
            f"{self.id}-{index}",
            self.prompts[index // self.n],
            sampling,
            self.digest,
            self.priority,
            self.salt,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """The output of one choice in one step. `finish` is set on a choice's last piece.

    stop_reason: the stop string or stop token that ended the choice, as vLLM reports it.
    queued_s: on a choice's first piece, how long it waited for its first row. calls: of tools.
    prompt: on a choice's first piece, if the call asks for it. thought: reasoning before `text`.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    queued_s: float = 0.0
    calls: tuple[ToolCall, ...] = ()
    prompt: PromptResult | None = None
    thought: str = ""


async def run(engine: Engine, call: Call) -> AsyncGenerator[Piece, None]:
    """Yields the pieces of all choices in order of arrival, until the call's deadline.

    Raises DeadlineExceeded, and what `_run` raises. The engine drops the requests then.
    """
    async with aclosing(_run(engine, call)) as pieces:
        if call.deadline_s is None:
            async for piece in pieces:
                yield piece
            return
        loop = asyncio.get_running_loop()
        try:
            while True:
                yield await asyncio.wait_for(anext(pieces), call.deadline_s - loop.time())
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed before the answer was complete") from error


async def _run(engine: Engine, call: Call) -> AsyncGenerator[Piece, None]:
    """Raises the first choice's FleetError and cancels the other choices. Closing the generator
    early cancels all of the call's requests in the engine. Releases the call's claim once all its
    requests are on their way to the engine: a callback runs after what was scheduled before it, and
    after the current task waits. More than CHOICES_MAX are not on their way at once; then whoever
    has the call releases it at the end.
    """
    loop = asyncio.get_running_loop()
    if call.choices == 1:
        loop.call_soon(call.release)
        async with aclosing(_choice(engine, call, 0)) as pieces:
            async for piece in pieces:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
    at_once = asyncio.Semaphore(CHOICES_MAX)
    tasks = [
        asyncio.create_task(_forward(queue, _choice(engine, call, index), at_once))
        for index in range(call.choices)
    ]
    if call.choices <= CHOICES_MAX:
        loop.call_soon(call.release)
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    queue: asyncio.Queue[Piece | BaseException | None],
    pieces: AsyncGenerator[Piece, None],
    at_once: asyncio.Semaphore,
) -> None:
    """Puts one choice's pieces on the queue, then None at its end or the exception it raised."""
    try:
        async with at_once, aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait(piece)
    except Exception as error:  # `run` raises it.
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)


async def _choice(engine: Engine, call: Call, index: int) -> AsyncGenerator[Piece, None]:
    request, skip = call.request(index), call.skip_special_tokens
    detokenizer = call.text.detokenizer(request.prompt, skip_special_tokens=skip)
    writer = _Writer(call, index, detokenizer)
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            if isinstance(delta.error, LogitsNotFinite):  # the engine does not know the name
                raise LogitsNotFinite(f"{call.model}: {delta.error.message}", field="model")
            if delta.error is not None:
                raise delta.error
            piece = writer.write(delta)
            yield piece
            if piece.finish is not None:
                return


class _Writer:
    """Converts one choice's deltas to pieces: detokenizes, and looks for stop strings."""

    def __init__(self, call: Call, index: int, detokenizer: Detokenizer) -> None:
        self._call = call
        self._index = index
        self._detokenizer = detokenizer
        self._stops = StopStrings(call.stops, include=call.include_stop) if call.stops else None
        self._tools = None if call.tools is None else ToolReader(call.tools)
        self._reasoning = None if call.thinks is None else ReasoningReader(call.thinks)
        self._count = 0
        self._echo = call.echoes[index // call.n] if call.echoes else ""

    def write(self, delta: Delta) -> Piece:
        echo, self._echo = self._echo, ""
        if self._call.prompt_only:
            cached, queued_s, told = delta.cached_tokens, delta.queued_s, delta.prompt
            ended = (Finish.LENGTH, None, cached, queued_s, (), told)
            return Piece(self._index, echo, (), (), *ended)
        tokens, logprobs = delta.tokens, delta.logprobs
        finish = delta.finish
        reason: str | int | None = None
        if self._stops is None:
            text = self._detokenizer.push(self._visible(tokens, finish))
            self._count += len(tokens)
            if finish is not None:
                text += self._detokenizer.flush()
        else:
            text, used = self._push_until_stop(self._stops, tokens, finish)
            if self._stops.found is not None:
                tokens, logprobs = tokens[:used], logprobs[:used]
                finish, reason = Finish.STOP, self._stops.found
        if reason is None and finish is Finish.STOP:
            reason = self._stop_token(tokens)
        thought, calls = "", list[ToolCall]()
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text)
            if finish is not None:
                more_thought, more_text = self._reasoning.flush()
                thought, text = thought + more_thought, text + more_text
        if self._tools is not None:
            text, calls = self._tools.push(text)
            if finish is not None:
                rest, more = self._tools.flush()
                text, calls = text + rest, calls + more
        return Piece(
            self._index,
            echo + text,
            tokens,
            logprobs,
            finish,
            reason,
            delta.cached_tokens,
            delta.queued_s,
            tuple(calls),
            delta.prompt,
            thought,
        )

    def _push_until_stop(
        self, stops: StopStrings, tokens: Sequence[int], finish: Finish | None
    ) -> tuple[str, int]:
        """The text to emit, and the number of tokens up to and including the stop string.

        Detokenizes one token at a time, to leave tokens after the stop out of the count.
        """
        text = ""
        visible = self._visible(tokens, finish)
        for used, token in enumerate(visible, start=1):
            self._count += 1
            piece = self._detokenizer.push((token,))
            if self._count <= self._call.sampling.min_tokens:
                text += stops.release(piece)
                continue
            text += stops.push(piece)
            if stops.found is not None:
                return text, used
        self._count += len(tokens) - len(visible)
        if finish is not None:
            text += stops.push(self._detokenizer.flush())
            if stops.found is None:
                text += stops.release("")
        return text, len(tokens)

    def _visible(self, tokens: Sequence[int], finish: Finish | None) -> Sequence[int]:
        """The tokens whose text belongs to the answer: all but the stop token that ended it."""
        if finish is Finish.STOP and not self._call.include_stop:
            return tokens[:-1]
        return tokens

    def _stop_token(self, tokens: Sequence[int]) -> int | None:
        """The last token if it is one of the request's `stop_token_ids`."""
        if tokens and tokens[-1] in self._call.sampling.stop_tokens:
            return tokens[-1]
        return None
