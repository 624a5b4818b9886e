"""Who is let in, whose turn it is, and what keys may use."""

import asyncio
from contextlib import ExitStack

import pytest

from actors.coordinator import admission
from actors.coordinator.admission import UNNAMED, Admission, Caller, FairQueue, TokenBucket
from cluster.errors import Overloaded

ALICE, BOB = Caller(name="alice"), Caller(name="bob")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_keys_take_turns_and_one_with_many_requests_gains_nothing() -> None:
    queue = FairQueue(1)
    order: list[str] = []

    async def ask(name: str) -> None:
        async with queue.turn(name):
            order.append(name)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for name in ["a"] * 6 + ["b"] * 2 + ["c"]:
            tasks.create_task(ask(name))
    assert order == ["a", "a", "b", "c", "a", "b", "a", "a", "a"]
    assert queue.is_idle


async def test_so_many_turns_are_out_at_once() -> None:
    queue = FairQueue(3)
    running = peak = 0

    async def ask(name: str) -> None:
        nonlocal running, peak
        async with queue.turn(name):
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0)
            running -= 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(ask(str(number % 4)))
    assert peak == 3


async def test_who_leaves_the_queue_or_gives_up_a_turn_holds_up_nobody() -> None:
    queue = FairQueue(1)
    gate = asyncio.Event()

    async def hold(name: str) -> None:
        async with queue.turn(name):
            await gate.wait()

    first, second, third = (asyncio.create_task(hold(name)) for name in "aba")
    await settle()
    second.cancel()
    await settle()
    first.cancel()
    await settle()
    gate.set()
    await third
    # Given a turn and cancelled before it could be used.
    gate.clear()
    holder, waiter = asyncio.create_task(hold("a")), asyncio.create_task(hold("b"))
    await settle()
    holder.cancel()
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(holder, waiter, return_exceptions=True)
    assert queue.is_idle


async def test_requests_for_other_models_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_STARTING", 1)
    door = Admission(10)
    async with door.turn(ALICE, {"gone"}):
        async with asyncio.timeout(5), door.turn(ALICE, ()):
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), door.turn(BOB, ["gone"]):
                pass
    assert door._queues == {}


def test_no_more_requests_are_open_than_there_may_be() -> None:
    door = Admission(2)
    with door.open(UNNAMED), door.open(ALICE), pytest.raises(Overloaded, match="2 requests are open"), door.open(BOB):
        pass
    with door.open(BOB), door.open(BOB):
        pass


def test_a_key_has_its_own_number_of_requests() -> None:
    door = Admission(100)
    few = Caller(name="few", max_sequences=2)
    with ExitStack() as stack:
        stack.enter_context(door.open(few))
        stack.enter_context(door.open(few))
        with pytest.raises(Overloaded, match="'few' has 2 requests open") as caught:
            stack.enter_context(door.open(few))
        assert caught.value.retry_after_s == 1
        stack.enter_context(door.open(ALICE))
    with door.open(few):
        pass


def test_a_key_that_has_used_up_its_tokens_is_told_when_it_may_come_again() -> None:
    clock = Clock()
    door = Admission(100, clock)
    caller = Caller(name="small", tokens_per_minute=60)
    with door.open(caller) as ticket:
        ticket.charge(20)
        ticket.charge(50)
        # Open requests go on, and others may begin while anything is left.
        with door.open(caller) as another:
            another.charge(30)
        ticket.charge(51)
    with (
        pytest.raises(Overloaded, match="used up its 60 tokens a minute; try again in 22 s") as caught,
        door.open(caller),
    ):
        pass
    assert caught.value.retry_after_s == pytest.approx(22)
    clock.now += caught.value.retry_after_s or 0
    with door.open(caller):
        pass
    with door.open(ALICE) as ticket:
        ticket.charge(10**9)


def test_in_the_long_run_a_key_has_its_rate_and_no_more() -> None:
    clock = Clock()
    door = Admission(100, clock)
    caller, used = Caller(name="steady", tokens_per_minute=600), 0
    for _ in range(3600):
        clock.now += 1
        try:
            with door.open(caller) as ticket:
                ticket.charge(37)
                used += 37
        except Overloaded:
            pass
    assert 36_000 <= used <= 36_000 + 600 + 37


def test_a_rate_that_changes_counts_from_then_on() -> None:
    clock = Clock()
    bucket = TokenBucket(100, clock)
    bucket.allow(10)
    bucket.take(10)
    assert bucket.wait_s() == pytest.approx(6)
    bucket.allow(600)
    assert bucket.wait_s() == pytest.approx(0.1)


def test_an_overload_survives_pickling() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(Overloaded("full", 3.5)))
    assert (str(again), again.retry_after_s) == ("full", 3.5)
