"""Options of `trimtab keys`: `new`, `list` and `revoke`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.command import Command, Commands

File = Annotated[Path, typer.Option(help="that holds the keys")]
Name = Annotated[str, typer.Option(help="of the key")]


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """A key to make."""

    file: File
    name: Name
    max_sequences: Annotated[int | None, typer.Option(help="open requests, at most")] = None
    tokens_per_minute: Annotated[int | None, typer.Option(help="prompts and answers together")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class List:
    """Keys to name."""

    file: File


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """A key to take away."""

    file: File
    name: Name


def _new(options: New) -> None:
    from deploy.cli.keys import run_new

    run_new(options)


def _list(options: List) -> None:
    from deploy.cli.keys import run_list

    run_list(options)


def _revoke(options: Revoke) -> None:
    from deploy.cli.keys import run_revoke

    run_revoke(options)


COMMAND = Commands(
    name="keys",
    description="The API keys of a service. A running one takes the file's changes within a second or two.",
    members=(
        Command(name="keys new", options=New, work=_new, description="Make a key; it is printed once."),
        Command(name="keys list", options=List, work=_list, description="The names and limits of all keys."),
        Command(name="keys revoke", options=Revoke, work=_revoke, description="Take a key away."),
    ),
)
