"""Which replica of a model a lease goes to; Serve runs this wherever a handle is used, in coordinators above all."""

import random
import time
from collections import defaultdict, deque
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

UNDER_WAY_S = 2.0
"""A choice that no replica has accepted by then came to nothing."""


class LeaseRouter(FIFOMixin, LocalityMixin, RequestRouter):
    """A replica on this node before all others, and of those that are equally near the one with the fewest sequences.

    Serve's own router compares two random replicas, by counts that leave out what is still under way. Many short calls
    even out; sequences stay where they are, and of 120 that began at once three replicas got 65, 52 and 3.
    """

    def initialize_state(self, *, under_way_s: float = UNDER_WAY_S) -> None:
        """Begin with nothing under way; forget a choice after so long."""
        self._under_way_s = under_way_s
        self._under_way: dict[ReplicaID, deque[float]] = defaultdict(deque)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in ranks; Serve takes the first rank that has room, and there the fewest ongoing calls."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, wait before the next look
        # In any order: of equal ones the first is taken.
        candidates = random.sample(candidate_replicas, len(candidate_replicas))
        ranks = [rank for rank in self.rank_replicas_via_locality(candidates) if rank]
        for number, rank in enumerate(ranks):
            counted = [replica for replica in rank if self._num_reported(replica) is not None]
            if not counted:
                break  # Serve asks them all
            best = min(counted, key=self._num_sequences)
            if self._num_sequences(best) < best.max_ongoing_requests:
                self._under_way[best.replica_id].append(time.monotonic())
                # Serve asks the others beside it for their counts.
                others = [replica for replica in rank if replica not in counted]
                return [*ranks[:number], [best, *others], *ranks[number + 1 :]]
        return ranks

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Add nothing to Serve's count: what is under way is counted here."""

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note that the replica has accepted, and so counts it by itself."""
        if self._under_way[replica_id]:
            self._under_way[replica_id].popleft()

    def _num_reported(self, replica: RunningReplica) -> int | None:
        """Ongoing calls of everybody, as the replica said lately."""
        count: int | None = self.replica_queue_len_cache.get(replica.replica_id)
        return count

    def _num_sequences(self, replica: RunningReplica) -> int:
        under_way = self._under_way[replica.replica_id]
        while under_way and time.monotonic() - under_way[0] > self._under_way_s:
            under_way.popleft()
        return (self._num_reported(replica) or 0) + len(under_way)
