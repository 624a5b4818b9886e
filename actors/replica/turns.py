"""Turns on the processor for models that share its cores.

Two models that compute at the same time on the same cores hold each other up: the threads of each wait for those that
the other one displaced. One after the other they are done sooner than side by side.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


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
        # A lock that waits by itself has no time limit, and one that is tried again and again comes late. So a thread
        # waits for it, and is waited for.
        self._state = threading.Lock()
        self._is_asking = False
        self._is_waited_for = False
        self._is_closed = False
        self._asked = threading.Semaphore(0)
        self._granted = threading.Semaphore(0)
        threading.Thread(target=self._ask, name="turns", daemon=True).start()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn, and keep it while the context lasts."""
        is_taken = self._wait()
        try:
            yield
        finally:
            if is_taken:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Take no more turns; to be called between two of them."""
        self._is_closed = True
        self._asked.release()

    def _wait(self) -> bool:
        with self._state:
            # Asking may still go on for an earlier turn that was not waited for to the end.
            if not self._is_asking:
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._is_asking = True
                    self._asked.release()
                else:
                    return True
            self._is_waited_for = True
        is_taken = self._granted.acquire(timeout=self._patience_s)
        with self._state:
            is_taken = is_taken or self._granted.acquire(blocking=False)
            self._is_waited_for = False
        return is_taken

    def _ask(self) -> None:
        """Wait for the lock whenever that is asked for; give it back if nobody waits any more."""
        while True:
            self._asked.acquire()
            if self._is_closed:
                os.close(self._descriptor)
                return
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            except OSError as error:
                logger.warning("no turns can be had: %s", error)
                with self._state:
                    self._is_asking = False
                continue
            with self._state:
                self._is_asking = False
                if self._is_waited_for:
                    self._granted.release()
                else:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
