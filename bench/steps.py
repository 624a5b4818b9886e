"""Where the time of a step goes: the real lane over the real exchange, with replicas in processes of their own.

The lane runs in this process, as it does in a coordinator; its parts are timed by wrapping them from outside. Only full
steps of decoding count: every sequence appends one token to every model.

* plan, merge, draw, commit: in the coordinator, one after the other. `text` runs beside the models.
* base, guide: the forward pass in the replica, `guide` that of the slowest one. Base and guides run at the same time,
  on the same cores if there are no others.
* output: hidden states to logits, where guides send these (--rows hidden_states); before merge.
* exchange: from the first step message sent to the last rows landed, less the longest forward pass.
* rest: what is left of the time from one step to the next.
"""

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

import torch

from actors.coordinator.lane import Lane
from actors.coordinator.sequence import LiveSequence, Voice
from actors.coordinator.text import TextWriter
from actors.guidance import Sampling
from actors.guidance.output import OutputFunction
from actors.settings import Limits
from actors.vocabularies import load_tokenizer
from bench.recorder import Breakdown, Recorder, TimedStream, summarise
from bench.replica import RemoteReplica, remote_replica
from bench.table import ABSENT, markdown
from bench.workload import WEIGHT, Batch, Models, Prompts

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
                    breakdown = asyncio.run(_measure(voices, models, batch))
                breakdowns.append(breakdown)
    return breakdowns


async def _measure(
    voices: Sequence[tuple[RemoteReplica, OutputFunction | None]], models: Models, batch: Batch
) -> Breakdown:
    replicas, outputs = zip(*voices, strict=True)
    coordinator, recorder, limits = uuid.uuid4().hex, Recorder(), Limits()
    tokenizer = load_tokenizer(str(models.base)).backend_tokenizer
    streams: list[TimedStream] = []
    sequences: list[LiveSequence] = []
    try:
        prompts: list[list[Sequence[int]]] = []
        for replica in replicas:
            leases = [replica.lease(coordinator, str(i), prompt) for i, prompt in enumerate(batch.prompts)]
            prompts.append([lease.prompt_tokens for lease in leases])
            stream = await TimedStream.connect(
                leases[0].address,
                token=leases[0].token,
                coordinator=coordinator,
                transport=models.transport,
                timeout_s=10.0,
                keepalive_s=30.0,
            )
            stream.recorder = recorder
            streams.append(stream)
        for i, seed in enumerate(batch.seeds):
            sequences.append(
                LiveSequence(
                    key=str(i),
                    voices=[
                        Voice(f"voice {n}", WEIGHT if n else 1.0, stream, list(prompts[n][i]), output=outputs[n])
                        for n, stream in enumerate(streams)
                    ],
                    sampling=Sampling(seed=seed),
                    max_tokens=batch.max_tokens,
                    end_tokens=(),
                    writer=TextWriter(tokenizer, prompts[0][i]),
                )
            )
        with recorder.wrapping():
            async with asyncio.timeout(TIMEOUT_S):
                running = Lane(limits)
                for sequence in sequences:
                    running.add(sequence)
                await asyncio.gather(*map(_read, sequences))
    finally:
        for stream in streams:
            await stream.close()
        for replica in replicas:
            replica.release()
    forwards = [replica.forwards() for replica in replicas]
    return summarise(recorder.steps, forwards, num_sequences=len(batch.prompts))


async def _read(sequence: LiveSequence) -> None:
    while (await sequence.read())["finish_reason"] is None:
        pass


def table(breakdowns: Sequence[Breakdown]) -> str:
    """Return the breakdowns as a table: milliseconds, and megabytes moved."""
    parts = ["step", "plan", "base", "guide", "exchange", "output", "merge", "draw", "commit", "rest", "text"]
    header = ["sequences", "guides", *parts, "outside models", "MB moved"]
    rows = []
    for breakdown in breakdowns:
        figures = asdict(breakdown)
        outside = 1 - max(breakdown.base, breakdown.guide or 0.0) / breakdown.step
        cells = [ABSENT if figures[name] is None else f"{figures[name]:.2f}" for name in parts]
        size = f"{breakdown.bytes_moved / 1e6:.2f}"
        rows.append([str(breakdown.sequences), str(breakdown.guides), *cells, f"{100 * outside:.0f} %", size])
    return markdown(header, rows)
