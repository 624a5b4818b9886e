"""What holds for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """A run leaves no segment behind."""
    shared_memory = Path("/dev/shm")
    before = set(shared_memory.glob("trimtab-*"))
    yield
    assert set(shared_memory.glob("trimtab-*")) <= before
