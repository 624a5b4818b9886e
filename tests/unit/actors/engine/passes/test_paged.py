"""The pass for GPUs: attention over blocks, recorded steps, and all of a model.

Where there is a GPU they run there; elsewhere Triton interprets the kernels, and steps are computed again instead of
being replayed.

Shapes: N tokens, H query heads, K key-value heads, D key width, E value width, P positions of the cache.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine import Engine, Work
from actors.engine import engine as engine_module
from actors.engine.blocks import BLOCK_SIZE
from actors.engine.models.inspection import Layer, inspect_model
from actors.engine.passes import forward
from actors.engine.passes.cache import LayerCache
from actors.engine.work import PlacedWork
from tests import tiny

pytest.importorskip("triton")
from actors.engine.passes.paged import attention, decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_BLOCKS = 40
MAX_CONTEXT = 48


@pytest.fixture(autouse=True)
def less_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted program takes milliseconds."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(decoder, "NUM_SPLITS", 3)
        monkeypatch.setattr(decoder, "_NUM_WARM_UPS", 0)


@dataclass
class Case:
    """A layer, and sequences that attend in it."""

    num_heads: int = 4
    num_key_heads: int = 2
    key_width: int = 16
    value_width: int = 16
    window: int | None = None
    cap: float | None = None
    scaling: float | None = None
    dtype: torch.dtype = torch.float32
    sequences: Sequence[tuple[int, int]] = ((0, 20), (37, 1), (0, 1), (16, 1), (15, 5), (130, 1), (100, 17))
    """Tokens that each holds, and that come."""

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.sequences)


CASES = {
    "grouped queries": Case(),
    "a head of keys for each query": Case(num_key_heads=4),
    "one head of keys, seven queries": Case(num_heads=7, num_key_heads=1),
    "three queries to a head of keys": Case(num_heads=9, num_key_heads=3),
    "widths that are no powers of two": Case(key_width=24, value_width=40),
    "wide heads": Case(key_width=256, value_width=256, num_heads=2, num_key_heads=1),
    "a window": Case(window=21),
    "a window of one": Case(window=1),
    "capped scores, own scaling": Case(cap=1.5, scaling=0.9),
    "float16": Case(dtype=torch.float16, key_width=32),
    "bfloat16": Case(dtype=torch.bfloat16, key_width=32, window=50),
}


@dataclass
class Run:
    """What attention was asked for, and what it gave."""

    query_HND: Tensor
    keys_KPD: Sequence[Tensor]
    """Of each sequence."""

    values_KPE: Sequence[Tensor]
    output_NHE: Tensor


def run(case: Case, order: Sequence[int] | None = None) -> Run:
    """Attend with random numbers, which are each sequence's own whatever the order of the sequences."""
    order = range(len(case.sequences)) if order is None else order
    cache = LayerCache.allocate(
        Layer(case.num_key_heads, case.key_width, case.value_width, case.dtype, DEVICE, case.window),
        NUM_BLOCKS * BLOCK_SIZE,
    )
    # Nothing but a sequence's own tokens may be read.
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    free = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(len(order))).add(1).tolist()
    work, queries, keys, values = [], [], [], []
    for index in order:
        length, num_tokens = case.sequences[index]
        generator = torch.Generator().manual_seed(index)

        def numbers(heads: int, tokens: int, width: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(heads, tokens, width, generator=generator).to(DEVICE, case.dtype)

        queries.append(numbers(case.num_heads, num_tokens, case.key_width))
        keys.append(numbers(case.num_key_heads, length + num_tokens, case.key_width))
        values.append(numbers(case.num_key_heads, length + num_tokens, case.value_width))
        blocks = [free.pop() for _ in range(-(-(length + num_tokens) // BLOCK_SIZE))]
        work.append(PlacedWork(Work(str(index), [0] * num_tokens, []), blocks, length))
        held = work[-1].places[:length].to(DEVICE)
        cache.write(keys[-1][None, :, :length], values[-1][None, :, :length], held)
    group = case.num_heads // case.num_key_heads
    most = attention.tile_tokens(group=group, width=case.key_width, itemsize=case.dtype.itemsize)
    inputs, _ = decoder.lay_out(work, most, DEVICE)
    layer = nn.Identity()
    new_keys, new_values = (
        torch.cat([held[:, placed.length :] for held, placed in zip(parts, work, strict=True)], 1)
        for parts in (keys, values)
    )
    query_HND = torch.cat(queries, 1)
    options = {"scaling": case.scaling, **({} if case.cap is None else {"softcap": case.cap})}
    output = attention.PagedAttention({layer: cache}, inputs).attend(
        layer, query_HND[None], new_keys[None], new_values[None], None, options
    )
    return Run(query_HND, keys, values, output[0])


def expected(case: Case, result: Run) -> Tensor:
    """Attention as it is defined, in float64, [N, H, E]."""
    outputs, first = [], 0
    for (length, num_tokens), keys, values in zip(case.sequences, result.keys_KPD, result.values_KPE, strict=True):
        query = result.query_HND[:, first : first + num_tokens].double()
        first += num_tokens
        keys, values = (
            part.double().repeat_interleave(case.num_heads // case.num_key_heads, 0) for part in (keys, values)
        )
        scores = query @ keys.transpose(1, 2) * (case.key_width**-0.5 if case.scaling is None else case.scaling)
        if case.cap is not None:
            scores = case.cap * torch.tanh(scores / case.cap)
        tokens_T, keys_P = (torch.arange(n, device=DEVICE) for n in (num_tokens, length + num_tokens))
        queries_T1 = length + tokens_T[:, None]
        is_seen = keys_P <= queries_T1
        if case.window is not None:
            is_seen &= keys_P > queries_T1 - case.window
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                case.dtype == torch.bfloat16 and DEVICE.type == "cpu",
                reason="Triton's interpreter multiplies the bits of bfloat16 as integers",
            ),
        )
        for name, case in CASES.items()
    ],
)
def test_attention_over_blocks_is_attention(name: str) -> None:
    case = CASES[name]
    result = run(case)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.dtype]
    assert result.output_NHE.shape == (case.num_tokens, case.num_heads, case.value_width)
    torch.testing.assert_close(result.output_NHE.double(), expected(case, result), atol=tolerance, rtol=0)


@pytest.mark.parametrize("index", range(len(Case.sequences)))
def test_what_is_beside_a_sequence_changes_no_bit_of_its_attention(index: int) -> None:
    case = CASES["grouped queries"]
    alone, together = run(case, [index]).output_NHE, run(case).output_NHE
    first = sum(num_tokens for _, num_tokens in case.sequences[:index])
    assert torch.equal(together[first : first + len(alone)], alone)


def allocate(layers: Mapping[nn.Module, Layer], num_blocks: int) -> dict[nn.Module, LayerCache]:
    return {module: LayerCache.allocate(layer, num_blocks * BLOCK_SIZE) for module, layer in layers.items()}


def paged_engine(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, **options: Any) -> Engine:
    """An engine that computes as one on a GPU does."""

    def make(model: PreTrainedModel, layers: Mapping[nn.Module, Layer], *, num_blocks: int, **limits: Any) -> Any:
        return decoder.PagedPass(model, allocate(layers, num_blocks), **limits)

    monkeypatch.setattr("actors.engine.engine.make_forward_pass", make)
    return Engine(model.to(DEVICE), **{"max_sequences": 5, "max_context": MAX_CONTEXT, **options})


def own_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "granite"])
def test_prompts_and_single_tokens_together_give_the_models_own_logits(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    model = tiny.ARCHITECTURES[architecture](attn_implementation="eager")
    engine = paged_engine(monkeypatch, copy.deepcopy(model), max_sequences=3)
    prompts = {
        name: [(7 * i + shift) % 90 for i in range(n)] for name, n, shift in [("a", 19, 1), ("b", 3, 2), ("c", 33, 3)]
    }
    held: dict[str, list[int]] = {name: [] for name in prompts}

    def check(work: Sequence[Work]) -> None:
        rows = engine.step(work)
        wanted = []
        for item in work:
            held[item.sequence] += item.tokens
            start = len(held[item.sequence]) - len(item.tokens)
            wanted.append(own_logits(model, held[item.sequence])[[start + row for row in item.rows]])
        torch.testing.assert_close(rows, torch.cat(wanted), atol=1e-4, rtol=0)

    for name in prompts:
        engine.open(name)
    check([Work("a", prompts["a"], [0, 18])])
    check([Work("a", [5], [0]), Work("b", prompts["b"], [2]), Work("c", prompts["c"][:18], [])])
    check([Work("c", prompts["c"][18:], range(15)), Work("b", [6], [0]), Work("a", [6], [])])
    check([Work("b", [7], [0]), Work("a", [8], [0]), Work("c", [9], [0])])
    check([Work("c", [3], [0]), Work("a", [2], []), Work("b", [1], [0])])
    check([Work("a", [4], [0])])


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.llama(attn_implementation="eager")


def test_graphs_are_recorded_for_powers_of_two_up_to_the_most_sequences(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    engine = paged_engine(monkeypatch, model)
    assert engine.description.endswith("attention over blocks, graphs of 1, 2, 4, 8 sequences")


def test_more_sequences_than_the_largest_graph_takes_give_the_same(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    def rows(most: int) -> Tensor:
        monkeypatch.setattr(decoder, "MAX_RECORDED", most)
        engine = paged_engine(monkeypatch, copy.deepcopy(model))
        for i in range(5):
            engine.open(str(i))
            engine.step([Work(str(i), range(1, 12 - i), [])])
        return engine.step([Work(str(i), [20 + i], [0]) for i in range(5)])

    torch.testing.assert_close(rows(2), rows(8), atol=1e-4, rtol=0)


def test_a_beginning_that_is_shared_is_copied_into_the_own_block(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    engine = paged_engine(monkeypatch, copy.deepcopy(model))
    engine.open("first")
    engine.step([Work("first", range(1, 25), [])])
    engine.open("second")
    assert engine.reuse("second", [*range(1, 21), 60, 61]) == 20
    rows = engine.step([Work("second", [60], [0]), Work("first", [30], [0])])
    wanted = [own_logits(model, [*range(1, 21), 60])[-1], own_logits(model, [*range(1, 25), 30])[-1]]
    torch.testing.assert_close(rows, torch.stack(wanted), atol=1e-4, rtol=0)


def test_hidden_states_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    engine = paged_engine(monkeypatch, copy.deepcopy(model), rows="hidden_states")
    engine.open("it")
    engine.step([Work("it", range(1, 20), [])])
    with torch.inference_mode():
        wanted = model.base_model(torch.tensor([[*range(1, 21)]]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(engine.step([Work("it", [20], [0])]), wanted[-1:], atol=1e-4, rtol=0)


def test_rows_that_are_asked_for_twice_or_not_at_all_come_as_often(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    engine = paged_engine(monkeypatch, copy.deepcopy(model))
    for name in ("a", "b", "c"):
        engine.open(name)
    rows = engine.step([Work("a", [5], [0, 0]), Work("b", [6], []), Work("c", [7], [0])])
    wanted = [own_logits(model, [token])[0] for token in (5, 5, 7)]
    torch.testing.assert_close(rows, torch.stack(wanted), atol=1e-4, rtol=0)


def test_more_room_than_the_context_can_be_reserved(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    engine = paged_engine(monkeypatch, copy.deepcopy(model), cache_tokens=200)
    engine.open("it")
    assert engine.reserve("it", 100)
    torch.testing.assert_close(engine.step([Work("it", [20], [0])]), own_logits(model, [20]), atol=1e-4, rtol=0)


def test_where_the_kernels_do_not_run_the_engine_goes_on_without_them(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(query_HND: Tensor, cache: LayerCache, *_: object) -> None:
        assert cache.keys.any()
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(attention, "_launch", fail)
    caches = allocate(inspect_model(model.to(DEVICE), 8).layers, 2)
    assert forward._paged_pass(model, caches, max_sequences=2, max_context=8, gives_hidden_states=False) is None
    assert "is slower: RuntimeError: Failed to find C compiler" in caplog.text
    # Attempts leave nothing behind.
    assert not any(cache.keys.any() or cache.values.any() for cache in caches.values())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 7), torch.float32), ((1, 7), torch.float32), ((2, 7), torch.float16)]
)
def test_rows_go_into_the_room_if_they_fit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, room = torch.randn(2, 7, device=DEVICE), torch.zeros(shape, dtype=dtype)
    brought = engine_module._bring(rows, room)
    assert brought.device.type == "cpu"
    assert torch.equal(brought, rows.cpu())
    assert (brought is room) == (shape == (2, 7) and dtype == torch.float32)


def test_a_model_that_cannot_be_recorded_is_run_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoder, "DecodeGraph", refuse)
    engine = paged_engine(monkeypatch, copy.deepcopy(model))
    assert "cannot be recorded: operation not permitted" in caplog.text
    assert engine.description.endswith("no graphs")
    engine.open("it")
    torch.testing.assert_close(engine.step([Work("it", [20], [0])]), own_logits(model, [20]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_and_fit_their_shared_memory(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.actors.engine.passes.compile_kernels", str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # What a program may use on the smallest of these GPUs (compute capability 8.6).
    assert max(int(line.split()[-1]) for line in run.stdout.splitlines()) <= 99 * 1024
