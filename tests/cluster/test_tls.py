"""Under Ray's TLS variables the whole service runs, and its data plane takes nobody without a certificate."""

import os
import subprocess
import sys
from pathlib import Path

import ray.util

from actors.settings import CHECKOUT
from tests import tiny
from tests.certificates import Authority
from tests.cluster.conftest import free_port

# Ray reads its variables when it is imported: a process of its own.
SCRIPT = """
import asyncio, os, sys
import ray, requests
from ray import serve

from actors.coordinator.replicas import model_handle
from actors.leases import LeaseRequest
from actors.prompts import Prompt
from actors.settings import BaseModelSettings, CoordinatorSettings, Resources
from cluster.errors import ReplicaLost
from cluster.exchange import StepStream
from cluster.tls import Tls
from deploy import applications

model, port = sys.argv[1], int(sys.argv[2])
ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
settings = BaseModelSettings(model=model, max_context=64, threads=1, resources=Resources(cpus=0.1))
serve.run(applications.base(settings), name="trimtab-base", route_prefix=None)
serve.run(applications.trimtab(CoordinatorSettings()), name="trimtab", route_prefix="/")
body = {"model": "base", "prompt": "hello", "max_tokens": 4, "seed": 1}
for stream in (False, True):
    answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json={**body, "stream": stream}, timeout=60)
    print("answered", answer.status_code, "length" in answer.text, flush=True)

async def try_streams():
    wanted = LeaseRequest(
        coordinator="test", sequence="s", prompt=Prompt(text="hi", messages=None), known_bases=frozenset()
    )
    call = model_handle("base").options(stream=True).lease.remote(wanted)
    lease = await anext(call)
    for tls in (None, Tls.of_environment(os.environ)):
        try:
            stream = await StepStream.connect(
                lease.address, token=lease.token, coordinator="test", timeout_s=10, tls=tls
            )
            await stream.close()
            print("connected", tls is not None, flush=True)
        except ReplicaLost:
            print("refused", tls is not None, flush=True)
    call.cancel()

asyncio.run(try_streams())
serve.shutdown()
ray.shutdown()
"""


def test_rays_certificates_guard_the_data_plane(tmp_path: Path) -> None:
    base = tiny.save(tiny.talkative(tiny.llama(60)), tmp_path / "base")
    node = Authority(tmp_path / "tls").node("127.0.0.1", ray.util.get_node_ip_address())
    environment = {
        **os.environ,
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(node.certificate),
        "RAY_TLS_SERVER_KEY": str(node.key),
        "RAY_TLS_CA_CERT": str(node.authority),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, base, str(free_port())],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("answered", "connected", "refused"))]
    assert said == ["answered 200 True", "answered 200 True", "refused False", "connected True"], done.stderr[-4000:]
