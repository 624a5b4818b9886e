"""Whether an evaluation.yaml can be carried out: every name, file and size in it, before any model loads."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from actors.settings import CHECKOUT, locate_model
from actors.training.rewards import Reward, load_reward
from actors.training.soup import check_average, count_parameters
from cluster.errors import InvalidConfiguration
from deploy.jobs.evaluation.plan import AlignmentTable, Plan, slug
from deploy.jobs.evaluation.service import LOCAL, service_config
from deploy.service.check import check, validate


def load_plan(path: Path) -> Plan:
    """Read an evaluation.yaml and check all that can be checked without loading a model.

    Raises:
        InvalidConfiguration: what cannot work, each with its path in the file.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InvalidConfiguration(f"not YAML: {error}") from error
    plan = validate("", Plan, content)
    complaints = [*_check_rows(plan), *_check_tables(plan), *_check_fronts(plan), *_check_files(plan)]
    if complaints:
        raise InvalidConfiguration("\n".join(complaints))
    return plan


def load_rewards(plan: Plan) -> dict[str, Reward]:
    """Import the plan's rewards.

    Raises:
        InvalidConfiguration: one cannot be imported.
    """
    rewards = {}
    for name, function in plan.rewards.items():
        try:
            rewards[name] = load_reward(function)
        except InvalidConfiguration as error:
            raise InvalidConfiguration(f"rewards.{name}: {error}") from error
    return rewards


def _check_known(path: str, what: str, name: str | None, known: Mapping[str, Any]) -> Iterator[str]:
    if name is not None and name not in known:
        yield f"{path}: no such {what}{'' if path.endswith(f'.{name}') else f' {name!r}'}; {what}s are {_listed(known)}"


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"


def _check_rows(plan: Plan) -> Iterator[str]:
    files: dict[str, str] = {}
    for name, row in plan.rows.items():
        path = f"rows.{name}"
        if not slug(name):
            yield f"{path}: a row's name needs a letter or a digit"
        elif files.setdefault(slug(name), name) != name:
            yield f"{path}: its answers would go to the file of {files[slug(name)]!r}; give it another name"
        for guide in row.weights or {}:
            yield from _check_known(f"{path}.weights.{guide}", "guide", guide, plan.guides)
        yield from _check_known(f"{path}.model", "model", row.model, plan.models)
        yield from _check_known(f"{path}.reward", "reward", row.reward, plan.rewards)
        yield from _check_known(f"{path}.from", "row", row.source, plan.rows)
        if row.best_of is not None and row.source in plan.rows:
            yield from _check_best_of(plan, path, row.best_of, row.source)


def _check_best_of(plan: Plan, path: str, best_of: int, source: str) -> Iterator[str]:
    if plan.rows[source].best_of is not None:
        yield f"{path}.from: {source!r} is itself a best_of; name the row that was written"
    elif plan.num_samples_of(source) % best_of:
        yield (
            f"{path}.best_of: {best_of} does not divide the {plan.num_samples_of(source)} answers to a prompt of "
            f"{source!r}; set rows.{source}.num_samples to a multiple"
        )


def _check_tables(plan: Plan) -> Iterator[str]:
    for name, table in (("alignment", plan.tables.alignment), ("recovery", plan.tables.recovery)):
        if table is None:
            continue
        path = f"tables.{name}"
        yield from _check_known(f"{path}.reward", "reward", table.reward, plan.rewards)
        for number, row in enumerate(table.rows):
            yield from _check_known(f"{path}.rows[{number}]", "row", row, plan.rows)
        if isinstance(table, AlignmentTable):
            yield from _check_known(f"{path}.against", "row", table.against, plan.rows)
        else:
            yield from _check_known(f"{path}.from", "row", table.source, plan.rows)
            yield from _check_known(f"{path}.to", "row", table.target, plan.rows)


def _check_fronts(plan: Plan) -> Iterator[str]:
    for name, front in plan.fronts.items():
        path = f"fronts.{name}"
        yield from _check_known(f"{path}.x", "reward", front.x, plan.rewards)
        yield from _check_known(f"{path}.y", "reward", front.y, plan.rewards)
        for curve, rows in front.curves.items():
            for number, row in enumerate(rows):
                yield from _check_known(f"{path}.curves.{curve}[{number}]", "row", row, plan.rows)
        for number, curve in enumerate(front.compare or ()):
            yield from _check_known(f"{path}.compare[{number}]", "curve", curve, front.curves)


def _check_files(plan: Plan) -> Iterator[str]:
    """Check that every model is there whole, and that averages are possible."""
    wanted = {"base": {plan.base: 1.0}, **{f"guides.{name}": {path: 1.0} for name, path in plan.guides.items()}}
    wanted |= {f"models.{name}": dict(model.average) for name, model in plan.models.items()}
    for path, parts in wanted.items():
        try:
            directories = {_find_model(directory): weight for directory, weight in parts.items()}
            if len(directories) < len(parts):
                raise InvalidConfiguration(f"{list(parts)} name one directory twice; name each once")
            check_average(directories)
            count_parameters(next(iter(directories)))
        except (ValueError, InvalidConfiguration) as error:
            yield f"{path}: {error}"


def _find_model(directory: str) -> Path:
    path = Path(locate_model(directory))
    if not path.is_absolute():
        # Elsewhere this would be a hub id; here the files' sizes and times tell whether answers are still good.
        raise ValueError(f"there is no directory {CHECKOUT / path}; make it first, or correct the path")
    return path


def check_models(plan: Plan, rows: Sequence[str]) -> None:
    """Check that the models of these rows can be read, have enough context, and share the base's vocabulary.

    Raises:
        InvalidConfiguration: one cannot write, guide, or be scored under the base.
    """
    guides = {guide: plan.guide_path(guide) for row in rows for guide in plan.guides_of(row)}
    check({**LOCAL, **service_config(plan, plan.base_path, guides)})
    for row in rows:
        model = plan.rows[row].model
        if model is None:
            continue
        try:
            # It writes alone, but its tokens are scored under the base: what is asked of a guide.
            check({**LOCAL, **service_config(plan, plan.base_path, {"writer": next(iter(plan.parts_of(row)))})})
        except InvalidConfiguration as error:
            raise InvalidConfiguration(f"models.{model}: {error}") from error
