"""What importing a module costs: nothing is compiled, and what holds no model maps no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from actors.replica.router import LeaseRouter
from actors.settings import CHECKOUT, CoordinatorSettings
from deploy.applications import trimtab

COMPILATIONS = """
from numba.core import event

with event.install_recorder("numba:run_pass") as recorder:
    import actors.replica.base, actors.replica.guide, actors.coordinator.coordinator
    import deploy.applications, deploy.cli.check
    assert not recorder.buffer, recorder.buffer[0][1].data
    from actors.engine.passes.compiled import kernels
    assert kernels.product_address() == kernels.product_address()
    assert recorder.buffer
"""
"""Records the passes of numba's compiler."""


def test_kernels_are_compiled_when_they_are_asked_for_and_not_at_import(tmp_path: Path) -> None:
    # An empty cache: nothing is read from there in place of compiling it.
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILATIONS], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*_enter_product*.nbi"))


def heavy_modules(code: str) -> str:
    """Which of the large libraries a process has imported after some code."""
    code = f"import sys; {code}; print(*{{'torch', 'transformers', 'numba'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "deploy.http.gateway",
        "deploy.client",
        "deploy.cli.keys",
        "deploy.cli.batch",
        "deploy.cli.status",
        "deploy.cli.check",
    ],
)
def test_what_holds_no_model_imports_no_torch(module: str) -> None:
    assert heavy_modules(f"import {module}") == ""


def test_a_gateways_replica_unpickles_nothing_that_imports_torch(tmp_path: Path) -> None:
    settings = CoordinatorSettings()
    gateway = trimtab(settings)._bound_deployment
    (tmp_path / "gateway").write_bytes(cloudpickle.dumps((gateway.func_or_class, LeaseRouter, settings)))
    load = f"from ray import cloudpickle; cloudpickle.loads(open({str(tmp_path / 'gateway')!r}, 'rb').read())"
    assert heavy_modules(load) == ""
