"""Processor time that a streamed token costs on its way from the coordinator to the client, of all processes together.

    python -m bench.streams
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 python -m bench.streams

The base is tiny and waits in every step, so that the model's own work hardly counts and tokens come as they come from
a real one. The same requests are made streamed and not, in turn; the difference, the idle service's own share taken
off both, is what streaming costs. The client's processor time is not counted.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from actors.names import BASE
from actors.settings import CHECKOUT
from bench.endless import make_endless
from bench.machine import descendants, describe
from bench.options import RESULTS, plain, positive
from bench.run import say, write
from bench.service import Http, running_service, service_config
from bench.table import markdown
from bench.workload import Batch, Models
from tests import tiny

PROMPT = "once upon a time"
WARM_UP_TOKENS = 8
IDLE_S = 5.0
SETTLE_S = 0.5
"""After a measurement, for what is done later than the answer."""

REST = "Ray and Serve, all others"
PARTS = {"ServeReplica:trimtab:Coordinator": "coordinator", "ServeReplica:trimtab:Gateway": "gateway"}
PARTS |= {"ProxyActor": "Serve's proxy", f"ServeReplica:{BASE}": "base model"}
ALL = "all"


@dataclass(frozen=True)
class Cost:
    """Processor time of one measurement, the idle share taken off."""

    round: int
    streams: bool
    num_tokens: int
    elapsed_s: float
    cpu_s: Mapping[str, float]
    """By part of the service."""

    def ms_per_token(self, part: str) -> float:
        """Of one part, or of all."""
        seconds = sum(self.cpu_s.values()) if part == ALL else self.cpu_s.get(part, 0.0)
        return 1e3 * seconds / self.num_tokens


def cpu_seconds() -> Counter[str]:
    """Return the processor time that the parts of the service have used so far."""
    seconds: Counter[str] = Counter()
    for process in descendants():
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue  # it has ended
        part = next((name for beginning, name in PARTS.items() if beginning in title), REST)
        seconds[part] += times.user + times.system
    return seconds


def measure(service: Http, batch: Batch, idle_cores: Mapping[str, float], number: int, *, streams: bool) -> Cost:
    """Run the batch and count."""
    before, start = cpu_seconds(), time.perf_counter()
    outcome = service.run(batch)
    time.sleep(SETTLE_S)
    after, elapsed_s = cpu_seconds(), time.perf_counter() - start
    used = {part: after[part] - before[part] - elapsed_s * idle_cores.get(part, 0.0) for part in after}
    return Cost(number, streams, outcome.num_tokens, outcome.elapsed_s, used)


def run(models: Models, arguments: argparse.Namespace) -> list[Cost]:
    """Start the service, let it idle, and measure both ways in turn."""
    config = service_config(models)
    base = config["applications"][0]
    base |= {"import_path": "bench.paced:base", "args": {**base["args"], "step_ms": arguments.step_ms}}
    # Serve's own processes must find this package.
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    costs = []
    with running_service(models, config) as url:
        ways = [(streams, Http(url, models, streams=streams)) for streams in (False, True)]
        for number in range(arguments.rounds + 1):
            if number == 1:
                say("warmed up; idling")
                before = cpu_seconds()
                time.sleep(IDLE_S)
                idle_cores = {part: (s - before[part]) / IDLE_S for part, s in cpu_seconds().items()}
            for streams, service in ways if number % 2 else reversed(ways):
                seeds = [1000 * number + i for i in range(arguments.streams)]
                max_tokens = arguments.max_tokens if number else WARM_UP_TOKENS
                batch = Batch([PROMPT] * arguments.streams, seeds, max_tokens, 0)
                if number:
                    costs.append(measure(service, batch, idle_cores, number, streams=streams))
                else:
                    service.run(batch)
    return costs


def figures(costs: Sequence[Cost]) -> dict[str, dict[str, float]]:
    """Return medians over the rounds, in milliseconds a token, by part; the difference is taken within a round."""
    whole = sorted((cost for cost in costs if not cost.streams), key=lambda cost: cost.round)
    streamed = sorted((cost for cost in costs if cost.streams), key=lambda cost: cost.round)
    pairs = list(zip(whole, streamed, strict=True))
    parts = [*PARTS.values(), REST, ALL]
    return {
        part: {
            "whole": statistics.median(w.ms_per_token(part) for w, _ in pairs),
            "streamed": statistics.median(s.ms_per_token(part) for _, s in pairs),
            "difference": statistics.median(s.ms_per_token(part) - w.ms_per_token(part) for w, s in pairs),
        }
        for part in parts
    }


def report(machine: Mapping[str, str], by_part: Mapping[str, Mapping[str, float]], step_ms: float) -> str:
    """Return what was measured as Markdown."""
    rows = [[part, *(f"{value:.3f}" for value in figure.values())] for part, figure in by_part.items()]
    header = ["ms of processor time a token", "whole answers", "streamed", "difference"]
    return "\n\n".join(
        [
            "\n".join(f"* {name}: {value}" for name, value in machine.items()),
            f"Steps {step_ms:g} ms apart; medians over the rounds, the idle service's share taken off:",
            markdown(header, rows),
        ]
    )


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="bench.streams", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=positive, default=16, help="requests at once")
    parser.add_argument("--max-tokens", type=positive, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=120.0, help="pause of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and Markdown")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write it down; return what was written as JSON."""
    arguments = parse(command_line)
    # Like Ctrl-C, it lets us end what we started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine = describe(1, "float32")
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        tiny.save(tiny.llama(max_position_embeddings=4096), Path(folder) / "tiny")
        base = make_endless(Path(folder) / "tiny", Path(folder) / "base")
        max_context = len(PROMPT) + arguments.max_tokens
        models = Models(
            base=base, guides={}, dtype="float32", threads=1, max_sequences=arguments.streams, max_context=max_context
        )
        costs = run(models, arguments)
    by_part = figures(costs)
    text = report(machine, by_part, arguments.step_ms)
    print(text)
    result = {
        "machine": machine,
        "options": plain(arguments),
        "ms_per_token": by_part,
        "rounds": [{**vars(cost), "cpu_s": dict(cost.cpu_s)} for cost in costs],
    }
    write("streams", arguments.output, result, text + "\n")
    return result


if __name__ == "__main__":
    main()
