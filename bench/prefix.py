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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from actors.coordinator.lane import Lane
from actors.coordinator.sequence import LiveSequence
from actors.guidance import drawing
from actors.settings import Limits
from actors.vocabularies import load_tokenizer
from bench.machine import describe
from bench.options import add_models, endless_models, plain, positive
from bench.replica import RemoteReplica, remote_replica
from bench.run import say, write
from bench.sequences import live_sequences, read_all
from bench.table import markdown
from bench.workload import Batch, Models

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Arrival:
    """One round's measurement."""

    first_token_s: Sequence[float]
    """Of each sequence, ascending."""

    num_computed: Sequence[int]
    """Tokens that went through the base, then through each guide."""

    num_needed: int
    """The common beginning once, and every suffix."""


def make_prompts(tokenizer: PreTrainedTokenizerFast, shared: int, suffix: int, number: int) -> list[str]:
    """Return texts of so many tokens each, with exactly the first `shared` tokens in common."""
    words = [text for i in range(tokenizer.vocab_size) if (text := tokenizer.decode([i])).strip().isalpha()]
    words = [word for word in words if word.startswith(" ") and len(tokenizer(word).input_ids) == 1]
    beginning = random.choices(words, k=shared)
    different = random.sample(words, k=number)
    return ["".join([*beginning, first, *random.choices(words, k=suffix - 1)]) for first in different]


async def arrive(replicas: Sequence[RemoteReplica], models: Models, prompts: Sequence[str]) -> Arrival:
    """Let all prompts come at once, and wait until each has its first token."""
    before = [replica.counters().num_computed_tokens for replica in replicas]
    batch = Batch(prompts, list(range(len(prompts))), max_tokens=1, num_guides=len(replicas) - 1)
    async with live_sequences(replicas, [None] * len(replicas), models, batch) as sequences:
        read = [list(sequence.voices[0].tokens) for sequence in sequences]
        async with asyncio.timeout(TIMEOUT_S):
            lane, start = Lane(Limits()), time.perf_counter()
            for sequence in sequences:
                lane.add(sequence)
            first_token_s = await asyncio.gather(*(_first_token(sequence, start) for sequence in sequences))
    computed = [replica.counters().num_computed_tokens - num for replica, num in zip(replicas, before, strict=True)]
    return Arrival(sorted(first_token_s), computed, _num_different(read))


async def _first_token(sequence: LiveSequence, start: float) -> float:
    await read_all(sequence)
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
