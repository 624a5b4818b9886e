"""What the models' applications say of themselves, asked for when somebody wants to know."""

import asyncio
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentResponse

ASK_S = 2.0
"""For an answer, which a list of models can do without."""

FRESH_S = 30.0
"""How long an answer is taken for true: a model may be deployed anew with other settings."""


class Facts:
    """Asks applications, and keeps what they say for a while. Lives on one event loop."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], tuple[float, Any]] = {}

    async def ask(self, application: str, method: str) -> Any:
        """Return what a method of an application's replicas says; the last that is known where none can be asked."""
        asked_at, answer = self._answers.get((application, method), (-FRESH_S, None))
        if time.monotonic() - asked_at < FRESH_S:
            return answer
        call: DeploymentResponse | None = None
        try:
            async with asyncio.timeout(ASK_S):
                handle = await asyncio.to_thread(serve.get_app_handle, application)
                call = getattr(handle, method).remote()
                answer = await call
        except (RayError, RayServeException, TimeoutError):
            if call is not None:
                call.cancel()
            return answer
        self._answers[application, method] = time.monotonic(), answer
        return answer
