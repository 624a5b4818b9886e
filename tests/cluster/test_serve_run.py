"""A deploy.yaml run as `make serve` runs it: it comes up, says so, answers, and leaves nothing when it is stopped."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import yaml
from openai import OpenAI

from actors.settings import CHECKOUT
from tests.cluster.conftest import free_port, serve_run

QUESTION: list[Any] = [{"role": "user", "content": "What is it like to work night shifts in a hospital?"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The shipped file on another port."""
    config = yaml.safe_load((CHECKOUT / "deploy.yaml").read_text())
    config["http_options"]["port"] = free_port()
    address = f"http://127.0.0.1:{config['http_options']['port']}"

    def is_ready() -> bool:
        try:
            return requests.get(f"{address}/health", timeout=30).status_code == 200
        except requests.RequestException:
            return False

    command = (sys.executable, "-m", "deploy.start")
    with serve_run(config, tmp_path_factory.mktemp("serve"), command, RAY_SERVE_PROXY_USE_GRPC="1") as running:
        running.wait_until(is_ready)
        running.wait_until(lambda: f"ready at {address}\n" in running.output())
        assert running.process.poll() is None, running.output()[-5000:]
        yield address


def test_base_and_guided_answers_come_and_differ(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:

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
