"""Many requests to the running service: so many at a time, each tried again after errors that pass."""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray import serve

from actors.api import Piece
from actors.names import TRIMTAB
from cluster.errors import DeadlineExceeded, InvalidConfiguration, Overloaded, ReplicaLost
from deploy.client import AsyncClient
from deploy.jobs.batch.lines import Line
from deploy.jobs.progress import Progress

TRANSIENT = (ReplicaLost, Overloaded, DeadlineExceeded)
"""Errors that another try may not meet."""

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each further try of a request that met such an error."""

Generate = Callable[..., Awaitable[Piece]]


async def answer_all(
    lines: Iterable[Line],
    generate: Generate,
    record: Callable[[Line, Mapping[str, Any]], None],
    progress: Progress,
    *,
    concurrency: int,
    pauses_s: Sequence[float] = PAUSES_S,
) -> None:
    """Answer every line, at most `concurrency` at a time, and record each as it finishes.

    `lines` is read no faster than requests are done. What `generate` raises is recorded.

    Raises:
        OSError: what `lines` and `record` raise; calls that are open are cancelled.
    """
    waiting = iter(lines)

    async def answer_in_turn() -> None:
        for line in waiting:
            try:
                piece = await _answer(line, generate, progress, pauses_s)
            except Exception as error:
                described = {
                    "type": type(error).__name__,
                    "message": str(error),
                    "field": getattr(error, "field", None),
                }
                record(line, {"error": described})
                progress.fail(line, error)
            else:
                record(line, {**piece})
                progress.succeed()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(answer_in_turn())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _answer(line: Line, generate: Generate, progress: Progress, pauses_s: Sequence[float]) -> Piece:
    if line.error is not None:
        raise line.error
    for pause_s in pauses_s:
        try:
            return await generate(**line.fields)
        except TRANSIENT as error:
            progress.note(f"line {line.number}: {type(error).__name__}: {error}; next try in {pause_s:g} s")
            await asyncio.sleep(pause_s)
    return await generate(**line.fields)


def connect() -> AsyncClient:
    """Return a client of the service on the running cluster.

    Raises:
        InvalidConfiguration: there is no cluster, or the service on it does not run yet.
        ReplicaLost: there is no service on it.
    """
    join_cluster()
    application = serve.status().applications.get(TRIMTAB)
    if application is not None and application.status != "RUNNING":
        raise InvalidConfiguration(
            f"the application `trimtab` is {application.status.value}; wait until `trimtab status` says RUNNING"
        )
    return AsyncClient()


def join_cluster() -> None:
    """Connect this process to the Ray cluster that runs already.

    Raises:
        InvalidConfiguration: there is none.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    # Where a cluster's address is known but nothing answers there, Ray tries for minutes without a word.
    print("connecting to the Ray cluster", address, file=sys.stderr, flush=True)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        told = "no Ray cluster runs on this machine"
        if address:
            told = (
                f"no Ray cluster lets this process in at {address}, which RAY_ADDRESS names (one that has token "
                "authentication does with RAY_AUTH_MODE=token)"
            )
        raise InvalidConfiguration(
            f"{told}; start the service with `trimtab serve` (or `serve deploy deploy.yaml` on a running cluster)"
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
