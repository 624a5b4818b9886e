"""Imports point one way: deploy -> actors -> cluster, and the mathematics and the engine know nothing of Ray."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "cluster": {"actors", "deploy", "ray", "transformers"},
    "actors": {"deploy", "fastapi", "grpc"},
    "actors/guidance": {"deploy", "ray", "grpc", "transformers"},
    "actors/engine": {"deploy", "ray", "grpc"},
}
LOADS = re.compile(r"Auto\w+\.from_pretrained")


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_imports_only_what_is_below_it(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*.py") if "_pb2" not in file.name]
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file)
        if name.split(".")[0] in FORBIDDEN[folder]
    ]
    assert wrong == []


def test_a_command_line_ends_in_typed_values() -> None:
    files = [*(ROOT / "deploy").rglob("*.py")]
    assert files
    assert [file for file in files if "argparse" in imports(file)] == []


@pytest.mark.parametrize("folder", ["http", "jobs", "planning", "service"])
def test_what_commands_are_made_of_knows_no_command(folder: str) -> None:
    files = [*(ROOT / "deploy" / folder).rglob("*.py")]
    assert files
    assert [file for file in files for name in imports(file) if name.split(".")[:2] == ["deploy", "cli"]] == []


@pytest.mark.parametrize("folder", ["actors", "deploy"])
def test_no_model_brings_code_of_its_own(folder: str) -> None:
    # Left open, transformers asks on a terminal, and a yes would run it.
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and LOADS.fullmatch(ast.unparse(node.func)):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
