"""How far a job has come, as people see it: over requests, or in time where there is nothing to count."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from tqdm import tqdm

from deploy.jobs.batch.lines import Line

REPORT_PERIOD_S = 10.0

PATIENCE_S = 5.0
"""That people have without a sign of life."""


class Progress:
    """Counts on stderr: a bar on a terminal, elsewhere one line now and then."""

    def __init__(self, *, total: int, num_done: int, file: IO[str]) -> None:
        self.num_failed = 0
        self._num_done = num_done
        self._total = total
        self._file = file
        self._reported_at = time.monotonic()
        self._bar = tqdm(total=total, initial=num_done, unit="request", file=file) if file.isatty() else None

    def succeed(self) -> None:
        """Count a request with an answer."""
        self._num_done += 1
        self._advance()

    def fail(self, line: Line, error: BaseException) -> None:
        """Count a request without one, and say why."""
        self.num_failed += 1
        self.note(f"line {line.number}: {type(error).__name__}: {error}")
        self._advance()

    def note(self, text: str) -> None:
        """Say something without disturbing the bar."""
        if self._bar is None:
            print(text, file=self._file, flush=True)
        else:
            self._bar.write(text, file=self._file)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix(failed=self.num_failed, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._reported_at >= REPORT_PERIOD_S:
            self.report()

    def report(self) -> None:
        """Give the counts as text."""
        self._reported_at = time.monotonic()
        self.note(f"{self._num_done} done, {self.num_failed} failed of {self._total}")

    def close(self) -> None:
        """Leave the bar as it stands, and the counts below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self.report()


@contextmanager
def busy(what: str, *, patience_s: float = PATIENCE_S, file: IO[str] | None = None) -> Iterator[None]:
    """Show for how long something goes on that takes longer than people wait without a sign of life.

    On a terminal that is a line that counts the seconds, elsewhere one now and then.

    Args:
        what: goes on, in words such as `making models/positivity`.
        patience_s: until the first sign.
        file: where it is shown; stderr if none is given.
    """
    is_over = threading.Event()
    thread = threading.Thread(target=_count, args=(what, patience_s, file or sys.stderr, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _count(what: str, patience_s: float, file: IO[str], is_over: threading.Event) -> None:
    begin, pause_s, form = time.monotonic(), REPORT_PERIOD_S, "{what}: {seconds:.0f} s\n"
    if file.isatty():
        pause_s, form = 1.0, "\r{what}: {seconds:.0f} s"
    has_shown = False
    while not is_over.wait(pause_s if has_shown else patience_s):
        print(form.format(what=what, seconds=time.monotonic() - begin), end="", file=file, flush=True)
        has_shown = True
    if has_shown and file.isatty():
        print(file=file, flush=True)
