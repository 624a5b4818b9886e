"""The Python client: guided text from any process on the Ray cluster, synchronously or not.

    client = Client()
    print(client.generate(prompt="It was a dark", weights={"positivity": 1.0})["text"])
    for piece in client.stream(messages=[{"role": "user", "content": "Hello"}], model="positive"):
        print(piece["text"], end="")

    answer = await AsyncClient().generate(prompt="It was a dark", seed=7)

Both take the fields of `actors.coordinator.request.GenerationRequest` as keywords, and raise the errors of
`cluster.errors`. `ray.init()` is the caller's.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.coordinator.sequence import Piece
from cluster.errors import ReplicaLost


class Client:
    """Calls the service and waits. Not for use inside an event loop.

    Raises:
        ReplicaLost: the service does not run on this Ray cluster.
    """

    def __init__(self) -> None:
        self._coordinator = _coordinator()

    def generate(self, **fields: Any) -> Piece:
        """Return a whole answer: its text, token ids, finish reason, usage and seed."""
        with _own_errors():
            return self._coordinator.generate.remote(**fields).result()

    def stream(self, **fields: Any) -> Iterator[Piece]:
        """Yield an answer piece by piece; closing the iterator ends the request."""
        call = self._coordinator.options(stream=True).stream.remote(**fields)
        try:
            with _own_errors():
                yield from call
        finally:
            call.cancel()


class AsyncClient:
    """Calls the service from an event loop; may have any number of calls open.

    Raises:
        ReplicaLost: the service does not run on this Ray cluster.
    """

    def __init__(self) -> None:
        self._coordinator = _coordinator()

    async def generate(self, **fields: Any) -> Piece:
        """Return a whole answer: its text, token ids, finish reason, usage and seed."""
        call = self._coordinator.generate.remote(**fields)
        try:
            with _own_errors():
                return await call
        finally:
            call.cancel()

    async def stream(self, **fields: Any) -> AsyncIterator[Piece]:
        """Yield an answer piece by piece; closing the iterator ends the request."""
        call = self._coordinator.options(stream=True).stream.remote(**fields)
        try:
            with _own_errors():
                async for piece in call:
                    yield piece
        finally:
            call.cancel()


def _coordinator() -> DeploymentHandle:
    if "trimtab" not in serve.status().applications:
        raise ReplicaLost("no application 'trimtab' runs on this Ray cluster; start it: serve run deploy.yaml")
    return serve.get_deployment_handle("Coordinator", "trimtab")


@contextmanager
def _own_errors() -> Iterator[None]:
    """Turn what Ray says of a call into the errors of `cluster.errors`."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except (RayError, RayServeException) as error:
        raise ReplicaLost(f"the coordinator was lost: {error}") from error
