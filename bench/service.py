"""The whole service on a Ray cluster of its own, and a client that sends real HTTP requests, all at once."""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import ray
from ray import serve

from actors.names import BASE, COORDINATOR, GATEWAY, TRIMTAB, guide_application
from bench.workload import Batch, Models, Outcome
from deploy.jobs.evaluation.service import LOOPBACK, Cluster

OBJECT_STORE_BYTES = 256 * 2**20
"""Room for the output function of a guide with --rows hidden_states."""

REQUEST_TIMEOUT_S = 1800.0


class Http:
    """The service by its /v1/completions."""

    def __init__(self, url: str, models: Models, *, streams: bool) -> None:
        self._url = f"{url}/v1/completions"
        self._models = models
        self._streams = streams

    def run(self, batch: Batch) -> Outcome:
        """Send every prompt as a request of its own at once; the time ends with the last answer."""
        return asyncio.run(self._run(batch))

    async def _run(self, batch: Batch) -> Outcome:
        bodies = [
            {
                "model": "base",
                "prompt": prompt,
                "max_tokens": batch.max_tokens,
                "seed": seed,
                "guidance": {"weights": self._models.weights(batch.num_guides)},
                **({"stream": True, "stream_options": {"include_usage": True}} if self._streams else {}),
            }
            for prompt, seed in zip(batch.prompts, batch.seeds, strict=True)
        ]
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            start = time.perf_counter()
            counts = await asyncio.gather(*(self._request(session, body) for body in bodies))
            elapsed_s = time.perf_counter() - start
        return Outcome(num_tokens=sum(counts), elapsed_s=elapsed_s)

    async def _request(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> int:
        """Return how many tokens the answer has, by its usage.

        Raises:
            RuntimeError: the service refused the request or failed.
        """
        usage: dict[str, int] | None = None
        async with session.post(self._url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"the service answered {response.status}: {await response.text()}")
            if not self._streams:
                usage = (await response.json())["usage"]
            else:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        chunk = json.loads(line[len(b"data: ") :])
                        if "error" in chunk:
                            raise RuntimeError(f"the service failed: {chunk}")
                        usage = chunk.get("usage") or usage
        if usage is None:
            raise RuntimeError("the service's stream ended without token counts")
        return usage["completion_tokens"]


@contextmanager
def running_service(models: Models, config: dict[str, Any] | None = None) -> Iterator[str]:
    """Serve the models on a Ray cluster that lives as long as the context; yield its URL.

    Args:
        models: what is served.
        config: a parsed deploy.yaml in place of `service_config(models)`.
    """
    # Not in /tmp/ray: what is started here is not to be found by others, and leaves nothing.
    directory = tempfile.mkdtemp(prefix="tb-")
    try:
        with _cluster(directory) as (cluster, port):
            cluster.deploy(config or service_config(models))
            yield f"http://{LOOPBACK}:{port}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _cluster(directory: str) -> Iterator[tuple[Cluster, int]]:
    # An address in the environment would lead to somebody else's cluster.
    addresses = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    dashboard_port, port = free_port(), free_port()
    try:
        ray.init(
            address="local",
            num_cpus=max(4, len(os.sched_getaffinity(0))),
            include_dashboard=True,
            dashboard_host=LOOPBACK,
            dashboard_port=dashboard_port,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=directory,
        )
        # Ray aborts the process on this signal; like Ctrl-C it lets us stop what we started.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(http_options={"host": LOOPBACK, "port": port})
            yield Cluster(f"http://{LOOPBACK}:{dashboard_port}"), port
        finally:
            serve.shutdown()
    finally:
        ray.shutdown()
        os.environ.update(addresses)


def service_config(models: Models) -> dict[str, Any]:
    """Return a parsed deploy.yaml for the models."""
    args = {
        "dtype": models.dtype,
        "max_sequences": models.max_sequences,
        "max_context": models.max_context,
        "cache_tokens": models.cache_tokens,
        "resources": {"cpus": 0.1},
    }
    if not models.takes_turns:
        args["threads"] = models.threads
    base = str(models.base)
    applications = [{"name": BASE, "import_path": "deploy.applications:base", "args": {"model": base, **args}}]
    for name, path in models.guides.items():
        guide = {"model": str(path), "base": base, "rows": models.rows, **args}
        applications.append(
            {"name": guide_application(name), "import_path": "deploy.applications:guide", "args": guide}
        )
    user_config = {"guides": list(models.guides), "profiles": {}}
    trimtab = {
        "name": TRIMTAB,
        "route_prefix": "/",
        "import_path": "deploy.applications:trimtab",
        "args": {"exchange": {"transport": models.transport}},
        "deployments": [{"name": name, "user_config": user_config} for name in (GATEWAY, COORDINATOR)],
    }
    return {"applications": [*({**application, "route_prefix": None} for application in applications), trimtab]}


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
