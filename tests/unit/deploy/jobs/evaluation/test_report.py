"""The report says what the scores say: tables, fronts, pictures and the same numbers as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.jobs.evaluation.measures import Law, ScoredAnswer
from deploy.jobs.evaluation.plan import Plan
from deploy.jobs.evaluation.prompts import Prompt
from deploy.jobs.evaluation.report import write_report
from deploy.jobs.evaluation.scoring import ScoredRow
from deploy.jobs.evaluation.tables import Results, build

PLAN: dict[str, Any] = {
    "base": "base",
    "max_tokens": 8,
    "max_context": 64,
    "rewards": {"joy": "m:joy", "ease": "m:ease"},
    "guides": {"kind": "kind"},
    "models": {"dpo": "dpo"},
    "rows": {
        "base": {"num_samples": 2},
        "best of 2": {"best_of": 2, "from": "base", "reward": "joy"},
        "guided": {"weights": {"kind": 1.0}, "num_samples": 1},
        "DPO": {"model": "dpo", "num_samples": 1},
    },
    "tables": {
        "alignment": {"reward": "joy", "against": "DPO", "rows": ["base", "guided", "DPO"]},
        "recovery": {"reward": "joy", "from": "base", "to": "DPO", "rows": ["guided"]},
    },
    "fronts": {
        "both": {
            "x": "joy",
            "y": "ease",
            "curves": {"guides": ["guided"], "models": ["DPO", "base"]},
            "compare": ["guides", "models"],
        }
    },
}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "prompts.jsonl").write_text("{}")
    return Plan.model_validate({**PLAN, "prompts": str(tmp_path / "prompts.jsonl")})


def scored(*answers: tuple[float, str], guides: int = 0, num_samples: int = 1) -> ScoredRow:
    listed = [
        ScoredAnswer(text=text, num_tokens=2, has_ended=True, law=Law(-3.0, 0.5), rewards={"joy": joy, "ease": 1 - joy})
        for joy, text in answers
    ]
    by_prompt = [listed[start : start + num_samples] for start in range(0, len(listed), num_samples)]
    return ScoredRow(
        answers=by_prompt, tokens_per_s=12.34, num_parameters=2_000_000 + guides, num_guide_parameters=guides
    )


PROMPTS = [Prompt("a", "first"), Prompt("b", [{"role": "user", "content": "second"}])]

ROWS = {
    "base": scored((0.0, "a b"), (0.2, "a b"), (0.0, "c d"), (0.2, "c d"), num_samples=2),
    "guided": scored((0.6, "e f"), (0.4, "e f"), guides=500_000),
    "DPO": scored((0.9, "g h"), (0.9, "i j")),
}


def report(plan: Plan, results: Results, folder: Path) -> str:
    return write_report(plan, 2, results, folder).read_text()


def test_the_tables_hold_the_measures(plan: Plan, tmp_path: Path) -> None:
    text = report(plan, build(plan, PROMPTS, ROWS), tmp_path)
    base, guided, dpo = (line for line in text.splitlines() if line.startswith(("| base", "| guided | 2", "| DPO | 2")))
    law = "0.250 | -1.500 | 100 ± 0 | 2 | 1.000"
    assert base == f"| base | 4 | 0.100 ± 0.000 | 0.900 ± 0.000 | {law} | 1.000 | 0 | 12.3 | 2.0 | 0 / 0 / 100 |"
    assert guided == (f"| guided | 2 | 0.500 ± 0.196 | 0.500 ± 0.196 | {law} | 0.500 | 0 | 12.3 | 2.5 | 0 / 0 / 100 |")
    assert dpo.endswith("| – |"), "no row is compared with itself"
    assert "first 1 answers to each prompt" in text
    assert "| guided | 0.5 | 0.500 ± 0.196 | 50 % | 38 to 62 % |" in text
    assert "**Not answered yet**, and left out of what follows: best of 2." in text


def test_the_front_says_which_points_are_on_it(plan: Plan, tmp_path: Path) -> None:
    text = report(plan, build(plan, PROMPTS, ROWS), tmp_path)
    assert "Is a point of guides on or above the front of models?" in text
    assert "| guided | yes | +0.000 | +0.196 |" in text


def test_the_same_numbers_are_in_the_json(plan: Plan, tmp_path: Path) -> None:
    report(plan, build(plan, PROMPTS, ROWS), tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["plan_digest"] == plan.digest
    assert found["alignment"]["lines"][1]["rewards"]["joy"]["value"] == pytest.approx(0.5)
    assert found["recovery"]["lines"][0]["recovery"]["share"] == pytest.approx(0.5)
    assert found["missing"] == ["best of 2"]


def test_the_pictures_are_there_and_linked(plan: Plan, tmp_path: Path) -> None:
    text = report(plan, build(plan, PROMPTS, ROWS), tmp_path)
    for name in ("alignment.png", "fronts.png"):
        assert f"]({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 600
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 10


def test_a_report_without_answers_says_so(plan: Plan, tmp_path: Path) -> None:
    text = report(plan, build(plan, PROMPTS, {}), tmp_path)
    assert "left out of what follows: base, best of 2, guided, DPO." in text
    assert ".png" not in text
    half = report(plan, build(plan, PROMPTS, {"base": ROWS["base"]}), tmp_path)
    assert "| base | 4 |" in half
    assert "Weak to strong" not in half


def test_whole_answers_are_there_to_read(plan: Plan, tmp_path: Path) -> None:
    long = "one line\n\n| and | a table |\n" + "word " * 500
    text = report(plan, build(plan, PROMPTS, {**ROWS, "guided": scored((0.6, long), (0.4, "e f"))}), tmp_path)
    section = text.partition("## Answers to read")[2]
    assert section.count("**guided**") == section.count("**DPO**") == section.count("**base**") == 2
    assert "### first" in section
    assert "### second" in section
    assert f"> one line\n> \n> | and | a table |\n> {'word ' * 500}".rstrip() in section


def test_a_plan_without_tables_has_one_of_all_rows_against_the_first(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}")
    bare = {name: value for name, value in PLAN.items() if name not in ("tables", "fronts")}
    plan = Plan.model_validate({**bare, "prompts": str(tmp_path / "prompts.jsonl")})
    table = plan.tables.alignment
    assert table is not None
    assert (table.against, table.rows) == (next(iter(plan.rows)), list(plan.rows))
    text = report(plan, build(plan, PROMPTS, ROWS), tmp_path)
    assert "| guided | 2 |" in text
    assert "| DPO | 2 |" in text
