"""Which models have a replica that runs, as Serve's controller tells."""

import asyncio
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from actors.names import BASE, BASE_MODEL, GUIDE, guide_application
from actors.settings import NO_GUIDANCE

POLL_S = 1.0
"""The controller is asked at most so often."""

ANSWER_S = 5.0
"""A controller that takes longer is dead or frozen."""


def deployment_of(name: str) -> tuple[str, str]:
    """Return the deployment of the base or of a guide, and its application."""
    return (BASE_MODEL, BASE) if name == NO_GUIDANCE else (GUIDE, guide_application(name))


def model_handle(name: str) -> Any:
    """Return the handle of the base's deployment or of a guide's."""
    return serve.get_deployment_handle(*deployment_of(name))


class Presence:
    """Asks for all sequences of a coordinator together."""

    def __init__(self) -> None:
        self._asking = asyncio.Lock()
        self._asked_at = -POLL_S
        self._applications: Any = None

    async def is_there(self, name: str) -> bool:
        """Whether a model has a replica that runs, free or not; True too where nobody can tell."""
        loop = asyncio.get_running_loop()
        async with self._asking:
            if loop.time() - self._asked_at >= POLL_S:
                try:
                    async with asyncio.timeout(ANSWER_S):
                        self._applications = (await asyncio.to_thread(serve.status)).applications
                except (RayError, RayServeException, TimeoutError):
                    self._applications = None
                self._asked_at = loop.time()
        if self._applications is None:
            return True
        deployment, application = deployment_of(name)
        if application not in self._applications:
            return False
        status = self._applications[application].deployments.get(deployment)
        return status is not None and status.replica_states.get("RUNNING", 0) > 0
