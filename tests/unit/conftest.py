"""What holds for every unit test."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute with one thread: on tiny models more of them only wait for each other, for minutes on busy cores."""
    torch.set_num_threads(1)
