"""A live sequence: its voices, its tokens, and the text that waits for its reader. Knows nothing of Ray."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from actors.api import FinishReason as FinishReason
from actors.api import Piece as Piece
from actors.api import PromptPiece, Resume, Sampling, Scores, Scoring, TokenScore, Usage
from actors.coordinator.echo import Echo
from actors.coordinator.spelling import Spelling
from actors.coordinator.text import TextWriter
from actors.guidance import Spelled
from actors.guidance.lm_head import OutputFunction
from actors.guidance.scoring import RowScores
from actors.guidance.shaping import Shaper
from cluster.errors import ReplicaLost, TrimtabError
from cluster.exchange import Rows, Work

SEND_AGAIN = "send the request again"


class Replica(Protocol):
    """Where a voice's model runs: in service, a `cluster.exchange.StepStream`."""

    async def step(self, work: Sequence[Work], *, timeout_s: float, inline: bool = False) -> Rows:
        """Run one step; `Rows` are in the order of `work`. `inline` leaves the shared memory to others."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """Where a voice's model runs. A voice that moves gets another one, so that what comes late for the old is known."""

    replica: Replica
    key: str
    """The sequence's name in step messages to the replica; another one for every lease."""

    output: OutputFunction | None = None
    """Of a replica whose rows are hidden states."""


@dataclass(slots=True, eq=False)
class Voice:
    """One model's part in a sequence: what it has been sent, and its row for the next token."""

    name: str
    """A guide's name, or `base`."""

    weight: float
    """Of a guide; the base's is 1."""

    seat: Seat | None
    """None while it waits for a replica."""

    tokens: list[int]
    """The prompt in this model's tokens, and the output so far."""

    num_sent: int = 0
    """How many of them its replica holds, or will hold once the step in flight is done."""

    in_flight: bool = False
    """Whether a step of this voice is on its way."""

    row: Tensor | None = None
    """The replica's row for the next token, once it holds all tokens: logits, or what `Seat.output` makes logits of.
    Several rows, of its last tokens, while the sequence reads its prompt."""

    @property
    def num_pending(self) -> int:
        """Tokens that the replica does not have yet."""
        return len(self.tokens) - self.num_sent

    def append(self, token: int) -> None:
        """Take a drawn token; the row has served."""
        self.tokens.append(token)
        self.row = None

    def leave(self) -> None:
        """Give the seat up; on the next one all tokens are sent again."""
        self.seat = None
        self.num_sent = 0
        self.in_flight = False
        self.row = None


@dataclass(slots=True, eq=False, kw_only=True)
class LiveSequence:
    """A request that is being answered."""

    voices: Sequence[Voice]
    """The base's first, then the guides' in the order in which they are summed."""

    sampling: Sampling
    max_tokens: int
    end_tokens: Collection[int]
    writer: TextWriter
    sample: int = 0
    """Its index among the answers to one request."""

    spelled: Spelled | None = None
    """The base's tokens; without them every column of its logits may be drawn."""

    shaper: Shaper | None = None
    """What changes its logits, if anything does."""

    scoring: Scoring | None = None
    """Which log probabilities its reader wants to see, if any."""

    spelling: Spelling | None = None
    """Of the base's tokens, where there is `scoring`."""

    echo: Echo | None = None
    """What is told of the prompt, if anything is."""

    writes_end: bool = False
    """Whether the token that ends the output is text, as far as it is any."""

    on_loss: Callable[[Voice, TrimtabError], None] | None = None
    """Finds a voice that has lost its replica another seat; without it the sequence fails."""

    output: list[int] = field(default_factory=list)
    scores: list[RowScores | None] = field(default_factory=list)
    """Of the output's tokens, with `scoring`; none of those that came from elsewhere."""

    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    num_prompt_tokens: int = field(init=False)
    """In the base's tokens."""

    num_rows: int = 1
    """Rows that each voice gives next: of its last tokens."""

    is_reading: bool = False
    """Whether the rows are wanted for the prompt's scores, and not for a draw."""

    _num_written: int = 0
    _num_read: int = 0
    _text: list[str] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.voices[0].tokens)
        if self.echo is not None and self.echo.is_scored:
            chunk = self.echo.next_chunk()
            self.num_rows = len(chunk)
            for voice in self.voices:
                voice.tokens = list(chunk)
            self.is_reading = True
        elif self.max_tokens == 0:
            self.finish_reason = "length"

    @property
    def is_live(self) -> bool:
        """Whether more tokens are wanted."""
        return self.finish_reason is None and self.error is None

    @property
    def can_draw(self) -> bool:
        """Whether every voice has given its row."""
        return self.is_live and all(voice.row is not None for voice in self.voices)

    def resume(self, resume: Resume) -> None:
        """Go on behind what the reader has. To be called before anything else.

        Raises:
            ReplicaLost: these tokens are not that text with this base.
        """
        for token in resume.token_ids:
            self.commit(token)
        self.write()
        text = "".join(self._text)
        if len(text) < resume.num_chars:
            raise ReplicaLost(f"base was changed by an update while it was writing: {SEND_AGAIN}")
        self._text = [text[resume.num_chars :]] if len(text) > resume.num_chars else []
        self._num_read = self._num_written

    def read_on(self, scores: Sequence[RowScores]) -> None:
        """Take the scores that the rows gave, and send for more of the prompt, or begin to write."""
        assert self.echo is not None
        self.echo.scores += scores
        chunk = self.echo.next_chunk()
        for voice in self.voices:
            assert voice.row is not None
            voice.tokens += chunk
            voice.row = None if chunk else voice.row[-1]
        self.num_rows = len(chunk) or 1
        self.is_reading = bool(chunk)
        if not chunk and self.max_tokens == 0:
            self.finish_reason = "length"
            self._news.set()

    def lose(self, voice: Voice, error: TrimtabError) -> None:
        """Note that a voice's replica does not hold it any more."""
        if not self.is_live:
            return
        voice.leave()
        if self.on_loss is None:
            self.fail(ReplicaLost(f"{voice.name} was lost while it was writing: {error}"))
        else:
            self.on_loss(voice, error)

    def commit(self, token: int, scores: RowScores | None = None) -> None:
        """Append a drawn token everywhere; end at an end token or at the last that was asked for."""
        self.output.append(token)
        self.scores.append(scores)
        for voice in self.voices:
            voice.append(token)
        if self.shaper is not None:
            self.shaper.append(token)
        if token in self.end_tokens:
            self.finish_reason = "stop"
        elif len(self.output) >= self.max_tokens:
            self.finish_reason = "length"

    def write(self) -> None:
        """Turn tokens that were committed into text for the reader; end where a stop string stands."""
        if self.error is not None or self._num_written == len(self.output):
            return
        for token in self.output[self._num_written :]:
            self._num_written += 1
            if self.writes_end or token not in self.end_tokens:
                self._put(self.writer.append(token))
            if self.writer.is_stopped:
                self.finish_reason = "stop"
                # A step may have run ahead of the text; what it drew is not part of the answer.
                del self.output[self._num_written :]
                del self.scores[self._num_written :]
                break
        if self.finish_reason is not None:
            self._put(self.writer.finish())
        self._news.set()

    def _put(self, text: str) -> None:
        if text:
            self._text.append(text)

    def fail(self, error: BaseException) -> None:
        """End without more tokens; the reader gets the error after what was written."""
        if self.error is None and not self._is_written_out:
            self.error = error
            self._news.set()

    async def read(self) -> Piece:
        """Wait for text and return all there is.

        Raises:
            TrimtabError: the sequence failed; what it was failed with.
        """
        while not (self._text or self._is_written_out):
            if self.error is not None:
                raise self.error
            self._news.clear()
            await self._news.wait()
        piece = Piece(
            text="".join(self._text),
            token_ids=self.output[self._num_read : self._num_written],
            finish_reason=self.finish_reason if self._is_written_out else None,
            usage=Usage(
                prompt_tokens=self.num_prompt_tokens,
                completion_tokens=self._num_written,
                total_tokens=self.num_prompt_tokens + self._num_written,
            ),
            seed=self.sampling.seed,
        )
        if self.scoring is not None:
            piece["scores"] = [self._spelled(scores) for scores in self.scores[self._num_read : self._num_written]]
        if self.echo is not None:
            scores = [self._spelled(row) for row in self.echo.scores]
            first = [self._unscored(self.echo.tokens[0])] if self.echo.is_scored else []
            piece["prompt_echo"] = PromptPiece(text=self.echo.text, scores=[*first, *scores])
            self.echo = None
        self._num_read = self._num_written
        self._text.clear()
        return piece

    def _unscored(self, token: int) -> Scores:
        """A token that nothing comes before."""
        assert self.spelling is not None
        text, spelled = self.spelling.spell(token)
        return Scores(drawn=TokenScore(token=token, text=text, bytes=list(spelled), logprob=None), top=[])

    def _spelled(self, row: RowScores | None) -> Scores:
        """A token's scores as the reader gets them."""
        assert row is not None
        assert self.spelling is not None
        tokens: list[TokenScore] = []
        for i, (token, logprob) in enumerate(zip(row.tokens, row.logprobs, strict=True)):
            text, spelled = self.spelling.spell(token)
            tokens.append(TokenScore(token=token, text=text, bytes=list(spelled), logprob=logprob))
            if row.own is not None:
                tokens[-1]["voices"] = {voice.name: own[i] for voice, own in zip(self.voices, row.own, strict=True)}
        scores = Scores(drawn=tokens[0], top=tokens[1:])
        if row.own is not None:
            scores["log_z"] = row.log_z
        return scores

    @property
    def _is_written_out(self) -> bool:
        return self.finish_reason is not None and self._num_written == len(self.output)
