"""What a common beginning costs: many prompts that share one, beside the same prompts without it.

    python -m bench.prefix

All sequences arrive at once. Prints, for each model, how many tokens went through it, and when the last sequence had
its first token; medians over rounds in which both are measured in turn, each with words of its own.
"""

import argparse
import asyncio
import random
import signal
import statistics
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from actors.coordinator.lane import Lane
from actors.coordinator.sequence import LiveSequence, Voice
from actors.coordinator.text import TextWriter
from actors.guidance import Sampling, drawing
from actors.settings import Limits
from actors.vocabularies import load_tokenizer
from bench.machine import describe
from bench.options import add_models, endless_models, plain, positive
from bench.replica import RemoteReplica, remote_replica
from bench.run import say, write
from bench.table import markdown
from bench.workload import WEIGHT, Models
from cluster.exchange import StepStream


@dataclass(frozen=True)
class Arrival:
    """One round's measurement."""

    first_token_s: Sequence[float]
    """Of each sequence, ascending."""

    num_computed: Sequence[int]
    """Tokens that went through the base, then through each guide, until then and in the decoding beside it."""

    num_needed: int
    """The common beginning once, every suffix, and what was decoded."""


def make_prompts(tokenizer: PreTrainedTokenizerFast, shared: int, suffix: int, number: int) -> list[str]:
    """Return texts of so many tokens each, with exactly the first `shared` tokens in common."""
    words = [text for i in range(tokenizer.vocab_size) if (text := tokenizer.decode([i])).strip().isalpha()]
    words = [word for word in words if word.startswith(" ") and len(tokenizer(word).input_ids) == 1]
    beginning = random.choices(words, k=shared)
    different = random.sample(words, k=number)
    return ["".join([*beginning, first, *random.choices(words, k=suffix - 1)]) for first in different]


async def arrive(replicas: Sequence[RemoteReplica], models: Models, prompts: Sequence[str]) -> Arrival:
    """Let all prompts come at once, and wait until each has its first token."""
    coordinator, tokenizer = uuid.uuid4().hex, load_tokenizer(str(models.base)).backend_tokenizer
    streams: list[StepStream] = []
    before = [replica.counters().num_computed_tokens for replica in replicas]
    sequences: list[LiveSequence] = []
    try:
        tokens: list[list[Sequence[int]]] = []
        for replica in replicas:
            leases = [replica.lease(coordinator, str(i), prompt) for i, prompt in enumerate(prompts)]
            tokens.append([lease.prompt_tokens for lease in leases])
            streams.append(
                await StepStream.connect(
                    leases[0].address, token=leases[0].token, coordinator=coordinator, timeout_s=10.0, keepalive_s=30.0
                )
            )
        for i in range(len(prompts)):
            voices = [
                Voice(f"voice {n}", WEIGHT if n else 1.0, stream, list(tokens[n][i]))
                for n, stream in enumerate(streams)
            ]
            writer = TextWriter(tokenizer, tokens[0][i])
            sequences.append(
                LiveSequence(
                    key=str(i), voices=voices, sampling=Sampling(seed=i), max_tokens=1, end_tokens=(), writer=writer
                )
            )
        lane, start = Lane(Limits()), time.perf_counter()
        for sequence in sequences:
            lane.add(sequence)
        first_token_s = await asyncio.gather(*(_first_token(sequence, start) for sequence in sequences))
    finally:
        for stream in streams:
            await stream.close()
        for replica in replicas:
            replica.release()
    computed = [replica.counters().num_computed_tokens - num for replica, num in zip(replicas, before, strict=True)]
    return Arrival(sorted(first_token_s), computed, _num_different(tokens[0]))


async def _first_token(sequence: LiveSequence, start: float) -> float:
    while (await sequence.read())["finish_reason"] is None:
        pass
    return time.perf_counter() - start


def _num_different(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of all prompts, those of equal beginnings once."""
    beginnings = {tuple(prompt[:stop]) for prompt in prompts for stop in range(1, len(prompt) + 1)}
    return len(beginnings)


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="bench.prefix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=positive, default=64)
    parser.add_argument("--shared", type=positive, default=500, help="tokens that all prompts begin with")
    parser.add_argument("--suffix", type=positive, default=32, help="tokens of each prompt's own")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--guides", type=int, default=1, help="number of guides")
    add_models(parser)
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write it down; return what was written as JSON."""
    arguments = parse(command_line)
    # Like Ctrl-C, it lets us end what we started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)
    drawing.warm_up()
    number, longest = arguments.sequences, arguments.shared + arguments.suffix
    with endless_models(arguments, num_guides=arguments.guides, max_sequences=number, max_tokens=longest) as (
        models,
        _,
    ):
        tokenizer = load_tokenizer(str(models.base))
        kinds = {"shared": arguments.shared, "alone": 0}
        found: dict[str, list[Arrival]] = {kind: [] for kind in kinds}
        with ExitStack() as stack:
            paths = (models.base, *models.guides.values())
            replicas = [stack.enter_context(remote_replica(path, models)) for path in paths]
            for turn in range(arguments.rounds):
                for kind, shared in kinds.items():
                    prompts = make_prompts(tokenizer, shared, arguments.suffix, number)
                    found[kind].append(asyncio.run(arrive(replicas, models, prompts)))
                say(f"round {turn + 1} of {arguments.rounds}")
    last = {kind: statistics.median(round.first_token_s[-1] for round in rounds) for kind, rounds in found.items()}
    ratio = statistics.median(
        one.first_token_s[-1] / other.first_token_s[-1]
        for one, other in zip(found["shared"], found["alone"], strict=True)
    )
    rows = [
        [kind, f"{found[kind][-1].num_needed}", ", ".join(map(str, found[kind][-1].num_computed)), f"{last[kind]:.2f}"]
        for kind in kinds
    ]
    text = markdown(["prompts", "different tokens", "computed by each model", "last first token, s"], rows)
    text += f"\nThe last sequence's first token: {ratio:.2f} times that of the suffixes alone.\n"
    print(text)
    result = {
        "machine": describe(arguments.threads, arguments.dtype),
        "options": plain(arguments),
        "rounds": {kind: [asdict(round) for round in rounds] for kind, rounds in found.items()},
        "ratio": ratio,
    }
    write("prefix", arguments.output, result, text)
    return result


if __name__ == "__main__":
    main()
