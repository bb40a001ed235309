"""The Serve request router: ranks replicas by the view and the policy, without ever blocking."""

import asyncio
import logging
import os
import time
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.registry import FleetView
from router.policy import RoutingWeights, rank
from router.view import View

logger = logging.getLogger(__name__)


class AdapterAffinityRouter(RequestRouter):  # type: ignore[misc]  # ray has no types
    """One instance per process that holds a handle to the replicas."""

    def initialize_state(
        self, *, redis_variable: str, fleet: str, step_tokens: int, batch_rows: int
    ) -> None:
        """redis_variable: the environment variable with Redis' URL. Serve shows these arguments."""
        self._view = View()
        self._weights = RoutingWeights(step_tokens=step_tokens, batch_rows=batch_rows)
        self._fleet_view = FleetView(os.environ[redis_variable], fleet)
        self._fleet_view_task: asyncio.Task[None] | None = None

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve calls this on the routing loop before the first request; starts the fleet view."""
        if self._fleet_view_task is None:
            self._fleet_view_task = asyncio.get_running_loop().create_task(self._run_fleet_view())
        super().update_replicas(replicas)

    async def _run_fleet_view(self) -> None:
        try:
            await self._fleet_view.run()
        except Exception:
            # Routing continues with the last known states and this router's own picks.
            logger.exception("the router's fleet view has stopped")

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None
    ) -> list[list[RunningReplica]]:
        """One singleton rank a replica, best first. Counts the first as picked."""
        if pending_request is not None:
            # Without it, Serve retries in a busy loop.
            pending_request.routing_context.should_backoff = True
        if not candidate_replicas:
            return []
        model, tokens = _arguments(pending_request)
        digest = self._fleet_view.names.get(model) if model is not None else None
        now_s = time.monotonic()
        by_id = {r.replica_id.to_full_id_str(): r for r in candidate_replicas}
        candidates = self._view.candidates(by_id, self._fleet_view.replicas, digest, now_s)
        ranked = rank(candidates, digest or model or "", self._weights)
        self._view.picked(ranked[0].replica_id, digest, tokens, now_s)
        return [[by_id[candidate.replica_id]] for candidate in ranked]


def _arguments(pending_request: PendingRequest | None) -> tuple[str | None, int]:
    """The ingress' arguments, model and prompt tokens; (None, 0) for another caller's."""
    args: list[Any] = list(pending_request.args) if pending_request is not None else []
    match args:
        case [str() as model, int() as tokens]:
            return model, tokens
        case [None, int() as tokens]:
            return None, tokens
    return None, 0
