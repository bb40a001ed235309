"""Which tokens may come next in answers that must follow a grammar.

llguidance is imported where the first grammar needs it: an engine runs without it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.errors import BadRequest
from replica.model.tokenizer import read_tokenizer
from replica.scheduling.request import Request

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = NDArray[np.int32]
"""One bit a token, lowest first: 1 if it may come next. [ceil(vocab / 32)]"""

# Masks of different requests are computed beside each other; llguidance releases the GIL.
_THREADS = 2
# A step waits this long for masks, which usually take some 10 µs. Rows whose masks take longer are
# left out of it.
_WAIT_S = 0.002
_COMPILED_MAX = 64
_REASON_MAX = 300


class _Follower:
    """One request's matcher, and how many tokens of the output it has taken in."""

    def __init__(self, tokenizer: "LLTokenizer", matcher: "LLMatcher") -> None:
        self._vocab = tokenizer.vocab_size
        self._matcher = matcher
        self._taken = 0

    def mask(self, output: tuple[int, ...]) -> Mask:
        """output: all tokens so far.

        Raises ValueError if the grammar exceeds a limit of the parser, has no text, or does not go
        with the tokens.
        """
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        matcher = self._matcher
        for token in output[self._taken :]:
            # What follows the end of the grammar's text (`ignore_eos`) is no part of it.
            if not matcher.is_stopped():
                matcher.consume_token(token)
        self._taken = len(output)
        mask = allocate_token_bitmask(1, self._vocab)
        if not matcher.is_error():
            fill_next_token_bitmask(matcher, mask)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        found: Mask = mask[0]
        return found


class Grammars:
    """The masks of the requests that have a grammar, computed on threads while steps run.

    Nothing of it is lost when a request is parked or loses its pages: a mask depends only on the
    grammar and the output. wake: called on a thread when a mask is ready.
    """

    def __init__(
        self,
        model_dir: str,
        vocab: int,
        eos_tokens: frozenset[int],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = model_dir, vocab, sorted(eos_tokens)
        self._wake = wake
        self._threads = ThreadPoolExecutor(_THREADS, "grammar")
        self._tokenizer: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._followers: dict[str, Future[_Follower]] = {}
        self._masks: dict[str, Future[Mask]] = {}

    def add(self, request: Request) -> None:
        """Compiles the grammar, and computes the first mask. The first call reads the tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._threads.submit(self._read_tokenizer)
        grammar = request.sampling.grammar
        assert grammar is not None
        tokenizer, compiled = self._tokenizer, self._compiled.get(grammar)
        if compiled is None:
            compiled = self._threads.submit(lambda: _matcher(tokenizer.result(), grammar))
            self._compiled[grammar] = compiled
            if len(self._compiled) > _COMPILED_MAX:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        self._followers[request.id] = self._threads.submit(
            lambda: _Follower(tokenizer.result(), compiled.result().deep_copy())
        )
        self.advance(request)

    def advance(self, request: Request) -> None:
        """The request's output has changed: computes its next mask."""
        follower, output = self._followers[request.id], tuple(request.output)
        mask = self._threads.submit(lambda: follower.result().mask(output))
        mask.add_done_callback(lambda _: self._wake())
        self._masks[request.id] = mask

    def wait(self, requests: Sequence[Request]) -> tuple[set[str], dict[str, BadRequest]]:
        """The ids of those whose masks are not ready in time, and the errors of those that have
        none.
        """
        masks = {request.id: self._masks[request.id] for request in requests}
        brief = [mask for name, mask in masks.items() if self._followers[name].done()]
        if brief:
            wait(brief, _WAIT_S)
        late = {name for name, mask in masks.items() if not mask.done()}
        # llguidance's panics are no `Exception`.
        errors = {name: mask.exception() for name, mask in masks.items() if name not in late}
        return late, {name: _refused(error) for name, error in errors.items() if error is not None}

    def mask(self, request: Request) -> Mask:
        """The request's mask, which must be ready."""
        return self._masks[request.id].result(timeout=0)

    def remove(self, request_id: str) -> None:
        """The request has ended. One without a grammar is ignored."""
        for futures in (self._masks, self._followers):
            future = futures.pop(request_id, None)
            if future is not None:
                future.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read_tokenizer(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        model_dir, vocab, eos_tokens = self._source
        return from_tokenizer(read_tokenizer(model_dir), vocab, eos_tokens)


def _matcher(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, grammar, log_level=0)


def _refused(error: BaseException) -> BadRequest:
    reason = " ".join(str(error).split())[:_REASON_MAX]
    return BadRequest(f"the grammar cannot be followed: {reason}")
