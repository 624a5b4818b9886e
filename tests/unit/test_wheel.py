"""A wheel that is built from the tree works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from actors.settings import CHECKOUT

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is unpacked: built from what git has, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=60)
    for name in listed.stdout.splitlines():
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, target, follow_symlinks=False)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "tree")]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (wheel,) = folder.glob("*.whl")
    unpack = [*PIP, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(unpack, check=True, capture_output=True, timeout=240)
    return folder / "site"


def trimtab(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an empty folder, and with a home of its own."""
    (folder / "empty").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(installed / "bin" / "trimtab"), *words],
        cwd=folder / "empty",
        env={**os.environ, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_wheel_holds_all_that_is_read(installed: Path) -> None:
    for name in ("deploy/files", "deploy/guides"):
        for file in (CHECKOUT / name).rglob("*"):
            assert (installed / file.relative_to(CHECKOUT)).exists(), file
    default = installed / "deploy" / "files" / "default.yaml"
    assert not default.is_symlink()
    assert yaml.safe_load(default.read_text()) == yaml.safe_load((CHECKOUT / "deploy.yaml").read_text())
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {file.name for file in (installed / "bin").iterdir()} == set(scripts)


def test_in_an_empty_folder_the_default_service_is_checked(installed: Path, tmp_path: Path) -> None:
    missing = trimtab(installed, tmp_path, "check")
    assert missing.returncode == 1, missing.stderr
    told = f"no model at {tmp_path}/trimtab/models/smollm2-135m-instruct (no config.json there); run `trimtab models`"
    assert told in missing.stderr
    assert f"trimtab check: {installed}/deploy/files/default.yaml: trimtab-base.args.model: " in missing.stderr


def test_models_in_the_users_cache_are_found(installed: Path, tmp_path: Path) -> None:
    if not (CHECKOUT / "models" / "positivity" / "config.json").is_file():
        pytest.skip("needs `make models`")
    (tmp_path / "trimtab").mkdir()
    (tmp_path / "trimtab" / "models").symlink_to(CHECKOUT / "models")
    made = trimtab(installed, tmp_path, "models")
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("is there already") == 3
    fine = trimtab(installed, tmp_path, "check")
    assert fine.returncode == 0, fine.stderr
    assert ": fine" in fine.stdout
    assert list((tmp_path / "empty").iterdir()) == []
