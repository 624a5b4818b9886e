"""Makes, lists and revokes the API keys in a file: `trimtab keys new --name alice --file keys.yaml`.

A new key is printed once; the file keeps its hash (`deploy.http.access.keys`). A running service takes the file's
changes within a second or two.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from cluster.errors import InvalidConfiguration
from deploy.cli.options.keys import COMMAND, List, New, Revoke
from deploy.cli.trimtab import old_way
from deploy.http.access.keys import Key, Keys, digest, new_key, parse_keys


def read(file: Path) -> Keys:
    """Return a file's keys; none if there is no such file.

    Raises:
        InvalidConfiguration: the file holds something else.
    """
    return parse_keys(file.read_text(), str(file)) if file.exists() else Keys(keys=[])


def write(file: Path, keys: Sequence[Key]) -> None:
    """Put keys into a file, at once and for its owner's eyes only."""
    text = yaml.safe_dump({"keys": [key.model_dump(exclude_none=True) for key in keys]}, sort_keys=False)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}-", delete=False) as whole:
        try:
            whole.write(text)
            whole.close()
            os.replace(whole.name, file)
        except BaseException:
            os.unlink(whole.name)
            raise


def add(file: Path, name: str, *, max_sequences: int | None = None, tokens_per_minute: int | None = None) -> str:
    """Add a key and return it.

    Raises:
        InvalidConfiguration: the name is taken or impossible, a limit is, or the file holds something else.
    """
    keys = read(file).keys
    if name in {key.name for key in keys}:
        raise InvalidConfiguration(f"there is a key {name!r} already; revoke it first, or choose another name")
    secret = new_key()
    try:
        key = Key(name=name, sha256=digest(secret), max_sequences=max_sequences, tokens_per_minute=tokens_per_minute)
    except ValidationError as error:
        complaint = error.errors()[0]
        option = str(complaint["loc"][0]).replace("_", "-")
        raise InvalidConfiguration(f"--{option}: {complaint['msg']}, not {complaint['input']!r}") from error
    write(file, [*keys, key])
    return secret


def revoke(file: Path, name: str) -> None:
    """Take a key away.

    Raises:
        InvalidConfiguration: there is none of that name, or the file holds something else.
    """
    keys = read(file).keys
    if name not in {key.name for key in keys}:
        raise InvalidConfiguration(f"there is no key {name!r} in {file}")
    write(file, [key for key in keys if key.name != name])


def _describe(key: Key) -> str:
    limits = []
    if key.max_sequences is not None:
        limits.append(f"{key.max_sequences} sequences")
    if key.tokens_per_minute is not None:
        limits.append(f"{key.tokens_per_minute} tokens a minute")
    return f"{key.name}: {', '.join(limits) or 'no limits'}"


def run_new(options: New) -> None:
    """Make a key and print it.

    Raises:
        InvalidConfiguration: the name is taken, a limit is impossible, or the file holds something else.
    """
    limits = {"max_sequences": options.max_sequences, "tokens_per_minute": options.tokens_per_minute}
    print(add(options.file, options.name, **limits))


def run_list(options: List) -> None:
    """Print the names and limits of all keys.

    Raises:
        InvalidConfiguration: there is no such file, or it holds something else.
    """
    if not options.file.exists():
        raise InvalidConfiguration(f"--file: there is no file {options.file}; `trimtab keys new` makes it")
    for key in read(options.file).keys:
        print(_describe(key))


def run_revoke(options: Revoke) -> None:
    """Take a key away.

    Raises:
        InvalidConfiguration: there is none of that name, or the file holds something else.
    """
    revoke(options.file, options.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, or 2 with what is wrong."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("keys"))
