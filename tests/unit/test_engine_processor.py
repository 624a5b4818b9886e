"""A model prepared for a processor computes what it computed before; what is not recognised stays as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from actors.engine import processor
from actors.engine.fingerprint import fingerprint
from actors.engine.processor import prepare_for_processor
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


@pytest.fixture(params=["in two layouts", "packed only"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "packed only":
        monkeypatch.setattr(processor, "_MAX_TWICE_BYTES", 0)
    return str(request.param)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_are_the_same_up_to_rounding(architecture: str, memory: str) -> None:
    model = tiny.ARCHITECTURES[architecture]()
    prepared = prepared_copy(model)
    assert replaced(prepared)
    assert_computes_the_same(prepared, model)


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({"attention_bias": True, "mlp_bias": True}, tiny.llama),
        ({"tie_word_embeddings": True}, tiny.llama),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, tiny.llama),
        ({"hidden_act": "relu"}, tiny.llama),
        ({"rms_norm_eps": 1e-1}, tiny.qwen3),
    ],
)
def test_settings_of_an_architecture_are_kept(
    settings: dict[str, Any], build: Callable[..., PreTrainedModel], memory: str
) -> None:
    model = build(**settings)
    prepared = prepared_copy(model)
    assert any(name.endswith("Attention") for name in replaced(prepared))
    assert_computes_the_same(prepared, model)


def test_a_step_that_asks_for_no_rows_gets_none(memory: str) -> None:
    prepared = prepared_copy(tiny.llama())
    rows = logits(prepared, 3, logits_to_keep=torch.tensor([], dtype=torch.int64))
    assert rows.shape == (0, tiny.VOCABULARY_SIZE)


def test_a_small_model_keeps_its_weights_and_fingerprint() -> None:
    model = tiny.qwen2()
    prepared = prepared_copy(model)
    before, after = model.state_dict(), prepared.state_dict()
    assert list(before) == list(after)
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    assert fingerprint(prepared) == fingerprint(model)


def test_a_large_model_holds_each_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_MAX_TWICE_BYTES", 0)
    untied, tied = prepared_copy(tiny.llama()), prepared_copy(tiny.llama(tie_word_embeddings=True))
    left = {name.split(".")[-2] for name, weight in untied.state_dict().items() if weight.dim() == 2}
    assert left == {"embed_tokens", "o_proj", "down_proj"}
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
    assert replaced(model) == {"LlamaRMSNorm"}
    logits(model, 2)
    assert len(calls) == num_products


class BoundedRMSNorm(modeling_llama.LlamaRMSNorm):
    """Differs from an RMS norm for large inputs only."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.clamp(-100, 100))


class BoundedMLP(modeling_llama.LlamaMLP):
    """Differs from a gated layer for large inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))
        return rows


class NewAttention(modeling_llama.LlamaAttention):
    """Not known, though it computes the same."""


@pytest.mark.parametrize(
    ("own", "parent"),
    [
        (BoundedRMSNorm, modeling_llama.LlamaRMSNorm),
        (BoundedMLP, modeling_llama.LlamaMLP),
        (NewAttention, modeling_llama.LlamaAttention),
    ],
)
def test_modules_that_do_something_else_keep_their_own_code(own: type[nn.Module], parent: type[nn.Module]) -> None:
    model = tiny.llama()
    for module in model.modules():
        if type(module) is parent:
            module.__class__ = own
    prepared = prepared_copy(model)
    assert own.__name__ not in replaced(prepared)
    assert "Linear" in replaced(prepared)
    assert_computes_the_same(prepared, model)


def test_an_attention_that_gives_other_logits_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_ROTARY_ATTENTIONS", {"CohereAttention"})
    # Cohere rotates neighbours, not halves.
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CohereForCausalLM(CohereConfig(**sizes, vocab_size=tiny.VOCABULARY_SIZE, initializer_range=0.3)).eval()
    prepared = prepared_copy(model)
    assert "CohereAttention" not in replaced(prepared)
    assert_computes_the_same(prepared, model)


def test_the_attention_implementation_is_left_as_it_was() -> None:
    model = tiny.llama(attn_implementation="sdpa")
    prepare_for_processor(model)
    assert model.config._attn_implementation == "sdpa"
