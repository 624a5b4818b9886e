"""What every system is given: which models, which prompts, how many tokens."""

import json
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.engine import RowKind
from actors.prompts import Prompt, PromptEncoder
from actors.settings import CHECKOUT
from cluster.exchange import Transport

PROMPTS = CHECKOUT / "deploy" / "guides" / "heldout_prompts.jsonl"
NUM_TEXTS = 16
WEIGHT = 0.2
"""Of every guide in use: four of them together are still a sensible text."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of one measurement, in directories whose texts do not end, and how they are served."""

    base: Path
    guides: dict[str, Path]
    """By name; a measurement with n guides uses the first n."""

    dtype: str
    threads: int
    max_sequences: int
    max_context: int
    rows: RowKind = "logits"
    """What the guides' replicas send."""

    transport: Transport = "auto"
    """How rows travel from replicas."""

    @property
    def takes_turns(self) -> bool:
        """Whether the models share all cores, one after the other, as they do without `threads` in their settings."""
        return self.threads == len(os.sched_getaffinity(0))

    @property
    def cache_tokens(self) -> int:
        """Room for all sequences at once, so that none is ever rolled back."""
        return self.max_sequences * self.max_context

    @property
    def engine_options(self) -> dict[str, Any]:
        """Keywords of `Engine.load`."""
        return {
            "dtype": getattr(torch, self.dtype),
            "max_sequences": self.max_sequences,
            "max_context": self.max_context,
            "cache_tokens": self.cache_tokens,
            "threads": self.threads,
        }

    def weights(self, num_guides: int) -> dict[str, float]:
        """Return the weights of the first guides."""
        return dict.fromkeys(list(self.guides)[:num_guides], WEIGHT)


@dataclass(frozen=True)
class Batch:
    """Sequences that are asked for at once."""

    prompts: Sequence[str]
    """Templated texts, no two alike."""

    seeds: Sequence[int]
    max_tokens: int
    num_guides: int


@dataclass(frozen=True)
class Outcome:
    """What became of a batch."""

    num_tokens: int
    """Really generated, of all sequences together."""

    elapsed_s: float
    """From handing the batch over until its last token is there."""


class Prompts:
    """An endless supply of prompts of about equal length, none of which comes twice.

    Held-out prompts of median length, templated for the base; the user's message begins with a number, so that no
    system can profit from having seen the prompt in an earlier measurement. (The template's own beginning is common
    to all, as it is in service.)
    """

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        encoder = PromptEncoder(tokenizer)
        self._tokenizer = tokenizer
        conversations = [json.loads(line)["messages"] for line in PROMPTS.read_text().splitlines()]
        lengths = [len(encoder.encode(Prompt(messages=messages))) for messages in conversations]
        median = statistics.median(lengths)
        order = sorted(range(len(lengths)), key=lambda i: (abs(lengths[i] - median), i))[:NUM_TEXTS]
        self._texts = [conversations[i][-1]["content"] for i in sorted(order)]
        self._random = random.Random(seed)
        self._num_taken = 0

    def batch(self, num_sequences: int, *, max_tokens: int, num_guides: int) -> Batch:
        """Return the next prompts, with a seed for each."""
        first, self._num_taken = self._num_taken, self._num_taken + num_sequences
        prompts = [self._template(i, self._texts[(i - first) % NUM_TEXTS]) for i in range(first, self._num_taken)]
        seeds = [self._random.randrange(2**31) for _ in prompts]
        return Batch(prompts, seeds, max_tokens, num_guides)

    def num_tokens(self, batch: Batch) -> list[int]:
        """Return the length of each prompt in tokens."""
        return [len(self._tokenizer(prompt).input_ids) for prompt in batch.prompts]

    def _template(self, number: int, text: str) -> str:
        messages = [{"role": "user", "content": f"{number:06d}. {text}"}]
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
