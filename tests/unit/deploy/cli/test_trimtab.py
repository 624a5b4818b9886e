"""The command `trimtab` as a user runs it: help, bad use, exit statuses, and what each of its commands shares."""

import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pytest
import typer

from actors.settings import CHECKOUT
from cluster.errors import InvalidConfiguration, ReplicaLost
from deploy.cli import trimtab
from deploy.cli.command import Command, Commands
from deploy.jobs.outcome import BadOutcome

LARGE = ("ray", "torch", "transformers", "numba", "fastapi", "datasets", "numpy")


def run(*words: str, folder: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_help_names_every_command_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert trimtab.main(words) == 0
        told = capsys.readouterr().out
        for name, purpose in trimtab.COMMANDS.items():
            assert f"  {name} " in told
            assert purpose in told
        for status in ("0     done", "1     it ran", "2     bad use", "130   interrupted"):
            assert status in told


def commands() -> list[tuple[str, Command[object]]]:
    found: list[tuple[str, Command[object]]] = []
    for name in trimtab.COMMANDS:
        command = import_module(f"deploy.cli.options.{name}").COMMAND
        found += [(each.name, each) for each in (command.members if isinstance(command, Commands) else (command,))]
    return found


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_explains_its_options_and_refuses_others(
    name: str, command: Command[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_dataclass(command.options)
    assert command.options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert trimtab.main([*name.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Usage: trimtab {name} ")
    assert all(field.name in told or f"--{field.name.replace('_', '-')}" in told for field in fields(command.options))
    assert trimtab.main([*name.split(), "--no-such-option"]) == 2
    assert capsys.readouterr().err.startswith(f"trimtab {name}: No such option: --no-such-option")


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys; from deploy.cli.trimtab import COMMANDS, main; main(['--help']); "
        "assert not [name for name in sys.modules if name.startswith('deploy.cli.options.')]; "
        "assert all(main([name, '--help']) == 0 for name in COMMANDS); "
        f"print(*{set(LARGE)!r} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chekc"], "trimtab: No such command 'chekc'. Did you mean 'check'?"),
        (["keys", "neu"], "trimtab keys: No such command 'neu'. Did you mean 'new'?"),
        (["plan"], "trimtab plan: Missing argument"),
        (["models", "--directory"], "trimtab models: Option '--directory' requires an argument."),
        (["batch", "--input", "a", "--output", "b", "--seed", "x"], "trimtab batch: Invalid value for '--seed': "),
    ],
)
def test_bad_use_is_told_in_a_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab.main(words) == 2
    assert told in capsys.readouterr().err


def test_a_bad_file_is_told_by_its_mistake(tmp_path: Path) -> None:
    (tmp_path / "deploy.yaml").write_text("aplications: []\n")
    done = run("deploy", "check", str(tmp_path / "deploy.yaml"))
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"trimtab check: {tmp_path}/deploy.yaml: aplications: there is no such key; did you mean 'applications'?\n"
    )
    (tmp_path / "deploy.yaml").write_bytes(b"applications: \xff")
    done = run("deploy", "check", str(tmp_path / "deploy.yaml"))
    assert done.returncode == 1
    assert "unacceptable character" in done.stderr or "invalid start byte" in done.stderr
    done = run("deploy", "check", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stderr.startswith("trimtab check: [Errno 2] No such file or directory")


def test_the_old_way_names_the_new_one(tmp_path: Path) -> None:
    done = run("deploy.keys", "list", "--file", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    old, new = done.stderr.splitlines()
    assert old == "python -m deploy.keys is now `trimtab keys`, and will be gone in the next release"
    assert new.startswith("trimtab keys list: --file: there is no file")
    assert "now `trimtab serve`" in run("deploy.start", "--help").stderr


def test_completion_knows_commands_and_options() -> None:
    def completed(line: str, word: int) -> list[str]:
        environment = {"_TRIMTAB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
        code = "import sys; from deploy.cli.trimtab import main; sys.exit(main([]))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout.split()

    assert completed("trimtab de", 1) == ["derive"]
    assert completed("trimtab train --lora", 2) == ["--lora-rank", "--lora-alpha"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the command of the tests below is told."""

    outcome: Annotated[str, typer.Argument()]
    rows: Annotated[list[str] | None, typer.Option()] = None

    def __post_init__(self) -> None:
        if self.outcome == "impossible":
            raise InvalidConfiguration("--outcome: impossible")


def work(told: Told) -> None:
    errors: dict[str, BaseException] = {
        "bad": BadOutcome("of no use"),
        "lost": ReplicaLost("gone"),
        "no file": FileNotFoundError("there"),
        "stopped": KeyboardInterrupt(),
        "defect": RuntimeError("defect"),
    }
    if error := errors.get(told.outcome):
        raise error


COMMAND = Command(
    name="test", options=Told, work=work, description="A test.", interrupted="stopped; go on", spread="--rows"
)


@pytest.mark.parametrize(
    ("outcome", "status", "told"),
    [
        ("good", 0, ""),
        ("bad", 1, "trimtab test: of no use\n"),
        ("lost", 2, "trimtab test: gone\n"),
        ("no file", 2, "trimtab test: there\n"),
        ("impossible", 2, "trimtab test: --outcome: impossible\n"),
        ("stopped", 130, "trimtab test: stopped; go on\n"),
    ],
)
def test_an_outcome_has_its_status(outcome: str, status: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main([outcome]) == status
    assert capsys.readouterr().err == told


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="defect"):
        COMMAND.main(["defect"])


def test_an_option_may_take_all_words_up_to_the_next() -> None:
    assert COMMAND.parse(["good", "--rows", "a", "b", "--rows", "c"]) == Told(outcome="good", rows=["a", "b", "c"])
    assert COMMAND.parse(["good"]) == Told(outcome="good")
    with pytest.raises(SystemExit):
        COMMAND.parse(["impossible"])
