"""A lease goes to the nearest replica that has room, and there to the one with the fewest sequences."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from actors.replica.router import LeaseRouter

DEPLOYMENT = DeploymentID(name="Guide", app_name="trimtab-guide-kind")


@dataclass(eq=False)
class Replica:
    """What the router asks of a replica."""

    replica_id: ReplicaID
    node_id: str
    max_ongoing_requests: int = 10
    availability_zone: None = None
    multiplexed_model_ids: frozenset[str] = frozenset()


class Routing:
    """A router on node `here`, and replicas there and elsewhere."""

    def __init__(self, **counts: dict[str, int]) -> None:
        self.router: Any = LeaseRouter(
            deployment_id=DEPLOYMENT,
            handle_source=DeploymentHandleSource.REPLICA,
            self_node_id="here",
            use_replica_queue_len_cache=True,
            create_replica_wrapper_func=lambda info: info,
            prefer_local_node_routing=False,
        )
        self.router.initialize_state()
        self.replicas = [
            Replica(ReplicaID(unique_id=name, deployment_id=DEPLOYMENT), node)
            for node, names in counts.items()
            for name in names
        ]
        self.router.update_replicas(self.replicas)
        for names in counts.values():
            for name, count in names.items():
                self.report(name, count)

    def report(self, name: str, count: int) -> None:
        """A replica says how many sequences it has."""
        if count >= 0:
            self.router.on_new_queue_len_info(ReplicaID(unique_id=name, deployment_id=DEPLOYMENT), count)

    async def choose(self) -> list[list[str]]:
        request = PendingRequest(args=[], kwargs={}, metadata=RequestMetadata(request_id="", internal_request_id=""))
        ranks = await self.router.choose_replicas(self.replicas, request)
        assert request.routing_context.should_backoff
        return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def test_a_burst_is_spread_before_any_replica_has_answered() -> None:
    routing = Routing(here={"a": 0, "b": 0, "c": 3})
    chosen = Counter([(await routing.choose())[0][0] for _ in range(18)])
    assert chosen == {"a": 7, "b": 7, "c": 4}


async def test_what_a_replica_has_accepted_is_not_counted_twice() -> None:
    routing = Routing(here={"a": 0, "b": 1})
    assert (await routing.choose())[0] == ["a"]
    identity = ReplicaID(unique_id="a", deployment_id=DEPLOYMENT)
    routing.router.on_send_request(identity)
    routing.router.on_new_queue_len_info(identity, 1)
    routing.router.on_request_routed(None, identity, None)
    assert {(await routing.choose())[0][0] for _ in range(2)} == {"a", "b"}


async def test_a_choice_that_came_to_nothing_is_forgotten() -> None:
    routing = Routing(here={"a": 0, "b": 1})
    routing.router.initialize_state(under_way_s=-1.0)
    assert [(await routing.choose())[0] for _ in range(5)] == [["a"]] * 5


async def test_replicas_on_this_node_come_first_while_they_have_room() -> None:
    routing = Routing(there={"far": 0}, here={"near": 8})
    assert [(await routing.choose())[0] for _ in range(2)] == [["near"], ["near"]]
    # Full by now: Serve asks it whether it still is, and takes the other one.
    assert await routing.choose() == [["near"], ["far"]]


async def test_a_replica_that_nobody_knows_yet_is_asked() -> None:
    routing = Routing(here={"old": 4, "new": -1})
    assert await routing.choose() == [["old", "new"]]
    unknown = Routing(here={"a": -1, "b": -1})
    assert sorted((await unknown.choose())[0]) == ["a", "b"]
