"""The Serve request router: ranks replicas by the view and the policy, without ever blocking."""

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.redis_client import connect
from cluster.registry import FleetView
from router.peers import Peers
from router.policy import RoutingWeights, rank
from router.view import View

logger = logging.getLogger(__name__)


class AdapterAffinityRouter(RequestRouter):  # type: ignore[misc]  # ray has no types
    """One instance per process that holds a handle to the replicas."""

    def initialize_state(
        self,
        *,
        redis_variable: str,
        fleet: str,
        step_tokens: int,
        batch_rows: int,
        queue_max: int,
    ) -> None:
        """redis_variable: the environment variable with Redis' URL. Serve shows these arguments."""
        self._view = View(queue_max=queue_max)
        self._weights = RoutingWeights(step_tokens=step_tokens, batch_rows=batch_rows)
        self._fleet_view = FleetView(os.environ[redis_variable], fleet)
        self._peers = Peers(connect(os.environ[redis_variable]), fleet)
        self._tasks: list[asyncio.Task[None]] = []

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve calls this on the routing loop before the first request; starts the fleet view."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._keep(each.run())) for each in self._followed()]
        super().update_replicas(replicas)

    def _followed(self) -> tuple[FleetView, Peers]:
        return self._fleet_view, self._peers

    async def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            # Routing continues with the last known states and this router's own picks.
            logger.exception("the router has stopped following the fleet")

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
        digest = None
        if model is not None:
            named = self._fleet_view.digest_of
            digest = named(model) or named(model.partition(":")[2])  # "BASE:ADAPTER" as in SGLang
        now_s = time.monotonic()
        self._peers.picked(now_s)
        self._view.routers = self._peers.count
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
