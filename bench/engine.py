"""The bare engine: base and guides in one process, one after the other, merged and drawn as the service does it.

No coordinator, no exchange, no HTTP and no text: what of the service's time is the models' own.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actors.engine import Engine, Work
from actors.guidance import Guidance, Sampling
from actors.guidance.drawing import merge_and_draw
from actors.vocabularies import load_tokenizer
from bench.workload import WEIGHT, Batch, Models, Outcome

MAX_PROMPT_TOKENS = 256
"""Prompts share steps of about so many tokens, as in a replica."""


class BareEngine:
    """An engine for each model, all in this process."""

    def __init__(self, models: Models) -> None:
        self._tokenizer = load_tokenizer(str(models.base))
        paths = (models.base, *models.guides.values())
        self._engines = [Engine.load(str(path), **models.engine_options) for path in paths]

    @torch.inference_mode()
    def run(self, batch: Batch) -> Outcome:
        """Write the batch; the time begins with its tokens and ends with the last one's."""
        prompts: dict[str, Sequence[int]] = {
            str(i): self._tokenizer(prompt).input_ids for i, prompt in enumerate(batch.prompts)
        }
        samplings = [Sampling(seed=seed) for seed in batch.seeds]
        engines = self._engines[: batch.num_guides + 1]
        outputs: list[list[int]] = [[] for _ in prompts]
        start = time.perf_counter()
        rows = [_prefill(engine, prompts) for engine in engines]
        for position in range(batch.max_tokens):
            guidance = [[Guidance(WEIGHT, guide[i]) for guide in rows[1:]] for i in range(len(outputs))]
            drawn = merge_and_draw(list(rows[0]), guidance, samplings, [position] * len(outputs), [0] * len(outputs))
            tokens = [token for token in drawn if token is not None]
            for output, token in zip(outputs, tokens, strict=True):
                output.append(token)
            if position + 1 < batch.max_tokens:
                work = [Work(key, [token], [0]) for key, token in zip(prompts, tokens, strict=True)]
                rows = [engine.step(work) for engine in engines]
        elapsed_s = time.perf_counter() - start
        for engine in engines:
            for key in prompts:
                engine.close(key)
        return Outcome(num_tokens=sum(map(len, outputs)), elapsed_s=elapsed_s)


def _prefill(engine: Engine, prompts: Mapping[str, Sequence[int]]) -> Tensor:
    """Open all sequences and return the rows [B, V] after their prompts."""
    rows, chunk = [], list[Work]()
    for number, (key, tokens) in enumerate(prompts.items(), start=1):
        engine.open(key)
        num_cached = engine.reuse(key, tokens[:-1])
        chunk.append(Work(key, tokens[num_cached:], [len(tokens) - num_cached - 1]))
        if number == len(prompts) or sum(len(item.tokens) for item in chunk) >= MAX_PROMPT_TOKENS:
            rows.append(engine.step(chunk).clone())
            chunk.clear()
    return torch.cat(rows)
