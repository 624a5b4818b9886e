"""Scores the answers that are kept: rewards, log-probabilities under the base, and what a row costs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.prompts import Message
from actors.prompts import Prompt as ModelPrompt
from actors.training.rewards import Reward
from actors.training.rewards import score as apply_reward
from actors.training.soup import count_parameters
from deploy.evaluation.answers import Answer, KeptAnswers, files_digest
from deploy.evaluation.measures import Row, ScoredAnswer, best_of, log_probs
from deploy.evaluation.plan import Plan
from deploy.evaluation.prompts import Prompt


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
    """Scores rows one after the other; loads the base at most once, and only for answers without log-probabilities."""

    def __init__(self, plan: Plan, prompts: Sequence[Prompt], rewards: Mapping[str, Reward]) -> None:
        self._plan = plan
        self._prompts = prompts
        self._rewards = rewards
        self._base_digest = files_digest(plan.base_path)
        self._base: tuple[object, object] | None = None

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
        log_probs = files.log_probs(answers, self._base_digest)
        if log_probs is None:
            print(f"{row}: log-probabilities under the base", file=sys.stderr, flush=True)
            log_probs = self._log_probs(answers)
            files.keep_log_probs(answers, self._base_digest, log_probs)
        scored = []
        for number, pairs in enumerate(files.by_prompt(list(zip(answers, log_probs, strict=True)))):
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
                        log_prob=log_prob,
                        rewards={name: values[sample] for name, values in by_reward.items()},
                    )
                    for sample, (answer, log_prob) in enumerate(pairs)
                ]
            )
        guides = sum(count_parameters(self._plan.guide_path(guide)) for guide in self._plan.guides_of(row))
        return ScoredRow(
            answers=scored,
            tokens_per_s=files.meta.tokens_per_s,
            num_parameters=count_parameters(next(iter(self._plan.parts_of(row)))) + guides,
            num_guide_parameters=guides,
        )

    def _log_probs(self, answers: Sequence[Answer]) -> list[float]:
        if self._base is None:
            model = AutoModelForCausalLM.from_pretrained(
                self._plan.base_path, dtype=torch.float32, trust_remote_code=False
            ).eval()
            self._base = model, AutoTokenizer.from_pretrained(self._plan.base_path, trust_remote_code=False)
        prompts = [_as_model_prompt(prompt) for prompt in self._prompts]
        texts = [(prompts[line % len(prompts)], answer.token_ids) for line, answer in enumerate(answers)]
        return log_probs(texts, *self._base)


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
