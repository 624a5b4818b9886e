"""What holds for every test."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes computes in one thread: two teams on the same cores displace each other. Read when torch
    # is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

SHARED_MEMORY = Path("/dev/shm")
SEGMENTS = pytest.StashKey[set[Path]]()

if not torch.cuda.is_available():
    # Kernels for GPUs run in Triton's interpreter then. Read when Triton is imported, which transformers' models do.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=200, help="how many hostile requests; `make fuzz` sends 10,000")
    parser.addoption("--chaos", type=int, default=1, help="how many faults; `make chaos` does 26 beside 200 requests")
    parser.addoption("--leavers", type=int, default=32, help="how many clients leave; in `make chaos` 500 do")


@pytest.fixture(scope="session")
def num_hostile(request: pytest.FixtureRequest) -> int:
    """How many hostile requests a fuzz test sends."""
    return int(request.config.getoption("--fuzz"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Note which segments are there before the run."""
    if not hasattr(session.config, "workerinput"):
        session.config.stash[SEGMENTS] = set(SHARED_MEMORY.glob("trimtab-*"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves a segment behind; only the process that started the others can tell."""
    if not hasattr(session.config, "workerinput"):
        before = session.config.stash[SEGMENTS]
        left = set(SHARED_MEMORY.glob("trimtab-*")) - before
        if left:
            print(f"\nleft in {SHARED_MEMORY}: {sorted(path.name for path in left)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
