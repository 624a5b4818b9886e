"""Which sequences run in the next step, with how many tokens each. Decides only; sends nothing."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from actors.coordinator.sequence import LiveSequence, Replica, Voice
from cluster.exchange import Work


@dataclass(frozen=True, slots=True)
class Chunk:
    """One voice's part in a step."""

    sequence: LiveSequence
    voice: Voice
    num_tokens: int
    completes: bool
    """Whether the replica then holds every token, so that its row is wanted."""

    def work(self) -> Work:
        """The step message's item for it."""
        start = self.voice.num_sent
        return Work(
            sequence=self.sequence.key,
            length=start,
            tokens=self.voice.tokens[start : start + self.num_tokens],
            rows=(self.num_tokens - 1,) if self.completes else (),
        )


def plan_step(sequences: Iterable[LiveSequence], max_prompt_tokens: int) -> dict[Replica, list[Chunk]]:
    """Return what each replica is to do next.

    Every voice that only lacks the last drawn token runs. Prompts share `max_prompt_tokens` per replica, first come
    first served, so that a long one holds up its neighbours by no more than that.
    """
    chunks: defaultdict[Replica, list[Chunk]] = defaultdict(list)
    room: defaultdict[Replica, int] = defaultdict(lambda: max_prompt_tokens)
    for sequence in sequences:
        for voice in sequence.voices:
            if not sequence.is_live or voice.in_flight or voice.num_pending == 0:
                continue
            num_tokens = voice.num_pending
            if num_tokens > 1:
                num_tokens = min(num_tokens, room[voice.replica])
                room[voice.replica] -= num_tokens
            if num_tokens > 0:
                chunks[voice.replica].append(
                    Chunk(sequence, voice, num_tokens, completes=num_tokens == voice.num_pending)
                )
    return dict(chunks)
