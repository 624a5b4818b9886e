"""Tokenizers of the families that models have, trained on a few sentences in milliseconds.

Each has what its family is known by (normalizer, pre-tokenizer, decoder, what is put before and after a text, which
tokens are added) and a chat template in the family's manner, in a vocabulary of some hundred tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The night shift begins at ten. The nurses said that the other ward was quiet.",
    "They were there before the thunder, and there they stayed; it's what they'd do.",
    "def the_other(there):\n    return [there for _ in range(10)]\n\n\nthen = the_other(3)",
    "Straße, naïve, 你好世界, здравствуй, こんにちは, 👋🏽, 2026.",
]
WORDS = r"(?i:'s|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACE = "▁"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\\n\\n' }}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\\n' }}"
    "{{ m.content | trim }}<end_of_turn>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{% endif %}"
)
COLONS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def gpt2() -> PreTrainedTokenizerFast:
    """Bytes and merges; one special token, which begins and ends."""
    return _fast(_byte_level(["<|endoftext|>"]), COLONS, bos="<|endoftext|>", eos="<|endoftext|>")


def llama3() -> PreTrainedTokenizerFast:
    """Bytes and merges within words of its own kind; a token before every text."""
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    backend = _byte_level([f"<|{name}|>" for name in names], words=WORDS)
    _surround(backend, "<|begin_of_text|> $A")
    return _fast(backend, LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>")


def qwen() -> PreTrainedTokenizerFast:
    """Composed characters; nothing before a text; tokens for thinking that are no special ones."""
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], words=WORDS, normalizer=normalizers.NFC())
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return _fast(backend, CHATML, bos=None, eos="<|im_end|>")


def llama2() -> PreTrainedTokenizerFast:
    """A space put before every text, and after every special token, by the normalizer."""
    backend = _sentence_pieces(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    _surround(backend, "<s> $A")
    return _fast(backend, INSTRUCTIONS, bos="<s>", eos="</s>")


def mistral() -> PreTrainedTokenizerFast:
    """A space put before the first word alone; tokens for instructions."""
    backend = _sentence_pieces(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    _surround(backend, "<s> $A")
    return _fast(backend, INSTRUCTIONS, bos="<s>", eos="</s>", more=["[INST]", "[/INST]"])


def both_ends() -> PreTrainedTokenizerFast:
    """A Mistral kind that puts its end after every text too."""
    fast = mistral()
    _surround(fast.backend_tokenizer, "<s> $A </s>")
    return fast


def gemma() -> PreTrainedTokenizerFast:
    """Spaces as they are, none put before a text; tokens for lines."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = _sentence_pieces([*names, "\n", "\n\n"])
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    _surround(backend, "<bos> $A")
    fast = _fast(backend, TURNS, bos="<bos>", eos="<end_of_turn>", more=["<start_of_turn>", "<end_of_turn>"])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("\n", "\n\n")])
    return fast


def t5() -> PreTrainedTokenizerFast:
    """Unigram: the likeliest pieces of each word; an end put after every text; no bytes for what it does not know."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    _surround(backend, "$A </s>")
    return _fast(backend, COLONS, bos=None, eos="</s>")


FAMILIES: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    build.__name__: build for build in (gpt2, llama3, qwen, llama2, mistral, both_ends, gemma, t5)
}


def _byte_level(
    special: Sequence[str], *, words: str | None = None, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=words is not None))
    if normalizer is not None:
        backend.normalizer = normalizer
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    backend.pre_tokenizer = characters
    if words is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), characters])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return backend


def _sentence_pieces(first: Sequence[str]) -> Tokenizer:
    """BPE over ▁, with bytes for characters that are no pieces. What comes first is in the vocabulary, as bytes are."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        CORPUS[:2],
        trainers.BpeTrainer(
            vocab_size=180, initial_alphabet=[chr(code) for code in range(33, 127)], show_progress=False
        ),
    )
    trained: dict[str, Any] = json.loads(backend.to_str())["model"]
    stray = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = dict.fromkeys([*first, *stray, *sorted(trained["vocab"], key=trained["vocab"].__getitem__)])
    merges = [(left, right) for left, right in trained["merges"]]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _surround(backend: Tokenizer, single: str) -> None:
    names = [name for name in single.split() if name != "$A"]
    special = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _fast(
    backend: Tokenizer, template: str, *, bos: str | None, eos: str, more: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    unknown = "<unk>" if backend.token_to_id("<unk>") is not None else None
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in named.items() if token is not None}
    )
    fast.add_special_tokens({"additional_special_tokens": list(more)})
    fast.chat_template = template
    return fast
