"""How many more KV pages rows will need. Admission and parking leave these free.

A row grows by one token a step until it ends, and nobody knows when that is. `max_tokens` bounds
it, but clients often set it far above what they get. So a row is expected to grow by `horizon`
tokens, or up to its bound if that is nearer. The horizon follows the output lengths of ended
requests. It stretches with the tokens that were recomputed because rows grew further than expected.
When these reach RECOMPUTED_MAX of the tokens needed, the horizon is infinite: all pages that a row
can ever need are left free for it, and nothing more is recomputed. The idea is SGLang's
`new_token_ratio`, with a bound.
"""

import math
from collections.abc import Iterable

from cluster.costs import Smoothed
from replica.scheduling.request import Request

# Recent tokens recomputed ÷ tokens needed.
RECOMPUTED_MAX = 0.05
# Mean output before any request has ended.
_FIRST_MEAN = 256.0
# A row, in a number that also counts the tokens of all rows.
_ROW = 2**40
# Longest period that counts as recent, in multiples of the tokens that the memory holds.
_WINDOW = 40


class Growth:
    """needed: tokens computed for the first time.
    recomputed: tokens computed again.
    horizon: the most tokens that a row is expected to grow by.
    """

    def __init__(self, page_tokens: int, capacity_tokens: int, outputs: float = 2.0) -> None:
        """capacity_tokens: tokens that all pages hold.
        outputs: the horizon, in mean outputs; few outputs are longer than two. With 0 no pages are
            left free until too much was recomputed.
        """
        self.needed = self.recomputed = 0
        self._recent_needed = self._recent_recomputed = 0.0
        self._page_tokens = page_tokens
        self._capacity_tokens = capacity_tokens
        self._window = float(_WINDOW * capacity_tokens)
        self._outputs = outputs
        self._output = Smoothed(_FIRST_MEAN)
        self.horizon = outputs * _FIRST_MEAN

    @property
    def over_needed(self) -> float:
        """Tokens computed ÷ tokens needed."""
        return (self.needed + self.recomputed) / max(self.needed, 1)

    def computed(self, needed: int, recomputed: int) -> None:
        """Count the tokens of one step."""
        self.needed += needed
        self.recomputed += recomputed
        self._recent_needed += needed
        self._recent_recomputed += recomputed
        if self._recent_needed > self._window:
            self._recent_needed /= 2
            self._recent_recomputed /= 2
        spent = self.spent
        self.horizon = math.inf
        if spent < 1:
            self.horizon = self._outputs * self._output.value / (1 - spent)

    @property
    def output_tokens(self) -> float:
        """Mean output of recent requests."""
        return self._output.value

    def ended(self, output_tokens: int) -> None:
        self._output.take_in(output_tokens)

    @property
    def spent(self) -> float:
        """Share of the recompute allowance that is used up; 1 or more: all of it."""
        return self._recent_recomputed / max(self._recent_needed, self._window / 2) / RECOMPUTED_MAX

    def of(self, request: Request) -> int:
        """Pages that the request is expected to take beyond those it holds."""
        tokens = min(request.tokens_max, request.tokens + self.horizon)
        return -int(-tokens // self._page_tokens) - len(request.pages)

    def peak(self, running: Iterable[Request], parked: Iterable[Request]) -> int:
        """The most pages that these requests need at once beyond those they hold.

        Running rows give their pages back as they end. No end is known for parked ones.
        """
        still = sum(map(self.of, parked))
        horizon = self.horizon
        if horizon == math.inf:
            # Rows may share pages. The first of them to end does not free those.
            return still + sum(map(self.of, running))
        if not horizon:
            return still
        # Written for speed: this runs once a row and step.
        size, ahead = self._page_tokens, int(min(horizon, self._capacity_tokens))
        # By the pages until they end: their tokens, and rows × ROW.
        ending = [0] * (ahead // size + 1)
        held = 0
        for request in running:
            own = request.tokens
            left = request.tokens_max - own
            ending[(ahead if left > ahead else left) // size] += own + _ROW
            held += len(request.pages)
        alive, tokens = divmod(sum(ending), _ROW)
        most = 0.0
        for pages, ended in enumerate(ending):
            if not ended:
                continue
            # When these end. 1.5: half a page for rounding on average, and one last page a row.
            most = max(most, tokens / size + alive * (pages + 1.5) - held)
            rows, own = divmod(ended, _ROW)
            alive, tokens = alive - rows, tokens - own
        return still + int(most)

    def check(self, rows_max: int) -> None:
        """What was recomputed is bounded.

        When the horizon becomes infinite, rows that began earlier may still preempt one another,
        once each. Together they hold the whole memory, in ever smaller shares: hence the logarithm.
        """
        slack = (2 + math.log2(rows_max + 1)) * self._capacity_tokens
        assert self.recomputed <= 2 * RECOMPUTED_MAX * self.needed + slack, (
            "recomputed again and again"
        )
