"""Finds the weight that a guide bears: `trimtab calibrate --guide DIR --base DIR`.

Answers kept-back prompts at several weights, on Ray workers and without a service, and writes what it finds into the
guide's directory: `calibration.json`, a picture, and a section of its card. `trimtab train` ends with it.
"""

import functools
import hashlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from actors.calibration import FILE, Calibration, Point
from actors.engine.models.loading import load_whole
from actors.prompts import Prompt, PromptEncoder
from actors.settings import locate_model
from actors.training.calibration import (
    WEIGHTS_ALONE,
    WEIGHTS_UNDER_BASE,
    Observed,
    observe,
    recommend,
    summarise,
)
from actors.training.card import replace_section
from actors.training.derive import check_can_scale, scale_guide
from actors.training.rewards import Reward, load_reward, score
from actors.training.run import SETTINGS
from actors.vocabularies import end_tokens, load_tokenizer
from cluster.errors import InvalidConfiguration, InvalidRequest
from deploy.cli.options.calibrate import COMMAND, MAX_TOKENS, NUM_ANSWERS, VALIDATION_PROMPTS, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.outcome import BadOutcome
from deploy.jobs.prefer.answers import Asked, read_prompts
from deploy.jobs.progress import busy
from deploy.jobs.training.run import choose_dtype

PICTURE = "calibration.png"
SECTION = "## Weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is to be calibrated, and how."""

    guide: Path
    base: str
    """Directory or hub id."""

    prompts: Path
    weights: tuple[float, ...]
    reward: str | None = None
    num_answers: int = NUM_ANSWERS
    """At each weight."""

    max_tokens: int = MAX_TOKENS
    temperature: float = 0.7
    top_p: float = 0.9
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    has_to_scale: bool = False
    """Multiply the guide's logits so that the recommended weight becomes 1."""


def calibrate(settings: Settings) -> Calibration:
    """Answer the prompts on the Ray cluster that this process is connected to, and write down what was found.

    Raises:
        InvalidConfiguration: prompts, reward or models cannot be used.
        RayError: a worker died.
    """
    if settings.has_to_scale:
        check_can_scale(settings.guide)
    reward = load_reward(settings.reward) if settings.reward else None
    asked = choose_prompts(read_prompts(settings.prompts), settings.num_answers)
    num_workers = max(1, min(len(asked), int(ray.cluster_resources().get("CPU", 1))))
    shares = [asked[start::num_workers] for start in range(num_workers)]
    work = ray.remote(num_cpus=1, num_gpus=1 if settings.device == "cuda" else 0, max_calls=1)(_observe)
    with busy(f"answering {len(asked)} prompts at {1 + len(settings.weights)} weights"):
        found = ray.get([work.remote(settings, share) for share in shares])
    observed = [
        replace(answer, prompt=start + num_workers * answer.prompt)
        for start, of_worker in enumerate(found)
        for answer in of_worker
    ]
    points = summarise(observed, None if reward is None else functools.partial(_score, reward, asked))
    weight, is_sound = recommend(points)
    if settings.has_to_scale and is_sound:
        scale_guide(settings.guide, weight)
        points = [point.model_copy(update={"weight": point.weight / weight}) for point in points]
        weight = 1.0
    calibration = Calibration(
        base=Path(settings.base).name,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        reward=settings.reward,
        weight=weight,
        is_sound=is_sound,
        points=points,
    )
    _write(settings.guide, calibration)
    return calibration


def choose_prompts(prompts: Sequence[Asked], num_answers: int) -> list[Asked]:
    """Return `num_answers` of the prompts, chosen by their digests; several times each where there are fewer."""
    ordered = sorted(prompts, key=lambda asked: hashlib.sha256(json.dumps(asked.content).encode()).digest())
    return list(itertools.islice(itertools.cycle(ordered), num_answers))


def _score(reward: Reward, asked: Sequence[Asked], answer: Observed) -> float:
    prompt = asked[answer.prompt]
    content = prompt.content.get("messages") or prompt.content["prompt"]
    return score(reward, content, [answer.text], number=prompt.number)[0]


def _observe(settings: Settings, asked: Sequence[Asked]) -> list[Observed]:
    """One worker's part."""
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    tokenizer = load_tokenizer(settings.base)
    base, guide = (
        load_whole(model, dtype=dtype, attn_implementation="eager").eval()
        for model in (settings.base, str(settings.guide))
    )
    encoder = PromptEncoder(tokenizer)
    prompts = []
    for each in asked:
        try:
            prompts.append(encoder.encode(Prompt(each.content.get("prompt"), each.content.get("messages"))))
        except InvalidRequest as error:
            raise InvalidConfiguration(f"--prompts: line {each.number}: {error}") from error
    return observe(
        base,
        guide,
        tokenizer,
        prompts,
        (0.0, *settings.weights),
        end_tokens=end_tokens(settings.base, tokenizer),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed + asked[0].number,
    )


def _write(guide: Path, calibration: Calibration) -> None:
    partial = guide / f"{FILE}.partial"
    partial.write_text(calibration.model_dump_json(indent=1) + "\n")
    partial.replace(guide / FILE)
    draw(calibration, guide / PICTURE)
    card = guide / "README.md"
    if card.is_file():
        card.write_text(replace_section(card.read_text(), SECTION, "\n".join(section(calibration))))


def section(calibration: Calibration) -> list[str]:
    """Return the card's lines on weights."""
    verdict = (
        f"**Recommended: {calibration.weight:g}**"
        if calibration.is_sound
        else f"**None is sound**: at every weight fewer answers end, or they vary less, than the base's. "
        f"{calibration.weight:g} does the least harm"
    )
    return [
        SECTION,
        "",
        f"{verdict} (under {calibration.base}; {calibration.points[0].num_answers} answers at each weight, at most "
        f"{calibration.max_tokens} tokens, temperature {calibration.temperature:g}, top_p {calibration.top_p:g}).",
        "",
        *table(calibration.points),
        "",
        f"![What the weight does]({PICTURE})",
    ]


def table(points: Sequence[Point]) -> list[str]:
    """Return the points as lines of a Markdown table."""
    has_reward = points[0].reward is not None
    header = [
        "weight",
        *(["reward"] if has_reward else []),
        "KL / token",
        "ended",
        "distinct-2",
        "longest repeat",
        "tokens",
    ]
    lines = [header, ["---"] * len(header)]
    for point in points:
        lines.append(
            [
                f"{point.weight:g}",
                *([f"{point.reward:.3f}"] if point.reward is not None else []),
                f"{point.divergence:.3f}",
                f"{point.ended:.0%}",
                f"{point.distinct_2:.3f}",
                str(point.longest_repeat),
                f"{point.num_tokens:.0f}",
            ]
        )
    return [f"| {' | '.join(line)} |" for line in lines]


def draw(calibration: Calibration, path: Path) -> None:
    """Draw what the weight does to an answer, each measure in a panel of its own; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    panels: dict[str, Callable[[Point], float | None]] = {
        "reward": lambda point: point.reward,
        "KL / token (nats)": lambda point: point.divergence,
        "ended": lambda point: point.ended,
        "distinct-2 in an answer": lambda point: point.distinct_2,
    }
    if calibration.reward is None:
        del panels["reward"]
    figure: Any = Figure(figsize=(3.2 * len(panels), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.plot([point.weight for point in calibration.points], [value(p) for p in calibration.points], "o-")
        axes.axvline(calibration.weight, color="0.6", linestyle=":")
        axes.set_xlabel("weight")
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def weights_for(guide: Path) -> tuple[float, ...]:
    """Return the weights to look at: those around 1 for a guide that was trained under its base."""
    try:
        settings = json.loads((guide / SETTINGS).read_text())
    except (OSError, ValueError):
        return WEIGHTS_ALONE
    return WEIGHTS_UNDER_BASE if settings.get("objective") == "guided" else WEIGHTS_ALONE


def settings_from(options: Options) -> Settings:
    """Return what the command line asks for.

    Raises:
        InvalidConfiguration: a model or a file cannot be used.
    """
    try:
        guide = Path(locate_model(str(options.guide.resolve())))
        base = locate_model(str(Path(options.base).resolve()) if Path(options.base).exists() else options.base)
    except ValueError as error:
        raise InvalidConfiguration(str(error)) from error
    prompts = options.prompts or guide / VALIDATION_PROMPTS
    if not prompts.is_file():
        raise InvalidConfiguration(f"--prompts: there is no file {prompts}; name one with messages or prompt on a line")
    return Settings(
        guide=guide,
        base=base,
        prompts=prompts,
        weights=options.chosen_weights or weights_for(guide),
        reward=options.reward,
        num_answers=options.answers,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        dtype=choose_dtype(options.dtype, on_gpu=False),
        seed=options.seed,
        has_to_scale=options.scale,
    )


def run(options: Options) -> None:
    """Calibrate the guide, and say what was found.

    Raises:
        BadOutcome: no weight can be recommended.
        InvalidConfiguration: it cannot be started.
        RayError: a worker died.
    """
    settings = settings_from(options)
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    started_at = time.monotonic()
    calibration = calibrate(settings)
    print("\n".join(section(calibration)[2:-2]))
    print(f"{settings.guide / FILE} is written ({time.monotonic() - started_at:.0f} s)")
    if not calibration.is_sound:
        raise BadOutcome("no weight that was looked at leaves the answers sound; try smaller ones with --weights")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if no weight can be recommended, 2 if nothing was started."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("calibrate"))
