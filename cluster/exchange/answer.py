"""What becomes of a step at the coordinator: it is outstanding, then it is rows."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

from torch import Tensor

from cluster.errors import EngineError
from cluster.exchange import step_pb2
from cluster.exchange.messages import NO_SLOT, Failure, Malformed, Step, Work, decode_failures, num_rows
from cluster.exchange.rows import IncomingRows, RowFormat
from cluster.exchange.segment import Slots


class Rows:
    """What a step brought back. A context manager: leaving it gives the slot back."""

    def __init__(
        self, tensor: Tensor, work: Sequence[Work], failures: tuple[Failure, ...], give_back: Callable[[], None] | None
    ) -> None:
        self.tensor = tensor
        """[R, W], in the order of the step's work, then of `Work.rows`, without the failed sequences. In a slot it is
        the shared memory itself: it may be changed in place, and is not to be touched after `release`."""
        self.failures = failures
        self._work = work
        self._give_back = give_back

    def spans(self) -> dict[str, slice]:
        """Where in `tensor` each sequence's rows are; a failed sequence has no entry."""
        failed = {failure.sequence for failure in self.failures}
        spans, start = {}, 0
        for item in self._work:
            if item.sequence not in failed:
                spans[item.sequence] = slice(start, start + len(item.rows))
                start += len(item.rows)
        return spans

    def release(self) -> None:
        """Give the slot back; doing so again is no error. Rows that are never released keep their slot."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Outstanding:
    """A step that waits for its result. Its answer is done early when nobody waits for it any more."""

    def __init__(
        self,
        step: Step,
        slot: int,
        row_format: RowFormat,
        slots: Slots | None,
        give_back: Callable[[int], None],
    ) -> None:
        self.slot = slot
        self.answer: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self._step = step
        self._row_format = row_format
        self._slots = slots
        self._give_back = give_back
        self._incoming: IncomingRows | None = None

    def add(self, piece: bytes) -> None:
        """Take a piece of the rows.

        Raises Malformed: there are more of them than were asked for.
        """
        if self.answer.done():
            return
        if self._incoming is None:
            self._incoming = IncomingRows(self._row_format, num_rows(self._step.work))
        try:
            self._incoming.add(piece)
        except ValueError as error:
            raise Malformed(str(error)) from error

    def finish(self, result: step_pb2.Result) -> bool:
        """Take the result; returns whether the slot now belongs to the answer's rows, which give it back.

        Raises Malformed: it does not answer this step.
        """
        if self.answer.done():
            return False
        if result.error:
            self.answer.set_exception(EngineError(f"the replica could not do the step: {result.error}"))
            return False
        failures, work = decode_failures(result), self._step.work
        if result.num_rows != num_rows(work, failures):
            raise Malformed(f"{result.num_rows} rows for step {result.id}, which wants {num_rows(work, failures)}")
        if result.in_slot:
            tensor, give_back = self._in_slot(result), partial(self._give_back, self.slot)
        else:
            tensor, give_back = self._inline(result), None
        self.answer.set_result(Rows(tensor, work, failures, give_back))
        return result.in_slot

    def _in_slot(self, result: step_pb2.Result) -> Tensor:
        if self._slots is None or self.slot == NO_SLOT or result.num_rows == 0:
            raise Malformed(f"rows of step {result.id} in a slot that it does not have")
        return self._slots.rows(self.slot, result.num_rows)

    def _inline(self, result: step_pb2.Result) -> Tensor:
        incoming = self._incoming or IncomingRows(self._row_format, result.num_rows)
        try:
            incoming.add(result.rows)
            return incoming.finish(result.num_rows)
        except ValueError as error:
            raise Malformed(f"step {result.id}: {error}") from error
