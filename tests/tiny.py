"""Tiny random models and tokenizers, built in milliseconds, for tests that need real ones.

Every model is seeded, in float32 and in eval mode. Weights are large enough that tokens and positions matter.
"""

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY_SIZE = 97
MAX_POSITIONS = 128
SLIDING_WINDOW = 5

END_TOKEN = "<end>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}


def _build(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Biases start at zero and norms at one; random ones show when they are left out.
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def llama(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Llama: rotary positions, grouped queries. `settings` override those of its config."""
    return _build(LlamaForCausalLM, LlamaConfig(**{**_GROUPED, "vocab_size": vocabulary_size, **settings}), seed)


def qwen2(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Qwen2: biases on queries, keys and values."""
    return _build(Qwen2ForCausalLM, Qwen2Config(**{**_GROUPED, "vocab_size": vocabulary_size, **settings}), seed)


def qwen3(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Qwen3: normalised queries and keys, heads wider than the hidden size suggests."""
    config = Qwen3Config(**{**_GROUPED, "head_dim": 16, "vocab_size": vocabulary_size, **settings})
    return _build(Qwen3ForCausalLM, config, seed)


def mistral(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Mistral whose every layer sees a window of SLIDING_WINDOW tokens."""
    config = MistralConfig(**{**_GROUPED, "sliding_window": SLIDING_WINDOW, "vocab_size": vocabulary_size, **settings})
    return _build(MistralForCausalLM, config, seed)


def gemma(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Gemma: one key-value head for all queries, scaled and tied embeddings."""
    config = GemmaConfig(
        **{**_GROUPED, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": vocabulary_size, **settings}
    )
    return _build(GemmaForCausalLM, config, seed)


def gemma2(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Gemma 2: sliding and full layers in turn, capped scores and logits, a scaling of its own."""
    own = {
        "head_dim": 16,
        "sliding_window": SLIDING_WINDOW,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 7,
        "vocab_size": vocabulary_size,
    }
    return _build(Gemma2ForCausalLM, Gemma2Config(**{**_GROUPED, **own, **settings}), seed)


def gemma3(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Gemma 3: sliding and full layers with rotary frequencies of their own."""
    own = {
        "head_dim": 16,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "vocab_size": vocabulary_size,
    }
    return _build(Gemma3ForCausalLM, Gemma3TextConfig(**{**_GROUPED, **own, **settings}), seed)


def gpt2(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a GPT-2: learned positions."""
    return _build(GPT2LMHeadModel, GPT2Config(**{**_COMMON, "vocab_size": vocabulary_size, **settings}), seed)


def gpt_neox(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a GPT-NeoX: rotary positions on a quarter of each head."""
    own = {"intermediate_size": 48, "vocab_size": vocabulary_size}
    return _build(GPTNeoXForCausalLM, GPTNeoXConfig(**{**_COMMON, **own, **settings}), seed)


def granite(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Granite: a Llama with factors of its own on embeddings, scores, residuals and logits."""
    own = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.5,
        "vocab_size": vocabulary_size,
    }
    return _build(GraniteForCausalLM, GraniteConfig(**{**_GROUPED, **own, **settings}), seed)


def phi(vocabulary_size: int = VOCABULARY_SIZE, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a Phi: attention beside the other half of a layer, biases everywhere, on logits too."""
    own = {"intermediate_size": 48, "vocab_size": vocabulary_size}
    return _build(PhiForCausalLM, PhiConfig(**{**_COMMON, **own, **settings}), seed)


ARCHITECTURES: Mapping[str, Callable[..., PreTrainedModel]] = {
    build.__name__: build
    for build in (llama, qwen2, qwen3, mistral, gemma, gemma2, gemma3, gpt2, gpt_neox, granite, phi)
}
"""Every builder by name, to parametrise tests with."""


def talkative(model: PreTrainedModel) -> PreTrainedModel:
    """Return a Llama changed so that it rarely draws the end token, and never greedily."""
    model.get_output_embeddings().weight.data[0] = 0
    return model


def tokenizer(vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Return a character tokenizer with exactly that many tokens, three at least, and a chat template.

    Token 0 is END_TOKEN; then come newline, space, colon, lower-case letters and the other printable ASCII characters,
    then `<extra N>` tokens that no text yields. Tokenizers of different sizes agree on the tokens that both have.
    Characters without a token become spaces.
    """
    printable = [chr(code) for code in range(33, 127)]
    characters = dict.fromkeys(["\n", " ", ":", *string.ascii_lowercase, *printable])
    extra = (f"<extra {i}>" for i in range(vocabulary_size))
    tokens = [END_TOKEN, *characters, *extra][:vocabulary_size]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_TOKEN)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def byte_alphabet() -> dict[int, str]:
    """Return the character that stands for each byte in GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


SPACE_BEFORE_TEXT = ("prepended", "first", "always", "byte_level")
"""Kinds of tokenizers that put a space before a text: Llama 2's, Mistral's, T5's, and GPT-2's with a prefix space."""


def spacing_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a space before a text, as SPACE_BEFORE_TEXT says, with `<s>`, `</s>` and `<turn>`.

    Token 0 is `</s>`, its eos; `<s>`, 1, comes before a text that no template wrote. `<turn>`, 2, is special too. Then
    come bytes, and printable characters with merges to The, he and ▁The.
    """
    space = "Ġ" if kind == "byte_level" else "▁"
    merges = [("h", "e"), (space, "T"), (f"{space}T", "he")]
    special = ["</s>", "<s>", "<turn>", "<unk>"]
    single = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "byte_level" else [chr(i) for i in range(33, 127)]
    stray = [] if kind == "byte_level" else [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = dict.fromkeys([*special, *stray, space, *single, *("".join(pair) for pair in merges)])
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=kind != "byte_level",
        )
    )
    if kind == "byte_level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
    else:
        if kind == "prepended":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    return fast


def save(model: PreTrainedModel, directory: Path, *, with_tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Save a model and a tokenizer of its vocabulary size (or the one given); return the directory as text."""
    model.save_pretrained(directory)
    (with_tokenizer or tokenizer(model.config.vocab_size)).save_pretrained(directory)
    return str(directory)
