"""Makes a small model out of a large one: `trimtab derive --model DIR --keep 10 --data FILE --output DIR`.

Some of the model's layers are kept, under the same embeddings and vocabulary, and healed by distillation from the whole
model. So a strong model that has no small sibling gets a weak one, to be trained as its guide.
"""

import re
import sys
from collections.abc import Sequence

from actors.training.data import read_texts
from actors.training.derive import choose_layers
from actors.training.run import RunSettings
from cluster.errors import InvalidConfiguration
from deploy.cli.options.derive import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.training.run import (
    Job,
    adapter_rank,
    count_layers,
    describe_adapter,
    describe_data,
    locate,
    response_encoder,
    shared_settings,
)
from deploy.jobs.training.run import run as train


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


def prepare(options: Options) -> Job:
    """Read and encode the data; loads a tokenizer, and no model.

    Raises:
        InvalidConfiguration: the data or an option cannot be used.
    """
    options.check_numbers()
    model = locate(options.model)
    texts = read_texts(options.data, skip_bad_rows=options.skip_bad_rows, split=options.split)
    layers = _layers(options, count_layers(model))
    encoder = response_encoder(model, options)
    examples = encoder.texts(texts.texts)
    data = describe_data(texts, encoder.report)
    if not examples:
        raise InvalidConfiguration(f"--data: no text is left to train on: {'; '.join(data)}")
    settings = settings_from(model, options, layers, len(examples))
    return Job(
        settings=settings,
        examples=examples,
        validation=[],
        data=[*data, *describe_adapter(settings)],
        digest=texts.digest,
    )


def _layers(options: Options, num_layers: int) -> tuple[int, ...]:
    """The layers to keep.

    Raises:
        InvalidConfiguration: the model has no such layers.
    """
    if options.layers is None:
        assert options.keep is not None
        return choose_layers(num_layers, options.keep)
    layers = parse_layers(options.layers)
    if layers[-1] >= num_layers:
        raise InvalidConfiguration(f"--layers: {layers[-1]} is beyond the model's last layer, {num_layers - 1}")
    return layers


def settings_from(model: str, options: Options, layers: tuple[int, ...], num_texts: int) -> RunSettings:
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
        **shared_settings(model, options, num_texts, default_rate=2e-4 if options.full else 1.5e-3),
    )


def run(options: Options) -> None:
    """Cut and distil, and say where the model is.

    Raises:
        InvalidConfiguration: the run cannot start.
        TrainingFailed: a worker died or raised.
    """
    train(prepare(options), options)
    print(f"{options.output.resolve()} is ready: train it with `trimtab train --model`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if training stopped on the way, 2 if it was never started."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("derive"))
