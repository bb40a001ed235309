"""From a checked call to pieces of text: choices run side by side, each ends or is cancelled."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from replica.api.interfaces import Engine
from replica.api.text import Detokenizer, StopStrings, Text
from replica.scheduling.request import Delta, Finish, NewRequest, Sampling, TokenLogprobs

SEED_RANGE = 2**63


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, ready to run.

    model: the name that was asked for. digest: of its adapter, None for the base model.
    prompts: each gets `n` choices; choice i continues prompt i // n.
    echoes: for each prompt the text to repeat before the answer. priority: lower goes first.
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

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def request(self, index: int) -> NewRequest:
        """Choice `index` as the engine sees it. With a seed, each choice has its own."""
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
    """What one step gave one choice. The last one has `finish`.

    stop_reason: the stop string or stop token that ended it, as vLLM reports it.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0


async def run(engine: Engine, text: Text, call: Call) -> AsyncGenerator[Piece, None]:
    """Pieces of all choices as they come. Raises the first FleetError and cancels the rest.

    Closed early it cancels everything it started in the engine.
    """
    if call.choices == 1:
        async with aclosing(_choice(engine, text, call, 0)) as pieces:
            async for piece in pieces:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_feed(queue, _choice(engine, text, call, index)))
        for index in range(call.choices)
    ]
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


async def _feed(
    queue: asyncio.Queue[Piece | BaseException | None], pieces: AsyncGenerator[Piece, None]
) -> None:
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait(piece)
    except Exception as error:  # Handed to the reader, who raises it.
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
            if delta.error is not None:
                raise delta.error
            piece = writer.write(delta)
            yield piece
            if piece.finish is not None:
                return


class _Writer:
    """Deltas of one choice → pieces."""

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
            text, used = self._look_for_stops(self._stops, tokens, finish)
            if self._stops.found is not None:
                tokens, logprobs = tokens[:used], logprobs[:used]
                finish, reason = Finish.STOP, self._stops.found
        if reason is None and finish is Finish.STOP:
            reason = self._stop_token(tokens)
        return Piece(
            self._index, echo + text, tokens, logprobs, finish, reason, delta.cached_tokens
        )

    def _look_for_stops(
        self, stops: StopStrings, tokens: Sequence[int], finish: Finish | None
    ) -> tuple[str, int]:
        """Text to give out, and how many tokens came up to a stop string.

        Token by token, so that those after the stop are not counted.
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
        """Without the token that ended the request: it is not part of the answer's text."""
        if finish is Finish.STOP and not self._call.include_stop:
            return tokens[:-1]
        return tokens

    def _stop_token(self, tokens: Sequence[int]) -> int | None:
        """The last token when it was one of the request's own stop tokens."""
        if tokens and tokens[-1] in self._call.sampling.stop_tokens:
            return tokens[-1]
        return None
