"""Resident memory of the service's processes after few and after many short requests, over HTTP.

    python -m bench.memory

What counts is USS, the memory that is a process's own. A service that keeps nothing of a request ends where it was.
"""

import argparse
import signal
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench.machine import descendants, describe
from bench.options import add_models, endless_models, plain, positive
from bench.run import say, write
from bench.service import Http, running_service
from bench.table import markdown
from bench.workload import Models, Prompts

REPLICA = "ray::ServeReplica:"


@dataclass(frozen=True)
class Growth:
    """One process's memory."""

    name: str
    early_bytes: int
    late_bytes: int

    @property
    def percent(self) -> float:
        """How much more it is in the end."""
        return 100 * (self.late_bytes / self.early_bytes - 1)


def replica_bytes() -> dict[str, int]:
    """Return the USS of every Serve replica that this process started, by name and process id."""
    found: dict[str, int] = {}
    for process in descendants():
        try:
            title = " ".join(process.cmdline())
            if title.startswith(REPLICA):
                found[f"{title.removeprefix(REPLICA).strip()} ({process.pid})"] = process.memory_full_info().uss
        except psutil.Error:
            continue  # it has ended
    return found


def measure(models: Models, prompts: Prompts, arguments: argparse.Namespace) -> list[Growth]:
    """Run the requests, so many at once, and look twice."""
    with running_service(models) as url:
        service = Http(url, models, streams=False)
        done, early = 0, dict[str, int]()
        while done < arguments.requests:
            limit = arguments.early if done < arguments.early else arguments.requests
            num_sequences = min(arguments.concurrency, limit - done)
            service.run(prompts.batch(num_sequences, max_tokens=arguments.max_tokens, num_guides=len(models.guides)))
            done += num_sequences
            if done == arguments.early:
                early = replica_bytes()
                say(f"{done} requests done: {sum(early.values()) / 2**20:.0f} MiB")
        late = replica_bytes()
    return [Growth(name, early[name], late[name]) for name in early if name in late]


def table(growths: Sequence[Growth]) -> str:
    """Return the memory of each process and of all together."""
    total = Growth("all", sum(g.early_bytes for g in growths), sum(g.late_bytes for g in growths))
    rows = [
        [g.name, f"{g.early_bytes / 2**20:.1f}", f"{g.late_bytes / 2**20:.1f}", f"{g.percent:+.2f} %"]
        for g in (*growths, total)
    ]
    return markdown(["process", "early, MiB", "late, MiB", "more"], rows)


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=positive, default=2000)
    parser.add_argument("--early", type=positive, default=200, help="requests before the first look")
    parser.add_argument("--concurrency", type=positive, default=16, help="requests at once")
    parser.add_argument("--max-tokens", type=positive, default=4)
    parser.add_argument("--guides", type=int, default=1, help="number of guides")
    add_models(parser)
    arguments = parser.parse_args(command_line)
    if arguments.early >= arguments.requests:
        parser.error(f"--early: {arguments.early} is not less than --requests, {arguments.requests}")
    return arguments


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write it down; return what was written as JSON."""
    arguments = parse(command_line)
    # Like Ctrl-C, it lets us end what we started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine = describe(arguments.threads, arguments.dtype)
    with endless_models(
        arguments,
        num_guides=arguments.guides,
        max_sequences=arguments.concurrency,
        max_tokens=arguments.max_tokens,
    ) as (models, prompts):
        growths = measure(models, prompts, arguments)
    text = f"After {arguments.early} and after {arguments.requests} requests:\n\n{table(growths)}\n"
    print(text)
    result = {
        "machine": machine,
        "options": plain(arguments),
        "processes": [{**asdict(growth), "percent": growth.percent} for growth in growths],
        "median_percent": statistics.median(growth.percent for growth in growths),
    }
    write("memory", arguments.output, result, text)
    return result


if __name__ == "__main__":
    main()
