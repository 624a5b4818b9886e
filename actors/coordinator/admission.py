"""Who is answered next: how many requests may be open, what each key may have, and whose turn it is.

Callers are told apart by the names of their keys; those that come through a handle of Ray's have none and count as one.
Knows nothing of Ray.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from cluster.errors import Overloaded

MAX_STARTING = 8
"""Requests for the same models that wait in Serve's router together, where the first come is the first served; the
others wait here, where keys take turns. Enough to start hundreds a second where there is room."""

SOON_S = 1.0
"""When a key with too many requests may try again: as soon as one of them has ended, whenever that is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whom a request is for."""

    name: str
    """Of the key."""

    max_sequences: int | None = None
    """Open requests of this key, at most."""

    tokens_per_minute: int | None = None
    """Prompt and answers together."""


UNNAMED = Caller(name="")
"""Whoever has no key."""


class TokenBucket:
    """Tokens that a caller may use: a minute's worth at most, filled as time goes by.

    What a request uses is known only as it is answered, so the level may fall below zero: then nothing more begins
    until it is above again. In the long run nobody has more than the rate.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._filled_at = clock()

    def allow(self, per_minute: int) -> None:
        """Change the rate, if it is another one."""
        self._fill()
        self._per_minute = per_minute
        self._level = min(self._level, per_minute)

    def take(self, num_tokens: int) -> None:
        """Note that tokens were used."""
        self._fill()
        self._level -= num_tokens

    def wait_s(self) -> float:
        """How long until something may begin; 0 if it may."""
        self._fill()
        return 0.0 if self._level > 0 else (1 - self._level) * 60 / self._per_minute

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._filled_at) * self._per_minute / 60)
        self._filled_at = now


class FairQueue:
    """So many turns at a time; whoever waits for one is served by name in rotation, and first come first within one."""

    def __init__(self, num_turns: int) -> None:
        self._num_free = num_turns
        self._num_turns = num_turns
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def is_idle(self) -> bool:
        """Whether nobody has a turn or waits for one."""
        return self._num_free == self._num_turns and not self._waiting

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn and have it for as long as the context lasts."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, deque()).append(turn)
        self._hand_out()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._num_free += 1
            else:
                self._leave(name, turn)
            self._hand_out()

    def _hand_out(self) -> None:
        while self._num_free and self._waiting:
            name, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            if turns:
                self._waiting.move_to_end(name)
            else:
                del self._waiting[name]
            if not turn.done():
                self._num_free -= 1
                turn.set_result(None)

    def _leave(self, name: str, turn: "asyncio.Future[None]") -> None:
        turns = self._waiting.get(name)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[name]


class Account:
    """What one caller has open and has used."""

    def __init__(self) -> None:
        self.num_open = 0
        self.bucket: TokenBucket | None = None


class Ticket:
    """An open request. Its tokens are charged as they come."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._num_charged = 0

    def charge(self, total_tokens: int) -> None:
        """Note how many tokens the request has used in all so far."""
        if self._account.bucket is not None:
            self._account.bucket.take(total_tokens - self._num_charged)
        self._num_charged = total_tokens


class Admission:
    """Lets requests in, or says when to try again. Lives on one event loop."""

    def __init__(self, max_open: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_open = max_open
        self._clock = clock
        self.num_open = 0
        """Requests that are open, those that wait included."""
        self._accounts: dict[str, Account] = {}
        self._queues: dict[frozenset[str], FairQueue] = {}

    @contextmanager
    def open(self, caller: Caller) -> Iterator[Ticket]:
        """An open request, for as long as the context lasts.

        Raises:
            Overloaded: too many are open, of all or of this caller, or the caller has used up its tokens.
        """
        if self.num_open >= self._max_open:
            raise Overloaded(f"{self.num_open} requests are open or waiting, which is the limit; try again later")
        account = self._account(caller)
        if caller.max_sequences is not None and account.num_open >= caller.max_sequences:
            raise Overloaded(
                f"the key {caller.name!r} has {account.num_open} requests open, which is its limit; "
                "try again when one has ended",
                SOON_S,
            )
        if account.bucket is not None and (wait_s := account.bucket.wait_s()):
            raise Overloaded(
                f"the key {caller.name!r} has used up its {caller.tokens_per_minute} tokens a minute; "
                f"try again in {wait_s:.0f} s",
                wait_s,
            )
        self.num_open += 1
        account.num_open += 1
        try:
            yield Ticket(account)
        finally:
            self.num_open -= 1
            account.num_open -= 1

    def _account(self, caller: Caller) -> Account:
        account = self._accounts.setdefault(caller.name, Account())
        if caller.tokens_per_minute is None:
            account.bucket = None
        elif account.bucket is None:
            account.bucket = TokenBucket(caller.tokens_per_minute, self._clock)
        else:
            account.bucket.allow(caller.tokens_per_minute)
        return account

    @asynccontextmanager
    async def turn(self, caller: Caller, guides: Collection[str]) -> AsyncIterator[None]:
        """The caller's turn to wait for room among the models, for as long as the context lasts.

        Requests for other guides have turns of their own: a guide that cannot be had holds up nobody else.
        """
        models = frozenset(guides)
        queue = self._queues.setdefault(models, FairQueue(MAX_STARTING))
        try:
            async with queue.turn(caller.name):
                yield
        finally:
            if queue.is_idle and self._queues.get(models) is queue:
                del self._queues[models]
