"""Cutting a model to some of its layers, and adapters that become part of its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM, SmolLM3Config, SmolLM3ForCausalLM
from transformers.pytorch_utils import Conv1D

from actors.training.derive import (
    adapter_reach,
    add_adapter,
    cut_layers,
    merge_adapter,
    save_adapter,
    save_map,
    scale_guide,
    silence_output,
)
from cluster.errors import InvalidConfiguration
from tests import tiny
from tests.tiny import ARCHITECTURES, llama, save

# peft reads a property that transformers has renamed; nothing we can say differently.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keeping_every_layer_keeps_the_model(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    with torch.inference_mode():
        torch.testing.assert_close(cut_layers(model, [0, 1, 2])(TOKENS).logits, model(TOKENS).logits)


def test_the_cut_has_the_chosen_layers_in_order_and_the_whole_vocabulary() -> None:
    model = llama()
    small = cut_layers(model, [2, 0])
    assert len(small.model.layers) == small.config.num_hidden_layers == 2
    for new, old in enumerate([2, 0]):
        for found, expected in zip(
            small.model.layers[new].parameters(), model.model.layers[old].parameters(), strict=True
        ):
            assert torch.equal(found, expected)
    assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert small(TOKENS).logits.shape[-1] == model.config.vocab_size


def test_the_cut_runs_with_a_cache_as_without() -> None:
    """Layers know their own number in the cache."""
    small = cut_layers(llama(), [2, 0])
    with torch.inference_mode():
        start = small(TOKENS[:, :3], use_cache=True)
        rest = small(TOKENS[:, 3:], past_key_values=start.past_key_values)
        torch.testing.assert_close(rest.logits, small(TOKENS).logits[:, 3:], rtol=1e-4, atol=1e-4)


def test_the_original_is_left_alone() -> None:
    model = llama()
    before = model(TOKENS).logits
    with torch.no_grad():
        for parameter in cut_layers(model, [0]).parameters():
            parameter.zero_()
    assert torch.equal(model(TOKENS).logits, before)
    assert model.config.num_hidden_layers == 3


def leave_out(layer: Any) -> None:
    """Let a layer pass on what it is given."""
    forward = layer.forward

    def pass_on(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        output = forward(hidden, *args, **options)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    layer.forward = pass_on


def unlike_layers(architecture: str) -> Any:
    """A model whose layers differ in more than weights."""
    if architecture == "smollm3":
        common = {**tiny._GROUPED, "vocab_size": 97, "no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3}
        return tiny._build(SmolLM3ForCausalLM, SmolLM3Config(**common), 0)
    if architecture == "gpt_neo":
        config = GPTNeoConfig(
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            attention_types=[[["global"], 1], [["local"], 2]],
            window_size=2,
            vocab_size=97,
            max_position_embeddings=128,
            initializer_range=0.3,
        )
        return tiny._build(GPTNeoForCausalLM, config, 0)
    return tiny.gpt2(scale_attn_by_inverse_layer_idx=True)


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 2], [1, 2]])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "smollm3", "gpt_neo", "inverse"])
def test_a_cut_computes_what_its_layers_compute_or_is_refused(
    architecture: str, kept: list[int], tmp_path: Path
) -> None:
    model = ARCHITECTURES[architecture]() if architecture in ARCHITECTURES else unlike_layers(architecture)
    if architecture == "inverse" and kept[-1] >= len(kept):
        with pytest.raises(InvalidConfiguration, match="depends on its number"):
            cut_layers(model, kept)
        return
    cut_layers(model, kept).save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for number, layer in enumerate(layers):
        if number not in kept:
            leave_out(layer)
    with torch.inference_mode():
        expected = model(TOKENS, use_cache=False).logits
        torch.testing.assert_close(small(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_cut_keeps_every_list_of_its_layers() -> None:
    small = cut_layers(unlike_layers("smollm3"), [1, 2])
    assert small.config.no_rope_layers == [0, 1]
    assert small.config.layer_types == ["full_attention"] * 2


def test_token_ids_are_no_list_of_layers() -> None:
    assert cut_layers(llama(eos_token_id=[1, 2, 3]), [0, 2]).config.eos_token_id == [1, 2, 3]


def test_a_cut_in_bfloat16_has_the_models_rotary_frequencies() -> None:
    model = llama().to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = llama().model.rotary_emb.inv_freq
    small = cut_layers(model, [0, 2])
    assert small.dtype == torch.bfloat16
    assert torch.equal(small.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_tied_weights_stay_tied() -> None:
    small = cut_layers(llama(tie_word_embeddings=True), [0, 2])
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


@pytest.mark.parametrize("kept", [[], [3], [-1]])
def test_layers_that_are_not_there_are_refused(kept: list[int]) -> None:
    with pytest.raises(InvalidConfiguration, match="layers 0 to 2"):
        cut_layers(llama(), kept)


def test_a_merged_adapter_computes_what_peft_computes(tmp_path: Path) -> None:
    guide = add_adapter(cut_layers(llama(), [0, 2]), rank=4, seed=0)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(guide, tmp_path / "adapter")
    with torch.inference_mode():
        unmerged = PeftModel.from_pretrained(cut_layers(llama(), [0, 2]), str(tmp_path / "adapter"))(TOKENS).logits
        merged = merge_adapter(cut_layers(llama(), [0, 2]), tmp_path / "adapter")
        plain = cut_layers(llama(), [0, 2])(TOKENS).logits
        torch.testing.assert_close(merged(TOKENS).logits, unmerged, rtol=1e-4, atol=1e-4)
    assert (unmerged - plain).abs().max() > 0.1
    assert type(merged) is type(llama())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_an_adapter_reaches_all_projections_as_is_said(build: Any) -> None:
    model = build()
    assert adapter_reach(model) == 1
    projections = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    wrapped = [module for module in add_adapter(model, rank=1, seed=0).modules() if isinstance(module, LoraLayer)]
    assert {id(module.get_base_layer().weight) for module in wrapped} == projections - {
        id(model.get_output_embeddings().weight)
    }


def test_only_the_adapter_is_trained() -> None:
    guide = add_adapter(llama(), rank=4, seed=0)
    trained = {name for name, parameter in guide.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(projection in name for name in trained)


def test_a_scaled_guide_has_scaled_logits_and_so_has_what_it_is_made_again_from(tmp_path: Path) -> None:
    model = silence_output(llama(), 2, seed=3)
    torch.nn.init.normal_(model.get_output_embeddings().map.up)
    save_map(model, tmp_path / "adapter")
    merge_adapter(llama(), tmp_path / "adapter").save_pretrained(tmp_path)
    with torch.inference_mode():
        before = AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits
        scale_guide(tmp_path, 0.5)
        after = AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits
        made_again = merge_adapter(llama(), tmp_path / "adapter")(TOKENS).logits
    torch.testing.assert_close(after, 0.5 * before)
    torch.testing.assert_close(made_again, after)
    assert not list(tmp_path.rglob("*partial*"))


def test_a_guide_whose_embedding_is_its_output_layer_cannot_be_scaled(tmp_path: Path) -> None:
    save(llama(tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(InvalidConfiguration, match="leave --scale out"):
        scale_guide(tmp_path / "tied", 0.5)
