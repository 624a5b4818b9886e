"""What a user would otherwise write: transformers `generate`, with the guides in a LogitsProcessor.

One process, a static batch padded on the left, default settings but for the sampling, which is the service's: the
whole distribution at temperature 1.

Shapes: B sequences, T tokens of the prompt or 1, V vocabulary.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationConfig

from actors.vocabularies import load_tokenizer
from bench.workload import WEIGHT, Batch, Models, Outcome


class Guide(LogitsProcessor):
    """Adds a guide's weighted logits to the base's; keeps the guide's own cache for one call of `generate`."""

    def __init__(self, model: PreTrainedModel, weight: float, mask_BT: Tensor) -> None:
        self._model = model
        self._weight = weight
        self._mask_BT = mask_BT
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores + w * logits of the guide, [B, V]. A constant per row, as a log-softmax takes off, is left."""
        is_first = self._cache is None
        if not is_first:
            self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(input_ids), 1)], dim=1)
        positions_BT = (self._mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        output = self._model(
            input_ids=input_ids if is_first else input_ids[:, -1:],
            attention_mask=self._mask_BT,
            position_ids=positions_BT if is_first else positions_BT[:, -1:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return scores.add(output.logits[:, -1], alpha=self._weight)


class Generate:
    """Base and guides in this process."""

    def __init__(self, models: Models) -> None:
        dtype = getattr(torch, models.dtype)
        self._tokenizer = load_tokenizer(str(models.base))
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(0)
        self._base: Any = AutoModelForCausalLM.from_pretrained(models.base, dtype=dtype)
        self._guides: Sequence[Any] = [
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in models.guides.values()
        ]

    @torch.inference_mode()
    def run(self, batch: Batch) -> Outcome:
        """Texts in, texts out, as users do it."""
        torch.manual_seed(batch.seeds[0])
        settings = GenerationConfig(
            max_new_tokens=batch.max_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        start = time.perf_counter()
        inputs = self._tokenizer(list(batch.prompts), return_tensors="pt", padding=True)
        guides = [Guide(guide, WEIGHT, inputs.attention_mask) for guide in self._guides[: batch.num_guides]]
        output = self._base.generate(**inputs, generation_config=settings, logits_processor=LogitsProcessorList(guides))
        new = output[:, inputs.input_ids.shape[1] :]
        self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return Outcome(num_tokens=new.numel(), elapsed_s=time.perf_counter() - start)
