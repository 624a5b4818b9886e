"""Training on a real Ray: the same curve however many workers share it, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.training.run import newest_checkpoint
from deploy.client import Client
from tests.cluster.conftest import Deploy, model_args, service_config
from tests.tiny import llama, save

NUM_STEPS = 20
CHECKPOINT_EVERY = 5
DEADLINE_S = 240
pytestmark = pytest.mark.timeout(3 * DEADLINE_S + 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its preferences, whose prompts and responses differ in length."""
    folder = tmp_path_factory.mktemp("train")
    save(llama(), folder / "model")
    rows = [
        {"prompt": f"say {i}" + "abc"[: i % 3], "chosen": "good " * (i % 4 + 1), "rejected": "bad " * (i % 5 + 1)}
        for i in range(64)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "deploy",
            "train",
            "--model",
            str(folder / "model"),
            "--data",
            str(folder / "pairs.jsonl"),
        ),
        *("--output", str(output), "--steps", str(NUM_STEPS), "--batch-size", "8", "--cpus-per-worker", "1"),
        *("--dtype", "float32"),
        *("--checkpoint-every", str(CHECKPOINT_EVERY), "--learning-rate", "5e-3", "--validation-share", "0.2", *more),
    ]


def environment() -> dict[str, str]:
    """A cluster of its own, not the one that other tests share."""
    return {**os.environ, "RAY_ADDRESS": "local"}


def train(folder: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        command(folder, output, *more),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return steps(output)


def steps(output: Path) -> list[dict[str, Any]]:
    path = output / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in map(json.loads, (line for line in lines if line.endswith("\n"))) if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    train(folder, folder / "undisturbed")
    return folder / "undisturbed"


def test_two_workers_give_the_curve_of_one(folder: Path, undisturbed: Path) -> None:
    one, two = steps(undisturbed), train(folder, folder / "two", "--workers", "2", "--micro-batch", "2")
    assert [step["step"] for step in one] == [step["step"] for step in two] == list(range(1, NUM_STEPS + 1))
    for name in ("loss", "margin", "accuracy"):
        found, expected = ([step[name] for step in run] for run in (two, one))
        assert found == pytest.approx(expected, abs=1e-4), name
    assert one[-1]["loss"] < one[0]["loss"] - 0.02


def test_a_killed_run_resumes_and_gives_the_curve_of_an_undisturbed_one(folder: Path, undisturbed: Path) -> None:
    output = folder / "killed"
    process = subprocess.Popen(
        command(folder, output), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_checkpoint(process, output)
    finally:
        kill_family(process.pid)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    num_done, checkpoint = len(steps(output)), newest_checkpoint(output)
    assert checkpoint is not None
    assert num_done < NUM_STEPS
    assert num_done - int(checkpoint.name.rpartition("-")[2]) <= CHECKPOINT_EVERY
    resumed, expected = train(folder, output, "--resume"), steps(undisturbed)
    assert [step["loss"] for step in resumed] == pytest.approx([step["loss"] for step in expected], abs=1e-6)


def wait_for_checkpoint(process: "subprocess.Popen[str]", output: Path) -> None:
    """Until a checkpoint is whole, and not the run."""
    deadline = time.monotonic() + DEADLINE_S
    while not list((output / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_family(pid: int) -> None:
    """SIGKILL for the driver and every process of the cluster that it started."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family[1:], timeout=30)


def test_the_output_is_a_model_with_its_adapter_card_and_logs(folder: Path, undisturbed: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    after = AutoModelForCausalLM.from_pretrained(undisturbed)
    tokens = torch.tensor([[5, 6, 7]])
    assert (before(tokens).logits - after(tokens).logits).abs().max() > 1e-3
    assert (undisturbed / "adapter" / "adapter_model.safetensors").is_file()
    assert list((undisturbed / "tensorboard").glob("events.*"))
    card = (undisturbed / "README.md").read_text()
    for fact in ("pairs.jsonl", "64 rows", "GenARM", "| beta | 0.05 |", "accuracy on validation pairs"):
        assert fact in card
    kept_back = [json.loads(line) for line in (undisturbed / "validation_prompts.jsonl").read_text().splitlines()]
    assert all(set(line) == {"prompt"} for line in kept_back)


def test_the_output_guides_as_it_is(folder: Path, undisturbed: Path, deploy: Deploy) -> None:
    base = str(folder / "model")
    deploy(service_config(model_args(base), {"kind": model_args(str(undisturbed), base=base)}))
    client = Client()
    plain, guided = (
        client.generate(prompt="say 1", weights=weights, temperature=0.0, max_tokens=12)["token_ids"]
        for weights in ({}, {"kind": 5.0})
    )
    assert plain != guided


def test_a_worker_that_fails_is_an_error_with_its_reason(folder: Path) -> None:
    """A model whose configuration loads and whose weights do not."""
    broken = folder / "broken"
    save(llama(), broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    done = subprocess.run(
        [*command(folder, folder / "fails"), "--model", str(broken)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "trimtab train: " in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
