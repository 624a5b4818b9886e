"""The batch job as users run it: under `ray job submit`, by itself, killed and taken up again."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from actors.settings import CHECKOUT
from tests import tiny
from tests.cluster.conftest import BIN, Deploy, Service, model_args, service_config

TIMEOUT_S = 150
COMMAND = [sys.executable, "-m", "deploy", "batch"]
NUM_PROMPTS = 100
OPTIONS = ["--max-tokens", "16", "--weights", '{"kind": 1.0}', "--seed", "5"]
PROMPTS: list[dict[str, Any]] = [
    {"id": f"chat-{i}", "messages": [{"role": "user", "content": f"tell me about {i}"}], "model": "base"}
    if i % 10 == 0
    else {"prompt": f"the quick brown fox {i}", "temperature": 0.5 + i % 3 / 2}
    for i in range(NUM_PROMPTS)
]
BAD = [
    (b"{not JSON", "the line is not JSON", "InvalidRequest", None),
    (b'{"prompt": "x", "n": 2}', "n is not supported", "InvalidRequest", "n"),
    (
        b'{"prompt": "x", "weights": {"unkind": 1.0}}',
        "there is no guide 'unkind'; guides are: kind",
        "InvalidRequest",
        "weights",
    ),
    (b'{"prompt": "x", "max_tokens": 4000}', "the context limit", "ContextExceeded", "max_tokens"),
]
Result = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A tiny base with one guide."""
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.llama(80), root / "base")
    kind = tiny.save(tiny.gpt2(80, seed=2), root / "kind")
    return deploy(service_config(model_args(base), {"kind": model_args(kind, base=base)}))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in PROMPTS))
    return path


@contextmanager
def batch(prompts: Path, results: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """`trimtab batch` on the test's cluster; ended at the latest when the block ends."""
    process = subprocess.Popen(
        [*COMMAND, "--input", prompts, "--output", results, *OPTIONS, *options],
        cwd=CHECKOUT,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(prompts: Path, results: Path) -> tuple[int, str]:
    """Run a batch to its end; return its exit status and what it said."""
    with batch(prompts, results) as process:
        _, told = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, told


def wait_for_results(results: Path, num_results: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a batch that is under way has written so many."""
    deadline = time.monotonic() + TIMEOUT_S
    while not results.exists() or results.read_bytes().count(b"\n") < num_results:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read(results: Path) -> dict[int, Result]:
    """Results by the line of the input; every line has one."""
    listed = [json.loads(line) for line in results.read_text().splitlines()]
    by_line = {result["line"]: result for result in listed}
    assert len(by_line) == len(listed)
    return by_line


@pytest.fixture(scope="module")
def undisturbed(service: Service, prompts: Path) -> dict[int, Result]:
    """What a job that is left in peace writes."""
    sent, results = prompts.with_name("sent"), prompts.with_name("undisturbed.jsonl")
    command = shlex.join([*COMMAND, "--input", str(prompts), "--output", str(results), *OPTIONS])
    submit = [str(BIN / "ray"), "job", "submit", "--address", service.dashboard, "--working-dir", str(CHECKOUT)]
    job = subprocess.run(
        # The shell that lists what has arrived is the only difference to what users type.
        [*submit, "--", "sh", "-c", f"ls -A > {sent}; {command}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert job.returncode == 0, job.stdout
    assert f"{NUM_PROMPTS} done, 0 failed of {NUM_PROMPTS}" in job.stdout
    names = set(sent.read_text().split())
    assert {"deploy", "actors", "cluster", "pyproject.toml"} <= names
    assert not {".venv", "models", ".git"} & names, "what git ignores is not sent"
    return read(results)


def test_a_job_answers_every_prompt(undisturbed: dict[int, Result]) -> None:
    assert set(undisturbed) == set(range(1, NUM_PROMPTS + 1))
    for line, result in undisturbed.items():
        prompt = PROMPTS[line - 1]
        assert result["id"] == prompt.get("id", line)
        assert {name: result[name] for name in prompt} == prompt
        assert result.get("weights") == (None if "model" in prompt else {"kind": 1.0})
        assert result["finish_reason"] in ("stop", "length")
        assert len(result["token_ids"]) == result["usage"]["completion_tokens"] <= 16


def test_a_killed_run_is_taken_up_and_bad_lines_are_told(
    prompts: Path, tmp_path: Path, undisturbed: dict[int, Result]
) -> None:
    mixed, results = tmp_path / "mixed.jsonl", tmp_path / "results.jsonl"
    mixed.write_bytes(prompts.read_bytes() + b"".join(raw + b"\n" for raw, *_ in BAD))
    with batch(mixed, results, "--concurrency", "2") as process:
        wait_for_results(results, 10, process)
        process.kill()
        process.wait()
    with results.open("ab") as file:
        file.write(b'{"line": 99, "digest')
    kept = results.read_bytes().splitlines(keepends=True)[:-1]
    assert len(kept) < NUM_PROMPTS

    status, told = finish(mixed, results)
    assert status == 1
    assert f"{len(kept)} of them done before" in told
    assert results.read_bytes().startswith(b"".join(kept)), "what was done stays"
    resumed = read(results)
    assert set(resumed) == set(range(1, NUM_PROMPTS + len(BAD) + 1))
    for line, (_, message, kind, field) in enumerate(BAD, NUM_PROMPTS + 1):
        error = resumed[line]["error"]
        assert message in error["message"]
        assert (error["type"], error["field"]) == (kind, field)
        assert f"line {line}: {kind}: {error['message']}" in told
    assert all(resumed[line]["seed"] == result["seed"] for line, result in undisturbed.items())
    # Sums that round differently in another batch may tip a draw between two equal scores.
    assert sum(resumed[line]["token_ids"] != undisturbed[line]["token_ids"] for line in undisturbed) <= 1

    mixed.write_bytes(prompts.read_bytes() + b'{"prompt": "mended"}\n' * len(BAD))
    status, told = finish(mixed, results)
    assert status == 0, told
    assert f"{NUM_PROMPTS} of them done before" in told
    assert all("error" not in result for result in read(results).values())


def test_a_coordinator_that_dies_costs_no_answer(prompts: Path, tmp_path: Path, undisturbed: dict[int, Result]) -> None:
    results = tmp_path / "results.jsonl"
    with batch(prompts, results, "--concurrency", "8") as process:
        wait_for_results(results, 10, process)
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = [actor["name"] for actor in actors if "#Coordinator#" in actor["name"]]
        for name in names:
            ray.kill(ray.get_actor(name, namespace="serve"))
        _, told = process.communicate(timeout=TIMEOUT_S)
    assert len(names) == 1
    assert process.returncode == 0, told
    answered = read(results)
    assert sum(answered[line]["token_ids"] != undisturbed[line]["token_ids"] for line in undisturbed) <= 1


def test_a_service_that_does_not_run_stops_the_start(prompts: Path, tmp_path: Path) -> None:
    # The last test of this module: the next one deploys its own service.
    serve.delete("trimtab")
    status, told = finish(prompts, tmp_path / "results.jsonl")
    assert status == 2
    assert "no application 'trimtab' runs on this Ray cluster; start it: trimtab serve" in told
    assert not (tmp_path / "results.jsonl").exists()
