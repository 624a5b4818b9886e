"""Prompts that end inside answers."""

import json
from pathlib import Path

import pytest

from deploy.cli import contexts
from tests.tiny import llama, save

LONG = "The first sentence is of some length. The second one is here too! And a third\nline. The end"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save(llama(), tmp_path / "model")


def run(model: str, folder: Path, answers: list[str], *more: str) -> int:
    listed = [{"text": text, "token_ids": [5, 6], "finish_reason": "stop"} for text in answers]
    (folder / "answers.jsonl").write_text(json.dumps({"id": "a", "prompt": "say it", "answers": listed}) + "\n")
    files = ["--answers", str(folder / "answers.jsonl"), "--output", str(folder / "out.jsonl")]
    return contexts.main([*files, "--model", model, *more])


def made(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_beginnings_end_with_sentences() -> None:
    assert contexts.beginnings(LONG, 500) == [LONG[:37], LONG[:65], LONG[:78], LONG[:83]]
    assert contexts.beginnings(LONG, 70) == [LONG[:37], LONG[:65]]


def test_a_text_that_is_stuck_begins_where_it_has_become_so() -> None:
    assert contexts.beginnings("It said. " * 30, 500) == ["It said. " * 7 + "It said."]
    assert contexts.beginnings("It said. " * 30, 20) == [], "it lies beyond twice the limit"
    assert contexts.beginnings("and happy " * 30, 500) == [], "no sentence ends"


def test_a_prompt_comes_alone_and_with_the_beginnings_of_its_answers(model: str, tmp_path: Path) -> None:
    assert run(model, tmp_path, [LONG, LONG.upper(), "Short."], "--inside", "3") == 0
    alone, *inside = made(tmp_path)
    assert alone == {"id": "a", "prompt": "say it"}
    assert len(inside) == 2
    assert len({context["id"] for context in inside}) == 2
    for context in inside:
        beginning = context["prompt"].removeprefix("say it")
        assert beginning in contexts.beginnings(LONG, 500) + contexts.beginnings(LONG.upper(), 500)
    first = made(tmp_path)
    assert run(model, tmp_path, [LONG, LONG.upper(), "Short."], "--inside", "3") == 0
    assert made(tmp_path) == first, "the same seed chooses the same places"


def test_what_is_no_file_of_answers_is_refused_with_its_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path, [LONG]) == 0
    (tmp_path / "answers.jsonl").write_text('{"prompt": "x"}\n')
    files = ["--answers", str(tmp_path / "answers.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert contexts.main([*files, "--model", model]) == 2
    assert "answers.jsonl, line 1: no answers as trimtab prefer keeps them" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_told_as_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(str(tmp_path / "empty"), tmp_path, [LONG]) == 2
    assert "trimtab contexts: --model: " in capsys.readouterr().err
