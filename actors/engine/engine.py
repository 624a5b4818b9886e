"""Sequences over one model: which are open, how long they are, in which slot of the cache they lie.

Called from one thread; knows nothing of other threads, Ray or asyncio.

Shapes: R asked rows, V vocabulary.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.attention import attending
from actors.engine.cache import LayerCache
from actors.engine.fingerprint import fingerprint
from actors.engine.inspection import inspect_model, model_name
from actors.engine.loading import load_model
from actors.engine.plan import PlacedWork, StepPlan, Work
from actors.engine.verification import verify
from cluster.errors import EngineError, InvalidConfiguration


@dataclass(slots=True)
class _Sequence:
    slot: int
    length: int = 0
    """Tokens in the cache."""

    num_used: int = 0
    """Positions of the slot that were ever written for it."""


class Engine:
    """A causal language model with a batched key-value cache: append tokens, get logits, roll back."""

    vocabulary_size: int
    """Columns of a row: the width of the model's output layer."""

    num_token_ids: int
    """Token ids that the model can read are below this."""

    dtype: torch.dtype
    """Of rows."""

    fingerprint: str
    """Of the model: engines with equal fingerprints compute the same."""

    max_sequences: int
    """Slots: sequences that can be open at once."""

    max_context: int
    """Positions of a slot: tokens that a sequence can hold."""

    def __init__(self, model: PreTrainedModel, *, max_sequences: int, max_context: int) -> None:
        """Take a model over: its attention is the engine's from now on. Allocates the whole cache.

        Raises:
            InvalidConfiguration: a limit that cannot be, or a model that the engine cannot run.
        """
        _check_limits(model, max_sequences, max_context)
        model.eval().requires_grad_(False)
        inspection = inspect_model(model, max_context)
        self._model = model
        self._caches = {
            module: LayerCache.allocate(layer, max_sequences, max_context)
            for module, layer in inspection.layers.items()
        }
        self._sequences: dict[str, _Sequence] = {}
        # A heap: the lowest free slot is taken first, so that open sequences lie side by side and attend together.
        self._free_slots = list(range(max_sequences))
        self.vocabulary_size = inspection.num_columns
        self.num_token_ids = model.get_input_embeddings().weight.shape[0]
        self.dtype = model.dtype
        self.fingerprint = fingerprint(model)
        self.max_sequences = max_sequences
        self.max_context = max_context
        verify(self, model)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype,
        max_sequences: int,
        max_context: int,
        threads: int | None = None,
        device: str | torch.device = "cpu",
    ) -> "Engine":
        """Load a model and make an engine of it.

        Args:
            model: a directory or hub id that `AutoModelForCausalLM` loads; safetensors, without code of its own.
            dtype: float32, bfloat16 or float16, of weights, cache and rows.
            max_sequences: how many can be open at once.
            max_context: how many tokens one can hold.
            threads: processor threads of this whole process; none leaves them as they are.
            device: where the model computes.

        Raises:
            InvalidConfiguration: the model cannot be loaded, or the engine cannot run it with these limits.
        """
        if threads is not None:
            if threads < 1:
                raise InvalidConfiguration(f"threads: {threads} is less than 1; leave it out to use all cores")
            torch.set_num_threads(threads)
        loaded = load_model(model, dtype=dtype, device=device)
        return cls(loaded, max_sequences=max_sequences, max_context=max_context)

    def open(self, sequence: str, tokens: Sequence[int]) -> int:
        """Open a sequence, known to begin with `tokens`; nothing is computed yet.

        Returns:
            How many of the leading tokens are in the cache already and need not be sent to `step`.

        Raises:
            EngineError: it is open already, no slot is free, or the tokens do not fit the model or its cache.
        """
        if sequence in self._sequences:
            raise EngineError(f"sequence {sequence!r} is open already; close it first")
        self._check_tokens(sequence, tokens, 0)
        if not self._free_slots:
            raise EngineError(
                f"sequence {sequence!r} finds no free slot: all {self.max_sequences} sequences are in use; "
                "close one first, or raise max_sequences"
            )
        self._sequences[sequence] = _Sequence(slot=heapq.heappop(self._free_slots))
        return 0

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> Tensor:
        """Append tokens to sequences in one forward pass.

        Returns:
            Next-token logits [R, V] in the model's dtype, on its device: rows in the order of the work, then of
            each one's rows.

        Raises:
            EngineError: an item cannot be done; no sequence has changed then, nor after any other error.
        """
        seen = set()
        for item in work:
            if item.sequence in seen:
                raise EngineError(f"sequence {item.sequence!r} comes twice in one step; send its tokens as one item")
            seen.add(item.sequence)
            self.check(item)
        if not work:
            return torch.empty(0, self.vocabulary_size, dtype=self.dtype, device=self._model.device)
        open_work = [(item, self._sequences[item.sequence]) for item in work]
        for item, open_sequence in open_work:
            open_sequence.num_used = max(open_sequence.num_used, open_sequence.length + len(item.tokens))
        placed = [PlacedWork(item, open_sequence.slot, open_sequence.length) for item, open_sequence in open_work]
        plan = StepPlan(placed, self._caches, self._model.device)
        with attending(plan):
            output = self._model(
                input_ids=plan.tokens_N[None],
                position_ids=plan.positions_N[None],
                use_cache=False,
                logits_to_keep=plan.rows_R,
            )
        logits: Tensor = output.logits[0].to(self.dtype)
        for item, open_sequence in open_work:
            open_sequence.length += len(item.tokens)
        return logits

    def check(self, item: Work) -> None:
        """Check that a sequence can take its part of a step, so that it spoils no other's.

        Raises:
            EngineError: it cannot; `step` would refuse the whole step.
        """
        length = self._sequence(item.sequence).length
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
        return self._sequence(sequence).length

    def truncate(self, sequence: str, length: int) -> None:
        """Roll a sequence back to its first `length` tokens; costs nothing.

        Raises:
            EngineError: it is not open, or holds fewer tokens.
        """
        open_sequence = self._sequence(sequence)
        if not 0 <= length <= open_sequence.length:
            raise EngineError(
                f"sequence {sequence!r} cannot be rolled back to {length} tokens: it holds {open_sequence.length}; "
                f"give a length from 0 to {open_sequence.length}"
            )
        open_sequence.length = length

    def close(self, sequence: str) -> None:
        """Close a sequence and free its slot.

        Raises:
            EngineError: it is not open.
        """
        closed = self._sequence(sequence)
        del self._sequences[sequence]
        for cache in self._caches.values():
            cache.clear(closed.slot, closed.num_used)
        heapq.heappush(self._free_slots, closed.slot)

    def _sequence(self, sequence: str) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise EngineError(f"sequence {sequence!r} is not open; open it first") from None

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


def _check_limits(model: PreTrainedModel, max_sequences: int, max_context: int) -> None:
    if max_sequences < 1:
        raise InvalidConfiguration(f"max_sequences: {max_sequences} is less than 1")
    if max_context < 1:
        raise InvalidConfiguration(f"max_context: {max_context} is less than 1")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and max_context > limit:
        raise InvalidConfiguration(
            f"max_context: {max_context} positions are more than the {limit} of {model_name(model)}; "
            f"set it to {limit} or less"
        )
