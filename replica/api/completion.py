"""Runs a call's choices concurrently on the engine and yields their text piece by piece."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.errors import LogitsNotFinite
from replica.api.interfaces import Claim, Engine
from replica.api.text import Detokenizer, StopStrings, Text
from replica.scheduling.request import Delta, Finish, NewRequest, Sampling, TokenLogprobs

SEED_RANGE = 2**63


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, ready to run.

    model: the name in the request. digest: its adapter's; None for the base model.
    prompts: each gets `n` choices; choice i continues prompt i // n.
    echoes: the text to put before each prompt's answer; empty without `echo`.
    priority: lower runs first. claim: keeps the adapter's version until the engine has the
    requests of all choices.
    """

    id: str
    model: str
    digest: str | None
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    n: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echoes: tuple[str, ...] = ()
    priority: int = 0
    claim: Claim | None = None

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

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
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """The output of one choice in one step. `finish` is set on a choice's last piece.

    stop_reason: the stop string or stop token that ended the choice, as vLLM reports it.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0


async def run(engine: Engine, text: Text, call: Call) -> AsyncGenerator[Piece, None]:
    """Yields the pieces of all choices in order of arrival.

    Raises the first choice's FleetError and cancels the other choices. Closing the generator
    early cancels all of the call's requests in the engine. Releases the call's claim once all its
    requests are on their way to the engine: a callback runs after what was scheduled before it, and
    after the current task waits.
    """
    loop = asyncio.get_running_loop()
    if call.choices == 1:
        loop.call_soon(call.release)
        async with aclosing(_choice(engine, text, call, 0)) as pieces:
            async for piece in pieces:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_forward(queue, _choice(engine, text, call, index)))
        for index in range(call.choices)
    ]
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
    queue: asyncio.Queue[Piece | BaseException | None], pieces: AsyncGenerator[Piece, None]
) -> None:
    """Puts one choice's pieces on the queue, then None at its end or the exception it raised."""
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait(piece)
    except Exception as error:  # `run` raises it.
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)


async def _choice(
    engine: Engine, text: Text, call: Call, index: int
) -> AsyncGenerator[Piece, None]:
    request = call.request(index)
    detokenizer = text.detokenizer(request.prompt, skip_special_tokens=call.skip_special_tokens)
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
        self._count = 0
        self._echo = call.echoes[index // call.n] if call.echoes else ""

    def write(self, delta: Delta) -> Piece:
        echo, self._echo = self._echo, ""
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
        return Piece(
            self._index, echo + text, tokens, logprobs, finish, reason, delta.cached_tokens
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
