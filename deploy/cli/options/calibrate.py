"""Options of `trimtab calibrate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.errors import InvalidConfiguration
from deploy.cli.command import Command

VALIDATION_PROMPTS = "validation_prompts.jsonl"
"""Beside a guide that `trimtab train` made: the prompts that it was not trained on."""

NUM_ANSWERS = 12
MAX_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which guide under which base, and how they are looked at."""

    guide: Annotated[Path, typer.Option(metavar="DIR", help="directory of the guide")]
    base: Annotated[str, typer.Option(help="directory or hub id of the model that it steers")]
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"JSON Lines with messages or prompt (the guide's {VALIDATION_PROMPTS})"),
    ] = None
    reward: Annotated[str | None, typer.Option(metavar="MODULE:FUNCTION", help="what the guide is to raise (none)")] = (
        None
    )
    weights: Annotated[
        str | None, typer.Option(metavar="LIST", help="such as 0.5,1,1.5 (by how the guide was trained)")
    ] = None
    answers: Annotated[int, typer.Option(metavar="N", help=f"at each weight ({NUM_ANSWERS})")] = NUM_ANSWERS
    max_tokens: Annotated[int, typer.Option(metavar="N", help=f"of an answer ({MAX_TOKENS})")] = MAX_TOKENS
    temperature: Annotated[float, typer.Option(metavar="T", help="(0.7)")] = 0.7
    top_p: Annotated[float, typer.Option(metavar="P", help="(0.9)")] = 0.9
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="(auto)")] = "auto"
    seed: Annotated[int, typer.Option(help="(0)")] = 0
    scale: Annotated[
        bool,
        typer.Option("--scale", help="multiply the guide's logits so that the recommended weight becomes 1"),
    ] = False

    def __post_init__(self) -> None:
        weights = self.chosen_weights
        if weights and weights[0] <= 0:
            raise InvalidConfiguration(f"--weights: {weights[0]:g} is not above 0; the base alone is looked at anyway")
        if self.answers < 1 or self.max_tokens < 1:
            raise InvalidConfiguration("--answers and --max-tokens are 1 or more")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InvalidConfiguration("--temperature is above 0, and --top-p above 0 and at most 1")

    @property
    def chosen_weights(self) -> tuple[float, ...] | None:
        """The weights to look at, from the smallest; none if that is not said.

        Raises:
            InvalidConfiguration: it is said in other words than a list of numbers.
        """
        if not self.weights:
            return None
        try:
            return tuple(sorted({float(weight) for weight in self.weights.split(",")}))
        except ValueError as error:
            raise InvalidConfiguration(f"--weights: {self.weights!r} is no list such as 0.5,1,1.5") from error


def _work(options: Options) -> None:
    from deploy.cli.calibrate import run

    run(options)


COMMAND = Command(
    name="calibrate",
    options=Options,
    work=_work,
    description="Find the weight that a guide bears: KL, reward, ends and variety of answers at several weights.",
    epilog="Exit status: 0 if a weight can be recommended, 1 if not, 2 if nothing was looked at.",
)
