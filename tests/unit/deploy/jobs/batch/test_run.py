"""How a batch is answered, whatever the service does, and what its command line refuses."""

import asyncio
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.api import Piece
from cluster.errors import DeadlineExceeded, InvalidRequest, Overloaded, ReplicaLost
from deploy.cli.batch import main
from deploy.cli.options.batch import COMMAND
from deploy.jobs.batch.lines import Line
from deploy.jobs.progress import Progress
from deploy.jobs.requests import answer_all


def answer_of(seed: int) -> Piece:
    return {
        "text": f"answer {seed}",
        "token_ids": [seed],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "seed": seed,
    }


def line(number: int, error: InvalidRequest | None = None) -> Line:
    return Line(number=number, id=number, digest="0" * 16, fields={} if error else {"seed": number}, error=error)


class Run:
    """One batch against a service written for the test."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Mapping[str, Any]] = {}
        self.stderr = io.StringIO()

    def record(self, line: Line, outcome: Mapping[str, Any]) -> None:
        assert line.number not in self.outcomes
        self.outcomes[line.number] = outcome

    def __call__(self, lines: Any, generate: Any, *, concurrency: int = 4, total: int = 0) -> Progress:
        progress = Progress(total=total, num_done=0, file=self.stderr)
        asyncio.run(answer_all(lines, generate, self.record, progress, concurrency=concurrency, pauses_s=[0, 0]))
        progress.close()
        return progress


@pytest.fixture
def run() -> Run:
    return Run()


def test_every_line_is_answered_with_so_many_open_at_most(run: Run) -> None:
    num_open, num_read, most_open = 0, 0, 0

    def lines() -> Iterator[Line]:
        nonlocal num_read
        for number in range(1, 51):
            num_read += 1
            assert num_read - len(run.outcomes) <= 4, "read no further than needed"
            yield line(number)

    async def generate(*, seed: int) -> Piece:
        nonlocal num_open, most_open
        num_open += 1
        most_open = max(most_open, num_open)
        for _ in range(seed % 5):
            await asyncio.sleep(0)
        num_open -= 1
        return answer_of(seed)

    run(lines(), generate, total=50)
    assert most_open == 4
    assert run.outcomes == {number: answer_of(number) for number in range(1, 51)}
    assert "50 done, 0 failed of 50" in run.stderr.getvalue()


def test_a_bad_line_is_recorded_and_the_rest_is_done(run: Run) -> None:
    async def generate(*, seed: int) -> Piece:
        if seed == 2:
            raise InvalidRequest("there is no guide 'x'", "weights")
        return answer_of(seed)

    progress = run([line(1, InvalidRequest("not JSON")), line(2), line(3)], generate, total=3)
    assert run.outcomes[1] == {"error": {"type": "InvalidRequest", "message": "not JSON", "field": None}}
    assert run.outcomes[2] == {
        "error": {"type": "InvalidRequest", "message": "there is no guide 'x'", "field": "weights"}
    }
    assert run.outcomes[3] == answer_of(3)
    assert progress.num_failed == 2
    assert "line 2: InvalidRequest: there is no guide 'x'" in run.stderr.getvalue()
    assert "1 done, 2 failed of 3" in run.stderr.getvalue()


@pytest.mark.parametrize("error", [ReplicaLost("gone"), Overloaded("full"), DeadlineExceeded("late")])
def test_what_may_pass_is_tried_again(run: Run, error: Exception) -> None:
    tries: list[int] = []

    async def generate(*, seed: int) -> Piece:
        tries.append(seed)
        if tries.count(seed) <= (2 if seed == 1 else 9):
            raise error
        return answer_of(seed)

    run([line(1), line(2)], generate)
    assert run.outcomes[1] == answer_of(1)
    assert run.outcomes[2] == {"error": {"type": type(error).__name__, "message": str(error), "field": None}}
    assert [tries.count(1), tries.count(2)] == [3, 3]


def test_what_will_not_pass_is_tried_once(run: Run) -> None:
    tries = 0

    async def generate(*, seed: int) -> Piece:
        nonlocal tries
        tries += 1
        raise RuntimeError("defect")

    run([line(1)], generate)
    assert tries == 1
    assert run.outcomes[1]["error"]["type"] == "RuntimeError"


def test_a_full_disk_ends_the_batch_and_cancels_what_is_open(run: Run) -> None:
    num_cancelled = 0

    async def generate(*, seed: int) -> Piece:
        nonlocal num_cancelled
        if seed == 1:
            return answer_of(seed)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            num_cancelled += 1
            raise
        return answer_of(seed)

    def record(line: Line, outcome: Mapping[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    run.record = record  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        run([line(2), line(1), line(3)], generate)
    assert num_cancelled == 2


def test_a_terminal_gets_a_bar_with_done_failed_and_total() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    progress = Progress(total=5, num_done=1, file=terminal)
    progress.succeed()
    progress.fail(line(3), InvalidRequest("no guide"))
    progress.close()
    shown = terminal.getvalue()
    assert "1/5" in shown
    assert "3/5" in shown
    assert "failed=1" in shown
    assert "line 3: InvalidRequest: no guide\n" in shown
    assert shown.endswith("2 done, 1 failed of 5\n")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--concurrency", "0", "at least 1"),
        ("--max-tokens", "0", "--max-tokens: 0 tokens are no answer"),
        ("--temperature", "nan", "--temperature"),
        ("--weights", "kind", "not JSON"),
        ("--weights", '{"kind": NaN}', "--weights.kind"),
        ("--weights", "[1]", "--weights"),
    ],
)
def test_impossible_options_are_refused(option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        COMMAND.parse(["--input", "a", "--output", "b", option, value])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_options_give_defaults() -> None:
    given = ["--max-tokens", "5", "--temperature", "0", "--weights", '{"kind": 2}', "--seed", "3"]
    defaults = COMMAND.parse(["--input", "a", "--output", "b", *given]).defaults
    assert (defaults.fields, defaults.guidance, defaults.seed) == (
        {"max_tokens": 5, "temperature": 0.0},
        {"weights": {"kind": 2}},
        3,
    )


def test_help_says_in_which_order_results_come(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMAND.parse(["--help"])
    assert "in the order in which they finish" in " ".join(capsys.readouterr().out.split())


def test_files_that_cannot_be_used_stop_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    for source, target, told in [
        (tmp_path / "no.jsonl", tmp_path / "out", f"--input: there is no file {tmp_path / 'no.jsonl'}"),
        (prompts, tmp_path / "no" / "out", f"--output: there is no folder {tmp_path / 'no'}"),
        (prompts, tmp_path, "is no file"),
        (prompts, prompts, "is the input"),
    ]:
        assert main(["--input", str(source), "--output", str(target)]) == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [prompts]
