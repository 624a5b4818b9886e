"""A model's output function, taken out of the model, so that its engine can give hidden states in place of logits.

Only families that tests know: what an architecture does between its last hidden state and its logits is its own.

Shapes: T tokens, D hidden width, V vocabulary.
"""

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from actors.engine.models.inspection import model_name
from actors.engine.models.sharding import whole
from actors.engine.models.verification import own_attention
from actors.guidance.lm_head import OutputFunction
from cluster.errors import InvalidConfiguration

RowKind = Literal["logits", "hidden_states"]
"""What an engine's rows are."""

FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "phi",
        "qwen2",
        "qwen3",
    }
)
"""Values of `config.model_type` whose output functions are known."""

_TOKENS = [[1, 2, 3, 4]]

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference relative to the largest logit: of one product, on another device at most."""


def check_family(config: Any, name: str) -> None:
    """Check that the output function of a model with this configuration is known.

    Raises:
        InvalidConfiguration: it is not; `name` says which model that is.
    """
    if config.model_type not in FAMILIES:
        raise InvalidConfiguration(
            f"model {name}: hidden states in place of logits are not tested with the family {config.model_type!r}. "
            f"Set `rows: logits`, or use one of {', '.join(sorted(FAMILIES))}."
        )


def output_function(model: PreTrainedModel) -> OutputFunction:
    """Return what a model does with its last hidden state, after comparing it with the model's own logits.

    The tensors are the model's own if it is on the processor. Call it before anything replaces the model's modules.

    Raises:
        InvalidConfiguration: the model's family is not tested, or its logits are others.
    """
    config, head = model.config, model.get_output_embeddings()
    check_family(config, model_name(model))
    bias = getattr(head, "bias", None)
    function = OutputFunction(
        weight_VD=whole(head.weight).detach().cpu(),
        bias_V=None if bias is None else whole(bias).detach().cpu(),
        divisor=getattr(config, "logits_scaling", None),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    _compare(function, model)
    return function


def _compare(function: OutputFunction, model: PreTrainedModel) -> None:
    tokens = torch.tensor(_TOKENS, device=model.device) % model.get_input_embeddings().weight.shape[0]
    with own_attention(model), torch.inference_mode():
        hidden_TD = model.base_model(tokens, use_cache=False).last_hidden_state[0].to(model.dtype)
        expected_TV = model(tokens, use_cache=False).logits[0].to(model.dtype).cpu()
    if not expected_TV.isfinite().all():
        return  # the engine's verification says so
    difference = float((function(hidden_TD.cpu()).float() - expected_TV.float()).abs().max())
    limit = _TOLERANCES[expected_TV.dtype] * float(expected_TV.float().abs().max())
    if not difference <= limit:
        raise InvalidConfiguration(
            f"model {model_name(model)}: logits from its hidden states differ by {difference:.2g} from its own, by "
            f"{limit:.2g} at most. Set `rows: logits`."
        )
