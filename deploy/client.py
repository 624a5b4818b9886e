"""The Python client: guided text from any process on the Ray cluster, synchronously or not.

    client = Client()
    print(client.generate(prompt="It was a dark", weights={"positivity": 1.0})["text"])
    for piece in client.stream(messages=[{"role": "user", "content": "Hello"}], model="positive"):
        print(piece["text"], end="")

    answer = await AsyncClient().generate(prompt="It was a dark", seed=7)

Both take the fields of `actors.coordinator.request.GenerationRequest` as keywords, and raise the errors of
`cluster.errors`. When a coordinator is lost, they go on with another one, up to the request's `timeout` (600 s if it
has none): the answer has every token once. `ray.init()` is the caller's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.api import Piece
from actors.names import COORDINATOR, TRIMTAB
from cluster.errors import ReplicaLost
from deploy.http.attempts import REPEATABLE, Attempts, own_errors


class Client:
    """Calls the service and waits. Not for use inside an event loop.

    Raises:
        ReplicaLost: the service does not run on this Ray cluster.
    """

    def __init__(self) -> None:
        self._coordinator = _coordinator()

    def generate(self, **fields: Any) -> Piece:
        """Return a whole answer: its text, token ids, finish reason, usage and seed."""
        attempts = Attempts(fields)
        while True:
            try:
                with own_errors():
                    return self._coordinator.generate.remote(**attempts.fields()).result()
            except REPEATABLE as error:
                time.sleep(attempts.pause_s(error))

    def stream(self, **fields: Any) -> Iterator[Piece]:
        """Yield an answer piece by piece; closing the iterator ends the request."""
        attempts = Attempts(fields)
        while not attempts.is_finished:
            call = self._coordinator.options(stream=True).stream.remote(attempts.resume(), **attempts.fields())
            try:
                with own_errors():
                    for piece in call:
                        attempts.take([piece])
                        yield piece
            except REPEATABLE as error:
                if not attempts.is_finished:
                    time.sleep(attempts.pause_s(error))
            finally:
                if not attempts.is_finished:
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
        attempts = Attempts(fields)
        while True:
            call = self._coordinator.generate.remote(**attempts.fields())
            answer: Piece | None = None
            try:
                with own_errors():
                    answer = await call
                    return answer
            except REPEATABLE as error:
                await asyncio.sleep(attempts.pause_s(error))
            finally:
                if answer is None:
                    call.cancel()

    async def stream(self, **fields: Any) -> AsyncIterator[Piece]:
        """Yield an answer piece by piece; closing the iterator ends the request."""
        attempts = Attempts(fields)
        while not attempts.is_finished:
            call = self._coordinator.options(stream=True).stream.remote(attempts.resume(), **attempts.fields())
            try:
                with own_errors():
                    async for piece in call:
                        attempts.take([piece])
                        yield piece
            except REPEATABLE as error:
                if not attempts.is_finished:
                    await asyncio.sleep(attempts.pause_s(error))
            finally:
                if not attempts.is_finished:
                    call.cancel()


def _coordinator() -> DeploymentHandle:
    if TRIMTAB not in serve.status().applications:
        raise ReplicaLost("no application 'trimtab' runs on this Ray cluster; start it: trimtab serve")
    return serve.get_deployment_handle(COORDINATOR, TRIMTAB)
