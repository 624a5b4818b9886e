"""Options that every kind of training has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Where a run goes, how long it is, and on what it runs."""

    data: Annotated[str, typer.Option(metavar="FILE")]
    output: Annotated[Path, typer.Option(metavar="DIR", help="the model, and all of the run")]
    lora_rank: int | None = None
    full: Annotated[bool, typer.Option("--full", help="train all weights instead of an adapter")] = False
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --output")] = False
    learning_rate: Annotated[float | None, typer.Option(metavar="R", help="highest rate of a cosine schedule")] = None
    steps: Annotated[int | None, typer.Option(metavar="N", help="instead of --epochs")] = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batch: Annotated[
        int, typer.Option(metavar="N", help="of them, that a worker computes at once, at most (32)")
    ] = 32
    checkpoint_every: Annotated[int, typer.Option(metavar="N", help="steps (50)")] = 50
    seed: Annotated[int, typer.Option(help="the same seed repeats a run (0)")] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="of the products; what is trained stays float32 (auto: bfloat16 where the hardware has it)"),
    ] = "auto"
    max_prompt_tokens: Annotated[int | None, typer.Option(metavar="N", help="leave longer prompts out")] = None
    max_response_tokens: Annotated[int | None, typer.Option(metavar="N", help="cut longer responses")] = None
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="count rows that cannot be used instead of stopping")
    ] = False
    split: Annotated[str, typer.Option(help="of a data set on the hub (train)")] = "train"
    workers: Annotated[int, typer.Option(metavar="N", help="processes that share each batch (1)")] = 1
    cpus_per_worker: Annotated[
        float | None, typer.Option(metavar="N", help="default: an equal share of the cluster's")
    ] = None
    gpus_per_worker: Annotated[float, typer.Option(metavar="N", help="0 trains on processors (0)")] = 0

    def check_numbers(self) -> None:
        """Check that numbers can be.

        Raises:
            InvalidConfiguration: one cannot.
        """
        self._check_above_0("batch_size", "micro_batch", "checkpoint_every", "workers", "steps", "epochs")
        for name in ("max_prompt_tokens", "max_response_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfiguration(f"--{name.replace('_', '-')}: {value} is less than 1")
        if self.gpus_per_worker < 0 or (self.cpus_per_worker is not None and self.cpus_per_worker <= 0):
            raise InvalidConfiguration("--cpus-per-worker must be above 0, and --gpus-per-worker not below")

    def _check_above_0(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidConfiguration(f"--{name.replace('_', '-')}: {value} is not above 0")
