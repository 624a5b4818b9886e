"""Ctrl-C while answers are streamed, as `make serve` runs the service."""

import signal
import sys
import threading
from pathlib import Path

import pytest
import requests

from tests import tiny
from tests.cluster.conftest import free_port, model_args, serve_run, service_config

NUM_STREAMS = 6


@pytest.mark.parametrize(
    ("drain_s", "max_tokens", "end"), [(60, 200, "data: [DONE]"), (1, 90_000, "was stopped before")]
)
def test_every_stream_ends_with_its_rest_or_with_an_error_event(
    tmp_path: Path, drain_s: int, max_tokens: int, end: str
) -> None:
    base = tiny.save(tiny.talkative(tiny.llama(80, max_position_embeddings=100_000)), tmp_path / "base")
    config = service_config(model_args(base, max_context=95_000, cache_tokens=200_000), {}, limits={"drain_s": drain_s})
    port = free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    url = f"http://127.0.0.1:{port}"
    body = {"model": "base", "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    ends = [""] * NUM_STREAMS
    begun = threading.Barrier(NUM_STREAMS + 1, timeout=120)

    def read(number: int) -> None:
        with requests.post(f"{url}/v1/completions", json={**body, "seed": number}, stream=True, timeout=120) as stream:
            for line in stream.iter_lines(decode_unicode=True):
                if line and not ends[number]:
                    begun.wait()
                ends[number] = line or ends[number]

    def is_ready() -> bool:
        try:
            return requests.get(f"{url}/health", timeout=30).status_code == 200
        except requests.RequestException:
            return False

    with serve_run(config, tmp_path, (sys.executable, "-m", "deploy", "serve")) as running:
        running.wait_until(is_ready)
        readers = [threading.Thread(target=read, args=(number,)) for number in range(NUM_STREAMS)]
        for reader in readers:
            reader.start()
        begun.wait()
        running.process.send_signal(signal.SIGINT)
        for reader in readers:
            reader.join(120)
        running.process.wait(120)
    assert [end in last for last in ends] == [True] * NUM_STREAMS, ends
