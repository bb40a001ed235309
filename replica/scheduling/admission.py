"""Limits of one engine, and which requests it refuses."""

from collections.abc import Collection
from dataclasses import dataclass

from cluster.errors import BadRequest, FleetError, LogitsNotFinite, ModelNotFound, QueueFull
from replica.scheduling.adapter_cache import AdapterCache
from replica.scheduling.pages import Pages
from replica.scheduling.request import NewRequest, Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a step and of the queue.

    queue_max: requests accepted beyond `batch_rows_max`.
    context: longest prompt + output, in tokens.
    parked_pages_max: KV pages that parked rows may hold; None for no limit.
    page_wait_max_s: how long others may pass a request that finds no KV pages. After that, free
        pages are saved for it.
    """

    batch_rows_max: int
    step_tokens_max: int
    queue_max: int
    loads_in_flight_max: int
    context: int
    eos_tokens: frozenset[int] = frozenset()
    parked_pages_max: int | None = None
    page_wait_max_s: float = 2.0


def check_admissible(
    new: NewRequest, limits: Limits, pages: Pages, adapter_cache: AdapterCache
) -> None:
    """Raise a FleetError if the request could not run even alone."""
    assert new.prompt and new.sampling.max_tokens > 0
    if len(new.prompt) >= limits.context:
        raise BadRequest(
            f"prompt: {len(new.prompt)} tokens leave no room for output in a context of "
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


def check_queue(
    waiting: int, running: Collection[Request], limits: Limits, decode_s: float
) -> None:
    """Raise QueueFull if the engine has all the requests it may. decode_s: of one step."""
    if waiting + len(running) < limits.queue_max + limits.batch_rows_max:
        return
    left = min((r.remaining for r in running), default=1)
    raise QueueFull(
        f"the engine is full: {waiting} requests wait and {len(running)} run",
        retry_after_s=max(1.0, left * decode_s),  # until the first row comes free
    )


def accepted(
    new: NewRequest, adapter_key: str | None, base_tokens: int, limits: Limits, now_s: float
) -> Request:
    """adapter_key: what the request needs in the adapter cache; None if nothing. base_tokens: as in
    `Request`.
    """
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
        salt=new.salt,
        stops=stops,
        tokens_max=min(len(new.prompt) + sampling.max_tokens, limits.context),
        stepwise=sampling.grammar is not None,
        base_tokens=base_tokens,
    )


def no_token(finite: bool) -> FleetError:
    """Why no token can be chosen. finite: the logits are."""
    if finite:
        return BadRequest("the request's parameters together allow no token")
    return LogitsNotFinite("the logits are not finite: the forward pass overflowed")
