"""Time of a step without a model: a replica in a process of its own answers with rows it already has.

    python -m bench.exchange

Prints medians in milliseconds per transport and shape of the rows, from the call of `step` until the rows are there.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch

from cluster.exchange import Step, StepRows, StepServer, StepStream, Transport, Work

ROW_WIDTH = 49_152


class Echo:
    """Answers with as many rows as are wanted, without computing anything."""

    def __init__(self, row_width: int, max_rows: int) -> None:
        self._rows_RW = torch.randn(max_rows, row_width)

    async def step(self, coordinator: str, step: Step) -> StepRows:
        """The first rows of one tensor."""
        return StepRows(self._rows_RW[: sum(len(item.rows) for item in step.work)])

    def leave(self, coordinator: str, sequence: str) -> None:
        """Nothing is held."""

    async def detach(self, coordinator: str) -> None:
        """Nothing is held."""


def run_replica(connection: Connection, row_width: int) -> None:
    """Serve until the other end of the connection says otherwise."""

    async def serve() -> None:
        server = StepServer(
            Echo(row_width, 16), row_width=row_width, dtype=torch.float32, max_rows=16, host="127.0.0.1"
        )
        await server.start()
        connection.send((server.address, server.token))
        await asyncio.to_thread(connection.recv)
        await server.stop()

    torch.set_num_threads(1)
    asyncio.run(serve())


async def measure(address: str, token: str, transport: Transport, num_rows: int, num_steps: int) -> float:
    """Median milliseconds of a step that brings so many rows."""
    stream = await StepStream.connect(
        address, token=token, coordinator="bench", transport=transport, timeout_s=10.0, keepalive_s=30.0
    )
    times_ms = []
    for number in range(num_steps + 20):
        work = [Work(f"s{row}", number, [7], [0]) for row in range(num_rows)] or [Work("s", number, [7])]
        start = time.perf_counter()
        with await stream.step(work, timeout_s=10.0):
            times_ms.append((time.perf_counter() - start) * 1e3)
    await stream.close()
    return statistics.median(times_ms[20:])


async def measure_all(address: str, token: str, row_width: int, num_steps: int) -> None:
    """Print the table."""
    print(f"{'':14} {'no rows':>10} {f'[1, {row_width}]':>12} {f'[16, {row_width}]':>12}  (ms)")
    transports: tuple[Transport, ...] = ("shared_memory", "grpc")
    for transport in transports:
        figures = [await measure(address, token, transport, num_rows, num_steps) for num_rows in (0, 1, 16)]
        print(f"{transport:14} {figures[0]:10.2f} {figures[1]:12.2f} {figures[2]:12.2f}")


def main() -> None:
    """Start a replica and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row-width", type=int, default=ROW_WIDTH)
    parser.add_argument("--num-steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    replica = context.Process(target=run_replica, args=(other, arguments.row_width))
    replica.start()
    address, token = connection.recv()
    asyncio.run(measure_all(address, token, arguments.row_width, arguments.num_steps))
    connection.send("stop")
    replica.join()


if __name__ == "__main__":
    main()
