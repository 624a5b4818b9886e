"""What takes long gives signs of life, and what does not gives none."""

import io
import re
import time

from deploy.jobs.progress import busy


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_seconds_on_one_line() -> None:
    shown = Terminal()
    with busy("scoring", patience_s=0.01, file=shown):
        while not shown.getvalue():
            time.sleep(0.01)
    assert re.fullmatch(r"(\rscoring: \d+ s)+\n", shown.getvalue())


def test_elsewhere_there_is_a_line_now_and_then() -> None:
    shown = io.StringIO()
    with busy("scoring", patience_s=0.01, file=shown):
        while not shown.getvalue():
            time.sleep(0.01)
    assert re.fullmatch(r"(scoring: \d+ s\n)+", shown.getvalue())


def test_what_is_quick_shows_nothing() -> None:
    shown = Terminal()
    with busy("scoring", file=shown):
        pass
    assert shown.getvalue() == ""
