"""The output functions of guides whose rows are hidden states, and how a step's rows become logits with them."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from actors.coordinator.sequence import Voice
from actors.guidance.lm_head import OutputFunction
from actors.leases import Lease
from cluster.errors import ReplicaLost, in_brief

FETCH_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


class OutputFunctions:
    """Fetches each model's output function once, for all sequences; keeps it while a replica of the model is known."""

    def __init__(self) -> None:
        self._fetches: dict[str, asyncio.Task[OutputFunction]] = {}

    async def get(self, lease: Lease) -> OutputFunction | None:
        """Return what turns the rows of a lease's model into logits; None where they are logits.

        Raises:
            ReplicaLost: it cannot be had.
        """
        if lease.output is None:
            return None
        fetch = self._fetches.get(lease.fingerprint)
        if fetch is None or (fetch.done() and fetch.exception() is not None):
            fetch = asyncio.create_task(asyncio.to_thread(_fetch, lease))
            self._fetches[lease.fingerprint] = fetch
        # One caller that leaves does not take it from the others.
        return await asyncio.shield(fetch)

    def keep(self, fingerprints: Collection[str]) -> None:
        """Forget the output functions of all models but these."""
        for fingerprint in self._fetches.keys() - set(fingerprints):
            del self._fetches[fingerprint]


def _fetch(lease: Lease) -> OutputFunction:
    assert lease.output is not None
    try:
        function: OutputFunction = ray.get(lease.output, timeout=FETCH_TIMEOUT_S)
    except RayError as error:
        raise ReplicaLost(f"the output function of {lease.replica} cannot be had: {in_brief(error)}") from error
    logger.info("fetched the output function of %s", lease.replica)
    return function


def logits_of(voice: Voice) -> Tensor:
    """Return a voice's logits [..., V], of however many rows it has."""
    assert voice.row is not None
    assert voice.seat is not None
    return voice.row if voice.seat.output is None else voice.seat.output(voice.row)


def logits_by_voice(voices: Iterable[Voice]) -> dict[Voice, Tensor]:
    """Return each voice's logits [V]: its row, or what its output function makes of it.

    All rows of one function go through one matrix product.
    """
    logits: dict[Voice, Tensor] = {}
    hidden: defaultdict[OutputFunction, list[tuple[Voice, Tensor]]] = defaultdict(list)
    for voice in voices:
        assert voice.row is not None
        assert voice.seat is not None
        if voice.seat.output is None:
            logits[voice] = voice.row
        else:
            hidden[voice.seat.output].append((voice, voice.row))
    for output, rows in hidden.items():
        logits_RV = output(torch.stack([row for _, row in rows]))
        logits.update(zip((voice for voice, _ in rows), logits_RV, strict=True))
    return logits
