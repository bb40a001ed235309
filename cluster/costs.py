"""Smoothed measurements that predict what a load, a step or an eviction costs.

The model: a step with p prompt tokens takes `decode_s + p × prefill_token_s`; a copy of b bytes
takes b ÷ the rate of their tier. Each rate starts from a prior and follows the measurements. A tier
with no measured copy borrows the other tier's rate.
"""

from dataclasses import dataclass

from cluster.values import Tier

# Weight of the newest measurement.
_WEIGHT = 0.1
# So many measurements are averaged before smoothing starts. They replace the prior, which says
# nothing about this machine.
_TRUSTED = 3
# Factor on the estimate for a page copy each time it is too slow.
_DECLINED = 0.5
# A copy that another process held up counts as at most so many times the estimate.
_OUTLIER = 4.0


@dataclass(slots=True)
class Smoothed:
    """An exponential moving average that starts as an arithmetic mean."""

    value: float
    count: int = 0

    def take_in(self, measured: float) -> None:
        self.count += 1
        weight = max(_WEIGHT, 1.0 / self.count) if self.count > _TRUSTED else 1.0 / self.count
        self.value += weight * (measured - self.value)


class Costs:
    """The scheduler's and the router's estimates for one device, in seconds and bytes."""

    def __init__(
        self,
        copy_bytes_per_s: float = 1e9,
        decode_s: float = 0.02,
        prefill_token_s: float = 1e-4,
    ) -> None:
        self._copy_s_per_byte = {
            tier: Smoothed(1.0 / copy_bytes_per_s) for tier in (Tier.HOST, Tier.DISK)
        }
        # Free until measured: an adapter's rate includes its files, or the overhead of small ones.
        self._page_s_per_byte = Smoothed(0.0)
        self._decode_s = Smoothed(decode_s)
        self._prefill_token_s = Smoothed(prefill_token_s)

    def copied(self, size: int, source: Tier, seconds: float) -> None:
        if size > 0:
            self._copy_s_per_byte[source].take_in(max(seconds, 1e-9) / size)

    def pages_copied(self, size: int, seconds: float) -> None:
        """KV pages, to host memory or back."""
        own, measured = self._page_s_per_byte, max(seconds, 1e-9) / size
        own.take_in(min(measured, _OUTLIER * own.value) if own.count else measured)

    def stepped(self, prompt_tokens: int, seconds: float) -> None:
        if prompt_tokens == 0:
            self._decode_s.take_in(seconds)
        else:
            # Until a decode step is measured, its prior must not make the prompt cheap.
            decode_s = self._decode_s.value if self._decode_s.count else 0.0
            spent_s = max(seconds - decode_s, seconds / 10)
            self._prefill_token_s.take_in(spent_s / prompt_tokens)

    @property
    def copy_bytes_per_s(self) -> float:
        """The rate from disk, where most adapters that were not used recently are."""
        return 1.0 / self._rate(Tier.DISK).value

    @property
    def host_bytes_per_s(self) -> float:
        return 1.0 / self._rate(Tier.HOST).value

    @property
    def decode_s(self) -> float:
        """One decode step."""
        return self._decode_s.value

    def copy_s(self, size: int, source: Tier = Tier.DISK) -> float:
        return size * self._rate(source).value

    def page_copy_s(self, size: int) -> float:
        """KV pages to host memory, or back."""
        return size * self._page_s_per_byte.value

    def page_copy_declined(self) -> None:
        """It seemed too slow. The estimate falls a little, so that it is measured again."""
        self._page_s_per_byte.value *= _DECLINED

    def _rate(self, source: Tier) -> Smoothed:
        own = self._copy_s_per_byte[source]
        other = self._copy_s_per_byte[Tier.HOST if source is Tier.DISK else Tier.DISK]
        return other if other.count and not own.count else own

    def step_s(self, prompt_tokens: int) -> float | None:
        """A step with so many prompt tokens. None if no step like it has been measured."""
        if not self._decode_s.count or (prompt_tokens and not self._prefill_token_s.count):
            return None
        return self.prefill_s(prompt_tokens)

    def prefill_s(self, tokens: int) -> float:
        return self.decode_s + tokens * self._prefill_token_s.value
