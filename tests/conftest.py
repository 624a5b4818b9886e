"""What holds for every test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session", autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """A run leaves no segment behind."""
    shared_memory = Path("/dev/shm")
    before = set(shared_memory.glob("trimtab-*"))
    yield
    assert set(shared_memory.glob("trimtab-*")) <= before
