"""An evaluation as users run it, on a cluster that runs already: every row is written by what the plan says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from transformers import AutoModelForCausalLM

from actors.guidance import Sampling
from actors.guidance.reference import Voice, generate
from actors.settings import CHECKOUT
from actors.training.soup import average_models
from tests import tiny
from tests.cluster.conftest import Deploy, Service, model_args, service_config
from tests.reference import Comparison

TIMEOUT_S = 280
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S + 60)
MAX_TOKENS = 16
PROMPTS = ["the quick brown fox", "jumps over", "the lazy dog"]
BUILDERS = {"base": (tiny.llama, 0), "kind": (tiny.gpt2, 1), "dpo": (tiny.llama, 2), "other": (tiny.llama, 3)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base, a guide, and two models of the base's shape."""
    root = tmp_path_factory.mktemp("models")
    return {name: Path(tiny.save(build(80, seed=seed), root / name)) for name, (build, seed) in BUILDERS.items()}


@pytest.fixture
def plan(directories: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (tmp_path / "evaluated_rewards.py").write_text(
        "def letters(prompt, response):\n    return sum(map(str.isalpha, response)) / 16\n\n\n"
        "def spaces(prompt, response):\n    return response.count(' ') / 16\n"
    )
    return {
        "base": str(directories["base"]),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "num_samples": 2,
        "max_tokens": MAX_TOKENS,
        "max_context": 64,
        "concurrency": 8,
        "rewards": {"letters": "evaluated_rewards:letters", "spaces": "evaluated_rewards:spaces"},
        "guides": {"kind": str(directories["kind"])},
        "models": {
            "dpo": str(directories["dpo"]),
            "soup": {"average": {str(directories["dpo"]): 0.75, str(directories["other"]): 0.25}},
        },
        "rows": {
            "base": {"num_samples": 4},
            "best of 2": {"best_of": 2, "from": "base", "reward": "letters"},
            "guided 1": {"weights": {"kind": 1.0}},
            "DPO": {"model": "dpo"},
            "Soup": {"model": "soup"},
        },
        "tables": {
            "alignment": {"reward": "letters", "against": "DPO", "rows": ["base", "best of 2", "guided 1", "DPO"]},
            "recovery": {"reward": "letters", "from": "base", "to": "DPO", "rows": ["guided 1"]},
        },
        "fronts": {
            "two": {
                "x": "letters",
                "y": "spaces",
                "curves": {"guides": ["base", "guided 1"], "soups": ["Soup", "DPO"]},
                "compare": ["guides", "soups"],
            }
        },
    }


def evaluate(plan: dict[str, Any], folder: Path, *options: str) -> tuple[int, str]:
    """Run the command on the test's cluster; return its exit status and what it said on stderr."""
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "evaluate", "evaluation.yaml", "--output", "out", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode, done.stderr


def answers(folder: Path, row: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "answers" / f"{row}.jsonl").read_text().splitlines()]


def check_answers(written: list[dict[str, Any]], base: Any, guides: list[tuple[Any, float]]) -> None:
    """Check that the answers are those of the one-process reference."""
    comparison = Comparison()
    fast = tiny.tokenizer(80)
    for answer in written:
        prompt = fast(answer["prompt"]).input_ids
        reference = generate(
            Voice(model=base, prompt=prompt),
            [Voice(model=guide, prompt=prompt, weight=weight) for guide, weight in guides],
            sampling=Sampling(seed=answer["seed"]),
            max_tokens=MAX_TOKENS,
            end_tokens=[0],
        )
        comparison.add(answer["id"], answer["token_ids"], reference)
    comparison.finish()


def test_a_cluster_that_serves_something_else_is_left_alone(
    deploy: Deploy, directories: dict[str, Path], plan: dict[str, Any], tmp_path: Path
) -> None:
    deploy(service_config(model_args(str(directories["base"])), {}))
    status, told = evaluate(plan, tmp_path)
    assert status == 2
    assert "the cluster serves trimtab, trimtab-base already" in told
    assert serve.status().applications["trimtab"].status == "RUNNING"


def test_every_row_is_written_by_its_models_and_reported(
    cluster: Service, directories: dict[str, Path], plan: dict[str, Any], tmp_path: Path
) -> None:
    for name in serve.status().applications:
        serve.delete(name)
    soup_row = plan["rows"].pop("Soup")
    plan["fronts"]["two"]["curves"]["soups"] = ["DPO"]
    status, told = evaluate(plan, tmp_path)
    assert status == 0, told
    assert serve.status().applications == {}, "it takes down what it deployed"
    assert [len(answers(tmp_path, row)) for row in ("base", "guided-1", "dpo")] == [12, 6, 6]

    plan["rows"]["Soup"] = soup_row
    plan["fronts"]["two"]["curves"]["soups"] = ["Soup", "DPO"]
    status, told = evaluate(plan, tmp_path)
    assert status == 0, told
    assert "Soup: 6 answers, 0 of them written before" in told
    assert "base: " not in told, "what is kept costs nothing, its scores included"
    assert not (tmp_path / "out" / ".averaged").exists()

    average_models({directories["dpo"]: 0.75, directories["other"]: 0.25}, tmp_path / "soup")
    model = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in directories.items()}
    check_answers(answers(tmp_path, "base"), model["base"], [])
    check_answers(answers(tmp_path, "guided-1"), model["base"], [(model["kind"], 1.0)])
    check_answers(answers(tmp_path, "dpo"), model["dpo"], [])
    check_answers(answers(tmp_path, "soup"), AutoModelForCausalLM.from_pretrained(tmp_path / "soup").eval(), [])

    report = (tmp_path / "out" / "report.md").read_text()
    assert "Not answered yet" not in report
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    base, best, guided, dpo = results["alignment"]["lines"]
    assert best["rewards"]["letters"]["value"] > base["rewards"]["letters"]["value"]
    assert best["num_answers"] == 6
    assert all(line["tokens_per_s"] > 0 for line in (base, best, guided, dpo))
    assert guided["num_parameters"] - base["num_parameters"] == results["recovery"]["lines"][0]["num_guide_parameters"]
    assert [point["row"] for point in results["fronts"]["two"]["curves"]["soups"]] == ["Soup", "DPO"]
    for picture in ("alignment.png", "fronts.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
