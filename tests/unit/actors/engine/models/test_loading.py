"""An engine starts with any model that it computes rightly, and refuses every other by name."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, T5Config, T5ForConditionalGeneration
from transformers.models.bloom import BloomConfig
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.falcon_h1 import FalconH1Config
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.lfm2 import Lfm2Config
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.stablelm import StableLmConfig

from actors.engine import Engine, Work
from actors.engine.models.loading import load_whole
from actors.training.run import RunSettings, build
from cluster.errors import InvalidConfiguration
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
}


def engine_of(config: PretrainedConfig, max_context: int = 32) -> Engine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return Engine(model, max_sequences=2, max_context=max_context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_loads_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny.qwen3(vocabulary_size=101)
    directory = tiny.save(model, tmp_path / "model")
    engine = Engine.load(directory, dtype=dtype, max_sequences=2, max_context=16, threads=torch.get_num_threads())
    assert engine.vocabulary_size == engine.num_token_ids == 101
    engine.open("one")
    row = engine.step([Work("one", [1, 2, 3], [2])])
    assert row.dtype == engine.dtype == dtype
    expected = model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    assert (row.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("path", ["nowhere/at/all", "/nowhere"])
def test_a_model_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"'{path}' cannot be loaded"):
        Engine.load(path, dtype=torch.float32, max_sequences=1, max_context=8)


def test_weights_that_could_run_code_are_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidConfiguration, match="safetensors"):
        Engine.load(str(tmp_path), dtype=torch.float32, max_sequences=1, max_context=8)


def test_missing_weights_are_never_made_up(tmp_path: Path) -> None:
    directory = tiny.save(tiny.llama(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidConfiguration, match=r"lacks 1 of the weights .*layers\.1\.mlp\.up_proj\.weight"):
        Engine.load(directory, dtype=torch.float32, max_sequences=1, max_context=8)


def add(directory: Path, **more: torch.Tensor) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file({**weights, **more}, directory / "model.safetensors", {"format": "pt"})


EXTRA = {
    "score.weight": "score.weight first. Save the model again",
    "v_head.summary.weight": "v_head.summary.weight first. Save",
    "model.layers.0.self_attn.q_proj.bias": r"self_attn\.q_proj\.bias first. Save",
    "model.layers.1.self_attn.q_norm.weight": r"self_attn\.q_norm\.weight first. Save",
    "model.layers.3.mlp.up_proj.weight": r"layers\.3\.mlp\.up_proj\.weight first. Save",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "lora_A.weight first. Merge the adapter",
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight": "lora_B.default.weight first. Merge",
    "lm_head.bias": "lm_head.bias first. Save",
}


@pytest.mark.parametrize(("weight", "told"), EXTRA.items())
def test_weights_that_a_model_would_not_use_are_refused_everywhere(tmp_path: Path, weight: str, told: str) -> None:
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    add(tmp_path / "model", **{weight: torch.ones(4)})
    with pytest.raises(InvalidConfiguration, match=f"holds 1 weights that LlamaForCausalLM does not have, .*{told}"):
        Engine.load(directory, dtype=torch.float32, max_sequences=1, max_context=8)
    other = tiny.save(tiny.llama(), tmp_path / "other")
    runs = (
        RunSettings(model=directory),
        RunSettings(model=directory, objective="distillation", layers=(0, 2)),
        RunSettings(model=directory, objective="dpo", lora_rank=0),
        RunSettings(model=other, objective="guided", base=directory),
    )
    for run in runs:
        with pytest.raises(InvalidConfiguration, match=told):
            build(run)


@pytest.mark.parametrize(
    ("architecture", "buffer"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("llama", "model.embeddings.position_ids"),
    ],
)
def test_what_old_checkpoints_hold_and_no_model_learns_is_left_out(
    tmp_path: Path, architecture: str, buffer: str
) -> None:
    model = tiny.ARCHITECTURES[architecture]()
    directory = tiny.save(model, tmp_path)
    add(tmp_path, **{buffer: torch.ones(4)})
    tokens = torch.tensor([[1, 2, 3]])
    loaded = load_whole(directory, dtype=torch.float32)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("file", "content"), [("model.safetensors", "damaged"), ("config.json", "{"), ("config.json", "{}")]
)
def test_a_damaged_model_is_refused(tmp_path: Path, file: str, content: str) -> None:
    directory = tiny.save(tiny.llama(), tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InvalidConfiguration, match=f"{directory}.* cannot be loaded"):
        Engine.load(directory, dtype=torch.float32, max_sequences=1, max_context=8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "KeyError: 'su'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "requires bitsandbytes"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ],
)
def test_whatever_a_configuration_makes_transformers_raise_is_told(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    directory = tiny.save(tiny.llama(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(InvalidConfiguration, match=f"'{directory}' cannot be loaded: .*{says}"):
        load_whole(directory, dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_context": 129}, "max_context: 129 positions are more than the 128 of"),
        ({"max_context": 0}, "max_context: 0 is less than 1"),
        ({"max_sequences": 0}, "max_sequences: 0 is less than 1"),
        ({"threads": 0}, "threads: 0 is less than 1"),
        ({"dtype": torch.int8}, "dtype: torch.int8 is not one of torch.float32, torch.bfloat16, torch.float16"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    directory = tiny.save(tiny.gpt2(), tmp_path / "model")
    with pytest.raises(InvalidConfiguration, match=message):
        Engine.load(directory, **{"dtype": torch.float32, "max_sequences": 2, "max_context": 16, **settings})


@pytest.mark.parametrize(("max_sequences", "max_context"), [(1, 1), (1, 2), (2, 1)])
def test_the_smallest_limits_work(max_sequences: int, max_context: int) -> None:
    model = tiny.mistral()
    engine = Engine(model, max_sequences=max_sequences, max_context=max_context)
    engine.open("one")
    assert engine.step([Work("one", [5], [0])]).shape == (1, engine.vocabulary_size)


LATENT_ATTENTION = DeepseekV3Config(
    **{**SIZES, "num_key_value_heads": 4},
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)


@pytest.mark.parametrize("config", [LATENT_ATTENTION, StableLmConfig(**SIZES)], ids=lambda config: config.model_type)
def test_keys_wider_than_values_and_attention_without_extra_arguments_work(config: PretrainedConfig) -> None:
    engine_of(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(**SIZES), "does not go through transformers' AttentionInterface"),
        (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), "1 of its 2 layers attend"),
        (GptOssConfig(**SIZES, head_dim=8, num_local_experts=4), "its attention takes s_aux"),
        (
            Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=6, num_local_experts=2),
            "neither causal nor a causal sliding window",
        ),
        (
            FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
            "its logits differ by .* from the model's own",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_an_architecture_that_the_engine_would_get_wrong_is_refused(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"ForCausalLM.*the engine cannot run it: .*{reason}"):
        engine_of(config)


def test_chunked_attention_is_fine_within_its_first_chunk() -> None:
    engine_of(Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=32, num_local_experts=2), max_context=32)


def test_an_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(InvalidConfiguration, match=r"T5ForConditionalGeneration.*encoder-decoder"):
        Engine(model, max_sequences=1, max_context=8)


def test_rotary_frequencies_that_change_with_the_longest_sequence_limit_the_context() -> None:
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(**SIZES, original_max_position_embeddings=24, rope_parameters=rotary)
    with pytest.raises(InvalidConfiguration, match=r"max_context: 25 .* beyond the 24 .*Set max_context to 24"):
        engine_of(config, max_context=25)
    engine_of(config, max_context=24)


def test_a_model_that_overflows_its_dtype_is_refused() -> None:
    model = tiny.llama().to(torch.float16)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e5)
    with pytest.raises(InvalidConfiguration, match=r"not finite in torch\.float16.*another dtype"):
        Engine(model, max_sequences=1, max_context=8)


def test_engines_in_threads_of_one_process_do_not_meet() -> None:
    engines = [Engine(build(), max_sequences=1, max_context=64) for build in (tiny.llama, tiny.gemma2)]
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(index: int, sequence: str) -> None:
        engines[index].open(sequence)
        rows[index] += [engines[index].step([Work(sequence, [token], [0])]) for token in range(30)]
        engines[index].close(sequence)

    for index in range(2):
        work(index, "alone")
    threads = [threading.Thread(target=work, args=(index, "together")) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        alone, together = torch.cat(rows[index][:30]), torch.cat(rows[index][30:])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
