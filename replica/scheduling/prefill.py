"""Which prompts a step computes, and how many tokens of each.

By priority, lower first. Within one priority, prompts in progress go before those of new requests.

A long prompt has more tokens left than a whole step computes. It would take every step until it is
done, so it leaves an eighth of the tokens to shorter prompts behind it:

    | decode rows |  the long prompt                                          | shorter |

- An eighth, because the long prompt then ends after at most 8/7 of the tokens.
- Shorter means at most an eighth of what the long one has left: at an eighth of the rate such a
  prompt still ends first. Two prompts of about one length go one after the other: if they shared
  the steps, the first would end later and the second no sooner.
- The shorter ones go in order, but one that needs more than what is kept yields to those that fit.
- What they leave is saved, up to the tokens of one step, so that most of them take one step. If
  none comes, the long prompt takes all.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator

from replica.scheduling.plan import Work
from replica.scheduling.request import Phase, Request

_KEPT = 1 / 8

# After this many new requests were too long for the kept tokens, a step tries no more.
_TRIES = 64


class Prefill:
    """Divides the tokens of each step among prompts.

    step_tokens_max: tokens of a whole step.
    keeps: False lets a long prompt take whole steps, so that no request passes another.
    """

    def __init__(self, step_tokens_max: int, keeps: bool) -> None:
        self._step_tokens_max = step_tokens_max
        self._saved_max = float(step_tokens_max if keeps else 0)
        self._saved = self._saved_max

    def rows(
        self,
        number: int,
        tokens: int,
        begun: Iterable[Request],
        waiting: Iterable[Request],
        admit: Callable[[Request], bool],
    ) -> Iterator[Work]:
        """Rows for prompts in progress, and for new requests.

        number: of the step. tokens: left in it, more than 0. begun: requests whose prompt is in
        progress, by priority. waiting: new requests by priority, while the batch takes any. admit:
        gives one a row of the batch if it can; False if none of its tokens can be computed now.
        """
        self._saved = min(self._saved + tokens * _KEPT, self._saved_max)
        order = heapq.merge(begun, waiting, key=_priority)
        for request in order:
            if request.phase is not Phase.RUNNING and not admit(request):
                continue
            if _left(request) > self._step_tokens_max:
                yield from self._beside(request, number, tokens, order, admit)
                return
            work = _chunk(request, tokens, number)
            yield work
            tokens -= work.end - work.start
            if tokens <= 0:
                return

    def _beside(
        self,
        long: Request,
        number: int,
        tokens: int,
        order: Iterable[Request],
        admit: Callable[[Request], bool],
    ) -> Iterator[Work]:
        """Rows for a long prompt and for shorter ones behind it, which share what is left."""
        kept = left = min(int(self._saved), tokens)
        most = shortest = int(_left(long) * _KEPT)
        late, tries = [], 0
        for request in order:
            if not left or tries > _TRIES or request.priority > long.priority:
                break
            # One that does not fit joins the batch only if it goes before those that do not either.
            longest = min(most, max(left, shortest))
            new = request.phase is not Phase.RUNNING
            if new and (_left(request) > longest or not admit(request)):
                tries += 1
                continue
            needed = _left(request)
            if needed <= min(left, most):
                yield _chunk(request, left, number)
                left -= needed
            elif needed <= most:
                late.append(request)
                shortest = min(shortest, needed - 1)
        for request in sorted(late, key=_left):
            if left:
                work = _chunk(request, left, number)
                yield work
                left -= work.end - work.start
        self._saved -= kept - left
        tokens -= kept - left
        if tokens:
            yield _chunk(long, tokens, number)


def _priority(request: Request) -> int:
    return request.priority


def _left(request: Request) -> int:
    """Prompt tokens to compute; more if its prefix is cached."""
    return request.tokens - request.computed


def _chunk(request: Request, tokens: int, number: int) -> Work:
    """The row that computes up to `tokens` of its next tokens."""
    start = request.computed
    end = min(request.tokens, start + tokens)
    sample = end == request.tokens
    request.computed, request.step = end, number
    request.tokens += sample
    return Work(request, start, end, request.slot, sample)
