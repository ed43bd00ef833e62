"""Ray's request router for the replicas: `affinity` decides, with the loads that Ray knows."""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serving.ray.affinity import preferred


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Sends a call of `EngineReplica.answer` where its beginning was computed.

    Ray asks the replicas of each group in turn whether they have room, and takes the one that has least to do.
    """

    def initialize_state(self, *, slots: int) -> None:
        """What the deployment's configuration says; `slots`: of a replica."""
        self._slots, self._rng = slots, random.Random()  # noqa: S311 - spreads load

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the best first."""
        if pending_request is not None:
            # Ray goes on at once, instead of after a while, where it is told not to back off.
            pending_request.routing_context.should_backoff = True
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        # A replica of which nothing was heard for long is asked before anything is sent to it.
        loads = {name: self.replica_queue_len_cache.get(one.replica_id) or 0 for name, one in by_name.items()}
        groups = preferred(_beginning(pending_request), loads, slots=self._slots, rng=self._rng)
        return [[by_name[name] for name in group] for group in groups if group]


def _beginning(request: Any) -> str:
    """The second argument of `EngineReplica.answer`."""
    return str(request.args[1]) if request is not None and len(request.args) > 1 else ""
