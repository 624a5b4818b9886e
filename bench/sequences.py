"""Live sequences over replicas in other processes, as a coordinator has them."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from actors.coordinator.sequence import LiveSequence, Seat, Voice
from actors.coordinator.text import TextWriter
from actors.guidance import Sampling
from actors.guidance.lm_head import OutputFunction
from actors.vocabularies import load_tokenizer
from bench.replica import RemoteReplica
from bench.workload import WEIGHT, Batch, Models
from cluster.exchange import StepStream


@asynccontextmanager
async def live_sequences(
    replicas: Sequence[RemoteReplica],
    outputs: Sequence[OutputFunction | None],
    models: Models,
    batch: Batch,
    connect: Callable[..., Awaitable[StepStream]] = StepStream.connect,
) -> AsyncIterator[list[LiveSequence]]:
    """Lease room for a batch on the base's replica and the guides', and free it when the context ends.

    Args:
        replicas: the base's first.
        outputs: each replica's output function, none where rows are logits.
        models: how they are served.
        batch: what is to be written.
        connect: opens a stream to a replica.
    """
    coordinator = uuid.uuid4().hex
    tokenizer = load_tokenizer(str(models.base)).backend_tokenizer
    streams: list[StepStream] = []
    try:
        prompts: list[list[Sequence[int]]] = []
        for replica in replicas:
            leases = [replica.lease(coordinator, str(i), prompt) for i, prompt in enumerate(batch.prompts)]
            prompts.append([lease.prompt_tokens for lease in leases])
            connecting = connect(
                leases[0].address,
                token=leases[0].token,
                coordinator=coordinator,
                transport=models.transport,
                timeout_s=10.0,
                keepalive_s=30.0,
            )
            streams.append(await connecting)
        yield [
            LiveSequence(
                voices=[
                    Voice(f"voice {n}", WEIGHT if n else 1.0, Seat(stream, str(i), outputs[n]), list(prompts[n][i]))
                    for n, stream in enumerate(streams)
                ],
                sampling=Sampling(seed=seed),
                max_tokens=batch.max_tokens,
                end_tokens=(),
                writer=TextWriter(tokenizer, prompts[0][i]),
            )
            for i, seed in enumerate(batch.seeds)
        ]
    finally:
        for stream in streams:
            await stream.close()
        for replica in replicas:
            replica.release()


async def read_all(sequence: LiveSequence) -> None:
    """Read an answer to its end."""
    while (await sequence.read())["finish_reason"] is None:
        pass
