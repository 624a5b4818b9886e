"""Sequences open, step, roll back and close without touching one another, and mistakes change nothing."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine import Engine, Work
from actors.engine.passes.compiled.decoder import CompiledPass
from actors.engine.passes.transformers import TransformersPass
from cluster.errors import EngineError
from tests import tiny

MAX_CONTEXT = 32


@pytest.fixture(scope="module")
def shared_engine() -> Engine:
    return Engine(tiny.llama(), max_sequences=3, max_context=MAX_CONTEXT)


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    """An engine whose sequences one, two and three are not open."""
    for sequence in ("one", "two", "three"):
        try:
            shared_engine.close(sequence)
        except EngineError:
            continue
    return shared_engine


def fill(engine: Engine, sequence: str, tokens: Sequence[int]) -> Tensor:
    """Open a sequence, and return the logits of its last token."""
    engine.open(sequence)
    return engine.step([Work(sequence, tokens, [len(tokens) - 1])])


def test_rows_come_in_the_order_of_the_work_and_of_its_rows(engine: Engine) -> None:
    for sequence in ("one", "two", "three"):
        engine.open(sequence)
    rows = engine.step([Work("three", [7, 8, 9], [2, 0, 2]), Work("one", [7, 8], []), Work("two", [7], [0])])
    assert rows.shape == (4, engine.vocabulary_size)
    torch.testing.assert_close(rows[0], rows[2])
    torch.testing.assert_close(rows[1], rows[3])
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


def test_a_step_without_work_or_rows_gives_no_rows(engine: Engine) -> None:
    assert engine.step([]).shape == (0, engine.vocabulary_size)
    engine.open("one")
    assert engine.step([Work("one", [4], [])]).shape == (0, engine.vocabulary_size)
    assert engine.length("one") == 1


def test_a_sequence_goes_on_from_where_it_was_rolled_back_to(engine: Engine) -> None:
    expected = fill(engine, "one", [1, 2, 3, 4])
    fill(engine, "two", [1, 2, 9, 9, 9, 9])
    engine.truncate("two", 2)
    assert engine.length("two") == 2
    torch.testing.assert_close(engine.step([Work("two", [3, 4], [1])]), expected, atol=1e-5, rtol=0)
    engine.truncate("two", 0)
    torch.testing.assert_close(engine.step([Work("two", [1, 2, 3, 4], [3])]), expected, atol=1e-5, rtol=0)


def test_a_sequence_may_fill_its_context_to_the_last_token(engine: Engine) -> None:
    fill(engine, "one", [3] * (MAX_CONTEXT - 1))
    engine.step([Work("one", [3], [0])])
    assert engine.length("one") == MAX_CONTEXT


@pytest.mark.parametrize("build", [partial(tiny.llama, head_dim=16), tiny.gemma], ids=["compiled", "transformers"])
def test_a_reused_block_keeps_nothing_of_what_lay_in_it(build: Callable[..., PreTrainedModel]) -> None:
    model = build()
    own = copy.deepcopy(model)
    embedding = own.get_input_embeddings()
    engine = Engine(own, max_sequences=2, max_context=MAX_CONTEXT)
    poison = 11
    assert isinstance(embedding.weight, Tensor)
    embedding.weight[poison] = torch.nan
    assert fill(engine, "bad", [1, 2] + [poison] * 8).isnan().any()
    engine.truncate("bad", 1)
    engine.close("bad")
    # Side by side with a longer sequence, so that the short one's empty positions are read and masked.
    prompts = {"short": [5, 6, 7, 8, 9], "long": [1, 2, 3, 4, 5, 6, 7, 8]}
    for sequence, tokens in prompts.items():
        fill(engine, sequence, tokens)
    rows = engine.step([Work(sequence, [4], [0]) for sequence in prompts])
    for row, tokens in zip(rows, prompts.values(), strict=True):
        expected = model(torch.tensor([[*tokens, 4]])).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("build", [partial(tiny.llama, head_dim=16), tiny.gemma], ids=["compiled", "transformers"])
def test_the_cache_is_allocated_once(build: Callable[..., PreTrainedModel]) -> None:
    engine = Engine(build(), max_sequences=3, max_context=MAX_CONTEXT)

    def addresses() -> list[int]:
        forward = engine._forward_pass
        if isinstance(forward, CompiledPass):
            return [tensor.data_ptr() for tensor in (*forward._keys, *forward._values)]
        assert isinstance(forward, TransformersPass)
        return [tensor.data_ptr() for cache in forward._caches.values() for tensor in (cache.keys, cache.values)]

    before = addresses()
    fill(engine, "one", list(range(20)))
    engine.truncate("one", 3)
    engine.close("one")
    fill(engine, "two", list(range(30)))
    assert addresses() == before
    assert len(set(before)) == 2 * 3


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ([Work("two", [1], [0]), Work("nobody", [1], [0])], "'nobody' is not open"),
        ([Work("two", [1], [0]), Work("one", [1], []), Work("two", [2], [])], "'two' comes twice"),
        ([Work("two", [1], [0]), Work("one", [], [])], "'one' comes without tokens"),
        (
            [Work("two", [1], [0]), Work("one", [1] * 30, [])],
            "holds 3 tokens and cannot take 30 more: 33 .* limit of 32",
        ),
        ([Work("two", [1], [0]), Work("one", [97], [])], "token id 97 is outside .* from 0 to 96"),
        ([Work("two", [1], [0]), Work("one", [-1], [])], "token id -1 is outside"),
        ([Work("two", [1], [0]), Work("one", [1, 2], [2])], "row 2 is outside its 2 tokens"),
        ([Work("two", [1], [0]), Work("one", [1, 2], [-1])], "row -1 is outside its 2 tokens"),
    ],
)
def test_a_refused_step_says_why_and_changes_nothing(engine: Engine, work: list[Work], message: str) -> None:
    fill(engine, "one", [1, 2, 3])
    fill(engine, "two", [4, 5])
    with pytest.raises(EngineError, match=message):
        engine.step(work)
    assert (engine.length("one"), engine.length("two")) == (3, 2)
    row = engine.step([Work("two", [6], [0])])
    torch.testing.assert_close(row, fill(engine, "three", [4, 5, 6]), atol=1e-5, rtol=0)


def test_a_step_that_fails_within_the_model_changes_nothing() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    model = tiny.gemma()
    engine = Engine(model, max_sequences=2, max_context=MAX_CONTEXT)
    fill(engine, "one", [1, 2, 3])
    last_layer = model.get_submodule("model.layers.2")
    hook = last_layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step([Work("one", [9, 9, 9], [0])])
    hook.remove()
    assert engine.length("one") == 3
    row = engine.step([Work("one", [4], [0])])
    torch.testing.assert_close(row, fill(engine, "two", [1, 2, 3, 4]), atol=1e-5, rtol=0)


def test_opening_takes_a_place_and_refuses_what_cannot_be(engine: Engine) -> None:
    engine.open("one")
    assert engine.length("one") == 0
    with pytest.raises(EngineError, match="'one' is open already"):
        engine.open("one")
    engine.open("two")
    with pytest.raises(EngineError, match="33 are past the limit of 32"):
        engine.reuse("two", [1] * 33)
    with pytest.raises(EngineError, match="token id 1000 is outside"):
        engine.reuse("two", [1000])
    engine.open("three")
    with pytest.raises(EngineError, match="all 3 sequences are in use"):
        engine.open("four")
    engine.close("two")
    engine.open("four")
    engine.close("four")


def test_rolling_back_and_closing_refuse_what_cannot_be(engine: Engine) -> None:
    fill(engine, "one", [1, 2, 3])
    for length in (4, -1):
        with pytest.raises(EngineError, match=f"rolled back to {length} tokens: it holds 3"):
            engine.truncate("one", length)
    assert engine.length("one") == 3
    engine.close("one")
    for act in (engine.close, engine.length, lambda sequence: engine.truncate(sequence, 0)):
        with pytest.raises(EngineError, match="'one' is not open"):
            act("one")
