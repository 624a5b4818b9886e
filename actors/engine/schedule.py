"""Which sequences take part in a forward pass, with how many tokens each, when all of them have more to do than fits.

Sits between callers, who want tokens appended and rows back, and the engine. A pass takes every sequence that lacks one
token, and of the longer tasks (prompts) no more than a number of tokens together, the oldest sequence first. Where the
cache has no room for a sequence, others are preempted, the youngest first: rolled back to nothing, to be sent again
from their first token. Tasks that begin there simply wait for room, so nothing fails for lack of it. Called from one
thread, like the engine.

Shapes: R rows of a pass, W their width: the vocabulary's, or that of hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from actors.engine.engine import Engine
from actors.engine.work import Work
from cluster.errors import EngineError, Preempted

MIN_SHARED = 16
"""Tokens that two prompts must have in common for one to wait until the other has computed them."""


class PassRow(NamedTuple):
    """One of the rows that a pass computed."""

    rows_RW: Tensor
    row: int


@dataclass(slots=True, eq=False)
class Task:
    """Tokens that a caller wants appended to a sequence, and the rows that it wants back."""

    sequence: str
    length: int
    """Tokens of the sequence that are kept before the new ones."""

    tokens: Sequence[int]
    rows: Sequence[int]
    """Indices into `tokens` whose next-token rows are wanted."""

    found: dict[int, PassRow] = field(default_factory=dict)
    """Rows that were computed, by their index."""

    is_preempted: bool = False
    """Whether it was given up, because the tokens before its own are no longer held."""

    @property
    def missing(self) -> list[int]:
        """Indices of rows that were not computed yet, ascending."""
        return sorted(set(self.rows) - self.found.keys())


class Schedule:
    """Runs tasks on an engine, pass by pass."""

    def __init__(self, engine: Engine, *, max_prompt_tokens: int) -> None:
        """Take an engine over.

        Args:
            engine: opened, stepped and closed by nobody else from now on.
            max_prompt_tokens: of all prompts together in one pass.
        """
        self.num_preemptions = 0
        """How often a sequence was rolled back because another needed its room."""
        self._engine = engine
        self._max_prompt_tokens = max_prompt_tokens
        # Of all sequences, the oldest first; those that are not open any more leave it.
        self._order: dict[str, None] = {}
        # By sequence, in the order in which they came.
        self._tasks: dict[str, Task] = {}
        self._preempted: list[Task] = []

    @property
    def has_tasks(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._tasks)

    def open(self, sequence: str) -> None:
        """Open an empty sequence.

        Raises:
            EngineError: it is open already, or too many are.
        """
        self._engine.open(sequence)
        self._order[sequence] = None

    def close(self, sequence: str) -> None:
        """Close a sequence, whatever it is doing.

        Raises:
            EngineError: it is not open.
        """
        self._engine.close(sequence)
        del self._order[sequence]
        self._tasks.pop(sequence, None)

    def is_open(self, sequence: str) -> bool:
        """Whether a sequence is open."""
        return sequence in self._order

    def add(self, task: Task) -> None:
        """Take a task, to be done in the passes to come.

        Raises:
            EngineError: it cannot be done; nothing has changed.
            Preempted: the tokens before its own were given up; send it with all tokens.
        """
        if task.sequence in self._tasks:
            raise EngineError(f"sequence {task.sequence!r} has a step under way; wait for its rows first")
        self._engine.check(Work(task.sequence, task.tokens, task.rows), task.length)
        length = self._engine.length(task.sequence)
        if task.length > length:
            raise Preempted(
                f"sequence {task.sequence!r} holds {length} tokens, not {task.length}: its room was needed; "
                "send all its tokens again"
            )
        self._engine.truncate(task.sequence, task.length)
        self._tasks[task.sequence] = task

    def run(self, room: Tensor | None = None) -> list[Task]:
        """Run one forward pass.

        Args:
            room: memory for the rows, if all tasks together want as many as fit there exactly.

        Returns:
            The tasks that are done now, and those that were preempted.
        """
        work = self._plan()
        starts = [self._engine.length(item.sequence) for item in work]
        rows_RW = self._engine.step(work, room)
        done, self._preempted = self._preempted, []
        index = 0
        for item, start in zip(work, starts, strict=True):
            task = self._tasks[item.sequence]
            for row in item.rows:
                task.found[start + row - task.length] = PassRow(rows_RW, index)
                index += 1
            if not self._pending(item.sequence):
                done.append(self._tasks.pop(item.sequence))
        return done

    def drop_tasks(self) -> None:
        """Give all tasks up, as after a pass that failed."""
        self._tasks.clear()
        self._preempted.clear()

    def _plan(self) -> list[Work]:
        """Choose what the next pass does, and reserve room for it."""
        chosen: dict[str, Work] = {}
        num_left = self._max_prompt_tokens
        busy = [sequence for sequence in self._order if sequence in self._tasks]
        # Those that lack one token first, so that no prompt is in their way.
        for sequence in sorted(busy, key=lambda sequence: len(self._pending(sequence)) > 1):
            if sequence not in self._tasks:
                continue  # preempted meanwhile
            is_prompt = len(self._pending(sequence)) > 1
            if is_prompt:
                if num_left == 0:
                    break
                self._reuse(sequence)
                if self._is_being_computed(sequence, chosen):
                    continue
            num_tokens = min(len(self._pending(sequence)), num_left if is_prompt else 1)
            if self._make_room(sequence, num_tokens, chosen):
                chosen[sequence] = self._work(sequence, num_tokens)
                num_left -= num_tokens if is_prompt else 0
            elif self._tasks[sequence].length > 0:
                # Others that were asked for together with it do not wait for room.
                self._preempt(sequence)
        # In the order of the tasks, so that rows which are wanted together lie together.
        return [chosen[sequence] for sequence in self._tasks if sequence in chosen]

    def _pending(self, sequence: str) -> Sequence[int]:
        """The tokens of a sequence's task that the engine does not hold yet."""
        task = self._tasks[sequence]
        return task.tokens[self._engine.length(sequence) - task.length :]

    def _reuse(self, sequence: str) -> None:
        """Take over what the cache holds of the tokens before the next row, which must be computed itself."""
        task = self._tasks[sequence]
        start, stop = self._engine.length(sequence) - task.length, len(task.tokens) - 1
        if missing := task.missing:
            stop = min(stop, missing[0])
        if stop > start:
            self._engine.reuse(sequence, task.tokens[start:stop])

    def _is_being_computed(self, sequence: str, chosen: dict[str, Work]) -> bool:
        """Whether another sequence computes in this pass what this one needs next."""
        task, length = self._tasks[sequence], self._engine.length(sequence)
        if task.length > 0:
            return False
        stop = length + MIN_SHARED
        for other, work in chosen.items():
            first = self._engine.length(other)
            is_there = self._tasks[other].length == 0 and first <= length < first + len(work.tokens)
            if is_there and self._tasks[other].tokens[:stop] == task.tokens[:stop]:
                return True
        return False

    def _make_room(self, sequence: str, num_tokens: int, chosen: dict[str, Work]) -> bool:
        """Reserve room for a sequence, if need be that of others."""
        if self._engine.reserve(sequence, num_tokens):
            return True
        for other in self._dispensable(sequence, chosen):
            self._preempt(other)
            if self._engine.reserve(sequence, num_tokens):
                return True
        return False

    def _preempt(self, sequence: str) -> None:
        """Roll a sequence back to nothing; a task that begins there waits, another one is given up."""
        self._engine.truncate(sequence, 0)
        self.num_preemptions += 1
        task = self._tasks.get(sequence)
        if task is not None and task.length > 0:
            task.is_preempted = True
            self._preempted.append(self._tasks.pop(sequence))

    def _dispensable(self, sequence: str, chosen: dict[str, Work]) -> list[str]:
        """The sequences that must give room: the youngest first, older ones only if they have nothing to do now."""
        order = list(self._order)
        age = order.index(sequence)
        younger, older = order[:age:-1], order[:age][::-1]
        candidates = [*younger, *(other for other in older if other not in self._tasks)]
        return [other for other in candidates if other not in chosen and self._engine.length(other) > 0]

    def _work(self, sequence: str, num_tokens: int) -> Work:
        task = self._tasks[sequence]
        start = self._engine.length(sequence) - task.length
        rows = [row - start for row in task.missing if row < start + num_tokens]
        return Work(sequence, task.tokens[start : start + num_tokens], rows)


def gather_rows(tasks: Sequence[Task], engine: Engine) -> Tensor:
    """Return the rows [R, W] of tasks that are done, in their order; without a copy where they lie so already."""
    found = [task.found[row] for task in tasks for row in task.rows]
    if not found:
        return torch.empty(0, engine.row_width, dtype=engine.dtype)
    rows_RW, first = found[0]
    if all(row.rows_RW is rows_RW and row.row == first + i for i, row in enumerate(found)):
        return rows_RW[first : first + len(found)]
    return torch.stack([row.rows_RW[row.row] for row in found])
