"""From every node of a cluster, takes leases on a model at once and prints which replicas gave them.

    python -m tests.cluster.lease_counts ADDRESS MODEL NUM_LEASES

One JSON object: by the node's id, how many leases each replica gave.
"""

import asyncio
import json
import sys
import uuid
from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.coordinator.presence import model_handle
from actors.leases import LeaseRequest
from actors.prompts import Prompt


async def take_leases(name: str, num_leases: int, *, num_in_turn: int = 0) -> dict[str, int]:
    """Hold so many leases, the first of them taken one after the other and the rest at once; give them all back.

    Returns:
        How many each replica gave.
    """
    coordinator, calls = uuid.uuid4().hex, []

    async def take(number: int) -> str:
        request = LeaseRequest(
            coordinator=coordinator, sequence=str(number), prompt=Prompt(text="hello"), known_bases=frozenset()
        )
        call = model_handle(name).options(stream=True).lease.remote(request)
        calls.append(call)
        return str((await anext(call)).replica)

    try:
        replicas = [await take(number) for number in range(num_in_turn)]
        replicas += await asyncio.gather(*map(take, range(num_in_turn, num_leases)))
        return dict(Counter(replicas))
    finally:
        for call in calls:
            call.cancel()


class Taker:
    """Takes leases on the node where it is."""

    async def take(self, name: str, num_leases: int) -> dict[str, int]:
        """See `take_leases`."""
        return await take_leases(name, num_leases)


def main() -> None:
    """Print the counts."""
    address, name, num_leases = sys.argv[1:]
    ray.init(address=address, namespace="serve", log_to_driver=False)
    counts: dict[str, Any] = {}
    for node in ray.nodes():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        taker = ray.remote(Taker).options(num_cpus=0, scheduling_strategy=here).remote()
        counts[node["NodeID"]] = ray.get(taker.take.remote(name, int(num_leases)), timeout=120)
        ray.kill(taker)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
