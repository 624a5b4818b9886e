"""Where the time of a step goes: the real lane over the real exchange, with replicas in processes of their own.

The lane runs in this process, as it does in a coordinator; its parts are timed by wrapping them from outside. Only full
steps of decoding count: every sequence appends one token to every model.

* plan, merge, draw, commit: in the coordinator, one after the other. `text` runs beside the models.
* base, guide: the forward pass in the replica, `guide` that of the slowest one. Models that share all cores take turns;
  with --threads below their number they compute at the same time.
* output: hidden states to logits, where guides send these (--rows hidden_states); before merge.
* exchange: from the first step message sent to the last rows landed, less the time in which models compute: the sum of
  their forward passes if they take turns, else the longest.
* rest: what is left of the time from one step to the next.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from actors.coordinator.lane import Lane
from actors.guidance.lm_head import OutputFunction
from actors.settings import Limits
from bench.recorder import Breakdown, Recorder, StepRecord, TimedStream, summarise
from bench.replica import Forward, RemoteReplica, remote_replica
from bench.sequences import live_sequences, read_all
from bench.table import ABSENT, markdown
from bench.workload import Batch, Models, Prompts

TIMEOUT_S = 600.0


def measure_steps(
    models: Models, prompts: Prompts, concurrency: Sequence[int], num_guides: Sequence[int], max_tokens: int
) -> list[Breakdown]:
    """Break down a step at each concurrency with each number of guides."""
    # As in a coordinator's actor.
    torch.set_num_threads(1)
    used = list(models.guides.values())[: max(num_guides)]
    breakdowns = []
    with ExitStack() as stack:
        replicas = [stack.enter_context(remote_replica(models.base, models))]
        replicas += [stack.enter_context(remote_replica(path, models, models.rows)) for path in used]
        outputs = [replica.output() for replica in replicas]
        for guides in num_guides:
            for sequences in concurrency:
                # The first is the warm-up.
                for num_tokens in (min(4, max_tokens), max_tokens):
                    batch = prompts.batch(sequences, max_tokens=num_tokens, num_guides=guides)
                    voices = list(zip(replicas[: guides + 1], outputs, strict=False))
                    recorded = asyncio.run(_record(voices, models, batch))
                breakdowns.append(summarise(*recorded, num_sequences=sequences, takes_turns=models.takes_turns))
    return breakdowns


async def _record(
    voices: Sequence[tuple[RemoteReplica, OutputFunction | None]], models: Models, batch: Batch
) -> tuple[list[StepRecord], list[Sequence[Forward]]]:
    """Return the steps in which a batch was written, and each model's forward passes."""
    replicas, outputs = zip(*voices, strict=True)
    recorder = Recorder()

    async def connect(address: str, **options: Any) -> TimedStream:
        stream = await TimedStream.connect(address, **options)
        stream.recorder = recorder
        return stream

    async with live_sequences(replicas, outputs, models, batch, connect) as sequences:
        with recorder.wrapping():
            async with asyncio.timeout(TIMEOUT_S):
                lane = Lane(Limits())
                for sequence in sequences:
                    lane.add(sequence)
                await asyncio.gather(*map(read_all, sequences))
    return recorder.steps, [replica.forwards() for replica in replicas]


def table(breakdowns: Sequence[Breakdown]) -> str:
    """Return the breakdowns as a table: milliseconds, and megabytes moved."""
    parts = ["step", "plan", "base", "guide", "exchange", "output", "merge", "draw", "commit", "rest", "text"]
    header = ["sequences", "guides", *parts, "outside models", "MB moved"]
    rows = []
    for breakdown in breakdowns:
        figures = asdict(breakdown)
        outside = 1 - breakdown.models / breakdown.step
        cells = [ABSENT if figures[name] is None else f"{figures[name]:.2f}" for name in parts]
        size = f"{breakdown.bytes_moved / 1e6:.2f}"
        rows.append([str(breakdown.sequences), str(breakdown.guides), *cells, f"{100 * outside:.0f} %", size])
    return markdown(header, rows)
