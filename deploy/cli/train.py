"""Trains a guide from preferences: `trimtab train --model DIR --data pairs.jsonl --output DIR`.

By itself, or under `ray job submit --working-dir . -- trimtab train ...`. What it leaves in --output is a
model directory that deploy.yaml can name as a guide. Method: GenARM (arXiv 2410.08193), section 3.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from actors.training.data import Pair, read_pairs
from actors.training.run import RunSettings
from actors.training.verdict import judge
from cluster.errors import InvalidConfiguration
from deploy.cli import calibrate
from deploy.cli.options.calibrate import VALIDATION_PROMPTS
from deploy.cli.options.train import COMMAND, MIN_STEPS, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.training.run import (
    Job,
    UselessGuide,
    adapter_rank,
    count_layers,
    describe_adapter,
    describe_data,
    locate,
    response_encoder,
    shared_settings,
)
from deploy.jobs.training.run import run as train

KEPT_SHARE = 0.2
"""Of the base's layers, those that a guide without a model of its own is made of."""

HOW_TO_SERVE = """To serve it, add an application to a copy of deploy.yaml:

  - name: trimtab-guide-{name}
    route_prefix: null
    import_path: deploy.applications:guide
    args:
      model: {output}
      base: {base}
      resources: {{cpus: 0.25}}

and to the user_config of Gateway and Coordinator the guide's name, and a profile:

          guides: [{name}]
          profiles:
            {name}: {{{name}: {weight:g}}}"""


def _first_layers(options: Options, base: str | None) -> tuple[int, ...] | None:
    """The layers of the base that a guide without a model of its own has.

    Under a base they need no healing: what they lack as a language model the base has.

    Raises:
        InvalidConfiguration: there is neither a model nor a base, both, or the base has too few layers.
    """
    if options.model:
        if options.keep is not None:
            raise InvalidConfiguration("--keep: is for the base's own layers; leave it or --model out")
        return None
    if base is None:
        raise InvalidConfiguration(
            "--model: name what to train, or a --base whose first layers are to become the guide"
        )
    num_layers = count_layers(base)
    keep = max(1, round(num_layers * KEPT_SHARE)) if options.keep is None else options.keep
    if not 1 <= keep <= num_layers:
        raise InvalidConfiguration(f"--keep: {keep} layers cannot be kept; the base has {num_layers}")
    return tuple(range(keep))


def _kl(options: Options) -> float:
    """What KL costs.

    Raises:
        InvalidConfiguration: it is below 0, or there is no base.
    """
    if options.kl is None:
        return 0.5 if options.base else 0.0
    if not options.base:
        raise InvalidConfiguration("--kl: is the distance from a --base; name one, or leave it out")
    if not (math.isfinite(options.kl) and options.kl >= 0):
        raise InvalidConfiguration(f"--kl: {options.kl} is not 0 or more")
    return options.kl


def settings_from(
    model: str, options: Options, num_pairs: int, *, base: str | None, layers: tuple[int, ...] | None
) -> RunSettings:
    """Return the run's settings.

    Raises:
        InvalidConfiguration: options that cannot work, alone or together.
    """
    objective: Literal["arm", "guided", "dpo"] = "guided" if options.base else options.loss
    beta = {"arm": 0.05, "dpo": 0.1, "guided": 0.1}[objective] if options.beta is None else options.beta
    if beta <= 0:
        raise InvalidConfiguration(f"--beta: {beta} is not above 0")
    if options.map_rank is not None and not options.base:
        raise InvalidConfiguration("--map-rank: belongs to --base; name one, or leave it out")
    if options.map_rank is not None and options.map_rank < 1:
        raise InvalidConfiguration(f"--map-rank: {options.map_rank} is less than 1")
    if options.base and options.loss == "dpo":
        raise InvalidConfiguration("--base is for guides; --loss dpo trains --model itself, so leave one of them out")
    if objective != "arm" and (options.margin or options.length_normalised):
        raise InvalidConfiguration("--margin and --length-normalised belong to --loss arm without --base")
    # Under a base the layers stay as they are, unless an adapter or all weights are asked for.
    map_only = bool(options.base) and options.lora_rank is None and not options.full
    if map_only and options.lora_alpha is not None:
        raise InvalidConfiguration("--lora-alpha: with --base there is an adapter only with --lora-rank; give that too")
    rank = 0 if map_only else adapter_rank(options, 8, options.lora_alpha)
    return RunSettings(
        objective=objective,
        base=base,
        kl=_kl(options),
        map_rank=8 if options.map_rank is None else options.map_rank,
        map_only=map_only,
        layers=layers,
        beta=beta,
        margin=options.margin,
        length_normalised=options.length_normalised,
        lora_rank=rank,
        lora_alpha=2 * rank if options.lora_alpha is None else options.lora_alpha,
        eval_every=options.eval_every,
        patience=options.patience,
        **shared_settings(
            model,
            options,
            num_pairs,
            default_rate=4e-3 if map_only else 5e-6 if options.full else 5e-4,
            min_steps=MIN_STEPS,
        ),
    )


def split_by_prompt(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on and those kept back: about `share` of the prompts, none of which is trained on.

    A prompt's own digest decides, so that every data set and every run with this share and seed keeps back the same.

    Raises:
        InvalidConfiguration: the share is outside [0, 1), or leaves nothing to train on.
    """
    if not 0 <= share < 1:
        raise InvalidConfiguration(f"--validation-share: {share} is not from 0 up to 1")
    training: list[Pair] = []
    kept_back: list[Pair] = []
    for pair in pairs:
        digest = hashlib.sha256(f"{seed}:{json.dumps(pair.prompt)}".encode()).digest()
        is_kept_back = int.from_bytes(digest[:8]) < share * 2**64
        (kept_back if is_kept_back else training).append(pair)
    if not training:
        raise InvalidConfiguration(f"--validation-share: {share} leaves none of the {len(pairs)} pairs to train on")
    return training, kept_back


def write_prompts(path: Path, pairs: Sequence[Pair]) -> None:
    """Write the pairs' prompts, each once, as `trimtab prefer` and `trimtab evaluate` read them."""
    prompts = {json.dumps({"prompt" if isinstance(pair.prompt, str) else "messages": pair.prompt}) for pair in pairs}
    path.write_text("".join(f"{prompt}\n" for prompt in sorted(prompts)))


def prepare(options: Options) -> tuple[Job, list[Pair]]:
    """Read and encode the data, and return it with the pairs kept back; loads a tokenizer, and no model.

    Raises:
        InvalidConfiguration: the data or an option cannot be used.
    """
    options.check_numbers()
    base = locate(options.base, option="--base") if options.base else None
    layers = _first_layers(options, base)
    model = locate(options.model) if options.model else base
    assert model is not None
    pairs = read_pairs(
        options.data, objective=options.objective, skip_bad_rows=options.skip_bad_rows, split=options.split
    )
    training, validation = split_by_prompt(pairs.pairs, options.validation_share, options.seed)
    encoder = response_encoder(model, options, base=base)
    examples = encoder.pairs(training)
    kept_back = encoder.pairs(validation)
    data = [*describe_data(pairs, encoder.report), f"{len(kept_back)} of the examples kept back for validation"]
    if not examples:
        raise InvalidConfiguration(f"--data: no pair is left to train on: {'; '.join(data)}")
    settings = settings_from(model, options, len(examples), base=base, layers=layers)
    job = Job(
        settings=settings,
        examples=examples,
        validation=kept_back,
        data=[*data, *describe_adapter(settings)],
        digest=pairs.digest,
    )
    return job, validation


def run(options: Options) -> None:
    """Train, and say what came of it and how to serve it.

    Raises:
        InvalidConfiguration: the run cannot start.
        TrainingFailed: a worker died or raised.
        UselessGuide: it is trained, and nobody should serve it.
    """
    job, kept_back = prepare(options)
    figures = train(job, options)
    output, base = options.output.resolve(), job.settings.base
    write_prompts(output / VALIDATION_PROMPTS, kept_back)
    for name, value in figures.items():
        print(f"{name} on validation pairs: {value:.4f}")
    verdict = judge(
        num_pairs=len(job.validation), accuracy=figures.get("accuracy", 0.0), margin=figures.get("margin", 0.0)
    )
    print(f"{output}: " + "\n".join(verdict.lines))
    if not verdict.is_useful:
        raise UselessGuide(f"{output} is written, and should not be served")
    if options.loss == "dpo":
        return
    weight = _calibrate(options, base, job.settings.dtype) if base and kept_back else None
    if not base:
        print(f"Which weight it bears: trimtab calibrate --guide {output} --base <the base>")
    print(
        HOW_TO_SERVE.format(
            name=guide_name(output), output=output, base=base or "<the base of the service>", weight=weight or 1.0
        )
    )


def _calibrate(options: Options, base: str, dtype: str) -> float:
    """Find the weight of the guide that was just trained under its base, say what was found, and return it."""
    output = options.output.resolve()
    print("looking for the weight that it bears", file=sys.stderr, flush=True)
    settings = calibrate.Settings(
        guide=output,
        base=base,
        prompts=output / VALIDATION_PROMPTS,
        weights=calibrate.weights_for(output),
        reward=options.reward,
        dtype=dtype,
        device="cuda" if options.gpus_per_worker else "cpu",
    )
    found = calibrate.calibrate(settings)
    print("\n".join(calibrate.section(found)[2:-2]))
    if not found.is_sound:
        raise UselessGuide(f"{output} is written, but bears none of the weights that were tried; train it for less")
    return found.weight


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status.

    0: trained; 1: training stopped on the way, or the guide is of no use; 2: nothing was started.
    """
    return COMMAND.main(arguments)


def guide_name(output: Path) -> str:
    """Return a name for the guide that deploy.yaml takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", output.resolve().name).lstrip("._-")[:64] or "guide"


if __name__ == "__main__":
    sys.exit(old_way("train"))
