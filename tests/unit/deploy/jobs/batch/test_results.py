"""What a batch leaves in its output, and what the next run makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidConfiguration
from deploy.jobs.batch.lines import Defaults, Line, Pending, parse_line
from deploy.jobs.batch.results import ResultFile

ANSWER = {"text": "naïve\n", "token_ids": [1, 2]}
FAILURE = {"error": {"type": "ReplicaLost", "message": "gone", "field": None}}


def lines_of(*prompts: str) -> list[Line]:
    return [
        parse_line(json.dumps({"prompt": prompt}).encode(), number, Defaults())
        for number, prompt in enumerate(prompts, 1)
    ]


def write(path: Path, lines: list[Line], outcomes: list[dict[str, Any]]) -> None:
    results = ResultFile(path)
    results.resume(Pending([]), redo_changed=False)
    for line, outcome in zip(lines, outcomes, strict=True):
        results.append(line, outcome)
    results.close()


def resume(path: Path, lines: list[Line], *, redo_changed: bool = False) -> list[int]:
    """Take the file up again; return the numbers of the lines that are to be done."""
    pending, results = Pending(lines), ResultFile(path)
    try:
        results.resume(pending, redo_changed=redo_changed)
    finally:
        results.close()
    return [line.number for line in lines if line.number in pending]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_a_result_holds_the_request_and_its_answer(path: Path) -> None:
    line = lines_of("x")[0]
    write(path, [line], [ANSWER])
    assert read(path) == [{"line": 1, "digest": line.digest, "id": 1, **line.fields, **ANSWER}]


def test_a_result_can_be_read_at_once(path: Path) -> None:
    results = ResultFile(path)
    results.append(lines_of("x")[0], ANSWER)
    assert len(read(path)) == 1
    results.close()


def test_answers_are_kept_and_failures_are_done_again(path: Path) -> None:
    lines = lines_of("x", "y", "z")
    write(path, [lines[2], lines[0]], [ANSWER, FAILURE])
    assert resume(path, lines) == [1, 2]
    assert [result["line"] for result in read(path)] == [3]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_half_written_line_is_cut_off(path: Path, cut: int) -> None:
    lines = lines_of("x", "y")
    write(path, lines, [ANSWER, ANSWER])
    path.write_bytes(path.read_bytes()[:-cut])
    assert resume(path, lines) == [2]
    assert [result["line"] for result in read(path)] == [1]


@given(size=st.integers(0, 400), outcomes=st.lists(st.sampled_from([ANSWER, FAILURE]), min_size=3, max_size=3))
@settings(deadline=None)
def test_a_file_cut_anywhere_is_completed(
    tmp_path_factory: pytest.TempPathFactory, size: int, outcomes: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("batch") / "results.jsonl"
    lines = lines_of("x", "y", "z")
    write(path, lines, outcomes)
    path.write_bytes(path.read_bytes()[:size])
    pending, results = Pending(lines), ResultFile(path)
    results.resume(pending, redo_changed=False)
    for line in lines:
        if line.number in pending:
            results.append(line, ANSWER)
    results.close()
    assert sorted(result["line"] for result in read(path)) == [1, 2, 3]
    assert all("error" not in result for result in read(path))


def test_results_of_other_requests_are_not_touched(path: Path) -> None:
    write(path, lines_of("x", "y"), [ANSWER, ANSWER])
    before = path.read_bytes()
    for changed in (lines_of("x", "other"), lines_of("x")):
        with pytest.raises(InvalidConfiguration, match=r"results\.jsonl:2 .* line 2 .*--redo-changed"):
            resume(path, changed)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_results_of_other_requests_are_replaced_on_demand(path: Path) -> None:
    write(path, lines_of("x", "y"), [ANSWER, ANSWER])
    assert resume(path, lines_of("x", "other"), redo_changed=True) == [2]
    assert [result["line"] for result in read(path)] == [1]


def test_a_failed_line_may_be_mended(path: Path) -> None:
    write(path, lines_of("x", "y"), [ANSWER, FAILURE])
    assert resume(path, lines_of("x", "mended")) == [2]


def test_lines_may_be_added(path: Path) -> None:
    write(path, lines_of("x"), [ANSWER])
    assert resume(path, lines_of("x", "y")) == [2]


@pytest.mark.parametrize(
    "content", ["a letter to mother", "[]\n", '{"line": "one"}\n', '{"line": [], "digest": ""}\n', '{"prompt": "x"}\n']
)
def test_a_file_that_no_batch_wrote_is_not_touched(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(InvalidConfiguration, match=r"results\.jsonl:1 is no result of a batch"):
        resume(path, lines_of("x"))
    assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_one_run_at_a_time_writes_a_file(path: Path) -> None:
    first = ResultFile(path)
    with pytest.raises(InvalidConfiguration, match="another run is writing"):
        ResultFile(path)
    first.resume(Pending([]), redo_changed=False)
    # The file that took the first one's place is locked as well.
    with pytest.raises(InvalidConfiguration, match="another run is writing"):
        ResultFile(path)
    first.close()
    ResultFile(path).close()
