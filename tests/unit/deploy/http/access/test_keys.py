"""API keys: made once, kept as hashes, found again, and read anew when their file changes."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from actors.settings import SecuritySettings
from cluster.errors import InvalidConfiguration
from deploy.cli import keys
from deploy.http.access.keys import KEYS_VARIABLE, Key, KeyRing, digest, new_key, parse_keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_new_key_is_printed_once_and_kept_as_a_hash_that_others_cannot_read(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["new", "--name", "alice", "--file", str(file), "--max-sequences", "8", "--tokens-per-minute", "10000"]
    keys.main(command)
    secret = capsys.readouterr().out.strip()
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = KeyRing.of_file(file).find(secret)
    assert found == Key(name="alice", sha256=digest(secret), max_sequences=8, tokens_per_minute=10000)
    keys.main(["list", "--file", str(file)])
    assert capsys.readouterr().out == "alice: 8 sequences, 10000 tokens a minute\n"
    keys.main(["revoke", "--name", "alice", "--file", str(file)])
    assert KeyRing.of_file(file).find(secret) is None


def test_impossible_commands_are_refused_and_change_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.add(file, "alice")
    before = file.read_text()
    for command, told in (
        (["new", "--name", "alice"], "there is a key 'alice' already"),
        (["revoke", "--name", "bob"], "there is no key 'bob'"),
        (
            ["new", "--name", "bob", "--max-sequences", "0"],
            "--max-sequences: Input should be greater than or equal to 1",
        ),
        (["new", "--name", "b o b"], "--name: String should match"),
        (["list", "--nmae", "bob"], "No such option: --nmae"),
    ):
        assert keys.main([*command, "--file", str(file)]) == 2
        assert capsys.readouterr().err.startswith(f"trimtab keys {command[0]}: {told}")
    assert keys.main(["list", "--file", str(file.with_name("no.yaml"))]) == 2
    assert "no.yaml; `trimtab keys new` makes it" in capsys.readouterr().err
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_only_a_whole_key_is_found(file: Path) -> None:
    secret, other = keys.add(file, "alice"), keys.add(file, "bob")
    ring = KeyRing.of_file(file)
    assert [ring.find(shown).name for shown in (secret, other) if ring.find(shown)] == ["alice", "bob"]  # type: ignore[union-attr]
    for shown in ("", secret[:-1], f"{secret}x", digest(secret), new_key(), "ü" * 50, "x" * 10_000):
        assert ring.find(shown) is None


def test_a_changed_file_is_taken_within_a_second_and_a_broken_one_is_not(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    first = keys.add(file, "alice")
    ring = KeyRing.of_file(file, clock)
    second = keys.add(file, "bob")
    assert ring.find(second) is None
    clock.now += 1.1
    assert ring.find(second) is not None

    file.write_text(f"keys: [{{name: alice, sha256: {first}}}]")
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            clock.now += 1.1
            assert ring.find(second) is not None
    assert len(caplog.records) == 1
    assert "keys.0.sha256" in caplog.text
    assert first not in caplog.text

    file.unlink()
    clock.now += 1.1
    assert ring.find(second) is not None
    keys.add(file, "carol")
    clock.now += 1.1
    assert ring.find(second) is None


def test_keys_come_from_a_file_or_from_the_environment_but_not_from_both(file: Path) -> None:
    secret = keys.add(file, "alice")
    as_json = json.dumps({"keys": [{"name": "env", "sha256": digest(secret)}]})
    assert KeyRing.load(SecuritySettings(), {}) is None
    from_file = KeyRing.load(SecuritySettings(keys_file=str(file)), {})
    from_environment = KeyRing.load(SecuritySettings(), {KEYS_VARIABLE: as_json})
    assert from_file is not None
    assert from_environment is not None
    assert from_file.find(secret).name == "alice"  # type: ignore[union-attr]
    assert from_environment.find(secret).name == "env"  # type: ignore[union-attr]
    with pytest.raises(InvalidConfiguration, match="use one of them"):
        KeyRing.load(SecuritySettings(keys_file=str(file)), {KEYS_VARIABLE: as_json})
    with pytest.raises(InvalidConfiguration, match=r"keys_file: /nowhere/keys.yaml cannot be read: No such file"):
        KeyRing.load(SecuritySettings(keys_file="/nowhere/keys.yaml"), os.environ)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file"),
        ("keys: {", "not YAML in line 1"),
        ("[" * 100_000, "nested too deeply|not YAML"),
        ("keys: [{name: alice}]", "keys.0.sha256: Field required"),
        ("keys: [{name: alice, sha256: hunter2}]", "keys.0.sha256: String should match"),
        (f"keys: [{{name: alice, sha256: {digest('a')}, key: hunter2}}]", "keys.0.key: Extra"),
        (f"keys: [{{name: a, sha256: {digest('a')}}}, {{name: a, sha256: {digest('b')}}}]", "the same name"),
        (f"keys: [{{name: a, sha256: {digest('a')}}}, {{name: b, sha256: {digest('a')}}}]", "the same sha256"),
        ("keys: !!python/object/apply:os.system [hunter2]", "not YAML in line 1"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_without_quoting_it(text: str, says: str) -> None:
    with pytest.raises(InvalidConfiguration, match=says) as caught:
        parse_keys(text, "keys.yaml")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__
