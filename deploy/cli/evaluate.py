"""Evaluates ways of writing: `trimtab evaluate evaluation.yaml --output results/evaluation`.

Serves the plan's models, has every row's answers to held-out prompts written through the service, and reports what each
way of writing gains and costs. What a plan may hold is in `deploy.jobs.evaluation.plan`.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.training.soup import average_models
from cluster.errors import InvalidConfiguration
from deploy.cli.options.evaluate import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.client import AsyncClient
from deploy.jobs.evaluation.answers import KeptAnswers
from deploy.jobs.evaluation.checks import check_models, load_plan, load_rewards
from deploy.jobs.evaluation.pictures import require_matplotlib
from deploy.jobs.evaluation.plan import Plan, slug
from deploy.jobs.evaluation.prompts import read_prompts
from deploy.jobs.evaluation.report import write_report
from deploy.jobs.evaluation.scoring import Scorer
from deploy.jobs.evaluation.service import Cluster, cluster, service_config
from deploy.jobs.evaluation.tables import build
from deploy.jobs.progress import busy

Kept = Mapping[str, KeptAnswers]


def run(options: Options) -> None:
    """Write the answers that are missing, then the report, and say where it is.

    Raises:
        InvalidConfiguration: the plan cannot be carried out; nothing was loaded.
        TrimtabError: answers could not be written; those that could are kept.
        OSError: a file cannot be read or written.
    """
    plan = load_plan(options.plan)
    prompts = read_prompts(plan)
    rewards = load_rewards(plan)
    require_matplotlib()
    selected = _select(plan, options.only)
    check_models(plan, selected)
    answers = options.output / "answers"
    answers.mkdir(parents=True, exist_ok=True)
    kept = {row: KeptAnswers(answers, plan, row, prompts) for row in plan.rows if plan.written_by(row) == row}
    missing = [row for row in selected if kept[row].read() is None]
    if missing and not options.report:
        with cluster() as ray_cluster:
            _write_rows(plan, ray_cluster, {row: kept[row] for row in missing}, options.output)
    with busy("scoring"):
        scored = Scorer(plan, prompts, rewards).score(kept)
    print(write_report(plan, len(prompts), build(plan, prompts, scored), options.output))


def _select(plan: Plan, only: Sequence[str] | None) -> list[str]:
    """Return the rows to write, each once: those that others pick from instead of the others."""
    for row in only or ():
        if row not in plan.rows:
            raise InvalidConfiguration(f"--only: no such row {row!r}; rows are {', '.join(plan.rows)}")
    return list(dict.fromkeys(plan.written_by(row) for row in only or plan.rows))


def _write_rows(plan: Plan, ray_cluster: Cluster, kept: Kept, folder: Path) -> None:
    """Have rows written, the base's first, then those of each model that takes its place."""
    by_model: dict[str | None, list[str]] = {None: []}
    for row in kept:
        by_model.setdefault(plan.rows[row].model, []).append(row)
    for model, rows in by_model.items():
        if not rows:
            continue
        guides = {guide: plan.guide_path(guide) for row in rows for guide in plan.guides_of(row)}
        with _directory(plan, rows[0], folder) as directory:
            print(f"loading {model or 'the base'}, guides: {', '.join(guides) or 'none'}", file=sys.stderr, flush=True)
            with busy("loading"):
                ray_cluster.deploy(service_config(plan, directory, guides))
            for row in rows:
                kept[row].write(AsyncClient().generate)


@contextmanager
def _directory(plan: Plan, row: str, folder: Path) -> Iterator[Path]:
    """Where the model that writes a row lies; an average is made there, and removed in the end."""
    parts = plan.parts_of(row)
    if len(parts) == 1:
        yield next(iter(parts))
        return
    # A name of its own: Serve takes another path for another model, and the same one for no change.
    target = folder.resolve() / ".averaged" / slug(row)
    shutil.rmtree(target.parent, ignore_errors=True)  # of a run that was killed
    try:
        average_models(parts, target)
        yield target
    finally:
        shutil.rmtree(target.parent, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, or 2 if there is no report."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("evaluate"))
