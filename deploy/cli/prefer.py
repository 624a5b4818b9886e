"""Makes preference pairs out of a model: `trimtab prefer --prompts FILE --reward NAME --output FILE`.

Samples several answers to every prompt (`deploy.jobs.prefer.sampling`), keeps them in a file
(`deploy.jobs.prefer.answers`), scores them with a reward function (`actors.training.rewards`) and writes pairs
(`actors.training.preferences`).
"""

import asyncio
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.training.preferences import Pairing, PairRules, pair_answers
from actors.training.rewards import Reward, load_reward, score
from cluster.errors import InvalidConfiguration
from deploy.cli.options.prefer import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.batch.lines import to_json
from deploy.jobs.outcome import BadOutcome
from deploy.jobs.prefer.answers import Answer, Answers, AnswersFile, Asked, read_prompts
from deploy.jobs.prefer.sampling import LocalSampling, Record, sample_locally, sample_through_service
from deploy.jobs.progress import Progress
from deploy.jobs.requests import connect

BATCH = 10
"""Prompts at a time, of a model in this process."""

CONCURRENCY = 16
"""Open requests at a time."""


def collect_answers(options: Options, path: Path, prompts: Sequence[Asked]) -> Answers:
    """Return the answers to all prompts; those that the file there does not hold yet are sampled and kept in it."""
    source = (
        {"model": str(options.model)} if options.model else {"profile": options.profile, "weights": options.weights}
    )
    sampling = {
        **source,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    if options.model and options.sentence:
        sampling["sentence"] = options.sentence
    file = AnswersFile(path, num_samples=options.samples, sampling=sampling)
    try:
        answers = file.read(prompts)

        def record(asked: Asked, drawn: Sequence[Answer]) -> None:
            file.append(asked, drawn)
            answers[asked.id] = drawn

        print(f"{len(prompts)} prompts, {len(answers)} of them answered in {path}", file=sys.stderr)
        if len(answers) < len(prompts):
            _sample(options, prompts, answers, record)
    finally:
        file.close()
    return answers


def _sample(options: Options, prompts: Sequence[Asked], done: Answers, record: Record) -> None:
    model = options.model
    # Before anything is counted: without a service there is nothing to do.
    client = None if model is not None else connect()
    total, num_done = len(prompts) * options.samples, len(done) * options.samples
    progress = Progress(total=total, num_done=num_done, file=sys.stderr)
    try:
        if client is None:
            assert model is not None
            local = LocalSampling(
                model=model,
                num_samples=options.samples,
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
                dtype=options.dtype or "auto",
                batch=options.batch or BATCH,
                min_sentence_tokens=options.sentence,
            )
            sample_locally(local, prompts, done, record, progress)
        else:
            sampling = sample_through_service(
                client.generate,
                [asked for asked in prompts if asked.id not in done],
                record,
                progress,
                num_samples=options.samples,
                fields=options.request_fields(),
                seed=options.seed,
                concurrency=options.concurrency or CONCURRENCY,
            )
            asyncio.run(sampling)
    finally:
        progress.close()


def score_answers(reward: Reward, prompts: Sequence[Asked], answers: Answers) -> list[list[float]]:
    """Return the rewards of every prompt's answers; an error names the prompt by its line."""
    progress = Progress(total=len(prompts), num_done=0, file=sys.stderr)
    rewards = []
    try:
        for asked in prompts:
            prompt = asked.content.get("messages") or asked.content["prompt"]
            texts = [answer.text for answer in answers[asked.id]]
            rewards.append(score(reward, prompt, texts, number=asked.number))
            progress.succeed()
    finally:
        progress.close()
    return rewards


def pair_all(
    prompts: Sequence[Asked], answers: Answers, rewards: Sequence[Sequence[float]], rules: PairRules, *, seed: int
) -> list[Pairing]:
    """Return every prompt's pairs; which are drawn depends on the seed and the prompt's own line alone."""
    return [
        pair_answers(
            [answer.text for answer in answers[asked.id]],
            [len(answer.token_ids) for answer in answers[asked.id]],
            values,
            rules,
            random.Random(f"{seed}:{asked.number}"),
        )
        for asked, values in zip(prompts, rewards, strict=True)
    ]


def write_pairs(
    path: Path,
    prompts: Sequence[Asked],
    answers: Answers,
    rewards: Sequence[Sequence[float]],
    pairings: Sequence[Pairing],
) -> None:
    """Write a pair a line; the file appears when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for asked, values, pairing in zip(prompts, rewards, pairings, strict=True):
            for better, worse in pairing.pairs:
                chosen, rejected = answers[asked.id][better], answers[asked.id][worse]
                pair = {
                    "id": asked.id,
                    **asked.content,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "chosen_finish_reason": chosen.finish_reason,
                    "rejected_finish_reason": rejected.finish_reason,
                    "chosen_reward": values[better],
                    "rejected_reward": values[worse],
                }
                file.write(to_json(pair) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def summarise(rewards: Sequence[Sequence[float]], pairings: Sequence[Pairing]) -> str:
    """Return the counts as text."""
    values = [value for of_prompt in rewards for value in of_prompt]
    num_compared = sum(pairing.num_compared for pairing in pairings)
    num_close = sum(pairing.num_within_margin for pairing in pairings)
    num_unlike = sum(pairing.num_unlike_in_length for pairing in pairings)
    num_stuck = sum(pairing.num_stuck for pairing in pairings)
    num_pairs = sum(len(pairing.pairs) for pairing in pairings)
    num_without = sum(not pairing.pairs for pairing in pairings)
    num_over = num_compared - num_close - num_unlike - num_stuck - num_pairs
    share = max(1, num_compared)
    return (
        f"{len(values)} answers to {len(rewards)} prompts, mean reward {statistics.fmean(values):.4f}\n"
        f"{num_pairs} pairs, {num_without} prompts without one\n"
        f"of {num_compared} pairs of different answers {num_close / share:.1%} were dropped by the margin, "
        f"{num_unlike / share:.1%} by their length, {num_stuck / share:.1%} because the better one repeats itself, "
        f"{num_over / share:.1%} by the number of pairs per prompt"
    )


def run(options: Options) -> None:
    """Make the pairs.

    Raises:
        BadOutcome: no two answers make one.
        TrimtabError: they could not be made.
        OSError: a file cannot be read or written.
    """
    options = _absolute(options)
    answers_path = options.answers or options.output.with_name(f"{options.output.stem}.answers.jsonl")
    check_files(options, answers_path)
    reward = load_reward(options.reward)
    prompts = read_prompts(options.prompts)
    answers = collect_answers(options, answers_path, prompts)
    print(f"scoring with {options.reward}", file=sys.stderr)
    rewards = score_answers(reward, prompts, answers)
    rules = PairRules(
        margin=options.margin,
        max_length_difference=options.max_length_difference,
        max_length_ratio=options.max_length_ratio,
        max_repeat=options.max_repeat,
        limit=options.pairs_per_prompt or None,
        widest=options.widest,
    )
    pairings = pair_all(prompts, answers, rewards, rules, seed=options.seed)
    print(summarise(rewards, pairings))
    if not any(pairing.pairs for pairing in pairings):
        raise BadOutcome(
            "no two answers make a pair, and nothing was written; lower --margin, raise --max-length-difference, or "
            "sample more or longer answers (--samples, --max-tokens, --temperature) into another --answers"
        )
    write_pairs(options.output, prompts, answers, rewards, pairings)
    print(f"pairs are in {options.output}, answers in {answers_path}")


def _absolute(options: Options) -> Options:
    """The options with paths that mean the same in any folder."""
    paths = {name: getattr(options, name) for name in ("prompts", "output", "answers", "model")}
    return replace(options, **{name: path.resolve() for name, path in paths.items() if path is not None})


def check_files(options: Options, answers: Path) -> None:
    """Look for what is to be read, and for the folders of what is to be written.

    Raises:
        InvalidConfiguration: something is not there, or two options name one file.
    """
    if not options.prompts.is_file():
        raise InvalidConfiguration(f"--prompts: there is no file {options.prompts}")
    if options.model and not options.model.is_dir():
        raise InvalidConfiguration(f"--model: there is no folder {options.model}")
    files = {"--prompts": options.prompts}
    for option, path in {"--answers": answers, "--output": options.output}.items():
        if not path.parent.is_dir():
            raise InvalidConfiguration(f"{option}: there is no folder {path.parent}; make it first")
        if path.exists() and not path.is_file():
            raise InvalidConfiguration(f"{option}: {path} is no file")
        if path in files.values():
            raise InvalidConfiguration(f"{option}: {path} is another file of this run; give another")
        files[option] = path


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if no two answers make a pair, 2 if nothing was started."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("prefer"))
