"""What a model's attention layers need of a cache, found by watching one short forward call.

Whatever the engine cannot compute is refused here, by name, before any sequence is served: states other than keys and
values, masks other than causal ones and sliding windows, and inputs of the attention that the engine does not know.

Shapes: N tokens, H query heads, K key-value heads, D key width, E value width, Q query positions, C key positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.models.attention import IMPLEMENTATION, MaskFunction, attending
from cluster.errors import InvalidConfiguration

_KNOWN_TENSORS = frozenset({"position_ids", "cache_position"})
_NUM_PROBES = 64


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer's needs."""

    num_heads: int
    """Key-value heads."""

    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    window: int | None
    """How many positions a token sees, itself included; none for all."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the engine must know about a model."""

    layers: Mapping[nn.Module, Layer]
    """By attention module, in the order of the forward call."""

    num_columns: int
    """Columns of the logits."""


class _Watch:
    """An attention pass that notes what every layer brings, and returns values in place of attention."""

    def __init__(self, model_name: str, max_context: int) -> None:
        self.layers: dict[nn.Module, Layer] = {}
        self._model_name = model_name
        self._max_context = max_context

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, options: dict[str, Any]
    ) -> Tensor:
        unknown = sorted(
            name for name, option in options.items() if isinstance(option, Tensor) and name not in _KNOWN_TENSORS
        )
        if unknown:
            raise unsupported(self._model_name, f"its attention takes {', '.join(unknown)}, which the engine does not")
        if layer in self.layers:
            raise unsupported(self._model_name, "several of its layers share one attention module")
        num_queries, num_heads = query.shape[1], key.shape[1]
        if value.shape[1] != num_heads or num_queries % num_heads or query.shape[-1] != key.shape[-1]:
            shapes = f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            raise unsupported(self._model_name, f"queries, keys and values of shapes {shapes} do not fit together")
        if not callable(mask):
            raise unsupported(self._model_name, "it makes its attention masks by itself")
        self.layers[layer] = Layer(
            num_heads=num_heads,
            key_width=key.shape[-1],
            value_width=value.shape[-1],
            dtype=key.dtype,
            device=key.device,
            window=_window(mask, self._max_context, self._model_name),
        )
        return value.repeat_interleave(num_queries // num_heads, dim=1).transpose(1, 2)


def unsupported(model_name: str, reason: str) -> InvalidConfiguration:
    """Return the error that refuses a model."""
    return InvalidConfiguration(
        f"model {model_name}: the engine cannot run it: {reason}. Use a decoder with plain or sliding-window causal "
        "attention, such as Llama, Mistral, Qwen, Gemma, GPT-NeoX or GPT-2."
    )


def inspect_model(model: PreTrainedModel, max_context: int) -> Inspection:
    """Set the engine's attention on a model, and find out what its layers need.

    Raises:
        InvalidConfiguration: the model needs what the engine does not have.
    """
    name = model_name(model)
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise unsupported(name, "it is an encoder-decoder")
    _check_rotary(config, name, max_context)
    model.set_attn_implementation(IMPLEMENTATION)
    if config._attn_implementation != IMPLEMENTATION:
        raise unsupported(name, "its attention does not go through transformers' AttentionInterface")
    watch = _Watch(name, max_context)
    logits = _forward(model, watch, name)
    if len(watch.layers) != config.num_hidden_layers:
        raise unsupported(
            name,
            f"{len(watch.layers)} of its {config.num_hidden_layers} layers attend through transformers' "
            "AttentionInterface; states of other kinds cannot be rolled back",
        )
    return Inspection(layers=watch.layers, num_columns=logits.shape[-1])


def model_name(model: PreTrainedModel) -> str:
    """Return where a model came from and its architecture, for messages."""
    return f"{model.name_or_path or '(built in memory)'} ({type(model).__name__})"


def _forward(model: PreTrainedModel, watch: _Watch, name: str) -> Tensor:
    # An attention mask, even one that masks nothing, keeps transformers from taking positions for packed sequences.
    arguments = {"input_ids": [[0]], "position_ids": [[0]], "attention_mask": [[1]]}
    tensors = {key: torch.tensor(value, device=model.device) for key, value in arguments.items()}
    try:
        with torch.inference_mode(), attending(watch):
            keep = torch.tensor([0], device=model.device)
            return model(**tensors, use_cache=False, logits_to_keep=keep).logits
    except InvalidConfiguration:
        raise
    except Exception as error:
        # Any architecture may come; what it does with arguments that it does not expect is its own.
        raise unsupported(name, f"its forward call fails on one token: {type(error).__name__}: {error}") from error


def _check_rotary(config: Any, name: str, max_context: int) -> None:
    """Refuse rotary frequencies that depend on the longest sequence of a batch, which the cache cannot follow."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rotary in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if rotary.get("rope_type") != "longrope":
            continue
        limit = int(rotary["original_max_position_embeddings"])
        if max_context > limit:
            raise InvalidConfiguration(
                f"max_context: {max_context} positions are beyond the {limit} up to which {name} keeps one set of "
                f"rotary frequencies (longrope). Set max_context to {limit} or less."
            )


def _window(mask: MaskFunction, max_context: int, name: str) -> int | None:
    """Return the window that a mask function stands for.

    Raises:
        InvalidConfiguration: within `max_context` the mask is neither causal nor a sliding window.
    """
    keys_C = torch.arange(max_context)
    last_row = mask(0, 0, torch.tensor([max_context - 1]), keys_C).expand(max_context)
    window = int(last_row.sum())
    spread = torch.linspace(0, max_context - 1, _NUM_PROBES).long()
    edges = torch.tensor([0, 1, window - 1, window, window + 1, 2 * window]).clamp(max=max_context - 1)
    queries_Q1 = torch.cat([spread, edges])[:, None]
    expected = (keys_C <= queries_Q1) & (keys_C > queries_Q1 - window)
    if not torch.equal(mask(0, 0, queries_Q1, keys_C).expand_as(expected), expected):
        raise unsupported(name, "its attention mask is neither causal nor a causal sliding window")
    return None if window == max_context else window
