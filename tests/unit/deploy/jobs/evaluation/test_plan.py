"""An evaluation.yaml is checked as a whole before anything loads, and mistakes are named by their path."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import InvalidConfiguration
from deploy.cli.evaluate import main
from deploy.jobs.evaluation.checks import check_models, load_plan, load_rewards
from deploy.jobs.evaluation.prompts import read_prompts
from tests import tiny

PROMPTS = [{"id": "one", "prompt": "tell me"}, {"messages": [{"role": "user", "content": "hello"}], "seeds": [1]}]


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    """A plan that can be carried out."""
    base, guide, tuned = (tmp_path / name for name in ("base", "guide", "tuned"))
    for seed, directory in enumerate((base, guide, tuned)):
        tiny.save(tiny.llama(seed=seed), directory)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n\n" for prompt in PROMPTS))
    return {
        "base": str(base),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "max_tokens": 8,
        "max_context": 64,
        "rewards": {"positivity": "actors.training.rewards:positivity"},
        "guides": {"kind": str(guide)},
        "models": {"tuned": str(tuned), "soup": {"average": {str(base): 0.25, str(tuned): 0.75}}},
        "rows": {
            "base": {"num_samples": 8},
            "best of 2": {"best_of": 2, "from": "base", "reward": "positivity"},
            "guided 1": {"weights": {"kind": 1}},
            "tuned": {"model": "tuned"},
            "soup": {"model": "soup"},
        },
        "tables": {
            "alignment": {"reward": "positivity", "against": "tuned", "rows": ["base", "best of 2", "guided 1"]},
            "recovery": {"reward": "positivity", "from": "base", "to": "tuned", "rows": ["guided 1"]},
        },
        "fronts": {
            "two": {
                "x": "positivity",
                "y": "positivity",
                "curves": {"guides": ["guided 1"], "soups": ["soup", "tuned"]},
                "compare": ["guides", "soups"],
            }
        },
    }


def write(plan: Any, folder: Path) -> Path:
    path = folder / "evaluation.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def change(plan: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split("/")
    inner: Any = plan
    for key in way:
        inner = inner[key]
    inner[last] = value


def test_a_good_plan_is_read(plan: dict[str, Any], tmp_path: Path) -> None:
    read = load_plan(write(plan, tmp_path))
    assert read.num_samples_of("guided 1") == 4
    assert read.num_samples_of("best of 2") == 4
    assert read.written_by("best of 2") == "base"
    assert read.parts_of("soup") == {tmp_path / "base": 0.25, tmp_path / "tuned": 0.75}
    check_models(read, ["base", "guided 1", "tuned", "soup"])
    assert set(load_rewards(read)) == {"positivity"}
    assert [prompt.id for prompt in read_prompts(read)] == ["one", 3]


MISTAKES = [
    ("colour", "red", "colour: there is no such key"),
    ("num_samples", 0, "num_samples: Input should be greater than or equal to 1, not 0"),
    ("rows/guided 1/weight", {}, "rows.guided 1.weight: there is no such key"),
    ("rows/guided 1/weights", {"knd": 1}, "rows.guided 1.weights.knd: no such guide; guides are kind"),
    ("rows/guided 1/model", "tuned", "rows.guided 1: a model of models writes alone; give model or weights, not both"),
    ("rows/tuned/model", "tund", "rows.tuned.model: no such model 'tund'; models are tuned, soup"),
    ("rows/base/from", "tuned", "rows.base: from and reward belong to best_of"),
    ("rows/best of 2", {"best_of": 2, "from": "base"}, "rows.best of 2: best_of needs from"),
    ("rows/best of 2/num_samples", 3, "rows.best of 2: best_of picks from another row"),
    ("rows/best of 2/best_of", 3, "rows.best of 2.best_of: 3 does not divide the 8 answers to a prompt of 'base'"),
    ("rows/best of 2/from", "bas", "rows.best of 2.from: no such row 'bas'; rows are base,"),
    ("rows/best of 2/from", "best of 2", "rows.best of 2.from: 'best of 2' is itself a best_of"),
    ("rows/best of 2/reward", "joy", "rows.best of 2.reward: no such reward 'joy'; rewards are positivity"),
    ("rows/Base", {}, "rows.Base: its answers would go to the file of 'base'; give it another name"),
    ("tables/alignment/rows", ["base", "bse"], "tables.alignment.rows[1]: no such row 'bse'"),
    ("tables/alignment/against", "dpo", "tables.alignment.against: no such row 'dpo'"),
    ("tables/recovery/to", "dpo", "tables.recovery.to: no such row 'dpo'"),
    ("fronts/two/curves/soups", ["soap"], "fronts.two.curves.soups[0]: no such row 'soap'"),
    ("fronts/two/compare", ["guides", "soaps"], "fronts.two.compare[1]: no such curve 'soaps'"),
    ("fronts/two/y", "joy", "fronts.two.y: no such reward 'joy'"),
    ("base", "results/none", "base: there is no directory"),
    ("guides/kind", "models/none", "guides.kind: no model at"),
    ("models/tuned", "/none", "models.tuned: no model at /none"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), MISTAKES)
def test_a_mistake_is_named_by_its_path(
    plan: dict[str, Any], tmp_path: Path, path: str, value: Any, complaint: str
) -> None:
    change(plan, path, value)
    with pytest.raises(InvalidConfiguration) as caught:
        load_plan(write(plan, tmp_path))
    assert str(caught.value).startswith(complaint)


def test_shares_of_an_average_must_sum_to_1(plan: dict[str, Any], tmp_path: Path) -> None:
    plan["models"]["soup"]["average"][plan["base"]] = 0.5
    with pytest.raises(InvalidConfiguration, match=r"models.soup: the weights \[0.5, 0.75\] sum to 1.25"):
        load_plan(write(plan, tmp_path))
    plan["models"]["soup"]["average"] = {plan["base"]: 0.5, f"{plan['base']}/": 0.5}
    with pytest.raises(InvalidConfiguration, match=r"models.soup: .* name one directory twice"):
        load_plan(write(plan, tmp_path))


def test_models_must_have_the_bases_vocabulary_and_enough_context(plan: dict[str, Any], tmp_path: Path) -> None:
    vocabulary = tmp_path / "tuned" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"q":', '"swap":').replace('"x":', '"q":'))
    read = load_plan(write(plan, tmp_path))
    check_models(read, ["base"])
    with pytest.raises(
        InvalidConfiguration, match=r"models.tuned: .*another tokenizer than the base: token \d+ is 'swap'"
    ):
        check_models(read, ["tuned"])
    plan["max_context"] = 4000
    with pytest.raises(InvalidConfiguration, match=r"max_context is 4000, but .* can take 128 tokens"):
        check_models(load_plan(write(plan, tmp_path)), ["base"])


def test_a_reward_that_cannot_be_imported_is_named(plan: dict[str, Any], tmp_path: Path) -> None:
    plan["rewards"]["joy"] = "actors.training.rewards:joy"
    with pytest.raises(InvalidConfiguration, match=r"rewards.joy: .*joy does not exist"):
        load_rewards(load_plan(write(plan, tmp_path)))


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"prompt": "a"}'], "at least 2, not 1"),
        (['{"prompt": "a"}', "{}"], "line 2: .*give either prompt or messages"),
        (['{"prompt": "a"}', '{"prompt": "b", "weights": {}}'], "line 2: weights: Extra inputs"),
        (['{"id": "x", "prompt": "a"}', '{"prompt": "a"}'], "line 2 repeats 'x'"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(
    plan: dict[str, Any], tmp_path: Path, lines: list[str], complaint: str
) -> None:
    Path(plan["prompts"]).write_text("\n".join(lines))
    with pytest.raises(InvalidConfiguration, match=f"prompts: .*{complaint}"):
        read_prompts(load_plan(write(plan, tmp_path)))


def test_a_prompts_seeds_do_not_depend_on_the_others(plan: dict[str, Any], tmp_path: Path) -> None:
    read = load_plan(write(plan, tmp_path))
    before = read_prompts(read)
    lines = Path(plan["prompts"]).read_text()
    Path(plan["prompts"]).write_text('{"prompt": "first"}\n' + lines)
    after = read_prompts(read)[1:]
    assert [prompt.seed(1) for prompt in before] == [prompt.seed(1) for prompt in after]
    assert len({prompt.seed(sample) for prompt in before for sample in (1, 2, 3)}) == 6


def test_the_command_says_what_is_wrong_and_starts_nothing(
    plan: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(plan, tmp_path))
    assert main([path, "--output", str(tmp_path / "out"), "--only", "bse"]) == 2
    assert "--only: no such row 'bse'; rows are base, best of 2" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
