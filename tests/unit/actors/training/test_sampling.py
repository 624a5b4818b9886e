"""Answers drawn in a batch: from a model alone, and from a base and guides with weights of each answer's own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from actors.guidance.merge import Guidance, merge
from actors.training.sampling import answer_prompts, decode_answer, draw_answers, sentence_ends
from tests.tiny import SPACE_BEFORE_TEXT, llama, spacing_tokenizer, tokenizer

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
MANY = 4000


def _draw(models: Sequence[Any], rows: Sequence[tuple[int, Sequence[float]]], **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "max_tokens": 6,
        "end_tokens": {0},
        "generator": torch.Generator().manual_seed(3),
    }
    return [answer.tokens for answer in draw_answers(models, PROMPTS, rows, **{**settings, **changes})]


def _alone(**changes: Any) -> list[list[int]]:
    return _draw([llama()], [(prompt, ()) for prompt in range(3) for _ in range(4)], **changes)


def _shares(tokens: Sequence[int], size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=size) / len(tokens)


def _next(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    return logits


def test_the_same_seed_gives_the_same_answers() -> None:
    answers = _alone()
    assert len(answers) == 12
    assert all(1 <= len(answer) <= 6 for answer in answers)
    assert _alone() == answers


def test_an_answer_stops_after_any_end_token() -> None:
    first = _alone()[0]
    end_token = first[2]
    stopped = _alone(end_tokens={0, end_token})[0]
    assert stopped == first[: first.index(end_token) + 1]


def test_a_stop_cuts_an_answer_off_once_it_is_long_enough() -> None:
    (free,) = _draw([llama()], [(0, ())], max_tokens=12)
    for min_tokens in (0, 3, 6):
        stop = free[5]
        at = next(i for i, token in enumerate(free) if token == stop and i + 1 >= min_tokens)
        (cut,) = _draw([llama()], [(0, ())], max_tokens=12, stops={stop}, min_tokens=min_tokens)
        assert cut == free[: at + 1]
    (late,) = _draw([llama()], [(0, ())], max_tokens=12, stops=set(free), min_tokens=9)
    assert late == free[:9]


def test_sentences_end_at_marks_and_lines() -> None:
    fast = tokenizer()
    ends = {fast.decode([token]) for token in sentence_ends(fast)}
    assert ends >= {".", "!", "?", "\n"}
    assert not any(text.strip().isalnum() for text in ends)


def test_answers_that_go_on_follow_the_law_after_others_have_left_the_batch() -> None:
    """Half the tokens end an answer, so rows leave at every step; those that stay keep their own context."""
    model = llama()
    size = model.config.vocab_size
    ends = set(range(0, size, 2))
    answers = _draw([model], [(0, ())] * MANY, end_tokens=ends, max_tokens=2)
    starts = _shares([answer[0] for answer in answers], size)
    torch.testing.assert_close(starts, _next(model, PROMPTS[0]).softmax(-1), rtol=0, atol=0.04)
    likely = max((token for token in range(1, size, 2)), key=lambda token: float(starts[token]))
    follow = [answer[1] for answer in answers if answer[0] == likely]
    wanted = _next(model, [*PROMPTS[0], likely]).softmax(-1)
    torch.testing.assert_close(_shares(follow, size), wanted, rtol=0, atol=0.15)
    assert all((answer[0] in ends) == (len(answer) == 1) for answer in answers)


def test_answers_follow_the_models_own_distribution() -> None:
    """With padding in the batch, the first two tokens of each prompt's answers fit the prompt run alone."""
    model = llama()
    size = model.config.vocab_size
    answers = _draw([model], [(prompt, ()) for prompt in range(3) for _ in range(MANY)], max_tokens=2)
    for number, prompt in enumerate(PROMPTS):
        drawn = answers[number * MANY : (number + 1) * MANY]
        first = _next(model, prompt).softmax(-1)
        torch.testing.assert_close(_shares([answer[0] for answer in drawn], size), first, rtol=0, atol=0.04)
        likely = int(first.argmax())
        follow = [answer[1] for answer in drawn if answer[0] == likely and len(answer) > 1]
        second = _next(model, [*prompt, likely]).softmax(-1)
        torch.testing.assert_close(_shares(follow, size), second, rtol=0, atol=0.12)


def test_a_temperature_flattens_the_distribution_and_a_nucleus_cuts_it() -> None:
    model = llama()
    scores = _next(model, PROMPTS[0]) / 2
    answers = _draw([model], [(0, ())] * MANY, max_tokens=1, temperature=2.0)
    shares = _shares([answer[0] for answer in answers], len(scores))
    torch.testing.assert_close(shares, scores.softmax(-1), rtol=0, atol=0.04)

    ordered, tokens = scores.softmax(-1).sort(descending=True)
    kept = tokens[ordered.cumsum(-1) - ordered < 0.5]
    wanted = torch.zeros_like(scores)
    wanted[kept] = scores.softmax(-1)[kept] / scores.softmax(-1)[kept].sum()
    answers = _draw([model], [(0, ())] * MANY, max_tokens=1, temperature=2.0, top_p=0.5)
    torch.testing.assert_close(_shares([answer[0] for answer in answers], len(scores)), wanted, rtol=0, atol=0.04)


@pytest.mark.parametrize("weight", [0.0, 0.7, -0.5])
def test_guided_answers_follow_the_merged_distribution(weight: float) -> None:
    """In a batch in which every row has a weight of its own."""
    base, guide = llama(seed=1), llama(seed=2)
    rows = [(0, (each,)) for each in (weight, 3.0) for _ in range(MANY)]
    answers = draw_answers(
        [base, guide],
        PROMPTS,
        rows,
        max_tokens=1,
        end_tokens={0},
        generator=torch.Generator().manual_seed(0),
    )
    logits = _next(base, PROMPTS[0])
    guided = merge([logits], [[Guidance(weight, _next(guide, PROMPTS[0]))] if weight else []])[0]
    shares = _shares([answer.tokens[0] for answer in answers[:MANY]], len(logits))
    torch.testing.assert_close(shares, guided.softmax(-1), rtol=0, atol=0.04)
    wanted = (guided.softmax(-1) * (guided.log_softmax(-1) - logits.log_softmax(-1))).sum()
    assert answers[0].divergence == pytest.approx(float(wanted), abs=1e-4)


def _answer(prompts: list[list[int]], pending: set[int]) -> dict[int, list[list[int]]]:
    settings: dict[str, Any] = {"num_samples": 3, "max_tokens": 5, "end_tokens": {0}, "temperature": 1.0, "top_p": 0.9}
    return dict(answer_prompts(llama(), prompts, pending, seed=4, batch=2, **settings))


def test_prompts_are_answered_in_batches_of_like_length() -> None:
    answers = _answer(PROMPTS, {0, 1, 2})
    # By length: 1 and 2, then 0, which is number 2 of all.
    for members, seed in (([1, 2], 4), ([0], 4 + 2)):
        rows = [(number, ()) for number in members for _ in range(3)]
        wanted = _draw([llama()], rows, max_tokens=5, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        assert [answer for i in members for answer in answers[i]] == wanted


def test_what_is_left_is_answered_as_it_would_have_been() -> None:
    whole = _answer(PROMPTS, {0, 1, 2})
    for pending in ({0}, {1}, {2, 0}, set[int]()):
        assert _answer(PROMPTS, pending) == {i: whole[i] for i in pending}


@pytest.mark.parametrize("kind", SPACE_BEFORE_TEXT)
@pytest.mark.parametrize(
    ("pieces", "text"), [(["_The"], " The"), (["T", "he", "<turn>"], "The"), ([], ""), (["A"], "")]
)
def test_an_answers_text_keeps_its_space_and_leaves_the_end_token_out(kind: str, pieces: list[str], text: str) -> None:
    fast = spacing_tokenizer(kind)
    space = "Ġ" if kind == "byte_level" else "▁"
    answer = fast.convert_tokens_to_ids([piece.replace("_", space) for piece in pieces])
    ends = {fast.convert_tokens_to_ids("A"), 0, 2}
    assert decode_answer(fast, fast("hi").input_ids, answer, ends) == text


@pytest.mark.parametrize("tokens", [range(40), [0, *range(30, 60)]])
@pytest.mark.parametrize("weights", [(), (-2.0,), (1.0,)])
def test_a_column_without_a_token_is_never_drawn(tokens: Sequence[int], weights: Sequence[float]) -> None:
    models = [llama(), *(llama(seed=i + 1) for i in range(len(weights)))]
    rows = [(prompt, weights) for prompt in range(3) for _ in range(20)]
    drawn = _draw(models, rows, tokens=tokens)
    assert {token for answer in drawn for token in answer} <= set(tokens)
    assert not {token for answer in _draw(models, rows) for token in answer} <= set(tokens)


def test_the_divergence_counts_the_vocabularys_tokens_alone() -> None:
    [answer] = draw_answers(
        [llama(), llama(seed=1)],
        [[5]],
        [(0, (0.5,))],
        max_tokens=4,
        end_tokens={0},
        generator=torch.Generator().manual_seed(0),
        tokens=range(40),
    )
    assert 0 < answer.divergence < float("inf")
