"""What the evaluation measures, on texts whose scores are known."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import InvalidConfiguration
from deploy.evaluate import distinct_2, log_prob_per_token, read_results, score
from tests.tiny import llama, tokenizer

RECORDS: list[dict[str, Any]] = [
    {"prompt": "abc", "text": "What a wonderful day", "token_ids": [5, 6, 7]},
    {"prompt": "abc", "text": "a terrible terrible awful day", "token_ids": [8]},
    {"prompt": "d", "text": "a table", "token_ids": [9, 10]},
]


def test_distinct_2_counts_pairs_of_words() -> None:
    assert distinct_2(["a b a b a"]) == 2 / 4
    assert distinct_2(["A b.", "a, b"]) == 1 / 2
    assert distinct_2(["word", ""]) is None


def test_log_prob_is_the_mean_over_all_tokens() -> None:
    model, tokens = llama(), tokenizer()
    total = 0.0
    for record in RECORDS:
        prompt = tokens(record["prompt"]).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + record["token_ids"]])).logits[0].log_softmax(-1)
        total += sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(record["token_ids"]))
    assert log_prob_per_token(RECORDS, model, tokens) == pytest.approx(total / 6, rel=1e-4)


def test_a_positive_text_scores_higher_than_a_negative_one() -> None:
    scores = [score([record], llama(), tokenizer()) for record in RECORDS]
    assert scores[0].sentiment > 0.5 > scores[2].sentiment == 0 > -0.5 > scores[1].sentiment
    assert math.isnan(scores[0].interval)


def test_answers_to_one_prompt_are_one_observation() -> None:
    both = score(RECORDS, llama(), tokenizer())
    assert both.num_answers == 3
    positive, negative = (score([record], llama(), tokenizer()).sentiment for record in RECORDS[:2])
    means = [(positive + negative) / 2, 0.0]
    assert both.interval == pytest.approx(1.96 * abs(means[0] - means[1]) / 2, rel=1e-6)


def test_a_line_without_an_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [RECORDS[0], {"prompt": "x", "error": "no"}]))
    with pytest.raises(InvalidConfiguration, match=r"results\.jsonl, line 2: no answer to score \(text, token_ids"):
        read_results(path)
    path.write_text("")
    with pytest.raises(InvalidConfiguration, match="holds no answer"):
        read_results(path)
