"""Scores the answers that are kept: rewards, log-probabilities and KL under the base, and what a row costs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.prompts import Message
from actors.prompts import Prompt as ModelPrompt
from actors.training.rewards import Reward
from actors.training.rewards import score as apply_reward
from actors.training.soup import count_parameters
from deploy.jobs.evaluation.answers import Answer, KeptAnswers, files_digest
from deploy.jobs.evaluation.measures import Law, Row, ScoredAnswer, best_of, laws
from deploy.jobs.evaluation.plan import Plan
from deploy.jobs.evaluation.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """A row's answers with their scores, and what they cost."""

    answers: Row
    tokens_per_s: float | None
    """Of the answers that are kept, all of them together; None if no run of the row was timed."""

    num_parameters: int
    """That run for a token that is kept."""

    num_guide_parameters: int


class Scorer:
    """Scores rows one after the other; loads models only for answers that were not measured yet, the base once."""

    def __init__(self, plan: Plan, prompts: Sequence[Prompt], rewards: Mapping[str, Reward]) -> None:
        self._plan = plan
        self._prompts = prompts
        self._rewards = rewards
        self._base_digest = files_digest(plan.base_path)
        self._base: tuple[Any, Any] | None = None

    def score(self, kept: Mapping[str, KeptAnswers]) -> dict[str, ScoredRow]:
        """Return every row of the plan whose answers are complete, in the plan's order.

        Raises:
            InvalidConfiguration: a reward failed.
        """
        written = {}
        for row, files in kept.items():
            answers = files.read()
            if answers is not None:
                written[row] = self._score_written(row, files, answers)
        scored = {}
        for row, settings in self._plan.rows.items():
            if row in written:
                scored[row] = written[row]
            elif settings.best_of and settings.reward and settings.source in written:
                scored[row] = _pick(written[settings.source], settings.best_of, settings.reward)
        return scored

    def _score_written(self, row: str, files: KeptAnswers, answers: Sequence[Answer]) -> ScoredRow:
        num_measured = min(self._plan.num_measured, self._plan.num_samples_of(row)) * len(self._prompts)
        measured = files.measured(answers[:num_measured], self._base_digest)
        if measured is None:
            print(f"{row}: log-probabilities and KL", file=sys.stderr, flush=True)
            found = self._laws(row, answers[:num_measured])
            log_probs, divergences = [law.log_prob for law in found], [law.divergence for law in found]
            measured = files.keep_measured(answers[:num_measured], self._base_digest, log_probs, divergences)
        laws = [Law(*values) for values in zip(measured.log_probs, measured.divergences, strict=True)]
        scored = []
        padded = [*laws, *[None] * (len(answers) - len(laws))]
        for number, pairs in enumerate(files.by_prompt(list(zip(answers, padded, strict=True)))):
            prompt = self._prompts[number].content
            texts = [answer.text for answer, _ in pairs]
            by_reward = {
                name: apply_reward(reward, prompt, texts, number=number + 1) for name, reward in self._rewards.items()
            }
            scored.append(
                [
                    ScoredAnswer(
                        text=answer.text,
                        num_tokens=len(answer.token_ids),
                        has_ended=answer.has_ended,
                        law=law,
                        rewards={name: values[sample] for name, values in by_reward.items()},
                    )
                    for sample, (answer, law) in enumerate(pairs)
                ]
            )
        guides = sum(count_parameters(self._plan.guide_path(guide)) for guide in self._plan.guides_of(row))
        return ScoredRow(
            answers=scored,
            tokens_per_s=files.meta.tokens_per_s,
            num_parameters=count_parameters(next(iter(self._plan.parts_of(row)))) + guides,
            num_guide_parameters=guides,
        )

    def _laws(self, row: str, answers: Sequence[Answer]) -> list[Law]:
        if self._base is None:
            tokenizer = AutoTokenizer.from_pretrained(self._plan.base_path, trust_remote_code=False)
            self._base = _load(self._plan.base_path), tokenizer
        prompts = [_as_model_prompt(prompt) for prompt in self._prompts]
        texts = [(prompts[line % len(prompts)], answer.token_ids) for line, answer in enumerate(answers)]
        settings = self._plan.rows[row]
        weights = settings.weights or {}
        guides = [(_load(self._plan.guide_path(guide)), weights[guide]) for guide in self._plan.guides_of(row)]
        return laws(texts, *self._base, guides=guides, writer=_load_average(self._plan.parts_of(row), settings.model))


def _load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()


def _load_average(parts: Mapping[Path, float], model: str | None) -> Any:
    """The model that wrote in the base's place, of one directory or of several averaged; None if it was the base."""
    if model is None:
        return None
    (first, share), *others = parts.items()
    loaded = _load(first)
    weights = loaded.state_dict()
    for value in weights.values():
        value.mul_(share)
    for directory, share in others:
        for name, value in _load(directory).state_dict().items():
            weights[name].add_(value, alpha=share)
    return loaded


def _as_model_prompt(prompt: Prompt) -> ModelPrompt:
    if isinstance(prompt.content, str):
        return ModelPrompt(text=prompt.content)
    return ModelPrompt(messages=[Message(role=turn["role"], content=turn["content"]) for turn in prompt.content])


def _pick(source: ScoredRow, num: int, reward: str) -> ScoredRow:
    """The best of every `num` answers: each costs all of them."""
    kept = best_of(source.answers, num, reward)
    share = _num_tokens(kept) / _num_tokens(source.answers)
    return ScoredRow(
        answers=kept,
        tokens_per_s=None if source.tokens_per_s is None else source.tokens_per_s * share,
        num_parameters=source.num_parameters * num,
        num_guide_parameters=source.num_guide_parameters,
    )


def _num_tokens(row: Row) -> int:
    return sum(answer.num_tokens for answers in row for answer in answers)
