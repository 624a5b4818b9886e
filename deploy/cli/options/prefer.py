"""Options of `trimtab prefer`: their defaults, and what is refused before anything is sampled."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from actors.coordinator.request import GenerationRequest, invalid_request
from actors.training.rewards import EXAMPLE
from cluster.errors import InvalidConfiguration
from deploy.cli.command import Command
from deploy.cli.options.batch import parse_json

MIN_TEMPERATURE = 0.01
"""Below, the samples of a prompt are all the same."""

LOCAL = ("dtype", "batch", "sentence")
SERVICE = ("profile", "weights", "concurrency")
"""Options that mean nothing in the other way of sampling."""

LEAST = {
    "samples": 2,
    "concurrency": 1,
    "batch": 1,
    "max_length_difference": 0,
    "max_repeat": 0,
    "pairs_per_prompt": 0,
    "sentence": 1,
    "seed": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which prompts and reward, how answers are sampled, and which of them become pairs."""

    prompts: Annotated[Path, typer.Option(metavar="FILE", help="the prompts, JSON Lines")]
    output: Annotated[Path, typer.Option(metavar="FILE", help="the pairs")]
    answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="the answers; what it holds is kept (<output's stem>.answers.jsonl)"),
    ] = None
    reward: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help=f"f(prompt, response) -> float, higher is better: {EXAMPLE}, actors.training.rewards:plainness, or "
            "your own; the current directory is searched too",
        ),
    ]
    samples: Annotated[int, typer.Option(metavar="N", help="answers to each prompt (8)")] = 8
    max_tokens: Annotated[int, typer.Option(metavar="N", help="of an answer (128)")] = 128
    temperature: Annotated[float, typer.Option(metavar="T", help="(1.0)")] = 1.0
    top_p: Annotated[float, typer.Option(metavar="P", help="(1.0)")] = 1.0
    seed: Annotated[int, typer.Option(help="of the samples and of the choice of pairs (0)")] = 0
    margin: Annotated[float, typer.Option(metavar="R", help="smallest difference of rewards (0)")] = 0.0
    max_length_difference: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="in tokens; pairs whose lengths differ by more are left out (no limit). Summed log-probabilities of "
            "answers of different lengths differ by nats for every token, which drowns the reward",
        ),
    ] = None
    max_length_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="of the longer answer to the shorter one, in tokens; for whole answers, which differ in length",
        ),
    ] = None
    max_repeat: Annotated[
        int | None, typer.Option(metavar="N", help="words in a row that the better answer says twice (no limit)")
    ] = None
    pairs_per_prompt: Annotated[int, typer.Option(metavar="N", help="at most, drawn at random; 0 keeps all (8)")] = 8
    widest: Annotated[
        bool,
        typer.Option("--widest", help="keep the pairs whose rewards differ the most, no answer in two of them"),
    ] = False
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="through the service: guidance of the answers (none: the base alone)"),
    ] = None
    weights: Annotated[
        Any, typer.Option(parser=parse_json, metavar="JSON", help='instead of --profile: {"<guide>": 1.0}')
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="through the service: open requests at a time (16)")
    ] = None
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="sample from this transformers model in this process; no service is needed"),
    ] = None
    sentence: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="with --model: cut answers off at the end of the first sentence behind N tokens: pairs of sentences "
            "after the same beginning teach more a token than whole answers, where the reward is one of sentences",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(help="with --model: bfloat16 on processors that have it (auto)"),
    ] = None
    batch: Annotated[int | None, typer.Option(metavar="N", help="with --model: prompts at a time (10)")] = None

    def __post_init__(self) -> None:
        if self.profile is not None and self.weights is not None:
            raise InvalidConfiguration("--weights: not allowed with --profile; leave one of them out")
        for name in SERVICE if self.model else LOCAL:
            if getattr(self, name) is not None:
                raise InvalidConfiguration(
                    f"--{name}: means nothing {'with' if self.model else 'without'} --model; leave it out"
                )
        for name, limit in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise InvalidConfiguration(f"--{name.replace('_', '-')}: at least {limit}, not {value}")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise InvalidConfiguration(f"--margin: at least 0, not {self.margin}")
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1:
            raise InvalidConfiguration(f"--max-length-ratio: at least 1, not {self.max_length_ratio}")
        if self.temperature < MIN_TEMPERATURE:
            raise InvalidConfiguration(
                f"--temperature: at least {MIN_TEMPERATURE}, not {self.temperature}; answers must differ"
            )
        try:
            GenerationRequest.model_validate({"prompt": "a prompt", **self.request_fields()})
        except ValidationError as error:
            raise InvalidConfiguration(f"--{invalid_request(error.errors()[0])}".replace("_", "-")) from error

    def request_fields(self) -> dict[str, Any]:
        """Return what all requests to the service have in common."""
        fields = {"model": self.profile, "weights": self.weights}
        fields |= {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in fields.items() if value is not None}


def _work(options: Options) -> None:
    from deploy.cli.prefer import run

    run(options)


COMMAND = Command(
    name="prefer",
    options=Options,
    work=_work,
    interrupted="stopped; the same command continues",
    description="Make preference pairs out of a model: sample answers to prompts, score them, pair them. Answers come "
    "through the running service, or from --model in this process.",
    epilog="A line of the prompts holds `messages` or `prompt`, and an `id` (its line if absent). A line of the pairs "
    "holds that, `chosen` and `rejected`, and the finish reason and reward of each. The answers file makes a stopped "
    "run go on, and gives another reward the same answers: give the options of the first run. Exit status: 0, 1 if no "
    "two answers make a pair, 2 if nothing was started.",
)
