"""A deploy.yaml run as `make serve` runs it: it comes up, says so, answers, and leaves nothing when it is stopped."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import requests
import yaml
from openai import OpenAI

from actors.settings import CHECKOUT
from tests.cluster.conftest import free_port, serve_run

QUESTION: list[Any] = [{"role": "user", "content": "What is it like to work night shifts in a hospital?"}]


COMMAND = (sys.executable, "-m", "deploy")


@dataclass(frozen=True)
class Running:
    """What `trimtab serve` has started."""

    url: str
    ray: psutil.Process
    """Ray's process of this machine."""

    def trimtab(self, *words: str, told: str = "") -> subprocess.CompletedProcess[str]:
        """Run another command on the service's cluster."""
        addresses = [re.fullmatch(r"--gcs-address=(.+)", word) for word in self.ray.cmdline()]
        (address,) = [found[1] for found in addresses if found]
        return subprocess.run(
            [*COMMAND, *words],
            cwd=CHECKOUT,
            env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
            input=told,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The shipped file on another port."""
    config = yaml.safe_load((CHECKOUT / "deploy.yaml").read_text())
    config["http_options"]["port"] = free_port()
    address = f"http://127.0.0.1:{config['http_options']['port']}"

    def is_ready() -> bool:
        try:
            return requests.get(f"{address}/health", timeout=30).status_code == 200
        except requests.RequestException:
            return False

    with serve_run(config, tmp_path_factory.mktemp("serve"), (*COMMAND, "serve")) as service:
        service.wait_until(is_ready)
        service.wait_until(lambda: f"ready at {address}\n" in service.output())
        assert service.process.poll() is None, service.output()[-5000:]
        children = psutil.Process(service.process.pid).children(recursive=True)
        (raylet,) = [child for child in children if child.name() == "raylet"]
        yield Running(address, raylet)


def test_serve_is_told_what_it_does_otherwise_than_by_itself(running: Running) -> None:
    variables = running.ray.environ()
    assert variables["RAY_SERVE_PROXY_USE_GRPC"] == "1"
    assert variables["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] == "1"


def test_the_status_names_what_runs_and_what_it_holds(running: Running) -> None:
    # Long enough to be written still when the command has begun.
    body = {"model": "positive", "messages": QUESTION, "min_tokens": 1900, "max_tokens": 1900, "stream": True}
    with requests.post(f"{running.url}/v1/chat/completions", json=body, stream=True, timeout=120) as answer:
        # Kept: the connection is closed, and the answer ended, with the iterator.
        lines = answer.iter_lines()
        next(lines)
        done = running.trimtab("status", "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert set(status["applications"].values()) == {"RUNNING"}
    held = {(replica["application"], replica["deployment"]): replica["held"] for replica in status["replicas"]}
    assert held == {
        ("trimtab-base", "BaseModel"): 1,
        ("trimtab-guide-positivity", "Guide"): 1,
        ("trimtab-guide-plainness", "Guide"): 0,
        ("trimtab", "Gateway"): 1,
        ("trimtab", "Coordinator"): 1,
    }
    assert (status["live"], status["waiting"]) == (1, 0)
    assert status["addresses"] == [running.url]
    done = running.trimtab("status")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^trimtab-base  RUNNING\n  BaseModel \w+  RUNNING  \d live sequences  on ", done.stdout, re.MULTILINE
    )
    assert done.stdout.endswith(f"HTTP: {running.url}\n")


def test_a_conversation_is_answered(running: Running) -> None:
    options = ("--url", running.url, "--profile", "positive", "--max-tokens", "12")
    done = running.trimtab(
        "chat", *options, told="Hello\n/weights plainness=auto\nAnd you?\n/weights unknown=1\nHello?\n"
    )
    assert done.returncode == 0, done.stderr
    assert "profiles: base, plain, positive, positive-and-plain; guides: positivity, plainness" in done.stdout
    shown = r".*\nprofile positive\n(.+)\nprofile positive, weights plainness=auto\n(.+)\nprofile .* unknown=1.0\n"
    assert re.fullmatch(shown, done.stdout, re.DOTALL), done.stdout
    assert "there is no guide 'unknown'" in done.stderr


def test_base_and_guided_answers_come_and_differ(running: Running) -> None:
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=120) as client:

        def answer(**more: object) -> str:
            body = {"top_k": 0, **more}
            reply = client.chat.completions.create(
                model="base",
                messages=QUESTION,
                max_tokens=24,
                seed=1,
                extra_body=body,
            )
            return reply.choices[0].message.content or ""

        # What the profile `positive` says, told by a request.
        sampling = {"temperature": 0.7, "top_p": 0.9}
        plain, guided = answer(**sampling), answer(guidance={"weights": {"positivity": "auto"}}, **sampling)
        assert plain
        assert guided
        assert plain != guided
        profile = client.chat.completions.create(
            model="positive",
            messages=QUESTION,
            max_tokens=24,
            seed=1,
        )
        assert profile.choices[0].message.content == guided
        streamed = client.chat.completions.create(
            model="positive",
            messages=QUESTION,
            max_tokens=24,
            seed=1,
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == guided
