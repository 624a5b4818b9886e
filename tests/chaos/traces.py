"""What requests leave behind in the service's processes."""

import time
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from tests.chaos.faults import ROLES, processes_of

NAMESPACE = "serve"


@dataclass(frozen=True, slots=True)
class Trace:
    """What one process holds."""

    live: dict[str, int]
    """Sequences, leases and the like, by what they are called; of an idle service all 0."""

    num_connections: int
    num_segments: int
    """Mapped, whether or not they have a name."""

    uss_bytes: int
    """Memory that is the process's own."""


def look() -> dict[str, Trace]:
    """What every process of the service holds, by replica."""
    return {
        name.removeprefix("SERVE_REPLICA::"): _look_at(name, process)
        for role in ROLES
        for name, process in processes_of(role).items()
    }


def settled(timeout_s: float = 60) -> dict[str, Trace]:
    """What every process holds once nothing is live any more."""
    deadline = time.monotonic() + timeout_s
    while True:
        traces = look()
        if not any(count for trace in traces.values() for count in trace.live.values()):
            return traces
        assert time.monotonic() < deadline, {name: trace.live for name, trace in traces.items()}
        time.sleep(0.2)


def _look_at(name: str, process_id: int) -> Trace:
    actor = ray.get_actor(name, namespace=NAMESPACE)
    live = ray.get(actor.__ray_call__.remote(count_live), timeout=60)
    process = psutil.Process(process_id)
    with open(f"/proc/{process_id}/maps") as maps:
        num_segments = len({line.split()[4] for line in maps if "/trimtab-" in line})
    connections = [each for each in process.net_connections() if each.status == psutil.CONN_ESTABLISHED]
    return Trace(live, len(connections), num_segments, process.memory_full_info().uss)


def count_live(replica: Any) -> dict[str, int]:
    """What a replica holds for requests (runs in its process)."""
    actor = replica._replica_impl._user_callable_wrapper._callable
    if hasattr(actor, "_inbox"):  # a gateway
        return {"feeds": 0 if actor._inbox is None else len(actor._inbox._feeds)}
    if hasattr(actor, "_lanes"):  # a coordinator
        return {
            "sequences": sum(lane.num_sequences for lane in actor._lanes.values()),
            "requests": actor._admission.num_open,
        }
    server = actor._server
    return {
        "leases": len(server._leases),
        "messages": len(server._arrived) + len(server._messages) + len(server._answerable),
        "sequences": len(server.schedule._order),
    }
