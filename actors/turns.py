"""Turns on the processor for models that share its cores.

Two models that compute at the same time on the same cores hold each other up: the threads of each wait for those that
the other one displaced. One after the other they are done sooner than side by side.
"""

import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.001


class Turns:
    """What models on one node take before they compute; a process that dies gives it back."""

    def __init__(self, meeting_place: Path = Path(__file__).parent, *, patience_s: float = 0.5) -> None:
        """Meet the models that run this same code on this node.

        Args:
            meeting_place: a file or folder that all of them see, of which nothing is read or written.
            patience_s: who has waited so long goes on all the same; the one whose turn it is may have been stopped.
        """
        self._patience_s = patience_s
        self._descriptor = os.open(meeting_place, os.O_RDONLY | os.O_CLOEXEC)
        # Not before the last turn is over: somebody else may have its number by then.
        self.close = weakref.finalize(self, os.close, self._descriptor)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn, and keep it while the context lasts."""
        is_taken = self._wait()
        try:
            yield
        finally:
            if is_taken:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _wait(self) -> bool:
        # A lock that waits by itself has no time limit.
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_S)
            else:
                return True
