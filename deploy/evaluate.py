"""Scores what the batch job wrote: `python -m deploy.evaluate results.jsonl ...`.

For every file one row of three measures, each of which a guide can only gain in at the cost of another:

    sentiment      VADER's compound score of the text, between -1 and 1; mean and 95 % interval
    log p / token  the base model's own log-probability of the tokens at temperature 1: is it still the base's language
    distinct-2     different pairs of adjacent words over all of them, within an answer and over the whole file
"""

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.prompts import Prompt, PromptEncoder
from actors.training.objective import collate, response_log_probs, response_logits
from cluster.errors import InvalidConfiguration

BASE = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The measures of one file of results."""

    num_answers: int
    sentiment: float
    interval: float
    """Half the width of the sentiment's 95 % interval; answers to one prompt count as one observation, their mean."""

    log_prob: float
    """Per token, in nats."""

    distinct_in_answer: float
    distinct_in_file: float


def score(records: Sequence[dict[str, Any]], model: Any, tokenizer: Any) -> Scores:
    """Measure the answers, each with `text`, `token_ids` and `messages` or `prompt`, under the base `model`."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    by_prompt: dict[str, list[float]] = {}
    for record in records:
        key = json.dumps(record.get("messages") or record["prompt"])
        by_prompt.setdefault(key, []).append(analyzer.polarity_scores(record["text"])["compound"])
    means = [statistics.fmean(values) for values in by_prompt.values()]
    spread = statistics.stdev(means) if len(means) > 1 else float("nan")
    texts = [record["text"] for record in records]
    per_answer = [distinct_2([text]) for text in texts]
    return Scores(
        num_answers=len(records),
        sentiment=statistics.fmean(itertools.chain.from_iterable(by_prompt.values())),
        interval=1.96 * spread / len(means) ** 0.5,
        log_prob=log_prob_per_token(records, model, tokenizer),
        distinct_in_answer=statistics.fmean(value for value in per_answer if value is not None),
        distinct_in_file=distinct_2(texts) or 0.0,
    )


def distinct_2(texts: Iterable[str]) -> float | None:
    """Different pairs of adjacent words over all such pairs (Li et al., 2016); None where there is no pair."""
    pairs = [pair for text in texts for pair in itertools.pairwise(re.findall(r"\w+", text.lower()))]
    return len(set(pairs)) / len(pairs) if pairs else None


@torch.inference_mode()
def log_prob_per_token(records: Sequence[dict[str, Any]], model: Any, tokenizer: Any) -> float:
    """The mean log-probability of all answers' tokens under the model, given their prompts, in nats."""
    encoder = PromptEncoder(tokenizer)
    texts = [
        (encoder.encode(Prompt(record.get("prompt"), record.get("messages"))), record["token_ids"])
        for record in records
        if record["token_ids"]
    ]
    texts.sort(key=lambda text: len(text[0]) + len(text[1]))
    total = 0.0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        inputs = collate([prompt for prompt, _ in batch], [answer for _, answer in batch])
        total += response_log_probs(response_logits(model, inputs), inputs.targets_BT).double().sum().item()
    return total / sum(len(answer) for _, answer in texts)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the answers in a file of the batch job.

    Raises:
        InvalidConfiguration: a line is no answer, or there is none at all.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        record = json.loads(line)
        missing = [key for key in ("text", "token_ids") if key not in record]
        if missing or not ("messages" in record or "prompt" in record):
            raise InvalidConfiguration(
                f"{path}, line {number}: no answer to score ({', '.join(missing) or 'prompt or messages'} missing); "
                "run the batch job again so that it does what failed"
            )
        records.append(record)
    if not records:
        raise InvalidConfiguration(f"{path}: holds no answer; run the batch job first")
    return records


def main() -> None:
    """Print a table with one row per file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSONL files that deploy.batch wrote")
    parser.add_argument("--base", type=Path, default=BASE, help="directory of the base model")
    arguments = parser.parse_args()
    files = {path: read_results(path) for path in arguments.results}
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    print("| file | answers | sentiment | log p / token | distinct-2 in an answer | distinct-2 in the file |")
    print("|---|---|---|---|---|---|")
    for path, records in files.items():
        scores = score(records, model, tokenizer)
        print(
            f"| {path.name} | {scores.num_answers} | {scores.sentiment:.3f} ± {scores.interval:.3f} "
            f"| {scores.log_prob:.3f} | {scores.distinct_in_answer:.3f} | {scores.distinct_in_file:.3f} |"
        )


if __name__ == "__main__":
    main()
