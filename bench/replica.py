"""A model replica without Ray, in a process of its own, which notes how long each forward pass takes.

The engine, the leases and the data plane are the service's own classes; only Serve's part, who is granted a lease, is
done by the process that measures.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from actors.engine import Counters, Engine, RowKind
from actors.guidance.lm_head import OutputFunction
from actors.leases import Lease, LeaseRequest, Refusal
from actors.prompts import Prompt, PromptEncoder
from actors.replica.server import ModelServer, engine_thread
from actors.replica.turns import Turns
from actors.vocabularies import load_tokenizer
from bench.worker import process, receive
from bench.workload import Models
from deploy.applications import THREADS

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass."""

    num_sequences: int
    num_tokens: int
    elapsed_s: float


class TimedEngine(Engine):
    """An engine that notes its forward passes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.forwards: list[Forward] = []
        super().__init__(*args, **kwargs)
        self.forwards.clear()

    def step(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the step and note it."""
        start = time.perf_counter()
        rows = super().step(work, *args, **kwargs)
        elapsed_s = time.perf_counter() - start
        self.forwards.append(Forward(len(work), sum(len(item.tokens) for item in work), elapsed_s))
        return rows


class RemoteReplica:
    """A replica in another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def lease(self, coordinator: str, sequence: str, prompt: str) -> Lease:
        """Take a lease, which lasts until `release`.

        Raises:
            RuntimeError: it was refused.
        """
        request = LeaseRequest(
            coordinator=coordinator, sequence=sequence, prompt=Prompt(text=prompt), known_bases=frozenset()
        )
        self._connection.send(request)
        answer: Lease | Refusal = receive(self._connection)
        if isinstance(answer, Refusal):
            raise RuntimeError(str(answer.error))
        return answer

    def release(self) -> None:
        """End all leases."""
        self._connection.send("release")
        receive(self._connection)

    def output(self) -> OutputFunction | None:
        """Return what turns its rows into logits, if they are hidden states."""
        self._connection.send("output")
        answer: OutputFunction | None = receive(self._connection)
        return answer

    def counters(self) -> Counters:
        """Return what the engine has done since it started."""
        self._connection.send("counters")
        answer: Counters = receive(self._connection)
        return answer

    def forwards(self) -> Sequence[Forward]:
        """Return the forward passes since the last call."""
        self._connection.send("forwards")
        answer: Sequence[Forward] = receive(self._connection)
        return answer


@contextmanager
def remote_replica(path: Path, models: Models, rows: RowKind = "logits") -> Iterator[RemoteReplica]:
    """Serve a model in a process of its own while the context lasts."""
    with process(_run, path, models, rows, environment=THREADS) as connection:
        receive(connection)
        yield RemoteReplica(connection)


def _run(connection: Connection, path: Path, models: Models, rows: RowKind) -> None:
    thread = engine_thread()
    engine = thread.submit(TimedEngine.load, str(path), rows=rows, **models.engine_options).result()
    assert isinstance(engine, TimedEngine)
    asyncio.run(_serve(connection, engine, thread, path, models))


async def _serve(
    connection: Connection, engine: TimedEngine, thread: ThreadPoolExecutor, path: Path, models: Models
) -> None:
    encoder = PromptEncoder(load_tokenizer(str(path)))
    server = ModelServer(
        engine,
        encoder,
        replica=path.name,
        host=LOOPBACK,
        max_rows=models.max_sequences,
        thread=thread,
        turns=Turns() if models.takes_turns else None,
    )
    holders: list[asyncio.Task[Any]] = []
    connection.send("ready")
    try:
        while True:
            match await asyncio.to_thread(connection.recv):
                case LeaseRequest() as request:
                    items = server.lease(request)
                    connection.send(await anext(items))
                    # A lease lasts while its caller waits for more.
                    holders.append(asyncio.create_task(_hold(items)))
                case "release":
                    for holder in holders:
                        holder.cancel()
                    await asyncio.gather(*holders, return_exceptions=True)
                    holders.clear()
                    connection.send("released")
                case "output":
                    connection.send(engine.output)
                case "counters":
                    connection.send(engine.counters)
                case "forwards":
                    connection.send(list(engine.forwards))
                    engine.forwards.clear()
    except EOFError:
        pass
    finally:
        await server.stop()


async def _hold(items: AsyncGenerator[Lease | Refusal, None]) -> None:
    try:
        async for _ in items:
            pass
    finally:
        await items.aclose()
