"""Makes a small model out of a large one: `python -m deploy.derive --model DIR --keep 10 --data FILE --output DIR`.

Some of the model's layers are kept, under the same embeddings and vocabulary, and healed by distillation from the whole
model. So a strong model that has no small sibling gets a weak one, to be trained as its guide.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from actors.training.data import read_texts
from actors.training.derive import choose_layers
from actors.training.run import RunSettings
from cluster.errors import InvalidConfiguration
from deploy.jobs.training.run import (
    Job,
    adapter_rank,
    add_run_arguments,
    check_run_arguments,
    count_layers,
    describe_adapter,
    describe_data,
    exit_status,
    locate,
    response_encoder,
    run,
    shared_settings,
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's choices. Exits with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.derive",
        description="Cut a smaller model with the same vocabulary out of a model, and distil the model into it.",
        epilog="Data: the model's own answers are best: the file of answers that deploy.prefer keeps, a file of pairs, "
        "or rows of prompt (or messages) and response. Exit status as of deploy.train.",
    )
    parser.add_argument("--model", required=True, help="directory or hub id of the model to cut")
    layers = parser.add_mutually_exclusive_group(required=True)
    layers.add_argument(
        "--keep", type=int, metavar="N", help="layers to keep: the last three in ten, the rest from the first"
    )
    layers.add_argument("--layers", metavar="LIST", help="the very layers to keep, such as 0-6,27-29")
    parser.add_argument("--data", required=True, metavar="FILE", help="prompts with responses: a file, or a hub id")
    parser.add_argument("--lora-rank", type=int, help="of an adapter on all projections (32)")
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="texts of a step, over all workers (32)"
    )
    parser.add_argument("--epochs", type=float, default=2.0, metavar="N", help="passes over the texts (2)")
    add_run_arguments(parser)
    return parser.parse_args(arguments)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers of a list such as `0-6,27-29`.

    Raises:
        InvalidConfiguration: it is no such list.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise InvalidConfiguration(f"--layers: {part!r} is neither a layer nor a range such as 0-6")
        first = int(match[1])
        layers += range(first, int(match[2] or first) + 1)
    if not layers or layers != sorted(set(layers)):
        raise InvalidConfiguration(f"--layers: {text!r} does not rise; name every layer once, in order")
    return tuple(layers)


def prepare(options: argparse.Namespace) -> Job:
    """Read and encode the data; loads a tokenizer, and no model.

    Raises:
        InvalidConfiguration: the data or an option cannot be used.
    """
    check_run_arguments(options)
    options.model = locate(options.model)
    texts = read_texts(options.data, skip_bad_rows=options.skip_bad_rows, split=options.split)
    num_layers = count_layers(options.model)
    layers = choose_layers(num_layers, options.keep) if options.layers is None else parse_layers(options.layers)
    if layers[-1] >= num_layers:
        raise InvalidConfiguration(f"--layers: {layers[-1]} is beyond the model's last layer, {num_layers - 1}")
    encoder = response_encoder(options)
    examples = encoder.texts(texts.texts)
    data = describe_data(texts, encoder.report)
    if not examples:
        raise InvalidConfiguration(f"--data: no text is left to train on: {'; '.join(data)}")
    settings = settings_from(options, layers, len(examples))
    return Job(
        settings=settings,
        examples=examples,
        validation=[],
        data=[*data, *describe_adapter(settings)],
        digest=texts.digest,
    )


def settings_from(options: argparse.Namespace, layers: tuple[int, ...], num_texts: int) -> RunSettings:
    """Return the run's settings.

    Raises:
        InvalidConfiguration: an option that cannot work.
    """
    rank = adapter_rank(options, default=32)
    return RunSettings(
        layers=layers,
        objective="distillation",
        lora_rank=rank,
        lora_alpha=rank,
        **shared_settings(options, num_texts, default_rate=2e-4 if options.full else 1.5e-3),
    )


def derive(options: argparse.Namespace) -> None:
    """Cut and distil, and say where the model is.

    Raises:
        InvalidConfiguration: the run cannot start.
        TrainingFailed: a worker died or raised.
    """
    run(prepare(options), options)
    print(f"{options.output.resolve()} is ready: train it with deploy.train --model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if training stopped on the way, 2 if it was never started."""
    options = parse_arguments(arguments)
    return exit_status("deploy.derive", lambda: derive(options))


if __name__ == "__main__":
    sys.exit(main())
