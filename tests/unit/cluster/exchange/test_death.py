"""A replica in a process of its own that dies or freezes, and a coordinator that does."""

import asyncio
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import pytest
import torch

from cluster.errors import ReplicaLost
from cluster.exchange import Step, StepRows, StepServer, StepStream, Work
from cluster.exchange.segment import PREFIX, SHARED_MEMORY

TIMEOUT_S = 30.0
KEEPALIVE_S = 1.0


class Hanging:
    """Answers sequence `a`, and `busy` after a while; tells of each other step and never answers it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def step(self, coordinator: str, step: Step) -> StepRows:
        if step.work[0].sequence == "busy":
            ctypes.PyDLL(None).usleep(round(2 * KEEPALIVE_S * 1e6))  # with the interpreter's lock held
        elif step.work[0].sequence != "a":
            self.connection.send("hangs")
            await asyncio.Event().wait()
        return StepRows(torch.ones(1, 101))

    def leave(self, coordinator: str, sequence: str) -> None:
        pass

    async def detach(self, coordinator: str) -> None:
        self.connection.send(f"detached {coordinator}")


def make_server(connection: Connection) -> StepServer:
    return StepServer(
        Hanging(connection),
        row_width=101,
        dtype=torch.float32,
        max_rows=4,
        host="127.0.0.1",
        keepalive_s=KEEPALIVE_S,
    )


async def connect(address: str, token: str) -> StepStream:
    return await StepStream.connect(
        address, token=token, coordinator="c", timeout_s=TIMEOUT_S, keepalive_s=KEEPALIVE_S, transport="shared_memory"
    )


def run_replica(connection: Connection) -> None:
    async def serve() -> None:
        server = make_server(connection)
        await server.start()
        connection.send((server.address, server.token))
        await asyncio.Event().wait()

    asyncio.run(serve())


def run_coordinator(connection: Connection, address: str, token: str) -> None:
    async def ask() -> None:
        stream = await connect(address, token)
        await stream.step([Work("hangs", 0, [1], [0])], timeout_s=TIMEOUT_S)

    asyncio.run(ask())


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[tuple[SpawnProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=target, args=(other, *arguments), daemon=True)
    process.start()
    other.close()
    try:
        yield process, mine
    finally:
        process.kill()
        process.join()
        process.close()
        mine.close()


async def read(connection: Connection) -> Any:
    assert await asyncio.to_thread(connection.poll, TIMEOUT_S)
    return connection.recv()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_replica_that_dies_or_freezes_is_found(how: signal.Signals) -> None:
    with process(run_replica) as (replica, connection):
        assert replica.pid is not None
        address, token = await read(connection)
        stream = await connect(address, token)
        rows = await stream.step([Work("a", 0, [1], [0])], timeout_s=TIMEOUT_S)
        hanging = [
            asyncio.create_task(stream.step([Work("hangs", 0, [1], [0])], timeout_s=TIMEOUT_S)) for _ in range(2)
        ]
        assert [await read(connection), await read(connection)] == ["hangs", "hangs"]
        os.kill(replica.pid, how)
        for step in hanging:
            # Well before the step's own time is over; the rest is for machines under load.
            with pytest.raises(ReplicaLost, match=address):
                await asyncio.wait_for(step, KEEPALIVE_S + 10.0)
        assert address in str(stream.lost.result())
        assert rows.tensor.sum() == 101
        rows.release()
        await stream.close()
        assert not list(SHARED_MEMORY.glob(f"{PREFIX}{replica.pid}-*"))


async def test_a_replica_that_is_busy_is_not_taken_for_dead() -> None:
    with process(run_replica) as (_, connection):
        address, token = await read(connection)
        stream = await connect(address, token)
        (await stream.step([Work("busy", 0, [1], [0])], timeout_s=TIMEOUT_S)).release()
        assert not stream.lost.done()
        await stream.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_coordinator_that_dies_or_freezes_is_detached(how: signal.Signals) -> None:
    mine, other = multiprocessing.Pipe()
    server = make_server(other)
    await server.start()
    with process(run_coordinator, server.address, server.token) as (coordinator, _):
        assert coordinator.pid is not None
        await server.wait_attached("c", TIMEOUT_S)
        assert await read(mine) == "hangs"
        os.kill(coordinator.pid, how)
        assert await asyncio.wait_for(read(mine), KEEPALIVE_S + 10.0) == "detached c"
        assert not server.attached("c")
    await server.stop()
    assert not mine.poll()
    mine.close()
    other.close()
    assert not list(SHARED_MEMORY.glob(f"{PREFIX}{os.getpid()}-*"))
