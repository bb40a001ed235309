"""How many pages rows will still need: what admission and parking leave free for them.

A row grows by a token a step until it ends. When that is nobody knows: `max_tokens` bounds it, and
clients often leave that far above what they get. So a row is expected to grow by `horizon` tokens,
or up to its bound where that is nearer. The horizon follows the outputs of requests that ended, and
what had to be computed again because rows grew further: as that comes to AGAIN_MAX of what was
needed, the horizon has no end. Then all pages a row can ever need are left free for it, and nothing
more is computed again (the idea of SGLang's `new_token_ratio`, with a bound).
"""

import math
from collections.abc import Iterable

from cluster.costs import Smoothed
from replica.scheduling.request import Request

# Tokens computed again ÷ tokens needed, of late.
AGAIN_MAX = 0.05
# Before any request has ended.
_FIRST_MEAN = 256.0
# Of how many times the memory's tokens "of late" is, at most.
_WINDOW = 40


class Growth:
    """needed, again: tokens computed for the first time, and once more. horizon: tokens that a row
    is expected to grow by, at most.
    """

    def __init__(self, page_tokens: int, capacity_tokens: int, outputs: float = 2.0) -> None:
        """capacity_tokens: of all pages. outputs: the horizon, in mean outputs; few are longer than
        two. 0: nothing is left free until too much was computed again.
        """
        self.needed = self.again = 0
        self._late_needed = self._late_again = 0.0
        self._page_tokens = page_tokens
        self._capacity_tokens = capacity_tokens
        self._window = float(_WINDOW * capacity_tokens)
        self._outputs = outputs
        self._output = Smoothed(_FIRST_MEAN)
        self.horizon = outputs * _FIRST_MEAN

    @property
    def over_needed(self) -> float:
        """Tokens computed ÷ tokens that had to be."""
        return (self.needed + self.again) / max(self.needed, 1)

    def computed(self, needed: int, again: int) -> None:
        """What one step computed."""
        self.needed += needed
        self.again += again
        self._late_needed += needed
        self._late_again += again
        if self._late_needed > self._window:
            self._late_needed /= 2
            self._late_again /= 2
        spent = self.spent
        self.horizon = math.inf
        if spent < 1:
            self.horizon = self._outputs * self._output.value / (1 - spent)

    def ended(self, output_tokens: int) -> None:
        self._output.take_in(output_tokens)

    @property
    def spent(self) -> float:
        """Of what may be computed again: 1 when it is all spent."""
        return self._late_again / max(self._late_needed, self._window / 2) / AGAIN_MAX

    def of(self, request: Request) -> int:
        """Pages that it is still to take."""
        tokens = min(request.tokens_max, request.tokens + self.horizon)
        return -int(-tokens // self._page_tokens) - len(request.pages)

    def peak(self, running: Iterable[Request], parked: Iterable[Request]) -> int:
        """Pages that these need at most beyond those they have. Running rows give theirs back as
        they end; parked ones have no end in sight.
        """
        still = sum(map(self.of, parked))
        horizon = self.horizon
        if horizon == math.inf:
            # Rows may share pages, which are not given back with the first of them.
            return still + sum(map(self.of, running))
        if not horizon:
            return still
        size, ahead = self._page_tokens, int(horizon)
        ending: dict[int, list[int]] = {}  # pages until they end → of how many rows, their tokens
        alive = tokens = held = 0
        for request in running:
            own = request.tokens
            left = request.tokens_max - own
            end = ending.setdefault((ahead if left > ahead else left) // size, [0, 0])
            end[0] += 1
            end[1] += own
            alive, tokens, held = alive + 1, tokens + own, held + len(request.pages)
        most = 0.0
        for pages in sorted(ending):
            # When these end: half a page more on average, and a last page for each.
            most = max(most, tokens / size + alive * (pages + 1.5) - held)
            alive, tokens = alive - ending[pages][0], tokens - ending[pages][1]
        return still + int(most)

    def check(self, rows_max: int) -> None:
        """When the horizon loses its end, rows that began before may still take each other's pages:
        once each, and what they hold together is the memory, again and again by shrinking shares.
        """
        slack = (2 + math.log2(rows_max + 1)) * self._capacity_tokens
        assert self.again <= 2 * AGAIN_MAX * self.needed + slack, "the same tokens again and again"
