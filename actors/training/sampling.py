"""Answers drawn in this process, many at a time: from a model alone, or from a base and guides together.

The law is the service's (`actors.guidance.reference`): the base's logits plus every guide's, each answer with weights
of its own, then temperature and top-p. The noise is torch's, so a seed gives other tokens than in the service.

Shapes: P prompts, R answers that are still written, M models (the base first), L positions so far, V vocabulary.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUCLEUS = 1024
"""Tokens among which a nucleus is looked for before the whole row is sorted."""

NUM_CONTEXT_TOKENS = 8
"""Prompt tokens that an answer is decoded after: some decoders drop the space at the beginning of a text."""


@dataclass(slots=True)
class Drawn:
    """An answer."""

    tokens: list[int]
    """With the end token, if one was drawn."""

    divergence: float
    """KL(guided || base) at temperature 1, in nats, summed over its positions; 0 for a model alone."""


@torch.inference_mode()
def draw_answers(
    models: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, Sequence[float]]],
    *,
    max_tokens: int,
    end_tokens: Collection[int],
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stops: Collection[int] = (),
    min_tokens: int = 0,
    tokens: Collection[int] | None = None,
) -> list[Drawn]:
    """Draw an answer for every row, all of them in one batch.

    Prompts run once each, and their caches are shared out to the rows; prompts of about the same length waste the
    least on padding. Rows that have ended leave the batch when a third of it has.

    Args:
        models: The base and the guides, causal language models of transformers with the same tokens.
        prompts: In tokens.
        rows: For every answer the index of its prompt and the weights of the guides.
        max_tokens: Of an answer.
        end_tokens: Any of them ends an answer.
        generator: Of the noise.
        temperature: Above 0.
        top_p: In (0, 1].
        stops: Any of them cuts an answer off behind it, once it has `min_tokens`; see `sentence_ends`.
        min_tokens: See there.
        tokens: Those that the vocabulary holds: the base's other columns are never drawn. All by default.
    """
    answers = [Drawn([], 0.0) for _ in rows]
    voices = [_Voice(model, prompts, [prompt for prompt, _ in rows]) for model in models]
    weights_RM = torch.tensor([[1.0, *weights] for _, weights in rows])
    ends, late_ends = torch.tensor(sorted(end_tokens)), torch.tensor(sorted({*end_tokens, *stops}))
    is_unspelled_V = torch.zeros(voices[0].logits_RV.shape[1], dtype=torch.bool)
    if tokens is not None:
        is_unspelled_V[:] = True
        is_unspelled_V[[token for token in tokens if token < len(is_unspelled_V)]] = False
    live = torch.arange(len(rows))
    is_over_R = torch.zeros(len(rows), dtype=torch.bool)
    for position in range(max_tokens):
        base_RV, *guides = (voice.logits_RV for voice in voices)
        base_RV = base_RV.float().masked_fill(is_unspelled_V, -torch.inf)
        guided_RV = _merged([base_RV, *guides], weights_RM)
        drawn_R = _draw(guided_RV, temperature, top_p, generator)
        divergence_R = _divergence(guided_RV, base_RV) if len(voices) > 1 else torch.zeros(len(live))
        for index, is_over, token, nats in zip(
            live.tolist(), is_over_R.tolist(), drawn_R.tolist(), divergence_R.tolist(), strict=True
        ):
            if not is_over:
                answers[index].tokens.append(token)
                answers[index].divergence += nats
        is_over_R |= torch.isin(drawn_R, late_ends if position + 1 >= min_tokens else ends)
        if is_over_R.all() or position + 1 == max_tokens:
            break
        if is_over_R.sum() > len(live) / 3:
            kept = (~is_over_R).nonzero()[:, 0]
            live, drawn_R, weights_RM, is_over_R = live[kept], drawn_R[kept], weights_RM[kept], is_over_R[kept]
            for voice in voices:
                voice.keep(kept)
        for voice in voices:
            voice.append(drawn_R)
    return answers


def sentence_ends(tokenizer: Any) -> set[int]:
    """Return the tokens that end a sentence: by a full stop, an exclamation or question mark, or a new line."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return {token for token, text in enumerate(texts) if re.search(r"[.!?][\"')\]]*\s*$|\n", text)}


class _Voice:
    """A model with its cache of all answers, and its logits for each one's next token."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> None:
        self._model = model
        longest = max(len(prompt) for prompt in prompts)
        tokens_PL = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_PL = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model(
            input_ids=tokens_PL,
            attention_mask=mask_PL,
            position_ids=(mask_PL.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        rows = torch.tensor(prompt_of_row)
        self._cache = output.past_key_values
        self._cache.batch_select_indices(rows)
        self._mask_RL = mask_PL[rows]
        self.logits_RV: Tensor = output.logits[rows, -1]

    def append(self, tokens_R: Tensor) -> None:
        """Go on by one token in every row."""
        self._mask_RL = torch.cat([self._mask_RL, self._mask_RL.new_ones(len(tokens_R), 1)], 1)
        output = self._model(
            input_ids=tokens_R[:, None],
            attention_mask=self._mask_RL,
            position_ids=self._mask_RL.sum(1, keepdim=True) - 1,
            past_key_values=self._cache,
        )
        self.logits_RV = output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Leave out all other rows."""
        self._cache.batch_select_indices(rows)
        self._mask_RL = self._mask_RL[rows]


def _merged(logits: Sequence[Tensor], weights_RM: Tensor) -> Tensor:
    """The guided logits [R, V] of `actors.guidance.merge`, each row with weights of its own; a weight 0 is no guide."""
    guided_RV = logits[0].float().clone()
    for guide_RU, weights_R in zip(logits[1:], weights_RM.unbind(1)[1:], strict=True):
        num_common = min(guided_RV.shape[1], guide_RU.shape[1])
        guided_RV[:, :num_common] += weights_R[:, None] * guide_RU[:, :num_common].float()
        guided_RV[weights_R != 0, num_common:] = -torch.inf
    return guided_RV


def _draw(logits_RV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token for each row, by a race of exponential clocks."""
    probabilities_RV = (logits_RV / temperature).softmax(-1)
    tokens_RV: Tensor | None = None
    if top_p < 1:
        probabilities_RV, tokens_RV = _nucleus(probabilities_RV, top_p)
    clocks_RV = torch.empty_like(probabilities_RV).exponential_(generator=generator)
    first_R = (probabilities_RV / clocks_RV).argmax(-1)
    return first_R if tokens_RV is None else tokens_RV.gather(1, first_R[:, None])[:, 0]


def _nucleus(probabilities_RV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens that together reach `top_p`, the others' probabilities 0, and which tokens they are."""
    width = probabilities_RV.shape[1]
    for num_looked_at in (min(NUCLEUS, width), width):
        kept_RK, tokens_RK = probabilities_RV.topk(num_looked_at, -1)
        before_RK = kept_RK.cumsum(-1) - kept_RK
        if num_looked_at == width or (before_RK[:, -1] >= top_p).all():
            break
    return kept_RK.masked_fill(before_RK >= top_p, 0), tokens_RK


def _divergence(guided_RV: Tensor, base_RV: Tensor) -> Tensor:
    """KL(guided || base) of each row, [R], in nats."""
    guided_RV, base_RV = guided_RV.log_softmax(-1), base_RV.log_softmax(-1)
    # A token that a guide forbids has probability 0, and adds nothing.
    return (guided_RV.exp() * (guided_RV - base_RV).nan_to_num(neginf=0.0)).sum(-1)


def decode_answer(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], end_tokens: Collection[int]) -> str:
    """Return an answer's text as the service writes it: what follows the prompt's, up to the end token."""
    context = list(prompt[-NUM_CONTEXT_TOKENS:])
    tokens = answer[:-1] if answer and answer[-1] in end_tokens else answer
    before, whole = (
        tokenizer.backend_tokenizer.decode(part, skip_special_tokens=True) for part in (context, [*context, *tokens])
    )
    return str(whole[len(before) :])


def answer_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pending: Collection[int],
    *,
    num_samples: int,
    max_tokens: int,
    end_tokens: Collection[int],
    temperature: float,
    top_p: float,
    seed: int,
    batch: int,
    stops: Collection[int] = (),
    min_tokens: int = 0,
    tokens: Collection[int] | None = None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield the index of every pending prompt with its responses, `batch` prompts of about the same length at a time.

    All prompts together decide which are in a batch, and its first one's rank by length which noise it draws with: the
    prompts that are pending get what they would have got had all been.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch):
        members = by_length[start : start + batch]
        if not any(i in pending for i in members):
            continue
        answers = draw_answers(
            [model],
            [prompts[i] for i in members],
            [(number, ()) for number in range(len(members)) for _ in range(num_samples)],
            max_tokens=max_tokens,
            end_tokens=end_tokens,
            generator=torch.Generator().manual_seed(seed + start),
            temperature=temperature,
            top_p=top_p,
            stops=stops,
            min_tokens=min_tokens,
            tokens=tokens,
        )
        for number, i in enumerate(members):
            if i in pending:
                of_prompt = answers[number * num_samples : (number + 1) * num_samples]
                yield i, [answer.tokens for answer in of_prompt]
