"""A guide's output function is fetched once for all sequences, and again when that failed or it was forgotten."""

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from ray.exceptions import OwnerDiedError

from actors.coordinator.outputs import OutputFunctions
from actors.guidance.lm_head import OutputFunction
from actors.leases import Lease
from cluster.errors import ReplicaLost


class Store:
    """In place of Ray's object store: a fetch of a reference ends when `open` is set."""

    def __init__(self) -> None:
        self.num_fetches = 0
        self.begun, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.is_lost = False

    def get(self, reference: object, *, timeout: float) -> OutputFunction:
        self.num_fetches += 1
        self.begun.set()
        assert self.open.wait(timeout)
        if self.is_lost:
            raise OwnerDiedError("00", None, "")
        return OutputFunction(weight_VD=torch.eye(3))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr("ray.get", store.get)
    return store


def lease(fingerprint: str, output: object = "reference") -> Lease:
    make: Callable[..., Lease] = Lease
    return make(
        replica=f"replica of {fingerprint}",
        address="",
        token="",
        fingerprint=fingerprint,
        prompt_tokens=[1],
        max_context=8,
        base_vocabulary="",
        output=output,
    )


async def test_rows_of_logits_need_none(store: Store) -> None:
    assert await OutputFunctions().get(lease("a", None)) is None
    assert store.num_fetches == 0


async def test_all_sequences_share_one_fetch_even_if_the_first_leaves(store: Store) -> None:
    functions = OutputFunctions()
    store.open.clear()
    first, *others = (asyncio.create_task(functions.get(lease("a"))) for _ in range(3))
    await asyncio.to_thread(store.begun.wait, 60)
    first.cancel()
    store.open.set()
    one, two = await asyncio.gather(*others)
    assert one is two is await functions.get(lease("a"))
    assert store.num_fetches == 1
    assert await functions.get(lease("b")) is not one


async def test_what_no_replica_needs_is_forgotten(store: Store) -> None:
    functions = OutputFunctions()
    kept, forgotten = await functions.get(lease("a")), await functions.get(lease("b"))
    functions.keep({"a"})
    assert await functions.get(lease("a")) is kept
    assert await functions.get(lease("b")) is not forgotten


async def test_a_fetch_that_failed_is_tried_again(store: Store) -> None:
    functions = OutputFunctions()
    store.is_lost = True
    with pytest.raises(ReplicaLost, match="the output function of replica of a cannot be had"):
        await functions.get(lease("a"))
    store.is_lost = False
    assert await functions.get(lease("a")) is not None
