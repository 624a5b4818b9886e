"""What all commands have in common: options as frozen values, errors on stderr, and one table of exit statuses.

A command's options are a frozen dataclass whose fields say, as typer reads them, what the command line may hold; its
work takes such a value. Knows no command by name.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from cluster.errors import TrimtabError
from deploy.jobs.outcome import BadOutcome

PROGRAM = "trimtab"

DONE, BAD, REFUSED, INTERRUPTED = 0, 1, 2, 130

STATUSES = f"""Exit status of every command:

\b
{DONE:<5} done
{BAD:<5} it ran, and the outcome is bad
{REFUSED:<5} bad use, or nothing was started
{INTERRUPTED:<5} interrupted"""

DEFAULT = Path(__file__).resolve().parents[1] / "files" / "default.yaml"
"""The default service's."""

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Generic[Options]):
    """One command: what it may be told, and what it does."""

    name: str
    """Behind `trimtab`; of a command within another one, both words."""

    options: type[Options]
    """Raises `TrimtabError` where values make no sense together."""

    work: Callable[[Options], None]
    """Raises `BadOutcome` where it ran to no good end."""

    description: str
    epilog: str = ""
    interrupted: str = "stopped"
    """What Ctrl-C leaves."""

    spread: str | None = None
    """An option that takes all words up to the next option."""

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Do what a command line says (the process's own if none is given); return the process's exit status."""
        return execute(self.click(), arguments, f"{PROGRAM} {self.name}")

    def parse(self, arguments: Sequence[str] | None = None) -> Options:
        """Return the options of a command line.

        Raises:
            SystemExit: they make no sense, which is said, or only the help was asked for.
        """
        parsed: list[Options] = []
        status = execute(self._click(parsed.append), arguments, f"{PROGRAM} {self.name}")
        if not parsed:
            raise SystemExit(status)
        return parsed[0]

    def click(self) -> TyperCommand:
        """Return the command as typer runs it; what it returns is the exit status."""
        return self._click(self.work)

    def _click(self, work: Callable[[Options], None]) -> TyperCommand:
        def run(**fields: Any) -> int:
            return self._status(lambda: work(self.options(**fields)))

        # What typer reads of a function: its parameters, with what each is to the command line.
        run.__dict__["__signature__"] = inspect.signature(self.options)
        run.__annotations__ = get_type_hints(self.options, include_extras=True)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        name, settings = self.name.split()[-1], {"help_option_names": ["-h", "--help"]}
        app.command(
            name, cls=_command_class(self.spread), help=self.description, epilog=self.epilog, context_settings=settings
        )(run)
        command = get_command(app)
        assert isinstance(command, TyperCommand)
        own = inspect.get_annotations(self.options)
        # Options that several commands share come behind a command's own.
        command.params.sort(key=lambda parameter: parameter.name not in own)
        for parameter in command.params:
            # Help texts tell defaults themselves.
            parameter.show_default = False  # type: ignore[attr-defined]
        return command

    def _status(self, work: Callable[[], None]) -> int:
        try:
            work()
        except KeyboardInterrupt:
            complain(self.name, self.interrupted)
            return INTERRUPTED
        except BadOutcome as error:
            complain(self.name, str(error))
            return BAD
        except _told() as error:
            complain(self.name, str(error))
            return REFUSED
        return DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """A command that is several."""

    name: str
    members: Sequence[Command[Any]]
    description: str

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Do what a command line says; return the process's exit status."""
        return execute(self.click(), arguments, f"{PROGRAM} {self.name}")

    def click(self) -> TyperGroup:
        """Return the commands as typer runs them."""
        commands: dict[str, Any] = {member.name.split()[-1]: member.click() for member in self.members}
        return TyperGroup(name=self.name, commands=commands, help=self.description, rich_markup_mode=None)


def execute(command: TyperCommand | TyperGroup, arguments: Sequence[str] | None, program: str) -> int:
    """Run a command line; return the exit status. What is wrong with the words themselves is said here."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status: int | None = command.main(given, prog_name=program, standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else program
        print(f"{path}: {error.format_message()} (`{path} --help`)", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:
        # Who read the output has seen enough; nor is anything to be told when Python closes it.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return DONE
    return status or DONE


def complain(name: str, text: str) -> None:
    """Say on stderr which command has met what."""
    print(f"{PROGRAM} {name}: {text}", file=sys.stderr, flush=True)


DeployFile = Annotated[
    Path | None,
    typer.Argument(help="a deploy.yaml (that of the current directory; without one, the default service's)"),
]
"""An argument; `default_file` is meant where there is none."""


def default_file() -> Path:
    """Return the deploy.yaml that is meant where none is named: the current directory's, else the default service's."""
    own = Path("deploy.yaml")
    return own if own.is_file() else DEFAULT


def _told() -> tuple[type[BaseException], ...]:
    """Errors whose message is all that a user needs; Ray's where Ray is in use."""
    ray = sys.modules.get("ray.exceptions")
    return (TrimtabError, OSError) if ray is None else (TrimtabError, OSError, ray.RayError)


def _command_class(spread: str | None) -> type[TyperCommand]:
    """A command whose errors know it, and that takes `SPREAD a b` for `SPREAD a SPREAD b`."""

    class Told(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            words: list[str] = []
            for word in args:
                if spread is not None and words[-2:-1] == [spread] and not word.startswith("-"):
                    words.append(spread)
                words.append(word)
            try:
                return super().parse_args(ctx, words)
            except typer.TyperException as error:
                # The parser's own errors come without.
                if getattr(error, "ctx", None) is None:
                    error.__dict__["ctx"] = ctx
                raise

    return Told
