"""The hot loop: all sequences of one base replica, step by step."""

import asyncio
import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from actors.coordinator.figures import Figures
from actors.coordinator.outputs import logits_by_voice, logits_of
from actors.coordinator.plan import Message, Part, plan_step
from actors.coordinator.sequence import LiveSequence
from actors.guidance import Guidance, drawing
from actors.guidance.scoring import RowScores, score
from actors.settings import Limits
from cluster.errors import DeadlineExceeded, EngineError, InvalidRequest, Preempted, ReplicaLost, TrimtabError
from cluster.exchange import Failure, Rows

PATIENCE_S = 0.25
"""How much longer than twice the step's first answer a replica may take before its sequences are left behind."""

PARTS = ("plan", "models", "merge_and_draw", "commit")
"""Of a step, in their order, as figures name them; text is made while the models compute."""

logger = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """What a step yields for one sequence."""

    token: int | None
    """None where the merged logits hold a NaN, or no finite best."""

    scores: RowScores | None = None


class Lane:
    """Steps its sequences together: one that arrives joins at the next step, one that ends leaves at once.

    A sequence whose rows are late is left out of a step and joins a later one, so that a replica that hangs holds up
    only the sequences that use it. Prompts fly apart from the steps: a sequence joins when all its voices have read it.
    A sequence that a replica has lost hears of it (`LiveSequence.lose`), and is left out until its voice has another.
    """

    def __init__(self, limits: Limits, figures: Figures | None = None) -> None:
        self._limits = limits
        self._figures = Figures() if figures is None else figures
        self._sequences: list[LiveSequence] = []
        self._unwritten: list[LiveSequence] = []
        self._flights: set[asyncio.Task[None]] = set()
        self._landed: list[Rows] = []
        self._arrival = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences that are being answered."""
        return len(self._sequences)

    def add(self, sequence: LiveSequence) -> None:
        """Let a sequence take part from the next step on."""
        self._sequences.append(sequence)
        self._arrival.set()
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())

    def remove(self, sequence: LiveSequence) -> None:
        """Take a sequence out, finished or not; it is written no further."""
        sequence.fail(TrimtabError("its reader has left"))
        self.release(sequence)

    def release(self, sequence: LiveSequence) -> None:
        """Take out a sequence whose voices have left their seats; it may go on in any lane."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
        self._arrival.set()

    def wake(self) -> None:
        """Look again at what can run: a voice has another seat."""
        self._arrival.set()

    async def _run(self) -> None:
        try:
            while self._sequences:
                await self._step()
        except Exception as error:
            logger.exception("a lane's loop failed")
            for sequence in [*self._sequences, *self._unwritten]:
                sequence.fail(TrimtabError(f"the coordinator's step failed: {error!r}"))
            self._sequences.clear()
            self._unwritten.clear()
        finally:
            self._release_rows()
            self._loop = None

    async def _step(self) -> None:
        self._arrival.clear()
        times_s = [time.perf_counter()]
        flights = self._scatter(plan_step(self._sequences))
        times_s.append(time.perf_counter())
        # Two turns of the event loop: into the streams' queues, and out of them.
        for _ in range(2):
            await asyncio.sleep(0)
        self._write()
        await self._gather(flights)
        times_s.append(time.perf_counter())
        await self._read_prompts()
        ready = [sequence for sequence in self._sequences if sequence.can_draw and not sequence.is_reading]
        if ready:
            drawn = await asyncio.to_thread(merge_and_draw, ready)
            times_s.append(time.perf_counter())
            self._commit(ready, drawn)
        self._release_rows()
        if ready:
            times_s.append(time.perf_counter())
            self._figures.num_steps += 1
            for part, (begin_s, end_s) in zip(PARTS, pairwise(times_s), strict=True):
                self._figures.step_s[part] += end_s - begin_s

    def _scatter(self, messages: Sequence[Message]) -> set[asyncio.Task[None]]:
        """Send every replica its part; all of them run at once. Returns the flights that the step waits for."""
        step = set()
        for message in messages:
            flight = asyncio.create_task(self._fly(message))
            self._flights.add(flight)
            flight.add_done_callback(self._flights.discard)
            if not message.is_prompt:
                step.add(flight)
        return step

    async def _fly(self, message: Message) -> None:
        """Carry one step message there and its rows back."""
        work = [part.work() for part in message.parts]
        for part in message.parts:
            part.voice.num_sent = len(part.voice.tokens)
            part.voice.in_flight = True
        # A prompt waits for its turn and takes many passes: its limit is the request's own.
        timeout_s = self._limits.deadline_s if message.is_prompt else self._limits.step_timeout_s
        try:
            rows = await message.replica.step(work, timeout_s=timeout_s, inline=message.is_prompt)
            self._land(message.parts, rows)
        except (ReplicaLost, DeadlineExceeded) as error:
            for part in message.parts:
                if part.is_current:
                    part.sequence.lose(part.voice, error)
        except Exception as error:
            logger.exception("a step message failed")
            for part in message.parts:
                if part.is_current:
                    part.sequence.fail(TrimtabError(f"a step of {part.voice.name} failed: {error}"))
        finally:
            for part in message.parts:
                if part.is_current:
                    part.voice.in_flight = False

    def _land(self, parts: Sequence[Part], rows: Rows) -> None:
        """Hand rows that have come to their voices; what comes for a seat that was left is dropped."""
        if not any(part.sequence.is_live and part.is_current for part in parts):
            rows.release()
            return
        self._landed.append(rows)
        failures = {failure.sequence: failure for failure in rows.failures}
        completed = [part for part in parts if part.seat.key not in failures]
        start = 0
        for part in completed:
            if part.is_current:
                reads = part.sequence.is_reading
                part.voice.row = rows.tensor[start : start + part.num_rows] if reads else rows.tensor[start]
            start += part.num_rows
        for part in parts:
            failure = failures.get(part.seat.key)
            if failure is not None and part.is_current:
                self._refuse(part, failure)

    def _refuse(self, part: Part, failure: Failure) -> None:
        """Take note of why a replica has not done a part of a step."""
        if failure.kind == Preempted.__name__:
            part.voice.num_sent = 0
        elif failure.kind == ReplicaLost.__name__:
            part.sequence.lose(part.voice, ReplicaLost(failure.message))
        else:
            part.sequence.fail(EngineError(f"{part.voice.name} could not take a step: {failure.message}"))

    def _write(self) -> None:
        """Turn the last step's tokens into text while the models compute."""
        unwritten, self._unwritten = self._unwritten, []
        for sequence in unwritten:
            try:
                sequence.write()
            except Exception as error:
                logger.exception("tokens could not be written as text")
                sequence.fail(TrimtabError(f"tokens could not be written as text: {error!r}"))

    async def _gather(self, flights: set[asyncio.Task[None]]) -> None:
        """Wait for this step's rows; for late ones of earlier steps, or for a new sequence, if this step has none."""
        self._sequences = [sequence for sequence in self._sequences if sequence.is_live]
        if flights:
            start = asyncio.get_running_loop().time()
            _, late = await asyncio.wait(flights, return_when=asyncio.FIRST_COMPLETED)
            elapsed_s = asyncio.get_running_loop().time() - start
            if late:
                await asyncio.wait(late, timeout=2 * elapsed_s + PATIENCE_S)
        elif self._sequences and not any(sequence.can_draw for sequence in self._sequences):
            arrival = asyncio.create_task(self._arrival.wait())
            await asyncio.wait({arrival, *self._flights}, return_when=asyncio.FIRST_COMPLETED)
            arrival.cancel()

    async def _read_prompts(self) -> None:
        """Take what rows say of prompts that are told of."""
        reading = [sequence for sequence in self._sequences if sequence.is_reading and sequence.can_draw]
        if reading:
            for sequence, scores in zip(reading, await asyncio.to_thread(score_prompts, reading), strict=True):
                if sequence.can_draw:
                    sequence.read_on(scores)

    def _commit(self, sequences: Sequence[LiveSequence], drawn: Sequence[Drawn]) -> None:
        for sequence, (token, scores) in zip(sequences, drawn, strict=True):
            if token is None:
                sequence.fail(_no_token(sequence))
            elif sequence.can_draw:
                sequence.commit(token, scores)
                self._unwritten.append(sequence)
        self._sequences = [sequence for sequence in self._sequences if sequence.is_live]
        if not self._sequences:
            self._write()

    def _release_rows(self) -> None:
        """Give the slots back; rows that wait for other voices are kept as copies."""
        if self._landed:
            for sequence in self._sequences:
                for voice in sequence.voices:
                    if voice.row is not None:
                        voice.row = voice.row.clone()
            for rows in self._landed:
                rows.release()
            self._landed.clear()


def _no_token(sequence: LiveSequence) -> TrimtabError:
    """Why nothing could be drawn."""
    names = ", ".join(voice.name for voice in sequence.voices)
    if sequence.shaper is not None and sequence.shaper.is_masked:
        return InvalidRequest(
            f"no token of {names} goes on in the form that was asked for; ask for another one", "response_format"
        )
    return EngineError(f"the merged logits of {names} are not finite; use a wider dtype")


def score_prompts(sequences: Sequence[LiveSequence]) -> list[list[RowScores]]:
    """Return what each sequence's rows say of the next tokens of its prompt."""
    return [_score_prompt(sequence) for sequence in sequences]


def _score_prompt(sequence: LiveSequence) -> list[RowScores]:
    echo, scoring = sequence.echo, sequence.scoring
    assert echo is not None
    assert scoring is not None
    first = 1 + len(echo.scores)
    base, *guides = (logits_of(voice) for voice in sequence.voices)
    gaps = sequence.spelled.guidance() if sequence.spelled else []
    scores = []
    for i, token in enumerate(echo.tokens[first : first + len(base)]):
        row = sequence.spelled.cut(base[i]) if sequence.spelled else base[i]
        guidance = [Guidance(voice.weight, rows[i]) for voice, rows in zip(sequence.voices[1:], guides, strict=True)]
        scores.append(score(row, guidance, gaps, token, scoring))
    return scores


def merge_and_draw(sequences: Sequence[LiveSequence]) -> list[Drawn]:
    """Return the next token of each sequence, from the rows of all its voices."""
    logits = logits_by_voice(voice for sequence in sequences for voice in sequence.voices)
    rows, guidance = [], []
    for sequence in sequences:
        row = logits[sequence.voices[0]]
        rows.append(sequence.spelled.cut(row) if sequence.spelled else row)
        guidance.append([Guidance(voice.weight, logits[voice]) for voice in sequence.voices[1:]])
    gaps = [sequence.spelled.guidance() if sequence.spelled else [] for sequence in sequences]
    tokens = drawing.merge_and_draw(
        rows,
        [[*guides, *gap] for guides, gap in zip(guidance, gaps, strict=True)],
        [sequence.sampling for sequence in sequences],
        [len(sequence.output) for sequence in sequences],
        [sequence.sample for sequence in sequences],
        [sequence.shaper for sequence in sequences],
    )
    return [
        Drawn(token)
        if sequence.scoring is None or token is None
        else Drawn(token, score(row, guides, gap, token, sequence.scoring))
        for sequence, row, guides, gap, token in zip(sequences, rows, guidance, gaps, tokens, strict=True)
    ]
