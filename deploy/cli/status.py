"""Says what runs: `trimtab status`.

By application and replica, with what each holds: a model's replica the live sequences that use it, a coordinator and a
gateway the requests that are open. Serve counts all of them, so nothing is asked of the replicas' own code.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import HTTPOptionsSchema

from actors.names import BASE_MODEL, COORDINATOR, GUIDE, TRIMTAB
from cluster.errors import InvalidConfiguration
from deploy.cli.options.status import COMMAND, Options
from deploy.jobs.outcome import BadOutcome
from deploy.jobs.requests import join_cluster
from deploy.service.port import url_of

NAMESPACE = "serve"
"""Of Serve's actors."""

ASK_S = 5.0
"""For a replica's number of requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One replica of a deployment."""

    application: str
    deployment: str
    id: str
    state: str
    node: str
    process: int | None
    held: int | None
    """Live sequences of a model, open requests of a coordinator or gateway; none if it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A service as it is."""

    applications: Mapping[str, str]
    """Their states, by name."""

    messages: Mapping[str, str]
    """What Serve says of those that do not run."""

    replicas: Sequence[Replica]
    live: int
    """Sequences that are being written."""

    waiting: int
    """Requests that wait for room."""

    addresses: Sequence[str]
    """Where HTTP is listened for."""


def run(options: Options) -> None:
    """Print the status.

    Raises:
        BadOutcome: an application does not run.
        InvalidConfiguration: there is no service.
    """
    join_cluster()
    status = read_status()
    print(json.dumps(asdict(status), indent=2) if options.json else describe(status))
    if failing := [name for name, state in status.applications.items() if state != "RUNNING"]:
        raise BadOutcome(f"{', '.join(failing)} {'is' if len(failing) == 1 else 'are'} not RUNNING")


def read_status() -> Status:
    """Return the status of the service on the cluster that this process is connected to.

    Raises:
        InvalidConfiguration: there is none.
    """
    address = ray.get_runtime_context().gcs_address
    try:
        details = _get_global_client().get_serve_details()
    except RayServeException as error:
        raise InvalidConfiguration(
            f"no service runs on the Ray cluster at {address}; `trimtab serve` starts one"
        ) from error
    applications = details["applications"]
    if TRIMTAB not in applications:
        others = ", ".join(applications) or "none"
        raise InvalidConfiguration(
            f"no application {TRIMTAB!r} runs on the Ray cluster at {address}; its applications are: {others}"
        )
    replicas = [replica for name, application in applications.items() for replica in _replicas(name, application)]
    held = {
        name: sum(each.held or 0 for each in replicas if each.deployment == name) for name in (BASE_MODEL, COORDINATOR)
    }
    return Status(
        applications={name: _word(application["status"]) for name, application in applications.items()},
        messages={name: application["message"] for name, application in applications.items() if application["message"]},
        replicas=replicas,
        live=held[BASE_MODEL],
        waiting=max(0, held[COORDINATOR] - held[BASE_MODEL]),
        addresses=_addresses(details),
    )


def _replicas(name: str, application: Mapping[str, Any]) -> list[Replica]:
    found = [
        (deployment, replica)
        for deployment, described in application["deployments"].items()
        for replica in described["replicas"]
    ]
    held = [_ask(replica["actor_name"]) for _, replica in found]
    return [
        Replica(
            application=name,
            deployment=deployment,
            id=replica["replica_id"],
            state=_word(replica["state"]),
            node=replica["node_ip"] or "no node yet",
            process=replica["pid"],
            held=_answer(number),
        )
        for (deployment, replica), number in zip(found, held, strict=True)
    ]


def _ask(actor: str) -> Any:
    """Ask a replica for the number of its requests; none if it cannot be asked."""
    try:
        return ray.get_actor(actor, namespace=NAMESPACE).get_num_ongoing_requests.remote()
    except (ValueError, RayError):
        return None


def _answer(number: Any) -> int | None:
    try:
        return None if number is None else int(ray.get(number, timeout=ASK_S))
    except RayError:
        return None


def _addresses(details: Mapping[str, Any]) -> list[str]:
    """The address of every node that listens, as that node's machine reaches it."""
    options = HTTPOptionsSchema.model_validate(details["http_options"] or {})
    listens_everywhere = options.host in ("0.0.0.0", "::")
    nodes = sorted(proxy["node_ip"] for proxy in details["proxies"].values())
    hosts = nodes if listens_everywhere else [options.host] if nodes else []
    return [url_of(options.model_copy(update={"host": host})) for host in hosts]


def _word(state: Any) -> str:
    """A state of Serve's as a word, whether it comes as one or as an enumeration's item."""
    return str(getattr(state, "value", state))


def describe(status: Status) -> str:
    """Return a status as text."""
    lines = []
    for name, state in status.applications.items():
        message = f": {status.messages[name]}" if state != "RUNNING" and name in status.messages else ""
        lines.append(f"{name}  {state}{message}")
        lines += [f"  {_line(replica)}" for replica in status.replicas if replica.application == name]
    lines.append(f"{status.live} live sequences, {status.waiting} requests wait")
    lines.append(f"HTTP: {', '.join(status.addresses) or 'nowhere'}")
    return "\n".join(lines)


def _line(replica: Replica) -> str:
    unit = "live sequences" if replica.deployment in (BASE_MODEL, GUIDE) else "open requests"
    held = "does not say what it holds" if replica.held is None else f"{replica.held} {unit}"
    process = "" if replica.process is None else f", process {replica.process}"
    return f"{replica.deployment} {replica.id}  {replica.state}  {held}  on {replica.node}{process}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if an application does not run, 2 if there is no service."""
    return COMMAND.main(arguments)
