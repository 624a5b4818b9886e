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
from typing import Any

from ray import serve
from ray.exceptions import RayTaskError

from actors.coordinator.sequence import Piece


class Client:
    """Calls the service and waits. Not for use inside an event loop."""

    def __init__(self) -> None:
        self._coordinator = serve.get_deployment_handle("Coordinator", "trimtab")

    def generate(self, **fields: Any) -> Piece:
        """Return a whole answer: its text, token ids, finish reason, usage and seed."""
        try:
            return self._coordinator.generate.remote(**fields).result()
        except RayTaskError as error:
            raise error.cause from error

    def stream(self, **fields: Any) -> Iterator[Piece]:
        """Yield an answer piece by piece; closing the iterator ends the request."""
        call = self._coordinator.options(stream=True).stream.remote(**fields)
        try:
            yield from call
        except RayTaskError as error:
            raise error.cause from error
        finally:
            call.cancel()


class AsyncClient:
    """Calls the service from an event loop; may have any number of calls open."""

    def __init__(self) -> None:
        self._coordinator = serve.get_deployment_handle("Coordinator", "trimtab")

    async def generate(self, **fields: Any) -> Piece:
        """Return a whole answer: its text, token ids, finish reason, usage and seed."""
        call = self._coordinator.generate.remote(**fields)
        try:
            return await call
        except RayTaskError as error:
            raise error.cause from error
        finally:
            call.cancel()

    async def stream(self, **fields: Any) -> AsyncIterator[Piece]:
        """Yield an answer piece by piece; closing the iterator ends the request."""
        call = self._coordinator.options(stream=True).stream.remote(**fields)
        try:
            async for piece in call:
                yield piece
        except RayTaskError as error:
            raise error.cause from error
        finally:
            call.cancel()
