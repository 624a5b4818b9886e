"""The end of a gateway: nothing new begins, what is being written has some time, and what is left then is told so."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from cluster.errors import ReplicaLost

LAST_WORDS_S = 5.0
"""For answers that were given up to leave."""


class Closing:
    """Counts the answers that are being written, and ends their waits. Lives on one event loop."""

    def __init__(self) -> None:
        self._is_closing = False
        self._is_over = False
        self._num_open = 0
        self._waits: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def answer(self) -> Iterator[None]:
        """An answer that is being written, for as long as the context lasts.

        Raises:
            ReplicaLost: nothing begins any more.
        """
        if self._is_closing:
            raise ReplicaLost("the service is being stopped; try again later")
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    @asynccontextmanager
    async def wait(self, timeout_s: float, late: str) -> AsyncIterator[None]:
        """A wait for more of an answer.

        Raises:
            ReplicaLost: the time is over, which `late` says, or the service has ended.
        """
        try:
            async with asyncio.timeout(0 if self._is_over else timeout_s) as timeout:
                self._waits.add(timeout)
                try:
                    yield
                finally:
                    self._waits.discard(timeout)
        except TimeoutError as error:
            raise ReplicaLost(
                "the service was stopped before the answer was finished" if self._is_over else late
            ) from error

    async def close(self, drain_s: float) -> None:
        """Let nothing begin any more; return when no answer is being written. Those left after `drain_s` fail."""
        self._is_closing = True
        if await self._is_idle(drain_s):
            return
        self._is_over = True
        now = asyncio.get_running_loop().time()
        for timeout in list(self._waits):
            if not timeout.expired():
                timeout.reschedule(now)
        await self._is_idle(LAST_WORDS_S)

    async def _is_idle(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
