"""`serve run deploy.yaml`, as `make serve` starts it: it comes up, answers, and leaves nothing when it is stopped."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from openai import OpenAI

from actors.settings import CHECKOUT
from tests.cluster.conftest import BIN, START_TIMEOUT_S, free_port

QUESTION: list[Any] = [{"role": "user", "content": "What is it like to work night shifts in a hospital?"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The shipped file on another port, stopped by Ctrl-C in the end; then no process of it is left."""
    config = yaml.safe_load((CHECKOUT / "deploy.yaml").read_text())
    config["http_options"]["port"] = free_port()
    root: Path = tmp_path_factory.mktemp("serve")
    (root / "deploy.yaml").write_text(yaml.safe_dump(config))
    with (root / "log").open("wb") as log:
        command = [str(BIN / "serve"), "run", str(root / "deploy.yaml")]
        server = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_SERVE_PROXY_USE_GRPC": "1"},
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )
    family: list[psutil.Process] = []
    try:
        address = f"http://127.0.0.1:{config['http_options']['port']}"
        wait_until_ready(address, server)
        family = psutil.Process(server.pid).children(recursive=True)
        assert family
        yield address
        server.send_signal(signal.SIGINT)
        server.wait(120)
        _, left = psutil.wait_procs(family, timeout=60)
        assert left == []
    finally:
        for process in [*family, psutil.Process(server.pid)] if server.poll() is None else family:
            if process.is_running():
                process.kill()
        server.wait(60)


def hear_ctrl_c() -> None:
    # A shell starts what it runs in the background, this test perhaps, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until_ready(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert server.poll() is None
        try:
            if requests.get(f"{address}/health", timeout=30).status_code == 200:
                return
        except requests.ConnectionError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.5)


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

        plain, guided = answer(), answer(guidance={"weights": {"positivity": 0.4}})
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
