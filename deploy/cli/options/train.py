"""Options of `trimtab train`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from deploy.cli.command import Command
from deploy.jobs.training.options import RunOptions

MIN_STEPS = 64
"""Of a run whose length is not given: one pass over a few hundred pairs teaches next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(RunOptions):
    """What is to be trained, on what, and towards what."""

    model: Annotated[
        str | None,
        typer.Option(help="directory or hub id of the model to start from (with --base: the base's own first layers)"),
    ] = None
    keep: Annotated[
        int | None, typer.Option(metavar="N", help="with --base and no --model: how many of its layers (a fifth)")
    ] = None
    data: Annotated[str, typer.Option(metavar="FILE", help="preference pairs: a file, or a hub id")]
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="that the guide is to raise, for choosing its weight; with --base (none)"
        ),
    ] = None
    objective: Annotated[
        Literal["helpful", "harmless"] | None, typer.Option(help="which label of PKU-SafeRLHF counts")
    ] = None
    base: Annotated[
        str | None, typer.Option(help="train under this base, which the guide is to steer: directory or hub id")
    ] = None
    loss: Annotated[Literal["arm", "dpo"], typer.Option(help="GenARM's, or DPO's as a baseline (arm)")] = "arm"
    beta: Annotated[float | None, typer.Option(help="of the loss (0.05 for arm, 0.1 for dpo and with --base)")] = None
    kl: Annotated[
        float | None,
        typer.Option(help="what a nat of KL a token from the base costs beside the loss, with --base (0.5)"),
    ] = None
    margin: Annotated[float, typer.Option(help="by which chosen is to win, arm only (0)")] = 0.0
    length_normalised: Annotated[bool, typer.Option("--length-normalised", help="mean log-probabilities, arm only")] = (
        False
    )
    lora_rank: Annotated[
        int | None,
        typer.Option(help="of an adapter on all projections (8; with --base none, and the layers stay as they are)"),
    ] = None
    lora_alpha: Annotated[float | None, typer.Option(help="its share is alpha / rank (twice the rank)")] = None
    map_rank: Annotated[
        int | None, typer.Option(metavar="N", help="with --base: of the matrix before the output layer (8)")
    ] = None
    batch_size: Annotated[int, typer.Option(metavar="N", help="pairs of a step, over all workers (16)")] = 16
    epochs: Annotated[
        float | None, typer.Option(metavar="N", help=f"passes over the pairs (1, and {MIN_STEPS} steps or more)")
    ] = None
    validation_share: Annotated[
        float, typer.Option(metavar="S", help="of the prompts, kept back to measure on and to stop by (0.1)")
    ] = 0.1
    eval_every: Annotated[int, typer.Option(metavar="N", help="steps between looks at the kept-back pairs (16)")] = 16
    patience: Annotated[int, typer.Option(metavar="N", help="looks without a lower loss that end the run (3)")] = 3

    def check_numbers(self) -> None:
        """Check that numbers can be.

        Raises:
            InvalidConfiguration: one cannot.
        """
        # Named in full: a dataclass with slots is another class than the one that `super()` would see.
        RunOptions.check_numbers(self)
        self._check_above_0("eval_every", "patience")


def _work(options: Options) -> None:
    from deploy.cli.train import run

    run(options)


COMMAND = Command(
    name="train",
    options=Options,
    work=_work,
    description="Train a guide (an autoregressive reward model) on preference pairs, or a model by DPO.",
    epilog="Data: JSONL, JSON or Parquet, or a hub id, with the columns prompt, chosen, rejected (texts or chat "
    "messages), chosen and rejected as whole conversations (messages, or texts with Human: and Assistant:, as hh-rlhf "
    "has them), or those of PKU-SafeRLHF. Relative paths start in the working folder, which under `ray job submit` is "
    "the job's own copy: give absolute ones there, which all workers can see. Exit status: 0 trained, 1 stopped on the "
    "way or of no use, 2 nothing was started.",
)
