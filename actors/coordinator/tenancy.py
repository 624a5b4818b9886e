"""The places of one sequence on replicas: taken at its start, and taken again when one is lost."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

from actors.coordinator.lane import Lane
from actors.coordinator.replicas import Place
from actors.coordinator.sequence import SEND_AGAIN, LiveSequence, Voice
from actors.leases import Lease
from actors.settings import NO_GUIDANCE
from cluster.errors import ReplicaLost, TrimtabError
from cluster.exchange import StepStream

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
"""Between two attempts at a lease that fail at once."""

LOOK_S = 1.0
"""How long a lease may take before it is asked whether its model is there at all."""

HOLD_S = 2.0
"""How long a sequence that has lost a guide keeps its other places."""

logger = logging.getLogger(__name__)


class _Gone(Exception):
    """No replica of a model runs, and its sequence holds places that others could use."""


class Tenancy:
    """Takes a sequence's places, always in the order of their names, the base's last.

    Two sequences so never wait for each other. A sequence that loses a guide first tries to get another place on it
    while it holds the rest, for a moment only; if that fails, or if it was the base, it gives everything back and
    begins again in the same order, and its replicas' caches of prompts make that cheap. What waits for a guide of which
    no replica runs holds no place on any other, and goes on asking for one there: Serve starts what is asked for.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        lease: Callable[[str], Awaitable[Place]],
        is_there: Callable[[str], Awaitable[bool]],
        waits_for_guides: bool = True,
        replays: Counter[str] | None = None,
    ) -> None:
        """Describe what is needed; `begin` takes it.

        Args:
            names: of the models, each of them once, in the order in which their places are taken.
            lease: takes a place on a model; raises `ReplicaLost` if that may work later.
            is_there: whether a replica of a model runs, free or not.
            waits_for_guides: or fails, when one is lost or not there.
            replays: counts the losses, by model, after which the sequence went on.
        """
        assert len(set(names)) == len(names)
        self.places: dict[str, Place] = {}
        self._names = names
        self._lease = lease
        self._is_there = is_there
        self._waits_for_guides = waits_for_guides
        self._replays = Counter() if replays is None else replays
        self._lost: list[str] = []
        self._wanted: str | None = None
        self._complaint = "all its replicas are busy, or none is running"
        self._origins: Mapping[str, Lease] = {}
        self._sequence: LiveSequence | None = None
        self._lane_of: Callable[[StepStream], Lane]
        self._lane: Lane | None = None
        self._recovery: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Take all places.

        Raises:
            InvalidRequest: a model cannot take the prompt.
            ReplicaLost: a guide is not there, and the sequence is not to wait.
        """
        while missing := self._missing():
            try:
                for name in missing:
                    await self._take(name)
            except _Gone:
                assert self._wanted is not None
                self._give_back()
                await self._until_there(self._wanted)

    def settle(self, sequence: LiveSequence, lane_of: Callable[[StepStream], Lane]) -> None:
        """Seat the sequence's voices in the places, and keep them seated from now on.

        lane_of: the lane of a base's stream.
        """
        self._origins = {name: place.lease for name, place in self.places.items()}
        self._sequence = sequence
        self._lane_of = lane_of
        sequence.on_loss = self._lose
        self._seat(sequence)

    async def end(self) -> None:
        """Give all places back, whatever the sequence is doing."""
        try:
            if self._recovery is not None:
                self._recovery.cancel()
                await asyncio.gather(self._recovery, return_exceptions=True)
        finally:
            # Also for a caller that is cancelled once more meanwhile.
            if self._sequence is not None and self._lane is not None:
                self._lane.remove(self._sequence)
            for place in self.places.values():
                place.end()
            self.places.clear()

    def overdue(self, timeout_s: float) -> ReplicaLost | None:
        """What to say when the time is over while a place is waited for; None if none is."""
        if self._wanted is None:
            return None
        return ReplicaLost(
            f"no place on {_title(self._wanted)} was to be had within {timeout_s:g} s: {self._complaint}"
        )

    def _missing(self) -> list[str]:
        return [name for name in self._names if name not in self.places]

    async def _take(self, name: str) -> None:
        """Wait for a place.

        Raises:
            _Gone: the model is not there, and other places are held.
            ReplicaLost: it is not the model that the sequence began with, or a guide for which it is not to wait.
        """
        self._wanted = name
        taking = asyncio.create_task(self._persist(name))
        try:
            while not (await asyncio.wait({taking}, timeout=LOOK_S))[0]:
                await self._look(name)
            place = taking.result()
            self._check(name, place.lease)
            self.places[name] = place
            self._wanted = None
        finally:
            if name not in self.places:
                taking.cancel()
                taking.add_done_callback(_end_place)

    async def _persist(self, name: str) -> Place:
        """Ask for a place until there is one."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._lease(name)
            except ReplicaLost as error:
                logger.info("%s; trying again", error)
                self._complaint = str(error)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _look(self, name: str) -> None:
        """Raise if a place is not to be waited for as things are."""
        if name == NO_GUIDANCE:
            # Whoever could use the places that are held meanwhile needs the base too.
            return
        is_unwaited = not self._waits_for_guides
        if (is_unwaited or self.places) and not await self._is_there(name):
            if is_unwaited:
                raise ReplicaLost(f"{_title(name)} is not there, and limits.on_guide_loss is fail")
            raise _Gone

    async def _until_there(self, name: str) -> None:
        """Wait for a model, and ask for a place all the while.

        Raises:
            InvalidRequest: the model cannot take the prompt.
        """
        asking = asyncio.create_task(self._persist(name))
        try:
            while not (asking.done() or await self._is_there(name)):
                await asyncio.wait({asking}, timeout=LOOK_S)
            if asking.done():
                asking.result()
        finally:
            # The places are taken in their order.
            asking.cancel()
            asking.add_done_callback(_end_place)

    def _check(self, name: str, lease: Lease) -> None:
        """Raise `ReplicaLost` unless a lease is on the model that the sequence began with, if it has begun."""
        origin = self._origins.get(name, lease)
        if (lease.fingerprint, list(lease.prompt_tokens)) != (origin.fingerprint, list(origin.prompt_tokens)):
            raise ReplicaLost(f"{_title(name)} was changed by an update while the request ran: {SEND_AGAIN}")

    def _lose(self, voice: Voice, error: TrimtabError) -> None:
        """Find a voice another place."""
        assert self._sequence is not None
        logger.warning("a sequence has lost its place on %s: %s", _title(voice.name), error)
        self._complaint = str(error)
        self._lost.append(voice.name)
        if (place := self.places.pop(voice.name, None)) is not None:
            place.end()
        if voice.name != NO_GUIDANCE and not self._waits_for_guides:
            message = f"{_title(voice.name)} was lost, and limits.on_guide_loss is fail: {error}"
            self._sequence.fail(ReplicaLost(message))
        elif self._recovery is None:
            self._recovery = asyncio.create_task(self._recover(self._sequence))

    async def _recover(self, sequence: LiveSequence) -> None:
        try:
            # Those that a replica held do not all ask in the same moment, nor one of them without a rest.
            await asyncio.sleep(random.uniform(0, FIRST_PAUSE_S))
            while missing := self._missing():
                if NO_GUIDANCE in missing or not await self._take_soon(missing):
                    self._give_back()
                    await self.begin()
            self._seat(sequence)
            self._replays.update(self._lost)
            self._lost.clear()
        except Exception as error:
            if not isinstance(error, TrimtabError):
                logger.exception("a sequence could not be moved")
            sequence.fail(error)
        finally:
            self._recovery = None

    async def _take_soon(self, missing: Sequence[str]) -> bool:
        """Try to take places while the others are held."""
        try:
            async with asyncio.timeout(HOLD_S):
                for name in missing:
                    await self._take(name)
        except (TimeoutError, _Gone):
            return False
        return True

    def _give_back(self) -> None:
        """End all places; the sequence leaves its lane."""
        for place in self.places.values():
            place.end()
        self.places.clear()
        if self._sequence is not None and self._lane is not None:
            for voice in self._sequence.voices:
                voice.leave()
            self._lane.release(self._sequence)
            self._lane = None

    def _seat(self, sequence: LiveSequence) -> None:
        """Seat the voices that have lost their seats, in the lane of their base."""
        for voice in sequence.voices:
            if voice.seat is None:
                voice.seat = self.places[voice.name].seat
        if self._lane is None:
            self._lane = self._lane_of(self.places[NO_GUIDANCE].stream)
            self._lane.add(sequence)
        else:
            self._lane.wake()


def _title(name: str) -> str:
    return "the base" if name == NO_GUIDANCE else f"guide {name!r}"


def _end_place(taking: "asyncio.Task[Place]") -> None:
    """End a place that came when nobody waited for it any more."""
    if not taking.cancelled() and taking.exception() is None:
        taking.result().end()
