"""The values that the two ends of a stream pass to their users, and their way into and out of step.proto's messages.

What arrives from the other end is checked here: a message that cannot be meant raises `Malformed`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import DecodeError
from torch import Tensor

from cluster.exchange import step_pb2

VERSION = 2
METHOD = "Steps"
SERVICE = "trimtab.exchange.StepExchange"

NO_SLOT = -1
PART_BYTES = 2**19


class Malformed(Exception):
    """A message of the other end breaks the protocol; its stream cannot go on."""


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of a step."""

    sequence: str
    """Key of the sequence, unique within its stream; at most once in a step."""
    length: int
    """Tokens of the sequence that are kept before the new ones are appended; 0 opens it or starts it afresh."""
    tokens: Sequence[int]
    """Token ids to append, at least one: a prompt chunk, one token, a window."""
    rows: Sequence[int] = ()
    """Indices into `tokens` at which a row is wanted."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a coordinator asks of a replica at once."""

    work: tuple[Work, ...]
    room: Tensor | None = field(default=None, compare=False, repr=False)
    """On the replica's side, the shared memory [R, W] from which the rows will be read: a handler may write them there
    and return it, or any tensor of its own, which is then copied."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A sequence that could not take its part of a step."""

    sequence: str
    kind: str
    """Name of the error's class."""
    message: str


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a handler answers to a step."""

    tensor: Tensor
    """[R, W] in the server's dtype: in the order of `Step.work`, then of `Work.rows`, without the failed sequences."""
    failures: Sequence[Failure] = ()


class StepHandler(Protocol):
    """What a replica does with the steps that it is sent."""

    async def step(self, coordinator: str, step: Step) -> StepRows:
        """Do a step. Called in the order of a stream's steps, for many steps and streams at once; cancelled when the
        stream breaks. The tensor is not to be written to afterwards. What it raises fails the step, not the stream.
        """
        ...

    def leave(self, coordinator: str, sequence: str) -> None:
        """Free what is held for a sequence that has ended, known or not. It may have a step under way."""
        ...

    async def detach(self, coordinator: str) -> None:
        """Free all that is held for a coordinator: its stream has ended. Called once per stream."""
        ...


def num_rows(work: Iterable[Work], failures: Iterable[Failure] = ()) -> int:
    """Rows that a step yields when these of its sequences failed."""
    failed = {failure.sequence for failure in failures}
    return sum(len(item.rows) for item in work if item.sequence not in failed)


def check_work(work: Iterable[Work]) -> None:
    """Raise ValueError for work that no replica could do, saying what is wrong with it."""
    seen: set[str] = set()
    for item in work:
        if item.sequence in seen:
            raise ValueError(f"sequence {item.sequence!r} occurs more than once in a step")
        seen.add(item.sequence)
        if not item.tokens:
            raise ValueError(f"sequence {item.sequence!r} has no tokens")
        if item.rows and not 0 <= min(item.rows) <= max(item.rows) < len(item.tokens):
            raise ValueError(
                f"sequence {item.sequence!r} wants rows {list(item.rows)} of {len(item.tokens)} tokens; "
                f"they must be between 0 and {len(item.tokens) - 1}"
            )


def encode_step(step_id: int, slot: int, step: Step) -> bytes:
    """A Request with a Step.

    Raises ValueError: the work cannot be done, or a number does not fit its field.
    """
    check_work(step.work)
    message = step_pb2.Step(
        id=step_id,
        slot=slot,
        work=[
            step_pb2.Work(sequence=item.sequence, length=item.length, tokens=item.tokens, rows=item.rows)
            for item in step.work
        ],
    )
    return step_pb2.Request(step=message).SerializeToString()


def encode_leave(sequence: str) -> bytes:
    """A Request with a Leave."""
    return step_pb2.Request(leave=step_pb2.Leave(sequence=sequence)).SerializeToString()


def decode_step(message: step_pb2.Step) -> Step:
    """The step in a message.

    Raises Malformed: its work cannot be done.
    """
    work = tuple(Work(item.sequence, item.length, tuple(item.tokens), tuple(item.rows)) for item in message.work)
    try:
        check_work(work)
    except ValueError as error:
        raise Malformed(f"step {message.id}: {error}") from error
    return Step(work)


def decode_request(data: bytes) -> step_pb2.Request:
    """Raises Malformed."""
    try:
        request = step_pb2.Request.FromString(data)
    except DecodeError as error:
        raise Malformed(f"not a Request: {error}") from error
    if request.WhichOneof("body") is None:
        raise Malformed("a Request without a body")
    return request


def decode_reply(data: bytes) -> step_pb2.Reply:
    """Raises Malformed."""
    try:
        reply = step_pb2.Reply.FromString(data)
    except DecodeError as error:
        raise Malformed(f"not a Reply: {error}") from error
    if reply.WhichOneof("body") is None:
        raise Malformed("a Reply without a body")
    return reply


def encode_reply(reply: step_pb2.Reply) -> bytes:
    """A Reply as bytes."""
    return reply.SerializeToString()


def encode_rows(reply: step_pb2.Reply, rows: memoryview) -> Iterator[bytes]:
    """A Reply with a Result that brings `rows`: its last message, after as many Parts as it takes.

    Parts keep the memory that a message passes through small enough to be used again for the next one: fresh pages
    would cost more time than all copies together. Other results may go between them.
    """
    result = reply.result
    while len(rows) > PART_BYTES:
        part = step_pb2.Reply(part=step_pb2.Part(id=result.id))
        yield _with_rows(part, step_pb2.Reply.PART_FIELD_NUMBER, step_pb2.Part.ROWS_FIELD_NUMBER, rows[:PART_BYTES])
        rows = rows[PART_BYTES:]
    yield _with_rows(reply, step_pb2.Reply.RESULT_FIELD_NUMBER, step_pb2.Result.ROWS_FIELD_NUMBER, rows)


def _with_rows(reply: step_pb2.Reply, body: int, field: int, rows: memoryview) -> bytes:
    """A Reply as bytes, with `rows` as a field of its body.

    Put into the message they would be copied three times on their way out. So they are put behind it in protobuf's
    encoding: a message that is continued is merged with what came before
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
    """
    start = _field_start(field, len(rows))
    return b"".join((reply.SerializeToString(), _field_start(body, len(start) + len(rows)), start, rows))


def _field_start(number: int, num_bytes: int) -> bytes:
    """What precedes the bytes of a length-delimited field: its tag and its length, as varints."""
    start = bytearray()
    for value in (number << 3 | 2, num_bytes):
        while value > 0x7F:
            start.append(value & 0x7F | 0x80)
            value >>= 7
        start.append(value)
    return bytes(start)


def encode_failures(failures: Iterable[Failure]) -> list[step_pb2.Failure]:
    """Failures as messages."""
    return [step_pb2.Failure(sequence=item.sequence, kind=item.kind, message=item.message) for item in failures]


def decode_failures(result: step_pb2.Result) -> tuple[Failure, ...]:
    """The failures in a Result."""
    return tuple(Failure(item.sequence, item.kind, item.message) for item in result.failures)
