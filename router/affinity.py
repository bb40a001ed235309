"""The Serve request router: asks the view and the policy, and never waits for anything."""

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
        """`redis_variable` names the variable that holds the URL: Serve shows these arguments."""
        self._view = View()
        self._costs = RoutingWeights(step_tokens=step_tokens, batch_rows=batch_rows)
        self._follower = FleetView(os.environ[redis_variable], fleet)
        self._following: asyncio.Task[None] | None = None

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Runs on the loop that routes, before the first request; the follower lives there too."""
        if self._following is None:
            self._following = asyncio.get_running_loop().create_task(self._follow())
        super().update_replicas(replicas)

    async def _follow(self) -> None:
        try:
            await self._follower.run()
        except Exception:
            # Routing goes on by what is known, and by our own picks.
            logger.exception("the router follows the fleet no more")

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None
    ) -> list[list[RunningReplica]]:
        """Singletons, best first; the first is counted as picked."""
        if pending_request is not None:
            # Serve asks again at once, in a loop, unless a request says that it may wait.
            pending_request.routing_context.should_backoff = True
        if not candidate_replicas:
            return []
        model, tokens = _arguments(pending_request)
        digest = self._follower.names.get(model) if model is not None else None
        now_s = time.monotonic()
        by_id = {r.replica_id.to_full_id_str(): r for r in candidate_replicas}
        candidates = self._view.candidates(by_id, self._follower.replicas, digest, now_s)
        ranked = rank(candidates, digest or model or "", self._costs)
        self._view.picked(ranked[0].replica_id, digest, tokens, now_s)
        return [[by_id[candidate.replica_id]] for candidate in ranked]


def _arguments(pending_request: PendingRequest | None) -> tuple[str | None, int]:
    """Model and prompt tokens as the ingress passes them; others that hold a handle pass theirs."""
    args: list[Any] = list(pending_request.args) if pending_request is not None else []
    match args:
        case [str() as model, int() as tokens]:
            return model, tokens
        case [None, int() as tokens]:
            return None, tokens
    return None, 0
