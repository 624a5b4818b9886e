"""Preference pairs through the running service, as users make them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.settings import CHECKOUT
from tests import tiny
from tests.cluster.conftest import Deploy, Service, model_args, service_config

TIMEOUT_S = 150
NUM_PROMPTS, NUM_SAMPLES, MAX_TOKENS = 12, 4, 12

Prefer = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module", autouse=True)
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A tiny base with one guide."""
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.llama(80), root / "base")
    kind = tiny.save(tiny.gpt2(80, seed=2), root / "kind")
    profiles = {"kinder": {"kind": 1.0}}
    return deploy(service_config(model_args(base), {"kind": model_args(kind, base=base)}, profiles=profiles))


@pytest.fixture
def prefer(tmp_path: Path) -> Prefer:
    """`trimtab prefer` on the test's cluster; returns its exit status and what it said."""
    prompts = [
        {"id": f"chat-{i}", "messages": [{"role": "user", "content": f"tell me about {i}"}]}
        if i % 3 == 0
        else {"prompt": f"the quick brown fox {i}"}
        for i in range(NUM_PROMPTS)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))

    def run(output: str, *options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "deploy", "prefer", "--prompts", str(tmp_path / "prompts.jsonl")]
        command += ["--output", str(tmp_path / output), "--reward", "actors.training.rewards:plainness"]
        command += ["--samples", str(NUM_SAMPLES), "--max-tokens", str(MAX_TOKENS), *options]
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        return done.returncode, done.stdout

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens_by_id(path: Path) -> dict[str | int, list[list[int]]]:
    return {record["id"]: [answer["token_ids"] for answer in record["answers"]] for record in read(path)}


def test_pairs_come_out_of_the_running_service(prefer: Prefer, tmp_path: Path) -> None:
    status, told = prefer("base.jsonl")
    assert status == 0, told
    answers, pairs = tokens_by_id(tmp_path / "base.answers.jsonl"), read(tmp_path / "base.jsonl")
    assert len(answers) == NUM_PROMPTS
    assert all(len(drawn) == NUM_SAMPLES == len(set(map(tuple, drawn))) for drawn in answers.values())
    assert f"{NUM_PROMPTS * NUM_SAMPLES} answers to {NUM_PROMPTS} prompts" in told
    assert f"{len(pairs)} pairs" in told
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert {"chat-0", 2} <= {pair["id"] for pair in pairs}

    # A run that was killed goes on with the same seeds.
    kept = (tmp_path / "base.answers.jsonl").read_bytes()
    (tmp_path / "base.answers.jsonl").write_bytes(kept[: len(kept) // 2])
    status, told = prefer("base.jsonl")
    assert status == 0, told
    again = tokens_by_id(tmp_path / "base.answers.jsonl")
    # Sums that round differently in another batch may tip a draw between two equal scores.
    assert set(again) == set(answers)
    assert sum(again[name] != answers[name] for name in answers) <= 1

    status, told = prefer("guided.jsonl", "--profile", "kinder")
    assert status == 0, told
    assert tokens_by_id(tmp_path / "guided.answers.jsonl") != answers
    status, told = prefer("guided.jsonl", "--weights", '{"kind": 2.0}')
    assert status == 2
    assert "it was sampled with profile 'kinder', not None" in told


def test_what_the_service_refuses_ends_the_run(prefer: Prefer, tmp_path: Path) -> None:
    status, told = prefer("pairs.jsonl", "--profile", "unkind")
    assert status == 2
    assert "line 1: UnknownModel: there is no model 'unkind'; models are: base, kinder" in told
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
