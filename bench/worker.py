"""A system under measurement in a process of its own, which waits without work until it is asked.

Between measurements the process blocks in a read of its pipe, so it takes nothing from the others. It ends with the
process that started it, however that ends.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import transformers

from bench.workload import Batch, Models, Outcome

STOP_S = 10.0


class System(Protocol):
    """Something that writes texts."""

    def run(self, batch: Batch) -> Outcome:
        """Write the batch's texts and say how long it took."""
        ...


class RemoteSystem:
    """A system in another process, called like one in this."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def run(self, batch: Batch) -> Outcome:
        """Have the batch written.

        Raises:
            RuntimeError: the other process failed; what it said stands above.
        """
        self._connection.send(batch)
        outcome: Outcome = receive(self._connection)
        return outcome


@contextmanager
def process(
    target: Callable[..., None], *args: Any, environment: Mapping[str, str] | None = None
) -> Iterator[Connection]:
    """Run `target(connection, *args)` in a fresh process while the context lasts; yield the connection's other end.

    `environment` is added to this process's own.
    """
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    child = context.Process(target=_obey, args=(other, target, *args), daemon=True)
    before = dict(os.environ)
    os.environ |= environment or {}
    child.start()
    os.environ.clear()
    os.environ |= before
    other.close()
    try:
        yield connection
    finally:
        connection.close()
        child.join(STOP_S)
        if child.is_alive():
            child.kill()
            child.join()


@contextmanager
def remote_system(load: Callable[[Models], System], models: Models) -> Iterator[RemoteSystem]:
    """Load a system in a process of its own and wait until it is there."""
    with process(_serve, load, models) as connection:
        receive(connection)
        yield RemoteSystem(connection)


def receive(connection: Connection) -> Any:
    """Return what the other process sends next.

    Raises:
        RuntimeError: it has ended.
    """
    try:
        return connection.recv()
    except EOFError as error:
        raise RuntimeError("a process of the benchmark has ended; what it said stands above") from error


def _obey(connection: Connection, target: Callable[..., None], *args: Any) -> None:
    # Ctrl-C reaches the whole process group; the process that started this one decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers.utils.logging.disable_progress_bar()
    target(connection, *args)


def _serve(connection: Connection, load: Callable[[Models], System], models: Models) -> None:
    torch.set_num_threads(models.threads)
    system = load(models)
    connection.send("ready")
    while True:
        try:
            batch = connection.recv()
        except EOFError:
            return
        connection.send(system.run(batch))
