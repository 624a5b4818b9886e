"""A row's answers are kept from run to run, for as long as nothing that they depend on has changed."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InvalidRequest, TrimtabError
from deploy.jobs.evaluation.answers import KeptAnswers
from deploy.jobs.evaluation.plan import Plan
from deploy.jobs.evaluation.prompts import Prompt

PROMPTS = [Prompt("a", "first"), Prompt("b", [{"role": "user", "content": "second"}]), Prompt("c", "third")]


class Writer:
    """In the service's place: a token for each of a request's seed and weights."""

    def __init__(self) -> None:
        self.requests: list[Mapping[str, Any]] = []
        self.refused = ""

    async def generate(self, **fields: Any) -> Any:
        self.requests.append(fields)
        await asyncio.sleep(0.01)
        if fields.get("prompt") == self.refused:
            raise InvalidRequest("not this one", "prompt")
        return {"text": f"seed {fields['seed']}", "token_ids": [fields["seed"] % 7, 1], "finish_reason": "length"}


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    for name in ("base", "guide"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return {
        "base": str(tmp_path / "base"),
        "prompts": "unused",
        "num_samples": 2,
        "max_tokens": 8,
        "max_context": 64,
        "rewards": {"joy": "unused:unused"},
        "guides": {"kind": str(tmp_path / "guide")},
        "rows": {"base": {}, "guided": {"weights": {"kind": 0.5}}},
    }


def kept(plan: dict[str, Any], folder: Path, row: str = "guided", prompts: list[Prompt] = PROMPTS) -> KeptAnswers:
    return KeptAnswers(folder, Plan.model_validate(plan), row, prompts)


def test_every_prompt_is_answered_as_often_as_asked(plan: dict[str, Any], tmp_path: Path) -> None:
    writer, row = Writer(), kept(plan, tmp_path)
    assert row.read() is None
    row.write(writer.generate)
    answers = row.read()
    assert answers is not None
    by_prompt = row.by_prompt(answers)
    expected = [[f"seed {prompt.seed(sample)}" for sample in (1, 2)] for prompt in PROMPTS]
    assert [[answer.text for answer in answers] for answers in by_prompt] == expected
    assert all(request["weights"] == {"kind": 0.5} and request["max_tokens"] == 8 for request in writer.requests)
    assert row.meta.num_timed_tokens == 12
    assert row.meta.tokens_per_s is not None
    assert 0 < row.meta.tokens_per_s < 12 / 0.01


def test_a_row_that_was_cut_off_goes_on(plan: dict[str, Any], tmp_path: Path) -> None:
    first, second = Writer(), Writer()
    kept(plan, tmp_path).write(first.generate)
    path = tmp_path / "guided.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert kept(plan, tmp_path).read() is None
    kept(plan, tmp_path).write(second.generate)
    assert len(second.requests) == 3
    assert kept(plan, tmp_path).read() is not None
    assert kept(plan, tmp_path).meta.num_timed_tokens == 18, "what both runs wrote, in the time of both"


def test_more_samples_and_more_rows_cost_only_themselves(plan: dict[str, Any], tmp_path: Path) -> None:
    writer = Writer()
    kept(plan, tmp_path).write(writer.generate)
    before = kept(plan, tmp_path).read()
    plan["num_samples"] = 4
    plan["rows"]["another"] = {"weights": {"kind": 0.7}}
    kept(plan, tmp_path).write(writer.generate)
    after = kept(plan, tmp_path).read()
    assert len(writer.requests) == 12
    assert before is not None
    assert after is not None
    assert after[:6] == before


CHANGES = [("max_tokens", 9), ("temperature", 0.5), ("concurrency", 3), ("dtype", "bfloat16"), ("max_context", 65)]


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_other_settings_make_the_answers_again(plan: dict[str, Any], tmp_path: Path, key: str, value: object) -> None:
    kept(plan, tmp_path).write(Writer().generate)
    plan[key] = value
    assert kept(plan, tmp_path).read() is None
    again = Writer()
    kept(plan, tmp_path).write(again.generate)
    assert len(again.requests) == 6
    assert kept(plan, tmp_path).meta.num_timed_tokens == 12


def test_another_model_makes_the_answers_of_its_rows_again(plan: dict[str, Any], tmp_path: Path) -> None:
    for row in ("base", "guided"):
        kept(plan, tmp_path, row).write(Writer().generate)
    (tmp_path / "guide" / "config.json").write_text("{} ")
    assert kept(plan, tmp_path, "guided").read() is None
    assert kept(plan, tmp_path, "base").read() is not None, "no guide ran"


def test_a_failure_is_told_and_tried_again(
    plan: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = Writer()
    writer.refused = "first"
    with pytest.raises(TrimtabError, match=r"rows.guided: 2 of 6 answers failed"):
        kept(plan, tmp_path).write(writer.generate)
    assert "InvalidRequest: not this one" in capsys.readouterr().err
    assert kept(plan, tmp_path).read() is None
    again = Writer()
    kept(plan, tmp_path).write(again.generate)
    assert len(again.requests) == 2


def test_what_was_measured_is_kept_for_these_answers_and_this_base(plan: dict[str, Any], tmp_path: Path) -> None:
    row = kept(plan, tmp_path)
    row.write(Writer().generate)
    answers = row.read()
    assert answers is not None
    row.keep_measured(answers[:3], "base-1", [-1.5] * 3, [0.25] * 3)
    measured = kept(plan, tmp_path).measured(answers[:3], "base-1")
    assert measured is not None
    assert (measured.log_probs, measured.divergences) == ([-1.5] * 3, [0.25] * 3)
    assert row.measured(answers[:3], "base-2") is None
    assert row.measured(answers[2::-1], "base-1") is None
    assert row.measured(answers, "base-1") is None
    assert row.meta.num_timed_tokens == 12, "the time is kept beside them"
    assert json.loads((tmp_path / "guided.meta.json").read_text())["made_with"]["weights"] == {"kind": 0.5}
