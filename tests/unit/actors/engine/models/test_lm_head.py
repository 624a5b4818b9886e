"""Hidden states and the output function that is sent apart from them give a model's own logits."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.cohere import CohereConfig

from actors.engine import Engine, RowKind, Work
from actors.engine.models.lm_head import FAMILIES, output_function
from cluster.errors import InvalidConfiguration
from tests import tiny

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SETTINGS: dict[str, dict[str, Any]] = {
    # Caps that the logits reach, and a head that is the embedding.
    "gemma2": {"final_logit_softcapping": 1.5},
    "gemma3": {"final_logit_softcapping": 1.5},
    "llama": {"tie_word_embeddings": True},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = tiny.ARCHITECTURES[name](**SETTINGS.get(name, {})).to(dtype)
    return model


def rows_of(model: PreTrainedModel, rows: RowKind) -> tuple[Engine, Tensor]:
    """All rows of a prompt in two chunks, and of a second sequence in the same step."""
    engine = Engine(model, max_sequences=2, max_context=16, rows=rows)
    engine.open("a")
    engine.open("b")
    first = engine.step([Work("a", PROMPT[:5], range(5))])
    return engine, torch.cat([first, engine.step([Work("a", PROMPT[5:], range(3)), Work("b", PROMPT[:2], [1])])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_hidden_states_give_the_logits_that_the_model_gives(name: str, dtype: torch.dtype) -> None:
    _, expected = rows_of(build(name, dtype), "logits")
    engine, hidden = rows_of(build(name, dtype), "hidden_states")
    assert engine.output is not None
    assert engine.row_width == hidden.shape[1] == 32
    assert engine.vocabulary_size == tiny.VOCABULARY_SIZE
    logits = engine.output(hidden)
    assert logits.dtype == hidden.dtype == expected.dtype == dtype
    # The same products; what differs is in how many rows they run.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] * float(expected.float().abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_every_known_family_is_tested() -> None:
    assert {build().config.model_type for build in tiny.ARCHITECTURES.values()} == FAMILIES


def test_a_capped_head_is_capped() -> None:
    _, hidden = rows_of(build("gemma2"), "hidden_states")
    model = build("gemma2")
    model.config.final_logit_softcapping = None
    uncapped = model.get_output_embeddings()(hidden)
    assert uncapped.abs().max() > 3
    assert output_function(build("gemma2"))(hidden).abs().max() <= 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "granite", "phi"])
def test_an_output_function_travels_as_buffers(name: str, dtype: torch.dtype) -> None:
    function = output_function(build(name, dtype))
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(function, protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 2000
    # As out of the object store, which nobody may write to.
    restored = pickle.loads(pickled, buffers=[bytes(buffer) for buffer in buffers])
    hidden = torch.randn(3, 32).to(dtype)
    assert torch.equal(restored(hidden), function(hidden))
    assert torch.equal(pickle.loads(pickle.dumps(function))(hidden), function(hidden))


def test_no_rows_are_as_wide_as_others() -> None:
    engine = Engine(build("llama"), max_sequences=1, max_context=16, rows="hidden_states")
    engine.open("a")
    assert engine.step([]).shape == engine.step([Work("a", PROMPT, [])]).shape == (0, 32)


def test_a_family_that_is_not_tested_is_refused_by_name() -> None:
    config = CohereConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    Engine(model, max_sequences=1, max_context=16)
    with pytest.raises(InvalidConfiguration, match=r"CohereForCausalLM.*'cohere'.*`rows: logits`"):
        Engine(model, max_sequences=1, max_context=16, rows="hidden_states")


def test_an_output_layer_that_does_more_than_its_family_is_refused() -> None:
    model = build("llama")
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits * 1.01)
    with pytest.raises(InvalidConfiguration, match=r"logits from its hidden states differ by .*`rows: logits`"):
        Engine(model, max_sequences=1, max_context=16, rows="hidden_states")
