"""Which adapter has which slot, a row of the device directory. Slot 0 is the base model's."""

from collections.abc import Collection

from cluster.values import Tier
from replica.scheduling.adapter import Adapter


class Slots:
    """count: slots, without the base model's. placed: adapters with a slot, by digest."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.placed: dict[str, Adapter] = {}
        self._free = list(range(count, 0, -1))

    @property
    def full(self) -> bool:
        return not self._free

    def on_device(self) -> list[Adapter]:
        """Those whose load is done."""
        device = Tier.DEVICE  # once: this runs for each place and step
        return [adapter for adapter in self.placed.values() if adapter.tier is device]

    def take(self, adapter: Adapter) -> int:
        assert adapter.slot is None
        slot = adapter.slot = self._free.pop()
        self.placed[adapter.digest] = adapter
        return slot

    def give_back(self, adapter: Adapter) -> int:
        slot, adapter.slot = adapter.slot, None
        assert slot is not None
        self._free.append(slot)
        del self.placed[adapter.digest]
        return slot

    def check(self, adapters: Collection[Adapter]) -> None:
        assert {a.digest: a for a in adapters if a.slot is not None} == self.placed
        slots = [a.slot for a in self.placed.values() if a.slot is not None]
        assert sorted([*slots, *self._free]) == list(range(1, self.count + 1))
        for adapter in adapters:
            assert (adapter.slot is not None) == (adapter.tier in (Tier.DEVICE, Tier.LOADING))
