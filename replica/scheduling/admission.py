"""What one engine may hold, and the requests that it can never serve."""

from dataclasses import dataclass

from cluster.errors import BadRequest, ModelNotFound
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.pages import Pages
from replica.scheduling.request import NewRequest, Request


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step, and the queue, may hold.

    queue_max: requests beyond a full batch. context: the longest prompt + output, in tokens.
    parked_pages_max: pages that parked rows may hold. page_wait_max_s: how long a request may be
    passed over for want of pages before the pages that come free are saved for it.
    """

    batch_rows_max: int
    step_tokens_max: int
    queue_max: int
    loads_in_flight_max: int
    context: int
    eos_tokens: frozenset[int] = frozenset()
    parked_pages_max: int | None = None
    page_wait_max_s: float = 2.0


def admissible(new: NewRequest, limits: Limits, pages: Pages, adapter_cache: AdapterCache) -> None:
    """Raises a FleetError when it could not run even alone."""
    assert new.prompt and new.sampling.max_tokens > 0
    if len(new.prompt) >= limits.context:
        raise BadRequest(
            f"prompt: {len(new.prompt)} tokens leave no room for an answer in a context of "
            f"{limits.context}",
            field="prompt",
        )
    most = min(len(new.prompt) + new.sampling.max_tokens, limits.context)
    if pages.needed(most) > pages.capacity:
        raise BadRequest(
            f"prompt + max_tokens: {most} tokens take {pages.needed(most)} KV pages; "
            f"this engine has {pages.capacity}",
            field="max_tokens",
        )
    if new.digest is not None:
        adapter = adapter_cache.adapters.get(new.digest)
        if adapter is None or adapter.leaving:
            raise ModelNotFound(f"adapter {new.digest[:12]} is not registered here")


def accepted(new: NewRequest, adapter_key: str | None, limits: Limits, now_s: float) -> Request:
    """place: the adapter it needs on the device."""
    sampling = new.sampling
    stops = sampling.stop_tokens
    if not sampling.ignore_eos:
        stops |= limits.eos_tokens
    return Request(
        new.id,
        new.prompt,
        sampling,
        new.digest,
        adapter_key,
        new.priority,
        now_s,
        stops=stops,
        tokens_max=min(len(new.prompt) + sampling.max_tokens, limits.context),
    )
