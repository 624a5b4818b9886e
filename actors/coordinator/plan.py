"""Which sequences run in the next step, in which messages. Decides only; sends nothing."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from actors.coordinator.sequence import LiveSequence, Replica, Seat, Voice
from cluster.exchange import Work


@dataclass(frozen=True, slots=True)
class Part:
    """One voice's part in a step."""

    sequence: LiveSequence
    voice: Voice
    seat: Seat
    """The voice's, when the step was planned."""

    num_rows: int = 1
    """Rows that come back: those after the last tokens."""

    @property
    def is_current(self) -> bool:
        """Whether the answer still concerns the voice: it has not moved meanwhile."""
        return self.voice.seat is self.seat

    def work(self) -> Work:
        """The step message's item for it: all tokens that its replica lacks, and the row after the last of them, or
        those after the last ones.
        """
        tokens = self.voice.tokens[self.voice.num_sent :]
        rows = tuple(range(len(tokens) - self.num_rows, len(tokens)))
        return Work(self.seat.key, self.voice.num_sent, tokens, rows)


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent to a replica at once, and answered at once."""

    replica: Replica
    parts: list[Part]
    is_prompt: bool
    """Whether it may take the replica several passes, for which nobody else waits."""


def plan_step(sequences: Iterable[LiveSequence]) -> list[Message]:
    """Return what is to be sent.

    Voices that only lack the last drawn token share a message to their replica. Those that lack more, at the beginning,
    on another replica, or after the replica gave their tokens up, have one each: their replica takes them in chunks
    beside the others. A voice without a seat waits.
    """
    prompts: list[Message] = []
    decoding: defaultdict[Replica, list[Part]] = defaultdict(list)
    for sequence in sequences:
        for voice in sequence.voices:
            seat = voice.seat
            if not sequence.is_live or seat is None or voice.in_flight or voice.num_pending == 0:
                continue
            part = Part(sequence, voice, seat, sequence.num_rows)
            if voice.num_pending > 1:
                prompts.append(Message(seat.replica, [part], is_prompt=True))
            else:
                decoding[seat.replica].append(part)
    return [*(Message(replica, parts, is_prompt=False) for replica, parts in decoding.items()), *prompts]
