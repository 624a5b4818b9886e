"""Finding replicas that hang, and ending them, so that Serve starts others. Knows nothing of sequences."""

import asyncio
import logging

import ray
from ray.exceptions import RayError

from cluster.errors import DeadlineExceeded, EngineError, ReplicaLost
from cluster.exchange import StepStream

NAMESPACE = "serve"
"""Serve's in Ray, in which a replica's full id is its actor's name."""

logger = logging.getLogger(__name__)


async def watch(replica: str, stream: StepStream, step_timeout_s: float) -> None:
    """Wait until a stream is over; kill its replica if it hangs.

    A replica hangs that does not answer a ping, which goes through its event loop and its engine's thread and waits for
    one forward pass at most; and one whose stream is over and whose process does not answer either.
    """
    half_s = step_timeout_s / 2
    try:
        while not (await asyncio.wait({stream.lost}, timeout=half_s))[0]:
            await _ping(stream, step_timeout_s)
    except DeadlineExceeded:
        logger.warning("%s is killed: it has not answered a ping within %g s", replica, step_timeout_s)
        await stream.close()
        await _kill(replica)
        return
    except ReplicaLost:
        pass
    if await _is_frozen(replica, half_s):
        logger.warning("%s is killed: %s, and it does not answer", replica, stream.lost.result())
        await _kill(replica)


async def _ping(stream: StepStream, timeout_s: float) -> None:
    """Send a step without work and wait for its answer.

    Raises:
        DeadlineExceeded: there is none within that time.
        ReplicaLost: the stream is over.
    """
    try:
        (await stream.step((), timeout_s=timeout_s)).release()
    except EngineError as error:
        logger.warning("a step failed beside a ping: %s", error)


async def _is_frozen(replica: str, timeout_s: float) -> bool:
    """Whether a replica is alive, as far as Ray knows, and yet does not answer within that time."""
    try:
        actor = await asyncio.to_thread(ray.get_actor, replica, namespace=NAMESPACE)
        async with asyncio.timeout(timeout_s):
            await actor.__ray_ready__.remote()
    except TimeoutError:
        return True
    except (ValueError, RayError):
        pass  # it is dead
    return False


async def _kill(replica: str) -> None:
    """End a replica's process; Ray itself sends SIGKILL to one that is stopped."""
    try:
        actor = await asyncio.to_thread(ray.get_actor, replica, namespace=NAMESPACE)
        await asyncio.to_thread(ray.kill, actor, no_restart=True)
    except (ValueError, RayError) as error:
        logger.info("%s is dead already: %s", replica, error)
