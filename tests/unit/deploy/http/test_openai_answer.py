"""Answers of several choices, as OpenAI's API has them."""

from typing import Any

from actors.api import Piece, Scores
from deploy.http.openai_answer import Answer
from deploy.http.openai_schema import ChatCompletionRequest, CompletionRequest


def place(text: str, logprob: float | None) -> Scores:
    drawn = {"token": 1, "text": text, "bytes": list(text.encode()), "logprob": logprob}
    return {"drawn": drawn, "top": []}  # type: ignore[typeddict-item]


def piece(text: str, *logprobs: float, num_prompt_tokens: int = 5, is_last: bool = True) -> Piece:
    num_written = len(logprobs) or 1
    written = Piece(
        text=text,
        token_ids=[1] * num_written,
        finish_reason="stop" if is_last else None,
        usage={
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_written,
            "total_tokens": num_prompt_tokens + num_written,
        },
        seed=0,
    )
    if logprobs:
        written["scores"] = [place(text, logprob) for logprob in logprobs]
    return written


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "base", "prompt": "x", **fields})


def test_there_is_a_request_for_each_answer_and_all_have_one_seed() -> None:
    asked = completion(prompt=["a", [1, 2]], n=2).requests({})
    assert [(fields["prompt"], fields["sample"]) for fields in asked] == [
        ("a", 0),
        ("a", 1),
        ([1, 2], 0),
        ([1, 2], 1),
    ]
    assert len({fields["seed"] for fields in asked}) == 1
    chat = ChatCompletionRequest.model_validate(
        {"model": "base", "messages": [{"role": "user", "content": "x"}], "n": 3, "logprobs": True, "top_logprobs": 2}
    )
    assert [(fields["sample"], fields["logprobs"]) for fields in chat.requests({})] == [(0, 2), (1, 2), (2, 2)]


def test_choices_are_counted_over_all_prompts_and_prompts_count_once() -> None:
    request = completion(prompt=["a", "b"], n=2)
    pieces = [piece(text, num_prompt_tokens=number) for text, number in zip("pqrs", (5, 5, 7, 7), strict=True)]
    whole = Answer(request).whole(pieces)
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [
        (0, "p"),
        (1, "q"),
        (2, "r"),
        (3, "s"),
    ]
    assert whole["usage"] == {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16}


def test_the_most_probable_answers_are_given() -> None:
    request = completion(best_of=3, n=2)
    assert {fields["logprobs"] for fields in request.requests({})} == {0}
    pieces = [piece("long", -3.0, -1.0, -2.0), piece("worst", -4.0), piece("best", -0.5, -1.5)]
    whole = Answer(request).whole(pieces)
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [(0, "best"), (1, "long")]
    assert whole["choices"][0]["logprobs"] is None
    assert whole["usage"]["completion_tokens"] == 6


def test_a_stream_ends_when_all_choices_have() -> None:
    answer = Answer(completion(n=2))
    for index, text, is_last in [(0, "a", False), (1, "b", True), (0, "c", True)]:
        assert not answer.is_finished
        chunk = answer.chunk(index, piece(text, is_last=is_last))
        assert chunk["choices"][0]["index"] == index
    assert answer.is_finished
    assert answer.usage_chunk()["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def test_each_choice_of_a_chat_names_its_role_once() -> None:
    request = ChatCompletionRequest.model_validate(
        {"model": "base", "messages": [{"role": "user", "content": "x"}], "n": 2, "stream": True}
    )
    answer = Answer(request)
    deltas = [answer.chunk(index, piece("a", is_last=False))["choices"][0]["delta"] for index in (0, 1, 1, 0)]
    assert [delta.get("role") for delta in deltas] == ["assistant", "assistant", None, None]


def test_a_prompt_comes_before_its_answer() -> None:
    answer = Answer(completion(prompt="éa", echo=True, logprobs=1))
    written = piece("b", -0.5)
    written["prompt_echo"] = {"text": "éa", "scores": [place("é", None), place("a", -0.2)]}
    choice = answer.whole([written])["choices"][0]
    assert choice["text"] == "éab"
    assert choice["logprobs"] == {
        "tokens": ["é", "a", "b"],
        "token_logprobs": [None, -0.2, -0.5],
        "top_logprobs": [None, {"a": -0.2}, {"b": -0.5}],
        "text_offset": [0, 1, 2],
    }
