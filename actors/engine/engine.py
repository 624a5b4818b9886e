"""Sequences over one model: which are open, how long they are, in which blocks of the cache they lie.

Called from one thread; knows nothing of other threads, Ray or asyncio.

Shapes: R asked rows, V vocabulary, D hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.blocks import BLOCK_SIZE, BlockPool, BlockTable
from actors.engine.models.fingerprint import fingerprint
from actors.engine.models.inspection import inspect_model, model_name
from actors.engine.models.lm_head import RowKind, output_function
from actors.engine.models.loading import load_model
from actors.engine.models.verification import own_logits, verify
from actors.engine.passes.forward import make_forward_pass
from actors.engine.work import PlacedWork, Work
from actors.guidance.lm_head import OutputFunction
from actors.settings import DEFAULT_CACHE_TOKENS
from cluster.errors import EngineError, InvalidConfiguration


@dataclass(slots=True)
class Counters:
    """What an engine has done since it started."""

    num_computed_tokens: int = 0
    """Tokens that went through the model, rejected drafts and replays included."""

    num_reused_tokens: int = 0
    """Tokens that were found in the cache instead."""


class Engine:
    """A causal language model with a batched key-value cache: append tokens, get logits, roll back."""

    vocabulary_size: int
    """Columns of the logits: the width of the model's output layer."""

    row_width: int
    """Elements of a row: `vocabulary_size`, or the hidden width."""

    output: OutputFunction | None
    """What turns rows into logits, on the processor; none where they are logits already."""

    num_token_ids: int
    """Token ids that the model can read are below this."""

    dtype: torch.dtype
    """Of rows."""

    fingerprint: str
    """Of the model: engines with equal fingerprints compute the same."""

    max_sequences: int
    """Sequences that can be open at once."""

    max_context: int
    """Tokens that a sequence can hold."""

    counters: Counters

    on_call: Callable[..., None] | None = None
    """Told of every call that changes sequences, its name and arguments, before it is carried out, so that the other
    ranks of a sharded model do the same."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sequences: int,
        max_context: int,
        cache_tokens: int | None = None,
        rows: RowKind = "logits",
    ) -> None:
        """Take a model over: its attention is the engine's from now on. Allocates the whole cache.

        Raises:
            InvalidConfiguration: a limit that cannot be, or a model that the engine cannot run, or not with such rows.
        """
        cache_tokens = max(DEFAULT_CACHE_TOKENS, max_context) if cache_tokens is None else cache_tokens
        _check_limits(model, max_sequences, max_context, cache_tokens)
        model.eval().requires_grad_(False)
        inspection = inspect_model(model, max_context)
        self._pool = BlockPool(-(-cache_tokens // BLOCK_SIZE), BLOCK_SIZE)
        self._tables: dict[str, BlockTable] = {}
        self.vocabulary_size = inspection.num_columns
        self.output = output_function(model) if rows == "hidden_states" else None
        self.row_width = self.vocabulary_size if self.output is None else self.output.weight_VD.shape[1]
        self.num_token_ids = model.get_input_embeddings().weight.shape[0]
        self.dtype = model.dtype
        self.fingerprint = fingerprint(model)
        self.max_sequences = max_sequences
        self.max_context = max_context
        self.counters = Counters()
        expected = own_logits(model, max_context)
        # After all that reads the weights: it lays some of them out anew.
        self._forward_pass = make_forward_pass(
            model,
            inspection.layers,
            num_blocks=self._pool.num_blocks + 1,  # block 0 is nobody's
            max_sequences=max_sequences,
            max_context=max_context,
            gives_hidden_states=self.output is not None,
        )
        verify(self, expected, model_name(model))
        self._pool.forget()
        self.counters = Counters()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype,
        max_sequences: int,
        max_context: int,
        cache_tokens: int | None = None,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        rows: RowKind = "logits",
        num_ranks: int = 1,
    ) -> "Engine":
        """Load a model and make an engine of it.

        Args:
            model: a directory or hub id that `AutoModelForCausalLM` loads; safetensors, without code of its own.
            dtype: float32, bfloat16 or float16, of weights, cache and rows.
            max_sequences: how many can be open at once.
            max_context: how many tokens one can hold.
            cache_tokens: how many all sequences together can hold; 16,384 or `max_context` if absent.
            threads: processor threads of this whole process; none leaves them as they are.
            device: where the model computes.
            rows: what a row is: next-token logits, or the last hidden states that `output` turns into these.
            num_ranks: the size of the group that this process has joined (`sharding.join_group`), all of which load
                the model now, and do the same with it from then on: see `calls`.

        Raises:
            InvalidConfiguration: the model cannot be loaded, or the engine cannot run it with these limits and rows.
        """
        if threads is not None:
            if threads < 1:
                raise InvalidConfiguration(f"threads: {threads} is less than 1; leave it out to use all cores")
            torch.set_num_threads(threads)
        loaded = load_model(model, dtype=dtype, device=device, num_ranks=num_ranks)
        return cls(loaded, max_sequences=max_sequences, max_context=max_context, cache_tokens=cache_tokens, rows=rows)

    @property
    def description(self) -> str:
        """How it computes, for logs and benchmarks."""
        return self._forward_pass.description

    @property
    def cache_use(self) -> float:
        """Share of the cache that open sequences hold, 0 to 1."""
        return 1 - self._pool.num_available / self._pool.num_blocks

    def open(self, sequence: str) -> None:
        """Open an empty sequence.

        Raises:
            EngineError: it is open already, or too many are.
        """
        self._tell("open", sequence)
        if sequence in self._tables:
            raise EngineError(f"sequence {sequence!r} is open already; close it first")
        if len(self._tables) >= self.max_sequences:
            raise EngineError(
                f"sequence {sequence!r} finds no room: all {self.max_sequences} sequences are in use; "
                "close one first, or raise max_sequences"
            )
        self._tables[sequence] = BlockTable()

    def reuse(self, sequence: str, tokens: Sequence[int]) -> int:
        """Append what the cache holds already of the tokens that follow, without computing anything.

        Returns:
            How many of the leading tokens that were; they need not be sent to `step`.

        Raises:
            EngineError: it is not open, or the tokens do not fit the model or its context.
        """
        self._tell("reuse", sequence, tokens)
        table = self._table(sequence)
        self._check_tokens(sequence, tokens, table.length)
        num_tokens, copies = self._pool.reuse(table, tokens)
        self._forward_pass.copy(copies)
        self.counters.num_reused_tokens += num_tokens
        return num_tokens

    def reserve(self, sequence: str, num_tokens: int) -> bool:
        """Make room in the cache for so many more tokens of a sequence, until it is truncated or closed.

        Returns:
            Whether there was enough; `step` refuses what does not fit.

        Raises:
            EngineError: it is not open.
        """
        self._tell("reserve", sequence, num_tokens)
        return self._reserve(sequence, num_tokens)

    def _reserve(self, sequence: str, num_tokens: int) -> bool:
        copies = self._pool.reserve(self._table(sequence), num_tokens)
        if copies is None:
            return False
        self._forward_pass.copy(copies)
        return True

    @torch.inference_mode()
    def step(self, work: Sequence[Work], room: Tensor | None = None) -> Tensor:
        """Append tokens to sequences in one forward pass.

        Args:
            work: what each sequence does.
            room: memory for the rows; what is returned lies there if it fits and the pass can write there.

        Returns:
            Next-token logits [R, V] in the model's dtype, on the processor: rows in the order of the work, then of
            each one's rows. Where there is an `output`, the hidden states [R, D] that it turns into these.

        Raises:
            EngineError: an item cannot be done; no sequence has changed then, nor after any other error.
        """
        self._tell("step", work)
        seen = set()
        for item in work:
            if item.sequence in seen:
                raise EngineError(f"sequence {item.sequence!r} comes twice in one step; send its tokens as one item")
            seen.add(item.sequence)
            self.check(item)
        if not work:
            return torch.empty(0, self.row_width, dtype=self.dtype)
        self._reserve_all(work)
        rows = self._forward_pass.run([self._place(item) for item in work], room).to(self.dtype)
        if rows.device.type != "cpu":
            rows = _bring(rows, room)
        for item in work:
            self._pool.commit(self._tables[item.sequence], item.tokens)
            self.counters.num_computed_tokens += len(item.tokens)
        return rows

    def check(self, item: Work, length: int | None = None) -> None:
        """Check that a sequence can take its part of a step, so that it spoils no other's.

        Args:
            item: its part.
            length: how many tokens it will hold by then; those that it holds now if absent.

        Raises:
            EngineError: it cannot; `step` would refuse the whole step.
        """
        length = self.length(item.sequence) if length is None else length
        if not item.tokens:
            raise EngineError(f"sequence {item.sequence!r} comes without tokens; leave it out of the step")
        self._check_tokens(item.sequence, item.tokens, length)
        for row in item.rows:
            if not 0 <= row < len(item.tokens):
                raise EngineError(
                    f"sequence {item.sequence!r}: row {row} is outside its {len(item.tokens)} tokens; "
                    f"ask for rows from 0 to {len(item.tokens) - 1}"
                )

    def length(self, sequence: str) -> int:
        """Return how many tokens a sequence holds.

        Raises:
            EngineError: it is not open.
        """
        return self._table(sequence).length

    def truncate(self, sequence: str, length: int) -> None:
        """Roll a sequence back to its first `length` tokens, and give back the room of the others.

        Raises:
            EngineError: it is not open, or holds fewer tokens.
        """
        self._tell("truncate", sequence, length)
        table = self._table(sequence)
        if not 0 <= length <= table.length:
            raise EngineError(
                f"sequence {sequence!r} cannot be rolled back to {length} tokens: it holds {table.length}; "
                f"give a length from 0 to {table.length}"
            )
        self._pool.truncate(table, length)

    def close(self, sequence: str) -> None:
        """Close a sequence. What it held can be reused until its room is needed.

        Raises:
            EngineError: it is not open.
        """
        self._tell("close", sequence)
        self._pool.truncate(self._table(sequence), 0)
        del self._tables[sequence]

    def _tell(self, call: str, *arguments: object) -> None:
        if self.on_call is not None:
            self.on_call(call, *arguments)

    def _reserve_all(self, work: Sequence[Work]) -> None:
        for item in work:
            if not self._reserve(item.sequence, len(item.tokens)):
                for reserved in work:
                    table = self._table(reserved.sequence)
                    self._pool.truncate(table, table.length)
                raise EngineError(
                    f"sequence {item.sequence!r} finds no room for {len(item.tokens)} tokens: the cache is full; "
                    "roll others back, or raise cache_tokens"
                )

    def _table(self, sequence: str) -> BlockTable:
        try:
            return self._tables[sequence]
        except KeyError:
            raise EngineError(f"sequence {sequence!r} is not open; open it first") from None

    def _place(self, item: Work) -> PlacedWork:
        """Say where a sequence's tokens lie, and the new ones will."""
        table = self._tables[item.sequence]
        return PlacedWork(item, [block.number for block in table.blocks], table.length)

    def _check_tokens(self, sequence: str, tokens: Sequence[int], length: int) -> None:
        if length + len(tokens) > self.max_context:
            raise EngineError(
                f"sequence {sequence!r} holds {length} tokens and cannot take {len(tokens)} more: "
                f"{length + len(tokens)} are past the limit of {self.max_context}; shorten it, or raise max_context"
            )
        for token in tokens:
            if not 0 <= token < self.num_token_ids:
                raise EngineError(
                    f"sequence {sequence!r}: token id {token} is outside the vocabulary; "
                    f"ids go from 0 to {self.num_token_ids - 1}"
                )


def _bring(rows: Tensor, room: Tensor | None) -> Tensor:
    """Bring rows to the processor: into the room, if they fit there."""
    if room is not None and room.shape == rows.shape and room.dtype == rows.dtype:
        return room.copy_(rows)
    return rows.cpu()


def _check_limits(model: PreTrainedModel, max_sequences: int, max_context: int, cache_tokens: int) -> None:
    if max_sequences < 1:
        raise InvalidConfiguration(f"max_sequences: {max_sequences} is less than 1")
    if max_context < 1:
        raise InvalidConfiguration(f"max_context: {max_context} is less than 1")
    if cache_tokens < max_context:
        raise InvalidConfiguration(
            f"cache_tokens: {cache_tokens} is less than max_context, {max_context}: one sequence must fit"
        )
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and max_context > limit:
        raise InvalidConfiguration(
            f"max_context: {max_context} positions are more than the {limit} of {model_name(model)}; "
            f"set it to {limit} or less"
        )
