"""A model is served only if the engine computes what the model computes by itself.

Checked when an engine starts, on a few tokens: whatever escapes inspection (biases by distance inside an attention,
positions that a model counts by itself) shows as other logits.

Shapes: P positions, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.models.attention import IMPLEMENTATION
from actors.engine.models.inspection import model_name, unsupported
from actors.engine.work import Work
from cluster.errors import InvalidConfiguration

if TYPE_CHECKING:
    from actors.engine.engine import Engine

_NUM_TOKENS = 72
"""Of several blocks of the cache."""

_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest difference at a position, relative to the largest logit: far above rounding, far below another attention.

At single positions rounding in 16 bits goes further (two implementations of SmolLM2's attention differ by a quarter of
the largest logit at one of twelve), while another attention is wrong at most of them: there the median position counts.
"""


def own_logits(model: PreTrainedModel, max_context: int) -> Tensor:
    """Return a model's own logits [P, V] for a few tokens, on the processor, for `verify`.

    Raises:
        InvalidConfiguration: they are not finite.
    """
    with own_attention(model), torch.inference_mode():
        tokens = torch.tensor([_tokens(model.get_input_embeddings().weight.shape[0], max_context)], device=model.device)
        logits_PV: Tensor = model(tokens, use_cache=False).logits[0].to(model.dtype).cpu()
    if not logits_PV.isfinite().all():
        raise InvalidConfiguration(
            f"model {model_name(model)}: its logits are not finite in {model.dtype}. "
            "Use another dtype, such as bfloat16."
        )
    return logits_PV


def verify(engine: "Engine", expected_PV: Tensor, name: str) -> None:
    """Compare the engine's logits with the `own_logits` of a model of this name.

    Raises:
        InvalidConfiguration: they differ.
    """
    tokens = _tokens(engine.num_token_ids, engine.max_context)
    differences_P = (_logits_by_engine(engine, tokens).float() - expected_PV.float()).abs().amax(1)
    is_exact = expected_PV.dtype == torch.float32
    difference = float(differences_P.max() if is_exact else differences_P.median())
    limit = _TOLERANCES[expected_PV.dtype] * float(expected_PV.float().abs().max())
    if not difference <= limit:
        raise unsupported(name, f"its logits differ by {difference:.2g} from the model's own, by {limit:.2g} at most")


def _tokens(num_token_ids: int, max_context: int) -> list[int]:
    return [(1 + 7 * i) % num_token_ids for i in range(min(_NUM_TOKENS, max_context))]


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let an engine's model attend as its architecture defines it, which is transformers' eager attention."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


def _logits_by_engine(engine: "Engine", tokens: list[int]) -> Tensor:
    """Return the logits [P, V] of one sequence in chunks, beside a second one if there is room for it."""
    names = [f"verification {i}" for i in range(min(2, engine.max_sequences))]
    for name in names:
        engine.open(name)
    engine.reserve(names[0], len(tokens))
    # The second sequence starts a chunk later, so that positions and lengths differ within a step.
    cuts = sorted({0, len(tokens) // 2, len(tokens) - 1, len(tokens)})
    logits = []
    for start, stop in pairwise(cuts):
        chunk = tokens[start:stop]
        work = [Work(names[0], chunk, range(len(chunk)))]
        if start > 0:
            work += [Work(name, tokens[:1], ()) for name in names[1:] if _has_room(engine, name)]
        rows = engine.step(work)
        logits.append(rows if engine.output is None else engine.output(rows))
    for name in names:
        engine.close(name)
    return torch.cat(logits)


def _has_room(engine: "Engine", sequence: str) -> bool:
    return engine.length(sequence) < engine.max_context and engine.reserve(sequence, 1)
