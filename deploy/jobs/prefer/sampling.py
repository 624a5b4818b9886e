"""The two ways in which `trimtab prefer` samples answers: from a model in this process, and through a running service.

Both hand over a prompt's answers once it has all of them. Knows no file of answers.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.engine.models.loading import load_whole
from actors.prompts import Prompt, PromptEncoder
from actors.training.sampling import answer_prompts, decode_answer, sentence_ends
from actors.vocabularies import end_tokens, load_tokenizer, max_positions
from cluster.errors import InvalidConfiguration, InvalidRequest, TrimtabError
from deploy.jobs.batch.lines import Line, derive_seed
from deploy.jobs.prefer.answers import Answer, Answers, Asked
from deploy.jobs.progress import Progress
from deploy.jobs.requests import PAUSES_S, Generate, answer_all
from deploy.jobs.training.run import choose_dtype

Record = Callable[[Asked, Sequence[Answer]], None]
"""Takes a prompt and all of its answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSampling:
    """How a model in this process answers."""

    model: Path
    num_samples: int
    """Of each prompt."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    batch: int
    """Prompts at a time."""

    min_sentence_tokens: int | None = None
    """Cut answers off at the end of the first sentence behind so many tokens."""


def sample_locally(
    local: LocalSampling, prompts: Sequence[Asked], done: Answers, record: Record, progress: Progress
) -> None:
    """Answer the prompts that are not done.

    Raises:
        InvalidConfiguration: it cannot be loaded, or a prompt cannot be encoded or is too long.
    """
    try:
        tokenizer: Any = load_tokenizer(str(local.model))
        ends = end_tokens(str(local.model), tokenizer)
        # Eager attention is the fastest in bfloat16 on CPUs.
        dtype = getattr(torch, choose_dtype(local.dtype, on_gpu=False))
        model: Any = load_whole(local.model, dtype=dtype, attn_implementation="eager").eval()
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"--model: {str(error).removeprefix('model: ')}") from error
    except (OSError, ValueError) as error:
        raise InvalidConfiguration(f"--model: {local.model} cannot be loaded: {error}") from error
    if not ends:
        raise InvalidConfiguration(f"--model: {local.model} names no token that ends an answer (eos_token); set it")
    max_context = max_positions(str(local.model)) or sys.maxsize
    encoder = PromptEncoder(tokenizer)
    tokens = [_encode(asked, encoder, max_context - local.max_tokens) for asked in prompts]
    for i, drawn in answer_prompts(
        model,
        tokens,
        {i for i, asked in enumerate(prompts) if asked.id not in done},
        num_samples=local.num_samples,
        max_tokens=local.max_tokens,
        end_tokens=ends,
        temperature=local.temperature,
        top_p=local.top_p,
        seed=local.seed,
        batch=local.batch,
        stops=sentence_ends(tokenizer) if local.min_sentence_tokens else (),
        min_tokens=local.min_sentence_tokens or 0,
        tokens={*tokenizer.get_vocab().values(), *ends},
    ):
        answers = [
            Answer(
                text=decode_answer(tokenizer, tokens[i], ids, ends),
                token_ids=ids,
                finish_reason="stop" if ids[-1] in ends else "length",
            )
            for ids in drawn
        ]
        record(prompts[i], answers)
        for _ in drawn:
            progress.succeed()


def _encode(asked: Asked, encoder: PromptEncoder, limit: int) -> list[int]:
    try:
        tokens = encoder.encode(Prompt(asked.content.get("prompt"), asked.content.get("messages")))
    except InvalidRequest as error:
        raise InvalidConfiguration(f"--prompts: line {asked.number}: {error}") from error
    if len(tokens) > limit:
        raise InvalidConfiguration(
            f"--prompts: line {asked.number} has {len(tokens)} tokens, and --max-tokens leaves room for {limit} in the "
            "model's context; shorten it or ask for fewer"
        )
    return tokens


async def sample_through_service(
    generate: Generate,
    prompts: Sequence[Asked],
    record: Record,
    progress: Progress,
    *,
    num_samples: int,
    fields: Mapping[str, Any],
    seed: int,
    concurrency: int,
    pauses_s: Sequence[float] = PAUSES_S,
) -> None:
    """Answer the prompts, each sample a request with a seed of its own; a request that failed for a while is repeated.

    Raises:
        TrimtabError: a request failed for good; what was recorded is done.
    """
    requests = (
        Line(
            number=asked.number,
            id=sample,
            digest="",
            fields={**fields, **asked.content, "seed": derive_seed(f"{seed}:{asked.number}:{sample}")},
        )
        for asked in prompts
        for sample in range(num_samples)
    )
    by_number = {asked.number: asked for asked in prompts}
    drawn: defaultdict[int, dict[str | int, Answer]] = defaultdict(dict)

    def collect(line: Line, outcome: Mapping[str, Any]) -> None:
        if error := outcome.get("error"):
            raise TrimtabError(
                f"--prompts: line {line.number}: {error['type']}: {error['message']}; the same command goes on where "
                "this one stopped (a prompt that cannot be answered may be left out: a blank line is skipped)"
            )
        answers = drawn[line.number]
        answers[line.id] = Answer.model_validate({name: outcome[name] for name in Answer.model_fields})
        if len(answers) == num_samples:
            record(by_number[line.number], [answers[sample] for sample in range(num_samples)])
            del drawn[line.number]

    await answer_all(requests, generate, collect, progress, concurrency=concurrency, pauses_s=pauses_s)
