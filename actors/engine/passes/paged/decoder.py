"""A pass on a GPU: transformers' modules, attention over blocks, and steps of one token each as recorded graphs.

A graph replays the kernels of a whole step with one call; launched one by one from Python, a step's hundreds of small
kernels take longer than the GPU needs for them. Graphs have fixed shapes, so there is one for each of a few numbers
of sequences, and what is left of it computes a token that nobody reads, in the block that is nobody's.

Shapes: N tokens of a step, R asked rows, S sequences, W blocks of the longest of them, U tiles.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from actors.engine.blocks import BLOCK_SIZE, Copy
from actors.engine.models.attention import attending
from actors.engine.passes.cache import LayerCache, copy_blocks
from actors.engine.passes.paged.attention import NUM_SPLITS, PagedAttention, StepInputs, Tiles, tile_tokens
from actors.engine.work import PlacedWork, Work

MAX_RECORDED = 256
"""Sequences of the largest graph; larger steps are launched kernel by kernel."""

_NUM_WARM_UPS = 1
"""Passes before a graph is recorded: libraries choose and load their kernels in the first ones."""

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]


class PagedPass:
    """A pass through transformers' own modules on a GPU: for any architecture and dtype."""

    def __init__(
        self,
        model: PreTrainedModel,
        caches: Mapping[nn.Module, LayerCache],
        *,
        max_sequences: int,
        max_context: int,
        gives_hidden_states: bool,
    ) -> None:
        """Take a model over, try its kernels, and record its graphs.

        Raises whatever a driver, a compiler or the model has against it.

        Args:
            model: not to be used by anyone else from now on.
            caches: of its attention modules.
            max_sequences: of a step.
            max_context: positions of a sequence.
            gives_hidden_states: whether rows are the last hidden states, and not logits.
        """
        self._model = model
        self._caches = caches
        self._gives_hidden_states = gives_hidden_states
        num_ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        num_heads = model.config.get_text_config(decoder=True).num_attention_heads // num_ranks
        self._tile_tokens = min(
            tile_tokens(group=num_heads // num_key_heads, width=width, itemsize=cache.keys.itemsize)
            for cache in caches.values()
            for _, num_key_heads, width in [cache.keys.shape]
        )
        # In four dimensions transformers takes it for a mask that is made already, and looks at no values.
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)
        self._graphs: list[DecodeGraph] = []
        self._try(max_context)
        # Ranks start their kernels one by one: their collectives would be recorded too, which was never tried.
        if num_ranks == 1:
            self._graphs = self._record(max_sequences, max_context)

    @torch.inference_mode()
    def _try(self, max_context: int) -> None:
        """Compute one token and then several, in the block that is nobody's."""
        for num_tokens in (1, min(BLOCK_SIZE, max_context)):
            self.run([PlacedWork(Work("", [0] * num_tokens, [0]), [0], 0)])
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def _record(self, max_sequences: int, max_context: int) -> list["DecodeGraph"]:
        """Record a graph for each power of two up to the most sequences, the largest first."""
        sizes = [1 << power for power in range((min(max_sequences, MAX_RECORDED) - 1).bit_length() + 1)]
        graphs: list[DecodeGraph] = []
        pool = torch.cuda.graph_pool_handle() if self._model.device.type == "cuda" else None
        try:
            for size in reversed(sizes):
                inputs = DecodeInputs(size, max_context, self._model.device)
                graphs.insert(0, DecodeGraph(inputs, lambda inputs: self._compute(inputs, None), pool))
        except RuntimeError as error:
            # A model that decides on the processor what the GPU does next, such as many mixtures of experts.
            logger.warning("decode steps are launched kernel by kernel: they cannot be recorded: %s", error)
            return []
        return graphs

    @property
    def description(self) -> str:
        """How it computes."""
        steps = (
            f"graphs of {', '.join(str(graph.size) for graph in self._graphs)} sequences"
            if self._graphs
            else "no graphs"
        )
        return f"transformers' modules, attention over blocks, {steps}"

    def run(self, work: Sequence[PlacedWork], room: Tensor | None = None) -> Tensor:
        """Append tokens and return the asked rows, which the next pass may overwrite; see `ForwardPass`."""
        if all(placed.num_tokens == 1 for placed in work):
            for graph in self._graphs:
                if graph.size >= len(work):
                    rows = graph.run(work)
                    asked = [index for index, placed in enumerate(work) for _ in placed.work.rows]
                    return rows[: len(work)] if asked == list(range(len(work))) else rows[asked]
        return self._compute(*lay_out(work, self._tile_tokens, self._model.device))

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy keys and values between blocks; see `ForwardPass`."""
        copy_blocks(self._caches.values(), copies, self._model.device)

    def _compute(self, inputs: StepInputs, rows_R: Tensor | None) -> Tensor:
        """Return the given rows of a step, or all."""
        arguments: dict[str, Any] = {
            "input_ids": inputs.tokens_N[None],
            "position_ids": inputs.positions_N[None],
            "attention_mask": self._mask,
            "use_cache": False,
        }
        with attending(PagedAttention(self._caches, inputs)):
            if self._gives_hidden_states:
                hidden: Tensor = self._model.base_model(**arguments).last_hidden_state[0]
                return hidden if rows_R is None else hidden[rows_R]
            # 0 stands for all of them.
            logits: Tensor = self._model(**arguments, logits_to_keep=0 if rows_R is None else rows_R).logits[0]
            return logits


class DecodeInputs:
    """Inputs of a step in which each of a fixed number of sequences takes one token, in memory of their own."""

    def __init__(self, size: int, max_context: int, device: torch.device) -> None:
        # Tokens, positions, places, and from then on the blocks: what a step needs lies together at the beginning.
        self._memory = torch.zeros(3 + -(-max_context // BLOCK_SIZE), size, dtype=torch.int64, device=device)
        numbers = torch.arange(size, device=device)
        tiles = Tiles(torch.stack([numbers, torch.ones_like(numbers), numbers]), num_tokens=1, num_splits=NUM_SPLITS)
        tokens_N, positions_N, places_N = self._memory[:3]
        self.step = StepInputs(tokens_N, positions_N, places_N, self._memory[3:], [tiles])

    @property
    def size(self) -> int:
        """Sequences."""
        return self._memory.shape[1]

    def fill(self, work: Sequence[PlacedWork]) -> None:
        """Take a step's inputs; sequences that are missing stand at the first place of the block that is nobody's."""
        columns = np.zeros((4 + max(placed.length for placed in work) // BLOCK_SIZE, self.size), np.int64)
        for index, placed in enumerate(work):
            block, offset = divmod(placed.length, BLOCK_SIZE)
            columns[:3, index] = placed.work.tokens[0], placed.length, placed.blocks[block] * BLOCK_SIZE + offset
            # Without what is reserved for tokens to come.
            columns[3 : 4 + block, index] = placed.blocks[: block + 1]
        self._memory[: len(columns)].copy_(torch.from_numpy(columns))


class DecodeGraph:
    """A recorded step, to be replayed with other inputs. On a processor it is simply computed again."""

    def __init__(self, inputs: DecodeInputs, compute: Callable[[StepInputs], Tensor], pool: Any) -> None:
        """Record a step.

        Args:
            inputs: that the graph reads from now on.
            compute: launches the step's kernels, always the same ones, and returns all its rows.
            pool: the memory that graphs share, of which one is replayed at a time.
        """
        self._inputs = inputs
        self._compute = compute
        self._graph: torch.cuda.CUDAGraph | None = None
        if pool is not None:
            self._rows = self._record(pool)

    def _record(self, pool: Any) -> Tensor:
        for _ in range(_NUM_WARM_UPS):
            self._compute(self._inputs.step)
        stream, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        try:
            # What waits for the GPU cannot be recorded, and a recording that fails is not always cleaned up after.
            torch.cuda.set_sync_debug_mode("error")
            self._compute(self._inputs.step)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, of metrics say, may talk to the GPU meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                return self._compute(self._inputs.step)
        finally:
            torch.cuda.set_stream(stream)

    @property
    def size(self) -> int:
        """Sequences that it takes at most."""
        return self._inputs.size

    def run(self, work: Sequence[PlacedWork]) -> Tensor:
        """Return the rows of a step and of what fills it up; the next replay overwrites them."""
        self._inputs.fill(work)
        if self._graph is None:
            return self._compute(self._inputs.step)
        self._graph.replay()
        return self._rows


def lay_out(work: Sequence[PlacedWork], tile_tokens: int, device: torch.device) -> tuple[StepInputs, Tensor]:
    """Return a step's inputs on the device, which get there in one copy, and its asked rows' numbers [R].

    Args:
        work: of each sequence.
        tile_tokens: of a prompt, that attend together.
        device: where the model computes.
    """
    counts = [placed.num_tokens for placed in work]
    firsts = [0, *accumulate(counts)][:-1]
    tokens = [token for placed in work for token in placed.work.tokens]
    positions = np.concatenate([np.arange(placed.length, placed.length + placed.num_tokens) for placed in work])
    sequences = np.repeat(np.arange(len(work)), counts)
    blocks = np.zeros((max(len(placed.blocks) for placed in work), len(work)), np.int64)
    for sequence, placed in enumerate(work):
        blocks[: len(placed.blocks), sequence] = placed.blocks
    places = blocks[positions // BLOCK_SIZE, sequences] * BLOCK_SIZE + positions % BLOCK_SIZE
    rows = [first + row for first, placed in zip(firsts, work, strict=True) for row in placed.work.rows]
    single, several = _tiles(work, firsts, tile_tokens)
    parts = [np.asarray(part, np.int64) for part in (tokens, positions, places, blocks, single, several, rows)]
    memory = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(device)
    tokens_N, positions_N, places_N, blocks_WS, single_3U, several_3U, rows_R = (
        piece.view(part.shape)
        for piece, part in zip(torch.split(memory, [part.size for part in parts]), parts, strict=True)
    )
    tiles = [Tiles(single_3U, num_tokens=1, num_splits=NUM_SPLITS)] if single.size else []
    # Prompts have tiles enough to occupy the GPU.
    tiles += [Tiles(several_3U, num_tokens=tile_tokens, num_splits=1)] if several.size else []
    return StepInputs(tokens_N, positions_N, places_N, blocks_WS, tiles), rows_R


def _tiles(work: Sequence[PlacedWork], firsts: Sequence[int], tile_tokens: int) -> tuple[IntArray, IntArray]:
    """Return the tiles of sequences with one token and of those with several, [3, U] each."""
    single, several = [], []
    for sequence, (placed, first) in enumerate(zip(work, firsts, strict=True)):
        if placed.num_tokens == 1:
            single.append((first, 1, sequence))
            continue
        for start in range(0, placed.num_tokens, tile_tokens):
            several.append((first + start, min(tile_tokens, placed.num_tokens - start), sequence))
    return tuple(np.array(tiles, np.int64).reshape(-1, 3).T for tiles in (single, several))  # type: ignore[return-value]
