"""How far a job over requests has come, as people see it."""

import time
from typing import IO

from tqdm import tqdm

from deploy.jobs.batch.lines import Line

REPORT_PERIOD_S = 10.0


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
