"""Forward passes: a step's tokens through a model and its cache.

Shapes: N tokens of a step, R asked rows, V vocabulary, D hidden width.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.attention import attending
from actors.engine.blocks import BLOCK_SIZE, Copy
from actors.engine.cache import LayerCache
from actors.engine.compiled.decoder import CompiledPass, fits
from actors.engine.inspection import Layer
from actors.engine.plan import PlacedWork, StepPlan
from actors.engine.processor import prepare_for_processor
from actors.engine.sharding import unwrap_slices


class ForwardPass(Protocol):
    """A model and its cache, as an engine uses them."""

    def run(self, work: Sequence[PlacedWork], room: Tensor | None = None) -> Tensor:
        """Append tokens to sequences, each of them at most once.

        Args:
            work: what each sequence does.
            room: memory for the rows, which a pass that can write there returns.

        Returns:
            Next-token logits [R, V], or the last hidden states [R, D]: rows in the order of the work, then of each
            one's rows.
        """
        ...

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy keys and values between blocks."""
        ...


def make_forward_pass(
    model: PreTrainedModel,
    layers: Mapping[nn.Module, Layer],
    *,
    num_blocks: int,
    max_context: int,
    gives_hidden_states: bool,
) -> ForwardPass:
    """Take a model over for the fastest pass that can compute it, and allocate the cache.

    Args:
        model: not to be used by anyone else from now on.
        layers: what its attention modules need of a cache.
        num_blocks: of the cache.
        max_context: positions of a sequence.
        gives_hidden_states: whether rows are the last hidden states, and not logits.
    """
    if fits(model, layers):
        return CompiledPass(
            model, layers, num_blocks=num_blocks, max_context=max_context, gives_hidden_states=gives_hidden_states
        )
    return TransformersPass(model, layers, num_blocks=num_blocks, gives_hidden_states=gives_hidden_states)


class TransformersPass:
    """A pass through transformers' own modules, with the engine's attention: for any architecture and device."""

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[nn.Module, Layer], *, num_blocks: int, gives_hidden_states: bool
    ) -> None:
        prepare_for_processor(model)
        unwrap_slices(model)
        self._model = model
        self._gives_hidden_states = gives_hidden_states
        self._caches = {module: LayerCache.allocate(layer, num_blocks * BLOCK_SIZE) for module, layer in layers.items()}

    def run(self, work: Sequence[PlacedWork], room: Tensor | None = None) -> Tensor:
        """Append tokens and return the asked rows; see `ForwardPass`."""
        plan = StepPlan(work, self._caches, self._model.device)
        inputs = {"input_ids": plan.tokens_N[None], "position_ids": plan.positions_N[None], "use_cache": False}
        with attending(plan):
            if self._gives_hidden_states:
                hidden: Tensor = self._model.base_model(**inputs).last_hidden_state[0]
                return hidden[plan.rows_R]
            logits: Tensor = self._model(**inputs, logits_to_keep=plan.rows_R).logits[0]
            return logits

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy keys and values between blocks; see `ForwardPass`."""
        for source, target, start, stop in copies:
            positions = torch.arange(start, stop, device=self._model.device)
            for cache in self._caches.values():
                cache.copy(source * BLOCK_SIZE + positions, target * BLOCK_SIZE + positions)
