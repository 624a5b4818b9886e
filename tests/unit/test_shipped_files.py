"""The files at the root are what their readers expect."""

import re
import tomllib

import pytest
import yaml

from actors.settings import CHECKOUT
from deploy.jobs.evaluation.plan import Plan


def test_every_package_is_listed() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(init.parent.relative_to(CHECKOUT).parts)
        for top in ("actors", "cluster", "deploy")
        for init in (CHECKOUT / top).rglob("__init__.py")
    }
    assert listed == found


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (CHECKOUT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [
        *project["dependencies"],
        *(item for group in project["optional-dependencies"].values() for item in group),
    ]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[><=;]", item)[0]).lower() for item in wanted}
    # torch's builds for GPUs demand a version of Triton each, which constraints.txt must not contradict.
    assert names - {"triton"} <= pinned


@pytest.mark.parametrize("pattern", ["models/", "results/", ".venv/"])
def test_ignored_folders_are_anchored(pattern: str) -> None:
    # Ray leaves out of `working_dir` what .gitignore names: an unanchored `models/` would drop code of that name.
    lines = (CHECKOUT / ".gitignore").read_text().splitlines()
    assert f"/{pattern}" in lines
    assert pattern not in lines


@pytest.mark.parametrize("name", ["README.md", "docs/evidence.md", "docs/architecture.md", "CHANGELOG.md"])
def test_no_text_has_a_hole_to_fill(name: str) -> None:
    text = (CHECKOUT / name).read_text()
    assert re.findall(r"@[A-Z]+@|^(?:RESULTS|COMMANDS|TODO)\b", text, re.MULTILINE) == []


def test_the_shipped_evaluation_is_a_plan_over_the_shipped_guides_and_prompts() -> None:
    plan = Plan.model_validate(yaml.safe_load((CHECKOUT / "deploy" / "files" / "evaluation.yaml").read_text()))
    service = yaml.safe_load((CHECKOUT / "deploy.yaml").read_text())
    guides = service["applications"][-1]["deployments"][0]["user_config"]["guides"]
    assert plan.prompts_path.is_file()
    assert {name: plan.guides[name] for name in guides} == {name: f"models/{name}" for name in guides}
