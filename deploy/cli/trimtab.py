"""The command `trimtab`, and which commands it has.

A command's module is imported when it runs, its options when they are asked for: `trimtab --help` imports neither.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from deploy.cli.command import PROGRAM, STATUSES, execute

COMMANDS: Mapping[str, str] = {
    "serve": "Run a service in the foreground.",
    "chat": "Talk to a running service.",
    "status": "Say what runs, and where.",
    "check": "Find the mistakes of a deploy.yaml without starting anything.",
    "plan": "Estimate a service before there is a machine for it.",
    "models": "Make the models of the default service.",
    "keys": "Make, list and revoke API keys.",
    "batch": "Answer a file of prompts.",
    "prefer": "Make preference pairs out of a model.",
    "contexts": "Make prompts that end inside answers.",
    "train": "Train a guide on preference pairs.",
    "calibrate": "Find the weight that a guide bears.",
    "derive": "Cut a smaller model out of a model.",
    "evaluate": "Measure ways of writing.",
}
"""What each is for; `deploy/cli/options/NAME.py` is what it may be told."""


class _Trimtab(TyperGroup):
    """Knows its commands by name, and loads the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, purpose in COMMANDS.items():
            self.add_command(TyperCommand(name, help=purpose))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load(name), rest


def load(name: str) -> TyperCommand | TyperGroup:
    """Return a command."""
    command: TyperCommand | TyperGroup = importlib.import_module(f"deploy.cli.options.{name}").COMMAND.click()
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what a command line says; return the process's exit status."""
    app = typer.Typer(
        cls=_Trimtab,
        rich_markup_mode=None,
        help="Weak-to-strong guided generation as a service: small models steer every token of a large one.",
        epilog=STATUSES,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(lambda: None)
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return execute(command, (sys.argv[1:] if arguments is None else arguments) or ["--help"], PROGRAM)


def old_way(name: str, new: str | None = None) -> int:
    """Do what `python -m deploy.NAME` is told, and name the command that has taken its place."""
    new = new or name
    print(f"python -m deploy.{name} is now `{PROGRAM} {new}`, and will be gone in the next release", file=sys.stderr)
    return main([new, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
