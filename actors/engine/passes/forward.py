"""Forward passes: a step's tokens through a model and its cache.

Shapes: N tokens of a step, R asked rows, V vocabulary, D hidden width.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.blocks import BLOCK_SIZE, Copy
from actors.engine.models.inspection import Layer
from actors.engine.models.sharding import unwrap_slices
from actors.engine.passes.cache import LayerCache
from actors.engine.passes.compiled.decoder import CompiledPass, fits
from actors.engine.passes.processor import prepare_for_processor
from actors.engine.passes.transformers import TransformersPass
from actors.engine.work import PlacedWork

logger = logging.getLogger(__name__)


class ForwardPass(Protocol):
    """A model and its cache, as an engine uses them."""

    @property
    def description(self) -> str:
        """How it computes, for logs and benchmarks."""
        ...

    def run(self, work: Sequence[PlacedWork], room: Tensor | None = None) -> Tensor:
        """Append tokens to sequences, each of them at most once.

        Args:
            work: what each sequence does.
            room: memory for the rows, which a pass that can write there returns.

        Returns:
            Next-token logits [R, V], or the last hidden states [R, D]: rows in the order of the work, then of each
            one's rows. What lies on a GPU is there until the next call.
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
    max_sequences: int,
    max_context: int,
    gives_hidden_states: bool,
) -> ForwardPass:
    """Take a model over for the fastest pass that can compute it, and allocate the cache.

    Args:
        model: not to be used by anyone else from now on.
        layers: what its attention modules need of a cache.
        num_blocks: of the cache.
        max_sequences: of a step.
        max_context: positions of a sequence.
        gives_hidden_states: whether rows are the last hidden states, and not logits.
    """
    if fits(model, layers):
        return CompiledPass(
            model, layers, num_blocks=num_blocks, max_context=max_context, gives_hidden_states=gives_hidden_states
        )
    prepare_for_processor(model)
    unwrap_slices(model)
    caches = {module: LayerCache.allocate(layer, num_blocks * BLOCK_SIZE) for module, layer in layers.items()}
    if model.device.type == "cuda":
        paged = _paged_pass(
            model,
            caches,
            max_sequences=max_sequences,
            max_context=max_context,
            gives_hidden_states=gives_hidden_states,
        )
        if paged is not None:
            return paged
    return TransformersPass(model, caches, gives_hidden_states=gives_hidden_states)


def _paged_pass(model: PreTrainedModel, caches: Mapping[nn.Module, LayerCache], **options: Any) -> ForwardPass | None:
    """Return a `PagedPass`, or none where it does not run."""
    try:
        # Triton, which its kernels are written in, comes with torch's builds for GPUs alone.
        from actors.engine.passes.paged.decoder import PagedPass

        return PagedPass(model, caches, **options)
    except Exception as error:
        # Whatever a compiler or a driver has against it: the other pass is slower and as exact.
        logger.warning(
            "attention over the cache's blocks does not run on this GPU, so keys and values are gathered for every "
            "step, which is slower: %s: %s",
            type(error).__name__,
            error,
        )
        for cache in caches.values():
            # The other pass reads zeros there.
            cache.keys[:BLOCK_SIZE] = cache.values[:BLOCK_SIZE] = 0
        return None
