"""Options of `trimtab chat`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from actors.settings import NO_GUIDANCE
from deploy.cli.command import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Whom to talk to, and how."""

    url: Annotated[str, typer.Option(metavar="URL", help="of the service (http://127.0.0.1:8000)")] = (
        "http://127.0.0.1:8000"
    )
    key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="TRIMTAB_KEY", help="where the service asks for one (none)")
    ] = None
    profile: Annotated[str, typer.Option(metavar="NAME", help=f"to begin with ({NO_GUIDANCE}: no guidance)")] = (
        NO_GUIDANCE
    )
    max_tokens: Annotated[int, typer.Option(metavar="N", help="of an answer (512)")] = 512


def _work(options: Options) -> None:
    from deploy.cli.chat import run

    run(options)


COMMAND = Command(
    name="chat",
    options=Options,
    work=_work,
    description="Talk to a running service in the terminal; answers appear as they are written.",
    epilog="While it runs: /weights positivity=0.4 or /weights positivity=auto steers what follows, /weights alone "
    "goes back to the profile's; /profile NAME takes another profile; /reset begins a new conversation; /help lists "
    "these; /quit or Ctrl-D ends. Ctrl-C ends an answer.",
)
