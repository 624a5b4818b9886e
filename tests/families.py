"""Families of models, built tiny, and what Trimtab does with each: `python -m tests.families` writes docs/models.md.

Every row of that page is measured on a random model of the family with three layers; `tests/unit/test_families.py`
measures them again.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.engine import Engine
from actors.engine.models.sharding import check_shardable
from actors.settings import CHECKOUT
from actors.training.derive import adapter_reach, add_adapter, cut_layers
from cluster.errors import InvalidConfiguration

PAGE = CHECKOUT / "docs" / "models.md"
MAX_CONTEXT = 40
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_WHERE_KNOWN: dict[str, Any] = {
    "head_dim": 16,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 5,
}
"""Settings that families have by these names, if they have them."""

_LATENT: dict[str, Any] = {"num_key_value_heads": 4}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": {},
    "ctrl": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jais2": {},
    "jetmoe": {},
    "llama": {},
    "llama4_text": {},
    "minicpm3": _LATENT,
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "youtu": _LATENT,
}
"""By `model_type`: settings of its own. All of them are served."""

REFUSED: Mapping[str, str] = {
    "bert": "attention mask is neither causal",
    "bloom": "does not go through transformers' AttentionInterface",
    "codegen": "does not go through transformers' AttentionInterface",
    "diffllama": "several of its layers share one attention module",
    "falcon": "does not go through transformers' AttentionInterface",
    "falcon_mamba": "0 of its 3 layers attend",
    "gpt_oss": "its attention takes s_aux",
    "gptj": "does not go through transformers' AttentionInterface",
    "jamba": "0 of its 3 layers attend",
    "mamba": "0 of its 3 layers attend",
    "minimax": "of its 3 layers attend",
    "mpt": "does not go through transformers' AttentionInterface",
    "qwen3_next": "0 of its 3 layers attend",
    "recurrent_gemma": "of its 3 layers attend",
    "rwkv": "does not go through transformers' AttentionInterface",
    "xglm": "does not go through transformers' AttentionInterface",
}
"""By `model_type`: what is said where such a model is to be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What can be done with a family, in words of the page."""

    compiled: str
    sharded: str
    trains: str
    derives: str
    hidden_states: str


TITLES = (
    "compiled pass on processors",
    "sharding plan for `tensor_parallel`",
    "trains (share of the small model's layers that an adapter reaches)",
    "`trimtab derive` cuts it",
    "`rows: hidden_states`",
)


TEXT = """# Models

This page answers:

* [Which models can be served, trained and cut?](#served)
* [Which cannot, and what is said?](#refused)

It is written by `python -m tests.families`, which builds a random model of each family of transformers' causal language
models (`model_type` in config.json) with three layers and does all of it; the unit tests do so again. Families that are
not here may be served too: an engine compares its logits with the model's own at every start, and refuses what it
cannot run exactly.

## Served

| family | {titles} |
|{rule}
{served}

An adapter does not reach experts that a model holds as one parameter; `--full` trains them too. A sharding plan is
transformers' own; `tests/unit/actors/engine/models/test_sharding.py` and `tests/cluster/test_tensor_parallel.py`
compare shards with the whole model for some of the families.

## Refused

| family | what is said |
|---|---|
{refused}
"""


def build(family: str, **settings: Any) -> PreTrainedModel:
    """Return a random model of a family: three layers, 97 tokens. `settings` override those of its configuration."""
    known = AutoConfig.for_model(family).to_dict()
    more = {name: value for name, value in _WHERE_KNOWN.items() if name in known}
    config = AutoConfig.for_model(family, **{**_COMMON, **more, **FAMILIES.get(family, {}), **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def measure(family: str) -> Abilities:
    """Do with a family all that the page is about; it must be served.

    Raises:
        InvalidConfiguration: it is not.
    """
    model = build(family)
    # Made of it, an engine compares its logits with the model's own.
    engine = Engine(copy.deepcopy(model), max_sequences=2, max_context=MAX_CONTEXT)
    return Abilities(
        compiled="yes" if "compiled" in engine.description else "no",
        sharded=_tried(lambda: check_shardable(model.config, family, 2)),
        derives=_tried(lambda: cut_layers(copy.deepcopy(model), [0, 2])),
        hidden_states=_tried(
            lambda: Engine(copy.deepcopy(model), max_sequences=2, max_context=MAX_CONTEXT, rows="hidden_states")
        ),
        trains=_trains(model),
    )


def _tried(act: Callable[[], Any]) -> str:
    try:
        act()
    except InvalidConfiguration:
        return "refused"
    return "yes"


def _trains(model: PreTrainedModel) -> str:
    """Take a step of an adapter; all of it must have a gradient."""
    reach = adapter_reach(model)
    adapted = add_adapter(copy.deepcopy(model), rank=2, seed=0)
    logits = adapted(input_ids=TOKENS, use_cache=False).logits
    logits.log_softmax(-1)[0, :-1].gather(-1, TOKENS[0, 1:, None]).mean().backward()
    gradients = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    return f"yes ({reach:.0%})"


@functools.cache
def recorded() -> Mapping[str, Abilities]:
    """Return what the page says, by family."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    names = Abilities.__dataclass_fields__
    return {row[0].strip("`"): Abilities(**dict(zip(names, row[1:], strict=True))) for row in rows if len(row) > 2}


def page() -> str:
    """Return docs/models.md, measured now."""
    return TEXT.format(
        titles=" | ".join(TITLES),
        rule="---|" * (len(TITLES) + 1),
        served="\n".join(f"| `{family}` | {' | '.join(astuple(measure(family)))} |" for family in sorted(FAMILIES)),
        refused="\n".join(f"| `{family}` | {told} |" for family, told in sorted(REFUSED.items())),
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE} is written: {len(FAMILIES)} families")
