"""The compiled pass computes what the model computes, and each token alike whatever is computed beside it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from actors.engine import Engine, Work
from actors.engine.passes.compiled.decoder import CompiledPass
from actors.engine.passes.transformers import TransformersPass
from tests import tiny

NUM_TOKENS = 75  # more than four blocks, and an odd end
TOKENS = [(5 + 11 * i) % tiny.VOCABULARY_SIZE for i in range(NUM_TOKENS)]

# Every kind of layer that the pass knows, and sizes that do not fit its tiles.
MODELS: dict[str, tuple[Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "llama": (tiny.llama, {}),
    "one head of keys": (tiny.llama, {"num_key_value_heads": 1}),
    "a head of keys for each query": (tiny.llama, {"num_key_value_heads": 4}),
    "ten queries to a head of keys": (
        tiny.llama,
        {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 1},
    ),
    "wide heads": (tiny.llama, {"head_dim": 80}),
    "tied": (tiny.llama, {"tie_word_embeddings": True}),
    "scaled positions": (
        tiny.llama,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama 3 positions": (
        tiny.llama,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "large epsilon": (tiny.llama, {"rms_norm_eps": 1e-1}),
    "sliding window": (tiny.mistral, {}),
    "biases": (tiny.qwen2, {}),
    "norms of heads": (tiny.qwen3, {"rms_norm_eps": 1e-1}),
}


def build_model(name: str) -> PreTrainedModel:
    build, settings = MODELS[name]
    return build(**{"head_dim": 16, **settings})


def compiled_engine(model: PreTrainedModel, **options: Any) -> Engine:
    engine = Engine(model, max_sequences=20, max_context=100, **options)
    assert isinstance(engine._forward_pass, CompiledPass)
    return engine


def rows_in_chunks(engine: Engine, tokens: Sequence[int], sizes: Iterator[int]) -> Tensor:
    """All rows of a new sequence that is sent in chunks."""
    name = f"sequence {engine.counters.num_computed_tokens}"
    engine.open(name)
    rows, start = [], 0
    while start < len(tokens):
        chunk = tokens[start : start + next(sizes)]
        rows.append(engine.step([Work(name, chunk, range(len(chunk)))]))
        start += len(chunk)
    engine.close(name)
    return torch.cat(rows)


def cycle(*sizes: int) -> Iterator[int]:
    while True:
        yield from sizes


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str) -> None:
    model = build_model(name)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    rows = rows_in_chunks(compiled_engine(copy.deepcopy(model)), TOKENS, cycle(16, 1, 7))
    torch.testing.assert_close(rows, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["llama", "sliding window", "norms of heads"])
def test_hidden_states_are_those_of_the_model(name: str) -> None:
    model = build_model(name)
    with torch.inference_mode():
        expected = model.base_model(torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0]
    rows = rows_in_chunks(compiled_engine(copy.deepcopy(model), rows="hidden_states"), TOKENS, cycle(30, 1))
    torch.testing.assert_close(rows, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


@pytest.fixture(params=["llama", "sliding window", "wide heads"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return compiled_engine(build_model(request.param))


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (17,), (64,)])
def test_chunks_change_no_bit(engine: Engine, sizes: tuple[int, ...]) -> None:
    whole = rows_in_chunks(engine, TOKENS, cycle(NUM_TOKENS))
    assert torch.equal(rows_in_chunks(engine, TOKENS, cycle(*sizes)), whole)


@pytest.mark.parametrize("num_others", [1, 2, 6, 7, 15, 19])
def test_other_sequences_change_no_bit(engine: Engine, num_others: int) -> None:
    alone = rows_in_chunks(engine, TOKENS, cycle(1))
    names = [f"other {i}" for i in range(num_others)]
    for i, name in enumerate(names):
        engine.open(name)
        engine.step([Work(name, TOKENS[i : 2 * i + 1], ())])
    engine.open("watched")
    for position, token in enumerate(TOKENS[:30]):
        others = [Work(name, [token], [0]) for name in names]
        place = position % (num_others + 1)
        rows = engine.step([*others[:place], Work("watched", [token], [0]), *others[place:]])
        assert torch.equal(rows[place], alone[position])


def test_the_number_of_threads_changes_no_bit() -> None:
    rows, num_threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            rows.append(rows_in_chunks(compiled_engine(tiny.llama(head_dim=16)), TOKENS, cycle(9, 1)))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_shared_beginnings_change_no_bit(engine: Engine) -> None:
    whole = rows_in_chunks(engine, TOKENS, cycle(NUM_TOKENS))
    engine.open("again")
    num_reused = engine.reuse("again", [*TOKENS[:40], 1])
    assert num_reused == 40
    assert torch.equal(engine.step([Work("again", TOKENS[40:], range(NUM_TOKENS - 40))]), whole[40:])


class BoundedNorm(modeling_llama.LlamaRMSNorm):
    """Differs from an RMS norm for large inputs only."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.clamp(-100, 100))


def with_bounded_norms() -> PreTrainedModel:
    model = tiny.llama(head_dim=16)
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.__class__ = BoundedNorm
    return model


def with_a_hook() -> PreTrainedModel:
    model = tiny.llama(head_dim=16)
    model.base_model.layers[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "build",
    [
        tiny.gemma,
        with_bounded_norms,
        with_a_hook,
        lambda: tiny.llama(head_dim=16).to(torch.bfloat16),
        lambda: tiny.llama(head_dim=16, attention_bias=True),
        lambda: tiny.llama(head_dim=16, mlp_bias=True),
        lambda: tiny.llama(head_dim=16, hidden_act="relu"),
        lambda: tiny.llama(head_dim=8),
        lambda: tiny.llama(head_dim=16, intermediate_size=50),
        lambda: tiny.llama(head_dim=16, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
    ids=[
        "another family",
        "norms of another kind",
        "a hook",
        "another type",
        "a bias after attention",
        "biases between",
        "another activation",
        "narrow heads",
        "odd widths",
        "positions that depend on the length",
    ],
)
def test_what_the_pass_does_not_know_runs_through_transformers(build: Callable[[], PreTrainedModel]) -> None:
    engine = Engine(build(), max_sequences=2, max_context=64)
    assert isinstance(engine._forward_pass, TransformersPass)


def test_a_model_gives_its_weights_up() -> None:
    model = tiny.llama(head_dim=16, tie_word_embeddings=True)
    compiled_engine(model)
    left = {name.split(".")[-2] for name, weight in model.named_parameters() if weight.dim() == 2}
    assert left == {"embed_tokens"}


def test_a_step_without_rows_gives_none(engine: Engine) -> None:
    engine.open("one")
    assert engine.step([Work("one", TOKENS[:5], ())]).shape == (0, tiny.VOCABULARY_SIZE)
    assert engine.length("one") == 5


def test_not_a_number_stays_visible() -> None:
    model = tiny.llama(head_dim=16)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, Tensor)
    engine = compiled_engine(model)
    embedding.weight[TOKENS[0]] = torch.nan
    assert rows_in_chunks(engine, TOKENS[:3], cycle(3)).isnan().all()
