"""A Llama-like decoder as one compiled pass over all its layers, with its cache.

Shapes: N tokens of a step, R asked rows, I hidden width, F width between the products of the feed-forward part, H query
heads, K key-value heads, D head width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.blocks import BLOCK_SIZE, Copy
from actors.engine.models.inspection import Layer
from actors.engine.passes.compiled import kernels
from actors.engine.passes.compiled.layout import num_panels, panels
from actors.engine.passes.compiled.team import has_team, run_in_team
from actors.engine.work import PlacedWork

_MODELS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Classes of transformers whose layers are those of the pass: RMS norms before attention with rotary positions and
before a gated feed-forward part, Qwen's with biases or norms of its heads."""

_UNLIMITED = 1 << 40
"""The window of a layer that sees all positions."""


class CompiledPass:
    """A forward pass that computes each token alike whatever is computed beside it: batches, chunks of prompts and the
    number of threads change no bit of a row.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[nn.Module, Layer],
        *,
        num_blocks: int,
        max_context: int,
        gives_hidden_states: bool,
    ) -> None:
        """Take a model's weights over, laid out anew; the model cannot compute any more.

        Args:
            model: one that `fits`.
            layers: what its attention modules need of a cache.
            num_blocks: of the cache, which is allocated.
            max_context: positions of a sequence.
            gives_hidden_states: whether rows are the last hidden states, and not logits.
        """
        assert kernels.BLOCK_SIZE == BLOCK_SIZE
        # Compiled now, so that no step waits for it.
        self._function = kernels.pass_address()
        decoder, attention = model.model, model.model.layers[0].self_attn
        self._held: list[Tensor] = []
        self._num_columns = model.config.hidden_size if gives_hidden_states else model.lm_head.out_features
        num_output_panels = 0 if gives_hidden_states else num_panels(self._num_columns)
        width = attention.head_dim
        num_heads, num_key_heads = (p.out_features // width for p in (attention.q_proj, attention.k_proj))
        hidden, inner = model.config.hidden_size, model.config.intermediate_size
        self._widths = {
            kernels.STATES: hidden,
            kernels.NORMED: hidden,
            kernels.HEADS: (num_heads + 2 * num_key_heads) * width,
            kernels.ATTENDED: num_heads * width,
            kernels.INNER: 2 * inner,
            kernels.GATED: inner,
        }
        self._row_width = num_output_panels * kernels.LANES or hidden
        zeros = torch.zeros(max(self._row_width, *self._widths.values()))
        max_context = -(-max_context // BLOCK_SIZE) * BLOCK_SIZE
        cosine_PD, sine_PD = decoder.rotary_emb(zeros, torch.arange(max_context)[None])
        self._num_threads = torch.get_num_threads()
        # Written, not merely promised: memory that is missing is missed now, not under load.
        self._keys = torch.empty(len(layers), num_blocks, num_key_heads, width, BLOCK_SIZE).zero_()
        self._values = torch.empty(len(layers), num_blocks, num_key_heads, BLOCK_SIZE, width).zero_()
        self._workspace = torch.empty(0)
        self._counters = np.zeros((4 + len(layers) * kernels.NUM_PHASES, 2), np.int64)
        self._layers = np.zeros((len(layers), kernels.NUM_LAYER_FIELDS), np.int64)
        for number, layer in enumerate(decoder.layers):
            self._layers[number] = self._describe(layer, layers[layer.self_attn].window, number, zeros)
        self._job = self._table(
            kernels.NUM_FIELDS,
            {
                kernels.COUNTERS: self._counters.ctypes.data,
                kernels.LAYERS: self._layers.ctypes.data,
                kernels.NUM_LAYERS: len(layers),
                kernels.HIDDEN_WIDTH: hidden,
                kernels.INNER_WIDTH: inner,
                kernels.NUM_HEADS: num_heads,
                kernels.NUM_KEY_HEADS: num_key_heads,
                kernels.HEAD_WIDTH: width,
                kernels.MAX_CONTEXT: max_context,
                kernels.NUM_PANELS: num_output_panels,
                kernels.EPSILON: torch.tensor([decoder.norm.variance_epsilon]),
                kernels.SCALE: torch.tensor([attention.scaling]),
                kernels.EMBEDDING: decoder.embed_tokens.weight,
                kernels.COSINE: cosine_PD,
                kernels.SINE: sine_PD,
                kernels.FINAL_NORM: decoder.norm.weight,
                kernels.ZEROS: zeros,
                kernels.SCORES: torch.empty(self._num_threads, num_heads // num_key_heads, max_context),
                kernels.OUTPUT: panels([model.lm_head.weight]) if num_output_panels else 0,
            },
        )
        model.lm_head.weight = None

    @property
    def description(self) -> str:
        """How it computes."""
        return "one compiled pass"

    def run(self, work: Sequence[PlacedWork], room: Tensor | None = None) -> Tensor:
        """Append tokens and return the asked rows [R, V], or [R, I]; see `ForwardPass`."""
        tokens: list[int] = []
        positions: list[int] = []
        tables: list[int] = []
        rows: list[int] = []
        blocks = [np.array(placed.blocks, np.int64) for placed in work]
        for placed, numbers in zip(work, blocks, strict=True):
            rows += [len(tokens) + row for row in placed.work.rows]
            tokens += placed.work.tokens
            positions += range(placed.length, placed.length + placed.num_tokens)
            tables += [numbers.ctypes.data] * placed.num_tokens
        result = room if self._can_write(room, len(rows)) else torch.empty(len(rows), self._row_width)
        numbers = np.array([*tokens, *positions, *tables, *rows], np.int64)
        starts = range(0, 3 * len(tokens) + 1, len(tokens))
        job = self._job
        for field, start in zip((kernels.TOKENS, kernels.POSITIONS, kernels.TABLES, kernels.ROWS), starts, strict=True):
            job[field] = numbers.ctypes.data + start * numbers.itemsize
        job[kernels.NUM_TOKENS], job[kernels.NUM_ROWS] = len(tokens), len(rows)
        job[kernels.RESULT] = result.data_ptr()
        self._counters[:] = 0
        self._make_room(max(len(tokens), len(rows)))
        run_in_team(self._function, job.ctypes.data, self._num_threads)
        return result if self._num_columns == self._row_width else result[:, : self._num_columns].contiguous()

    def _can_write(self, room: Tensor | None, num_rows: int) -> TypeGuard[Tensor]:
        """Whether so many rows can be written to some memory as they are."""
        return (
            room is not None
            and room.shape == (num_rows, self._row_width)
            and self._num_columns == self._row_width
            and room.dtype == torch.float32
            and room.is_contiguous()
        )

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy keys and values between blocks; see `ForwardPass`."""
        for source, target, start, stop in copies:
            self._keys[:, target, ..., start:stop] = self._keys[:, source, ..., start:stop]
            self._values[:, target, :, start:stop] = self._values[:, source, :, start:stop]

    def _make_room(self, num_rows: int) -> None:
        """Give each of a pass's intermediate results a place; the largest pass decides how much there is."""
        if self._workspace.numel() < num_rows * sum(self._widths.values()):
            self._workspace = torch.empty(num_rows * sum(self._widths.values()))
        address = self._workspace.data_ptr()
        for field, width in self._widths.items():
            self._job[field] = address
            address += num_rows * width * self._workspace.itemsize

    def _describe(self, layer: Any, window: int | None, number: int, zeros: Tensor) -> Any:
        """Return a layer's row in the table of layers; its products give up their weights."""
        attention, inner = layer.self_attn, layer.mlp
        heads = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_and_up = [inner.gate_proj, inner.up_proj]
        row = self._table(
            kernels.NUM_LAYER_FIELDS,
            {
                kernels.ATTENTION_NORM: layer.input_layernorm.weight,
                kernels.HEADS_PRODUCT: panels([product.weight for product in heads]),
                kernels.HEADS_BIAS: zeros if heads[0].bias is None else torch.cat([p.bias for p in heads]),
                kernels.QUERY_NORM: attention.q_norm.weight if hasattr(attention, "q_norm") else 0,
                kernels.KEY_NORM: attention.k_norm.weight if hasattr(attention, "k_norm") else 0,
                kernels.KEYS: self._keys[number],
                kernels.VALUES: self._values[number],
                kernels.WINDOW: _UNLIMITED if window is None else window,
                kernels.ATTENDED_PRODUCT: panels([attention.o_proj.weight]),
                kernels.INNER_NORM: layer.post_attention_layernorm.weight,
                kernels.INNER_PRODUCT: panels([product.weight for product in gate_and_up]),
                kernels.GATED_PRODUCT: panels([inner.down_proj.weight]),
            },
        )
        for product in (*heads, attention.o_proj, *gate_and_up, inner.down_proj):
            product.weight = None
        return row

    def _table(self, num_fields: int, entries: Mapping[int, Tensor | int]) -> Any:
        """Return a table of numbers and of tensors' addresses; the tensors are held from now on."""
        table = np.zeros(num_fields, np.int64)
        for field, entry in entries.items():
            if isinstance(entry, Tensor):
                entry = entry.detach().contiguous()
                self._held.append(entry)
                entry = entry.data_ptr()
            table[field] = entry
        return table


def fits(model: Any, layers: Mapping[nn.Module, Layer]) -> bool:
    """Return whether a model can be computed by a `CompiledPass`."""
    if not kernels.IS_FAST or not has_team() or not is_known(model):
        return False
    config, rotary = model.config, model.model.rotary_emb
    products = [model.lm_head]
    for layer in model.model.layers:
        products += [layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    widths = {config.hidden_size, config.intermediate_size, *(layer.key_width for layer in layers.values())}
    return (
        config.hidden_act == "silu"
        and rotary.rope_type not in ("dynamic", "longrope")
        and 2 * len(rotary.inv_freq) == model.model.layers[0].self_attn.head_dim
        and all(product.bias is None for product in products)
        and all(width % BLOCK_SIZE == 0 for width in widths)
    )


def is_known(model: PreTrainedModel) -> bool:
    """Return whether a model is of a class that is known, on a processor and in float32, with nothing put into it."""
    return (
        type(model).__name__ in _MODELS
        and model.device.type == "cpu"
        and model.dtype == torch.float32
        and all(type(module).__module__.startswith(("transformers.", "torch.nn.")) for module in model.modules())
        and all(type(weight.data) is Tensor and weight.dtype == torch.float32 for weight in model.parameters())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    )
