"""An average of models is a model: its weights, its files, and what cannot be averaged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.training.soup import average_models, count_parameters
from cluster.errors import InvalidConfiguration
from tests import tiny


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        tiny.save(tiny.llama(seed=seed), tmp_path / f"model-{seed}")
    return [tmp_path / f"model-{seed}" for seed in range(3)]


def test_every_weight_is_averaged_and_the_result_loads(models: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "soup"
    average_models(dict(zip(models, (0.5, 0.3, 0.2), strict=True)), target)
    wanted = [AutoModelForCausalLM.from_pretrained(model).state_dict() for model in models]
    found = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert found.keys() == wanted[0].keys()
    for name, tensor in found.items():
        expected = 0.5 * wanted[0][name] + 0.3 * wanted[1][name] + 0.2 * wanted[2][name]
        torch.testing.assert_close(tensor, expected)
    assert AutoTokenizer.from_pretrained(target).get_vocab() == tiny.tokenizer().get_vocab()


def test_all_the_weight_on_one_model_gives_that_model(models: list[Path], tmp_path: Path) -> None:
    average_models({models[0]: 0.0, models[1]: 1.0}, tmp_path / "soup")
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "soup", models[1]))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_files_of_weights_stay_divided_and_in_their_dtype(tmp_path: Path) -> None:
    model = tiny.llama(seed=0).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny.llama(seed=1).save_pretrained(tmp_path / "whole")
    average_models({tmp_path / "sharded": 0.5, tmp_path / "whole": 0.5}, tmp_path / "soup")
    files = {file.name for file in (tmp_path / "sharded").glob("*.safetensors")}
    assert len(files) > 1
    assert {file.name for file in (tmp_path / "soup").glob("*.safetensors")} == files
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    assert found.dtype == torch.bfloat16
    expected = (model.lm_head.weight.float() + tiny.llama(seed=1).lm_head.weight) / 2
    torch.testing.assert_close(found.lm_head.weight, expected.bfloat16())


def test_weights_must_sum_to_1(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"\[0.5, 0.6\] sum to 1.1; make them sum to 1"):
        average_models({models[0]: 0.5, models[1]: 0.6}, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_models_of_other_shapes_are_refused_by_the_tensors_name(models: list[Path], tmp_path: Path) -> None:
    tiny.llama(seed=4, intermediate_size=64).save_pretrained(tmp_path / "wider")
    with pytest.raises(InvalidConfiguration, match=r"layers.0.mlp.down_proj.weight' is 32x48 .* and 32x64"):
        average_models({models[0]: 0.5, tmp_path / "wider": 0.5}, tmp_path / "soup")
    tiny.llama(seed=4, num_hidden_layers=2).save_pretrained(tmp_path / "shallow")
    with pytest.raises(InvalidConfiguration, match=r"layers.2.* in the first and missing in the second"):
        average_models({models[0]: 0.5, tmp_path / "shallow": 0.5}, tmp_path / "soup")


def test_a_directory_without_safetensors_is_named(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidConfiguration, match=r"empty has no \*.safetensors"):
        average_models({models[0]: 0.5, tmp_path / "empty": 0.5}, tmp_path / "soup")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(InvalidConfiguration, match=r"model.safetensors is no safetensors file"):
        count_parameters(tmp_path / "empty")


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "model.safetensors")
    assert count_parameters(tmp_path) == 16
