"""The service and the bare engine beside transformers `generate`: tokens a second, and where a step's time goes.

    make bench
    make bench ARGS="--concurrency 1,16 --guides 0,1 --max-tokens 32"
    make bench ARGS="--concurrency 1,16 --guides 0,1 --max-tokens 32 --systems generate,http --no-steps"
    make bench ARGS="--concurrency 1,16 --guides 1 --systems none --rows hidden_states --transport grpc"

Every system gets prompts of the same kind and length, the same sampling (the whole distribution at temperature 1),
dtype and threads, and models whose end token was taken away, so that all texts have --max-tokens tokens. In one round
each system is measured once in every cell, in an order that turns from round to round; a ratio compares two systems
within a round, and its median is what stands in the table. A first round with few tokens is not counted. While one is
measured the others wait without work: `generate` and the bare engine in a read of their pipes, the service as it idles
(what all of them use then is measured and printed; starting the service for every measurement would take longer than
all of them).

The default takes about 40 minutes on two cores: with two and four guides only 1 and 16 sequences are measured, streams
with no and one guide, and above 16 sequences a text has half of --max-tokens; --all measures every cell, in about two
hours. The first example above takes about 7 minutes, the second about 4. Figures say nothing while something else runs
on the machine.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, get_args

from actors.engine import RowKind
from bench import steps
from bench.engine import BareEngine
from bench.generate import Generate
from bench.machine import busy_cores, describe
from bench.options import add_models, endless_models, numbers, plain, positive, positives
from bench.recorder import Breakdown
from bench.service import Http, running_service
from bench.table import REFERENCE, Cell, Sample, Samples
from bench.worker import System, remote_system
from bench.workload import Models, Prompts
from cluster.exchange import Transport

NAMES = {
    REFERENCE: "transformers generate",
    "engine": "bare engine",
    "http": "service, HTTP",
    "stream": "service, HTTP, streamed",
}
FEW_GUIDES = 1
MANY_SEQUENCES = 16
WARM_UP_TOKENS = 8
IDLE_S = 3.0


def choose_cells(
    systems: Sequence[str], concurrency: Sequence[int], num_guides: Sequence[int], *, every: bool
) -> list[Cell]:
    """Return what is measured: each combination, or those that matter."""
    cells = [Cell(c, g, system) for c in concurrency for g in num_guides for system in systems]
    if every:
        return cells
    return [
        cell
        for cell in cells
        if cell.num_guides <= FEW_GUIDES or (cell.concurrency in (1, MANY_SEQUENCES) and cell.system != "stream")
    ]


def choose_tokens(max_tokens: int, concurrency: int, *, every: bool) -> int:
    """Return how many tokens each text has."""
    return max_tokens if every or concurrency <= MANY_SEQUENCES else max(1, max_tokens // 2)


def turned(cells: Sequence[Cell], number: int) -> list[Cell]:
    """Return the cells with the systems of each combination in an order that turns with the number of the round."""
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.concurrency, cell.num_guides), []).append(cell)
    return [
        cell for group in groups.values() for cell in (*group[number % len(group) :], *group[: number % len(group)])
    ]


@contextmanager
def started(names: Sequence[str], models: Models) -> Iterator[Mapping[str, System]]:
    """Start the systems while the context lasts."""
    systems: dict[str, System] = {}
    with ExitStack() as stack:
        for name, load in ((REFERENCE, Generate), ("engine", BareEngine)):
            if name in names:
                say(f"starting {NAMES[name]}")
                systems[name] = stack.enter_context(remote_system(load, models))
        if {"http", "stream"} & set(names):
            say("starting the service")
            url = stack.enter_context(running_service(models))
            systems["http"] = Http(url, models, streams=False)
            systems["stream"] = Http(url, models, streams=True)
        yield systems


def measure(
    systems: Mapping[str, System], cells: Sequence[Cell], prompts: Prompts, rounds: int, arguments: argparse.Namespace
) -> Samples:
    """Warm up, then measure every cell once a round."""
    samples: list[Sample] = []
    start = time.monotonic()
    for number in range(rounds + 1):
        for cell in turned(cells, number):
            max_tokens = choose_tokens(arguments.max_tokens, cell.concurrency, every=arguments.all)
            if number == 0:
                max_tokens = min(WARM_UP_TOKENS, max_tokens)
            batch = prompts.batch(cell.concurrency, max_tokens=max_tokens, num_guides=cell.num_guides)
            outcome = systems[cell.system].run(batch)
            if number:
                samples.append(Sample(cell, number, outcome.num_tokens, outcome.elapsed_s))
        if number == 0:
            say("warmed up")
            start = time.monotonic()
        else:
            elapsed_s = time.monotonic() - start
            say(f"round {number} of {rounds}; {elapsed_s / number * (rounds - number) / 60:.1f} minutes to go")
    return Samples(samples)


def report(machine: Mapping[str, str], samples: Samples | None, breakdowns: Sequence[Breakdown]) -> str:
    """Return all that was measured as Markdown."""
    parts = ["\n".join(f"* {name}: {value}" for name, value in machine.items())]
    if samples is not None:
        parts.append(samples.table(NAMES))
        parts.append(
            "Medians over the rounds; ratios of tokens a second are medians of ratios within a round. ms/token is the "
            "time between two tokens of one sequence, its prompt's time shared out among them."
        )
    if breakdowns:
        parts.append("A step that decodes one token of every sequence, in milliseconds:")
        parts.append(steps.table(breakdowns))
        parts.append(
            "Exchange is from the first message sent to the last row there, less the time in which models compute: one "
            "after the other on shared cores. Text is made meanwhile; the rest comes one after the other."
        )
    return "\n\n".join(parts) + "\n"


def say(message: str) -> None:
    """Tell whoever waits."""
    print(message, file=sys.stderr, flush=True)


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=positives, default=[1, 4, 16, 64], help="sequences at once")
    parser.add_argument("--guides", type=numbers, default=[0, 1, 2, 4], help="numbers of guides")
    parser.add_argument(
        "--systems",
        type=lambda text: text.split(","),
        default=list(NAMES),
        help=f"of {','.join(NAMES)}; `none` for the steps alone",
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--max-tokens", type=positive, default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="measure every cell, all with --max-tokens")
    parser.add_argument("--no-steps", action="store_true", help="do not break steps down")
    parser.add_argument(
        "--rows",
        choices=get_args(RowKind),
        default="logits",
        help="what guides send in the service and in the steps (default: %(default)s)",
    )
    parser.add_argument(
        "--transport", choices=get_args(Transport), default="auto", help="of rows (default: %(default)s)"
    )
    add_models(parser)
    arguments = parser.parse_args(command_line)
    if arguments.systems == ["none"]:
        arguments.systems = []
    if unknown := set(arguments.systems) - set(NAMES):
        parser.error(f"--systems: there is no {', '.join(sorted(unknown))}; systems are {', '.join(NAMES)}")
    if min(arguments.guides) < 0:
        parser.error(f"--guides: {min(arguments.guides)} is less than 0")
    return arguments


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables and write them down; return what was written as JSON."""
    arguments = parse(command_line)
    # Like Ctrl-C, it lets us end what we started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine = describe(arguments.threads, arguments.dtype)
    samples, breakdowns = None, []
    with endless_models(
        arguments,
        num_guides=max(arguments.guides),
        max_sequences=max(arguments.concurrency),
        max_tokens=arguments.max_tokens,
        rows=arguments.rows,
        transport=arguments.transport,
    ) as (models, prompts):
        if arguments.systems:
            cells = choose_cells(arguments.systems, arguments.concurrency, arguments.guides, every=arguments.all)
            with started(arguments.systems, models) as systems:
                machine["cores that all systems keep busy while they idle"] = f"{busy_cores(IDLE_S):.2f}"
                samples = measure(systems, cells, prompts, arguments.rounds, arguments)
        if not arguments.no_steps:
            if samples is not None:
                say(samples.table(NAMES))
            say("breaking steps down")
            breakdowns = steps.measure_steps(
                models, prompts, arguments.concurrency, arguments.guides, arguments.max_tokens
            )
    text = report(machine, samples, breakdowns)
    print(text)
    result = {
        "machine": machine,
        "options": plain(arguments),
        "cells": samples.figures() if samples is not None else [],
        "steps_ms": [asdict(breakdown) for breakdown in breakdowns],
    }
    write("bench", arguments.output, result, text)
    return result


def write(name: str, folder: Any, result: Mapping[str, Any], text: str) -> None:
    """Write a result as JSON and as Markdown, named by the time."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    say(f"written to {stem}.json and .md")


if __name__ == "__main__":
    main()
