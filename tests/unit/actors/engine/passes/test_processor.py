"""A model prepared for a processor computes what it computed before; what is not recognised stays as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.passes.processor import prepare_for_processor
from tests import tiny

NUM_ROWS = (1, 2, 3, 4, 5, 70)


def logits(model: PreTrainedModel, num_tokens: int, **arguments: Any) -> Tensor:
    tokens = torch.randint(tiny.VOCABULARY_SIZE, (1, num_tokens), generator=torch.Generator().manual_seed(num_tokens))
    with torch.inference_mode():
        rows: Tensor = model(tokens, use_cache=False, **arguments).logits[0]
    return rows


def assert_computes_the_same(prepared: PreTrainedModel, model: PreTrainedModel) -> None:
    for num_tokens in NUM_ROWS:
        expected = logits(model, num_tokens)
        tolerance = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(logits(prepared, num_tokens), expected, atol=tolerance, rtol=0)


def prepared_copy(model: PreTrainedModel) -> PreTrainedModel:
    prepared = copy.deepcopy(model)
    prepare_for_processor(prepared)
    return prepared


def replaced(model: nn.Module) -> set[str]:
    """Return the classes of the modules that have another forward call."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_are_the_same_up_to_rounding(architecture: str) -> None:
    model = tiny.ARCHITECTURES[architecture]()
    prepared = prepared_copy(model)
    assert replaced(prepared) <= {"Linear", "Conv1D"}
    assert replaced(prepared)
    assert_computes_the_same(prepared, model)


def test_biases_are_kept() -> None:
    model = tiny.llama(attention_bias=True, mlp_bias=True)
    assert_computes_the_same(prepared_copy(model), model)


def test_a_step_that_asks_for_no_rows_gets_none() -> None:
    prepared = prepared_copy(tiny.llama())
    rows = logits(prepared, 3, logits_to_keep=torch.tensor([], dtype=torch.int64))
    assert rows.shape == (0, tiny.VOCABULARY_SIZE)


def test_each_matrix_is_held_once_unless_it_is_shared() -> None:
    untied, tied = prepared_copy(tiny.llama()), prepared_copy(tiny.llama(tie_word_embeddings=True))
    left = {name.split(".")[-2] for name, weight in untied.state_dict().items() if weight.dim() == 2}
    assert left == {"embed_tokens"}
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    assert not replaced(prepared_copy(tiny.llama().to(dtype)))


def test_watched_modules_are_left_alone() -> None:
    model = tiny.llama()
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    num_products = sum(isinstance(module, nn.Linear) for module in model.modules())
    prepare_for_processor(model)
    assert not replaced(model)
    logits(model, 2)
    assert len(calls) == num_products


class ScaledLinear(nn.Linear):
    """Not a plain product."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_modules_that_do_something_else_keep_their_own_code() -> None:
    model = tiny.llama()
    for module in model.modules():
        if type(module) is nn.Linear and module.in_features == 48:
            module.__class__ = ScaledLinear
    prepared = prepared_copy(model)
    assert replaced(prepared) == {"Linear"}
    assert_computes_the_same(prepared, model)


def test_the_attention_implementation_is_left_as_it_was() -> None:
    model = tiny.llama(attn_implementation="sdpa")
    prepare_for_processor(model)
    assert model.config._attn_implementation == "sdpa"
