"""What is done to a service under load, and how long it takes to be whole again."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.util.state import list_actors

WHOLE_TIMEOUT_S = 120.0
LOOK_S = 0.1
ALONE_S = 1.0
"""How long a fault that does not wait for the service stays the only one."""

ROLES = {
    "base": ("trimtab-base", "BaseModel"),
    "guide kind": ("trimtab-guide-kind", "Guide"),
    "guide terse": ("trimtab-guide-terse", "Guide"),
    "coordinator": ("trimtab", "Coordinator"),
    "gateway": ("trimtab", "Gateway"),
}
"""Application and deployment of every kind of actor."""

DRAINED = ("base", "guide kind", "guide terse", "coordinator")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done, and when."""

    kind: str
    """`killed`, `stopped` or `drained`."""

    role: str
    start: float
    end: float
    """When the service had all its replicas again; for a fault among others, when all of them were over."""


def make_plan(count: int, *, seed: int) -> list[tuple[str, str]]:
    """So many faults in a random order, every kind on every role before any comes again."""
    every = [(kind, role) for kind in ("killed", "stopped", "drained") for role in DRAINED] + [("killed", "gateway")]
    chance = random.Random(seed)
    plan: list[tuple[str, str]] = []
    while len(plan) < count:
        plan += chance.sample(every, len(every))
    return plan[:count]


class Faults:
    """Harms a service, in every third case while it has not recovered yet from the fault before."""

    def __init__(self, deploy: Callable[[dict[str, int]], Any], num_replicas: dict[str, int], *, seed: int) -> None:
        """Describe the service.

        deploy: changes its numbers of replicas by role. num_replicas: those that it has.
        """
        self.done: list[Fault] = []
        self._deploy = deploy
        self._num_replicas = num_replicas
        self._chance = random.Random(seed)

    def run(self, plan: list[tuple[str, str]]) -> None:
        """Do all that is planned; the service is whole in the end."""
        open_faults: list[tuple[str, str, float]] = []
        gone: set[str] = set()
        for number, (kind, role) in enumerate(plan):
            time.sleep(self._chance.uniform(ALONE_S, 2 * ALONE_S))
            open_faults.append((kind, role, time.monotonic()))
            if kind == "drained":
                # Serve takes the younger or the older one; which it was does not matter.
                self._deploy({**self._num_replicas, role: self._num_replicas[role] - 1})
                self._wait_until_whole({**self._num_replicas, role: self._num_replicas[role] - 1}, gone)
                self._deploy(self._num_replicas)
            else:
                name, process = self._chance.choice(sorted(processes_of(role).items()))
                os.kill(process, SIGNALS[kind])
                gone.add(name)
            if number % 3 == 1 and number + 1 < len(plan):
                continue
            self._wait_until_whole(self._num_replicas, gone)
            end = time.monotonic()
            for fault in (Fault(*each, end) for each in open_faults):
                print(f"{fault.role} {fault.kind}: whole after {fault.end - fault.start:.1f} s", flush=True)
                self.done.append(fault)
            open_faults.clear()

    def _wait_until_whole(self, num_replicas: dict[str, int], gone: set[str]) -> None:
        """Wait until there are so many replicas, none that was killed or stopped among them."""
        deadline = time.monotonic() + WHOLE_TIMEOUT_S
        while not _is_whole(num_replicas, gone):
            assert time.monotonic() < deadline, serve.status()
            time.sleep(LOOK_S)


def processes_of(role: str) -> dict[str, int]:
    """The processes of a role's replicas, by replica."""
    prefix = "SERVE_REPLICA::{}#{}#".format(*ROLES[role])
    return {
        str(actor.name): int(actor.pid)
        for actor in list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")], detail=True)
        if (actor.name or "").startswith(prefix) and actor.pid is not None
    }


def _is_whole(num_replicas: dict[str, int], gone: set[str]) -> bool:
    applications = serve.status().applications
    for role, (application, deployment) in ROLES.items():
        states = applications[application].deployments[deployment].replica_states
        if {state: count for state, count in states.items() if count} != {"RUNNING": num_replicas[role]}:
            return False
        # Serve may not have noticed yet that one is gone, and Ray may count one that is stopped.
        processes = processes_of(role)
        if len(processes) != num_replicas[role] or set(processes) & gone:
            return False
    return True
