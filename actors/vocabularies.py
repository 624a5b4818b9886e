"""What a model directory or hub id says of its tokens, without loading its weights."""

from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from actors.guidance import Vocabulary
from cluster.errors import InvalidConfiguration


def load_tokenizer(model: str) -> Any:
    """Return a model's fast tokenizer.

    Raises:
        InvalidConfiguration: it has none, or none that can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        # Whatever lies in the directory makes transformers raise what it will; the first line says most of it.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise InvalidConfiguration(
            f"{model!r} cannot be loaded: its tokenizer: {reason}. Copy tokenizer.json and tokenizer_config.json there "
            "from the model that it was made of."
        ) from error
    if not tokenizer.is_fast:
        raise InvalidConfiguration(
            f"{model} has no fast tokenizer (tokenizer.json); convert it with transformers first"
        )
    return tokenizer


def end_tokens(model: str, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a text: those of the generation settings, else the model's, and the tokenizer's own."""
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        eos = None
    if eos is None:
        eos = AutoConfig.from_pretrained(model, trust_remote_code=False).eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def max_positions(model: str) -> int | None:
    """Return how many tokens a model was made for, prompt and answer together; none if it names no limit."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit if limit and limit > 0 else None


def read_vocabulary(model: str, tokenizer: Any) -> Vocabulary:
    """Return what guidance must know of a model's vocabulary."""
    return Vocabulary(
        tokens=tokenizer.convert_ids_to_tokens(range(max(tokenizer.get_vocab().values()) + 1)),
        width=AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().vocab_size,
        end_tokens=end_tokens(model, tokenizer),
    )
